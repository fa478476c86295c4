-- Data of the chart of the overlap by lag.
--
-- One row per trace and lag: the share of experts that two tokens d positions apart have in common, with
-- its interval and baselines, as the autocorr metric computed them.
--
-- needs: autocorr(max_lag=$max_lag)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param max_lag INTEGER = 32: longest lag d [tokens]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the pairs lie in
-- column lag BIGINT: distance d between the two tokens [tokens]
-- column n_pairs BIGINT: token pairs at this lag per layer
-- column overlap DOUBLE: mean of |E(t) and E(t+d)| / k [fraction]
-- column overlap_lo DOUBLE: lower end of its 95 % interval; null without one
-- column overlap_hi DOUBLE: upper end
-- column expected_uniform DOUBLE: k / N [fraction]
-- column expected_popularity DOUBLE: sum over e of p_e^2 / k [fraction]
-- column expected_request DOUBLE: the request's own tokens in random order [fraction]
-- column rho DOUBLE: (overlap - expected_popularity) / (1 - expected_popularity)
-- column rho_request DOUBLE: (overlap - expected_request) / (1 - expected_request)
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.* exclude ("by", layer, label, request_id, intervals, seed, jaccard, any_shared, rank0_repeat),
    t.model,
    t.num_experts,
    t.top_k
from autocorr as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and r.lag <= coalesce(getvariable('max_lag'), 32)
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
order by r.trace, r.lag;
