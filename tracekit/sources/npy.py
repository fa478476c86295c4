"""numpy files, read without ever unpickling and without believing what a header claims."""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import IN_MEMORY, allocate, fault, file_size, reading, row_by_row

MAGIC = b"\x93NUMPY"
_DEFLATE_LIMIT = 1032
"""No deflate stream expands further than this."""
_BOMB_RATIO = 200
"""Routing ids never compress this well; only looked at for big members."""
_LENGTH = {(1, 0): "<H", (2, 0): "<I"}
"""How each version writes the length of its header."""
_LONGEST_HEADER = 1 << 16
_PIECE = 1 << 22
_MOST_AXES = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What an npy header says, checked against the bytes that follow it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int
    """Bytes before the data."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes], size: int, where: str) -> Header:
    """Read an npy header and check that the rest of the ``size`` bytes is exactly its data.

    Raises
    ------
    SourceError
        If this is no npy file, needs unpickling, or its shape is not what the bytes hold.
    """
    try:
        version = npy_format.read_magic(file)
        if version not in _LENGTH:
            raise SourceError(f"is npy version {version}", where=where, expected="version 1.0 or 2.0")
        length = file.read(struct.calcsize(_LENGTH[version]))
        text = file.read(min(struct.unpack(_LENGTH[version], length)[0], _LONGEST_HEADER))
        shape, fortran, dtype = _parse_header(version, length + text)
    except SourceError:
        raise
    except Exception as error:  # a hostile header makes numpy's parser raise nearly anything
        raise SourceError(
            f"has no readable npy header ({fault(error)})",
            where=where,
            expected="an array saved by numpy.save or numpy.savez",
        ) from error
    if dtype.hasobject:
        raise SourceError(
            "holds Python objects, which only unpickling could load",
            where=where,
            expected="an integer array",
            remedy="Save it as integers: numpy.asarray(ids, dtype='uint16'); tracekit never unpickles",
        )
    if any(not 0 <= n < 1 << 62 for n in shape) or len(shape) > _MOST_AXES:
        raise SourceError("claims an impossible shape", where=where, expected="an array that numpy could save")
    header = Header(tuple(int(n) for n in shape), dtype, bool(fortran), file.tell())
    held = size - header.offset
    if header.nbytes != held:
        fate = "truncated" if held < header.nbytes else "longer than one array"
        raise SourceError(
            f"claims shape {header.shape} of {dtype} ({header.nbytes} bytes) but holds {held} bytes: {fate}",
            where=where,
            remedy="Save one array per file again with numpy.save" if held > header.nbytes else "Copy it again",
        )
    return header


@lru_cache(maxsize=64)
def _parse_header(version: tuple[int, int], text: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and type; a folder of arrays has the same header again and again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        return read(io.BytesIO(text))


def map_npy(path: Path) -> NDArray[Any]:
    """Memory-map a ``.npy`` file."""
    with reading(str(path)), path.open("rb") as file:
        header = read_header(file, os.fstat(file.fileno()).st_size, str(path))
        return _map(file, header, header.offset)


def npy_shape(path: Path) -> tuple[int, ...]:
    """Shape in the header of a ``.npy`` file."""
    size = file_size(path)
    with reading(str(path)), path.open("rb") as file:
        return read_header(file, size, str(path)).shape


def parse_npy(data: bytes, where: str) -> NDArray[Any]:
    """Read an npy file held in memory, without a copy."""
    file = io.BytesIO(data)
    header = read_header(file, len(data), where)
    array = np.frombuffer(data, header.dtype, offset=header.offset)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _map(file: IO[bytes], header: Header, offset: int) -> NDArray[Any]:
    if not header.nbytes:
        return np.empty(header.shape, header.dtype)
    # Not np.memmap, which resolves the path each time: many requests are small files.
    mapped = mmap.mmap(file.fileno(), offset + header.nbytes, access=mmap.ACCESS_READ)
    return np.ndarray(header.shape, header.dtype, mapped, offset, order="F" if header.fortran else "C")


class Member:
    """One array of an ``.npz``: its header at once, its data when asked for.

    Stored members are memory-mapped in place, compressed ones are unpacked piece by piece.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.path = path
        self.where = f"{path}[{info.filename.removesuffix('.npy')}]"
        self._archive = archive
        self._info = info
        self._unpacked = 0
        self._check_size()
        with reading(self.where):
            # The stream stays where the data begins: most members are read once, right after their header.
            self._stream: IO[bytes] = archive.open(info)
            try:
                self.header = read_header(self._stream, info.file_size, self.where)
            except BaseException:
                self._stream.close()
                raise

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.header.dtype

    def close(self) -> None:
        """Close the member's stream, which keeps the archive's file open."""
        self._stream.close()

    def load(self) -> NDArray[Any]:
        """Return the whole array; to be called once."""
        if self._info.compress_type == zipfile.ZIP_STORED:
            offset = stored_offset(self.path, self._info, self.where) + self.header.offset
            with reading(self.where), self.path.open("rb") as file:
                return _map(file, self.header, offset)
        self._refuse_bomb()
        flat = self._unpack(math.prod(self.shape))
        return flat.reshape(self.shape, order="F" if self.header.fortran else "C")

    def rows(self) -> Callable[[int], NDArray[Any]]:
        """Return a function that gives the next ``n`` rows of the first axis on each call; to be called once."""
        if self.header.fortran or self._info.compress_type == zipfile.ZIP_STORED:
            return row_by_row(self.load())
        self._refuse_bomb()
        width = math.prod(self.shape[1:])
        return lambda count: self._unpack(count * width).reshape(count, *self.shape[1:])

    def _unpack(self, count: int) -> NDArray[Any]:
        """Return the next ``count`` elements of a compressed member."""
        flat = allocate([count], self.dtype)
        target, done = flat.view(np.uint8), 0
        with reading(self.where):
            while done < target.size:
                piece = self._stream.read(min(_PIECE, target.size - done))
                if not piece:
                    raise SourceError(f"ends {target.size - done} bytes too early: truncated", where=self.where)
                target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)
            self._unpacked += count
            if self._unpacked == math.prod(self.shape):
                self._stream.read(1)  # the end of the stream is where zipfile compares the checksum
        return flat

    def _check_size(self) -> None:
        info = self._info
        if info.flag_bits & 0x1:
            raise SourceError("is encrypted", where=self.where)
        if info.compress_type == zipfile.ZIP_STORED:
            plausible = info.file_size == info.compress_size
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            plausible = info.file_size <= info.compress_size * _DEFLATE_LIMIT
        else:
            raise SourceError(f"is compressed by method {info.compress_type}", where=self.where, expected="numpy's own")
        if not plausible or info.compress_size > file_size(self.path):
            raise SourceError(
                f"claims {info.file_size} bytes packed into {info.compress_size}, which is impossible", where=self.where
            )

    def _refuse_bomb(self) -> None:
        info = self._info
        if info.file_size > IN_MEMORY and info.file_size > info.compress_size * _BOMB_RATIO:
            raise SourceError(
                f"unpacks {info.compress_size} bytes to {info.file_size}: constant filler, not routing",
                where=self.where,
                remedy="If it is real, save it uncompressed with numpy.savez",
            )


def stored_offset(path: Path, info: zipfile.ZipInfo, where: str) -> int:
    """Return where a stored member's bytes begin: its local header has its own name and extra field.

    Raises
    ------
    SourceError
        If the header is missing or the member reaches beyond the end of the archive.
    """
    with reading(where), path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) != 30 or not local.startswith(b"PK\x03\x04"):
            raise SourceError("has no local header: damaged archive", where=where)
        name, extra = struct.unpack("<HH", local[26:30])
        offset = info.header_offset + 30 + int(name) + int(extra)
    if offset + info.compress_size > file_size(path):
        raise SourceError("reaches beyond the end of the archive", where=where)
    return offset


def open_npz(path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Open an ``.npz`` and return its members by key."""
    with reading(str(path)):
        archive = zipfile.ZipFile(path)
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        key = info.filename.removesuffix(".npy")
        if key in members:
            archive.close()
            raise SourceError(f"holds two arrays named {key!r}", where=str(path))
        members[key] = info
    return archive, members
