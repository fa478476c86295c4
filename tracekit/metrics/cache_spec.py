"""What is asked of expert caches: policies, capacities and what a cache begins with, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UsageError
from tracekit.metrics.state import Spec
from tracekit.schema import TraceMeta

Scope = Literal["layer", "all"]
Unit = Literal["experts", "bytes", "share"]
Start = Literal["cold", "prompt", "carry"]

POLICIES = ("lru", "lfu", "lfru", "belady", "static", "random")
SCOPES: tuple[Scope, ...] = ("layer", "all")
UNITS: tuple[Unit, ...] = ("experts", "bytes", "share")

STARTS: tuple[Start, ...] = ("cold", "prompt", "carry")
"""What a cache holds when a request (or batch) begins: nothing; what its prompt left there, which is not counted; or
what the request before it left, prompts included."""


@dataclass(frozen=True, slots=True)
class CacheSpec(Spec):
    """What one pass replays."""

    policies: tuple[str, ...] = ("lru", "belady")
    capacities: tuple[float, ...] = ()
    """Ascending, in ``unit``; the bytes are those of all layers together."""
    unit: Unit = "experts"
    scope: Scope = "layer"
    """A cache for each layer, or one for all."""
    batch_size: int = 1
    start: Start = "cold"
    sizes: tuple[int, ...] = ()
    """Bytes of an expert of each layer; empty where they are not known."""

    def costs(self, meta: TraceMeta) -> NDArray[np.int64]:
        """Return what an expert of each layer takes, ``[L]``, in the unit of the budgets."""
        return np.array(self.sizes if self.unit == "bytes" else [1] * len(meta.layers), np.int64)

    def budgets(self, meta: TraceMeta) -> NDArray[np.int64]:
        """Return the budgets of the caches, ``[G, L]`` or, of one for all layers, ``[G, 1]``."""
        layers, n = len(meta.layers), meta.num_experts
        rows = []
        for capacity in self.capacities:
            if self.unit == "bytes":
                total = int(capacity)
            else:
                experts = capacity * n if self.unit == "share" else capacity
                total = math.floor(experts * layers + 1e-9)
            rows.append([total] if self.scope == "all" else [total // layers] * layers)
        return np.array(rows, np.int64).reshape(len(rows), -1)

    def experts(self, meta: TraceMeta) -> list[float]:
        """Return the capacities in experts per layer, on average."""
        whole = self.budgets(meta).sum(axis=1)
        return [float(total / self.costs(meta).sum()) for total in whole]


def check_capacities(meta: TraceMeta, unit: Unit, capacities: Iterable[float], sizes: tuple[int, ...]) -> list[float]:
    """Return the capacities in ascending order.

    Raises
    ------
    UsageError
        One is not a number of its unit, holds less than a token's k experts per layer (bytes may), or more than all.
    """
    n, k = meta.num_experts, meta.top_k
    found = sorted({float(c) for c in capacities})
    if not found:
        raise UsageError("no capacity", expected="one or more")
    for c in found:
        what = {"experts": f"a capacity of {c:g} experts per layer", "share": f"a capacity of {c:g} of the experts"}
        said = what.get(unit, f"a capacity of {c:,.0f} bytes")
        if not math.isfinite(c) or c <= 0:
            raise UsageError(said, expected="more than 0")
        if unit == "bytes":
            if c > sum(sizes) * n:
                raise UsageError(said, expected=f"at most the {sum(sizes) * n:,} bytes of all experts")
            continue
        if unit == "experts" and c != int(c):
            raise UsageError(said, expected="a whole number")
        if not k <= (c if unit == "experts" else math.floor(c * n + 1e-9)) <= n:
            span = f"{k} (k, what one token needs) to {n} (N, all there are)"
            raise UsageError(said, expected=span if unit == "experts" else f"a share that is {span} experts")
    return found


def default_capacities(meta: TraceMeta) -> list[float]:
    """Return k and some shares of N, in experts per layer."""
    shares = (round(meta.num_experts * s) for s in (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1))
    return [float(c) for c in sorted({meta.top_k, *(c for c in shares if c >= meta.top_k)})]
