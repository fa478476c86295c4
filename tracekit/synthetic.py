"""Seeded traces whose true answers are known in closed form.

Anyone who measures routing can check a whole tool chain with them: generate a trace, run
the chain, and compare with :attr:`SynthTrace.truth`.

The kinds:

``uniform``
    Every token of every layer draws one of the k-subsets, all equally likely, independently.
``skewed``
    Tokens are independent; expert e is in the set with probability p_e, Zipf-distributed per layer.
``sticky``
    With probability ``stay`` a token keeps the whole set of the token before it, otherwise it draws
    a fresh uniform k-subset.
``topical``
    Skewed popularity, tilted once per label and once per request, and sticky tokens: all four causes
    of the attribution are present.
``repeat``
    Each request repeats one set per layer.
``cycle``
    Each request walks through P = floor(N / k) disjoint sets in turn.
``law``
    What a :class:`tracekit.economics.law.RoutingLaw` says, such as one fitted to a trace.

The popularity kinds draw by systematic sampling (Madow 1949): with cumulative probabilities laid out
on a line of length k and one uniform u, the experts at u, u+1, ..., u+k-1 are chosen. Unlike Gumbel
top-k, whose inclusion probabilities have no closed form, this gives p_e exactly. The price is that
*which experts go together* is an artefact (the order on the line is drawn per request and layer),
so these traces say nothing about co-activation. Rank 0 is a uniformly drawn member of the set.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from tracekit.economics.law import NEGLIGIBLE, RoutingLaw, absence, inclusion
from tracekit.economics.law_file import load
from tracekit.errors import UsageError, did_you_mean
from tracekit.schema import Request, TraceMeta, id_dtype

__all__ = ["KINDS", "SynthTrace", "synth"]

_UNITS = 4096
"""Popularities are multiples of 1 / _UNITS, so that sampling is exact integer arithmetic."""
_MAX_WINDOW = 8
_MAX_LAG = 32

Ids = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Shape:
    """What every law needs to know about the trace it draws for."""

    num_experts: int
    top_k: int
    num_layers: int
    decode_lengths: NDArray[np.int64]
    """Decode tokens of each request ``[requests]``."""
    seed: int

    @property
    def requests(self) -> int:
        return len(self.decode_lengths)


class _Law(Protocol):
    """How the sets of one request are drawn, and what their expectations are."""

    def draw(self, rng: np.random.Generator, request: int, tokens: int) -> Ids:
        """Draw the sets of a request, ``[tokens, layers, k]``."""
        ...

    def expect(self, windows: Sequence[int], lags: Sequence[int]) -> dict[str, dict[int, float]]:
        """Return expectations: ``unique`` (and rungs) by window length, ``overlap`` by lag."""
        ...

    def label(self, request: int) -> str | None:
        """Return the request's label."""
        ...


def _rotate(ids: Ids, rng: np.random.Generator) -> Ids:
    """Rotate each row by a random offset, so that rank 0 is a uniformly drawn member of the set."""
    top_k = ids.shape[-1]
    offset = rng.integers(0, top_k, size=(*ids.shape[:-1], 1), dtype=np.uint8)
    ranks = (offset + np.arange(top_k, dtype=np.uint8)) % np.uint8(top_k)
    return np.take_along_axis(ids, ranks.astype(np.intp), axis=-1)


def _hold(fresh: Ids, stay: float, rng: np.random.Generator) -> Ids:
    """Let each (token, layer) keep the row before it with probability ``stay``.

    The first row is a fresh draw, so the chain is stationary and every expectation below is exact
    from the first token on.
    """
    if stay == 0:
        return fresh
    tokens, layers, _ = fresh.shape
    source = np.arange(tokens, dtype=np.intp)[:, None].repeat(layers, axis=1)
    source[rng.random((tokens, layers)) < stay] = 0
    np.maximum.accumulate(source, axis=0, out=source)
    return np.take_along_axis(fresh, source[:, :, None], axis=0)


def _absent(absent_from_one: Floats, window: int, stay: float) -> Floats:
    """Return the probability that an expert is in none of ``window`` consecutive tokens.

    The window holds 1 + Binomial(window - 1, 1 - stay) independent draws; this is the expectation of
    ``absent_from_one`` to that power.
    """
    moved: Floats = stay + (1 - stay) * absent_from_one
    return absent_from_one * moved ** (window - 1)


@dataclass(frozen=True)
class _Uniform:
    """Uniform k-subsets, each kept with probability ``stay``."""

    shape: _Shape
    stay: float = 0.0

    def draw(self, rng: np.random.Generator, request: int, tokens: int) -> Ids:
        n, k = self.shape.num_experts, self.shape.top_k
        columns: list[NDArray[Any]] = []
        # Floyd's sampling, all rows at once: each k-subset is equally likely.
        for last in range(n - k, n):
            pick = rng.integers(0, last + 1, size=(tokens, self.shape.num_layers), dtype=id_dtype(n))
            taken = np.zeros(pick.shape, dtype=bool)
            for column in columns:
                taken |= column == pick
            pick[taken] = last
            columns.append(pick)
        return _hold(_rotate(np.stack(columns, axis=-1), rng), self.stay, rng)

    def expect(self, windows: Sequence[int], lags: Sequence[int]) -> dict[str, dict[int, float]]:
        n = self.shape.num_experts
        p = self.shape.top_k / n
        absent = np.asarray(1 - p)
        return {
            "unique": {t: n * (1 - float(_absent(absent, t, self.stay))) for t in windows},
            "overlap": {d: self.stay**d + (1 - self.stay**d) * p for d in lags},
        }

    def label(self, request: int) -> str | None:
        return None


def _probabilities(weights: Floats, top_k: int) -> NDArray[np.int64]:
    """Scale weights ``[..., N]`` to inclusion probabilities in units of 1 / _UNITS.

    They sum to ``top_k`` and none exceeds 1.
    """
    scaled = inclusion(weights, top_k) * _UNITS
    units: NDArray[np.int64] = np.floor(scaled).astype(np.int64)
    # Largest remainders get the missing units; a capped expert has no remainder and cannot overflow.
    missing = top_k * _UNITS - units.sum(axis=-1, keepdims=True)
    order = np.argsort(units - scaled, axis=-1, kind="stable")
    place = np.argsort(order, axis=-1, kind="stable")
    units += place < missing
    return units


@dataclass(frozen=True)
class _Popular:
    """Popularity by layer, tilted by label and request, each set kept with probability ``stay``."""

    shape: _Shape
    skew: float
    labels: int = 1
    label_tilt: float = 0.0
    request_tilt: float = 0.0
    stay: float = 0.0

    @cached_property
    def _log_weights(self) -> Floats:
        """Log weights of each label ``[labels, layers, N]``."""
        s = self.shape
        rng = np.random.default_rng([s.seed, 0])
        zipf = -self.skew * np.log(np.arange(1, s.num_experts + 1, dtype=np.float64))
        base = rng.permuted(np.tile(zipf, (s.num_layers, 1)), axis=1)
        tilt = rng.standard_normal((self.labels, s.num_layers, s.num_experts))
        return base + self.label_tilt * tilt

    def _units(self, request: int) -> NDArray[np.int64]:
        """Inclusion probabilities of a request ``[layers, N]`` in units of 1 / _UNITS."""
        s = self.shape
        log_weights = self._log_weights[request % self.labels]
        if self.request_tilt:
            rng = np.random.default_rng([s.seed, 1, request])
            log_weights = log_weights + self.request_tilt * rng.standard_normal(log_weights.shape)
        return _probabilities(np.exp(log_weights), s.top_k)

    def draw(self, rng: np.random.Generator, request: int, tokens: int) -> Ids:
        s = self.shape
        units = self._units(request)
        order = rng.permuted(np.tile(np.arange(s.num_experts), (s.num_layers, 1)), axis=1)
        widths = np.take_along_axis(units, order, axis=1)
        # The line of length k, one entry a unit: looking an expert up is one gather.
        line = np.repeat(order.astype(id_dtype(s.num_experts)).ravel(), widths.ravel())
        start = rng.integers(0, _UNITS, size=(tokens, s.num_layers, 1), dtype=np.int64)
        start += np.arange(s.num_layers)[:, None] * (s.top_k * _UNITS)
        fresh = line[start + np.arange(s.top_k) * _UNITS]
        return _hold(_rotate(fresh, rng), self.stay, rng)

    def expect(self, windows: Sequence[int], lags: Sequence[int]) -> dict[str, dict[int, float]]:
        s = self.shape
        mass = np.zeros((self.labels, s.num_layers, s.num_experts))
        tokens = np.zeros(self.labels)
        starts = {t: np.zeros(self.labels) for t in windows}
        observed, independent = dict.fromkeys(windows, 0.0), dict.fromkeys(windows, 0.0)
        pairs, shared = dict.fromkeys(lags, 0), dict.fromkeys(lags, 0.0)
        for request, length in enumerate(int(n) for n in s.decode_lengths):
            label = request % self.labels
            p = self._units(request) / _UNITS
            mass[label] += length * p
            tokens[label] += length
            for t in windows:
                weight = max(0, length - t + 1)
                starts[t][label] += weight
                observed[t] += weight * _union(_absent(1 - p, t, self.stay))
                independent[t] += weight * _union((1 - p) ** t)
            fresh = float(np.mean(np.sum(p * p, axis=-1))) / s.top_k
            for d in lags:
                weight = max(0, length - d)
                pairs[d] += weight
                shared[d] += weight * (self.stay**d + (1 - self.stay**d) * fresh)
        pool = mass.sum(axis=0) / tokens.sum()
        total = {t: float(starts[t].sum()) for t in windows}
        by_label = dict.fromkeys(windows, 0.0)
        for label in range(min(self.labels, s.requests)):
            p = mass[label] / tokens[label]
            for t in windows:
                by_label[t] += float(starts[t][label]) * _union((1 - p) ** t)
        return {
            "unique": {t: observed[t] / total[t] for t in windows},
            "overlap": {d: shared[d] / pairs[d] for d in lags},
            "popularity": {t: _union((1 - pool) ** t) for t in windows},
            "label": {t: by_label[t] / total[t] for t in windows},
            "request": {t: independent[t] / total[t] for t in windows},
        }

    def label(self, request: int) -> str | None:
        return f"topic-{request % self.labels}" if self.labels > 1 else None


@dataclass(frozen=True)
class _Lawful:
    """A law of routing: requests tilt the popularity, passages their requests, and some tokens repeat."""

    shape: _Shape
    law: RoutingLaw

    @cached_property
    def _popularity(self) -> Floats:
        """Popularity of each expert ``[layers, N]``."""
        s = self.shape
        return np.random.default_rng([s.seed, 0]).permuted(self.law.popularity(), axis=1)

    def _units(self, request: int) -> NDArray[np.int64]:
        """Inclusion probabilities of a request ``[layers, N]`` in units of 1 / _UNITS."""
        s = self.shape
        rng = np.random.default_rng([s.seed, 1, request])
        tilted = [
            _dirichlet(p, layer.request, s.top_k, rng)
            for p, layer in zip(self._popularity, self.law.layers, strict=True)
        ]
        return _probabilities(np.stack(tilted), s.top_k)

    def draw(self, rng: np.random.Generator, request: int, tokens: int) -> Ids:
        s = self.shape
        units = self._units(request)
        keep, stay = (self.law.parameter(name) for name in ("keep", "stay"))
        fresh = rng.random((tokens, s.num_layers)) >= stay
        fresh[0] = True
        turns = fresh & (rng.random((tokens, s.num_layers)) >= keep)
        turns[0] = False
        passage = turns.cumsum(axis=0)
        ids = np.empty((tokens, s.num_layers, s.top_k), id_dtype(s.num_experts))
        for i, layer in enumerate(self.law.layers):
            own = np.tile(units[i], (int(passage[-1, i]) + 1, 1))
            held = np.zeros(own.shape)
            np.put_along_axis(held, _systematic(own, np.arange(len(own)), rng), layer.anchor, axis=1)
            mixed = _probabilities((1 - layer.anchor) * own / _UNITS + held, s.top_k)
            ids[:, i] = _systematic(mixed, passage[:, i], rng)
        source = np.where(fresh, np.arange(tokens, dtype=np.intp)[:, None], 0)
        np.maximum.accumulate(source, axis=0, out=source)
        return _rotate(np.take_along_axis(ids, source[:, :, None], axis=0), rng)

    def expect(self, windows: Sequence[int], lags: Sequence[int]) -> dict[str, dict[int, float]]:
        s, longest = self.shape, max(windows)
        anchor, keep, stay = (self.law.parameter(name)[:, None] for name in ("anchor", "keep", "stay"))
        same = (stay + (1 - stay) * keep)[:, 0]
        pool = np.zeros((s.num_layers, s.num_experts))
        starts, pairs = dict.fromkeys(windows, 0), dict.fromkeys(lags, 0)
        observed, independent = dict.fromkeys(windows, 0.0), dict.fromkeys(windows, 0.0)
        shared = dict.fromkeys(lags, 0.0)
        for request, length in enumerate(int(n) for n in s.decode_lengths):
            p = self._units(request) / _UNITS
            pool += length / s.decode_lengths.sum() * p
            absent = absence(p, longest, anchor, keep, stay)
            for t in windows:
                weight = max(0, length - t + 1)
                starts[t] += weight
                observed[t] += weight * _union(absent[t - 1])
                independent[t] += weight * _union((1 - p) ** t)
            apart = np.square(p).sum(axis=-1) / s.top_k
            near = apart + (1 - apart) * anchor[:, 0] ** 2
            for d in lags:
                weight = max(0, length - d)
                pairs[d] += weight
                overlap = apart + (near - apart) * same**d + (1 - near) * stay[:, 0] ** d
                shared[d] += weight * float(overlap.mean())
        return {
            "unique": {t: observed[t] / starts[t] for t in windows},
            "overlap": {d: shared[d] / pairs[d] for d in lags},
            "popularity": {t: _union((1 - pool) ** t) for t in windows},
            "request": {t: independent[t] / starts[t] for t in windows},
        }

    def label(self, request: int) -> str | None:
        return None


_MOST_ATOMS = 4096
"""Sets that make up a request's draw from the Dirichlet process, at most."""


def _dirichlet(p: Floats, spread: float, top_k: int, rng: np.random.Generator) -> Floats:
    """Draw inclusion probabilities ``[N]`` around ``p`` from a Dirichlet process over sets, by breaking a stick.

    What is left when it is shorter than a unit (Sethuraman, 1994) goes to ``p`` itself, so their mean is exact.
    """
    if spread < NEGLIGIBLE:
        return p
    concentration = (1 - spread) / spread
    atoms = min(_MOST_ATOMS, int(np.ceil(concentration * np.log(_UNITS))) + 1)
    broken = rng.beta(1, concentration, size=atoms)
    left = np.cumprod(1 - broken)
    weights = broken * np.concatenate([[1.0], left[:-1]])
    sets = _systematic(_probabilities(p, top_k)[None], np.zeros(atoms, np.intp), rng)
    drawn = np.bincount(sets.ravel(), np.repeat(weights, top_k), minlength=len(p))
    return np.asarray(drawn + left[-1] * p)


def _systematic(units: NDArray[np.int64], rows: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw one set for each of ``rows``, by systematic sampling with that row's probabilities.

    Parameters
    ----------
    units
        ``[rows, N]`` in units of 1 / _UNITS, each row's sum being k of them.
    rows
        Which row each set is drawn with ``[sets]``.

    Returns
    -------
    ndarray
        Ids ``[sets, k]``.
    """
    order = rng.permutation(units.shape[1])
    ends = np.cumsum(units[:, order], axis=1)
    length = int(ends[0, -1])
    # The lines of all rows one after the other: looking experts up is one search.
    ends += np.arange(len(units))[:, None] * length
    at = rng.integers(0, _UNITS, size=(len(rows), 1)) + np.arange(length // _UNITS) * _UNITS
    found = np.searchsorted(ends.ravel(), at + rows[:, None] * length, side="right")
    return np.asarray(order[found % units.shape[1]], np.intp)


def _union(absent: Floats) -> float:
    """Return the expected union, averaged over layers, from the experts' probabilities of absence ``[layers, N]``."""
    return float(np.mean(np.sum(1 - absent, axis=-1)))


@dataclass(frozen=True)
class _Cycle:
    """``period`` disjoint sets in turn; a period of 1 repeats one set."""

    shape: _Shape
    period: int

    def draw(self, rng: np.random.Generator, request: int, tokens: int) -> Ids:
        s = self.shape
        dtype = id_dtype(s.num_experts)
        order = rng.permuted(np.tile(np.arange(s.num_experts, dtype=dtype), (s.num_layers, 1)), axis=1)
        sets = order[:, : self.period * s.top_k].reshape(s.num_layers, self.period, s.top_k)
        return np.ascontiguousarray(sets[:, np.arange(tokens) % self.period].swapaxes(0, 1))

    def expect(self, windows: Sequence[int], lags: Sequence[int]) -> dict[str, dict[int, float]]:
        return {
            "unique": {t: float(self.shape.top_k * min(t, self.period)) for t in windows},
            "overlap": {d: 1.0 if d % self.period == 0 else 0.0 for d in lags},
        }

    def label(self, request: int) -> str | None:
        return None


def _cycle(shape: _Shape) -> _Law:
    return _Cycle(shape, shape.num_experts // shape.top_k)


def _repeat(shape: _Shape) -> _Law:
    return _Cycle(shape, 1)


@dataclass(frozen=True)
class _Kind:
    make: Callable[..., _Law]
    defaults: Mapping[str, float] = field(default_factory=dict)


_KINDS: dict[str, _Kind] = {
    "uniform": _Kind(_Uniform),
    "skewed": _Kind(_Popular, {"skew": 0.8}),
    "sticky": _Kind(_Uniform, {"stay": 0.4}),
    "topical": _Kind(_Popular, {"skew": 0.3, "labels": 2, "label_tilt": 0.7, "request_tilt": 0.5, "stay": 0.15}),
    "repeat": _Kind(_repeat),
    "cycle": _Kind(_cycle),
}

KINDS: tuple[str, ...] = tuple(_KINDS)
"""Names that :func:`synth` takes as ``kind``."""


@dataclass(frozen=True)
class SynthTrace:
    """A synthetic trace: its metadata, its requests one at a time, and its true answers.

    Made by :func:`synth`. A request depends only on the seed and its number, so any of them can be
    drawn again without the others, and nothing larger than one request is ever held.
    """

    kind: str
    meta: TraceMeta
    lengths: NDArray[np.int64]
    """Rows of each request ``[requests]``, prompt rows included."""
    prompt: int
    """Leading rows of each request that are prompt."""
    seed: int
    _law: _Law = field(repr=False)

    def requests(self) -> Iterator[Request]:
        """Draw the requests in order, one at a time.

        Yields
        ------
        Request
            ``ids`` is C-contiguous ``[tokens, layers, k]`` of the smallest unsigned dtype.
        """
        for number, tokens in enumerate(self.lengths):
            rng = np.random.default_rng([self.seed, 2, number])
            label = self._law.label(number)
            yield Request(
                request_id=f"{self.kind}-{number:05d}",
                ids=self._law.draw(rng, number, int(tokens)),
                prompt_len=self.prompt,
                decode_start=self.prompt,
                labels={} if label is None else {"label": label},
                where=f"request {number} of the synthetic trace",
            )

    @cached_property
    def truth(self) -> dict[str, dict[int, float]]:
        """Expected values over decode tokens, layers averaged.

        ``unique``: window length 1..8 to unique experts, sliding windows. ``overlap``: lag 1..32 to
        overlap as a share of k. Both are exact expectations over the random draws, for the popularity
        kinds given the popularities that the seed chose. The popularity kinds also have
        ``popularity``, ``label`` and ``request``: what those rungs of the ladder tend to as requests
        grow long (in a finite trace each is a little lower, being estimated from the tokens it
        explains; the request rung of sticky tokens also keeps a trace of their order).
        Window lengths and lags that no request reaches are absent.
        """
        decode = int(self.lengths.max()) - self.prompt
        windows = range(1, min(_MAX_WINDOW, decode) + 1)
        return self._law.expect(windows, range(1, min(_MAX_LAG, decode - 1) + 1))

    def sidecar(self) -> list[dict[str, Any]]:
        """Return one object per request, in order, for ``ingest(requests=...)`` and ``--requests``."""
        rows: list[dict[str, Any]] = []
        for number in range(len(self.lengths)):
            label = self._law.label(number)
            row: dict[str, Any] = {"request_id": f"{self.kind}-{number:05d}", "prompt_len": self.prompt}
            rows.append(row if label is None else {**row, "label": label})
        return rows

    def save(self, path: str | Path) -> Path:
        """Write the trace as one uncompressed ``.npz`` and ``NAME.requests.json`` beside it.

        The archive holds ``expert_ids`` ``[tokens, layers, k]`` of all requests in a row,
        ``request_lens``, ``prompt_len`` and ``num_experts``; the JSON file, :meth:`sidecar`, adds names
        and labels. Requests stream to disk. The same trace always gives the same bytes.

        Parameters
        ----------
        path
            A path that ends in ``.npz``.

        Returns
        -------
        Path
            The sidecar's path.

        Raises
        ------
        UsageError
            If the suffix is not ``.npz``.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise UsageError(f"the name {path.name!r}", expected="a name that ends in .npz")
        meta = self.meta
        header = {
            "descr": npy_format.dtype_to_descr(np.dtype(id_dtype(meta.num_experts))),
            "fortran_order": False,
            "shape": (int(self.lengths.sum()), len(meta.layers), meta.top_k),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            # ZipInfo's default date is 1980-01-01: equal traces are equal files.
            with archive.open(zipfile.ZipInfo("expert_ids.npy"), "w", force_zip64=True) as member:
                npy_format.write_array_header_1_0(member, header)
                for request in self.requests():
                    member.write(np.ascontiguousarray(request.ids).data)
            for name, value in (
                ("request_lens", self.lengths),
                ("prompt_len", np.asarray(self.prompt, dtype=np.int64)),
                ("num_experts", np.asarray(meta.num_experts, dtype=np.int64)),
            ):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    npy_format.write_array(member, value, version=(1, 0), allow_pickle=False)
        sidecar = path.with_suffix(".requests.json")
        lines = ",\n".join(json.dumps(row) for row in self.sidecar())
        sidecar.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return sidecar

    def save_npy(self, folder: str | Path) -> list[Path]:
        """Write one ``.npy`` per request, ``[tokens, layers, k]``, into a folder.

        The files carry ids only: N, phase and labels have to be given when they are ingested.

        Parameters
        ----------
        folder
            Created if it does not exist.

        Returns
        -------
        list of Path
            The files in request order, which is also their sorted order.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for request in self.requests():
            paths.append(folder / f"{request.request_id}.npy")
            np.save(paths[-1], request.ids, allow_pickle=False)
        return paths


def synth(
    kind: str | None = None,
    *,
    law: RoutingLaw | str | Path | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    layers: int | None = None,
    requests: int = 16,
    tokens: int | tuple[int, int] = 256,
    prompt: int = 0,
    seed: int = 0,
    **shape: float,
) -> SynthTrace:
    """Describe a synthetic trace; nothing is drawn until its requests are read or saved.

    Parameters
    ----------
    kind
        One of :data:`KINDS`: ``uniform``, ``skewed``, ``sticky``, ``topical``, ``repeat``, ``cycle``; ``law`` or None
        with a law.
    law
        A law of routing to draw from, such as ``tk.fit_law`` returns, or the JSON file of one.
    num_experts
        N, routed experts per layer. Default: the law's, or 64.
    top_k
        k, routed experts per token. Default: the law's, or 8.
    layers
        MoE layers L. Default: the law's, or 4. Other N, k or L than the law's hold its parameters.
    requests
        Number of requests.
    tokens
        Rows per request, prompt included; a pair draws each length uniformly between the two.
    prompt
        Leading rows of each request that are prompt; the others are decode.
    seed
        Seed of every draw; recorded in ``meta.extra``.
    **shape
        ``skew`` (Zipf exponent; ``skewed``, ``topical``); ``stay`` (probability that a token keeps the
        set before it; ``sticky``, ``topical``); ``labels`` (number of labels), ``label_tilt`` and
        ``request_tilt`` (standard deviation of the log weights between labels and between requests;
        ``topical``).

    Returns
    -------
    SynthTrace
        The trace, drawn lazily.

    Raises
    ------
    UsageError
        If the kind or a shape parameter is unknown, or a value is out of range.
    SourceError
        If the law's file cannot be read or is not a law.
    """
    make: Callable[..., _Law]
    if law is not None or kind in (None, "law"):
        fitted = _law_for(kind, law, num_experts, top_k, layers, shape)
        num_experts, top_k, layers = fitted.num_experts, fitted.top_k, len(fitted.layers)
        kind, make, values = "law", partial(_Lawful, law=fitted), {}
        about: Mapping[str, Any] = {"law": dict(fitted.source)}
    elif kind in _KINDS:
        make, about = _KINDS[kind].make, {}
        values = _shape_of(kind, shape)
    else:
        known = (*KINDS, "law")
        raise UsageError(f"the kind {kind!r}", expected="one of " + ", ".join(known), remedy=did_you_mean(kind, known))
    num_experts, top_k, layers = (
        default if given is None else given for given, default in ((num_experts, 64), (top_k, 8), (layers, 4))
    )
    low, high = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    _check(num_experts, top_k, layers, requests, low, high, prompt, seed, values)
    if "labels" in values:
        values["labels"] = int(values["labels"])

    rng = np.random.default_rng([seed, 3])
    lengths = rng.integers(low, high + 1, size=requests, dtype=np.int64)
    drawn_by = make(_Shape(num_experts, top_k, layers, lengths - prompt, seed), **values)
    meta = TraceMeta(
        num_experts=num_experts,
        top_k=top_k,
        layers=tuple(range(layers)),
        source_format="synth",
        model=f"synthetic {kind}",
        engine="tracekit synth",
        id_space="logical",
        router_order=True,
        extra={"kind": kind, "seed": seed, **values, **about},
    )
    return SynthTrace(kind=kind, meta=meta, lengths=lengths, prompt=prompt, seed=seed, _law=drawn_by)


def _shape_of(kind: str, shape: Mapping[str, float]) -> dict[str, float]:
    """Return the shape parameters of a kind, given or by default."""
    known = _KINDS[kind].defaults
    unknown = sorted(set(shape) - set(known))
    if unknown:
        takes = f"{kind} takes {', '.join(known)}" if known else f"{kind} takes none"
        raise UsageError(f"the parameter {unknown[0]!r}", expected=takes, remedy=did_you_mean(unknown[0], known))
    values = {**known, **shape}
    if "labels" in values and float(values["labels"]).is_integer():
        values["labels"] = int(values["labels"])
    return values


def _law_for(
    kind: str | None,
    law: RoutingLaw | str | Path | None,
    num_experts: int | None,
    top_k: int | None,
    layers: int | None,
    shape: Mapping[str, float],
) -> RoutingLaw:
    """Return the law to draw from, in the shape asked for."""
    if law is None:
        what = "a kind or a law" if kind is None else "a law with the kind 'law'"
        raise UsageError("no law to draw from", expected=what, remedy="Fit one to a trace: tracekit law")
    if kind not in (None, "law"):
        raise UsageError(f"the kind {kind!r} and a law", expected="one of them")
    if shape:
        raise UsageError(f"the parameter {min(shape)!r}", expected="law takes none: the law has them")
    if not isinstance(law, RoutingLaw):
        law = load(law)
    return law.reshaped(num_experts=num_experts, top_k=top_k, layers=layers)


def _check(
    num_experts: int,
    top_k: int,
    layers: int,
    requests: int,
    low: int,
    high: int,
    prompt: int,
    seed: int,
    shape: Mapping[str, float],
) -> None:
    """Raise UsageError for the first value that is out of range."""
    rules: list[tuple[bool, str, str]] = [
        (1 <= num_experts <= 1 << 16, f"num_experts={num_experts}", "1 to 65536"),
        (1 <= top_k <= min(num_experts, 255), f"top_k={top_k}", "1 to num_experts, at most 255"),
        (layers >= 1, f"layers={layers}", "at least 1"),
        (requests >= 1, f"requests={requests}", "at least 1"),
        (1 <= low <= high, f"tokens={low if low == high else (low, high)}", "at least 1, smaller first"),
        (0 <= prompt < low, f"prompt={prompt}", "at least 0 and fewer than the tokens"),
        (seed >= 0, f"seed={seed}", "at least 0"),
        (0 <= shape.get("skew", 0) <= 10, f"skew={shape.get('skew')}", "0 to 10"),
        (0 <= shape.get("stay", 0) < 1, f"stay={shape.get('stay')}", "at least 0 and below 1"),
        (
            shape.get("labels", 1) >= 1 and float(shape.get("labels", 1)).is_integer(),
            f"labels={shape.get('labels')}",
            "a whole number of at least 1",
        ),
        *(
            (0 <= shape.get(name, 0) <= 10, f"{name}={shape.get(name)}", "0 to 10")
            for name in ("label_tilt", "request_tilt")
        ),
    ]
    for fine, found, expected in rules:
        if not fine:
            raise UsageError(found, expected=expected)
