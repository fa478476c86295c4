-- Data of the chart of the reduction by batch size.
--
-- One row per trace and batch size, sliding windows of one length: the union over one window of each of
-- B requests, its baselines and the reductions, as the windows metric computed them.
--
-- needs: windows(max_window=$window, batch_size=1 2 4 8 16 32 64 128 256)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column batch_size BIGINT: requests verified together, B
-- column window BIGINT: window length T [tokens]
-- column n_windows BIGINT: windows of this length per layer
-- column observed DOUBLE: mean unique experts of a window, or of the union of batch_size windows [experts]
-- column observed_lo DOUBLE: lower end of its 95 % interval; null without one
-- column observed_hi DOUBLE: upper end
-- column per_top_k DOUBLE: observed / k [loads of a single token]
-- column expected_uniform DOUBLE: every k-subset equally likely [experts]; null where undefined
-- column expected_popularity DOUBLE: independent tokens, experts as popular as in the whole trace [experts]; null where undefined
-- column expected_label DOUBLE: the same inside each label [experts]; null where undefined
-- column expected_request DOUBLE: the request's own tokens in random order [experts]; null where undefined
-- column reduction_uniform DOUBLE: 1 - observed / expected_uniform [fraction]
-- column reduction_uniform_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_uniform_hi DOUBLE: upper end
-- column reduction_uniform_bias DOUBLE: jackknife estimate of its bias [fraction]
-- column reduction_popularity DOUBLE: 1 - observed / expected_popularity [fraction]
-- column reduction_popularity_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_popularity_hi DOUBLE: upper end
-- column reduction_popularity_bias DOUBLE: jackknife estimate of its bias [fraction]
-- column reduction_label DOUBLE: 1 - observed / expected_label [fraction]
-- column reduction_label_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_label_hi DOUBLE: upper end
-- column reduction_label_bias DOUBLE: jackknife estimate of its bias [fraction]
-- column reduction_request DOUBLE: 1 - observed / expected_request [fraction]
-- column reduction_request_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_request_hi DOUBLE: upper end
-- column reduction_request_bias DOUBLE: jackknife estimate of its bias [fraction]
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.* exclude ("by", layer, label, request_id, intervals, seed, overlapping, "distinct"),
    t.model,
    t.num_experts,
    t.top_k
from windows as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and r.overlapping
    and not r."distinct"
    and coalesce(r."window" = getvariable('window'), r."window" <= 4)
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
qualify r."window" = max(r."window") over (partition by r.trace)
order by r.trace, r.batch_size;
