"""Compaction: the small segments of a trace that grew become few, with parts of the usual size."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import TraceMeta
from tracekit.store.location import on_disk
from tracekit.store.manifest import (
    SEGMENTS,
    Segment,
    TraceInfo,
    part_name,
    sync_segment,
    with_trace,
    write_manifest,
)
from tracekit.store.part import PartRows, write_part
from tracekit.store.reader import Store, compare_sums, read_file, unreadable
from tracekit.store.segment import PART_ROWS, write_parquet
from tracekit.store.spool import COUNTS, PREDICTED, STEPS, join
from tracekit.store.sums import checksum
from tracekit.store.writer import writable_store

if TYPE_CHECKING:
    import polars as pl

_COUNTS = ("requests", "tokens", "rows", "decode_tokens", "prefill_tokens")
"""Fields of a segment that add up."""


def compact(store: Store | str | Path, *, trace: str | None = None) -> pl.DataFrame:
    """Put the segments of traces together, and their small parts into parts of the usual size.

    Requests, their order, findings and results stay as they are. Rows are copied as they are stored, a part at a time;
    each trace is committed by a single rename. Segments stay apart where only some have router weights, token ids,
    verification steps or predictions, for what can be asked of a trace hangs on that.

    Parameters
    ----------
    store
        The store or its path.
    trace
        Name of one trace; default: all of them.

    Returns
    -------
    polars.DataFrame
        One row a trace: ``trace``, ``segments_before``, ``segments``, ``parts_before``, ``parts``; they count segments
        and part files.

    Raises
    ------
    StoreError
        There is no such trace, a file of it cannot be read, or the store cannot be written.
    """
    import polars as pl

    root = on_disk(store.path if isinstance(store, Store) else store)
    opened = Store(root)
    names = [info.name for info in (opened.traces() if trace is None else [opened.trace(trace)])]
    rows = []
    for name in names:
        with writable_store(root) as traces:
            before = opened.trace(name)
            after = _compacted(root, before)
            if after is not before:
                write_manifest(root, with_trace(traces, after))
        rows.append((name, len(before.segments), len(after.segments), _parts(before), _parts(after)))
    counts = ("segments_before", "segments", "parts_before", "parts")
    return pl.DataFrame(rows, schema={"trace": pl.String, **dict.fromkeys(counts, pl.Int64)}, orient="row")


def _parts(trace: TraceInfo) -> int:
    return sum(len(segment.parts) for segment in trace.segments)


def _compacted(root: Path, trace: TraceInfo) -> TraceInfo:
    """Return the trace with its segments put together; the same object where there is nothing to do."""
    segments: list[Segment] = []
    for _, group in groupby(trace.segments, lambda segment: _holds(root, segment)):
        together = list(group)
        if len(together) == 1:  # its parts are as large as its requests allow
            segments += together
        else:
            segments.append(_together(root, together, trace.meta))
    return trace if len(segments) == len(trace.segments) else replace(trace, segments=tuple(segments))


def _holds(root: Path, segment: Segment) -> tuple[object, ...]:
    """Return what beside the routing a segment has; only segments that agree in it are put together."""
    steps = _columns(root / SEGMENTS / segment.id / STEPS) if segment.has_steps else ()
    return segment.has_weights, segment.has_token_ids, steps, segment.predicted


def _columns(path: Path) -> tuple[str, ...]:
    import polars as pl

    try:
        return tuple(pl.read_parquet_schema(path))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from None


def _together(root: Path, segments: Sequence[Segment], meta: TraceMeta) -> Segment:
    """Write one segment with the rows of several, in their order."""
    import polars as pl

    new, first = uuid.uuid4().hex, segments[0]
    target = root / SEGMENTS / new
    target.mkdir(parents=True)
    folders = [root / SEGMENTS / segment.id for segment in segments]
    requests = [_rows(f / "requests.parquet", s.requests) for f, s in zip(folders, segments, strict=True)]
    write_parquet(pl.concat(requests), target / "requests.parquet")
    parts = _Parts(target, meta.num_experts)
    for folder, segment in zip(folders, segments, strict=True):
        parts.add_all(folder, segment)
    parts.finish()
    beside = {
        "tokens.parquet": first.has_token_ids,
        STEPS: first.has_steps,
        PREDICTED: first.has_predictions,
        COUNTS: meta.histogram,
    }
    for name in (name for name, there in beside.items() if there):
        pieces = [folder / name for folder in folders]
        try:
            join(pieces, target / name)
        except OSError:
            _find_unreadable(pieces)
            raise
    sync_segment(target)
    merged = tuple(content for segment in segments for content in segment.merged or (segment.content,))
    return replace(
        first,
        id=new,
        content=hashlib.sha256("".join(merged).encode()).hexdigest()[:32],
        parts=tuple(parts.written),
        sums=tuple(parts.sums),
        sources=tuple(file for segment in segments for file in segment.sources),
        merged=merged,
        **{count: sum(getattr(segment, count) for segment in segments) for count in _COUNTS},
    )


class _Parts:
    """Part files of the usual size, made of smaller ones: whole parts are put together, and none is cut."""

    def __init__(self, directory: Path, num_experts: int) -> None:
        self._directory, self._num_experts = directory, num_experts
        self._frames: list[pl.DataFrame] = []
        """Of the part that grows, and ``_runs_here`` its runs."""
        self._runs_here: list[pl.DataFrame] = []
        self._runs: list[pl.DataFrame] = []
        self.written: list[int] = []
        """Rows of each part file."""
        self.sums: list[tuple[str, str]] = []

    def add_all(self, folder: Path, segment: Segment) -> None:
        """Take the parts of a segment."""
        path = folder / "runs.parquet"
        runs = read_file(path)
        self._runs.append(runs.clear())  # a segment of counts has no part
        by_part = runs.partition_by("part", as_dict=True)
        if list(by_part) != [(number,) for number in range(len(segment.parts))]:
            raise unreadable(path, f"it does not tell of {len(segment.parts)} parts, one after the other")
        for number, rows in enumerate(segment.parts):
            if by_part[(number,)]["n"].sum() != rows:
                raise unreadable(path, f"it does not tell of the {rows} rows of part {number}")
            part = folder / part_name(number)
            frame = _rows(part, rows)
            if segment.sums:
                compare_sums(part, _columns_of(frame, "e"), _columns_of(frame, "w"), segment.sums[number])
            self._add(frame, by_part[(number,)])

    def _add(self, frame: pl.DataFrame, runs: pl.DataFrame) -> None:
        import polars as pl

        held = sum(frame.height for frame in self._frames)
        if held and (held + frame.height > PART_ROWS or frame.columns != self._frames[0].columns):
            self._flush()
            held = 0
        number = pl.lit(len(self.written), pl.UInt32).alias("part")
        self._runs_here.append(runs.with_columns(number, pl.col("row") + pl.lit(held, pl.UInt32)))
        self._frames.append(frame)

    def _flush(self) -> None:
        import polars as pl

        frame, runs = pl.concat(self._frames).rechunk(), pl.concat(self._runs_here)
        columns = {name: runs[name].to_numpy().astype(np.int64) for name in ("request", "layer", "pos", "n")}
        ids, weights = _columns_of(frame, "e"), _columns_of(frame, "w")
        decode, known = frame["decode"].fill_null(False).to_numpy(), frame["decode"].is_not_null().to_numpy()
        rows = PartRows(columns, decode, known, ids, weights)
        write_part(self._directory / part_name(len(self.written)), rows, self._num_experts)
        self.written.append(frame.height)
        self.sums.append((checksum(ids), checksum(weights)))
        self._runs.append(runs)
        self._frames, self._runs_here = [], []

    def finish(self) -> None:
        """Write what is left, and where the runs are."""
        import polars as pl

        if self._frames:
            self._flush()
        write_parquet(pl.concat(self._runs), self._directory / "runs.parquet")


def _columns_of(frame: pl.DataFrame, letter: str) -> list[NDArray[Any]]:
    """Return the ids of a part, ``e``, or its weights, ``w``, rank by rank: they are stored in that order."""
    return [frame[name].to_numpy() for name in frame.columns if name[0] == letter]


def _rows(path: Path, expected: int) -> pl.DataFrame:
    frame = read_file(path)
    if frame.height != expected:
        raise unreadable(path, f"{frame.height} of {expected} rows")
    return frame


def _find_unreadable(paths: Sequence[Path]) -> None:
    """Name the one of some files that cannot be read, if it is that."""
    import polars as pl

    for path in paths:
        try:
            for _ in pl.scan_parquet(path, glob=False).collect_batches():
                pass
        except (OSError, pl.exceptions.PolarsError) as error:
            raise unreadable(path, error) from None
