"""Tables of a calibration: its parameters, and its points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column
from tracekit.reports.text import MISSING, align, fixed, interval, number, scale

Row = dict[str, Any]

_READABLE = {"bytes/s": (1e-9, "GB/s"), "FLOP/s": (1e-12, "TFLOP/s"), "s": (1e3, "ms"), "fraction": (100, "%")}
"""Units for reading: the factor, and the unit's name."""

_NAMES = {"draft_cost": "cost of a draft", "routed_share": "routed share at B = 1"}


def calibration(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out the parameters, one a line."""
    rows = frame.rows(named=True)
    units = [_READABLE.get(row["unit"], (1.0, row["unit"])) for row in rows]
    values = [_value(row, factor) for row, (factor, _) in zip(rows, units, strict=True)]
    ranges = [
        interval(scale(row["lo"], factor), scale(row["hi"], factor))
        for row, (factor, _) in zip(rows, units, strict=True)
    ]
    columns = [
        Column("parameter", [_NAMES.get(row["parameter"], row["parameter"]) for row in rows], right=False),
        Column("estimate", align(values)),
        Column("95 %", ranges, right=False, gap=1, name="lo/hi"),
        Column("unit", [unit for _, unit in units], right=False),
    ]
    unknown = [f"({MISSING}: the points do not tell)"] if None in frame["estimate"].to_list() else []
    yield Block([column for column in columns if any(column.cells)], "fitted to the measurements", unknown)


def _value(row: Row, factor: float) -> str:
    if row["estimate"] is None:
        return MISSING
    known = row["lo"] is not None and row["hi"] is not None
    return number(row["estimate"] * factor, (row["hi"] - row["lo"]) / 2 * factor if known else None)


def points(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out the points, one a line: times in milliseconds."""
    rows = frame.rows(named=True)
    timed = {"step", "verification"}
    factors = [1e3 if row["quantity"] in timed else 1.0 for row in rows]
    columns = [
        Column("batch", [str(row["batch_size"]) for row in rows], name="batch_size"),
        Column("drafts", [str(row["drafts"]) for row in rows]),
        Column(
            "quantity", [row["quantity"] + (", ms" if row["quantity"] in timed else "") for row in rows], right=False
        ),
    ]
    columns += [
        Column(name, align([number(row[name] * factor) for row, factor in zip(rows, factors, strict=True)]))
        for name in ("measured", "predicted")
    ]
    columns.append(Column("residual, %", align([fixed(row["residual"] * 100, 1) for row in rows]), name="residual"))
    columns.append(Column("", ["beyond 2 sd" if row["flagged"] else "" for row in rows], right=False, name="flagged"))
    for name, title in (("acceptance_length", "AL"), ("context", "context"), ("repeats", "runs")):
        if any(row[name] not in (None, 1) for row in rows):
            columns.insert(3, Column(title, align([number(row[name]) for row in rows]), rank=1, name=name))
    if any(row["spread"] is not None for row in rows):
        columns.append(
            Column("spread, %", align([number(scale(row["spread"], 100)) for row in rows]), rank=2, name="spread")
        )
    yield Block(columns, "measured, and as fitted")
