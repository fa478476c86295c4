"""What measurements say of a model of time: parameters with intervals, points with residuals, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit import markup
from tracekit.economics.calibration import notes as said
from tracekit.economics.calibration.benchmarks import Cell
from tracekit.economics.calibration.fits import Fitted, Parameter, Points, fit_amdahl, fit_roofline, tuned
from tracekit.economics.calibration.least_squares import Floats
from tracekit.economics.cost import CostModel
from tracekit.economics.hardware import Hardware

if TYPE_CHECKING:
    import polars as pl

UNITS = {
    "bandwidth": "bytes/s",
    "overhead": "s",
    "flops": "FLOP/s",
    "draft_cost": "steps",
    "routed_share": "fraction",
}
"""Parameters in the order of the table, and their units; ``steps`` are those of the target without speculation."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What measurements say of the parameters of a model of time."""

    fitted: tuple[Parameter, ...]
    cells: tuple[Cell, ...]
    """What was measured, as whole steps."""
    predicted: Floats
    flagged: NDArray[np.bool_]
    notes: tuple[str, ...]
    """Sentences: what could not be told, how good the fit is, and where the model does not hold."""
    residual_sd: float | None
    """Standard deviation of the relative residuals; None without degrees of freedom."""
    r_squared: float | None
    """Share of the variance of the logarithms that the model explains."""
    hardware: Hardware | None = None
    """The machine with what was identified in place of the data sheet's figures; None without a model."""
    acceptance_rate: float | None = None
    """Chance that a draft is accepted by the acceptance lengths that the measurements say; None where they say none."""

    @property
    def measured(self) -> Floats:
        """``[X]``: seconds, or ratios."""
        return np.array([cell.value for cell in self.cells], np.float64)

    def value(self, name: str) -> float | None:
        """Return the estimate of a parameter, None where the data do not tell it."""
        return next((p.estimate for p in self.fitted if p.name == name), None)

    def _repr_html_(self) -> str:
        rows = [(p.name, p.estimate, p.lo, p.hi, p.unit) for p in self.fitted]
        title = f"fitted to {len(self.cells)} measured points"
        return markup.table(("parameter", "estimate", "lo", "hi", "unit"), rows, title=title, notes=self.notes)

    @property
    def routed_share(self) -> float | None:
        """Share f of the routed experts in the time of a step of one token; None where the data do not tell it."""
        return self.value("routed_share")

    @property
    def draft_cost(self) -> float | None:
        """What one draft costs, in steps without speculation; None where the data do not tell it."""
        return self.value("draft_cost")

    @property
    def parameters(self) -> pl.DataFrame:
        """A row a parameter: ``parameter``, ``estimate``, ``lo``, ``hi`` (95 %), ``unit``; null where unknown."""
        import polars as pl

        schema = {"parameter": pl.String, "estimate": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "unit": pl.String}
        return pl.DataFrame([(p.name, p.estimate, p.lo, p.hi, p.unit) for p in self.fitted], schema, orient="row")

    @property
    def points(self) -> pl.DataFrame:
        """A row a measured cell.

        ``quantity`` says what ``measured`` and ``predicted`` are: seconds of a ``step`` with its drafting or of the
        ``verification`` alone; the ``verification ratio`` or, of a ``relative step``, V + D. ``residual`` is
        measured / predicted - 1, ``flagged`` whether it lies beyond two standard deviations.
        """
        import polars as pl

        schema = {
            "batch_size": pl.Int64,
            "drafts": pl.Int64,
            "context": pl.Float64,
            "quantity": pl.String,
            "acceptance_length": pl.Float64,
            "measured": pl.Float64,
            "predicted": pl.Float64,
            "residual": pl.Float64,
            "flagged": pl.Boolean,
            "repeats": pl.Int64,
            "spread": pl.Float64,
        }
        columns: dict[str, Any] = {
            name: [getattr(cell, name) for cell in self.cells] for name in schema if hasattr(Cell, name)
        }
        columns |= {
            "measured": self.measured,
            "predicted": self.predicted,
            "residual": self.measured / self.predicted - 1,
            "flagged": self.flagged,
        }
        return pl.DataFrame({name: columns[name] for name in schema}, schema)


def calibrated(
    points: Points,
    costs: Sequence[CostModel] | None = None,
    *,
    hold: Sequence[str] = (),
    draft_cost: float | None = None,
    acceptance_rate: float | None = None,
    notes: Sequence[str] = (),
) -> Calibration:
    """Fit what the points can tell and say how well it holds.

    Parameters
    ----------
    points
        What was measured, with the experts that its steps load.
    costs
        The cost model of each point; without them Amdahl's law is fitted.
    hold
        Parameters that keep the value that the machine has.
    draft_cost
        What a draft costs in steps without speculation, where it is known.
    acceptance_rate
        What the measurements say of the acceptance.
    notes
        What is known already.
    """
    machine = None
    if costs is None:
        fitted = fit_amdahl(points, draft_cost=draft_cost)
        found = _shares(fitted)
    else:
        fitted, scale = fit_roofline(points, costs, hold=hold, draft_cost=draft_cost)
        found = _figures(fitted, costs[0].hardware, scale)
        machine = _machine(costs[0].hardware, found)
        if (share := _implied_share(fitted, costs[0], scale)) is not None:
            found.append(share)
    sd, r_squared = _quality(points, fitted)
    sentences = [
        *notes,
        *said.unknown(fitted, found),
        *said.goodness(points, fitted, sd, r_squared),
        *said.patterns(points, fitted),
        *(said.implausible(costs[0].hardware, found) if costs is not None else ()),
    ]
    return Calibration(
        fitted=tuple(sorted(found, key=lambda p: list(UNITS).index(p.name))),
        cells=points.cells,
        predicted=fitted.predicted,
        flagged=fitted.fit.flagged,
        notes=tuple(dict.fromkeys(sentences)),
        residual_sd=sd,
        r_squared=r_squared,
        hardware=machine,
        acceptance_rate=acceptance_rate,
    )


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _shares(fitted: Fitted) -> list[Parameter]:
    """Return parameters that are fitted as they are."""
    found = []
    for name, value, lo, hi, known in zip(
        fitted.names, fitted.fit.values, fitted.fit.lo, fitted.fit.hi, fitted.fit.identified, strict=True
    ):
        # An interval over everything that a share can be is as good as none.
        known = known and not (name == "routed_share" and lo <= 0 and hi >= 1)
        found.append(_parameter(name, value, lo, hi, known))
    return found


def _parameter(name: str, value: float, lo: float, hi: float, known: bool) -> Parameter:
    if not known:
        return Parameter(name, None, None, None, UNITS[name])
    return Parameter(name, float(value), _known(lo), _known(hi), UNITS[name])


def _figures(fitted: Fitted, machine: Hardware, scale: float) -> list[Parameter]:
    """Return the machine's parameters in their own units."""
    fit, found = fitted.fit, []
    for i, name in enumerate(fitted.names):
        value, lo, hi, known = fit.values[i], fit.lo[i], fit.hi[i], bool(fit.identified[i])
        if name in ("bandwidth", "flops"):
            peak = getattr(tuned(machine, {}, scale), name)
            # Fitted is the time of a byte or FLOP: one whose interval reaches down to nothing is not known.
            known = known and not lo <= 1e-2
            value, lo, hi = peak / value, peak / hi, peak / lo
        elif name == "overhead":
            value, lo, hi = value * scale, lo * scale, hi * scale
        found.append(_parameter(name, value, lo, hi, known))
    return found


def _machine(machine: Hardware, found: Sequence[Parameter]) -> Hardware:
    """Return the machine with what is known in place of the data sheet's figures."""
    figures = {p.name: p.estimate for p in found if p.estimate is not None}
    plain = tuned(machine, {}, 1.0)
    names = ("bandwidth", "flops", "overhead")
    return replace(plain, **{name: figures.get(name, getattr(plain, name)) for name in names})


def _implied_share(fitted: Fitted, cost: CostModel, scale: float) -> Parameter | None:
    """Return the routed experts' share of a step of one token, with the error that it has from the fitted figures."""
    if not fitted.fit.identified.all():
        return None

    def share(values: Floats) -> float:
        machine = tuned(cost.hardware, dict(zip(fitted.names, values, strict=True)), scale)
        parts = cost.on(machine).parts(1, 1, cost.model.config.top_k)
        routed = sum(float(part.seconds) for part in parts if part.name == "experts")
        return routed / sum(float(part.seconds) for part in parts)

    values = fitted.fit.values
    slope = np.zeros(len(values))
    for i, value in enumerate(values):
        step = np.zeros(len(values))
        step[i] = 1e-4 * max(value, 1e-2)
        slope[i] = (share(values + step) - share(values)) / step[i]
    from scipy.special import stdtrit

    f, half = share(values), np.nan
    if fitted.fit.dof:
        half = stdtrit(fitted.fit.dof, 0.975) * float(np.sqrt(slope @ fitted.fit.covariance @ slope))
    return _parameter("routed_share", f, max(f - half, 0.0), min(f + half, 1.0), True)


def _quality(points: Points, fitted: Fitted) -> tuple[float | None, float | None]:
    """Return the residuals' standard deviation and R², of logarithms."""
    logarithm = np.log(points.measured)
    whole, left = np.square(logarithm - logarithm.mean()).sum(), np.square(fitted.fit.residuals).sum()
    return _known(fitted.fit.sigma), float(1 - left / whole) if whole > 1e-18 else None
