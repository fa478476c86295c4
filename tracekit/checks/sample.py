"""A bounded sample of stretches of consecutive rows, for the statistics that need the ids themselves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.keys import Keys, probes, request_keys

Ids = NDArray[np.unsignedinteger[Any]]

STRETCH = 512
"""Rows of a stretch."""
STRETCHES = 8
"""Stretches taken of one request at most, evenly spread."""
MOST_ROWS = 32_768
"""Rows kept of a trace at most."""
MOST_SETS = 1 << 19
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
    """Stretches of a trace's requests: all of them while they fit, then every second, every fourth and so on.

    Which are kept depends on their number alone, so that the sample of a trace is the same however it was read.
    """

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.seen = 0
        """Rows of the whole trace."""
        self._number = 0
        self._every = 1

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
            starts = np.arange(low, high, STRETCH)
            starts = starts[np.unique(np.linspace(0, len(starts) - 1, min(len(starts), STRETCHES)).astype(int))]
            for start in starts.tolist():
                if self._number % self._every == 0:
                    rows = np.ascontiguousarray(ids[start : min(start + STRETCH, high)])
                    self.stretches.append(
                        Stretch(self._number, request_id, start, rows.copy() if rows.base is not None else rows)
                    )
                self._number += 1
        while self.rows > min(MOST_ROWS, MOST_SETS // ids.shape[1]) and len(self.stretches) > 1:
            self._every *= 2
            self.stretches = [s for s in self.stretches if s.number % self._every == 0]

    @property
    def rows(self) -> int:
        """Return the rows that are kept."""
        return sum(len(s.ids) for s in self.stretches)

    def said(self) -> str:
        """Return how much of the trace was looked at, as text."""
        return f"{self.rows:,} of {self.seen:,} rows" if self.rows < self.seen else f"all {self.seen:,} rows"

    def ids(self) -> Ids:
        """Return the rows of all stretches ``[rows, layers, k]``."""
        return np.concatenate([s.ids for s in self.stretches])

    def fresh(self) -> NDArray[np.bool_]:
        """Return which rows were not there before in the sample ``[rows]``: copies are no further evidence."""
        _, first = np.unique(self.keys(), return_index=True)
        mask = np.zeros(self.rows, bool)
        mask[first] = True
        return mask

    def keys(self) -> Keys:
        """Return a key for each row ``[rows]``."""
        return np.concatenate([request_keys(s.ids).rows for s in self.stretches])

    def unit(self) -> NDArray[np.int64]:
        """Return the stretch of each row ``[rows]``."""
        return np.repeat(np.arange(len(self.stretches)), [len(s.ids) for s in self.stretches])


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
