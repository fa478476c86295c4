-- How unevenly the experts of each layer are used.
--
-- One row per trace and layer, computed from the activations, or from the counts of a trace that has
-- nothing else (phase all). Experts that no token chose count with zero tokens in every measure;
-- where k is not known, what it takes part in is null.
--
-- needs: nothing
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where the trace has it, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column layer INTEGER: layer number of the model
-- column tokens BIGINT: tokens routed in this layer
-- column max_over_mean DOUBLE: tokens of the most popular expert / mean over experts [ratio]
-- column cv DOUBLE: coefficient of variation, population standard deviation / mean [ratio]
-- column gini DOUBLE: Gini coefficient, without small-sample correction [0 even .. 1]
-- column entropy DOUBLE: entropy H of the share of activations per expert [nats]
-- column entropy_norm DOUBLE: H / ln N [fraction of an even load's]
-- column effective_experts DOUBLE: exp(H) [experts]
-- column dead_experts INTEGER: experts that no token chose
-- column top_share DOUBLE: share of all activations that go to the k most popular experts [fraction]
-- column sum_p2_over_k DOUBLE: sum over e of p_e^2 / k, the overlap expected of two independent tokens [fraction]
with scope as (
    select trace, coalesce(getvariable('phase'), default_phase) as phase, histogram
    from traces
    where trace = coalesce(getvariable('trace'), trace)
),
choices as (
    select scope.trace, scope.phase, a.layer, a.expert, count(*)::double as n
    from activations as a
    join scope on a.trace = scope.trace and (scope.phase = 'all' or a.phase = scope.phase)
    group by scope.trace, scope.phase, a.layer, a.expert
    union all
    select scope.trace, scope.phase, n.layer, n.expert, sum(n.n)::double as n
    from counts as n
    join scope on n.trace = scope.trace and scope.histogram and scope.phase = 'all'
    group by scope.trace, scope.phase, n.layer, n.expert
),
ranked as (
    select
        c.*,
        t.top_k,
        t.num_experts,
        sum(c.n) over (partition by c.trace, c.layer) as total,
        row_number() over (partition by c.trace, c.layer order by c.n desc, c.expert) as place
    from choices as c join traces as t on c.trace = t.trace
),
-- Experts without a token are no rows here: they add nothing to the sums, and every mean divides by N.
layers as (
    select
        trace,
        phase,
        layer,
        top_k,
        num_experts,
        total,
        max(n) / (total / num_experts) as max_over_mean,
        -- of whole numbers: shares would leave a remainder where the load is even
        sqrt(greatest(0, num_experts * sum(n * n) - total * total)) / total as cv,
        -- sum over ranks i ascending of (2i - N - 1) n_i / (N total), written with the descending place
        sum((num_experts::double + 1 - 2 * place) * n) / (num_experts * total) as gini,
        -sum(n / total * ln(n / total)) as entropy,
        (num_experts::bigint - count(*))::integer as dead_experts,
        sum(n) filter (where place <= top_k) / total as top_share,
        top_k * sum(pow(n / total, 2)) as sum_p2_over_k
    from ranked
    group by trace, phase, layer, top_k, num_experts, total
)
select
    trace,
    phase,
    layer::integer as layer,
    (total / top_k)::bigint as tokens,
    max_over_mean,
    cv,
    gini,
    entropy,
    entropy / nullif(ln(num_experts), 0) as entropy_norm,
    exp(entropy) as effective_experts,
    dead_experts,
    top_share,
    sum_p2_over_k
from layers
order by trace, layer;
