"""The sums over a trace's routing: those that are kept, and of the segments that they do not have, the rows."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracekit.analysis import cluster
from tracekit.errors import UsageError
from tracekit.execution import current
from tracekit.metrics.state import Cells, Spec, State, Sums, accumulate
from tracekit.store import Store, TraceInfo, states

if TYPE_CHECKING:
    import polars as pl


def sums(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Sums:
    """Return the sums over a trace's routing, and keep them; of segments whose sums are kept nothing is read.

    Counts are those of one pass over everything, bit for bit; expectations differ from it by rounding.

    Parameters
    ----------
    requests
        All of the trace's requests in order.
    """
    parts = range(sum(len(segment.parts) for segment in info.segments))
    # The recursion for batches of distinct requests takes them one by one.
    known = None if spec.distinct_batch else _known(store, info, requests, spec)
    rest = parts[sum(len(segment.parts) for segment in info.segments[: known.segments if known else 0]) :]
    total = read(store, info, requests, spec, rest) if rest else accumulate(info.meta, requests, spec, (), threads=1)
    if known and not add(total, known.sums):
        rest, total = parts, read(store, info, requests, spec, parts)
    if rest:
        states.save(store.path, info, _parameters(spec), _extent(spec), _arrays(total))
    return total


def read(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec, parts: range) -> Sums:
    """Return the sums over some of a trace's part files; ``requests`` are all of the trace's, in order."""
    if current().engine == "ray":
        return cluster.sums(store, info, requests, spec, parts)
    return accumulate(info.meta, requests, spec, store.columns(info, parts), current().threads)


def add(total: Sums, first: Sums) -> bool:
    """Add the sums over a trace's first requests to those over others, if they can be told apart as these are.

    Parameters
    ----------
    total
        Sums over requests that follow, with the cells of all requests.
    first
        Sums with the cells that the first requests had without the others: of windows and lags as long, or longer.

    Returns
    -------
    bool
        Whether each cell's requests have one cell in ``total``; nothing is added otherwise.
    """
    n = len(first.longest_run)
    to_cell = _mapping(first.cells.cell, total.cells.cell[:n], len(first.cells.cell_group))
    to_count_cell = _mapping(first.cells.count_cell, total.cells.count_cell[:n], len(first.cells.count_label))
    if to_cell is None or to_count_cell is None:
        return False
    for field in fields(State):
        into, added = getattr(total.state, field.name), getattr(first.state, field.name)
        here = tuple(slice(size) for size in into.shape[1:])
        to = to_count_cell if field.name in ("counts", "label_windows") else to_cell
        for old, new in enumerate(to if len(into) else ()):  # without batches there are no rows per expert
            into[new] += added[old][here]
    np.maximum(total.longest_run[:n], first.longest_run, out=total.longest_run[:n])
    return True


def _mapping(old: NDArray[np.int64], new: NDArray[np.int64], cells: int) -> NDArray[np.int64] | None:
    """Return the new cell of each old one, from the cells of each request; None where one would be torn apart."""
    there = old >= 0
    mapping = np.full(cells, -1, np.int64)
    mapping[old[there]] = new[there]
    fits = np.array_equal(mapping[old[there]], new[there]) and (new[~there] < 0).all() and (mapping >= 0).all()
    return mapping if fits else None


class _Known(NamedTuple):
    segments: int
    """How many of the trace's first segments they are of."""
    sums: Sums


def _known(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> _Known | None:
    """Return the sums that are kept of as many segments as possible."""
    # Without intervals there is one cell, to which those of all groups add up.
    specs = [spec] if spec.intervals else [spec, replace(spec, intervals=True)]
    found = [(state, asked) for asked in specs for state in states.kept(store.path, info, _parameters(asked))]
    for state, asked in sorted(found, key=lambda one: -one[0].segments):
        if state.reaches(_extent(spec)):
            there = requests.head(sum(segment.requests for segment in info.segments[: state.segments]))
            window, lag, batches = state.extent
            measured = replace(asked, max_window=window, max_lag=lag, batches=bool(batches))
            with contextlib.suppress(UsageError):  # it goes so far that it takes too much memory
                cells = Cells.assign(there, measured)
                empty = Sums(cells, State.empty(info.meta, measured, cells), np.zeros(there.height, np.int64), None)
                if (arrays := states.load(state, _arrays(empty))) is not None:
                    return _Known(state.segments, Sums(cells, State(*arrays[1:]), arrays[0], None))
    return None


def _parameters(spec: Spec) -> dict[str, Any]:
    """Return what decides the rows of the sums, and which windows there are."""
    by = None if spec.by == "layer" else spec.by  # layers are an axis
    names = ("phase", "overlapping", "intervals", "seed")
    return {"by": by} | {name: getattr(spec, name) for name in names}


def _extent(spec: Spec) -> tuple[int, int, int]:
    return spec.max_window, spec.max_lag, int(spec.batches)


def _arrays(sums: Sums) -> list[NDArray[Any]]:
    return [sums.longest_run, *(getattr(sums.state, field.name) for field in fields(State))]
