-- What expert caches hit, and what their misses are made of.
--
-- One row per trace, policy and capacity. A miss is cold (a first touch since the cache began empty), of the working set
-- (Belady's policy, which knows the future, misses it too: the cache is too small) or of the policy (what is left: a
-- better one could have hit). Its chart is "cache".
--
-- needs: cache(scope=$scope, batch_size=$batch_size, start=$start)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param scope VARCHAR = NULL: layer or all; NULL takes a cache for each layer
-- param batch_size INTEGER = 1: requests that run together [requests]
-- param start VARCHAR = NULL: cold, prompt or carry; NULL takes prompt where it was computed, else cold, else carry
-- column trace VARCHAR: name of the trace
-- column model VARCHAR: name of the model; null where the source does not say
-- column num_experts INTEGER: N, routed experts per layer [experts]
-- column top_k INTEGER: k, routed experts per token [experts]
-- column phase VARCHAR: phase of the tokens that count
-- column scope VARCHAR: a cache for each layer, or one for all
-- column start VARCHAR: what the cache held when a request began
-- column batch_size BIGINT: requests that run together [requests]
-- column policy VARCHAR: who is evicted
-- column capacity DOUBLE: size of the cache [experts per layer]
-- column capacity_bytes BIGINT: the same of all layers together [bytes]; null where the experts' sizes are not known
-- column hit_rate DOUBLE: share of accesses that hit [fraction]
-- column hit_rate_lo DOUBLE: lower end of its 95 % interval; null without one
-- column hit_rate_hi DOUBLE: upper end
-- column miss_rate DOUBLE: share of accesses that miss, the sum of the next three [fraction]
-- column cold DOUBLE: first touches [fraction]
-- column working_set DOUBLE: misses that the best policy has beyond them [fraction]
-- column policy_excess DOUBLE: misses that this policy has beyond the best one's [fraction]
-- column misses_per_token DOUBLE: misses per token, in all layers [experts]
-- column bytes_per_token DOUBLE: what they load [bytes]; null where the experts' sizes are not known
select
    c.trace,
    t.model,
    t.num_experts,
    t.top_k,
    c.phase,
    c.scope,
    c.start,
    c.batch_size,
    c.policy,
    c.capacity,
    c.capacity_bytes,
    c.hit_rate,
    c.hit_rate_lo,
    c.hit_rate_hi,
    1 - c.hit_rate as miss_rate,
    c.cold,
    c.working_set,
    c.policy_excess,
    c.misses_per_token,
    c.bytes_per_token
from cache as c
join traces as t on c.trace = t.trace
where c."by" = 'trace'
    and c.unit = 'experts'
    and c.trace = coalesce(getvariable('trace'), c.trace)
    and c.phase = coalesce(getvariable('phase'), t.default_phase)
    and c.scope = coalesce(getvariable('scope'), 'layer')
    and c.batch_size = coalesce(getvariable('batch_size'), 1)
    and c.start = coalesce(getvariable('start'), c.start)
qualify dense_rank() over (partition by c.trace order by list_position(['prompt', 'cold', 'carry'], c.start)) = 1
order by c.trace, list_position(['lru', 'lfu', 'lfru', 'belady', 'static', 'random'], c.policy), c.capacity;
