"""The passes over a trace that results come from: what each reads, and what it returns.

The heavy modules are imported here, by the pass that needs them: a result that is saved does without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tracekit.metrics.state import Spec
from tracekit.store import Store, TraceInfo

if TYPE_CHECKING:
    import polars as pl

Pass = Callable[[Store, TraceInfo, "pl.DataFrame", Spec], Any]
"""Takes a trace, its requests in order and what is to be measured."""


def threads() -> int:
    """Return the threads that a pass uses: the processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def routing(store: Store, info: TraceInfo, requests: pl.DataFrame, spec: Spec) -> Any:
    """Read the routing rows: a ``Measurement``, or ``Counted`` of a trace that holds counts only."""
    from tracekit.metrics.measurement import Counted, Measurement

    if info.meta.histogram:
        return Counted(info.meta, requests, spec, partial(store.counts, info))
    return Measurement(info.meta, requests, spec, store.blocks(info), threads())


PASSES: dict[str, Pass] = {"routing": routing}
