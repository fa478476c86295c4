"""vLLM and SGLang responses: what they say, how they are wrapped, and what is refused."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import parse_config

CONFIG = parse_config({"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 3, "first_k_dense_replace": 1})


def routing(rows, seed=0):
    """Rows of 4 layers, k = 3, N = 16, layer 0 dense."""
    ids = np.argsort(np.random.default_rng(seed).random((rows, 4, 16)), axis=2)[..., :3]
    ids[:, 0] = 0
    return ids


def npy_base64(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def vllm(prompt=5, output=4, seed=0, start=0, **fields):
    ids = routing(prompt + output - 1 - start, seed).astype(np.uint8)
    choice = {"index": 0, "finish_reason": "length", "routed_experts": npy_base64(ids)}
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return {"id": f"cmpl-{seed}", "model": "m", "choices": [choice], "usage": usage, **fields}


def sglang(prompt=5, output=4, seed=0, start=0, **fields):
    ids = routing(prompt + output - 1 - start, seed).astype("<i4")
    meta = {"id": f"r{seed}", "prompt_tokens": prompt, "completion_tokens": output}
    meta["routed_experts"] = base64.b64encode(ids.tobytes()).decode()
    return {"text": "", "output_ids": list(range(output)), "meta_info": meta, **fields}


def write(tmp_path, *documents, name="r.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def read(path, **options):
    source = open_source([path], IngestOptions(**{"config": CONFIG, **options}))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


counts = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)
layouts = st.sampled_from(["lines", "array", "pretty array", "lists"])


def lay_out(path, documents, layout):
    if layout == "lines":
        text = "\n\n".join(json.dumps(document) for document in documents)
    elif layout == "lists":
        text = "\n".join(json.dumps([document]) for document in documents)
    else:
        text = json.dumps(documents, indent=1 if layout == "pretty array" else None)
    path.write_text(text)


@given(
    counts=counts, layout=layouts, make=st.sampled_from([vllm, sglang]), envelope=st.sampled_from(["", "log", "batch"])
)
def test_round_trip(tmp_path_factory, counts, layout, make, envelope):
    documents = [make(p, n, i) for i, (p, n) in enumerate(counts)]
    if envelope == "log":
        documents = [{"topic": f"t{i}", "request": {"seed": i}, "response": d} for i, d in enumerate(documents)]
    elif envelope == "batch":
        documents = [
            {"custom_id": f"c{i}", "response": {"status_code": 200, "body": d}} for i, d in enumerate(documents)
        ]
    path = tmp_path_factory.mktemp("r") / "r.json"
    lay_out(path, documents, layout)
    fields = {"": (), "log": ("topic", "seed"), "batch": ("custom_id",)}[envelope]
    source, requests = read(path, label_fields=fields)
    assert source.formats == {make.__name__}
    assert source.meta.engine == make.__name__
    assert source.meta.layers == (1, 2, 3)
    assert source.meta.native_top_k == 3
    for i, ((prompt, output), request) in enumerate(zip(counts, requests, strict=True)):
        assert (request.ids == routing(prompt + output - 1, i)[:, 1:]).all()
        assert (request.prompt_len, request.decode_start, request.first_pos) == (prompt, prompt, 0)
        assert request.request_id == (f"cmpl-{i}" if make is vllm else f"r{i}")
        expected = {"": {}, "log": {"topic": f"t{i}", "seed": str(i)}, "batch": {"custom_id": f"c{i}"}}[envelope]
        assert request.labels == expected


def test_one_pretty_printed_response(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("\ufeff\n" + json.dumps(vllm(), indent=2), encoding="utf-8")
    assert len(read(path)[1]) == 1


def test_version_and_id_space(tmp_path):
    source, _ = read(write(tmp_path, vllm(system_fingerprint="vllm-0.32.0-6016")))
    assert (source.meta.engine_version, source.meta.id_space, source.meta.model) == ("0.32.0", "logical", "m")
    assert source.meta.router_order is None
    source, _ = read(write(tmp_path, vllm(system_fingerprint="vllm-0.24.1")))
    assert any("layer 0" in note and "0.26" in note for note in source.notes)
    source, _ = read(write(tmp_path, sglang()))
    assert (source.meta.engine_version, source.meta.id_space) == (None, "unknown")


def test_start(tmp_path):
    for make, field in ((vllm, "routed_experts_prompt_start"), (sglang, "routed_experts_start_len")):
        document = {"request": {field: 3}, "response": make(8, 4, start=3)}
        _, (request,) = read(write(tmp_path, document))
        assert (request.first_pos, request.prompt_len, len(request.ids)) == (3, 8, 8)
        refuse(write(tmp_path, {"request": {field: 2}, "response": make(8, 4, start=3)}), "8 rows of routing")
        refuse(
            write(tmp_path, {"request": {}, "response": vllm(8, 4, start=3)}),
            r"8 prompt \+ 4 output - 1 - start 0 = 11",
        )
    _, (request,) = read(write(tmp_path, vllm(8, 4, start=3)), requests=[{"first_pos": 3}])
    assert request.first_pos == 3
    # SGLang's rows are all that checks the config's shape: fewer of them are never taken for a later start.
    refuse(write(tmp_path, sglang(8, 4, start=3)), "8 rows of routing.*first_pos")
    assert read(write(tmp_path, sglang(8, 4, start=3)), requests=[{"first_pos": 3}])[1][0].first_pos == 3


def test_token_ids(tmp_path):
    document = vllm(3, 4)
    document["choices"][0].update(prompt_token_ids=[7, 8, 9], token_ids=[1, 2, 3, 4])
    assert read(write(tmp_path, document))[1][0].token_ids.tolist() == [7, 8, 9, 1, 2, 3]
    document["choices"][0]["prompt_token_ids"] = [7, 8]
    refuse(write(tmp_path, document), "2 prompt_token_ids but usage.prompt_tokens is 3")
    _, (request,) = read(write(tmp_path, {"request": {"input_ids": [5, 6]}, "response": sglang(2, 3)}))
    assert request.token_ids.tolist() == [5, 6, 0, 1]


@pytest.mark.parametrize("token_ids", [True, False])
def test_several_choices(tmp_path, token_ids):
    document = vllm(5, 4)
    document["choices"].append(vllm(5, 6, seed=1)["choices"][0])
    document["usage"]["completion_tokens"] = 10
    if token_ids:
        for choice, n in zip(document["choices"], (4, 6), strict=True):
            choice["token_ids"] = list(range(n))
    _, requests = read(write(tmp_path, document))
    assert [(r.request_id, len(r.ids)) for r in requests] == [("cmpl-0/0", 8), ("cmpl-0/1", 5)]
    assert [(r.first_pos, r.prompt_len, r.decode_start) for r in requests] == [(0, 5, 5), (5, 5, 5)]
    assert (requests[1].ids == routing(10, 1)[5:, 1:]).all()
    if not token_ids:
        document["usage"]["completion_tokens"] = 11
        refuse(write(tmp_path, document), "10 output tokens but completion_tokens is 11")


def test_without_counts(tmp_path):
    source, (request,) = read(write(tmp_path, vllm(usage=None)))
    assert (request.prompt_len, request.decode_start) == (None, None)
    assert any("without token counts" in note for note in source.notes)
    assert read(write(tmp_path, vllm(usage=None)), requests=[{"prompt_tokens": 5}])[1][0].decode_start == 5


def test_names_without_an_id(tmp_path):
    for make in (vllm, sglang):
        documents = [make(seed=0), make(seed=1)]
        for document in documents:
            document.pop("id", None)
            document.get("meta_info", {}).pop("id", None)
        assert [r.request_id for r in read(write(tmp_path, *documents))[1]] == ["r/0", "r/1"]
    document = vllm(id="a/../b\n\ud800<i>")
    assert read(write(tmp_path, document))[1][0].request_id == "a/../b\n?<i>"


def test_sglang_in_openai_form(tmp_path):
    native = sglang(5, 4)
    data = native["meta_info"]["routed_experts"]
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    for place in ({"sglext": {"routed_experts": data}}, {"sgl_ext": {"routed_experts": data}}):
        for document in (
            {"id": "x", "choices": [{"index": 0}], "usage": usage, **place},
            {"id": "x", "choices": [{"index": 0, **place}], "usage": usage},
        ):
            source, (request,) = read(write(tmp_path, document))
            assert source.formats == {"sglang"}
            assert (request.ids == routing(8)[:, 1:]).all()
            assert (request.request_id, request.prompt_len) == ("x", 5)
    document = {"id": "x", "choices": [{"meta_info": sglang(5, n, n)["meta_info"]} for n in (4, 2)], "usage": usage}
    assert [(r.request_id, len(r.ids)) for r in read(write(tmp_path, document))[1]] == [("x/0", 8), ("x/1", 1)]


def test_sglang_needs_a_shape(tmp_path):
    path = write(tmp_path, sglang())
    refuse(path, "ids without a shape.*--config", config=None, num_experts=16)
    source, _ = read(path, config=None, num_experts=16, top_k=3)
    assert source.meta.layers == (1, 2, 3)
    wrong = parse_config({"num_hidden_layers": 5, "num_experts": 16, "num_experts_per_tok": 3})
    refuse(path, "96 ids are not whole rows of 5 layers x 3 experts, 8 rows by the token counts", config=wrong)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 3, "first_k_dense_replace": 1})
    )
    assert read(path, config=None)[0].meta.num_experts == 16


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "response without routing.*finish_reason 'length'"),
        ([[[1]]], "contradicts the config"),
        ([[["a"]]], "a list of <U1"),
        ([[[1], [2, 3]]], "a list that is no array"),
        ([[1]], r"shape \(1, 1\)"),
        (7, "routed_experts of type int"),
        ({"data": "", "shape": [1]}, "prime-rl or Dynamo|without routing|has shape"),
        ("nrlre1:int8:1x1x1:AA", "NeMo|claims shape|not base64"),
        ("ObjectRef(1)", "Ray store"),
        ("k05VTVBZ*", "not base64"),
        ("k05VTVBZAQ==", "header"),
        (npy_base64(routing(8).astype(np.uint8))[:-40], "truncated"),
        (npy_base64(routing(8).astype(np.uint8))[:-1], "not base64"),
        (npy_base64(routing(9).astype(np.uint8)), "9 rows of routing"),
        (npy_base64(routing(8).astype(np.float32)), "float32"),
        (npy_base64(routing(8)[0]), r"shape \(4, 3\)"),
        (npy_base64(np.where(routing(8) == 3, -1, routing(8))), "negative expert id -1"),
    ],
)
def test_faulty_routing(tmp_path, value, said):
    document = vllm()
    document["choices"][0]["routed_experts"] = value
    path = write(tmp_path, vllm(seed=7), document)
    assert "r.jsonl:2" in refuse(path, said)
    refuse(write(tmp_path, document), said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "without routing"),
        ("", "without routing"),
        ("AAA", "not base64"),
        ("ÄÖÜ!", "not base64"),
        ("AAAA", "3 bytes"),
        (npy_base64(routing(8)), "a .npy"),
        (base64.b64encode(routing(7).astype("<i4").tobytes()[:-4]).decode(), "not whole rows"),
        (base64.b64encode(routing(9).astype("<i4").tobytes()).decode(), "9 rows of routing"),
    ],
)
def test_faulty_sglang_routing(tmp_path, value, said):
    document = sglang()
    document["meta_info"]["routed_experts"] = value
    assert "r.jsonl:2" in refuse(write(tmp_path, sglang(seed=7), document), said)


def test_mixed_models_and_repeated_ids(tmp_path):
    refuse(write(tmp_path, vllm(), vllm(seed=1, model="other")), "model is other, in the first request m")
    refuse(write(tmp_path, vllm(), vllm()), "two requests have the same id.*r.jsonl:1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[", "cut off|not JSON"),
        ("[1, 2]", "JSON that is no response"),
        ("{}", "JSON without choices"),
        ('{"error": "x"}', "JSON without choices"),
        ('{"choices": []}', "not a response with choices"),
        ('{"choices": 3}', "not a response with choices"),
        ('{"choices": [{}], "usage": {"prompt_tokens": "x"}}', "without routing"),
        ('{"meta_info": 3}', "without routing"),
        ('{"meta_info": {"prompt_tokens": 1.5, "routed_experts": "AAAA"}}', "prompt_tokens is 1.5"),
        ('{"meta_info": {"prompt_tokens": -1, "routed_experts": "AAAA"}}', "prompt_tokens is -1"),
        ("[" * 100_000, "JSON|deep|cut off"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"x": 1' + "0" * 5000 + "}", "not JSON"),
        ('data: {"choices": []}', "streams carry no routing"),
        ('{"layer": 1, "top_indices": [[1]]}', "step is None"),
        ('{"layer": 1, "expert_ids": [1], "phase": "decode"}', "routing events"),
    ],
)
def test_documents_that_are_no_responses(tmp_path, text, said):
    (tmp_path / "r.json").write_text(text)
    refuse(tmp_path / "r.json", said)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"PAR1\x00\x00", "Parquet"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x80\x04\x95\x00", "pickle"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a": 1}        ', "safetensors"),
        (b'{"\xff\xfe": 1}', "not JSON|UTF-8"),
        (b'[{"\xff\xfe": 1}]', "UTF-8"),
    ],
)
def test_files_of_other_formats(tmp_path, data, said):
    (tmp_path / "r").write_bytes(data)
    refuse(tmp_path / "r", said)


def test_long_arrays_are_read_in_pieces(tmp_path, monkeypatch):
    from tracekit.sources import jsonio

    monkeypatch.setattr(jsonio, "_PIECE", 7)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"é🙂": i, **vllm(seed=i)} for i in range(3)], ensure_ascii=False), encoding="utf-8")
    assert len(read(path)[1]) == 3
    for extra in ("]", "x", "{}"):
        path.write_text(json.dumps([vllm()]) + extra)
        refuse(path, "not JSON|after the array")


@pytest.mark.parametrize("make", [vllm, sglang])
@pytest.mark.parametrize("layout", ["lines", "array", "pretty array"])
def test_cut_off_files(tmp_path, make, layout):
    path = tmp_path / "r.json"
    lay_out(path, [make(seed=i) for i in range(3)], layout)
    data = path.read_bytes()
    ends = {0, *(i for i in range(len(data)) if data[i : i + 2] == b"\n\n"), len(data)}
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        if length in ends or (layout == "lines" and not data[:length].rstrip().endswith(b"}")) or layout != "lines":
            with pytest.raises(SourceError):
                read(path)


def test_a_folder_of_responses(tmp_path):
    for i in range(3):
        write(tmp_path, vllm(seed=i), name=f"{i}.json")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.json").touch()
    source, requests = read(tmp_path)
    assert [r.request_id for r in requests] == ["cmpl-0", "cmpl-1", "cmpl-2"]
    assert any("'notes.txt'" in note and "'empty.json'" in note for note in source.notes)
    np.save(tmp_path / "a.npy", routing(3))
    refuse(tmp_path, "several formats: arrays, vllm")
    assert len(read(tmp_path, source_format="vllm")[1]) == 3


@given(
    record=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "meta_info", "routed_experts", "usage", "prompt_tokens", "response", "body", "id"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_only_makes_source_errors(tmp_path_factory, record):
    path = write(tmp_path_factory.mktemp("j"), record)
    for name in (None, "vllm", "sglang"):
        with pytest.raises(SourceError):
            read(path, source_format=name)
