"""Padded batches [requests, tokens, layers, k], as verl keeps them."""

from __future__ import annotations

import pickle
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchzip import save as save_torch

from tracekit.errors import SourceError
from tracekit.sources import IngestOptions, open_source

LAYERS, K, N = 3, 2, 8


def routing(tokens, k=K, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, LAYERS, N)), axis=2)[..., :k]


def batch(lens, prompt_max, response_max, k=K):
    """verl's layout: prompts padded on the left, responses on the right, no row for the last sampled token."""
    ids = np.zeros((len(lens), prompt_max + response_max, LAYERS, k), np.int16)
    mask = np.zeros(ids.shape[:2], np.int64)
    tokens = np.full(ids.shape[:2], 999)
    rows = []
    for i, (prompt, output) in enumerate(lens):
        first = prompt_max - prompt
        rows.append(routing(prompt + output - 1, k, i))
        ids[i, first : first + prompt + output - 1] = rows[-1]
        mask[i, first : first + prompt + output] = 1
        tokens[i, first : first + prompt + output] = np.arange(prompt + output)
    return ids, mask, tokens, rows


def read(path, **options):
    source = open_source([path], IngestOptions(num_experts=N, **options))
    return source, list(source.requests())


def save(path, ids, **beside):
    if path.suffix == ".npy":
        np.save(path, ids)
    elif path.suffix == ".npz":
        np.savez(path, routed_experts=ids, **beside)
    else:
        save_torch(path, {"routed_experts": ids, **beside})
    return path


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)).filter(lambda n: sum(n) > 1), min_size=1, max_size=4)


@given(
    lens=lengths, suffix=st.sampled_from([".npy", ".npz", ".pt"]), known=st.sampled_from(["mask", "lens", "prompts"])
)
def test_each_request_comes_back(tmp_path_factory, lens, suffix, known):
    ids, mask, tokens, rows = batch(lens, 6, 7)
    beside = {
        "mask": {"attention_mask": mask, "input_ids": tokens, "responses": tokens[:, 6:]},
        "lens": {
            "prompt_lens": np.array([p for p, _ in lens]),
            "response_lens": np.array([o for _, o in lens]),
            "prompts": tokens[:, :6],
        },
        "prompts": {"prompts": tokens[:, :6]},
    }[known]
    path = save(tmp_path_factory.mktemp("v") / f"batch{suffix}", ids, **beside)
    _, requests = read(path)
    assert [r.request_id for r in requests] == [f"batch/{i}" for i in range(len(lens))]
    for request, expected, (prompt, output) in zip(requests, rows, lens, strict=True):
        assert (request.ids == expected).all()
        if suffix != ".npy":
            assert (request.prompt_len, request.decode_start) == (prompt, prompt)
        if suffix != ".npy" and known == "mask":
            assert request.token_ids.tolist() == list(range(prompt + output - 1))


def test_one_expert_a_token_needs_the_mask(tmp_path):
    ids, mask, tokens, rows = batch([(3, 4), (2, 2)], 4, 5, k=1)
    with pytest.raises(SourceError, match="k = 1, where rows of padding look like routing to expert 0"):
        read(save(tmp_path / "a.npy", ids))
    _, requests = read(save(tmp_path / "b.npz", ids, attention_mask=mask, prompts=tokens[:, :4]))
    assert all((request.ids == expected).all() for request, expected in zip(requests, rows, strict=True))


def test_requests_without_rows_are_left_out_and_holes_are_not_filled(tmp_path):
    ids, mask, _, rows = batch([(3, 4), (2, 2)], 4, 5)
    ids[0], mask[0] = 0, 0
    source, requests = read(save(tmp_path / "a.npz", ids, attention_mask=mask))
    assert [r.request_id for r in requests] == ["a/1"]
    assert any("without any row" in note for note in source.notes)
    assert (requests[0].ids == rows[1]).all()
    ids[1, 3] = 0
    with pytest.raises(SourceError, match="Rows of zeros are tokens whose routing was not captured"):
        read(save(tmp_path / "b.npy", ids))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"attention_mask": np.ones((2, 8), int)}, "attention_mask has shape"),
        ({"attention_mask": np.array([[1, 0, 1, 1, 1, 1, 0, 0, 0]] * 2)}, "with a gap"),
        (
            {"prompt_lens": np.array([9, 2]), "response_lens": np.array([2, 2]), "prompts": np.zeros((2, 4), int)},
            "lengths",
        ),
        ({"prompt_lens": np.array([3])}, "for 2 requests"),
    ],
)
def test_neighbours_that_contradict(tmp_path, beside, said):
    ids, *_ = batch([(3, 4), (2, 2)], 4, 5)
    with pytest.raises(SourceError, match=said):
        read(save(tmp_path / "a.npz", ids, **beside))


def test_other_axes_and_floats(tmp_path):
    ids, *_ = batch([(3, 4), (2, 2)], 4, 5)
    with pytest.raises(SourceError, match="Transpose it"):
        read(save(tmp_path / "a.npy", ids), axes="ltk")
    with pytest.raises(SourceError, match="the batch is float32"):
        read(save(tmp_path / "b.npy", ids.astype(np.float32)))


def test_a_dataproto_is_refused_with_the_way_out(tmp_path, monkeypatch):
    module = types.ModuleType("verl.protocol")
    module.DataProto = type("DataProto", (), {"__module__": "verl.protocol"})
    monkeypatch.setitem(sys.modules, "verl", types.ModuleType("verl"))
    monkeypatch.setitem(sys.modules, "verl.protocol", module)
    path = tmp_path / "batch.pkl"
    path.write_bytes(pickle.dumps(module.DataProto()))
    monkeypatch.undo()
    with pytest.raises(SourceError, match="verl's DataProto") as caught:
        read(path)
    assert "numpy.savez" in str(caught.value)


@pytest.mark.parametrize("shape", [(1 << 40, 0, LAYERS, K), (0, 9, LAYERS, K), (1 << 40, 5, 0, K)])
def test_a_batch_of_nothing_is_refused_at_once(tmp_path, shape):
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i2", "fortran_order": False, "shape": shape})
    with pytest.raises(SourceError, match="is empty"):
        read(tmp_path / "x.npy")
