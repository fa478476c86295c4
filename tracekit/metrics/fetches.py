"""What each token has to fetch, layer by layer: with a cache, with predictions, and with both.

A cache holds experts of one layer, by LRU those that were used last. All experts of a token are looked up before any is
kept, and a prompt is one event, after which all of its experts are there until the next (:mod:`tracekit.metrics.replay`
has the rules). Predicted experts are copied beside it and enter it only when they are used: what a cache holds does not
depend on the predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tracekit.metrics import replay
from tracekit.metrics.cache_spec import Start
from tracekit.metrics.replay import Stream
from tracekit.metrics.streams import Rows, stream, whole_requests
from tracekit.schema import Phase, TraceMeta

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Block

MISSED, RIGHT, WRONG, RIGHT_ABSENT, WRONG_ABSENT, EXECUTED = range(6)
"""Counts of experts, the last axis of ``Fetches.counts``: those of the router that the cache lacks; those that were
predicted and needed; predicted in vain; of both those that the cache lacks; and those needed among the first k that
were predicted."""
COUNTS = 6

POLICIES = ("lru", "lfu", "lfru", "belady", "random")
"""Those of a cache that can be followed token by token: all but the static hot list."""

Predict = Callable[[Rows], tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]]
"""Takes a request; returns the experts predicted of its rows ``[tokens, L, m]``, the likeliest first, and where there
are predictions ``[tokens, L]``."""


@dataclass(frozen=True, slots=True)
class Fetches:
    """What the tokens of some requests have to fetch."""

    counts: NDArray[np.uint16]
    """``[tokens, L, 6]`` experts, by ``MISSED`` … ``EXECUTED``."""
    known: NDArray[np.bool_]
    """``[tokens, L]`` where there is a prediction."""
    request: NDArray[np.int64]
    """``[tokens]`` the request."""
    row: NDArray[np.int64]
    """``[tokens]`` the row of the request."""
    width: int
    """m, experts that a prediction names; 0 without a predictor."""


@njit(cache=True, nogil=True)
def _resident(last: Any, expert: int, capacity: int) -> bool:
    """Return whether the cache holds an expert: if it was used in the last event, or fewer than the capacity since."""
    N = len(last) - 2
    used = last[expert]
    if capacity == 0 or used == 0:
        return False
    if used > last[N + 1]:
        return True
    above = 0
    for other in range(N):
        above += last[other] > used
    return above < capacity


@njit(cache=True, nogil=True)
def fetch(
    ids: Any, predicted: Any, known: Any, counted: Any, together: Any, capacity: int, last: Any, out: Any
) -> None:
    """Look up the tokens of a request and what was predicted of them, and keep what they used.

    Parameters
    ----------
    ids
        ``[n, L, k]`` routed experts.
    predicted, known
        ``[n, L, m]`` and ``[n, L]``.
    counted
        ``[n]`` whether the token is looked up; the others only warm the cache up.
    together
        ``[n]`` whether the token belongs to the event of the one before it.
    capacity
        Experts that the cache of a layer holds; 0 for none.
    last
        ``[L, N + 2]`` int64: when each expert was used last, counted in uses from 1 on; the uses so far; those before
        the last event. All 0: an empty cache.
    out
        ``[n, L, 6]`` uint16, added to where a token is counted.
    """
    n, L, k = ids.shape
    N, m = last.shape[1] - 2, predicted.shape[2]
    needed = np.zeros(N, np.bool_)
    named = np.full(N, -1, np.int64)
    for i in range(n):
        for layer in range(L):
            kept, told = last[layer], out[i, layer]
            if counted[i]:
                for r in range(k):
                    needed[ids[i, layer, r]] = True
                    told[MISSED] += not _resident(kept, ids[i, layer, r], capacity)
                for r in range(m if known[i, layer] else 0):
                    e = predicted[i, layer, r]
                    if named[e] == i * L + layer:
                        continue  # named twice, copied once
                    named[e] = i * L + layer
                    absent = not _resident(kept, e, capacity)
                    if needed[e]:
                        told[RIGHT] += 1
                        told[RIGHT_ABSENT] += absent
                        told[EXECUTED] += r < k
                    else:
                        told[WRONG] += 1
                        told[WRONG_ABSENT] += absent
                for r in range(k):
                    needed[ids[i, layer, r]] = False
            if not together[i]:
                kept[N + 1] = kept[N]
            for r in range(k):
                kept[N] += 1
                kept[ids[i, layer, r]] = kept[N]


def fetches(
    meta: TraceMeta,
    requests: pl.DataFrame,
    phase: Phase,
    blocks: Iterable[Block],
    chosen: NDArray[np.bool_],
    *,
    capacity: int = 0,
    policy: str = "lru",
    start: Start = "prompt",
    predict: Predict | None = None,
    seed: int = 0,
) -> Fetches:
    """Replay requests, a token at a time.

    Parameters
    ----------
    meta, requests
        The trace, and its requests in order.
    phase
        Whose tokens are counted, one after the other. Of ``decode`` the rows before them are the prompt.
    blocks
        Its routing rows.
    chosen
        ``[requests]`` whose tokens are counted.
    capacity
        Experts a layer that the cache holds; 0 for none.
    policy
        ``lru``, or one of ``POLICIES``: of those only what the router's experts miss is known, and ``RIGHT_ABSENT`` and
        ``WRONG_ABSENT`` count as without a cache.
    start
        What the cache of a request begins with, one of :data:`tracekit.metrics.cache_spec.STARTS`.
    predict
        The predictor; None for none.
    seed
        Of the policy ``random``.
    """
    shape = (len(meta.layers), meta.num_experts + 2)
    last = np.zeros(shape, np.int64)
    parts: list[tuple[Any, ...]] = []
    width = 0
    wanted = chosen | (start == "carry")
    for rows in whole_requests(meta, requests, blocks, wanted):
        n = len(rows.ids)
        decoded = np.arange(n) >= rows.prompt
        of_phase = {"decode": decoded, "prefill": ~decoded, "all": np.ones(n, bool)}[phase]
        counted = of_phase & chosen[rows.request]
        # The prompt is evaluated at once; what is counted goes token by token.
        together = ~of_phase & ~decoded
        together[:1] = False
        if start != "carry":
            last = np.zeros(shape, np.int64)
        predicted, known = np.zeros((n, shape[0], 0), np.uint16), np.zeros((n, shape[0]), bool)
        if predict is not None:
            predicted, known = predict(rows)
            width = predicted.shape[2]
        seen = slice(rows.prompt if start == "cold" and phase == "decode" else 0, None)
        out = np.zeros((n, shape[0], COUNTS), np.uint16)
        held = capacity if policy == "lru" else 0
        fetch(rows.ids[seen], predicted[seen], known[seen], counted[seen], together[seen], held, last, out[seen])
        if policy != "lru" and counted.any():
            alone = rows if phase == "decode" else Rows(rows.request, rows.ids[counted], 0)
            events = stream(meta, [alone], "decode", start, 0)
            out[counted, :, MISSED] = meta.top_k - _hits(meta, events, policy, capacity, seed)
        if counted.any():
            parts.append((out[counted], known[counted], rows.request, np.flatnonzero(counted)))
    counts, known_parts, numbers, places = zip(*parts, strict=True) if parts else ((), (), (), ())
    lengths = [len(place) for place in places]
    return Fetches(
        np.concatenate([np.zeros((0, shape[0], COUNTS), np.uint16), *counts]),
        np.concatenate([np.zeros((0, shape[0]), bool), *known_parts]),
        np.repeat(np.array(numbers, np.int64), lengths),
        np.concatenate([np.zeros(0, np.int64), *places]),
        width,
    )


def _hits(meta: TraceMeta, events: Stream, policy: str, capacity: int, seed: int) -> NDArray[np.int64]:
    """Return the hits of each counted step of a stream in the caches of all layers, ``[steps, L]``."""
    counted = events.cells >= 0
    cells = np.where(counted, np.cumsum(counted) - 1, -1)
    n, L = meta.num_experts, len(meta.layers)
    hits = np.zeros((int(counted.sum()), L), np.int64)
    seen = events.experts, events.offsets, cells
    sizes = np.ones(L, np.int64), np.full(L, capacity, np.int64)
    if policy == "random":
        replay.replay_random(*seen, n, *sizes, seed, hits)
    elif policy == "lfru":
        replay.replay_lfru(*seen, n, *sizes, hits)
    else:
        coming = replay.next_uses(*seen[:2], L, n) if policy == "belady" else np.zeros(0, np.int32)
        replay.replay(*seen, coming, n, *sizes, {"lfu": replay.LFU, "belady": replay.BELADY}[policy], hits)
    return hits


def previous_token(rows: Rows) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
    """Predict the experts of the token before, at the same layer: known of every layer before the token begins."""
    known = np.ones(rows.ids.shape[:2], bool)
    known[0] = False
    return np.roll(rows.ids, 1, axis=0), known


def perfect(rows: Rows) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
    """Predict what the router will say, of all layers but the first: the best that any predictor can do."""
    known = np.ones(rows.ids.shape[:2], bool)
    known[:, 0] = False
    return rows.ids, known


OWN: dict[str, Predict] = {"previous_token": previous_token, "perfect": perfect}
"""Predictors that need nothing but the routing."""
