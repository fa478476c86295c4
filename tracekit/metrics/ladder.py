"""Unique experts per verification window: observed, and under each baseline.

The ladder, from the baseline that explains nothing to the trace: ``uniform``, ``popularity``, ``label``, ``request``,
observed. Formulas: Hurlbert's rarefaction (Ecology 52, 1971) for ``request``, the coupon-collector expectation for
the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.batches import independent_union
from tracekit.metrics.kernels import expected_unique
from tracekit.metrics.replicates import Replicates

Floats = NDArray[np.float64]

RUNGS = ("uniform", "popularity", "label", "request", "observed")

_TOGETHER = 16
"""Batch sizes whose unions are in memory at once."""


def uniform(num_experts: int, top_k: int, tokens: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Return N (1 - (1 - k/N)^tokens), unique experts if every k-subset is equally likely."""
    return np.asarray(num_experts * (1 - (1 - top_k / num_experts) ** np.asarray(tokens, np.float64)))


def ladder(r: Replicates) -> dict[str, Floats]:
    """Return every rung for windows of single requests, ``[replicates, L, T]``."""
    lengths = np.arange(1, r.spec.max_window + 1)
    shape = (len(r), len(r.meta.layers), len(lengths))
    s = r.state
    return {
        "uniform": np.broadcast_to(uniform(r.meta.num_experts, r.meta.top_k, lengths), shape),
        "popularity": np.stack([expected_unique(c, r.tokens(c), r.spec.max_window) for c in r.counts()]),
        "label": r.label_union(),
        "request": r.ratio(s.request_union_sum, s.n_windows),
        "observed": r.ratio(s.union_sum, s.n_windows),
    }


def ladders(
    r: Replicates, batch_sizes: Iterable[int], drawable: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, Floats]]]:
    """Yield every rung, ``[replicates, L, T]``, for each batch size in ascending order.

    Parameters
    ----------
    r
        The group's sums.
    batch_sizes
        B, windows drawn independently into a batch. Above 1 their union is sum_e 1 - (1 - q_e)^B with q_e the share of
        windows that contain expert e; the sums must hold counts per expert.
    drawable
        ``[T]`` requests that have a window of each length. With fewer than B of them there is no such batch: NaN, but
        for ``uniform`` and ``popularity``, which do not depend on it.
    """
    sizes = np.unique(np.fromiter(batch_sizes, np.int64))
    if sizes[0] == 1:
        yield 1, ladder(r)
    larger = sizes[sizes > 1]
    for first in range(0, len(larger), _TOGETHER):
        yield from _batches(r, larger[first : first + _TOGETHER], drawable)


def _batches(
    r: Replicates, sizes: NDArray[np.int64], drawable: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, Floats]]]:
    """Yield the rungs of batch sizes above 1."""
    lengths = np.arange(1, r.spec.max_window + 1)
    shape = (len(r), len(r.meta.layers), len(lengths))
    unions = {name: np.full((*shape, len(sizes)), np.nan) for name in RUNGS[1:]}
    for i, shares in enumerate(r.shares()):
        for name, share in shares.items():
            unions[name][i] = independent_union(share.reshape(-1, share.shape[-1]), sizes).reshape(*shape[1:], -1)
    for j, size in enumerate(sizes.tolist()):
        rungs = {name: union[..., j] for name, union in unions.items()}
        for name in ("label", "request", "observed"):
            rungs[name][..., drawable < size] = np.nan
        yield (
            size,
            {"uniform": np.broadcast_to(uniform(r.meta.num_experts, r.meta.top_k, lengths * size), shape), **rungs},
        )
