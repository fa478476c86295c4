"""Experts that were predicted before the router chose: recorded beside the routing, and checked like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import Predictions, TraceMeta
from tracekit.sources import checks
from tracekit.sources.axes import Order
from tracekit.sources.base import RawPredictions
from tracekit.sources.files import RELEASE_BYTES, allocate, release
from tracekit.sources.layers import LayerPlan

_FARTHEST = 255
_LONGEST_NAME = 64


def checked_predictions(
    given: Sequence[RawPredictions], tokens: int, order: Order, plan: LayerPlan, meta: TraceMeta, where: str
) -> tuple[Predictions, ...]:
    """Check what predictors said about a request and take its MoE layers.

    Parameters
    ----------
    given
        As the reader tells them.
    tokens
        Rows of the request.
    order
        How the axes of the source become ``[tokens, layers, k]``.
    plan
        Which entries of the layer axis are MoE layers.
    meta
        The trace's shape.
    where
        File and request, for messages.

    Returns
    -------
    tuple of Predictions
        In canonical form; without those that predict nothing.

    Raises
    ------
    SourceError
        Naming the predictor whose array does not fit the routing, or the first id at fault.
    """
    done: dict[tuple[str, int], Predictions] = {}
    for raw in given:
        name = raw.predictor[:_LONGEST_NAME].encode("utf-8", "replace").decode("utf-8")
        at = f"{where}, predictor {name!r} from {raw.distance} MoE layers before"
        if not 1 <= len(raw.predictor) <= _LONGEST_NAME:
            raise SourceError(
                f"a predictor's name of {len(raw.predictor)} characters", where=at, expected=f"1 to {_LONGEST_NAME}"
            )
        if not 1 <= raw.distance <= _FARTHEST:
            raise SourceError(f"a distance of {raw.distance} MoE layers", where=at, expected=f"1 to {_FARTHEST}")
        if (name, raw.distance) in done:
            raise SourceError("predictions twice", where=at, expected="one array per predictor and distance")
        predictions = Predictions(name, raw.distance, *_checked(raw.ids, tokens, order, plan, meta, at))
        if predictions.known.any():
            done[name, raw.distance] = predictions
    if len({predictions.ids.shape[2] for predictions in done.values()}) > 1:
        counts = sorted({predictions.ids.shape[2] for predictions in done.values()})
        raise SourceError(
            f"predictors name different numbers of experts: {counts}",
            where=where,
            expected="as many for every predictor and distance",
        )
    return tuple(done.values())


def _checked(
    given: NDArray[Any], tokens: int, order: Order, plan: LayerPlan, meta: TraceMeta, where: str
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
    """Return ``[tokens, layers, m]`` ids, and ``[tokens, layers]`` which rows of them are predictions."""
    ids = np.transpose(given, order) if given.ndim == 3 else given
    fits = ids.ndim == 3 and ids.shape[:2] == (tokens, plan.size) and 1 <= ids.shape[2] <= meta.num_experts
    if not fits or ids.dtype.kind not in "ui":
        raise SourceError(
            f"predictions are {given.dtype} of shape {given.shape}",
            where=where,
            expected=f"integers for {tokens} tokens, {plan.size} layers and 1 to {meta.num_experts} experts each, "
            "in the order of the routing's axes",
        )
    out, known = _without_filler(plan.take(ids), meta.num_experts, where)
    return checks.checked_ids(out, meta.num_experts, meta.layers, where), known


def _without_filler(ids: NDArray[Any], num_experts: int, where: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return ids with rows of filler made harmless, and ``[tokens, layers]`` which rows are none."""
    tokens, layers, m = ids.shape
    filler = -1 if ids.dtype.kind == "i" else int(np.iinfo(ids.dtype).max)
    known = np.empty((tokens, layers), bool)
    out = allocate(ids.shape, ids.dtype)
    step, touched = max(1, checks.CHUNK_IDS // (layers * m)), 0
    different = np.arange(m).astype(ids.dtype)  # which passes the checks, and means nothing
    for start in range(0, tokens, step):
        chunk = np.ascontiguousarray(ids[start : start + step])
        there = (chunk != filler).any(axis=2)
        known[start : start + step] = there
        out[start : start + step] = np.where(there[..., None], chunk, different)
        touched += chunk.nbytes
        if touched >= RELEASE_BYTES:
            release(ids)
            release(out)
            touched = 0
    if m == 1 and filler < num_experts and not known.all():
        raise SourceError(
            f"{filler} may be expert {filler}, or no prediction",
            where=where,
            remedy="Save predictions in a larger type",
        )
    return out, known
