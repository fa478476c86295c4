"""Experts that do not fit: caches and prefetch. The public functions: what is measured of a trace, and its frame."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tracekit.analysis.ensure import StoreLike, ensure, shown
from tracekit.errors import UnsupportedError, UsageError
from tracekit.metrics.cache_spec import POLICIES, Scope, Start, Unit
from tracekit.schema import By, Phase
from tracekit.sources.sizes import Model

if TYPE_CHECKING:
    import polars as pl


def cache(
    store: StoreLike,
    *,
    policy: str | Iterable[str] = POLICIES,
    capacity: float | Iterable[float] | None = None,
    unit: Unit = "experts",
    scope: Scope = "layer",
    batch_size: int = 1,
    start: Start | None = None,
    model: Model | str | Path | None = None,
    expert_bytes: float | None = None,
    link: float | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return what a cache of experts would have hit, for every policy and capacity, and what the misses are made of.

    An access is an event: all experts that one step needs in one layer are looked up together, then updated together,
    and none of them is evicted by its own event. A first touch is a miss. An event larger than the cache stays until
    the next event of the cache.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`tracekit.windows`. With phase ``all`` prompts are counted, each as one event a layer. ``seed`` is
        also that of ``random``.
    policy
        ``lru``; ``lfu`` (uses so far, those before an eviction included); ``lfru`` (uses since it was loaded per access
        since the last one, as in vLLM's pull request 37190); ``belady`` (the farthest next use: the optimum for experts
        of one size); ``static`` (a hot list, loaded beforehand: what the requests of the other jackknife groups use
        most, so that no request is judged by a list that it is part of; null with one request); ``random``.
    capacity
        Sizes of the cache in ``unit``. Default: k and some shares of N.
    unit
        ``experts`` per layer, ``share`` of all experts, or ``bytes`` of all layers together.
    scope
        ``layer``: a cache for each, of the same number of experts (or bytes); ``all``: one cache that the layers share.
    batch_size
        Requests that run together: an event is the union of their experts.
    start
        What the cache holds when a request begins: nothing (``cold``); what its prompt left, which is evaluated at once
        and not counted (``prompt``, the default for decode tokens where the trace has prompts); or what the request
        before it left (``carry``, which keeps the whole trace in memory).
    model, expert_bytes
        A bundled model or a ``config.json``, or the bytes of an expert. Default: as the trace says.
    link
        Bytes per second that experts are loaded with.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, policy and capacity. ``capacity`` is in experts per layer, on average;
        ``hit_rate`` and, in shares of ``accesses`` as well, what the misses are: ``cold`` (first touches),
        ``working_set`` (Belady's others: the cache is too small) and ``policy_excess`` (the policy's above Belady's; of
        ``static``, which needs no first touch, it may be negative). ``misses_per_token``, over the layers of the row,
        and ``bytes_per_token``; with ``link`` also ``seconds_per_token``, the time to load them one after the other.
        Null where undefined.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no such phase or label, too few requests, or no expert sizes.
    UsageError
        An argument is out of range: a capacity below k experts or beyond N, a link of no speed.
    """
    import polars as pl

    if link is not None and not (math.isfinite(link) and link > 0):
        raise UsageError(f"a link of {link:g} bytes per second", expected="more than 0")
    arguments = {
        "policy": policy if isinstance(policy, str) else tuple(policy),
        "capacity": capacity,
        "unit": unit,
        "scope": scope,
        "batch_size": batch_size,
        "start": start,
        "model": model,
        "expert_bytes": expert_bytes,
        "by": by,
    }
    [frame] = ensure(store, [("cache", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    frame = shown(frame, by)
    if link is None:
        return frame
    if frame["bytes_per_token"].null_count() == frame.height:
        raise UnsupportedError(
            "the time on a link, and the trace does not say how large its experts are",
            expected="their size",
            remedy="Name the model (--model) or the bytes of an expert (--expert-bytes)",
        )
    return frame.with_columns(seconds_per_token=pl.col("bytes_per_token") / link)


def reuse(
    store: StoreLike,
    *,
    scope: Scope = "layer",
    batch_size: int = 1,
    start: Start | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return the reuse-distance curve: what LRU caches of every size hit, from one pass.

    The stack distance of an access is the size of the smallest LRU cache that hits (Mattson et al., IBM Syst. J. 9(2),
    1970); an access is an event as in :func:`cache`.

    Parameters
    ----------
    store, scope, batch_size, start, trace, phase, by, intervals, seed
        As in :func:`cache`.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and ``capacity``, k to N experts per layer: ``share`` of accesses that hit with
        this capacity and not with a smaller one, ``hit_rate`` of those that hit with it. 1 - ``hit_rate`` at N is the
        share of first touches.

    Raises
    ------
    StoreError, UnsupportedError, UsageError
        As :func:`cache`.
    """
    arguments = {"scope": scope, "batch_size": batch_size, "start": start, "by": by}
    [frame] = ensure(store, [("reuse", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def prefetch(
    store: StoreLike,
    *,
    predictor: str | Iterable[str] | None = None,
    m: int | Iterable[int] | None = None,
    distance: int | Iterable[int] = (1,),
    model: Model | str | Path | None = None,
    expert_bytes: float | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how well the experts of a layer are foretold, for every predictor and number m of prefetched experts.

    Predictors that learn from the trace's ids are judged on each request with what all *other* requests taught them.
    With p_f the share of tokens that choose expert f, n(e) the tokens that chose e in the layer ``distance`` before and
    n(e, f) those of them that chose f, and n(w, f) the same of the tokens of id w:

    - ``previous_token``: the experts of the tokens before in the same layer, the latest first (so of the token before,
      where m = k, and its recall is the overlap at lag 1); a run's first token is not judged.
    - ``hot_list``: by p_f.
    - ``transition``: by the sum of (n(e, f) + p_f) / (n(e) + 1) over the token's experts e.
    - ``token_id``: by n(w, f) + p_f.
    - ``token_id+transition``: by the product of the two over p_f, as if they were independent given f.

    Beside them what the trace recorded, by its own names: ``next_gate`` is the next router on the current hidden state,
    ``quasi_hidden`` that of Madan et al. ("Speculating Experts", arXiv 2603.19289), whose hit rate is the recall at
    m = k.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`tracekit.windows`. The intervals take the learned tables as they are.
    predictor
        Names of predictors; default: all that the trace supports.
    m
        Experts that are fetched per layer, 1 to N. Default: k, 1.5 k and 2 k.
    distance
        MoE layers between where a prediction is made and the layer that it is about.
    model, expert_bytes
        A bundled model or a ``config.json``, or the bytes of an expert. Default: as the trace says.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, predictor, ``distance`` (null: known before the token's first layer) and ``m``;
        none with more experts than a recorded predictor names. ``n`` tokens were judged in a layer. ``recall`` is
        |predicted ∩ routed| / k, ``precision`` the same over the experts that were predicted, ``exact`` the share of
        tokens all of whose k experts were predicted, ``weight_covered`` the share of the router weight on predicted
        experts (null where some ingest has no weights), ``rank_match`` the share of the k ranks at which the predictor
        names the router's expert (null without router order). They are means over the layers that are predicted.
        ``bytes_fetched`` and ``bytes_wasted`` are per token, over those layers together (null without sizes).

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace does not support a predictor, with the reason: no token ids, one request, no such recording.
    UsageError
        An argument is out of range, or there is no such predictor.
    """
    arguments = {
        "predictor": predictor,
        "m": m,
        "distance": distance,
        "model": model,
        "expert_bytes": expert_bytes,
        "by": by,
    }
    [frame] = ensure(store, [("prefetch", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def layer_budgets(
    store: StoreLike,
    *,
    capacity: float | Iterable[float] | None = None,
    unit: Unit = "experts",
    batch_size: int = 1,
    start: Start | None = None,
    model: Model | str | Path | None = None,
    expert_bytes: float | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how many experts each layer's LRU cache should hold, where all of them share one budget.

    The next expert goes to the layer where it adds the most hits for its size, by the layers' LRU curves; no layer gets
    fewer than k. That is the best split where the curves are concave; ``hit_rate_bound`` says how far from it one is
    where they are not.

    Parameters
    ----------
    store, unit, batch_size, start, model, expert_bytes, trace, phase, intervals, seed
        As in :func:`cache`.
    capacity
        Budgets: experts per layer on average, shares of all experts, or bytes of all layers. Default: some shares of N.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, capacity and layer, and one with a null ``layer`` for all of them. ``total`` is the
        budget (experts, or bytes), ``experts`` what the layer gets (for all: the mean). ``hit_rate`` of the split is
        judged on requests that it was not learned from: for each jackknife group, a split learned from all others;
        ``uniform`` is that of the same budget in equal parts, ``gain`` the difference. ``hit_rate_learned`` is that of
        the split shown on the requests that it was learned from, and ``hit_rate_bound`` what no split hits more of them
        than: the split is the best one where the two are equal.

    Raises
    ------
    StoreError, UnsupportedError, UsageError
        As :func:`cache`.
    """
    arguments = {
        "capacity": capacity,
        "unit": unit,
        "batch_size": batch_size,
        "start": start,
        "model": model,
        "expert_bytes": expert_bytes,
    }
    [frame] = ensure(store, [("layer_budgets", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, None, "layer")


def locality(
    store: StoreLike,
    *,
    segment: int | Iterable[int] | None = None,
    cache_ratio: float | Iterable[float] | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return local routing consistency: how well one choice of experts serves a whole segment of tokens.

    SRP and SCH of Liang et al., "Not All Models Suit Expert Offloading" (arXiv 2505.16056). Segments lie in one request
    and one phase, begin at every token, and weigh the same.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`tracekit.windows`.
    segment
        Segment lengths m in tokens. Default: 16, as published, or what the trace has.
    cache_ratio
        Cache sizes over k. Default: 1, 1.5, 2, 3 and 4, as far as the model has experts.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, segment length and cache size ``capacity`` (experts per layer, ``cache_ratio``
        times k). Of the segment alone: ``srp``, the best F1 score of a router that keeps an expert for a whole segment
        or not at all, pooled over experts and layers, and ``size_ratio``, how many experts it keeps, over k. Of the
        cache too: ``sch``, the hit rate of a cache that loads on demand and evicts the expert with the fewest uses in
        the next m tokens (of equals the one not used for longest; empty at the start, never the token's own), and
        ``fixed_hit_rate``, that of the best fixed set of experts of each segment, the SCH of the paper's first version.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no such phase, label or segment.
    UsageError
        An argument is out of range.
    """
    arguments = {"segment": segment, "cache_ratio": cache_ratio, "by": by}
    [frame] = ensure(store, [("locality", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)
