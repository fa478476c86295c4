"""Local routing consistency: how well the experts of a stretch of tokens can be known for the whole stretch.

Two measures of Liang et al., "Not All Models Suit Expert Offloading" (arXiv 2505.16056), over segments of m consecutive
tokens, every start:

- SRP(m), segment routing best performance: a router keeps an expert for all of its m tokens or for
  none; SRP is the best F1 score that it can reach against the real routing. Best is to keep the experts with at least
  theta uses in a segment, c, for one theta: 2 sum(c | c >= theta) / (m #{c >= theta} + sum(c)). The size ratio is how
  many experts that router keeps, over k.
- SCH(m), segment cache best hit rate: of a cache that evicts the expert with the fewest uses in the next m tokens, and
  loads on demand. Here the experts of the token itself are never evicted, and every cache begins empty, as everywhere
  in this project. The first version of the paper computed the hit rate of the best *fixed* set of each segment, which
  is what a cache reaches that is filled anew for every segment: ``fixed_hit_rate``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UsageError
from tracekit.execution import check_state
from tracekit.metrics.state import MIN_REQUESTS, Cells, PhaseRuns, Spec, layer_index
from tracekit.schema import TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block

SEGMENT = 16
"""Tokens of a segment by default, those of the published table."""

RATIOS = (1, 1.5, 2, 3, 4)
"""Cache sizes by default, over k."""


@dataclass(frozen=True, slots=True)
class LocalitySpec(Spec):
    """What one pass measures; ``max_window`` is the longest of ``lengths``."""

    lengths: tuple[int, ...] = (SEGMENT,)
    """Segment lengths m, ascending."""
    capacities: tuple[int, ...] = (1,)
    """Cache sizes in experts per layer, ascending."""


@dataclass(slots=True)
class LocalityState:
    """Sums over the segments of each cell. C cells, L layers, M segment lengths, G cache sizes, N experts."""

    n_segments: NDArray[np.int64]
    """``[C, L, M]`` segments."""
    tokens: NDArray[np.int64]
    """``[C, L, M]`` tokens of runs that have a segment."""
    uses: NDArray[np.int64]
    """``[C, L, sum(m + 1)]``: for each length after the other, pairs of a segment and an expert by the uses c."""
    filled: NDArray[np.int64]
    """``[C, L, M, N]``: summed over its first n entries, uses that the n most used experts of each segment have."""
    hits: NDArray[np.int64]
    """``[C, L, M, G]`` hits of the caches that see a segment ahead."""

    @classmethod
    def empty(cls, meta: TraceMeta, spec: LocalitySpec, cells: int) -> LocalityState:
        """Return a state with nothing accumulated.

        Raises
        ------
        UsageError
            The state would need more memory than it may take, by default 4 GiB.
        """
        shape = (cells, len(meta.layers))
        lengths, wide = len(spec.lengths), sum(spec.lengths) + len(spec.lengths)
        each = wide + lengths * (2 + meta.num_experts + len(spec.capacities))
        size = 8.0 * np.prod(shape, dtype=float) * each
        check_state(size, "these segments need", "Ask for fewer or shorter segments, or use --no-intervals")
        return cls(
            n_segments=np.zeros((*shape, lengths), np.int64),
            tokens=np.zeros((*shape, lengths), np.int64),
            uses=np.zeros((*shape, wide), np.int64),
            filled=np.zeros((*shape, lengths, meta.num_experts), np.int64),
            hits=np.zeros((*shape, lengths, len(spec.capacities)), np.int64),
        )

    def merge(self, other: LocalityState) -> None:
        """Add another state of the same shape to this one."""
        for field in fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))


class Locality:
    """The sums of one pass over a trace's routing, and the frame that is finalised from them."""

    def __init__(
        self, meta: TraceMeta, requests: pl.DataFrame, spec: LocalitySpec, blocks: Iterable[Block], threads: int
    ) -> None:
        """Read ``blocks`` once; ``requests`` are the trace's requests in order."""
        self.meta, self.spec = meta, spec
        self.cells = Cells.assign(requests, spec)
        self.state = LocalityState.empty(meta, spec, len(self.cells.cell_group))
        self._having = np.zeros((requests.height, len(spec.lengths)), bool)
        self._cut = PhaseRuns(requests, spec.phase, self.cells)
        self._layer_index = layer_index(meta)
        self._tasks = max(1, min(threads, len(meta.layers)))
        with ThreadPoolExecutor(self._tasks, thread_name_prefix="tracekit-locality") as pool:
            for block in blocks:
                self._add(block, pool)

    def _add(self, block: Block, pool: ThreadPoolExecutor) -> None:
        from tracekit.metrics.locality_kernel import replay_ahead, scan_segments

        request, layer, start, length, _ = self._cut(block)
        lengths, s, n = np.array(self.spec.lengths), self.state, self.meta.num_experts
        np.logical_or.at(self._having, request, length[:, None] >= lengths)
        layers = self._layer_index[layer]
        runs = np.stack([layers, self.cells.cell[request], start, length], axis=1)
        np.add.at(s.tokens, (runs[:, 1], layers), np.where(length[:, None] >= lengths, length[:, None], 0))
        task_of = layers * self._tasks // len(self.meta.layers)
        capacities = np.array(self.spec.capacities)

        def work(task: int) -> None:  # tasks own disjoint layers, so they write disjoint parts of the state
            mine = np.ascontiguousarray(runs[task_of == task])
            for i, (m, uses) in enumerate(zip(self.spec.lengths, self._by_length(s.uses), strict=True)):
                scan_segments(block.ids, mine, m, n, s.n_segments[:, :, i], uses, s.filled[:, :, i])
                replay_ahead(block.ids, mine, m, capacities, n, s.hits[:, :, i])

        list(pool.map(work, range(self._tasks)))

    def _by_length(self, uses: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the part of ``uses[…, sum(m + 1)]`` of each segment length, as views."""
        ends = np.cumsum([m + 1 for m in self.spec.lengths])
        return [uses[..., end - m - 1 : end] for m, end in zip(self.spec.lengths, ends, strict=True)]

    def locality(self) -> pl.DataFrame:
        """Return SRP and SCH: one row per group, segment length and cache size."""
        from tracekit.metrics.intervals import jackknife
        from tracekit.metrics.measurement import interval_columns, result_frame
        from tracekit.metrics.replicates import layer_mean, output_groups

        rows: list[dict[str, Any]] = []
        s, k = self.state, self.meta.top_k
        every = np.array(self.spec.capacities)
        for r, groups in output_groups(self.meta, self.spec, self.cells, s):
            enough = self._having[np.isin(self.cells.cell, r.members)].sum(axis=0) >= MIN_REQUESTS
            uses, n_segments = self._by_length(r.total(s.uses)), r.total(s.n_segments)
            for i, m in enumerate(self.spec.lengths):
                most_used = r.total(s.filled[:, :, i]).cumsum(axis=-1)[..., every - 1]
                of_cache = {
                    "sch": _over(r.total(s.hits[:, :, i]), k * r.total(s.tokens[:, :, i])),
                    "fixed_hit_rate": _over(most_used, k * m * n_segments[:, :, i]),
                }
                for group, layers in groups:
                    # The published figure of a model pools its layers; where there is one, it is the layer's.
                    best, size = best_performance(uses[i][:, layers].sum(axis=1), m)
                    segments = n_segments[:, layers, i].sum(axis=1)
                    with np.errstate(invalid="ignore", divide="ignore"):
                        ratio = np.where(segments > 0, size / (k * segments), np.nan)
                    columns: dict[str, NDArray[Any]] = {}
                    for name, values in (("srp", best), ("size_ratio", ratio)):
                        of_all = interval_columns(name, jackknife(values[:, None]).where(enough[i : i + 1]))
                        columns |= {column: value.repeat(len(every)) for column, value in of_all.items()}
                    for name, values in of_cache.items():
                        interval = jackknife(layer_mean(values, layers)).where(np.repeat(enough[i], len(every)))
                        columns |= interval_columns(name, interval)
                    rows += [
                        {
                            **group,
                            "segment": m,
                            "n_segments": int(n_segments[0, layers, i].max()),
                            "capacity": capacity,
                            "cache_ratio": capacity / k,
                        }
                        | {name: value[g].item() for name, value in columns.items()}
                        for g, capacity in enumerate(self.spec.capacities)
                    ]
        return result_frame(self.spec, "locality", rows)


def best_performance(uses: NDArray[np.int64], length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the best F1 score of a router that keeps experts for whole segments, and how many it keeps in all.

    Parameters
    ----------
    uses
        ``[…, m + 1]``: pairs of a segment and an expert that it uses c times, c = 0 .. m.
    length
        m, tokens of a segment.

    Returns
    -------
    SRP (NaN without segments), and the pairs that the best router keeps; the fewest among equals. ``[…]`` each.
    """
    c = np.arange(length + 1)
    kept = uses[..., :0:-1].cumsum(axis=-1)[..., ::-1].astype(np.float64)  # c >= theta, theta = 1 .. m
    right = (uses * c)[..., :0:-1].cumsum(axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        score = 2 * right / (length * kept + right[..., :1])
    # From the largest threshold on, so that of equal scores the one that keeps the fewest is taken.
    at = length - 1 - np.argmax(np.nan_to_num(score[..., ::-1], nan=-1.0), axis=-1)
    return np.take_along_axis(score, at[..., None], -1)[..., 0], np.take_along_axis(kept, at[..., None], -1)[..., 0]


def _over(sums: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``sums[…, G]`` over ``weights[…]``, NaN where there is no weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weights[..., None] > 0, sums / weights[..., None], np.nan)


def spec_of(meta: TraceMeta, lengths: Iterable[int], ratios: Iterable[float]) -> dict[str, Any]:
    """Return checked arguments of a :class:`LocalitySpec`; cache sizes are ratio * k, rounded, and at most N.

    Raises
    ------
    UsageError
        A length is below 1, or a ratio does not hold k experts or holds more than N.
    """
    lengths = tuple(sorted({operator.index(m) for m in lengths}))
    if not lengths or lengths[0] < 1:
        raise UsageError(f"segments of {lengths[0]} tokens" if lengths else "no segment", expected="at least 1")
    capacities = set()
    for ratio in ratios:
        size = meta.top_k * float(ratio)
        if not meta.top_k <= size <= meta.num_experts:
            most = meta.num_experts / meta.top_k
            raise UsageError(f"a cache of {ratio:g} k experts per layer", expected=f"a ratio of 1 to {most:g} (N / k)")
        capacities.add(round(size))
    if not capacities:
        raise UsageError("no cache ratio", expected="one or more")
    return {"lengths": lengths, "capacities": tuple(sorted(capacities)), "max_window": lengths[-1]}
