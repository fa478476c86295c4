"""The metrics of a store's traces: measured in one pass, saved beside the trace, returned as frames."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.state import Spec, caveats, resolve_phase
from tracekit.schema import By, Phase
from tracekit.store import Store, TraceInfo, results
from tracekit.store.runs import Runs

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.measurement import Measurement

StoreLike = Store | str | Path

MAX_WINDOW = 8
"""Longest window by default: up to 7 drafted tokens."""

MAX_LAG = 32
"""Largest lag by default."""

WINDOW = 4
"""Window that is taken apart by default."""


def as_store(store: StoreLike) -> Store:
    """Return the store, opened if it is a path."""
    return store if isinstance(store, Store) else Store(store)


def threads() -> int:
    """Return the threads that a pass uses: the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One result that is wanted of a trace: how it is measured, keyed, and finalised."""

    kind: str
    spec: Spec
    key: dict[str, Any]
    """What the numbers depend on, besides the trace."""
    finalise: Callable[[Measurement], pl.DataFrame]


def _want_windows(
    runs: Runs,
    *,
    max_window: int | None = None,
    batch_size: int | Iterable[int] = 1,
    overlapping: bool = True,
    **common: Any,
) -> _Wanted:
    import polars as pl

    sizes = [operator.index(b) for b in (batch_size if isinstance(batch_size, Iterable) else [batch_size])]
    if not sizes or min(sizes) < 1:
        raise UsageError(f"batch sizes {sizes}", expected="whole numbers from 1 on")
    longest = runs.fit(max_window, MAX_WINDOW, "windows")
    runs.batch(sizes, longest, common["by"])
    spec = Spec(runs.phase, max_window=longest, overlapping=overlapping, batches=max(sizes) > 1, **common)
    key = {"max_window": longest, "batch_size": sizes, "overlapping": overlapping, **common}
    return _Wanted("windows", spec, key, lambda m: m.windows(sizes).filter(pl.col("window") <= longest))


def _want_autocorr(runs: Runs, *, max_lag: int | None = None, **common: Any) -> _Wanted:
    import polars as pl

    largest = runs.fit(max_lag, MAX_LAG, "lags", reach=1)
    spec = Spec(runs.phase, max_lag=largest, **common)
    return _Wanted(
        "autocorr", spec, {"max_lag": largest, **common}, lambda m: m.autocorr().filter(pl.col("lag") <= largest)
    )


def _want_attribution(runs: Runs, *, window: int | None = None, **common: Any) -> _Wanted:
    length = runs.fit(window, WINDOW, "windows", least=2)
    spec = Spec(runs.phase, max_window=length, **common)
    return _Wanted("attribution", spec, {"window": length, **common}, lambda m: m.attribution(length))


def _want_load(runs: Runs, *, by: By | None = None, **common: Any) -> _Wanted:
    if by == "request":
        raise UsageError("load by request", expected="by layer or by label")
    group: By | None = "label" if by == "label" else None
    return _Wanted("load", Spec(runs.phase, by=group, **common), {"by": group}, lambda m: m.load())


_WANT: dict[str, Callable[..., _Wanted]] = {
    "windows": _want_windows,
    "autocorr": _want_autocorr,
    "attribution": _want_attribution,
    "load": _want_load,
}


def ensure(
    store: StoreLike,
    wanted: Sequence[tuple[str, dict[str, Any]]],
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> list[pl.DataFrame]:
    """Return several results, of one trace or of all: what is not saved yet is measured in as few passes as possible.

    Of several traces, one that does not support the results is left out, with a warning.

    Parameters
    ----------
    wanted
        For each result its kind (``windows``, ``autocorr``, ``attribution``, ``load``) and the arguments of the
        function of that name.
    trace, phase, intervals, seed
        As in :func:`windows`.

    Returns
    -------
    list of polars.DataFrame
        One frame per result, with the columns of the view of that name.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        No trace supports the results, with the reason.
    """
    import polars as pl

    store = as_store(store)
    infos = [store.trace(trace)] if trace is not None else store.traces() or [store.trace()]
    several = len(infos) > 1
    per_trace = []
    refused = []
    for info in infos:
        requests = store.requests(info)
        name = f"trace {info.name!r}"
        warn_of(info)
        try:
            _check_tokens(info, [kind for kind, _ in wanted])
            runs = Runs.read(store, info, requests, resolve_phase(requests, phase))
            common = {"by": None, "intervals": intervals, "seed": seed}
            asked = [_WANT[kind](runs, **common | a) for kind, a in wanted]
            notes = [note for w in asked if w.kind != "load" for note in caveats(requests, w.spec)]
            for note in dict.fromkeys(notes + runs.notes):
                _warn(f"{name}: {note}" if several else note)
            frames = _obtain(store, info, requests, asked)
        except UnsupportedError as error:
            refused.append((name, error))
            continue
        per_trace.append([frame.select(pl.lit(info.name).alias("trace"), pl.all()) for frame in frames])
    if not per_trace:
        name, refusal = refused[0]
        where = name if several else None
        raise UnsupportedError(refusal.found, where=where, expected=refusal.expected, remedy=refusal.remedy)
    for name, refusal in refused:
        _warn(f"{name} is left out: {refusal.found}")
    return [pl.concat(frames) for frames in zip(*per_trace, strict=True)]


def _check_tokens(info: TraceInfo, kinds: Sequence[str]) -> None:
    """Refuse what takes tokens of a trace that holds counts only."""
    others = [kind for kind in kinds if kind != "load"]
    if info.meta.histogram and others:
        raise UnsupportedError(
            f"the trace holds counts per expert only, without tokens or their order: no {others[0]}",
            remedy="Ask for its load, or ingest a trace of tokens",
        )


def _obtain(store: Store, info: TraceInfo, requests: pl.DataFrame, asked: list[_Wanted]) -> list[pl.DataFrame]:
    """Return the results asked for: saved ones are read, the others computed and saved."""
    frames = [results.load(store.path, w.kind, info, w.key | {"phase": w.spec.phase}) for w in asked]
    passes: dict[Spec, list[int]] = {}
    for i, frame in enumerate(frames):
        if frame is None:
            passes.setdefault(replace(asked[i].spec, max_window=1, max_lag=0, batches=False), []).append(i)
    if passes:
        from tracekit.metrics.measurement import Counted, Measurement  # brings numba, which a saved result does without
    for spec, members in passes.items():
        specs = [asked[i].spec for i in members]
        shared = replace(
            spec,
            max_window=max(s.max_window for s in specs),
            max_lag=max(s.max_lag for s in specs),
            batches=any(s.batches for s in specs),
        )
        measured: Any = (
            Counted(info.meta, requests, shared, partial(store.counts, info))
            if info.meta.histogram
            else Measurement(info.meta, requests, shared, store.blocks(info), threads())
        )
        for i in members:
            frame = frames[i] = asked[i].finalise(measured)
            results.save(store.path, asked[i].kind, info, asked[i].key | {"phase": spec.phase}, frame)
    return [frame for frame in frames if frame is not None]


def warn_of(info: TraceInfo) -> None:
    """Repeat, in a line each, what the check at ingest found serious."""
    for finding in info.findings:
        if finding.severity == "serious":
            _warn(f"trace {info.name!r}: {finding.finding} ({finding.where}): {finding.effect}. {finding.remedy}")


def _warn(note: str) -> None:
    warnings.warn(note, TracekitWarning, stacklevel=4)


def _shown(frame: pl.DataFrame, by: By | None, *also: str) -> pl.DataFrame:
    """Leave out the columns that say how a row was grouped, but for the group itself."""
    groups = {"layer": "layer", "label": "label", "request_id": "request"}
    return frame.drop(
        "by", "intervals", "seed", *(column for column, name in groups.items() if name != by and column not in also)
    )


def measure(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int = MAX_WINDOW,
    max_lag: int = MAX_LAG,
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
    from tracekit.metrics.measurement import Measurement

    store = as_store(store)
    info = store.trace(trace)
    warn_of(info)
    _check_tokens(info, ["windows"])
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
    for note in caveats(requests, spec):
        warnings.warn(note, TracekitWarning, stacklevel=2)
    return Measurement(info.meta, requests, spec, store.blocks(info), threads())


def windows(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int | None = None,
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
        Name of one trace; default: every trace of the store that can answer.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    max_window
        Longest window T in tokens; with K drafted tokens T = K + 1. Default: 8, or what the trace has.
    batch_size
        Batch sizes B: the union over B windows drawn independently; null with fewer than B requests.
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
        The trace cannot answer, with the reason: it has no such phase, label or window.
    UsageError
        An argument is out of range.
    """
    arguments = {"max_window": max_window, "batch_size": batch_size, "overlapping": overlapping, "by": by}
    [frame] = ensure(store, [("windows", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return _shown(frame, by).drop("overlapping")


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
    return _shown(frame, by)


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
    return _shown(frame, by)


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
    return _shown(frame, by, "layer")
