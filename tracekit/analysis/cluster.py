"""Passes over a trace on a Ray cluster: ranges of part files are tasks, and their sums are merged here.

Ray places the tasks, moves what they return, and runs those again whose worker died. How a trace is cut into ranges
depends on the trace alone, and sums are merged in the order of the ranges: the numbers are the same on every cluster.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit import __version__
from tracekit.errors import MissingDependencyError, StoreError, TracekitError, UsageError
from tracekit.execution import current, running
from tracekit.metrics.state import Cells, Spec, State, Sums, accumulate
from tracekit.schema import id_dtype
from tracekit.store import Store, TraceInfo
from tracekit.store.location import Location, Url

if TYPE_CHECKING:
    import polars as pl

_MOUNTED = "Keep it on storage that every machine mounts there, or use --engine local"

MIN_RANGES = 32
"""Ranges that a trace is cut into if it has as many parts, so that there is work for as many processors."""


def sums(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec, parts: range) -> Sums:
    """Read some of a trace's part files on Ray and return their sums.

    Counts are those of one pass on one machine, bit for bit; expectations differ from it by rounding.

    Parameters
    ----------
    requests
        All of the trace's requests in order.
    parts
        Which of the trace's part files.

    Raises
    ------
    MissingDependencyError
        Ray is not installed, or the workers do not run this version of tracekit.
    StoreError
        A worker cannot see the store, or a file of it cannot be read.
    UsageError
        There is no such cluster, or batches of distinct requests are wanted, whose sums cannot be merged.
    """
    if spec.distinct_batch:
        raise UsageError("batches of distinct requests on Ray", expected="one pass", remedy="Use --engine local")
    total = accumulate(info.meta, requests, spec, (), threads=1)
    with connected(current().address) as ray:
        read = ray.remote(_task())
        # In a list, Ray hands it to the task as it is: the task unpacks it once it knows that it can.
        work = [ray.put((store.path, info, requests, spec, current().memory))]
        pending: deque[Any] = deque()
        try:
            for piece in ranges(info, total.state, parts):
                # Few enough in flight for the sums that wait for their turn to fit into the object store.
                while len(pending) >= 2 * max(1, ray.cluster_resources().get("CPU", 1)):
                    _add(total, _result(ray, pending.popleft()))
                pending.append(
                    read.options(name=f"parts {piece.start}-{piece.stop - 1}").remote(__version__, work, piece)
                )
            while pending:
                _add(total, _result(ray, pending.popleft()))
        finally:
            for unfinished in pending:
                ray.cancel(unfinished)
    return total


def ranges(info: TraceInfo, state: State, parts: range) -> Iterator[range]:
    """Cut part files into ranges: a task reads at least as many bytes of ids as the sums that it returns have."""
    sizes = [rows for segment in info.segments for rows in segment.parts]
    ids = np.dtype(id_dtype(info.meta.num_experts)).itemsize * info.meta.top_k * sum(sizes[i] for i in parts)
    sums_size = sum(getattr(state, field.name).nbytes for field in fields(state))
    count = min(len(parts), max(MIN_RANGES, ids // max(1, sums_size)))
    for i in range(count):
        yield parts[len(parts) * i // count : len(parts) * (i + 1) // count]


def _task() -> Callable[..., Any]:
    """Return what a worker runs, as a function that travels whole: nothing of this package is needed to begin it."""

    def read(version: str, work: list[Any], parts: range) -> Any:
        import os
        import platform

        # A task has one processor, and Polars asks how many threads it may have when it is imported.
        os.environ.setdefault("POLARS_MAX_THREADS", "1")
        try:
            from tracekit import __version__ as here

            if here != version:
                return f"tracekit {here} on {platform.node()}"
            import ray

            from tracekit.analysis.cluster import read_parts
        except ImportError as error:
            return f"no tracekit on {platform.node()} ({error})"
        return read_parts(parts, *ray.get(work[0]))

    return read


def read_parts(
    parts: range, path: Location, info: TraceInfo, requests: pl.DataFrame, spec: Spec, memory: int | None
) -> _Rows:
    """Return the sums of some part files: what a task does on a worker."""
    try:
        store = Store(path)
        held = {segment.id for trace in store.traces() for segment in trace.segments}
        problem = None if held.issuperset(s.id for s in info.segments) else f"does not hold trace {info.name!r}"
    except StoreError as error:
        problem = error.found
    if problem:
        raise StoreError(
            f"{problem} on {platform.node()}, a machine of the cluster",
            where=str(path),
            expected="the same store on all of them",
            remedy=f"{path.access}, of that machine" if isinstance(path, Url) else _MOUNTED,
        )
    with running(threads=1, memory=memory):
        return _rows(accumulate(info.meta, requests, spec, store.columns(info, parts), threads=1))


_Rows = tuple[NDArray[np.int64], dict[str, NDArray[Any]]]
"""``Sums`` without the cells that no row was added to: to move those would take longer than to read the part files."""


def _rows(sums: Sums) -> _Rows:
    """Return the longest runs, and the rows of each array of the state that were added to."""
    touched = _touched(sums.cells, sums.longest_run)
    arrays = {field.name: getattr(sums.state, field.name) for field in fields(sums.state)}
    return sums.longest_run, {name: array[touched(name)] for name, array in arrays.items() if len(array)}


def _add(total: Sums, rows: _Rows) -> None:
    longest_run, arrays = rows
    touched = _touched(total.cells, longest_run)
    for name, array in arrays.items():
        getattr(total.state, name)[touched(name)] += array
    np.maximum(total.longest_run, longest_run, out=total.longest_run)


def _touched(cells: Cells, longest_run: NDArray[np.int64]) -> Callable[[str], NDArray[np.int64]]:
    """Return which rows of an array of the state, named by its field, are of requests with tokens."""
    there = longest_run > 0
    cell, count_cell = (np.unique(of[there]) for of in (cells.cell, cells.count_cell))
    return lambda name: count_cell if name in ("counts", "label_windows") else cell


def _result(ray: Any, task: Any) -> _Rows:
    """Wait for a task; what it raised on purpose is raised as it is."""
    try:
        result = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TracekitError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise TracekitError(
            f"the cluster gave up on a part of the trace ({str(error).strip().splitlines()[0]})",
            remedy="Workers were killed again and again: if it was for memory, lower --max-window or --max-lag",
        ) from error
    if isinstance(result, str):
        raise MissingDependencyError(
            result,
            expected=f"tracekit {__version__}, which runs here",
            remedy=f"Run on every machine of the cluster: pip install moe-tracekit=={__version__}",
        )
    rows: _Rows = result
    return rows


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Import Ray and connect to a cluster, unless this process is connected to one.

    Parameters
    ----------
    address
        The cluster's; None: the one that ``RAY_ADDRESS`` or this machine has, else one that is started here for as long
        as it is needed.

    Raises
    ------
    MissingDependencyError
        Ray is not installed.
    UsageError
        There is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that this will be the default
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed",
            remedy='Install what --engine ray needs with: pip install "moe-tracekit[ray]"',
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        if address:
            _reach(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster at {address!r} ({error})" if address else f"Ray does not start ({error})",
            expected="HOST:PORT of the cluster's head, or auto on a machine of the cluster",
            remedy="Leave --address out to start one on this machine" if address else None,
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of workers that died
            yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Connect to ``HOST:PORT`` and leave: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
