"""Intervals from whole requests: the delete-a-group jackknife.

Tokens of a request are dependent, so requests are left out whole. Every baseline is recomputed without the group as
well, so that the interval of a reduction is paired. (Kott, "The delete-a-group jackknife", 2001.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

_ROUNDING = 1e-12
"""What sums in another order may differ by, relatively."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A plain estimate with its jackknife interval and bias; each ``[X]``, NaN where there is none."""

    estimate: NDArray[np.float64]
    lo: NDArray[np.float64]
    hi: NDArray[np.float64]
    bias: NDArray[np.float64]

    def where(self, enough: NDArray[np.bool_]) -> Interval:
        """Return it without the interval where there is not enough to rest one on."""
        lo, hi, bias = (np.where(enough, value, np.nan) for value in (self.lo, self.hi, self.bias))
        return Interval(self.estimate, lo, hi, bias)

    def contains(self, value: Any) -> NDArray[np.bool_]:
        """Return where the interval contains a value; False where there is no interval."""
        return np.asarray((self.lo <= value) & (value <= self.hi))


def jackknife(replicates: NDArray[np.float64]) -> Interval:
    """Return the interval of an estimate from its values with each group left out.

    Parameters
    ----------
    replicates
        ``[1 + G, X]``: row 0 is the plain estimate, row g the estimate without group g. With G < 2 there is no
        interval.
    """
    estimate, without = replicates[0], replicates[1:]
    g = len(without)
    if g < 2:
        none = np.full_like(estimate, np.nan)
        return Interval(estimate, none, none, none)
    from scipy.special import stdtrit

    bias, error = _bias_and_error(replicates)
    half = stdtrit(g - 1, 0.5 + CONFIDENCE / 2) * error
    centre = estimate - bias
    return Interval(estimate, centre - half, centre + half, bias)


def _bias_and_error(replicates: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    estimate, without = replicates[0], replicates[1:]
    g, mean = len(without), without.mean(axis=0)
    return (g - 1) * (mean - estimate), np.sqrt((g - 1) / g * np.square(without - mean).sum(axis=0))


def difference(a: NDArray[np.float64], b: NDArray[np.float64], *, paired: bool) -> Interval:
    """Return the interval of b - a from the values of both with each group left out.

    Parameters
    ----------
    a, b
        ``[1 + G, X]`` each, see :func:`jackknife`.
    paired
        Whether group g is of the same requests in both: then both leave it out together, and what the requests have in
        common cancels. Else the two standard errors add up in squares, with the degrees of freedom of Welch and
        Satterthwaite (Welch, Biometrika 34, 1947).
    """
    estimate = _rounded(b[0] - a[0], a[0], b[0])
    if len(a) < 3 or len(b) < 3 or (paired and len(a) != len(b)):
        none = np.full_like(estimate, np.nan)
        return Interval(estimate, none, none, none)
    if paired:
        return jackknife(_rounded(b - a, a, b))
    from scipy.special import stdtrit

    (bias_a, error_a), (bias_b, error_b) = _bias_and_error(a), _bias_and_error(b)
    square_a, square_b = np.square(error_a), np.square(error_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.square(square_a + square_b) / (square_a**2 / (len(a) - 2) + square_b**2 / (len(b) - 2))
        half = np.where(
            square_a + square_b > 0, stdtrit(freedom, 0.5 + CONFIDENCE / 2) * np.sqrt(square_a + square_b), 0.0
        )
    bias = bias_b - bias_a
    centre = estimate - bias
    return Interval(estimate, centre - half, centre + half, bias)


def _rounded(difference: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a difference, 0 where it is no more than the rounding of what it is of."""
    return np.where(np.abs(difference) <= _ROUNDING * np.maximum(np.abs(a), np.abs(b)), 0.0, difference)
