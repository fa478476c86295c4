"""Debug rollouts of slime (torch tensors) and miles (numpy arrays)."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchzip import View, Writer, archive, numpy_array, save

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source

LAYERS, K, N = 4, 2, 16


def routing(tokens, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, LAYERS, N)), axis=2)[..., :K].astype(np.int32)


def sample(prompt, output, seed=0, *, miles=False, **others):
    ids = routing(prompt + output - 1, seed)
    return {
        "group_index": seed // 2,
        "index": seed,
        "prompt": [{"role": "user", "content": "x"}],
        "tokens": list(range(100, 100 + prompt + output)),
        "response": "text",
        "response_length": output,
        "label": "42",
        "reward": 1.0,
        "loss_mask": [1] * output,
        "rollout_log_probs": [-0.25] * output,
        "rollout_routed_experts": numpy_array(ids) if miles else View(ids),
        "remove_sample": False,
        "status": "completed",
        "metadata": {"task": "gpqa", "nested": {"a": 1}},
        "spec_info": {"spec_accept_token_num": 0},
        **others,
    }


def read(path, **options):
    source = open_source([path], IngestOptions(num_experts=N, **options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes
    return source, requests


@pytest.mark.parametrize("miles", [False, True])
def test_samples(tmp_path, miles):
    samples = [sample(5 + i, 3 + i, i, miles=miles) for i in range(4)]
    content = {"rollout_id": 7, "samples": samples, **({"metadata": {"args": "x"}} if miles else {})}
    source, requests = read(save(tmp_path / "rollout_7.pt", content), label_fields=("task", "rollout_id"))
    assert source.meta.source_format == "slime"
    assert [r.request_id for r in requests] == [f"rollout_7/{i}" for i in range(4)]
    for i, request in enumerate(requests):
        assert (request.ids == routing(7 + 2 * i, i)).all()
        assert (request.prompt_len, request.decode_start) == (5 + i, 5 + i)
        assert request.token_ids.tolist() == list(range(100, 107 + 2 * i))
        assert request.labels == {"task": "gpqa", "rollout_id": "7"}


def test_aborted_samples_are_left_out(tmp_path):
    samples = [sample(5, 3), sample(5, 3, 1, rollout_routed_experts=None, status="aborted")]
    source, requests = read(save(tmp_path / "r.pt", {"rollout_id": 0, "samples": samples}))
    assert len(requests) == 1
    assert any("sample 1 is the first" in note for note in source.notes)
    empty = {"rollout_id": 0, "samples": samples[1:]}
    with pytest.raises(SourceError, match="no sample has rollout_routed_experts"):
        read(save(tmp_path / "e.pt", empty))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": list(range(10))}, "7 rows of routing"),
        ({"tokens": None}, "has no tokens"),
        ({"response_length": 99}, "response_length 99"),
        ({"response_length": None}, "response_length None"),
        ({"rollout_routed_experts": View(routing(7).astype(np.float32))}, "float32"),
        ({"rollout_routed_experts": View(routing(7)[0])}, "of shape"),
        ({"rollout_routed_experts": "gone"}, "a str"),
        ({"rollout_routed_experts": View(np.full((7, LAYERS, K), 3, np.int32))}, "twice in one row"),
    ],
)
def test_samples_that_contradict_themselves(tmp_path, change, said):
    with pytest.raises(SourceError, match=said):
        read(save(tmp_path / "r.pt", {"rollout_id": 0, "samples": [sample(5, 3, **change)]}))


def test_one_sample_told_a_thousand_times(tmp_path):
    writer = Writer()
    once = writer.one(sample(60, 60))
    opcodes = b"\x80\x02}(" + writer.one("rollout_id") + b"K\x00" + writer.one("samples") + b"](" + once + b"q\x05"
    opcodes += b"h\x05" * 1000 + b"eu."
    with pytest.raises(SourceError, match="the same bytes are told again and again"):
        read(archive(tmp_path / "r.pt", opcodes, writer.storages))


@given(data=st.data())
def test_mutations_raise_nothing_else(tmp_path_factory, data):
    writer = Writer()
    pickled = bytearray(writer.pickle({"rollout_id": 0, "samples": [sample(3, 3), sample(2, 4, 1, miles=True)]}))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = archive(tmp_path_factory.mktemp("f") / "x.pt", bytes(pickled), writer.storages)
    with contextlib.suppress(TracekitError):
        list(open_source([path], IngestOptions(num_experts=N)).requests())


def test_samples_that_share_their_tokens_are_not_unpacked_each(tmp_path):
    writer = Writer()
    opcodes = b"\x80\x02}(" + writer.one("samples") + b"](}("
    one = {"tokens": [1] * 600, "response_length": 1, "rollout_routed_experts": View(routing(0))}
    opcodes += b"".join(writer.one(part) for item in one.items() for part in item) + b"uq\xfa"
    opcodes += b"h\xfa" * 600 + b"eu."
    with pytest.raises(SourceError, match="more tokens, with the samples before it, than the file has bytes"):
        read(archive(tmp_path / "x.pt", opcodes, writer.storages))


def test_values_too_deep_for_a_message(tmp_path):
    deep = b")" + b"\x85" * 100_000
    path = save(tmp_path / "x.pt", {"rollout_id": 7, "samples": [sample(5, 3) | {"response_length": deep}]})
    with pytest.raises(SourceError, match="nests its values too deeply"):
        read(path)
