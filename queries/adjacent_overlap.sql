-- Overlap of a token's experts with the previous token's, by layer.
--
-- One row per trace and layer, computed from the activations alone; both tokens lie in one request and one
-- phase and follow each other. The overlap is the hit rate of a cache that keeps the last token's k experts.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the pairs lie in
-- column layer INTEGER: layer number of the model
-- column n_pairs BIGINT: pairs of a token and the one before it
-- column overlap DOUBLE: mean of |E(t-1) and E(t)| / k [fraction]
-- column any_shared DOUBLE: pairs that share one expert or more [fraction]
-- column all_shared DOUBLE: pairs of the same experts [fraction]
-- column expected_uniform DOUBLE: overlap if every k-subset is equally likely, k / N [fraction]
-- column expected_popularity DOUBLE: overlap of independent tokens with the layer's popularity, sum of p_e^2 / k [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
pairs as (
    -- A token and the one right before it, in one request and phase.
    select trace, phase, layer, experts, previous
    from (
        select r.trace, s.phase, r.layer, r.pos, r.experts, lag(r.experts) over before as previous, lag(r.pos) over before as earlier
        from routing as r
        join scope as s on r.trace = s.trace and (s.phase = 'all' or r.phase = s.phase)
        window before as (partition by r.trace, r.request, r.phase, r.layer order by r.pos)
    )
    where pos = earlier + 1
),
popularity as (
    select trace, layer, sum(pow(n / tokens, 2)) as sum_p2
    from (
        select a.trace, a.layer, a.expert, count(*) as n, sum(count(*)) over (partition by a.trace, a.layer) / s.top_k as tokens
        from activations as a
        join scope as s on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
        group by a.trace, a.layer, a.expert, s.top_k
    )
    group by trace, layer
),
shared as (
    select trace, phase, layer, len(list_intersect(experts, previous)) as n from pairs
)
select
    p.trace,
    p.phase,
    p.layer::integer as layer,
    count(*) as n_pairs,
    avg(p.n) / s.top_k as overlap,
    avg((p.n > 0)::integer) as any_shared,
    avg((p.n = s.top_k)::integer) as all_shared,
    s.top_k / s.num_experts as expected_uniform,
    q.sum_p2 / s.top_k as expected_popularity
from shared as p
join scope as s on p.trace = s.trace
join popularity as q on p.trace = q.trace and p.layer = q.layer
group by p.trace, p.phase, p.layer, s.top_k, s.num_experts, q.sum_p2
order by p.trace, p.layer;
