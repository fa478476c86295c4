"""A bounded sample of stretches of consecutive rows, for the statistics that need the ids themselves."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.keys import Keys, probes, request_keys

Ids = NDArray[np.unsignedinteger[Any]]

STRETCH = 512
"""Rows of a stretch."""
STRETCHES = 8
"""Stretches taken of one request at most, evenly spread."""
MOST_ROWS = 24_576
"""Rows kept of a trace at most."""
MOST_SETS = 5 << 16
"""Rows times layers kept of a trace with many layers."""
_MOST_BITS = 1024
"""Bits of a mask: ids of wider layers share them, which hides a little of the dependence and invents none."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive rows of one request."""

    number: int
    """Which stretch of the trace it was, counted over all."""
    request_id: str
    start: int
    """Its first row in the request."""
    ids: Ids
    """``[rows, layers, k]``."""


class Sample:
    """Stretches of a trace's requests: all of them while they fit, then those of the smallest hashes.

    Which are kept depends on the names of the requests alone, so that the sample of a trace is the same however it
    was read, and that of two halves merged the same as that of the whole.
    """

    def __init__(self) -> None:
        self.seen = 0
        """Rows of the whole trace."""
        self.rows = 0
        """Rows that are kept."""
        self._number = 0
        self._heap: list[tuple[int, int, Stretch]] = []
        """Minus the hash, so that the largest comes first; the number, so that stretches are never compared."""
        self._bound = 1 << 64
        """The smallest hash that was dropped: none from there on is kept, or the order of requests would matter."""
        self._ids: Ids | None = None
        self._keys: Keys | None = None

    def add(self, request_id: str, ids: Ids, breaks: NDArray[np.int64]) -> None:
        """Take stretches of a request ``[tokens, layers, k]``; none reaches over a row of ``breaks``.

        Parameters
        ----------
        breaks
            Rows before which positions are missing, ascending.
        """
        self.seen += len(ids)
        edges = [0, *(int(row) for row in breaks[: 4 * STRETCHES]), len(ids)]
        for low, high in itertools.pairwise(edges):
            for start in _starts(low, high):
                self._number += 1
                name = f"{start} {request_id}".encode("utf-8", "surrogatepass")
                hashed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
                if hashed < self._bound:
                    rows = np.array(ids[start : min(start + STRETCH, high)], order="C")  # a copy: it is kept
                    self._keep(hashed, Stretch(self._number, request_id, start, rows))

    def merge(self, other: Sample) -> None:
        """Add the sample of the requests that follow this one's."""
        self.seen += other.seen
        self._bound = min(self._bound, other._bound)
        mine = [(-key, stretch) for key, _, stretch in self._heap]
        theirs = [(-key, replace(stretch, number=self._number + number)) for key, number, stretch in other._heap]
        self._heap, self.rows = [], 0
        self._number += other._number
        for hashed, stretch in mine + theirs:
            if hashed < self._bound:
                self._keep(hashed, stretch)

    def _keep(self, hashed: int, stretch: Stretch) -> None:
        heapq.heappush(self._heap, (-hashed, stretch.number, stretch))
        self.rows += len(stretch.ids)
        self._ids = self._keys = None
        while self.rows > min(MOST_ROWS, MOST_SETS // stretch.ids.shape[1]) and len(self._heap) > 1:
            largest, _, dropped = heapq.heappop(self._heap)
            self.rows -= len(dropped.ids)
            self._bound = -largest

    @property
    def stretches(self) -> list[Stretch]:
        """Return what is kept, in the order of the trace."""
        return sorted((stretch for *_, stretch in self._heap), key=lambda s: s.number)

    def said(self) -> str:
        """Return how much of the trace was looked at, as text."""
        return f"{self.rows:,} of {self.seen:,} rows" if self.rows < self.seen else f"all {self.seen:,} rows"

    def ids(self) -> Ids:
        """Return the rows of all stretches ``[rows, layers, k]``; not to be written to."""
        if self._ids is None:
            self._ids = np.concatenate([s.ids for s in self.stretches])
        return self._ids

    def fresh(self) -> NDArray[np.bool_]:
        """Return which rows were not there before in the sample ``[rows]``: copies are no further evidence."""
        _, first = np.unique(self.keys(), return_index=True)
        mask = np.zeros(self.rows, bool)
        mask[first] = True
        return mask

    def keys(self) -> Keys:
        """Return a key for each row ``[rows]``; not to be written to."""
        if self._keys is None:
            self._keys = request_keys(self.ids()).rows
        return self._keys

    def unit(self) -> NDArray[np.int64]:
        """Return the stretch of each row ``[rows]``."""
        return np.repeat(np.arange(len(self._heap)), [len(s.ids) for s in self.stretches])


def _starts(low: int, high: int) -> list[int]:
    """Return where the stretches of the rows ``low .. high - 1`` start."""
    starts = range(low, high, STRETCH)
    if len(starts) <= STRETCHES:
        return list(starts)
    chosen = np.unique(np.linspace(0, len(starts) - 1, STRETCHES).astype(int))
    return [starts[i] for i in chosen.tolist()]


def masks(ids: Ids, num_experts: int) -> NDArray[np.uint64]:
    """Return the sets of ``ids[rows, layers, k]`` as bit masks ``[words, layers, rows]``."""
    bits = min(num_experts, _MOST_BITS)
    words = -(-bits // 64)
    out = np.zeros((words, *ids.shape[1::-1]), np.uint64)
    expert = np.arange(num_experts) % bits
    of_expert = np.zeros((words, num_experts), np.uint64)
    of_expert[expert >> 6, np.arange(num_experts)] = np.uint64(1) << (expert & 63).astype(np.uint64)
    for rank in range(ids.shape[2]):
        id_ = np.ascontiguousarray(ids[..., rank].T)
        for w in range(words):
            out[w] |= of_expert[w].take(id_)
    return out


def shared(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """Return how many experts the sets of two arrays of masks ``[words, layers, rows]`` share, ``[layers, rows]``."""
    total: NDArray[np.uint16] = np.bitwise_count(a[0] & b[0]).astype(np.uint16)
    for word in range(1, len(a)):
        total += np.bitwise_count(a[word] & b[word])
    return total


def thin(ids: Ids, layers: int) -> tuple[Ids, NDArray[np.intp]]:
    """Return at most ``layers`` layers of ``ids[rows, layers, k]``, and which they are."""
    chosen = probes(ids.shape[1], layers)
    return ids[:, chosen], chosen
