"""Safetensors: the header against the file's size, and arrays in it."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.safetensors import read_safetensors

CODES = {
    "?": "BOOL",
    "u1": "U8",
    "i1": "I8",
    "<u2": "U16",
    "<i2": "I16",
    "<f2": "F16",
    "<u4": "U32",
    "<i4": "I32",
    "<f4": "F32",
    "<u8": "U64",
    "<i8": "I64",
    "<f8": "F64",
}


def routing(tokens, layers, k, n, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, n)), axis=2)[..., :k]


def save(path, arrays, metadata=None, codes=CODES):
    """Write a file of the format: length, JSON header, data."""
    header, data = {}, b""
    for name, array in arrays.items():
        stored = array.tobytes()
        dtype = codes[np.dtype(array.dtype).newbyteorder("<").str.replace("|", "").replace("b1", "?")]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    if metadata is not None:
        header["__metadata__"] = metadata
    return write(path, header, data)


def write(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refuse(path, said):
    with pytest.raises(SourceError, match=said):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", list(CODES))
def test_types(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensors, metadata = read_safetensors(
        save(
            tmp_path / "x.safetensors",
            {"first": np.zeros(3, "u1"), "a": array, "none": np.zeros((0, 4), "<f4")},
            {"m": "x"},
        )
    )
    assert (tensors["a"].load() == array).all()
    assert (tensors["a"].shape, tensors["a"].dtype, metadata) == ((2, 3, 4), np.dtype(dtype), {"m": "x"})
    assert tensors["none"].load().shape == (0, 4)


def test_bfloat16(tmp_path):
    words = np.array([0x3FC0, 0xC010], "<u2")
    path = save(tmp_path / "x.safetensors", {"a": words}, codes={"<u2": "BF16"})
    assert read_safetensors(path)[0]["a"].load().tolist() == [1.5, -2.25]


ONE = {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {**ONE, "shape": [2, 3]}}, "claims I32"),
        ({"a": {**ONE, "shape": [1 << 60]}}, "claims I32"),
        ({"a": {**ONE, "shape": [1 << 31, 1 << 31]}}, "claims I32"),
        ({"a": {**ONE, "shape": [10**400]}}, "not described"),
        ({"a": {**ONE, "shape": [-2, -2]}}, "not described"),
        ({"a": {**ONE, "shape": [2.0, 2]}}, "not described"),
        ({"a": {**ONE, "shape": [True, 4]}}, "not described"),
        ({"a": {**ONE, "data_offsets": [16, 0]}}, "claims I32"),
        ({"a": {**ONE, "data_offsets": [8, 24]}}, "claims I32"),
        ({"a": {**ONE, "data_offsets": [0]}}, "not described"),
        ({"a": {**ONE, "dtype": "F8_E4M3"}}, "of type 'F8_E4M3'"),
        ({"a": {**ONE, "dtype": 3}}, "not described"),
        ({"a": 7}, "not described"),
        ({"a": ONE, "b": ONE}, "overlap at byte 0"),
        ({"a": {**ONE, "shape": [2], "data_offsets": [8, 16]}}, "leave a gap at byte 8"),
        ({"a": {**ONE, "shape": [2], "data_offsets": [0, 8]}}, "16 bytes of data for tensors of 8"),
        ({"a": ONE, "__metadata__": {"x": 1}}, "no map of strings"),
        ({"a": {**ONE, "shape": [1] * 100 + [2, 2]}}, "not described"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a"', "no readable header"),
        (b'{"a":' + b"[" * 100_000, "no readable header"),
    ],
)
def test_headers_that_lie(tmp_path, header, said):
    refuse(write(tmp_path / "x.safetensors", header, b"\0" * 16), said)


def test_lengths_that_lie(tmp_path):
    for length in (0, 1, 1 << 20, 1 << 63, (1 << 64) - 1):
        refuse(write(tmp_path / "x.safetensors", {"a": ONE}, b"\0" * 16, length), "announces a header")
    (tmp_path / "short").write_bytes(b"\x10\0\0")
    refuse(tmp_path / "short", "announces a header")


def test_routing_with_its_neighbours(tmp_path):
    ids = routing(29, 4, 2, 8)
    beside = {"prompt_len": np.array(12), "token_ids": np.arange(30)}
    path = save(tmp_path / "r.safetensors", {"routed_experts": ids.astype("<u2"), **beside}, {"model": "olmoe"})
    source = open_source([path], IngestOptions(num_experts=8))
    (request,) = source.requests()
    assert (request.ids == ids).all()
    assert (request.prompt_len, request.token_ids.tolist(), source.meta.model) == (12, list(range(29)), "olmoe")


def test_weights_of_a_model_are_no_trace(tmp_path):
    weights = {
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": np.zeros((8, 16), "<f4") for i in (0, 1) for e in (0, 1)
    }
    path = save(tmp_path / "model.safetensors", weights)
    with pytest.raises(SourceError, match="a safetensors file without an array per layer"):
        open_source([path], IngestOptions(num_experts=8))


@given(data=st.data())
def test_mutations_raise_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("f")
    ids = routing(6, 3, 2, 8).astype("<i4")
    whole = bytearray(
        save(folder / "x", {"routed_experts": ids, "token_ids": np.arange(6)}, {"model": "m"}).read_bytes()
    )
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / "y.safetensors").write_bytes(
        whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    )
    with contextlib.suppress(TracekitError):
        list(open_source([folder / "y.safetensors"], IngestOptions(num_experts=8)).requests())
