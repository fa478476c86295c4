-- Working set of each layer: distinct experts of the last w tokens.
--
-- One row per trace, layer and w, and one with a null layer for their mean (Denning, CACM 11(5), 1968): the unique
-- experts of sliding windows, as the windows metric computed them. A cache that holds what the last w tokens used
-- takes that many experts on average, and what one more token adds to it is what the cache misses: miss_rate.
--
-- needs: windows(max_window=$max_window), windows(max_window=$max_window, by=layer)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param max_window INTEGER = NULL: longest window w [tokens]; NULL takes the longest that was computed, 8 if none was
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column layer USMALLINT: layer number of the model; null for the mean over the layers
-- column window BIGINT: w [tokens]
-- column n_windows BIGINT: windows of this length per layer
-- column unique DOUBLE: mean distinct experts of w consecutive tokens [experts]
-- column unique_lo DOUBLE: lower end of its 95 % interval; null without one
-- column unique_hi DOUBLE: upper end
-- column share DOUBLE: unique / N, of the layer's experts [fraction]
-- column miss_rate DOUBLE: what the next token adds, (unique at w + 1 - unique) / k [fraction]; null at the longest window
-- column expected_uniform DOUBLE: N (1 - (1 - k/N)^w), every k-subset equally likely [experts]
-- column expected_request DOUBLE: the request's own tokens in random order [experts]; null where undefined
select
    r.trace,
    r.phase,
    r.layer,
    r."window",
    r.n_windows,
    r.observed as "unique",
    r.observed_lo as unique_lo,
    r.observed_hi as unique_hi,
    r.observed / t.num_experts as share,
    (lead(r.observed) over (partition by r.trace, r.phase, r.layer order by r."window") - r.observed) / t.top_k as miss_rate,
    r.expected_uniform,
    r.expected_request
from windows as r
join traces as t on r.trace = t.trace
where r."by" in ('trace', 'layer')
    and r.overlapping
    and not r."distinct"
    and r.batch_size = 1
    and r."window" <= coalesce(getvariable('max_window'), r."window")
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
order by r.trace, r.layer nulls first, r."window";
