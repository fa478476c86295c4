"""Rows of benchmark results: CSV, TSV, JSON, JSON lines, Parquet, frames and dictionaries, all small."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.errors import SourceError, UsageError
from tracekit.sources.files import file_size, read_head, reading
from tracekit.sources.jsonio import records
from tracekit.sources.tables import PARQUET, parquet_blocks, parquet_schema

if TYPE_CHECKING:
    import polars as pl

    Source = str | Path | pl.DataFrame | Mapping[str, Any]
    Measured = Source | Iterable[Source]

MAX_BYTES = 1 << 28
"""Largest file that is read: one with every request's times has some ten megabytes."""

MAX_ROWS = 100_000

_GIVEN = re.compile(r"(?P<path>.*):(?P<given>\w+=[^=,]*(?:,\w+=[^=,]*)*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found."""

    where: str
    """File and line, or what else says where it stands."""
    fields: dict[str, Any]
    """Its values by the names of the file, in lower case and with ``_`` for other signs: ``TPOT (ms)`` is tpot_ms."""
    given: dict[str, str]
    """What the user said of the whole file, by the same kind of name."""


def normal(name: str) -> str:
    """Return a column's name in lower case, letters and digits parted by ``_``."""
    return re.sub(r"[^0-9a-zµμ]+", "_", name.strip().lower()).strip("_")


def tables(measured: Measured) -> list[list[Row]]:
    """Return the rows of each file, frame or row.

    Parameters
    ----------
    measured
        A file, a frame, a mapping (one row), or an iterable of those. ``FILE:key=value,…`` says of a file what it does
        not say itself: ``latency.json:batch_size=8,output_len=128``.

    Raises
    ------
    SourceError
        A file cannot be read, is damaged, too large, or holds no rows.
    UsageError
        Nothing is given, or something of another type.
    """
    import polars as pl

    several = [measured] if isinstance(measured, str | Path | Mapping | pl.DataFrame) else list(measured)
    if not several:
        raise UsageError("no measurements", expected="at least one file of them")
    found = []
    rows: list[Row] = []
    for number, source in enumerate(several):
        if isinstance(source, Mapping):
            rows.append(_row(f"row {number}", source, {}))
        elif isinstance(source, pl.DataFrame):
            found.append([_row(f"row {i}", fields, {}) for i, fields in enumerate(source.iter_rows(named=True))])
        elif isinstance(source, str | Path):
            found.append(_file(source))
        else:
            raise UsageError(f"measurements in a {type(source).__name__}", expected="a file, a frame or a mapping")
    found += [rows] if rows else []
    for table in found:
        if not table:
            raise SourceError("holds no rows", where="the frame of measurements", expected="a row a measurement")
    return found


def _file(source: str | Path) -> list[Row]:
    path, given = Path(source), {}
    if not path.exists() and (match := _GIVEN.fullmatch(str(source))):
        path = Path(match["path"])
        pairs = [pair.split("=") for pair in match["given"].split(",")]
        given = {normal(key): value.strip() for key, value in pairs}
        if len(given) < len(pairs):
            raise UsageError(f"{match['given']!r} says one thing twice", expected="each name once")
    where = str(path)
    size = file_size(path)
    if size > MAX_BYTES:
        raise SourceError(f"has {size:,} bytes", where=where, expected=f"benchmark results of at most {MAX_BYTES:,}")
    head = read_head(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    form = _parquet if head.startswith(PARQUET) else _json if head[:1] in (b"{", b"[") else _text
    rows = [_row(place, fields, given) for place, fields in islice(form(path), MAX_ROWS + 1)]
    if not rows:
        raise SourceError("holds no rows", where=where, expected="a row a measurement")
    if len(rows) > MAX_ROWS:
        raise SourceError(f"holds more than {MAX_ROWS:,} rows", where=where, expected="a row a measurement")
    return rows


def _row(where: str, fields: Mapping[str, Any], given: dict[str, str]) -> Row:
    named: dict[str, Any] = {}
    for name, value in fields.items():
        if (key := normal(str(name))) in named:
            raise SourceError(f"has two columns {key!r}", where=where, expected="each name once")
        named[key] = value
    return Row(where, named, given)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record, _ in records(path):
        if not isinstance(record, dict):
            raise SourceError(
                f"is {type(record).__name__}, not an object", where=where, expected="one object a measurement"
            )
        yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    columns = [name for name, dtype in parquet_schema(path).items() if not dtype.is_nested()]
    if columns:
        for block in parquet_blocks(path, columns):
            for i, fields in enumerate(block.frame.iter_rows(named=True)):
                yield f"{path}, row {block.first + i}", fields


def _text(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of delimited text: tabs where the header has one, else commas, else semicolons."""
    where = str(path)
    with reading(where):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"is not text ({error.reason} at byte {error.start})",
            where=where,
            expected="benchmark results in CSV, TSV, JSON, JSON lines or Parquet",
        ) from None
    lines = io.StringIO(text, newline="").readlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), None)
    if first is None:
        return
    header = lines[first]
    delimiter = next((sign for sign in "\t,;" if sign in header), ",")
    rows = csv.reader(io.StringIO("".join(lines[first:])), delimiter=delimiter, strict=True)
    try:
        names = next(rows)
        if len({normal(name) for name in names}) < len(names):
            raise SourceError("has a name twice", where=f"{where}:{first + 1}", expected="each name once")
        for row in rows:
            place = f"{where}:{first + rows.line_num}"
            if len(row) != len(names) and any(cell.strip() for cell in row):
                raise SourceError(f"has {len(row)} values", where=place, expected=f"{len(names)}, as the header has")
            if any(cell.strip() for cell in row):
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise SourceError(f"does not parse ({error})", where=f"{where}:{first + rows.line_num}") from None
