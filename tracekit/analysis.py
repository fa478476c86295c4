"""The metrics of a store's traces: measured in one pass, saved beside the trace, returned as frames."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.errors import TracekitWarning, UsageError
from tracekit.metrics.measurement import Measurement, caveats, resolve_phase
from tracekit.metrics.state import Spec
from tracekit.schema import By, Phase
from tracekit.store import Store, TraceInfo, results

if TYPE_CHECKING:
    import polars as pl

StoreLike = Store | str | Path


def _store(store: StoreLike) -> Store:
    return store if isinstance(store, Store) else Store(store)


def threads() -> int:
    """Return the threads that a pass uses: the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int = 8,
    max_lag: int = 32,
    overlapping: bool = True,
    batches: bool = False,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> Measurement:
    """Read one trace once and return the sums that windows, autocorrelation, attribution and load come from.

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
    store = _store(store)
    info = store.trace(trace)
    requests = store.requests(info)
    spec = Spec(
        phase=resolve_phase(requests, phase),
        max_window=max_window,
        max_lag=max_lag,
        overlapping=overlapping,
        batches=batches,
        by=by,
        intervals=intervals,
        seed=seed,
    )
    _warn(requests, spec)
    return Measurement(info.meta, requests, spec, store.blocks(info), threads())


def _warn(requests: pl.DataFrame, spec: Spec) -> None:
    for note in caveats(requests, spec):
        warnings.warn(note, TracekitWarning, stacklevel=4)


def windows(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int = 8,
    batch_size: int | Iterable[int] = 1,
    overlapping: bool = True,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return unique experts per speculative-decoding verification window against named independence baselines.

    Parameters
    ----------
    store
        A store or its path.
    trace
        Name of one trace; default: every trace of the store.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    max_window
        Longest window T in tokens; with K drafted tokens T = K + 1.
    batch_size
        Batch sizes B: the union over B windows drawn independently.
    overlapping
        Sliding windows (every start), or starts 0, T, 2T, … with the tail dropped.
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
        The trace cannot answer, with the reason.
    UsageError
        An argument is out of range.
    """
    sizes = [batch_size] if isinstance(batch_size, int) else list(batch_size)
    parameters = {"max_window": max_window, "batch_size": sizes, "overlapping": overlapping}

    def compute(store: Store, info: TraceInfo, **common: Any) -> pl.DataFrame:
        m = measure(
            store, trace=info.name, max_window=max_window, max_lag=0, overlapping=overlapping, batches=max(sizes) > 1, **common
        )
        return m.windows(sizes)

    frame = _each(store, "windows", trace, phase, by, intervals, seed, parameters, compute)
    return frame.drop("overlapping")


def autocorr(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_lag: int = 32,
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
        Largest lag D in tokens.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and lag. ``overlap`` is the mean of shared experts over k, ``rho`` its
        coefficient against popularity, (overlap - expected) / (1 - expected); ``jaccard``, ``any_shared`` and
        ``rank0_repeat`` are means over pairs (the last is null unless the trace keeps router order).
    """
    parameters = {"max_lag": max_lag}

    def compute(store: Store, info: TraceInfo, **common: Any) -> pl.DataFrame:
        return measure(store, trace=info.name, max_window=1, max_lag=max_lag, **common).autocorr()

    return _each(store, "autocorr", trace, phase, by, intervals, seed, parameters, compute)


def attribution(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int = 4,
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
        Window length T in tokens.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and cause. ``drop`` is in unique experts; ``share`` is the cause's part of the
        whole drop. An unresolved label has drop 0 and a null share, and ``request`` starts from popularity.
    """
    parameters = {"window": window}

    def compute(store: Store, info: TraceInfo, **common: Any) -> pl.DataFrame:
        return measure(store, trace=info.name, max_window=window, max_lag=0, **common).attribution(window)

    return _each(store, "attribution", trace, phase, by, intervals, seed, parameters, compute)


def load(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
) -> pl.DataFrame:
    """Return popularity and balance of the experts: one row per trace, phase and layer (and label with ``by="label"``).

    Returns
    -------
    polars.DataFrame
        ``max_over_mean``, ``cv`` (population), ``gini`` (uncorrected), ``entropy`` (nats) and ``entropy_norm`` (over
        ln N), ``effective_experts`` exp(H), ``dead_experts``, ``top_share`` (activations of the k most popular
        experts) and ``sum_p2_over_k``, the overlap that popularity alone gives.
    """
    if by == "request":
        raise UsageError("load by request", expected="by layer or by label")
    group: By = "label" if by == "label" else "layer"

    def compute(store: Store, info: TraceInfo, **common: Any) -> pl.DataFrame:
        return measure(store, trace=info.name, max_window=1, max_lag=0, **common).load()

    return _each(store, "load", trace, phase, group, False, 0, {}, compute)


def _each(
    store: StoreLike,
    kind: str,
    trace: str | None,
    phase: Phase | None,
    by: By | None,
    intervals: bool,
    seed: int,
    parameters: dict[str, Any],
    compute: Callable[..., pl.DataFrame],
) -> pl.DataFrame:
    """Return one kind of result for one trace or all of them, computed unless it is saved already."""
    import polars as pl

    store = _store(store)
    infos = [store.trace(trace)] if trace is not None else store.traces() or [store.trace()]
    frames = []
    for info in infos:
        requests = store.requests(info)
        common = {"phase": resolve_phase(requests, phase), "by": by, "intervals": intervals, "seed": seed}
        key = parameters | common
        frame = results.load(store.path, kind, info, key)
        if frame is None:
            frame = compute(store, info, **common)
            results.save(store.path, kind, info, key, frame)
        else:
            _warn(requests, Spec(**common))
        frames.append(frame.select(pl.lit(info.name).alias("trace"), pl.all()))
    frame = pl.concat(frames)
    group_columns = {"layer": kind == "load" or by == "layer", "label": by == "label", "request_id": by == "request"}
    return frame.drop("by", *(column for column, shown in group_columns.items() if not shown))
