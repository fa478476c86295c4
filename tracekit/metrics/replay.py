"""Expert caches, replayed: what a cache of a given size would have hit, under a policy that could have been built.

A cache access is an *event*: all experts of one layer that one step needs are looked up together, then updated
together, and none of them may be evicted by their own event (one-at-a-time replay inflates the misses of LRU, arXiv
2608.07911). An event larger than the cache stays resident until the next one. A first touch is a miss.

A replay reads a :class:`Stream`: steps in order, in each step an event for every layer in order. A step is a decode
token, a token of each of B requests decoded together, or a whole prompt, whose tokens are evaluated together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

LRU, LFU, BELADY = range(3)
"""Policies of :func:`replay`."""

_KEEP = np.iinfo(np.int64).max
"""Priority of what may not be evicted: experts that are not there, and those of the event itself."""

_MANY = 1e300
"""Uses of the same, which no age makes few: where it is uses over age that decide."""


class Stream(NamedTuple):
    """What one cache sees, step by step."""

    experts: NDArray[np.uint16]
    """``[accesses]``: the distinct experts of each event, the most recent use last."""
    offsets: NDArray[np.int64]
    """``[steps * layers + 1]``: first access of each event; event ``s * layers + l`` is layer l in step s."""
    cells: NDArray[np.int64]
    """``[steps]``: where the hits of a step are counted, -1 for steps that warm the cache up and do not count."""
    tokens: NDArray[np.int64]
    """``[steps]``: tokens of each step, of all requests."""


@njit(cache=True, nogil=True)
def _lowest(priority: Any, first: int, n: int) -> tuple[Any, Any]:
    """Return the lowest of ``n`` priorities and where it is."""
    begin, end = np.uint64(first), np.uint64(first + n)
    low, at = _KEEP, np.int64(first)
    for i in range(begin, end):
        low = min(low, priority[i])
    for i in range(begin, end):  # all of them, which takes no branch and is the faster for it
        at = max(at, np.int64(i) if priority[i] == low else np.int64(0))
    return low, at


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _coldest(uses: Any, last: Any, score: Any, clock: float, first: int, n: int) -> tuple[Any, Any]:
    """Return the fewest uses for the time since the last one, and where that is: the oldest among equals."""
    begin, end = np.uint64(first), np.uint64(first + n)
    low, at = _MANY, np.int64(first)
    for i in range(begin, end):
        score[i] = uses[i] / (clock - last[i])
        low = min(low, score[i])
    oldest = clock
    for i in range(begin, end):
        oldest = min(oldest, last[i] if score[i] == low else clock)
    for i in range(begin, end):  # no two have the same last use, but for those never used
        at = max(at, np.int64(i) if last[i] == oldest and score[i] == low else np.int64(0))
    return low, at


@njit(cache=True, nogil=True)
def next_uses(experts: Any, offsets: Any, layers: int, num_experts: int) -> Any:
    """Return, for each access, the event in which the expert is used next, or one past the last event: int32."""
    events = len(offsets) - 1
    coming = np.full(layers * num_experts, events, np.int64)
    out = np.empty(len(experts), np.int32)
    for event in range(events - 1, -1, -1):
        base = event % layers * num_experts
        for i in range(offsets[event], offsets[event + 1]):
            out[i] = coming[base + experts[i]]
            coming[base + experts[i]] = event
    return out


@njit(cache=True, nogil=True)
def replay(
    experts: Any,
    offsets: Any,
    cells: Any,
    following: Any,
    num_experts: int,
    cost: Any,
    budget: Any,
    policy: int,
    hits: Any,
) -> None:
    """Replay one cache from cold, or one for each layer, and add the hits.

    Parameters
    ----------
    experts, offsets, cells
        The :class:`Stream`.
    following
        :func:`next_uses` of the stream; of length 0 unless the policy is ``BELADY``.
    cost
        ``[L]`` int64: what an expert of each layer takes, in the unit of ``budget``: 1, or bytes.
    budget
        int64: ``[1]``, one cache for all layers, or ``[L]``, a cache for each.
    policy
        ``LRU``; ``LFU``: the fewest uses so far, those before an eviction included, the least recent among equals;
        ``BELADY``: the farthest next use (Belady, IBM Syst. J. 5(2), 1966).
    hits
        ``[cells, L]`` int64, added to.
    """
    layers = len(cost)
    alone = len(budget) == layers and layers > 1
    resident = np.zeros(layers * num_experts, np.bool_)
    priority = np.full(layers * num_experts, _KEEP, np.int64)
    uses = np.zeros(layers * num_experts, np.int64)
    low = np.full(layers, _KEEP, np.int64)
    low_at = np.zeros(layers, np.int64)
    stale = np.zeros(layers, np.bool_)
    """Where the lowest priority of a layer has to be looked for again."""
    used = np.zeros(len(budget), np.int64)
    clock = 0
    for event in range(len(offsets) - 1):
        layer = event % layers
        mine = layer if alone else 0
        cell = cells[event // layers]
        base = layer * num_experts
        for i in range(offsets[event], offsets[event + 1]):
            key = base + experts[i]
            if resident[key]:
                if cell >= 0:
                    hits[cell, layer] += 1
            else:
                resident[key] = True
                used[mine] += cost[layer]
            priority[key] = _KEEP
        stale[layer] = True
        while used[mine] > budget[mine]:
            least, victim, owner = _KEEP, 0, layer
            if alone:
                least, victim = _lowest(priority, base, num_experts)
            else:
                for other in range(layers):
                    if stale[other]:
                        low[other], low_at[other] = _lowest(priority, other * num_experts, num_experts)
                        stale[other] = False
                    if low[other] < least:
                        least, victim, owner = low[other], low_at[other], other
            if least == _KEEP:  # the event alone is larger than the cache
                break
            resident[victim] = False
            priority[victim] = _KEEP
            used[mine] -= cost[owner]
            stale[owner] = True
        for i in range(offsets[event], offsets[event + 1]):
            key = base + experts[i]
            clock += 1
            uses[key] += 1
            if policy == LFU:
                priority[key] = (uses[key] << 40) | clock
            elif policy == BELADY:
                priority[key] = -np.int64(following[i])
            else:
                priority[key] = clock
        stale[layer] = True


@njit(cache=True, nogil=True)
def replay_lfru(experts: Any, offsets: Any, cells: Any, num_experts: int, cost: Any, budget: Any, hits: Any) -> None:
    """Replay, as :func:`replay` does, caches that evict the least frequently recently used expert.

    That with the fewest uses since it was loaded for each access of the cache since the last one: the LFRU of vLLM's
    expert cache (pull request 37190) and of tinyserve, where it comes from. Of equals the one used last goes last.
    """
    layers = len(cost)
    alone = len(budget) == layers and layers > 1
    uses = np.full(layers * num_experts, _MANY)
    """Uses since it was loaded; ``_MANY`` for what may not be evicted."""
    held = np.zeros(layers * num_experts)
    """The same, 0 for what is not there."""
    last, score = np.zeros(layers * num_experts), np.zeros(layers * num_experts)
    low = np.zeros(layers)
    low_at = np.zeros(layers, np.int64)
    stale = np.zeros(layers, np.bool_)
    used = np.zeros(len(budget), np.int64)
    clock = np.zeros(len(budget))
    for event in range(len(offsets) - 1):
        layer = event % layers
        mine = layer if alone else 0
        cell = cells[event // layers]
        for i in range(offsets[event], offsets[event + 1]):
            key = layer * num_experts + experts[i]
            if held[key]:
                if cell >= 0:
                    hits[cell, layer] += 1
            else:
                used[mine] += cost[layer]
            uses[key] = _MANY
        first, end = (layer, layer + 1) if alone else (0, layers)
        stale[first:end] = True  # all have aged since
        while used[mine] > budget[mine]:
            fewest, victim, owner = _MANY, -1, 0
            for other in range(first, end):
                if stale[other]:
                    first_of = other * num_experts
                    low[other], low_at[other] = _coldest(uses, last, score, clock[mine] + 1, first_of, num_experts)
                    stale[other] = False
                at = low_at[other]
                if uses[at] < _MANY and (low[other] < fewest or (low[other] == fewest and last[at] < last[victim])):
                    fewest, victim, owner = low[other], at, other
            if victim < 0:
                break
            uses[victim], held[victim] = _MANY, 0
            used[mine] -= cost[owner]
            stale[owner] = True
        for i in range(offsets[event], offsets[event + 1]):
            key = layer * num_experts + experts[i]
            clock[mine] += 1
            held[key] += 1
            uses[key], last[key] = held[key], clock[mine]


@njit(cache=True, nogil=True)
def replay_random(
    experts: Any, offsets: Any, cells: Any, num_experts: int, cost: Any, budget: Any, seed: int, hits: Any
) -> None:
    """Replay, as :func:`replay` does, caches that evict at random."""
    layers = len(cost)
    alone = len(budget) == layers and layers > 1
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, which every thread has for itself
    place = np.full(layers * num_experts, -1, np.int64)
    """Where an expert stands among the residents of its cache, -1 if it is not there."""
    residents = np.zeros((len(budget), layers * num_experts // len(budget)), np.int64)
    number = np.zeros(len(budget), np.int64)
    used = np.zeros(len(budget), np.int64)
    needed = np.full(layers * num_experts, -1, np.int64)
    for event in range(len(offsets) - 1):
        layer = event % layers
        mine = layer if alone else 0
        cell = cells[event // layers]
        base = layer * num_experts
        for i in range(offsets[event], offsets[event + 1]):
            key = base + experts[i]
            needed[key] = event
            if place[key] >= 0:
                if cell >= 0:
                    hits[cell, layer] += 1
                continue
            place[key] = number[mine]
            residents[mine, number[mine]] = key
            number[mine] += 1
            used[mine] += cost[layer]
        while used[mine] > budget[mine] and number[mine] > offsets[event + 1] - offsets[event]:
            at = np.random.randint(0, number[mine])  # noqa: NPY002
            victim = residents[mine, at]
            if needed[victim] == event:
                continue
            number[mine] -= 1
            moved = residents[mine, number[mine]]
            residents[mine, at], place[moved], place[victim] = moved, at, -1
            used[mine] -= cost[victim // num_experts]


@njit(cache=True, nogil=True)
def count(experts: Any, offsets: Any, cells: Any, counts: Any, cold: Any) -> None:
    """Add the accesses to each expert to ``counts[cells, L, N]`` and those that are the first to ``cold[cells, L]``."""
    layers, n = counts.shape[1], counts.shape[2]
    seen = np.zeros(layers * n, np.bool_)
    for event in range(len(offsets) - 1):
        layer, cell = event % layers, cells[event // layers]
        for i in range(offsets[event], offsets[event + 1]):
            key = layer * n + experts[i]
            if cell >= 0:
                counts[cell, layer, experts[i]] += 1
                cold[cell, layer] += not seen[key]
            seen[key] = True


@njit(cache=True, nogil=True)
def lru_by_layer(experts: Any, offsets: Any, cells: Any, num_experts: int, hist: Any) -> None:
    """Add the LRU stack distances of a cache for each layer (Mattson et al., IBM Syst. J. 9(2), 1970).

    The distance of an expert is the number of others that were used more recently. They are counted one by one: a loop
    without a branch, eight at a time, is faster than any tree.

    Parameters
    ----------
    experts, offsets, cells
        The :class:`Stream`.
    hist
        ``[cells, L, N + 1]`` int64: entry d counts accesses that hit with d + 1 or more experts a layer; the last one
        first touches.
    """
    layers = hist.shape[1]
    n = np.uint64(num_experts)
    last = np.zeros(layers * num_experts, np.int32)
    previous = np.zeros(layers, np.int64)
    distance = np.zeros(num_experts, np.int64)
    clock = 0
    for event in range(len(offsets) - 1):
        layer = event % layers
        base = np.uint64(layer) * n
        cell = cells[event // layers]
        begin, end = offsets[event], offsets[event + 1]
        if cell >= 0:
            for i in range(begin, end):
                used = last[base + np.uint64(experts[i])]
                above = np.int32(0)
                for e in range(base, base + n):
                    above = np.int32(above + (last[e] > used))  # 32 bits, or numba would make it 64
                # The whole last event stays until this one, however small the cache.
                distance[i - begin] = num_experts if used == 0 else 0 if above < previous[layer] else above
            for i in range(end - begin):
                hist[cell, layer, distance[i]] += 1
        for i in range(begin, end):
            clock += 1
            last[base + np.uint64(experts[i])] = clock
        previous[layer] = end - begin


@njit(cache=True, nogil=True)
def _raise(values: Any, begin: int, end: int, weight: Any) -> None:
    """Add to ``values[begin:end]``."""
    for i in range(np.uint64(begin), np.uint64(end)):
        values[i] += weight


@njit(cache=True, nogil=True)
def lru_of_all(experts: Any, offsets: Any, cells: Any, num_experts: int, cost: Any, place: Any, hist: Any) -> None:
    """Add the LRU stack distances of one cache for all layers.

    What was used more recently than an expert: what was used last in a later step, in a later layer of the same step,
    or later in the same event. Each use raises those numbers for all steps since the use before, which is cheap: an
    expert comes back after N / k steps on average.

    Parameters
    ----------
    experts, offsets, cells
        The :class:`Stream`.
    cost
        ``[L]`` int32: what an expert of each layer takes, 1 or in units of bytes that all sizes are multiples of.
    place
        ``[what all experts take + 1]`` int32: for what an access takes to hit, the first of G ascending cache sizes
        that holds it, G where none does.
    hist
        ``[cells, L, G + 1]`` int64: entry g counts accesses that hit with the g-th size and more, but not with less;
        the last one those that hit with none, first touches included.
    """
    layers, sizes = len(cost), hist.shape[2] - 1
    steps = (len(offsets) - 1) // layers
    last = np.full(layers * num_experts, -1, np.int64)
    rank = np.zeros(layers * num_experts, np.int64)
    later = np.zeros(steps, cost.dtype)
    """What was used last in step s or later, s from 1 on."""
    below = np.zeros(steps * layers, cost.dtype)
    """What was used last in step s, in a later layer than l."""
    for step in range(steps):
        for layer in range(layers):
            begin, end = offsets[step * layers + layer], offsets[step * layers + layer + 1]
            base, weight, cell = layer * num_experts, cost[layer], cells[step]
            if cell >= 0:
                for i in range(begin, end):
                    key = base + experts[i]
                    s = last[key]
                    at = sizes
                    if s >= 0 and s == step - 1 and layers == 1:
                        at = 0  # the whole last event stays until this one
                    elif s >= 0:
                        same = 1
                        for j in range(offsets[s * layers + layer] + rank[key] + 1, offsets[s * layers + layer + 1]):
                            same += last[base + experts[j]] == s
                        above = later[s + 1] + below[s * layers + layer] + same * weight
                        at = place[above]
                    hist[cell, layer, at] += 1
            for i in range(begin, end):
                key = base + experts[i]
                s = last[key]
                _raise(later, s + 1, step + 1, weight)
                if s >= 0:
                    _raise(below, s * layers, s * layers + layer, -weight)
                last[key], rank[key] = step, i - begin
            _raise(below, step * layers, step * layers + layer, (end - begin) * weight)
