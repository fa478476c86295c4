"""Check a source before it is ingested, or the traces of a store: what is wrong, where, and what it would do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.checks import OF_INGEST, Checker, Finding, findings_of_parts, ordered
from tracekit.errors import SourceError, UsageError
from tracekit.schema import Request
from tracekit.sources.mend import Mends
from tracekit.sources.released import released_experts, released_top_k
from tracekit.store import Store, TraceInfo
from tracekit.store.location import location
from tracekit.store.manifest import is_store
from tracekit.store.recheck import checkers
from tracekit.store.writer import Progress, default_name, open_mended, reading_options

if TYPE_CHECKING:
    import polars as pl

_REFUSALS = {
    r"twice in one row": "duplicate-ids",
    r"negative expert id": "negative-ids",
    r"^expert id \d+ of": "ids-out-of-range",
    r"padding$|filler": "filler-rows",
    r"whole rankings cut": "argsort-view",
    r"capture never ran|all zero: not captured|is zero in this request": "not-captured",
    r"packed MoE layers": "packed-layers",
    r"have routing but are dense|routed in this request but zero": "dense-layers",
    r"rows of routing": "missing-rows",
    r"axes|axis": "ambiguous-axes",
    r"prompt of \d+ tokens|--phase prefill": "prompt-dropped",
    r"more than the model's": "surplus-top-k",
    r"^router weight": "invalid-weights",
    r"^contradiction about": "contradiction",
}
"""What ingest refuses, by what its message says, and the name of the finding."""


def check(
    source: Store | str | Path | Sequence[str | Path],
    *,
    trace: str | None = None,
    drop_warmup: bool = False,
    deinterleave: int | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
    **reading: Any,
) -> pl.DataFrame:
    """Say what is wrong with a source or with the traces of a store.

    Requests are looked at row by row for copies, gaps and ids that no router makes (after some 8 million ids one in 16
    of them); what takes statistics looks at a sample of some 25,000 rows. A finding says how much was looked at.

    Parameters
    ----------
    source
        A store or its path; or files and folders that :func:`tracekit.ingest` takes, together one trace.
    trace
        Name of one trace of the store; default: all of them.
    drop_warmup, deinterleave, layers
        Mends to check the source with, as in :func:`tracekit.ingest`.
    progress
        As in :func:`tracekit.ingest`.
    **reading
        How to read the source: ``config``, ``num_experts``, ``top_k``, ``axes``, ``phase``, ``requests``,
        ``label_fields``, ``labels``, ``source_format``, ``router_order``, ``id_space``, as in :func:`tracekit.ingest`.

    Returns
    -------
    polars.DataFrame
        One row a finding, the serious first: ``trace``, ``severity`` (``serious``, ``warning``, ``note``), ``finding``,
        ``where``, ``evidence``, ``effect``, ``remedy``; all text. What ingest would refuse is a serious finding.

    Raises
    ------
    SourceError
        The source is not a trace at all, or cannot be read without an option that is missing.
    StoreError
        The store or the trace is not there, or damaged.
    """
    mends = Mends(drop_warmup, deinterleave, None if layers is None else tuple(layers))
    paths = [] if isinstance(source, Store) else [location(p) for p in _several(source)]
    if len(paths) > 1 and any(map(is_store, paths)):
        raise UsageError("a store beside other sources", expected="one store, or sources that make up one trace")
    if isinstance(source, Store) or (len(paths) == 1 and is_store(paths[0])):
        given = [name for name, value in reading.items() if value]
        if given or mends != Mends():
            raise UsageError("options for reading a source", expected="a source: the trace of a store is read already")
        store = source if isinstance(source, Store) else Store(paths[0])
        infos = store.traces() if trace is None else [store.trace(trace)]
        return _frame([(info.name, f) for info in infos for f in check_trace(store, info)])
    if not paths:
        raise UsageError("no source given", expected="at least one file, folder or store")
    if trace is not None:
        raise UsageError("--trace names a trace of a store", expected="a store")
    files = [path for path in paths if isinstance(path, Path)]  # all of them: a URL is a store
    found = _check_source(files, mends, progress, reading)
    return _frame([(default_name(files[0]), f) for f in found])


def _several(source: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [source] if isinstance(source, str | Path) else source


def _frame(rows: list[tuple[str, Finding]]) -> pl.DataFrame:
    import polars as pl

    names = Finding.__slots__
    data = [(trace, *(getattr(finding, name) for name in names)) for trace, finding in rows]
    return pl.DataFrame(data, schema=dict.fromkeys(("trace", *names), pl.String), orient="row")


def _check_source(paths: list[Path], mends: Mends, progress: Progress | None, reading: dict[str, Any]) -> list[Finding]:
    options = reading_options(**reading)
    checker: Checker | None = None
    notes: Sequence[str] = ()
    tokens = 0
    try:
        stream = open_mended(paths, options, mends)
        meta = stream.meta
        checker = Checker(meta, released_top_k(meta), released_experts(meta), options.phase)
        for request in stream.requests():
            checker.add(request)
            tokens += len(request.ids) if isinstance(request, Request) else 0
            if progress:
                progress(stream.done_bytes, stream.total_bytes, tokens)
        notes = stream.notes
    except SourceError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        return ordered([refusal, *(checker.findings() if checker else ())])
    return checker.findings(notes)


def _refusal(error: SourceError) -> Finding | None:
    """Return as a finding what ingest refuses; None for what is no trace at all, or lacks an option."""
    where = error.where or ""
    if "does not say how many experts" in error.found or ", request " not in where:
        return None
    other = "verification-steps" if ", verification steps" in where else "refused"
    name = next((name for pattern, name in _REFUSALS.items() if re.search(pattern, error.found)), other)
    expected = f"; expected {error.expected}" if error.expected else ""
    return Finding(
        "serious",
        name,
        where,
        error.found + expected,
        "ingest refuses it: there would be no numbers; what comes after it was not looked at",
        error.remedy or "Correct the source",
    )


def check_trace(store: Store, info: TraceInfo) -> list[Finding]:
    """Return what is wrong with one trace of a store, as :func:`check` does.

    Raises
    ------
    StoreError
        A file of the store cannot be read.
    """
    found = findings_of_parts(checkers(store, info), info.notes)
    return ordered([*found, *(f for f in info.findings if f.finding in OF_INGEST)])
