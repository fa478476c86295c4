"""The header of GGUF files, parsed with every length held against the file's size."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import file_size, reading

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _F32 = 8, 9, 0
_MOST_DIMENSIONS = 4
_SHORTEST_PAIR, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_KEPT_ENTRIES = 64
"""Entries of an array that are kept; vocabularies are skipped over."""
_DEEPEST = 2


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    where: str
    shape: tuple[int, ...]
    """Fastest axis first, as GGUF has it."""
    type: int
    offset: int
    """Byte of the file at which it begins."""


class _Cursor:
    """Reads on, and never more than the file still has."""

    def __init__(self, file: IO[bytes], size: int, where: str) -> None:
        self._file, self._size, self.where = file, size, where
        self.at = 0

    def check(self, count: int) -> None:
        if not 0 <= count <= self._size - self.at:
            raise SourceError(
                f"announces {count} bytes of which {self._size - self.at} are there",
                where=f"{self.where}, byte {self.at}",
                expected="a whole GGUF file",
                remedy="Copy it again from where it was made",
            )

    def take(self, count: int) -> bytes:
        self.check(count)
        self.at += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self.check(count)
        self.at += count
        self._file.seek(count, 1)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth == _DEEPEST:
            raise SourceError(f"has a value of type {kind}", where=f"{self.where}, byte {self.at}", expected="0 to 12")
        entries, count = self.number("<I"), self.number("<Q")
        if entries in _SCALARS:
            form = _SCALARS[entries]
            width = struct.calcsize(form)
            self.check(count * width)
            kept = [self.number(form) for _ in range(min(count, _KEPT_ENTRIES))]
            self.skip((count - len(kept)) * width)
            return kept
        self.check(count * 8)  # of strings and of arrays each has a length at least
        kept = []
        for i in range(count):
            entry = self.value(entries, depth + 1)
            if i < _KEPT_ENTRIES:
                kept.append(entry)
        return kept


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the metadata of a GGUF file and its tensors' places, by name.

    Raises
    ------
    SourceError
        If it is no GGUF of version 2 or 3, or announces more than the file holds.
    """
    where = str(path)
    with reading(where), path.open("rb") as file:
        cursor = _Cursor(file, file_size(path), where)
        magic, version = cursor.take(4), cursor.number("<I")
        if magic != MAGIC or version not in (2, 3):
            raise SourceError(f"is GGUF version {version}", where=where, expected="version 2 or 3, little-endian")
        tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
        cursor.check(tensors * _SHORTEST_TENSOR + pairs * _SHORTEST_PAIR)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.number("<I"))
        described = [_tensor(cursor) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise SourceError(f"has the alignment {alignment!r:.40}", where=where, expected="a small power of two")
        data = -(-cursor.at // alignment) * alignment
    infos = {name: TensorInfo(f"{where}[{name}]", shape, kind, data + at) for name, shape, kind, at in described}
    if len(infos) != tensors:
        raise SourceError("names a tensor twice", where=where)
    return metadata, infos


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = cursor.text(), cursor.number("<I")
    if axes > _MOST_DIMENSIONS:
        raise SourceError(f"{name[:60]!r} has {axes} axes", where=cursor.where, expected=f"at most {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number("<Q") for _ in range(axes))
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def load_f32(path: Path, info: TensorInfo) -> NDArray[np.float32]:
    """Return the elements of an F32 tensor, flat.

    Raises
    ------
    SourceError
        If it is of another type, or reaches beyond the end of the file.
    """
    if info.type != _F32:
        raise SourceError(f"is of type {info.type}", where=info.where, expected=f"{_F32}, F32")
    size = math.prod(info.shape) * 4
    if info.offset + size > file_size(path):
        raise SourceError(
            f"claims {size} bytes from byte {info.offset} on of {file_size(path)}",
            where=info.where,
            expected="a tensor within the file",
            remedy="Copy it again from where it was made",
        )
    with reading(info.where), path.open("rb") as file:
        file.seek(info.offset)
        return np.frombuffer(file.read(size), "<f4")
