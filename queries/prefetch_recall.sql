-- How well each predictor foretells the experts of a layer.
--
-- One row per trace, layer and predictor: of a token's k routed experts in that layer, the share that was among the m
-- that the predictor names, as the prefetch metric judged it. A predictor that looks ahead from another layer names
-- nothing for the first layers: null there.
--
-- needs: prefetch(by=layer, m=$m, distance=$distance)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param m INTEGER = NULL: experts that are prefetched per layer; NULL takes k
-- param distance INTEGER = 1: MoE layers that a predictor looks ahead, of those that look from layer to layer
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase of the tokens
-- column layer USMALLINT: layer number of the model, the one that is predicted
-- column predictor VARCHAR: its name
-- column distance BIGINT: MoE layers that it looks ahead; null: it knows before the token's first layer
-- column m BIGINT: experts that are prefetched
-- column n BIGINT: tokens judged
-- column recall DOUBLE: mean of |predicted and routed| / k [fraction]
-- column recall_lo DOUBLE: lower end of its 95 % interval; null without one
-- column recall_hi DOUBLE: upper end
-- column precision DOUBLE: share of the predicted experts that were routed to [fraction]
-- column exact DOUBLE: share of tokens all of whose k experts were predicted [fraction]
-- column weight_covered DOUBLE: share of the router weight on predicted experts [fraction]; null without weights
-- column rank_match DOUBLE: share of the k ranks at which predictor and router name the same expert [fraction]; null without router order
-- column bytes_fetched DOUBLE: bytes of the predicted experts [bytes per token]; null without sizes
-- column bytes_wasted DOUBLE: bytes of those that were not routed to [bytes per token]; null without sizes
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.trace,
    r.phase,
    r.layer,
    r.predictor,
    r.distance,
    r.m,
    r.n,
    r.recall,
    r.recall_lo,
    r.recall_hi,
    r."precision",
    r.exact,
    r.weight_covered,
    r.rank_match,
    r.bytes_fetched,
    r.bytes_wasted,
    t.model,
    t.num_experts,
    t.top_k
from prefetch as r
join traces as t on r.trace = t.trace
where r."by" = 'layer'
    and r.m = coalesce(getvariable('m'), t.top_k)
    and (r.distance is null or r.distance = coalesce(getvariable('distance'), 1))
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
order by r.trace, r.layer, r.predictor, r.distance;
