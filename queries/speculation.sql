-- Speculative decoding by Amdahl's law: what verification costs and what it gains, without a model of the machine.
--
-- One row per trace, batch size B and draft length K = T - 1. The routed experts' share f of a step without
-- speculation grows with the batch, f(B) = f1 x / (f1 x + 1 - f1) with x = U(1, B) / k; a verification costs
-- V = f(B) U(T, B) / U(1, B) + 1 - f(B) such steps and gains S = AL / (V + D). The defaults are bounds: routed experts
-- are all of a step, every draft is accepted, and drafts cost nothing.
--
-- The unions are of windows of committed tokens, drawn independently; sampling, caches and compute are in no term.
--
-- needs: expert_ratio(max_window=$max_window, batch_size=1 2 4 8 16 32 64)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param max_window INTEGER = 8: longest window K + 1 [tokens]; NULL takes 8, or the longest that a trace of short requests has
-- param routed_share DOUBLE = 1.0: f1, share of the routed experts in a step of one token at B = 1 [fraction]
-- param acceptance_rate DOUBLE = 1.0: a, chance that a draft is accepted once those before it were [fraction]
-- param acceptance_length DOUBLE = NULL: AL of every row, in place of that of the rate; for one draft length [tokens]
-- param draft_cost DOUBLE = 0.0: cost of one draft; D is K times it [steps without speculation]
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column batch_size BIGINT: requests verified together, B
-- column drafts BIGINT: drafts per step, K [tokens]
-- column window BIGINT: tokens verified per request, K + 1 [tokens]
-- column unique DOUBLE: U(T, B), experts per layer that a verification loads [experts]
-- column unique_single DOUBLE: U(1, B), experts per layer that a step of one token per request loads [experts]
-- column expert_ratio DOUBLE: U(T, B) / U(1, B)
-- column routed_share DOUBLE: f(B), the routed experts' share of a step without speculation [fraction]
-- column verification_ratio DOUBLE: V [steps without speculation]
-- column verification_ratio_lo DOUBLE: lower end of its 95 % interval, that of the expert ratio; null without one
-- column verification_ratio_hi DOUBLE: upper end
-- column verification_ratio_uniform DOUBLE: V if every k-subset were equally likely [steps without speculation]
-- column acceptance_length DOUBLE: AL, tokens that a step emits, the bonus token included [tokens]
-- column draft_cost DOUBLE: D, all drafts of a step [steps without speculation]
-- column speedup DOUBLE: S = AL / (V + D)
-- column speedup_lo DOUBLE: lower end of its 95 % interval; null without one
-- column speedup_hi DOUBLE: upper end
-- column speedup_uniform DOUBLE: S if every k-subset were equally likely
-- column break_even_length DOUBLE: V + D, the AL from which speculation gains [tokens]
-- column model VARCHAR: name of the model, where the source says
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
with given as (
    select
        coalesce(getvariable('routed_share'), 1.0)::double as f1,
        coalesce(getvariable('acceptance_rate'), 1.0)::double as a,
        coalesce(getvariable('draft_cost'), 0.0)::double as draft_cost
),
expected as (
    -- unique experts of B and of T B tokens if every k-subset were equally likely
    select
        r.*,
        t.model,
        t.num_experts,
        t.top_k,
        t.num_experts * (1 - (1 - t.top_k / t.num_experts) ** r.batch_size) as uniform_single,
        t.num_experts * (1 - (1 - t.top_k / t.num_experts) ** (r.batch_size * r."window")) as uniform
    from expert_ratio as r
    join traces as t on r.trace = t.trace
    where r."by" = 'trace'
        and r."window" > 1
        and r.ratio is not null
        and r."window" <= coalesce(getvariable('max_window'), 8)
        and r.trace = coalesce(getvariable('trace'), r.trace)
        and r.phase = coalesce(getvariable('phase'), t.default_phase)
),
shares as (
    select
        e.*,
        g.*,
        e."window" - 1 as k,
        g.f1 * e.unique_single / (g.f1 * e.unique_single + (1 - g.f1) * e.top_k) as f,
        g.f1 * e.uniform_single / (g.f1 * e.uniform_single + (1 - g.f1) * e.top_k) as f_uniform
    from expected as e cross join given as g
),
costs as (
    select
        *,
        f * ratio + 1 - f as v,
        f * ratio_lo + 1 - f as v_lo,
        f * ratio_hi + 1 - f as v_hi,
        f_uniform * uniform / uniform_single + 1 - f_uniform as v_uniform,
        k * draft_cost as d,
        coalesce(
            getvariable('acceptance_length')::double,
            case when a = 1 then k + 1 else (1 - a ** (k + 1)) / (1 - a) end
        ) as al
    from shares
)
select
    trace,
    phase,
    batch_size,
    k as drafts,
    "window",
    "unique",
    unique_single,
    ratio as expert_ratio,
    f as routed_share,
    v as verification_ratio,
    v_lo as verification_ratio_lo,
    v_hi as verification_ratio_hi,
    v_uniform as verification_ratio_uniform,
    al as acceptance_length,
    d as draft_cost,
    al / (v + d) as speedup,
    al / (v_hi + d) as speedup_lo,
    al / (v_lo + d) as speedup_hi,
    al / (v_uniform + d) as speedup_uniform,
    v + d as break_even_length,
    model,
    num_experts,
    top_k
from costs
order by trace, batch_size, "window";
