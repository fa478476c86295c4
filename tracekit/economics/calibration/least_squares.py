"""Least squares with intervals, that says which parameters the data cannot tell.

The residuals are divided by what one run scatters, so that their sum of squares over the degrees of freedom estimates
its variance; intervals are Student's, from the Jacobian at the solution (Seber and Wild, "Nonlinear Regression", 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.intervals import CONFIDENCE

Floats = NDArray[np.float64]

_NO_EFFECT = 1e-7
"""Norm of a column of the Jacobian, relative to the largest, below which a parameter moves nothing."""

_COLLINEAR = 1e-5
"""Singular value of the scaled Jacobian, relative to the largest, below which parameters move the same."""

_TREND = 0.01
"""Chance below which a trend of residuals is no chance."""

_EXACT = 1e-9
"""Residuals below come from rounding in the arithmetic."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The solution; arrays are ``[P]`` over parameters or ``[X]`` over points."""

    values: Floats
    lo: Floats
    hi: Floats
    """95 % intervals, kept within the bounds; NaN without degrees of freedom, or for a parameter that is not known."""
    identified: NDArray[np.bool_]
    alike: tuple[tuple[int, ...], ...]
    """Parameters that the data cannot tell from each other; a single one has no effect on any point."""
    covariance: Floats
    """``[P, P]``, 0 for what is not identified."""
    residuals: Floats
    """As the function gave them."""
    sigma: float
    """Standard deviation of a residual; NaN without degrees of freedom."""
    standardised: Floats
    """Residuals over their own standard deviations; NaN where a point has none."""
    dof: int
    basis: Floats
    """``[X, R]``: orthonormal directions in which parameters and means move the points."""

    @property
    def flagged(self) -> NDArray[np.bool_]:
        """Points beyond two standard deviations."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(self.standardised) > 2)


def fit(
    residuals: Callable[[Floats], Floats],
    starts: Sequence[Sequence[float]],
    bounds: Sequence[tuple[float, float]],
    *,
    means: Floats | None = None,
) -> Fit:
    """Minimise a sum of squares.

    Parameters
    ----------
    residuals
        From parameters ``[P]`` to residuals ``[X]``, each divided by what makes them scatter alike.
    starts
        Where to begin; the best of what is found counts.
    bounds
        Least and largest value of each parameter. All are of the order of 1, so that one tolerance serves.
    means
        ``[X, G]``, orthonormal: what was projected out of the residuals already, such as the means of groups.
    """
    from scipy.optimize import least_squares

    low, high = np.array(bounds, np.float64).reshape(-1, 2).T
    if not len(low):
        left = residuals(low)
        return _described(low, left, np.zeros((len(left), 0)), low, high, means)
    found = [
        least_squares(
            residuals,
            np.clip(np.asarray(start, np.float64), low + 1e-9, high - 1e-9),
            bounds=(low, high),
            jac="3-point",
            xtol=1e-10,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=100,
        )
        for start in starts
    ]
    best = min(found, key=lambda result: result.cost)
    return _described(best.x, best.fun, best.jac, low, high, means)


def _described(
    values: Floats, residuals: Floats, jacobian: Floats, low: Floats, high: Floats, means: Floats | None
) -> Fit:
    from scipy.special import stdtrit

    basis, inverse, alike = _taken_apart(jacobian)
    if means is not None:
        basis = np.column_stack([means, basis])
    identified = np.ones(len(values), bool)
    identified[[i for group in alike for i in group]] = False
    dof = max(len(residuals) - basis.shape[1], 0)
    sigma = float(np.sqrt(residuals @ residuals / dof)) if dof else np.nan
    free = 1 - np.square(basis).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        standardised = np.where(free > 1e-6, residuals / (sigma * np.sqrt(free)), np.nan)
    if sigma <= _EXACT:
        standardised = np.zeros(len(residuals))
    covariance = sigma**2 * np.where(np.outer(identified, identified), inverse, 0.0)
    half = stdtrit(max(dof, 1), 0.5 + CONFIDENCE / 2) * np.sqrt(np.diag(covariance))
    lo, hi = (np.where(identified, np.clip(values + side * half, low, high), np.nan) for side in (-1, 1))
    return Fit(values, lo, hi, identified, alike, covariance, residuals, sigma, standardised, dof, basis)


def _taken_apart(jacobian: Floats) -> tuple[Floats, Floats, tuple[tuple[int, ...], ...]]:
    """Return a basis of what the parameters move, (JᵀJ)⁻¹ in it, and the parameters that it does not tell.

    A group of several moves the points in the same way, up to a factor or a sum; one alone does not move them.
    """
    norms = np.linalg.norm(jacobian, axis=0)
    dead = norms <= _NO_EFFECT * norms.max(initial=0.0)
    scale = np.where(dead, 1.0, norms)
    left, singular, right = np.linalg.svd(np.where(dead, 0.0, jacobian / scale), full_matrices=False)
    kept = singular > _COLLINEAR * singular.max(initial=1e-300)
    basis = left[:, kept]
    inverse = (right[kept].T / np.square(singular[kept])) @ right[kept] / np.outer(scale, scale)
    # A parameter is told by the data where its own direction lies within those that move the points.
    told = np.square(right[kept]).sum(axis=0)
    alike: list[tuple[int, ...]] = [(int(i),) for i in np.flatnonzero(dead)]
    if together := tuple(int(i) for i in np.flatnonzero(~dead & (told < 1 - 1e-3))):
        alike.append(together)
    return basis, inverse, tuple(alike)


def trend(found: Fit, along: Floats) -> tuple[float, float] | None:
    """Return the slope of the residuals along something, and the chance of one as steep where there is none.

    The slope is that of the model with one more term (a partial t test), so what the parameters took up is allowed for.

    Parameters
    ----------
    along
        ``[X]``, such as the logarithm of the batch size.

    Returns
    -------
    tuple of float or None
        None where the points cannot tell, or where the trend is within chance.
    """
    from scipy.special import stdtr

    rest = along - along.mean()
    rest = rest - found.basis @ (found.basis.T @ rest)
    length, dof = rest @ rest, found.dof - 1
    if dof < 2 or length <= 1e-6 * (along @ along) or found.sigma <= _EXACT:
        return None
    slope = float(rest @ found.residuals / length)
    left = found.residuals - slope * rest
    error = float(np.sqrt(left @ left / dof / length))
    chance = float(2 * stdtr(dof, -abs(slope) / error)) if error > 0 else 0.0
    return (slope, chance) if chance < _TREND else None
