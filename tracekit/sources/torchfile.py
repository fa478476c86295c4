"""Torch's ``.pt`` files, read without torch: the pickle by a machine that runs nothing, the tensors by memory map.

A file of ``torch.save`` (since 1.6) is a zip archive of stored members: ``NAME/data.pkl``, a pickle in which each
tensor refers to a storage, and ``NAME/data/KEY``, the bytes of the storages.
"""

from __future__ import annotations

import math
import mmap
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources import pickles
from tracekit.sources.files import file_size, reading
from tracekit.sources.npy import stored_offset
from tracekit.sources.pickles import Buildable, Name
from tracekit.sources.tensors import Held, Storage, Tensor

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch before 1.6 (or of ``_use_new_zipfile_serialization=False``) begins."""

_PICKLE = "data.pkl"
_NUMBERS = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint64": "u8",
    "uint32": "u4",
    "uint16": "u2",
    "uint8": "u1",
    "bool": "?",
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": None,
}
_NUMPY_KINDS = "biuf"
_NUMPY_SIZES = (1, 2, 4, 8)
_LONGEST_TEXT = 1 << 16


class PickledArray(Held, Buildable):
    """A numpy array (or scalar) whose bytes are in the pickle; made by numpy from the bytes, not by its own globals."""

    def __init__(self, where: str) -> None:
        super().__init__(np.empty(0, np.uint8), where)

    def build(self, state: Any) -> None:
        """Take ``(version, shape, dtype, is_fortran, bytes)``."""
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, fortran is True)

    def fill(self, data: object, dtype: object, shape: object, fortran: bool) -> None:
        """Hold the shape against the bytes and take them."""
        if not isinstance(data, bytes) or not isinstance(dtype, _DType) or not isinstance(shape, tuple):
            raise TypeError("a numpy array of Python objects")
        if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise ValueError("a numpy array of an impossible shape")
        numbers = dtype.numbers()
        if math.prod(shape) * numbers.itemsize != len(data):
            raise ValueError(f"a numpy array of another size than its {len(data)} bytes")
        self._array = np.frombuffer(data, numbers).reshape(shape, order="F" if fortran else "C")


class _DType(Buildable):
    """``numpy.dtype`` of a plain number."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code[:1] not in _NUMPY_KINDS or not code[1:].isdecimal():
            raise TypeError("a numpy array of something else than numbers")
        if int(code[1:]) not in _NUMPY_SIZES:
            raise TypeError("a numpy array of numbers of an unknown size")
        self._code, self._order = code, "="

    def build(self, state: Any) -> None:
        """Take ``(version, byte order, …)``."""
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError("a numpy array of an unknown byte order")
        self._order = str(order)

    def numbers(self) -> np.dtype[Any]:
        """Return the type; ``=`` in a file means the machine that wrote it, which all but wholly was little-endian."""
        return np.dtype(("<" if self._order == "=" else self._order) + self._code)


class _Archive:
    """The members of a ``.pt`` file."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, file_size(path)
        with reading(str(path)), zipfile.ZipFile(path) as archive:
            self._infos: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if info.filename in self._infos:
                    raise SourceError(f"holds {info.filename!r} twice", where=str(path), expected="one member a name")
                self._infos[info.filename] = info
        pickled = [name for name in self._infos if name == _PICKLE or name.endswith(f"/{_PICKLE}")]
        if len(pickled) != 1:
            raise SourceError(
                f"holds {len(pickled)} members named {_PICKLE}",
                where=str(path),
                expected="a file that torch.save wrote",
            )
        self._prefix = pickled[0].removesuffix(_PICKLE)
        if f"{self._prefix}constants.pkl" in self._infos:
            raise SourceError(
                "is a TorchScript module, which is code",
                where=str(path),
                expected="tensors that torch.save wrote",
            )

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._infos

    def where(self, name: str) -> str:
        """Return how messages call a member."""
        return f"{self.path}[{name}]"

    def span(self, name: str) -> tuple[int, int]:
        """Return where a member's bytes begin in the file, and how many they are."""
        where, info = self.where(name), self._infos.get(self._prefix + name)
        if info is None:
            raise SourceError("is missing in the archive", where=where, remedy="Copy the file again")
        if info.flag_bits & 0x1 or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise SourceError(
                f"is packed ({info.compress_size} bytes for {info.file_size})",
                where=where,
                expected="members stored as they are, as torch.save writes them",
                remedy="Load and save it again with torch",
            )
        return stored_offset(self.path, info, where), info.file_size

    def bytes_of(self, name: str) -> bytes:
        """Return a member's bytes, compared with their checksum."""
        self.span(name)
        with reading(self.where(name)), zipfile.ZipFile(self.path) as archive:
            return archive.read(self._infos[self._prefix + name])

    def little_endian(self) -> bool:
        """Whether the storages were written by a little-endian machine, as torch assumes where nothing says it."""
        order = self.bytes_of("byteorder") if "byteorder" in self else b"little"
        if order not in (b"little", b"big"):
            raise SourceError(f"is {order[:16]!r}", where=self.where("byteorder"), expected="little or big")
        return order == b"little"


class _Loader:
    """What the globals of a torch pickle stand for."""

    def __init__(self, archive: _Archive) -> None:
        self._archive, self._order = archive, "<" if archive.little_endian() else ">"
        self._storages: dict[str, tuple[int, int]] = {}
        self.names = self._table()

    def storage(self, given: object) -> _StorageRef:
        """Make the stand-in of ``('storage', type, key, location, count)``."""
        if not isinstance(given, tuple) or len(given) != 5 or given[0] != "storage":
            raise TypeError("a persistent id that is no storage")
        _, kind, key, _, count = given
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(count) is not int:
            raise TypeError("a persistent id that is no storage")
        if key not in self._storages:
            self._storages[key] = self._archive.span(f"data/{key}")
        offset, held = self._storages[key]
        size = count * (_itemsize(kind.dtype) if kind.dtype else 1)
        if not 0 <= size <= held:
            raise SourceError(
                f"claims {count} elements of {kind.dtype or 'one byte'} but holds {held} bytes",
                where=self._archive.where(f"data/{key}"),
                remedy="Copy the file again",
            )
        return _StorageRef(key, kind.dtype, offset, size)

    def tensor(self, reference: _StorageRef, start: int, shape: Any, strides: Any, dtype: str | None) -> Tensor:
        """Make a tensor; ``dtype`` is used where the storage has no type of its own."""
        if not isinstance(reference, _StorageRef) or type(start) is not int:
            raise TypeError("a tensor without a storage")
        if not all(isinstance(axes, tuple) and all(type(n) is int for n in axes) for axes in (shape, strides)):
            raise TypeError("a tensor without a shape")
        dtype = reference.dtype or dtype
        if dtype is None:
            raise TypeError("a tensor of an unknown type")
        numbers = np.dtype(self._order + _NUMBERS[dtype])
        storage = Storage(
            self._archive.path,
            self._archive.where(f"data/{reference.key}"),
            reference.offset,
            reference.size // numbers.itemsize,
            numbers,
            dtype == "bfloat16",
        )
        return Tensor(storage, start, shape, strides)

    def _table(self) -> dict[tuple[str, str], Name]:
        where = self._archive.where(_PICKLE)
        table: dict[tuple[str, str], Name] = {}

        def allow(modules: Iterable[str], name: str, call: Callable[..., Any] | None = None) -> None:
            for module in modules:
                table[module, name] = Name(f"{module}.{name}", call)

        def array(_kind: object, _shape: object, _code: object) -> PickledArray:
            return PickledArray(where)

        def filled(data: object, dtype: object, shape: object, order: object) -> PickledArray:
            made = PickledArray(where)
            made.fill(data, dtype, shape, order == "F")
            return made

        def tensor_v2(storage: Any, start: Any, shape: Any, strides: Any, *_: object) -> Tensor:
            return self.tensor(storage, start, shape, strides, None)

        def tensor_v3(storage: Any, start: Any, shape: Any, strides: Any, _g: object, _h: object, dtype: Any) -> Tensor:
            if not isinstance(dtype, _TorchDType):
                raise TypeError("a tensor of an unknown type")
            return self.tensor(storage, start, shape, strides, dtype.text)

        builtin = ("builtins", "__builtin__")
        for kind in ("list", "dict", "int", "float", "str", "bool"):
            allow(builtin, kind)
        allow(builtin, "set", lambda values=(): pickles.scalar_set(_sequence(values)))
        allow(builtin, "frozenset", lambda values=(): frozenset(pickles.scalar_set(_sequence(values))))
        allow(["collections"], "OrderedDict", _ordered)
        allow(["collections"], "defaultdict", lambda _factory=None: {})
        allow(["_codecs"], "encode", _encode)
        for package in ("numpy.core", "numpy._core"):
            allow([f"{package}.multiarray"], "_reconstruct", array)
            allow([f"{package}.multiarray"], "scalar", lambda dtype, data: filled(data, dtype, (), "C"))
            allow([f"{package}.numeric"], "_frombuffer", filled)
        allow(["numpy"], "ndarray")
        allow(["numpy"], "dtype", _DType)
        allow(["torch._utils"], "_rebuild_tensor_v2", tensor_v2)
        allow(["torch._utils"], "_rebuild_tensor_v3", tensor_v3)
        allow(["torch._utils"], "_rebuild_parameter", _parameter)
        allow(["torch"], "Size", lambda sizes=(): tuple(_sequence(sizes)))
        allow(["torch"], "device", lambda *parts: ":".join(str(part)[:32] for part in parts if _is_scalar(part)))
        for name, dtype in _STORAGES.items():
            for module in ("torch", "torch.storage"):
                table[module, name] = _StorageType(f"{module}.{name}", dtype=dtype)
        for dtype in _NUMBERS:
            table["torch", dtype] = _TorchDType(dtype)
        return table


@dataclass(frozen=True, slots=True)
class _StorageType(Name):
    """A torch storage class, which fixes the type of its elements unless it is untyped."""

    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class _TorchDType(Name):
    """A torch dtype; ``text`` is its name without the module."""


@dataclass(frozen=True, slots=True)
class _StorageRef:
    """A storage of the file: its bytes, and its type where its class fixes one."""

    key: str
    dtype: str | None
    offset: int
    size: int


def _itemsize(dtype: str) -> int:
    return np.dtype(_NUMBERS[dtype]).itemsize


def _is_scalar(value: object) -> bool:
    return isinstance(value, str) or (type(value) is int and abs(value) < 1 << 31)


def _sequence(values: Any) -> list[Any]:
    if not isinstance(values, list | tuple | set | frozenset):
        raise TypeError("a set or a shape of something else than items")
    return list(values)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise TypeError("an OrderedDict of something else than items")
    keys = [pair[0] for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(keys) != len(pairs):
        raise TypeError("an OrderedDict of something else than items")
    pickles.scalar_set(keys)
    return {pair[0]: pair[1] for pair in pairs}


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _parameter(tensor: Any, *_: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("a parameter that is no tensor")
    return tensor


def is_torch(path: Path, head: bytes) -> bool:
    """Whether a file is a zip archive with a torch pickle in it."""
    if not head.startswith(ZIP_MAGIC):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name == _PICKLE or name.endswith(f"/{_PICKLE}") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def mentions(path: Path, *words: str) -> bool:
    """Whether each word occurs in the pickle of a ``.pt`` file: a quick look that parses nothing."""
    archive = _Archive(path)
    offset, size = archive.span(_PICKLE)
    with reading(str(path)), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(data.find(word.encode(), offset, offset + size) >= 0 for word in words)


def load_torch(path: Path) -> Any:
    """Return what ``torch.save`` stored: containers, scalars, `Tensor` and `PickledArray`, on no device.

    Raises
    ------
    SourceError
        If the file is no such archive, is damaged, claims more than it holds, or names anything that is not data.
    """
    with reading(str(path)), path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not head.startswith(ZIP_MAGIC):
        raise not_an_archive(path, head)
    archive = _Archive(path)
    data, loader = archive.bytes_of(_PICKLE), _Loader(archive)
    return pickles.load(data, archive.where(_PICKLE), loader.names, loader.storage)


def not_an_archive(path: Path, head: bytes) -> SourceError:
    """Return the error for a file that ``torch.save`` may have written, but not as an archive."""
    what = "in torch's format from before 1.6" if head.startswith(LEGACY_MAGIC) else "no archive of torch.save"
    return SourceError(
        f"is {what}",
        where=str(path),
        expected="the zip format that torch.save writes",
        remedy="Load it with torch and save it again; without _use_new_zipfile_serialization=False",
    )
