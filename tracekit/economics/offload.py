"""The time of one token where experts are copied to the device over a link: two engines, each working in order.

One engine computes, layer after layer. The other copies experts, one after the other in the order of its orders. The
router of layer l orders what is missing for l (*on demand*), and behind it what is predicted for layer l + j
(*ahead*), right or wrong; the experts of a layer run when all that was ordered for it is there. Where every layer
misses something this is

    sum over l of  missed_l + max(compute_l, ahead_{l+1}),

with compute_l from the router of layer l to that of the next (Madan et al., "Speculating Experts", arXiv 2603.19289);
where nothing is missed, copies queue across layers and the time is a little less. One engine or the other always works,
so the time is compute + copies - what overlaps, and prefetching saves at most the sum over l of min(compute_l, copy_l).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.economics.cost import CostModel
from tracekit.errors import UsageError, did_you_mean

Floats = NDArray[np.float64]

LINKS: dict[str, tuple[float, str]] = {
    "pcie3-x16": (12.5e9, "PCIe 3.0 x16 from pinned memory, 79 % of its 15.75 GB/s"),
    "pcie4-x16": (25e9, "PCIe 4.0 x16 from pinned memory, 79 % of its 31.5 GB/s"),
    "pcie5-x16": (50e9, "PCIe 5.0 x16 from pinned memory, 79 % of its 63.0 GB/s"),
    "pcie4-x4": (6.3e9, "PCIe 4.0 x4, 79 % of its 7.9 GB/s: external and secondary slots"),
    "nvlink-c2c": (360e9, "NVLink-C2C of a GH200, 80 % of its 450 GB/s in one direction"),
    "nvme-gen3": (3.2e9, "NVMe on PCIe 3.0 x4, large reads at a queue that is never empty"),
    "nvme-gen4": (6.5e9, "NVMe on PCIe 4.0 x4, the same"),
    "nvme-gen5": (12e9, "NVMe on PCIe 5.0 x4, the same"),
    "ufs4": (3.5e9, "UFS 4.0 flash of a phone, large reads"),
}
"""Links by name: bytes per second that large copies achieve, and what that is. Any other is given by its figure."""
LINK = "pcie4-x16"
"""What offloaded experts come over, unless it is said."""

_RANGE = (1e6, 1e13)


def link(name_or_figure: str | float) -> float:
    """Return the bytes per second of a known link, or the figure that was given.

    Raises
    ------
    UsageError
        If the link is not known, or its figure is not possible.
    """
    figure: Any = name_or_figure
    if isinstance(name_or_figure, str):
        known = LINKS.get(name_or_figure.casefold())
        if known is not None:
            return known[0]
        try:
            figure = float(name_or_figure)
        except ValueError:
            raise UsageError(
                f"no link {name_or_figure!r}",
                expected=f"one of {', '.join(LINKS)}, or bytes per second",
                remedy=did_you_mean(name_or_figure, LINKS),
            ) from None
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not _RANGE[0] <= figure <= _RANGE[1]:
        text = f"{figure:g}" if isinstance(figure, int | float) else repr(figure)
        raise UsageError(
            f"a link of {text} bytes per second",
            expected=f"{_RANGE[0]:g} to {_RANGE[1]:g}",
            remedy="Figures are in plain units, such as 25e9",
        )
    return float(figure)


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds that the device computes for one token, by MoE layer.

    Raises
    ------
    UsageError
        If a time is negative or no number, or the layers do not agree.
    """

    before: Floats
    """``[L]`` until the layer's router has decided; the first with all that comes before the first MoE layer."""
    after: Floats
    """``[L]`` from there to the end of the layer: its experts."""
    head: float = 0.0
    """After the last layer."""

    def __post_init__(self) -> None:
        if self.before.shape != self.after.shape or self.before.ndim != 1 or not len(self.before):
            raise UsageError(
                f"compute of {self.before.shape} layers before and {self.after.shape} after their routers",
                expected="a time for each MoE layer",
            )
        _check("compute", self.before, self.after, self.head)

    @classmethod
    def given(cls, seconds: ArrayLike, layers: int) -> Compute:
        """Return a token's compute as it was measured: ``[L]``, or the whole token's, taken as even over layers.

        It counts from router to router: all of it can hide the copies for the next layer.

        Raises
        ------
        UsageError
            If there are other layers, or a time is no number from 0 on.
        """
        time = np.asarray(seconds, np.float64)
        if time.ndim == 0:
            time = np.full(layers, time / layers)
        if time.shape != (layers,):
            raise UsageError(f"compute times of shape {list(time.shape)}", expected=f"one, or {layers}: one a layer")
        return cls(np.zeros(layers), time)

    @classmethod
    def of(cls, cost: CostModel) -> Compute:
        """Return what a roofline says of one token of one request, every expert read from the device's own memory.

        Attention of layers without experts and their dense part come before the first MoE layer; what is fixed per
        step after the last.
        """
        parts = {part.name: float(part.seconds) for part in cost.parts(1, 1, cost.model.config.top_k)}
        L = cost.model.moe_layers
        attention = (parts["attention"] + parts.get("cache", 0.0)) / cost.layers
        before = np.full(L, attention + parts.get("router", 0.0) / L)
        before[0] += (cost.layers - L) * attention + parts.get("dense", 0.0)
        after = np.full(L, (parts["experts"] + parts.get("shared", 0.0)) / L)
        return cls(before, after, parts["head"] + parts["overhead"])

    @property
    def seconds(self) -> float:
        """Seconds of the whole token."""
        return float(self.before.sum() + self.after.sum() + self.head)

    @property
    def windows(self) -> Floats:
        """``[L]`` compute that can hide the copies ahead for a layer: from the router before it to its own.

        Of the first layer 0: nothing was computed before it that could predict.
        """
        return np.concatenate([np.zeros(1), self.after[:-1] + self.before[1:]])


@dataclass(frozen=True, slots=True)
class Copies:
    """Seconds that the link is busy for a token, ``[tokens, L]`` each.

    Raises
    ------
    UsageError
        If a time is negative or no number, or the shapes do not agree.
    """

    demand: Floats
    """What the router of the layer orders because it is not there."""
    ahead: Floats
    """What was predicted for the layer and ordered before its router: right and wrong."""
    distance: int = 1
    """Layers between the router that orders ahead and the layer that it orders for. What is known of the first layers,
    which have no such router before them, was known before the token: it is ordered at its start."""

    def __post_init__(self) -> None:
        if self.demand.ndim != 2 or self.demand.shape != self.ahead.shape:
            raise UsageError(
                f"predictions of shape {list(self.ahead.shape)} beside copies of {list(self.demand.shape)}",
                expected="[tokens, layers] both",
            )
        if self.distance < 1:
            raise UsageError(f"a distance of {self.distance} layers", expected="1 or more")
        _check("copies", self.demand, self.ahead)

    @property
    def seconds(self) -> Floats:
        """``[tokens]`` seconds that the link is busy."""
        return np.asarray(self.demand.sum(axis=1) + self.ahead.sum(axis=1))

    def token(self, index: int) -> Copies:
        """Return those of one token."""
        return Copies(self.demand[index : index + 1], self.ahead[index : index + 1], self.distance)


@dataclass(frozen=True, slots=True)
class Span:
    """What one engine did at a stretch, for a single token."""

    engine: str
    """``compute`` or ``copy``."""
    layer: int
    """Number among the MoE layers."""
    part: str
    """``attention`` (what comes before the experts, the router included), ``predictor``, ``experts``, ``head``;
    ``demand`` or ``ahead``."""
    start: float
    end: float
    """Seconds from the start of the token."""


def token_times(compute: Compute, copies: Copies, predictor: float = 0.0) -> Floats:
    """Return the seconds of each token, ``[tokens]``.

    Parameters
    ----------
    compute
        Of one token.
    copies
        Of every token.
    predictor
        Seconds per token that predicting takes, in equal parts on the computing engine before every router.

    Raises
    ------
    UsageError
        If the layers do not agree, or the predictor's time is not one.
    """
    return _run(compute, copies, predictor, None)


def timeline(compute: Compute, copies: Copies, predictor: float = 0.0) -> Iterator[Span]:
    """Yield what both engines do for a single token, layer by layer; arguments as of `token_times`."""
    if len(copies.demand) != 1:
        raise UsageError(f"a timeline of {len(copies.demand)} tokens", expected="1")
    spans: list[Span] = []
    _run(compute, copies, predictor, lambda *what: spans.append(Span(*what)))
    yield from (span for span in spans if span.end > span.start)


def _run(compute: Compute, copies: Copies, predictor: float, note: Callable[..., None] | None) -> Floats:
    tokens, L = copies.demand.shape
    if len(compute.before) != L:
        raise UsageError(f"compute of {len(compute.before)} layers, copies of {L}", expected="the same layers")
    _check("a predictor", predictor)
    each, d = predictor / L, copies.distance
    computed, copied = np.zeros(tokens), np.zeros(tokens)  # when each engine is done with what it was given
    arrived = np.zeros((min(d, L) + 1, tokens))
    """When what was ordered ahead for layer l is there, in row l mod (d + 1)."""
    rows = len(arrived)

    def copy(layer: int, part: str, seconds: Floats, ordered: Floats) -> Floats:
        nonlocal copied
        begin = np.maximum(copied, ordered)
        # An empty order does not wait for its turn.
        end = np.where(seconds > 0, begin + seconds, copied)
        if note is not None and seconds[0] > 0:
            note("copy", layer, part, float(begin[0]), float(end[0]))
        copied = end
        return np.where(seconds > 0, end, 0.0)

    def work(layer: int, part: str, seconds: float) -> None:
        nonlocal computed
        if note is not None:
            note("compute", layer, part, float(computed[0]), float(computed[0]) + seconds)
        computed = computed + seconds

    for layer in range(min(d, L)):
        arrived[layer % rows] = copy(layer, "ahead", copies.ahead[:, layer], np.zeros(tokens))
    for layer in range(L):
        work(layer, "attention", float(compute.before[layer]))
        work(layer, "predictor", each)
        missing = copy(layer, "demand", copies.demand[:, layer], computed)
        ready = np.maximum(arrived[layer % rows], missing)
        if layer + d < L:
            arrived[(layer + d) % rows] = copy(layer + d, "ahead", copies.ahead[:, layer + d], computed)
        computed = np.maximum(computed, ready)
        work(layer, "experts", float(compute.after[layer]))
    work(L - 1, "head", compute.head)
    return computed


def saving_bound(compute: Compute, needed: Floats) -> Floats:
    """Return the most that prefetching one layer ahead can save, sum over l of min(compute_l, copy_l), ``[tokens]``.

    Parameters
    ----------
    compute
        Of one token.
    needed
        ``[tokens, L]`` seconds of the copies without prefetching.
    """
    return np.asarray(np.minimum(compute.windows, needed).sum(axis=1))


def break_even(seconds: Callable[[float], float], without: float) -> float:
    """Return the predictor's seconds per token above which it loses; 0 where it loses even if it costs nothing.

    Parameters
    ----------
    seconds
        Seconds per token with a predictor of a given cost: convex, and not falling.
    without
        Seconds per token without it.
    """
    low, high = 0.0, 0.0
    value = seconds(0.0)
    if value >= without:
        return 0.0
    gain = without - value
    high, value_high = gain, seconds(gain)  # a cost is hidden, at best, so the break-even is here or beyond
    while value_high < without:
        low, value, high = high, value_high, 2 * high
        value_high = seconds(high)
    # The chord of a convex function lies above it: where it meets the level is on this side of the break-even.
    while high - low > 1e-9 * high:
        at = low + (high - low) * (without - value) / (value_high - value)
        found = seconds(at)
        if without - found <= 1e-12 * without:
            return at
        low, value = at, found
        middle = (low + high) / 2
        found = seconds(middle)
        if found < without:
            low, value = middle, found
        else:
            high, value_high = middle, found
    return (low + high) / 2


def implied_cost(throughput: float, saved: float, copy_share: float) -> tuple[float, float]:
    """Return what a predictor must have cost, as a share of the time per token without it, to explain a measurement.

    T' / T = 1 / throughput = 1 - h saved copy_share + cost, where the share h of the copies that are no longer missed
    is hidden behind compute: between none (they moved, but as long was waited for them) and all.

    Parameters
    ----------
    throughput
        Throughput with the predictor over that without.
    saved
        Share of the misses that the predictor avoided.
    copy_share
        Share of the time per token that copies took without it.

    Returns
    -------
    tuple of float
        The cost if nothing was hidden, and if all was.

    Raises
    ------
    UsageError
        If a figure is out of range.
    """
    if not 0 < throughput < math.inf:
        raise UsageError(f"a throughput of {throughput:g} times", expected="more than 0")
    for what, value in (("saved misses", saved), ("copies", copy_share)):
        if not 0 <= value <= 1:
            raise UsageError(f"a share of {value:g} of {what}", expected="0 to 1")
    slower = 1 / throughput - 1
    return slower, slower + saved * copy_share


def _check(what: str, *times: ArrayLike) -> None:
    """Refuse times that are none."""
    for time in times:
        values = np.asarray(time, np.float64)
        wrong = ~((values >= 0) & (values < np.inf))
        if wrong.any():
            raise UsageError(f"{what} of {values[wrong].flat[0]:g} seconds", expected="0 or more")
