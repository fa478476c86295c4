-- Accepted drafts per verification step, and the experts that such steps load, for the chart "acceptance".
--
-- One row per trace and number of accepted drafts; nothing for traces without verification steps.
--
-- needs: acceptance, steps
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column model VARCHAR: name of the model; null where the source does not say
-- column num_experts INTEGER: N, routed experts per layer [experts]
-- column top_k INTEGER: k, routed experts per token [experts]
-- column phase VARCHAR: phase the steps begin in
-- column accepted BIGINT: accepted drafts [tokens]
-- column n_steps BIGINT: steps that accept exactly so many
-- column share DOUBLE: their share of all steps [fraction]
-- column share_lo DOUBLE: its 95 % interval [fraction]
-- column share_hi DOUBLE: its 95 % interval [fraction]
-- column unique DOUBLE: mean unique experts of their rows [experts]
-- column rejected_unique DOUBLE: of these those that only rejected rows load [experts]; null where they are not known
-- column drafted DOUBLE: mean drafts of all steps [tokens]
-- column acceptance_length DOUBLE: mean tokens emitted by all steps [tokens]
-- column mean_unique DOUBLE: mean unique experts of all steps [experts]
-- column accepted_only DOUBLE: unique experts of windows of as many committed tokens [experts]
-- column expected_uniform DOUBLE: unique experts of as many tokens, every k-subset equally likely [experts]
select
    a.trace,
    t.model,
    t.num_experts,
    t.top_k,
    a.phase,
    a.accepted,
    a.n_steps,
    a.share,
    a.share_lo,
    a.share_hi,
    a."unique",
    a.rejected_unique,
    s.drafted,
    s.acceptance_length,
    s."unique" as mean_unique,
    s.accepted_only,
    s.expected_uniform
from acceptance as a
join traces as t on a.trace = t.trace
join steps as s on a.trace = s.trace and a.phase = s.phase and s."window" is null and s."by" = 'trace'
where a."by" = 'trace'
    and a.trace = coalesce(getvariable('trace'), a.trace)
    and a.phase = coalesce(getvariable('phase'), t.default_phase)
order by a.trace, a.accepted;
