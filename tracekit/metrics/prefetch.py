"""Prefetch: how well experts are foretold, by any predictor and for any number m of experts that are fetched.

Two kinds of predictors are judged alike. Those that rank by *tables* of a trace's ids are learned from all requests but
the one that is judged, whose counts are taken out of the tables meanwhile: what is learned is never judged by itself.
*Recorded* ones are predictions that lie in the trace beside the routing.

Recall@m is |predicted ∩ routed| / k. Intervals are over whole requests, with the tables as they were learned.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UsageError
from tracekit.execution import check_state
from tracekit.metrics.replicates import Replicates
from tracekit.metrics.state import Cells, PhaseRuns, Spec, layer_index, together
from tracekit.schema import TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block

Ints = NDArray[np.int64]

PREVIOUS = "previous_token"
TABLES = ("hot_list", "transition", "token_id", "token_id+transition")
"""Predictors that are learned, in the order of the kernel's kinds."""
BUILT_IN = (PREVIOUS, *TABLES)
BY_LAYER = ("transition", "token_id+transition")
"""Built-in predictors that look from one layer to another; the others know before the token's first layer."""
BY_TOKEN = ("token_id", "token_id+transition")
"""Built-in predictors that look at the token itself."""

MAX_WORDS_BYTES = 1 << 30
"""Memory for the table by token id; the ids that occur most are in it."""


@dataclass(frozen=True, slots=True)
class PrefetchSpec(Spec):
    """What one pass judges."""

    predictors: tuple[tuple[str, int | None], ...] = ((PREVIOUS, None),)
    """Name, and MoE layers between where the prediction is made and the layer that it is about; None: known before the
    token's first layer."""
    recorded: tuple[tuple[str, int, int], ...] = ()
    """Predictors that the trace holds: name, distance, experts named."""
    m: tuple[int, ...] = (1,)
    """Experts that are fetched, ascending."""
    weights: bool = False
    """Whether the trace has router weights."""
    sizes: tuple[int, ...] = ()
    """Bytes of one expert of each MoE layer; empty where they are not known."""


@dataclass(slots=True)
class PrefetchState:
    """Sums over the judged tokens of each cell. P predictors, C cells, L layers, M the most experts fetched."""

    n: Ints
    """``[P, C, L]`` tokens."""
    weighed: Ints
    """``[P, C, L]`` those of them that have router weights."""
    sizes: Ints
    """``[P, C, L, M + 1]`` tokens for which so many experts were named, or M and more."""
    found: Ints
    """``[P, C, L, M]`` routed experts that the predictor ranks here, from 0."""
    deepest: Ints
    """``[P, C, L, M]`` tokens whose worst ranked expert is ranked here."""
    aligned: Ints
    """``[P, C, L, k]`` tokens whose expert of router rank r is ranked r by the predictor."""
    mass: NDArray[np.float64]
    """``[P, C, L, M]`` share of the token's router weight on the expert that is ranked here."""

    @classmethod
    def empty(cls, meta: TraceMeta, spec: PrefetchSpec, cells: Cells) -> PrefetchState:
        """Return a state with nothing accumulated.

        Raises
        ------
        UsageError
            The state would need more memory than it may take, by default 4 GiB.
        """
        predictors = len(spec.predictors) + len(spec.recorded)
        shape, most = (predictors, len(cells.cell_group), len(meta.layers)), max(spec.m)
        size = 8.0 * math.prod(shape) * (4 * most + meta.top_k + 3)
        check_state(size, "these predictors need", "Ask for fewer predictors or experts, or use --no-intervals")
        return cls(
            n=np.zeros(shape, np.int64),
            weighed=np.zeros(shape, np.int64),
            sizes=np.zeros((*shape, most + 1), np.int64),
            found=np.zeros((*shape, most), np.int64),
            deepest=np.zeros((*shape, most), np.int64),
            aligned=np.zeros((*shape, meta.top_k), np.int64),
            mass=np.zeros((*shape, most)),
        )

    def merge(self, other: PrefetchState) -> None:
        """Add another state of the same shape to this one."""
        for field in fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))


@dataclass(slots=True)
class Rows:
    """Routing rows of one block as the kernels take them; see :func:`count_tables` for the arrays."""

    ids: NDArray[Any]
    weights: NDArray[np.float32]
    request: Ints
    """``[U]`` of each unit."""
    units: Ints
    start: Ints
    length: Ints
    pos: Ints
    """``[R]`` position of each run's first token."""
    source: Ints
    token: Ints


class Aligned:
    """Cuts blocks into (request, layer) units and finds the same tokens in the layers before.

    A request that is longer than a block is split between layers: its last layers are kept until the next block.

    Parameters
    ----------
    distances
        D distances in MoE layers.
    """

    def __init__(
        self, meta: TraceMeta, cells: Cells, cut: PhaseRuns, distances: tuple[int, ...], words: Words | None
    ) -> None:
        self._meta, self._cells, self._cut, self._distances, self._words = meta, cells, cut, distances, words
        self._layer_index = layer_index(meta)
        self._kept: tuple[Ints, Ints, Ints, Ints, NDArray[Any]] | None = None
        """Request, layer index, length and position of the runs that are kept, and their columns."""

    def __call__(self, block: Block) -> Rows | None:
        """Return the rows of the phase, None where there are none."""
        request, layer, start, length, _ = self._cut(block)
        if not len(request):
            return None
        layer = self._layer_index[layer]
        of = np.searchsorted(block.runs["row"], start, "right") - 1
        pos = block.runs["pos"][of] + start - block.runs["row"][of]
        ids, weights = block.ids, block.weights
        judged = np.ones(len(request), bool)
        if self._kept is not None and self._kept[0][0] == request[0]:
            before = self._kept[4].shape[1]
            ids = np.concatenate([self._kept[4], ids], axis=1)
            if weights is not None:
                weights = np.concatenate([np.full((len(weights), before), np.nan, np.float32), weights], axis=1)
            lengths = self._kept[2]
            start = np.concatenate([np.cumsum(lengths) - lengths, start + before])
            joined = zip(self._kept[:4], (request, layer, length, pos), strict=True)
            judged = np.concatenate([np.zeros(len(lengths), bool), judged])
            request, layer, length, pos = (np.concatenate(pair) for pair in joined)
        if max(self._distances, default=0):
            self._keep(ids, request, layer, start, length, pos)
        first, unit_runs = together(request, layer)
        units = np.stack([layer[first], self._cells.cell[request[first]], *unit_runs.T], axis=1)
        source = self._sources(request[first], units, start)
        token = np.full(len(start), -1) if self._words is None else self._words.find(request, pos, length)
        mine = judged[first]
        none = np.empty((ids.shape[0], 0), np.float32)
        arrays = units[mine], start, length, pos, source, token
        return Rows(ids, none if weights is None else weights, request[first][mine], *arrays)

    def _keep(self, ids: NDArray[Any], request: Ints, layer: Ints, start: Ints, length: Ints, pos: Ints) -> None:
        """Keep the last layers of a request that goes on in the next block."""
        self._kept = None
        if layer[-1] < len(self._meta.layers) - 1:
            there = np.flatnonzero((request == request[-1]) & (layer > layer[-1] - max(self._distances)))
            columns = np.concatenate([np.arange(start[i], start[i] + length[i]) for i in there])
            self._kept = request[there], layer[there], length[there], pos[there], ids[:, columns]

    def _sources(self, request: Ints, units: Ints, start: Ints) -> Ints:
        """Return where each run begins in the layers before, ``[D, R]``, -1 where there is no such layer."""
        layers = len(self._meta.layers)
        key, runs = request * layers + units[:, 0], units[:, 3] - units[:, 2]
        source = np.full((len(self._distances), len(start)), -1)
        unit_of = np.repeat(np.arange(len(units)), runs)
        for d, distance in enumerate(self._distances):
            at = np.minimum(np.searchsorted(key, key - distance), len(key) - 1)
            # Every layer of a request has the same runs.
            there = (units[:, 0] >= distance) & (key[at] == key - distance) & (runs[at] == runs)
            shifted = units[at, 2][unit_of] + np.arange(len(start)) - units[unit_of, 2]
            source[d] = np.where(there[unit_of], start[np.where(there[unit_of], shifted, 0)], -1)
        return source


class Words:
    """Token ids of a trace, as rows of a table of those that occur most.

    Parameters
    ----------
    tokens
        ``request``, ``pos``, ``token_id``, ordered by request and position.
    most
        Rows that the table may have. An id of a single request is in none: no other request has learned it.
    """

    def __init__(self, tokens: pl.DataFrame, most: int) -> None:
        import polars as pl

        self._key = (tokens["request"].cast(pl.Int64) * (1 << 32) + tokens["pos"].cast(pl.Int64)).to_numpy()
        requests = pl.col("request").n_unique()
        table = (
            tokens.group_by("token_id")
            .agg(pl.len().alias("n"), requests.alias("requests"))
            .filter(pl.col("requests") > 1)
            .sort(["n", "token_id"], descending=[True, False])
            .head(most)
            .select("token_id", pl.int_range(pl.len(), dtype=pl.Int32).alias("row"))
        )
        self.size = table.height
        rows = tokens.select("token_id").join(table, on="token_id", how="left", maintain_order="left")["row"]
        self.row = rows.fill_null(-1).to_numpy()
        """``[tokens]`` int32: row of each token's id, -1 where it has none."""

    def find(self, request: Ints, pos: Ints, length: Ints) -> Ints:
        """Return where the tokens of each run begin in ``row``, -1 where they are not known."""
        if not len(self._key):
            return np.full(len(request), -1)
        first = request * (1 << 32) + pos
        at = np.searchsorted(self._key, first)
        end = np.minimum(at + length, len(self._key)) - 1
        there = self._key[np.minimum(at, len(self._key) - 1)] == first
        return np.where(there & (self._key[end] == first + length - 1), at, -1)


class Recorded:
    """The predictions of a trace, taken in step with its routing."""

    def __init__(self, meta: TraceMeta, frames: Iterator[pl.DataFrame]) -> None:
        self._meta, self._frames = meta, frames
        self._layer_index = layer_index(meta)
        self._held: list[pl.DataFrame] = []

    def take(self, first: int, last: int) -> pl.DataFrame | None:
        """Return the predictions about some consecutive requests; those about earlier ones are forgotten."""
        import polars as pl

        self._held = [frame for frame in self._held if frame["request"][-1] >= first]
        while not self._held or self._held[-1]["request"][-1] <= last:
            frame = next(self._frames, None)
            if frame is None:
                break
            if frame.height and frame["request"][-1] >= first:
                self._held.append(frame)
        if not self._held:
            return None
        # A later ingest may have named more experts: null where there are none.
        return pl.concat(self._held, how="diagonal").filter(pl.col("request").is_between(first, last))

    def of(self, frame: pl.DataFrame, name: str, distance: int, rows: Rows) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """Return the rows of each unit, ``[U, 2]``, and the positions and experts of one predictor's predictions."""
        import polars as pl

        mine = frame.filter(predictor=name, distance=distance)
        layers = len(self._meta.layers)
        layer = self._layer_index[mine["layer"].to_numpy().astype(np.int64)]
        key = mine["request"].to_numpy().astype(np.int64) * layers + layer
        unit = rows.request * layers + rows.units[:, 0]
        between = np.stack([np.searchsorted(key, unit), np.searchsorted(key, unit, "right")], axis=1)
        experts = [column for column in mine.columns if column[0] == "p" and column[1:].isdigit()]
        named = np.array([mine[c].cast(pl.Int32).fill_null(-1).to_numpy() for c in experts], np.int32)
        return between, mine["pos"].to_numpy().astype(np.int64), named.reshape(len(experts), len(key))


class Prefetch:
    """What predictors foretell of a trace: one pass to learn the tables, where there are some, and one to judge."""

    def __init__(
        self,
        meta: TraceMeta,
        requests: pl.DataFrame,
        spec: PrefetchSpec,
        blocks: Callable[[], Iterable[Block]],
        threads: int,
        tokens: pl.DataFrame | None = None,
        predictions: Iterable[pl.DataFrame] = (),
    ) -> None:
        """Read the routing.

        Parameters
        ----------
        requests
            The trace's requests in order.
        blocks
            Reads the routing, with its weights if the spec wants them.
        tokens
            ``request``, ``pos``, ``token_id`` in order, for predictors by token id.
        predictions
            What the trace recorded of ``spec.recorded``, ordered by request.
        """
        from tracekit.metrics import prefetch_kernel as kernel

        self.meta, self.spec = meta, spec
        self.cells = Cells.assign(requests, spec)
        self.state = PrefetchState.empty(meta, spec, self.cells)
        self._distances = tuple(sorted({d for _, d in spec.predictors if d is not None}))
        row_bytes = 4 * len(meta.layers) * meta.num_experts
        words = None if tokens is None else Words(tokens, max(1, MAX_WORDS_BYTES // row_bytes))
        self._row = np.empty(0, np.int32) if words is None else words.row
        self._cut = PhaseRuns(requests, spec.phase, self.cells)
        self._kernel, self._words = kernel, words
        self._tasks = max(1, min(threads, len(meta.layers)))
        plan = [
            (TABLES.index(name), 0 if d is None else self._distances.index(d), p)
            for p, (name, d) in enumerate(spec.predictors)
            if name in TABLES
        ]
        self._plan = np.array(plan, np.int64).reshape(-1, 3)
        self._tables = self._empty_tables()
        self._recorded = Recorded(meta, iter(predictions)) if spec.recorded else None
        with ThreadPoolExecutor(self._tasks, thread_name_prefix="tracekit-prefetch") as pool:
            if plan:
                self._each(pool, blocks(), judging=False)
            self._each(pool, blocks(), judging=True)

    def _empty_tables(self) -> list[NDArray[np.int32]]:
        layers, n = (len(self.meta.layers), self.meta.num_experts) if len(self._plan) else (0, 0)
        d, v = len(self._distances), 0 if self._words is None else self._words.size
        shapes = [(layers, n), (d, layers, n), (d, layers, n, n), (layers, v, n)]
        size = 4.0 * sum(math.prod(shape) for shape in shapes)
        check_state(size, "the tables of these predictors need", "Ask for fewer distances")
        return [np.zeros(shape, np.int32) for shape in shapes]

    def _each(self, pool: ThreadPoolExecutor, blocks: Iterable[Block], judging: bool) -> None:
        aligned = Aligned(self.meta, self.cells, self._cut, self._distances, self._words)
        for block in blocks:
            rows = aligned(block)
            if rows is None or not len(rows.units):
                continue
            # Tasks own disjoint layers, so they write disjoint parts of the tables and of the state.
            task_of = rows.units[:, 0] * self._tasks // len(self.meta.layers)
            mine = [task_of == task for task in range(self._tasks)]
            if judging:
                predicted = self._predicted(rows)
                list(pool.map(self._judge, repeat(rows), mine, repeat(predicted)))
            else:
                list(pool.map(self._count, repeat(rows), mine))

    def _count(self, rows: Rows, here: NDArray[np.bool_]) -> None:
        units = np.ascontiguousarray(rows.units[here])
        runs = rows.start, rows.length, rows.source, rows.token, self._row
        self._kernel.count_tables(rows.ids, units, *runs, 1, *self._tables)

    def _predicted(self, rows: Rows) -> list[tuple[Ints, Ints, NDArray[np.int32]]]:
        """Return what each recorded predictor says of these rows, see :meth:`Recorded.of`."""
        frame = self._recorded.take(int(rows.request[0]), int(rows.request[-1])) if self._recorded else None
        if self._recorded is None or frame is None:
            return []
        return [self._recorded.of(frame, name, distance, rows) for name, distance, _ in self.spec.recorded]

    def _judge(
        self, rows: Rows, here: NDArray[np.bool_], predicted: list[tuple[Ints, Ints, NDArray[np.int32]]]
    ) -> None:
        units = np.ascontiguousarray(rows.units[here])
        state = [getattr(self.state, field.name) for field in fields(self.state)]
        routed, runs = (rows.ids, rows.weights, units), (rows.start, rows.length)
        for p, (name, _) in enumerate(self.spec.predictors):
            if name == PREVIOUS:
                self._kernel.judge_previous(*routed, *runs, p, self.meta.num_experts, *state)
        if len(self._plan):
            places = rows.source, rows.token, self._row, self._plan, *self._tables
            self._kernel.judge_tables(*routed, *runs, *places, *state)
        for p, (between, pos, named) in enumerate(predicted, len(self.spec.predictors)):
            self._kernel.judge_recorded(
                *routed, *runs, rows.pos, np.ascontiguousarray(between[here]), pos, named, p, *state
            )

    def prefetch(self) -> pl.DataFrame:
        """Return how well each predictor foretells: one row per group, predictor, distance and m."""
        from tracekit.metrics.intervals import jackknife
        from tracekit.metrics.measurement import interval_columns, result_frame
        from tracekit.metrics.replicates import layer_mean, output_groups

        built_in = [(name, distance, self.meta.num_experts) for name, distance in self.spec.predictors]
        judged = [*built_in, *self.spec.recorded]
        grid = np.array(self.spec.m)
        rows: list[dict[str, Any]] = []
        for r, groups in output_groups(self.meta, self.spec, self.cells, self.state):
            measured = [self._measured(r, p, grid) for p in range(len(judged))]
            for group, layers in groups:
                for (name, distance, most), (ratios, n, fetched, wasted) in zip(judged, measured, strict=True):
                    columns: dict[str, NDArray[Any]] = {"n": np.repeat(n[layers].max(initial=0), len(grid))}
                    for column, values in ratios.items():
                        interval = jackknife(layer_mean(values, layers))
                        columns |= (
                            {column: interval.estimate}
                            if column == "rank_match"
                            else interval_columns(column, interval)
                        )
                    for column, amount in (("bytes_fetched", fetched), ("bytes_wasted", wasted)):
                        there = ~np.isnan(amount[layers, 0])
                        total = np.nansum(amount[layers], axis=0)
                        columns[column] = total if there.any() else np.full(len(grid), np.nan)
                    rows += [
                        {**group, "predictor": name, "distance": distance, "m": m}
                        | {column: value[i].item() for column, value in columns.items()}
                        for i, m in enumerate(self.spec.m)
                        if m <= most
                    ]
        return result_frame(self.spec, "prefetch", rows)

    def _measured(
        self, r: Replicates, p: int, grid: Ints
    ) -> tuple[dict[str, NDArray[np.float64]], Ints, NDArray[np.float64], NDArray[np.float64]]:
        """Return what one predictor reaches with each m of the grid, G.

        Returns
        -------
        ratios ``[replicates, L, G]``, judged tokens ``[L]``, bytes fetched and wasted per token ``[L, G]``.
        """
        s, k = self.state, self.meta.top_k
        n = np.repeat(s.n[p][..., None], len(grid), axis=-1)
        found, deepest, mass = (np.cumsum(sums[p], axis=-1)[..., grid - 1] for sums in (s.found, s.deepest, s.mass))
        named = s.sizes[p] @ np.minimum(np.arange(s.sizes.shape[-1])[:, None], grid)
        weighed = np.repeat(s.weighed[p][..., None], len(grid), axis=-1)
        aligned = np.cumsum(s.aligned[p], axis=-1)[..., np.minimum(grid, k) - 1]
        ratios = {
            "recall": r.ratio(found, n * k),
            "precision": r.ratio(found, named),
            "exact": r.ratio(deepest, n),
            "weight_covered": r.ratio(mass, weighed),
            "rank_match": r.ratio(aligned, n * k),
        }
        if not self.meta.router_order:
            ratios["rank_match"] = np.full_like(ratios["rank_match"], np.nan)
        size = np.array(self.spec.sizes or [np.nan] * len(self.meta.layers))[:, None]
        fetched, right = r.ratio(named, n)[0] * size, ratios["recall"][0] * k * size
        return ratios, r.total(s.n[p])[0], fetched, fetched - right


def check_m(meta: TraceMeta, m: int | Iterable[int] | None) -> tuple[int, ...]:
    """Return the numbers of prefetched experts, ascending; by default k, 1.5 k and 2 k.

    Raises
    ------
    UsageError
        One is not between 1 and N.
    """
    k, n = meta.top_k, meta.num_experts
    if m is None:
        return tuple(sorted({min(n, size) for size in (k, math.ceil(1.5 * k), 2 * k)}))
    grid = tuple(sorted({operator.index(size) for size in (m if isinstance(m, Iterable) else [m])}))
    if not grid or grid[0] < 1 or grid[-1] > n:
        wrong = next((size for size in grid if not 1 <= size <= n), None)
        found = "no number of experts to prefetch" if wrong is None else f"{wrong} experts prefetched per layer"
        raise UsageError(found, expected=f"1 to {n}, the model's experts per layer")
    return grid
