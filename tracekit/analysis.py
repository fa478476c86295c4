"""The metrics of a store's traces: measured in one pass, saved beside the trace, returned as frames."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.errors import TracekitWarning, UsageError
from tracekit.metrics.measurement import Measurement, caveats, resolve_phase
from tracekit.metrics.state import Spec
from tracekit.schema import By, Phase
from tracekit.store import Store, results

if TYPE_CHECKING:
    import polars as pl

StoreLike = Store | str | Path

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes of the summary and of the chart by batch size."""


def as_store(store: StoreLike) -> Store:
    """Return the store, opened if it is a path."""
    return store if isinstance(store, Store) else Store(store)


def threads() -> int:
    """Return the threads that a pass uses: the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """One result that is wanted of a trace: how it is measured, keyed, and finalised."""

    kind: str
    spec: Spec
    finalise: Callable[[Measurement], pl.DataFrame]
    key: dict[str, Any]
    """What the numbers depend on, besides the trace."""


def wanted_windows(spec: Spec, batch_sizes: Sequence[int] = (1,)) -> Wanted:
    """Ask for unique experts per window; see :func:`windows`."""
    import polars as pl

    spec = replace(spec, batches=max(batch_sizes, default=1) > 1)
    key = _key(spec, "max_window", "overlapping") | {"batch_size": list(batch_sizes)}
    return Wanted("windows", spec, lambda m: m.windows(batch_sizes).filter(pl.col("window") <= spec.max_window), key)


def wanted_autocorr(spec: Spec) -> Wanted:
    """Ask for temporal autocorrelation; see :func:`autocorr`."""
    import polars as pl

    return Wanted("autocorr", spec, lambda m: m.autocorr().filter(pl.col("lag") <= spec.max_lag), _key(spec, "max_lag"))


def wanted_attribution(spec: Spec, window: int) -> Wanted:
    """Ask for the causes of the reduction; see :func:`attribution`."""
    spec = replace(spec, max_window=window)
    return Wanted("attribution", spec, lambda m: m.attribution(window), _key(spec, "max_window"))


def wanted_load(spec: Spec) -> Wanted:
    """Ask for popularity and balance; see :func:`load`."""
    return Wanted("load", spec, Measurement.load, {"phase": spec.phase, "by": spec.by})


def _key(spec: Spec, *names: str) -> dict[str, Any]:
    values = asdict(spec)
    return {name: values[name] for name in ("phase", "by", "intervals", "seed", *names)}


def obtain(
    store: Store, trace: str | None, phase: Phase | None, wanted: Callable[[Phase], list[Wanted]]
) -> list[pl.DataFrame]:
    """Return results for one trace or all of them: those that are saved are read, the others share one pass.

    Parameters
    ----------
    wanted
        Given the phase that a trace is measured in, the results wanted of it; they may differ in window lengths,
        lags and batches only.

    Returns
    -------
    One frame per result wanted, with a row block per trace.
    """
    import polars as pl

    infos = [store.trace(trace)] if trace is not None else store.traces() or [store.trace()]
    per_trace = []
    for info in infos:
        requests = store.requests(info)
        asked = wanted(resolve_phase(requests, phase))
        _warn(requests, asked[0].spec)
        frames = [results.load(store.path, w.kind, info, w.key) for w in asked]
        missing = [w for w, frame in zip(asked, frames, strict=True) if frame is None]
        if missing:
            shared = replace(
                missing[0].spec,
                max_window=max(w.spec.max_window for w in missing),
                max_lag=max(w.spec.max_lag for w in missing),
                batches=any(w.spec.batches for w in missing),
            )
            measured = Measurement(info.meta, requests, shared, store.blocks(info), threads())
            for w in missing:
                frame = w.finalise(measured)
                results.save(store.path, w.kind, info, w.key, frame)
                frames[asked.index(w)] = frame
        name = pl.lit(info.name).alias("trace")
        per_trace.append([frame.select(name, pl.all()) for frame in frames if frame is not None])
    return [pl.concat(frames) for frames in zip(*per_trace, strict=True)]


def _warn(requests: pl.DataFrame, spec: Spec) -> None:
    for note in caveats(requests, spec):
        warnings.warn(note, TracekitWarning, stacklevel=4)


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
    store = as_store(store)
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

    def wanted(phase: Phase) -> list[Wanted]:
        spec = Spec(phase, max_window=max_window, overlapping=overlapping, by=by, intervals=intervals, seed=seed)
        return [wanted_windows(spec, sizes)]

    return _shown(obtain(as_store(store), trace, phase, wanted)[0], by).drop("overlapping")


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
    if max_lag < 1:
        raise UsageError(f"a largest lag of {max_lag}", expected="at least 1")

    def wanted(phase: Phase) -> list[Wanted]:
        return [wanted_autocorr(Spec(phase, max_lag=max_lag, by=by, intervals=intervals, seed=seed))]

    return _shown(obtain(as_store(store), trace, phase, wanted)[0], by)


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

    def wanted(phase: Phase) -> list[Wanted]:
        return [wanted_attribution(Spec(phase, by=by, intervals=intervals, seed=seed), window)]

    return _shown(obtain(as_store(store), trace, phase, wanted)[0], by)


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
    group: By | None = "label" if by == "label" else None

    def wanted(phase: Phase) -> list[Wanted]:
        return [wanted_load(Spec(phase, by=group, intervals=False))]

    return _shown(obtain(as_store(store), trace, phase, wanted)[0], group, layer=True)


def headline(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int = 4,
    intervals: bool = True,
    seed: int = 0,
) -> None:
    """Compute what the summary needs, in one pass: windows, batches, autocorrelation, attribution and load."""

    def wanted(phase: Phase) -> list[Wanted]:
        spec = Spec(phase, max_window=max(8, window), max_lag=32, intervals=intervals, seed=seed)
        return [
            wanted_windows(spec, BATCH_SIZES),
            wanted_autocorr(spec),
            wanted_attribution(spec, window),
            wanted_load(spec),
        ]

    obtain(as_store(store), trace, phase, wanted)


def _shown(frame: pl.DataFrame, by: By | None, *, layer: bool = False) -> pl.DataFrame:
    """Leave out the group columns that this grouping does not use."""
    shown = {"layer": layer or by == "layer", "label": by == "label", "request_id": by == "request"}
    return frame.drop("by", *(column for column, keep in shown.items() if not keep))
