"""Tables of models and of the sizes of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column
from tracekit.reports.text import MISSING, align, count, fixed, number, printable

Row = dict[str, Any]


def models(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out the models that are known, one a line."""
    rows = frame.rows(named=True)
    layers = [f"{row['moe_layers']}/{row['layers']}" for row in rows]
    columns = [
        Column("model", [_text(row["model"]) for row in rows], right=False, cut=True),
        Column("N", [count(row["num_experts"]) for row in rows]),
        Column("k", [count(row["top_k"]) for row in rows], gap=1),
        Column("MoE", layers, gap=1, name="moe_layers"),
        Column("shared", [count(row["shared_experts"]) for row in rows], rank=1, gap=1),
        Column("total", [_scaled(row["total_parameters"], 1e9, 1) for row in rows], rank=2),
        Column("active", [_scaled(row["active_parameters"], 1e9, 1) for row in rows], rank=2),
        Column("as", [_text(row["quantisation"]) for row in rows], right=False),
        Column("expert", [_scaled(row["expert_bytes"], 1e6, 2) for row in rows]),
        Column("all", [_scaled(row["total_bytes"], 1e9, 1) for row in rows], rank=1),
    ]
    title = "MoE layers of all; parameters in 10⁹; an expert in MB, all in GB"
    schemes = {row["quantisation"] for row in rows}
    if len(schemes) == 1:
        columns = [column for column in columns if column.title != "as"]
        title += f", {_text(schemes.pop())}"
    yield Block(columns, title)


def model(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out what one model is made of, one kind of weights a line."""
    rows = frame.rows(named=True)
    parts = [row for row in rows if row["part"] not in ("total", "active")]
    whole = [row for row in rows if row["part"] in ("total", "active")]
    shown = [*parts, *whole]
    estimates = list(dict.fromkeys(row["estimate"] for row in parts if row["estimate"]))
    marks = [f"[{estimates.index(row['estimate']) + 1}]" if row["estimate"] else "" for row in shown]
    small = max((row["total_parameters"] or 0 for row in shown), default=0) < 1e9
    unit, letter = (1e6, "M") if small else (1e9, "G")
    blank = [""] * len(whole)
    columns = [
        Column("part", [_NAMES.get(row["part"], row["part"]) for row in shown], right=False),
        Column("copies", [count(row["copies"]) for row in parts] + blank),
        Column("parameters of one", [count(row["parameters"]) for row in parts] + blank),
        Column("MB of one", align([_scaled(row["bytes"], 1e6) for row in parts] + blank)),
        Column(
            f"all, {letter}", align([_scaled(row["total_parameters"], unit, 3) for row in shown]), name="parameters"
        ),
        Column(f"all, {letter}B", align([_scaled(row["total_bytes"], unit, 3) for row in shown]), name="bytes"),
    ]
    if estimates:
        columns.append(Column("", marks, right=False, gap=1, name="estimate"))
    notes = [f"[{i}] an estimate: {_text(why)}" for i, why in enumerate(estimates, start=1)]
    yield Block(columns, _title(rows[0]), notes)


_NAMES = {
    "shared": "shared experts",
    "attention": "attention, all layers",
    "dense": "dense layer",
    "norms": "norms, all layers",
    "embeddings": "embeddings, head",
}


def _title(row: Row) -> str:
    shared = f" and {row['shared_experts']} shared" if row["shared_experts"] else ""
    return (
        f"{_text(row['model'])}: {row['top_k']} of {row['num_experts']} experts{shared} "
        f"in {row['moe_layers']} of {row['layers']} layers, weights as {_text(row['quantisation'])}"
    )


def _scaled(value: int | None, unit: float, places: int | None = None) -> str:
    if value is None:
        return MISSING
    return number(value / unit) if places is None else fixed(value / unit, places)


def _text(value: str | None) -> str:
    return MISSING if value is None else printable(value)
