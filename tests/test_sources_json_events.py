"""Logs of routing events: Megatron's router traces, MLX's moe-trace, and what ``VLLM_LOG_MOE`` patches write."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError, TracekitError
from tracekit.schema import Histogram
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import parse_config

N, K, LAYERS = 16, 3, 4


def routing(rows, seed=0, layers=LAYERS):
    return np.argsort(np.random.default_rng(seed).random((rows, layers, N)), axis=2)[..., :K]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path, **options):
    source = open_source([path], IngestOptions(**{"num_experts": N, **options}))
    found = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, found


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def has_note(source, text):
    return any(text in note for note in source.notes)


def count(ids):
    """Counts ``[layers, N]`` of ``[tokens, layers, k]``."""
    return np.stack([np.bincount(ids[:, layer].reshape(-1), minlength=N) for layer in range(ids.shape[1])])


# Megatron


def records(steps, rank=0, numbers=range(LAYERS), **fields):
    """Records of steps ``[tokens, layers, k]``, as the tracer flushes them: layer by layer, step after step."""
    return [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": number,
            "rank": rank,
            "num_tokens": len(ids),
            "topk": ids.shape[2],
            **fields,
            "top_indices": ids[:, entry].tolist(),
        }
        for step, ids in enumerate(steps)
        for entry, number in enumerate(numbers)
    ]


def trace(tmp_path, *ranks, name="router_trace_rank{}.jsonl"):
    for rank, found in enumerate(ranks):
        lines(tmp_path / name.format(rank), found)
    return tmp_path


def packed(*sizes, seed=0):
    return [routing(size, seed + i) for i, size in enumerate(sizes)]


def test_megatron_packed_steps_become_counts(tmp_path):
    steps = packed(6, 6, 6)
    source, found = read(trace(tmp_path, records(steps)) / "router_trace_rank0.jsonl")
    assert source.formats == {"megatron"}
    assert (source.meta.histogram, source.meta.top_k, source.meta.layers) == (True, K, (0, 1, 2, 3))
    assert all(isinstance(record, Histogram) for record in found)
    for record, ids in zip(found, steps, strict=True):
        assert (record.counts == count(ids)).all()
    assert [record.request_id for record in found] == [f"router_trace_rank0/{i}" for i in range(3)]
    assert has_note(source, "packed batches without request ids")


def test_megatron_one_request_at_a_time_becomes_requests(tmp_path):
    steps = packed(5, 1, 1, 7, 1)
    source, (first, second) = read(trace(tmp_path, records(steps)))
    assert not source.meta.histogram
    assert (first.ids == np.concatenate(steps[:3])).all()
    assert (second.ids == np.concatenate(steps[3:])).all()
    assert (first.prompt_len, first.decode_start, first.first_pos, second.prompt_len) == (5, 5, 0, 7)
    assert has_note(source, "taken for prompts")


@pytest.mark.parametrize("sizes", [(8, 2, 2, 1, 1), (8, 8, 1), (4, 4, 4), (5, 5)])
def test_megatron_steps_that_could_be_several_requests_are_counts(tmp_path, sizes):
    source, found = read(trace(tmp_path, records(packed(*sizes))))
    assert source.meta.histogram
    assert len(found) == len(sizes)


def test_megatron_ranks_add_up(tmp_path):
    a, b = packed(6, 6), packed(4, 4, seed=9)
    source, found = read(trace(tmp_path, records(a), records(b, rank=1)))
    assert source.formats == {"megatron"}
    assert [record.request_id.rpartition("/")[2] for record in found] == ["0", "1"]
    for step in range(2):
        assert (found[step].counts == count(a[step]) + count(b[step])).all()


def test_megatron_replicas_count_once(tmp_path):
    steps = packed(6, 6)
    source, found = read(trace(tmp_path, *(records(steps, rank) for rank in range(3))))
    assert (found[0].counts == count(steps[0])).all()
    assert has_note(source, "count once: router_trace_rank1.jsonl, router_trace_rank2.jsonl left out")
    single = packed(5, 1, 1)
    for path in tmp_path.iterdir():
        path.unlink()
    _, (request,) = read(trace(tmp_path, records(single), records(single, 1)))
    assert len(request.ids) == 7


def test_other_files_in_a_folder_of_ranks_are_named(tmp_path):
    trace(tmp_path, records(packed(6)), records(packed(4)))
    (tmp_path / "logits_rank0.bin").write_bytes(bytes(9))
    source, _ = read(tmp_path)
    assert has_note(source, "not part of the trace, left out: 'logits_rank0.bin'")


def test_megatron_two_ranks_of_single_requests(tmp_path):
    a, b = packed(5, 1), packed(4, 1, 1, seed=9)
    _, (first, second) = read(trace(tmp_path, records(a), records(b, 1)))
    assert first.request_id.endswith("rank0/0")
    assert second.request_id.endswith("rank1/0")
    assert (second.ids == np.concatenate(b)).all()


def test_megatron_pipeline_stages(tmp_path):
    ids = packed(6, 6)
    stages = [
        records([step[:, :2] for step in ids], 0, range(2)),
        records([step[:, 2:] for step in ids], 1, range(2, 4)),
    ]
    source, found = read(trace(tmp_path, *stages))
    assert source.meta.layers == (0, 1, 2, 3)
    assert (found[1].counts == count(ids[1])).all()
    overlapping = records([step[:, 1:] for step in ids], 1, range(1, 4))
    refuse(trace(tmp_path, stages[0], overlapping), "some of them the same.*local to a pipeline stage")


def test_megatron_microbatches_are_counted_together(tmp_path):
    a, b = packed(1, 1)
    repeated = [*records([a]), *records([b])]
    source, (record,) = read(trace(tmp_path, repeated))
    assert source.meta.histogram
    assert (record.counts == count(np.concatenate([a, b]))).all()


@pytest.mark.parametrize(
    ("numbers", "note"),
    [((1, 2, 3), None), ((0, 1, 2), "layer counted the MoE layers"), ((2, 3, 4), "numbered from 1")],
)
def test_megatron_layer_numbers_by_the_config(tmp_path, numbers, note):
    config = parse_config(
        {"num_hidden_layers": 4, "num_experts": N, "num_experts_per_tok": K, "first_k_dense_replace": 1}
    )
    steps = [ids[:, 1:] for ids in packed(6, 6)]
    path = trace(tmp_path, records(steps, numbers=numbers))
    source, found = read(path, config=config)
    assert source.meta.layers == (1, 2, 3)
    assert (found[0].counts == count(steps[0])).all()
    assert note is None or has_note(source, note)
    assert read(path)[0].meta.layers == numbers


def test_megatron_layers_that_are_not_the_configs(tmp_path):
    config = parse_config({"num_hidden_layers": 9, "num_experts": N, "num_experts_per_tok": K, "mlp_only_layers": []})
    refuse(trace(tmp_path, records(packed(6, 6))), "which are not the config's MoE layers.*pipeline", config=config)


def test_megatron_leaves_out_mtp(tmp_path):
    steps = packed(6, 6)
    mtp = [{**record, "block": "mtp", "mtp_idx": 0} for record in records(packed(6, 6, seed=50))]
    both = [record for pair in zip(records(steps), mtp, strict=True) for record in pair]
    source, found = read(trace(tmp_path, both))
    assert (found[0].counts == count(steps[0])).all()
    assert has_note(source, "blocks other than the decoder were left out: mtp")
    refuse(trace(tmp_path, mtp), "no record of the decoder")


def test_megatron_steps_with_dropped_records_are_left_out(tmp_path):
    found = records(packed(6, 6, 6))
    source, kept = read(trace(tmp_path, found[:5] + found[6:]))
    assert [record.request_id.rpartition("/")[2] for record in kept] == ["0", "2"]
    assert has_note(source, "different numbers of tokens")
    refuse(trace(tmp_path, found[:3] + found[5:8]), "no step in which every layer")
    single = records(packed(5, 1, 1))
    refuse(trace(tmp_path, single[:-1]), "step 2 has no layer 3.*cut off")


def test_megatron_sorted_ids_lose_the_router_order(tmp_path):
    steps = [np.sort(ids, axis=2) for ids in packed(9, 1, 1)]
    source, _ = read(trace(tmp_path, records(steps)))
    assert source.meta.router_order is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": None}, "step is None"),
        ({"step": -1}, "step is -1"),
        ({"step": 1.5}, "step is 1.5"),
        ({"layer": "x"}, "layer is x"),
        ({"layer": 1 << 20}, "layer is 1048576"),
        ({"num_tokens": 7}, "num_tokens is 7 but top_indices has 6"),
        ({"topk": 2}, "topk is 2 but top_indices has 3"),
        ({"top_indices": [[1, 2], [3]]}, "no array"),
        ({"top_indices": [[1.5]]}, "float64"),
        ({"top_indices": "x"}, "shape"),
        ({"top_indices": [[1, 2, 2]] * 6}, "twice in one row"),
        ({"top_indices": [[1, 2, 16]] * 6}, "expert id 16 of 16"),
        ({"top_indices": [[1, 2, -1]] * 6}, "expert id -1"),
        ({"top_indices": [[1, 2, 3, 4]] * 6, "topk": 4}, r"k \[3, 4\]"),
    ],
)
def test_megatron_faulty_records(tmp_path, change, said):
    found = records(packed(6, 6))
    found[5] |= change
    refuse(trace(tmp_path, found), said)


def test_megatron_other_faults(tmp_path):
    found = records(packed(6, 6))
    refuse(trace(tmp_path, found), "how many experts.*--num-experts", num_experts=None)
    refuse(trace(tmp_path, found[4:] + found[:4]), "step 0 after step 1.*Two runs")
    path = trace(tmp_path, found) / "router_trace_rank0.jsonl"
    path.write_text(path.read_text()[:-9])
    refuse(path, "not JSON.*cut its last line")
    refuse(trace(tmp_path, found), "--phase decode, but counts", phase="decode")


# MLX


def events(ids, prompt=5, scores=True, **fields):
    """Events as moe-trace writes them: a prompt layer by layer, then the output token by token; ids in no order."""
    tokens = [(t, layer) for layer in range(ids.shape[1]) for t in range(prompt)]
    tokens += [(t, layer) for t in range(prompt, len(ids)) for layer in range(ids.shape[1])]
    found = []
    for t, layer in tokens:
        event = {"phase": "prefill" if t < prompt else "decode", "token_index": t, "layer": layer}
        event["expert_ids"] = ids[t, layer, ::-1].tolist()
        if scores:
            event["scores"] = [0.2, 0.3, 0.5]
        found.append({**event, **fields})
    return found


def test_mlx(tmp_path):
    ids = routing(8)
    source, (request,) = read(
        lines(tmp_path / "r.jsonl", events(ids, model="q", workload="code")), label_fields=("workload",)
    )
    assert source.formats == {"mlx"}
    # The last id of each event has the largest score: it is the router's first choice.
    assert (request.ids == ids).all()
    assert np.allclose(request.weights[0, 0], [0.5, 0.3, 0.2])
    assert (source.meta.router_order, source.meta.model, source.meta.engine) == (True, "q", "mlx")
    assert (request.prompt_len, request.decode_start, request.labels) == (5, 5, {"workload": "code"})
    assert has_note(source, "in the order of their scores")


def test_mlx_without_scores_has_no_order(tmp_path):
    source, (request,) = read(lines(tmp_path / "r.jsonl", events(routing(8), scores=False)))
    assert source.meta.router_order is False
    assert request.weights is None


def test_mlx_several_requests(tmp_path):
    named = [event for i in range(3) for event in events(routing(8, i), prompt_id=f"p{i}")]
    _, found = read(lines(tmp_path / "r.jsonl", named))
    assert [r.request_id for r in found] == ["p0", "p1", "p2"]
    assert (found[2].ids == routing(8, 2)).all()
    unnamed = [event for i in range(3) for event in events(routing(8, i))]
    assert [r.request_id for r in read(lines(tmp_path / "r.jsonl", unnamed))[1]] == ["r/0", "r/1", "r/2"]
    # The next prompt may begin with another layer: a prompt after decoding is another request.
    second = events(routing(8, 1))
    second[:20] = second[:20][::-1]
    assert len(read(lines(tmp_path / "r.jsonl", events(routing(8)) + second))[1]) == 2


def test_mlx_decode_only_and_holes(tmp_path):
    decode = [event for event in events(routing(8)) if event["phase"] == "decode"]
    _, (request,) = read(lines(tmp_path / "r.jsonl", decode))
    assert (request.first_pos, request.decode_start) == (5, 5)
    holes = [event for event in events(routing(8)) if event["token_index"] not in (2, 6)]
    _, (request,) = read(lines(tmp_path / "r.jsonl", holes))
    assert request.positions.tolist() == [0, 1, 3, 4, 5, 7]
    assert (request.ids == routing(8)[[0, 1, 3, 4, 5, 7]]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phase": "verify"}, "phase is 'verify'"),
        ({"phase": ["decode"]}, "phase is"),
        ({"phase": "prefill"}, "two requests|no event|decode token"),
        ({"token_index": -1}, "token is -1"),
        ({"token_index": True}, "token is True"),
        ({"layer": -1}, "layer is -1"),
        ({"layer": 9}, "no event of token"),
        ({"token_index": 5}, "has token 5 of layer . twice"),
        ({"expert_ids": []}, r"has the experts \[\]"),
        ({"expert_ids": ["a", 2, 3]}, "has the expert a"),
        ({"expert_ids": [1, 2, 1 << 40]}, "has the expert 1099511627776"),
        ({"expert_ids": [1, 2]}, "has 2 experts, events before it 3"),
        ({"expert_ids": [1, 2, 2]}, "expert 2 twice in one row"),
        ({"expert_ids": [1, 2, 99]}, "expert id 99"),
        ({"scores": None}, "in some events only"),
        ({"scores": [1, 2]}, "has the weights"),
        ({"scores": [1, 2, float("nan")]}, "has the weight nan"),
        ({"scores": [1, 2, 10**400]}, "not JSON|has the weight"),
    ],
)
def test_mlx_faulty_events(tmp_path, change, said):
    found = events(routing(8))
    found[-2] |= change
    refuse(lines(tmp_path / "r.jsonl", found), said)


def test_mlx_cut_off(tmp_path):
    refuse(lines(tmp_path / "r.jsonl", events(routing(8))[:-1]), "no event of token 7 in layer 3.*cut its last token")
    refuse(lines(tmp_path / "r.jsonl", [*events(routing(8)), {"x": 1}]), "no routing event")


# VLLM_LOG_MOE

META = {
    "type": "meta",
    "model_id": "m",
    "vllm_version": "0.15.1",
    "torch_version": "2.9",
    "device": "cuda",
    "seed": 1234,
    "layers_logged": [0],
    "top_k": K,
}
WEIGHTS = [0.5, 0.3, 0.2]


def route(ids, token, layer=0, req="r1"):
    route = {"type": "route", "req_id": req, "token_idx": token, "layer": layer}
    return {**route, "topk_ids": list(map(int, ids)), "topk_weights": WEIGHTS}


def log(passes, layers=1, per_pass=True, call=False, meta_each=False):
    """Passes ``[rows, layers, k]``; ``token_idx`` counts the rows of the pass, or all rows of the log."""
    found, seen = [META], 0
    for number, ids in enumerate(passes):
        for layer in range(layers):
            if meta_each and number:
                found.append(META)
            for row in range(len(ids)):
                token = row if per_pass else seen
                found.append(route(ids[row, layer], token, layer, f"call_{number}" if call else "r1"))
                seen += 1
    return found


def batch(sizes, seed=0, layers=1):
    return [routing(size, seed + i, layers) for i, size in enumerate(sizes)]


def test_log_of_requests_with_ids(tmp_path):
    """Rows of three requests mixed as continuous batching does, with their own ids and positions."""
    ids = [routing(n, i, 2) for i, n in enumerate((6, 7, 5))]
    found = [META]
    for layer in range(2):
        for i in range(3):
            found += [route(ids[i][t, layer], t, layer, f"q{i}") for t in range(4)]
    for t in range(4, 7):
        for layer in range(2):
            found += [route(ids[i][t, layer], t, layer, f"q{i}") for i in range(3) if t < len(ids[i])]
    source, requests = read(lines(tmp_path / "r.jsonl", found))
    assert source.formats == {"vllm-log"}
    assert [r.request_id for r in requests] == ["q0", "q1", "q2"]
    for request, wanted in zip(requests, ids, strict=True):
        assert (request.ids == wanted).all()
        assert request.first_pos == 0
    assert np.allclose(requests[0].weights[0, 0], WEIGHTS)
    meta = source.meta
    assert (meta.engine, meta.engine_version, meta.model, meta.layers) == ("vllm", "0.15.1", "m", (0, 1))
    assert (meta.router_order, meta.id_space) == (True, "unknown")
    assert has_note(source, "ids come back after others")


def test_log_whose_token_idx_counts_all_rows(tmp_path):
    ids = [routing(4, i, 1) for i in range(2)]
    rows = [(i, t) for t in range(4) for i in range(2)]
    found = [META, *(route(ids[i][t, 0], n, 0, f"q{i}") for n, (i, t) in enumerate(rows))]
    source, requests = read(lines(tmp_path / "r.jsonl", found))
    assert all((request.ids == wanted).all() for request, wanted in zip(requests, ids, strict=True))
    assert [r.positions for r in requests] == [None, None]
    assert has_note(source, "token_idx counts all rows")


def test_log_of_one_request_at_a_time(tmp_path):
    passes = batch((6, 1, 1, 4, 1), layers=2)
    for form in ({}, {"per_pass": False}, {"call": True, "per_pass": False}, {"meta_each": True, "per_pass": False}):
        source, (first, second) = read(lines(tmp_path / "r.jsonl", log(passes, 2, **form)))
        assert (first.ids == np.concatenate(passes[:3])).all()
        assert (first.prompt_len, first.decode_start, second.prompt_len) == (6, 6, 4)
        assert has_note(source, "one request at a time")


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_log_is_spooled_in_pieces(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("tracekit.sources.readers.vllm_log._ROWS_AT_ONCE", rows)
    passes = batch((6, 1, 1))
    _, (request,) = read(lines(tmp_path / "r.jsonl", log(passes)))
    assert (request.ids == np.concatenate(passes)).all()


def test_log_warm_up_is_left_out(tmp_path):
    passes = [np.repeat(routing(1, 9, 1), 50, axis=0), *batch((6, 1, 1))]
    source, (request,) = read(lines(tmp_path / "r.jsonl", log(passes)))
    assert (request.ids == np.concatenate(passes[1:])).all()
    assert has_note(source, "50 rows of other passes (warm-up")


def test_log_of_a_batch_is_put_back_into_sequences(tmp_path):
    """Three requests decode together until one ends, then two: who is left is not known, so sequences end there."""
    passes = batch((30, 3, 3, 3, 3, 2, 2, 2))
    source, requests = read(lines(tmp_path / "r.jsonl", log(passes)))
    assert [r.request_id for r in requests] == [f"r/pass1-4/{j}" for j in range(3)] + [
        f"r/pass5-7/{j}" for j in range(2)
    ]
    for j in range(3):
        assert (requests[j].ids[:, 0] == np.stack([ids[j, 0] for ids in passes[1:5]])).all()
    assert all(r.decode_start == 0 for r in requests)
    assert has_note(source, "30 rows of other passes")
    assert has_note(source, "joined to sequences")


@pytest.mark.parametrize(
    "sizes",
    [
        (30, 3, 3, 3, 3),  # nobody ends: three requests of one row, or one of three speculated rows
        (30, 4, 4, 4, 2, 2, 2),  # ends by two: a request of two rows a pass
        (64, 64, 64, 10, 4, 4),  # prompts cut in chunks of one size
        (5, 9, 7),
    ],
)
def test_log_that_does_not_show_who_is_who_becomes_counts(tmp_path, sizes):
    passes = batch(sizes)
    source, (record,) = read(lines(tmp_path / "r.jsonl", log(passes)))
    assert (source.meta.histogram, source.meta.top_k) == (True, K)
    assert (record.counts == count(np.concatenate(passes))).all()
    assert has_note(source, "does not tell requests apart")


def test_log_with_one_counter_and_one_id_becomes_counts(tmp_path):
    passes = batch((6, 1, 1))
    source, (record,) = read(lines(tmp_path / "r.jsonl", log(passes, per_pass=False)))
    assert source.meta.histogram
    assert (record.counts == count(np.concatenate(passes))).all()
    # The number of a pass in req_id is no request: nothing comes back.
    source, _ = read(lines(tmp_path / "r.jsonl", log(batch((9, 3, 3, 3)), per_pass=False, call=True)))
    assert source.meta.histogram


def test_log_says_how_many_experts_there_are(tmp_path):
    found = log(batch((6, 1, 1)))
    found[0] = {**META, "num_experts": N}
    assert read(lines(tmp_path / "r.jsonl", found), num_experts=None)[0].meta.num_experts == N
    found = log(batch((9, 9)))
    refuse(lines(tmp_path / "r.jsonl", found), "how many experts", num_experts=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk_ids": [1, 2]}, "has 2 experts.*unlike the first"),
        ({"topk_ids": "x"}, "has the experts x"),
        ({"topk_ids": [1, 2, 2]}, "twice in one row"),
        ({"topk_ids": [1, 2, 77]}, "expert id 77"),
        ({"topk_weights": None}, "without weights"),
        ({"topk_weights": ["a", 1, 2]}, "has the weight a"),
        ({"token_idx": -1}, "token_idx is -1"),
        ({"layer": None}, "layer is None"),
    ],
)
def test_log_faulty_lines(tmp_path, change, said):
    found = log(batch((6, 1, 1)))
    found[4] |= change
    refuse(lines(tmp_path / "r.jsonl", found), said)


def test_log_other_faults(tmp_path):
    refuse(lines(tmp_path / "r.jsonl", [META]), "no route line")
    refuse(lines(tmp_path / "r.jsonl", [META, {"x": 1}]), "neither meta nor route")
    ids = [routing(5, i, 2) for i in range(2)]
    rows = [(t, layer, i) for t in range(5) for layer in range(2) for i in range(2)]
    found = [META, *(route(ids[i][t, layer], t, layer, f"q{i}") for t, layer, i in rows)]
    assert len(read(lines(tmp_path / "r.jsonl", found))[1]) == 2
    refuse(lines(tmp_path / "r.jsonl", found[:-1]), "not the same tokens in every layer.*cut its last pass")


# Damaged files

VALID = [
    "".join(json.dumps(record) + "\n" for record in found)
    for found in (
        records(packed(4, 1, 1)),
        records(packed(4, 4)),
        events(routing(4), prompt=2),
        log(batch((4, 1, 1))),
        log(batch((9, 2, 2, 1, 1))),
    )
]


@given(
    text=st.sampled_from(VALID),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=3)), max_size=4),
    drop=st.lists(st.integers(0, 40), max_size=3),
    name=st.sampled_from([None, "megatron", "mlx", "vllm-log"]),
)
def test_damaged_files_only_make_errors_of_ours(tmp_path_factory, text, edits, drop, name):
    kept = [line for i, line in enumerate(text.splitlines(keepends=True)) if i not in drop]
    data = bytearray("".join(kept).encode())
    for place, cut, inserted in edits:
        at = int(place * len(data))
        data[at : at + cut] = inserted
    path = tmp_path_factory.mktemp("f") / "router_trace_rank0.jsonl"
    path.write_bytes(bytes(data))
    for given_path in (path, path.parent):
        with contextlib.suppress(TracekitError):
            read(given_path, source_format=name)


@given(
    values=st.dictionaries(
        st.sampled_from(
            ["step", "layer", "token_index", "token_idx", "expert_ids", "topk_ids", "top_indices", "phase"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=6,
        ),
    ),
    base=st.sampled_from([0, 2, 3]),
)
def test_any_value_in_a_record(tmp_path_factory, values, base):
    found = [json.loads(line) for line in VALID[base].splitlines()]
    found[-1] |= {key: value for key, value in values.items() if key in found[-1]}
    with contextlib.suppress(TracekitError):
        read(lines(tmp_path_factory.mktemp("v") / "r.jsonl", found))


def test_megatron_lines_that_name_two_layers(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text('{"step": 0, "layer": 0, "layer": 7, "num_tokens": 2, "topk": 1, "top_indices": [[1], [2]]}\n')
    refuse(path, "names layer 7 and another")
