"""The headline figures of a trace with every jackknife group left out in turn: what two traces are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.attribution import telescope
from tracekit.metrics.intervals import jackknife
from tracekit.metrics.ladder import RUNGS, ladder, ladders
from tracekit.metrics.load import balance
from tracekit.metrics.measurement import Measurement
from tracekit.metrics.replicates import Replicates, layer_mean
from tracekit.metrics.state import MIN_REQUESTS, Cells, Spec
from tracekit.metrics.verification import StepSums
from tracekit.schema import BASELINES, CAUSES, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store.steps import StepRows

Floats = NDArray[np.float64]
Key = tuple[str, str, str | None]
"""Section, metric, and the length, lag or batch size that it is at."""

LOAD = ("max_over_mean", "cv", "gini", "entropy_norm", "effective_experts", "sum_p2_over_k")


def headline(
    m: Measurement, window: int, batch_sizes: Sequence[int], lags: Sequence[int], *, label: bool
) -> dict[Key, Floats]:
    """Return the figures of a trace, ``[1 + G]`` each: the plain estimate, then without each jackknife group.

    Parameters
    ----------
    m
        The sums of a pass that was not grouped.
    window
        T, the window length that is looked at.
    batch_sizes, lags
        Batch sizes above 1, and lags; the pass must have measured them.
    label
        Whether the label is a cause of its own, see :func:`label_resolved`.
    """
    r = Replicates(m.meta, m.spec, m.cells, m.state, 0)
    layers = np.arange(len(m.meta.layers))
    having = m.drawable(0, max(window, m.spec.max_lag + 1))

    def known(values: Floats, tokens: int) -> Floats:
        """Leave out the replicates where too few requests have as many consecutive tokens."""
        return values if having[tokens - 1] >= MIN_REQUESTS else values[:1]

    found: dict[Key, Floats] = {}
    at = f"window {window}"
    rungs = {name: layer_mean(rung, layers)[:, window - 1] for name, rung in ladder(r).items()}
    found["windows", "observed", at] = known(rungs["observed"], window)
    found["windows", "per_top_k", at] = known(rungs["observed"] / m.meta.top_k, window)
    for name in BASELINES:
        found["windows", f"reduction_{name}", at] = known(_reduction(rungs["observed"], rungs[name]), window)
    for cause, share in _shares(rungs, label).items():
        found["attribution", f"share_{cause}", at] = known(share, window)
    if batch_sizes:
        for size, batch in ladders(r, batch_sizes, m.drawable(0, m.spec.max_window)):
            means = {name: layer_mean(batch[name], layers) for name in ("uniform", "observed")}
            of_batch = f"{at}, batch size {size}"
            observed = means["observed"][:, window - 1]
            found["batches", "observed", of_batch] = known(observed, window)
            reduction = _reduction(observed, means["uniform"][:, window - 1])
            found["batches", "reduction_uniform", of_batch] = known(reduction, window)
            found["batches", "expert_ratio", of_batch] = known(observed / means["observed"][:, 0], window)
    found |= {key: known(v, lag + 1) for lag in lags for key, v in _at_lag(m, r, lag).items()}
    loads = [balance(counts, m.meta.top_k) for counts in r.counts()]
    for name in LOAD:
        by_layer = np.array([load[name] for load in loads])[..., None]
        found["load", name, None] = known(layer_mean(by_layer, layers)[:, 0], 1)
    return found


def label_resolved(m: Measurement, window: int) -> bool:
    """Return whether the trace's label is resolved as a cause of its own, see :func:`telescope`."""
    r = Replicates(m.meta, m.spec, m.cells, m.state, 0)
    layers = np.arange(len(m.meta.layers))
    rungs = {name: layer_mean(rung, layers)[:, window - 1] for name, rung in ladder(r).items()}
    enough = bool(m.drawable(0, window)[-1] >= MIN_REQUESTS)
    causes = {row["cause"]: row for row in telescope(rungs, m.spec.intervals, enough)}
    return bool(causes["label"]["resolved"])


def verification(
    meta: TraceMeta, spec: Spec, cells: Cells, requests: pl.DataFrame, batches: Iterable[StepRows]
) -> dict[Key, Floats]:
    """Return the figures of a trace's verification steps, ``[1 + G]`` each; none where no step is of the phase.

    Parameters
    ----------
    requests
        The trace's requests in order.
    batches
        The rows of the steps.
    """
    sums = StepSums(meta, cells, requests, spec.phase)
    for rows in batches:
        sums.add(rows)
    if not sums.by_window:
        return {}
    s = sums.acceptance
    r = Replicates(meta, spec, cells, s, 0)
    n = r.total(s.n).astype(np.float64)
    steps = n.sum(axis=1)
    verified = sum(window * r.total(state.n) for window, state in sums.by_window.items())
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            ("verification", "acceptance_length", None): n @ np.arange(1, n.shape[1] + 1) / steps,
            ("verification", "verified_tokens", None): np.asarray(verified / steps),
            ("verification", "unique", None): r.total(s.unique).sum(axis=1).mean(axis=1) / steps,
        }


def _at_lag(m: Measurement, r: Replicates, lag: int) -> dict[Key, Floats]:
    """Return how alike tokens at one lag are; the coefficients and rank-0 repeats at lag 1 only."""
    s, k = m.state, m.meta.top_k
    layers = np.arange(len(m.meta.layers))
    at = f"lag {lag}"

    def mean(sums: NDArray[np.float64]) -> Floats:
        return layer_mean(r.ratio(sums[..., lag - 1, None], s.n_pairs[..., lag - 1, None]), layers)[:, 0]

    overlap = mean(s.overlap_counts @ np.arange(1, k + 1) / k)
    found: dict[Key, Floats] = {("autocorr", "overlap", at): overlap}
    if lag == 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            by_layer = [np.square(counts / r.tokens(counts)[:, None]).sum(axis=-1) / k for counts in r.counts()]
        popularity = layer_mean(np.array(by_layer)[..., None], layers)[:, 0]
        request = mean(s.request_overlap_sum)
        found["autocorr", "rho", at] = _coefficient(overlap, popularity)
        found["autocorr", "rho_request", at] = _coefficient(overlap, request)
        if m.meta.router_order:
            found["autocorr", "rank0_repeat", at] = mean(s.rank0_repeats.astype(np.float64))
    return found


def _shares(rungs: dict[str, Floats], label: bool) -> dict[str, Floats]:
    """Return each cause's share of the drop from ``uniform`` to observed; none where there may be no drop at all."""
    path = [name for name in RUNGS if name != "label" or label]
    causes = [cause for cause in CAUSES if cause != "label" or label]
    total = rungs["uniform"] - rungs["observed"]
    if total[0] == 0 or jackknife(total[:, None]).contains(0.0).item():
        return {}
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            cause: (rungs[before] - rungs[after]) / total
            for cause, before, after in zip(causes, path[:-1], path[1:], strict=True)
        }


def _reduction(observed: Floats, baseline: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - observed / baseline)


def _coefficient(overlap: Floats, baseline: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(baseline < 1, (overlap - baseline) / (1 - baseline), np.nan)
