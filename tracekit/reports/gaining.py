"""Tables of what speculative decoding gains, and of what a step is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.reports.grid import Block, Column
from tracekit.reports.text import align, fixed, interval, number, printable

Row = dict[str, Any]

_UNIONS = {
    "accepted-only": "windows of accepted tokens",
    "steps": "the trace's own steps, rejected drafts included",
}


def speedup(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out cost and gain, one batch size and draft length a line, and what that says about the draft length."""
    yield Block([], notes=[_legend(frame["speedup"].is_not_null().any())])
    kind = pl.when(pl.col("unions") == "extended").then(pl.lit("steps")).otherwise("unions").alias("kind")
    for (trace, phase, _), part in frame.group_by("trace", "phase", kind, maintain_order=True):
        rows = part.rows(named=True)
        known = any(row["speedup"] is not None for row in rows)
        yield Block([*_cost(rows), *(_gain(rows) if known else [])], _title(trace, phase, rows), _notes(rows))
        decided = [row for row in rows if row["regret"] is not None]
        if decided and len({row["drafts"] for row in rows}) > 1:
            yield _choice(decided)


def _title(trace: Any, phase: Any, rows: Sequence[Row]) -> str:
    row = rows[0]
    kind = "steps" if row["unions"] == "extended" else row["unions"]
    machine = f"{printable(row['model'])} on {printable(row['hardware'])}"
    return f"{printable(trace)}, {'all tokens' if phase == 'all' else phase}: {machine}, by {_UNIONS[kind]}"


def _cost(rows: Sequence[Row]) -> list[Column]:
    extended = ["~" if row["unions"] == "extended" else "" for row in rows]
    ratios = [mark + fixed(row["expert_ratio"], 3) for mark, row in zip(extended, rows, strict=True)]
    columns = [
        Column("B", [str(row["batch_size"]) for row in rows]),
        Column("K", [str(row["drafts"]) for row in rows]),
        Column("experts ×", ratios, name="expert_ratio"),
        Column("f, %", [fixed(100 * row["routed_share"], 1) for row in rows], rank=4, name="routed_share"),
        Column("V", [fixed(row["verification_ratio"], 3) for row in rows], name="verification_ratio"),
        Column("uniform", [fixed(row["verification_ratio_uniform"], 3) for row in rows], rank=1, name="V uniform"),
        Column("a from", [_rate(row) for row in rows], name="break_even_rate"),
    ]
    if len({row["regime"] for row in rows}) > 1:
        columns.insert(-1, Column("bound by", [row["regime"] for row in rows], right=False, rank=2, name="regime"))
    return columns


def _rate(row: Row) -> str:
    return "never" if row["break_even_rate"] is None else fixed(row["break_even_rate"], 3)


def _gain(rows: Sequence[Row]) -> list[Column]:
    columns = [
        Column("AL", [fixed(row["acceptance_length"], 2) for row in rows], rank=1, name="acceptance_length"),
        Column("S", align([_speedup(row) + ("*" if row["best"] else " ") for row in rows]), name="speedup"),
        Column("uniform", [fixed(row["speedup_uniform"], 3) for row in rows], name="S uniform"),
    ]
    intervals = [interval(row["speedup_lo"], row["speedup_hi"]) for row in rows]
    if any(intervals):
        columns.insert(2, Column("95 %", intervals, right=False, gap=1, rank=3, name="speedup_lo/hi"))
    return columns


def _speedup(row: Row) -> str:
    """Return S rounded by its interval: a model of time is not known to more than three decimals."""
    low, high = row["speedup_lo"], row["speedup_hi"]
    return number(row["speedup"], max(0.01, 0.0 if low is None or high is None else (high - low) / 2))


def _notes(rows: Sequence[Row]) -> list[str]:
    regimes = {row["regime"] for row in rows}
    notes = [f"every verification is bound by {regimes.pop()}"] if len(regimes) == 1 else []
    if any(row["unions"] == "extended" for row in rows):
        notes.append("~ of windows of committed tokens that load at B = 1 what a step does")
    return notes


def _legend(known: bool) -> str:
    words = "(experts ×: U(T, B) / U(1, B); f: their share of a step; V: verification in steps; a from: break-even rate"
    if known:
        words += "; S: speedup, * best at its B"
    return words + "; uniform: by the uniform formula)"


def _choice(rows: Sequence[Row]) -> Block:
    """Return the draft length that is best at each batch size beside the one that the uniform formula chooses."""
    cells = []
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        here = [row for row in rows if row["batch_size"] == size]
        best, uniform = (next((row for row in here if row[name]), None) for name in ("best", "best_uniform"))
        cells.append(
            (
                str(size),
                "none" if best is None else f"K = {best['drafts']}",
                "1" if best is None else fixed(best["speedup"], 3),
                "none" if uniform is None else f"K = {uniform['drafts']}",
                "1" if uniform is None else fixed(uniform["speedup_uniform"], 3),
                "1" if uniform is None else fixed(uniform["speedup"], 3),
                f"{fixed(100 * here[0]['regret'], 1)} %",
            )
        )
    titles = ("B", "best", "S", "by uniform", "promised", "S of it", "lost")
    columns = [
        Column(title, column, right=title not in ("best", "by uniform"))
        for title, column in zip(titles, zip(*cells, strict=True), strict=True)
    ]
    return Block(columns, "which draft length, with the trace and without")


def parts(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out what each part of a step costs, one part a line, a table for each batch size."""
    for (trace, phase, size), part in frame.group_by("trace", "phase", "batch_size", maintain_order=True):
        tokens = part["tokens"].unique().sort().to_list()
        shown = tokens if len(tokens) <= 3 else [tokens[0], tokens[len(tokens) // 2], tokens[-1]]
        steps = {n: part.filter(pl.col("tokens") == n).rows(named=True) for n in shown}
        first = steps[shown[0]]
        columns = [Column("part", [*(row["part"] for row in first), "step"], right=False)]
        for n, rows in steps.items():
            seconds = [row["seconds"] for row in rows]
            words = "a token" if n == 1 else f"{n} tokens"
            columns += [
                Column(f"{words}, ms", align([number(1e3 * s) for s in [*seconds, sum(seconds)]])),
                Column("%", [*(fixed(100 * row["share"], 1) for row in rows), ""]),
                Column("bound", [*(_bound(row) for row in rows), ""], right=False, rank=1, gap=1),
            ]
        row = first[0]
        machine = f"{printable(row['model'])} on {printable(row['hardware'])}"
        title = f"{printable(trace)}, {phase}: a step of {size} request{'s' * (size > 1)}, {machine}"
        yield Block(columns, title)


def _bound(row: Row) -> str:
    return row["bound"] if row["seconds"] else ""


def amdahl(frame: pl.DataFrame) -> Iterator[Block]:
    """Lay out a step at B = 1 taken apart, a table for each draft length."""
    for row in frame.rows(named=True):
        measured = row["measured_ratio"] is not None
        lines: list[tuple[str, float | None, float | None, float | None]] = [
            (
                "routed share f, %",
                100 * row["routed_share"],
                100 * row["routed_share_fixed"],
                _scaled(row["implied_share"], 100),
            ),
            ("fixed share, %", 0.0, 100 * row["overhead_share"], _scaled(row["implied_overhead_share"], 100)),
            (
                "fixed, ms",
                0.0,
                1e3 * row["seconds"] * row["overhead_share"] / (1 - row["overhead_share"]),
                _scaled(row["implied_overhead"], 1e3),
            ),
            (
                "verification ratio V",
                row["verification_ratio"],
                row["verification_ratio_fixed"],
                row["measured_ratio"],
            ),
        ]
        names, bare, fixed_costs, implied = zip(*lines, strict=True)
        columns = [
            Column("", list(names), right=False),
            Column("bytes and FLOPs", align([number(value) for value in bare])),
            Column("with fixed costs", align([number(value) for value in fixed_costs])),
        ]
        if measured:
            columns.append(Column("as measured", align([number(value) for value in implied])))
        machine = f"{printable(row['model'])} on {printable(row['hardware'])}"
        title = f"{printable(row['trace'])}, {row['phase']}: {machine}, B = 1, {row['drafts']} drafts"
        loads = f"they load {number(row['unique'])} experts, {number(row['expert_ratio'])} × k"
        more = measured and (row["implied_overhead"] is None or row["implied_overhead"] < 0)
        notes = ["measured: more than the experts' reading grew, or less than nothing did"] if more else []
        yield Block(columns, f"{title}; {loads}", notes)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
