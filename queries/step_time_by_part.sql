-- Where the time of a step goes, part by part, without speculation and in a verification.
--
-- One row per trace, batch size B, tokens per request and part of the model, as tracekit speedup --parts says it.
--
-- A store keeps every answer; shown is, for each trace, the one that was asked for last among those that fit the
-- parameters.
--
-- needs: step_time(model=$model, hardware=$hardware, context=$context)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes the one that was asked for last
-- param model VARCHAR = NULL: a bundled model or its config.json; NULL takes the trace's own
-- param hardware VARCHAR = NULL: a known machine, for which what is missing is computed; NULL computes nothing
-- param context INTEGER = NULL: context per request; NULL takes 1024 [tokens]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column batch_size BIGINT: requests verified together, B
-- column tokens BIGINT: tokens per request: 1, or K + 1 of a verification [tokens]
-- column part VARCHAR: part of the model: attention, cache, router, shared, experts, …; communication; overhead
-- column seconds DOUBLE: time of the part [s]
-- column share DOUBLE: part of the step's time [fraction]
-- column growth DOUBLE: its time over that in a step of one token per request; null for a part that takes none
-- column bound VARCHAR: what the part is bound by: bandwidth, compute or overhead
-- column bytes DOUBLE: that a device reads, or sends [bytes]
-- column flops DOUBLE: of a device [FLOP]
-- column model VARCHAR: name of the model
-- column hardware VARCHAR: name of the machine
with answer as (
    select *
    from step_time
    where trace = coalesce(getvariable('trace'), trace)
        and phase = coalesce(getvariable('phase'), phase)
        and coalesce(getvariable('model') in (model, setting ->> '$.asked.model'), getvariable('model') is null)
        and coalesce(
            getvariable('hardware') in (hardware, setting ->> '$.asked.hardware'),
            getvariable('hardware') is null
        )
        and coalesce((setting ->> 'context')::integer = getvariable('context')::integer, getvariable('context') is null)
    qualify rank() over (partition by trace order by asked desc) = 1
)
select
    a.trace,
    a.phase,
    a.batch_size,
    a.tokens,
    a.part,
    a.seconds,
    a.share,
    case when one.seconds > 0 then a.seconds / one.seconds end as growth,
    a.bound,
    a.bytes,
    a.flops,
    a.model,
    a.hardware
from answer as a
join answer as one on a.trace = one.trace and a.batch_size = one.batch_size and a.part = one.part and one.tokens = 1
order by a.trace, a.batch_size, a.tokens, a.share desc, a.part;
