"""What can be asked of a trace: for each kind of result, what it takes to measure it and how it is finalised."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracekit.errors import UsageError
from tracekit.metrics.state import Spec
from tracekit.schema import By
from tracekit.store.runs import Runs

if TYPE_CHECKING:
    import polars as pl

MAX_WINDOW = 8
"""Longest window by default: up to 7 drafted tokens."""

MAX_LAG = 32
"""Largest lag by default."""

WINDOW = 4
"""Window that is taken apart by default."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One result that is wanted of a trace: how it is measured, keyed, and finalised."""

    kind: str
    spec: Spec
    key: dict[str, Any]
    """What the numbers depend on, besides the trace."""
    finalise: Callable[[Any], pl.DataFrame]
    """Makes the frame of what the pass returned."""
    reads: str = "routing"
    """The pass that it comes from, see :mod:`tracekit.analysis.passes`."""


def _want_windows(
    runs: Runs,
    *,
    max_window: int | None = None,
    batch_size: int | Iterable[int] = 1,
    overlapping: bool = True,
    **common: Any,
) -> Wanted:
    import polars as pl

    sizes = [operator.index(b) for b in (batch_size if isinstance(batch_size, Iterable) else [batch_size])]
    if not sizes or min(sizes) < 1:
        raise UsageError(f"batch sizes {sizes}", expected="whole numbers from 1 on")
    longest = runs.fit(max_window, MAX_WINDOW, "windows")
    runs.batch(sizes, longest, common["by"])
    spec = Spec(runs.phase, max_window=longest, overlapping=overlapping, batches=max(sizes) > 1, **common)
    key = {"max_window": longest, "batch_size": sizes, "overlapping": overlapping, **common}
    return Wanted("windows", spec, key, lambda m: m.windows(sizes).filter(pl.col("window") <= longest))


def _want_autocorr(runs: Runs, *, max_lag: int | None = None, **common: Any) -> Wanted:
    import polars as pl

    largest = runs.fit(max_lag, MAX_LAG, "lags", reach=1)
    spec = Spec(runs.phase, max_lag=largest, **common)
    return Wanted(
        "autocorr", spec, {"max_lag": largest, **common}, lambda m: m.autocorr().filter(pl.col("lag") <= largest)
    )


def _want_attribution(runs: Runs, *, window: int | None = None, **common: Any) -> Wanted:
    length = runs.fit(window, WINDOW, "windows", least=2)
    spec = Spec(runs.phase, max_window=length, **common)
    return Wanted("attribution", spec, {"window": length, **common}, lambda m: m.attribution(length))


def _want_load(runs: Runs, *, by: By | None = None, **common: Any) -> Wanted:
    if by == "request":
        raise UsageError("load by request", expected="by layer or by label")
    group: By | None = "label" if by == "label" else None
    return Wanted("load", Spec(runs.phase, by=group, **common), {"by": group}, lambda m: m.load())


WANT: dict[str, Callable[..., Wanted]] = {
    "windows": _want_windows,
    "autocorr": _want_autocorr,
    "attribution": _want_attribution,
    "load": _want_load,
}
