"""Parameters of the models of time, from measurements: least squares with intervals, of what the data can tell.

Two models. With a model and a machine, `CostModel`: seconds of a step from its bytes and FLOPs, with the effective
bandwidth, the fixed overhead and, where points are bound by compute, the effective FLOP per second. Without them,
Amdahl's law for verification (:mod:`tracekit.economics.amdahl`): V = f(B) x + 1 - f(B), with f at B = 1. In both
each draft costs a share of a step without speculation. Errors are taken as relative: residuals are logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracekit.economics import amdahl
from tracekit.economics.calibration.benchmarks import Cell
from tracekit.economics.calibration.least_squares import Fit, Floats, fit
from tracekit.economics.calibration.names import RATIO, SPEEDUP, STEP, TOKEN, VERIFICATION
from tracekit.economics.cost import CostModel
from tracekit.economics.hardware import BANDWIDTH, FLOPS, Hardware
from tracekit.errors import SourceError

RELATIVE = "relative step"
"""A step with its drafting, in steps without speculation: V + D."""

HOLDABLE = ("bandwidth", "overhead", "flops")
"""Figures of the machine that can be held instead of being fitted."""

_BETTER = 0.01
"""Chance below which one more parameter is no chance improvement."""


@dataclass(frozen=True, slots=True)
class Points:
    """Measured cells with what the models need to predict them; arrays ``[X]``."""

    cells: tuple[Cell, ...]
    """Their quantities are `STEP`, `VERIFICATION`, `RELATIVE` and `RATIO`."""
    unique: Floats
    """U(K + 1, B)."""
    unique_single: Floats
    """U(1, B)."""
    top_k: int

    @property
    def batch_size(self) -> Floats:
        """B."""
        return np.array([cell.batch_size for cell in self.cells], np.float64)

    @property
    def drafts(self) -> Floats:
        """K."""
        return np.array([cell.drafts for cell in self.cells], np.float64)

    @property
    def measured(self) -> Floats:
        """Seconds, or ratios."""
        return np.array([cell.value for cell in self.cells], np.float64)

    def of(self, *quantities: str) -> NDArray[np.bool_]:
        """Return which points are of one of these quantities."""
        return np.array([cell.quantity in quantities for cell in self.cells], bool)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One fitted parameter; None where the data do not tell."""

    name: str
    estimate: float | None
    lo: float | None
    hi: float | None
    unit: str


def resolved(cells: Sequence[Cell], length: Callable[[NDArray[np.int64]], Floats] | None) -> tuple[Cell, ...]:
    """Return cells as whole steps: a time per output token times the acceptance length is that of a step.

    Parameters
    ----------
    cells
        As they were read.
    length
        Acceptance length by draft length, for cells that do not say their own; None where nobody knows.

    Raises
    ------
    SourceError
        A cell needs an acceptance length that nobody knows.
    """
    return tuple(_resolved(cell, length) for cell in cells)


def _resolved(cell: Cell, length: Callable[[NDArray[np.int64]], Floats] | None) -> Cell:
    if cell.quantity not in (TOKEN, SPEEDUP):
        return cell
    if not cell.drafts:
        return replace(cell, quantity=STEP)
    emitted = cell.acceptance_length
    if emitted is None and length is not None:
        emitted = float(length(np.array([cell.drafts]))[0])
    if emitted is None:
        raise SourceError(
            f"{cell}: {cell.said} says nothing of a step without the acceptance length",
            where=cell.where,
            expected="a column acceptance_length: the tokens that a step emits, its own one included",
            remedy="Or give it with --acceptance-length or --acceptance-rate",
        )
    value = cell.value * emitted if cell.quantity == TOKEN else emitted / cell.value
    quantity = STEP if cell.quantity == TOKEN else RELATIVE
    return replace(cell, quantity=quantity, value=value, acceptance_length=emitted)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fit of one of the models to points."""

    fit: Fit
    names: tuple[str, ...]
    """The parameters that were fitted, in the order of ``fit.values``."""
    predicted: Floats
    held: bool
    """Whether FLOP per second keep the machine's value for want of points that tell them."""
    lonely: NDArray[np.bool_]
    """Points whose time had no other to be compared with, and so say nothing."""


def fit_roofline(
    points: Points, costs: Sequence[CostModel], *, hold: Sequence[str] = (), draft_cost: float | None = None
) -> tuple[Fitted, float]:
    """Fit effective bandwidth, overhead, FLOP per second and the cost of a draft.

    FLOP per second stay those of the machine unless the points say better than by chance that they are not.

    Parameters
    ----------
    points
        What was measured.
    costs
        The cost model of each point: they differ in their context.
    hold
        Names of `HOLDABLE` that keep the machine's value.
    draft_cost
        What a draft costs, where it is known.

    Returns
    -------
    Fitted, float
        The fit, and the seconds that its overhead counts in: `tuned` makes a machine of both.
    """
    machine = costs[0].hardware
    names = [name for name in ("bandwidth", "overhead", "flops") if name not in hold]
    if draft_cost is None and (points.of(STEP, RELATIVE) & (points.drafts > 0)).any():
        names.append("draft_cost")
    unit = float(points.measured[points.of(STEP, VERIFICATION)].min(initial=1.0))

    def predict(values: Floats, names: Sequence[str]) -> Floats:
        at = dict(zip(names, values, strict=True))
        return _steps(points, costs, tuned(machine, at, unit), at.get("draft_cost", draft_cost or 0.0))

    def run(names: Sequence[str], starts: Sequence[dict[str, float]]) -> Fit:
        begin = {"bandwidth": 1.3, "overhead": 0.1, "flops": 1.0, "draft_cost": 0.1}
        limits = {
            "bandwidth": _slower(machine.bandwidth * machine.bandwidth_share, BANDWIDTH),
            "overhead": (0.0, min(10.0, 9.9 / unit)),
            "flops": _slower(machine.flops * machine.flops_share, FLOPS),
        }
        return fit(
            lambda values: np.log(points.measured / predict(values, names)),
            [[(begin | start)[name] for name in names] for start in starts],
            [limits.get(name, (0.0, 1e3)) for name in names],
        )

    several = [{"bandwidth": b} for b in (1.0, 3.0)]
    found = run(names, several)
    held = False
    if "flops" in names:
        found, names = _without_idle_flops(found, names, run, several)
        held = "flops" not in names
    alone = np.zeros(len(points.cells), bool)
    return Fitted(found, tuple(names), predict(found.values, names), held, alone), unit


def _slower(peak: float, possible: tuple[float, float]) -> tuple[float, float]:
    """Return how many times slower than its peak a machine may come out, so that its figure is possible."""
    least, most = possible
    # A little within, so that a difference quotient at the limit does not leave it.
    return max(0.01, 1.001 * peak / most), max(0.02, min(1e3, peak / (1.001 * least)))


def _without_idle_flops(
    found: Fit,
    names: list[str],
    run: Callable[[Sequence[str], Sequence[dict[str, float]]], Fit],
    several: Sequence[dict[str, float]],
) -> tuple[Fit, list[str]]:
    """Return the fit with the FLOP per second where the points tell them, else the fit that holds them."""
    from scipy.special import fdtrc

    fewer = [name for name in names if name != "flops"]
    held = run(fewer, several)
    for slower in (2.0, 8.0):
        other = run(names, [several[0] | {"flops": slower}])
        if other.residuals @ other.residuals < found.residuals @ found.residuals:
            found = other
    place = names.index("flops")
    gain = held.residuals @ held.residuals - found.residuals @ found.residuals
    if not found.identified[place] or not found.dof or found.lo[place] <= 0.0:
        return held, fewer
    if found.sigma > 0 and gain <= found.sigma**2 * 1e-6:
        return held, fewer
    chance = fdtrc(1, found.dof, gain / found.sigma**2) if found.sigma > 1e-9 else 0.0
    tells = chance < _BETTER and np.sqrt(found.covariance[place, place]) < 0.5 * found.values[place]
    return (found, names) if tells else (held, fewer)


def tuned(machine: Hardware, at: dict[str, float], unit: float) -> Hardware:
    """Return a machine with fitted values, which are relative: slower by a factor, or in units of the fastest step."""
    bandwidth = machine.bandwidth * machine.bandwidth_share / at.get("bandwidth", 1.0)
    flops = machine.flops * machine.flops_share / at.get("flops", 1.0)
    overhead = at["overhead"] * unit if "overhead" in at else machine.overhead
    return replace(
        machine, bandwidth=bandwidth, bandwidth_share=1.0, flops=flops, flops_share=1.0, overhead=float(overhead)
    )


def _steps(points: Points, costs: Sequence[CostModel], machine: Hardware, draft_cost: float) -> Floats:
    """Return what a machine predicts for each point."""
    B, K = points.batch_size, points.drafts
    verify, single = np.empty(len(B)), np.empty(len(B))
    for cost in {id(cost): cost for cost in costs}.values():
        here = np.array([other is cost for other in costs])
        on = cost.on(machine)
        verify[here] = on.seconds(B[here], K[here] + 1, points.unique[here])
        single[here] = on.seconds(B[here], 1, points.unique_single[here])
    whole = verify + draft_cost * K * single
    kinds = [points.of(STEP), points.of(VERIFICATION), points.of(RELATIVE), points.of(RATIO)]
    return np.select(kinds, [whole, verify, whole / single, verify / single])


def fit_amdahl(points: Points, *, draft_cost: float | None = None) -> Fitted:
    """Fit the routed share f at B = 1 and the cost of a draft.

    Times are compared within a batch size and context only, so that nothing but ratios counts; the level of each is
    taken out as a mean of logarithms.
    """
    names = ["routed_share"]
    if draft_cost is None and (points.of(STEP, RELATIVE) & (points.drafts > 0)).any():
        names.append("draft_cost")
    means = _means(points)

    def ratios(values: Floats) -> Floats:
        at = dict(zip(names, values, strict=True))
        f = amdahl.share_at(at["routed_share"], points.unique_single / points.top_k)
        V = amdahl.verification_ratio(f, points.unique / points.unique_single)
        drafting = at.get("draft_cost", draft_cost or 0.0) * points.drafts
        return np.asarray(V + np.where(points.of(STEP, RELATIVE), drafting, 0.0), np.float64)

    def left(values: Floats) -> Floats:
        """Return the residuals without the level of their group."""
        whole = np.log(points.measured / ratios(values))
        return np.asarray(whole - means @ (means.T @ whole), np.float64)

    found = fit(
        left,
        [[f, 0.05][: len(names)] for f in (0.1, 0.5, 0.9)],
        [(0.0, 1.0), (0.0, 1e3)][: len(names)],
        means=means,
    )
    predicted = points.measured / np.exp(found.residuals)
    lonely = np.square(means).max(axis=1, initial=0.0) > 1 - 1e-9
    return Fitted(found, tuple(names), predicted, False, lonely)


def _means(points: Points) -> Floats:
    """Return ``[X, G]``, a direction for the times of each batch size and context: that of their common level."""
    timed = points.of(STEP, VERIFICATION)
    groups = dict.fromkeys((c.batch_size, c.context) for c, t in zip(points.cells, timed, strict=True) if t)
    columns = np.array(
        [
            [t and (c.batch_size, c.context) == group for c, t in zip(points.cells, timed, strict=True)]
            for group in groups
        ]
    ).reshape(len(groups), len(points.cells))
    return np.asarray((columns / np.linalg.norm(columns, axis=1, keepdims=True)).T, np.float64)
