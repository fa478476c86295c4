-- Unique experts per verification window, against uniform and popularity.
--
-- One row per trace and window length T that fits into a request, computed from the activations alone.
-- Windows slide over consecutive positions of one request and one phase, never across a hole; every window
-- weighs the same and layers are averaged with equal weight. Reductions are ratios of the layer means.
--
-- The count needs no window to be enumerated (Denning and Schwartz): in a segment of n tokens an
-- occurrence at t = 0 .. n-1, at distance g from the same expert's previous use (t + 1 at its first),
-- is the first use of its expert in max(0, min(g, T) - max(0, t - (n - T))) windows of length T.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param max_window INTEGER = 8: longest window length T [tokens]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column window INTEGER: window length T [tokens]
-- column n_windows BIGINT: windows of this length per layer
-- column observed DOUBLE: mean unique experts per window [experts]; null without a window
-- column per_top_k DOUBLE: observed / k [loads of a single token]
-- column expected_uniform DOUBLE: N (1 - (1 - k/N)^T), every k-subset equally likely [experts]
-- column expected_popularity DOUBLE: sum over e of 1 - (1 - p_e)^T, independent tokens with the trace's popularity [experts]
-- column reduction_uniform DOUBLE: 1 - observed / expected_uniform [fraction]
-- column reduction_popularity DOUBLE: 1 - observed / expected_popularity [fraction]
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
    select trace, phase, request, min(pos) as first_pos, max(pos) as last_pos
    from (
        select *, pos - row_number() over (partition by trace, request, part order by pos) as island
        from positions
    )
    group by trace, phase, request, part, island
),
uses as (
    select
        s.trace,
        a.layer,
        a.expert,
        s.last_pos + 1 - a.pos as remaining,
        coalesce(
            a.pos - lag(a.pos) over (
                partition by s.trace, s.request, a.layer, s.first_pos, a.expert order by a.pos
            ),
            a.pos - s.first_pos + 1
        ) as gap
    from (select * replace (pos::bigint as pos) from activations) as a
    join segments as s on a.trace = s.trace and a.request = s.request and a.pos between s.first_pos and s.last_pos
),
lengths as (
    select unnest(generate_series(1, coalesce(getvariable('max_window'), 8)))::integer as "window"
),
windows_of as (
    select
        s.trace,
        s.phase,
        l."window",
        sum(s.last_pos - s.first_pos + 1)::bigint as tokens,
        sum(greatest(0, s.last_pos - s.first_pos + 2 - l."window"))::bigint as n_windows
    from segments as s cross join lengths as l
    group by s.trace, s.phase, l."window"
    having n_windows > 0
),
-- A gap or a remainder beyond the longest window counts like the longest window, so the trace
-- shrinks to a small table before it meets the window lengths.
gaps as (
    select trace, layer, least(gap, max_window) as gap, least(remaining, max_window) as remaining, count(*) as n
    from uses cross join (select max("window") as max_window from lengths)
    group by all
),
seen as (
    select
        g.trace,
        g.layer,
        l."window",
        sum(g.n * greatest(0, least(g.gap, l."window") - greatest(0, l."window" - g.remaining))) as unique_experts
    from gaps as g cross join lengths as l
    group by g.trace, g.layer, l."window"
),
choices as (
    select trace, layer, expert, count(*) as n from uses group by trace, layer, expert
),
independent as (
    select c.trace, c.layer, w."window", sum(1 - pow(1 - c.n / w.tokens, w."window")) as expected
    from choices as c join windows_of as w on c.trace = w.trace
    group by c.trace, c.layer, w."window"
),
layer_means as (
    select
        w.trace,
        w.phase,
        w."window",
        w.n_windows,
        avg(seen.unique_experts / w.n_windows) as observed,
        avg(independent.expected) as popularity
    from windows_of as w
    join seen on w.trace = seen.trace and w."window" = seen."window"
    join independent on seen.trace = independent.trace and seen.layer = independent.layer and seen."window" = independent."window"
    group by w.trace, w.phase, w."window", w.n_windows
)
select
    m.trace,
    m.phase,
    m."window",
    m.n_windows,
    m.observed,
    m.observed / t.top_k as per_top_k,
    t.num_experts * (1 - pow(1 - t.top_k / t.num_experts, m."window")) as expected_uniform,
    m.popularity as expected_popularity,
    1 - m.observed / expected_uniform as reduction_uniform,
    1 - m.observed / m.popularity as reduction_popularity
from layer_means as m join traces as t on m.trace = t.trace
order by m.trace, m."window";
