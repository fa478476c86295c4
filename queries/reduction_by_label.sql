-- Reduction of unique experts in each label of the requests (domain, dataset, language, ...).
--
-- One row per trace and label: sliding windows of one length inside that label's requests, as the
-- windows metric computed them. popularity stays the whole trace's, so a label whose own experts are
-- popular there shows a larger reduction against it than against its own (label).
--
-- needs: windows(by=label, max_window=$window)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column label VARCHAR: label of the requests; (none) stands for requests without one
-- column requests BIGINT: requests with this label that have tokens in the phase
-- column tokens BIGINT: their tokens in the phase
-- column window BIGINT: window length T [tokens]
-- column n_windows BIGINT: windows of this length per layer
-- column observed DOUBLE: mean unique experts per window [experts]
-- column observed_lo DOUBLE: lower end of its 95 % interval; null without one
-- column observed_hi DOUBLE: upper end
-- column reduction_uniform DOUBLE: 1 - observed / expected of k-subsets drawn uniformly [fraction]
-- column reduction_uniform_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_uniform_hi DOUBLE: upper end
-- column reduction_popularity DOUBLE: 1 - observed / expected from the trace's popularity [fraction]
-- column reduction_popularity_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_popularity_hi DOUBLE: upper end
-- column reduction_label DOUBLE: 1 - observed / expected from the label's own popularity [fraction]
-- column reduction_label_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_label_hi DOUBLE: upper end
-- column reduction_request DOUBLE: 1 - observed / expected of each request's tokens in random order [fraction]
-- column reduction_request_lo DOUBLE: lower end of its 95 % interval; null without one
-- column reduction_request_hi DOUBLE: upper end
with chosen as (
    select *
    from windows as w
    where "by" = 'label'
        and overlapping
        and not "distinct"
        and batch_size = 1
        and coalesce("window" = getvariable('window'), "window" <= 4)
        and trace = coalesce(getvariable('trace'), trace)
        and phase = coalesce(
            getvariable('phase'),
            (select t.default_phase from traces as t where t.trace = w.trace)
        )
    qualify "window" = max("window") over (partition by trace)
),
sizes as (
    select
        c.trace,
        c.label,
        case c.phase
            when 'decode' then q.n_decode
            when 'prefill' then q.n_tokens::bigint - q.n_decode
            else q.n_tokens
        end as tokens
    from chosen as c
    join requests as q on c.trace = q.trace and c.label = coalesce(q.label, '(none)')
),
totals as (
    select trace, label, count(*) filter (where tokens > 0) as requests, sum(tokens)::bigint as tokens
    from sizes
    group by trace, label
)
select
    c.trace,
    c.phase,
    c.label,
    t.requests,
    t.tokens,
    c."window",
    c.n_windows,
    c.observed,
    c.observed_lo,
    c.observed_hi,
    c.reduction_uniform,
    c.reduction_uniform_lo,
    c.reduction_uniform_hi,
    c.reduction_popularity,
    c.reduction_popularity_lo,
    c.reduction_popularity_hi,
    c.reduction_label,
    c.reduction_label_lo,
    c.reduction_label_hi,
    c.reduction_request,
    c.reduction_request_lo,
    c.reduction_request_hi
from chosen as c
join totals as t on c.trace = t.trace and c.label = t.label
order by c.trace, c.label;
