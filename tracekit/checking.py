"""Check a source before it is ingested, or the traces of a store: what is wrong, where, and what it would do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks import Checker, Finding, ordered
from tracekit.errors import SourceError, StoreError, UsageError
from tracekit.schema import Request
from tracekit.sources.mend import Mends
from tracekit.sources.released import released_top_k
from tracekit.store import Store, TraceInfo
from tracekit.store.manifest import SEGMENTS, is_store
from tracekit.store.writer import Progress, default_name, open_mended, reading_options

if TYPE_CHECKING:
    import polars as pl

TOKENS = "tokens.parquet"

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
    of them); what takes statistics looks at a sample of some 30,000 rows. A finding says how much was looked at.

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
    paths = [] if isinstance(source, Store) else [Path(p) for p in _several(source)]
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
    found = _check_source(paths, mends, progress, reading)
    return _frame([(default_name(paths[0]), f) for f in found])


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
        checker = Checker(stream.meta, released_top_k(stream.meta))
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
    name = next((name for pattern, name in _REFUSALS.items() if re.search(pattern, error.found)), "refused")
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
    checker = Checker(info.meta, released_top_k(info.meta))
    if not info.meta.histogram:
        for request in _requests(store, info):
            checker.add(request)
    return checker.findings(info.notes)


def _requests(store: Store, info: TraceInfo) -> Iterator[Request]:
    """Yield the trace's requests again, in order, from its blocks."""
    rows = {row["request"]: row for row in store.requests(info).iter_rows(named=True)}
    tokens = _Tokens(store, info)
    begun: list[NDArray[Any]] = []  # layers of a request that goes on in the next block
    for block in store.blocks(info):
        runs = block.runs
        for number in np.unique(runs["request"]).tolist():
            of_request = np.flatnonzero(runs["request"] == number)
            layers = np.unique(runs["layer"][of_request])
            of_layer = of_request[runs["layer"][of_request] == layers[0]]
            low, count = int(runs["row"][of_request[0]]), int(runs["n"][of_layer].sum())
            ids = block.ids[:, low : low + count * len(layers)].reshape(-1, len(layers), count)
            begun.append(ids.transpose(2, 1, 0))
            if sum(part.shape[1] for part in begun) < len(info.meta.layers):
                begun[-1] = begun[-1].copy()
                continue
            pieces = zip(runs["pos"][of_layer].tolist(), runs["n"][of_layer].tolist(), strict=True)
            positions = np.concatenate([np.arange(pos, pos + n, dtype=np.int64) for pos, n in pieces])
            row = rows[number]
            yield Request(
                request_id=row["request_id"],
                ids=begun[0] if len(begun) == 1 else np.concatenate(begun, axis=1),
                first_pos=int(positions[0]),
                prompt_len=row["prompt_len"],
                decode_start=row["decode_start"],
                positions=positions if len(of_layer) > 1 else None,
                token_ids=tokens.of(number, count),
            )
            begun = []


class _Tokens:
    """The token ids of a trace's requests, read along with its rows."""

    def __init__(self, store: Store, info: TraceInfo) -> None:
        self._batches = self._read([store.path / SEGMENTS / s.id / TOKENS for s in info.segments if s.has_token_ids])
        self._requests = np.zeros(0, np.int64)
        self._ids = np.zeros(0, np.int64)

    def of(self, request: int, count: int) -> NDArray[np.int64] | None:
        """Return the token ids of a request that is not before the last one asked for, None where it has none."""
        while not len(self._requests) or self._requests[-1] <= request:
            batch = next(self._batches, None)
            if batch is None:
                break
            keep = self._requests >= request
            self._requests = np.concatenate([self._requests[keep], batch[0]])
            self._ids = np.concatenate([self._ids[keep], batch[1]])
        low, high = np.searchsorted(self._requests, [request, request + 1])
        return self._ids[low:high] if high - low == count else None

    @staticmethod
    def _read(paths: list[Path]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        import polars as pl

        for path in paths:
            try:
                for frame in pl.scan_parquet(path, glob=False).collect_batches(maintain_order=True):
                    yield frame["request"].to_numpy().astype(np.int64), frame["token_id"].to_numpy()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise StoreError(f"cannot be read ({error})", where=str(path)) from None
