"""What hooks in transformers models leave: ids or logits per layer, in .pt, .npz and .safetensors."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sources_safetensors import save as save_safetensors
from torchzip import View, Writer, archive, name, save

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import parse_config

LAYERS, K, N = 3, 2, 16


def routing(tokens, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, LAYERS, N)), axis=2)[..., :K].astype(np.int16)


def config(model_type="olmoe", layers=LAYERS, **others):
    return parse_config(
        {"model_type": model_type, "num_hidden_layers": layers, "num_experts": N, "num_experts_per_tok": K, **others}
    )


def read(path, **options):
    source = open_source([path], IngestOptions(**{"num_experts": N, **options}))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def write(path, arrays):
    match path.suffix:
        case ".npz":
            np.savez(path, **arrays)
        case ".safetensors":
            save_safetensors(path, {key: np.ascontiguousarray(array) for key, array in arrays.items()})
        case _:
            save(path, {key: View(array) for key, array in arrays.items()})
    return path


# Ids


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("pattern", ["model.layers.{}.mlp.experts", "layer_{}", "layers.{}", "{}"])
def test_a_layer_a_name(tmp_path, suffix, pattern):
    ids = routing(9)
    arrays = {pattern.format(number): ids[:, entry] for entry, number in ((2, 11), (0, 2), (1, 5))}
    source, (request,) = read(write(tmp_path / f"hook{suffix}", arrays))
    assert (request.ids == ids).all()
    assert (source.meta.layers, source.meta.source_format, source.meta.engine) == (
        (2, 5, 11),
        "transformers-hooks",
        "transformers",
    )
    assert (request.request_id, request.prompt_len) == ("hook", None)
    assert any("one sequence" in note for note in source.notes)


@pytest.mark.parametrize("kind", [list, tuple])
def test_layers_in_order(tmp_path, kind):
    ids = routing(9)
    path = save(tmp_path / "x.pt", kind(View(ids[:, entry]) for entry in range(LAYERS)))
    source, (request,) = read(path)
    assert (request.ids == ids).all()
    assert source.meta.layers == (0, 1, 2)
    dense = config("glm4_moe", 5, first_k_dense_replace=2)
    assert read(path, config=dense)[0].meta.layers == (2, 3, 4)


def test_a_call_a_step(tmp_path):
    """defaultdict(list) of the hook: the prompt's call, then a row for each generated token."""
    ids, writer = routing(12), Writer()
    made = b"".join(
        writer.one(f"model.layers.{entry}.mlp.experts")
        + writer.one([View(ids[:8, entry]), *(View(ids[t : t + 1, entry]) for t in range(8, 12))])
        for entry in range(LAYERS)
    )
    opcodes = b"\x80\x02" + name("collections", "defaultdict") + name("__builtin__", "list") + b"\x85R(" + made + b"u."
    _, (request,) = read(archive(tmp_path / "x.pt", opcodes, writer.storages))
    assert (request.ids == ids).all()
    assert (request.prompt_len, request.decode_start) == (8, 8)


def test_several_prompts_one_after_the_other(tmp_path):
    first, second = routing(7, 1), routing(5, 2)
    calls = [first[:5], first[5:6], first[6:7], second[:4], second[4:5]]
    content = {f"layers.{e}": [View(call[:, e]) for call in calls] for e in range(LAYERS)}
    source, (a, b) = read(save(tmp_path / "x.pt", content))
    assert (a.ids == first).all()
    assert (b.ids == second).all()
    assert (a.prompt_len, b.prompt_len) == (5, 4)
    assert any("each call with more than one row" in note for note in source.notes)


def test_a_routers_output_in_either_order(tmp_path):
    """transformers 5: (logits, weights, indices); DeepSeek and GLM in 4.57: (indices, weights)."""
    ids = routing(9).astype(np.int64)
    weights = np.sort(np.random.default_rng(1).random(ids.shape).astype(np.float32))[..., ::-1].copy()
    logits = np.random.default_rng(2).random((9, LAYERS, N)).astype(np.float32)
    newer = [(View(logits[:, e]), View(weights[:, e]), View(ids[:, e])) for e in range(LAYERS)]
    older = [(View(ids[:, e]), View(weights[:, e])) for e in range(LAYERS)]
    for i, content in enumerate((newer, older)):
        source, (request,) = read(save(tmp_path / f"{i}.pt", content))
        assert (request.ids == ids).all()
        assert (request.weights == weights).all()
        assert source.meta.router_order is True


@pytest.mark.parametrize("whole", [False, True])
def test_batches_are_cut_by_the_attention_mask(tmp_path, whole):
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    a, b = routing(3 + 2, 1), routing(5 + 2, 2)
    pad = routing(2, 3)
    calls = [np.concatenate([pad, a[:3], b[:5]]), np.stack([a[3], b[5]]), np.stack([a[4], b[6]])]
    tokens = np.arange(10).reshape(2, 5)
    if whole:  # the second step of the first request is padding after its end
        mask = np.concatenate([mask, [[1, 0], [1, 1]]], axis=1)
        tokens = np.arange(14).reshape(2, 7)
    content = {f"layers.{e}": [View(call[:, e]) for call in calls] for e in range(LAYERS)}
    content |= {"attention_mask": View(mask), "input_ids": View(tokens)}
    _, (first, second) = read(save(tmp_path / "x.pt", content))
    assert (first.ids == (a[:4] if whole else a)).all()
    assert (second.ids == b).all()
    assert (first.prompt_len, second.prompt_len) == (3, 5)
    assert (first.token_ids is None) == (not whole)
    if whole:
        assert first.token_ids.tolist() == [2, 3, 4, 5]
    del content["attention_mask"]
    assert "Save attention_mask" in refuse(save(tmp_path / "y.pt", content), "looks like a batch of 2")
    del content["input_ids"]
    refuse(save(tmp_path / "z.pt", content), "looks like a batch of 2")


def test_batch_of_a_single_forward(tmp_path):
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = routing(8)
    arrays = {f"layer_{e}": rows[:, e] for e in range(LAYERS)} | {"attention_mask": mask}
    _, (first, second) = read(write(tmp_path / "x.npz", arrays))
    assert (first.ids == rows[:3]).all()
    assert (second.ids == rows[4:]).all()


# Logits


def ranked(logits):
    return np.argsort(-logits, axis=2, kind="stable")[..., :K]


@pytest.mark.parametrize(
    "family",
    ["mixtral", "olmoe", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "jamba", "llama4_text", "cohere2_moe"],
)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_logits_of_families_that_run_their_top_k(tmp_path, family, suffix):
    logits = np.random.default_rng(0).normal(size=(9, LAYERS, N)).astype(np.float32)
    path = write(tmp_path / f"x{suffix}", {f"layers.{e}.gate": logits[:, e] for e in range(LAYERS)})
    source, (request,) = read(path, config=config(family))
    assert (request.ids == ranked(logits)).all()
    assert source.meta.router_order is True
    assert any("made of router logits" in note for note in source.notes)


def test_output_router_logits_skips_dense_layers(tmp_path):
    logits = np.random.default_rng(0).normal(size=(9, LAYERS, N)).astype(np.float32)
    path = save(tmp_path / "x.pt", tuple(View(logits[:, e]) for e in range(LAYERS)))
    sparse = config("qwen2_moe", 6, decoder_sparse_step=2)
    source, (request,) = read(path, config=sparse)
    assert source.meta.layers == (1, 3, 5)
    assert (request.ids == ranked(logits)).all()


@pytest.mark.parametrize(
    ("family", "others", "said"),
    [
        ("deepseek_v3", {}, "deepseek_v3 adds a correction bias"),
        ("glm4_moe", {}, "glm4_moe adds a correction bias"),
        ("minimax_m2", {}, "minimax_m2 adds a correction bias"),
        ("ernie4_5_moe", {}, "ernie4_5_moe adds a bias"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "'group_limited_greedy' limits the choice"),
        ("deepseek_v2", {}, "limits the choice"),
        ("switch_transformers", {}, "not among those that were checked"),
    ],
)
def test_logits_of_other_families_are_refused(tmp_path, family, others, said):
    logits = np.random.default_rng(0).normal(size=(9, LAYERS, N)).astype(np.float32)
    path = write(tmp_path / "x.npz", {f"layers.{e}": logits[:, e] for e in range(LAYERS)})
    assert "Hook the experts module" in refuse(path, said, config=config(family, **others))


def test_logits_need_the_right_config(tmp_path):
    logits = np.random.default_rng(0).normal(size=(9, LAYERS, N)).astype(np.float32)
    path = write(tmp_path / "x.npz", {f"layers.{e}": logits[:, e] for e in range(LAYERS)})
    assert "--config" in refuse(path, "only for some families")
    greedy = config("deepseek_v2", topk_method="greedy", first_k_dense_replace=0)
    assert (read(path, config=greedy)[1][0].ids == ranked(logits)).all()
    wide = write(tmp_path / "y.npz", {f"layers.{e}": np.zeros((9, 2 * N), "f4") for e in range(LAYERS)})
    refuse(wide, "32 columns; expected 16", config=config())
    logits[3, 1, 2] = np.nan
    refuse(write(tmp_path / "z.npz", {f"layers.{e}": logits[:, e] for e in range(LAYERS)}), "NaN", config=config())


def test_ties_are_told(tmp_path):
    logits = np.tile(np.arange(N, dtype=np.float32), (4, LAYERS, 1))
    logits[2, 1, N - 2] = logits[2, 1, N - 3]
    path = write(tmp_path / "x.npz", {f"layers.{e}": logits[:, e] for e in range(LAYERS)})
    source, (request,) = read(path, config=config())
    assert request.ids[0, 0].tolist() == [N - 1, N - 2]
    assert request.ids[2, 1].tolist() == [N - 1, N - 3]
    assert any("1 of 12 rows had a tie" in note for note in source.notes)


def test_bfloat16_logits(tmp_path):
    logits = np.random.default_rng(0).normal(size=(9, LAYERS, N)).astype(np.float32)
    words = (logits.view(np.uint32) >> 16).astype(np.uint16)
    content = [View(np.ascontiguousarray(words[:, e]).view(np.int16), bfloat16=True) for e in range(LAYERS)]
    _, (request,) = read(save(tmp_path / "x.pt", content), config=config())
    assert (request.ids == ranked((words.astype(np.uint32) << 16).view(np.float32))).all()


# What is wrong


def test_layers_of_different_tokens(tmp_path):
    ids = routing(9)
    arrays = {f"layer_{e}": ids[: 9 - e, e] for e in range(LAYERS)}
    refuse(write(tmp_path / "x.npz", arrays), "layer 1 has 1 calls of 8 rows, layer 0 1 of 9")
    refuse(save(tmp_path / "y.pt", {"layer_0": View(ids[:, 0]), "layer_1": View(ids[:, 1, :1])}), "different k")
    refuse(save(tmp_path / "z.pt", {"layer_0": View(ids[:, 0]), "layer_00": View(ids[:, 1])}), "one array of ids")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no routing"),
        ([], "no call of any layer"),
        ([[]], "no call of any layer"),
        ({"weight": 1.5}, r"holds no routing \(weight\)"),
        (["a"], "holds a str"),
        ([{"a": 1}], "holds a dict"),
        (3, "holds no routing"),
        ([View(routing(9))], "one array of ids"),
    ],
)
def test_files_without_routing(tmp_path, content, said):
    refuse(save(tmp_path / "x.pt", content), said)


def test_a_state_dict_is_no_trace(tmp_path):
    content = {f"layers.{i}.mlp.experts.{e}.up.weight": View(np.zeros((8, 4), "f4")) for i in (0, 1) for e in (0, 1)}
    refuse(save(tmp_path / "model.pt", content), "router logits")


@given(data=st.data(), suffix=st.sampled_from([".pt", ".npz", ".safetensors"]))
def test_mutations_raise_nothing_else(tmp_path_factory, data, suffix):
    folder, ids = tmp_path_factory.mktemp("f"), routing(5)
    arrays = {f"layers.{e}": ids[:, e] for e in range(LAYERS)} | {"attention_mask": np.ones((1, 5), int)}
    whole = bytearray(write(folder / f"x{suffix}", arrays).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / f"y{suffix}").write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    with contextlib.suppress(TracekitError):
        list(open_source([folder / f"y{suffix}"], IngestOptions(num_experts=N)).requests())


@pytest.mark.parametrize(
    "pattern", ["qwen3.model.layers.{}.mlp.experts", "v2/block_{}", "gpt2.h.{}.moe", "m8.layer[{}]"]
)
def test_numbers_in_the_name_of_the_model_are_no_layers(tmp_path, pattern):
    ids = routing(7)
    arrays = {pattern.format(layer): ids[:, layer] for layer in range(LAYERS)}
    source, (request,) = read(write(tmp_path / "x.pt", arrays))
    assert source.meta.layers == tuple(range(LAYERS))
    assert (request.ids == ids).all()


def test_calls_without_rows_are_refused_at_once(tmp_path):
    arrays = {f"layers.{layer}": np.zeros((0, K), np.int64) for layer in range(LAYERS)}
    np.savez(tmp_path / "x.npz", attention_mask=np.zeros((1 << 40, 0), np.int64), **arrays)
    refuse(tmp_path / "x.npz", "calls without any row")


def test_lists_that_repeat_each_other_are_not_followed(tmp_path):
    writer = Writer()
    repeated = b"](" + writer.one(View(routing(1)[:, 0])) + b"eq\x00"
    for slot in range(1, 3):
        repeated = b"](" + repeated + bytes([0x68, slot - 1]) * 200 + b"eq" + bytes([slot])
    opcodes = b"\x80\x02](" + repeated + b"h\x02e."
    refuse(archive(tmp_path / "x.pt", opcodes, writer.storages), "the same array or list twice")
