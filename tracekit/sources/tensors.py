"""Tensors that lie uncompressed in a file: checked against its size, mapped into memory where they are asked for.

Those that are in memory already stand beside them, with the same methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import allocate, reading, row_by_row

_MOST_AXES = 64
_CONVERTED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements of one type in a file."""

    path: Path
    where: str
    """File and member, for messages."""
    offset: int
    """Bytes of the file before it."""
    count: int
    """Elements."""
    dtype: np.dtype[Any]
    bfloat16: bool = False
    """True where the 16-bit words of ``dtype`` are the upper halves of 32-bit floats."""


class Tensor:
    """A strided view of a `Storage`; its shape at once, its elements when they are asked for.

    Parameters
    ----------
    storage
        Where the elements lie; already held against the file's size.
    start
        Element of the storage that is the first of the tensor.
    shape, strides
        Of the tensor, in elements.

    Raises
    ------
    SourceError
        If the tensor reaches beyond its storage, or claims more elements than that has (which only a view that
        repeats them could hold, and that would be as large as a file says it is).
    """

    def __init__(self, storage: Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.where, self.shape = storage.where, shape
        self._storage, self._start, self._strides = storage, start, strides
        if len(shape) != len(strides) or len(shape) > _MOST_AXES or min((*shape, *strides, start), default=0) < 0:
            raise SourceError(f"claims the impossible shape {_short(shape)}", where=self.where)
        size = math.prod(shape)
        last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if size and (last >= storage.count or size > storage.count):
            raise SourceError(
                f"claims shape {_short(shape)} ({size} elements up to number {last}) of a storage of "
                f"{storage.count} elements",
                where=self.where,
                expected="a tensor that lies within its storage",
                remedy="Copy the file again; save an expanded tensor with .contiguous()",
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements that `load` returns."""
        return np.dtype(np.float32) if self._storage.bfloat16 else self._storage.dtype

    def load(self) -> NDArray[Any]:
        """Return the elements as a read-only memory map (bfloat16: as a float32 copy)."""
        storage = self._storage
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        with reading(self.where):
            mapped: NDArray[Any] = np.memmap(storage.path, storage.dtype, "r", storage.offset, (storage.count,))
        flat = np.asarray(mapped)[self._start :]
        steps = tuple(step * storage.dtype.itemsize for step in self._strides)
        view: NDArray[Any] = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        return _widened(view) if storage.bfloat16 else view

    def rows(self) -> Callable[[int], NDArray[Any]]:
        """Return a function that gives the next ``n`` rows of the first axis on each call; to be called once."""
        return row_by_row(self.load())

    def close(self) -> None:
        """Nothing is open: a memory map ends with its arrays."""


class Held:
    """An array that is in memory already."""

    def __init__(self, array: NDArray[Any], where: str) -> None:
        self.where = where
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._array.dtype

    def load(self) -> NDArray[Any]:
        """Return the array."""
        return self._array

    def rows(self) -> Callable[[int], NDArray[Any]]:
        """Return a function that gives the next ``n`` rows of the first axis on each call."""
        return row_by_row(self._array)

    def close(self) -> None:
        """Nothing is open."""


def contiguous(storage: Storage, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this shape, in C order, that begins where its storage begins."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Tensor(storage, 0, shape, strides)


def _widened(words: NDArray[Any]) -> NDArray[np.float32]:
    """Return bfloat16 words as float32."""
    out = allocate(words.shape, np.float32)
    step = max(1, _CONVERTED_AT_ONCE // max(1, math.prod(words.shape[1:]))) if words.ndim else 1
    if not words.ndim:
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    for start in range(0, len(words), step):
        wide = words[start : start + step].astype(np.uint32) << np.uint32(16)
        out[start : start + step] = wide.view(np.float32)
    return out


def _short(shape: tuple[int, ...]) -> str:
    shown = ", ".join(f"{n:.3g}" if n >= 1 << 63 else str(n) for n in shape[:8])
    return f"({shown}, …)" if len(shape) > 8 else f"({shown})"
