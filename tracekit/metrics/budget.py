"""Expert budgets: how much of a verification window's router weight a few experts carry.

MoE-Spec (McDanel et al., arXiv 2602.16052, 2026) loads no more than m experts per layer when it verifies drafts: those
that the tokens of the window weigh most together. What the others would have added is dropped. From a trace with router
weights this module says what a budget keeps, before anyone drops anything.

Each token counts the same: its weights are taken as shares of their sum, so that it does not matter whether an engine
renormalises or scales them. A router's probabilities for experts that were *not* chosen are in no trace, so the ranking
here is by the weight that was really used. Of experts of equal weight the lower id is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UnsupportedError, UsageError
from tracekit.execution import check_state
from tracekit.metrics.state import MIN_REQUESTS, Cells, PhaseRuns, Spec, layer_index
from tracekit.schema import TraceMeta
from tracekit.store.steps import StepRows

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block


@dataclass(frozen=True, slots=True)
class BudgetSpec(Spec):
    """What one pass over the routing and its weights measures; ``max_window`` is the longest of ``lengths``."""

    lengths: tuple[int, ...] = (4,)
    """Window lengths T, ascending."""
    budgets: tuple[int, ...] = (1,)
    """Experts per layer that may be loaded, ascending."""
    share: float = 0.9
    """Share of the window's router weight whose experts are counted."""
    steps: bool = False
    """Whether the windows are verification steps as they ran, and not those of consecutive tokens."""


@dataclass(slots=True)
class BudgetState:
    """Sums over the windows of each cell. C cells, L layers, W window lengths, M budgets."""

    n_windows: NDArray[np.int64]
    """``[C, L, W]`` windows whose every token has weights."""
    left_out: NDArray[np.int64]
    """``[C, L, W]`` windows with a token that has none."""
    unique: NDArray[np.int64]
    """``[C, L, W]`` unique experts, summed over windows."""
    needed: NDArray[np.int64]
    """``[C, L, W]`` the fewest experts that carry the share, summed over windows."""
    loaded: NDArray[np.int64]
    """``[C, L, W, M]`` experts loaded under the budget, summed over windows."""
    kept: NDArray[np.float64]
    """``[C, L, W, M]`` share of the window's weight that they carry, summed over windows."""
    intact: NDArray[np.int64]
    """``[C, L, W, M]`` tokens of windows all of whose experts are loaded."""

    @classmethod
    def empty(cls, meta: TraceMeta, spec: BudgetSpec, cells: Cells) -> BudgetState:
        """Return a state with nothing accumulated.

        Raises
        ------
        UsageError
            The state would need more memory than it may take, by default 4 GiB.
        """
        shape = (len(cells.cell_group), len(meta.layers), len(spec.lengths))
        full = (*shape, len(spec.budgets))
        size = 8 * (4 * np.prod(shape, dtype=float) + 3 * np.prod(full, dtype=float))
        check_state(size, "these budgets need", "Ask for fewer windows or budgets, or use --no-intervals")
        return cls(
            n_windows=np.zeros(shape, np.int64),
            left_out=np.zeros(shape, np.int64),
            unique=np.zeros(shape, np.int64),
            needed=np.zeros(shape, np.int64),
            loaded=np.zeros(full, np.int64),
            kept=np.zeros(full),
            intact=np.zeros(full, np.int64),
        )


class Budgets:
    """The sums of one pass over a trace's routing and weights."""

    def __init__(
        self,
        meta: TraceMeta,
        requests: pl.DataFrame,
        spec: BudgetSpec,
        blocks: Iterable[Block | StepRows],
        threads: int,
    ) -> None:
        """Read blocks, or the rows of steps, once, with their weights; ``requests`` are the trace's in order."""
        from tracekit.metrics.budget_kernel import scan_budgets

        self._scan = scan_budgets
        self.meta, self.spec = meta, spec
        self.cells = Cells.assign(requests, spec)
        self.state = BudgetState.empty(meta, spec, self.cells)
        self._having = np.zeros((requests.height, len(spec.lengths)), bool)
        self._cut = PhaseRuns(requests, spec.phase, self.cells)
        self._decode_start = requests["decode_start"].cast(int).fill_null(-1).to_numpy().astype(np.int64)
        self._layer_index = layer_index(meta)
        self._tasks = max(1, min(threads, len(meta.layers)))
        with ThreadPoolExecutor(self._tasks, thread_name_prefix="tracekit-budget") as pool:
            for block in blocks:
                self._add(block, pool)
        if spec.steps and not self.state.n_windows.any():
            rows = ", ".join(map(str, spec.lengths[:8])) + (", …" if len(spec.lengths) > 8 else "")
            raise UnsupportedError(f"no verification step of {rows} {spec.phase} tokens has router weights")

    def _add(self, block: Block | StepRows, pool: ThreadPoolExecutor) -> None:
        lengths = np.array(self.spec.lengths)
        if isinstance(block, StepRows):
            request, layer, start, length = self._steps(block)
            np.logical_or.at(self._having, request, length[:, None] == lengths)
        else:
            request, layer, start, length, _ = self._cut(block)
            np.logical_or.at(self._having, request, length[:, None] >= lengths)
        layers = self._layer_index[layer]
        runs = np.stack([layers, self.cells.cell[request], start, length], axis=1)
        task_of = layers * self._tasks // len(self.meta.layers)
        state = [getattr(self.state, field.name) for field in fields(self.state)]
        budgets = np.array(self.spec.budgets)
        arguments = lengths, budgets, self.spec.share, self.meta.num_experts, self.spec.steps

        def work(task: int) -> None:  # tasks own disjoint layers, so they write disjoint parts of the state
            self._scan(block.ids, block.weights, np.ascontiguousarray(runs[task_of == task]), *arguments, *state)

        list(pool.map(work, range(self._tasks)))

    def _steps(self, rows: StepRows) -> tuple[NDArray[np.int64], ...]:
        """Return request, layer, first row and rows of the steps of the phase: that of their first row."""
        first = rows.first_rows()
        request, start = rows.request[first], rows.pos[first]
        border = self._decode_start[request]
        of_phase = (border >= 0) & ((start >= border) == (self.spec.phase == "decode"))
        mine = (self.cells.cell[request] >= 0) & (of_phase | (self.spec.phase == "all"))
        length = np.diff(np.append(first, len(rows)))
        return request[mine], rows.layer[first][mine], first[mine], length[mine]

    def budget(self) -> pl.DataFrame:
        """Return what budgets keep: one row per group, window length and budget."""
        from tracekit.metrics.intervals import jackknife
        from tracekit.metrics.measurement import interval_columns, result_frame
        from tracekit.metrics.replicates import layer_mean, output_groups

        rows: list[dict[str, Any]] = []
        s = self.state
        for r, groups in output_groups(self.meta, self.spec, self.cells, s):
            mine = np.isin(self.cells.cell, r.members)
            enough = self._having[mine].sum(axis=0) >= MIN_REQUESTS
            # By layer, then averaged with equal weight: [replicates, L, W] and [replicates, L, W, M].
            of_window = {"unique": r.ratio(s.unique, s.n_windows), "experts_for_share": r.ratio(s.needed, s.n_windows)}
            windows = np.repeat(s.n_windows[..., None], len(self.spec.budgets), axis=-1)
            tokens = windows * np.array(self.spec.lengths)[:, None]
            of_budget = {"weight_kept": r.ratio(s.kept, windows), "tokens_intact": r.ratio(s.intact, tokens)}
            loaded = r.ratio(s.loaded, windows)
            totals = {"n_windows": r.total(s.n_windows)[0], "n_left_out": r.total(s.left_out)[0]}
            for group, layers in groups:
                columns: dict[str, NDArray[Any]] = {}
                for name, values in of_window.items():
                    columns |= interval_columns(name, jackknife(layer_mean(values, layers)).where(enough))
                columns |= {name: value[layers].max(axis=0) for name, value in totals.items()}
                columns = {name: np.repeat(v[:, None], len(self.spec.budgets), axis=1) for name, v in columns.items()}
                for name, values in of_budget.items():
                    interval = jackknife(layer_mean(values, layers)).where(enough[:, None])
                    columns |= interval_columns(name, interval)
                columns["loaded"] = layer_mean(loaded, layers)[0]
                columns["per_top_k"] = columns["loaded"] / self.meta.top_k
                rows += [
                    {**group, "steps": self.spec.steps, "window": length, "budget": budget, "share": self.spec.share}
                    | {name: value[w, m].item() for name, value in columns.items()}
                    for w, length in enumerate(self.spec.lengths)
                    for m, budget in enumerate(self.spec.budgets)
                ]
        return result_frame(self.spec, "budget", rows)


def spec_of(meta: TraceMeta, lengths: Iterable[int], budgets: Iterable[int] | None, share: float) -> dict[str, Any]:
    """Return checked arguments of a :class:`BudgetSpec`.

    Parameters
    ----------
    budgets
        None: k, 2 k, 3 k, … experts, up to what the longest window can use.

    Raises
    ------
    UsageError
        A length, a budget or the share is out of range.
    """
    lengths = tuple(sorted({operator.index(length) for length in lengths}))
    if lengths[0] < 1:
        raise UsageError(f"windows of {lengths[0]} tokens", expected="at least 1")
    most = min(meta.num_experts, lengths[-1] * meta.top_k)
    if budgets is None:
        budgets = {*range(meta.top_k, most, meta.top_k), most}
    budgets = tuple(sorted({operator.index(m) for m in budgets}))
    if not budgets or budgets[0] < 1 or budgets[-1] > meta.num_experts:
        wrong = next((m for m in budgets if not 1 <= m <= meta.num_experts), None)
        found = "no budget" if wrong is None else f"a budget of {wrong} experts"
        raise UsageError(found, expected=f"1 to {meta.num_experts}, the model's experts per layer")
    share = float(share)
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share:g} of the router weight", expected="more than 0 and at most 1, such as .9")
    return {"lengths": lengths, "budgets": budgets, "share": share, "max_window": lengths[-1]}
