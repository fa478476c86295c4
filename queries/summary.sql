-- The one page to read first: what the routing of a trace allows, and why.
--
-- One row per figure, in reading order: the shape of the trace, unique experts of a verification window
-- with the ladder of baselines, what the reduction is made of, how the overlap decays, what remains in a
-- batch, and how even the load is. Figures of one section share the phase and, where it says so, the
-- window length. A figure that the trace does not support has no row, or a null value and a note.
--
-- needs: windows(max_window=$window, batch_size=1 2 4 8 16 32 64), autocorr, attribution(window=$window), load
-- param trace VARCHAR = NULL: name of one trace; NULL takes all
-- param phase VARCHAR = NULL: decode, prefill or all; NULL takes decode where it was computed, else what there is
-- param window INTEGER = 4: window length T [tokens]; NULL takes 4, or the longest that a trace of short requests has
-- column trace VARCHAR: name of the trace
-- column phase VARCHAR: phase that the figures are of
-- column section VARCHAR: part of the page
-- column measure VARCHAR: what the figure is
-- column baseline VARCHAR: what it is compared with or expected from; null where it stands alone
-- column value DOUBLE: the figure
-- column lo DOUBLE: lower end of its 95 % interval; null without one
-- column hi DOUBLE: upper end
-- column unit VARCHAR: unit of value, lo and hi
-- column note VARCHAR: what to know before quoting it
with picked as (
    select *
    from windows as w
    where "by" = 'trace'
        and overlapping
        and not "distinct"
        and coalesce("window" = getvariable('window'), "window" <= 4)
        and trace = coalesce(getvariable('trace'), trace)
        and phase = coalesce(
            getvariable('phase'),
            (select t.default_phase from traces as t where t.trace = w.trace)
        )
    qualify "window" = max("window") over (partition by trace)
),
scope as (
    select distinct trace, phase, "window" from picked
),
sizes as (
    select
        s.trace,
        s.phase,
        case s.phase
            when 'decode' then q.n_decode
            when 'prefill' then q.n_tokens::bigint - q.n_decode
            else q.n_tokens
        end as tokens
    from scope as s
    join requests as q on s.trace = q.trace
),
totals as (
    select trace, phase, count(*) filter (where tokens > 0) as requests, sum(tokens)::bigint as tokens
    from sizes
    group by trace, phase
),
-- Figures are numbered by section and by place in it, so that the page has one order.
figures as (
    select s.trace, s.phase, 1 as part, i.place, 'trace' as section, i.measure, null as baseline, i.value,
        null::double as lo, null::double as hi, i.unit, i.note
    from totals as s
    join traces as t on s.trace = t.trace
    cross join lateral (
        values
            (1, 'experts per layer, N', t.num_experts::double, 'experts', t.model),
            (2, 'experts per token, k', t.top_k::double, 'experts',
                case when t.native_top_k <> t.top_k then 'reduced: the model''s own k is ' || t.native_top_k end),
            (3, 'MoE layers', t.moe_layers::double, 'layers', null),
            (4, 'requests', s.requests::double, 'requests', case
                when s.requests < 5 then 'fewer than 5: no intervals'
                when s.requests < 30 then 'fewer than 30: intervals are rough'
            end),
            (5, 'tokens', s.tokens::double, 'tokens', s.phase || case when s.phase = 'all' then ' phases' else '' end)
    ) as i (place, measure, value, unit, note)

    union all

    select w.trace, w.phase, 2, i.place, 'unique experts, T = ' || w."window", i.measure, i.baseline, i.value, i.lo, i.hi,
        i.unit, nullif(concat_ws('; ', i.note, case
            when i.value not between i.lo and i.hi then 'biased: the interval leaves out the estimate'
        end), '')
    from picked as w
    join traces as t on w.trace = t.trace
    cross join lateral (
        values
            (1, 'expected', 'uniform', w.expected_uniform, null, null, 'experts', 'every k-subset equally likely'),
            (2, 'expected', 'popularity', w.expected_popularity, null, null, 'experts', 'independent tokens, skewed experts'),
            (3, 'expected', 'label', w.expected_label, null, null, 'experts', 'the same inside each label'),
            (4, 'expected', 'request', w.expected_request, null, null, 'experts', 'a request''s tokens in random order'),
            (5, 'observed', null, w.observed, w.observed_lo, w.observed_hi, 'experts', case
                when w.phase = 'prefill' then null
                when t.drafts_included then 'accepted-only; tracekit steps has the steps with rejected drafts'
                else 'accepted-only: the trace has no rejected drafts'
            end),
            (6, 'observed / k', null, w.per_top_k, null, null, 'loads of one token', null),
            (7, 'reduction', 'uniform', w.reduction_uniform, w.reduction_uniform_lo, w.reduction_uniform_hi, 'fraction', null),
            (8, 'reduction', 'popularity', w.reduction_popularity, w.reduction_popularity_lo, w.reduction_popularity_hi,
                'fraction', null),
            (9, 'reduction', 'label', w.reduction_label, w.reduction_label_lo, w.reduction_label_hi, 'fraction', null),
            (10, 'reduction', 'request', w.reduction_request, w.reduction_request_lo, w.reduction_request_hi, 'fraction',
                'temporal correlation alone')
    ) as i (place, measure, baseline, value, lo, hi, unit, note)
    where w.batch_size = 1 and (i.value is not null or i.measure = 'observed')

    union all

    select a.trace, a.phase, 3, list_position(['popularity', 'label', 'request', 'token_order'], a.cause),
        'share of the drop, T = ' || a."window",
        replace(a.cause, '_', ' '), null, a.share, a.share_lo, a.share_hi, 'fraction',
        case a.cause
            when 'popularity' then 'some experts are popular everywhere'
            when 'label' then 'the label''s domain'
            when 'request' then 'the request''s topic'
            when 'token_order' then 'temporal correlation in the strict sense'
        end || case
            when a.resolved then ''
            when a.share is null and a.cause = 'label' then '; not resolved, its drop is the request''s'
            when a.share is null then '; not resolved, there may be no drop at all'
            when a.share not between a.share_lo and a.share_hi then '; not resolved, the interval leaves out the estimate'
            else '; not resolved, the interval includes 0'
        end || case
            when a.share > -1e-12 or a.share is null then ''
            when a.cause = 'request' then '; negative: its tokens are no more alike than the trace''s, or the requests too few'
            when a.cause = 'token_order' then '; negative: neighbours share fewer experts than in random order'
            else '; negative'
        end
    from attribution as a
    join scope as s on a.trace = s.trace and a.phase = s.phase and a."window" = s."window"
    where a."by" = 'trace'

    union all

    select c.trace, c.phase, 4, i.place, 'overlap', i.measure, i.baseline, i.value, i.lo, i.hi, 'fraction', null
    from autocorr as c
    join scope as s on c.trace = s.trace and c.phase = s.phase
    cross join lateral (
        values
            (c.lag, 'lag ' || c.lag, null, c.overlap, c.overlap_lo, c.overlap_hi),
            (100, 'expected', 'uniform', c.expected_uniform, null, null),
            (101, 'expected', 'popularity', c.expected_popularity, null, null),
            (102, 'expected, lag 1', 'request', c.expected_request, null, null),
            (200 + c.lag, 'rho, lag ' || c.lag, 'popularity', c.rho, null, null)
    ) as i (place, measure, baseline, value, lo, hi)
    where c."by" = 'trace'
        and c.lag in (1, 2, 4, 8, 16, 32)
        and i.value is not null
        and (c.lag = 1 or i.place not between 100 and 102)

    union all

    select w.trace, w.phase, 5, w.batch_size, 'reduction in a batch, T = ' || w."window",
        w.batch_size || ' requests', 'uniform', w.reduction_uniform, w.reduction_uniform_lo, w.reduction_uniform_hi,
        'fraction', null
    from picked as w
    where w.batch_size in (2, 4, 8, 16, 32, 64) and w.reduction_uniform is not null

    union all

    select l.trace, l.phase, 6, i.place, 'load', i.measure, null, i.value, null, null, i.unit, i.note
    from (
        select
            l.trace,
            l.phase,
            avg(l.max_over_mean) as max_over_mean,
            avg(l.entropy_norm) as entropy_norm,
            avg(l.effective_experts) as effective_experts,
            sum(l.dead_experts)::double as dead_experts,
            sum(t.num_experts)::bigint as experts
        from load as l
        join traces as t on l.trace = t.trace
        join scope as s on l.trace = s.trace and l.phase = s.phase
        where l."by" = 'layer'
        group by l.trace, l.phase
    ) as l
    cross join lateral (
        values
            (1, 'busiest expert / mean', l.max_over_mean, 'ratio', 'mean over layers'),
            (2, 'entropy / ln N', l.entropy_norm, 'fraction', 'mean over layers; 1 is even'),
            (3, 'effective experts', l.effective_experts, 'experts', 'mean over layers, exp of the entropy'),
            (4, 'dead experts', l.dead_experts, 'experts', 'of ' || l.experts || ', in all layers')
    ) as i (place, measure, value, unit, note)
)
select trace, phase, section, measure, baseline, value, lo, hi, unit, note
from figures
order by trace, part, place;
