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

    mean = without.mean(axis=0)
    half = stdtrit(g - 1, 0.5 + CONFIDENCE / 2) * np.sqrt((g - 1) / g * np.square(without - mean).sum(axis=0))
    bias = (g - 1) * (mean - estimate)
    centre = estimate - bias
    return Interval(estimate, centre - half, centre + half, bias)
