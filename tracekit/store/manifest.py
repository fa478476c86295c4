"""The manifest: which files make up a store. Replacing this one file is what commits a change.

A store is a directory::

    manifest.json                what the store holds; written to a temporary file and renamed
    segments/ID/                 one ingest, or a share of one: never changed after it is listed
        part-00000.parquet       routing rows, one row group each
        requests.parquet         one row a request
        runs.parquet             where each request's consecutive positions lie in the parts
        tokens.parquet           token ids, where the source has them
        steps.parquet            rows of verification steps, rejected drafts included, where the source has them
        predicted.parquet        experts that predictors named ahead of time, where the source has them
        counts.parquet           tokens per expert, of a source that holds counts only: it has no parts
    results/KIND-KEY.parquet     what the kernels computed, see ``results``
    states/KEY.state             sums that results are computed from, see ``states``

Anything under ``segments`` that the manifest does not list is the remains of an ingest that did not finish.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tracekit import markup
from tracekit.checks import Finding
from tracekit.errors import StoreError
from tracekit.schema import SCHEMA_VERSION, Phase, SourceFile, TraceMeta
from tracekit.store.location import Location, Url, reason, scan

MANIFEST = "manifest.json"
SEGMENTS = "segments"
RESULTS = "results"
STATES = "states"
VERSION = 4
"""Version of results and states, part of their names: raise it when a metric's numbers, columns or sums change."""
TEMPORARY = ".writing-"
"""Prefix of files that are being written."""
_FORMAT = "tracekit-store"
_NO_STORE = f"not a tracekit store (it has no {MANIFEST})"


@dataclass(frozen=True, slots=True)
class Segment:
    """One committed ingest, a share of one, or several put together: a directory of immutable Parquet files."""

    id: str
    content: str
    """Hex digest of everything a metric can depend on."""
    requests: int
    tokens: int
    rows: int
    parts: tuple[int, ...]
    """Rows of each part file."""
    sums: tuple[tuple[str, str], ...] = ()
    """Checksums of the ids and of the weights of each part file, in hex; an older tracekit wrote none."""
    decode_tokens: int = 0
    prefill_tokens: int = 0
    """Tokens whose phase is known."""
    has_weights: bool = False
    has_token_ids: bool = False
    has_steps: bool = False
    predicted: int = 0
    """m, experts that each prediction names; 0: there are no predictions."""
    sources: tuple[SourceFile, ...] = ()
    """What it was read from."""
    merged: tuple[str, ...] = ()
    """``content`` of the segments that were put together in it; none: it is as it was ingested."""

    @property
    def has_predictions(self) -> bool:
        """Whether there are predictions beside the routing."""
        return self.predicted > 0


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """One trace of a store: its shape, provenance and extent."""

    name: str
    meta: TraceMeta
    created: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = field(default=())
    """What the ingest noticed, in sentences."""
    findings: tuple[Finding, ...] = field(default=())
    """What the check found at ingest; none are known of a trace of an older tracekit."""

    @property
    def requests(self) -> int:
        """Requests in the trace."""
        return sum(s.requests for s in self.segments)

    @property
    def tokens(self) -> int:
        """Routed tokens, summed over requests."""
        return sum(s.tokens for s in self.segments)

    @property
    def rows(self) -> int:
        """Routing rows: tokens times MoE layers."""
        return sum(s.rows for s in self.segments)

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """What the trace was read from."""
        return tuple(file for s in self.segments for file in s.sources)

    @property
    def default_phase(self) -> Phase:
        """The phase that is measured unless another is asked for: decode where it is known, else what there is."""
        if any(s.decode_tokens for s in self.segments):
            return "decode"
        return "prefill" if any(s.prefill_tokens for s in self.segments) else "all"

    @property
    def content(self) -> str:
        """Hex digest of the trace's content; results are keyed by it, and putting segments together keeps them."""
        meta = self.meta
        ingests = [content for s in self.segments for content in s.merged or (s.content,)]
        parts = [meta.num_experts, meta.top_k, meta.layers, meta.router_order, *ingests]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @property
    def contents(self) -> list[str]:
        """Hex digests of the trace up to each of its segments; states are keyed by them."""
        meta, found = self.meta, []
        shape = [meta.num_experts, meta.top_k, meta.layers, meta.router_order]
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        for segment in self.segments:
            for ingest in segment.merged or (segment.content,):
                digest.update(f"\n{ingest}".encode())
            found.append(digest.hexdigest())
        return found

    def _repr_html_(self) -> str:
        meta, layers = self.meta, self.meta.layers
        order = {True: "kept", False: "lost", None: None}[meta.router_order]
        kept = {
            "router weights": all(s.has_weights for s in self.segments),
            "token ids": all(s.has_token_ids for s in self.segments),
            "verification steps": any(s.has_steps for s in self.segments),
            "predictions": any(s.has_predictions for s in self.segments),
            "counts only": meta.histogram,
        }
        rows: list[tuple[str, str | int | None]] = [
            ("model", meta.model),
            ("engine", " ".join(filter(None, (meta.engine, meta.engine_version))) or None),
            ("format", meta.source_format),
            ("experts per layer, N", meta.num_experts),
            ("experts per token, k", meta.top_k or None),
            ("the model's own k", meta.native_top_k),
            ("MoE layers", f"{len(layers)}: {layers[0]} to {layers[-1]}" if layers else "0"),
            ("expert ids", meta.id_space),
            ("router order", order),
            ("requests", self.requests),
            ("tokens", self.tokens),
            ("decode tokens", sum(s.decode_tokens for s in self.segments)),
            ("prefill tokens", sum(s.prefill_tokens for s in self.segments)),
            ("beside the routing", ", ".join(name for name, there in kept.items() if there) or "nothing"),
            ("ingested", self.created),
        ]
        notes = [*self.notes, *(f"{f.severity}: {f.finding} ({f.where})" for f in self.findings)]
        return markup.table(("", ""), rows, title=f"trace {self.name}", notes=notes)


def part_name(index: int) -> str:
    """Return the file name of a segment's part."""
    return f"part-{index:05d}.parquet"


def damaged(root: Location, trace: TraceInfo) -> list[Location]:
    """Return the files of a trace that are missing or cut short."""
    files = list[Location]()
    for segment in trace.segments:
        names = [part_name(i) for i in range(len(segment.parts))] + ["requests.parquet", "runs.parquet"]
        names += ["tokens.parquet"] * segment.has_token_ids + ["steps.parquet"] * segment.has_steps
        names += ["predicted.parquet"] * segment.has_predictions
        names += ["counts.parquet"] * trace.meta.histogram
        files += [root / SEGMENTS / segment.id / name for name in names]
    with ThreadPoolExecutor() as pool:  # for files that are far away
        return [file for file, fine in zip(files, pool.map(whole, files), strict=True) if not fine]


def whole(path: Location) -> bool:
    """Return whether a Parquet file is there to its end."""
    if isinstance(path, Url):
        import polars as pl

        with contextlib.suppress(OSError, pl.exceptions.PolarsError):
            return bool(scan(path).collect_schema())  # it stands at the end
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read() == b"PAR1"
    return False


def is_store(path: Location) -> bool:
    """Return whether a path is a store, if perhaps a damaged one; sources may have a ``manifest.json`` too."""
    if isinstance(path, Url):  # no source is read from one
        return True
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (path / MANIFEST).is_file() and (path / SEGMENTS).is_dir()
    return isinstance(data, dict) and data.get("format") == _FORMAT


def read_manifest(root: Location) -> list[TraceInfo]:
    """Read the traces that a store holds.

    Raises
    ------
    StoreError
        The directory is not a store, its manifest is damaged, or its schema is newer than this version reads.
    """
    return list(_traces(root, _text_at(root) if isinstance(root, Url) else _text_in(root)))


@lru_cache(maxsize=4)
def _traces(root: Location, text: str) -> tuple[TraceInfo, ...]:
    """Return the traces of a manifest's text, which is read again and again: sources may be thousands."""
    path = root / MANIFEST
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise StoreError("is not the manifest of a tracekit store", where=str(path))
        version = data["schema_version"]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"store schema {version}",
                where=str(root),
                expected=f"at most {SCHEMA_VERSION}, which this tracekit reads",
                remedy="Upgrade with: pip install --upgrade moe-tracekit",
            )
        return tuple(_trace(entry) for entry in data["traces"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"damaged manifest ({error})", where=str(path), remedy="Restore it or ingest again") from None


def _text_in(root: Path) -> str:
    path = root / MANIFEST
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = f"is {_NO_STORE}" if root.exists() else "does not exist"
        raise StoreError(found, where=str(root), remedy="Create one with: tracekit ingest SOURCE --store DIR") from None
    except NotADirectoryError:
        raise StoreError("is a file, not a store", where=str(root), expected="a directory") from None
    except UnicodeDecodeError:
        raise StoreError("is not UTF-8 text", where=str(path), expected="the JSON that tracekit writes") from None


def _text_at(root: Url) -> str:
    import polars as pl

    try:
        return (root / MANIFEST).text()
    except (OSError, pl.exceptions.PolarsError) as error:
        missing = isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)
        found = f"is {_NO_STORE}" if missing else f"cannot be read ({reason(error)})"
        raise StoreError(found, where=root, remedy=root.access) from None


def _trace(entry: dict[str, Any]) -> TraceInfo:
    meta = dict(entry["meta"])
    meta["layers"] = tuple(meta["layers"])
    segments = [_segment(segment) for segment in entry["segments"]]
    numbers = [
        meta["num_experts"],
        meta["top_k"],
        *meta["layers"],
        *(n for s in segments for n in (s.requests, s.predicted, *s.parts)),
    ]
    if not isinstance(entry["name"], str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a field of the wrong type")
    findings = tuple(Finding(**finding) for finding in entry.get("findings", ()))
    if any(not isinstance(getattr(f, name), str) for f in findings for name in Finding.__slots__):
        raise ValueError("a finding of the wrong type")
    return TraceInfo(
        entry["name"], TraceMeta(**meta), entry["created"], tuple(segments), tuple(entry["notes"]), findings
    )


def _segment(entry: dict[str, Any]) -> Segment:
    # A tracekit without digests of sources listed their names.
    sources = [SourceFile(file) if isinstance(file, str) else SourceFile(**file) for file in entry["sources"]]
    if any(not isinstance(file.name, str) or not isinstance(file.digest, str | None) for file in sources):
        raise ValueError("a source of the wrong type")
    lists = {name: tuple(entry.get(name, ())) for name in ("parts", "merged")}
    sums = tuple((ids, weights) for ids, weights in entry.get("sums", ()))
    segment = Segment(**{**entry, **lists, "sources": tuple(sources), "sums": sums})
    if len(sums) not in (0, len(segment.parts)):
        raise ValueError("a segment without the checksums of some parts")
    if not segment.id.isalnum():
        raise ValueError(f"segment id {segment.id!r}")
    return segment


def write_manifest(root: Path, traces: list[TraceInfo]) -> None:
    """Commit the list of traces: one atomic rename, durable before it returns."""
    from tracekit import __version__

    data = {
        "format": _FORMAT,
        "schema_version": SCHEMA_VERSION,
        "tracekit": __version__,
        "traces": [asdict(trace) for trace in traces],
    }
    temporary = root / f"{TEMPORARY}{MANIFEST}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data))  # not dump and no indent: ten times as long with thousands of sources
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(root)


def with_trace(traces: list[TraceInfo], trace: TraceInfo) -> list[TraceInfo]:
    """Return the traces with this one in the place of that of its name, or behind them."""
    if all(t.name != trace.name for t in traces):
        return [*traces, trace]
    return [trace if t.name == trace.name else t for t in traces]


def sync_segment(directory: Path) -> None:
    """Make the files of a segment durable, before it is listed."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)
    sync_directory(directory.parent)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store's write lock; a second writer fails at once."""
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = "another ingest, or a compaction, is writing to it"
            raise StoreError(found, where=str(root), remedy="Try again when it ends") from None
        yield


def sweep(root: Path, traces: list[TraceInfo]) -> None:
    """Delete what no listed trace uses: unfinished or replaced segments and files, results and states of others."""
    for directory in (root, root / RESULTS, root / STATES):
        for unfinished in directory.glob(f"{TEMPORARY}*"):
            unfinished.unlink(missing_ok=True)
    listed = {segment.id for trace in traces for segment in trace.segments}
    for directory in (root / SEGMENTS).glob("*"):
        if directory.name not in listed:
            shutil.rmtree(directory, ignore_errors=True)
    contents = {trace.content for trace in traces}
    for result in (root / RESULTS).glob("*.parquet"):
        if not any(result.match(f"*-{VERSION}-{content}-*") for content in contents):
            result.unlink(missing_ok=True)
    # What an appended trace begins with are the states of its first segments.
    kept = {(str(VERSION), content) for trace in traces for content in trace.contents}
    for state in (root / STATES).glob("*.state"):
        if tuple(state.name.split("-")[:2]) not in kept:
            state.unlink(missing_ok=True)
