"""``.safetensors`` files: a JSON header that is held against the file's size, tensors by memory map."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.files import fault, file_size, reading
from tracekit.sources.tensors import Storage, Tensor, contiguous

_LONGEST_HEADER = 100_000_000
"""The limit of the format's own reader."""
_METADATA = "__metadata__"
_MOST_AXES = 64
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a length and the JSON object that it announces."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata.

    Raises
    ------
    SourceError
        If the header is not JSON, or what it says about a tensor does not fit the bytes behind it.
    """
    size = file_size(path)
    with reading(str(path)), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise SourceError(
                f"announces a header of {length} bytes in a file of {size}",
                where=str(path),
                expected="a safetensors file",
                remedy="Copy it again from where it was made",
            )
        header = _parse(file.read(length), str(path))
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"has a {_METADATA} that is no map of strings", where=str(path))
    begin, tensors, spans = 8 + length, {}, []
    for name, entry in header.items():
        storage, shape, span = _storage(path, name, entry, begin, size - begin)
        tensors[name] = contiguous(storage, shape)
        spans.append(span)
    _check_spans(sorted(spans), size - begin, str(path))
    return tensors, metadata


def _parse(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        found = f"has no readable header ({fault(error)})"
        raise SourceError(found, where=where, expected="a safetensors file") from error
    if not isinstance(header, dict):
        raise SourceError("has a header that is no JSON object", where=where, expected="a safetensors file")
    return header


def _storage(
    path: Path, name: str, entry: object, begin: int, held: int
) -> tuple[Storage, tuple[int, ...], tuple[int, int]]:
    where = f"{path}[{name}]"
    fields = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    described = isinstance(dtype, str) and _counts(shape) and _counts(offsets)
    if not described or len(offsets) != 2 or len(shape) > _MOST_AXES:
        raise SourceError(
            "is not described by dtype, shape and data_offsets", where=where, expected="a safetensors file"
        )
    if dtype not in _DTYPES:
        raise SourceError(f"is of type {dtype[:32]!r}", where=where, expected=", ".join(_DTYPES))
    numbers = np.dtype(_DTYPES[dtype])
    first, last = offsets
    needed = math.prod(shape) * numbers.itemsize
    if not first <= last <= held or last - first != needed:
        raise SourceError(
            f"claims {dtype} of shape {str(shape[:8])[:200]} in bytes {first} to {last} of {held}",
            where=where,
            expected="as many bytes as the shape takes, within the file",
            remedy="Copy it again from where it was made",
        )
    storage = Storage(path, where, begin + first, math.prod(shape), numbers, dtype == "BF16")
    return storage, tuple(shape), (first, last)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_spans(spans: list[tuple[int, int]], held: int, where: str) -> None:
    """Check that the tensors lie side by side and fill the file: what the format asks for."""
    end = 0
    for first, last in spans:
        if first != end:
            fate = "overlap" if first < end else "leave a gap"
            raise SourceError(f"its tensors {fate} at byte {first} of the data", where=where)
        end = last
    if end != held:
        raise SourceError(
            f"holds {held} bytes of data for tensors of {end}",
            where=where,
            remedy="Copy it again from where it was made",
        )
