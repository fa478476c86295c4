"""A finding: what was noticed, where, how it shows, what it would do to which metric, and what helps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["serious", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
"""``serious``: headline numbers are wrong; ``warning``: some questions cannot be asked; ``note``: worth knowing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check noticed."""

    severity: Severity
    finding: str
    """Its name: ``warm-up``, ``interleaved``, …; names are an interface."""
    where: str
    """Request, rows and layers, or file and record."""
    evidence: str
    """What was measured, with the number of rows looked at."""
    effect: str
    """What it would do to which metric."""
    remedy: str
    """What to do, naming the option that mends it where there is one."""


def is_serious(findings: Iterable[Finding]) -> bool:
    """Return whether any of the findings makes headline numbers wrong."""
    return any(f.severity == "serious" for f in findings)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings, each once, the serious ones first."""
    return sorted(dict.fromkeys(findings), key=lambda f: SEVERITIES.index(f.severity))


def counted(number: int, noun: str) -> str:
    """Return ``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def percent(part: float, whole: float) -> str:
    """Return a share as text, ``–`` of nothing."""
    return f"{100 * part / whole:.3g} %" if whole else "–"


def numbers(values: Iterable[int]) -> str:
    """Return whole numbers in short, consecutive ones as ranges: ``0-3, 7``."""
    parts = _ranges(values)
    return ", ".join(parts[:12]) + (", …" if len(parts) > 12 else "")


def layers_without(layers: Iterable[int], left_out: Iterable[int]) -> str:
    """Return the option that keeps all layers but some, as it can be typed: ``--layers 0-3,7``."""
    return "--layers " + ",".join(_ranges(set(layers) - set(left_out)))


def _ranges(values: Iterable[int]) -> list[str]:
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
