"""Verification steps as they ran: the experts of every verified row, those of rejected drafts included.

A step verifies W rows at once: the last committed token and W - 1 drafts, in a chain or a tree. It emits the accepted
drafts and one token more, and loads the union of the experts of all W rows. A trace of accepted tokens alone shows the
union of W *consecutive committed* tokens instead; how much that understates the real one is the ``bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracekit.errors import UnsupportedError
from tracekit.metrics.intervals import jackknife
from tracekit.metrics.ladder import ladder
from tracekit.metrics.measurement import Measurement, interval_columns, result_frame
from tracekit.metrics.replicates import Replicates, layer_mean, output_groups
from tracekit.metrics.state import MIN_REQUESTS, Cells, Spec
from tracekit.schema import Phase, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Columns
    from tracekit.store.steps import StepRows

Floats = NDArray[np.float64]

LONGEST_WINDOW = 64
"""Committed tokens in the longest window that steps are compared with: trees of drafts may be larger."""


@njit(cache=True, nogil=True)
def step_unions(ids: Any, kept: Any, first: Any, num_experts: int) -> Any:
    """Return, for each step of each layer, its unique experts and those of its kept rows.

    Parameters
    ----------
    ids
        Routed experts ``[k, rows]``, below ``num_experts``.
    kept
        ``[rows]`` int8: 1 for a row that was kept.
    first
        ``[steps]`` int64, ascending: first row of each step; the last one ends with the rows.
    num_experts
        N.

    Returns
    -------
    ``[2, steps]`` int64.
    """
    out = np.zeros((2, len(first)), np.int64)
    seen = np.full((2, num_experts), -1, np.int64)
    for s in range(len(first)):
        end = first[s + 1] if s + 1 < len(first) else len(kept)
        for row in range(first[s], end):
            for r in range(ids.shape[0]):
                e = ids[r, row]
                if seen[0, e] != s:
                    seen[0, e] = s
                    out[0, s] += 1
                if kept[row] == 1 and seen[1, e] != s:
                    seen[1, e] = s
                    out[1, s] += 1
    return out


@dataclass(slots=True)
class AcceptanceState:
    """Sums over the steps of each cell by the drafts they accept. C cells, L layers, A numbers of accepted drafts."""

    n: NDArray[np.int64]
    """``[C, A]`` steps that accepted so many drafts."""
    tried: NDArray[np.int64]
    """``[C, A]`` steps that accepted at least one draft fewer and had a draft that deep."""
    unknown: NDArray[np.int64]
    """``[C, A]`` steps of which not every kept row is known."""
    unique: NDArray[np.int64]
    """``[C, A, L]`` unique experts of all rows."""
    unique_kept: NDArray[np.int64]
    """``[C, A, L]`` unique experts of the kept rows."""

    @classmethod
    def empty(cls, cells: int, depths: int, layers: int) -> AcceptanceState:
        """Return a state with nothing accumulated."""
        flat, deep = (cells, depths), (cells, depths, layers)
        return cls(*(np.zeros(shape, np.int64) for shape in (flat, flat, flat, deep, deep)))

    def grown(self, depths: int) -> AcceptanceState:
        """Return the state with room for at least so many numbers of accepted drafts."""
        cells, there, layers = self.unique.shape
        if depths <= there:
            return self
        out = AcceptanceState.empty(cells, depths, layers)
        out.merge(self)
        return out

    def merge(self, other: AcceptanceState) -> None:
        """Add another state, of no more accepted drafts, to this one."""
        for name in ("n", "tried", "unknown", "unique", "unique_kept"):
            sums = getattr(other, name)
            getattr(self, name)[:, : sums.shape[1]] += sums


@dataclass(slots=True)
class LengthState:
    """Sums over the steps of one length of each cell. C cells, L layers, R requests."""

    n: NDArray[np.int64]
    """``[C]`` steps."""
    accepted: NDArray[np.int64]
    """``[C]`` drafts that they accepted."""
    unknown: NDArray[np.int64]
    """``[C]`` steps of which not every kept row is known."""
    unique: NDArray[np.int64]
    """``[C, L]`` unique experts of all rows."""
    unique_kept: NDArray[np.int64]
    """``[C, L]`` unique experts of the kept rows."""
    requests: NDArray[np.bool_]
    """``[R]`` which requests have such a step."""

    @classmethod
    def empty(cls, cells: int, layers: int, requests: int) -> LengthState:
        """Return a state with nothing accumulated."""
        n, accepted, unknown = np.zeros((3, cells), np.int64)
        unique, unique_kept = np.zeros((2, cells, layers), np.int64)
        return cls(n, accepted, unknown, unique, unique_kept, np.zeros(requests, bool))

    def merge(self, other: LengthState) -> None:
        """Add another state of the same length to this one."""
        for field in fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))


class StepSums:
    """The states of the steps of a trace, and what it takes to add to them.

    Parameters
    ----------
    meta
        The trace's shape.
    cells
        Which cell each request adds to; a request without one is left out.
    requests
        The trace's requests in order.
    phase
        Which steps count: a step is of the phase of its first row.
    """

    def __init__(self, meta: TraceMeta, cells: Cells, requests: pl.DataFrame, phase: Phase) -> None:
        self.meta, self.cells = meta, cells
        self.by_window: dict[int, LengthState] = {}
        """For each number of rows W the steps of that length."""
        self.acceptance = AcceptanceState.empty(len(cells.cell_group), 1, len(meta.layers))
        self._decode_start = requests["decode_start"].cast(int).fill_null(-1).to_numpy().astype(np.int64)
        self._phase = phase

    def merge(self, other: StepSums) -> None:
        """Add what was seen of other requests, or of other steps of these, in the same cells."""
        for window, state in other.by_window.items():
            self._of_length(window).merge(state)
        self.acceptance = self.acceptance.grown(other.acceptance.n.shape[1])
        self.acceptance.merge(other.acceptance)

    def add(self, rows: StepRows) -> None:
        """Accumulate a batch of whole steps."""
        first = rows.first_rows()
        cell = np.where(self._in_phase(rows.request[first], rows.pos[first]), self.cells.cell[rows.request[first]], -1)
        if not (cell >= 0).any():
            return
        unions = step_unions(np.ascontiguousarray(rows.ids), rows.kept, first, self.meta.num_experts)
        length = np.diff(np.append(first, len(rows)))
        start = rows.pos[first]
        depth = np.maximum.reduceat(rows.pos, first) - start
        accepted = np.maximum.reduceat(np.where(rows.kept == 0, start.min(), rows.pos), first) - start
        unknown = np.minimum.reduceat(rows.kept, first) < 0
        layer = np.searchsorted(self.meta.layers, rows.layer[first])
        there = cell >= 0
        self.acceptance = self.acceptance.grown(int(depth[there].max()) + 1)
        _add_unions(self.acceptance, (cell[there], accepted[there], layer[there]), unions[:, there])
        for window in np.unique(length[there]).tolist():
            here, state = there & (length == window), self._of_length(window)
            _add_unions(state, (cell[here], layer[here]), unions[:, here])
        # Every layer has the same steps: what does not depend on it is counted once.
        once = there & (layer == 0)
        cell, length, depth, accepted, unknown = (column[once] for column in (cell, length, depth, accepted, unknown))
        np.add.at(self.acceptance.n, (cell, accepted), 1)
        np.add.at(self.acceptance.unknown, (cell, accepted), unknown)
        for n in range(self.acceptance.n.shape[1]):
            np.add.at(self.acceptance.tried[:, n], cell[(accepted >= n - 1) & (depth >= n)], 1)
        for window in np.unique(length).tolist():
            here, state = length == window, self._of_length(window)
            np.add.at(state.n, cell[here], 1)
            np.add.at(state.accepted, cell[here], accepted[here])
            np.add.at(state.unknown, cell[here], unknown[here])
            state.requests[rows.request[first][once][here]] = True

    def _in_phase(self, request: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which steps are of the phase: that of their first row."""
        border = self._decode_start[request]
        if self._phase == "all":
            return np.ones(len(start), bool)
        return np.asarray((border >= 0) & ((start >= border) == (self._phase == "decode")))

    def _of_length(self, window: int) -> LengthState:
        if window not in self.by_window:
            cells, layers, requests = len(self.cells.cell_group), len(self.meta.layers), len(self.cells.cell)
            self.by_window[window] = LengthState.empty(cells, layers, requests)
        return self.by_window[window]


def _add_unions(
    state: AcceptanceState | LengthState, index: tuple[NDArray[Any], ...], unions: NDArray[np.int64]
) -> None:
    """Add the unions of steps, ``[2, steps]``, of all rows and of kept ones, where the index says."""
    at = np.ravel_multi_index(index, state.unique.shape)  # one index is several times as fast as three
    np.add.at(state.unique.reshape(-1), at, unions[0])
    np.add.at(state.unique_kept.reshape(-1), at, unions[1])


class Verification:
    """The verification steps of a trace, and beside them windows over the committed tokens of the same requests."""

    def __init__(
        self,
        meta: TraceMeta,
        requests: pl.DataFrame,
        spec: Spec,
        batches: Iterable[StepRows],
        blocks: Callable[[], Iterable[Columns]],
        threads: int,
    ) -> None:
        """Read the steps once; the routing is read when it is asked for.

        Parameters
        ----------
        meta, spec, threads
            As for :class:`Measurement`.
        requests
            The trace's requests in order; those without steps have no tokens.
        batches
            The rows of the steps.
        blocks
            Reads the routing.
        """
        self.meta, self.spec = meta, spec
        self._requests, self._blocks, self._threads = requests, blocks, threads
        self.cells = Cells.assign(requests, spec)
        self.sums = StepSums(meta, self.cells, requests, spec.phase)
        for rows in batches:
            self.sums.add(rows)
        if not self.sums.by_window:
            raise UnsupportedError(f"no verification step begins among the {spec.phase} tokens")

    def steps(self) -> pl.DataFrame:
        """Return what steps load: one row per group and length W of step, and one over all lengths (null)."""
        windows = np.array(sorted(self.sums.by_window))
        spec = replace(self.spec, max_window=int(min(windows[-1], LONGEST_WINDOW)))
        committed = Measurement.read(self.meta, self._requests, spec, self._blocks(), self._threads)
        rows: list[dict[str, Any]] = []
        for r, groups in output_groups(self.meta, spec, self.cells, committed.state):
            rungs = {name: _at_lengths(rung, windows) for name, rung in ladder(r).items()}
            here = self._requests_of(r.group)
            having = [(here & self.sums.by_window[w].requests).sum() for w in windows.tolist()] + [r.requests]
            enough = np.array(having) >= MIN_REQUESTS
            for group, layers in groups:
                columns = self._step_columns(r, windows, rungs, layers, enough)
                rows += [
                    {**group, "window": window} | {name: value[i].item() for name, value in columns.items()}
                    for i, window in enumerate([*windows.tolist(), None])
                    if columns["n_steps"][i]
                ]
        return result_frame(self.spec, "steps", rows)

    def acceptance(self) -> pl.DataFrame:
        """Return how many drafts are accepted: one row per group and number, 0 to the deepest draft."""
        s = self.sums.acceptance
        rows: list[dict[str, Any]] = []
        for r, groups in output_groups(self.meta, self.spec, self.cells, s):
            n, tried = r.total(s.n).astype(np.float64), r.total(s.tried)
            at_least = n[:, ::-1].cumsum(axis=1)[:, ::-1]
            unique = _ratio(r.total(s.unique), n[..., None])
            rejected = unique - _ratio(r.total(s.unique_kept), np.where(r.total(s.unknown) > 0, 0, n)[..., None])
            enough = np.full(n.shape[1], r.requests >= MIN_REQUESTS)
            rate = _ratio(at_least, tried)
            rate[:, 0] = np.nan  # nothing is drafted at depth 0
            for group, layers in groups:
                every, own = (layer_mean(value.swapaxes(1, 2), layers) for value in (unique, rejected))
                columns: dict[str, NDArray[Any]] = {
                    "n_steps": n[0].astype(np.int64),
                    **interval_columns("share", jackknife(_ratio(n, at_least[:, :1])).where(enough)),
                    **interval_columns("at_least", jackknife(_ratio(at_least, at_least[:, :1])).where(enough)),
                    **interval_columns("rate", jackknife(rate).where(enough)),
                    **interval_columns("unique", jackknife(every).where(enough)),
                    **interval_columns("rejected_unique", jackknife(own).where(enough)),
                }
                rows += [
                    {**group, "accepted": a} | {name: value[a].item() for name, value in columns.items()}
                    for a in range(n.shape[1])
                ]
        return result_frame(self.spec, "acceptance", rows)

    def _requests_of(self, group: int) -> NDArray[np.bool_]:
        cell = self.cells.cell
        return np.asarray((cell >= 0) & (self.cells.cell_group[np.maximum(cell, 0)] == group))

    def _step_columns(
        self,
        r: Replicates,
        windows: NDArray[np.int64],
        rungs: dict[str, Floats],
        layers: NDArray[np.int64],
        enough: NDArray[np.bool_],
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of one group, ``[W + 1]`` each: every length, and all of them together."""
        states = [self.sums.by_window[w] for w in windows.tolist()]
        n = _with_all(np.stack([r.total(s.n) for s in states], axis=-1))
        accepted = _ratio(_with_all(np.stack([r.total(s.accepted) for s in states], axis=-1)), n)
        unknown = _with_all(np.stack([r.total(s.unknown) for s in states], axis=-1))

        def mean(name: str) -> Floats:
            sums = np.stack([r.total(getattr(s, name)) for s in states], axis=-1)
            return layer_mean(_ratio(_with_all(sums), n[:, None]), layers)

        unique = mean("unique")
        kept = np.where(unknown > 0, np.nan, mean("unique_kept"))
        expected = {
            name: _with_mean(layer_mean(rungs[name], layers), n) for name in ("uniform", "popularity", "observed")
        }
        with np.errstate(invalid="ignore", divide="ignore"):
            rejected, bias = 1 - kept / unique, unique / expected["observed"] - 1
        return {
            "n_steps": n[0].astype(np.int64),
            "drafted": _with_mean(np.broadcast_to(windows - 1.0, n[:, :-1].shape), n)[0],
            "accepted": accepted[0],
            **interval_columns("acceptance_length", jackknife(accepted + 1).where(enough)),
            **interval_columns("unique", jackknife(unique).where(enough)),
            **interval_columns("unique_kept", jackknife(kept).where(enough)),
            **interval_columns("rejected_share", jackknife(rejected).where(enough)),
            "expected_uniform": expected["uniform"][0],
            "expected_popularity": expected["popularity"][0],
            "accepted_only": expected["observed"][0],
            **interval_columns("bias", jackknife(bias).where(enough)),
        }


def _ratio(sums: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """Return sums / weights, NaN where there is no weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weights > 0, sums / weights, np.nan)


def _with_all(sums: NDArray[Any]) -> NDArray[Any]:
    """Return sums ``[…, W]`` with that over all lengths behind them, ``[…, W + 1]``."""
    return np.concatenate([sums, sums.sum(axis=-1, keepdims=True)], axis=-1)


def _with_mean(values: Floats, n: NDArray[Any]) -> Floats:
    """Return ``[replicates, W]`` values with their mean behind them, each length weighed by its steps ``n[…, :-1]``."""
    weighted = np.where(n[:, :-1] > 0, values * n[:, :-1], 0.0).sum(axis=-1, keepdims=True)
    return np.concatenate([values, _ratio(weighted, n[:, -1:])], axis=-1)


def _at_lengths(rung: Floats, windows: NDArray[np.int64]) -> Floats:
    """Return ``[replicates, L, W]`` of a rung for windows of some lengths, NaN where it was not measured."""
    there = windows <= rung.shape[-1]
    return np.where(there, rung[..., np.where(there, windows - 1, 0)], np.nan)
