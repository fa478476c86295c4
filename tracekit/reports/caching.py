"""The tables of expert caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.metrics.cache_spec import POLICIES
from tracekit.reports.grid import Block, Column, estimate, rounded
from tracekit.reports.text import MISSING, align, count, fixed, number, printable, scale

Row = dict[str, Any]

_ONE = ("trace", "phase", "scope", "start", "batch_size")
_SCOPES = {"layer": "a cache per layer", "all": "one cache for all layers"}
_STARTS = {"cold": "from cold", "prompt": "from the prompt", "carry": "carried on"}
_GROUPS = ("layer", "label", "request_id")

_LISTED = 12
"""Capacities of the reuse curve in a table."""


def cache(frame: pl.DataFrame) -> Iterator[Block]:
    """Yield hits by capacity and policy, then what the misses of one policy are made of."""
    group = next((name for name in _GROUPS if name in frame.columns), None)
    if group:
        yield from _by(frame, group)
        return
    for title, part in _parts(frame):
        rows = part.rows(named=True)
        first = [row for row in rows if row["policy"] == rows[0]["policy"]]
        capacities = _capacities(first)
        yield Block([*capacities, *_rates(rows)], f"{title}: hit rate, %")
        # Belady's own misses have no part of the policy: those of a policy that can be built say more.
        policy = next(
            (p for p in ("lru", *POLICIES) if p != "belady" and any(r["policy"] == p for r in rows)), "belady"
        )
        mine = [row for row in rows if row["policy"] == policy]
        columns = [
            capacities[0],
            _percent("misses", [1 - r["hit_rate"] if r["hit_rate"] is not None else None for r in mine]),
        ]
        columns += [_percent(text, [r[name] for r in mine]) for name, text in _PARTS.items()]
        columns.append(Column("per token", align([number(r["misses_per_token"]) for r in mine])))
        if any(r["bytes_per_token"] is not None for r in mine):
            sizes = [scale(r["bytes_per_token"], 1e-6) for r in mine]
            columns.append(Column("MB/token", align([number(size) for size in sizes])))
        if "seconds_per_token" in part.columns:
            columns.append(Column("ms/token", align([number(scale(r["seconds_per_token"], 1e3)) for r in mine])))
        yield Block(columns, f"misses of {policy}, % of accesses, and what they are", [_sentence(policy, mine)])


_PARTS = {"cold": "cold", "working_set": "working set", "policy_excess": "policy"}


def _sentence(policy: str, rows: Sequence[Row]) -> str:
    known = [row for row in rows if row["hit_rate"] is not None and row["hit_rate"] < 1]
    if not known:
        return ""
    row = max(known, key=lambda r: (r["policy_excess"], -r["capacity"]))
    misses = 1 - row["hit_rate"]
    parts = [f"{100 * row[name] / misses:.0f} % {text}" for name, text in _PARTS.items()]
    return (
        f"at {row['capacity']:.4g} experts per layer the misses of {policy} are {parts[0]}, {parts[1]} and {parts[2]}"
    )


def _by(frame: pl.DataFrame, group: str) -> Iterator[Block]:
    for title, part in _parts(frame, "policy"):
        rows = part.rows(named=True)
        keys = list(dict.fromkeys(row[group] for row in rows))
        columns = [Column(group.removesuffix("_id"), [_text(key) for key in keys], right=group == "layer", cut=True)]
        for capacity in dict.fromkeys(row["capacity"] for row in rows):
            at = {row[group]: row["hit_rate"] for row in rows if row["capacity"] == capacity}
            columns.append(_percent(f"{capacity:.4g}", [at.get(key) for key in keys]))
        yield Block(columns, f"{title}: hit rate, %, by experts per layer")
    yield Block([], notes=["(--format csv has the misses, intervals and every column)"])


def reuse(frame: pl.DataFrame) -> Iterator[Block]:
    """Yield the curve at some capacities."""
    group = next((name for name in _GROUPS if name in frame.columns), None)
    every = sorted(frame["capacity"].unique())
    step = -(-len(every) // _LISTED)
    listed = sorted({*every[::step], every[-1]})
    if group:
        shown = frame.filter(pl.col("capacity").is_in(listed)).with_columns(policy=pl.lit("lru"))
        yield from _by(shown, group)
        return
    for title, part in _parts(frame):
        rows = part.filter(pl.col("capacity").is_in(listed)).rows(named=True)
        columns = [Column("experts", [count(row["capacity"]) for row in rows])]
        columns += estimate("hit rate, %", rows, "hit_rate", factor=100)
        never = part.filter(pl.col("capacity") == every[-1])["hit_rate"][0]
        notes = (
            []
            if never is None
            else [f"first touches: {100 * (1 - never):.1f} % of {count(rows[0]['accesses'])} accesses"]
        )
        notes += ["(--format csv has every capacity)"] if len(listed) < len(every) else []
        yield Block(columns, f"{title}: hit rate of LRU by experts per layer", notes)


def _parts(frame: pl.DataFrame, *more: str) -> Iterator[tuple[str, pl.DataFrame]]:
    for values, part in frame.group_by(*_ONE, *more, maintain_order=True):
        trace, phase, scope, start, size, *policy = values
        title = [
            _text(trace),
            "all tokens" if phase == "all" else _text(phase),
            _SCOPES[str(scope)],
            _STARTS[str(start)],
        ]
        title += [f"batch of {size}"] * (size != 1) + [_text(p) for p in policy]
        yield ", ".join(title), part


def _capacities(rows: Sequence[Row]) -> list[Column]:
    columns = [Column("experts", [f"{row['capacity']:.4g}" for row in rows])]
    if any(row["capacity_bytes"] is not None for row in rows):
        columns.append(Column("GB", align([number(scale(row["capacity_bytes"], 1e-9)) for row in rows])))
    return columns


def _rates(rows: Sequence[Row]) -> Iterator[Column]:
    """Yield a column for each policy, the interval beside the first."""
    policies = dict.fromkeys(row["policy"] for row in rows)
    for i, policy in enumerate(policies):
        mine = [row for row in rows if row["policy"] == policy]
        if i == 0:
            yield from estimate(policy, mine, "hit_rate", factor=100)
        else:
            yield Column(policy, rounded(mine, "hit_rate", factor=100))


def _percent(title: str, values: Sequence[float | None]) -> Column:
    return Column(title, [fixed(scale(value, 100), 1) for value in values])


def _text(value: Any) -> str:
    return MISSING if value is None else printable(str(value))
