"""Popularity and balance of experts within a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def balance(counts: NDArray[np.int64], top_k: int) -> dict[str, NDArray[Any]]:
    """Return the popularity and balance of experts, from ``counts[L, N]``; each value ``[L]``.

    Population standard deviation, uncorrected Gini, natural logarithm; ``top_share`` is the share of all activations
    that the k most popular experts take. NaN for a layer without tokens, and for what needs k where that is 0: unknown.
    """
    n = counts.shape[1]
    total = counts.sum(axis=1)
    ordered = np.sort(counts, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = counts / total[:, None]
        entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(axis=1)
        entropy = np.where(total > 0, entropy, np.nan)
        mean = total / n
        p = counts * top_k / total[:, None]
        unknown = np.full(len(counts), np.nan)
        return {
            "tokens": total // top_k if top_k else unknown,
            "max_over_mean": counts.max(axis=1) / mean,
            "cv": counts.std(axis=1) / mean,
            "gini": ((2 * np.arange(1, n + 1) - n - 1) * ordered).sum(axis=1) / (n * total),
            "entropy": entropy,
            "entropy_norm": entropy / np.log(n) if n > 1 else np.full(len(counts), np.nan),
            "effective_experts": np.exp(entropy),
            "dead_experts": (counts == 0).sum(axis=1),
            "top_share": ordered[:, -top_k:].sum(axis=1) / total if top_k else unknown,
            "sum_p2_over_k": np.square(p).sum(axis=1) / top_k if top_k else unknown,
        }
