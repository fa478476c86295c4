-- What mixing costs: the experts that a batch drawn from all requests loads, against a batch of one label.
--
-- One row per trace, batch size and label, and one without a label for the mean over labels, weighted by
-- their windows. Both batches are B windows drawn independently. A label has a row as far as it has B
-- requests; where some do not, the mean leaves them out, and covered says how much is left.
--
-- needs: windows(by=label, max_window=$window, batch_size=1 2 4 8 16 32 64 128 256), windows(max_window=$window, batch_size=1 2 4 8 16 32 64 128 256)
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase the windows lie in
-- column window BIGINT: window length T [tokens]
-- column batch_size BIGINT: requests verified together, B
-- column label VARCHAR: label of the requests, (none) for those without one; null for the mean over labels
-- column unique DOUBLE: experts that a batch of the label loads [experts]
-- column mixed DOUBLE: experts that a batch of all requests loads [experts]
-- column extra DOUBLE: mixed / unique - 1, what a mixed batch loads more [fraction]
-- column n_windows BIGINT: windows of this length per layer, of the label or of all that the mean takes
-- column covered DOUBLE: their share of the trace's windows [fraction]
-- column unique_lo DOUBLE: lower end of the 95 % interval of unique; null without one, and for the mean
-- column unique_hi DOUBLE: upper end
-- column mixed_lo DOUBLE: lower end of the 95 % interval of mixed; null without one
-- column mixed_hi DOUBLE: upper end
-- column num_experts INTEGER: N, routed experts per layer
-- column top_k INTEGER: k, routed experts per token
with chosen as (
    select w.*, t.num_experts, t.top_k
    from windows as w
    join traces as t on w.trace = t.trace
    where w."by" in ('label', 'trace')
        and w.overlapping
        and not w."distinct"
        and coalesce(w."window" = getvariable('window'), w."window" <= 4)
        and w.trace = coalesce(getvariable('trace'), w.trace)
        and w.phase = coalesce(getvariable('phase'), t.default_phase)
    qualify w."window" = max(w."window") over (partition by w.trace, w."by")
),
pairs as (
    select
        m.trace,
        m.phase,
        m."window",
        m.batch_size,
        l.label,
        l.observed as "unique",
        m.observed as mixed,
        m.observed / l.observed - 1 as extra,
        l.n_windows,
        l.n_windows / m.n_windows as covered,
        l.observed_lo as unique_lo,
        l.observed_hi as unique_hi,
        m.observed_lo as mixed_lo,
        m.observed_hi as mixed_hi,
        m.num_experts,
        m.top_k
    from chosen as m
    join chosen as l on l."by" = 'label' and l.trace = m.trace and l."window" = m."window" and l.batch_size = m.batch_size
    where m."by" = 'trace' and l.observed is not null and m.observed is not null
),
means as (
    select
        trace,
        phase,
        "window",
        batch_size,
        null::varchar as label,
        sum("unique" * n_windows) / sum(n_windows) as "unique",
        any_value(mixed) as mixed,
        any_value(mixed) * sum(n_windows) / sum("unique" * n_windows) - 1 as extra,
        sum(n_windows)::bigint as n_windows,
        sum(covered) as covered,
        null::double as unique_lo,
        null::double as unique_hi,
        any_value(mixed_lo) as mixed_lo,
        any_value(mixed_hi) as mixed_hi,
        any_value(num_experts) as num_experts,
        any_value(top_k) as top_k
    from pairs
    group by trace, phase, "window", batch_size
)
select *
from (from pairs union all by name from means)
order by trace, batch_size, label nulls last;
