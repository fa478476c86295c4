"""One output group's sums, in full and with every jackknife group left out in turn."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.kernels import expected_unique
from tracekit.metrics.state import MIN_REQUESTS, Cells, Spec
from tracekit.schema import TraceMeta


class Replicates:
    """The sums of one output group; axis 0 of everything is replicate, 0 for the plain total."""

    def __init__(self, meta: TraceMeta, spec: Spec, cells: Cells, state: Any, group: int) -> None:
        self.meta, self.spec, self.cells, self.state, self.group = meta, spec, cells, state, group
        self.requests = cells.group_requests[group]
        self.members = np.flatnonzero(cells.cell_group == group)
        wanted = spec.intervals and spec.by != "request" and self.requests >= MIN_REQUESTS
        self.left_out = self.members if wanted else self.members[:0]

    def __len__(self) -> int:
        return 1 + len(self.left_out)

    def plain(self) -> Self:
        """Return the same without what is left out: replicate 0 alone."""
        alone = copy(self)
        alone.left_out = self.left_out[:0]
        return alone

    def total(self, sums: NDArray[Any]) -> NDArray[Any]:
        """Sum the group's cells of ``[C, …]``: ``[replicates, …]``."""
        total = _summed(sums, self.members)
        return np.concatenate([total[None], total[None] - sums[self.left_out]])

    def ratio(self, sums: NDArray[Any], weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return total(sums) / total(weights), NaN where there is no weight."""
        denominator = self.total(weights).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(denominator > 0, self.total(sums) / denominator, np.nan)

    def counts(self) -> Iterator[NDArray[np.int64]]:
        """Yield, for each replicate, the tokens that chose each expert in the whole trace, ``[L, N]``.

        Popularity is the trace's under every grouping; only the left-out requests are this group's.
        """
        total = self.state.counts.sum(axis=0)
        yield total
        for cell in self.left_out:
            rest = total
            for mine in np.flatnonzero(self.cells.count_cell_of == cell):
                rest = rest - self.state.counts[mine]
            yield rest

    def tokens(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the tokens behind ``[…, N]`` counts: each token chose k experts."""
        return np.asarray(counts.sum(axis=-1) / self.meta.top_k, np.float64)

    def label_pools(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the labels of the group and the count cells that make them up."""
        cell_of = self.cells.count_cell_of
        if self.spec.by == "request":
            request = np.flatnonzero(self.cells.cell == self.members[0])[0]
            label = self.cells.count_label[self.cells.count_cell[request]]
            return np.array([label]), np.flatnonzero(self.cells.count_label == label)
        here = np.flatnonzero(np.isin(cell_of, self.members))
        return np.unique(self.cells.count_label[here]), here

    def label_union(self) -> NDArray[np.float64]:
        """Return the unique experts expected from each label's popularity, ``[replicates, L, T]``.

        Labels weigh by their windows. All NaN where no request has a label.
        """
        shape = (len(self), len(self.meta.layers), self.spec.max_window)
        if not self.cells.labels:
            return np.full(shape, np.nan)
        labels, here = self.label_pools()
        if self.spec.by == "request":
            counts = self.state.counts[here].sum(axis=0)
            windows = self.state.n_windows[self.members].sum(axis=0)
            return np.where(windows > 0, expected_unique(counts, self.tokens(counts), self.spec.max_window), np.nan)[
                None
            ]
        expected = np.zeros(shape)
        weight = np.zeros(shape)
        for label in labels:
            pool = here[self.cells.count_label[here] == label]
            counts = self.state.counts[pool].sum(axis=0)
            windows = self.state.label_windows[pool].sum(axis=0)
            with_label = self._weighted_union(counts, windows)
            expected += with_label
            weight += windows
            for i, cell in enumerate(self.left_out, 1):
                for c in pool[self.cells.count_cell_of[pool] == cell]:
                    left = windows - self.state.label_windows[c]
                    expected[i] += self._weighted_union(counts - self.state.counts[c], left) - with_label
                    weight[i] -= self.state.label_windows[c]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(weight > 0, expected / weight, np.nan)

    def _weighted_union(self, counts: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.float64]:
        union = expected_unique(counts, self.tokens(counts), self.spec.max_window)
        return np.where(windows > 0, union * windows, 0.0)

    def shares(self) -> Iterator[dict[str, NDArray[np.float64]]]:
        """Yield, for each replicate, the share of windows that contain each expert: ``[L, T, N]`` under every rung.

        All but ``uniform``, whose share needs no array; without those that the sums do not know.
        """
        s = self.state
        labels = self._label_shares() if self.cells.labels else None
        totals = [_summed(sums, self.members) for sums in (s.n_windows, s.expert_windows, s.request_expert_windows)]
        for i, counts in enumerate(self.counts()):
            shares = {"popularity": self.presence(counts)}
            if len(s.expert_windows):
                n, observed, request = totals
                if i:
                    cell = self.left_out[i - 1]
                    n = n - s.n_windows[cell]
                    observed, request = observed - s.expert_windows[cell], request - s.request_expert_windows[cell]
                shares |= {"request": _share(request, n), "observed": _share(observed, n)}
            if labels is not None:
                shares["label"] = next(labels)
            yield shares

    def _label_shares(self) -> Iterator[NDArray[np.float64]]:
        """Yield, for each replicate, the share of windows with each expert by the labels' popularity, ``[L, T, N]``."""
        s = self.state
        labels, here = self.label_pools()
        pools = {label: here[self.cells.count_label[here] == label] for label in labels}
        counts = {label: _summed(s.counts, pool) for label, pool in pools.items()}
        windows = {label: _summed(s.label_windows, pool) for label, pool in pools.items()}

        def weighted(counts: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.float64]:
            return np.where(windows[..., None] > 0, windows[..., None] * self.presence(counts), 0.0)

        total = np.zeros((*s.label_windows.shape[1:], self.meta.num_experts))
        for label in labels:
            total += weighted(counts[label], windows[label])
        weight = np.asarray(sum(windows.values()))
        yield _share(total, weight)
        for cell in self.left_out:
            share, left = total.copy(), weight.copy()
            for c in here[self.cells.count_cell_of[here] == cell]:
                label = self.cells.count_label[c]
                fewer = windows[label] - s.label_windows[c]
                share += weighted(counts[label] - s.counts[c], fewer) - weighted(counts[label], windows[label])
                left -= s.label_windows[c]
            yield _share(share, left)

    def presence(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return 1 - (1 - p_e)^T for ``counts[L, N]``: ``[L, T, N]``, NaN where there are no tokens."""
        tokens = self.tokens(counts)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            absent = np.where(tokens > 0, np.clip(1 - counts / tokens, 0, 1), np.nan)
        return 1 - np.cumprod(np.repeat(absent[:, None, :], self.spec.max_window, axis=1), axis=1)


def layer_mean(values: NDArray[np.float64], layers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average ``[replicates, L, X]`` over some layers with equal weight, without those that have no value."""
    chosen = values[:, layers]
    here = ~np.isnan(chosen)
    count = here.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, np.where(here, chosen, 0.0).sum(axis=1) / count, np.nan)


def output_groups(
    meta: TraceMeta, spec: Spec, cells: Cells, state: Any
) -> Iterator[tuple[Replicates, list[tuple[dict[str, Any], NDArray[np.int64]]]]]:
    """Yield the sums of each output group with its rows: the group columns and the layers to average over."""
    every = np.arange(len(meta.layers))
    for g, key in enumerate(cells.groups):
        rows: list[tuple[dict[str, Any], NDArray[np.int64]]] = [({}, every)]
        if spec.by == "layer":
            rows = [({"layer": layer}, every[i : i + 1]) for i, layer in enumerate(meta.layers)]
        elif spec.by:
            rows = [({"label" if spec.by == "label" else "request_id": key}, every)]
        yield Replicates(meta, spec, cells, state, g), rows


def _summed(sums: NDArray[Any], members: NDArray[np.int64]) -> NDArray[Any]:
    """Sum some cells of ``[C, …]`` one by one: picking them out first would copy them all."""
    total = np.zeros(sums.shape[1:], sums.dtype)
    for member in members if len(sums) else ():
        total += sums[member]
    return total


def _share(sums: NDArray[Any], windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``sums[L, T, N]`` over ``windows[L, T]``, NaN without windows; what rounding adds to 0 .. 1 is cut."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(windows[..., None] > 0, np.clip(sums / windows[..., None], 0, 1), np.nan)
