"""Sources that hold counts only: TensorRT-LLM, imatrix, MoE-Infinity, CSV tables."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, load_config, open_source
from tracekit.sources.gguf import read_gguf


def read(path, **options):
    source = open_source([path], IngestOptions(**options))
    records = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    assert source.meta.histogram
    return source, records


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def chosen(tokens, layers, experts, top_k, seed=0):
    """Counts ``[layers, experts]`` of tokens that choose k different experts each."""
    ids = np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[..., :top_k]
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(layers)])


# TensorRT-LLM


def safetensors(path, tensors, header=None):
    at, entries, data = 0, {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        kind = {"<i8": "I64", "<i4": "I32", "<f4": "F32"}[array.dtype.str]
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(raw)]}
        at, data = at + len(raw), data + raw
    text = json.dumps(entries if header is None else header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensorrt(folder, ranks, slots=16, top_k=2, **meta):
    """``ranks`` is one dict of (iteration, layer) -> counts for each rank."""
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": slots, "num_experts_per_token": top_k} | meta))
    for rank, tables in enumerate(ranks):
        named = {f"{i}_{layer}": np.asarray(n, np.int64) for (i, layer), n in tables.items()}
        safetensors(folder / f"rank{rank}.safetensors", named)
    return folder


FILES = ("meta_info.json", "rank0.safetensors")


def rank(seed, iterations=(100, 101), layers=(3, 4, 5), tokens=20):
    made = {i: chosen(tokens, len(layers), 16, 2, seed * 10 + i) for i in iterations}
    return {(i, layer): made[i][at] for i in iterations for at, layer in enumerate(layers)}


def test_tensorrt_ranks_add_up(tmp_path):
    ranks = [rank(1), rank(2)]
    source, records = read(tensorrt(tmp_path / "expert_statistic", ranks))
    assert (source.meta.num_experts, source.meta.top_k, source.meta.layers) == (16, 2, (3, 4, 5))
    assert (source.meta.engine, source.meta.source_format) == ("TensorRT-LLM", "tensorrt-llm")
    assert source.meta.id_space == "unknown"  # slots, where the load balancer is on
    assert [r.request_id for r in records] == ["expert_statistic/100", "expert_statistic/101"]
    for record, iteration in zip(records, (100, 101), strict=True):
        expected = [sum(r[iteration, layer] for r in ranks) for layer in (3, 4, 5)]
        assert (record.counts == expected).all()
    assert not source.notes


def test_tensorrt_ranks_that_saw_the_same_tokens_count_once(tmp_path):
    source, records = read(tensorrt(tmp_path / "t", [rank(1), rank(1)]))
    assert records[0].counts.sum() == 3 * 20 * 2
    assert any("tensor parallelism" in note for note in source.notes)


def test_other_files_in_a_folder_of_statistics_are_named(tmp_path):
    folder = tensorrt(tmp_path / "t", [rank(1)])
    (folder / "rank0.safetensors.bak").write_bytes(b"x")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("x")
    source, _ = read(folder)
    assert source.notes == ["not part of the trace, left out: 'logs/run.txt', 'rank0.safetensors.bak'"]
    assert source.done_bytes == source.total_bytes == sum((folder / n).stat().st_size for n in FILES)


def test_tensorrt_pipeline_stages_are_put_together(tmp_path):
    ranks = [rank(1, layers=(0, 1)), rank(2, layers=(2, 3))]
    source, records = read(tensorrt(tmp_path / "t", ranks))
    assert source.meta.layers == (0, 1, 2, 3)
    assert (records[1].counts[2] == ranks[1][101, 2]).all()


def test_tensorrt_iterations_are_in_the_order_of_their_numbers(tmp_path):
    source, records = read(tensorrt(tmp_path / "t", [rank(1, iterations=(10, 9, 100))]))
    assert [r.request_id for r in records] == ["t/9", "t/10", "t/100"]
    assert source.meta.extra == {"ranks": 1}


def test_tensorrt_through_the_store(tmp_path):
    tk.ingest(tensorrt(tmp_path / "t", [rank(1)]), tmp_path / "S", label_fields=["iteration"])
    store = tk.open(tmp_path / "S")
    assert store.sql("SELECT trace, requests, tokens, top_k FROM traces").row(0) == ("t", 2, 40, 2)
    assert tk.load(store, by="label")["label"].unique().sort().to_list() == ["100", "101"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: (d / "meta_info.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "meta_info.json").write_text("[]"), "num_experts is None"),
        (lambda d: (d / "meta_info.json").write_text('{"num_experts": 1e99}'), "num_experts is 1e"),
        (lambda d: (d / "meta_info.json").write_text('{"num_experts": 16}'), "num_experts_per_token is None"),
        (lambda d: safetensors(d / "rank0.safetensors", {"x": np.zeros(16, np.int64)}), "holds 'x'"),
        (lambda d: safetensors(d / "rank0.safetensors", {"1_2": np.zeros(8, np.int64)}), "is int64 of shape .8,."),
        (lambda d: safetensors(d / "rank0.safetensors", {"1_2": np.zeros(16, np.float32)}), "is float32"),
        (lambda d: safetensors(d / "rank0.safetensors", {}), "holds no counts"),
        (
            lambda d: safetensors(d / "rank0.safetensors", {"1_2": np.arange(16) % 2 * 9}),
            "72 routed.* no multiple of k 5",
        ),
        (lambda d: (d / "rank0.safetensors").write_bytes(b"\xff" * 20), "announces a header"),
    ],
)
def test_tensorrt_folders_that_are_at_fault(tmp_path, break_it, said):
    folder = tensorrt(tmp_path / "t", [rank(1)])
    if "multiple of k 5" in said:
        (folder / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 5}')
    break_it(folder)
    refuse(folder, said)


def test_tensorrt_slots_that_the_config_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2, "model_type": "olmoe"})
    )
    refuse(tensorrt(tmp_path / "t", [rank(1)]), "contradiction about experts per layer: the config says 8")


def test_a_folder_of_another_reader_is_not_taken_whole(tmp_path):
    with pytest.raises(SourceError, match="holds no file that a reader takes"):
        open_source([tensorrt(tmp_path / "t", [rank(1)])], IngestOptions(source_format="bigmoe"))


# GGUF


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, value):
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        inner = b"".join(text(v) for v in value) if isinstance(value[0], str) else np.array(value, "<i4").tobytes()
        kind = 8 if isinstance(value[0], str) else 5
        return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + inner
    return text(key) + struct.pack("<II", 4, value)


def gguf(tensors, pairs=None, *, version=3, alignment=32, magic=b"GGUF"):
    """Bytes of a GGUF with F32 tensors, from name -> array whose last axis is the fastest."""
    pairs = {"general.type": "imatrix"} if pairs is None else pairs
    head = magic + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(pair(key, value) for key, value in pairs.items())
    data = b""
    for name, array in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        shape = array.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += array.astype("<f4").tobytes()
    return head + b"\0" * (-len(head) % alignment) + data


def imatrix(counts, first=1, matrices=("gate", "up", "down")):
    tensors = {}
    for i, row in enumerate(counts):
        for name in matrices:
            tensors[f"blk.{first + i}.ffn_{name}_exps.weight.in_sum2"] = np.ones((len(row), 4))
            tensors[f"blk.{first + i}.ffn_{name}_exps.weight.counts"] = np.asarray(row, float)[:, None]
    return {"blk.0.attn_q.weight.counts": np.ones((1, 1)), **tensors}


@pytest.mark.parametrize("matrices", [("gate", "up", "down"), ("gate_up", "down"), ("down",)])
def test_imatrix(tmp_path, matrices):
    counts = chosen(50, 3, 8, 2)
    pairs = {
        "tokens": [1, 2, 3] * 100,
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.test"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 512,
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(imatrix(counts, matrices=matrices), pairs))
    source, [record] = read(path, top_k=2)
    assert (record.counts == counts).all()
    assert record.counts.dtype == np.int64
    assert source.meta.layers == (1, 2, 3)
    assert (source.meta.num_experts, source.meta.top_k, source.meta.engine) == (8, 2, "llama.cpp")
    assert source.meta.extra["imatrix.chunk_size"] == 512
    assert source.meta.extra["imatrix.datasets"] == ["wiki.test"]
    assert not source.notes
    _, [labelled] = read(path, top_k=2, label_fields=("dataset",))
    assert labelled.label == "wiki.test"
    assert read(path)[0].meta.top_k == 0


def test_imatrix_whose_matrices_differ(tmp_path):
    tensors = imatrix(chosen(50, 2, 8, 2))
    tensors["blk.1.ffn_up_exps.weight.counts"] = np.zeros((8, 1))
    (tmp_path / "m.gguf").write_bytes(gguf(tensors))
    source, _ = read(tmp_path / "m.gguf", top_k=2)
    assert any("differ in their counts" in note for note in source.notes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf({"blk.0.attn_q.weight.counts": np.ones((1, 1))}), "holds no counts of experts"),
        (gguf(imatrix(chosen(9, 1, 8, 2)), {"general.type": "model", "x": "imatrix"}), "a GGUF of type 'model'"),
        (gguf(imatrix(chosen(9, 1, 8, 2)), version=1), "GGUF version 1"),
        (gguf(imatrix(chosen(9, 1, 8, 2)))[:-1], "claims 32 bytes from byte"),
        (gguf(imatrix([[1, 1], [1, 1, 1]])), "layers of .2, 3. experts"),
        (gguf({"blk.0.ffn_up_exps.weight.counts": np.ones((1, 8))}), r"has shape .8, 1."),
        (gguf(imatrix([[0.5, 1.5]])), "is a fraction"),
        (gguf(imatrix([[np.nan, 1]])), "beyond all counting"),
        (gguf(imatrix([[-1, 1]])), "negative"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1) + b"imatrix", "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("imatrix") + struct.pack("<IIQ", 9, 8, 1 << 60), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("imatrix") + struct.pack("<IQ", 8, 1 << 62), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("imatrix") + struct.pack("<I", 77) + b"\0" * 9, "type 77"),
        (b"GGUF imatrix", "is GGUF version|announces"),
    ],
)
def test_gguf_files_that_are_at_fault(tmp_path, content, said):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refuse(path, said, top_k=2)


def test_a_huge_shape_allocates_nothing(tmp_path):
    name = "blk.0.ffn_up_exps.weight.counts"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair("general.type", "imatrix")
    head += text(name) + struct.pack("<IQQIQ", 2, 1, 1 << 60, 0, 0)
    (tmp_path / "m.gguf").write_bytes(head + b"\0" * 64)
    refuse(tmp_path / "m.gguf", "claims 4611686018427387904 bytes")


def test_vocabularies_are_skipped_over(tmp_path):
    pairs = {"general.type": "imatrix", "tokenizer.tokens": [f"t{i}" for i in range(5000)], "scores": [1] * 5000}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(imatrix(chosen(9, 1, 8, 2)), pairs))
    metadata, _ = read_gguf(path)
    assert len(metadata["tokenizer.tokens"]) == len(metadata["scores"]) == 64
    read(path, top_k=2)


# MoE-Infinity


def test_moe_infinity(tmp_path):
    counts = np.stack([chosen(30, 4, 8, 2, seed) for seed in range(5)]).astype(np.float32)
    counts[3:] = 0  # the array is allocated for more sequences than were traced
    np.save(tmp_path / "trace.npy", counts)
    source, records = read(tmp_path / "trace.npy", top_k=2)
    assert source.meta.source_format == "moe-infinity"
    assert [r.request_id for r in records] == ["trace/0", "trace/1", "trace/2"]
    assert all((record.counts == counts[i]).all() for i, record in enumerate(records))
    tk.ingest(tmp_path / "trace.npy", tmp_path / "S", top_k=2)
    assert tk.load(tmp_path / "S")["tokens"].to_list() == [90] * 4


def test_moe_infinity_of_a_config(tmp_path):
    counts = chosen(30, 4, 8, 2)[None].astype(float)
    np.save(tmp_path / "trace.npy", counts)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"num_hidden_layers": 5, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        )
    )
    source, _ = read(tmp_path / "trace.npy")
    assert (source.meta.layers, source.meta.top_k) == ((1, 2, 3, 4), 2)
    assert load_config(tmp_path).eos_token_ids == ()


def test_floats_that_are_no_counts_are_left_to_others(tmp_path):
    rng = np.random.default_rng(0)
    for name, array in (
        ("logits", rng.normal(size=(20, 4, 8))),
        ("weights", rng.random((20, 4, 2))),
        ("ids", np.argsort(rng.random((20, 4, 8)), axis=2)[..., :2].astype(float)),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(SourceError) as caught:
            read(tmp_path / f"{name}.npy", num_experts=8)
        assert "counts" in str(caught.value) or "weights" in str(caught.value) or "logits" in str(caught.value)


def test_an_array_without_counts_is_an_error(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((3, 2, 8)))
    refuse(tmp_path / "t.npy", "every entry is 0", source_format="moe-infinity")
    np.save(tmp_path / "u.npy", np.zeros((3, 8)))
    refuse(tmp_path / "u.npy", "the array is float64 of shape .3, 8.", source_format="moe-infinity")


# CSV


def table(counts, layers=None, header="layer_id,expert_id,count"):
    rows = [
        f"{layers[i] if layers else i},{e},{n}" for i, row in enumerate(np.asarray(counts)) for e, n in enumerate(row)
    ]
    return "\n".join([header, *rows]) + "\n"


def test_sglangs_first_recorder(tmp_path):
    per_rank = [chosen(30, 3, 8, 2, seed) for seed in (1, 2)]
    folder = tmp_path / "dump"
    folder.mkdir()
    for number, counts in enumerate(per_rank):
        name = f"expert_distribution_rank{number}_timestamp1745000000.csv"
        (folder / name).write_text(table(counts, layers=(3, 4, 7)))
    source, records = read(folder, top_k=2)
    assert source.meta.source_format == "counts-csv"
    assert (source.meta.layers, source.meta.num_experts) == ((3, 4, 7), 8)
    assert all((record.counts == counts).all() for record, counts in zip(records, per_rank, strict=True))


def test_a_table_may_be_in_any_order_and_lack_experts_if_their_number_is_given(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("expert,layer,count\r\n7,0,3\r\n1,0,3\r\n2,1,6\r\n")
    refuse(path, "experts without tokens are left out", top_k=1)
    source, [record] = read(path, top_k=1, num_experts=10)
    assert record.counts.tolist() == [[0, 3, 0, 0, 0, 0, 0, 3, 0, 0], [0, 0, 6, 0, 0, 0, 0, 0, 0, 0]]
    assert source.meta.num_experts == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("layer_id,expert_id,count\n", "a header but no rows"),
        ("layer_id,expert_id,count\n0,0,1\n0,0,2\n", "twice|left out"),
        ("layer_id,expert_id,count\n0,0,-1\n", "count is -1"),
        ("layer_id,expert_id,count\n0,65536,1\n", "expert_id is 65536"),
        ("layer_id,expert_id,count\n4096,0,1\n", "layer_id is 4096"),
        ("layer_id,expert_id,count\n0,0,1.5\n", "does not parse"),
        ("layer_id,expert_id,count\n0,0\n", "does not parse"),
    ],
)
def test_tables_that_are_at_fault(tmp_path, content, said):
    (tmp_path / "t.csv").write_text(content)
    refuse(tmp_path / "t.csv", said, top_k=1)
    if said == "twice|left out":
        refuse(tmp_path / "t.csv", "the same layer and expert twice", top_k=1, num_experts=2)
        refuse(tmp_path / "t.csv", "expert id 3 of 2|twice", top_k=1, num_experts=2)


# Damage


VALID = {
    "m.gguf": gguf(imatrix(chosen(9, 2, 8, 2)), {"general.type": "imatrix", "imatrix.datasets": ["a", "b"]}),
    "t.csv": table(chosen(9, 2, 8, 2)).encode(),
}


@pytest.mark.parametrize("name", list(VALID))
@given(data=st.data())
def test_damage_is_an_error_and_nothing_else(tmp_path_factory, name, data):
    content = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.mktemp("d") / name
    path.write_bytes(bytes(content))
    with contextlib.suppress(TracekitError):
        read(path, top_k=2)


@given(data=st.data())
def test_damaged_statistics_are_an_error_and_nothing_else(tmp_path_factory, data):
    folder = tensorrt(tmp_path_factory.mktemp("d") / "t", [rank(1)])
    for file in ("rank0.safetensors", "meta_info.json"):
        content = bytearray((folder / file).read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, min(len(content) - 1, 900)))] = data.draw(st.integers(0, 255))
        (folder / file).write_bytes(bytes(content))
    with contextlib.suppress(TracekitError):
        read(folder)


# Claims that cost nothing


def test_activations_of_sequences_without_experts_are_refused_at_once(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1, 0)})
    refuse(tmp_path / "x.npy", "the array is float32 of shape", source_format="moe-infinity")


def test_layers_of_one_run_of_bytes_are_not_counts_of_their_own(tmp_path):
    tensors, experts = 100, 4096
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, 1) + pair("general.type", "imatrix")
    for layer in range(tensors):
        head += text(f"blk.{layer}.ffn_up_exps.weight.counts") + struct.pack("<IQQIQ", 2, 1, experts, 0, 0)
    (tmp_path / "m.gguf").write_bytes(head + b"\0" * (experts * 4 + 32))
    refuse(tmp_path / "m.gguf", "claims 1638400 bytes of counts in a file of")


def test_a_folder_of_many_iterations_is_read_in_linear_time(tmp_path):
    tables = {(iteration, layer): chosen(4, 1, 16, 2)[0] for iteration in range(2000) for layer in range(4)}
    tensorrt(tmp_path / "s", [tables])
    _, records = read(tmp_path / "s")
    assert len(records) == 2000
