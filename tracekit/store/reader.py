"""An open store: its traces, its rows in bounded memory, and SQL over it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit import markup
from tracekit.errors import StoreError, UnsupportedError, did_you_mean
from tracekit.execution import Progress, current
from tracekit.schema import id_dtype
from tracekit.store import views
from tracekit.store.ahead import ahead
from tracekit.store.location import Location, Url, beside, location, reason, scan
from tracekit.store.manifest import SEGMENTS, TEMPORARY, Segment, TraceInfo, part_name, read_manifest, whole
from tracekit.store.part import map_ids
from tracekit.store.spool import COUNTS, STEPS
from tracekit.store.steps import StepRows, whole_steps
from tracekit.store.sums import checksum

if TYPE_CHECKING:
    import duckdb
    import polars as pl


Runs = dict[str, NDArray[np.int64]]
"""Runs of consecutive positions: ``row`` (the first of their rows), ``request``, ``layer``, ``pos``, ``n``; ordered by
request, layer, pos."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Routing rows of some whole requests, or of some layers of one, as the store's columns hold them."""

    columns: tuple[NDArray[np.unsignedinteger[Any]], ...]
    """Routed experts, k columns ``[rows]``."""
    runs: Runs

    def addresses(self) -> NDArray[np.uint64]:
        """Return where each column begins in memory, ``[k]``: valid as long as this object is there."""
        return np.array([column.__array_interface__["data"][0] for column in self.columns], np.uint64)

    def scratch(self, lengths: NDArray[np.int64]) -> NDArray[np.unsignedinteger[Any]]:
        """Return room for the ids of any run of these lengths, ``[k, tokens]``."""
        return np.empty((len(self.columns), lengths.max(initial=0)), self.columns[0].dtype)

    def fits(self, trace: TraceInfo) -> bool:
        """Return whether ids, rows, requests and layers are within the trace: kernels do not check bounds."""
        runs, meta = self.runs, trace.meta
        dtype, rows = self.columns[0].dtype, len(self.columns[0])
        keys = (runs["request"], runs["layer"], runs["pos"])
        return bool(
            all(column.dtype == dtype and len(column) == rows and column.flags.c_contiguous for column in self.columns)
            and (
                meta.num_experts > np.iinfo(dtype).max or max(c.max(initial=0) for c in self.columns) < meta.num_experts
            )
            and min(column.min(initial=0) for column in runs.values()) >= 0
            and (runs["row"] + runs["n"]).max(initial=0) <= rows
            and runs["request"].max(initial=0) < trace.requests
            and np.isin(np.unique(runs["layer"]), meta.layers).all()
            and _ascending(*keys)
        )


def _ascending(*keys: NDArray[np.int64]) -> bool:
    """Return whether rows are in the order of their keys, the first one first."""
    *before, last = keys
    fine = last[1:] > last[:-1]
    for key in reversed(before):
        fine = (key[1:] > key[:-1]) | (fine & (key[1:] == key[:-1]))
    return bool(fine.all())


@dataclass(frozen=True, slots=True)
class Block:
    """Routing rows of some whole requests, or of some layers of one, in one array."""

    ids: NDArray[np.unsignedinteger[Any]]
    """Routed experts ``[k, rows]``."""
    runs: Runs
    weights: NDArray[np.float32] | None = None
    """Router weights ``[k, rows]``, where they were asked for; NaN where the source has none."""


class Store:
    """A tracekit store. Open one with :func:`tracekit.open`."""

    def __init__(self, path: str | Path) -> None:
        self.path = location(path).absolute()
        read_manifest(self.path)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def _repr_html_(self) -> str | None:
        try:
            traces = self.traces()
        except StoreError:  # it is gone or being written to: the text will do
            return None
        names = ("trace", "model", "engine", "N", "k", "MoE layers", "requests", "tokens", "decode tokens", "findings")
        rows = [
            (
                trace.name,
                trace.meta.model,
                trace.meta.engine,
                trace.meta.num_experts,
                trace.meta.top_k or None,
                len(trace.meta.layers),
                trace.requests,
                trace.tokens,
                sum(segment.decode_tokens for segment in trace.segments),
                len(trace.findings),
            )
            for trace in traces
        ]
        return markup.table(names, rows, title=f"tracekit store {self.path}")

    def traces(self) -> list[TraceInfo]:
        """Return the traces that the store holds now."""
        return read_manifest(self.path)

    def trace(self, name: str | None = None) -> TraceInfo:
        """Return one trace; the name may be left out where there is only one.

        Raises
        ------
        StoreError
            There is no such trace, or several and no name.
        """
        traces = self.traces()
        names = [t.name for t in traces]
        if name is None and len(traces) == 1:
            return traces[0]
        if not traces:
            raise StoreError("holds no traces yet", where=str(self.path), remedy="Add one with: tracekit ingest")
        listed = ", ".join(repr(n) for n in names[:8]) + (", …" if len(names) > 8 else "")
        if name is None:
            found = f"holds {len(traces)} traces ({listed})"
            raise StoreError(found, where=str(self.path), remedy="Name one with --trace")
        if name not in names:
            raise StoreError(
                f"no trace named {name!r}",
                where=str(self.path),
                expected=f"one of {listed}",
                remedy=did_you_mean(name, names),
            )
        return traces[names.index(name)]

    def requests(self, trace: TraceInfo) -> pl.DataFrame:
        """Return the trace's requests, in order: the columns of the ``requests`` view without ``trace``."""
        import polars as pl

        frames = [self._read(s, "requests.parquet") for s in trace.segments]
        for segment, frame in zip(trace.segments, frames, strict=True):
            if frame.height != segment.requests:
                raise unreadable(
                    self._path(segment, "requests.parquet"), f"{frame.height} of {segment.requests} requests"
                )
        return pl.concat(frames)

    def columns(self, trace: TraceInfo, parts: range | None = None) -> Iterator[Columns]:
        """Return the trace's routing rows part by part; the next is made ready while one is worked on.

        Parameters
        ----------
        parts
            Which of the trace's part files, counted over its segments; default: all. A request's rows of one layer are
            in one part.
        """
        return ahead(part for part, _ in self._parts(trace, current().progress, weights=False, chosen=parts))

    def blocks(self, trace: TraceInfo, *, weights: bool = False) -> Iterator[Block]:
        """Return the trace's routing rows part by part, as arrays; the next is made ready while one is worked on.

        The ids and weights of a block are overwritten after the next two: copy what is to be kept.

        Parameters
        ----------
        weights
            Whether to read the router weights too; every segment of the trace must have them.
        """
        return ahead(self._blocks(trace, current().progress, weights))

    def _blocks(self, trace: TraceInfo, progress: Progress | None, weighted: bool) -> Iterator[Block]:
        k = trace.meta.top_k
        # Buffers take turns, for fresh memory for every part would cost as much as decoding it: one is being filled,
        # and the two blocks before it are being worked on.
        size = k * max((rows for s in trace.segments for rows in s.parts), default=0)
        dtypes = (id_dtype(trace.meta.num_experts), np.float32)[: 1 + weighted]
        buffers = cycle([[np.empty(size, dtype) for dtype in dtypes] for _ in range(3)])
        for (part, weights), turn in zip(self._parts(trace, progress, weights=weighted), buffers, strict=False):
            rows = len(part.columns[0])
            held = [buffer[: k * rows].reshape(k, rows) for buffer in turn]
            for columns, array in zip((part.columns, weights), held, strict=False):
                np.stack(columns, out=array)
            yield Block(held[0], part.runs, held[1] if weighted else None)

    def _parts(
        self, trace: TraceInfo, progress: Progress | None, *, weights: bool, chosen: range | None = None
    ) -> Iterator[tuple[Columns, tuple[NDArray[np.float32], ...]]]:
        """Yield the rows of each part file, checked, and the k columns of their weights where those are wanted."""
        k = trace.meta.top_k
        parts = [(s, i) for s in trace.segments for i in range(len(s.parts))]
        if chosen is not None:
            parts = parts[chosen.start : chosen.stop : chosen.step]
        done, total = 0, k * sum(s.parts[i] for s, i in parts)
        of: Segment | None = None
        for (segment, part), arrays in zip(parts, self._arrays(trace, parts, weights), strict=True):
            if progress:
                progress(done, total)
            path = self._path(segment, part_name(part))
            if of is not segment:  # after its first rows, for more are decoded meanwhile
                of, runs = segment, self._read(segment, "runs.parquet").partition_by("part", as_dict=True)
            here = runs.get((part,))
            if here is None:
                raise unreadable(path, "runs.parquet says nothing of it")
            read = Columns(
                arrays[:k], {c: here[c].to_numpy().astype(np.int64) for c in ("row", "request", "layer", "pos", "n")}
            )
            if not read.fits(trace):
                raise unreadable(path, "its ids or runs are outside what the manifest says")
            if segment.sums:
                compare_sums(path, arrays[:k], arrays[k:], segment.sums[part])
            yield read, arrays[k:]
            done += k * segment.parts[part]
        if progress:
            progress(done, total)

    def _arrays(
        self, trace: TraceInfo, parts: Sequence[tuple[Segment, int]], weights: bool
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield the k rank columns of each part file, and the k columns of its weights where those are wanted.

        Where they are as :func:`write_part` puts them, ids are mapped; Polars reads all others.
        """
        for decoded, together in groupby(parts, lambda part: weights or not self._is_mapped(trace, part[0])):
            if decoded:
                yield from self._decoded(trace, list(together), weights)
                continue
            for segment, part in together:
                path = self._path(segment, part_name(part))
                try:
                    ids = self._map(trace, segment, part)
                except OSError as error:
                    raise unreadable(path, error) from None
                if ids is None:
                    raise unreadable(path, f"it does not have the {segment.parts[part]} rows that it should")
                yield ids

    def _is_mapped(self, trace: TraceInfo, segment: Segment) -> bool:
        """Return whether the ids of a segment's parts are mapped: as those of its first can be, or not."""
        with contextlib.suppress(OSError):
            return self._map(trace, segment, 0) is not None
        return False

    def _map(
        self, trace: TraceInfo, segment: Segment, part: int
    ) -> tuple[NDArray[np.unsignedinteger[Any]], ...] | None:
        path = self._path(segment, part_name(part))
        if isinstance(path, Url):
            return None
        return map_ids(path, segment.parts[part], trace.meta.num_experts, trace.meta.top_k)

    def _decoded(
        self, trace: TraceInfo, parts: Sequence[tuple[Segment, int]], weights: bool
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield the columns of part files as Polars reads them."""
        import polars as pl

        k = trace.meta.top_k
        columns = [f"{letter}{r}" for letter in ("ew" if weights else "e") for r in range(k)]
        dtypes = [pl.Series(np.empty(0, id_dtype(trace.meta.num_experts))).dtype] * k + [pl.Float32] * k
        paths = [self._path(s, part_name(i)) for s, i in parts]
        batches = scan(*paths).select(columns).collect_batches(maintain_order=True)
        for number, ((segment, part), path) in enumerate(zip(parts, paths, strict=True)):
            expected, frames = segment.parts[part], list[pl.DataFrame]()
            while sum(frame.height for frame in frames) < expected:  # one row group a part, so this is one batch
                try:
                    frames.append(next(batches))
                except (OSError, StopIteration, pl.exceptions.PolarsError) as error:
                    # Those that come next are being fetched already: it may be one of them.
                    raise unreadable(next((p for p in paths[number:] if not whole(p)), path), error) from None
            frame = pl.concat(frames).rechunk()
            if frame.height != expected or frame.dtypes != dtypes[: len(columns)] or any(frame.null_count().row(0)):
                raise unreadable(path, f"it does not have the {expected} rows of {dtypes[0]} that it should")
            yield tuple(frame[column].to_numpy() for column in columns)

    def counts(self, trace: TraceInfo, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens per expert of a trace of counts, summed over groups of its requests.

        Parameters
        ----------
        groups
            ``[requests]`` the group of each request, 0 .. G - 1.

        Returns
        -------
        numpy.ndarray
            int64 ``[G, layers, num_experts]``.
        """
        import polars as pl

        layers = np.array(trace.meta.layers)
        shape = (int(groups.max(initial=-1)) + 1, len(layers), trace.meta.num_experts)
        total = np.zeros(shape, np.int64)
        for segment in trace.segments:
            path = self._path(segment, COUNTS)
            try:
                for frame in scan(path).collect_batches():
                    request, layer, expert, n = (
                        frame[c].to_numpy().astype(np.int64) for c in ("request", "layer", "expert", "n")
                    )
                    if request.max(initial=0) >= len(groups) or not np.isin(layer, layers).all():
                        raise unreadable(path, "its requests or layers are outside what the manifest says")
                    if expert.max(initial=0) >= shape[2] or n.min(initial=0) < 0:
                        raise unreadable(path, "its experts or counts are outside what the manifest says")
                    np.add.at(total, (groups[request], np.searchsorted(layers, layer), expert), n)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
        return total

    def steps(self, trace: TraceInfo, *, weights: bool = False) -> Iterator[StepRows]:
        """Return the rows of the trace's verification steps in bounded memory, whole steps at a time.

        Parameters
        ----------
        weights
            Whether to read the router weights too.

        Raises
        ------
        UnsupportedError
            Weights are asked for and the steps have none.
        """
        for segment in trace.segments:
            if segment.has_steps:
                path = self._path(segment, STEPS)
                if weights and whole(path) and "w0" not in scan(path).collect_schema():
                    raise UnsupportedError("the trace's verification steps have no router weights")
                yield from whole_steps(self._step_rows(path, trace, weights))

    def _step_rows(self, path: Location, trace: TraceInfo, weights: bool) -> Iterator[StepRows]:
        import polars as pl

        try:
            for frame in scan(path).collect_batches(maintain_order=True):
                rows = StepRows.of(frame, trace.meta.top_k, weights=weights)
                if not rows.fits(trace.meta, trace.requests):
                    raise unreadable(path, "its ids, requests or layers are outside what the manifest says")
                yield rows
        except StoreError:  # which is a ValueError too
            raise
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise unreadable(path, error) from None

    def has_steps(self, trace: TraceInfo) -> NDArray[np.bool_]:
        """Return which requests have verification steps, ``[requests]``."""
        import polars as pl

        there = np.zeros(trace.requests, bool)
        for path in (self._path(segment, STEPS) for segment in trace.segments if segment.has_steps):
            try:
                requests = scan(path).select(pl.col("request").unique()).collect()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
            numbers = requests["request"].to_numpy()
            if numbers.max(initial=0) >= trace.requests:
                raise unreadable(path, "its requests are outside what the manifest says")
            there[numbers] = True
        return there

    def step_count(self, trace: TraceInfo) -> int:
        """Return how many verification steps the trace has."""
        import polars as pl

        count = 0
        for path in (self._path(segment, STEPS) for segment in trace.segments if segment.has_steps):
            try:
                count += scan(path).filter(row=0).select("request", "step").unique().collect().height
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
        return count

    def connect(self, variables: Mapping[str, Any] | None = None) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection with the store's views that can read the store and nothing else.

        Of a store at a URL, which DuckDB does not read, there are the views of traces, requests, findings and results.
        """
        traces = self.traces()
        if isinstance(self.path, Url):
            return views.connect(self._requests_here(traces), traces, variables, rows=False)
        return views.connect(self.path, traces, variables)

    def sql(self, statement: str, variables: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Run one SELECT over the store's views.

        Parameters
        ----------
        statement
            Exactly one SELECT, in DuckDB's SQL.
        variables
            Values that the statement reads with ``getvariable('name')``.

        Raises
        ------
        QueryError
            The statement is not a SELECT, reaches outside the store, or fails.
        UnsupportedError
            It reads a view of rows, and the store is at a URL.
        """
        con = self.connect(variables)
        try:
            return views.run(con, statement)
        finally:
            con.close()

    def views(self) -> str:
        """Return the view definitions as a script for a plain ``duckdb`` shell.

        Raises
        ------
        UnsupportedError
            The store is at a URL.
        """
        if isinstance(self.path, Url):
            raise UnsupportedError("views are of files on this machine", where=self.path, remedy=views.COPY)
        return views.script(self.path, self.traces())

    def _requests_here(self, traces: list[TraceInfo]) -> Path:
        """Return a directory that has what the views read without rows: the requests, and the results."""
        root = beside(self.path)
        for segment in (segment for trace in traces for segment in trace.segments):
            copy = root / SEGMENTS / segment.id / "requests.parquet"
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                temporary = copy.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
                self._read(segment, copy.name).write_parquet(temporary)
                temporary.replace(copy)
        return root

    def _path(self, segment: Segment, name: str) -> Location:
        return self.path / SEGMENTS / segment.id / name

    def _read(self, segment: Segment, name: str) -> pl.DataFrame:
        return read_file(self._path(segment, name))


def read_file(path: Location, columns: list[str] | None = None) -> pl.DataFrame:
    """Read a file of a store as a whole, or these columns of it."""
    import polars as pl

    try:
        if isinstance(path, Path):
            return pl.read_parquet(path, columns=columns, memory_map=False, glob=False)
        rows = scan(path)
        return (rows if columns is None else rows.select(columns)).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from None


def compare_sums(
    path: Location, ids: Sequence[NDArray[Any]], weights: Sequence[NDArray[Any]], sums: tuple[str, str]
) -> None:
    """Hold the columns of a part, as far as they were read, against the checksums from when they were written."""
    for what, columns, known in (("ids", ids, sums[0]), ("weights", weights, sums[1])):
        if columns and checksum(columns) != known:
            raise unreadable(path, f"its {what} are not those that were written")


def unreadable(path: Location, problem: object) -> StoreError:
    """Return the error for a file of a store that cannot be read."""
    if isinstance(path, Path):
        remedy = "If the trace was replaced meanwhile, try again; if not, ingest it again with --force"
    elif isinstance(problem, OSError) and not isinstance(problem, FileNotFoundError):
        remedy = path.access
    else:
        remedy = "If the store was replaced meanwhile, try again; if not, copy it there again"
    return StoreError(f"cannot be read ({reason(problem) or 'it is damaged'})", where=str(path), remedy=remedy)
