"""A frame as csv, json, ndjson, markdown or parquet: every column, exact values.

Nothing here rounds. NaN and infinity become null in JSON, which has no word for them; nested and binary
columns become JSON text and hexadecimal in csv and markdown, which have no place for them.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import polars as pl

from tracekit.errors import UsageError
from tracekit.reports.text import printable

EXPORT_FORMATS = ("csv", "json", "ndjson", "markdown", "parquet")


def export(frame: pl.DataFrame, fmt: str) -> bytes:
    """Return ``frame`` in the format ``fmt`` (one of ``EXPORT_FORMATS``), text in UTF-8.

    Raises
    ------
    UsageError
        If the format is unknown.
    """
    match fmt:
        case "csv":
            return _flat(frame).write_csv().encode()
        case "json":
            rows = ",\n".join(_json_rows(frame))
            return (f"[\n{rows}\n]\n" if rows else "[]\n").encode()
        case "ndjson":
            return "".join(row + "\n" for row in _json_rows(frame)).encode()
        case "markdown":
            return _markdown(frame).encode()
        case "parquet":
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            return buffer.getvalue()
    raise UsageError(f"unknown format {fmt!r}", expected="one of " + ", ".join(EXPORT_FORMATS))


def plain(value: Any) -> Any:
    """Return a cell as something JSON can say: plain numbers, strings, booleans, lists, objects and null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case bytes():
            return value.hex()
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | pl.Series():
            return [plain(item) for item in value]
    return str(value)


def _json_rows(frame: pl.DataFrame) -> Iterator[str]:
    names = frame.columns
    for row in frame.iter_rows():
        yield json.dumps(dict(zip(names, map(plain, row), strict=True)), ensure_ascii=False, allow_nan=False)


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Return ``frame`` with nested and binary columns as text and NaN as null."""
    columns = []
    for series in frame:
        if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object):
            columns.append(pl.Series(series.name, [_cell(value) for value in series.to_list()], dtype=pl.String))
        elif series.dtype.is_float():
            columns.append(series.fill_nan(None))
        else:
            columns.append(series)
    return pl.DataFrame(columns)


def _cell(value: Any) -> str | None:
    value = plain(value)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown(frame: pl.DataFrame) -> str:
    rule = ["---:" if dtype.is_numeric() else "---" for dtype in frame.dtypes]
    lines = [[markdown_text(name) for name in frame.columns], rule]
    lines += [
        ["" if (text := _cell(value)) is None else markdown_text(text) for value in row] for row in frame.iter_rows()
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# A name from a trace must stay one cell of one row, and must not become markup where the page is shown.
_MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|", "`": "\\`", "<": "&lt;", ">": "&gt;", "&": "&amp;"})


def markdown_text(text: str) -> str:
    """Return text as one cell of a Markdown table, nothing in it markup."""
    return printable(text).translate(_MARKDOWN)
