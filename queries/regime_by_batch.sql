-- What bounds a verification on a machine, by batch size and draft length.
--
-- One row per trace, kind of unions, batch size B and draft length K: whether most of its time goes to reading
-- (bandwidth), to arithmetic (compute) or to what is fixed and sent (overhead). Where reading bounds, drafts that load few
-- more experts cost little; where arithmetic does, each costs time of its own.
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
-- column window BIGINT: tokens verified per request, K + 1 [tokens]
-- column regime VARCHAR: what most of a verification's time goes to: bandwidth, compute or overhead
-- column routed_share DOUBLE: f(B), the routed experts' share of a step without speculation [fraction]
-- column arithmetic_intensity DOUBLE: tokens of an expert that a verification loads [tokens]
-- column seconds_single DOUBLE: time of a step of one token per request [s]
-- column seconds_verify DOUBLE: time of a verification [s]
-- column target_efficiency DOUBLE: 1 / V
-- column model VARCHAR: name of the model
-- column hardware VARCHAR: name of the machine
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
    trace,
    phase,
    unions,
    batch_size,
    drafts,
    "window",
    regime,
    routed_share,
    arithmetic_intensity,
    seconds_single,
    seconds_verify,
    target_efficiency,
    model,
    hardware
from answer
order by trace, unions = 'accepted-only' desc, batch_size, "window";
