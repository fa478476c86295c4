-- Experts of the next MoE layer that follow an expert.
--
-- One row per trace, layer, expert and follower, the most frequent followers first; computed from the activations. What
-- a prefetcher that looks at one layer's experts would fetch for the next.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param top INTEGER = 1: followers of an expert
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column next_layer INTEGER: the next MoE layer
-- column expert INTEGER: expert of the layer
-- column rank INTEGER: 1 is the most frequent follower; ties go to the lower id
-- column next_expert INTEGER: expert of the next layer
-- column tokens BIGINT: tokens that chose both
-- column probability DOUBLE: tokens / tokens that chose the expert [fraction]
-- column lift DOUBLE: probability over the popularity of next_expert, 1 where the layers are independent [ratio]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
nexts as (
    -- One row a token and layer, with the experts of the next layer beside its own.
    select r.trace, s.phase, r.layer, r.experts, lead(r.layer) over token as next_layer, lead(r.experts) over token as next_experts
    from routing as r
    join scope as s on r.trace = s.trace and (s.phase = 'all' or r.phase = s.phase)
    window token as (partition by r.trace, r.request, r.pos order by r.layer)
),
pairs as (
    select trace, phase, layer, next_layer, expert, next_expert, count(*) as n
    from (
        select trace, phase, layer, next_layer, expert, unnest(next_experts) as next_expert
        from (select * exclude (experts), unnest(experts) as expert from nexts where next_layer is not null)
    )
    group by all
),
choices as (
    select trace, layer, expert, count(*) as n from (select trace, layer, unnest(experts) as expert from nexts) group by all
),
tokens as (
    select trace, layer, count(*) as n from nexts group by trace, layer
)
select
    p.trace,
    p.phase,
    p.layer::integer as layer,
    p.next_layer::integer as next_layer,
    p.expert::integer as expert,
    (row_number() over (
        partition by p.trace, p.layer, p.expert order by p.n desc, p.next_expert
    ))::integer as rank,
    p.next_expert::integer as next_expert,
    p.n as tokens,
    p.n / i.n as probability,
    p.n / i.n * t.n / j.n as lift
from pairs as p
join choices as i on p.trace = i.trace and p.layer = i.layer and p.expert = i.expert
join choices as j on p.trace = j.trace and p.next_layer = j.layer and p.next_expert = j.expert
join tokens as t on p.trace = t.trace and p.layer = t.layer
qualify rank <= coalesce(getvariable('top'), 1)
order by p.trace, p.layer, p.expert, rank;
