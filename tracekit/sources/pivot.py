"""Rows in any order, one per token and layer or one per routed expert, put into arrays ``[tokens, layers, k]``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import allocate

TOGETHER = "Sort the rows by request, so that those of a request stand together"
"""What to do where rows of several requests are mixed."""


def one_axis(token: NDArray[np.int64], phase: NDArray[np.int8]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Count the tokens of decoding on from the prompt where they begin again at 0, and say so.

    Parameters
    ----------
    token, phase
        ``[rows]`` of one request; phase 0 is prefill, 1 decode.
    """
    decode = phase == 1
    if not decode.any() or decode.all() or token[decode].min() > 0:
        return token, ()
    note = "token numbers begin again at 0 where decoding does: they were counted on from the end of the prompt"
    return np.where(decode, token + token[~decode].max() + 1, token), (note,)


def prompt_length(token: NDArray[np.int64], phase: NDArray[np.int8], where: str) -> int:
    """Return the prompt's length: the first token of phase 1, or one more than the last of phase 0.

    Raises
    ------
    SourceError
        If phases overlap.
    """
    prompt, decode = token[phase == 0], token[phase == 1]
    if prompt.size and decode.size and prompt.max() >= decode.min():
        raise SourceError(
            f"has prefill at token {int(prompt.max())} and decoding at token {int(decode.min())}",
            where=where,
            expected="the prompt before what is decoded",
        )
    return int(decode.min()) if decode.size else int(prompt.max()) + 1


def order_rows(
    cell: NDArray[np.int64],
    tokens: NDArray[np.int64],
    layers: NDArray[np.uint16],
    rank: NDArray[np.uint16] | None,
    ids: NDArray[np.uint16],
    where: str,
) -> tuple[NDArray[np.int64], int]:
    """Return the order of rows that makes them ``[tokens, layers, ranks]``, and k.

    Parameters
    ----------
    cell
        ``[rows]`` index of token times number of layers, plus index of layer.
    tokens, layers
        What the indices stand for.
    rank
        ``[rows]`` place of the expert among those of its token, None: as the rows come.
    ids
        ``[rows]`` one expert a row, or ``[rows, k]``.
    where
        File and request, for messages.

    Raises
    ------
    SourceError
        If a token lacks a row in some layer, or has too many.
    """
    cells = len(tokens) * len(layers)
    order = np.argsort(cell, kind="stable") if rank is None else np.lexsort((rank, cell))
    ordered = cell[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1])
    found, sizes = ordered[starts], np.diff(np.append(starts, len(ordered)))

    def place(number: int) -> str:
        return f"{where}, token {int(tokens[number // len(layers)])}, layer {int(layers[number % len(layers)])}"

    k = ids.shape[1] if ids.ndim == 2 else int(np.bincount(sizes).argmax())
    rows = 1 if ids.ndim == 2 else k
    if (sizes != rows).any():
        wrong = int(np.argmax(sizes != rows))
        remedy = TOGETHER + "; a trace cut off while it was written ends like this too: cut its last token"
        raise SourceError(
            f"has {int(sizes[wrong])} rows",
            where=place(int(found[wrong])),
            expected=f"{rows} of each token and layer",
            remedy=remedy,
        )
    if len(found) != cells:
        missing = (
            int(np.argmax(found != np.arange(len(found)))) if (found != np.arange(len(found))).any() else len(found)
        )
        raise SourceError(
            "has no rows",
            where=place(missing),
            expected="every layer of every token",
            remedy="A trace cut off while it was written ends like this: cut its last token. " + TOGETHER,
        )
    if rank is not None:
        ranks = rank[order].reshape(cells, k)
        off = (ranks != ranks.min() + np.arange(k)).any(axis=1)
        if off.any():
            wrong = int(np.argmax(off))
            raise SourceError(
                f"has the ranks {[int(r) for r in ranks[wrong][:16]]}",
                where=place(wrong),
                expected=f"{k} different ones, from {int(ranks.min())} on",
                remedy=TOGETHER,
            )
    return order, k


def take(values: NDArray[Any], order: NDArray[np.int64], shape: tuple[int, int, int], dtype: Any) -> NDArray[Any]:
    """Return the values in that order as ``[tokens, layers, k]``."""
    out = allocate(shape, dtype)
    flat = out.reshape(-1, shape[2]) if values.ndim == 2 else out.reshape(-1)
    np.take(values, order, axis=0, out=flat)
    return out
