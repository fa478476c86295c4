"""Ingest: canonical requests in, one committed segment out, in bounded memory."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tracekit.checks import OF_INGEST, Checker, Finding, findings_of_parts, ordered
from tracekit.errors import SourceError, StoreError, TracekitError, UsageError
from tracekit.schema import Histogram, IdSpace, Phase, Predictions, Request, SourceFile, TraceMeta, id_dtype
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import load_config
from tracekit.sources.files import fault
from tracekit.sources.histograms import tokens_of
from tracekit.sources.mend import Mended, Mends, Stream
from tracekit.sources.released import released_experts, released_top_k
from tracekit.store.ahead import SMALL, ahead
from tracekit.store.manifest import (
    MANIFEST,
    SEGMENTS,
    TEMPORARY,
    Segment,
    TraceInfo,
    locked,
    part_name,
    read_manifest,
    sweep,
    sync_segment,
    with_trace,
    write_manifest,
)
from tracekit.store.reader import Store
from tracekit.store.recheck import checkers
from tracekit.store.spool import COUNTS, PREDICTED, STEPS, Spool, count_columns, prediction_columns, step_columns
from tracekit.store.sums import checksum

if TYPE_CHECKING:
    import polars as pl

PART_ROWS = 2_000_000
"""Routing rows of a part file: one row group, a few tens of MB in memory."""

GROUP_ROWS = 4 * PART_ROWS
"""Routing rows after which an ingest that can be resumed commits the files that it has read."""

UNCHECKED = Finding(
    "warning",
    "not-checked",
    "the latest requests",
    "an ingest did not end",
    "none known: what the check would have found in them is not said here",
    "Run it again with --resume",
)
"""What a trace has that is being added to by an ingest that can be resumed."""

_TRANSPOSE_TOKENS = 512
_WRITERS = 2

Progress = Callable[[int, int, int], None]
"""Called with bytes read, bytes in all, and tokens ingested so far."""


def ingest(
    sources: str | Path | Sequence[str | Path],
    store: str | Path,
    *,
    name: str | None = None,
    config: str | Path | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    axes: str | None = None,
    phase: Literal["decode", "prefill"] | None = None,
    requests: str | Path | Sequence[Mapping[str, Any]] | None = None,
    label_fields: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    source_format: str | None = None,
    router_order: bool | None = None,
    id_space: IdSpace | None = None,
    drop_warmup: bool = False,
    deinterleave: int | None = None,
    layers: Sequence[int] | None = None,
    append: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> TraceInfo:
    """Read a trace from engine output, check it, and commit it to a store.

    The store is created if it is not there. It is changed by a single rename at the end: whatever happens before,
    it stays as it was. With ``resume`` it is changed file by file.

    What the trace has already is left out, by content, under whatever name it comes.

    Parameters
    ----------
    sources
        Files or folders, read in the order given.
    store
        Directory of the store.
    name
        Name of the trace; default: the first source's file name without its ending.
    config
        The model's ``config.json``, or the name of a bundled model: gives N, k and the MoE layers.
    num_experts, top_k
        N and k where no config says so.
    axes
        Order of the array axes, a permutation of ``"tlk"`` (token, layer, rank).
    phase
        ``"decode"`` or ``"prefill"`` where every row is one of them.
    requests
        One entry per request, in order or with a ``request_id``: a JSON file or a list of mappings.
    label_fields
        Fields of the requests that make up their label.
    labels
        Labels that hold for every request.
    source_format
        Name of the reader, where detection is not wanted.
    router_order, id_space
        Provenance, where it is known better than the source says.
    drop_warmup
        Leave out runs of identical rows at the start of requests, and where the same rows come back.
    deinterleave
        Sequences that take turns in each request, row by row: each becomes a request.
    layers
        Layer numbers to keep.
    append
        Add requests to an existing trace of that name.
    force
        Replace an existing trace of that name.
    resume
        Create the trace, or go on with it: read the files that it does not have, and commit now and then after a file,
        so that an ingest that is killed can go on there.
    progress
        Called now and then with bytes read, bytes in all, and tokens so far.

    Returns
    -------
    TraceInfo
        The trace as the store now holds it; its ``findings`` say what may be wrong with it.

    Raises
    ------
    SourceError
        The source is malformed, ambiguous, or contradicts itself or the options.
    StoreError
        The name exists, the directory is not a store, or it cannot be written.
    """
    paths = [Path(p) for p in ([sources] if isinstance(sources, str | Path) else sources)]
    if not paths:
        raise UsageError("no source given")
    root = Path(store)
    trace_name = name if name is not None else default_name(paths[0])
    check_words(trace_name, append=append, force=force, resume=resume)
    if resume and requests is not None:
        raise UsageError(
            "--resume with --requests, which has an entry for every request",
            expected="sources that can be read in several goes",
            remedy="Label with --label and --label-fields, or add each batch of files with --append and its --requests",
        )
    options = reading_options(
        config=config,
        num_experts=num_experts,
        top_k=top_k,
        axes=axes,
        phase=phase,
        requests=requests,
        label_fields=label_fields,
        labels=labels,
        source_format=source_format,
        router_order=router_order,
        id_space=id_space,
    )
    mends = Mends(drop_warmup, deinterleave, None if layers is None else tuple(layers))
    return _store_trace(
        root,
        trace_name,
        lambda known: open_mended(paths, options, mends, known),
        append=append,
        force=force,
        resume=resume,
        phase=phase,
        progress=progress,
    )


def reading_options(
    *,
    config: str | Path | None = None,
    requests: str | Path | Sequence[Mapping[str, Any]] | None = None,
    label_fields: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    **others: Any,
) -> IngestOptions:
    """Return the options for reading a source, with the files that they name read in; arguments as in `ingest`.

    Raises
    ------
    UsageError
        Two options contradict each other, whatever the source says.
    """
    options = IngestOptions(
        config=load_config(Path(config)) if config is not None else None,
        labels=dict(labels or {}),
        label_fields=tuple(label_fields),
        requests=_sidecar(requests),
        **others,
    )
    if options.config and options.num_experts not in (None, options.config.num_experts):
        raise UsageError(
            f"--num-experts {options.num_experts}, but --config {config} says {options.config.num_experts}",
            expected="one number of experts per layer",
            remedy="Leave out --num-experts, or give the config of the model that was traced",
        )
    return options


def open_mended(
    paths: Sequence[Path], options: IngestOptions, mends: Mends, known: Iterable[SourceFile] | None = None
) -> Stream:
    """Open files and folders as one trace, with the mends that were asked for; ``known`` as in `open_source`."""
    source = open_source(paths, options, known)
    return source if mends == Mends() or source.empty else Mended(source, mends)


class _Given:
    """A trace that is made as it is written: what `open_source` returns for one that is read."""

    done_bytes = total_bytes = 0
    empty, left_out = False, ()

    def __init__(
        self, meta: TraceMeta, requests: Iterable[Request], notes: Sequence[str], sources: Sequence[str]
    ) -> None:
        self.meta, self.notes = meta, notes
        self._requests, self._sources = requests, sources

    def records(self) -> Iterator[Request | Histogram | SourceFile]:
        layers, top_k, experts = len(self.meta.layers), self.meta.top_k, self.meta.num_experts
        for request in self._requests:
            ids = request.ids
            if ids.shape[1:] != (layers, top_k) or (ids.size and int(ids.max()) >= experts):
                raise SourceError(
                    f"request {request.request_id!r} has ids {list(ids.shape)} up to {int(ids.max(initial=0))}",
                    where=request.where or None,
                    expected=f"[tokens, {layers}, {top_k}] below {experts}",
                )
            for p in request.predictions:
                if p.ids.shape[:2] != ids.shape[:2] or (p.known.any() and int(p.ids[p.known].max()) >= experts):
                    raise SourceError(
                        f"request {request.request_id!r} has predictions {list(p.ids.shape)} by {p.predictor!r}",
                        where=request.where or None,
                        expected=f"[{len(ids)}, {layers}, m] below {experts}",
                    )
            yield request
        yield from map(SourceFile, self._sources)


def write_trace(
    store: str | Path,
    name: str,
    meta: TraceMeta,
    requests: Iterable[Request],
    *,
    sources: Sequence[str] = (),
    notes: Sequence[str] = (),
    append: bool = False,
    force: bool = False,
) -> TraceInfo:
    """Commit requests that come from no file, one after the other, as `ingest` does with those that do.

    Parameters
    ----------
    store
        Directory of the store, created if it is not there.
    name
        Name of the trace.
    meta
        Shape and provenance, which every request must have.
    requests
        In canonical form: taken once, one by one, after the name was found to be free, with the store locked.
    sources
        Where they are from, for the record.
    notes
        Sentences to keep with the trace.
    append, force
        Add to an existing trace of that name, or replace it.

    Returns
    -------
    TraceInfo
        The trace as the store now holds it.

    Raises
    ------
    SourceError
        There is no request, two have the same id, or they do not fit the trace that is appended to.
    StoreError
        The name exists, the directory is not a store, or it cannot be written.
    """
    check_words(name, append=append, force=force)
    given = _Given(meta, requests, notes, sources)
    return _store_trace(Path(store), name, lambda _: given, append=append, force=force)


def check_words(name: str | None, *, append: bool, force: bool, resume: bool = False) -> None:
    """Refuse a name, if it is known already, and intentions that no store could take.

    Raises
    ------
    UsageError
        The name is blank, or a trace is to be both added to and replaced.
    """
    given = [f"--{word}" for word, there in (("append", append), ("force", force), ("resume", resume)) if there]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other")
    if name is not None and not name.strip():
        raise UsageError(f"the name {name!r}", expected="a name that can be seen")


def check_name(store: str | Path, name: str, *, append: bool = False, force: bool = False) -> None:
    """Raise what `write_trace` would raise about the name and the store, before the work that makes the trace.

    Raises
    ------
    StoreError
        The name exists, or does not and is to be appended to; or the directory is not a store, or a damaged one.
    UsageError
        As `check_words`.
    """
    check_words(name, append=append, force=force)
    root = Path(store)
    _refuse_other(root)
    traces = read_manifest(root) if (root / MANIFEST).exists() else []
    _existing(traces, root, name, append=append, force=force)


def _existing(traces: list[TraceInfo], root: Path, name: str, *, append: bool, force: bool) -> TraceInfo | None:
    """Return the trace of that name; one that is there or not against the user's intention is an error."""
    existing = next((t for t in traces if t.name == name), None)
    if existing and not (append or force):
        raise StoreError(
            f"a trace named {name!r} is there already",
            where=str(root),
            remedy="Add requests to it with --append, replace it with --force, or choose another --name",
        )
    if append and not existing:
        raise StoreError(
            f"no trace named {name!r} to append to", where=str(root), remedy="Leave out --append to create it"
        )
    return existing


def _store_trace(
    root: Path,
    name: str,
    open_trace: Callable[[tuple[SourceFile, ...]], Stream | _Given],
    *,
    append: bool,
    force: bool,
    resume: bool = False,
    phase: Phase | None = None,
    progress: Progress | None = None,
) -> TraceInfo:
    """Write one trace as a segment and commit it; the store is as it was before if anything fails.

    An ingest that can be resumed writes and commits several segments. What is added to is checked again, from its rows:
    copies, shares and statistics are those of all requests.
    """
    with writable_store(root) as traces:
        existing = _existing(traces, root, name, append=append, force=force or resume)
        base = None if force else existing
        source = open_trace(base.sources if base else ())
        if base:
            if source.empty:
                return _unchanged(root, traces, base, source.left_out)
            _check_same_shape(base, source.meta)
        before = checkers(Store(root), base) if base else []
        said = [f for f in base.findings if f.finding in OF_INGEST] if base else []
        known = _request_ids(root, base) if base else set[str]()
        checker = Checker(source.meta, released_top_k(source.meta), released_experts(source.meta), phase)
        trace, tokens = base, 0
        # A trace that is made as it is written stays in this thread: models keep state there.
        records = source.records() if isinstance(source, _Given) else ahead(source.records(), SMALL)
        record = next(records, None)
        while record is not None:
            writer = _SegmentWriter(root, source.meta, trace.requests if trace else 0, known)
            with writer, ThreadPoolExecutor(1, thread_name_prefix="tracekit-check") as pool:
                while record is not None and not (resume and writer.full and not isinstance(record, SourceFile)):
                    if isinstance(record, SourceFile):
                        writer.end_file(record)
                    else:
                        writer.add(record)
                        checker.add(record)
                    if progress:
                        progress(source.done_bytes, source.total_bytes, tokens + writer.tokens)
                    record = next(records, None)
                notes = tuple(dict.fromkeys([*(base.notes if base else ()), *source.notes]))
                if record is None:  # the check of all, while the last part is written
                    found = pool.submit(findings_of_parts, [*before, checker], notes)
                segment = writer.finish()
                findings = ordered([*said, *(found.result() if record is None else [UNCHECKED])])
            tokens += writer.tokens
            trace = trace or TraceInfo(name, source.meta, _now(), ())
            meta = replace(trace.meta, drafts_included=trace.meta.drafts_included or segment.has_steps)
            segments = (*trace.segments, segment)
            trace = replace(trace, meta=meta, segments=segments, notes=notes, findings=tuple(findings))
            write_manifest(root, with_trace(traces, trace))
        if trace is None or trace is base:
            raise SourceError("no requests found in the source")
    return replace(trace, notes=(*trace.notes, *source.left_out))


def _unchanged(root: Path, traces: list[TraceInfo], trace: TraceInfo, notes: Sequence[str]) -> TraceInfo:
    """Return a trace that has all the sources, with what is to be said about them; check what an ingest left."""
    if UNCHECKED in trace.findings:
        said = [f for f in trace.findings if f.finding in OF_INGEST]
        found = findings_of_parts(checkers(Store(root), trace), trace.notes)
        trace = replace(trace, findings=tuple(ordered([*said, *found])))
        write_manifest(root, with_trace(traces, trace))
    return replace(trace, notes=(*trace.notes, *notes, "nothing is new: no request was added"))


def default_name(path: Path) -> str:
    """Return the name of a trace that was given none: the source's file name without its ending."""
    name = path.resolve().name
    return name if path.is_dir() else name.split(".")[0] or name


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _sidecar(requests: str | Path | Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    if requests is None:
        return None
    if not isinstance(requests, str | Path):
        return list(requests)
    where = str(requests)
    try:
        data = json.loads(Path(requests).read_bytes())
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", where=where) from None
    except (ValueError, RecursionError) as error:
        found = f"is not JSON ({fault(error)})"
        raise SourceError(found, where=where, expected="a JSON array, one entry a request") from None
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise SourceError("is not an array of objects", where=where, expected="a JSON array, one object a request")
    return data


def _refuse_other(root: Path) -> None:
    """Refuse what is there and is neither a store nor the place of one."""
    if not root.exists() or (root / MANIFEST).exists():
        return
    if not root.is_dir():
        raise StoreError("is a file, not a store", where=str(root), expected="a directory")
    ours = (SEGMENTS, ".lock")  # what an ingest that was killed leaves behind
    if any(entry.name not in ours and not entry.name.startswith(TEMPORARY) for entry in root.iterdir()):
        raise StoreError(
            "is not empty and is not a tracekit store", where=str(root), remedy="Choose another --store directory"
        )


@contextlib.contextmanager
def writable_store(root: Path) -> Iterator[list[TraceInfo]]:
    """Lock the store, creating it if need be; a store that was created here and stays empty is removed again."""
    created = not root.exists()
    _refuse_other(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            traces = read_manifest(root) if (root / MANIFEST).exists() else []
            try:
                yield traces
            finally:
                sweep(root, read_manifest(root) if (root / MANIFEST).exists() else traces)
                if created and not (root / MANIFEST).exists():
                    shutil.rmtree(root, ignore_errors=True)
    except OSError as error:
        if isinstance(error, TracekitError):
            raise
        raise StoreError(
            f"cannot be written ({error.strerror or error})", where=str(root), remedy="What was committed to it is safe"
        ) from error


def _check_same_shape(trace: TraceInfo, meta: TraceMeta) -> None:
    for what in ("histogram", "num_experts", "top_k", "layers", "model", "id_space"):
        old, new = getattr(trace.meta, what), getattr(meta, what)
        if old != new and not (what == "model" and None in (old, new)):
            raise SourceError(
                f"{what} is {new} here and {old} in trace {trace.name!r}",
                expected="the same model and layers to append to",
                remedy="Ingest it as a trace of its own with another --name",
            )


@dataclass(frozen=True, slots=True)
class _Block:
    """What the rows of one request, for some layers, have besides ids: they stand layer by layer."""

    request: int
    positions: NDArray[np.int64]
    decode_start: int | None
    layers: NDArray[np.uint16]

    @property
    def rows(self) -> int:
        return len(self.layers) * len(self.positions)

    def runs(self, part: int, row: int) -> NDArray[np.int64]:
        """Return the runs of consecutive positions, ``[runs, 6]`` as in ``_runs_schema``, from a first row on."""
        n, layers = len(self.positions), len(self.layers)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(self.positions) != 1) + 1]) if n else np.zeros(0, np.int64)
        runs = np.empty((layers, len(starts), 6), np.int64)
        runs[..., 0], runs[..., 2] = part, self.request
        runs[..., 1] = row + np.arange(layers)[:, None] * n + starts
        runs[..., 3] = self.layers[:, None]
        runs[..., 4], runs[..., 5] = self.positions[starts], np.diff(np.append(starts, n))
        return runs.reshape(-1, 6)


class _Buffers:
    """Memory for the columns of a part. It is used again, for touching fresh memory costs as much as encoding it."""

    def __init__(self, meta: TraceMeta, rows: int) -> None:
        self.ids = np.empty((meta.top_k, rows), id_dtype(meta.num_experts))
        self.request, self.pos = np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        self.layer, self.decode = np.empty(rows, np.uint16), np.empty(rows, np.bool_)

    @property
    def rows(self) -> int:
        return len(self.pos)


_Written = tuple[str, tuple[str, str]]


class _Part:
    """The rows of a part file, in the layout of the file: one contiguous column per rank."""

    def __init__(self, buffers: _Buffers) -> None:
        self.buffers = buffers
        self.ids = buffers.ids
        """``[k, >= rows]``."""
        self.weights: NDArray[np.float32] | None = None
        self.blocks: list[_Block] = []
        self.rows = 0

    def add(self, block: _Block, request: Request, low: int) -> None:
        """Copy the request's layers from ``low`` on, as many as the block has."""
        rows, high = slice(self.rows, self.rows + block.rows), low + len(block.layers)
        _fill(self.ids[:, rows], request.ids[:, low:high])
        if request.weights is not None:
            if self.weights is None:
                self.weights = np.full(self.ids.shape, np.nan, np.float32)
            _fill(self.weights[:, rows], request.weights[:, low:high])
        self.blocks.append(block)
        self.rows += block.rows

    def write(self, path: Path) -> _Written:
        """Write the file and return the digest of its ids and weights, and the checksums of each."""
        import polars as pl

        columns: dict[str, Any] = {
            name: getattr(self.buffers, name)[: self.rows] for name in ("request", "layer", "pos", "decode")
        }
        row = 0
        for block in self.blocks:
            request, layer, pos, decode = (
                column[row : row + block.rows].reshape(len(block.layers), len(block.positions))
                for column in columns.values()
            )
            request[:], layer[:], pos[:] = block.request, block.layers[:, None], block.positions
            decode[:] = block.decode_start is not None and block.positions >= block.decode_start
            row += block.rows
        known = [block.decode_start is not None for block in self.blocks]
        if not all(known):
            there = pl.Series(np.repeat(known, [block.rows for block in self.blocks]))
            columns["decode"] = pl.select(pl.when(there).then(pl.Series(columns["decode"]))).to_series()
        routing = {
            f"{letter}{rank}": column
            for letter, values in (("e", self.ids), ("w", self.weights))
            for rank, column in enumerate(() if values is None else values[:, : self.rows])
        }
        write_parquet(pl.DataFrame(columns | routing), path)
        sums = tuple(checksum(c for name, c in routing.items() if name[0] == letter) for letter in "ew")
        digest = hashlib.sha256()
        for column in routing.values():
            digest.update(column.data)
        return digest.hexdigest(), (sums[0], sums[1])


def _fill(out: NDArray[Any], values: NDArray[Any]) -> None:
    """Copy ``values[tokens, layers, k]`` to ``out[k, layers * tokens]``.

    In pieces of tokens that fit the cache, and one pass over the source, so that a memory map is read once.
    """
    tokens, layers, top_k = values.shape
    out = out.reshape(top_k, layers, tokens)
    for t in range(0, tokens, _TRANSPOSE_TOKENS):
        out[:, :, t : t + _TRANSPOSE_TOKENS] = values[t : t + _TRANSPOSE_TOKENS].transpose(2, 1, 0)


@dataclass
class _SegmentWriter:
    """Collect requests into parts of about ``PART_ROWS`` rows and write them in the background."""

    root: Path
    meta: TraceMeta
    first: int
    """Number of the first request."""
    known: set[str]
    """Ids of the trace's requests so far; those of new ones are added."""
    tokens: int = 0
    _part: _Part | None = None
    _spare: list[_Buffers] = field(default_factory=list)
    """Those of parts that are written, to be used again."""
    _parts: list[int] = field(default_factory=list)
    _pending: list[Future[_Written]] = field(default_factory=list)
    _written: list[_Written] = field(default_factory=list)
    _request_rows: list[dict[str, Any]] = field(default_factory=list)
    _runs: list[NDArray[np.int64]] = field(default_factory=list)
    _token_ids: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    _sources: list[SourceFile] = field(default_factory=list)
    _at_end: bool = False
    """Whether the last thing that was taken is the end of a file."""
    _has_weights: bool = False
    _predicted: int = 0
    """m of the predictions so far; 0: none."""

    def __post_init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.directory = self.root / SEGMENTS / self.id
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="tracekit-write")
        self._steps, self._counts = Spool(self.directory / STEPS), Spool(self.directory / COUNTS)
        self._predictions = Spool(self.directory / PREDICTED)

    def __enter__(self) -> _SegmentWriter:
        self.directory.mkdir(parents=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def add(self, request: Request | Histogram) -> None:
        """Take one request, or one record of counts; its arrays are copied."""
        self._at_end = False
        index = self.first + len(self._request_rows)
        if isinstance(request, Histogram):
            self._add_counts(index, request)
            return
        tokens, layers, _ = request.ids.shape
        request_id = self._claim(request)
        positions = (
            request.first_pos + np.arange(tokens, dtype=np.int64) if request.positions is None else request.positions
        )
        if tokens and (int(positions[0]) < 0 or int(positions[-1]) >= 1 << 32):
            found = f"positions {positions[0]} to {positions[-1]}"
            raise SourceError(found, where=request.where, expected="0 to 2^32 - 1")
        if self._part and self._part.rows + tokens * layers > PART_ROWS:
            self._flush()
        layers_a_part = max(1, PART_ROWS // max(1, tokens))
        for low in range(0, layers, layers_a_part):
            if low:
                self._flush()
            numbers = np.array(self.meta.layers[low : low + layers_a_part], np.uint16)
            if self._part is None:
                self._part = _Part(self._buffers(max(PART_ROWS, tokens)))
            self._part.add(_Block(index, positions, request.decode_start, numbers), request, low)
        self._has_weights |= request.weights is not None
        self._request_rows.append(
            {
                "request": index,
                "request_id": request_id,
                **_label_columns(request),
                "prompt_len": request.prompt_len,
                "decode_start": request.decode_start,
                "first_pos": int(positions[0]) if tokens else request.first_pos,
                "n_tokens": tokens,
                "n_decode": None if request.decode_start is None else int((positions >= request.decode_start).sum()),
            }
        )
        self.tokens += tokens
        if request.token_ids is not None:
            self._token_ids.append((index, positions, np.asarray(request.token_ids, np.int64)))
        if request.steps is not None:
            for columns in step_columns(index, request.steps, self.meta.layers, self.meta.num_experts):
                self._steps.add(columns)
        for predictions in request.predictions:
            self._add_predictions(index, predictions, positions, request.where)

    def _add_predictions(self, index: int, predictions: Predictions, positions: NDArray[np.int64], where: str) -> None:
        m = predictions.ids.shape[2]
        if self._predicted not in (0, m):
            raise SourceError(
                f"predictor {predictions.predictor!r} names {m} experts",
                where=where or None,
                expected=f"{self._predicted}, as the predictions before it",
                remedy="Save as many for every predictor and distance",
            )
        for columns in prediction_columns(index, predictions, positions, self.meta.layers, self.meta.num_experts):
            self._predicted = m
            self._predictions.add(columns)

    def _add_counts(self, index: int, histogram: Histogram) -> None:
        request_id, tokens = self._claim(histogram), tokens_of(histogram.counts, self.meta.top_k)
        self._counts.add(count_columns(index, histogram, self.meta.layers))
        known = {"request": index, "request_id": request_id, **_label_columns(histogram), "n_tokens": tokens}
        self._request_rows.append(dict.fromkeys(_requests_schema()) | known)
        self.tokens += tokens or 0

    def end_file(self, file: SourceFile) -> None:
        """Note that all requests of a file were taken."""
        self._sources.append(file)
        self._at_end = True

    @property
    def full(self) -> bool:
        """Whether this is enough for a segment: whole files with ``GROUP_ROWS`` rows."""
        return self._at_end and sum(self._parts) + (self._part.rows if self._part else 0) >= GROUP_ROWS

    def finish(self) -> Segment:
        """Write what is left and make the segment durable; the caller commits it."""
        import polars as pl

        if not self._request_rows:
            raise SourceError("no requests found in the source")
        self._flush()
        written = self._written + [future.result() for future in self._pending]
        schema = _requests_schema() | ({"n_tokens": pl.UInt64} if self._counts.rows else {})
        requests = pl.DataFrame(self._request_rows, schema=schema)
        write_parquet(requests, self.directory / "requests.parquet")
        runs = np.concatenate(self._runs) if self._runs else np.zeros((0, 6), np.int64)
        schema = _runs_schema()
        frame = pl.DataFrame({column: runs[:, i] for i, column in enumerate(schema)}, schema=schema)
        write_parquet(frame, self.directory / "runs.parquet")
        if self._token_ids:
            numbers, positions, ids = zip(*self._token_ids, strict=True)
            columns = {
                "request": np.repeat(np.array(numbers), [len(i) for i in ids]),
                "pos": np.concatenate(positions),
                "token_id": np.concatenate(ids),
            }
            frame = pl.DataFrame(columns, schema={"request": pl.UInt32, "pos": pl.UInt32, "token_id": pl.Int64})
            write_parquet(frame, self.directory / "tokens.parquet")
        digests = [part for part, _ in written]
        digests += [spool.finish() for spool in (self._steps, self._counts, self._predictions) if spool.rows]
        sync_segment(self.directory)
        digest = hashlib.sha256()
        for part in digests:
            digest.update(part.encode())
        for row in self._request_rows:
            digest.update(json.dumps([row[k] for k in ("request_id", "label", "decode_start")]).encode())
        digest.update(np.ascontiguousarray(runs).tobytes())
        return Segment(
            id=self.id,
            content=digest.hexdigest()[:32],
            requests=len(self._request_rows),
            tokens=self.tokens,
            rows=sum(self._parts),
            parts=tuple(self._parts),
            sums=tuple(sums for _, sums in written),
            decode_tokens=sum(row["n_decode"] or 0 for row in self._request_rows),
            prefill_tokens=sum(r["n_tokens"] - r["n_decode"] for r in self._request_rows if r["n_decode"] is not None),
            has_weights=self._has_weights,
            has_token_ids=bool(self._token_ids),
            has_steps=bool(self._steps.rows),
            predicted=self._predicted,
            sources=tuple(self._sources),
        )

    def _claim(self, request: Request | Histogram) -> str:
        request_id = request.request_id
        if request_id in self.known:
            raise SourceError(
                f"request {request_id!r} is in the trace already",
                where=request.where,
                remedy="Rename it, or replace the trace with --force",
            )
        self.known.add(request_id)
        return request_id

    def _buffers(self, rows: int) -> _Buffers:
        """Return buffers for the columns of a part of that many rows."""
        with contextlib.suppress(IndexError):  # writers put buffers back at any time
            buffers = self._spare.pop()
            if buffers.rows >= rows:
                return buffers
        return _Buffers(self.meta, rows)

    def _flush(self) -> None:
        """Hand the part to a writer; wait if both are busy, so that memory stays bounded."""
        part, self._part = self._part, None
        if part is None:
            return
        row, number = 0, len(self._parts)
        for block in part.blocks:
            self._runs.append(block.runs(number, row))
            row += block.rows
        if len(self._pending) >= _WRITERS:
            self._written.append(self._pending.pop(0).result())
        self._pending.append(self._pool.submit(self._write, part, self.directory / part_name(number)))
        self._parts.append(part.rows)

    def _write(self, part: _Part, path: Path) -> _Written:
        written = part.write(path)
        self._spare.append(part.buffers)
        return written


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Write a frame as one row group; a disk that is full is an OSError, whatever Polars calls it."""
    import polars as pl

    try:
        # Ids hardly compress: a higher level and statistics on every rank cost 1.7 times the time and save nothing.
        frame.write_parquet(path, compression_level=1, statistics=False, row_group_size=max(1, frame.height))
    except pl.exceptions.PolarsError as error:
        raise OSError(f"{path.name}: {error}") from error


def _label_columns(request: Request | Histogram) -> dict[str, str | None]:
    labels = json.dumps(dict(request.labels), ensure_ascii=False) if request.labels else None
    return {"label": request.label, "labels": labels}


def _request_ids(root: Path, trace: TraceInfo) -> set[str]:
    import polars as pl

    paths = [root / SEGMENTS / s.id / "requests.parquet" for s in trace.segments]
    return {str(i) for p in paths for i in pl.read_parquet(p, columns=["request_id"], glob=False)["request_id"]}


def _requests_schema() -> dict[str, Any]:
    import polars as pl

    return {
        "request": pl.UInt32,
        "request_id": pl.String,
        "label": pl.String,
        "labels": pl.String,
        "prompt_len": pl.UInt32,
        "decode_start": pl.UInt32,
        "first_pos": pl.UInt32,
        "n_tokens": pl.UInt32,
        "n_decode": pl.UInt32,
    }


def _runs_schema() -> dict[str, Any]:
    import polars as pl

    return {
        "part": pl.UInt32,
        "row": pl.UInt32,
        "request": pl.UInt32,
        "layer": pl.UInt16,
        "pos": pl.UInt32,
        "n": pl.UInt32,
    }
