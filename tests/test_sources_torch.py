"""Torch's .pt files without torch: what they hold, what they claim, and what they would like to run."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchzip import View, Writer, archive, integer, name, numpy_array, save, text

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source, pickles
from tracekit.sources.torchfile import load_torch


def refuse(path, said):
    with pytest.raises(SourceError, match=said) as caught:
        load_torch(path)
    return str(caught.value)


def raw(path, opcodes):
    """A .pt file whose pickle is written by hand."""
    return archive(path, b"\x80\x02" + opcodes + b".", [b"\0" * 64])


def routing(tokens, layers, k, n, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, n)), axis=2)[..., :k]


# What it holds

scalars = st.none() | st.booleans() | st.integers(-(1 << 100), 1 << 100) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner)
)


@given(value=values)
def test_containers_round_trip(tmp_path_factory, value):
    path = save(tmp_path_factory.mktemp("t") / "x.pt", value)
    assert load_torch(path) == value


@given(value=values, protocol=st.sampled_from([2, 3, 4, 5]))
def test_pythons_own_pickles_of_containers(tmp_path_factory, value, protocol):
    value = {"value": value, "set": {1, 2}, "frozen": frozenset({"a"}), "bytes": b"\0\xff", "buffer": [1] * 300}
    path = archive(tmp_path_factory.mktemp("t") / "x.pt", pickle.dumps(value, protocol), [])
    assert load_torch(path) == value


@given(
    code=st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "u2", "u4", "u8", "b1"]),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    order=st.sampled_from(["<", ">"]),
)
def test_tensors_of_every_type(tmp_path_factory, code, shape, order):
    array = np.random.default_rng(0).integers(0, 2 if code == "b1" else 100, shape).astype(code)
    path = save(tmp_path_factory.mktemp("t") / "x.pt", {"ids": array}, byteorder=order)
    tensor = load_torch(path)["ids"]
    assert (tensor.shape, tensor.dtype.newbyteorder("=")) == (shape, np.dtype(code))
    assert (tensor.load() == array).all()


def test_views(tmp_path):
    base = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    holes = View(base, (2, 3, 5), (20, 5, 1), 25)
    turned = View(base, (5, 4, 3), (1, 5, 20))
    last = View(base, (1,), (7,), 59)
    empty = View(base, (0, 1 << 40), (1, 1))
    path = save(tmp_path / "x.pt", [holes, turned, last, empty])
    found = [tensor.load() for tensor in load_torch(path)]
    assert (found[0] == base[1:, 1:]).all()
    assert (found[1] == base.T).all()
    assert found[2].tolist() == [59]
    assert found[3].shape == (0, 1 << 40)
    assert not found[1].flags.writeable


def test_bfloat16(tmp_path):
    numbers = np.array([[1.5, -2.25, 3e38], [0.0, -0.0, np.inf]], np.float32)
    words = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    view = View(words.view(np.int16), bfloat16=True)
    (tensor,) = load_torch(save(tmp_path / "x.pt", [view]))
    expected = (words.astype(np.uint32) << 16).view(np.float32)
    assert tensor.dtype == tensor.load().dtype == np.float32
    assert (tensor.load().view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u2", "|u1", "<f4", "|b1", "<i8"])
def test_numpy_arrays_in_the_pickle(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = save(tmp_path / "x.pt", {"ids": numpy_array(array)})
    held = load_torch(path)["ids"]
    assert (held.load() == array).all()
    assert (held.shape, held.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpys_own_pickles(tmp_path, protocol):
    value = {"a": np.asfortranarray(np.arange(6).reshape(2, 3)), "b": np.float32(1.5), "c": np.arange(3, dtype=">i2")}
    held = load_torch(archive(tmp_path / "x.pt", pickle.dumps(value, protocol), []))
    assert all((held[key].load() == value[key]).all() for key in value)


def test_defaultdict_as_hooks_save_it(tmp_path):
    made = name("collections", "defaultdict") + name("__builtin__", "list") + b"\x85R"
    opcodes = made + text("layers.0") + b"](K\x01K\x02e" + b"s"
    assert load_torch(raw(tmp_path / "x.pt", opcodes)) == {"layers.0": [1, 2]}


# What it would run


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    path = archive(tmp_path / "x.pt", pickle.dumps({"records": Bomb(tmp_path / "ran")}, protocol), [])
    with pytest.raises(SourceError):
        load_torch(path)
    with pytest.raises(SourceError):
        open_source([path], IngestOptions(num_experts=8))
    assert not (tmp_path / "ran").exists()


HOSTILE = [
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("posix", "system"),
    ("torch", "load"),
    ("torch.serialization", "load"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "__dict__"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("collections", "OrderedDict.fromkeys"),
    ("builtins", "getattr"),
    ("tracekit.sources.torchfile", "load_torch"),
    ("no_such_module_anywhere", "x"),
]


@pytest.mark.parametrize(("module", "attribute"), HOSTILE)
@pytest.mark.parametrize("call", [b"(U", b"R", b"\x81", b""])
def test_globals_are_refused_by_name(tmp_path, module, attribute, call):
    opcodes = name(module, attribute) + (text("1+1") + b"\x85" + call[-1:] if call else b"")
    said = refuse(raw(tmp_path / "x.pt", opcodes), "imports and calls nothing")
    assert repr(module) in said
    assert repr(attribute) in said
    stacked = text(module) + text(attribute) + b"\x93"
    refuse(raw(tmp_path / "y.pt", stacked), "imports and calls nothing")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"}" + text("__class__") + b"\x85R",  # a call of a dict
        name("builtins", "list") + b"]\x85R",  # a name that is never called
        name("torch", "IntStorage") + b")R",
        name("torch", "float32") + b")R",
        name("numpy", "ndarray") + b"K\x01\x85\x85R",
        b"]}b",  # a state for a list
        name("numpy", "dtype") + text("O8") + b"\x85R",
        name("numpy", "dtype") + text("V16") + b"\x85R",
        name("numpy", "dtype") + text("f16") + b"\x85R",
        name("_codecs", "encode") + text("x") + text("rot13") + b"\x86R",
        name("collections", "OrderedDict") + b"K\x05\x85R",
        b"(iposix\nsystem\n",  # INST
        b"(" + text("x") + b"o",  # OBJ
        b"\x82\x01",  # EXT1
        b"P1\n",  # PERSID
        b"\x97",  # NEXT_BUFFER
        text("storage") + b"Q",
    ],
)
def test_what_no_pickler_of_data_writes(tmp_path, opcodes):
    refuse(raw(tmp_path / "x.pt", opcodes), r"x\.pt")


def test_legacy_files_and_code_are_refused(tmp_path):
    legacy = tmp_path / "old.pt"
    legacy.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    assert "save it again" in refuse(legacy, "from before 1.6")
    with pytest.raises(SourceError, match=r"from before 1.6"):
        open_source([legacy])
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(save(script, {}), "a") as file:
        file.writestr("archive/constants.pkl", b"\x80\x02).")
    refuse(script, "TorchScript")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(SourceError, match="a Python pickle, which is never loaded"):
        open_source([tmp_path / "plain.pkl"])


# What it claims


@pytest.mark.parametrize(
    "view",
    [
        View(np.zeros(4, np.int32), (5,)),
        View(np.zeros(4, np.int32), (4,), (1,), 1),
        View(np.zeros(4, np.int32), (2, 2), (3, 1)),
        View(np.zeros(4, np.int32), (1 << 60,), (0,)),
        View(np.zeros(4, np.int32), (1 << 20, 1 << 20, 1 << 20)),
        View(np.zeros(4, np.int32), (1 << 62, 1 << 62)),
        View(np.zeros(4, np.int32), (8,), (0,)),
        View(np.zeros(4, np.int32), (-1, 4)),
        View(np.zeros(4, np.int32), (4,), (-1,), 3),
        View(np.zeros(4, np.int32), (4,), (1, 1)),
        View(np.zeros(4, np.int32), (1,) * 100),
        View(np.zeros(4, np.int32), count=5),
        View(np.zeros(4, np.int32), count=-1),
        View(np.zeros(4, np.int32), count=1 << 60),
        View(np.zeros(4, np.int32), kind="DoubleStorage"),
        View(np.zeros(4, np.int32), kind="ComplexFloatStorage"),
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, view):
    refuse(save(tmp_path / "x.pt", [view]), "storage|elements|shape|imports")


def test_numpy_arrays_of_another_size(tmp_path):
    good = numpy_array(np.arange(3, dtype=np.int32))
    huge = good.replace(b"(K\x03t" + name("numpy", "dtype"), b"(" + integer(1 << 60) + b"t" + name("numpy", "dtype"))
    assert huge != good
    refuse(save(tmp_path / "y.pt", huge), "another size than its 12 bytes")


def test_compressed_members_are_refused(tmp_path):
    path = save(tmp_path / "x.pt", {"ids": np.zeros((1000, 8), np.int32)}, compression=zipfile.ZIP_DEFLATED)
    assert "save it again" in refuse(path, "is packed")


def test_a_zip_that_lies_about_its_members(tmp_path):
    path = save(tmp_path / "x.pt", {"ids": np.zeros((100, 8), np.int32)})
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/0"))
    for field in (20, 24):  # packed and unpacked size in the central directory
        lie = bytearray(data)
        lie[at + field : at + field + 4] = struct.pack("<I", 0x7FFFFFFF)
        (tmp_path / "y.pt").write_bytes(lie)
        refuse(tmp_path / "y.pt", "packed|beyond the end")
    both = bytearray(data)
    both[at + 20 : at + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    (tmp_path / "y.pt").write_bytes(both)
    refuse(tmp_path / "y.pt", "beyond the end of the archive")


def test_members_that_are_missing_or_twice(tmp_path):
    writer = Writer()
    pickled = writer.pickle({"ids": np.zeros(4, np.int32)})
    refuse(archive(tmp_path / "x.pt", pickled, []), r"data/0\]: is missing")
    path = archive(tmp_path / "y.pt", pickled, writer.storages)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", b"\0" * 16)
    refuse(path, "twice")
    path = archive(tmp_path / "z.pt", pickled, writer.storages)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", pickled)
    refuse(path, "holds 2 members named data.pkl")
    refuse(archive(tmp_path / "o.pt", pickled, writer.storages, byteorder=b"middle"), "expected little or big")


def measured(path):
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            load_torch(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"N" + b"r" + struct.pack("<I", 0xFFFFFFFE),  # a memo of four billion entries
        b"\x8e" + struct.pack("<Q", 1 << 60),  # BINBYTES8
        b"\x8d" + struct.pack("<Q", 1 << 62),  # BINUNICODE8
        b"\x96" + struct.pack("<Q", 1 << 40),  # BYTEARRAY8
        b"B" + struct.pack("<I", 0xFFFFFFFF),
        b"\x8b" + struct.pack("<I", 0x7FFFFFFF),  # LONG4
        b"\x95" + struct.pack("<Q", 1 << 62) + b"N0",  # a frame, and a value too many
    ],
)
def test_opcodes_that_announce_more_than_there_is(tmp_path, opcodes):
    assert measured(raw(tmp_path / "x.pt", opcodes + b"N")) < 1 << 22


@pytest.mark.parametrize("bomb", [b"}" * 300_000, b"(" * 300_000, b"]\x94" * 150_000, b"N" + b"\x94" * 300_000])
def test_bombs_of_small_opcodes(tmp_path, monkeypatch, bomb):
    """The first million objects are free; here only a thousand, to see what each byte may ask for beyond that."""
    monkeypatch.setattr(pickles, "_FREE_OBJECTS", 1000)
    assert measured(archive(tmp_path / "x.pt", b"\x80\x04" + bomb, [])) < 100 * len(bomb)
    refuse(tmp_path / "x.pt", "more objects than such a file can hold|nests its values deeper|left over")


def test_depth_and_shared_references(tmp_path):
    deep = b"]" * 200_000 + b"a" * 199_999
    value = load_torch(raw(tmp_path / "x.pt", deep))
    assert isinstance(value, list)
    nested = b"(" * 5000 + b"t" * 5000
    refuse(raw(tmp_path / "y.pt", nested), "nests its values deeper")
    key = b"}" + b")" + b"\x85" * 100_000 + b"K\x01s"
    refuse(raw(tmp_path / "z.pt", key), "a tuple as key")
    # Ten lists of ten references each: 10^40 leaves for whoever walks them, a few hundred bytes for the reader.
    laughs = b"]q\x00" + b"".join(
        b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(40)
    )
    laughs = b"](" + laughs[:-2] + b"q\x28" + b"e"
    assert len(load_torch(raw(tmp_path / "l.pt", laughs))) == 41
    with pytest.raises(SourceError):
        open_source([tmp_path / "l.pt"], IngestOptions(num_experts=8))
    cycle = b"]q\x00h\x00a"
    looped = load_torch(raw(tmp_path / "c.pt", cycle))
    assert looped[0] is looped
    with pytest.raises(SourceError):
        open_source([tmp_path / "c.pt"], IngestOptions(num_experts=8))


@given(data=st.data())
def test_mutated_files_raise_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("f")
    ids = routing(6, 3, 2, 8).astype(np.int32)
    value = {"routed_experts": View(ids), "token_ids": list(range(6)), "np": numpy_array(ids), "model": "m", "x": 1.5}
    whole = save(folder / "x.pt", value).read_bytes()
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4))
    mutated = bytearray(whole)
    for at, byte in cuts:
        mutated[at] = byte
    (folder / "y.pt").write_bytes(
        mutated[: data.draw(st.integers(1, len(whole)))] if data.draw(st.booleans()) else mutated
    )
    with contextlib.suppress(TracekitError):
        list(open_source([folder / "y.pt"], IngestOptions(num_experts=8)).requests())


@given(data=st.data())
def test_mutated_pickles_raise_nothing_else(tmp_path_factory, data):
    """The checksum of the zip is right, so that the machine sees the mutation."""
    folder = tmp_path_factory.mktemp("f")
    ids = routing(6, 3, 2, 8).astype(np.int32)
    writer = Writer()
    pickled = bytearray(writer.pickle({"routed_experts": View(ids), "np": numpy_array(ids), "t": (1, [2, {"a": 1.5}])}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "opcode"])):
            case "set":
                pickled[at] = data.draw(st.integers(0, 255))
            case "cut":
                del pickled[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                pickled[at:at] = data.draw(st.binary(max_size=8))
            case "opcode":
                pickled[at:at] = data.draw(st.sampled_from([o.code for o in pickletools.opcodes])).encode("latin-1")
        if not pickled:
            return
    path = archive(folder / "x.pt", bytes(pickled), writer.storages)
    with contextlib.suppress(TracekitError):
        list(open_source([path], IngestOptions(num_experts=8)).requests())


# Arrays in it


def test_arrays_with_their_neighbours(tmp_path):
    ids = routing(29, 4, 2, 8)
    beside = {
        "prompt_len": 12,
        "token_ids": list(range(30)),
        "layer_ids": [3, 4, 5, 6],
        "model": "olmoe",
        "num_experts": 8,
    }
    path = save(tmp_path / "r.pt", {"routed_experts": ids.astype(np.int16), **beside})
    source = open_source([path])
    (request,) = source.requests()
    assert (request.ids == ids).all()
    assert (request.prompt_len, source.meta.layers, source.meta.model) == (12, (3, 4, 5, 6), "olmoe")
    assert request.token_ids.tolist() == list(range(29))
    assert source.meta.source_format == "arrays"


def test_a_bare_tensor_and_many_requests(tmp_path):
    ids = routing(30, 4, 2, 8)
    (request,) = open_source([save(tmp_path / "r.pt", View(ids))], IngestOptions(num_experts=8)).requests()
    assert (request.ids == ids).all()
    many = {"expert_ids": ids.astype(np.uint8), "request_lens": [10, 20], "domain": ["a", "b"]}
    found = open_source(
        [save(tmp_path / "m.pt", many)], IngestOptions(num_experts=8, label_fields=("domain",))
    ).requests()
    found = list(found)
    assert [len(r.ids) for r in found] == [10, 20]
    assert [r.label for r in found] == ["a", "b"]
    assert (np.concatenate([r.ids for r in found]) == ids).all()
