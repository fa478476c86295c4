-- What verification would cost other designs of a model, and the batch size at which each gains most.
--
-- One row per trace, design and batch size B, as tracekit design said it under the law of routing fitted to the trace.
-- What to vary has no default: run tracekit design first.
--
-- A store keeps every answer; shown is, for each trace, the one that was asked for last among those that fit the
-- parameters.
--
-- needs: design
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes the one that was asked for last
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase that the law is fitted to
-- column design VARCHAR: N, k and S in words
-- column batch_size BIGINT: requests verified together, B
-- column verification_ratio DOUBLE: V, time of a verification [steps without speculation]
-- column speedup DOUBLE: S = AL / (V + D); null where nothing is known of the acceptance
-- column sweet_spot BOOLEAN: whether this is the design's best batch size
-- column hold VARCHAR: which parameters of a layer the size of an expert keeps: active or total
-- column num_experts BIGINT: N, routed experts per layer
-- column top_k BIGINT: k, routed experts per token
-- column shared_experts DOUBLE: S, shared experts per layer
-- column expert_size DOUBLE: width of an expert, in those of the trace's
-- column extrapolated BOOLEAN: whether it is another design than the trace's, which nobody has trained
-- column window BIGINT: tokens verified per request, K + 1 [tokens]
-- column unique DOUBLE: U(T, B) by the law, experts per layer [experts]
-- column union_ratio DOUBLE: U(T, B) / U(1, B) by the law
-- column union_ratio_uniform DOUBLE: the same of uniform routing
-- column arithmetic_intensity DOUBLE: tokens of an expert that a verification loads [tokens]
-- column routed_share DOUBLE: f(B), the routed experts' share of a step without speculation [fraction]
-- column regime VARCHAR: what most of a verification's time goes to: bandwidth, compute or overhead
-- column acceptance_length DOUBLE: AL, tokens that a step emits, the bonus token included [tokens]
-- column draft_cost DOUBLE: D, all drafts of a step [steps without speculation]
-- column best_batch_size BIGINT: B of those asked for at which V is least and the speedup largest: the sweet spot
-- column model VARCHAR: name of the model
-- column hardware VARCHAR: name of the machine
with answer as (
    select *
    from design
    where trace = coalesce(getvariable('trace'), trace) and phase = coalesce(getvariable('phase'), phase)
    qualify rank() over (partition by trace order by asked desc) = 1
)
select
    trace,
    phase,
    design,
    batch_size,
    verification_ratio,
    speedup,
    batch_size = best_batch_size as sweet_spot,
    hold,
    num_experts,
    top_k,
    shared_experts,
    expert_size,
    extrapolated,
    "window",
    "unique",
    union_ratio,
    union_ratio_uniform,
    arithmetic_intensity,
    routed_share,
    regime,
    acceptance_length,
    draft_cost,
    best_batch_size,
    setting ->> 'model' as model,
    setting ->> 'hardware' as hardware
from answer
order by trace, extrapolated, num_experts, top_k, shared_experts, batch_size;
