"""What routing is like: the public functions for windows, autocorrelation, attribution and load."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tracekit.analysis.ensure import StoreLike, as_store, check_tokens, ensure, shown, warn_of
from tracekit.analysis.wants import MAX_LAG, MAX_WINDOW
from tracekit.errors import TracekitWarning
from tracekit.metrics.state import Spec, caveats, resolve_phase
from tracekit.schema import By, Phase

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.measurement import Measurement


def measure(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int = MAX_WINDOW,
    max_lag: int = MAX_LAG,
    overlapping: bool = True,
    batches: bool = False,
    distinct_batch: int = 0,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> Measurement:
    """Return the sums that windows, autocorrelation, attribution and load of one trace come from.

    Its rows are read once, or not again where their sums are kept.

    Parameters
    ----------
    store
        A store or its path.
    trace
        Name of the trace; may be left out where the store holds one.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    max_window, max_lag
        Window lengths 1 .. T and lags 1 .. D (0: none).
    overlapping
        Sliding windows, or starts 0, T, 2T, … with the tail dropped.
    batches
        Whether batch sizes above 1 will be asked of the result.
    distinct_batch
        Largest batch of distinct requests that will be asked of it, for its ``windows(…, distinct=True)``; 0: none.
    by
        ``layer``, ``label`` or ``request``: what a row of the results stands for; None: the trace.
    intervals
        Whether to keep what intervals need.
    seed
        Seed of the grouping of requests where there are more than 200.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason.
    """
    from tracekit.analysis.summing import sums
    from tracekit.metrics.measurement import Measurement

    store = as_store(store)
    info = store.trace(trace)
    warn_of(info)
    check_tokens(info, ["windows"])
    requests = store.requests(info)
    spec = Spec(
        phase=resolve_phase(requests, phase),
        max_window=max_window,
        max_lag=max_lag,
        overlapping=overlapping,
        batches=batches,
        distinct_batch=distinct_batch,
        by=by,
        intervals=intervals,
        seed=seed,
    )
    for note in caveats(requests, spec):
        warnings.warn(note, TracekitWarning, stacklevel=2)
    return Measurement(info.meta, spec, sums(store, info, requests, spec))


def windows(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int | None = None,
    batch_size: int | Iterable[int] = 1,
    overlapping: bool = True,
    distinct: bool = False,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return unique experts per speculative-decoding verification window against named independence baselines.

    The windows are accepted-only: consecutive committed tokens, whether or not the trace has rejected drafts. What real
    verification steps load is in :func:`tracekit.steps`, for traces that have them.

    Parameters
    ----------
    store
        A store or its path.
    trace
        Name of one trace; default: every trace of the store that can answer.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    max_window
        Longest window T in tokens; with K drafted tokens T = K + 1. Default: 8, or what the trace has.
    batch_size
        Batch sizes B: the union over B windows drawn independently; null with fewer than B requests.
    overlapping
        Sliding windows (every start), or starts 0, T, 2T, … with the tail dropped.
    distinct
        Draw B distinct requests instead, each equally likely, and a random window of each. There are no intervals
        then, and ``label`` and ``request`` are null: their requests weigh by their windows. Not with ``by="request"``.
    by
        ``layer``, ``label`` or ``request``.
    intervals
        95 % delete-a-group jackknife intervals over whole requests.
    seed
        Seed of the grouping of requests where there are more than 200.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, batch size and window length. ``observed`` and ``expected_*`` count unique
        experts per layer; ``per_top_k`` is observed / k; ``reduction_*`` is 1 - observed / expected (fractions).
        Null where undefined.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no such phase, label or window.
    UsageError
        An argument is out of range.
    """
    drawn = {"overlapping": overlapping, "distinct": distinct}
    arguments = {"max_window": max_window, "batch_size": batch_size, **drawn, "by": by}
    [frame] = ensure(store, [("windows", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by).drop(*drawn)


def autocorr(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_lag: int | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return the temporal autocorrelation of routing: the overlap of the expert sets of tokens d apart.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`windows`.
    max_lag
        Largest lag D in tokens. Default: 32, or what the trace has.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and lag. ``overlap`` is the mean of shared experts over k, ``rho`` its
        coefficient against popularity, (overlap - expected) / (1 - expected); ``jaccard``, ``any_shared`` and
        ``rank0_repeat`` are means over pairs (the last is null unless the trace keeps router order).
    """
    arguments = {"max_lag": max_lag, "by": by}
    [frame] = ensure(store, [("autocorr", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def attribution(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return what the reduction from ``uniform`` to observed is made of.

    The ladder of baselines telescopes: popularity (skewed experts), label (domain), request (topic), and token order,
    which alone is temporal correlation in the strict sense.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`windows`.
    window
        Window length T in tokens. Default: 4, or what the trace has.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and cause. ``drop`` is in unique experts; ``share`` is the cause's part of the
        whole drop. An unresolved label has drop 0 and a null share, and ``request`` starts from popularity.
    """
    arguments = {"window": window, "by": by}
    [frame] = ensure(store, [("attribution", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def load(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
) -> pl.DataFrame:
    """Return popularity and balance of the experts: one row per trace, phase and layer (and label with ``by="label"``).

    The one metric that traces of counts support; where their k is not known, ``tokens``, ``top_share`` and
    ``sum_p2_over_k`` are null.

    Returns
    -------
    polars.DataFrame
        ``max_over_mean``, ``cv`` (population), ``gini`` (uncorrected), ``entropy`` (nats) and ``entropy_norm`` (over
        ln N), ``effective_experts`` exp(H), ``dead_experts``, ``top_share`` (activations of the k most popular
        experts) and ``sum_p2_over_k``, the overlap that popularity alone gives.
    """
    [frame] = ensure(store, [("load", {"by": by})], trace=trace, phase=phase, intervals=False)
    return shown(frame, by, "layer")
