"""Fitting a law of routing to the figures of a trace, or to those that a publication quotes.

By matching moments, layer by layer: the two exponents of the popularity give back sum p^2 / k and the entropy; the
spread between requests, the anchor and the two persistences are the least squares of the overlaps, of the ``request``
baseline's overlap and of the unions. No likelihood: sets that systematic sampling never draws would have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.economics.law import (
    Figure,
    Floats,
    LayerLaw,
    RoutingLaw,
    layer_overlap,
    layer_presence,
    pair_mean,
    profile,
)
from tracekit.errors import UsageError

_PRIOR = {"request": 0.15, "anchor": 0.3, "keep": 0.95, "stay": 0.1}
"""Where parameters go that the figures leave open: about the middle layers of gpt-oss-20b's decode traces."""
_PULL = 1e-3
"""Weight of the prior, in errors of overlap per unit of log odds: felt only where the figures say nothing."""
_LEAST, _MOST = 1e-6, 1 - 1e-6
_GROUPS = 32
"""Experts of about the same popularity that stand for all of a layer while it is fitted."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What one layer's law has to give back.

    Raises
    ------
    UsageError
        If a figure is not possible for N and k.
    """

    num_experts: int
    top_k: int
    popularity_overlap: float
    """sum p^2 / k of independent tokens, without the bias of a finite number of requests."""
    overlaps: Mapping[int, float]
    """Overlap as a share of k by lag in tokens, from 1."""
    unions: Mapping[int, float] = field(default_factory=dict)
    """Unique experts by window in tokens."""
    entropy_norm: float | None = None
    """Entropy of the popularity over ln N; None: both ends of the popularity have one exponent."""
    request_overlap: float | None = None
    """Mean overlap of the pairs of tokens of a request, the ``request`` baseline."""
    lengths: Sequence[int] | NDArray[np.int64] = ()
    """Tokens of each request behind ``request_overlap``; none: so long that distant pairs dominate."""
    alike: bool = False
    """Whether requests cannot be told from popularity, there being only one: ``request`` is 0."""

    def __post_init__(self) -> None:
        n, k = self.num_experts, self.top_k
        if not 1 <= k <= n:
            raise UsageError(f"N = {n} and k = {k}", expected="1 to N experts per token")
        shares = {"popularity_overlap": self.popularity_overlap, "request_overlap": self.request_overlap}
        shares |= {f"the overlap at lag {lag}": value for lag, value in self.overlaps.items()}
        shares["entropy_norm"] = self.entropy_norm
        for what, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{what} of {value}", expected="a share from 0 to 1")
        if self.popularity_overlap < k / n * (1 - 1e-6):
            raise UsageError(
                f"popularity_overlap of {self.popularity_overlap:g}",
                expected=f"at least k / N = {k / n:g}, what uniform popularity gives",
            )
        for lag in self.overlaps:
            if lag < 1:
                raise UsageError(f"a lag of {lag} tokens", expected="1 or more")
        for window, value in self.unions.items():
            if window < 1 or not k * (1 - 1e-6) <= value <= min(n, window * k) * (1 + 1e-6):
                raise UsageError(
                    f"{value:g} unique experts in {window} tokens", expected=f"k = {k} to {min(n, max(window, 1) * k)}"
                )


def fit_layer(targets: Targets) -> LayerLaw:
    """Return the law that comes nearest to one layer's figures.

    Raises
    ------
    UsageError
        If there is neither an overlap nor a union to fit persistence to.
    """
    cold, hot = fit_popularity(targets)
    persistence = _fit_persistence(targets, profile(targets.num_experts, targets.top_k, cold, hot))
    return LayerLaw(cold, hot, **persistence)


def fit_popularity(targets: Targets) -> tuple[float, float]:
    """Return the exponents ``cold`` and ``hot`` that give back sum p^2 / k and the entropy."""
    from scipy.optimize import least_squares

    n, k, overlap, entropy = targets.num_experts, targets.top_k, targets.popularity_overlap, targets.entropy_norm
    if overlap <= k / n * (1 + 1e-9) or n == k:
        return 0.0, 0.0

    def errors(exponents: Floats) -> list[float]:
        p = profile(n, k, exponents[0], exponents[-1])
        found = [float(np.square(p).sum() / k / overlap - 1)]
        return found if entropy is None else [*found, entropy_norm(p) - entropy]

    ends = 1 if entropy is None else 2
    fits = [least_squares(errors, np.full(ends, start), bounds=(0, 20)).x for start in (0.3, 1.5)]
    best = min(fits, key=lambda x: sum(e * e for e in errors(x)))
    return float(best[0]), float(best[-1])


def entropy_norm(popularity: Floats) -> float:
    """Return the entropy of popularities ``[N]`` over ln N."""
    share = popularity[popularity > 0] / popularity.sum()
    return float(-(share * np.log(share)).sum() / math.log(len(popularity)))


def _fit_persistence(targets: Targets, popularity: Floats) -> dict[str, float]:
    from scipy.optimize import least_squares
    from scipy.special import expit, logit

    if not targets.overlaps and not targets.unions:
        raise UsageError("no overlap and no union", expected="at least one of them to fit persistence to")
    k = targets.top_k
    own = float(np.square(popularity).sum() / k)
    lags = np.array(list(targets.overlaps), np.float64)
    overlaps = np.array(list(targets.overlaps.values()))
    windows = np.array(list(targets.unions), np.int64)
    unions = np.array(list(targets.unions.values()))
    at, members = _grouped(popularity)
    names = [name for name in _PRIOR if not (targets.alike and name == "request")]
    prior = logit([_PRIOR[name] for name in names])

    def law(z: Floats) -> LayerLaw:
        return LayerLaw(**dict(zip(names, np.clip(expit(z), _LEAST, _MOST).tolist(), strict=True)))

    def errors(z: Floats) -> Floats:
        layer = law(z)
        # Windows span the short lags, and those have the most pairs.
        parts = [(layer_overlap(own, layer, lags) - overlaps) / np.sqrt(lags), _PULL * (z - prior)]
        if targets.request_overlap is not None:
            parts.append(np.array([request_overlap(own, layer, targets.lengths) - targets.request_overlap]))
        if len(windows):
            expected = layer_presence(at, layer, int(windows.max()))[windows - 1] @ members
            parts.append((expected - unions) / (k * np.maximum(windows - 1, 1)))
        return np.concatenate(parts)

    starts = (prior, prior + np.array([1.0 if name == "anchor" else -1.0 for name in names]))
    best = min(
        (least_squares(errors, start, xtol=1e-5, ftol=1e-5) for start in starts), key=lambda found: float(found.cost)
    )
    layer = law(best.x)
    return {name: getattr(layer, name) for name in _PRIOR}


def request_overlap(popularity_overlap: float, layer: LayerLaw, lengths: Sequence[int] | NDArray[np.int64]) -> float:
    """Return the expected ``request`` baseline of the overlap, of requests of some lengths."""
    within = popularity_overlap + (1 - popularity_overlap) * layer.request
    if not len(lengths):
        return within
    passage = within + (1 - within) * layer.anchor**2
    same = layer.stay + (1 - layer.stay) * layer.keep
    near, still = pair_mean([same, layer.stay], lengths)
    return float(within + (passage - within) * near + (1 - passage) * still)


def _grouped(popularity: Floats) -> tuple[Floats, Floats]:
    """Return the mean popularities of at most ``_GROUPS`` groups of like experts, and how many are in each."""
    p = np.sort(popularity)
    if len(p) <= _GROUPS:
        return p, np.ones(len(p))
    # Of equal sums of roots: the few busy experts differ most, and matter most.
    mass = np.cumsum(np.sqrt(p))
    ends = np.unique(np.searchsorted(mass / mass[-1], np.arange(1, _GROUPS) / _GROUPS))
    parts = [part for part in np.split(p, ends) if len(part)]
    return np.array([part.mean() for part in parts]), np.array([float(len(part)) for part in parts])


def from_summary(
    num_experts: int,
    top_k: int,
    overlaps: Mapping[int, float] | Sequence[float] = (),
    popularity_overlap: float | None = None,
    unions: Mapping[int, float] | None = None,
    *,
    entropy_norm: float | None = None,
    request_overlap: float | None = None,
    layers: int = 1,
    source: Mapping[str, Any] | None = None,
) -> RoutingLaw:
    """Return the law that gives back a few figures; see :meth:`RoutingLaw.from_summary`."""
    by_lag = dict(overlaps) if isinstance(overlaps, Mapping) else dict(enumerate(overlaps, 1))
    targets = Targets(
        num_experts,
        top_k,
        top_k / num_experts if popularity_overlap is None else popularity_overlap,
        by_lag,
        dict(unions or {}),
        entropy_norm,
        request_overlap,
    )
    law = RoutingLaw(num_experts, top_k, (fit_layer(targets),) * layers, dict(source or {}))
    return with_figures(law, [targets])


def with_figures(
    law: RoutingLaw, targets: Sequence[Targets], predicted: Mapping[tuple[int, int], float] | None = None
) -> RoutingLaw:
    """Return the law with how well it gives back what it was fitted to, mean over layers.

    Parameters
    ----------
    targets
        What each layer was fitted to.
    predicted
        Observed unique experts by window and batch size that the fit did not aim at.
    """
    popularity = law.popularity()
    figures = [_figure("popularity_overlap", targets, "popularity_overlap", law.popularity_overlaps())]
    if targets[0].entropy_norm is not None:
        figures.append(_figure("entropy_norm", targets, "entropy_norm", [entropy_norm(p) for p in popularity]))
    if targets[0].request_overlap is not None:
        expected = [
            request_overlap(own, layer, t.lengths)
            for own, layer, t in zip(law.popularity_overlaps(), law.layers, targets, strict=False)
        ]
        figures.append(_figure("request_overlap", targets, "request_overlap", expected))
    for lag, value in zip(targets[0].overlaps, law.overlap(list(targets[0].overlaps)), strict=True):
        observed = float(np.mean([t.overlaps[lag] for t in targets]))
        figures.append(Figure("overlap", lag, None, observed, float(value), target=True))
    unions = {(w, 1): float(np.mean([t.unions[w] for t in targets])) for w in targets[0].unions}
    both = unions | {key: value for key, value in (predicted or {}).items() if key not in unions}
    if both:
        windows, batches = np.array(list(both)).T
        for key, value in zip(both, law.unique(windows, batches), strict=True):
            figures.append(Figure("unique", key[0], key[1], both[key], float(value), target=key in unions))
    return replace(law, figures=tuple(figures))


def _figure(quantity: str, targets: Sequence[Targets], name: str, law: Any) -> Figure:
    observed = float(np.mean([getattr(t, name) for t in targets]))
    return Figure(quantity, None, None, observed, float(np.mean(law)), target=True)


def unbiased_popularity(popularity: float, request: float, tokens: NDArray[np.int64]) -> float:
    """Return sum p^2 / k of the popularity without the bias of a finite number of requests.

    Pooled counts hold pairs of tokens of one request, which are more alike than those of two: with shares w of the
    tokens, the pooled value is sum w^2 of the former and 1 - sum w^2 of the latter.

    Parameters
    ----------
    popularity
        The pooled value.
    request
        The ``request`` baseline's overlap.
    tokens
        Tokens of each request; at least two have some.
    """
    share = tokens / tokens.sum()
    same, alone = float(np.square(share).sum()), 1 / float(tokens.sum())
    own = request + (1 - request) * alone / same  # a token also meets itself
    return (popularity - same * own) / (1 - same)
