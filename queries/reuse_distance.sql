-- Tokens between two uses of an expert at the same layer.
--
-- One row per trace and distance d, computed from the activations alone and pooled over the layers: of all
-- uses, the share whose expert was last used d tokens before, in the same request and phase with no hole in
-- between. What is not there at any distance was a first use, or used longer ago than max_distance.
--
-- within is the hit rate of a cache that holds what the last d tokens of its request used, whatever that takes
-- (the working set; see the query working_set for how much it takes). For LRU caches of a fixed size, whose
-- distances count other experts instead of tokens, see tracekit reuse.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param max_distance INTEGER = 64: longest distance d [tokens]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column distance INTEGER: d, 1 is the token right before [tokens]
-- column uses BIGINT: uses of an expert that was last used d tokens before
-- column share DOUBLE: uses / all uses, first ones included [fraction]
-- column within DOUBLE: share of the uses at this distance or a shorter one [fraction]
-- column expected_uniform DOUBLE: k/N (1 - k/N)^(d-1), every k-subset equally likely in an endless request [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
uses as (
    select s.trace, s.phase, a.request, a.phase as part, a.layer, a.pos::bigint as pos, a.rank, a.expert
    from activations as a
    join scope as s on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
),
places as (
    select trace, request, part, pos, pos - row_number() over (partition by trace, request, part order by pos) as island
    from (select distinct trace, request, part, pos from uses)
),
distances as (
    select
        u.trace,
        u.pos - lag(u.pos) over (
            partition by u.trace, u.request, u.part, p.island, u.layer, u.expert order by u.pos
        ) as distance
    from uses as u
    join places as p
        on u.trace = p.trace and u.request = p.request and u.part is not distinct from p.part and u.pos = p.pos
),
found as (
    select trace, distance, count(*) as n from distances group by trace, distance
),
totals as (
    select trace, sum(n) as n, max(distance) as longest from found group by trace
)
select
    s.trace,
    s.phase,
    d.distance,
    coalesce(f.n, 0)::bigint as uses,
    coalesce(f.n, 0) / t.n as share,
    sum(coalesce(f.n, 0)) over (partition by s.trace order by d.distance) / t.n as within,
    s.top_k / s.num_experts * pow(1 - s.top_k / s.num_experts, d.distance - 1) as expected_uniform
from scope as s
join totals as t on s.trace = t.trace
join (select unnest(generate_series(1, coalesce(getvariable('max_distance'), 64)))::integer as distance) as d
    on d.distance <= t.longest
left join found as f on s.trace = f.trace and d.distance = f.distance
order by s.trace, d.distance;
