"""The passes over a trace that results come from: what each reads, and what it returns.

The heavy modules are imported here, by the pass that needs them: a result that is saved does without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tracekit.execution import Running, current, on_this_machine
from tracekit.metrics.state import Spec
from tracekit.store import Store, TraceInfo

if TYPE_CHECKING:
    import polars as pl

Pass = Callable[[Store, TraceInfo, "pl.DataFrame", Spec], Any]
"""Takes a trace, its requests in order and what is to be measured."""


def local() -> Running:
    """Return how a pass is run that cannot be cut into parts, whose sums are merged.

    Raises
    ------
    UsageError
        It is to be run on a cluster.
    """
    if current().engine != "local":
        raise on_this_machine()
    return current()


def routing(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the routing rows that no kept sums have: a ``Measurement``, or ``Counted`` of a trace of counts only."""
    from tracekit.analysis.summing import sums
    from tracekit.metrics.measurement import Counted, Measurement

    if info.meta.histogram:
        return Counted(info.meta, requests, spec, partial(store.counts, info))
    return Measurement(info.meta, spec, sums(store, info, requests, spec))


def weights(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the routing rows with their router weights: ``Budgets``."""
    from tracekit.metrics.budget import Budgets, BudgetSpec

    assert isinstance(spec, BudgetSpec)
    if spec.steps:
        there = with_steps(store, info, requests)
        return Budgets(info.meta, there, spec, store.steps(info, weights=True), local().threads)
    return Budgets(info.meta, requests, spec, store.blocks(info, weights=True), local().threads)


def with_steps(store: Store, info: TraceInfo, requests: pl.DataFrame) -> pl.DataFrame:
    """Return a trace's requests, those without verification steps as if they had no tokens."""
    import polars as pl

    none = ~pl.Series(store.has_steps(info))
    return requests.with_columns(pl.when(none).then(0).otherwise(pl.col("n_tokens", "n_decode")).name.keep())


def steps(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the verification steps, and the routing of the requests that have some: ``Verification``."""
    from tracekit.metrics.verification import Verification

    there = with_steps(store, info, requests)
    return Verification(info.meta, there, spec, store.steps(info), partial(store.columns, info), local().threads)


def caches(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Replay expert caches over the routing rows: ``Caches``."""
    from tracekit.metrics.cache_spec import CacheSpec
    from tracekit.metrics.caches import Caches

    assert isinstance(spec, CacheSpec)
    return Caches(info.meta, requests, spec, store.blocks(info), local().threads)


def prefetch(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the routing, once to learn and once to judge, and what predictors recorded: ``Prefetch``."""
    from tracekit.metrics.prefetch import BY_TOKEN, Prefetch, PrefetchSpec
    from tracekit.store.predicted import prediction_rows
    from tracekit.store.rows import token_rows

    assert isinstance(spec, PrefetchSpec)
    tokens = token_rows(store, info) if any(name in BY_TOKEN for name, _ in spec.predictors) else None
    rows = prediction_rows(store, info, [(name, distance) for name, distance, _ in spec.recorded])
    blocks = partial(store.blocks, info, weights=spec.weights)
    return Prefetch(info.meta, requests, spec, blocks, local().threads, tokens, rows)


def locality(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the routing rows for what stretches of tokens have in common: ``Locality``."""
    from tracekit.metrics.locality import Locality, LocalitySpec

    assert isinstance(spec, LocalitySpec)
    return Locality(info.meta, requests, spec, store.blocks(info), local().threads)


PASSES: dict[str, Pass] = {
    "caches": caches,
    "locality": locality,
    "routing": routing,
    "weights": weights,
    "steps": steps,
    "prefetch": prefetch,
}
