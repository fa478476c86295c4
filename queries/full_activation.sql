-- How many tokens at once it takes until a share of the experts is active: the full-activation threshold.
--
-- One row per trace and share. From there on a larger batch, or a longer draft, loads hardly any more
-- experts. Three answers beside each other: by the uniform formula, by the trace's popularity, both for
-- independent tokens, and as observed: the smallest batch of single tokens, a random one of each of B
-- distinct requests, that loads as many experts on average. Skewed popularity makes it later.
--
-- needs: windows(max_window=1, batch_size=1..256, distinct=true)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the tokens lie in
-- column share DOUBLE: share of the experts that is to be active, mean over layers [fraction]
-- column experts DOUBLE: share * N [experts]
-- column uniform BIGINT: smallest t with 1 - (1 - k/N)^t >= share [tokens]
-- column popularity BIGINT: the same with the popularity of each layer's experts [tokens]; null above a million
-- column observed BIGINT: smallest batch size B with U(1, B) >= share * N [requests]; null if none up to largest is
-- column largest BIGINT: largest batch that the trace has requests for, 256 at most [requests]
with recursive singles as (
    select w.trace, w.phase, w.batch_size, w.observed
    from windows as w
    join traces as t on w.trace = t.trace
    where w."by" = 'trace'
        and w.overlapping
        and w."distinct"
        and w."window" = 1
        and w.observed is not null
        and w.trace = coalesce(getvariable('trace'), w.trace)
        and w.phase = coalesce(getvariable('phase'), t.default_phase)
),
asked as (
    select s.trace, s.phase, t.num_experts, t.top_k, max(s.batch_size) as largest,
        unnest([0.5, 0.9, 0.95, 0.99])::double as share
    from singles as s
    join traces as t on s.trace = t.trace
    group by s.trace, s.phase, t.num_experts, t.top_k
),
choices as (
    select s.trace, a.layer, a.expert, count(*)::double as n
    from (select distinct trace, phase from asked) as s
    join activations as a on a.trace = s.trace and (s.phase = 'all' or a.phase = s.phase)
    group by s.trace, a.layer, a.expert
),
-- Every layer has as many tokens, and each token chose k experts.
popular as materialized (
    select c.trace, 1 - c.n / sum(c.n) over (partition by c.trace, c.layer) * t.top_k as absent, t.moe_layers
    from choices as c
    join traces as t on c.trace = t.trace
),
search as (
    select trace, share, num_experts, 0::bigint as low, 1048576::bigint as high from asked
    union all
    select trace, share, num_experts, if(reached, low, (low + high) // 2), if(reached, (low + high) // 2, high)
    from (
        select s.trace, s.share, s.num_experts, s.low, s.high,
            sum(1 - greatest(p.absent, 0) ^ ((s.low + s.high) // 2)) / max(p.moe_layers)
                >= (s.share - 1e-12) * s.num_experts as reached
        from search as s
        join popular as p on s.trace = p.trace
        where s.high - s.low > 1
        group by s.trace, s.share, s.num_experts, s.low, s.high
    )
)
select
    a.trace,
    a.phase,
    a.share,
    a.share * a.num_experts as experts,
    ceil(ln(1 - a.share + 1e-12) / ln(greatest(1 - a.top_k / a.num_experts, 1e-300)))::bigint as uniform,
    nullif(f.high, 1048576) as popularity,
    (
        select min(s.batch_size)
        from singles as s
        where s.trace = a.trace and s.observed >= (a.share - 1e-12) * a.num_experts
    ) as observed,
    a.largest
from asked as a
join search as f on a.trace = f.trace and a.share = f.share and f.high - f.low = 1
order by a.trace, a.share;
