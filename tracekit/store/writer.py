"""Ingest: canonical requests in, one committed segment out, in bounded memory."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tracekit.checks import OF_INGEST, Checker, Finding, findings_of_parts, ordered
from tracekit.errors import SourceError, StoreError, TracekitError, UsageError
from tracekit.schema import Histogram, IdSpace, Phase, Request, SourceFile, TraceMeta
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.canonical import same_id
from tracekit.sources.config import load_config
from tracekit.sources.files import fault
from tracekit.sources.mend import Mended, Mends, Share, Stream
from tracekit.sources.released import released_experts, released_top_k
from tracekit.store.ahead import SMALL, ahead
from tracekit.store.location import on_disk
from tracekit.store.manifest import (
    MANIFEST,
    SEGMENTS,
    TEMPORARY,
    Segment,
    TraceInfo,
    locked,
    read_manifest,
    sweep,
    with_trace,
    write_manifest,
)
from tracekit.store.reader import Store
from tracekit.store.recheck import checkers, merged
from tracekit.store.segment import SegmentWriter, in_trace, number
from tracekit.store.shares import SHARE_BYTES, Task, write_shares

UNCHECKED = Finding(
    "warning",
    "not-checked",
    "the latest requests",
    "an ingest did not end",
    "none known: what the check would have found in them is not said here",
    "Run it again with --resume",
)
"""What a trace has that is being added to by an ingest that can be resumed."""

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

    Many files are read in shares, with as many processes at the same time as there are threads (see `running`); the
    result is the same with one.

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
    root = on_disk(store)
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

    def shares(self, _: int) -> list[Share]:
        return []

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
    return _store_trace(on_disk(store), name, lambda _: given, append=append, force=force)


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
    root = on_disk(store)
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
    """Write one trace as a segment, or a few, and commit it; the store is as it was before if anything fails.

    An ingest of many files writes a segment of each share of them and commits all at once; one that can be resumed
    commits one segment after the other. What is added to is checked again, from its rows: copies and statistics are
    those of all requests.
    """
    with writable_store(root) as traces:
        existing = _existing(traces, root, name, append=append, force=force or resume)
        base = None if force else existing
        source = open_trace(base.sources if base else ())
        if base:
            if source.empty:
                return _unchanged(root, traces, base, source.left_out)
            _check_same_shape(base, source.meta)
        before = _Before.of(root, base)
        shares = [] if resume else source.shares(SHARE_BYTES)
        if shares:
            trace = _add_shares(root, name, before, source, shares, phase, progress)
            write_manifest(root, with_trace(traces, trace))
        else:
            for trace in _add_segments(root, name, before, source, resume=resume, phase=phase, progress=progress):
                write_manifest(root, with_trace(traces, trace))
    return replace(trace, notes=(*trace.notes, *source.left_out))


@dataclass(frozen=True, slots=True)
class _Before:
    """What an ingest adds to."""

    trace: TraceInfo | None
    checkers: Sequence[Checker] = ()
    said: Sequence[Finding] = ()
    """What was found at earlier ingests and cannot be found again."""
    ids: set[str] = field(default_factory=set)
    """Ids of its requests."""

    @classmethod
    def of(cls, root: Path, trace: TraceInfo | None) -> _Before:
        if trace is None:
            return cls(None)
        said = [finding for finding in trace.findings if finding.finding in OF_INGEST]
        return cls(trace, checkers(Store(root), trace), said, _request_ids(root, trace))

    @property
    def requests(self) -> int:
        return self.trace.requests if self.trace else 0

    def notes(self, *more: str) -> tuple[str, ...]:
        """Return what is noted, with more behind it."""
        return tuple(dict.fromkeys([*(self.trace.notes if self.trace else ()), *more]))

    def check(self, parts: Sequence[Checker], notes: Sequence[str]) -> list[Finding]:
        """Return what is wrong with all of the trace."""
        return findings_of_parts([*self.checkers, *parts], notes)


def _add_segments(
    root: Path,
    name: str,
    before: _Before,
    source: Stream | _Given,
    *,
    resume: bool,
    phase: Phase | None,
    progress: Progress | None,
) -> Iterator[TraceInfo]:
    """Write the segment of a source, or some where it can be resumed; yield the trace with each, to be committed."""
    checker = Checker(source.meta, released_top_k(source.meta), released_experts(source.meta), phase)
    trace, tokens, known = before.trace, 0, before.ids
    # A trace that is made as it is written stays in this thread: models keep state there.
    records = source.records() if isinstance(source, _Given) else ahead(source.records(), SMALL)
    record = next(records, None)
    while record is not None:
        writer = SegmentWriter(root, source.meta, number(trace.requests if trace else 0), known)
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
            notes = before.notes(*source.notes)
            if record is None:  # the check of all, while the last part is written
                found = pool.submit(before.check, [checker], notes)
            segment = writer.finish()
            findings = ordered([*before.said, *(found.result() if record is None else [UNCHECKED])])
        tokens += writer.tokens
        known |= writer.ids.keys()
        trace = _added(trace or TraceInfo(name, source.meta, _now(), ()), [segment], notes, findings)
        yield trace
    if trace is before.trace:
        raise SourceError("no requests found in the source")


def _add_shares(
    root: Path,
    name: str,
    before: _Before,
    source: Stream | _Given,
    shares: Sequence[Share],
    phase: Phase | None,
    progress: Progress | None,
) -> TraceInfo:
    """Write a segment of each share of a source; return the trace with them, to be committed."""
    left_out = source.total_bytes - sum(share.size for share in shares)

    def report(read: int, tokens: int) -> None:
        if progress:
            progress(left_out + read, source.total_bytes, tokens)

    tasks = [Task(root, share, phase) for share in shares]
    segments, parts, notes = list[Segment](), list[Checker](), [*source.notes]
    ids: dict[str, str] = {}
    idle: tuple[SourceFile, ...] = ()
    """Files of shares without any request: they are kept with those of another share."""
    with contextlib.closing(write_shares(tasks, before.requests, report)) as written:
        for done in written:
            for request_id, where in done.ids.items():
                if request_id in before.ids:
                    raise in_trace(request_id, where)
                if request_id in ids:
                    raise same_id(request_id, where, ids[request_id])
            ids.update(done.ids)
            notes += done.notes
            parts.append(done.checker)
            idle += done.sources
            if done.segment:
                segments.append(replace(done.segment, sources=idle))
                idle = ()
    if not segments:
        raise SourceError("no requests found in the source")
    segments[-1] = replace(segments[-1], sources=(*segments[-1].sources, *idle))
    noted = before.notes(*notes)
    findings = ordered([*before.said, *before.check(merged(parts), noted)])
    return _added(before.trace or TraceInfo(name, source.meta, _now(), ()), segments, noted, findings)


def _added(
    trace: TraceInfo, segments: Sequence[Segment], notes: tuple[str, ...], findings: Sequence[Finding]
) -> TraceInfo:
    """Return a trace with more segments, and what is known about all of it."""
    drafts = trace.meta.drafts_included or any(segment.has_steps for segment in segments)
    return replace(
        trace,
        meta=replace(trace.meta, drafts_included=drafts),
        segments=(*trace.segments, *segments),
        notes=notes,
        findings=tuple(findings),
    )


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


def _request_ids(root: Path, trace: TraceInfo) -> set[str]:
    import polars as pl

    paths = [root / SEGMENTS / s.id / "requests.parquet" for s in trace.segments]
    return {str(i) for p in paths for i in pl.read_parquet(p, columns=["request_id"], glob=False)["request_id"]}
