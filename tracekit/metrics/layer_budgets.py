"""Caches of unequal size: how many experts each layer should keep when all of them share one budget.

From the LRU curve of each layer the next expert goes to the layer where it adds the most hits for its size. That is the
optimum where every curve is concave (Fox, Oper. Res. 14(2), 1966). The curves of real traces nearly are; where one is
not, the steps are those of its concave hull, and the value of the hull bounds what any split can hit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracekit.metrics.intervals import jackknife
from tracekit.metrics.measurement import interval_columns, result_frame
from tracekit.metrics.replicates import output_groups
from tracekit.metrics.state import MIN_REQUESTS

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.cache_spec import CacheSpec
    from tracekit.metrics.caches import Caches


@njit(cache=True, nogil=True)
def split(curve: Any, costs: Any, totals: Any, out: Any, bound: Any) -> None:
    """Split budgets between layers by marginal gain.

    Parameters
    ----------
    curve
        ``[G, L]`` int64: hits of each layer with the least number of experts, one more, …; does not fall.
    costs
        ``[L]`` int64: what an expert of each layer takes.
    totals
        ``[B]`` int64: budgets for what goes beyond the least number, in the unit of ``costs``.
    out
        ``[B, L]`` int64, written: experts of each layer beyond the least number.
    bound
        ``[B]`` float64, written: hits that no split of the budget exceeds.
    """
    sizes, layers = curve.shape
    gain = np.zeros(layers * sizes)
    owner = np.zeros(layers * sizes, np.int64)
    more = np.zeros(layers * sizes, np.int64)
    steps = 0
    corner = np.zeros(sizes, np.int64)
    for layer in range(layers):
        n = 0
        for g in range(sizes):
            # A corner below the line to this one, or on it, is none.
            while n >= 2 and (curve[corner[n - 1], layer] - curve[corner[n - 2], layer]) * (g - corner[n - 1]) <= (
                curve[g, layer] - curve[corner[n - 1], layer]
            ) * (corner[n - 1] - corner[n - 2]):
                n -= 1
            corner[n] = g
            n += 1
        for i in range(1, n):
            more[steps] = corner[i] - corner[i - 1]
            rise = curve[corner[i], layer] - curve[corner[i - 1], layer]
            gain[steps] = rise / (more[steps] * costs[layer])
            owner[steps] = layer
            steps += 1
    order = np.argsort(-gain[:steps], kind="mergesort")
    full = np.zeros(layers, np.bool_)
    for b in range(totals.shape[0]):
        left = totals[b]
        out[b, :] = 0
        bound[b] = curve[0].sum()
        full[:] = False
        within = True
        """Whether no step was cut short yet."""
        for step in order:
            layer = owner[step]
            if full[layer]:
                continue
            taken = min(more[step], left // costs[layer])
            if within:
                bound[b] += gain[step] * min(left, more[step] * costs[layer])
                within = taken == more[step]
            full[layer] = taken < more[step]
            out[b, layer] += taken
            left -= taken * costs[layer]


def layer_budgets(caches: Caches, asked: CacheSpec) -> pl.DataFrame:
    """Return the split of each budget and what it hits: one row per capacity and layer, and one for all layers.

    What a split hits is judged, jackknife group by group, on requests that it was not learned from.

    Parameters
    ----------
    caches
        LRU caches of k, k + 1, … N experts for every layer.
    asked
        The budgets: capacities of one cache for all layers, in their unit.
    """
    meta, s = caches.meta, caches.state
    n_layers, k = len(meta.layers), meta.top_k
    every = np.arange(n_layers)
    costs, totals = asked.costs(meta), asked.budgets(meta)[:, 0]
    spare = totals - k * costs.sum()
    even = np.minimum(totals[:, None] // n_layers // costs, meta.num_experts) - k  # [B, L]
    curves = np.ascontiguousarray(s.hits["lru"])  # [C, G, L]
    learned, bound = np.zeros((len(totals), n_layers), np.int64), np.zeros(len(totals))
    total = curves.sum(axis=0)
    split(total, costs, spare, learned, bound)
    held_out = np.zeros((len(curves), len(totals), n_layers), np.int64)
    theirs, ignored = np.zeros_like(learned), np.zeros_like(bound)
    for cell, own in enumerate(curves):
        split(total - own, costs, spare, theirs, ignored)
        held_out[cell] = own[theirs, every]
    evenly = curves[:, np.clip(even, 0, None), every]
    [(r, _)] = list(output_groups(meta, caches.spec, caches.cells, s))
    enough = np.array([r.requests >= MIN_REQUESTS])
    accesses = r.total(s.counts.sum(axis=2)).astype(np.float64)
    judged, plain = r.total(held_out).astype(np.float64), r.total(evenly).astype(np.float64)
    if len(curves) < 2:
        judged[:] = np.nan  # nothing is left to judge by
    rows: list[dict[str, Any]] = []
    for b, capacity in enumerate(asked.capacities):
        of_layers = total[learned[b], every]
        for number, layers in [(None, every), *((layer, every[i : i + 1]) for i, layer in enumerate(meta.layers))]:
            of_all = accesses[:, layers].sum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                rates = {
                    "hit_rate": judged[:, b, layers].sum(axis=1) / of_all,
                    "uniform": plain[:, b, layers].sum(axis=1) / of_all,
                }
                best = of_layers[layers].sum() / of_all[0]
                most = bound[b] / of_all[0] if number is None else np.nan
            rates["gain"] = rates["hit_rate"] - rates["uniform"]
            columns: dict[str, NDArray[np.float64]] = {}
            for name, values in rates.items():
                columns |= interval_columns(name, jackknife(values[:, None]).where(enough))
            rows.append(
                {
                    "layer": number,
                    "start": caches.spec.start,
                    "batch_size": caches.spec.batch_size,
                    "unit": asked.unit,
                    "capacity": capacity,
                    "total": float(totals[b]),
                    "experts": float((k + learned[b, layers]).mean()),
                    "accesses": int(of_all[0]),
                    **{name: value.item() for name, value in columns.items()},
                    "hit_rate_learned": float(best),
                    "hit_rate_bound": float(most),
                }
            )
    return result_frame(caches.spec, "layer_budgets", rows)
