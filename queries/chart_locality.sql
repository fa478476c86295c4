-- Data of the chart of local routing consistency.
--
-- One row per trace, segment length and cache size: how well one choice of experts serves a whole segment of tokens, as
-- the locality metric computed it. Both measures see the future: they say what locality there is, not what a policy gets.
--
-- needs: locality(segment=$segment)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param segment INTEGER = NULL: segment length m [tokens]; NULL takes 16, or the longest up to it that was computed
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the segments lie in
-- column segment BIGINT: m [tokens]
-- column n_segments BIGINT: segments of this length per layer
-- column srp DOUBLE: best F1 score of a router that keeps an expert for a whole segment or not at all [fraction]
-- column srp_lo DOUBLE: lower end of its 95 % interval; null without one
-- column srp_hi DOUBLE: upper end
-- column size_ratio DOUBLE: experts that this router keeps, over k
-- column size_ratio_lo DOUBLE: lower end of its 95 % interval; null without one
-- column size_ratio_hi DOUBLE: upper end
-- column capacity BIGINT: size of the cache [experts per layer]
-- column cache_ratio DOUBLE: capacity / k
-- column sch DOUBLE: hit rate of a cache that evicts what the next m tokens need least [fraction]
-- column sch_lo DOUBLE: lower end of its 95 % interval; null without one
-- column sch_hi DOUBLE: upper end
-- column fixed_hit_rate DOUBLE: hit rate of the best fixed set of experts of each segment [fraction]
-- column fixed_hit_rate_lo DOUBLE: lower end of its 95 % interval; null without one
-- column fixed_hit_rate_hi DOUBLE: upper end
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.* exclude ("by", layer, label, request_id, intervals, seed),
    t.model,
    t.num_experts,
    t.top_k
from locality as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and coalesce(r.segment = getvariable('segment'), r.segment <= 16)
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
qualify r.segment = max(r.segment) over (partition by r.trace)
order by r.trace, r.capacity;
