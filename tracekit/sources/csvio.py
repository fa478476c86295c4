"""Columns of whole numbers out of big CSV files, a block at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import reading

if TYPE_CHECKING:
    import polars as pl

_BLOCK = 1 << 24
_LONGEST_LINE = 1 << 24

Columns = dict[str, NDArray[Any]]


def read_columns(
    path: Path, skip: int, header: Sequence[str], wanted: Mapping[str, type]
) -> Iterator[tuple[int, Columns, int]]:
    """Yield blocks of rows.

    Parameters
    ----------
    path
        The file.
    skip
        Lines before the first row.
    header
        Names of all columns, in order.
    wanted
        Columns to read, ``int`` or ``float``.

    Yields
    ------
    line, columns, done
        Line number of the block's first row, its columns as int64 or float64, bytes read so far.

    Raises
    ------
    SourceError
        Naming the first line that does not parse.
    """
    with reading(str(path)), path.open("rb") as file:
        for _ in range(skip):
            file.readline()
        line = skip + 1
        for whole in whole_lines(file, str(path)):
            frame = _parse(whole, str(path), line, header, wanted)
            yield line, {name: frame[name].to_numpy() for name in wanted}, file.tell()
            line += whole.count(b"\n")


def whole_lines(file: IO[bytes], where: str) -> Iterator[bytes]:
    """Yield the rest of a file in pieces of whole lines, some megabytes each; the last line may lack its end.

    Raises
    ------
    SourceError
        If a line is longer than any row of a trace.
    """
    rest = b""
    while data := file.read(_BLOCK):
        end = data.rfind(b"\n") + 1
        if len(rest) > _LONGEST_LINE:
            raise SourceError(f"has a line of more than {_LONGEST_LINE} bytes", where=where, expected="a row a line")
        whole, rest = (rest + data[:end], data[end:]) if end else (b"", rest + data)
        if whole:
            yield whole
    if rest.strip():
        yield rest + b"\n"


def _parse(block: bytes, where: str, line: int, header: Sequence[str], wanted: Mapping[str, type]) -> pl.DataFrame:
    import polars as pl

    types = {int: pl.Int64, float: pl.Float64}
    schema = {name: types[wanted[name]] if name in wanted else pl.String for name in header}
    try:
        frame = pl.read_csv(
            io.BytesIO(block),
            has_header=False,
            schema=schema,
            columns=[i for i, name in enumerate(header) if name in wanted],
            quote_char=None,
        )
    except pl.exceptions.PolarsError as error:
        raise _first_bad_line(block, where, line, header, wanted, str(error)) from error
    if sum(frame.null_count().row(0)):
        raise _first_bad_line(block, where, line, header, wanted, "a value is missing")
    return frame


def _first_bad_line(
    block: bytes, where: str, line: int, header: Sequence[str], wanted: Mapping[str, type], reason: str
) -> SourceError:
    expected = ",".join(header)
    for number, row in enumerate(block.splitlines(), start=line):
        cells = row.split(b",")
        try:
            if len(cells) != len(header):
                raise ValueError
            for name, kind in wanted.items():
                kind(cells[header.index(name)])
        except ValueError:
            text = row[:80].decode("utf-8", "replace")
            return SourceError(f"row {text!r} does not parse", where=f"{where}:{number}", expected=expected)
    return SourceError(f"does not parse ({reason.splitlines()[0]})", where=f"{where}:{line}", expected=expected)
