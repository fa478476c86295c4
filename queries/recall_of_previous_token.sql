-- Recall of the previous token's experts as a prediction, by layer.
--
-- One row per trace, layer and m: the first m experts of the previous token, in the router's order, are taken for
-- those that the token will need. Where the trace does not keep the router's order there is m = k alone. Computed from
-- the activations; both tokens lie in one request and one phase and follow each other.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the pairs lie in
-- column layer INTEGER: layer number of the model
-- column m INTEGER: experts that are predicted [experts]
-- column n_pairs BIGINT: pairs of a token and the one before it
-- column recall DOUBLE: recall@m, mean of |predicted and true| / k [fraction]
-- column precision DOUBLE: mean of |predicted and true| / m [fraction]
-- column first_found DOUBLE: tokens whose own first expert is predicted [fraction]; null without the router's order
-- column expected_uniform DOUBLE: recall if every k-subset is equally likely, m / N [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k, router_order
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
sizes as (
    select trace, unnest(generate_series(case when router_order then 1 else top_k end, top_k))::integer as m from scope
),
found as (
    select
        p.trace,
        p.phase,
        p.layer,
        z.m,
        len(list_intersect(p.experts, p.previous[1:z.m])) as n,
        list_contains(p.previous[1:z.m], p.experts[1]) as own_first
    from pairs as p
    join sizes as z on p.trace = z.trace
)
select
    f.trace,
    f.phase,
    f.layer::integer as layer,
    f.m,
    count(*) as n_pairs,
    avg(f.n) / s.top_k as recall,
    avg(f.n) / f.m as "precision",
    case when s.router_order then avg(f.own_first::integer) end as first_found,
    f.m / s.num_experts as expected_uniform
from found as f
join scope as s on f.trace = s.trace
group by f.trace, f.phase, f.layer, f.m, s.top_k, s.num_experts, s.router_order
order by f.trace, f.layer, f.m;
