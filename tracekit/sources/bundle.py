"""Named arrays in one file, whichever of ``.npz``, ``.safetensors`` and torch's ``.pt`` it is."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import scalar_text
from tracekit.sources.files import file_size
from tracekit.sources.npy import Member, open_npz
from tracekit.sources.safetensors import is_safetensors, read_safetensors
from tracekit.sources.tensors import Held, Tensor
from tracekit.sources.torchfile import PickledArray, is_torch, load_torch

_LARGEST_TEXT = 1 << 26
"""Bytes of all strings of a file that are looked at; numpy takes four for a character."""

TORCH_VALUES = (Tensor, PickledArray)


class Item(Protocol):
    """One array: its shape at once, its elements when they are asked for."""

    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    def load(self) -> NDArray[Any]:
        """Return the whole array; to be called once."""

    def rows(self) -> Callable[[int], NDArray[Any]]:
        """Return a function that gives the next ``n`` rows of the first axis on each call; to be called once."""

    def close(self) -> None:
        """Let go of what it holds open."""


class Bundle:
    """The arrays of a file by name, and the strings beside them."""

    def __init__(self, path: Path, head: bytes) -> None:
        self.path, self.where = path, str(path)
        self._archive: zipfile.ZipFile | None = None
        self._infos: Mapping[str, zipfile.ZipInfo] = {}
        self._items: dict[str, Item] = {}
        self._texts: dict[str, str] = {}
        self.content: Any = None
        """What a ``.pt`` file holds, where that is no mapping."""
        if is_safetensors(head):
            tensors, self._texts = read_safetensors(path)
            self._items = dict(tensors)
        elif is_torch(path, head):
            self._fill(load_torch(path))
        else:
            self._archive, self._infos = open_npz(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for item in self._items.values():
            item.close()
        if self._archive is not None:
            self._archive.close()

    def __contains__(self, key: str) -> bool:
        return key in self._items or key in self._infos

    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return [*self._infos, *(key for key in self._items if key not in self._infos)]

    def item(self, key: str) -> Item | None:
        """Return one array, None where there is none of that name."""
        if key not in self._items and key in self._infos:
            assert self._archive is not None
            self._items[key] = Member(self.path, self._archive, self._infos[key])
        return self._items.get(key)

    def array(self, key: str) -> NDArray[Any] | None:
        """Return the elements of one array."""
        item = self.item(key)
        return None if item is None else item.load()

    def ints(self, key: str) -> NDArray[np.int64] | None:
        """Return whole numbers, at most one axis of them."""
        array = self.array(key)
        if array is None:
            return None
        if array.dtype.kind not in "ui" or array.ndim > 1:
            raise SourceError(
                f"{key} is {array.dtype} of shape {array.shape}", where=self.where, expected="whole numbers, one axis"
            )
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise SourceError(f"{key} holds {array.max()}", where=self.where, expected="numbers that fit 63 bits")
        return array.astype(np.int64)

    def scalar(self, key: str) -> int | None:
        """Return one whole number."""
        array = self.ints(key)
        if array is None:
            return None
        if array.size != 1:
            raise SourceError(f"{key} has {array.size} entries", where=self.where, expected="one number")
        return int(array.reshape(-1)[0])

    def texts(self, requests: int | None, known: Sequence[str] | frozenset[str] = ()) -> dict[str, list[str]]:
        """Return the strings beside the arrays: single ones, and arrays with one entry per request."""
        found = {key: [scalar_text(text) or ""] for key, text in self._texts.items()}
        left = _LARGEST_TEXT
        for key in self.names():
            info = self._infos.get(key)
            if key in known or (info is not None and not info.filename.endswith(".npy")):
                continue
            if info is not None and info.file_size > _LARGEST_TEXT:
                continue
            item = self.item(key)
            if item is None or item.dtype.kind not in "US":
                continue
            if item.shape != () and (requests is None or item.shape != (requests,)):
                continue
            left -= math.prod(item.shape) * item.dtype.itemsize
            if left < 0:
                raise SourceError(
                    f"its texts up to {key[:60]!r} take more than {_LARGEST_TEXT} bytes",
                    where=self.where,
                    expected="labels",
                )
            values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in item.load().reshape(-1)]
            found[key] = [scalar_text(str(v)) or "" for v in values]
        return found

    def _fill(self, content: Any) -> None:
        if not isinstance(content, dict):
            self.content = content
            return
        made: dict[int, Item | None] = {}  # a list that many keys share is made an array once
        for key, value in content.items():
            if id(value) not in made:
                made[id(value)] = as_item(value, f"{self.path}[{str(key)[:100]}]")
            item = made[id(value)]
            if item is not None:
                self._items[str(key)] = item
            elif isinstance(value, str):
                self._texts[str(key)] = value
        self.content = content


def as_item(value: Any, where: str) -> Item | None:
    """Return a value of a ``.pt`` file as an array; None for what is none (containers of arrays, strings, nothing)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, PickledArray):
        return Held(value.load(), where)  # says which key it is; itself it knows only the pickle
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return None
    if isinstance(value, int):
        return Held(np.array(value), where) if abs(value) < 1 << 62 else None
    kinds = {type(entry) for entry in value}
    if kinds == {int} and all(abs(entry) < 1 << 62 for entry in value):
        return Held(np.array(value, np.int64), where)
    if kinds == {str} and sum(map(len, value)) <= _LARGEST_TEXT and max(map(len, value)) * len(value) <= _LARGEST_TEXT:
        return Held(np.array([text.encode("utf-8", "replace").decode() for text in value]), where)
    return None


def refuse_shared(items: Iterable[Item], path: Path) -> None:
    """Refuse arrays that together are larger than their file: views of one storage, told as many.

    Raises
    ------
    SourceError
        If they are larger than twice the file (bfloat16 doubles when it is read).
    """
    total, size = 0, file_size(path)
    for item in items:
        total += math.prod(item.shape) * item.dtype.itemsize
        if total > 2 * size:
            raise SourceError(
                f"its arrays add up to more than the {size} bytes of the file: the same bytes are told again and again",
                where=str(path),
                expected="arrays of their own for each request",
                remedy="Save copies (tensor.clone()), not views",
            )
