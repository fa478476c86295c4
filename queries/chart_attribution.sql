-- Data of the chart of what the reduction is made of.
--
-- One row per trace and cause, in the order of the ladder from uniform down to the trace as observed, as
-- the attribution metric computed them.
--
-- needs: attribution(window=$window)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column window BIGINT: window length T [tokens]
-- column cause VARCHAR: popularity, label, request or token_order
-- column unique_before DOUBLE: unique experts expected without the cause [experts]
-- column unique_after DOUBLE: unique experts with it; the last is the trace as observed [experts]
-- column drop DOUBLE: unique_before - unique_after; 0 for a label that is not resolved [experts]
-- column share DOUBLE: drop / total drop from uniform to observed [fraction]; null for a label that is not resolved, or without a drop
-- column share_lo DOUBLE: lower end of its 95 % interval; null without one
-- column share_hi DOUBLE: upper end
-- column resolved BOOLEAN: the trace is enough to tell this cause's share from nothing
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.* exclude ("by", layer, label, request_id, intervals, seed),
    t.model,
    t.num_experts,
    t.top_k
from attribution as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and coalesce(r."window" = getvariable('window'), r."window" <= 4)
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
qualify r."window" = max(r."window") over (partition by r.trace)
order by r.trace, list_position(['popularity', 'label', 'request', 'token_order'], r.cause);
