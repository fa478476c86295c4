"""Unique experts per verification window: observed, and under each baseline.

The ladder, from the baseline that explains nothing to the trace: ``uniform``, ``popularity``, ``label``, ``request``,
observed. Formulas: Hurlbert's rarefaction (Ecology 52, 1971) for ``request``, the coupon-collector expectation for
the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.kernels import expected_unique
from tracekit.metrics.replicates import Replicates

RUNGS = ("uniform", "popularity", "label", "request", "observed")


def uniform(num_experts: int, top_k: int, tokens: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Return N (1 - (1 - k/N)^tokens), unique experts if every k-subset is equally likely."""
    return np.asarray(num_experts * (1 - (1 - top_k / num_experts) ** np.asarray(tokens, np.float64)))


def ladder(
    r: Replicates, batch_size: int = 1, drawable: NDArray[np.int64] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return every rung, ``[replicates, L, T]``, for a batch of windows drawn independently.

    Parameters
    ----------
    r
        The group's sums.
    batch_size
        B, windows in the batch. Above 1 the union of B independent windows is sum_e 1 - (1 - q_e)^B with q_e the share
        of windows that contain expert e; the sums must hold counts per expert.
    drawable
        ``[T]`` requests that have a window of each length. With fewer than B of them there is no such batch: NaN, but
        for ``uniform`` and ``popularity``, which do not depend on it.
    """
    lengths = np.arange(1, r.spec.max_window + 1)
    shape = (len(r), len(r.meta.layers), len(lengths))
    rungs = {"uniform": np.broadcast_to(uniform(r.meta.num_experts, r.meta.top_k, lengths * batch_size), shape)}
    s = r.state
    if batch_size == 1:
        counts = r.counts()
        flat = counts.reshape(-1, counts.shape[-1])
        rungs["popularity"] = expected_unique(flat, r.tokens(flat), r.spec.max_window).reshape(shape)
        rungs["label"] = r.label_union()
        rungs["request"] = r.ratio(s.request_union_sum, s.n_windows)
        rungs["observed"] = r.ratio(s.union_sum, s.n_windows)
        return rungs
    out = {name: np.full(shape, np.nan) for name in RUNGS[1:]}
    counts = r.counts()
    there = np.ones(shape[2], bool) if drawable is None else drawable >= batch_size
    for i in range(len(r)):
        members = r.members if i == 0 else r.members[r.members != r.left_out[i - 1]]
        windows = s.n_windows[members].sum(axis=0)[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = {"popularity": r.presence(counts[i])}
            if len(s.expert_windows):
                shares |= {
                    "request": np.where(windows > 0, s.request_expert_windows[members].sum(axis=0) / windows, np.nan),
                    "observed": np.where(windows > 0, s.expert_windows[members].sum(axis=0) / windows, np.nan),
                }
        if r.cells.labels:
            shares["label"] = r.label_presence(i)
        for name, share in shares.items():
            out[name][i] = (1 - _power(1 - share, batch_size)).sum(axis=-1)
            if name != "popularity":
                out[name][i][:, ~there] = np.nan
    return rungs | out


def _power(base: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    """Raise to a positive integer power by squaring, much faster than ``**`` on large arrays."""
    result: NDArray[np.float64] | None = None
    while exponent:
        if exponent & 1:
            result = base if result is None else result * base
        base = base * base
        exponent >>= 1
    assert result is not None
    return result
