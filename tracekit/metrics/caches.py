"""Expert caches over a trace: hits under every policy and capacity, and what the misses are made of.

A miss is *cold* (the expert was never there since the cache began empty), of the *working set* (Belady's optimal policy
misses it too: the cache is too small), or of the *policy* (what is left). The rules of the replay are those of
:mod:`tracekit.metrics.replay`, what a cache begins with those of :data:`tracekit.metrics.cache_spec.STARTS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UnsupportedError
from tracekit.execution import check_state
from tracekit.metrics.cache_spec import CacheSpec
from tracekit.metrics.intervals import jackknife
from tracekit.metrics.measurement import interval_columns, result_frame
from tracekit.metrics.replay import Stream
from tracekit.metrics.replicates import output_groups
from tracekit.metrics.state import MIN_REQUESTS, Cells, phase_tokens
from tracekit.metrics.streams import batches, joined, stream, whole_requests
from tracekit.schema import TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block

_TABLE = 1 << 24
"""Entries of the table that turns a stack distance into a cache size at most; without one, LRU is replayed."""


@dataclass(slots=True)
class CacheState:
    """Sums over the counted steps of each cell. C cells, L layers, G capacities, N experts."""

    tokens: NDArray[np.int64]
    """``[C]``"""
    counts: NDArray[np.int64]
    """``[C, L, N]`` accesses."""
    cold: NDArray[np.int64]
    """``[C, L]`` accesses to experts that were not used since the cache began empty."""
    hits: dict[str, NDArray[np.int64]]
    """By policy ``[C, G, L]``."""

    @classmethod
    def empty(cls, meta: TraceMeta, spec: CacheSpec, cells: int) -> CacheState:
        """Return a state with nothing accumulated.

        Raises
        ------
        UsageError
            The state would need more memory than it may take, by default 4 GiB.
        """
        replayed = [policy for policy in spec.policies if policy != "static"]
        layers, n, sizes = len(meta.layers), meta.num_experts, len(spec.capacities)
        size = 8.0 * cells * layers * (n + len(spec.policies) * sizes)
        check_state(size, "these caches need", "Ask for fewer of them")
        return cls(
            tokens=np.zeros(cells, np.int64),
            counts=np.zeros((cells, layers, n), np.int64),
            cold=np.zeros((cells, layers), np.int64),
            hits={policy: np.zeros((cells, sizes, layers), np.int64) for policy in replayed},
        )

    def merge(self, other: CacheState, cells: slice = slice(None)) -> None:
        """Add another state, of these cells, to this one."""
        for name in ("tokens", "counts", "cold"):
            getattr(self, name)[cells] += getattr(other, name)
        for policy, hits in other.hits.items():
            self.hits[policy][cells] += hits


class Caches:
    """The sums of one pass over a trace's routing, and the frames that are finalised from it."""

    def __init__(
        self, meta: TraceMeta, requests: pl.DataFrame, spec: CacheSpec, blocks: Iterable[Block], threads: int
    ) -> None:
        """Read ``blocks`` once; ``requests`` are the trace's requests in order."""
        self.meta, self.spec = meta, spec
        self._budgets, self._costs = spec.budgets(meta), spec.costs(meta)
        unit, units = _units(requests, spec)
        # A static list needs requests apart from those it is judged on, intervals or not.
        self.cells = Cells.assign(units, replace(spec, intervals=True) if "static" in spec.policies else spec)
        self.state = CacheState.empty(meta, spec, len(self.cells.cell_group))
        if spec.start == "carry":
            rows = int(requests["n_tokens"].to_numpy().sum(dtype=np.int64)) * len(meta.layers)
            remedy = "Begin every request with an empty cache, or ask for another trace"
            check_state(rows * (8.0 * meta.top_k + 16), "a cache that lives on needs the whole trace at once:", remedy)
        together = batches(whole_requests(meta, requests, blocks, unit >= 0), unit, spec.batch_size)
        streams = (
            (number, stream(meta, rows, spec.phase, spec.start, int(self.cells.cell[number])))
            for number, rows in together
        )
        if spec.start == "carry":
            every = list(streams)
            self.state.merge(self._replay(0, joined([events for _, events in every]), len(self.cells.cell_group)))
            return
        running: deque[tuple[int, Future[CacheState]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="tracekit-cache") as pool:
            for number, events in streams:
                alone = events._replace(cells=np.minimum(events.cells, 0))
                running.append((int(self.cells.cell[number]), pool.submit(self._replay, number, alone, 1)))
                if len(running) > 2 * threads:
                    self._collect(running)
            while running:
                self._collect(running)

    def _collect(self, running: deque[tuple[int, Future[CacheState]]]) -> None:
        cell, done = running.popleft()
        self.state.merge(done.result(), slice(cell, cell + 1))

    def _replay(self, number: int, events: Stream, cells: int) -> CacheState:
        """Replay a stream under every policy and capacity."""
        from tracekit.metrics import replay as kernels

        n, layers = self.meta.num_experts, len(self.meta.layers)
        state = CacheState.empty(self.meta, self.spec, cells)
        there = events.cells >= 0
        np.add.at(state.tokens, events.cells[there], events.tokens[there])
        seen = events.experts, events.offsets, events.cells
        kernels.count(*seen, state.counts, state.cold)
        for policy, hits in state.hits.items():
            if policy == "lru" and self._lru_curve(events, hits):
                continue
            following = np.zeros(0, np.int32)
            if policy == "belady":
                following = kernels.next_uses(events.experts, events.offsets, layers, n)
            for g, budget in enumerate(self._budgets):
                out = np.zeros((cells, layers), np.int64)
                if policy == "random":
                    # Every stream has numbers of its own, the same ones however the streams are dealt to threads.
                    seed = (self.spec.seed * 1_000_003 + number * 1009 + g) % (1 << 32)
                    kernels.replay_random(*seen, n, self._costs, budget, seed, out)
                elif policy == "lfru":
                    kernels.replay_lfru(*seen, n, self._costs, budget, out)
                else:
                    kind = {"lru": kernels.LRU, "lfu": kernels.LFU, "belady": kernels.BELADY}[policy]
                    kernels.replay(*seen, following, n, self._costs, budget, kind, out)
                hits[:, g] = out
        return state

    def _lru_curve(self, events: Stream, hits: NDArray[np.int64]) -> bool:
        """Add the hits of LRU caches of every size from one pass; False where the sizes do not allow it."""
        from tracekit.metrics import replay as kernels

        n, seen = self.meta.num_experts, (events.experts, events.offsets, events.cells)
        if self.spec.scope == "layer":
            hist = np.zeros((len(hits), len(self.meta.layers), n + 1), np.int64)
            kernels.lru_by_layer(*seen, n, hist)
            # What is smaller than an event holds the event all the same.
            most = np.clip(self._budgets // self._costs, 1, n)
            curve = hist.cumsum(axis=2)
            for g, sizes in enumerate(most):
                hits[:, g] += curve[:, np.arange(len(sizes)), sizes - 1]
            return True
        step = int(np.gcd.reduce(self._costs))
        whole = int(self._costs.sum()) // step * n
        if whole > _TABLE:
            return False
        place = np.searchsorted(self._budgets[:, 0] // step, np.arange(whole + 1)).astype(np.int32)
        hist = np.zeros((len(hits), len(self.meta.layers), len(self._budgets) + 1), np.int64)
        kernels.lru_of_all(*seen, n, (self._costs // step).astype(np.int32), place, hist)
        hits += hist.cumsum(axis=2)[..., :-1].transpose(0, 2, 1)
        return True

    def cache(self, policies: tuple[str, ...]) -> pl.DataFrame:
        """Return hits and misses: one row per group, policy and capacity."""
        s, spec, rows = self.state, self.spec, []
        hits: dict[str, NDArray[Any]] = {**s.hits}
        if "static" in policies:
            hits["static"] = self._static()
        sizes = np.array(spec.sizes or [np.nan] * len(self.meta.layers), float)
        capacities = spec.experts(self.meta)
        for r, groups in output_groups(self.meta, spec, self.cells, s):
            enough = np.array([r.requests >= MIN_REQUESTS])
            accesses = r.total(s.counts.sum(axis=2)).astype(float)
            tokens, cold = r.total(s.tokens).astype(float), r.total(s.cold).astype(float)
            totals = {policy: r.total(found).astype(float) for policy, found in hits.items()}
            for group, layers in groups:
                of_all = accesses[:, layers].sum(axis=1)
                for policy in policies:
                    for g, capacity in enumerate(capacities):
                        found = totals[policy][:, g, layers]
                        with np.errstate(invalid="ignore", divide="ignore"):
                            rate = found.sum(axis=1) / of_all
                            per_token = (accesses[0, layers] - found[0]) / tokens[0]
                            best, never = totals["belady"][0, g, layers].sum(), cold[0, layers].sum()
                            split = np.array([never, of_all[0] - best - never, best - found[0].sum()]) / of_all[0]
                        columns = interval_columns("hit_rate", jackknife(rate[:, None]).where(enough))
                        rows.append(
                            {
                                **group,
                                "scope": spec.scope,
                                "start": spec.start,
                                "batch_size": spec.batch_size,
                                "unit": spec.unit,
                                "policy": policy,
                                "capacity": capacity,
                                "capacity_bytes": None if not spec.sizes else round(capacity * sizes[layers].sum()),
                                "accesses": int(of_all[0]),
                                "tokens": int(tokens[0]),
                                **{name: value.item() for name, value in columns.items()},
                                **dict(zip(("cold", "working_set", "policy_excess"), split.tolist(), strict=True)),
                                "misses_per_token": per_token.sum(),
                                "bytes_per_token": (per_token * sizes[layers]).sum(),
                            }
                        )
        return result_frame(spec, "cache", rows)

    def reuse(self) -> pl.DataFrame:
        """Return the LRU curve: one row per group and capacity, from k experts per layer to N."""
        s, spec, rows = self.state, self.spec, []
        capacities = spec.experts(self.meta)
        for r, groups in output_groups(self.meta, spec, self.cells, s):
            enough = np.array([r.requests >= MIN_REQUESTS] * len(capacities))
            accesses, hits = r.total(s.counts.sum(axis=2)), r.total(s.hits["lru"])
            for group, layers in groups:
                of_all = accesses[:, layers].sum(axis=1)
                with np.errstate(invalid="ignore", divide="ignore"):
                    rate = hits[:, :, layers].sum(axis=2) / of_all[:, None]
                columns = interval_columns("hit_rate", jackknife(rate).where(enough))
                columns["share"] = np.diff(rate[0], prepend=0.0)
                fixed = {**group, "scope": spec.scope, "start": spec.start, "batch_size": spec.batch_size}
                rows += [
                    fixed
                    | {"capacity": round(capacity), "accesses": int(of_all[0])}
                    | {name: value[g].item() for name, value in columns.items()}
                    for g, capacity in enumerate(capacities)
                ]
        return result_frame(spec, "reuse", rows)

    def _static(self) -> NDArray[np.float64]:
        """Return the hits of a hot list, ``[C, G, L]``, each cell's by a list of what all other cells used most.

        NaN where there is only one cell: nothing is left to learn from.
        """
        counts, n = self.state.counts, self.meta.num_experts
        cells, layers = counts.shape[:2]
        out = np.full((cells, len(self._budgets), layers), np.nan)
        total = counts.sum(axis=0)
        for cell, own in enumerate(counts):
            train = total - own
            if not train.any():
                continue
            if self.spec.scope == "layer":
                order = np.argsort(-train, axis=1, kind="stable")
                curve = np.concatenate(
                    [np.zeros((layers, 1)), np.take_along_axis(own, order, 1).cumsum(axis=1)], axis=1
                )
                for g, most in enumerate(np.minimum(self._budgets // self._costs, n)):
                    out[cell, g] = curve[np.arange(layers), most]
                continue
            # Of one cache for all the most uses for its size, as much as fits.
            order = np.argsort(-(train / self._costs[:, None]).reshape(-1), kind="stable")
            size = np.repeat(self._costs, n)[order].cumsum()
            for g, [budget] in enumerate(self._budgets):
                taken = order[: np.searchsorted(size, budget, side="right")]
                out[cell, g] = np.bincount(taken // n, own.reshape(-1)[taken], minlength=layers)
        return out


def _units(requests: pl.DataFrame, spec: CacheSpec) -> tuple[NDArray[np.int64], pl.DataFrame]:
    """Return the number of each request's unit (-1: none), and for each unit the row of its first request.

    A unit is what one cache serves at a time: a request, or so many, one after the other in the trace (and of the same
    label where labels are told apart). What is left over is no batch.

    Raises
    ------
    UnsupportedError
        There are not enough requests for one batch.
    """
    active = np.flatnonzero(phase_tokens(requests, spec.phase) > 0)
    size = spec.batch_size
    if size == 1:
        unit = np.full(requests.height, -1, np.int64)
        unit[active] = active
        return unit, requests
    keys = requests["label"].fill_null("").to_numpy() if spec.by == "label" else np.zeros(requests.height)
    groups = [members for key in dict.fromkeys(keys[active]) if len(members := active[keys[active] == key]) >= size]
    chosen = [some[i : i + size] for some in groups for i in range(0, len(some) - size + 1, size)]
    if not chosen:
        under = " of one label" if spec.by == "label" else ""
        raise UnsupportedError(
            f"a batch of {size} requests{under}: there are {len(active)} with {spec.phase} tokens",
            remedy="Ask for a smaller batch size",
        )
    chosen.sort(key=lambda members: int(members[0]))
    unit = np.full(requests.height, -1, np.int64)
    for number, members in enumerate(chosen):
        unit[members] = number
    return unit, requests[[int(members[0]) for members in chosen]]
