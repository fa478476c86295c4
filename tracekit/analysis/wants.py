"""What can be asked of a trace: for each kind of result, what it takes to measure it and how it is finalised."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tracekit.analysis.expert_sizes import expert_sizes
from tracekit.errors import UnsupportedError, UsageError
from tracekit.metrics.budget import BudgetSpec, spec_of
from tracekit.metrics.cache_spec import (
    POLICIES,
    SCOPES,
    STARTS,
    UNITS,
    CacheSpec,
    Scope,
    Start,
    Unit,
    check_capacities,
    default_capacities,
)
from tracekit.metrics.locality import RATIOS, SEGMENT, LocalitySpec
from tracekit.metrics.locality import spec_of as spec_of_segments
from tracekit.metrics.state import Spec
from tracekit.schema import By
from tracekit.sources.sizes import Model
from tracekit.store.runs import Runs

if TYPE_CHECKING:
    import polars as pl

MAX_WINDOW = 8
"""Longest window by default: up to 7 drafted tokens."""

MAX_LAG = 32
"""Largest lag by default."""

WINDOW = 4
"""Window that is taken apart by default."""

MAX_STEP = 16
"""Most tokens of a verification step whose budgets are measured by default."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes by default where several are compared."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One result that is wanted of a trace: how it is measured, keyed, and finalised."""

    kind: str
    spec: Spec
    key: dict[str, Any]
    """What the numbers depend on, besides the trace."""
    finalise: Callable[[Any], pl.DataFrame]
    """Makes the frame of what the pass returned."""
    reads: str = "routing"
    """The pass that it comes from, see :mod:`tracekit.analysis.passes`."""


def _want_windows(
    runs: Runs,
    *,
    max_window: int | None = None,
    batch_size: int | Iterable[int] = 1,
    overlapping: bool = True,
    distinct: bool = False,
    **common: Any,
) -> Wanted:
    import polars as pl

    sizes = _batch_sizes(batch_size)
    longest = runs.fit(max_window, MAX_WINDOW, "windows")
    runs.batch(sizes, longest, common["by"])
    if distinct:
        if common["by"] == "request":
            raise UsageError("a batch of distinct requests by request", expected="by layer or by label")
        if common["intervals"]:
            runs.notes.append("batches of distinct requests have no interval")
        common["intervals"] = False
    drawn = {"distinct_batch": max(sizes)} if distinct else {"batches": max(sizes) > 1}
    spec = Spec(runs.phase, max_window=longest, overlapping=overlapping, **drawn, **common)
    key = {"max_window": longest, "batch_size": sizes, "overlapping": overlapping, "distinct": distinct, **common}
    return Wanted(
        "windows", spec, key, lambda m: m.windows(sizes, distinct=distinct).filter(pl.col("window") <= longest)
    )


def _want_expert_ratio(
    runs: Runs, *, max_window: int | None = None, batch_size: int | Iterable[int] = BATCH_SIZES, **common: Any
) -> Wanted:
    import polars as pl

    sizes = _batch_sizes(batch_size)
    longest = runs.fit(max_window, MAX_WINDOW, "windows")
    runs.batch(sizes, longest, common["by"])
    spec = Spec(runs.phase, max_window=longest, batches=max(sizes) > 1, **common)
    key = {"max_window": longest, "batch_size": sizes, **common}
    return Wanted("expert_ratio", spec, key, lambda m: m.expert_ratio(sizes).filter(pl.col("window") <= longest))


def _batch_sizes(batch_size: int | Iterable[int]) -> list[int]:
    sizes = [operator.index(b) for b in (batch_size if isinstance(batch_size, Iterable) else [batch_size])]
    if not sizes or min(sizes) < 1:
        raise UsageError(f"batch sizes {sizes}", expected="whole numbers from 1 on")
    return list(dict.fromkeys(sizes))


def _want_autocorr(runs: Runs, *, max_lag: int | None = None, **common: Any) -> Wanted:
    import polars as pl

    largest = runs.fit(max_lag, MAX_LAG, "lags", reach=1)
    spec = Spec(runs.phase, max_lag=largest, **common)
    return Wanted(
        "autocorr", spec, {"max_lag": largest, **common}, lambda m: m.autocorr().filter(pl.col("lag") <= largest)
    )


def _want_attribution(runs: Runs, *, window: int | None = None, **common: Any) -> Wanted:
    length = runs.fit(window, WINDOW, "windows", least=2)
    spec = Spec(runs.phase, max_window=length, **common)
    return Wanted("attribution", spec, {"window": length, **common}, lambda m: m.attribution(length))


def _want_load(runs: Runs, *, by: By | None = None, **common: Any) -> Wanted:
    if by == "request":
        raise UsageError("load by request", expected="by layer or by label")
    group: By | None = "label" if by == "label" else None
    return Wanted("load", Spec(runs.phase, by=group, **common), {"by": group}, lambda m: m.load())


def _want_budget(
    runs: Runs,
    *,
    window: int | Iterable[int] | None = None,
    budget: int | Iterable[int] | None = None,
    share: float = 0.9,
    steps: bool = False,
    **common: Any,
) -> Wanted:
    import polars as pl

    if steps:
        _check_steps(runs)
    elif bare := sum(not segment.has_weights for segment in runs.trace.segments):
        several = len(runs.trace.segments) > bare
        raise UnsupportedError(
            f"{bare} of the trace's {len(runs.trace.segments)} ingests have no router weights"
            if several
            else "the trace has no router weights",
            expected="weights beside the expert ids, to rank a window's experts by",
            remedy="Capture them with: tracekit capture transformers (or ingest a source that holds router weights)",
        )
    lengths = {operator.index(t) for t in (window if isinstance(window, Iterable) else [window]) if t is not None}
    if not steps:
        lengths.add(runs.fit(max(lengths, default=None), WINDOW, "windows"))
    lengths = lengths or {*range(1, MAX_STEP + 1)}
    budgets = budget if budget is None or isinstance(budget, Iterable) else [budget]
    asked = spec_of(runs.trace.meta, lengths, budgets, share)
    asked["steps"] = steps
    spec = BudgetSpec(runs.phase, **asked, **common)
    key = {name: value for name, value in asked.items() if name != "max_window"} | {"default": budget is None} | common
    there = pl.col("n_windows") > 0 if steps else pl.lit(True)
    useful = pl.col("budget") <= (pl.col("window") * runs.trace.meta.top_k if budget is None else pl.col("budget"))
    return Wanted("budget", spec, key, lambda m: m.budget().filter(useful, there), reads="weights")


def _want_prefetch(
    runs: Runs,
    *,
    predictor: str | Iterable[str] | None = None,
    m: int | Iterable[int] | None = None,
    distance: int | Iterable[int] = 1,
    model: Any = None,
    expert_bytes: float | None = None,
    **common: Any,
) -> Wanted:
    from tracekit.analysis.expert_sizes import expert_sizes
    from tracekit.analysis.predictors import chosen_predictors
    from tracekit.metrics.prefetch import PrefetchSpec, check_m

    grid = check_m(runs.trace.meta, m)
    built_in, recorded = chosen_predictors(runs, predictor, distance, grid[0])
    asked: dict[str, Any] = {
        "predictors": built_in,
        "recorded": recorded,
        "m": grid,
        "weights": all(segment.has_weights for segment in runs.trace.segments),
        "sizes": expert_sizes(runs.trace, model=model, expert_bytes=expert_bytes),
    }
    spec = PrefetchSpec(runs.phase, **asked, **common)
    return Wanted("prefetch", spec, asked | common, lambda p: p.prefetch(), reads="prefetch")


def _check_steps(runs: Runs) -> None:
    """Refuse what takes verification steps of a trace that has none."""
    if not runs.trace.meta.drafts_included:
        raise UnsupportedError(
            "the trace has no verification steps: its tokens are those that were accepted",
            expected="steps with the rows of rejected drafts",
            remedy="Capture them with: tracekit capture transformers --draft MODEL; SGLang's expert distribution "
            "recorder (per_token) and tables of steps have them too. The windows of accepted tokens are in: "
            "tracekit windows",
        )


def _want_steps(kind: Literal["steps", "acceptance"]) -> Callable[..., Wanted]:
    def want(runs: Runs, **common: Any) -> Wanted:
        _check_steps(runs)
        spec = Spec(runs.phase, **common)
        return Wanted(kind, spec, common, lambda v: v.steps() if kind == "steps" else v.acceptance(), reads="steps")

    return want


def _want_locality(
    runs: Runs,
    *,
    segment: int | Iterable[int] | None = None,
    cache_ratio: float | Iterable[float] | None = None,
    **common: Any,
) -> Wanted:
    meta = runs.trace.meta
    lengths = {operator.index(m) for m in (segment if isinstance(segment, Iterable) else [segment]) if m is not None}
    lengths.add(runs.fit(max(lengths, default=None), SEGMENT, "segments"))
    if cache_ratio is None:
        cache_ratio = [ratio for ratio in RATIOS if ratio * meta.top_k <= meta.num_experts]
    ratios = cache_ratio if isinstance(cache_ratio, Iterable) else [cache_ratio]
    asked = spec_of_segments(meta, lengths, ratios)
    key = {name: value for name, value in asked.items() if name != "max_window"} | common
    spec = LocalitySpec(runs.phase, **asked, **common)
    return Wanted("locality", spec, key, lambda m: m.locality(), reads="locality")


def _want_cache(
    runs: Runs,
    *,
    policy: str | Iterable[str] = POLICIES,
    capacity: float | Iterable[float] | None = None,
    unit: Unit = "experts",
    scope: Scope = "layer",
    batch_size: int = 1,
    start: Start | None = None,
    model: Model | str | Path | None = None,
    expert_bytes: float | None = None,
    **common: Any,
) -> Wanted:
    policies = _chosen("policy", [policy] if isinstance(policy, str) else policy, POLICIES)
    _chosen("unit", [unit], UNITS)
    known = expert_sizes(runs.trace, model=model, expert_bytes=expert_bytes)
    if unit == "bytes" and not known:
        raise UnsupportedError(
            "a capacity in bytes, and the trace does not say how large its experts are",
            expected="their size",
            remedy="Name the model (--model) or the bytes of an expert (--expert-bytes)",
        )
    if capacity is None and unit != "experts":
        raise UsageError(f"no capacity in {unit}", expected="one or more")
    meta = runs.trace.meta
    asked = default_capacities(meta) if capacity is None else capacity
    capacities = check_capacities(meta, unit, asked if isinstance(asked, Iterable) else [asked], known)
    if unit == "bytes" and capacities[0] < (least := meta.top_k * sum(known)):
        runs.notes.append(f"less than {least:,} bytes does not hold what one token needs: k experts of every layer")
    if "static" in policies and runs.requests.height <= batch_size:
        runs.notes.append("a static list has no other request to be learned from: null")
    # Belady comes with every other policy: without it nobody can say what a policy loses.
    replayed = tuple(p for p in POLICIES if p in policies or p == "belady")
    spec, key = _cache_spec(runs, replayed, capacities, unit, scope, batch_size, start, known, common)
    return Wanted("cache", spec, key | {"shown": policies}, lambda m: m.cache(policies), reads="caches")


def _want_reuse(
    runs: Runs, *, scope: Scope = "layer", batch_size: int = 1, start: Start | None = None, **common: Any
) -> Wanted:
    meta = runs.trace.meta
    every = [float(c) for c in range(meta.top_k, meta.num_experts + 1)]
    spec, key = _cache_spec(runs, ("lru",), every, "experts", scope, batch_size, start, (), common)
    return Wanted("reuse", spec, key, lambda m: m.reuse(), reads="caches")


def _want_layer_budgets(
    runs: Runs,
    *,
    capacity: float | Iterable[float] | None = None,
    unit: Unit = "experts",
    batch_size: int = 1,
    start: Start | None = None,
    model: Model | str | Path | None = None,
    expert_bytes: float | None = None,
    **common: Any,
) -> Wanted:
    if common["by"] is not None:
        raise UsageError(f"budgets of layers by {common['by']}", expected="no groups")
    meta = runs.trace.meta
    _chosen("unit", [unit], UNITS)
    known = expert_sizes(runs.trace, model=model, expert_bytes=expert_bytes)
    if unit == "bytes" and not known:
        raise UnsupportedError(
            "a budget in bytes, and the trace does not say how large its experts are",
            expected="their size",
            remedy="Name the model (--model) or the bytes of an expert (--expert-bytes)",
        )
    default = [c for c in default_capacities(meta) if meta.top_k < c < meta.num_experts] or [float(meta.top_k)]
    sizes = default if capacity is None else capacity if isinstance(capacity, Iterable) else [capacity]
    capacities = tuple(check_capacities(meta, unit, sizes, known))
    asked = CacheSpec(runs.phase, capacities=capacities, unit=unit, scope="all", sizes=known)
    least = meta.top_k * int(asked.costs(meta).sum())
    if (total := int(asked.budgets(meta)[0, 0])) < least:
        raise UsageError(
            f"a budget of {total:,} {'bytes' if unit == 'bytes' else 'experts'} for all layers",
            expected=f"at least {least:,}: k experts of every layer, what one token needs",
        )
    if runs.requests.height <= batch_size:
        runs.notes.append("no other request to judge a split by: its hit rate is null but where it was learned")
    every = [float(c) for c in range(meta.top_k, meta.num_experts + 1)]
    # As for a static list, requests apart from those that are judged are needed, intervals or not.
    replayed = ("lru", "static")
    spec, key = _cache_spec(runs, replayed, every, "experts", "layer", batch_size, start, (), common)

    def finalise(m: Any) -> pl.DataFrame:
        from tracekit.metrics.layer_budgets import layer_budgets

        return layer_budgets(m, asked)

    key |= {"asked": capacities, "asked_unit": unit, "asked_sizes": known}
    return Wanted("layer_budgets", spec, key, finalise, reads="caches")


def _cache_spec(
    runs: Runs,
    policies: tuple[str, ...],
    capacities: list[float],
    unit: Unit,
    scope: Scope,
    batch_size: int,
    start: Start | None,
    sizes: tuple[int, ...],
    common: dict[str, Any],
) -> tuple[CacheSpec, dict[str, Any]]:
    """Return what is replayed and its key, what a cache begins with decided."""
    import polars as pl

    _chosen("scope", [scope], SCOPES)
    [batch_size] = _batch_sizes(batch_size)
    if batch_size > 1 and common["by"] == "request":
        raise UsageError("a batch by request", expected="by layer or by label")
    prompts = runs.requests.filter(pl.col("n_decode") < pl.col("n_tokens")).height > 0
    if start is None:
        start = "carry" if runs.phase == "prefill" else "prompt" if runs.phase == "decode" and prompts else "cold"
    _chosen("start", [start], STARTS)
    if start == "prompt" and (runs.phase != "decode" or not prompts):
        why = "the trace has no prompts" if not prompts else f"the phase is {runs.phase}, which counts prompts"
        raise UsageError(f"caches that begin with the prompt, but {why}", expected="start cold or carry")
    if start == "cold" and runs.phase == "prefill":
        raise UsageError("prompts from an empty cache, each one event: nothing can hit", expected="start carry")
    prefill = pl.col("n_tokens") - pl.col("n_decode").fill_null(0)
    whole = {"decode": pl.col("n_decode"), "prefill": prefill, "all": pl.max_horizontal(prefill, "n_decode")}
    if holes := runs.requests.filter(pl.col("longest") < whole[runs.phase]).height:
        runs.notes.append(f"{holes} requests have holes: for the cache the tokens on both sides follow each other")
    if batch_size > 1:
        runs.notes.append(
            f"batches are {batch_size} requests that follow each other in the trace, up to the end of the shortest; "
            "intervals are over batches"
        )
    asked = {
        "policies": policies,
        "capacities": tuple(capacities),
        "unit": unit,
        "scope": scope,
        "batch_size": batch_size,
        "start": start,
        "sizes": sizes,
    }
    return CacheSpec(runs.phase, **asked, **common), asked | common  # type: ignore[arg-type]


def _chosen(what: str, names: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(names))
    wrong = next((name for name in chosen if name not in known), None)
    if wrong is not None or not chosen:
        raise UsageError(f"{what} {wrong!r}" if chosen else f"no {what}", expected="one of " + ", ".join(known))
    return chosen


WANT: dict[str, Callable[..., Wanted]] = {
    "windows": _want_windows,
    "expert_ratio": _want_expert_ratio,
    "autocorr": _want_autocorr,
    "attribution": _want_attribution,
    "load": _want_load,
    "budget": _want_budget,
    "steps": _want_steps("steps"),
    "acceptance": _want_steps("acceptance"),
    "prefetch": _want_prefetch,
    "cache": _want_cache,
    "reuse": _want_reuse,
    "layer_budgets": _want_layer_budgets,
    "locality": _want_locality,
}
