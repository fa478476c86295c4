"""Parquet files of one row group whose pages are laid out by hand.

What a writer of frames does not offer: a column is one page, lies where the caller wants it, and is encoded from what
is known of its values. :mod:`tracekit.store.part` is what that is for; Polars writes all other files.

Sources: Encodings.md and parquet.thrift of the Parquet format (https://github.com/apache/parquet-format), and Thrift's
compact protocol. Numbers below are theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"PAR1"
BOOLEAN, INT32, FLOAT = 0, 1, 4
PLAIN, RLE, DELTA_BINARY_PACKED, RLE_DICTIONARY = 0, 3, 5, 8
_UINT = {8: 11, 16: 12, 32: 13}
_REQUIRED, _OPTIONAL = 0, 1
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UNCOMPRESSED, _GZIP = 0, 2
_GZIP_FORMAT = 31
"""How zlib calls it."""
_BLOCK, _MINIBLOCKS = 128, 4
"""Differences in a block of ``DELTA_BINARY_PACKED``, and the pieces of it that have a width of their own."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column and its one page of values."""

    name: str
    type: int
    encoding: int
    values: Any
    """The page's content, or what follows ``prefix`` there: anything with a buffer."""
    prefix: bytes = b""
    dictionary: bytes = b""
    """The page of the dictionary, where there is one."""
    bits: int | None = None
    """Of unsigned integers."""
    optional: bool = False
    """Whether there are definition levels."""
    gzip: bool = False
    at: int | None = None
    """Where in the file it begins; default: after the others."""

    def schema(self) -> dict[int, Any]:
        """Return its SchemaElement."""
        element = {1: self.type, 3: _OPTIONAL if self.optional else _REQUIRED, 4: self.name}
        return element | ({6: _UINT[self.bits], 10: {10: {1: _Byte(self.bits), 2: False}}} if self.bits else {})


def write(path: Path, columns: Sequence[Column], rows: int) -> None:
    """Write a file of one row group; without rows, of none.

    Raises
    ------
    OSError
        It cannot be written.
    """
    chunks: dict[str, dict[int, Any]] = {}
    total = 0
    with path.open("wb") as file:
        file.write(MAGIC)
        for column in sorted(columns, key=lambda c: (c.at is None, c.at)):
            values = memoryview(column.values).cast("B")
            plain = len(column.prefix) + len(values)
            if column.gzip:
                values = memoryview(zlib.compress(column.prefix + values, 1, _GZIP_FORMAT))
            prefix = b"" if column.gzip else column.prefix
            stored = len(prefix) + len(values)
            file.write(bytes((column.at or file.tell()) - file.tell()))
            at = file.tell()
            file.write(column.dictionary + data_page(rows, column.encoding, plain, stored) + prefix)
            file.write(values)
            size = file.tell() - at
            meta = {1: column.type, 2: [column.encoding, PLAIN, RLE], 3: [column.name]}
            meta |= {4: _GZIP if column.gzip else _UNCOMPRESSED, 5: _Long(rows)}
            meta |= {6: _Long(size + plain - stored), 7: _Long(size), 9: _Long(at + len(column.dictionary))}
            chunks[column.name] = {2: _Long(0), 3: meta | ({11: _Long(at)} if column.dictionary else {})}
            total += size + plain - stored
        group = {1: [chunks[column.name] for column in columns], 2: _Long(total), 3: _Long(rows)}
        schema = [{4: "schema", 5: len(columns)}, *(column.schema() for column in columns)]
        footer = _struct({1: 2, 2: schema, 3: _Long(rows), 4: [group] if rows else [], 6: "tracekit"})
        file.write(footer + len(footer).to_bytes(4, "little") + MAGIC)


# --- pages and encodings ----------------------------------------------------------------------


def dictionary_page(values: NDArray[np.integer[Any]]) -> bytes:
    """Return a dictionary of integers that the indices of a column refer to."""
    data = values.astype("<u4").tobytes()
    return _struct({1: _DICTIONARY_PAGE, 2: len(data), 3: len(data), 7: {1: len(values), 2: PLAIN}}) + data


def data_page(rows: int, encoding: int, size: int, stored: int) -> bytes:
    """Return the header of a page of so many bytes, before and after compression."""
    return _struct({1: _DATA_PAGE, 2: size, 3: stored, 5: {1: rows, 2: encoding, 3: RLE, 4: RLE}})


def bit_packed(rows: int) -> bytes:
    """Return what stands before so many bit-packed values; they are filled up to whole groups of eight."""
    return varint(-(-rows // 8) << 1 | 1)


def run_lengths(values: NDArray[Any], lengths: NDArray[np.int64], width: int) -> bytes:
    """Return integers of ``width`` bits, or flags, each repeated as ``lengths`` says, run-length encoded."""
    if not len(values):
        return b""
    first = _changes(values)
    value = values[first, None].astype("<i8").view(np.uint8)[:, : -(-width // 8)]
    count = np.add.reduceat(lengths, first)[:, None] << 1 >> np.arange(0, 42, 7)  # varints of less than 35 bits
    there = np.hstack([np.ones((len(first), 1), bool), count[:, 1:] != 0])
    coded = (count[:, :5] & 0x7F) | there[:, 1:] * 0x80
    encoded: NDArray[np.int64] = np.hstack([coded, value])[np.hstack([there[:, :5], np.ones(value.shape, bool)])]
    return encoded.astype(np.uint8).tobytes()


def flags(values: NDArray[np.bool_], known: NDArray[np.bool_]) -> bytes:
    """Return the content of an optional column of booleans: which of the values are known, and those."""
    first = _changes(known)
    levels = run_lengths(known[first], np.diff(np.append(first, len(known))), 1)
    return len(levels).to_bytes(4, "little") + levels + np.packbits(values[known], bitorder="little").tobytes()


def _changes(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return where a value differs from the one before it."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])


def counting(first: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """Return numbers that count up, run after run, as DELTA_BINARY_PACKED.

    Within a run the difference is 1, and a block of such takes a few bytes. A block that leaps to a new run holds its
    differences above the least one of the file, all in as many bytes as the greatest takes.

    Parameters
    ----------
    first, lengths
        ``[runs]`` first number of each run, of 32 unsigned bits, and how many there are.
    """
    rows = int(lengths.sum())
    head = varint(_BLOCK) + varint(_MINIBLOCKS) + varint(rows)
    if not rows:
        return head + _zigzag(0)
    head += _zigzag(int(first[:1].astype(np.int32)[0]))
    at = np.cumsum(lengths)[:-1] - 1  # the difference after the last number of a run leads to the next one
    steps = (first[1:] - (first[:-1] + lengths[:-1] - 1)).astype(np.int32)
    least = min(1, int(steps.min(initial=1)))
    blocks, block_of = np.unique(at // _BLOCK, return_inverse=True)
    above = np.full((len(blocks), _BLOCK), 1 - least, np.uint32)
    above[block_of, at % _BLOCK] = (steps.astype(np.int64) - least).astype(np.uint32)
    size = next(size for size in (1, 2, 4) if int(above.max(initial=0)) < 1 << (8 * size))
    plain = np.frombuffer(_zigzag(1) + bytes(_MINIBLOCKS), np.uint8)
    start = np.frombuffer(_zigzag(least) + bytes([8 * size] * _MINIBLOCKS), np.uint8)
    leaping = np.zeros(-(-(rows - 1) // _BLOCK), bool)
    leaping[blocks] = True
    width = len(start) + _BLOCK * size
    of_leaping = np.repeat(leaping, np.where(leaping, width, len(plain)))
    out = np.empty(len(of_leaping), np.uint8)
    out[~of_leaping] = np.tile(plain, len(leaping) - len(blocks))
    values = above.astype(f"<u{size}").view(np.uint8)
    out[of_leaping] = np.hstack([np.broadcast_to(start, (len(blocks), len(start))), values]).ravel()
    if leaping[-1:].any():  # the last block ends with the last piece that is used
        unused = _MINIBLOCKS - -(-((rows - 1) % _BLOCK or _BLOCK) // (_BLOCK // _MINIBLOCKS))
        end_of_head = len(out) - _BLOCK * size
        out[end_of_head - unused : end_of_head] = 0
        out = out[: len(out) - unused * size * (_BLOCK // _MINIBLOCKS)]
    return head + out.tobytes()


# --- Thrift's compact protocol ----------------------------------------------------------------


class _Byte(int):
    """A byte; an int has 32 bits."""


class _Long(int):
    """64 bits."""


_KINDS = {_Byte: 3, int: 5, _Long: 6, str: 8, list: 9, dict: 12}


def _struct(fields: dict[int, Any]) -> bytes:
    """Return a struct, given its fields by their numbers, in order."""
    out, before = bytearray(), 0
    for number, value in fields.items():
        flag = isinstance(value, bool)
        out.append((number - before) << 4 | (2 - value if flag else _KINDS[type(value)]))
        out += b"" if flag else _value(value)
        before = number
    return bytes(out) + b"\0"


def _value(value: Any) -> bytes:
    if isinstance(value, dict):
        return _struct(value)
    if isinstance(value, str):
        return varint(len(value.encode())) + value.encode()
    if isinstance(value, list):
        kind = _KINDS[type(value[0])] if value else _KINDS[dict]
        head = bytes([len(value) << 4 | kind]) if len(value) < 15 else bytes([0xF0 | kind]) + varint(len(value))
        return head + b"".join(map(_value, value))
    return bytes([value]) if isinstance(value, _Byte) else _zigzag(value)


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else ~(value << 1))


def varint(value: int) -> bytes:
    """Return an unsigned number, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
