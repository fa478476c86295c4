"""Responses of servers and rollouts of trainers, in every form that carries routing, and in the broken ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import parse_config
from tracekit.sources.streams import exchanges

# 5 layers of which the first two are dense, N = 16, k = 3.
CONFIG = parse_config({"num_hidden_layers": 5, "num_experts": 16, "num_experts_per_tok": 3, "first_k_dense_replace": 2})
MOE = (2, 3, 4)


def routing(rows, seed=0):
    """Ids ``[rows, 5, 3]``, zero in the dense layers 0 and 1."""
    ids = np.argsort(np.random.default_rng(seed).random((rows, 5, 16)), axis=2)[..., :3]
    ids[:, :2] = 0
    return ids


def packed_to_front(ids):
    """vLLM 0.21's layer axis: the MoE layers first, zeros at the end."""
    return np.concatenate([ids[:, 2:], ids[:, :2]], axis=1)


def npy(ids):
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def raw(ids, dtype):
    return base64.b64encode(ids.astype(dtype).tobytes()).decode()


def answer(choices, prompt=5, output=4, **fields):
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return {"id": "a", "model": "m", "choices": choices, "usage": usage, **fields}


def vllm(prompt=5, output=4, start=0, seed=0, **fields):
    ids = routing(prompt + output - 1, seed)[start:].astype(np.uint8)
    choice = {"index": 0, "finish_reason": "length", "routed_experts": npy(ids)}
    return answer([choice], prompt, output, **fields)


def write(tmp_path, *documents, name="r.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def events(tmp_path, *chunks, name="r.txt"):
    path = tmp_path / name
    path.write_text("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")
    return path


def read(path, **options):
    source = open_source([path], IngestOptions(**{"config": CONFIG, **options}))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def one(path, **options):
    source, (request,) = read(path, **options)
    return source, request


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def has_note(source, text):
    return any(text in note for note in source.notes)


# vLLM 0.14 to 0.20: what a script saves of a RequestOutput


def test_saved_arrays_of_the_first_generation(tmp_path):
    ids = routing(8).astype(np.int32)
    np.savez(tmp_path / "r.npz", routed_experts=ids, prompt_token_ids=np.arange(5), token_ids=np.arange(4))
    np.save(tmp_path / "r.npy", ids)
    source, request = one(tmp_path / "r.npz")
    assert (request.ids == ids[:, 2:]).all()
    assert (request.prompt_len, request.token_ids.tolist()) == (5, [0, 1, 2, 3, 4, 0, 1, 2])
    assert source.meta.layers == MOE
    # 0.14 stored physical ids under load balancing, and no file says its version: neither is claimed.
    assert (source.meta.id_space, source.meta.router_order) == ("unknown", None)
    assert (one(tmp_path / "r.npy")[1].ids == ids[:, 2:]).all()


def test_saved_arrays_of_0_21_are_shifted_back(tmp_path):
    ids = routing(8)
    shifted = packed_to_front(ids).astype(np.int16)
    np.savez(tmp_path / "r.npz", prompt_routed_experts=shifted[:5], routed_experts=shifted[5:])
    source, request = one(tmp_path / "r.npz")
    assert source.meta.layers == MOE
    assert (request.ids == ids[:, 2:]).all()
    assert has_note(source, "vLLM 0.21 packed the 3 MoE layers")


# vLLM 0.21: nested lists


def nested(n=1, prompt=5, output=4, shift=True, **fields):
    made = [
        packed_to_front(routing(prompt + output - 1, i)) if shift else routing(prompt + output - 1) for i in range(n)
    ]
    choices = [{"index": i, "finish_reason": "stop", "routed_experts": made[i][prompt:].tolist()} for i in range(n)]
    return answer(choices, prompt, output * n, prompt_routed_experts=made[0][:prompt].tolist(), **fields)


def test_nested_lists_are_joined_and_shifted_back(tmp_path):
    source, request = one(write(tmp_path, nested()))
    assert (request.ids == routing(8)[:, 2:]).all()
    assert (source.meta.layers, source.meta.engine, source.meta.engine_version) == (MOE, "vllm", "0.21")
    assert (request.prompt_len, request.decode_start, source.meta.id_space) == (5, 5, "logical")
    assert has_note(source, "put back to their numbers, 2 to 4")
    assert has_note(source, "may have overwritten layer 0")


def test_without_a_config_the_version_is_enough(tmp_path):
    source, request = one(write(tmp_path, nested()), config=None, num_experts=16)
    assert source.meta.layers == MOE
    assert (request.ids == routing(8)[:, 2:]).all()
    assert has_note(source, "first 2 layers were taken for the dense ones")


def test_the_shift_is_not_guessed(tmp_path):
    # Another version with the same zeros: layers were not captured, nothing is moved.
    path = write(tmp_path, nested(system_fingerprint="vllm-0.32.0-abc"))
    refuse(path, r"layers \[0, 1\] have routing but are dense by the config")
    source, _ = read(path, config=None, num_experts=16)
    assert source.meta.layers == (0, 1, 2)
    # Zeros in between, or too many of them for leading dense layers: no pattern of 0.21.
    document = nested()
    for rows in (document["prompt_routed_experts"], document["choices"][0]["routed_experts"]):
        for row in rows:
            row[0] = [0, 0, 0]
    path = write(tmp_path, document)
    refuse(path, r"MoE layers \[3, 4\] are all zero|have routing but are dense")
    refuse(path, "places do not say which layers are dense", config=None, num_experts=16)
    # Not shifted at all: the config's own places.
    assert read(write(tmp_path, nested(shift=False)))[0].meta.layers == MOE


def test_zeros_of_half_the_layers_are_interleaved_dense_ones(tmp_path):
    ids = np.argsort(np.random.default_rng(0).random((8, 4, 16)), axis=2)[..., :3]
    ids[:, 2:] = 0
    document = answer(
        [{"finish_reason": "stop", "routed_experts": ids[5:].tolist()}], prompt_routed_experts=ids[:5].tolist()
    )
    refuse(write(tmp_path, document), "places do not say which", config=None, num_experts=16)
    config = {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 3, "interleave_moe_layer_step": 2}
    source, request = one(write(tmp_path, document), config=parse_config(config))
    assert source.meta.layers == (1, 3)
    assert (request.ids == ids[:, :2]).all()


def test_the_prompt_of_0_21_stands_beside_the_choices_once(tmp_path):
    _, requests = read(write(tmp_path, nested(n=3)))
    assert [(r.request_id, r.first_pos, len(r.ids)) for r in requests] == [("a/0", 0, 8), ("a/1", 5, 3), ("a/2", 5, 3)]
    assert (requests[2].ids == routing(8, 2)[5:, 2:]).all()


def test_nested_lists_without_the_prompts_rows(tmp_path):
    ids = routing(8)
    # lmdeploy returns every row in one list ...
    document = answer([{"finish_reason": "stop", "routed_experts": ids.tolist()}])
    source, request = one(write(tmp_path, document))
    assert (request.ids == ids[:, 2:]).all()
    assert (source.meta.engine, source.meta.id_space) == (None, "unknown")
    # ... and the output's rows alone are known by their number.
    document = answer([{"finish_reason": "stop", "routed_experts": ids[5:].tolist()}])
    assert (one(write(tmp_path, document))[1].first_pos, one(write(tmp_path, document))[1].decode_start) == (5, 5)
    # One token was generated: the rows of the prompt are all there is.
    alone = packed_to_front(ids)[:5].tolist()
    document = answer([{"finish_reason": "stop", "routed_experts": None}], 5, 1, prompt_routed_experts=alone)
    assert len(one(write(tmp_path, document))[1].ids) == 5


@pytest.mark.parametrize(
    ("prompt", "output", "said"),
    [
        ([[[1, 2, 3]]], [[[1, 2, 3], [4, 5, 6]]], "do not join"),
        ([[[1, 2, 3]]], [[["x", 2, 3]]], "list of <U"),
        ([[[1, 2, 3]]], [[[1.5, 2, 3]]], "list of float64"),
        ([[[1, 2, 3]]], [[[1, 2], [3]]], "no array"),
        ([[[1, 2, 3]]], [[[10**30, 2, 3]]], "list of object"),
        ([1, 2], [[[1, 2, 3]]], "do not join"),
    ],
)
def test_faulty_nested_lists(tmp_path, prompt, output, said):
    document = answer([{"finish_reason": "stop", "routed_experts": output}], prompt_routed_experts=prompt)
    refuse(write(tmp_path, document), said)


# vLLM 0.22 and later: starts, choices, versions, streams


def test_the_start_is_taken_from_wherever_the_request_has_it(tmp_path):
    for request in ({"routed_experts_prompt_start": 3}, {"sampling_params": {"routed_experts_prompt_start": 3}}):
        _, found = one(write(tmp_path, {"request": request, "response": vllm(8, 4, start=3)}))
        assert (found.first_pos, len(found.ids)) == (3, 8)


def test_the_start_is_inferred_where_only_one_fits(tmp_path):
    source, request = one(write(tmp_path, vllm(8, 4, start=3)))
    assert (request.first_pos, request.prompt_len, request.decode_start) == (3, 8, 8)
    assert (request.ids == routing(11)[3:, 2:]).all()
    assert has_note(source, "routed_experts_prompt_start was inferred")
    # The logged request asks for no start: the rows are missing.
    refuse(write(tmp_path, {"request": {}, "response": vllm(8, 4, start=3)}), "8 rows of routing")
    # No start is inside the output.
    refuse(write(tmp_path, vllm(2, 9, start=3)), "7 rows of routing")
    refuse(write(tmp_path, vllm(2, 9) | {"usage": {"prompt_tokens": 2, "completion_tokens": 8}}), "10 rows of routing")


@pytest.mark.parametrize("tokens", [True, False])
def test_the_prompt_of_several_choices_is_kept_once(tmp_path, tokens):
    choices = [vllm(5, n, seed=n)["choices"][0] for n in (4, 6, 1)]
    for choice, n in zip(choices, (4, 6, 1), strict=True):
        choice.update(token_ids=list(range(n)), prompt_token_ids=[9] * 5) if tokens else None
    source, requests = read(write(tmp_path, answer(choices, 5, 11)))
    # The third choice generated one token, which was never forwarded: no row of its own.
    assert [(r.request_id, r.first_pos, r.decode_start, len(r.ids)) for r in requests] == [
        ("a/0", 0, 5, 8),
        ("a/1", 5, 5, 5),
    ]
    assert (requests[1].ids == routing(10, 6)[5:, 2:]).all()
    assert sum(min(r.decode_start, r.first_pos + len(r.ids)) - r.first_pos for r in requests) == 5
    assert has_note(source, "kept once, with the first choice")
    if tokens:
        assert requests[1].token_ids.tolist() == [0, 1, 2, 3, 4]


def test_several_choices_with_a_start(tmp_path):
    choices = [vllm(5, 4, seed=i, start=2)["choices"][0] for i in range(2)]
    document = {"request": {"routed_experts_prompt_start": 2}, "response": answer(choices, 5, 8)}
    assert [(r.first_pos, len(r.ids)) for r in read(write(tmp_path, document))[1]] == [(2, 6), (5, 3)]


def test_several_choices_without_counts_say_so(tmp_path):
    document = answer([vllm(seed=i)["choices"][0] for i in range(2)], usage=None)
    source, requests = read(write(tmp_path, document))
    assert [len(r.ids) for r in requests] == [8, 8]
    assert has_note(source, "the prompt's rows are counted once per choice")


@pytest.mark.parametrize(
    ("version", "notes", "id_space"),
    [
        ("0.14.0", ("MTP", "physical"), "unknown"),
        ("0.22.1", ("MTP",), "logical"),
        ("0.25.0", ("MTP",), "logical"),
        ("0.26.0", (), "logical"),
        ("1.0.0", (), "logical"),
        (None, (), "logical"),
    ],
)
def test_known_faults_of_a_version(tmp_path, version, notes, id_space):
    source, _ = one(write(tmp_path, vllm(system_fingerprint=None if version is None else f"vllm-{version}-abcdef")))
    assert source.meta.engine_version == version
    assert source.meta.id_space == id_space
    for text in ("MTP", "physical"):
        assert has_note(source, text) == (text in notes)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.15.0", "0.15 binds its capture"),
        ("0.26.0", "Monolithic .* since vLLM 0.27"),
        ("0.30.0", "without a capture hook"),
        (None, "monolithic kernels up to 0.26"),
    ],
)
def test_nothing_captured_names_the_cause(tmp_path, version, said):
    document = vllm(system_fingerprint=None if version is None else f"vllm-{version}-x")
    document["choices"][0]["routed_experts"] = npy(np.zeros((8, 5, 3), np.uint8))
    refuse(write(tmp_path, document), f"capture never ran.*{said}")


def generate_chunks(name, prompt=5, output=4, seed=0, usage=False):
    """``/inference/v1/generate`` streamed: one token a chunk, the routing in the last one, usage after it."""
    chunks = [
        {"request_id": name, "choices": [{"index": 0, "finish_reason": None, "token_ids": [i], "routed_experts": None}]}
        for i in range(output)
    ]
    chunks[-1]["choices"][0].update(finish_reason="stop", routed_experts=npy(routing(prompt + output - 1, seed)))
    if usage:
        chunks.append(
            {"request_id": name, "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}
        )
    return chunks


@pytest.mark.parametrize("as_events", [True, False])
def test_a_stream_of_generate(tmp_path, as_events):
    chunks = generate_chunks("s", usage=True)
    source, request = one((events if as_events else write)(tmp_path, *chunks))
    assert (request.ids == routing(8)[:, 2:]).all()
    assert (request.request_id, request.prompt_len, request.first_pos) == ("s", 5, 0)
    assert source.formats == {"vllm"}


def test_streams_that_are_mixed_with_each_other_and_with_responses(tmp_path):
    streams = [generate_chunks(f"s{i}", output=3 + i, seed=i, usage=True) for i in range(4)]
    mixed = [stream[at] for at in range(8) for stream in streams if at < len(stream)]
    _, requests = read(write(tmp_path, *mixed[:5], vllm(model=None), *mixed[5:]))
    assert {r.request_id for r in requests} == {"a", "s0", "s1", "s2", "s3"}
    for i in range(4):
        request = next(r for r in requests if r.request_id == f"s{i}")
        assert (request.ids == routing(5 + 3 + i - 1, i)[:, 2:]).all()


def test_many_streams_need_no_end_to_be_yielded(tmp_path):
    chunks = [chunk for i in range(40) for chunk in generate_chunks(f"s{i:02}", seed=i)]
    chunks.append({"request_id": "s00", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
    _, requests = read(write(tmp_path, *chunks), requests=[{"prompt_len": 5}] * 40)
    assert [r.request_id for r in requests] == [f"s{i:02}" for i in range(40)]


def test_the_prompt_of_generate_is_in_the_request(tmp_path):
    response = {"request_id": "g", "choices": generate_chunks("g")[-1]["choices"]}
    response["choices"][0]["token_ids"] = [7, 8, 9, 10]
    _, request = one(write(tmp_path, {"request": {"token_ids": [1, 2, 3, 4, 5]}, "response": response}))
    assert (request.prompt_len, request.token_ids.tolist()) == (5, [1, 2, 3, 4, 5, 7, 8, 9])


@pytest.mark.parametrize("delta", [True, False])
def test_streams_of_the_openai_endpoints_carry_none(tmp_path, delta):
    said = "streams carry no routing on /v1/chat/completions"
    part = {"delta": {"content": "x"}} if delta else {"text": "x"}
    kind = "chat.completion.chunk" if delta else "text_completion"
    chunks = [{"id": "c", "object": kind, "choices": [{"index": 0, "finish_reason": None, **part}]} for _ in range(3)]
    refuse(events(tmp_path, *chunks), said)
    refuse(write(tmp_path, *chunks), said)
    refuse(events(tmp_path, {"choices": []}), said)
    path = events(tmp_path, *generate_chunks("s"))
    path.write_text(path.read_text()[: path.read_text().index("stop") - 80] + "\n")
    refuse(path, "not JSON|no routing")
    path.write_text('data: {"choices": []}\nnonsense\n')
    refuse(path, "no event")


def test_a_key_of_a_ray_store_is_no_routing(tmp_path):
    document = answer(
        [{"finish_reason": "stop", "routed_experts": "00ffffffffffffffffffffffffffffffffffffff0100000001e1f505"}]
    )
    refuse(write(tmp_path, document), "lmdeploy returns the key of an object in a Ray store")


# SGLang


def sglang(prompt=5, output=4, start=0, seed=0, **meta):
    ids = routing(prompt + output - 1, seed)[start:]
    said = {"id": f"r{seed}", "prompt_tokens": prompt, "completion_tokens": output, "finish_reason": {"type": "stop"}}
    return {
        "text": "",
        "output_ids": list(range(output)),
        "meta_info": {**said, "routed_experts": raw(ids, "<i4"), **meta},
    }


@pytest.mark.parametrize("whole", [True, False])
def test_sglang_streams_end_with_the_routing(tmp_path, whole):
    last = sglang()
    chunks = []
    for n in range(1, 4):
        meta = {**last["meta_info"], "completion_tokens": n, "finish_reason": None}
        del meta["routed_experts"]
        chunks.append({"text": "", "output_ids": list(range(n)) if whole else [n], "meta_info": meta})
    last["output_ids"] = list(range(4)) if whole else [3]
    for path in (events(tmp_path, *chunks, last), write(tmp_path, *chunks, last)):
        source, request = one(path)
        assert source.formats == {"sglang"}
        assert (request.ids == routing(8)[:, 2:]).all()
    record = [{"request": {"input_ids": [9] * 5}, "response": chunk} for chunk in (*chunks, last)]
    tokens = one(write(tmp_path, *record))[1].token_ids
    assert tokens is None if not whole else tokens.tolist() == [9, 9, 9, 9, 9, 0, 1, 2]
    refuse(events(tmp_path, *chunks), "stream without routing")


def test_sglang_streams_of_the_openai_endpoint(tmp_path):
    data = sglang()["meta_info"]["routed_experts"]
    chunk = {"id": "c", "object": "chat.completion.chunk"}
    chunks = [
        {**chunk, "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]},
        {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**chunk, "choices": [], "sglext": {"routed_experts": data}},
        {**chunk, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}},
    ]
    source, request = one(events(tmp_path, *chunks))
    assert source.formats == {"sglang"}
    assert (request.ids == routing(8)[:, 2:]).all()


def test_sglang_behind_dynamo(tmp_path):
    data = sglang()["meta_info"]["routed_experts"]
    for place in (
        {"nvext": {"routed_experts": data}},
        {"nvext": {"engine_data": {"routed_experts": data}}},
        {"engine_data": {"routed_experts": data}},
    ):
        for document in (answer([{"index": 0}], **place), answer([{"index": 0, **place}])):
            source, request = one(write(tmp_path, document))
            assert source.formats == {"sglang"}
            assert (request.ids == routing(8)[:, 2:]).all()


def test_sglang_choices_with_their_own_meta_info_share_the_prompt(tmp_path):
    choices = [{"index": i, "meta_info": sglang(5, n, seed=n)["meta_info"]} for i, n in enumerate((4, 6))]
    source, requests = read(write(tmp_path, answer(choices, 5, 10)))
    assert [(r.request_id, r.first_pos, len(r.ids)) for r in requests] == [("a/0", 0, 8), ("a/1", 5, 5)]
    assert has_note(source, "kept once, with the first choice")


def sampled(prompts, n):
    """What ``/generate`` returns for some prompts and ``n`` outputs of each: a flat list, a random id each."""
    answers, wanted = [], []
    for prompt, length in enumerate(prompts):
        before = routing(length, 50 + prompt)
        for i in range(n):
            output = 3 + i
            ids = np.concatenate([before, routing(output - 1, 100 * prompt + i)])
            name = f"{prompt}-{i}"
            answers.append(sglang(length, output, id=name, routed_experts=raw(ids, "<i4")))
            wanted.append((name, 0 if i == 0 else length, ids[0 if i == 0 else length :, 2:]))
    return answers, wanted


@pytest.mark.parametrize("layout", ["array", "line", "lines", "logged"])
def test_sglang_lists_of_several_outputs_share_the_prompt(tmp_path, layout):
    answers, wanted = sampled([5, 5, 7], 3)
    path = tmp_path / "r.jsonl"
    if layout == "array":
        path.write_text(json.dumps(answers, indent=1))
    elif layout == "logged":
        document = {"request": {"sampling_params": {"n": 3}, "tag": "x"}, "response": answers}
        write(tmp_path, document)
    else:
        write(tmp_path, *([answers] if layout == "line" else [answers[:3], answers[3:]]))
    source, requests = read(path)
    assert [(r.request_id, r.first_pos) for r in requests] == [(name, first) for name, first, _ in wanted]
    for found, (_, _, ids) in zip(requests, wanted, strict=True):
        assert (found.ids == ids).all()
    assert has_note(source, "kept once, with the first")


@pytest.mark.parametrize("layout", ["calls", "one each", "other prompts", "start"])
def test_sglang_prompts_that_are_not_repeated_stay(tmp_path, layout):
    answers, _ = sampled([5], 2)
    if layout == "calls":  # each is a call of its own
        documents = answers
    elif layout == "one each":  # the same prompt twice, asked for one output each
        documents = [{"request": {"sampling_params": {"temperature": 1}}, "response": answers}]
    elif layout == "other prompts":
        documents = [[sglang(5, 4, seed=1, id="0-0"), sglang(5, 4, seed=2, id="0-1")]]
    else:
        documents = [{"request": {"sampling_params": {"n": 2}, "routed_experts_start_len": 5}, "response": answers}]
        for one_of in answers:
            ids = np.frombuffer(base64.b64decode(one_of["meta_info"]["routed_experts"]), "<i4").reshape(-1, 5, 3)
            one_of["meta_info"]["routed_experts"] = raw(ids[5:], "<i4")
    source, requests = read(write(tmp_path, *documents))
    assert [r.first_pos for r in requests] == ([5, 5] if layout == "start" else [0, 0])
    rows = [o["meta_info"]["completion_tokens"] - 1 + (0 if layout == "start" else 5) for o in answers]
    assert [len(r.ids) for r in requests] == (rows if layout != "other prompts" else [8, 8])
    assert not has_note(source, "kept once")


def test_sglang_start(tmp_path):
    document = {"request": {"routed_experts_start_len": 3}, "response": sglang(8, 4, start=3)}
    assert one(write(tmp_path, document))[1].first_pos == 3
    refuse(write(tmp_path, sglang(8, 4, start=3)), "8 rows of routing.*first_pos")
    # A prompt without output loses its last row: a known defect, not a start.
    refuse(write(tmp_path, sglang(8, 1, start=1)), "7 rows of routing.*loses the last prompt row")


def test_sglang_without_the_config_needs_k(tmp_path):
    refuse(write(tmp_path, sglang()), "ids without a shape.*--config", config=None, num_experts=16)


# prime-rl and Dynamo


def packed(ids, dtype="uint8", start=0, **fields):
    return {"data": raw(ids, np.dtype(dtype)), "shape": list(ids.shape), "start": start, "dtype": dtype, **fields}


@pytest.mark.parametrize("place", ["choice", "nvext", "engine_data", "nvext in choice", "engine_data in nvext"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_packed_objects(tmp_path, place, dtype):
    value = {"routed_experts": packed(routing(11)[3:], dtype, start=3)}
    choice, beside = {"index": 0, "finish_reason": "stop"}, {}
    if place == "choice":
        choice |= value
    elif place == "nvext in choice":
        choice["nvext"] = value
    else:
        beside = {"nvext": {"engine_data": value} if "engine_data in" in place else value}
        beside = {"engine_data": value} if place == "engine_data" else beside
    source, request = one(write(tmp_path, answer([choice], 8, 4, **beside)))
    assert (source.formats, source.meta.engine, source.meta.id_space) == ({"dynamo"}, "vllm", "logical")
    assert (request.ids == routing(11)[3:, 2:]).all()
    assert (request.first_pos, request.prompt_len) == (3, 8)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.b85encode])
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<i4"])
def test_packed_objects_of_the_older_form(tmp_path, encode, dtype):
    ids = routing(8)
    value = {"data": encode(ids.astype(dtype).tobytes()).decode(), "shape": list(ids.shape)}
    source, request = one(write(tmp_path, answer([{"finish_reason": "stop", "routed_experts": value}])))
    assert (request.ids == ids[:, 2:]).all()
    assert source.meta.id_space == "unknown"


def test_a_packed_object_beside_several_choices_is_the_first_ones(tmp_path):
    choices = [{"index": i, "finish_reason": "stop", "token_ids": [1] * 4} for i in range(2)]
    document = answer(choices, 5, 8, nvext={"routed_experts": packed(routing(8))})
    source, request = one(write(tmp_path, document))
    assert (request.request_id, len(request.ids)) == ("a/0", 8)
    assert has_note(source, "first choice's")


def test_packed_objects_of_several_choices_share_the_prompt(tmp_path):
    choices = [{"index": i, "finish_reason": "stop", "routed_experts": packed(routing(8, i))} for i in range(2)]
    assert [len(r.ids) for r in read(write(tmp_path, answer(choices, 5, 8)))[1]] == [8, 3]


def test_padding_with_zeros_is_cut_off(tmp_path):
    ids = np.concatenate([routing(8), np.zeros((3, 5, 3), int)])
    source, request = one(write(tmp_path, answer([{"finish_reason": "stop", "routed_experts": packed(ids)}])))
    assert len(request.ids) == 8
    assert has_note(source, "padding at the end")
    # With k = 1 zeros can be routing: the counts decide.
    ids = np.random.default_rng(0).integers(0, 16, (11, 5, 1))
    ids[8:] = 0
    path = write(tmp_path, answer([{"finish_reason": "stop", "routed_experts": packed(ids)}]))
    assert len(one(path, config=None, num_experts=16)[1].ids) == 8
    path = write(tmp_path, answer([{"finish_reason": "stop", "routed_experts": packed(ids)}], usage=None))
    assert len(one(path, config=None, num_experts=16)[1].ids) == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [8, 5]}, r"shape \[8, 5\]"),
        ({"shape": [8, 5, -3]}, "has shape"),
        ({"shape": [1 << 39, 1 << 39, 1 << 39]}, "holds 120 bytes or|holds 120 bytes for"),
        ({"shape": "8,5,3"}, "has shape"),
        ({"shape": [7, 5, 3]}, "for shape"),
        ({"dtype": "uint16"}, "expected 240 bytes"),
        ({"dtype": "object"}, "dtype is 'object'"),
        ({"data": 7}, "data is a int"),
        ({"data": "é"}, "no base64"),
        ({"data": ""}, "holds 0 bytes"),
        ({"start": -1}, "start is -1"),
        ({"start": 2}, "8 rows of routing"),
    ],
)
def test_faulty_packed_objects(tmp_path, change, said):
    value = {**packed(routing(8)), **change}
    refuse(write(tmp_path, answer([{"finish_reason": "stop", "routed_experts": value}])), said)


def test_a_start_that_was_not_asked_for(tmp_path):
    response = answer([{"finish_reason": "stop", "routed_experts": packed(routing(8))}])
    document = {"request": {"nvext": {"routed_experts_prompt_start": 2}}, "response": response}
    refuse(write(tmp_path, document), "rows start at 0, but the request asked for 2")
    refuse(write(tmp_path, response, answer([{"finish_reason": "stop"}], id="b")), "without routing.*extra_fields")


# NeMo-RL


def nrlre1(ids, dtype="int8"):
    shape = "x".join(map(str, ids.shape))
    return f"nrlre1:{dtype}:{shape}:{raw(ids, np.dtype(dtype).newbyteorder('<'))}"


def filled(ids, length, holes=()):
    """Rows as NeMo pads them: ``0 .. k-1`` after the last one, -1 where rows were lost."""
    out = np.tile(np.arange(ids.shape[2]), (length, ids.shape[1], 1))
    out[: len(ids)] = ids
    out[list(holes)] = -1
    return out


def rollout(value, prompt=5, output=4, **fields):
    tokens = {"prompt_token_ids": [1] * prompt, "generation_token_ids": [2] * output}
    return {**tokens, "routed_experts": value, **fields}


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "list"])
def test_rollouts(tmp_path, dtype):
    ids = filled(routing(8), 12)
    value = ids.tolist() if dtype == "list" else nrlre1(ids, dtype)
    source, request = one(write(tmp_path, rollout(value, domain="x")), label_fields=("domain",))
    assert (source.formats, source.meta.layers, source.meta.id_space) == ({"nemo"}, MOE, "logical")
    assert (request.ids == routing(8)[:, 2:]).all()
    assert (request.prompt_len, request.token_ids.tolist()) == (5, [1, 1, 1, 1, 1, 2, 2, 2])
    assert request.labels == {"domain": "x"}
    assert has_note(source, "padding at the end")


def test_rows_that_were_lost_are_holes(tmp_path):
    source, request = one(write(tmp_path, rollout(nrlre1(filled(routing(8), 9, holes=(1, 2, 6))))))
    assert request.positions.tolist() == [0, 3, 4, 5, 7]
    assert (request.ids == routing(8)[[0, 3, 4, 5, 7], 2:]).all()
    assert request.token_ids.tolist() == [1, 1, 1, 2, 2]
    assert has_note(source, "rows without routing (-1)")
    # Lost at the end, where nothing comes after: no hole, and no row is asked for.
    _, request = one(write(tmp_path, rollout(nrlre1(filled(routing(8), 9, holes=(6, 7))))))
    assert request.positions.tolist() == [0, 1, 2, 3, 4, 5]


def test_moe_layers_only(tmp_path):
    source, request = one(write(tmp_path, rollout(nrlre1(filled(routing(8)[:, 2:], 9)))))
    assert source.meta.layers == MOE
    assert (request.ids == routing(8)[:, 2:]).all()


@pytest.mark.parametrize("shape", [(8, 5, 1), (8, 1, 2)])
def test_filler_that_could_be_routing_is_cut_by_the_counts_only(tmp_path, shape):
    ids = np.argsort(np.random.default_rng(0).random((*shape[:2], 16)), axis=2)[..., : shape[2]]
    known = rollout(nrlre1(filled(ids, 11)))
    assert len(one(write(tmp_path, known), config=None, num_experts=16)[1].ids) == 8
    choice = {"finish_reason": "stop", "routed_experts": nrlre1(filled(ids, 11))}
    assert len(one(write(tmp_path, answer([choice])), config=None, num_experts=16)[1].ids) == 8
    refuse(write(tmp_path, rollout(nrlre1(filled(ids, 11)), 5, 3)), "11 rows of routing", config=None, num_experts=16)


def test_strings_in_choices_and_in_nested_rollouts(tmp_path):
    value = nrlre1(filled(routing(8), 9))
    for choice in ({"routed_experts": value}, {"message": {"routed_experts": value, "generation_token_ids": [2] * 4}}):
        source, request = one(write(tmp_path, answer([{"finish_reason": "stop", **choice}])))
        assert (source.formats, len(request.ids)) == ({"nemo"}, 8)
    turns = [{"type": "message", **rollout(nrlre1(filled(routing(8, i), 9)))} for i in range(2)]
    record = {"reward": 1.0, "response": {"output": [{"type": "reasoning"}, *turns]}}
    source, requests = read(write(tmp_path, record))
    assert [r.request_id for r in requests] == ["r/0/0", "r/0/1"]
    assert (requests[1].ids == routing(8, 1)[:, 2:]).all()
    assert has_note(source, "later turns repeat")


def test_choices_of_nemo_share_the_prompt(tmp_path):
    choices = [{"finish_reason": "stop", "routed_experts": nrlre1(filled(routing(8, i), 9))} for i in range(2)]
    for choice in choices:
        choice["token_ids"] = [1] * 4
    assert [len(r.ids) for r in read(write(tmp_path, answer(choices, 5, 8)))[1]] == [8, 3]
    holes = [{**choice, "routed_experts": nrlre1(filled(routing(8), 9, holes=(1, 6)))} for choice in choices]
    _, requests = read(write(tmp_path, answer(holes, 5, 8)))
    assert requests[0].positions.tolist() == [0, 2, 3, 4, 5, 7]
    assert requests[1].positions.tolist() == [5, 7]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nrlre1:", "has the header"),
        ("nrlre1:int8:8x5:AAAA", "has the header"),
        ("nrlre1:uint64:8x5x3:AAAA", "has the header"),
        ("nrlre1:int8:8x5x3:AAAA", r"\(120 bytes\) but holds 3 bytes"),
        ("nrlre1:int8:999999999999x999999999999x999999999999:AAAA", "but holds 3 bytes"),
        ("nrlre1:int8:8x5x3:*", "not base64"),
        ("nrlre1:int8:0x5x3:", "no request with any routing"),
        (nrlre1(np.full((9, 5, 3), -1)), "no request with any routing"),
        (nrlre1(filled(routing(7), 9)), "7 rows of routing"),
        (nrlre1(np.where(routing(8) == 5, -1, routing(8))), "negative expert id -1"),
    ],
)
def test_faulty_rollouts(tmp_path, value, said):
    refuse(write(tmp_path, rollout(value)), said)


# Whatever else arrives


def test_the_debug_trace_of_nemo_holds_no_routing(tmp_path):
    path = write(tmp_path, {"stage": "train", "sha256": "ab", "preview": [1, 2]}, name="r3_trace_host_pid1.jsonl")
    refuse(path, "hashes and previews")


def test_a_file_of_one_form_does_not_hide_another(tmp_path):
    good = vllm()
    for value, said in ((packed(routing(8)), "--source-format dynamo"), (nrlre1(routing(8)), "--source-format nemo")):
        refuse(write(tmp_path, good, answer([{"routed_experts": value}], id="b")), said)


VALID = [
    json.dumps(vllm()),
    json.dumps(nested()),
    json.dumps(sglang()),
    json.dumps(answer([{"finish_reason": "stop", "routed_experts": packed(routing(8))}])),
    json.dumps(rollout(nrlre1(filled(routing(8), 9, holes=(3,))))),
    json.dumps(rollout(routing(8).tolist())),
    "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in generate_chunks("s", usage=True)),
]


@given(
    text=st.sampled_from(VALID),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=3)), max_size=4),
    name=st.sampled_from([None, "vllm", "sglang", "dynamo", "nemo", "megatron", "mlx", "vllm-log"]),
)
def test_damaged_files_only_make_errors_of_ours(tmp_path_factory, text, edits, name):
    data = bytearray(text.encode())
    for place, cut, inserted in edits:
        at = int(place * len(data))
        data[at : at + cut] = inserted
    path = tmp_path_factory.mktemp("f") / "r.jsonl"
    path.write_bytes(bytes(data))
    with contextlib.suppress(TracekitError):
        read(path, source_format=name)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["data", "shape", "dtype", "start"]), inner)
        ),
        max_leaves=10,
    ),
    place=st.sampled_from(["choice", "nvext", "prompt", "rollout", "meta_info"]),
)
def test_any_value_in_the_place_of_the_routing(tmp_path_factory, value, place):
    if place == "rollout":
        document = rollout(value)
    elif place == "meta_info":
        document = {"meta_info": {"routed_experts": value, "prompt_tokens": 5, "completion_tokens": 4}}
    else:
        choice = {"finish_reason": "stop", "routed_experts": value if place == "choice" else None}
        beside = {"nvext": {"routed_experts": value}} if place == "nvext" else {}
        beside |= {"prompt_routed_experts": value} if place == "prompt" else {}
        document = answer([choice], **beside)
    path = write(tmp_path_factory.mktemp("v"), document)
    for name in (None, "vllm", "sglang", "dynamo", "nemo"):
        with pytest.raises(TracekitError):
            read(path, source_format=name)


def test_an_end_that_was_cut_does_not_move_the_rows(tmp_path):
    lost = routing(8)
    lost[-2:] = 0
    choice = {"index": 0, "finish_reason": "stop", "routed_experts": packed(lost, start=None)}
    refuse(write(tmp_path, answer([choice])), "6 rows of routing.*= 8 rows")
    choice["routed_experts"] = nrlre1(filled(routing(6), 8))
    refuse(write(tmp_path, answer([choice])), "6 rows of routing.*= 8 rows")


def test_streams_without_an_id_follow_each_other(tmp_path):
    chunks = [chunk for seed in range(3) for chunk in generate_chunks("s", seed=seed)]
    for chunk in chunks:
        del chunk["request_id"]
    _, requests = read(events(tmp_path, *chunks))
    assert len(requests) == 3
    for seed, request in enumerate(requests):
        assert (request.ids == routing(8, seed)[:, 2:]).all()


def test_streams_that_never_end_cost_no_time(tmp_path):
    started = [generate_chunks(f"open{i}")[0] for i in range(3000)]
    ended = [chunk for i in range(3000) for chunk in generate_chunks(f"s{i}", output=1)]
    path = write(tmp_path, *started, *ended)
    begin = time.perf_counter()
    assert sum(1 for _ in exchanges(path)) == 6000
    assert time.perf_counter() - begin < 5
