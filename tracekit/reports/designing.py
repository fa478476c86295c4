"""Tables of a law of routing and of the designs that it is put to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column
from tracekit.reports.text import MISSING, align, fixed, number, printable

Row = dict[str, Any]

_NAMES = {
    "popularity_overlap": "overlap of tokens of different requests, Σp²/k",
    "request_overlap": "overlap of a request's tokens in random order",
    "entropy_norm": "entropy of the popularity, H/ln N",
}


def law(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out how well a law gives back its trace: at lags and windows that are powers of two, and the last."""
    rows = frame.rows(named=True)
    alone = [row for row in rows if row["quantity"] in _NAMES]
    yield Block(_held("figure", [_NAMES[row["quantity"]] for row in alone], alone), _title(rows))
    lags = _some([row for row in rows if row["quantity"] == "overlap"])
    if lags:
        yield Block(_held("lag", [str(row["at"]) for row in lags], lags), "overlap by lag")
    unions = _some([row for row in rows if row["quantity"] == "unique"])
    if unions:
        columns = _held("window", [str(row["at"]) for row in unions], unions)
        columns.insert(1, Column("batch", [str(row["batch_size"]) for row in unions]))
        yield Block(columns, "unique experts", ["(--format csv has every lag, window and batch size)"])


def _title(rows: Sequence[Row]) -> str:
    name = "the law" if rows[0]["trace"] is None else f"{printable(rows[0]['trace'])}, {rows[0]['phase']}"
    return f"{name}: as observed, and by the law fitted to it (mean over layers)"


def _held(title: str, names: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    return [
        Column(title, names, right=title != "figure", cut=title == "figure"),
        Column("observed", align([number(row["observed"]) for row in rows])),
        Column("law", align([number(row["law"]) for row in rows])),
        Column("error", [_percent(row["error"]) for row in rows]),
        Column("", ["" if row["target"] else "predicted" for row in rows], right=False, name="target"),
    ]


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{fixed(100 * value, 2)} %"


def _some(rows: Sequence[Row]) -> list[Row]:
    last = max((row["at"] for row in rows), default=0)
    kept = [row for row in rows if row["at"] == last or row["at"].bit_count() == 1]
    return [row for row in kept if row["batch_size"] is None or row["batch_size"] in (1, 4, 16, 64)]


def design(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out designs, one a line: what they are, and what verification costs them by batch size."""
    first = frame.row(0, named=True)
    parts = [part.rows(named=True) for _, part in frame.group_by("design", maintain_order=True)]
    heads = [part[0] for part in parts]
    names = Column("design", [printable(row["design"]) for row in heads], right=False)
    columns = [names, Column("expert", [f"× {number(row['expert_size'])}" for row in heads])]
    for title, name in (("total, 10⁹", "total_parameters"), ("active, 10⁹", "active_parameters")):
        if first[name] is not None:
            columns.append(Column(title, [fixed(row[name] / 1e9, 2) for row in heads]))
    if first["best_batch_size"] is not None:
        largest = max(row["batch_size"] for row in parts[0])
        best = [f"{row['best_batch_size']}{'+' * (row['best_batch_size'] == largest)}" for row in heads]
        columns.append(Column("best B", best))
    columns.append(Column("", ["extrapolated" if row["extrapolated"] else "" for row in heads], right=False))
    trace = "the law" if first["trace"] is None else printable(first["trace"])
    yield Block(columns, f"{trace}: designs with the {first['hold']} parameters held")
    window = f"a window of {first['window']} tokens"
    for name, title in (
        ("union_ratio", f"by batch size: experts that {window} loads, over those of one token"),
        ("verification_ratio", f"by batch size: time to verify {window}, over that of one token"),
        ("speedup", f"by batch size: speedup at an acceptance length of {number(first['acceptance_length'])}"),
    ):
        if first[name] is not None:
            cells = zip(*([fixed(row[name], 2) for row in part] for part in parts), strict=True)
            sizes = [str(row["batch_size"]) for row in parts[0]]
            by_size = [Column(size, column, gap=1, rank=1) for size, column in zip(sizes, cells, strict=True)]
            yield Block([names, *by_size], title)
    yield Block([], notes=["(no such model was trained: the law's parameters and acceptance are held)"])
