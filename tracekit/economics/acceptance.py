"""How many drafts are accepted: acceptance length, the rate behind it, and what is measured of both.

The acceptance length AL counts the tokens that a step emits: the accepted drafts, and the bonus or corrected token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.errors import UsageError

Floats = NDArray[np.float64]

_HALVINGS = 60
"""Steps of the bisection: as many as a number in [0, 1] has bits."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The chance that a draft is accepted once those before it were, by its depth.

    A shorter draft is accepted as the first part of a longer one: whether a token is accepted does not depend on what
    is drafted after it.
    """

    beyond: float
    """The chance at depths that ``rates`` does not reach."""
    rates: tuple[float, ...] = ()
    """Chances at depths 1, 2, … that were measured."""
    trees: Mapping[int, float] = field(default_factory=dict)
    """Acceptance lengths of draft trees by their drafts, of which only some are deeper than the others."""

    @classmethod
    def given(
        cls, rate: float | None, length: float | None, at_drafts: int | None, drafts: Sequence[int]
    ) -> Acceptance | None:
        """Return what a rate or a length says, None with neither.

        Parameters
        ----------
        rate
            a, the same at every depth.
        length
            AL with ``at_drafts`` drafts.
        at_drafts
            K that the length belongs to; may be None with one draft length.
        drafts
            Draft lengths that are asked for.

        Raises
        ------
        UsageError
            If both are given, the length belongs to no draft length, or one is out of range.
        """
        if rate is not None and length is not None:
            raise UsageError("an acceptance rate and an acceptance length", expected="one of the two")
        if length is None and at_drafts is not None:
            raise UsageError("at_drafts without an acceptance length", expected="both or neither")
        if length is not None:
            if at_drafts is None and len(drafts) != 1:
                raise UsageError(
                    "an acceptance length for several draft lengths",
                    expected="at_drafts, the draft length that it was measured with",
                )
            rate = float(acceptance_rate(length, drafts[0] if at_drafts is None else at_drafts))
        if rate is None:
            return None
        acceptance_length(rate, 1)  # refuses what is no rate
        return cls(rate)

    @classmethod
    def measured(cls, rates: Sequence[float]) -> Acceptance:
        """Return what verification steps accepted, by depth from 1 on.

        Deeper drafts than theirs are taken to be accepted at the constant rate that gives their acceptance length.
        """
        length = 1 + float(np.cumprod(rates).sum())
        return cls(float(acceptance_rate(length, len(rates))), tuple(rates))

    def length(self, drafts: NDArray[np.int64]) -> Floats:
        """Return AL with K drafts: 1 + the sum of the chances to get to each depth."""
        further = [self.beyond] * max(int(drafts.max(initial=0)) - len(self.rates), 0)
        reached = np.cumprod([*self.rates, *further])
        lengths = np.asarray(np.concatenate([[1.0], 1 + np.cumsum(reached)])[drafts], np.float64)
        for K, length in self.trees.items():
            lengths[drafts == K] = length
        return lengths

    def source(self, drafts: NDArray[np.int64]) -> list[Literal["given", "measured", "extrapolated"]]:
        """Return where AL with K drafts is from."""
        if not self.rates:
            return ["given"] * len(drafts)
        beyond = (drafts > len(self.rates)) & ~np.isin(drafts, list(self.trees))
        return ["extrapolated" if further else "measured" for further in beyond]


def acceptance_length(rate: ArrayLike, drafts: ArrayLike) -> Floats:
    """Return AL = 1 + a + … + a^K, tokens that a step emits if each draft is accepted with probability a.

    (1 - a^(K+1)) / (1 - a), and K + 1 at a = 1 (Leviathan et al., 2023).

    Parameters
    ----------
    rate
        a, chance that a draft is accepted once those before it were.
    drafts
        K, drafts per step. Both broadcast.

    Raises
    ------
    UsageError
        If a rate is outside [0, 1], or K is negative.
    """
    a, K = np.asarray(rate, np.float64), np.asarray(drafts, np.int64)
    wrong = ~((a >= 0) & (a <= 1))
    if wrong.any():
        raise UsageError(f"an acceptance rate of {a[wrong][0]:g}", expected="0 to 1")
    if K.min(initial=0) < 0:
        raise UsageError(f"{K.min()} drafts", expected="0 or more")
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without a difference of powers, which would lose its digits where a is close to 1.
        summed = np.expm1((K + 1) * np.log(a)) / (a - 1)
    return np.where(a == 1, K + 1.0, summed)


def acceptance_rate(length: ArrayLike, drafts: ArrayLike) -> Floats:
    """Return the a whose acceptance length this is, the inverse of `acceptance_length`.

    Raises
    ------
    UsageError
        If a length is outside [1, K + 1].
    """
    AL, K = np.broadcast_arrays(np.asarray(length, np.float64), np.asarray(drafts, np.int64))
    wrong = ~((AL >= 1) & (AL <= K + 1))
    if wrong.any():
        raise UsageError(
            f"an acceptance length of {AL[wrong][0]:g} with {K[wrong][0]} drafts",
            expected=f"1 to {K[wrong][0] + 1}: the bonus token counts",
        )
    return break_even_rate(AL, K)


def break_even_rate(length: ArrayLike, drafts: ArrayLike) -> Floats:
    """Return the least a whose acceptance length reaches this one: 0 below 1, NaN above K + 1."""
    AL, K = np.asarray(length, np.float64), np.asarray(drafts, np.int64)
    shape = np.broadcast_shapes(AL.shape, K.shape)
    low, high = np.zeros(shape), np.ones(shape)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        under = acceptance_length(middle, K) < AL
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    # Halving never gets to the ends themselves.
    return np.where(AL <= 1, 0.0, np.where(AL == K + 1, 1.0, np.where(AL <= K + 1, high, np.nan)))
