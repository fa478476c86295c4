"""Writes what ``torch.save`` writes, byte by byte, without torch: opcodes of pickle protocol 2, a zip of storages."""

from __future__ import annotations

import struct
import zipfile

import numpy as np

STORAGES = {
    "f8": "DoubleStorage",
    "f4": "FloatStorage",
    "f2": "HalfStorage",
    "i8": "LongStorage",
    "i4": "IntStorage",
    "i2": "ShortStorage",
    "i1": "CharStorage",
    "u1": "ByteStorage",
    "b1": "BoolStorage",
}


def text(value):
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    """BININT1, BININT2, BININT or LONG1."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module, attribute):
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


class View:
    """A tensor as torch pickles it: a strided view of a storage."""

    def __init__(self, storage, shape=None, strides=None, offset=0, *, bfloat16=False, kind=None, count=None):
        self.storage = np.ascontiguousarray(storage).reshape(-1)
        array = np.asarray(storage)
        self.shape = array.shape if shape is None else shape
        plain = [int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape))]
        self.strides = plain if strides is None else strides
        self.offset, self.bfloat16, self.kind, self.count = offset, bfloat16, kind, count


class Writer:
    """Pickles containers, numbers, strings and tensors, and keeps the storages."""

    def __init__(self, byteorder="<"):
        self.storages = []
        self.byteorder = byteorder

    def pickle(self, value):
        return b"\x80\x02" + self.one(value) + b"."

    def one(self, value):
        if isinstance(value, bytes):
            return value  # opcodes written by hand
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            return b"]" + (b"(" + b"".join(map(self.one, value)) + b"e" if value else b"")
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.one, value)) + b"t"
        if isinstance(value, dict):
            pairs = b"".join(self.one(key) + self.one(item) for key, item in value.items())
            return b"}" + (b"(" + pairs + b"u" if value else b"")
        if isinstance(value, np.ndarray):
            value = View(value)
        if isinstance(value, View):
            return self.tensor(value)
        raise TypeError(type(value))

    def tensor(self, view):
        code = view.storage.dtype.str[1:]
        newer = code in ("u2", "u4", "u8")
        storage = "UntypedStorage" if newer else "BFloat16Storage" if view.bfloat16 else STORAGES[code]
        key = str(len(self.storages))
        self.storages.append(view.storage.astype(np.dtype(self.byteorder + code)).tobytes())
        count = view.storage.nbytes if newer else view.storage.size
        module = "torch.storage" if newer else "torch"
        number = count if view.count is None else view.count
        reference = ("storage", name(module, view.kind or storage), key, "cuda:0", number)
        rebuild = name("torch._utils", "_rebuild_tensor_v3" if newer else "_rebuild_tensor_v2")
        hooks = name("collections", "OrderedDict") + b")R"
        arguments = [self.one(reference) + b"Q", view.offset, tuple(view.shape), tuple(view.strides), False, hooks]
        if newer:
            arguments.append(name("torch", f"uint{8 * view.storage.itemsize}"))
        return rebuild + self.one(tuple(arguments)) + b"R"


def numpy_array(array):
    """Opcodes of a numpy array as protocol 2 pickles it: bytes as a latin-1 string."""
    array = np.asarray(array)
    w = Writer()

    def encoded(data):
        return name("_codecs", "encode") + w.one((data.decode("latin-1"), "latin1")) + b"R"

    made = (
        name("numpy._core.multiarray", "_reconstruct") + w.one((name("numpy", "ndarray"), (0,), encoded(b"b"))) + b"R"
    )
    order = array.dtype.str[0]
    dtype = name("numpy", "dtype") + w.one((array.dtype.str[1:], False, True)) + b"R"
    dtype += w.one((3, order, None, None, None, -1, -1, 0)) + b"b"
    return made + w.one((1, tuple(array.shape), dtype, False, encoded(array.tobytes()))) + b"b"


def archive(path, pickled, storages, *, byteorder=b"little", compression=zipfile.ZIP_STORED, prefix="archive"):
    """Write the zip archive around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{prefix}/data.pkl", pickled)
        if byteorder is not None:
            file.writestr(f"{prefix}/byteorder", byteorder)
        for key, data in enumerate(storages):
            file.writestr(f"{prefix}/data/{key}", data)
        file.writestr(f"{prefix}/version", b"3\n")
    return path


def save(path, value, byteorder="<", **options):
    """Write a value as ``torch.save`` does."""
    writer = Writer(byteorder)
    pickled = writer.pickle(value)
    order = b"little" if byteorder == "<" else b"big"
    return archive(path, pickled, writer.storages, byteorder=order, **options)
