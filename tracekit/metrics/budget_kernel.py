"""The hot loop of expert budgets: windows that grow token by token, and their experts by router weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_EDGE = 1e-9
"""What a sum of shares may fall short of the share asked for by rounding."""


@njit(cache=True, nogil=True)
def _shares(ids: Any, weights: Any, column: int, out: Any) -> bool:
    """Write the weights of a token as shares of their sum; False where it has none that can be used."""
    total = 0.0
    for r in range(ids.shape[0]):
        w = np.float64(weights[r, column])
        if not w >= 0.0:  # NaN, or a router's raw score
            return False
        total += w
    if not 0.0 < total < np.inf:
        return False
    for r in range(ids.shape[0]):
        out[r] = np.float64(weights[r, column]) / total
    return True


@njit(cache=True, nogil=True)
def _rank(size: int, mass: Any, bits: Any, keys: Any, place: Any, order: Any) -> None:
    """Put the ``size`` experts of ``order`` in order of their weight, of equal weight the lower id first.

    What is sorted are whole numbers: positive floats are in the order of their bits, and the last bits of the weight,
    which rounding made, give way to the id.
    """
    last = np.uint64((1 << 16) - 1)
    for i in range(size):  # insertion: there are few, and numba's own sort takes three times as long
        key = (bits[order[i]] | last) - np.uint64(order[i])
        j = i
        while j > 0 and keys[j - 1] < key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key
    for i in range(size):
        e = np.int64(last - (keys[i] & last))
        order[i], place[e] = e, i


@njit(cache=True, nogil=True)
def _reach(ids: Any, first: int, n: int, size: int, place: Any, reach: Any) -> None:
    """Count the tokens of a window by the rank, from 1, of the lightest of their experts."""
    reach[: size + 1] = 0
    for column in range(first, first + n):
        deepest = 0
        for r in range(ids.shape[0]):
            deepest = max(deepest, place[np.int64(ids[r, column])] + 1)
        reach[deepest] += 1


@njit(cache=True, nogil=True)
def _tally(
    cell: int,
    layer: int,
    w: int,
    tokens: int,
    size: int,
    mass: Any,
    order: Any,
    reach: Any,
    budgets: Any,
    share: float,
    needed: Any,
    loaded: Any,
    kept: Any,
    intact: Any,
) -> None:
    """Add what each budget keeps of a window whose ``size`` experts are in order."""
    total = 0.0
    for i in range(size):
        total += mass[order[i]]
    carried, whole, m, short = 0.0, 0, 0, True
    for i in range(size):
        carried += mass[order[i]]
        whole += reach[i + 1]
        if short and carried >= share * total - _EDGE:
            short = False
            needed[cell, layer, w] += i + 1
        if m < budgets.shape[0] and budgets[m] == i + 1:
            loaded[cell, layer, w, m] += i + 1
            kept[cell, layer, w, m] += carried / total
            intact[cell, layer, w, m] += whole
            m += 1
    for rest in range(m, budgets.shape[0]):  # room for all
        loaded[cell, layer, w, rest] += size
        kept[cell, layer, w, rest] += 1.0
        intact[cell, layer, w, rest] += tokens


@njit(cache=True, nogil=True)
def scan_budgets(
    ids: Any,
    weights: Any,
    runs: Any,
    lengths: Any,
    budgets: Any,
    share: float,
    num_experts: int,
    whole: bool,
    n_windows: Any,
    left_out: Any,
    unique: Any,
    needed: Any,
    loaded: Any,
    kept: Any,
    intact: Any,
) -> None:
    """Add the sliding windows of runs to the state.

    A window grows from each start, token by token, and its experts are put in order at every length that is asked for.

    Parameters
    ----------
    ids, weights
        Routed experts ``[k, rows]``, uint8 or uint16, and their router weights, float32. A token without weights (NaN,
        negative, or all 0) is in no window.
    runs
        ``[R, 4]`` int64: layer index, cell, first column and tokens of each run of consecutive positions.
    lengths, budgets
        ``[W]`` and ``[M]`` int64, ascending.
    share
        Of the window's weight, for ``needed``.
    whole
        Whether each run is a window, and not the windows that slide over it.
    n_windows, left_out, unique, needed, loaded, kept, intact
        The state, see :class:`BudgetState`.
    """
    longest = lengths[-1]
    mass = np.zeros(num_experts)
    bits, keys = mass.view(np.uint64), np.zeros(num_experts, np.uint64)
    place = np.full(num_experts, -1, np.int64)
    order = np.zeros(num_experts, np.int64)
    reach = np.zeros(num_experts + 1, np.int64)
    for run in range(runs.shape[0]):
        layer, cell, first, n = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        shortest = np.searchsorted(lengths, n) if whole else 0
        if shortest == lengths.shape[0] or (whole and lengths[shortest] != n):
            continue
        part = np.zeros((n, ids.shape[0]))
        usable = np.zeros(n, np.bool_)
        for t in range(n):
            usable[t] = _shares(ids, weights, first + t, part[t])
        for begin in range(1 if whole else n):
            size = 0  # unique experts so far
            w = shortest
            for tokens in range(1, min(longest, n - begin) + 1):
                t = begin + tokens - 1
                if not usable[t]:
                    break
                for r in range(ids.shape[0]):
                    e = np.int64(ids[r, first + t])
                    if place[e] < 0:
                        place[e] = size
                        order[size] = e
                        size += 1
                    mass[e] += part[t, r]
                if lengths[w] == tokens:
                    _rank(size, mass, bits, keys, place, order)
                    _reach(ids, first + begin, tokens, size, place, reach)
                    n_windows[cell, layer, w] += 1
                    unique[cell, layer, w] += size
                    _tally(
                        cell, layer, w, tokens, size, mass, order, reach, budgets, share, needed, loaded, kept, intact
                    )
                    w += 1
            for rest in range(w, lengths.shape[0]):
                if begin + lengths[rest] <= n:
                    left_out[cell, layer, rest] += 1
            for i in range(size):
                mass[order[i]] = 0.0
                place[order[i]] = -1
