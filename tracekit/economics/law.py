"""A law of routing: few parameters per layer from which a simulator draws routing like a trace's.

Per layer, from the outside in:

*Popularity.* The expert at rank q = (i + 1/2) / N, idlest first, has weight q^cold (1 - q)^-hot: ``hot`` is Zipf's
exponent at the busy end, ``cold`` the exponent at the idle end (Hankin and Lee's quantile function, "A new family of
non-negative distributions", 2006). Scaled to inclusion probabilities p_e that sum to k, none above 1.

*Requests.* A request's probabilities are a draw from a Dirichlet process over sets of k experts whose base measure
includes e with probability p_e (Ferguson, "A Bayesian analysis of some nonparametric problems", 1973). So they sum to k
exactly, and each is Beta(a p_e, a (1 - p_e)) with a = (1 - request) / request: ``request`` is the part of the way from
popularity to one fixed set per request.

*Passages.* Inside a request, passages follow each other; each has an anchor set, drawn by the request's probabilities
r, and its tokens include e with probability (1 - anchor) r_e + anchor [e in the anchor set]: single experts persist,
not whole sets. A fresh draw stays in the passage with probability ``keep``.

*Tokens.* A token repeats the set before it with probability ``stay``, else it draws afresh.

Expected unions and overlaps depend only on the 0-1 process of each expert by itself, not on which experts go together;
they are exact here. All zeros is uniform, independent routing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit import markup
from tracekit.errors import UsageError

Floats = NDArray[np.float64]

LONGEST = 1024
"""Longest window that a law answers for."""

_NODES = 32
_BLOCK = 4096
"""Experts whose quadrature is held in memory at once."""
NEGLIGIBLE = 1e-6
"""Spread between requests below which they are taken as alike."""


@dataclass(frozen=True, slots=True)
class LayerLaw:
    """The parameters of one layer, all dimensionless.

    Raises
    ------
    UsageError
        If a value is out of range.
    """

    cold: float = 0.0
    """Exponent of the popularity at its idle end, 0 to 20."""
    hot: float = 0.0
    """Zipf's exponent of the popularity at its busy end, 0 to 20."""
    request: float = 0.0
    """How far requests differ, from 0 (every request has the trace's popularity) to below 1 (each has one set)."""
    anchor: float = 0.0
    """Weight of a passage's own set in its tokens, 0 to 1."""
    keep: float = 0.0
    """Probability that a fresh draw is of the same passage as the one before, 0 to 1."""
    stay: float = 0.0
    """Probability that a token repeats the set before it, 0 to 1."""

    def __post_init__(self) -> None:
        for name, high in RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= high:
                text = f"{value:g}" if number else repr(value)
                expected = "at least 0 and below 1" if name == "request" else f"0 to {high:g}"
                raise UsageError(f"{name} of {text}", expected=expected)


RANGES = {"cold": 20.0, "hot": 20.0, "request": math.nextafter(1, 0), "anchor": 1.0, "keep": 1.0, "stay": 1.0}
"""The parameters of a layer and the largest value of each."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that a law was fitted to or held against, mean over layers."""

    quantity: str
    """``overlap``, ``unique``, ``popularity_overlap``, ``request_overlap`` or ``entropy_norm``."""
    at: int | None
    """Lag or window in tokens; None where there is none."""
    batch_size: int | None
    observed: float
    law: float
    target: bool
    """Whether the fit aimed at it; else it is a prediction."""


@dataclass(frozen=True, slots=True)
class RoutingLaw:
    """A law of routing for every MoE layer of a model.

    Raises
    ------
    UsageError
        If the shape is not possible.
    """

    num_experts: int
    """N, routed experts per layer."""
    top_k: int
    """k, routed experts per token."""
    layers: tuple[LayerLaw, ...]
    source: Mapping[str, Any] = field(default_factory=dict)
    """What it was fitted to: JSON-serialisable."""
    figures: tuple[Figure, ...] = field(default=(), repr=False)
    """How well it fits."""

    def __post_init__(self) -> None:
        for found, fine, expected in (
            (f"num_experts={self.num_experts}", 1 <= self.num_experts <= 1 << 16, "1 to 65536"),
            (f"top_k={self.top_k}", 1 <= self.top_k <= min(self.num_experts, 255), "1 to num_experts, at most 255"),
            (f"{len(self.layers)} layers", 1 <= len(self.layers) <= 4096, "1 to 4096"),
        ):
            if not fine:
                raise UsageError(found, expected=expected)

    @classmethod
    def from_summary(
        cls,
        num_experts: int,
        top_k: int,
        overlaps: Mapping[int, float] | Sequence[float] = (),
        popularity_overlap: float | None = None,
        unions: Mapping[int, float] | None = None,
        **more: Any,
    ) -> RoutingLaw:
        """Return the law that gives back a few figures, such as a publication quotes.

        What the figures leave open goes to about where gpt-oss-20b's decode traces have it.

        Parameters
        ----------
        num_experts, top_k
            N and k.
        overlaps
            Overlap as a share of k by lag in tokens; a sequence starts at lag 1.
        popularity_overlap
            sum p^2 / k; default: k / N, experts of the same popularity.
        unions
            Unique experts by window in tokens, at batch size 1.
        **more
            ``entropy_norm``, entropy of the popularity over ln N; ``request_overlap``, mean overlap of distant tokens
            of a request; ``layers``, how many the law has, all alike; ``source``, what the figures are from.

        Raises
        ------
        UsageError
            If a figure is not possible.
        """
        from tracekit.economics.law_fit import from_summary

        return from_summary(num_experts, top_k, overlaps, popularity_overlap, unions, **more)

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "law") -> RoutingLaw:
        """Return the law that :meth:`to_json` wrote.

        Parameters
        ----------
        where
            What to call the text in messages.

        Raises
        ------
        SourceError
            If it is not such a law, of a later version, or a value is out of range.
        """
        from tracekit.economics.law_file import parse

        return parse(text, where=where)

    def to_json(self) -> str:
        """Return the law as a JSON document; :mod:`tracekit.economics.law_file` documents its fields."""
        from tracekit.economics.law_file import dump

        return dump(self)

    def _repr_html_(self) -> str:
        about = f"law of routing: N = {self.num_experts}, k = {self.top_k}, MoE layers: {len(self.layers)}"
        if trace := self.source.get("trace"):
            about += f", fitted to trace {trace}"
        values = {name: self.parameter(name) for name in PARAMETERS}
        rows = [(name, float(v.mean()), float(v.min()), float(v.max())) for name, v in values.items()]
        return markup.table(("parameter", "mean", "least", "most"), rows, title=about, notes=self._errors())

    def _errors(self) -> Iterator[str]:
        """Say in sentences how well the law fits: a union by its share, an overlap as it is."""
        for name, relative in (("unique", True), ("overlap", False)):
            for target, what in ((True, "fitted"), (False, "predicted")):
                figures = [f for f in self.figures if f.quantity == name and f.target == target]
                errors = [abs(f.law - f.observed) / (f.observed if relative else 1) for f in figures]
                if errors:
                    worst = f"{max(errors):.1%}" if relative else f"{max(errors):.3f}"
                    yield f"{name}, {what}: within {worst} of the trace ({len(figures)} figures)"

    def parameter(self, name: str) -> Floats:
        """Return one parameter of every layer ``[layers]``."""
        return np.array([getattr(layer, name) for layer in self.layers], np.float64)

    def reshaped(
        self, *, num_experts: int | None = None, top_k: int | None = None, layers: int | None = None
    ) -> RoutingLaw:
        """Return the law extrapolated to another shape: every parameter is held, which no trace confirms.

        Other layers take the parameters of the layer at the same relative depth.
        """
        count = len(self.layers) if layers is None else layers
        if count < 1:
            raise UsageError(f"layers={count}", expected="at least 1")
        depth = [self.layers[i * len(self.layers) // count] for i in range(count)]
        return replace(
            self,
            num_experts=self.num_experts if num_experts is None else num_experts,
            top_k=self.top_k if top_k is None else top_k,
            layers=tuple(depth),
            figures=(),
        )

    def popularity(self) -> Floats:
        """Return the experts' probabilities, idlest first ``[layers, N]``; each layer's sum to k."""
        return profile(self.num_experts, self.top_k, self.parameter("cold"), self.parameter("hot"))

    def unique(self, window: ArrayLike, batch_size: ArrayLike = 1) -> Floats:
        """Return U(T, B): unique experts per layer in one window from each of B different requests.

        Parameters
        ----------
        window
            T, tokens of a window.
        batch_size
            B, requests. The two broadcast.

        Returns
        -------
        ndarray
            Mean over layers: sum_e 1 - (1 - q_e)^B, where q_e is the probability that a window holds expert e. The
            numbers are exact up to windows of 31 tokens; beyond, the integral over requests has 32 nodes.

        Raises
        ------
        UsageError
            If a window or batch size is out of range.
        """
        T, B = np.broadcast_arrays(np.asarray(window), np.asarray(batch_size))
        for what, values in (("window", T), ("batch size", B)):
            if not np.issubdtype(values.dtype, np.integer) or (values.size and values.min() < 1):
                raise UsageError(
                    f"{what} {np.asarray(values).ravel()[:4].tolist()}", expected="whole numbers from 1 on"
                )
        if not T.size:
            return np.zeros(T.shape)
        longest = int(T.max())
        if longest > LONGEST:
            raise UsageError(f"a window of {longest} tokens", expected=f"1 to {LONGEST}")
        out = np.zeros(T.shape)
        for layer, times in Counter(self.layers).items():
            popularity = profile(self.num_experts, self.top_k, layer.cold, layer.hot)
            q = layer_presence(popularity, layer, longest)
            out += times * (1 - (1 - q[T - 1]) ** B[..., None]).sum(axis=-1)
        return np.asarray(out / len(self.layers))

    def overlap(self, lag: ArrayLike) -> Floats:
        """Return the expected overlap of the sets of two tokens ``lag`` apart as a share of k, mean over layers."""
        d = np.asarray(lag, np.float64)
        if d.size and d.min() < 0:
            raise UsageError(f"a lag of {d.min():g}", expected="0 or more tokens")
        within = [
            layer_overlap(at, layer, d) for at, layer in zip(self.popularity_overlaps(), self.layers, strict=True)
        ]
        return np.asarray(np.mean(within, axis=0))

    def popularity_overlaps(self) -> Floats:
        """Return the overlap of tokens of different requests, sum p^2 / k ``[layers]``."""
        return np.asarray(np.square(self.popularity()).sum(axis=-1) / self.top_k)


PARAMETERS = tuple(f.name for f in fields(LayerLaw))


def inclusion(weights: Floats, top_k: int) -> Floats:
    """Scale weights ``[..., N]`` to inclusion probabilities that sum to ``top_k``.

    None exceeds 1: what would, is capped and the others share the rest.
    """
    capped = np.zeros(weights.shape, dtype=bool)
    while True:
        free = np.where(capped, 0.0, weights)
        left = top_k - capped.sum(axis=-1, keepdims=True)
        rest = np.maximum(free.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        p = np.where(capped, 1.0, free * (left / rest))
        over = p > 1
        if not over.any():
            return np.asarray(p)
        capped |= over


def profile(num_experts: int, top_k: int, cold: ArrayLike, hot: ArrayLike) -> Floats:
    """Return popularities ``[..., N]`` by their two exponents ``[...]``, idlest first; they sum to k."""
    q = (np.arange(num_experts) + 0.5) / num_experts
    log = np.multiply.outer(np.asarray(cold), np.log(q)) - np.multiply.outer(np.asarray(hot), np.log1p(-q))
    return inclusion(np.exp(log - log.max(axis=-1, keepdims=True)), top_k)


def layer_overlap(popularity_overlap: float, layer: LayerLaw, lag: Floats) -> Floats:
    """Return the expected overlap of one layer by lag: two geometric decays onto the overlap within a request."""
    request = popularity_overlap + (1 - popularity_overlap) * layer.request
    passage = request + (1 - request) * layer.anchor**2
    same = layer.stay + (1 - layer.stay) * layer.keep
    return np.asarray(request + (passage - request) * same**lag + (1 - passage) * layer.stay**lag)


def layer_presence(popularity: Floats, layer: LayerLaw, window: int) -> Floats:
    """Return the share of windows of 1 .. ``window`` tokens that contain experts of some popularity ``[window, N]``."""
    if layer.request < NEGLIGIBLE:
        return 1 - absence(popularity, window, layer.anchor, layer.keep, layer.stay)
    # A window's absence is a polynomial in r of degree 2 per token: T + 1 nodes integrate it exactly.
    blocks = []
    for some in np.array_split(popularity, -(-len(popularity) // _BLOCK)):
        at, weight = beta_nodes(some, (1 - layer.request) / layer.request, min(window + 1, _NODES))
        blocks.append(1 - (absence(at, window, layer.anchor, layer.keep, layer.stay) * weight).sum(axis=-1))
    return np.concatenate(blocks, axis=-1)


def absence(r: Floats, window: int, anchor: ArrayLike, keep: ArrayLike, stay: ArrayLike) -> Floats:
    """Return the probability that 1 .. ``window`` consecutive tokens all leave an expert out.

    Parameters
    ----------
    r
        The request's probabilities ``[...]``.
    window
        T.
    anchor, keep, stay
        As of :class:`LayerLaw`; they broadcast against ``r``.

    Returns
    -------
    ndarray
        ``[window, ...]``.
    """
    # A hidden Markov chain with two states: whether the passage's anchor set holds the expert.
    h, kept, repeated = (np.asarray(value, np.float64) for value in (anchor, keep, stay))
    out = (1 - h) * (1 - r), 1 - (1 - h) * r
    prior = r, 1 - r
    joint = [p * a for p, a in zip(prior, out, strict=True)]
    result = [joint[0] + joint[1]]
    for _ in range(1, window):
        drawn = [(kept * j + (1 - kept) * p * result[-1]) * a for j, p, a in zip(joint, prior, out, strict=True)]
        joint = [repeated * j + (1 - repeated) * d for j, d in zip(joint, drawn, strict=True)]
        result.append(joint[0] + joint[1])
    return np.stack([np.asarray(value, np.float64) for value in result])


def beta_nodes(mean: Floats, concentration: float, nodes: int) -> tuple[Floats, Floats]:
    """Return nodes and weights ``[..., nodes]`` that integrate polynomials over Beta(a m, a (1 - m)) exactly.

    Gauss-Jacobi by the eigenvalues of the recurrence (Golub and Welsch, "Calculation of Gauss quadrature rules", 1969),
    for every mean m at once.
    """
    mean = np.clip(mean, 1e-12, 1 - 1e-12)[..., None]
    upper, lower = concentration * (1 - mean) - 1, concentration * mean - 1  # exponents of (1 - x) and (1 + x)
    i = np.arange(1, nodes, dtype=np.float64)
    total = 2 * i + upper + lower
    first = (lower - upper) / (upper + lower + 2)
    diagonal = np.concatenate([first, (lower**2 - upper**2) / (total * (total + 2))], axis=-1)
    # At i = 1 the factors i + upper + lower and total - 1 are equal, and may both be 0.
    ratio = np.where(i == 1, 1.0, (i + upper + lower) / np.where(i == 1, 1.0, total - 1))
    beside = np.sqrt(4 * i * (i + upper) * (i + lower) * ratio / (total**2 * (total + 1)))
    matrix = np.zeros((*diagonal.shape, nodes))
    n = np.arange(nodes)
    matrix[..., n, n] = diagonal
    matrix[..., n[:-1], n[1:]] = matrix[..., n[1:], n[:-1]] = beside
    values, vectors = np.linalg.eigh(matrix)
    return np.clip((values + 1) / 2, 0.0, 1.0), np.square(vectors[..., 0, :])


def pair_mean(ratio: ArrayLike, lengths: Sequence[int] | NDArray[np.int64]) -> Floats:
    """Return the mean of ratio^lag over the pairs of tokens of requests ``[...]``.

    Parameters
    ----------
    ratio
        From 0 to 1 ``[...]``.
    lengths
        Tokens of each request; each weighs by its tokens less one, as the ``request`` baseline's overlap at lag 1.
    """
    x = np.asarray(ratio, np.float64)[..., None]
    n = np.asarray(lengths, np.float64)
    n = n[n > 1]
    if not len(n):
        return np.ones(np.shape(ratio))
    apart = np.maximum(1 - x, 1e-9)
    # sum over d of (n - d) x^d, d = 1 .. n - 1
    summed = np.where(1 - x < 1e-9, n * (n - 1) / 2, (n - 1) * x / apart - x * x * (1 - x ** (n - 1)) / apart**2)
    return np.asarray((2 * summed / n).sum(axis=-1) / (n - 1).sum())
