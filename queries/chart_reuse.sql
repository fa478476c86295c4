-- Data of the chart of the reuse-distance curve.
--
-- One row per trace and capacity, k to N experts per layer: what LRU caches of every size hit, as the reuse metric
-- computed it from one pass. 1 - hit_rate at N is the share of first touches.
--
-- needs: reuse(scope=$scope, batch_size=$batch_size, start=$start)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param scope VARCHAR = NULL: layer or all; NULL takes a cache for each layer
-- param batch_size INTEGER = 1: requests that run together [requests]
-- param start VARCHAR = NULL: cold, prompt or carry; NULL takes prompt where it was computed, else cold, else carry
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase of the tokens that count
-- column scope VARCHAR: a cache for each layer, or one for all
-- column start VARCHAR: what the cache held when a request began
-- column batch_size BIGINT: requests that run together [requests]
-- column capacity BIGINT: size of the cache [experts per layer]
-- column accesses BIGINT: accesses that count
-- column share DOUBLE: accesses that hit with this capacity and not with a smaller one [fraction]
-- column hit_rate DOUBLE: accesses that hit with this capacity [fraction]
-- column hit_rate_lo DOUBLE: lower end of its 95 % interval; null without one
-- column hit_rate_hi DOUBLE: upper end
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.* exclude ("by", layer, label, request_id, intervals, seed),
    t.model,
    t.num_experts,
    t.top_k
from reuse as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
    and r.scope = coalesce(getvariable('scope'), 'layer')
    and r.batch_size = coalesce(getvariable('batch_size'), 1)
    and r.start = coalesce(getvariable('start'), r.start)
qualify dense_rank() over (partition by r.trace order by list_position(['prompt', 'cold', 'carry'], r.start)) = 1
order by r.trace, r.capacity;
