"""The tables of the command line: what fits a terminal, rounded as far as it is known.

``table`` is for reading. Every other format (:mod:`tracekit.reports.export`) has every column and exact values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from tracekit.analysis.wants import WINDOW
from tracekit.reports import caching, calibrating, designing, gaining, localising, modelling, prefetching, timing
from tracekit.reports.export import EXPORT_FORMATS, export, plain
from tracekit.reports.grid import Block, Column, draw, estimate, rounded, wrap
from tracekit.reports.queries import Query
from tracekit.reports.text import MISSING, NOISE, align, count, interval, number, printable, scale
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
    return draw(blocks(frame, layout), width, bold=bold)


def blocks(frame: pl.DataFrame, layout: str | None = None) -> list[Block]:
    """Return ``frame`` laid out, as :func:`render` takes it, before it is fitted to a width."""
    by = _group_column(frame)
    if layout in GROUPED and by:
        return list(GROUPED[layout](frame, by))
    make = LAYOUTS[layout] if layout else _generic
    return list(make(frame))


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
        columns = [first, *estimate("observed", rows, "observed"), _values("× k", rows, "per_top_k")]
        columns += [_values(name, rows, f"expected_{name}") for name in BASELINES if _any(rows, f"expected_{name}")]
        yield Block(columns, f"{title}: unique experts, and how many to expect")
        columns = [first]
        # Where there is no room the label's interval goes first, then popularity's.
        for name, rank in zip(BASELINES, (1, 2, 3, 1), strict=True):
            if _any(rows, f"reduction_{name}"):
                columns += estimate(name, rows, f"reduction_{name}", factor=100, rank=rank)
        yield Block(columns, "fewer than expected, %")


def _windows_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    one = frame.filter(pl.col("window") <= WINDOW).filter(pl.col("window") == pl.col("window").max().over("trace"))
    for title, rows in _parts(one, ["trace", "phase", "batch_size", "window"]):
        columns = [_group(by, rows), *estimate("observed", rows, "observed")]
        columns += [
            Column(name, rounded(rows, f"reduction_{name}", factor=100), name=f"reduction_{name}")
            for name in BASELINES
            if _any(rows, f"reduction_{name}")
        ]
        yield Block(columns, f"{title}: unique experts, and how far below each baseline, %")
    others = "the other windows and " if one.height < frame.height else ""
    yield Block([], notes=[f"(--format csv has {others}every column)"])


def _expert_ratio(frame: pl.DataFrame) -> Iterator[Block]:
    # At a window of one token every ratio is 1.
    for title, rows in _parts(frame.filter(pl.col("window") > 1), ["trace", "phase"]):
        columns = [
            Column("B", [str(row["batch_size"]) for row in rows]),
            Column("T", [str(row["window"]) for row in rows]),
        ]
        columns += [_values("U(T, B)", rows, "unique"), _values("U(1, B)", rows, "unique_single"), *_ratios(rows)]
        yield Block(columns, f"{title}: experts of T tokens of B requests, over those of one token of each")


def _expert_ratio_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    one = frame.filter(pl.col("window") <= WINDOW).filter(pl.col("window") == pl.col("window").max().over("trace"))
    for title, rows in _parts(one, ["trace", "phase", "batch_size", "window"]):
        yield Block([_group(by, rows), *_ratios(rows)], f"{title}: experts loaded, over those of one token a request")
    others = "the other windows and " if one.height < frame.height else ""
    yield Block([], notes=[f"(--format csv has {others}every column)"])


def _ratios(rows: Sequence[Row]) -> list[Column]:
    rungs = [name for name in ("uniform", "popularity", "request") if _any(rows, f"ratio_{name}")]
    return [*estimate("ratio", rows, "ratio"), *(_values(name, rows, f"ratio_{name}") for name in rungs)]


def _autocorr(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase"]):
        columns = [Column("lag", [str(row["lag"]) for row in rows]), *estimate("overlap", rows, "overlap")]
        columns += [_values("request", rows, "expected_request")] if _any(rows, "expected_request") else []
        columns += [
            # What follows from the overlap is known no better than it.
            Column(heading, align([number(row[name], _half(row, "overlap")) for row in rows]), name=name)
            for heading, name in (
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
        columns += [Column(f"lag {lag}", rounded(part, "overlap")) for lag, part in at.items() if part]
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
            *estimate("share, %", rows, "share", factor=100),
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
            cells = zip(rounded(part, "share", factor=100), part, strict=True)
            marked = align([cell.rstrip() + " *"[not row["resolved"]] for cell, row in cells])
            columns.append(Column(_cause(cause), marked))
        unresolved = [] if all(row["resolved"] for row in rows) else ["* not resolved"]
        notes = unresolved + _warnings(rows)
        yield Block(columns, f"{title}: unique experts, and the causes' shares of the drop, %", notes)
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


def _steps(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase"]):
        kept = rows if len(rows) > 2 else rows[:1]  # one length: the row over all would say the same again
        first = Column("rows", ["all" if row["window"] is None else str(row["window"]) for row in kept])
        columns = [first, _counts("steps", kept, "n_steps")]
        columns += [*estimate("emitted", kept, "acceptance_length"), *_step_unions(kept)]
        yield Block(columns, f"{title}: tokens emitted and experts loaded by a step")
        columns = [first, _values("uniform", kept, "expected_uniform")]
        columns += [_values(name, kept, f"expected_{name}") for name in ("popularity",)]
        columns += [_values("accepted-only", kept, "accepted_only"), _values("step", kept, "unique")]
        columns += estimate("bias, %", kept, "bias", factor=100)
        yield Block(columns, "experts of as many tokens: expected, in windows of accepted ones, in a step")


def _steps_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    for title, rows in _parts(frame.filter(pl.col("window").is_null()), ["trace", "phase"]):
        columns = [_group(by, rows), *estimate("emitted", rows, "acceptance_length", rank=2)]
        columns += [*_step_unions(rows, 2), _values("accepted-only", rows, "accepted_only")]
        columns += estimate("bias, %", rows, "bias", factor=100, rank=1)
        yield Block(columns, f"{title}: tokens emitted and experts loaded by a step")
    yield Block([], notes=["(of all lengths of step; --format csv has each, and every column)"])


def _step_unions(rows: Sequence[Row], rank: int = 0) -> list[Column]:
    columns = estimate("unique", rows, "unique", rank=rank)
    if _any(rows, "unique_kept"):
        columns += [
            _values("kept", rows, "unique_kept"),
            Column("rejected, %", rounded(rows, "rejected_share", factor=100), name="rejected_share"),
        ]
    return columns


def _acceptance(frame: pl.DataFrame) -> Iterator[Block]:
    by = _group_column(frame)
    for title, rows in _parts(frame, ["trace", "phase", *([by] if by else [])]):
        columns = [Column("accepted", [str(row["accepted"]) for row in rows]), _counts("steps", rows, "n_steps")]
        columns += estimate("share, %", rows, "share", factor=100)
        columns += estimate("or more, %", rows, "at_least", factor=100, rank=2)
        columns += estimate("rate, %", rows, "rate", factor=100, rank=1)
        columns += [_values("unique", rows, "unique"), _values("rejected", rows, "rejected_unique")]
        length = 1 + sum(row["at_least"] for row in rows if row["accepted"])
        yield Block(columns, f"{title}: drafts accepted by a step, which emits {number(length)} tokens")


def _budget(frame: pl.DataFrame) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase", "steps", "window", "share"]):
        first = Column("budget", [str(row["budget"]) for row in rows])
        yield Block(_budget_columns(first, rows), _weighed(title, rows))


def _budget_by(frame: pl.DataFrame, by: str) -> Iterator[Block]:
    for title, rows in _parts(frame, ["trace", "phase", "steps", "window", "budget", "share"]):
        columns = [_group(by, rows), *_budget_columns(None, rows), _values("unique", rows, "unique")]
        yield Block([*columns, _values("carry it", rows, "experts_for_share")], _weighed(title, []))


def _budget_columns(first: Column | None, rows: Sequence[Row]) -> list[Column]:
    columns = [_values("loaded", rows, "loaded"), _values("× k", rows, "per_top_k")]
    columns += estimate("weight kept, %", rows, "weight_kept", factor=100)
    columns += estimate("tokens intact, %", rows, "tokens_intact", factor=100, rank=1)
    return columns if first is None else [first, *columns]


def _weighed(title: str, rows: Sequence[Row]) -> str:
    title, share = title.rsplit(", share ", 1)
    title = title.replace(", steps true, window of", ", real steps of").replace(", steps false", "")
    if not rows:
        return f"{title}: what it keeps (share {share})"
    row = rows[0]
    unique, needed = (number(row[name], _half(row, name)) for name in ("unique", "experts_for_share"))
    return f"{title}: {unique} unique experts, of which {needed} carry {float(share) * 100:g} % of the weight"


def _compare(frame: pl.DataFrame) -> Iterator[Block]:
    shown = frame.filter(~pl.col("at").fill_null("").str.starts_with("layer "))
    keys = ["trace_a", "phase_a", "trace_b", "phase_b", "paired"]
    for values, part in shown.group_by(keys, maintain_order=True):
        names: list[str] = []
        figures: dict[str, list[str]] = {"a": [], "b": [], "difference": []}
        intervals: list[str] = []
        marks: list[str] = []
        for (section, at), group in part.group_by("section", "at", maintain_order=True):
            rows = group.rows(named=True)
            where = f", {_text(at)}".replace("window ", "T = ").replace("batch size ", "B = ") if at else ""
            names += [_text(section) + where, *("  " + _text(row["metric"].replace("_", " ")) for row in rows)]
            halves = [_half({"d_lo": row["lo"], "d_hi": row["hi"]}, "d") for row in rows]
            for name, cells in figures.items():
                cells += ["", *align([number(row[name], half) for row, half in zip(rows, halves, strict=True)])]
            intervals += ["", *(interval(row["lo"], row["hi"]) for row in rows)]
            marks += ["", *(_mark(row) for row in rows)]
        columns = [Column("b - a", names, right=False), *(Column(name, cells) for name, cells in figures.items())]
        if any(intervals):
            columns.append(Column("95 %", intervals, right=False, gap=1, name="lo/hi"))
            columns.append(Column("", marks, right=False, gap=1))
        a, phase_a, b, phase_b, paired = values
        kind = "the same requests, paired" if paired else "two samples of requests"
        notes = ["* differs: the interval leaves out 0"] if "*" in marks else []
        notes += ["? not resolved: the interval leaves out the difference itself"] if "?" in marks else []
        notes += ["(--format csv has the agreement by layer)"] if shown.height < frame.height else []
        yield Block(columns, f"a: {_text(a)}, {_text(phase_a)}; b: {_text(b)}, {_text(phase_b)} ({kind})", notes)


def _mark(row: Row) -> str:
    if row["lo"] is None:
        return ""
    return {True: "*", False: "", None: "?"}[row["differs"]]


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
    "expert_ratio": _expert_ratio_by,
    "autocorr": _autocorr_by,
    "attribution": _attribution_by,
    "budget": _budget_by,
    "steps": _steps_by,
}
"""The layouts of frames that have a row for each layer, label or request: one table a trace, one line a group."""

LAYOUTS: dict[str, Callable[[pl.DataFrame], Iterable[Block]]] = {
    "windows": _windows,
    "expert_ratio": _expert_ratio,
    "autocorr": _autocorr,
    "attribution": _attribution,
    "load": _load,
    "budget": _budget,
    "compare": _compare,
    "steps": _steps,
    "acceptance": _acceptance,
    "cache": caching.cache,
    "reuse": caching.reuse,
    "layer_budgets": localising.layer_budgets,
    "locality": localising.locality,
    "prefetch": prefetching.prefetch,
    "summary": _summary,
    "formats": _formats,
    "info": _info,
    "check": _check,
    "calibration": calibrating.calibration,
    "calibration_points": calibrating.points,
    "models": modelling.models,
    "model": modelling.model,
    "speedup": gaining.speedup,
    "step_time": gaining.parts,
    "amdahl": gaining.amdahl,
    "tpot": timing.tpot,
    "law": designing.law,
    "design": designing.design,
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
