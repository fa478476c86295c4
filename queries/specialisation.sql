-- Experts that the requests of one label use more than others, by layer.
--
-- One row per trace, layer, label and expert, the experts with the most tokens beyond the trace's popularity first;
-- computed from the activations of requests with a label. The domain specialisation of OLMoE (Muennighoff et al., arXiv
-- 2409.02060) is share: of the label's tokens, those routed to the expert.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param top INTEGER = 3: experts of a layer and label
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column label VARCHAR: label of the requests
-- column rank INTEGER: 1 is the expert with the most tokens beyond the trace's popularity; ties go to the lower id
-- column expert INTEGER: expert id, from 0
-- column tokens BIGINT: tokens of the label that chose the expert
-- column share DOUBLE: tokens / tokens of the label [fraction]
-- column popularity DOUBLE: the same of all labels together [fraction]
-- column lift DOUBLE: share / popularity [ratio]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
choices as (
    select s.trace, s.phase, r.label, a.layer, a.expert, s.top_k, count(*) as n
    from activations as a
    join scope as s on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
    join requests as r on a.trace = r.trace and a.request = r.request
    where r.label is not null
    group by s.trace, s.phase, r.label, a.layer, a.expert, s.top_k
),
shares as (
    select
        *,
        n / (sum(n) over (partition by trace, layer, label) / top_k) as share,
        sum(n) over (partition by trace, layer, expert) / (sum(n) over (partition by trace, layer) / top_k) as popularity
    from choices
)
select
    trace,
    phase,
    layer::integer as layer,
    label,
    (row_number() over (
        partition by trace, layer, label order by share - popularity desc, expert
    ))::integer as rank,
    expert::integer as expert,
    n as tokens,
    share,
    popularity,
    share / popularity as lift
from shares
qualify rank <= coalesce(getvariable('top'), 3)
order by trace, layer, label, rank;
