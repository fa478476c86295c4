"""The state of every metric: sums and counts that are accumulated block by block, merged, and finalised.

A state has a fixed size, whatever the length of the trace. Requests are assigned to *cells*; a cell is one jackknife
group of one output group, so that leaving out a group is a subtraction.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UnsupportedError, UsageError
from tracekit.execution import check_state
from tracekit.schema import GROUPINGS, PHASES, By, Phase, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.batches import DistinctBatches
    from tracekit.store import Block, Columns

MAX_GROUPS = 200
"""Jackknife groups at most; of more requests than that, each goes where a hash of its id says."""

MIN_REQUESTS = 5
"""Requests below which there is no interval."""

ROUGH_REQUESTS = 30
"""Requests below which an interval is rough."""

_NO_LABEL = "(none)"


@dataclass(frozen=True, slots=True)
class Spec:
    """What one pass over the routing measures."""

    phase: Phase
    """Which rows count; windows and pairs never cross the border between prefill and decode."""
    max_window: int = 1
    """T: window lengths 1 .. T."""
    max_lag: int = 0
    """D: lags 1 .. D."""
    overlapping: bool = True
    """Sliding windows, or starts 0, T, 2T, … with the tail dropped."""
    batches: bool = False
    """Whether batch sizes above 1 will be asked for (needs a count per expert and window length)."""
    distinct_batch: int = 0
    """Largest batch of distinct requests that will be asked for; 0: none."""
    by: By | None = None
    intervals: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UsageError(f"phase {self.phase!r}", expected="one of " + ", ".join(PHASES))
        if self.by not in (None, *GROUPINGS):
            raise UsageError(f"by {self.by!r}", expected="one of " + ", ".join(GROUPINGS))
        for name in ("max_window", "max_lag", "distinct_batch", "seed"):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise UsageError(f"{name} = {getattr(self, name)!r}", expected="a whole number") from None
        if self.max_window < 1:
            raise UsageError(f"a longest window of {self.max_window} tokens", expected="at least 1")
        if self.max_lag < 0:
            raise UsageError(f"a largest lag of {self.max_lag}", expected="at least 1")


@dataclass(frozen=True, slots=True)
class Cells:
    """Which rows of the state each request adds to, and what those rows stand for."""

    groups: tuple[str | None, ...]
    """Output groups: labels, request ids, or one None."""
    group_requests: tuple[int, ...]
    """Requests of each output group."""
    labels: tuple[str, ...]
    """Distinct labels; empty where no request has one."""
    cell: NDArray[np.int64]
    """``[requests]``: cell of each request, -1 where it has no rows of the phase."""
    count_cell: NDArray[np.int64]
    """``[requests]``: count cell of each request."""
    cell_group: NDArray[np.int64]
    """``[cells]``: output group."""
    count_cell_of: NDArray[np.int64]
    """``[count cells]``: the cell that its requests belong to, -1 where they belong to several."""
    count_label: NDArray[np.int64]
    """``[count cells]``: index into ``labels``, -1 without labels."""

    @classmethod
    def assign(cls, requests: pl.DataFrame, spec: Spec, jackknife_groups: Mapping[str, int] | None = None) -> Cells:
        """Assign requests to cells.

        Parameters
        ----------
        requests
            The trace's requests in order: ``request_id``, ``label``, ``decode_start``, ``n_tokens``, ``n_decode``.
        jackknife_groups
            The jackknife group 0 .. G - 1 of each request id, where two traces are to leave out the same requests
            together; the trace is then these requests alone. Default: dealt out by :func:`deal`.
        """
        ids = requests["request_id"].to_list()
        raw = requests["label"].to_list()
        labelled = any(label is not None for label in raw)
        names = [_NO_LABEL if label is None else label for label in raw]
        labels = tuple(sorted(set(names))) if labelled else ()
        label_index = {name: i for i, name in enumerate(labels)}
        label_of = np.array([label_index[n] if labelled else -1 for n in names], np.int64)
        active = phase_tokens(requests, spec.phase) > 0
        if jackknife_groups is not None:
            active &= np.array([i in jackknife_groups for i in ids], bool)

        if spec.by == "label":
            if not labelled:
                found = "no request of this trace has a label"
                raise UnsupportedError(found, remedy="Ingest it with --label or --label-fields")
            keys: list[str | None] = list(names)
        elif spec.by == "request":
            keys = list(ids)
        else:
            keys = [None] * len(ids)
        groups = tuple(dict.fromkeys(key for key, here in zip(keys, active, strict=True) if here))
        if spec.by == "label":
            groups = tuple(sorted(groups, key=str))
        group_index = {key: i for i, key in enumerate(groups)}
        group_of = np.array([group_index.get(key, -1) for key in keys], np.int64)
        sizes = np.bincount(group_of[active], minlength=len(groups))

        jackknife = np.zeros(len(ids), np.int64)
        if spec.intervals and spec.by != "request":
            for g in range(len(groups)):
                members = np.flatnonzero(active & (group_of == g))
                dealt = deal([ids[i] for i in members], spec.seed) if jackknife_groups is None else jackknife_groups
                jackknife[members] = [dealt[ids[i]] for i in members]
        cell, cell_keys = _index(np.stack([group_of, jackknife], axis=1), active)
        # With one output group a request, counts are needed by label only: popularity is the whole trace's.
        fine = np.zeros_like(cell) if spec.by == "request" else cell
        count_cell, count_keys = _index(np.stack([fine, label_of], axis=1), active)
        return cls(
            groups=groups,
            group_requests=tuple(int(s) for s in sizes),
            labels=labels,
            cell=cell,
            count_cell=count_cell,
            cell_group=cell_keys[:, 0],
            count_cell_of=np.full(len(count_keys), -1) if spec.by == "request" else count_keys[:, 0],
            count_label=count_keys[:, 1],
        )


def phase_tokens(requests: pl.DataFrame, phase: Phase) -> NDArray[np.int64]:
    """Return the tokens that each request has in a phase; 0 where its phase is not known."""
    tokens = requests["n_tokens"].to_numpy().astype(np.int64)
    if phase == "all":
        return tokens
    decode = requests["n_decode"].cast(int).fill_null(-1).to_numpy().astype(np.int64)
    counted = decode if phase == "decode" else tokens - decode
    return np.where(decode < 0, 0, counted)


def resolve_phase(requests: pl.DataFrame, phase: Phase | None) -> Phase:
    """Return the phase to measure: the one asked for, else decode where the trace knows it, else what there is.

    Raises
    ------
    UnsupportedError
        The trace has no rows of the phase asked for, or does not know its phases.
    """
    if phase == "all":
        return phase
    if phase is not None and phase not in PHASES:
        raise UsageError(f"phase {phase!r}", expected="one of " + ", ".join(PHASES))
    known = requests["n_decode"].null_count() < requests.height
    has = {p: known and bool((phase_tokens(requests, p) > 0).any()) for p in ("decode", "prefill")}
    if phase is None:
        return "decode" if has["decode"] else "prefill" if has["prefill"] else "all"
    if not has[phase]:
        unknown = "the trace does not say which rows are prompt and which decode"
        reason = f"no {phase} tokens in this trace" if known else unknown
        raise UnsupportedError(reason, remedy="Use --phase all, or ingest it again with a prompt length or --phase")
    return phase


def caveats(requests: pl.DataFrame, spec: Spec) -> list[str]:
    """Return what the reader of a result should know about it, in sentences."""
    notes = []
    unknown = requests["n_decode"].null_count()
    if spec.phase != "all" and unknown:
        notes.append(f"{unknown} of {requests.height} requests do not say which rows are decode: left out")
    sizes = Cells.assign(requests, spec).group_requests
    if spec.intervals and spec.by != "request" and sizes:
        under = " under some labels" if spec.by == "label" else ""
        if min(sizes) < MIN_REQUESTS:
            notes.append(f"no interval with fewer than {MIN_REQUESTS} requests: there are {min(sizes)}{under}")
        elif min(sizes) < ROUGH_REQUESTS:
            few = f"fewer than {ROUGH_REQUESTS} requests"
            notes.append(f"intervals are rough with {few}: there are {min(sizes)}{under}")
    return notes


def deal(request_ids: Sequence[str], seed: int) -> dict[str, int]:
    """Deal requests out to jackknife groups 0 .. G - 1: one each up to ``MAX_GROUPS``, else by a hash of seed and id.

    Requests that are together stay together when others are added. G counts the groups that got some: about 127 with
    201 requests, 173 with 400, and all 200 with 2,000.
    """
    ids = list(request_ids)
    if len(ids) <= MAX_GROUPS:
        return {request_id: i for i, request_id in enumerate(ids)}
    hashes = (hashlib.blake2b(f"{seed}:{i}".encode(), digest_size=8).digest() for i in ids)
    _, group = np.unique([int.from_bytes(h, "big") % MAX_GROUPS for h in hashes], return_inverse=True)
    return dict(zip(ids, group.tolist(), strict=True))


def _index(keys: NDArray[np.int64], active: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of each row's key among the distinct active ones (-1 where inactive), and those keys."""
    index = np.full(len(keys), -1, np.int64)
    distinct, inverse = np.unique(keys[active], axis=0, return_inverse=True)
    index[active] = inverse.reshape(-1)
    return index, distinct.reshape(-1, keys.shape[1])


@dataclass(slots=True)
class State:
    """Sums and counts over the requests of each cell. C cells, L layers, T window lengths, D lags."""

    n_windows: NDArray[np.int64]
    """``[C, L, T]`` windows."""
    union_sum: NDArray[np.int64]
    """``[C, L, T]`` unique experts, summed over windows."""
    request_union_sum: NDArray[np.float64]
    """``[C, L, T]`` the same, expected under a shuffle of each request's tokens."""
    n_pairs: NDArray[np.int64]
    """``[C, L, D]`` pairs of tokens at each lag."""
    overlap_counts: NDArray[np.int64]
    """``[C, L, D, k]`` pairs that share exactly v + 1 experts."""
    rank0_repeats: NDArray[np.int64]
    """``[C, L, D]`` pairs with the same rank-0 expert; ``[C, L, 0]`` unless the trace keeps router order."""
    request_overlap_sum: NDArray[np.float64]
    """``[C, L, D]`` shared experts over k, expected under a shuffle and summed over pairs."""
    counts: NDArray[np.int64]
    """``[count cells, L, N]`` tokens that chose each expert."""
    label_windows: NDArray[np.int64]
    """``[count cells, L, T]`` windows."""
    expert_windows: NDArray[np.int64]
    """``[C, L, T, N]`` windows that contain each expert, or of length 0."""
    request_expert_windows: NDArray[np.float64]
    """The same, expected under a shuffle."""

    @classmethod
    def empty(cls, meta: TraceMeta, spec: Spec, cells: Cells) -> State:
        """Return a state with nothing accumulated.

        Raises
        ------
        UsageError
            The state would need more memory than it may take, by default 4 GiB.
        """
        c, cc, n_layers = len(cells.cell_group), len(cells.count_label), len(meta.layers)
        windows, lags = (c, n_layers, spec.max_window), (c, n_layers, spec.max_lag)
        per_expert = (c if spec.batches and spec.by != "request" else 0, n_layers, spec.max_window, meta.num_experts)
        size = 8 * (
            3 * np.prod(windows, dtype=float)
            + 16 * float(spec.max_window) ** 2  # the kernels' scratch
            + (4 + meta.top_k) * np.prod(lags, dtype=float)
            + cc * n_layers * float(meta.num_experts + spec.max_window)
            + 2 * np.prod(per_expert, dtype=float)
        )
        remedy = "Lower --max-window or --max-lag, leave out batch sizes above 1, or use --no-intervals"
        check_state(size, "these metrics need", remedy)
        return cls(
            n_windows=np.zeros(windows, np.int64),
            union_sum=np.zeros(windows, np.int64),
            request_union_sum=np.zeros(windows),
            n_pairs=np.zeros(lags, np.int64),
            overlap_counts=np.zeros((*lags, meta.top_k), np.int64),
            rank0_repeats=np.zeros(lags if meta.router_order else (*lags[:2], 0), np.int64),
            request_overlap_sum=np.zeros(lags),
            counts=np.zeros((cc, n_layers, meta.num_experts), np.int64),
            label_windows=np.zeros((cc, n_layers, spec.max_window), np.int64),
            expert_windows=np.zeros(per_expert, np.int64),
            request_expert_windows=np.zeros(per_expert),
        )

    def merge(self, other: State) -> None:
        """Add another state of the same shape to this one."""
        for field in fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))


@dataclass(slots=True)
class Sums:
    """What a pass over some of a trace's rows adds up to; passes over other rows of the same trace are merged."""

    cells: Cells
    state: State
    longest_run: NDArray[np.int64]
    """``[requests]`` tokens of each request's longest run: with fewer it has no window of that length."""
    distinct: DistinctBatches | None
    """Batches of distinct requests, where they are wanted."""

    def merge(self, other: Sums) -> None:
        """Add those of other rows: counts are exact in any order, expectations but for rounding.

        Raises
        ------
        UsageError
            Batches of distinct requests are wanted, whose recursion takes the requests one by one.
        """
        if self.distinct or other.distinct:
            raise UsageError("batches of distinct requests", expected="one pass: they cannot be merged")
        self.state.merge(other.state)
        np.maximum(self.longest_run, other.longest_run, out=self.longest_run)


def accumulate(
    meta: TraceMeta,
    requests: pl.DataFrame,
    spec: Spec,
    columns: Iterable[Columns],
    threads: int,
    jackknife_groups: Mapping[str, int] | None = None,
) -> Sums:
    """Read routing rows once and return their sums.

    Parameters
    ----------
    requests
        All of the trace's requests in order, whichever of them the rows belong to.
    columns
        The rows: a request's rows of one layer must be in one piece.
    jackknife_groups
        See :meth:`Cells.assign`.
    """
    with Accumulator(meta, spec, requests, threads, jackknife_groups) as accumulator:
        for piece in columns:
            accumulator.add(piece)
    return accumulator.sums


class Accumulator:
    """Adds blocks of routing rows to a state, layers in parallel."""

    def __init__(
        self,
        meta: TraceMeta,
        spec: Spec,
        requests: pl.DataFrame,
        threads: int,
        jackknife_groups: Mapping[str, int] | None = None,
    ) -> None:
        from tracekit.metrics import batches, kernels

        self.meta, self.spec = meta, spec
        self.cells = Cells.assign(requests, spec, jackknife_groups)
        self.state = State.empty(meta, spec, self.cells)
        self.longest_run = np.zeros(requests.height, np.int64)
        self.distinct = batches.DistinctBatches(meta, spec, self.cells) if spec.distinct_batch else None
        self._cut = PhaseRuns(requests, spec.phase, self.cells)
        self._layer_index = layer_index(meta)
        self._scan = kernels.scan
        self._bits = kernels.word_bits(spec.max_lag, spec.max_window)
        threads = max(1, min(threads, len(meta.layers)))
        # Tasks own disjoint layers, so they write disjoint parts of the one state; several a thread even out.
        self._tasks = [Lock() for _ in range(min(len(meta.layers), 4 * threads) if threads > 1 else 1)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tracekit-scan")
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Finish the block that is being accumulated and stop the threads."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        running, self._running = self._running, []
        for future in running:
            future.result()

    @property
    def sums(self) -> Sums:
        """Return what has been added, once the accumulator is closed."""
        return Sums(self.cells, self.state, self.longest_run, self.distinct)

    def add(self, block: Columns) -> None:
        """Accumulate one block; returns while it is being worked on, but not before the one before it is done."""
        request, layer, start, length, part = self._cut(block)
        if not len(request):
            return
        np.maximum.at(self.longest_run, request, length)
        first, unit_runs = together(request, layer, part)
        layers = self._layer_index[layer[first]]
        units = np.stack([layers, self.cells.cell[request[first]], self.cells.count_cell[request[first]]], axis=1)
        state = [getattr(self.state, field.name) for field in fields(self.state)]

        task_of = layers * len(self._tasks) // len(self.meta.layers)
        task_of_run = task_of.repeat(unit_runs[:, 1] - unit_runs[:, 0]) if self.distinct else task_of

        def work(task: int) -> None:
            mine = task_of == task
            with self._tasks[task]:  # the block before may still be at these layers
                self._scan(
                    block.addresses(),
                    block.scratch(length),
                    np.ascontiguousarray(units[mine]),
                    np.ascontiguousarray(unit_runs[mine]),
                    start,
                    length,
                    self._bits,
                    self.spec.overlapping,
                    *state,
                )
                if self.distinct:
                    mine = task_of_run == task
                    runs = request[mine], self._layer_index[layer[mine]], start[mine], length[mine]
                    self.distinct.add(block, *runs)

        running = [self._pool.submit(work, task) for task in range(len(self._tasks))]
        self._wait()
        self._running = running


def layer_index(meta: TraceMeta) -> NDArray[np.int64]:
    """Return the place of each layer number on the layer axis, -1 where there is no such MoE layer."""
    index = np.full(max(meta.layers) + 1, -1, np.int64)
    index[list(meta.layers)] = np.arange(len(meta.layers))
    return index


class PhaseRuns:
    """Cuts the runs of blocks at the prompt's end and keeps those of one phase, of requests that have a cell."""

    def __init__(self, requests: pl.DataFrame, phase: Phase, cells: Cells) -> None:
        self._decode_start = requests["decode_start"].cast(int).fill_null(-1).to_numpy().astype(np.int64)
        self._phase, self._cell = phase, cells.cell

    def __call__(self, block: Block | Columns) -> tuple[NDArray[np.int64], ...]:
        """Return request, layer, start, n and part of each run, ordered by request, layer, part, position."""
        runs = block.runs
        request, layer, row, pos, n = (runs[c] for c in ("request", "layer", "row", "pos", "n"))
        border = self._decode_start[request]
        known = border >= 0
        before = np.where(known, np.clip(border - pos, 0, n), n if self._phase == "all" else 0)
        after = np.where(known, n - before, 0)
        pieces: list[tuple[NDArray[Any], ...]] = []
        if self._phase in ("prefill", "all"):
            pieces.append((request, layer, row, before, np.zeros_like(n), pos))
        if self._phase in ("decode", "all"):
            pieces.append((request, layer, row + before, after, np.ones_like(n), pos))
        joined = [np.concatenate(columns) for columns in zip(*pieces, strict=True)]
        keep = (joined[3] > 0) & (self._cell[joined[0]] >= 0)
        if not keep.all():
            joined = [column[keep] for column in joined]
        if len(pieces) > 1:  # else they are as the block's runs are
            order = np.lexsort((joined[5], joined[4], joined[1], joined[0]))
            joined = [column[order] for column in joined]
        return tuple(joined[:5])


def together(*keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each stretch of equal keys begins, and ``[stretches, 2]`` its begin and end."""
    changed = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    first = np.concatenate([[0], np.flatnonzero(changed) + 1])
    return first, np.stack([first, np.append(first[1:], len(keys[0]))], axis=1)
