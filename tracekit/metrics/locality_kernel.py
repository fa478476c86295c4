"""The hot loops of local routing consistency: uses of an expert in a segment, and a cache that sees a segment ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_KEEP = np.iinfo(np.int64).max
"""Priority of what may not be evicted: experts that are not there, and those of the token itself."""


@njit(cache=True, nogil=True)
def scan_segments(ids: Any, runs: Any, length: int, num_experts: int, n_segments: Any, uses: Any, filled: Any) -> None:
    """Add the segments of one length that slide over runs.

    From one segment to the next only the experts of two tokens change their number of uses, so a sum over segments is
    kept as values and the segments for which they stand: k steps a token, whatever the length.

    Parameters
    ----------
    ids
        Routed experts ``[k, rows]``, uint8 or uint16.
    runs
        ``[R, 4]`` int64: layer index, cell, first column and tokens of each run of consecutive positions.
    length
        m, tokens of a segment; shorter runs have none.
    n_segments
        ``[C, L]`` int64, added to.
    uses
        ``[C, L, m + 1]`` int64: entry c counts the pairs of a segment and an expert that it uses c >= 1 times.
    filled
        ``[C, L, N]`` int64: summed over its first C entries, the uses that the C most used experts of a segment have.
        (Entry a - 1 counts the c for which a or more experts are used c times or more.)
    """
    count = np.zeros(num_experts, np.int64)
    since = np.zeros(num_experts, np.int64)
    """The segment from which on the expert has that many uses."""
    having = np.zeros(length + 1, np.int64)
    """Experts that are used so often or more."""
    depth = np.zeros(num_experts + 1, np.int64)
    """Numbers of uses that so many experts or more have."""
    deep_since = np.zeros(num_experts + 1, np.int64)
    k = ids.shape[0]
    for run in range(runs.shape[0]):
        layer, cell, first, n = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        if n < length:
            continue
        segments = n - length + 1
        n_segments[cell, layer] += segments
        count[:] = 0
        since[:] = 0
        having[:] = 0
        depth[:] = 0
        deep_since[:] = 0
        for t in range(n):
            now = max(0, t - length + 1)  # the segment that the token completes; those before it see no change
            if t >= length:
                for r in range(k):
                    e = np.int64(ids[r, first + t - length])
                    c = count[e]
                    uses[cell, layer, c] += now - since[e]
                    since[e] = now
                    count[e] = c - 1
                    a = having[c]
                    filled[cell, layer, a - 1] += depth[a] * (now - deep_since[a])
                    deep_since[a] = now
                    depth[a] -= 1
                    having[c] = a - 1
            for r in range(k):
                e = np.int64(ids[r, first + t])
                c = count[e] + 1
                if c > 1:
                    uses[cell, layer, c - 1] += now - since[e]
                since[e] = now
                count[e] = c
                a = having[c] + 1
                filled[cell, layer, a - 1] += depth[a] * (now - deep_since[a])
                deep_since[a] = now
                depth[a] += 1
                having[c] = a
        for expert in range(num_experts):
            if count[expert] > 0:
                uses[cell, layer, count[expert]] += segments - since[expert]
        for a in range(1, num_experts + 1):
            filled[cell, layer, a - 1] += depth[a] * (segments - deep_since[a])


@njit(cache=True, nogil=True)
def _lowest(priority: Any) -> Any:
    """Return where the lowest priority is, -1 where nothing may be evicted; no two others are equal."""
    low = np.int64(_KEEP)
    for p in priority:
        low = min(low, p)
    if low == _KEEP:
        return -1
    at = np.int64(0)
    for e in range(np.uint64(priority.shape[0])):  # all of them, which takes no branch and is the faster for it
        at = max(at, np.int64(e) if priority[e] == low else np.int64(0))
    return at


@njit(cache=True, nogil=True)
def _uses(ids: Any, first: int, n: int, count: Any) -> None:
    """Count the uses of each expert in some tokens."""
    count[:] = 0
    for t in range(n):
        for r in range(ids.shape[0]):
            count[np.int64(ids[r, first + t])] += 1


@njit(cache=True, nogil=True)
def replay_ahead(ids: Any, runs: Any, length: int, capacities: Any, num_experts: int, hits: Any) -> None:
    """Add the hits of caches that know how often each expert is used in the next ``length`` tokens.

    Of one layer, empty at the start of a run. After a token, whose experts stay, the expert with the fewest uses in the
    next ``length`` tokens goes first; of equals the one whose last use is longest ago.

    Parameters
    ----------
    ids, runs
        As in :func:`scan_segments`; runs that are shorter than a segment are left out.
    capacities
        ``[G]`` int64, experts, each at least k.
    hits
        ``[C, L, G]`` int64, added to.
    """
    k = ids.shape[0]
    coming = np.zeros(num_experts, np.int64)
    last = np.zeros(num_experts, np.int64)
    priority = np.empty(num_experts, np.int64)
    there = np.zeros(num_experts, np.bool_)
    for run in range(runs.shape[0]):
        layer, cell, first, n = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        if n < length:
            continue
        for g in range(capacities.shape[0]):
            _uses(ids, first, length, coming)
            last[:] = 0
            there[:] = False
            priority[:] = _KEEP
            size = 0
            for t in range(n):
                for r in range(k):
                    e = np.int64(ids[r, first + t])
                    coming[e] -= 1
                    priority[e] = _KEEP
                    if there[e]:
                        hits[cell, layer, g] += 1
                    else:
                        there[e] = True
                        size += 1
                    last[e] = t * k + r + 1
                if t + length < n:
                    for r in range(k):
                        e = np.int64(ids[r, first + t + length])
                        coming[e] += 1
                        if priority[e] != _KEEP:
                            priority[e] = (coming[e] << 40) | last[e]
                while size > capacities[g]:
                    victim = _lowest(priority)
                    if victim < 0:
                        break
                    there[victim] = False
                    priority[victim] = _KEEP
                    size -= 1
                for r in range(k):
                    e = np.int64(ids[r, first + t])
                    priority[e] = (coming[e] << 40) | last[e]
