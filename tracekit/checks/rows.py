"""Rows that no router makes: consecutive ids, pieces of whole rankings, ids in ascending order, gaps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.chance import LOG_ALPHA
from tracekit.checks.finding import Finding, counted, percent
from tracekit.checks.sample import Ids
from tracekit.schema import Request, TraceMeta

ARGSORT_EFFECT = "each token's whole ranking counts as several tokens: no number means anything"
ARGSORT_REMEDY = "ffn_moe_topk is a strided view: copy k ids per token with its row stride nb[1]"

_GROUPS = 64
_PIECE = 8192
"""Rows worked on at once."""


def is_cycle(rankings: NDArray[Any], top_k: int) -> bool:
    """Whether permutations ``[groups, N]`` consist of the same sets of k again and again: rankings would differ."""
    sets = np.sort(rankings.reshape(len(rankings), -1, top_k), axis=2)
    return len(sets) > 1 and bool((sets == sets[0]).all())


class Rows:
    """Filler rows, rankings cut into pieces, sorted ids, missing rows and duplicates, request by request."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.tokens = 0
        self.filler = self.alone = 0
        self.first_filler: tuple[str, int] | None = None
        self.requests = self.ascending = 0
        """Requests, and those whose ids ascend in every row."""
        self.ascending_tokens = 0
        self.first_ascending = ""
        self.rankings = 0
        self.not_rankings = False
        self.first_ranking = ""
        self.missing = self.gaps = self.holed = 0
        self.first_gap: tuple[str, int, int] | None = None

    def add(self, request: Request) -> None:
        """Take a request."""
        self.tokens += len(request.ids)
        if len(request.ids) == 0:
            return
        if self.meta.top_k > 1:
            self._consecutive(request)
            self.requests += 1
            if _ascending(request.ids):
                self.ascending += 1
                self.ascending_tokens += len(request.ids)
                self.first_ascending = self.first_ascending or request.request_id
            self._rankings(request)
        if request.positions is not None:
            steps = np.diff(request.positions) - 1
            gaps = np.flatnonzero(steps > 0)
            if len(gaps):
                self.holed += 1
                self.gaps += len(gaps)
                self.missing += int(steps[gaps].sum())
                if self.first_gap is None:
                    row = int(gaps[0])
                    self.first_gap = (request.request_id, int(request.positions[row]) + 1, int(steps[row]))

    def merge(self, other: Rows) -> None:
        """Add what was seen of the requests that follow."""
        for count in (
            *("tokens", "filler", "alone", "rankings", "missing", "gaps", "holed"),
            *("requests", "ascending", "ascending_tokens"),
        ):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for first in ("first_filler", "first_ranking", "first_gap", "first_ascending"):
            setattr(self, first, getattr(self, first) or getattr(other, first))
        self.not_rankings = self.not_rankings or other.not_rankings

    def _consecutive(self, request: Request) -> None:
        """Count rows that are consecutive ids (``arange``) in every layer; most fail in the first."""
        for start in range(0, len(request.ids), _PIECE):
            ids = request.ids[start : start + _PIECE]
            candidates = np.flatnonzero(_steps(ids[:, 0]).all(axis=1))
            if len(candidates) == 0:
                continue
            rows = candidates[_steps(ids[candidates]).all(axis=(1, 2))]
            self.alone += len(candidates) - len(rows)
            self.filler += len(rows)
            if len(rows) and self.first_filler is None:
                self.first_filler = (request.request_id, start + int(rows[0]))

    def _rankings(self, request: Request) -> None:
        """See whether the request's first ids, one after the other, are permutations of all experts."""
        n, k = self.meta.num_experts, self.meta.top_k
        tokens = -(-n * min(_GROUPS, len(request.ids) * k // n) // k)
        groups = tokens * k // n
        if self.not_rankings or n < 2 * k or groups < 1:
            return
        flat = request.ids[:tokens, 0].reshape(-1)[: groups * n].reshape(groups, n)
        if (np.sort(flat, axis=1) == np.arange(n)).all() and not (n % k == 0 and is_cycle(flat, k)):
            self.rankings += groups
            self.first_ranking = self.first_ranking or request.request_id
        else:
            self.not_rankings = True

    def findings(self) -> list[Finding]:
        """Return ``filler-rows``, ``argsort-view``, ``sorted-ids`` and ``missing-rows``."""
        return [*self._filler(), *self._argsort(), *self._sorted(), *self._holes()]

    def _filler(self) -> list[Finding]:
        """Report rows that are ``arange`` in every layer.

        The rate of such rows in one layer is estimated from rows that are so in the first layer only; in all L layers
        at once the expected number is ``tokens * rate^L``, which must be below 1e-6.
        """
        if self.first_filler is None:
            return []
        rate = (self.alone + 1) / (self.tokens - self.filler + 2)
        if math.log(self.tokens) + len(self.meta.layers) * math.log(min(1.0, rate)) > LOG_ALPHA:
            return []
        request_id, row = self.first_filler
        share = percent(self.filler, self.tokens)
        return [
            Finding(
                "serious" if self.filler >= 0.02 * self.tokens else "warning",
                "filler-rows",
                f"request {request_id!r} from row {row}",
                f"{counted(self.filler, 'row')} ({share}) hold consecutive ids in every layer",
                "padding counts as routing: load is flattened, windows over it are of no token",
                "Cut the requests at their real length, and leave out rows that were not captured, before saving",
            )
        ]

    def _argsort(self) -> list[Finding]:
        """Report requests whose every N consecutive ids hold each expert once, as a flat copy of an argsort does.

        Uniform routing would do so with a chance of ``N! / k!^(N/k) / C(N, k)^(N/k)`` a group, all groups below 1e-6.
        """
        n, k = self.meta.num_experts, self.meta.top_k
        if self.not_rankings or not self.rankings:
            return []
        one = math.lgamma(n + 1) - n / k * (math.lgamma(k + 1) + math.log(math.comb(n, k)))
        if self.rankings * one > LOG_ALPHA:
            return []
        return [
            Finding(
                "serious",
                "argsort-view",
                f"all requests, {self.first_ranking!r} the first",
                f"the ids are permutations of 0..{n - 1}, one after the other ({counted(self.rankings, 'group')})",
                ARGSORT_EFFECT,
                ARGSORT_REMEDY,
            )
        ]

    def _sorted(self) -> list[Finding]:
        """Report ids that ascend in every row of all requests, or of some: a chance of ``1 / k!`` a row.

        Where some do not, there were 2^requests choices of those that do.
        """
        rows = self.ascending_tokens * len(self.meta.layers)
        some = self.ascending < self.requests
        choices = self.requests * math.log(2) if some else 0.0
        if not self.ascending or choices - rows * math.lgamma(self.meta.top_k + 1) > LOG_ALPHA:
            return []
        return [
            Finding(
                "warning",
                "sorted-ids",
                f"request {self.first_ascending!r}"
                + (f", and {counted(self.ascending - 1, 'more request')}" if self.ascending > 1 else "")
                if some
                else "all rows",
                f"ids ascend in each of {rows:,} rows"
                + (f" ({percent(self.ascending_tokens, self.tokens)} of all)" if some else ""),
                "the router's order is lost: no rank-0 repeats, no measure by rank or of a smaller k",
                "Capture ids in the router's order if ranks matter; unique experts and overlap are not affected",
            )
        ]

    def _holes(self) -> list[Finding]:
        if self.first_gap is None:
            return []
        request_id, pos, length = self.first_gap
        share = percent(self.missing, self.tokens + self.missing)
        return [
            Finding(
                "warning" if self.missing >= 0.02 * (self.tokens + self.missing) else "note",
                "missing-rows",
                f"request {request_id!r}, {counted(length, 'row')} from position {pos}"
                + (f", and {counted(self.holed - 1, 'more request')}" if self.holed > 1 else ""),
                f"{counted(self.missing, 'row')} missing in {counted(self.gaps, 'gap')} ({share})",
                "windows and lags do not reach over a gap: fewer of the long ones, none of what was left out",
                "Prefix-cache hits and drop-outs do this: capture with the prefix cache off, or with a newer engine",
            )
        ]


def _ascending(ids: Ids) -> bool:
    """Return whether the ids of every row ascend; the first rows decide most traces."""
    for low in (0, *range(16, len(ids), _PIECE)):
        rows = ids[low : low + _PIECE if low else 16]
        if not (rows[..., 1:] > rows[..., :-1]).all():
            return False
    return True


def _steps(ids: Ids) -> NDArray[np.bool_]:
    """Return where an id is the one before it plus 1, ``[..., k - 1]``."""
    return np.asarray((ids[..., 1:] > ids[..., :-1]) & (ids[..., 1:] - ids[..., :-1] == 1))
