"""Time per output token where experts are offloaded: the public functions that put a trace's fetches into time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.analysis.ensure import StoreLike, as_store, check_tokens, warn_of
from tracekit.analysis.expert_sizes import expert_sizes
from tracekit.analysis.gains import CostOptions, chosen_hardware, cost_model, traced_model
from tracekit.economics import offload
from tracekit.economics.offload import Compute, Copies, Floats, Span
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.state import MIN_REQUESTS, deal, phase_tokens, resolve_phase
from tracekit.schema import Phase
from tracekit.sources.bundled import find
from tracekit.sources.sizes import Model
from tracekit.store import Store, TraceInfo

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.cache_spec import Start
    from tracekit.metrics.fetches import Fetches, Predict

MODES = ("on_demand", "cache", "prefetch", "cache+prefetch", "speculative")
"""What may be done about experts that are not on the device; see :func:`tpot`."""

MAX_TOKENS = 1 << 16
"""Tokens that are replayed at most: as many requests, drawn at random, as they come from."""


def tpot(
    store: StoreLike,
    *,
    link: str | float,
    compute: ArrayLike | None = None,
    expert_bytes: float | None = None,
    predictor: str | ArrayLike | None = None,
    distance: int = 1,
    m: int | None = None,
    predictor_cost: float = 0.0,
    capacity: int | None = None,
    policy: str = "lru",
    start: Start = "prompt",
    trace: str | None = None,
    phase: Phase | None = None,
    intervals: bool = True,
    seed: int = 0,
    **cost: Unpack[CostOptions],
) -> pl.DataFrame:
    """Return the time per output token of one request whose experts come over a link, by what is done about it.

    Every token is put through the same two engines, one that computes and one that copies
    (:mod:`tracekit.economics.offload`), with what it has to fetch of each layer.

    Parameters
    ----------
    store
        A store or its path.
    link
        A name of :data:`tracekit.economics.offload.LINKS`, or bytes per second.
    compute
        Seconds that a token computes, in all or ``[L]``, as they were measured. Default: the roofline of the model on
        ``hardware``.
    expert_bytes
        Bytes of an expert. Default: those of the model that is given, what the trace says, or those of its own model.
    predictor
        ``previous_token``, ``perfect``, or one that the trace recorded, token by token; one that learns from the trace
        (:func:`tracekit.prefetch`) by its mean recall in each layer; or a figure, one or ``[L]``: a predictor that has
        this recall at every token (NaN where a layer has none), of experts in and out of the cache alike. Means give a
        lower bound: the time is convex in what is copied. Default: none.
    distance
        Layers between the prediction and the layer that it is about.
    m
        Experts that are copied ahead per layer. Default: as many as were predicted; k for a figure.
    predictor_cost
        Seconds per token that predicting takes, on the computing engine.
    capacity
        Experts per layer that a cache on the device holds. Default: no cache.
    policy
        ``lru``, ``lfu``, ``lfru``, ``belady`` or ``random``, as of :func:`tracekit.cache`. With ``lru`` it is known
        which predicted experts the cache holds; with the others they are taken to be there as often as the token's own.
    start
        What a request's cache begins with: ``prompt`` (what its prompt left there), ``cold``, or ``carry`` (what the
        request before it left).
    trace
        Name of one trace; default: every trace of the store that can answer.
    phase
        ``decode``, ``prefill`` or ``all``: whose tokens are taken as decoded, one by one. Default: decode where the
        trace knows it, else what there is.
    intervals
        95 % intervals over whole requests; machine and link are taken as exact.
    seed
        Seed of the grouping of requests where there are more than 200, and of their choice where they have more than
        65,536 tokens.
    **cost
        What runs on what, as in :func:`tracekit.speedup`: one device, so without parallelism.

    Returns
    -------
    polars.DataFrame
        One row per trace and ``mode``:

        - ``on_demand``: every expert is copied when the router asks for it;
        - ``cache``: those that the cache lacks;
        - ``prefetch``: what was predicted is copied ahead, what it lacks on demand;
        - ``cache+prefetch``: the same, of what the cache lacks;
        - ``speculative``: the first k predicted are executed in place of the router's, nothing is copied on demand. It
          is ``lossy``: it changes what the model says and later routing with it, so the trace's hit rate is an upper
          bound.

        ``tpot_ms`` with its interval, its median and 95th percentile over tokens; ``compute_ms``, ``copy_ms`` and
        ``overlapped_ms`` (the time is the sum of the first two less the third); ``bytes`` per token and
        ``wasted_bytes`` (predicted in vain); ``hit_rate``, share of the router's experts that were there or on their
        way when it asked; ``saving``, share of the time on demand; ``saving_most``, the most that prefetching could
        save, Σ min(compute, copy) over that time; ``break_even_ms``, cost of the predictor per token above which it is
        slower than the same without it. Null where it has no meaning.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer: it holds counts only, or no predictions.
    SourceError
        The model's config cannot be read.
    UsageError
        An argument is out of range, or sizes or compute are not known.
    """
    asked = _Asked(
        link, compute, expert_bytes, predictor, distance, m, predictor_cost, capacity, policy, start, phase, seed
    )
    rows: list[dict[str, Any]] = []
    for case in _cases(as_store(store), asked, trace, cost):
        groups = _groups(case, seed) if intervals else None
        rows += [_row(case, mode, groups) for mode in case.modes]
    return _frame(rows)


def token_schedule(
    store: StoreLike,
    *,
    link: str | float,
    quantile: float = 0.5,
    compute: ArrayLike | None = None,
    expert_bytes: float | None = None,
    predictor: str | ArrayLike | None = None,
    distance: int = 1,
    m: int | None = None,
    predictor_cost: float = 0.0,
    capacity: int | None = None,
    policy: str = "lru",
    start: Start = "prompt",
    trace: str | None = None,
    phase: Phase | None = None,
    seed: int = 0,
    **cost: Unpack[CostOptions],
) -> pl.DataFrame:
    """Return what both engines do during one token, in every mode.

    Parameters
    ----------
    quantile
        Which token: the one whose time is at this quantile in the last mode that is not lossy.
    store, link, compute, expert_bytes, predictor, distance, m, predictor_cost, capacity, policy, start
        As in :func:`tpot`.
    trace, phase, seed, **cost
        As in :func:`tpot`.

    Returns
    -------
    polars.DataFrame
        One row per trace, ``mode`` and stretch of work: ``request_id`` and ``token`` (number of its row in the request,
        from 0); ``engine`` (``compute`` or ``copy``); ``layer`` (number among the MoE layers, from 0); ``part``
        (``attention``, ``predictor``, ``experts``, ``head``; ``demand``, ``ahead``);
        ``start_ms`` and ``end_ms`` from the start of the token; ``experts``, how many are copied.

    Raises
    ------
    StoreError, UnsupportedError, SourceError, UsageError
        As :func:`tpot`.
    """
    import polars as pl

    if not 0 <= quantile <= 1:
        raise UsageError(f"a quantile of {quantile:g}", expected="0 to 1")
    asked = _Asked(
        link, compute, expert_bytes, predictor, distance, m, predictor_cost, capacity, policy, start, phase, seed
    )
    rows: list[dict[str, Any]] = []
    for case in _cases(as_store(store), asked, trace, cost):
        times = case.times([mode for mode in case.modes if mode != "speculative"][-1])
        token = int(np.argsort(times, kind="stable")[round(quantile * (len(times) - 1))])
        for mode in case.modes:
            copies = case.copies(mode)
            one = copies.token(token)
            cells = {"demand": copies.demand[token], "ahead": copies.ahead[token]}
            head = case.head | {"mode": mode} | case.token(token)
            rows += [head | _span(case, s, cells) for s in offload.timeline(case.compute, one, case.cost_of(mode))]
    return pl.DataFrame(rows, schema_overrides={"layer": pl.Int64, "experts": pl.Float64})


_TEXTS = ("trace", "phase", "mode", "predictor", "policy", "start", "model", "hardware")
_WHOLE = ("n_tokens", "distance", "m", "capacity")


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    import polars as pl

    types = dict.fromkeys(_TEXTS, pl.String) | dict.fromkeys(_WHOLE, pl.Int64) | {"lossy": pl.Boolean}
    return pl.DataFrame(rows, schema={name: types.get(name, pl.Float64) for name in rows[0]}).fill_nan(None)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked, of whatever trace."""

    link: str | float
    compute: ArrayLike | None
    expert_bytes: float | None
    predictor: str | ArrayLike | None
    distance: int
    m: int | None
    predictor_cost: float
    capacity: int | None
    policy: str
    start: Start
    phase: Phase | None
    seed: int

    def check(self) -> None:
        """Refuse what no trace can answer."""
        from tracekit.metrics.cache_spec import STARTS
        from tracekit.metrics.fetches import POLICIES

        offload.link(self.link)
        if self.policy not in POLICIES:
            raise UsageError(f"policy {self.policy!r}", expected="one of " + ", ".join(POLICIES))
        if self.start == "carry" and self.policy != "lru":
            raise UsageError(f"start 'carry' with the policy {self.policy}", expected="lru, or prompt or cold")
        if self.start not in STARTS:
            raise UsageError(f"start {self.start!r}", expected="one of " + ", ".join(STARTS))
        if self.distance < 1:
            raise UsageError(f"a distance of {self.distance} layers", expected="1 or more")
        if not 0 <= self.predictor_cost < 1e3:
            raise UsageError(f"a predictor cost of {self.predictor_cost:g} seconds", expected="0 or more")
        if self.predictor is None and (self.m is not None or self.predictor_cost):
            raise UsageError("a predictor's cost or m without a predictor", expected="the predictor")
        if self.m is not None and self.m < 1:
            raise UsageError(f"m of {self.m} experts", expected="1 or more")


@dataclass(frozen=True, slots=True)
class _Case:
    """One trace, what its tokens have to fetch, and the engines."""

    asked: _Asked
    info: TraceInfo
    phase: Phase
    requests: pl.DataFrame
    found: Fetches
    counts: Floats
    """``[tokens, L, 6]`` experts, L the layers of the model."""
    known: NDArray[np.bool_]
    """``[tokens, L]``"""
    compute: Compute
    sizes: Floats
    """``[L]`` bytes of an expert."""
    model: Model | None
    hardware: str | None
    width: int
    """Experts that are copied ahead."""

    @property
    def modes(self) -> list[str]:
        cached, predicted = self.asked.capacity is not None, self.asked.predictor is not None
        there = (True, cached, predicted, cached and predicted, predicted)
        return [mode for mode, shown in zip(MODES, there, strict=True) if shown]

    @property
    def head(self) -> dict[str, Any]:
        return {"trace": self.info.name, "phase": self.phase}

    @property
    def rate(self) -> float:
        return offload.link(self.asked.link)

    def experts(self, mode: str) -> tuple[Floats, Floats, Floats, Floats]:
        """Return ``[tokens, L]`` experts copied on demand, ahead, in vain, and of the router's in time."""
        from tracekit.metrics import fetches as f

        k = float(self.info.meta.top_k)
        c = np.moveaxis(self.counts, 2, 0)
        none = np.zeros(c.shape[1:])
        match mode:
            case "on_demand":
                return none + k, none, none, none
            case "cache":
                return c[f.MISSED], none, none, k - c[f.MISSED]
            case "prefetch":
                return k - c[f.RIGHT], c[f.RIGHT] + c[f.WRONG], c[f.WRONG], c[f.RIGHT]
            case "cache+prefetch":
                missed = c[f.MISSED] - c[f.RIGHT_ABSENT]
                return missed, c[f.RIGHT_ABSENT] + c[f.WRONG_ABSENT], c[f.WRONG_ABSENT], k - missed
        executed = np.minimum(c[f.RIGHT] + c[f.WRONG], k)
        return np.where(self.known, 0.0, k), executed, executed - c[f.EXECUTED], c[f.EXECUTED]

    def copies(self, mode: str) -> Copies:
        demand, ahead, _, _ = self.experts(mode)
        each = self.sizes / self.rate
        return Copies(demand * each, ahead * each, self.asked.distance)

    def cost_of(self, mode: str) -> float:
        return 0.0 if mode in ("on_demand", "cache") else self.asked.predictor_cost

    def times(self, mode: str) -> Floats:
        return offload.token_times(self.compute, self.copies(mode), self.cost_of(mode))

    def token(self, index: int) -> dict[str, Any]:
        request = self.requests.row(int(self.found.request[index]), named=True)
        return {"request_id": request["request_id"], "token": int(self.found.row[index])}


def _cases(store: Store, asked: _Asked, trace: str | None, cost: CostOptions) -> Iterator[_Case]:
    asked.check()
    for option in ("tensor_parallel", "expert_parallel"):
        if cost.get(option, 1) != 1:
            raise UsageError(f"{option} of {cost[option]}", expected="1: the model of offloading has one device")
    infos = [store.trace(trace)] if trace is not None else store.traces() or [store.trace()]
    refused: list[tuple[TraceInfo, UnsupportedError]] = []
    for info in infos:
        warn_of(info)
        try:
            case = _case(store, info, asked, cost)
        except UnsupportedError as error:
            refused.append((info, error))
            continue
        yield case
    if len(refused) == len(infos):
        info, refusal = refused[0]
        where = f"trace {info.name!r}" if len(infos) > 1 else refusal.where
        raise UnsupportedError(refusal.found, where=where, expected=refusal.expected, remedy=refusal.remedy)
    for info, refusal in refused:
        _warn(f"trace {info.name!r} is left out: {refusal.found}")


def _case(store: Store, info: TraceInfo, asked: _Asked, cost: CostOptions) -> _Case:
    from tracekit.metrics.cache_spec import check_capacities
    from tracekit.metrics.fetches import fetches

    check_tokens(info, ["tpot"])
    meta = info.meta
    if asked.capacity is not None:
        check_capacities(meta, "experts", [asked.capacity], ())
    compute, model, hardware = _compute(info, asked, cost)
    L = len(meta.layers) if model is None else model.moe_layers
    stands = np.arange(L) * len(meta.layers) // L  # the traced layer that stands for each of the model's
    sizes = _sizes(info, asked, model, cost, stands)
    requests = store.requests(info)
    phase = resolve_phase(requests, asked.phase)
    chosen = _chosen(info, phase_tokens(requests, phase), asked.seed)
    predict, recall = _predictor(store, info, asked, phase, stands)
    found = fetches(
        meta,
        requests,
        phase,
        store.blocks(info),
        chosen,
        capacity=asked.capacity or 0,
        policy=asked.policy if asked.capacity else "lru",
        start=asked.start,
        predict=predict,
        seed=asked.seed,
    )
    counts, known, width = found.counts[:, stands].astype(np.float64), found.known[:, stands], found.width
    if recall is not None:
        width = meta.top_k if asked.m is None else asked.m
        counts, known = _supposed(counts, recall, meta.top_k, width)
    if recall is not None or asked.policy != "lru":
        counts = _as_often(counts, meta.top_k)
    return _Case(asked, info, phase, requests, found, counts, known, compute, sizes, model, hardware, width)


def _compute(info: TraceInfo, asked: _Asked, cost: CostOptions) -> tuple[Compute, Model | None, str | None]:
    """Return what a token computes, the model where it is known, and the machine's name."""
    machine = [name for name in ("hardware", "bandwidth", "flops") if cost.get(name) is not None]
    if asked.compute is None:
        if not machine:
            raise UsageError(
                "no time of compute",
                expected="compute: seconds per token without copies, as measured; or a model on hardware, its roofline",
            )
        costs = cost_model(info, chosen_hardware(cost), cost)
        return Compute.of(costs), costs.model, costs.hardware.name
    if machine:
        raise UsageError(f"compute beside {machine[0]}", expected="the time as measured, or the machine")
    known = cost.get("model") is not None or (info.meta.model is not None and find(info.meta.model) is not None)
    model = traced_model(info, cost) if known else None
    return Compute.given(asked.compute, len(info.meta.layers) if model is None else model.moe_layers), model, None


def _sizes(info: TraceInfo, asked: _Asked, model: Model | None, cost: CostOptions, stands: NDArray[np.int64]) -> Floats:
    """Return the bytes of an expert of each layer."""
    if asked.expert_bytes is None and model is not None and {"model", "quantisation", "bits"} & cost.keys():
        found = (model.expert_bytes or 0,) * len(info.meta.layers)
    else:
        found = expert_sizes(info, expert_bytes=asked.expert_bytes)
    if not any(found):
        raise UsageError(
            "the trace does not say how large an expert is",
            where=f"trace {info.name!r}",
            expected="model (--model), or expert_bytes (--expert-bytes)",
        )
    return np.array(found, np.float64)[stands]


def _chosen(info: TraceInfo, tokens: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Return the requests that are replayed: all, or as many as make up the most tokens."""
    active = np.flatnonzero(tokens > 0)
    if tokens.sum() <= MAX_TOKENS:
        return tokens > 0
    drawn = np.random.default_rng(seed).permutation(active)
    few = drawn[: max(1, int((np.cumsum(tokens[drawn]) <= MAX_TOKENS).sum()))]
    chosen = np.zeros(len(tokens), bool)
    chosen[few] = True
    _warn(
        f"trace {info.name!r}: {len(few):,} of its {len(active):,} requests, drawn at random, stand for all: they have "
        f"{tokens[few].sum():,} tokens"
    )
    return chosen


def _predictor(
    store: Store, info: TraceInfo, asked: _Asked, phase: Phase, stands: NDArray[np.int64]
) -> tuple[Predict | None, Floats | None]:
    """Return the predictor, or the recall ``[L]`` of one that is only supposed."""
    from tracekit.analysis.predicted import recorded
    from tracekit.metrics.fetches import OWN
    from tracekit.metrics.prefetch import TABLES

    name, m = asked.predictor, asked.m
    if name is None:
        return None, None
    if not isinstance(name, str) or _figure(name) is not None:
        return None, _recall(name if not isinstance(name, str) else float(name), len(stands), asked.distance)
    if name in TABLES:
        return None, _learned(store, info, asked, name, phase)[stands]
    predict = OWN[name] if name in OWN else recorded(store, info, name, asked.distance, ", ".join([*OWN, *TABLES]))
    if m is None:
        return predict, None

    def fewer(rows: Any) -> tuple[Any, Any]:
        ids, known = predict(rows)
        if m > ids.shape[2]:
            raise UsageError(f"m of {m} experts", expected=f"at most the {ids.shape[2]} that {name} names")
        return ids[:, :, :m], known

    return fewer, None


def _learned(store: Store, info: TraceInfo, asked: _Asked, name: str, phase: Phase) -> Floats:
    """Return the recall ``[layers traced]`` of a predictor that learns from the trace, on requests it did not see."""
    from tracekit.analysis.offloading import prefetch

    frame = prefetch(
        store,
        predictor=name,
        m=asked.m or info.meta.top_k,
        distance=asked.distance,
        trace=info.name,
        phase=phase,
        by="layer",
        intervals=False,
    )
    found = {row["layer"]: row["recall"] for row in frame.iter_rows(named=True)}
    _warn(f"{name}: its mean recall in each layer stands for every token, and for experts in and out of the cache")
    return np.array([np.nan if found.get(layer) is None else found[layer] for layer in info.meta.layers])


def _figure(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _recall(figure: ArrayLike, layers: int, distance: int) -> Floats:
    recall = np.asarray(figure, np.float64)
    if recall.shape not in ((), (layers,)):
        raise UsageError(f"recalls of shape {list(recall.shape)}", expected=f"one, or {layers}: one a layer")
    if not np.all(np.isnan(recall) | ((recall >= 0) & (recall <= 1))) or np.all(np.isnan(recall)):
        raise UsageError("a recall that is no share", expected="0 to 1")
    if recall.ndim == 0:
        recall = np.full(layers, recall)
        recall[:distance] = np.nan
    return recall


def _supposed(counts: Floats, recall: Floats, k: int, m: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Put in what a predictor of some recall does on average."""
    from tracekit.metrics import fetches as f

    known = ~np.isnan(recall)
    right = np.where(known, recall, 0.0) * k
    wrong = np.where(known, m - right, 0.0)
    if (wrong < -1e-9).any():
        raise UsageError(f"a recall of {right.max() / k:g} with m = {m}", expected=f"at most {m / k:g}: k is {k}")
    counts = counts.copy()
    counts[:, :, f.RIGHT], counts[:, :, f.WRONG] = right, wrong
    # Which of more than k predictions are the first is not supposed.
    counts[:, :, f.EXECUTED] = right if m <= k else np.where(known, np.nan, 0.0)
    return counts, np.broadcast_to(known, counts.shape[:2])


def _as_often(counts: Floats, k: int) -> Floats:
    """Take the cache to lack as large a share of the predicted experts as it lacks of the token's own."""
    from tracekit.metrics import fetches as f

    absent = counts[:, :, [f.MISSED]] / k
    predicted, missing = [f.RIGHT, f.WRONG], [f.RIGHT_ABSENT, f.WRONG_ABSENT]
    counts[:, :, missing] = counts[:, :, predicted] * absent
    return counts


def _groups(case: _Case, seed: int) -> NDArray[np.int64] | None:
    """Return the jackknife group of each token; None with too few requests."""
    ids = case.requests["request_id"].to_list()
    here = np.unique(case.found.request)
    if len(here) < MIN_REQUESTS:
        _warn(f"trace {case.info.name!r}: no interval with fewer than {MIN_REQUESTS} requests: there are {len(here)}")
        return None
    dealt = deal([ids[r] for r in here], seed)
    return np.array([dealt[ids[r]] for r in here])[np.searchsorted(here, case.found.request)]


def _row(case: _Case, mode: str, groups: NDArray[np.int64] | None) -> dict[str, Any]:
    """Return the row of one mode."""
    asked, k = case.asked, case.info.meta.top_k
    copies, cost = case.copies(mode), case.cost_of(mode)
    demand, ahead, vain, hits = case.experts(mode)
    times, plain = case.times(mode), case.times("on_demand")
    computed, copied = case.compute.seconds + cost, copies.seconds
    predicted = mode not in ("on_demand", "cache")
    without = {"prefetch": "on_demand", "cache+prefetch": "cache", "speculative": "on_demand"}.get(mode)
    level = None if without is None else float(case.times(without).mean())
    needed = case.copies("cache" if mode == "cache+prefetch" else "on_demand").demand
    bound = offload.saving_bound(case.compute, needed).mean() / plain.mean() if predicted else None
    interval = _intervals(times, plain, groups)
    return case.head | {
        "mode": mode,
        "lossy": mode == "speculative",
        "n_tokens": len(times),
        "tpot_ms": 1e3 * times.mean(),
        "tpot_ms_lo": 1e3 * interval[0],
        "tpot_ms_hi": 1e3 * interval[1],
        "tpot_ms_p50": 1e3 * float(np.quantile(times, 0.5)),
        "tpot_ms_p95": 1e3 * float(np.quantile(times, 0.95)),
        "compute_ms": 1e3 * computed,
        "copy_ms": 1e3 * copied.mean(),
        "overlapped_ms": 1e3 * max(0.0, computed + copied.mean() - times.mean()),
        "bytes": float(((demand + ahead) @ case.sizes).mean()),
        "wasted_bytes": float((vain @ case.sizes).mean()),
        "hit_rate": float(hits.mean() / k),
        "saving": 1 - times.mean() / plain.mean(),
        "saving_lo": interval[2],
        "saving_hi": interval[3],
        "saving_most": bound,
        "break_even_ms": None if level is None else 1e3 * _break_even(case, copies, level),
        "predictor": _name(asked.predictor) if predicted else None,
        "distance": asked.distance if predicted else None,
        "m": (min(case.width, k) if mode == "speculative" else case.width) if predicted else None,
        "predictor_cost_ms": 1e3 * cost if predicted else None,
        "policy": asked.policy if mode.startswith("cache") else None,
        "capacity": asked.capacity if mode.startswith("cache") else None,
        "start": asked.start if mode.startswith("cache") else None,
        "expert_bytes": float(case.sizes.mean()),
        "link": case.rate,
        "model": None if case.model is None else case.model.name,
        "hardware": case.hardware,
    }


def _break_even(case: _Case, copies: Copies, level: float) -> float:
    return offload.break_even(lambda c: float(offload.token_times(case.compute, copies, c).mean()), level)


def _intervals(times: Floats, plain: Floats, groups: NDArray[np.int64] | None) -> tuple[float, float, float, float]:
    """Return the ends of the intervals of the mean time and of the saving, by leaving groups of requests out."""
    from tracekit.metrics.intervals import jackknife

    if groups is None or np.ptp(times) <= 1e-9 * times.mean():  # there is nothing to estimate
        return (np.nan,) * 4
    n, own, base = (np.bincount(groups, weights) for weights in (None, times, plain))
    n, own, base = (np.concatenate([[x.sum()], x.sum() - x]) for x in (n, own, base))
    found = jackknife(np.stack([own / n, 1 - own / base], axis=1))
    return float(found.lo[0]), float(found.hi[0]), float(found.lo[1]), float(found.hi[1])


def _span(case: _Case, span: Span, cells: dict[str, Floats]) -> dict[str, Any]:
    layer = span.layer
    copied = span.engine == "copy"
    return {
        "engine": span.engine,
        "layer": layer,
        "part": span.part,
        "start_ms": 1e3 * span.start,
        "end_ms": 1e3 * span.end,
        "experts": float(cells[span.part][layer] * case.rate / case.sizes[layer]) if copied else None,
    }


def _name(predictor: Any) -> str:
    """Return what a predictor is called: a supposed one by its recall."""
    if isinstance(predictor, str):
        if (figure := _figure(predictor)) is None:
            return predictor
        predictor = figure
    return f"recall {np.nanmean(np.asarray(predictor, np.float64)):.4g}"


def _warn(note: str) -> None:
    warnings.warn(note, TracekitWarning, stacklevel=4)
