"""Batches: unique experts of several requests that are verified together, one window of each.

Two ways to draw them, both exact. Windows drawn *independently*, each window of the trace equally likely: with q_e the
share of windows that contain expert e, the union of B holds sum_e 1 - (1 - q_e)^B experts. Windows of *distinct*
requests, each request equally likely and a random window in each: the B requests are a random subset, and the chance
that expert e is in none of their windows is the elementary symmetric mean of the 1 - q_{r,e} over requests r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracekit.errors import UsageError
from tracekit.execution import check_state
from tracekit.metrics.kernels import scan_experts
from tracekit.metrics.state import Cells, Spec, together
from tracekit.schema import TraceMeta

if TYPE_CHECKING:
    from tracekit.store import Columns

_TOGETHER = 64
"""Requests that are added together, expert by expert: what there is of an expert stays in the processor's cache."""


def full_activation(num_experts: int, top_k: int, share: float) -> int:
    """Return how many tokens it takes until a share of the experts is active, if every k-subset is equally likely.

    The smallest t with 1 - (1 - k/N)^t >= share (MoESD, arXiv 2505.19645); from there on a batch loads no more experts
    by growing.

    Parameters
    ----------
    num_experts, top_k
        N and k.
    share
        Share of the N experts, below 1.

    Raises
    ------
    UsageError
        The share is not between 0 and 1, or k not between 1 and N.
    """
    if not 1 <= top_k <= num_experts:
        raise UsageError(f"{top_k} of {num_experts} experts per token", expected="from 1 to all of them")
    if not 0 < share < 1:
        raise UsageError(f"a share of {share} of the experts", expected="more than 0 and less than 1")
    absent, tokens = 1.0, 0
    while 1 - absent < share - 1e-12:
        absent *= 1 - top_k / num_experts
        tokens += 1
    return tokens


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def independent_union(shares: Any, sizes: Any) -> Any:
    """Return sum_e 1 - (1 - q_e)^B, the union of B windows drawn independently.

    Parameters
    ----------
    shares
        ``[M, N]`` float64: share q_e of windows that contain each expert, in M cases; NaN where there are none.
    sizes
        ``[S]`` int64: batch sizes B, ascending.

    Returns
    -------
    ``[M, S]`` float64 unique experts.
    """
    n = shares.shape[1]
    out = np.empty((shares.shape[0], sizes.shape[0]))
    power, square = np.empty(n), np.empty(n)
    for m in range(shares.shape[0]):
        power[:] = 1.0
        before = 0
        for i in range(sizes.shape[0]):
            left = sizes[i] - before
            before = sizes[i]
            for e in range(n):
                square[e] = 1.0 - shares[m, e]
            while left:  # raise to the power by squaring
                if left & 1:
                    for e in range(n):
                        power[e] *= square[e]
                left >>= 1
                if left:
                    for e in range(n):
                        square[e] *= square[e]
            absent = 0.0
            for e in range(n):
                absent += power[e]
            out[m, i] = n - absent
    return out


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _draw_one_more(old: Any, new: Any, size: Any, per_request: float, missed: float, end: int) -> None:
    """Write the means with one more request from those without it: it is one of b among r with chance b / r.

    ``old``, ``new`` and ``size`` are ``[B + 1]``, the last b itself as a float; ``per_request`` is 1 / r and
    ``missed`` 1 - q_e of the request that comes in.
    """
    for b in range(1, end):
        new[b] = old[b] + size[b] * per_request * (missed * old[b - 1] - old[b])


@njit(cache=True, nogil=True)
def _add_together(n: int, there: Any, missed: Any, group: int, layer: int, window: int, r: int, absent: Any) -> int:
    """Add n requests to one group, layer and window length of :func:`_add_requests`; return the requests so far.

    ``there[i, window]`` says whether a request has such a window, ``missed[i, window]`` is its 1 - q_e.
    """
    num_experts, sizes = absent.shape[3], absent.shape[4]
    means = np.zeros((2, sizes))  # in turn without and with the request that comes in
    size = np.arange(sizes) * 1.0
    before = r
    for e in range(num_experts):
        r, turn = before, 0
        means[:] = 0.0
        means[1, 0] = 1.0
        for b in range(sizes):
            means[0, b] = absent[group, layer, window, e, b]
        for i in range(n):
            if there[i, window]:
                r += 1
                _draw_one_more(means[turn], means[1 - turn], size, 1.0 / r, missed[i, window, e], min(r + 1, sizes))
                turn = 1 - turn
        for b in range(sizes):
            absent[group, layer, window, e, b] = means[turn, b]
    return r


@njit(cache=True, nogil=True)
def _add_requests(
    columns: Any,
    ids: Any,
    units: Any,
    unit_runs: Any,
    run_start: Any,
    run_length: Any,
    overlapping: bool,
    n_requests: Any,
    absent: Any,
) -> None:
    """Add the requests of one block of routing rows to the batches of distinct requests.

    Parameters
    ----------
    columns, ids, run_start, run_length, overlapping
        As :func:`tracekit.metrics.kernels.scan` takes them.
    units
        ``[U, 2]`` int64: layer index and output group of each unit, which is one request and one layer. Those that
        have both in common stand together.
    unit_runs
        ``[U, 2]`` int64: first run of each unit and one past its last.
    n_requests
        State ``[groups, L, T]``: requests so far that have a window of the length.
    absent
        State ``[groups, L, T, N, B + 1]``: the chance that none of b distinct ones of them, a random window of each,
        has the expert; 1 for b = 0.
    """
    max_window, num_experts = absent.shape[2], absent.shape[3]
    hits = np.zeros((1, 1, max_window, num_experts), np.int64)
    gaps = np.zeros((max_window, num_experts), np.int64)
    last = np.zeros(num_experts, np.int64)
    windows = np.zeros(max_window, np.int64)
    there = np.zeros((_TOGETHER, max_window), np.bool_)
    missed = np.zeros((_TOGETHER, max_window, num_experts))
    waiting = 0
    for u in range(units.shape[0]):
        layer, group = units[u, 0], units[u, 1]
        hits[:] = 0
        windows[:] = 0
        for run in range(unit_runs[u, 0], unit_runs[u, 1]):
            n = run_length[run]
            for i in range(min(max_window, n)):
                windows[i] += n - i if overlapping else n // (i + 1)
        runs = unit_runs[u]
        scan_experts(columns, runs[0], runs[1], run_start, run_length, overlapping, 0, 0, hits, ids, last, gaps)
        for i in range(max_window):
            there[waiting, i] = windows[i] > 0
            if windows[i] > 0:
                for e in range(num_experts):
                    missed[waiting, i, e] = 1.0 - hits[0, 0, i, e] / windows[i]
        waiting += 1
        end = u + 1 == units.shape[0] or units[u + 1, 0] != layer or units[u + 1, 1] != group
        if waiting == _TOGETHER or end:
            for i in range(max_window):
                so_far = n_requests[group, layer, i]
                n_requests[group, layer, i] = _add_together(waiting, there, missed, group, layer, i, so_far, absent)
            waiting = 0


class DistinctBatches:
    """Batches of distinct requests, of every size up to the largest that is wanted.

    Its numbers do not depend on the order of the requests but for rounding; they come from a recursion over requests,
    which no sum undoes, so there are no jackknife intervals.
    """

    def __init__(self, meta: TraceMeta, spec: Spec, cells: Cells) -> None:
        """Make room for batches of up to ``spec.distinct_batch`` requests of each output group.

        Raises
        ------
        UsageError
            It would take more memory than it may, by default 4 GiB.
        """
        largest = min(spec.distinct_batch, max(cells.group_requests, default=0))
        shape = (len(cells.groups), len(meta.layers), spec.max_window)
        size = 8.0 * np.prod((*shape, largest + 1, meta.num_experts), dtype=float)
        remedy = "Lower --max-window or --batch-size" + (", or leave out --by label" if spec.by else "")
        check_state(size, f"batches of up to {largest} distinct requests need", remedy)
        self._group, self._overlapping = np.where(cells.cell >= 0, cells.cell_group[cells.cell], -1), spec.overlapping
        self.n_requests = np.zeros(shape, np.int64)
        self.absent = np.zeros((*shape, meta.num_experts, largest + 1))
        self.absent[..., 0] = 1.0

    def add(
        self,
        columns: Columns,
        request: NDArray[np.int64],
        layer: NDArray[np.int64],
        start: NDArray[np.int64],
        length: NDArray[np.int64],
    ) -> None:
        """Add whole requests, or some layers of them, that come as runs ``[runs]``.

        Runs are ordered by request and layer (its place on the layer axis); a window of a request is any of its runs'.
        """
        first, unit_runs = together(request, layer)
        units = np.stack([layer[first], self._group[request[first]]], axis=1)
        order = np.lexsort(units.T)
        runs = unit_runs[order], start, length
        ids = columns.scratch(length)
        _add_requests(columns.addresses(), ids, units[order], *runs, self._overlapping, self.n_requests, self.absent)

    def unique(self, group: int, batch_size: int) -> NDArray[np.float64]:
        """Return the unique experts of a batch, ``[L, T]``; NaN where fewer requests have a window of the length."""
        n = self.n_requests[group]
        if batch_size >= self.absent.shape[-1]:
            return np.full(n.shape, np.nan)
        unique = (1 - self.absent[group, ..., batch_size]).sum(axis=-1)
        return np.where(n >= batch_size, unique, np.nan)
