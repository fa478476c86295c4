"""Padded batches ``[requests, tokens, layers, k]``, as verl keeps them, cut into requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray
from tracekit.sources.checks import CHUNK_IDS

_PROMPT_LENS = ("prompt_lens", "prompt_len", "prompt_lengths")
_OUTPUT_LENS = ("response_lens", "response_len", "response_lengths", "output_lens", "output_len")

SIDE_KEYS = ("attention_mask", "input_ids", "prompts", "responses", *_PROMPT_LENS, *_OUTPUT_LENS)
"""Arrays beside a batch that say which of its rows are tokens."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of one request in a batch."""

    first: int
    """Row of its first token."""
    last: int
    """One past its last row with routing."""
    prompt_len: int | None
    token_ids: NDArray[np.int64] | None


def cut_batch(ids: AnyArray, side: dict[str, AnyArray], where: str) -> Iterator[Cut]:
    """Yield the rows of each request of a batch, without its padding.

    A prompt is padded on its left, a response on its right, and rows without routing are zero: padding, and the last
    sampled token, which was never forwarded.

    Parameters
    ----------
    ids
        Integers ``[requests, tokens, layers, k]``.
    side
        What the file has of `SIDE_KEYS`: ``attention_mask`` and ``input_ids`` ``[requests, tokens]``, ``prompts`` and
        ``responses`` ``[requests, width]``, and lengths ``[requests]``.
    where
        For messages.

    Raises
    ------
    SourceError
        If what the file says of padding contradicts the batch, or nothing tells padding from routing.
    """
    _check(ids, side, where)
    mask, tokens = side.get("attention_mask"), side.get("input_ids")
    prompt_lens, output_lens = _lengths(side, _PROMPT_LENS), _lengths(side, _OUTPUT_LENS)
    boundary = _boundary(ids, side)
    counted = boundary is not None and prompt_lens is not None and output_lens is not None
    if mask is None and not counted and ids.shape[3] == 1:
        raise SourceError(
            "a batch with k = 1, where rows of padding look like routing to expert 0",
            where=where,
            remedy="Save attention_mask [requests, tokens] beside it: numpy.savez(path, routed_experts=…, "
            "attention_mask=…)",
        )
    for request in range(ids.shape[0]):
        here = f"{where}, request {request} of the batch"
        prompt_len = None if prompt_lens is None else int(prompt_lens[request])
        if mask is not None:
            first, end = _masked(mask[request], here)
        elif boundary is not None and prompt_len is not None and output_lens is not None:
            first, end = boundary - prompt_len, boundary + int(output_lens[request])
        else:
            first, end = _routed(ids[request])
        if not 0 <= first <= end <= ids.shape[1]:
            raise SourceError(
                f"tokens {first} to {end} of a batch of {ids.shape[1]}", where=here, expected="lengths within the batch"
            )
        if prompt_len is None and boundary is not None and first < boundary:
            prompt_len = min(boundary, end) - first
        last = end
        # The last sampled token has no routing: a zero row, which with k = 1 only its place gives away.
        if (mask is not None or counted) and last > first and (ids.shape[3] == 1 or not ids[request, last - 1].any()):
            last -= 1
        yield Cut(first, last, prompt_len, _tokens(tokens, request, first, end))


def _check(ids: AnyArray, side: dict[str, AnyArray], where: str) -> None:
    if not ids.size:
        raise SourceError(f"the batch of shape {ids.shape} is empty", where=where, expected="tokens in it")
    if ids.dtype.kind not in "ui":
        raise SourceError(f"the batch is {ids.dtype}", where=where, expected="integers [requests, tokens, layers, k]")
    for key in ("attention_mask", "input_ids"):
        array = side.get(key)
        if array is not None and array.shape != ids.shape[:2]:
            raise SourceError(
                f"{key} has shape {array.shape} beside a batch of {ids.shape}",
                where=where,
                expected="one entry per request and token",
            )
    for key, array in side.items():
        if array.dtype.kind not in "uib" or array.shape[:1] != ids.shape[:1]:
            raise SourceError(
                f"{key} is {array.dtype} of shape {array.shape} for {ids.shape[0]} requests",
                where=where,
                expected="whole numbers for each request",
            )


def _lengths(side: dict[str, AnyArray], keys: tuple[str, ...]) -> AnyArray | None:
    return next((side[key] for key in keys if key in side and side[key].ndim == 1), None)


def _boundary(ids: AnyArray, side: dict[str, AnyArray]) -> int | None:
    """Return the column at which responses begin."""
    if "prompts" in side and side["prompts"].ndim == 2:
        return int(side["prompts"].shape[1])
    if "responses" in side and side["responses"].ndim == 2:
        return int(ids.shape[1] - side["responses"].shape[1])
    return None


def _masked(mask: AnyArray, where: str) -> tuple[int, int]:
    """Return the run of tokens in one row of an attention mask."""
    on = np.flatnonzero(mask)
    if not on.size:
        return 0, 0
    first, end = int(on[0]), int(on[-1]) + 1
    if end - first != on.size:
        raise SourceError(
            "an attention mask with a gap",
            where=where,
            expected="padding on the left of the prompt and on the right of the response only",
            remedy="Save each request as [tokens, layers, k]",
        )
    return first, end


def _routed(ids: AnyArray) -> tuple[int, int]:
    """Return the run of rows between the zero rows at both ends of ``[tokens, layers, k]``."""
    step = max(1, CHUNK_IDS // max(1, ids.shape[1] * ids.shape[2]))
    first = end = 0
    found = False
    for start in range(0, len(ids), step):
        rows = np.flatnonzero(ids[start : start + step].any(axis=(1, 2)))
        if rows.size:
            first, end, found = (first if found else start + int(rows[0])), start + int(rows[-1]) + 1, True
    return first, end


def _tokens(tokens: AnyArray | None, request: int, first: int, end: int) -> NDArray[np.int64] | None:
    return None if tokens is None else tokens[request, first:end].astype(np.int64)
