-- Pairs of experts that tokens choose together, by layer.
--
-- One row per trace, layer and pair, the pairs with the most tokens beyond what independent choices would give first;
-- computed from the activations. Experts that go together are worth one transfer, or one device.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- param top INTEGER = 5: pairs of a layer
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column rank INTEGER: 1 is the layer's pair with the most tokens beyond independence; ties go to the lower ids
-- column expert INTEGER: expert i
-- column other INTEGER: expert j, j > i
-- column tokens BIGINT: N_ij, tokens that chose both
-- column given_expert DOUBLE: N_ij / N_i, tokens with i that chose j too [fraction]
-- column given_other DOUBLE: N_ij / N_j, tokens with j that chose i too [fraction]
-- column lift DOUBLE: N_ij n / (N_i N_j), over n tokens; (k-1) N / (k (N-1)) where every k-subset is equally likely [ratio]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
uses as (
    select s.trace, s.phase, a.request, a.phase as part, a.layer, a.pos::bigint as pos, a.rank, a.expert
    from activations as a
    join scope as s on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
),
choices as (
    select trace, layer, expert, count(*) as n from uses group by trace, layer, expert
),
tokens as (
    select trace, layer, count(*) as n from uses where rank = 0 group by trace, layer
),
pairs as (
    select a.trace, a.phase, a.layer, a.expert, b.expert as other, count(*) as n
    from uses as a
    join uses as b
        on a.trace = b.trace and a.request = b.request and a.layer = b.layer and a.pos = b.pos and a.expert < b.expert
    group by a.trace, a.phase, a.layer, a.expert, b.expert
)
select
    p.trace,
    p.phase,
    p.layer::integer as layer,
    (row_number() over (
        partition by p.trace, p.layer order by p.n - i.n * j.n / t.n desc, p.expert, p.other
    ))::integer as rank,
    p.expert::integer as expert,
    p.other::integer as other,
    p.n as tokens,
    p.n / i.n as given_expert,
    p.n / j.n as given_other,
    p.n / i.n * t.n / j.n as lift
from pairs as p
join choices as i on p.trace = i.trace and p.layer = i.layer and p.expert = i.expert
join choices as j on p.trace = j.trace and p.layer = j.layer and p.other = j.expert
join tokens as t on p.trace = t.trace and p.layer = t.layer
qualify rank <= coalesce(getvariable('top'), 5)
order by p.trace, p.layer, rank;
