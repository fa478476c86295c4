"""What an expert cache sees of a trace: from blocks of routing rows to streams of events, token by token.

A stored trace is layer by layer, a cache runs through all layers of one token before the next. Requests are put back
together here, one or a batch at a time, so that memory does not grow with the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracekit.metrics.cache_spec import Start as Start
from tracekit.metrics.replay import Stream
from tracekit.metrics.state import layer_index
from tracekit.schema import Phase, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one request, in the order of their positions."""

    request: int
    ids: NDArray[np.unsignedinteger[Any]]
    """``[tokens, layers, k]``"""
    prompt: int
    """Rows before the first decode token; all tokens come one by one where the phase is not known, and this is 0."""


@njit(cache=True, nogil=True)
def _place(ids: Any, row: Any, length: Any, layer: Any, at: Any, out: Any) -> None:
    """Copy runs of ``ids[k, rows]`` to ``out[tokens, layers, k]``, each to its first token ``at``."""
    for run in range(len(row)):
        for i in range(length[run]):
            for r in range(ids.shape[0]):
                out[at[run] + i, layer[run], r] = ids[r, row[run] + i]


@njit(cache=True, nogil=True)
def _events(ids: Any, rows: Any, borders: Any, num_experts: int, experts: Any, offsets: Any) -> int:
    """Write the event of each step and layer: the distinct experts of its rows, by their last use.

    Parameters
    ----------
    ids
        ``[tokens, layers, k]``
    rows, borders
        The rows of each step, and ``[steps + 1]`` where they begin.
    experts, offsets
        As in a stream; ``experts`` with room for all of the rows' ids.

    Returns
    -------
    How many experts were written.
    """
    layers, k = ids.shape[1], ids.shape[2]
    seen = np.full(num_experts, -1, np.int64)
    end = 0
    for step in range(len(borders) - 1):
        for layer in range(layers):
            event = step * layers + layer
            begin = end
            for at in range(borders[step + 1] - 1, borders[step] - 1, -1):
                for r in range(k - 1, -1, -1):
                    e = ids[rows[at], layer, r]
                    if seen[e] != event:
                        seen[e] = event
                        experts[end] = e
                        end += 1
            experts[begin:end] = experts[begin:end][::-1].copy()
            offsets[event + 1] = end
    return end


def whole_requests(meta: TraceMeta, requests: pl.DataFrame, blocks: Iterable[Block], wanted: Any) -> Iterator[Rows]:
    """Yield the wanted requests one by one; a request that is split between blocks is put together first.

    Parameters
    ----------
    wanted
        ``[requests]`` bool.
    """
    index = layer_index(meta)
    tokens = requests["n_tokens"].to_numpy().astype(np.int64)
    start = requests["decode_start"].cast(int).fill_null(-1).to_numpy().astype(np.int64)
    parts: dict[int, tuple[NDArray[Any], int, NDArray[np.int64]]] = {}
    for block in blocks:
        runs = block.runs
        first = np.concatenate([[0], np.flatnonzero(np.diff(runs["request"])) + 1, [len(runs["request"])]])
        for begin, end in pairwise(first.tolist()):
            if begin == end or not wanted[number := int(runs["request"][begin])]:
                continue
            row, n, pos = (runs[name][begin:end] for name in ("row", "n", "pos"))
            layer = index[runs["layer"][begin:end]]
            if number not in parts:
                parts[number] = (
                    np.empty((tokens[number], len(meta.layers), meta.top_k), block.ids.dtype),
                    0,
                    np.zeros(len(meta.layers), np.int64),
                )
            out, prompt, filled = parts.pop(number)
            # Runs are in the order of layers, then positions: a layer's rows follow each other.
            before = np.cumsum(n) - n
            new = np.concatenate([[True], layer[1:] != layer[:-1]])
            at = filled[layer] + before - np.maximum.accumulate(np.where(new, before, 0))
            _place(block.ids, row, n, layer, at, out)
            if layer[0] == 0 and start[number] >= 0:
                mine = layer == 0
                prompt += int(np.clip(start[number] - pos[mine], 0, n[mine]).sum())
            filled += np.bincount(layer, weights=n, minlength=len(meta.layers)).astype(np.int64)
            if filled[-1] == tokens[number]:
                yield Rows(number, out, prompt)
            else:
                parts[number] = (out, prompt, filled)


def batches(requests: Iterable[Rows], unit: NDArray[np.int64], batch_size: int) -> Iterator[tuple[int, list[Rows]]]:
    """Yield the requests that run together, with the number of their unit; ``unit`` is ``[requests]``."""
    waiting: dict[int, list[Rows]] = {}
    for rows in requests:
        number = int(unit[rows.request])
        waiting.setdefault(number, []).append(rows)
        if len(waiting[number]) == batch_size:
            yield number, waiting.pop(number)


def stream(meta: TraceMeta, together: list[Rows], phase: Phase, start: Start, cell: int) -> Stream:
    """Return what a cache sees of requests that begin together: their prompts in one step, then a token of each a step.

    Where one of several ends, the batch ends: steps of fewer requests would be those of a smaller batch. Counted are
    the steps of the phase.
    """
    prompts = [np.arange(rows.prompt) for rows in together] if start != "cold" or phase != "decode" else []
    steps = 0 if phase == "prefill" else min(len(rows.ids) - rows.prompt for rows in together)
    # The rows of all requests after one another, and where each one's begin.
    first = np.cumsum([0, *(len(rows.ids) for rows in together)])
    ids = together[0].ids if len(together) == 1 else np.concatenate([rows.ids for rows in together])
    prompt = np.concatenate([at + base for at, base in zip(prompts, first, strict=False)] or [np.zeros(0, np.int64)])
    heads = np.array([base + rows.prompt for base, rows in zip(first, together, strict=False)])
    decode = (heads + np.arange(steps)[:, None]).reshape(-1)
    sizes = [len(prompt)] * (len(prompt) > 0) + [len(together)] * steps
    cells, tokens = np.full(len(sizes), cell, np.int64), np.array(sizes, np.int64)
    if len(prompt) and phase == "decode":
        cells[0] = -1
    borders = np.concatenate([np.zeros(1, np.int64), tokens.cumsum()])
    layers = len(meta.layers)
    most = np.minimum(tokens * meta.top_k, meta.num_experts)
    experts = np.empty(int(most.sum()) * layers, np.uint16)
    offsets = np.zeros(len(sizes) * layers + 1, np.int64)
    _events(ids, np.concatenate([prompt, decode]).astype(np.int64), borders, meta.num_experts, experts, offsets)
    return Stream(experts[: offsets[-1]], offsets, cells, tokens)


def joined(streams: list[Stream]) -> Stream:
    """Return streams one after the other, as one."""
    ends = np.cumsum([0, *(s.offsets[-1] for s in streams)])
    offsets = [s.offsets[1:] + end for s, end in zip(streams, ends, strict=False)]
    return Stream(
        np.concatenate([s.experts for s in streams]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([s.cells for s in streams]),
        np.concatenate([s.tokens for s in streams]),
    )
