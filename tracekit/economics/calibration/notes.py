"""What to know of a calibration, in sentences: what the points do not tell, and where the model does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tracekit.economics.calibration.fits import Fitted, Parameter, Points
from tracekit.economics.calibration.least_squares import trend
from tracekit.economics.hardware import Hardware

_TITLES = {
    "bandwidth": "the bandwidth",
    "overhead": "the overhead",
    "flops": "the FLOP per second",
    "draft_cost": "the cost of a draft",
    "routed_share": "the routed share",
}


def unknown(fitted: Fitted, found: Sequence[Parameter]) -> Iterator[str]:
    """Say which parameters the points do not tell, and why."""
    names = fitted.names
    blamed = set()
    for group in fitted.fit.alike:
        blamed |= {names[i] for i in group}
        titles = [_TITLES[names[i]] for i in group]
        if len(titles) == 1:
            yield f"{titles[0]} is not identified: no point depends on it"
        else:
            yield (
                f"{', '.join(titles[:-1])} and {titles[-1]} are not identified: the points cannot tell one from the "
                "other, for they are too few or too alike in batch size and draft length"
            )
    for parameter in found:
        if parameter.estimate is None and parameter.name not in blamed:
            yield f"{_TITLES[parameter.name]} is not identified: its interval holds every value that it can have"
    if fitted.held:
        yield "the FLOP per second are held: no measured point tells by its time that it is bound by compute"
    if not fitted.fit.dof:
        yield "there are no intervals: there are as many parameters as points"


def goodness(points: Points, fitted: Fitted, sd: float | None, r_squared: float | None) -> Iterator[str]:
    """Say how far the points lie from the fit, and whether their noise explains it."""
    if sd is not None:
        explained = "" if r_squared is None else f", R² {r_squared:.4f}"
        yield f"{len(points.cells)} points lie {100 * sd:.2g} % (standard deviation) about the fit{explained}"
    spreads = [cell.spread / np.sqrt(cell.repeats) for cell in points.cells if cell.spread is not None]
    if sd is not None and spreads and sd > 3 * (noise := float(np.sqrt(np.mean(np.square(spreads))))):
        yield (
            f"by their repetitions the points are known to {100 * noise:.2g} %: most of what is left is the model's "
            "error, not noise, and the intervals may be too narrow for it"
        )
    if lonely := int(fitted.lonely.sum()):
        yield (
            f"{lonely} of {len(points.cells)} points have no other of their batch size and context to be compared "
            "with, and tell nothing of the ratios"
        )


def patterns(points: Points, fitted: Fitted) -> Iterator[str]:
    """Say where the model does not hold."""
    left = points.measured / fitted.predicted - 1
    flagged = np.flatnonzero(fitted.fit.flagged)
    if len(flagged):
        worst = sorted(flagged, key=lambda i: -abs(fitted.fit.standardised[i]))[:3]
        listed = "; ".join(f"{points.cells[i]}: {100 * left[i]:+.1f} %" for i in worst)
        yield (
            f"{len(flagged)} of {len(left)} points lie beyond 2 standard deviations, where chance alone has "
            f"{0.0455 * len(left):.1f}: {listed}"
        )
    B, K = points.batch_size, points.drafts
    every, drafted = np.ones(len(left), bool), K > 0
    for values, along, among, what in (
        (B, np.log2(B), every, "batch size"),
        (K, K, every, "draft length"),
        (B, np.log2(B) * drafted, drafted, "batch size of steps with drafts"),
    ):
        found = trend(fitted.fit, along)
        if found is None:
            continue
        low, high = values[among].min(), values[among].max()
        ends = [100 * float(np.mean(left[among & (values == end)])) for end in (low, high)]
        yield (
            f"the model does not hold along the {what}: what was measured {'rises' if found[0] > 0 else 'falls'} "
            f"against it, {ends[0]:+.1f} % at {low:.0f} and {ends[1]:+.1f} % at {high:.0f} (by chance: {found[1]:.1g})"
        )


def implausible(machine: Hardware, found: Sequence[Parameter]) -> Iterator[str]:
    """Say what the machine cannot do."""
    for parameter in found:
        if parameter.name not in ("bandwidth", "flops") or parameter.estimate is None:
            continue
        peak = getattr(machine, parameter.name)
        least = parameter.estimate if parameter.lo is None else parameter.lo
        if least > peak:
            yield (
                f"{_TITLES[parameter.name]} came out as {parameter.estimate / peak:.2f} of the machine's peak: the "
                "model counts too much (another quantisation, context or parallelism, or what was measured is cached)"
            )
