-- Data of the chart of how layers share a budget of cached experts.
--
-- One row per trace, budget and layer: how many experts the layer's LRU cache gets, as the layer_budgets metric split
-- the budget; the figures of the split as a whole stand beside every layer.
--
-- needs: layer_budgets(batch_size=$batch_size, start=$start)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param batch_size INTEGER = 1: requests that run together [requests]
-- param start VARCHAR = NULL: cold, prompt or carry; NULL takes prompt where it was computed, else cold, else carry
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase of the tokens that count
-- column start VARCHAR: what the caches held when a request began
-- column batch_size BIGINT: requests that run together [requests]
-- column unit VARCHAR: unit of capacity: experts
-- column capacity DOUBLE: the budget [experts per layer]
-- column layer USMALLINT: layer number of the model
-- column experts DOUBLE: what the layer gets [experts]
-- column hit_rate DOUBLE: hits of the layer, on requests that the split was not learned from [fraction]; null without any
-- column uniform DOUBLE: hits of the layer if every layer had as many experts [fraction]
-- column all_hit_rate DOUBLE: hits of all layers together with the split [fraction]
-- column all_uniform DOUBLE: the same in equal parts [fraction]
-- column gain DOUBLE: all_hit_rate - all_uniform [fraction]
-- column gain_lo DOUBLE: lower end of its 95 % interval; null without one
-- column gain_hi DOUBLE: upper end
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.trace,
    r.phase,
    r.start,
    r.batch_size,
    r.unit,
    r.capacity,
    r.layer,
    r.experts,
    r.hit_rate,
    r.uniform,
    a.hit_rate as all_hit_rate,
    a.uniform as all_uniform,
    a.gain,
    a.gain_lo,
    a.gain_hi,
    t.model,
    t.num_experts,
    t.top_k
from layer_budgets as r
join layer_budgets as a
    on r.trace = a.trace
    and r.phase = a.phase
    and r.start = a.start
    and r.batch_size = a.batch_size
    and r.unit = a.unit
    and r.capacity = a.capacity
    and a.layer is null
join traces as t on r.trace = t.trace
where r.layer is not null
    and r.unit = 'experts'
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
    and r.batch_size = coalesce(getvariable('batch_size'), 1)
    and r.start = coalesce(getvariable('start'), r.start)
qualify dense_rank() over (partition by r.trace order by list_position(['prompt', 'cold', 'carry'], r.start)) = 1
order by r.trace, r.capacity, r.layer;
