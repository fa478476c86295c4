"""Amdahl's law for verification: only the routed experts' part of a step grows with the experts that it loads.

V = f · x + 1 - f, where f is the routed experts' share of the step that is compared against and x how many times its
experts the verification loads (Cohere, "Why MoE models get more from speculative decoding", 2026). What is fixed
per step (launches, scheduling, sampling) makes f smaller than the bytes say, and verification cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.economics.cost import CostModel, total
from tracekit.economics.hardware import ideal
from tracekit.errors import UsageError

Floats = NDArray[np.float64]


def verification_ratio(routed_share: ArrayLike, expert_ratio: ArrayLike) -> Floats:
    """Return V = f x + 1 - f.

    Parameters
    ----------
    routed_share
        f, the routed experts' share of the time of a step with one token per request, in [0, 1].
    expert_ratio
        x = U(T, B) / U(1, B).

    Raises
    ------
    UsageError
        If a share is outside [0, 1].
    """
    f = share(routed_share)
    return np.asarray(f * np.asarray(expert_ratio, np.float64) + 1 - f, np.float64)


def share_at(routed_share: ArrayLike, growth: ArrayLike) -> Floats:
    """Return the routed share of a batch's step from that of a single request's.

    f(B) = f₁ x / (f₁ x + 1 - f₁): the experts' part grows to x times, all else is read once as before.

    Parameters
    ----------
    routed_share
        f₁, the share at B = 1.
    growth
        x = U(1, B) / k, experts that the batch loads over those of a single token.

    Raises
    ------
    UsageError
        If a share is outside [0, 1].
    """
    f, x = share(routed_share), np.asarray(growth, np.float64)
    with np.errstate(invalid="ignore"):
        # No more than 1, which rounding may come to.
        return np.asarray(np.minimum(f * x / (f * x + 1 - f), 1.0), np.float64)


def implied_share(measured: ArrayLike, expert_ratio: ArrayLike) -> Floats:
    """Return the f that a measured verification ratio implies: (V - 1) / (x - 1); NaN where x is 1.

    A figure outside [0, 1] says that something other than the experts grew or shrank.
    """
    V, x = np.asarray(measured, np.float64), np.asarray(expert_ratio, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(x == 1, np.nan, (V - 1) / (x - 1)), np.float64)


def share(value: ArrayLike) -> Floats:
    """Return shares as an array, refusing what is none."""
    shares = np.asarray(value, np.float64)
    if not np.all((shares >= 0) & (shares <= 1)):
        raise UsageError(f"a share of {shares[~((shares >= 0) & (shares <= 1))][0]:g}", expected="0 to 1")
    return shares


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A step of one token at B = 1, taken apart, and what it predicts for a window of T tokens."""

    seconds: float
    """Seconds of the step by its bytes and FLOPs alone."""
    routed_share: float
    """f without anything fixed: the experts' share of those seconds."""
    verification_ratio: float
    """V without anything fixed."""
    overhead_share: float
    """Share of the step that the machine's fixed costs take."""
    routed_share_fixed: float
    """f with the machine's fixed costs in the step."""
    verification_ratio_fixed: float
    """V with them."""
    implied_share: float
    """f that a measured V implies; NaN without one."""
    implied_overhead: float
    """Seconds of fixed cost that would bring f down to it; NaN without one, negative where f is above."""
    implied_overhead_share: float
    """Their share of the step."""


def decompose(cost: CostModel, window: int, unique: float, measured: float | None = None) -> Decomposition:
    """Return what a verification at B = 1 should cost, and how much fixed cost a measured one points to.

    Parameters
    ----------
    cost
        The model on its machine.
    window
        T, tokens in the verification.
    unique
        Routed experts per MoE layer that it loads, U(T, 1).
    measured
        V as it was measured.

    Raises
    ------
    UsageError
        If the measured ratio is not a positive number.
    """
    if measured is not None and not 0 < measured < 1e6:
        raise UsageError(f"a measured verification ratio of {measured:g}", expected="a positive number")
    tokens, loaded = np.array([1, window]), np.array([cost.model.config.top_k, unique])
    bare = cost.on(ideal(cost.hardware))
    parts = bare.parts(1, tokens, loaded)
    seconds = total(parts)
    routed = next(part for part in parts if part.name == "experts").seconds[0]
    with_fixed = cost.seconds(1, tokens, loaded)
    f = routed / seconds[0]
    implied = np.nan if measured is None else float(implied_share(measured, unique / cost.model.config.top_k))
    with np.errstate(divide="ignore", invalid="ignore"):
        overhead = np.float64(f) / implied - 1
        return Decomposition(
            seconds=float(seconds[0]),
            routed_share=float(f),
            verification_ratio=float(seconds[1] / seconds[0]),
            overhead_share=float(1 - seconds[0] / with_fixed[0]),
            routed_share_fixed=float(routed / with_fixed[0]),
            verification_ratio_fixed=float(with_fixed[1] / with_fixed[0]),
            implied_share=implied,
            implied_overhead=float(seconds[0] * overhead) if implied > 0 else np.nan,
            implied_overhead_share=float(1 - implied / f) if implied > 0 else np.nan,
        )
