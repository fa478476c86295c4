-- Overlap of the experts of two tokens d positions apart, against uniform and popularity.
--
-- One row per trace and lag d that fits into a request, computed from the activations alone: every use of
-- an expert looks back at the same expert's uses up to the longest lag before it, and each of those is one
-- shared expert at that distance. Both tokens lie in one request and one phase, with no hole between them;
-- layers are averaged with equal weight, and rho is a ratio of layer means.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param max_lag INTEGER = 32: longest lag d [tokens]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the pairs lie in
-- column lag INTEGER: distance d between the two tokens [tokens]
-- column n_pairs BIGINT: token pairs at this lag per layer
-- column overlap DOUBLE: mean of |E(t) and E(t+d)| / k [fraction]; null without a pair
-- column expected_uniform DOUBLE: k / N [fraction]
-- column expected_popularity DOUBLE: sum over e of p_e^2 / k, mean over layers [fraction]
-- column rho DOUBLE: (overlap - expected_popularity) / (1 - expected_popularity), the autocorrelation coefficient
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
positions as (
    select distinct scope.trace, scope.phase, a.request, a.phase as part, a.pos::bigint as pos
    from activations as a
    join scope on a.trace = scope.trace and (scope.phase = 'all' or a.phase = scope.phase)
    where a.rank = 0
),
segments as (
    select trace, phase, request, min(pos) as first_pos, max(pos) as last_pos, row_number() over () as segment
    from (
        select *, pos - row_number() over (partition by trace, request, part order by pos) as island
        from positions
    )
    group by trace, phase, request, part, island
),
uses as (
    select s.trace, s.segment, a.layer, a.expert, a.pos::bigint as pos
    from activations as a
    join segments as s on a.trace = s.trace and a.request = s.request and a.pos between s.first_pos and s.last_pos
),
lags as (
    select unnest(generate_series(1, coalesce(getvariable('max_lag'), 32)))::integer as lag
),
pairs as (
    select
        s.trace,
        s.phase,
        l.lag,
        sum(s.last_pos - s.first_pos + 1)::bigint as tokens,
        sum(greatest(0, s.last_pos - s.first_pos + 1 - l.lag))::bigint as n_pairs
    from segments as s cross join lags as l
    group by s.trace, s.phase, l.lag
    having n_pairs > 0
),
-- A window frame over the uses of one expert is linear in the length of a request; joining the uses to
-- themselves is not, and joining them once per lag took twenty times as long.
shared as (
    select trace, layer, pos - earlier as lag, count(*) as n
    from (
        select trace, layer, pos, unnest(list(pos) over recent) as earlier
        from uses
        window recent as (
            partition by segment, layer, expert
            order by pos range between (select max(lag) from lags) preceding and 1 preceding
        )
    )
    group by trace, layer, pos - earlier
),
choices as (
    select trace, layer, expert, count(*) as n from uses group by trace, layer, expert
),
-- Every layer stands here, also one in which no expert ever returns at some lag.
layers as (
    select c.trace, c.layer, p.phase, p.lag, p.n_pairs, sum(pow(c.n / p.tokens, 2)) as sum_p2
    from choices as c join pairs as p on c.trace = p.trace
    group by c.trace, c.layer, p.phase, p.lag, p.n_pairs
),
layer_means as (
    select
        l.trace,
        l.phase,
        l.lag,
        l.n_pairs,
        t.top_k / t.num_experts as uniform,
        avg(coalesce(s.n, 0) / l.n_pairs / t.top_k) as overlap,
        avg(l.sum_p2 / t.top_k) as popularity
    from layers as l
    join traces as t on l.trace = t.trace
    left join shared as s on l.trace = s.trace and l.layer = s.layer and l.lag = s.lag
    group by l.trace, l.phase, l.lag, l.n_pairs, t.top_k, t.num_experts
)
select
    trace,
    phase,
    lag,
    n_pairs,
    overlap,
    uniform as expected_uniform,
    popularity as expected_popularity,
    (overlap - popularity) / nullif(1 - popularity, 0) as rho
from layer_means
order by trace, lag;
