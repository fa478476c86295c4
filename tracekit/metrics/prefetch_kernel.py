"""The hot loops of prefetch predictors: tables of counts, and the rank that a predictor gives each routed expert.

A predictor ranks the experts of a layer. The ranks of the k experts that were then routed say everything about every
number m of prefetched experts at once: an expert of rank r is there for every m > r.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

HOT, TRANSITION, TOKEN, COMBINED = range(4)
"""Kinds of predictors that rank by a table."""

_LEAST = 1e-20
"""Popularity that an expert is taken to have at least where it is divided by."""


@njit(cache=True, nogil=True)
def count_tables(
    ids: Any,
    units: Any,
    start: Any,
    length: Any,
    source: Any,
    token: Any,
    words: Any,
    sign: int,
    popular: Any,
    used: Any,
    follows: Any,
    of_word: Any,
) -> None:
    """Count the experts of some (request, layer) units by what they could be predicted from.

    Parameters
    ----------
    ids
        Routed experts ``[k, columns]``, uint8 or uint16.
    units
        ``[U, 4]`` int64: layer index, cell, first run and end of runs of each unit.
    start, length
        ``[R]`` int64: first column and tokens of each run of consecutive positions.
    source
        ``[D, R]`` int64: the column at which the same run begins in the layer so far before, -1 where there is none.
    token
        ``[R]`` int64: where the run's tokens begin in ``words``, -1 where they are not known.
    words
        Row of ``of_word`` of each token, int32; -1: none.
    sign
        1 to count the units in, -1 to take them out again.
    popular
        ``[L, N]`` int32: tokens that chose each expert.
    used, follows
        ``[D, L, N]`` and ``[D, L, N, N]`` int32: tokens that chose each expert e in the layer so far before, and those
        of them that chose f in this layer.
    of_word
        ``[L, V, N]`` int32: tokens of each id that chose each expert.
    """
    k = ids.shape[0]
    for u in range(units.shape[0]):
        layer = units[u, 0]
        for run in range(units[u, 2], units[u, 3]):
            for t in range(length[run]):
                at = start[run] + t
                for r in range(k):
                    popular[layer, ids[r, at]] += sign
                if token[run] >= 0 and words[token[run] + t] >= 0:
                    row = of_word[layer, words[token[run] + t]]
                    for r in range(k):
                        row[ids[r, at]] += sign
                for d in range(source.shape[0]):
                    if source[d, run] >= 0:
                        for a in range(k):
                            e = ids[a, source[d, run] + t]
                            used[d, layer, e] += sign
                            after = follows[d, layer, e]
                            for r in range(k):
                                after[ids[r, at]] += sign


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _ranks_of(score: Any, ids: Any, at: int, ranks: Any) -> None:
    """Rank the experts of a token by score, the highest first, of equal ones the lowest id.

    Counts are floats, which are exact here and as wide as the scores: so the loop runs in vectors.
    """
    one, none = np.float32(1), np.float32(0)
    for r in range(ids.shape[0]):
        e = np.int64(ids[r, at])
        mine, above, level = score[e], none, none
        for f in range(score.shape[0]):
            above += one if score[f] > mine else none
            level += one if score[f] >= mine else none
        rank = np.int64(above)
        if level > above + one:
            for f in range(e):
                rank += score[f] == mine
        ranks[r] = rank


@njit(cache=True, nogil=True)
def _tally(
    place: Any,
    ranks: Any,
    named: int,
    weights: Any,
    at: int,
    n: Any,
    weighed: Any,
    sizes: Any,
    found: Any,
    deepest: Any,
    aligned: Any,
    mass: Any,
) -> None:
    """Add one token's ranks to the state of one predictor, cell and layer; a rank past the last m is a miss."""
    p, cell, layer = place
    k, most = ranks.shape[0], found.shape[3]
    n[p, cell, layer] += 1
    sizes[p, cell, layer, min(named, most)] += 1
    last = 0
    for r in range(k):
        rank = ranks[r]
        last = max(last, rank)
        if rank < most:
            found[p, cell, layer, rank] += 1
            if rank == r:
                aligned[p, cell, layer, r] += 1
    if last < most:
        deepest[p, cell, layer, last] += 1
    if weights.shape[1]:
        total = 0.0
        for r in range(k):
            w = np.float64(weights[r, at])
            if not w >= 0.0:  # NaN, or a router's raw score
                return
            total += w
        if 0.0 < total < np.inf:
            weighed[p, cell, layer] += 1
            for r in range(k):
                if ranks[r] < most:
                    mass[p, cell, layer, ranks[r]] += np.float64(weights[r, at]) / total


@njit(cache=True, nogil=True)
def _popularity(counts: Any, k: int, prior: Any, place: Any) -> bool:
    """Write the share of tokens that choose each expert and its rank; False where there are no tokens."""
    total = counts.sum()
    keys = np.empty(counts.shape[0], np.int64)
    for f in range(counts.shape[0]):
        keys[f] = -np.int64(counts[f]) * counts.shape[0] + f
    order = np.argsort(keys)
    for f in range(counts.shape[0]):
        place[order[f]] = f
        prior[f] = np.float32(counts[f]) * np.float32(k) / np.float32(total if total else 1)
    return bool(total > 0)


@njit(cache=True, nogil=True)
def _score_layer(ids: Any, at: int, used: Any, follows: Any, prior: Any, score: Any) -> None:
    """Score experts by what follows those of a token in an earlier layer, whose tables these are."""
    score[:] = np.float32(0)
    rest = np.float32(0)
    for a in range(ids.shape[0]):
        e = ids[a, at]
        after = follows[e]
        share = np.float32(1) / np.float32(used[e] + 1)
        rest += share
        for f in range(score.shape[0]):
            score[f] += np.float32(after[f]) * share
    for f in range(score.shape[0]):
        score[f] += prior[f] * rest


@njit(cache=True, nogil=True)
def _score_token(of_word: Any, word: int, prior: Any, score: Any) -> None:
    """Score experts by what a token id chose; without a row of its own it is popularity."""
    score[:] = prior
    if word >= 0:
        row = of_word[word]
        for f in range(score.shape[0]):
            score[f] += np.float32(row[f])


@njit(cache=True, nogil=True)
def _both(by_token: Any, by_layer: Any, prior: Any, score: Any) -> None:
    """Multiply the scores; what both know, popularity, counts once."""
    least = np.float32(_LEAST)
    for f in range(score.shape[0]):
        score[f] = by_token[f] * by_layer[f] / (prior[f] if prior[f] > least else least)


@njit(cache=True, nogil=True)
def _known(kind: int, token: int, d: int, source: Any) -> bool:
    """Return whether a kind of predictor has what it looks at."""
    if kind >= TOKEN and token < 0:
        return False
    return not (kind in (TRANSITION, COMBINED) and source[d] < 0)


@njit(cache=True, nogil=True)
def judge_tables(
    ids: Any,
    weights: Any,
    units: Any,
    start: Any,
    length: Any,
    source: Any,
    token: Any,
    words: Any,
    plan: Any,
    popular: Any,
    used: Any,
    follows: Any,
    of_word: Any,
    n: Any,
    weighed: Any,
    sizes: Any,
    found: Any,
    deepest: Any,
    aligned: Any,
    mass: Any,
) -> None:
    """Judge the predictors of tables on units that are taken out of the tables meanwhile.

    With p the experts' popularity, n(e) the tokens that chose e in the earlier layer and n(e, f) those of them that
    chose f in this one, and the same for token ids w: ``transition`` scores f by the sum over the token's experts e of
    (n(e, f) + p_f) / (n(e) + 1); ``token_id`` by n(w, f) + p_f; both together by the product of the two over p_f.

    Parameters
    ----------
    weights
        Router weights ``[k, columns]`` float32, or ``[k, 0]``.
    plan
        ``[P, 3]`` int64: kind, index of the distance, and the predictor's place in the state.
    n, weighed, sizes, found, deepest, aligned, mass
        The state, see :class:`PrefetchState`; the other arguments as for :func:`count_tables`.
    """
    k, num_experts = ids.shape[0], popular.shape[1]
    ranks, place = np.zeros(k, np.int64), np.zeros(num_experts, np.int64)
    prior, by_token, both = np.zeros((3, num_experts), np.float32)
    by_layer = np.zeros((source.shape[0], num_experts), np.float32)
    # Distances are there for the predictors that look back alone, and token ids for those that look at them.
    for u in range(units.shape[0]):
        mine, layer, cell = units[u : u + 1], units[u, 0], units[u, 1]
        count_tables(ids, mine, start, length, source, token, words, -1, popular, used, follows, of_word)
        learned = _popularity(popular[layer], k, prior, place)
        for run in range(units[u, 2], units[u, 3] if learned else units[u, 2]):
            for t in range(length[run]):
                at = start[run] + t
                for d in range(source.shape[0]):
                    if source[d, run] >= 0:
                        _score_layer(ids, source[d, run] + t, used[d, layer], follows[d, layer], prior, by_layer[d])
                if token[run] >= 0:
                    _score_token(of_word[layer], words[token[run] + t], prior, by_token)
                for i in range(plan.shape[0]):
                    kind, d = plan[i, 0], plan[i, 1]
                    if not _known(kind, token[run], d, source[:, run]):
                        continue
                    if kind == HOT:
                        for r in range(k):
                            ranks[r] = place[ids[r, at]]
                    elif kind == TRANSITION:
                        _ranks_of(by_layer[d], ids, at, ranks)
                    elif kind == TOKEN:
                        _ranks_of(by_token, ids, at, ranks)
                    else:
                        _both(by_token, by_layer[d], prior, both)
                        _ranks_of(both, ids, at, ranks)
                    where = (plan[i, 2], cell, layer)
                    _tally(where, ranks, num_experts, weights, at, n, weighed, sizes, found, deepest, aligned, mass)
        count_tables(ids, mine, start, length, source, token, words, 1, popular, used, follows, of_word)


@njit(cache=True, nogil=True)
def judge_previous(
    ids: Any,
    weights: Any,
    units: Any,
    start: Any,
    length: Any,
    predictor: int,
    num_experts: int,
    n: Any,
    weighed: Any,
    sizes: Any,
    found: Any,
    deepest: Any,
    aligned: Any,
    mass: Any,
) -> None:
    """Judge the experts of the tokens before, the latest first, as a prediction of the same layer's.

    ``predictor`` is its place in the state; the rest as for :func:`judge_tables`. A run's first token has none before.
    """
    k, most = ids.shape[0], found.shape[3]
    ranks = np.zeros(k, np.int64)
    recent, older = np.zeros(most, np.int64), np.zeros(most, np.int64)
    last_use = np.full(num_experts, -1, np.int64)
    now = 0
    for u in range(units.shape[0]):
        for run in range(units[u, 2], units[u, 3]):
            size = 0
            for t in range(length[run]):
                at = start[run] + t
                if t:
                    for r in range(k):
                        e = np.int64(ids[r, at])
                        ranks[r] = most
                        for i in range(size):
                            if recent[i] == e:
                                ranks[r] = i
                                break
                    place = (predictor, units[u, 1], units[u, 0])
                    _tally(place, ranks, size, weights, at, n, weighed, sizes, found, deepest, aligned, mass)
                now += 1
                older[:size] = recent[:size]
                before, size = size, min(k, most)
                for r in range(k):
                    e = np.int64(ids[r, at])
                    last_use[e] = now
                    if r < most:
                        recent[r] = e
                for i in range(before):
                    if size < most and last_use[older[i]] != now:
                        recent[size] = older[i]
                        size += 1


@njit(cache=True, nogil=True)
def judge_recorded(
    ids: Any,
    weights: Any,
    units: Any,
    start: Any,
    length: Any,
    first_pos: Any,
    rows: Any,
    pos: Any,
    predicted: Any,
    predictor: int,
    n: Any,
    weighed: Any,
    sizes: Any,
    found: Any,
    deepest: Any,
    aligned: Any,
    mass: Any,
) -> None:
    """Judge predictions that the trace holds.

    Parameters
    ----------
    first_pos
        ``[R]`` int64: position of each run's first token.
    rows
        ``[U, 2]`` int64: begin and end of the predictions of each unit, ascending by position.
    pos, predicted
        ``[rows]`` int64 and ``[m, rows]`` int32: which token it is about, and the experts named; -1 where fewer are.
    predictor
        Its place in the state; the rest as for :func:`judge_tables`.
    """
    k = ids.shape[0]
    ranks = np.zeros(k, np.int64)
    for u in range(units.shape[0]):
        row = rows[u, 0]
        for run in range(units[u, 2], units[u, 3]):
            for t in range(length[run]):
                while row < rows[u, 1] and pos[row] < first_pos[run] + t:
                    row += 1
                if row == rows[u, 1] or pos[row] != first_pos[run] + t:
                    continue
                at = start[run] + t
                size = 0
                while size < predicted.shape[0] and predicted[size, row] >= 0:
                    size += 1
                for r in range(k):
                    ranks[r] = found.shape[3]
                    for i in range(size):
                        if predicted[i, row] == np.int64(ids[r, at]):
                            ranks[r] = i
                            break
                place = (predictor, units[u, 1], units[u, 0])
                _tally(place, ranks, size, weights, at, n, weighed, sizes, found, deepest, aligned, mass)
