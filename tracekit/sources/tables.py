"""Rows of CSV, JSON-lines and Parquet files with named columns, a block at a time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.csvio import whole_lines
from tracekit.sources.files import file_size, reading
from tracekit.sources.jsonio import records

if TYPE_CHECKING:
    import polars as pl

PARQUET = b"PAR1"
_ROWS = 1 << 16
_LONGEST_HEADER = 1 << 16
_FREE_ROWS, _ROWS_PER_BYTE = 1 << 20, 8
"""Rows that a Parquet file may hold beyond those that its bytes pay for: an expert takes a few bits."""
_INTEGERS = re.compile(r"[\[({ ]*-?\d+([ ,;|]+-?\d+)*[\])} ]*")
_FLOATS = re.compile(r"[\[({ ]*[^\s,;|\[\](){}]+([ ,;|]+[^\s,;|\[\](){}]+)*[\])} ]*")

Where = str


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive rows: a polars column for each name, and where the first of them stands."""

    frame: pl.DataFrame
    first: int
    """Line of the first row in a text file (1 is the header's), number of the first row (from 0) in another."""
    done: int
    """Bytes of the file read so far."""


@contextmanager
def polars_reading(where: str) -> Iterator[None]:
    """Turn what polars raises on a damaged file, a panic of its Rust side included, into `SourceError`."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, SourceError):
            raise
        raise _damaged(error, where) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise _damaged(error, where) from None


def _damaged(error: BaseException, where: str) -> SourceError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return SourceError(
        f"cannot be read ({reason})", where=where, remedy="Is it whole? Copy it again from where it was made"
    )


def csv_header(head: bytes) -> list[str]:
    """Return the column names of a CSV's first line, in lower case."""
    first = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace")
    return [name.strip().strip('"').lower() for name in first.split(",")]


def csv_blocks(path: Path, columns: Sequence[str], numbers: dict[str, type]) -> Iterator[Block]:
    """Yield the rows of a CSV.

    Parameters
    ----------
    path
        The file; its first line names the columns.
    columns
        Columns to read.
    numbers
        Which of them are ``int`` or ``float``; the others are text.

    Raises
    ------
    SourceError
        Naming the first line that does not parse.
    """
    with reading(str(path)), path.open("rb") as file:
        header = csv_header(file.readline(_LONGEST_HEADER))
        line = 2
        for lines in whole_lines(file, str(path)):
            whole = lines.replace(b"\r\n", b"\n")
            frame = _parse_csv(whole, str(path), line, header, columns, numbers)
            yield Block(frame, line, file.tell())
            line += whole.count(b"\n")


def _parse_csv(
    text: bytes, where: str, line: int, header: list[str], columns: Sequence[str], numbers: dict[str, type]
) -> pl.DataFrame:
    import polars as pl

    with polars_reading(f"{where}:{line}"):
        # Names that occur twice would not be a schema; only their places matter here.
        schema: dict[str, Any] = {f"{i}": pl.String for i in range(len(header))}
        try:
            raw = pl.read_csv(io.BytesIO(text), has_header=False, schema=schema)
        except pl.exceptions.PolarsError as error:
            raise _bad_csv_line(text, where, line, header, error) from error
        frame = raw.select(pl.col(str(header.index(name))).alias(name) for name in columns)
        types = {int: pl.Int64, float: pl.Float64}
        for name, kind in numbers.items():
            parsed = frame[name].str.strip_chars().cast(types[kind], strict=False)
            if parsed.null_count():
                row = int(parsed.is_null().arg_max() or 0)
                raise SourceError(
                    f"{name} is {_shown(frame[name][row])}",
                    where=f"{where}:{line + row}",
                    expected="a whole number" if kind is int else "a number",
                )
            frame = frame.with_columns(parsed)
    return frame


def _bad_csv_line(text: bytes, where: str, line: int, header: list[str], error: Exception) -> SourceError:
    reason = (str(error).splitlines() or [""])[0][:120]
    for number, row in enumerate(text.splitlines(), start=line):
        if b'"' not in row and row.count(b",") != len(header) - 1:
            shown = row[:80].decode("utf-8", "replace")
            return SourceError(
                f"row {shown!r} has {row.count(b',') + 1} values", where=f"{where}:{number}", expected=",".join(header)
            )
    return SourceError(f"does not parse ({reason})", where=f"{where}:{line}", expected=",".join(header))


def json_blocks(path: Path, columns: Sequence[str]) -> Iterator[Block]:
    """Yield the objects of JSON lines, or of a JSON array, as rows: a column of Python objects for each name.

    Raises
    ------
    SourceError
        Naming the first record that is no object or lacks a column.
    """
    held: list[list[Any]] = [[] for _ in columns]
    first = rows = done = 0
    for where, record, done in records(path):
        if not isinstance(record, dict):
            raise SourceError(f"is {type(record).__name__}, not an object", where=where, expected="one object a row")
        for name, values in zip(columns, held, strict=True):
            if name not in record:
                raise SourceError(f"has no field {name!r}", where=where, expected="the same fields in every row")
            values.append(record[name])
        rows += 1
        if rows - first == _ROWS:
            yield Block(_objects(columns, held), first, done)
            first, held = rows, [[] for _ in columns]
    if rows > first:
        yield Block(_objects(columns, held), first, done)


def _objects(columns: Sequence[str], held: list[list[Any]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(
        {name: pl.Series(name, values, dtype=pl.Object) for name, values in zip(columns, held, strict=True)}
    )


def parquet_schema(path: Path) -> dict[str, pl.DataType]:
    """Return the columns of a Parquet file and their types."""
    import polars as pl

    with polars_reading(str(path)):
        return dict(pl.scan_parquet(path, glob=False).collect_schema())


def parquet_blocks(path: Path, columns: Sequence[str]) -> Iterator[Block]:
    """Yield the rows of a Parquet file, a few row groups in memory at a time.

    Raises
    ------
    SourceError
        If the file is damaged.
    """
    import polars as pl

    size, done, where = file_size(path), 0, str(path)
    with polars_reading(where):
        total = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    if total > _FREE_ROWS + _ROWS_PER_BYTE * size:
        raise SourceError(
            f"unpacks {size} bytes to {total} rows: constant filler, not routing", where=where, expected="a real trace"
        )
    with polars_reading(where):
        batches = pl.scan_parquet(path, glob=False).select(columns).collect_batches(maintain_order=True)
    while True:
        with polars_reading(where):
            frame = next(batches, None)
        if frame is None:
            return
        for start in range(0, frame.height, 1 << 18):
            part = frame.slice(start, 1 << 18)
            yield Block(part, done, size * (done + part.height) // max(total, 1))
            done += part.height


def integers(column: pl.Series, place: Place) -> NDArray[np.int64]:
    """Return a column of whole numbers, or of equally long lists of them, as ``[rows]`` or ``[rows, k]``.

    Raises
    ------
    SourceError
        Naming the first row that is something else.
    """
    found: NDArray[np.int64] = _numbers(column, place, np.int64)
    return found


def floats(column: pl.Series, place: Place) -> NDArray[np.float64]:
    """Return a column of numbers, or of equally long lists of them, as ``[rows]`` or ``[rows, k]``."""
    found: NDArray[np.float64] = _numbers(column, place, np.float64)
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a block stand, for messages."""

    path: Path
    first: int
    text: bool

    def row(self, row: int) -> str:
        """Return how messages call a row."""
        return f"{self.path}:{self.first + row}" if self.text else f"{self.path}, row {self.first + row}"


def _numbers(column: pl.Series, place: Place, dtype: Any) -> Any:
    import polars as pl

    wanted = "whole number" if dtype is np.int64 else "number"
    if column.dtype == pl.Object:
        return _of_objects(column.to_list(), column.name, place, dtype, wanted)
    if column.dtype == pl.String:
        column = _split(column, place, dtype, wanted)
    width = None
    if isinstance(column.dtype, pl.List | pl.Array):
        lengths = (column.list if isinstance(column.dtype, pl.List) else column.arr).len()
        width = lengths[0] if len(lengths) else 0
        odd = (lengths != width).fill_null(True)
        if odd.any() or not width:
            row = int(odd.arg_max() or 0)
            raise SourceError(
                f"{column.name} has {int(lengths[row] or 0)} entries",
                where=place.row(row),
                expected=f"{width or 'some'} as in the rows before",
            )
        column = column.explode()
    allowed = column.dtype.is_integer() or (dtype is np.float64 and column.dtype.is_float())
    if not allowed or column.null_count():
        row = int(column.is_null().arg_max() or 0) // (width or 1) if allowed else 0
        found = "empty" if allowed else str(column.dtype)
        raise SourceError(f"{column.name} is {found}", where=place.row(row), expected=f"a {wanted}")
    if column.dtype == pl.UInt64 and (column >= 1 << 63).any():
        raise SourceError(f"{column.name} holds numbers from 2^63 on", where=place.row(0), expected="smaller ones")
    array = column.cast(pl.Int64 if dtype is np.int64 else pl.Float64).to_numpy()
    return array if width is None else array.reshape(-1, width)


def _split(column: pl.Series, place: Place, dtype: Any, wanted: str) -> pl.Series:
    """Split texts such as ``[3, 1]`` or ``3 1`` into lists."""
    import polars as pl

    pattern = _INTEGERS if dtype is np.int64 else _FLOATS
    wrong = ~column.str.contains(f"^(?:{pattern.pattern})$").fill_null(False)
    parts = column.str.extract_all(r"[^\s,;|\[\](){}]+")
    values = parts.list.eval(pl.element().cast(pl.Int64 if dtype is np.int64 else pl.Float64, strict=False))
    wrong |= values.list.eval(pl.element().is_null().any()).list.first().fill_null(True)
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise SourceError(
            f"{column.name} is {_shown(column[row])}", where=place.row(row), expected=f"{wanted}s such as [3, 1]"
        )
    plain = len(column) and not re.search(r"[\s,;|\[\](){}]", str(column[0]).strip())
    return values.list.first() if plain and (values.list.len() == 1).all() else values


def _shown(text: str | None) -> str:
    return "empty" if text is None else repr(text[:60])


def _of_objects(values: list[Any], name: str, place: Place, dtype: Any, wanted: str) -> Any:
    kinds = (int,) if dtype is np.int64 else (int, float)

    def fits(value: Any) -> bool:
        entries = value if isinstance(value, list) else [value]
        return bool(entries) and all(type(entry) in kinds and abs(entry) < 1 << 62 for entry in entries)

    length = len(values[0]) if values and isinstance(values[0], list) else None
    for row, value in enumerate(values):
        if not fits(value) or (len(value) if isinstance(value, list) else None) != length:
            expected = f"a list of {length} {wanted}s" if length else f"a {wanted}, or a list of them"
            raise SourceError(f"{name} is {str(value)[:60]}", where=place.row(row), expected=expected)
    return np.array(values, dtype)
