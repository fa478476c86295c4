"""Real traces and real responses, each with the figures that are known of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tracekit.errors import SourceError
from tracekit.sources import IngestOptions, load_config, open_source


def read(path, **options):
    source = open_source([path], IngestOptions(**options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def test_gptoss(shared):
    folder = shared / "traces/gptoss20b_subset64"
    sidecar = json.loads((folder / "requests.json").read_text())
    source, requests = read(
        folder / "trace.npz", requests=sidecar, label_fields=("dataset",), num_experts=32, phase="decode"
    )
    assert len(requests) == 64
    assert sum(len(r.ids) for r in requests) == 28_262
    assert (source.meta.layers, source.meta.top_k, source.meta.num_experts) == (tuple(range(24)), 4, 32)
    assert [r.label for r in requests] == [entry["dataset"] for entry in sidecar]
    assert [len(r.ids) for r in requests] == [entry["n_tokens"] for entry in sidecar]
    assert all(r.decode_start == r.first_pos == 0 and r.ids.dtype == np.uint8 for r in requests)
    with np.load(folder / "trace.npz") as stored:
        assert (np.concatenate([r.ids for r in requests]) == stored["expert_ids"]).all()
    with pytest.raises(SourceError, match="no label field 'topic'; expected one of category, dataset"):
        read(folder / "trace.npz", requests=sidecar, label_fields=("topic",), num_experts=32)
    with pytest.raises(SourceError, match=r"largest id of this request is 31\)"):
        read(folder / "trace.npz")


def test_glm45air(shared):
    source, requests = read(shared / "traces/glm45air_decode/trace.npz", num_experts=128, phase="decode")
    assert source.meta.layers == tuple(range(1, 46))
    assert source.meta.router_order is False
    assert [len(r.ids) for r in requests] == [41, 41, 41]


def test_gemma(shared):
    source, (request,) = read(shared / "traces/gemma4_26b_route_trace/gemma.route.csv")
    meta = source.meta
    assert (meta.num_experts, meta.top_k, meta.layers) == (128, 6, tuple(range(30)))
    assert meta.router_order is True
    assert meta.model == "google_gemma-4-26B-A4B-it-Q4_K_M.gguf"
    assert len(meta.extra["expert_bytes"]) == 30
    assert meta.extra["expert_bytes"]["7"] == 3_593_216
    assert (request.prompt_len, request.decode_start, len(request.ids)) == (29, 29, 157)
    assert request.ids[0, 0].tolist() == [79, 102, 114, 19, 54, 46]
    assert (np.diff(request.weights) <= 0).all()


def test_olmoe(shared):
    source, requests = read(shared / "moe/traces/olmoe/npz", label_fields=("domain", "kind"))
    manifest = json.loads((shared / "moe/traces/olmoe/manifest.json").read_text())
    by_id = {entry["id"]: entry for entry in manifest}
    assert len(requests) == 378
    assert sum(len(r.ids) for r in requests) == 96_034
    assert (source.meta.router_order, source.meta.native_top_k) == (True, 4)
    for request in requests:
        entry = by_id[request.request_id]
        assert request.labels == {"domain": entry["domain"], "kind": entry["kind"]}
        assert request.decode_start == entry["prompt_len"]
        assert len(request.ids) == len(request.token_ids) == len(request.weights) == entry["rows"]


def test_sglang_responses_equal_the_arrays(shared):
    folder = shared / "moe/traces/olmoe"
    source, requests = read(folder / "sglang_responses.jsonl", label_fields=("domain",))
    assert source.meta.engine == "sglang"
    assert len(requests) == 56
    for request in requests:
        with np.load(folder / "npz" / f"{request.request_id}.npz") as stored:
            assert (request.ids == stored["routed_experts"]).all()
            assert request.prompt_len == stored["prompt_len"]
            assert request.label == str(stored["domain"])


@pytest.mark.parametrize(("folder", "count"), [("vllm_olmoe", 56), ("vllm_olmoe_spec", 42)])
def test_vllm_request_outputs(shared, folder, count):
    source, requests = read(shared / "moe/traces" / folder, label_fields=("domain",), num_experts=32)
    index = json.loads((shared / "moe/traces" / folder / "index.json").read_text())["requests"]
    by_id = {f"npz/{entry['id']}": entry for entry in index}
    assert len(requests) == count
    assert source.meta.router_order is None
    for request in requests:
        entry = by_id[request.request_id]
        assert (request.prompt_len, len(request.ids)) == (entry["prompt_len"], entry["shape"][0])
        assert request.label == entry["domain"]


def test_vllm_http(shared):
    config = load_config(shared / "moe/models/glm4moe")
    source, requests = read(shared / "moe/traces/vllm_http/responses.jsonl", label_fields=("domain",), config=config)
    assert len(requests) == 12
    meta = source.meta
    assert (meta.layers, meta.top_k, meta.num_experts, meta.native_top_k) == ((1, 2, 3, 4, 5), 6, 64, 6)
    assert (meta.model, meta.engine_version, meta.id_space) == ("tiny-glm", "0.32.0", "logical")
    assert "layer 0 is dense (all zero) and was left out" in source.notes
    by_label = {}
    for request in requests:
        by_label.setdefault(request.label, []).append(request)
        assert (request.prompt_len, request.decode_start) == (64, 64)
        assert len(request.token_ids) == len(request.ids)

    def sets(request, start=0):
        return np.sort(request.ids[start:], axis=2)

    (repeat,), (late,) = by_label["repeat-of-0"], by_label["start=40"]
    assert (sets(repeat) == sets(by_label["c_header"][0])).all()
    assert (late.first_pos, len(late.ids)) == (40, 71)
    assert (sets(late) == sets(by_label["dictionary"][0], 40)).all()
    first, second = by_label["n=2"]
    assert (first.request_id, second.request_id) == ("cmpl-8c537c368d71c7ac/0", "cmpl-8c537c368d71c7ac/1")
    # The second choice repeated the prompt's rows, which are kept once.
    assert (first.first_pos, second.first_pos, second.decode_start) == (0, 64, 64)
    assert (len(first.ids), len(second.ids)) == (111, 47)
    assert (sets(first) == sets(by_label["json"][0])).all()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("moe/traces/vllm_http/stream.txt", "streams carry no routing"),
        ("moe/models/olmoe/model.safetensors", "safetensors"),
        ("traces/olmoe_counts/counts.json", "JSON without choices"),
        ("moe/traces/olmoe", "several formats: arrays, sglang"),
    ],
)
def test_what_is_no_trace_says_so(shared, path, said):
    with pytest.raises(SourceError, match=said):
        read(shared / path)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("traces/gptoss20b_subset64/trace.npz", {"num_experts": 32}),
        ("traces/glm45air_decode/trace.npz", {"num_experts": 128}),
        ("traces/gemma4_26b_route_trace/gemma.route.csv", {}),
        ("moe/traces/olmoe/npz/spec_sampled-json-0333.npz", {}),
        ("moe/traces/olmoe/sglang_responses.jsonl", {"num_experts": 32, "top_k": 4}),
        ("moe/traces/vllm_http/responses.jsonl", {"num_experts": 64}),
    ],
)
def test_cut_off_files_only_make_source_errors(shared, tmp_path, path, options):
    copy = tmp_path / path.rpartition("/")[2]
    shutil.copyfile(shared / path, copy)
    size = copy.stat().st_size
    whole = copy.read_bytes()
    for length in sorted({1, 7, 100, 1000, *(size * i // 9 for i in range(9)), size - 1}):
        copy.write_bytes(whole[:length])
        try:
            _, requests = read(copy, **options)
        except SourceError:
            continue
        # Cut between two lines, or inside a last value that nobody reads.
        assert copy.suffix in (".jsonl", ".csv")
        assert requests
