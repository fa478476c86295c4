"""The tables of prefetch predictors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column, rounded
from tracekit.reports.text import MISSING, align, interval, number, printable, scale

Row = dict[str, Any]

_GROUPS = ("layer", "label", "request_id")
_ONE = ("trace", "phase")
_SHORT = {"previous_token": "previous", "token_id+transition": "both"}
"""Names where a column each has to fit; both: token id and transition together."""


def prefetch(frame: pl.DataFrame) -> Iterator[Block]:
    """Yield recall by predictor and number of prefetched experts, then the other figures at the smallest number."""
    group = next((name for name in _GROUPS if name in frame.columns), None)
    for (trace, phase), part in frame.group_by(*_ONE, maintain_order=True):
        title = f"{_text(trace)}, {'all tokens' if phase == 'all' else _text(phase)}"
        rows = part.rows(named=True)
        if group:
            yield _by(title, rows, group)
        else:
            yield from _alone(title, rows)
    if group:
        both = ["(both: token id and transition together)"] * ("token_id+transition" in frame["predictor"])
        yield Block([], notes=[*both, "(--format csv has every number of experts, the intervals and every column)"])


def _alone(title: str, rows: Sequence[Row]) -> Iterator[Block]:
    first = min(row["m"] for row in rows)
    at: dict[tuple[str, int | None], dict[int, Row]] = {}
    for row in rows:
        at.setdefault((row["predictor"], row["distance"]), {})[row["m"]] = row
    of_first = [found[first] for found in at.values() if first in found]
    names = [Column("predictor", [_text(name) for name, _ in at], right=False, cut=True)]
    names.append(Column("ahead", ["" if distance is None else str(distance) for _, distance in at]))
    columns = list(names)
    for m in sorted({row["m"] for row in rows}):
        cells = [found.get(m) for found in at.values()]
        columns.append(Column(f"m = {m}", _shares(cells, "recall"), name=f"recall@{m}"))
        if m == first:
            spans = [interval(_of(row, "recall_lo"), _of(row, "recall_hi")) if row else "" for row in cells]
            columns += [Column("95 %", spans, right=False, gap=1, name="recall_lo/hi")] if any(spans) else []
    yield Block(columns, f"{title}: recall, % of the routed experts that were among m predicted")
    if len(of_first) < len(at):
        return
    notes = [
        "(means over the layers that are predicted; those that look ahead leave out the first: compare --by layer)"
    ]
    columns = list(names)
    for heading, name in (
        ("precision", "precision"),
        ("all k", "exact"),
        ("rank", "rank_match"),
        ("weight", "weight_covered"),
    ):
        if any(row[name] is not None for row in of_first):
            columns.append(Column(heading, _shares(of_first, name), name=name))
    for heading, name in (("MB/token", "bytes_fetched"), ("wasted", "bytes_wasted")):
        if any(row[name] is not None for row in of_first):
            columns.append(Column(heading, align([number(scale(row[name], 1e-6)) for row in of_first]), name=name))
    yield Block(columns, f"with m = {first}, %", notes if any(distance for _, distance in at) else [])


def _by(title: str, rows: Sequence[Row], group: str) -> Block:
    first = min(row["m"] for row in rows)
    keys = list(dict.fromkeys(row[group] for row in rows))
    columns = [Column(group.removesuffix("_id"), [_text(key) for key in keys], right=group == "layer", cut=True)]
    for name, distance in dict.fromkeys((row["predictor"], row["distance"]) for row in rows):
        at = {
            row[group]: row for row in rows if (row["predictor"], row["distance"], row["m"]) == (name, distance, first)
        }
        if at:
            heading = _text(_SHORT.get(name, name)).replace("_", " ") + (
                "" if distance in (None, 1) else f" {distance}"
            )
            columns.append(Column(heading, _shares([at.get(key) for key in keys], "recall"), name=name))
    return Block(columns, f"{title}: recall with m = {first}, %")


def _of(row: Row, name: str) -> float | None:
    return scale(row[name], 100)


def _shares(rows: Sequence[Row | None], name: str) -> list[str]:
    return align([MISSING if row is None else rounded([row], name, factor=100)[0] for row in rows])


def _text(value: Any) -> str:
    return MISSING if value is None else printable(str(value))
