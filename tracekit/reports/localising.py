"""The tables of locality: what a stretch of tokens has in common, and how layers share a budget of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column, estimate, rounded
from tracekit.reports.text import MISSING, align, count, fixed, number, printable, scale

Row = dict[str, Any]

_GROUPS = ("layer", "label", "request_id")


def locality(frame: pl.DataFrame) -> Iterator[Block]:
    """Yield SRP by segment length, then the hit rates by segment length and cache size."""
    group = next((name for name in _GROUPS if name in frame.columns), None)
    for (trace, phase), part in frame.group_by("trace", "phase", maintain_order=True):
        title = f"{_text(trace)}, {_phase(phase)}"
        if group:
            yield from _locality_by(part, group, title)
            continue
        rows = part.unique("segment", keep="first", maintain_order=True).rows(named=True)
        columns = [Column("segment", [count(row["segment"]) for row in rows])]
        columns += [Column("segments", [count(row["n_segments"]) for row in rows])]
        columns += estimate("SRP, %", rows, "srp", factor=100, rank=1)
        columns += estimate("experts kept × k", rows, "size_ratio", rank=1)
        yield Block(columns, f"{title}: a router that keeps experts for a whole segment (SRP)")
        rows = part.rows(named=True)
        columns = [Column("segment", [count(row["segment"]) for row in rows])]
        columns += [Column("experts", [count(row["capacity"]) for row in rows])]
        columns += [Column("× k", align([number(row["cache_ratio"]) for row in rows]))]
        columns += estimate("SCH, %", rows, "sch", factor=100, rank=1)
        columns += estimate("fixed set, %", rows, "fixed_hit_rate", factor=100, rank=1)
        yield Block(columns, "hit rate of a cache that sees a segment ahead (SCH)")


def _locality_by(part: pl.DataFrame, group: str, title: str) -> Iterator[Block]:
    ratio = min(part["cache_ratio"].unique(), key=lambda r: abs(r - 2))
    for (segment,), some in part.filter(cache_ratio=ratio).group_by("segment", maintain_order=True):
        rows = some.rows(named=True)
        name = group.removesuffix("_id")
        columns = [Column(name, [_text(row[group]) for row in rows], right=group == "layer", cut=True)]
        columns += estimate("SRP, %", rows, "srp", factor=100, rank=1)
        columns += [Column("kept × k", align([number(row["size_ratio"]) for row in rows]))]
        columns += estimate("SCH, %", rows, "sch", factor=100, rank=1)
        columns += [Column("fixed set, %", rounded(rows, "fixed_hit_rate", factor=100))]
        yield Block(columns, f"{title}, segment of {segment} tokens; cache of {rows[0]['capacity']} experts")
    yield Block([], notes=["(--format csv has every cache size)"])


def layer_budgets(frame: pl.DataFrame) -> Iterator[Block]:
    """Yield what the split of each budget hits, then the experts of each layer."""
    for (trace, phase, unit), part in frame.group_by("trace", "phase", "unit", maintain_order=True):
        title = f"{_text(trace)}, {_phase(phase)}"
        rows = part.filter(pl.col("layer").is_null()).rows(named=True)
        first = Column({"bytes": "GB"}.get(str(unit), str(unit)), [_capacity(row) for row in rows])
        columns = [first, *estimate("split, %", rows, "hit_rate", factor=100, rank=1)]
        columns += [Column("equal parts", rounded(rows, "uniform", factor=100))]
        columns += estimate("gain, points", rows, "gain", factor=100, rank=1)
        columns += [Column("at most", [fixed(scale(row["hit_rate_bound"], 100), 1) for row in rows], rank=1)]
        notes = ["split and equal parts are judged on requests that the split was not learned from"]
        notes += [_not_best(rows)] if _not_best(rows) else []
        yield Block(columns, f"{title}: hit rate of LRU caches that share a budget", notes)
        layers = part.filter(pl.col("layer").is_not_null())
        columns = [Column("layer", [str(layer) for layer in layers["layer"].unique(maintain_order=True)])]
        for capacity in dict.fromkeys(row["capacity"] for row in rows):
            mine = layers.filter(capacity=capacity).rows(named=True)
            columns.append(Column(_capacity(mine[0]), [count(int(row["experts"])) for row in mine]))
        yield Block(columns, f"experts of each layer, by budget ({'GB' if unit == 'bytes' else unit})")


def _not_best(rows: Sequence[Row]) -> str:
    gaps = [row["hit_rate_bound"] - row["hit_rate_learned"] for row in rows if row["hit_rate_bound"] is not None]
    most = max(gaps, default=0.0)
    return f"another split could hit up to {100 * most:.2g} points more" if most > 1e-9 else ""


def _capacity(row: Row) -> str:
    return f"{row['capacity'] / 1e9:.4g}" if row["unit"] == "bytes" else f"{row['capacity']:.4g}"


def _phase(value: Any) -> str:
    return "all tokens" if value == "all" else _text(value)


def _text(value: Any) -> str:
    return MISSING if value is None else printable(str(value))
