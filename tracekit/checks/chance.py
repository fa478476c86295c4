"""How unlikely something is in a sound trace; every threshold of the detectors comes from here."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

ALPHA = 1e-6
"""Chance, per trace and detector, of a finding in a trace without the fault."""

LOG_ALPHA = math.log(ALPHA)


@cache
def z_limit(tests: int) -> float:
    """Return the normal deviate that a sound trace exceeds in any of so many tests with a chance of ``ALPHA``."""
    return NormalDist().inv_cdf(1 - ALPHA / max(1, tests))


def z_score(batches: NDArray[np.float64]) -> float:
    """Return how far the mean of independent batch means is above 0, as a normal deviate.

    A t value of few batches has heavy tails: it is turned into the deviate of the same chance (Wallace 1959).

    Parameters
    ----------
    batches
        ``[n]`` means of batches long enough to be taken for independent.
    """
    n = len(batches)
    if n < 3:
        return 0.0
    spread = float(batches.std(ddof=1))
    mean = float(batches.mean())
    if spread <= 1e-12 * max(1.0, abs(mean)):
        # Batches that agree exactly show a constant, of which nothing can be said but its sign.
        spread = 1e-12 + abs(mean) * 1e-3
    t, df = mean / (spread / math.sqrt(n)), n - 1
    return math.copysign((8 * df + 1) / (8 * df + 3) * math.sqrt(df * math.log1p(t * t / df)), t)


def log_chance_of_repeats(run: int, repeats: int, pairs: int) -> float:
    """Return the log chance that a run goes on for ``run`` rows when ``repeats`` of ``pairs`` other rows did so.

    The rate of repeats is not known but for those pairs: with a uniform prior its predictive (a Polya urn) is
    the product of ``(1 + repeats + i) / (2 + pairs + i)``; few pairs therefore prove little.
    """
    a, b = 1 + repeats, 2 + pairs
    n = max(0, run - 1)
    return math.lgamma(a + n) - math.lgamma(a) - math.lgamma(b + n) + math.lgamma(b)


def log_sets(num_experts: int, top_k: int) -> float:
    """Return the log of the number of sets that a router can choose."""
    return math.lgamma(num_experts + 1) - math.lgamma(top_k + 1) - math.lgamma(num_experts - top_k + 1)
