"""Counts per expert from sources that keep no tokens: whole numbers, one layer axis, one k."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import TraceMeta
from tracekit.sources.base import AnyArray, RawCounts
from tracekit.sources.layers import LayerPlan

Counts = NDArray[np.int64]

_MOST = 1 << 62


def checked_counts(raw: RawCounts, where: str) -> Counts:
    """Return ``[layers, experts]`` as int64.

    Raises
    ------
    SourceError
        If the array has another shape, or a count is negative, fractional or absurd.
    """
    counts = raw.counts
    if counts.ndim != 2 or counts.dtype.kind not in "uif" or not counts.shape[1]:
        raise SourceError(
            f"the counts are {counts.dtype} of shape {counts.shape}", where=where, expected="numbers [layers, experts]"
        )
    for wrong, what in (
        (~(np.abs(counts) < _MOST) if counts.dtype.kind == "f" else counts > _MOST, "beyond all counting"),
        (counts < 0, "negative"),
        (counts != np.floor(counts), "a fraction"),
    ):
        if wrong.any():
            layer, expert = (int(i) for i in np.argwhere(wrong)[0])
            raise SourceError(
                f"the count {counts[layer, expert]} is {what}",
                where=f"{where}, layer {_number(raw, layer)}, expert {expert}",
                expected="whole numbers of tokens",
                remedy="Averages and probabilities are no counts: save what was counted",
            )
    return counts.astype(np.int64)


def _number(raw: RawCounts, entry: int) -> int:
    known = raw.layer_ids is not None and entry < len(raw.layer_ids)
    return raw.layer_ids[entry] if known and raw.layer_ids is not None else entry


def is_rounded(counts: AnyArray) -> bool:
    """Whether floats hold counts too large for them to be exact."""
    return counts.dtype.kind == "f" and bool((counts > 2 ** (np.finfo(counts.dtype).nmant + 1)).any())


def tokens_of(counts: Counts, top_k: int) -> int | None:
    """Return the tokens that canonical counts ``[layers, experts]`` stand for; None where k is not known.

    Layers that saw fewer tokens than others (llama.cpp's last one) do not count.
    """
    return int(counts.sum(axis=1).max(initial=0)) // top_k if top_k else None


def check_counts(counts: Counts, plan: LayerPlan, meta: TraceMeta, where: str, *, exact: bool) -> None:
    """Check counts against the layers and the k of the trace.

    Parameters
    ----------
    counts
        ``[layers, experts]`` with the layer axis of the source.
    plan
        Which entries are MoE layers.
    exact
        Whether the source holds the counts as they were, and not rounded.

    Raises
    ------
    SourceError
        If a layer that the first record left out has tokens, or the counts of a layer are not those of tokens that
        choose k different experts each.
    """
    stray = [entry for entry in plan.left_out if counts[entry].any()]
    if stray:
        raise SourceError(
            f"layer {stray[0]} has tokens in this record but none in the first one",
            where=where,
            expected="the same layers in every record",
            remedy="Give --config to name the MoE layers",
        )
    if not meta.top_k or not exact:
        return
    for number, layer in zip(meta.layers, counts[list(plan.keep)], strict=True):
        total, most = int(layer.sum()), int(layer.max())
        if total % meta.top_k:
            raise SourceError(
                f"layer {number} has {total} routed experts in all, no multiple of k {meta.top_k}",
                where=where,
                expected="k experts a token",
                remedy="Give the right --top-k or --config",
            )
        if most > total // meta.top_k:
            raise SourceError(
                f"layer {number} has an expert with {most} of {total // meta.top_k} tokens",
                where=where,
                expected=f"each token to choose {meta.top_k} different experts",
                remedy="Give the right --top-k or --config",
            )
