from __future__ import annotations

import json

import pytest

from tracekit.errors import SourceError
from tracekit.sources.config import load_config, parse_config

BASE = {"num_hidden_layers": 6, "num_experts": 16, "num_experts_per_tok": 2}


def config(**fields):
    return parse_config({**BASE, **fields})


@pytest.mark.parametrize("key", ["num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"])
@pytest.mark.parametrize("k", ["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"])
def test_aliases(key, k):
    found = parse_config({"num_hidden_layers": 3, key: 16, k: 2})
    assert (found.num_experts, found.top_k, found.num_hidden_layers) == (16, 2, 3)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, None),
        ({"model_type": "mixtral"}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "dense", "sparse"]}, (1, 2, 3, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, (0, 1, 2, 3, 4, 5)),
        ({"moe_layers": [5, 1, 3]}, (1, 3, 5)),
        ({"interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1}, (1, 2, 3, 4)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, (1, 2, 3, 4, 5)),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "moe"]}, (1, 3, 5)),
        ({"hybrid_override_pattern": "ME*EME"}, (1, 3, 5)),
    ],
)
def test_moe_layers(fields, layers):
    assert config(**fields).moe_layers == layers


def test_nested_and_listed_numbers():
    assert parse_config({"model_type": "vlm", "text_config": {**BASE, "num_experts": 8}}).num_experts == 8
    dbrx = parse_config(
        {"model_type": "dbrx", "n_layers": 4, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
    )
    assert (dbrx.num_experts, dbrx.top_k, dbrx.moe_layers) == (16, 4, (0, 1, 2, 3))
    assert config(num_experts_per_tok=None, moe_topk=[8] * 6).top_k == 8
    per_layer = config(num_experts=[0, 16, 16, 0, 16, 16])
    assert (per_layer.num_experts, per_layer.moe_layers) == (16, (1, 2, 4, 5))
    blocks = config(num_experts=None, block_configs=[{"n_routed_experts": n} for n in (None, 32, 32, None, 32, 32)])
    assert (blocks.num_experts, blocks.moe_layers) == (32, (1, 2, 4, 5))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": None}, "dense model"),
        ({"num_experts": 1}, "dense model"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_experts_per_tok": None}, "how many experts a token takes"),
        ({"num_experts_per_tok": 17}, "17 of 16"),
        ({"num_experts": "16"}, "'16'"),
        ({"num_experts": [16, 32, 16, 16, 16, 16]}, "differs between layers"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace"),
        ({"first_k_dense_replace": 6}, "no layer with experts"),
        ({"num_hidden_layers": 1 << 30}, "1 to 65536"),
        ({"num_hidden_layers": 0}, "1 to 65536"),
    ],
)
def test_refused(fields, said):
    with pytest.raises(SourceError, match=said):
        config(**fields)


def test_a_bundled_model_is_a_config_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_config("deepseek-ai/DeepSeek-V3")
    assert (found.num_experts, found.top_k, found.moe_layers) == (256, 8, tuple(range(3, 61)))
    assert found.name == "DeepSeek-V3"
    (tmp_path / "DeepSeek-V3").mkdir()  # what is there goes before what is bundled
    (tmp_path / "DeepSeek-V3" / "config.json").write_text(json.dumps(BASE))
    assert load_config("DeepSeek-V3").num_experts == 16
    with pytest.raises(SourceError, match="Did you mean 'DeepSeek-V3'"):
        load_config("DeepSeek-V4")


def test_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "_name_or_path": "x/y"}))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json")
    assert load_config(tmp_path).name == "x/y"
    for text in ("", "[1]", '{"a":', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SourceError, match=r"bad\.json"):
            load_config(tmp_path / "bad.json")
    with pytest.raises(SourceError, match="cannot be read"):
        load_config(tmp_path / "missing.json")


def test_real(shared):
    glm = load_config(shared / "moe/models/glm4moe")
    assert (glm.num_experts, glm.top_k, glm.moe_layers) == (64, 6, (1, 2, 3, 4, 5))
    olmoe = load_config(shared / "moe/models/olmoe")
    assert (olmoe.num_experts, olmoe.top_k, olmoe.moe_layers) == (32, 4, tuple(range(8)))
    with pytest.raises(SourceError, match="dense"):
        load_config(shared / "moe/models/draft")
