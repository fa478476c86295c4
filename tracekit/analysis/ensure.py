"""Results of a store's traces: saved ones are read, the others measured in as few passes as possible and saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.analysis.passes import PASSES, with_steps
from tracekit.analysis.wants import WANT, Wanted
from tracekit.errors import TracekitWarning, UnsupportedError
from tracekit.metrics.state import Spec, caveats, resolve_phase
from tracekit.schema import By, Phase
from tracekit.store import Store, TraceInfo, results
from tracekit.store.runs import Runs

if TYPE_CHECKING:
    import polars as pl

StoreLike = Store | str | Path


def as_store(store: StoreLike) -> Store:
    """Return the store, opened if it is a path."""
    return store if isinstance(store, Store) else Store(store)


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
            check_tokens(info, [kind for kind, _ in wanted])
            runs = Runs.read(store, info, requests, resolve_phase(requests, phase))
            common = {"by": None, "intervals": intervals, "seed": seed}
            asked = [WANT[kind](runs, **common | a) for kind, a in wanted]
            of = {"steps": with_steps(store, info, requests)} if any(w.reads == "steps" for w in asked) else {}
            notes = [n for w in asked if w.kind != "load" for n in caveats(of.get(w.reads, requests), w.spec)]
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


def check_tokens(info: TraceInfo, kinds: Sequence[str]) -> None:
    """Refuse what takes tokens of a trace that holds counts only."""
    others = [kind for kind in kinds if kind != "load"]
    if info.meta.histogram and others:
        raise UnsupportedError(
            f"the trace holds counts per expert only, without tokens or their order: no {others[0]}",
            remedy="Ask for its load, or ingest a trace of tokens",
        )


def _obtain(store: Store, info: TraceInfo, requests: pl.DataFrame, asked: list[Wanted]) -> list[pl.DataFrame]:
    """Return the results asked for: saved ones are read, the others computed and saved."""
    frames = [results.load(store.path, w.kind, info, w.key | {"phase": w.spec.phase}) for w in asked]
    passes: dict[tuple[str, Spec], list[int]] = {}
    for i, frame in enumerate(frames):
        if frame is None:
            alike = replace(asked[i].spec, max_window=1, max_lag=0, batches=False, distinct_batch=0)
            passes.setdefault((asked[i].reads, alike), []).append(i)
    for (name, spec), members in passes.items():
        specs = [asked[i].spec for i in members]
        shared = replace(
            spec,
            max_window=max(s.max_window for s in specs),
            max_lag=max(s.max_lag for s in specs),
            batches=any(s.batches for s in specs),
            distinct_batch=max(s.distinct_batch for s in specs),
        )
        measured = PASSES[name](store, info, requests, shared)
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


def shown(frame: pl.DataFrame, by: By | None, *also: str) -> pl.DataFrame:
    """Leave out the columns that say how a row was grouped, but for the group itself."""
    groups = {"layer": "layer", "label": "label", "request_id": "request"}
    return frame.drop(
        "by", "intervals", "seed", *(column for column, name in groups.items() if name != by and column not in also)
    )
