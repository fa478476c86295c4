"""What a machine can do: the bandwidth, arithmetic and fixed costs that a step's time is made of."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tracekit.errors import UsageError, did_you_mean

Precision = Literal["bf16", "fp8"]

_TABLE = Path(__file__).with_name("hardware.toml")

BANDWIDTH, FLOPS = (1e8, 1e15), (1e9, 1e19)
"""What no device of today comes near, in either direction: a figure outside was given in another unit."""
_SECONDS = (0.0, 10.0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. With the defaults it is the plain roofline: peaks, perfect overlap, nothing fixed.

    Raises
    ------
    UsageError
        If a figure is not possible.
    """

    name: str
    bandwidth: float
    """Bytes per second of one device's memory."""
    flops: float
    """Dense FLOP per second of one device, at the precision in which the weights are multiplied."""
    overhead: float = 0.0
    """Seconds per step, whatever it holds: scheduling, sampling, the launch of a graph."""
    launch: float = 0.0
    """Seconds per kernel; a layer has one for its attention, its cache, its router, and each kind of its MLPs."""
    sampling: float = 0.0
    """Seconds per row of logits, one a token: sampling, and holding drafts against it."""
    link: float = math.inf
    """Bytes per second between devices, in one direction; infinite leaves communication out."""
    bandwidth_share: float = 1.0
    """Share of the bandwidth that is achieved."""
    flops_share: float = 1.0
    """Share of the FLOP per second that is achieved."""
    overlap: float = 1.0
    """Share of the shorter of reading and computing that is hidden behind the longer: 1 is a roofline, 0 a sum."""

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, *BANDWIDTH, unit="bytes per second")
        _check("flops", self.flops, *FLOPS, unit="FLOP per second")
        _check("overhead", self.overhead, *_SECONDS, unit="seconds")
        _check("launch", self.launch, *_SECONDS, unit="seconds")
        _check("sampling", self.sampling, *_SECONDS, unit="seconds")
        if self.link != math.inf:
            _check("link", self.link, 1e6, BANDWIDTH[1], unit="bytes per second")
        _check("bandwidth_share", self.bandwidth_share, 1e-3, 1.0)
        _check("flops_share", self.flops_share, 1e-3, 1.0)
        _check("overlap", self.overlap, 0.0, 1.0)


def _check(what: str, value: Any, low: float, high: float, *, unit: str = "") -> None:
    """Refuse what is no number in the range; NaN and infinity are not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        text = f"{value:g}" if isinstance(value, int | float) else repr(value)
        raise UsageError(
            f"{what} of {text} {unit}".rstrip(),
            expected=f"{low:g} to {high:g}",
            remedy="Figures are in plain units, such as 3.35e12 bytes per second" if "per second" in unit else None,
        )


def _read() -> dict[str, dict[str, Any]]:
    with _TABLE.open("rb") as file:
        return tomllib.load(file)


PRESETS: dict[str, dict[str, Any]] = _read()
"""The known machines as the table has them: title, source and figures; one without ``bf16`` has no published FLOPs."""

HARDWARE: dict[str, Hardware] = {
    name: Hardware(name, entry["bandwidth"], entry["bf16"], link=entry.get("link", math.inf))
    for name, entry in PRESETS.items()
    if "bf16" in entry
}
"""The known machines whose figures are complete, multiplying in bf16."""


def hardware(
    name: str | None = None,
    *,
    bandwidth: float | None = None,
    flops: float | None = None,
    overhead: float | None = None,
    precision: Precision = "bf16",
    **others: float,
) -> Hardware:
    """Return a known machine, one with some figures replaced, or one made of figures alone.

    Parameters
    ----------
    name
        A name of `PRESETS`; case does not matter. None: ``bandwidth`` and ``flops`` are needed.
    bandwidth, flops
        Bytes per second, and dense FLOP per second.
    overhead
        Seconds per step.
    precision
        ``bf16`` or ``fp8``: which of the known machine's FLOP per second counts.
    **others
        Further fields of `Hardware`.

    Raises
    ------
    UsageError
        If the machine is not known, a figure is missing, or one is not possible.
    """
    given = {"bandwidth": bandwidth, "flops": flops, "overhead": overhead} | others
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if name is None:
        missing = [key for key in ("bandwidth", "flops") if key not in changes]
        if missing:
            raise UsageError(
                f"a machine without {' and '.join(missing)}",
                expected=f"the name of a known one ({', '.join(PRESETS)}), or both figures",
                remedy="Name it with hardware (--hardware), or give bandwidth and flops (--bandwidth, --flops)",
            )
        return Hardware("custom", **changes)
    key = name.casefold().replace("_", "-").replace(" ", "-")
    entry = PRESETS.get(key)
    if entry is None:
        raise UsageError(
            f"no machine {name!r}",
            expected="one of " + ", ".join(PRESETS),
            remedy=did_you_mean(key, PRESETS) or "Any other is given by its bandwidth and flops",
        )
    if flops is None and precision not in entry:
        raise UsageError(
            f"no {precision} FLOP per second is known of {entry['title']}", expected="its flops beside its name"
        )
    known = {"bandwidth": entry["bandwidth"], "flops": entry.get(precision), "link": entry.get("link", math.inf)}
    return Hardware(key, **known | changes)


def ideal(machine: Hardware) -> Hardware:
    """Return the machine without its fixed costs: what a step would take if only bytes and FLOPs counted."""
    return replace(machine, overhead=0.0, launch=0.0, sampling=0.0)
