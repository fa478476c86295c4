"""One pass over a trace's routing, and the frames that are finalised from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UsageError
from tracekit.metrics.attribution import telescope
from tracekit.metrics.intervals import Interval, jackknife
from tracekit.metrics.ladder import ladder, ladders
from tracekit.metrics.load import balance
from tracekit.metrics.replicates import Replicates, layer_mean, output_groups
from tracekit.metrics.state import MIN_REQUESTS, Cells, Spec, Sums, accumulate
from tracekit.schema import BASELINES, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Columns


class Measurement:
    """The sums of one pass over one trace. Its methods return frames; none reads the trace again."""

    def __init__(
        self,
        meta: TraceMeta,
        spec: Spec,
        sums: Sums,
    ) -> None:
        self.meta, self.spec = meta, spec
        self.cells, self.state = sums.cells, sums.state
        self._longest_run, self._distinct = sums.longest_run, sums.distinct

    @classmethod
    def read(
        cls,
        meta: TraceMeta,
        requests: pl.DataFrame,
        spec: Spec,
        blocks: Iterable[Columns],
        threads: int,
        jackknife_groups: Mapping[str, int] | None = None,
    ) -> Self:
        """Read ``blocks`` once; for the rest see :func:`tracekit.metrics.state.accumulate`."""
        return cls(meta, spec, accumulate(meta, requests, spec, blocks, threads, jackknife_groups))

    def windows(self, batch_sizes: Iterable[int] = (1,), *, distinct: bool = False) -> pl.DataFrame:
        """Return unique experts per verification window: one row per group, batch size and window length.

        With ``distinct``, of the windows of distinct requests, each equally likely: without intervals, and without the
        baselines whose requests weigh by their windows.

        Raises
        ------
        UsageError
            A batch size is not possible, or the pass did not measure such batches.
        """
        return self._batched("windows", batch_sizes, self._window_columns, distinct)

    def expert_ratio(self, batch_sizes: Iterable[int]) -> pl.DataFrame:
        """Return how many more experts a verification step loads than a step of one token a request, U(T, B) / U(1, B).

        One row per group, batch size and window length.
        """
        return self._batched("expert_ratio", batch_sizes, self._ratio_columns)

    def _batched(
        self,
        kind: str,
        batch_sizes: Iterable[int],
        columns_of: Callable[[dict[str, NDArray[np.float64]], NDArray[np.bool_]], dict[str, NDArray[Any]]],
        distinct: bool = False,
    ) -> pl.DataFrame:
        """Return a frame with a row per group, batch size and window length, its columns made from the rungs."""
        batch_sizes = _batch_sizes(batch_sizes)
        if distinct and max(batch_sizes) > self.spec.distinct_batch:
            raise UsageError(
                f"batches of {max(batch_sizes)} distinct requests",
                expected=f"at most {self.spec.distinct_batch}, which were measured",
                remedy=f"Measure with distinct_batch={max(batch_sizes)}",
            )
        rows: list[dict[str, Any]] = []
        for r, groups in output_groups(self.meta, self.spec, self.cells, self.state):
            drawable = self.drawable(r.group, self.spec.max_window)
            n_windows = r.state.n_windows[r.members].sum(axis=0)
            found: dict[tuple[int, int], list[dict[str, Any]]] = {}
            for b, rungs in ladders(r, batch_sizes, drawable):
                if distinct:
                    assert self._distinct is not None
                    rungs |= dict.fromkeys(("label", "request"), np.full_like(rungs["observed"], np.nan))
                    rungs["observed"] = self._distinct.unique(r.group, b)[None]
                for i, (group, layers) in enumerate(groups):
                    means = {name: layer_mean(v, layers) for name, v in rungs.items()}
                    columns = columns_of(means, drawable >= MIN_REQUESTS) | {"n_windows": n_windows[layers].max(axis=0)}
                    found[i, b] = [
                        {**group, "distinct": distinct, "batch_size": b, "window": t}
                        | {c: v[t - 1].item() for c, v in columns.items()}
                        for t in range(1, self.spec.max_window + 1)
                    ]
            rows += [row for i in range(len(groups)) for b in batch_sizes for row in found[i, b]]
        return self._frame(kind, rows)

    def drawable(self, group: int, longest: int) -> NDArray[np.int64]:
        """Return the requests of a group that have 1 .. ``longest`` consecutive tokens, ``[longest]``."""
        active = self.cells.cell >= 0
        mine = active & (self.cells.cell_group[np.where(active, self.cells.cell, 0)] == group)
        lengths = np.arange(1, longest + 1)
        return np.asarray((self._longest_run[mine, None] >= lengths).sum(axis=0))

    def _window_columns(
        self, rungs: dict[str, NDArray[np.float64]], enough: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of one group and batch size, ``[T]`` each, from rungs ``[replicates, T]``."""
        observed = rungs["observed"]
        columns = interval_columns("observed", jackknife(observed).where(enough))
        columns["per_top_k"] = observed[0] / self.meta.top_k
        for name in BASELINES:
            columns[f"expected_{name}"] = rungs[name][0]
            with np.errstate(invalid="ignore", divide="ignore"):
                reduction = jackknife(1 - observed / rungs[name]).where(enough)
            columns |= interval_columns(f"reduction_{name}", reduction, bias=True)
        return columns

    def _ratio_columns(
        self, rungs: dict[str, NDArray[np.float64]], enough: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of one group and batch size, ``[T]`` each, from rungs ``[replicates, T]``."""
        observed = rungs["observed"]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = {name: rung / rung[:, :1] for name, rung in rungs.items()}
        return {
            **interval_columns("unique", jackknife(observed).where(enough)),
            "unique_single": np.broadcast_to(observed[0, 0], observed.shape[1:]),
            **interval_columns("ratio", jackknife(ratios["observed"]).where(enough)),
            **{f"ratio_{name}": ratios[name][0] for name in ("uniform", "popularity", "request")},
        }

    def autocorr(self) -> pl.DataFrame:
        """Return temporal autocorrelation of routing: one row per group and lag."""
        rows: list[dict[str, Any]] = []
        k = self.meta.top_k
        shared = np.arange(1, k + 1)
        s = self.state
        for r, groups in output_groups(self.meta, self.spec, self.cells, self.state):
            overlap = r.ratio((s.overlap_counts @ shared) / k, s.n_pairs)
            plain = r.plain()
            request = plain.ratio(s.request_overlap_sum, s.n_pairs)
            (counts,) = plain.counts()
            with np.errstate(invalid="ignore", divide="ignore"):
                popularity = (np.square(counts / plain.tokens(counts)[:, None]).sum(axis=-1) / k)[None, :, None]
            enough = self.drawable(r.group, self.spec.max_lag + 1)[1:] >= MIN_REQUESTS
            pairs = plain.total(s.n_pairs)
            pair_counts = plain.total(s.overlap_counts)
            with np.errstate(invalid="ignore", divide="ignore"):
                per_pair = {
                    "jaccard": pair_counts @ (shared / (2 * k - shared)) / pairs,
                    "any_shared": pair_counts.sum(axis=-1) / pairs,
                    "rank0_repeat": plain.total(s.rank0_repeats) / pairs if self.meta.router_order else pairs * np.nan,
                }
            for group, layers in groups:
                mean = layer_mean(overlap, layers)
                by_popularity = np.broadcast_to(layer_mean(popularity, layers)[0], mean[0].shape)
                by_request = layer_mean(request, layers)[0]
                columns: dict[str, NDArray[Any]] = {
                    "n_pairs": pairs[0, layers].max(axis=0),
                    **interval_columns("overlap", jackknife(mean).where(enough)),
                    "expected_uniform": np.full_like(by_request, k / self.meta.num_experts),
                    "expected_popularity": by_popularity,
                    "expected_request": by_request,
                    "rho": _coefficient(mean[0], by_popularity),
                    "rho_request": _coefficient(mean[0], by_request),
                    **{name: layer_mean(value, layers)[0] for name, value in per_pair.items()},
                }
                rows += [
                    {**group, "lag": d} | {c: v[d - 1].item() for c, v in columns.items()}
                    for d in range(1, self.spec.max_lag + 1)
                ]
        return self._frame("autocorr", rows)

    def attribution(self, window: int) -> pl.DataFrame:
        """Return what the reduction at one window length is made of: one row per group and cause."""
        if not 2 <= window <= self.spec.max_window:
            raise UsageError(f"a window of {window} tokens", expected=f"2 to {self.spec.max_window}")
        rows: list[dict[str, Any]] = []
        for r, groups in output_groups(self.meta, self.spec, self.cells, self.state):
            rungs = ladder(r)
            enough = self.drawable(r.group, window)[-1] >= MIN_REQUESTS
            for group, layers in groups:
                means = {name: layer_mean(v, layers)[:, window - 1] for name, v in rungs.items()}
                rows += [
                    {**group, "window": window} | row for row in telescope(means, self.spec.intervals, bool(enough))
                ]
        return self._frame("attribution", rows)

    def load(self) -> pl.DataFrame:
        """Return popularity and balance of the experts: one row per layer, and per label where it was measured so."""
        groups: list[tuple[str | None, NDArray[np.int64]]] = []
        for g, key in enumerate(self.cells.groups):
            r = Replicates(self.meta, self.spec, self.cells, self.state, g)
            counts = self.state.counts[r.label_pools()[1]] if self.spec.by == "label" else self.state.counts
            groups.append((key, counts.sum(axis=0)))
        return load_of(self.meta, self.spec, groups)

    def _frame(self, kind: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
        return result_frame(self.spec, kind, rows)


class Counted:
    """What stands in for a :class:`Measurement` where a trace holds counts only: it knows the load and nothing else."""

    def __init__(
        self,
        meta: TraceMeta,
        requests: pl.DataFrame,
        spec: Spec,
        counts: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> None:
        """Sum the ``counts`` of requests by their group, ``[requests] -> [groups, layers, num_experts]``."""
        import polars as pl

        # Without k the tokens of a record are not known, but every record has some.
        cells = Cells.assign(requests.with_columns(n_tokens=pl.lit(1)), spec)
        self._load = load_of(meta, spec, zip(cells.groups, counts(cells.cell_group[cells.cell]), strict=True))

    def load(self) -> pl.DataFrame:
        """Return popularity and balance of the experts, as :meth:`Measurement.load` does."""
        return self._load


def load_of(meta: TraceMeta, spec: Spec, groups: Iterable[tuple[str | None, NDArray[np.int64]]]) -> pl.DataFrame:
    """Return popularity and balance of the experts: one row per group and layer.

    Parameters
    ----------
    groups
        The label of each group (None without labels), and its tokens per expert ``[layers, num_experts]``.
    """
    rows: list[dict[str, Any]] = []
    for key, counts in groups:
        group = {"label": key} if spec.by == "label" else {}
        measured = balance(counts, meta.top_k)
        rows += [
            {"by": "label" if group else "layer", "layer": layer, **group}
            | {name: None if np.isnan(value[i]) else value[i].item() for name, value in measured.items()}
            for i, layer in enumerate(meta.layers)
        ]
    return result_frame(spec, "load", rows)


def result_frame(spec: Spec, kind: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Return rows as a frame with every column of the result's schema, NaN as null."""
    import polars as pl

    from tracekit.store import results

    names = ("phase", "overlapping", "intervals", "seed")
    fixed = {"by": spec.by or "trace"} | {name: getattr(spec, name) for name in names}
    schema = {name: getattr(pl, kind_) for name, kind_ in results.columns(kind).items()}
    frame = pl.DataFrame([fixed | row for row in rows], schema=schema)
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def _batch_sizes(sizes: Iterable[int]) -> list[int]:
    sizes = list(dict.fromkeys(sizes))
    wrong = [b for b in sizes if b < 1]
    if wrong or not sizes:
        raise UsageError(f"batch size {wrong[0]}" if wrong else "no batch size", expected="at least 1")
    return sizes


def interval_columns(name: str, interval: Interval, *, bias: bool = False) -> dict[str, NDArray[np.float64]]:
    """Return an estimate and its interval as columns ``NAME``, ``NAME_lo``, ``NAME_hi`` (and ``NAME_bias``)."""
    columns = {name: interval.estimate, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
    return columns | ({f"{name}_bias": interval.bias} if bias else {})


def _coefficient(overlap: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (overlap - baseline) / (1 - baseline)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(baseline < 1, (overlap - baseline) / (1 - baseline), np.nan)
