"""One segment of a trace: requests in, immutable Parquet files out, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import Histogram, Predictions, Request, SourceFile, TraceMeta, id_dtype
from tracekit.sources.histograms import tokens_of
from tracekit.store.manifest import SEGMENTS, Segment, part_name, sync_segment
from tracekit.store.part import PartRows, write_part
from tracekit.store.spool import COUNTS, PREDICTED, STEPS, Spool, count_columns, prediction_columns, step_columns
from tracekit.store.sums import checksum

if TYPE_CHECKING:
    import polars as pl

PART_ROWS = 2_000_000
"""Routing rows of a part file: one row group, a few tens of MB in memory."""

GROUP_ROWS = 4 * PART_ROWS
"""Routing rows after which an ingest that can be resumed commits the files that it has read."""

_TRANSPOSE_TOKENS = 512
_WRITERS = 2
_HELD = ".held"


@dataclass(frozen=True, slots=True)
class _Block:
    """What the rows of one request, for some layers, have besides ids: they stand layer by layer."""

    request: int
    """Its number in the segment."""
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


_Written = tuple[str, tuple[str, str]]
"""The digest of a part's ids and weights, and the checksums of each."""


class _Part:
    """The rows of a part file, in the layout of the file: one contiguous column per rank."""

    def __init__(self, number: int, ids: NDArray[np.unsignedinteger[Any]]) -> None:
        self.number = number
        self.ids = ids
        """``[k, >= rows]``: memory that is used again, for touching fresh one costs as much as writing it."""
        self.weights: NDArray[np.float32] | None = None
        self.blocks: list[_Block] = []
        self.rows = 0
        self._runs: list[NDArray[np.int64]] = []

    @property
    def runs(self) -> NDArray[np.int64]:
        """Runs of consecutive positions, ``[runs, 6]`` as in ``_runs_schema``."""
        return np.concatenate(self._runs)

    def add(self, block: _Block, request: Request, low: int) -> None:
        """Copy the request's layers from ``low`` on, as many as the block has."""
        rows, high = slice(self.rows, self.rows + block.rows), low + len(block.layers)
        _fill(self.ids[:, rows], request.ids[:, low:high])
        if request.weights is not None:
            if self.weights is None:
                self.weights = np.full(self.ids.shape, np.nan, np.float32)
            _fill(self.weights[:, rows], request.weights[:, low:high])
        self.blocks.append(block)
        self._runs.append(block.runs(self.number, self.rows))
        self.rows += block.rows

    def hold(self, path: Path) -> None:
        """Put ids and weights into a file, so that others can have the memory."""
        with path.open("wb") as file:
            for values in (self.ids, self.weights):
                for column in () if values is None else values[:, : self.rows]:
                    file.write(column.data)
        if self.weights is not None:
            self.weights = self.weights[:, :0].copy()

    def take_back(self, path: Path, ids: NDArray[np.unsignedinteger[Any]]) -> None:
        """Read what was put into the file, and delete it."""
        self.ids = ids
        if self.weights is not None:
            self.weights = np.empty(self.ids.shape, np.float32)
        with path.open("rb") as file:
            for values in (self.ids, self.weights):
                for column in () if values is None else values[:, : self.rows]:
                    file.readinto(column.data)
        path.unlink()

    def write(self, path: Path, first: int, num_experts: int) -> _Written:
        """Write the file, with requests that are counted from a first number on."""
        _, _, request, layer, pos, n = self.runs.T
        decode, known = np.zeros(self.rows, bool), np.ones(self.rows, bool)
        row = 0
        for block in self.blocks:
            here = slice(row, row + block.rows)
            if block.decode_start is None:
                known[here] = False
            else:
                decode[here].reshape(len(block.layers), -1)[:] = block.positions >= block.decode_start
            row += block.rows
        ids = [column[: self.rows] for column in self.ids]
        weights = [] if self.weights is None else [column[: self.rows] for column in self.weights]
        runs = {"request": first + request, "layer": layer, "pos": pos, "n": n}
        write_part(path, PartRows(runs, decode, known, ids, weights), num_experts)
        digest = hashlib.sha256()
        for column in ids + weights:
            digest.update(column.data)
        return digest.hexdigest(), (checksum(ids), checksum(weights))


def in_trace(request_id: str, where: str) -> SourceError:
    """Return the error for a request whose id the trace has."""
    return SourceError(
        f"request {request_id!r} is in the trace already",
        where=where,
        remedy="Rename it, or replace the trace with --force",
    )


def number(value: int) -> Future[int]:
    """Return a number that is known, as `SegmentWriter` takes it."""
    known = Future[int]()
    known.set_result(value)
    return known


def _fill(out: NDArray[Any], values: NDArray[Any]) -> None:
    """Copy ``values[tokens, layers, k]`` to ``out[k, layers * tokens]``.

    In pieces of tokens that fit the cache, and one pass over the source, so that a memory map is read once.
    """
    tokens, layers, top_k = values.shape
    out = out.reshape(top_k, layers, tokens)
    for t in range(0, tokens, _TRANSPOSE_TOKENS):
        out[:, :, t : t + _TRANSPOSE_TOKENS] = values[t : t + _TRANSPOSE_TOKENS].transpose(2, 1, 0)


@dataclass
class SegmentWriter:
    """Collect requests into parts of about ``PART_ROWS`` rows and write them in the background.

    Requests are numbered from 0 here; what is written has their numbers in the trace.
    """

    root: Path
    meta: TraceMeta
    first: Future[int]
    """Number of the first request in the trace. Until it is there, full parts wait in files as they are in memory."""
    known: Container[str] = ()
    """Ids of requests that the trace has."""
    ids: dict[str, str] = field(default_factory=dict)
    """Ids of the requests that were taken, and where they were found."""
    tokens: int = 0
    _part: _Part | None = None
    _spare: list[NDArray[np.unsignedinteger[Any]]] = field(default_factory=list)
    """Memory of parts that are written, to be used again."""
    _parts: list[int] = field(default_factory=list)
    _pending: list[Future[_Written | _Part]] = field(default_factory=list)
    _written: list[_Written | _Part] = field(default_factory=list)
    """Parts that wait for the number of the first request are among them."""
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

    def __enter__(self) -> SegmentWriter:
        self.directory.mkdir(parents=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def add(self, request: Request | Histogram) -> None:
        """Take one request, or one record of counts; its arrays are copied."""
        self._at_end = False
        index = len(self._request_rows)
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
                self._part = _Part(len(self._parts), self._memory(max(PART_ROWS, tokens)))
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

    @property
    def requests(self) -> int:
        """Requests that were taken."""
        return len(self._request_rows)

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Files whose end was noted."""
        return tuple(self._sources)

    def finish(self) -> Segment:
        """Write what is left and make the segment durable; the caller commits it."""
        import polars as pl

        if not self._request_rows:
            raise SourceError("no requests found in the source")
        self._flush()
        first = self.first.result()
        ended = self._written + [future.result() for future in self._pending]
        written = list(self._pool.map(self._release, ended))
        schema = _requests_schema() | ({"n_tokens": pl.UInt64} if self._counts.rows else {})
        requests = pl.DataFrame(self._request_rows, schema=schema)
        requests = requests.with_columns(pl.col("request") + pl.lit(first, pl.UInt32))
        write_parquet(requests, self.directory / "requests.parquet")
        runs = np.concatenate(self._runs) if self._runs else np.zeros((0, 6), np.int64)
        schema = _runs_schema()
        runs[:, list(schema).index("request")] += first
        frame = pl.DataFrame({column: runs[:, i] for i, column in enumerate(schema)}, schema=schema)
        write_parquet(frame, self.directory / "runs.parquet")
        if self._token_ids:
            numbers, positions, ids = zip(*self._token_ids, strict=True)
            columns = {
                "request": np.repeat(first + np.array(numbers), [len(i) for i in ids]),
                "pos": np.concatenate(positions),
                "token_id": np.concatenate(ids),
            }
            frame = pl.DataFrame(columns, schema={"request": pl.UInt32, "pos": pl.UInt32, "token_id": pl.Int64})
            write_parquet(frame, self.directory / "tokens.parquet")
        digests = [part for part, _ in written]
        digests += [spool.finish(first) for spool in (self._steps, self._counts, self._predictions) if spool.rows]
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
            sources=self.sources,
        )

    def _claim(self, request: Request | Histogram) -> str:
        request_id = request.request_id
        if request_id in self.known or request_id in self.ids:
            raise in_trace(request_id, request.where)
        self.ids[request_id] = request.where
        return request_id

    def _memory(self, rows: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return room for the ids of a part of that many rows."""
        with contextlib.suppress(IndexError):  # writers put it back at any time
            ids = self._spare.pop()
            if ids.shape[1] >= rows:
                return ids
        return np.empty((self.meta.top_k, rows), id_dtype(self.meta.num_experts))

    def _flush(self) -> None:
        """Hand the part to a writer; wait if both are busy, so that memory stays bounded."""
        part, self._part = self._part, None
        if part is None:
            return
        self._runs.append(part.runs)
        if len(self._pending) >= _WRITERS:
            self._written.append(self._pending.pop(0).result())
        self._pending.append(self._pool.submit(self._write, part))
        self._parts.append(part.rows)

    def _write(self, part: _Part) -> _Written | _Part:
        """Write a part, or put it aside where the numbers of its requests are not known yet."""
        path = self.directory / part_name(part.number)
        ended: _Written | _Part = part
        if self.first.done():
            ended = part.write(path, self.first.result(), self.meta.num_experts)
        else:
            part.hold(path.with_suffix(_HELD))
        self._spare.append(part.ids)
        return ended

    def _release(self, ended: _Written | _Part) -> _Written:
        """Write a part that was put aside."""
        if isinstance(ended, _Part):
            held = (self.directory / part_name(ended.number)).with_suffix(_HELD)
            ended.take_back(held, self._memory(ended.rows))
            ended = self._write(ended)
        assert not isinstance(ended, _Part)  # the number of the first request is known
        return ended


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
