"""The part files of a store: Parquet whose rank columns lie there as a kernel reads them.

A part is one row group that every reader of Parquet understands. What is particular is how the encodings are used:

* Ids hardly compress, and decoding them takes a third of a pass. So each rank column has the dictionary 0 .. N - 1,
  whose indices are the ids, in 8 or 16 bits, which bit-packing leaves as they are: writing a column is copying it, and
  reading it is mapping it. They come first in the file; where they lie follows from the numbers of rows and experts.
* ``request`` and ``layer`` are the same for a whole run of positions, and ``pos`` counts: they are encoded run by run,
  and are never in memory row by row.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import id_dtype
from tracekit.store import parquet
from tracekit.store.parquet import Column

_ALIGNED = 64
"""Ids begin at multiples of so many bytes: a line of the cache."""


@dataclass(frozen=True, slots=True)
class PartRows:
    """The rows of a part, in their order: request, layer, pos."""

    runs: dict[str, NDArray[np.int64]]
    """Runs of consecutive positions, one after the other: ``request``, ``layer``, ``pos`` and ``n``, ``[runs]``."""
    decode: NDArray[np.bool_]
    """``[rows]``."""
    known: NDArray[np.bool_]
    """``[rows]`` whether ``decode`` is."""
    ids: Sequence[NDArray[np.unsignedinteger[Any]]]
    """k columns ``[rows]`` of the dtype of :func:`tracekit.schema.id_dtype`."""
    weights: Sequence[NDArray[np.float32]] = ()
    """k columns ``[rows]``, or none."""


def write_part(path: Path, rows: PartRows, num_experts: int) -> None:
    """Write a part file.

    Raises
    ------
    OSError
        It cannot be written.
    """
    n, lengths = len(rows.decode), rows.runs["n"]
    columns = [_repeated(name, rows.runs[name], lengths, bits) for name, bits in (("request", 32), ("layer", 16))]
    pos, decode = parquet.counting(rows.runs["pos"], lengths), parquet.flags(rows.decode, rows.known)
    columns.append(Column("pos", parquet.INT32, parquet.DELTA_BINARY_PACKED, pos, bits=32, gzip=True))
    columns.append(Column("decode", parquet.BOOLEAN, parquet.PLAIN, decode, optional=True, gzip=True))
    layout = _Layout.of(n, num_experts, len(rows.ids))
    for rank, (ids, at) in enumerate(zip(rows.ids, layout.at, strict=True)):
        groups = np.ascontiguousarray(np.append(ids, np.zeros(-n % 8, ids.dtype)) if n % 8 else ids)
        columns.append(
            Column(
                f"e{rank}",
                parquet.INT32,
                parquet.RLE_DICTIONARY,
                groups,
                layout.prefix,
                layout.dictionary,
                bits=8 * ids.itemsize,
                at=at,
            )
        )
    for rank, weights in enumerate(rows.weights):
        columns.append(Column(f"w{rank}", parquet.FLOAT, parquet.PLAIN, np.ascontiguousarray(weights)))
    parquet.write(path, columns, n)


def _repeated(name: str, values: NDArray[np.int64], lengths: NDArray[np.int64], bits: int) -> Column:
    """Return a column of values that are repeated as often as ``lengths`` says."""
    distinct, indices = np.unique(values, return_inverse=True)
    width = max(1, (len(distinct) - 1).bit_length())
    encoded = parquet.run_lengths(indices, lengths, width)
    dictionary = parquet.dictionary_page(distinct)
    return Column(name, parquet.INT32, parquet.RLE_DICTIONARY, encoded, bytes([width]), dictionary, bits)


def map_ids(path: Path, rows: int, num_experts: int, top_k: int) -> tuple[NDArray[np.unsignedinteger[Any]], ...] | None:
    """Return the rank columns of a part file, k times ``[rows]``, mapped into memory and read-only.

    Parameters
    ----------
    rows
        Rows that the file should have.

    Returns
    -------
    tuple of numpy.ndarray, or None
        None where the file does not have them where :func:`write_part` puts them: another program wrote it, it does
        not have as many rows or experts, or it is cut short.

    Raises
    ------
    OSError
        It cannot be opened.
    """
    with path.open("rb") as file:
        if not rows or not file.seek(0, 2):  # there is nothing to map
            return None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data.madvise(mmap.MADV_WILLNEED)  # a cold disk is read in large pieces
    if data[-len(parquet.MAGIC) :] != parquet.MAGIC:
        return None
    layout, dtype = _Layout.of(rows, num_experts, top_k), np.dtype(id_dtype(num_experts))
    before = layout.dictionary + layout.header + layout.prefix
    starts = [at + len(before) for at in layout.at]
    if any(data[at:start] != before for at, start in zip(layout.at, starts, strict=True)):
        return None
    if len(data) < starts[-1] + rows * dtype.itemsize:
        return None
    return tuple(np.frombuffer(data, dtype, rows, start) for start in starts)


class _Layout(NamedTuple):
    """Where the rank columns lie, and what stands there before the ids, one after the other."""

    at: list[int]
    """Where each column begins."""
    dictionary: bytes
    header: bytes
    prefix: bytes

    @classmethod
    def of(cls, rows: int, num_experts: int, top_k: int) -> _Layout:
        itemsize = np.dtype(id_dtype(num_experts)).itemsize
        prefix = bytes([8 * itemsize]) + parquet.bit_packed(rows)
        ids = (rows + -rows % 8) * itemsize
        size = len(prefix) + ids
        dictionary = parquet.dictionary_page(np.arange(num_experts))
        header = parquet.data_page(rows, parquet.RLE_DICTIONARY, size, size)
        before = len(dictionary) + len(header) + len(prefix)
        at, end = [], len(parquet.MAGIC)
        for _ in range(top_k):
            start = end + before
            start += -start % _ALIGNED
            at.append(start - before)
            end = start + ids
        return cls(at, dictionary, header, prefix)
