-- The draft length to choose at each batch size, when it gains, and what the uniform formula would choose.
--
-- One row per trace, kind of unions (accepted-only; steps and extended together) and batch size B. The choice is among
-- the draft lengths that were asked for.
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
-- column drafts BIGINT: K of the fastest draft length, or without an acceptance of the one that breaks even first [tokens]
-- column speedup DOUBLE: S of that K; null where nothing is known of the acceptance
-- column speedup_lo DOUBLE: lower end of its 95 % interval; null without one
-- column speedup_hi DOUBLE: upper end
-- column gains BOOLEAN: whether it is faster than no speculation
-- column verification_ratio DOUBLE: V, time of a verification [steps without speculation]
-- column break_even_length DOUBLE: V + D at that K, the AL from which it gains [tokens]
-- column break_even_rate DOUBLE: the acceptance rate from which that K gains; null where none is enough [fraction]
-- column drafts_uniform BIGINT: K that the uniform formula would choose; null: not to speculate [tokens]
-- column speedup_promised DOUBLE: S that the formula promises of its choice
-- column speedup_had DOUBLE: S that its choice has by the trace
-- column regret DOUBLE: how much faster the best choice is than the formula's, 1 being not to speculate [fraction]
-- column model VARCHAR: name of the model
-- column hardware VARCHAR: name of the machine
with answer as (
    select *, unions = 'accepted-only' as committed
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
),
formula as (
    select
        trace,
        committed,
        batch_size,
        max(drafts) as drafts_uniform,
        max(speedup_uniform) as speedup_promised,
        max(speedup) as speedup_had
    from answer
    where best_uniform
    group by trace, committed, batch_size
),
fastest as (
    select *
    from answer
    qualify row_number() over (
        partition by trace, committed, batch_size
        order by speedup desc nulls last, break_even_rate nulls last, drafts
    ) = 1
)
select
    f.trace,
    f.phase,
    f.unions,
    f.batch_size,
    f.drafts,
    f.speedup,
    f.speedup_lo,
    f.speedup_hi,
    f.speedup > 1 as gains,
    f.verification_ratio,
    f.break_even_length,
    f.break_even_rate,
    u.drafts_uniform,
    u.speedup_promised,
    u.speedup_had,
    f.regret,
    f.model,
    f.hardware
from fastest as f
left join formula as u on f.trace = u.trace and f.committed = u.committed and f.batch_size = u.batch_size
order by f.trace, f.committed desc, f.batch_size;
