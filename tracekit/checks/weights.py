"""Router weights that cannot be what the experts were weighted with.

Families differ: weights sum to 1, to a scale (DeepSeek's 2.5), or to whatever the softmax left to the chosen ones; and
a router that adds a bias before it chooses does not rank by weight. So nothing is said of a sum as such, nor of single
rows that do not fall: only of what no family does.
"""

from __future__ import annotations

import math

import numpy as np

from tracekit.checks.finding import Finding, percent
from tracekit.schema import Request, TraceMeta

_ROWS = 256
"""Rows of a request that are looked at, evenly spread."""
_ENOUGH = 200
"""Rows times layers below which nothing is said of shares."""
_PER_BIN = 0.002
"""Width of the bins of the logarithm of the sums: half precision rounds sums by half of it."""
_BINS = 20_001
_REMEDY = "Save what the experts' outputs are multiplied with, in the order of the ids, or leave the weights out"


class Weights:
    """Weights that are no weights, all alike, out of order, or off the sum that all others have."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.rows = self.invalid = self.equal = self.falling = self.rising = 0
        """Rows times layers."""
        self.first_invalid = ""
        self.sums = np.zeros(_BINS, np.int64)
        """By logarithm, the middle for a sum of 1."""
        self.firsts: dict[int, str] = {}
        """The first request with a sum of each bin."""

    def add(self, request: Request) -> None:
        """Take a request's weights."""
        if request.weights is None or not len(request.ids):
            return
        every = -(-len(request.weights) // _ROWS)
        with np.errstate(over="ignore"):  # what the store cannot hold becomes infinite
            weights = np.asarray(request.weights[::every], np.float32)
        self.rows += weights.shape[0] * weights.shape[1]
        total = weights.sum(axis=-1, dtype=np.float64)
        sound = np.isfinite(weights).all(axis=-1) & (weights >= 0).all(axis=-1) & (total > 0)
        if not sound.all():
            self.invalid += int((~sound).sum())
            if not self.first_invalid:
                row, layer = (int(i) for i in np.argwhere(~sound)[0])
                self.first_invalid = (
                    f"request {request.request_id!r}, row {row * every}, layer {self.meta.layers[layer]}: "
                    + " ".join(f"{w:g}" for w in weights[row, layer, :8])
                )
        weights, total = weights[sound], total[sound]
        first, last = weights[:, 0], weights[:, -1]
        self.equal += int((weights == first[:, None]).all(axis=-1).sum())
        self.falling += int((first > last).sum())
        self.rising += int((first < last).sum())
        bins = np.clip(np.rint(np.log(total) / _PER_BIN) + _BINS // 2, 0, _BINS - 1).astype(np.intp)
        for fresh in np.unique(bins[self.sums[bins] == 0]).tolist():
            self.firsts[fresh] = request.request_id
        self.sums += np.bincount(bins, minlength=_BINS)

    def merge(self, other: Weights) -> None:
        """Add what was seen of the requests that follow."""
        for count in ("rows", "invalid", "equal", "falling", "rising", "sums"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        self.first_invalid = self.first_invalid or other.first_invalid
        self.firsts = other.firsts | self.firsts

    def findings(self) -> list[Finding]:
        """Return ``invalid-weights``, ``equal-weights``, ``weights-out-of-order`` and ``weight-sums``."""
        return [*self._invalid(), *self._equal(), *self._order(), *self._sum()]

    def _invalid(self) -> list[Finding]:
        if not self.invalid:
            return []
        return [
            Finding(
                "warning",
                "invalid-weights",
                self.first_invalid,
                f"{self.invalid:,} of {self.rows:,} sets looked at have a weight that is negative or not finite, or "
                "weights that are all zero",
                "nothing that counts experts; whatever is weighted with them is wrong",
                _REMEDY,
            )
        ]

    def _equal(self) -> list[Finding]:
        """Report weights that are the same for all experts of nearly every row, which says nothing of the router."""
        if self.meta.top_k == 1 or self.rows < _ENOUGH or self.equal < 0.99 * self.rows:
            return []
        return [
            Finding(
                "warning",
                "equal-weights",
                "whole trace",
                f"all {self.meta.top_k} weights are equal in {percent(self.equal, self.rows)} of {self.rows:,} sets "
                "looked at",
                "nothing that counts experts; the weights tell nothing",
                _REMEDY,
            )
        ]

    def _order(self) -> list[Finding]:
        """Report a router order that is claimed and is not that of the weights.

        A bias that a router adds for the choice alone (DeepSeek-V3) makes single rows rise; but what is chosen first
        still weighs more than what is chosen last, more often than not. Ids in any other order show each in half of
        the rows.
        """
        untied = self.falling + self.rising
        if self.meta.router_order is not True or untied < _ENOUGH or self.falling > 0.55 * untied:
            return []
        return [
            Finding(
                "warning",
                "weights-out-of-order",
                "whole trace",
                f"ids are said to stand in the router's order, but rank 0 has more weight than rank "
                f"{self.meta.top_k - 1} in {percent(self.falling, untied)} of {untied:,} sets looked at",
                "rank-0 repeats and measures of a smaller k are not those of the router's choices; or the weights are "
                "of other experts than the ids beside them",
                "Ingest with --router-order no, or capture ids and weights in one order",
            )
        ]

    def _sum(self) -> list[Finding]:
        """Report sums far from the one that nearly all others have.

        Normalised weights have one sum: 49 of 50 within 1 %. Weights that are not, but of a router so sure that most
        come near 1, have sums that thin out below it; so that those more than 5 % off must outnumber those between.
        """
        total = int(self.sums.sum())
        around = np.convolve(self.sums, np.ones(5, np.int64), "same")
        middle = int(around.argmax())
        near = slice(max(0, middle - 25), middle + 26)
        off = total - int(self.sums[near].sum())
        between = total - off - int(around[middle])
        if total < _ENOUGH or around[middle] < 0.98 * total or off <= 2 * between:
            return []
        other = min(request for at, request in self.firsts.items() if not near.start <= at < near.stop)
        return [
            Finding(
                "warning",
                "weight-sums",
                f"request {other!r}",
                f"{off:,} of {total:,} sets looked at have weights that do not sum to about "
                f"{math.exp((middle - _BINS // 2) * _PER_BIN):.2g}, as all the others do",
                "nothing that counts experts; whatever is weighted with them is wrong there",
                _REMEDY,
            )
        ]
