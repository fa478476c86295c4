"""The tables of the command line: what fits a terminal, rounded as far as it is known.

``table`` is for reading. Every other format (:mod:`tracekit.reports.export`) has every column and exact values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.analysis.wants import WINDOW
from tracekit.reports import modelling
from tracekit.reports.export import EXPORT_FORMATS, export, plain
from tracekit.reports.grid import Block, Column, draw, wrap
from tracekit.reports.queries import Query
from tracekit.reports.text import MISSING, NOISE, align, count, fixed, interval, number, printable, scale
from tracekit.schema import BASELINES, CAUSES

FORMATS = ("table", *EXPORT_FORMATS)
"""What ``render`` takes; ``table`` is for reading, the others carry every column and exact values."""

WIDTH = 80
COUNTED = ("experts", "layers", "requests", "tokens")
"""Units of the summary whose whole numbers are counts."""

MAX_ROWS = 50
"""Rows of a frame without a layout of its own that a table shows."""

Row = dict[str, Any]


def render(
    frame: pl.DataFrame, fmt: str = "table", *, layout: str | None = None, width: int = WIDTH, bold: bool = False
) -> str | bytes:
    """Return ``frame`` as a table (text) or in an export format (bytes, text in UTF-8).

    Parameters
    ----------
    frame
        Any frame.
    fmt
        One of ``FORMATS``.
    layout
        Name of the table layout, one of ``LAYOUTS``; None for a frame that has no layout of its own.
    width
        Terminal cells that a table may take in width.
    bold
        Whether to set headings in bold.

    Raises
    ------
    UsageError
        If the format is unknown.
    """
    if fmt != "table":
        return export(frame, fmt)
    if frame.is_empty() and layout:
        return "nothing was found\n" if layout == "check" else "(no rows)\n"
    by = _group_column(frame)
    if layout in GROUPED and by:
        return draw(list(GROUPED[layout](frame, by)), width, bold=bold)
    make = LAYOUTS[layout] if layout else _generic
    return draw(list(make(frame)), width, bold=bold)


def listing(queries: Iterable[Query], width: int = WIDTH) -> str:
    """Return the names and titles of queries, as text."""
    lines = []
    for query in queries:
        lines += [query.name, *(f"    {line}" for line in wrap(query.title, width - 4))]
    return "\n".join(lines) + "\n"


def description(query: Query, width: int = WIDTH) -> str:
    """Return what a query of the library yields and the parameters it takes, as text."""
    lines = wrap(f"{query.name}: {query.title}", width)
    for paragraph in query.text.split("\n\n"):
        lines += ["", *wrap(" ".join(paragraph.split()), width)]
    for heading, fields in (("Parameters", query.parameters), ("Columns", query.columns)):
        lines += ["", heading] if fields else []
        for entry in fields:
            default = getattr(entry, "default", None)
            head = f"  {entry.name} {entry.type.lower()}" + (f" = {default}" if default is not None else "")
            lines.append(head + (f" [{entry.unit}]" if entry.unit else ""))
            lines += [f"      {line}" for line in wrap(entry.text, width - 6)]
    return "\n".join(lines) + "\n"


def _windows(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase", "batch_size"]):
        first = Column("window", [str(row["window"]) for row in rows])
        columns = [first, *_estimate("observed", rows, "observed"), _values("× k", rows, "per_top_k")]
        columns += [_values(name, rows, f"expected_{name}") for name in BASELINES if _any(rows, f"expected_{name}")]
        yield Block(columns, f"{title}: unique experts, and how many to expect")
        columns = [first]
        # Where there is no room the label's interval goes first, then popularity's.
        for name, rank in zip(BASELINES, (1, 2, 3, 1), strict=True):
            if _any(rows, f"reduction_{name}"):
                columns += _estimate(name, rows, f"reduction_{name}", factor=100, interval_rank=rank)
        yield Block(columns, "fewer than expected, %")


def _windows_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    one = frame.filter(pl.col("window") <= WINDOW).filter(pl.col("window") == pl.col("window").max().over("trace"))
    for title, rows in _parts(one, ["trace", "phase", "batch_size", "window"]):
        columns = [_group(by, rows), *_estimate("observed", rows, "observed")]
        columns += [_percent(name, rows, f"reduction_{name}") for name in BASELINES if _any(rows, f"reduction_{name}")]
        yield Block(columns, f"{title}: unique experts, and how far below each baseline")
    others = "the other windows and " if one.height < frame.height else ""
    yield Block([], notes=[f"(--format csv has {others}every column)"])


def _autocorr(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase"]):
        columns = [Column("lag", [str(row["lag"]) for row in rows]), *_estimate("overlap", rows, "overlap")]
        columns += [
            _values(heading, rows, name)
            for heading, name in (
                ("request", "expected_request"),
                ("ρ", "rho"),
                ("ρ request", "rho_request"),
                ("Jaccard", "jaccard"),
                ("any", "any_shared"),
                ("rank 0", "rank0_repeat"),
            )
            if _any(rows, name)
        ]
        yield Block(columns, f"{title}: overlap{_constant(rows)}")


def _autocorr_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    largest = frame["lag"].max()
    lags = [lag for lag in frame["lag"].unique().sort() if lag == largest or lag.bit_count() == 1]
    for title, rows in _parts(frame, ["trace", "phase"]):
        at = {lag: [row for row in rows if row["lag"] == lag] for lag in lags}
        columns = [_group(by, at[1])]
        if not _constant(rows, "popularity"):
            columns.append(_values("popularity", at[1], "expected_popularity"))
        columns.append(_values("request", at[1], "expected_request"))
        columns += [
            Column(f"lag {lag}", [fixed(row["overlap"], 3) for row in part]) for lag, part in at.items() if part
        ]
        yield Block(columns, f"{title}: overlap by lag{_constant(rows)}")
    yield Block([], notes=["(request: expected at lag 1; --format csv has every lag and column)"])


def _constant(rows: Sequence[Row], *names: str) -> str:
    """Return the expectations that hold for every row, to stand above the table."""
    above = []
    for name in names or ("uniform", "popularity"):
        values = {row[f"expected_{name}"] for row in rows}
        above += [f"{name} {number(value)}" for value in values if len(values) == 1]
    return f" (expected: {', '.join(above)})" if above else ""


NEGATIVE = {
    "request": "a request's tokens are no more alike than the trace's, or the requests are too few to tell",
    "token_order": "neighbours share fewer experts than tokens in random order",
}
"""What it says of a cause that its share is below zero."""


def _attribution(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase", "window"]):
        words = [["unresolved"] * (not row["resolved"]) + ["negative"] * _negative(row) for row in rows]
        columns = [
            Column("cause", [_cause(row["cause"]) for row in rows], right=False),
            Column("from", align([number(row["unique_before"]) for row in rows])),
            Column("→ to", align([number(row["unique_after"]) for row in rows])),
            Column("drop", align([number(row["drop"]) for row in rows])),
            # An unresolved label has no share of its own; its drop went to the request.
            *_estimate("share, %", rows, "share", factor=100),
            Column("", [", ".join(word) for word in words], right=False),
        ]
        yield Block(columns, f"{title}: unique experts, cause by cause", _warnings(rows))


def _attribution_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase", "window"]):
        causes = {cause: [row for row in rows if row["cause"] == cause] for cause in CAUSES}
        first, last = causes[CAUSES[0]], causes[CAUSES[-1]]
        columns = [_group(by, first), _values("uniform", first, "unique_before")]
        columns.append(_values("observed", last, "unique_after"))
        for cause, part in causes.items():
            cells = zip(_percent("", part, "share").cells, part, strict=True)
            marked = [cell + (" " if row["resolved"] else "*") for cell, row in cells]
            columns.append(Column(_cause(cause), marked))
        unresolved = [] if all(row["resolved"] for row in rows) else ["* not resolved"]
        notes = unresolved + _warnings(rows)
        yield Block(columns, f"{title}: unique experts, and the causes' shares of the drop", notes)
    yield Block([], notes=["(--format csv has every step and interval)"])


def _cause(name: str) -> str:
    return name.replace("_", " ")


def _negative(row: Row) -> bool:
    return row["share"] is not None and row["share"] < -NOISE


def _warnings(rows: Sequence[Row]) -> list[str]:
    found = {row["cause"] for row in rows if _negative(row)}
    return [f"{_cause(cause)}, negative: {said}" for cause, said in NEGATIVE.items() if cause in found]


def _load(frame: pl.DataFrame) -> Iterator[Block]:
    by = "label" if "label" in frame.columns else None
    for title, rows in _parts(frame, ["trace", "phase", *([by] if by else [])]):
        columns = [Column("layer", [str(row["layer"]) for row in rows]), _counts("tokens", rows, "tokens")]
        columns += [
            _values(heading, rows, name)
            for heading, name in (
                ("max/mean", "max_over_mean"),
                ("CV", "cv"),
                ("Gini", "gini"),
                ("H/ln N", "entropy_norm"),
                ("effective", "effective_experts"),
            )
        ]
        columns += [
            Column("dead", [number(row["dead_experts"]) for row in rows]),
            _values("top", rows, "top_share"),
            _values("Σp²/k", rows, "sum_p2_over_k"),
            _values("entropy", rows, "entropy", rank=1),
        ]
        yield Block(columns, title)


def _summary(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase"]):
        names: list[str] = []
        values: list[str] = []
        intervals: list[str] = []
        notes: list[str] = []
        for section in dict.fromkeys(row["section"] for row in rows):
            inside = [row for row in rows if row["section"] == section]
            factors = [100 if row["unit"] == "fraction" else 1 for row in inside]
            figures = [_figure(row, factor) for row, factor in zip(inside, factors, strict=True)]
            names += ["", _text(section), *("  " + _measure(row) for row in inside)]
            values += ["", "", *align(figures)]
            intervals += ["", ""]
            intervals += [
                interval(scale(row["lo"], factor), scale(row["hi"], factor))
                for row, factor in zip(inside, factors, strict=True)
            ]
            notes += ["", "", *(_text(row["note"] or "") for row in inside)]
        columns = [Column("figure", names[1:], right=False), Column("value", values[1:])]
        if any(intervals):
            columns.append(Column("95 %", intervals[1:], right=False, gap=1, name="lo/hi"))
        columns.append(Column("", notes[1:], right=False, cut=True, fold=True, name="note"))
        yield Block(columns, title)


def _measure(row: Row) -> str:
    return _text(row["measure"]) + (f", {_text(row['baseline'])}" if row["baseline"] else "")


def _figure(row: Row, factor: float) -> str:
    value = row["value"]
    if value is None:
        return MISSING
    if row["unit"] in COUNTED and float(value).is_integer():
        return count(int(value))
    text = number(value * factor, _half({"v_lo": row["lo"], "v_hi": row["hi"]}, "v", factor))
    return text + " %" if factor == 100 else text


def _info(frame: pl.DataFrame) -> Iterator[Block]:
    for row in frame.iter_rows(named=True):
        names = [name for name in row if name != "trace"]
        values = ["unknown" if row[name] is None else _counted(row[name]) for name in names]
        yield Block(
            [Column("", names, right=False), Column("", values, right=False, cut=True, fold=True)],
            f"trace {_text(row['trace'])}",
        )


def _formats(frame: pl.DataFrame) -> Iterator[Block]:
    for row in frame.iter_rows(named=True):
        lines = [_text(row["title"]), _text(row["example"])]
        yield Block(
            [Column("", ["", ""], right=False), Column("", lines, right=False, cut=True, fold=True)], row["format"]
        )


def _check(frame: pl.DataFrame) -> Iterator[Block]:
    several = frame["trace"].n_unique() > 1
    for row in frame.iter_rows(named=True):
        names = ("where", "evidence", "effect", "remedy")
        columns = [
            Column("", [f"  {name}" for name in names], right=False),
            Column("", [_text(row[name]) for name in names], right=False, cut=True, fold=True),
        ]
        of_trace = f", trace {_text(row['trace'])}" if several else ""
        yield Block(columns, f"{row['severity']}: {_text(row['finding'])}{of_trace}")


def _generic(frame: pl.DataFrame) -> Iterator[Block]:
    shown = frame.head(MAX_ROWS)
    rows = shown.rows(named=True)
    columns = []
    for name, dtype in frame.schema.items():
        if dtype.is_float():
            cells = [number(row[name], _half(row, name)) for row in rows]
            columns.append(Column(_text(name), align(cells)))
        else:
            columns.append(Column(_text(name), [_text(row[name]) for row in rows], right=dtype.is_numeric(), cut=True))
    notes = []
    if frame.height == 0:
        notes = ["(no rows)"]
    elif frame.height > MAX_ROWS:
        notes = [f"(the first {MAX_ROWS} rows; --format csv has all)"]
    yield Block(columns, notes=notes)


GROUPED: dict[str, Callable[[pl.DataFrame, str], Iterable[Block]]] = {
    "windows": _windows_by,
    "autocorr": _autocorr_by,
    "attribution": _attribution_by,
}
"""The layouts of frames that have a row for each layer, label or request: one table a trace, one line a group."""

LAYOUTS: dict[str, Callable[[pl.DataFrame], Iterable[Block]]] = {
    "windows": _windows,
    "autocorr": _autocorr,
    "attribution": _attribution,
    "load": _load,
    "summary": _summary,
    "formats": _formats,
    "info": _info,
    "check": _check,
    "models": modelling.models,
    "model": modelling.model,
}
"""The layouts by name: each takes a frame with the columns of the function it is named after."""


def _parts(frame: pl.DataFrame, keys: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each combination of ``keys``, in order of appearance, under a title that names it."""
    for values, part in frame.group_by(keys, maintain_order=True):
        yield ", ".join(_name(key, value) for key, value in zip(keys, values, strict=True)), part.rows(named=True)


def _name(key: str, value: Any) -> str:
    match key:
        case "trace":
            return _text(value)
        case "phase":
            return "all tokens" if value == "all" else _text(value)
        case "window":
            return f"window of {value} token" + ("s" if value != 1 else "")
    return f"{key.replace('_id', '').replace('_', ' ')} {_text(value)}"


def _group_column(frame: pl.DataFrame) -> str | None:
    return next((name for name in ("layer", "label", "request_id") if name in frame.columns), None)


def _group(by: str, rows: Sequence[Row]) -> Column:
    return Column(by, [_text(row[by]) for row in rows], right=by == "layer", cut=True)


def _any(rows: Sequence[Row], name: str) -> bool:
    return any(row[name] is not None for row in rows)


def _percent(title: str, rows: Sequence[Row], name: str) -> Column:
    cells = [fixed(scale(row[name], 100), 1) for row in rows]
    return Column(title, [cell if cell == MISSING else f"{cell} %" for cell in cells], name=name)


def _estimate(title: str, rows: Sequence[Row], name: str, *, factor: float = 1, interval_rank: int = 0) -> list[Column]:
    """Return a column of estimates, rounded by their intervals, and the column of the intervals."""
    cells = [number(scale(row[name], factor), _half(row, name, factor)) for row in rows]
    return [
        Column(title, align(cells), name=name),
        *_interval(rows, name, factor=factor, rank=interval_rank),
    ]


def _interval(rows: Sequence[Row], name: str, *, factor: float = 1, rank: int = 0) -> list[Column]:
    cells = [interval(scale(row[f"{name}_lo"], factor), scale(row[f"{name}_hi"], factor)) for row in rows]
    return [Column("95 %", cells, right=False, rank=rank, gap=1, name=f"{name}_lo/hi")] if any(cells) else []


def _half(row: Row, name: str, factor: float = 1) -> float | None:
    """Return the half-width of the interval that stands beside a column, None without one."""
    low, high = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    return None if low is None or high is None else (high - low) / 2 * factor


def _values(title: str, rows: Sequence[Row], name: str, *, rank: int = 0) -> Column:
    return Column(title, align([number(row[name]) for row in rows]), rank=rank, name=name)


def _counts(title: str, rows: Sequence[Row], name: str) -> Column:
    return Column(title, [count(row[name]) for row in rows])


def _counted(value: Any) -> str:
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _text(value: Any) -> str:
    value = plain(value)
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(str(value))
