-- What speculation gains on a machine by batch size and draft length, and what the uniform formula says.
--
-- One row per trace, kind of unions, batch size B and draft length K, as tracekit speedup says it: the time of a step is
-- a roofline over the parts of the model, in which the routed experts are those that the trace's windows load.
--
-- A store keeps every answer; shown is, for each trace, the one that was asked for last among those that fit the
-- parameters.
--
-- needs: speedup(model=$model, hardware=$hardware, context=$context, acceptance_rate=$acceptance_rate, draft_cost=$draft_cost)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes the one that was asked for last
-- param model VARCHAR = NULL: a bundled model or its config.json; NULL takes the trace's own
-- param hardware VARCHAR = NULL: a known machine, for which what is missing is computed; NULL computes nothing
-- param context INTEGER = NULL: context per request; NULL takes 1024 [tokens]
-- param acceptance_rate DOUBLE = NULL: a, chance that a draft is accepted; NULL takes the trace's own, if any [fraction]
-- param draft_cost DOUBLE = NULL: cost of one draft; NULL takes 0 [steps without speculation]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column unions VARCHAR: accepted-only: windows of committed tokens; steps: real ones; extended: these in a batch
-- column batch_size BIGINT: requests verified together, B
-- column drafts BIGINT: drafts per step, K [tokens]
-- column speedup DOUBLE: S = AL / (V + D); null where nothing is known of the acceptance
-- column speedup_lo DOUBLE: lower end of its 95 % interval; null without one
-- column speedup_hi DOUBLE: upper end
-- column speedup_uniform DOUBLE: S with the uniform formula in place of the trace
-- column speedup_dense DOUBLE: S of the dense model
-- column verification_ratio DOUBLE: V, time of a verification [steps without speculation]
-- column verification_ratio_lo DOUBLE: lower end of its 95 % interval, that of the expert ratio; null without one
-- column verification_ratio_hi DOUBLE: upper end
-- column verification_ratio_uniform DOUBLE: V with the uniform formula in place of the trace [steps without speculation]
-- column verification_ratio_dense DOUBLE: V of a dense model with the same active weights [steps without speculation]
-- column window BIGINT: tokens verified per request, K + 1 [tokens]
-- column expert_ratio DOUBLE: U(T, B) / U(1, B)
-- column acceptance_length DOUBLE: AL, tokens that a step emits, the bonus token included [tokens]
-- column acceptance_source VARCHAR: given, measured, or extrapolated beyond the drafts that were measured
-- column draft_cost DOUBLE: D, all drafts of a step [steps without speculation]
-- column break_even_length DOUBLE: V + D, the AL from which speculation gains [tokens]
-- column break_even_rate DOUBLE: the acceptance rate from which it gains; null where none is enough [fraction]
-- column regime VARCHAR: what most of a verification's time goes to: bandwidth, compute or overhead
-- column best BOOLEAN: whether this K is the fastest at this B; nowhere true where none beats 1
-- column model VARCHAR: name of the model
-- column hardware VARCHAR: name of the machine
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
with answer as (
    select *
    from speedup
    where trace = coalesce(getvariable('trace'), trace)
        and phase = coalesce(getvariable('phase'), phase)
        and coalesce(getvariable('model') in (model, setting ->> '$.asked.model'), getvariable('model') is null)
        and coalesce(
            getvariable('hardware') in (hardware, setting ->> '$.asked.hardware'),
            getvariable('hardware') is null
        )
        and coalesce((setting ->> 'context')::integer = getvariable('context')::integer, getvariable('context') is null)
        and coalesce(
            (setting ->> 'acceptance_rate')::double = getvariable('acceptance_rate')::double,
            getvariable('acceptance_rate') is null
        )
        and coalesce(
            (setting ->> 'draft_cost')::double = getvariable('draft_cost')::double,
            getvariable('draft_cost') is null
        )
    qualify rank() over (partition by trace order by asked desc) = 1
)
select
    a.trace,
    a.phase,
    a.unions,
    a.batch_size,
    a.drafts,
    a.speedup,
    a.speedup_lo,
    a.speedup_hi,
    a.speedup_uniform,
    a.speedup_dense,
    a.verification_ratio,
    a.verification_ratio_lo,
    a.verification_ratio_hi,
    a.verification_ratio_uniform,
    a.verification_ratio_dense,
    a."window",
    a.expert_ratio,
    a.acceptance_length,
    a.acceptance_source,
    a.draft_cost,
    a.break_even_length,
    a.break_even_rate,
    a.regime,
    a.best,
    a.model,
    a.hardware,
    t.num_experts,
    t.top_k
from answer as a
join traces as t on a.trace = t.trace
order by a.trace, a.unions = 'accepted-only' desc, a.batch_size, a."window";
