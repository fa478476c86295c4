-- Router weight that a verification window keeps under a budget of experts.
--
-- One row per trace and budget m = 1, 2, ... up to the most experts that a window uses, computed from the activations
-- alone: the whole curve. At most m experts per layer are loaded, those that the tokens of the window weigh most
-- together (of equal weight the lower id), and the others' part is dropped. Weights are shares of the token's own sum.
-- Windows slide over consecutive positions of one request and one phase, never across a hole or a token without
-- weights; every window weighs the same and layers are averaged with equal weight. Only traces with router weights.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param window INTEGER = 4: window length T [tokens]
-- param percent INTEGER = 90: share of the window's weight for experts_for_share [percent]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column window INTEGER: window length T [tokens]
-- column budget BIGINT: m, experts per layer that may be loaded [experts]
-- column n_windows BIGINT: windows of this length, in the layer that has most
-- column unique_experts DOUBLE: mean unique experts per window without a budget [experts]
-- column experts_for_share DOUBLE: mean of the fewest experts that carry the share of the window's weight [experts]
-- column loaded DOUBLE: mean experts loaded under the budget [experts]
-- column per_top_k DOUBLE: loaded / k [loads of a single token]
-- column weight_kept DOUBLE: share of the window's weight that the loaded experts carry [fraction]
-- column tokens_intact DOUBLE: tokens of windows all of whose experts are loaded [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
asked as (
    select
        coalesce(getvariable('window'), 4)::integer as "window",
        coalesce(getvariable('percent'), 90) / 100 as share
),
-- A token without a usable weight (NaN, negative, all 0) is in no window.
weighed as (
    select
        scope.trace,
        a.request,
        a.layer,
        a.phase as part,
        a.pos::bigint as pos,
        list(a.expert) as experts,
        list(a.weight::double) as weights,
        sum(a.weight::double) as total
    from activations as a
    join scope on a.trace = scope.trace and (scope.phase = 'all' or a.phase = scope.phase)
    group by all
    having bool_and(coalesce(a.weight >= 0 and isfinite(a.weight), false)) and total > 0
),
-- Consecutive tokens have consecutive numbers: a window is named by that of its first token.
tokens as materialized (
    select *, min(token) over island as first_token, max(token) over island as last_token
    from (
        select *, pos - row_number() over (partition by trace, request, layer, part order by pos) as run
        from (select *, row_number() over (order by trace, request, layer, part, pos) as token from weighed)
    )
    window island as (partition by trace, request, layer, part, run)
),
-- Each expert of a token in each of the token's windows.
members as materialized (
    select t.token - d.offset_in as start, t.token, t.expert, t.part_of_token
    from (
        select token, first_token, last_token, unnest(experts) as expert, unnest(weights) / total as part_of_token
        from tokens
    ) as t
    cross join (select unnest(generate_series(0, asked."window" - 1)) as offset_in, "window" from asked) as d
    where t.token - d.offset_in >= t.first_token and t.token - d.offset_in + d."window" - 1 <= t.last_token
),
ranked as materialized (
    select *, row_number() over best as rank, sum(mass) over best as carried
    from (select start, expert, sum(part_of_token) as mass from members group by start, expert)
    window best as (partition by start order by mass desc, expert)
),
by_rank as (
    select
        trace,
        layer,
        rank,
        count(*) as windows_with,
        sum(mass) as mass,
        count(*) filter (where carried - mass < asked.share * asked."window" - 1e-9) as needed
    from ranked
    join tokens on ranked.start = tokens.token
    cross join asked
    group by trace, layer, rank
),
deepest as (
    select t.trace, t.layer, d.rank, count(*) as tokens
    from (
        select start, token, max(rank) as rank
        from members
        join ranked using (start, expert)
        group by start, token
    ) as d
    join tokens as t on d.start = t.token
    group by all
),
layers as (
    select trace, layer, max(windows_with) as n_windows, sum(windows_with) as uses, sum(needed) as needed
    from by_rank
    group by trace, layer
),
budgets as (
    select trace, unnest(generate_series(1, max(rank))) as budget from by_rank group by trace
),
loads as (
    select b.trace, b.budget, r.layer, sum(r.windows_with) as loaded, sum(r.mass) as mass
    from budgets as b join by_rank as r on b.trace = r.trace and r.rank <= b.budget
    group by all
),
intacts as (
    select b.trace, b.budget, d.layer, sum(d.tokens) as tokens
    from budgets as b join deepest as d on b.trace = d.trace and d.rank <= b.budget
    group by all
)
select
    l.trace,
    scope.phase,
    asked."window",
    b.budget,
    max(l.n_windows) as n_windows,
    avg(l.uses / l.n_windows) as unique_experts,
    avg(l.needed / l.n_windows) as experts_for_share,
    avg(o.loaded / l.n_windows) as loaded,
    avg(o.loaded / l.n_windows) / scope.top_k as per_top_k,
    avg(o.mass / l.n_windows) / asked."window" as weight_kept,
    avg(coalesce(i.tokens, 0) / l.n_windows) / asked."window" as tokens_intact
from layers as l
join budgets as b on l.trace = b.trace
join loads as o on l.trace = o.trace and l.layer = o.layer and b.budget = o.budget
left join intacts as i on l.trace = i.trace and l.layer = i.layer and b.budget = i.budget
join scope on l.trace = scope.trace
cross join asked
group by l.trace, scope.phase, scope.top_k, asked."window", b.budget
order by l.trace, b.budget;
