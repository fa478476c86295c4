-- Unique experts per real verification step, the rows of rejected drafts included.
--
-- One row per trace and number of rows W that a step verifies at once (the last committed token and W - 1 drafts,
-- in a chain or a tree), and one over all steps, whose window is null; nothing for traces without steps. Every step
-- weighs the same and layers are averaged with equal weight. A step is of the phase of its first row.
--
-- A kept row is null where a tree has several rows at a depth that was accepted and the source does not say which.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the steps begin in
-- column window BIGINT: rows W of a step [tokens]; null over all steps
-- column n_steps BIGINT: verification steps
-- column drafted DOUBLE: mean drafts per step [tokens]
-- column accepted DOUBLE: mean accepted drafts per step [tokens]
-- column acceptance_length DOUBLE: mean tokens emitted per step, the bonus or corrected one included [tokens]
-- column unique DOUBLE: mean unique experts of a step's rows [experts]
-- column unique_kept DOUBLE: mean unique experts of a step's kept rows [experts]; null where they are not all known
-- column rejected_share DOUBLE: 1 - unique_kept / unique, experts that only rejected rows load [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
steps as (
    select
        trace,
        request,
        step,
        layer,
        min(pos)::bigint as first_pos,
        count(*) as "window",
        max(pos) filter (kept is distinct from false) - min(pos) as accepted,
        bool_or(kept is null) as unknown,
        len(list_distinct(flatten(list(experts)))) as experts,
        len(list_distinct(flatten(list(experts) filter (kept)))) as experts_kept
    from verification
    group by trace, request, step, layer
),
layer_means as (
    select
        v.trace,
        s.phase,
        v.layer,
        v."window",
        count(*) as n_steps,
        avg(v."window" - 1) as drafted,
        avg(v.accepted) as accepted,
        bool_or(v.unknown) as unknown,
        avg(v.experts) as experts,
        avg(v.experts_kept) as experts_kept
    from steps as v
    join scope as s on v.trace = s.trace
    join requests as r on v.trace = r.trace and v.request = r.request
    where s.phase = 'all' or (v.first_pos >= r.decode_start) = (s.phase = 'decode')
    group by grouping sets ((v.trace, s.phase, v.layer, v."window"), (v.trace, s.phase, v.layer))
)
select
    trace,
    phase,
    "window",
    max(n_steps) as n_steps,
    avg(drafted) as drafted,
    avg(accepted) as accepted,
    avg(accepted) + 1 as acceptance_length,
    avg(experts) as "unique",
    case when not bool_or(unknown) then avg(experts_kept) end as unique_kept,
    1 - unique_kept / avg(experts) as rejected_share
from layer_means
group by trace, phase, "window"
order by trace, phase, "window" nulls last;
