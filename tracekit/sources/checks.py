"""The checks that every id passes, at the speed of the memory: range, negative ids, duplicates, filler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.rows import is_cycle
from tracekit.errors import SourceError
from tracekit.schema import id_dtype
from tracekit.sources.files import RELEASE_BYTES, allocate, release

CHUNK_IDS = 1 << 18
"""Ids checked at once: small enough for the cache, large enough for numpy's call overhead."""
_BY_CHANCE = math.log(1e-9)
"""A pattern less likely than this under random routing is taken for an artefact."""

Ids = NDArray[Any]


def _has_duplicates(flat: NDArray[Any], top_k: int) -> bool:
    ranks = np.ascontiguousarray(flat.reshape(-1, top_k).T)
    return any(bool(np.equal(ranks[d:], ranks[:-d]).any()) for d in range(1, top_k))


def checked_ids(ids: Ids, num_experts: int, layers: tuple[int, ...], where: str) -> NDArray[np.unsignedinteger[Any]]:
    """Check every id and return them in the smallest unsigned type.

    Parameters
    ----------
    ids
        Integers ``[tokens, layers, k]``, any layout. Returned as they are, a memory map
        included, where the type is right already.
    num_experts
        N.
    layers
        Layer numbers, for messages.
    where
        File and request, for messages.

    Raises
    ------
    SourceError
        Naming token row, layer and value of the first id that is negative, not below N, or
        twice in its row.
    """
    tokens, width, top_k = ids.shape
    dtype = np.dtype(id_dtype(num_experts))
    out = ids if ids.dtype == dtype else allocate(ids.shape, dtype)
    step = max(1, CHUNK_IDS // (width * top_k))
    touched = 0
    signed, may_exceed = ids.dtype.kind == "i", int(np.iinfo(ids.dtype).max) >= num_experts
    for start in range(0, tokens, step):
        chunk = np.ascontiguousarray(ids[start : start + step])
        flat = chunk.reshape(-1)
        wrong = (signed and flat.min() < 0) or (may_exceed and flat.max() >= num_experts)
        if not wrong and out is not ids:
            flat = flat.astype(dtype)
            out[start : start + step] = flat.reshape(chunk.shape)
        if wrong or _has_duplicates(flat, top_k):
            raise _first_fault(chunk, start, num_experts, layers, where)
        touched += chunk.nbytes
        if touched >= RELEASE_BYTES:
            release(ids)
            release(out)
            touched = 0
    return out


def _first_fault(chunk: Ids, start: int, num_experts: int, layers: tuple[int, ...], where: str) -> SourceError:
    ordered = np.sort(chunk, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    outside = ((chunk < 0) | (chunk >= num_experts)).any(axis=-1)
    token, layer = (int(i) for i in np.argwhere(repeated | outside)[0])
    row = [int(value) for value in chunk[token, layer]]
    where = f"{where}, token row {start + token}, layer {layers[layer]}"
    expected = f"{len(row)} different ids from 0 to {num_experts - 1}"
    worst = next((value for value in row if value < 0), None)
    if worst is not None:
        return SourceError(
            f"negative expert id {worst}",
            where=where,
            expected=expected,
            remedy="-1 marks padding or rows that were not captured: drop those rows before saving",
        )
    worst = next((value for value in row if value >= num_experts), None)
    if worst is not None:
        return SourceError(
            f"expert id {worst} of {num_experts} experts",
            where=where,
            expected=expected,
            remedy="Ids of physical replicas (expert-parallel load balancing) and fused shared experts do this; "
            "else give the right --num-experts",
        )
    worst = next(value for i, value in enumerate(row) if value in row[:i])
    hint = (
        "Rows of zeros are tokens whose routing was not captured"
        if not any(row)
        else "Padding and a wrong axis order do this: see --axes"
    )
    return SourceError(f"expert {worst} twice in one row {_short(row)}", where=where, expected=expected, remedy=hint)


def _short(row: list[int]) -> str:
    return str(row) if len(row) <= 16 else str(row[:16])[:-1] + ", …]"


def checked_weights(weights: NDArray[Any], layers: tuple[int, ...], where: str) -> NDArray[Any]:
    """Return router weights ``[tokens, layers, k]`` as they are.

    Raises
    ------
    SourceError
        Naming token row, layer and value of the first that is negative, infinite or no number.
    """
    tokens, width, top_k = weights.shape
    step, touched = max(1, CHUNK_IDS // (width * top_k)), 0
    for start in range(0, tokens, step):
        chunk = np.asarray(weights[start : start + step])
        if not (chunk.min() >= 0 and chunk.max() < np.inf):
            token, layer, rank = (int(i) for i in np.argwhere(~((chunk >= 0) & (chunk < np.inf)))[0])
            raise SourceError(
                f"router weight {chunk[token, layer, rank]:g}",
                where=f"{where}, token row {start + token}, layer {layers[layer]}",
                expected="finite weights from 0 on",
                remedy="Logits are no weights: save what the experts are weighted with, or leave the weights out",
            )
        touched += chunk.nbytes
        if touched >= RELEASE_BYTES:
            release(weights)
            touched = 0
    return weights


def refuse_filler(ids: Ids, num_experts: int, where: str) -> None:
    """Refuse an array whose last row is ``0 .. k-1`` in every layer: what trainers pad with."""
    _, width, top_k = ids.shape
    if top_k == 1 or not (ids[-1] == np.arange(top_k)).all():
        return
    if -width * math.log(math.comb(num_experts, top_k)) < _BY_CHANCE:
        raise SourceError(
            f"the last row is 0..{top_k - 1} in each of its {width} layers: padding",
            where=where,
            expected="routing of real tokens only",
            remedy="Cut the array at the request's real length",
        )


def refuse_argsort_view(ids: Ids, num_experts: int, where: str) -> None:
    """Refuse whole rankings cut into rows of k: every N/k consecutive rows hold every expert once.

    llama.cpp's ``ffn_moe_topk`` is a view of a full argsort; copied flat it becomes this.
    """
    tokens, _, top_k = ids.shape
    group, rest = divmod(num_experts, top_k)
    if rest or group < 2 or tokens % group:
        return
    sample = np.asarray(ids[: min(tokens, 64 * group), 0]).reshape(-1, num_experts)
    if (np.sort(sample, axis=1) != np.arange(num_experts)).any() or is_cycle(sample, top_k):
        return
    of_one = math.lgamma(num_experts + 1) - group * math.lgamma(top_k + 1)
    chance = len(sample) * (of_one - group * math.log(math.comb(num_experts, top_k)))
    if chance < _BY_CHANCE:
        raise SourceError(
            f"every {group} consecutive rows hold each of the {num_experts} experts once: "
            "whole rankings cut into pieces, not the chosen experts",
            where=where,
            expected=f"the first {top_k} ids of each token's ranking",
            remedy="ffn_moe_topk is a strided view: copy k ids per token with its row stride nb[1]",
        )


def is_sorted(ids: Ids, num_experts: int) -> bool:
    """Whether every row is strictly ascending, and too many are for that to be chance."""
    tokens, width, top_k = ids.shape
    if top_k < 2 or -tokens * width * math.lgamma(top_k + 1) > _BY_CHANCE:
        return False
    step = max(1, CHUNK_IDS // (width * top_k))
    for start in range(0, tokens, step):
        chunk = ids[start : start + step]
        if not (chunk[..., 1:] > chunk[..., :-1]).all():
            return False
    return True


def falls_with_rank(weights: NDArray[Any]) -> bool:
    """Whether no router weight is larger than the one before it, and some are smaller."""
    sample = np.asarray(weights[:4096])
    before, after = sample[..., :-1], sample[..., 1:]
    return bool(sample.shape[-1] > 1 and (after <= before).all() and (after < before).any())
