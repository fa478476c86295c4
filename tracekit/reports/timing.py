"""Tables of the time that a token takes where experts are offloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column, rounded
from tracekit.reports.text import MISSING, align, fixed, interval, number, printable, scale
from tracekit.reports.timing_charts import NAMES

Row = dict[str, Any]


def tpot(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out the time per token, one mode a line, and where it goes."""
    for (trace, phase), part in frame.group_by("trace", "phase", maintain_order=True):
        rows = part.rows(named=True)
        words = f"{printable(trace)}, {phase}: ms per token; {_machine(rows[0])}"
        if not any(row["predictor_cost_ms"] for row in rows):
            words += f", {number(rows[0]['compute_ms'])} ms of compute"
        yield Block(_times(rows), words)
        yield Block(_copies(rows), "what is copied", _notes(rows))


def _modes(rows: Sequence[Row]) -> Column:
    return Column("mode", [NAMES[row["mode"]] + ("*" if row["lossy"] else "") for row in rows], right=False)


def _times(rows: Sequence[Row]) -> list[Column]:
    columns = [_modes(rows), Column("TPOT", rounded(rows, "tpot_ms"))]
    ends = [interval(row["tpot_ms_lo"], row["tpot_ms_hi"]) if row["mode"] != "on_demand" else "" for row in rows]
    if any(ends):
        columns.append(Column("95 %", ends, right=False, gap=1, rank=2, name="tpot_ms_lo/hi"))
    columns.append(Column("p95", align([number(row["tpot_ms_p95"]) for row in rows]), rank=1, name="tpot_ms_p95"))
    if any(row["predictor_cost_ms"] for row in rows):
        columns.append(Column("compute", align([number(row["compute_ms"]) for row in rows])))
    return [
        *columns,
        Column("copies", align([number(row["copy_ms"]) for row in rows])),
        Column("overlap", align([number(row["overlapped_ms"]) for row in rows])),
        Column("saved, %", [fixed(scale(row["saving"], 100), 1) for row in rows]),
        Column("tokens/s", align([number(1e3 / row["tpot_ms"]) for row in rows]), rank=3, name="1000 / tpot_ms"),
    ]


def _copies(rows: Sequence[Row]) -> list[Column]:
    columns = [
        _modes(rows),
        Column("MB", [fixed(row["bytes"] / 1e6, 1) if row["bytes"] is not None else MISSING for row in rows]),
        Column("in vain", [fixed(scale(row["wasted_bytes"], 1e-6), 1) for row in rows]),
        Column("hits, %", [fixed(scale(row["hit_rate"], 100), 1) for row in rows]),
    ]
    if any(row["predictor"] for row in rows):
        columns += [
            Column("at most, %", [_at_most(row["saving_most"]) for row in rows]),
            Column("break-even, ms", align([_at_most(row["break_even_ms"], 1) for row in rows])),
        ]
    return columns


def _at_most(value: float | None, factor: float = 100) -> str:
    return "" if value is None else number(factor * value) if factor == 1 else fixed(factor * value, 1)


def _machine(row: Row) -> str:
    words = [f"link {row['link'] / 1e9:.4g} GB/s", f"{row['expert_bytes'] / 1e6:.4g} MB an expert"]
    if row["hardware"]:
        words.insert(0, f"{printable(row['model'])} on {printable(row['hardware'])}")
    return ", ".join(words)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    caches = [row for row in rows if row["capacity"] is not None]
    if caches:
        notes.append(f"cache: {caches[0]['policy']}, {caches[0]['capacity']} experts per layer")
    predicted = [row for row in rows if row["predictor"]]
    if predicted:
        row = predicted[0]
        cost = f", {number(row['predictor_cost_ms'])} ms per token" if row["predictor_cost_ms"] else ""
        notes.append(f"predictor: {printable(row['predictor'])}, {row['m']} experts, {row['distance']} ahead{cost}")
        notes.append("at most: what prefetching could save of the time on demand, Σ min(compute, copies)")
        notes.append(
            "break-even: what the predictor may cost per token before its mode is slower than the same without it"
        )
    if any(row["lossy"] for row in rows):
        notes.append(
            "* executes what was predicted, which changes the output: teacher-forced, an upper bound of its hits"
        )
    return notes
