-- Mutual information between the experts of a layer and those of the next.
--
-- One row per trace and layer that has a next one; computed from the activations. Of a token, one of its k experts is
-- drawn at either layer: the mutual information of the two, in nats, estimated from the counts. The estimate is high by
-- about (N - 1)^2 / 2n where n tokens are independent (Miller 1955, for n draws; those of one token go together), which
-- is bias: what is not well above it says nothing.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column next_layer INTEGER: the next MoE layer
-- column tokens BIGINT: n, tokens with both layers
-- column information DOUBLE: mutual information [nats]
-- column entropy_next DOUBLE: entropy of the next layer's expert [nats]
-- column explained DOUBLE: information / entropy_next [fraction]; null where the next layer has one expert
-- column bias DOUBLE: (used - 1)(used_next - 1) / 2n, used being the experts that were chosen [nats]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, num_experts, top_k
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
nexts as (
    -- One row a token and layer, with the experts of the next layer beside its own.
    select r.trace, s.phase, r.layer, r.experts, lead(r.layer) over token as next_layer, lead(r.experts) over token as next_experts
    from routing as r
    join scope as s on r.trace = s.trace and (s.phase = 'all' or r.phase = s.phase)
    window token as (partition by r.trace, r.request, r.pos order by r.layer)
),
pairs as (
    select trace, phase, layer, next_layer, expert, next_expert, count(*) as n
    from (
        select trace, phase, layer, next_layer, expert, unnest(next_experts) as next_expert
        from (select * exclude (experts), unnest(experts) as expert from nexts where next_layer is not null)
    )
    group by all
),
choices as (
    select trace, layer, expert, count(*) as n from (select trace, layer, unnest(experts) as expert from nexts) group by all
),
tokens as (
    select trace, layer, count(*) as n from nexts group by trace, layer
),
shares as (
    select trace, layer, expert, n / sum(n) over (partition by trace, layer) as p from choices
),
of_layers as (
    select trace, layer, -sum(p * ln(p)) as entropy, count(*) as used from shares group by trace, layer
),
informations as (
    select q.trace, q.phase, q.layer, q.next_layer, sum(q.p * ln(q.p / i.p / j.p)) as information
    from (select *, n / sum(n) over (partition by trace, layer) as p from pairs) as q
    join shares as i on q.trace = i.trace and q.layer = i.layer and q.expert = i.expert
    join shares as j on q.trace = j.trace and q.next_layer = j.layer and q.next_expert = j.expert
    group by q.trace, q.phase, q.layer, q.next_layer
)
select
    m.trace,
    m.phase,
    m.layer::integer as layer,
    m.next_layer::integer as next_layer,
    t.n as tokens,
    m.information,
    b.entropy as entropy_next,
    m.information / nullif(b.entropy, 0) as explained,
    (a.used - 1) * (b.used - 1) / 2 / t.n as bias
from informations as m
join of_layers as a on m.trace = a.trace and m.layer = a.layer
join of_layers as b on m.trace = b.trace and m.next_layer = b.layer
join tokens as t on m.trace = t.trace and m.layer = t.layer
order by m.trace, m.layer;
