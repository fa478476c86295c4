"""How far two traces of the same tokens agree, token by token: what quantisation or another kernel changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.state import MIN_REQUESTS

Floats = NDArray[np.float64]


class Agreement:
    """Sums over tokens that two traces route: of each jackknife group and layer."""

    def __init__(self, groups: int, layers: int) -> None:
        shape = (groups, layers)
        self.tokens = np.zeros(shape, np.int64)
        self.identical = np.zeros(shape, np.int64)
        """Tokens with the same set of experts in both."""
        self.shared = np.zeros(shape, np.int64)
        """Experts in both sets, summed over tokens."""
        self.top_k = 1

    def add(self, group: NDArray[np.int64], layer: NDArray[np.int64], a: NDArray[Any], b: NDArray[Any]) -> None:
        """Add tokens whose experts are ``a[k, rows]`` and ``b[k, rows]``, in any order; ``layer`` is its index."""
        self.top_k = len(a)
        shared = np.zeros(a.shape[1], np.int64)
        for of_rank in a:
            shared += (b == of_rank).any(axis=0)
        at = (group, layer)
        np.add.at(self.tokens, at, 1)
        np.add.at(self.identical, at, shared == self.top_k)
        np.add.at(self.shared, at, shared)

    def shares(self, requests: int) -> dict[str, Floats]:
        """Return the share of identical sets and the mean overlap, ``[1 + G, L]``: in all, then without each group.

        Parameters
        ----------
        requests
            Requests with tokens to compare; with too few there are no replicates.
        """

        def left_out(sums: NDArray[np.int64]) -> NDArray[np.int64]:
            total = sums.sum(axis=0, keepdims=True)
            return np.concatenate([total, total - sums]) if requests >= MIN_REQUESTS else total

        n = left_out(self.tokens)
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "identical_sets": np.where(n > 0, left_out(self.identical) / n, np.nan),
                "overlap": np.where(n > 0, left_out(self.shared) / (n * self.top_k), np.nan),
            }
