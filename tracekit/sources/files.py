"""Files and buffers: listing sources, errors of the operating system in tracekit's words, big buffers."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tracekit.errors import SourceError

HEAD_BYTES = 1 << 16
"""How much of a file a reader sees when the format is detected."""
IN_MEMORY = 1 << 28
"""Buffers above this many bytes live in a temporary file, so that memory stays bounded."""
RELEASE_BYTES = 1 << 25
"""Bytes of a memory map that are read before its pages are given back."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what a damaged or unreadable file makes the standard library raise into `SourceError`."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror or error})", where=where) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError) as error:
        raise SourceError(
            f"is damaged or truncated ({error})", where=where, remedy="Copy it again from where it was made"
        ) from error


def fault(error: Exception) -> str:
    """Return what a parser found wrong, without the advice that it gives to programmers."""
    return str(error).partition("\n")[0].partition("; use sys.")[0].rstrip(".")


def read_head(path: Path) -> bytes:
    """Return the beginning of a file; an empty one is an error."""
    with reading(str(path)), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise SourceError("is empty", where=str(path), expected="a routing trace")
    return head


def file_size(path: Path) -> int:
    """Size in bytes."""
    with reading(str(path)):
        return path.stat().st_size


def allocate(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Return an uninitialised array, backed by an unlinked temporary file where it is large."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if size <= IN_MEMORY:
        return np.empty(tuple(shape), dtype)
    with tempfile.TemporaryFile(prefix="tracekit-") as file:
        os.truncate(file.fileno(), size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=tuple(shape)))


def release(array: NDArray[Any]) -> None:
    """Give the pages of a memory-mapped array back to the system; they are read again where they are needed.

    Without this a pass over a mapping larger than memory counts, page by page, as memory of the process.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    # All mappings here are shared ones: written pages are in the file, not lost.
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def row_by_row(array: NDArray[Any]) -> Callable[[int], NDArray[Any]]:
    """Return a function that gives the next ``n`` rows of the first axis on each call, and releases those before."""
    row = touched = 0
    width = array[:1].nbytes

    def following(count: int) -> NDArray[Any]:
        nonlocal row, touched
        touched += width * count
        if touched >= RELEASE_BYTES:
            release(array)
            touched = 0
        row += count
        return array[row - count : row]

    return following


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths, without hidden ones and those that may never end."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from walk(path)
        elif entry.is_file() or not is_endless(path):
            yield path


def is_endless(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket: reading it may block, or never end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def stem(path: Path) -> str:
    """Path without its last suffix, with forward slashes: a request's default id, from the path below its folder."""
    return path.with_suffix("").as_posix().encode("utf-8", "replace").decode("utf-8")
