-- Data of the chart of what a budget of experts keeps of a window.
--
-- One row per trace and budget M: at most M experts of a layer are loaded for a window, those with the most router weight
-- in it, as the budget metric computed it. Only traces with router weights.
--
-- needs: budget(window=$window, share=$share)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- param share DOUBLE = 0.9: of a window's weight, for experts_for_share [fraction]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column window BIGINT: T [tokens]
-- column budget BIGINT: M [experts]
-- column share DOUBLE: of a window's weight that experts_for_share is about [fraction]
-- column n_windows BIGINT: windows of this length per layer
-- column unique DOUBLE: mean unique experts of a window without a budget [experts]
-- column loaded DOUBLE: mean experts that are loaded under the budget [experts]
-- column per_top_k DOUBLE: loaded / k [loads of a single token]
-- column weight_kept DOUBLE: share of the window's weight that the loaded experts carry [fraction]
-- column weight_kept_lo DOUBLE: lower end of its 95 % interval; null without one
-- column weight_kept_hi DOUBLE: upper end
-- column tokens_intact DOUBLE: tokens all of whose experts are loaded [fraction]
-- column tokens_intact_lo DOUBLE: lower end of its 95 % interval; null without one
-- column tokens_intact_hi DOUBLE: upper end
-- column experts_for_share DOUBLE: mean of the fewest experts that carry the share of the weight [experts]
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
select
    r.trace,
    r.phase,
    r."window",
    r.budget,
    r.share,
    r.n_windows,
    r."unique",
    r.loaded,
    r.per_top_k,
    r.weight_kept,
    r.weight_kept_lo,
    r.weight_kept_hi,
    r.tokens_intact,
    r.tokens_intact_lo,
    r.tokens_intact_hi,
    r.experts_for_share,
    t.model,
    t.num_experts,
    t.top_k
from budget as r
join traces as t on r.trace = t.trace
where r."by" = 'trace'
    and not r.steps
    and r.share = coalesce(getvariable('share'), 0.9)
    and coalesce(r."window" = getvariable('window'), r."window" <= 4)
    and r.trace = coalesce(getvariable('trace'), r.trace)
    and r.phase = coalesce(getvariable('phase'), t.default_phase)
qualify r."window" = max(r."window") over (partition by r.trace)
order by r.trace, r.budget;
