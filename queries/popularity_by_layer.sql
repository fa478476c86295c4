-- Popularity of every expert in every layer.
--
-- One row per trace, layer and expert, experts that no token chose included, computed from the
-- activations, or from the counts of a trace that has nothing else (phase all). Where such a trace
-- does not say k, popularity and relative are null.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column expert INTEGER: expert id, from 0
-- column tokens BIGINT: tokens that chose the expert in this layer
-- column popularity DOUBLE: p_e, tokens that chose the expert / tokens [fraction]; sums to k over the layer
-- column relative DOUBLE: p_e / (k/N), popularity in units of a perfectly even load [ratio]
-- column rank INTEGER: 1 is the layer's most popular expert; ties go to the lower id
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, histogram
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
choices as (
    select scope.trace, scope.phase, a.layer, a.expert, count(*) as tokens
    from activations as a
    join scope on a.trace = scope.trace and (scope.phase = 'all' or a.phase = scope.phase)
    group by scope.trace, scope.phase, a.layer, a.expert
    union all
    select scope.trace, scope.phase, n.layer, n.expert, sum(n.n) as tokens
    from counts as n
    join scope on n.trace = scope.trace and scope.histogram and scope.phase = 'all'
    group by scope.trace, scope.phase, n.layer, n.expert
),
experts as (
    select c.trace, c.phase, c.layer, t.top_k, t.num_experts, c.choices / t.top_k as tokens,
        unnest(generate_series(0, t.num_experts::bigint - 1)) as expert
    from (select trace, phase, layer, sum(tokens) as choices from choices group by trace, phase, layer) as c
    join traces as t on c.trace = t.trace
)
select
    e.trace,
    e.phase,
    e.layer::integer as layer,
    e.expert::integer as expert,
    coalesce(c.tokens, 0)::bigint as tokens,
    coalesce(c.tokens, 0) / e.tokens as popularity,
    coalesce(c.tokens, 0) / e.tokens * e.num_experts / e.top_k as relative,
    (row_number() over (
        partition by e.trace, e.layer order by coalesce(c.tokens, 0) desc, e.expert
    ))::integer as rank
from experts as e
left join choices as c on e.trace = c.trace and e.layer = c.layer and e.expert = c.expert
order by e.trace, e.layer, e.expert;
