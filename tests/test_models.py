"""Models and sizes: the bundled table against published figures, every way a config says something, quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import SourceError, TracekitError, UsageError
from tracekit.reports.text import display_width
from tracekit.sources.bundled import bundled
from tracekit.sources.catalogue import parts
from tracekit.sources.config import load_config
from tracekit.sources.sizes import PARTS, describe

# What was published or counted in the modules themselves: N, k, layers, MoE layers, hidden size, an expert's width,
# parameters of the shared part of a layer, parameters of an expert, MB of an expert in bf16, and all parameters in 10⁹
# as they are written there (of DBRX: those of its experts).
PUBLISHED = {
    "Mixtral-8x7B": (8, 2, 32, 32, 4096, 14336, 0, 176_160_768, "352.32", "46.70"),
    "Mixtral-8x22B": (8, 2, 56, 56, 6144, 16384, 0, 301_989_888, "603.98", "140.62"),
    "OLMoE-1B-7B": (64, 8, 16, 16, 2048, 1024, 0, 6_291_456, "12.58", "6.92"),
    "Qwen1.5-MoE-A2.7B": (60, 4, 24, 24, 2048, 1408, 3 * 2048 * 5632 + 2048, 8_650_752, "17.30", "14.32"),
    "Qwen3-30B-A3B": (128, 8, 48, 48, 2048, 768, 0, 4_718_592, "9.44", "30.53"),
    "Qwen3-235B-A22B": (128, 8, 94, 94, 4096, 1536, 0, 18_874_368, "37.75", "235.09"),
    "Qwen3-Next-80B-A3B": (512, 10, 48, 48, 2048, 512, 3_147_776, 3_145_728, "6.29", "79.67"),
    "DeepSeek-V3": (256, 8, 61, 58, 7168, 2048, 44_040_192, 44_040_192, "88.08", "671.03"),
    "Kimi-K2": (384, 8, 61, 60, 7168, 2048, 44_040_192, 44_040_192, "88.08", "1026.4"),
    "gpt-oss-20b": (32, 4, 24, 24, 2880, 2880, 0, 24_891_840, "49.78", "20.91"),
    "gpt-oss-120b": (128, 4, 36, 36, 2880, 2880, 0, 24_891_840, "49.78", "116.83"),
    "GLM-4.5-Air": (128, 8, 46, 45, 4096, 1408, 17_301_504, 17_301_504, "34.60", "106.9"),
    "GLM-4.5": (160, 8, 92, 89, 5120, 1536, 23_592_960, 23_592_960, "47.19", "352.8"),
    "GLM-4.7-Flash": (64, 4, 47, 46, 2048, 1536, 9_437_184, 9_437_184, "18.87", "29.94"),
    "Granite-3.1-1B-A400M": (32, 8, 24, 24, 1024, 512, 0, 1_572_864, "3.15", "1.33"),
    "Granite-3.1-3B-A800M": (40, 8, 32, 32, 1536, 512, 0, 2_359_296, "4.72", "3.30"),
    "Phi-3.5-MoE": (16, 2, 32, 32, 4096, 6400, 0, 78_643_200, "157.29", "41.87"),
    "Llama-4-Scout": (16, 1, 48, 48, 5120, 8192, 125_829_120, 125_829_120, "251.66", "107.8"),
    "Llama-4-Maverick": (128, 1, 48, 24, 5120, 8192, 125_829_120, 125_829_120, "251.66", "400.7"),
    "MiniMax-M2": (256, 8, 62, 62, 3072, 1536, 0, 14_155_776, "28.31", "228.7"),
    "Jamba-v0.1": (16, 2, 32, 16, 4096, 14336, 0, 176_160_768, "352.32", "51.57"),
    "DBRX": (16, 4, 40, 40, 6144, 10752, 0, 198_180_864, "396.36", "126.8"),
    "ERNIE-4.5-21B-A3B": (64, 6, 28, 27, 2560, 1536, 23_592_960, 11_796_480, "23.59", "21.83"),
}
FIRST_DENSE = {
    "DeepSeek-V3": 3,
    "Kimi-K2": 1,
    "GLM-4.5-Air": 1,
    "GLM-4.5": 3,
    "GLM-4.7-Flash": 1,
    "ERNIE-4.5-21B-A3B": 1,
}


def rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


# The table


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bundled_model_has_the_published_figures(name: str) -> None:
    experts, top_k, layers, moe, hidden, width, shared, expert, megabytes, total = PUBLISHED[name]
    model = tk.model(name, quantisation="bf16")
    assert (model.config.num_experts, model.config.top_k) == (experts, top_k)
    assert (model.config.num_hidden_layers, model.moe_layers) == (layers, moe)
    assert (model.hidden_size, model.expert_width) == (hidden, width)
    assert (model.expert_parameters, model.shared_parameters) == (expert, shared)
    assert model.expert_bytes == 2 * expert
    assert rounded(2 * expert / 1e6, megabytes) == megabytes
    assert model.total_parameters is not None
    everything = moe * experts * expert if name == "DBRX" else model.total_parameters
    assert rounded(everything / 1e9, total) == total
    assert model.active_parameters == model.total_parameters - moe * (experts - top_k) * expert
    assert model.rest_parameters == model.total_parameters - moe * (experts * expert + shared)
    assert all(part.estimated is None for part in model.parts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_moe_layers_of_a_bundled_model(name: str) -> None:
    layers, moe = PUBLISHED[name][2:4]
    first = FIRST_DENSE.get(name, 0)
    every_other = moe == layers // 2
    assert load_config(name).moe_layers == (tuple(range(1, layers, 2)) if every_other else tuple(range(first, layers)))


# To the last parameter: a change here is a change of what is counted.
EXACT = {
    "Mixtral-8x7B": 46_702_792_704,
    "OLMoE-1B-7B": 6_919_161_856,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "DBRX": 131_596_523_520,
    "Jamba-v0.1": 51_570_323_328,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", EXACT)
def test_all_parameters_are_counted(name: str) -> None:
    assert tk.model(name).total_parameters == EXACT[name]


def test_only_verified_models_are_bundled() -> None:
    assert {model.name for model in bundled()} == set(PUBLISHED)
    names = [name.casefold() for model in bundled() for name in (model.name, *model.also)]
    assert len(names) == len(set(names))
    assert not {"hunyuan-a13b", "command-a-plus", "deepseek-v2-lite", "glm-4.7"} & set(names)
    assert all(model.source for model in bundled())


def test_the_frame_of_models() -> None:
    frame = tk.models()
    assert frame["model"].to_list() == list(PUBLISHED)
    row = frame.filter(pl.col("model") == "DeepSeek-V3").row(0, named=True)
    assert (row["num_experts"], row["top_k"], row["layers"], row["moe_layers"], row["shared_experts"]) == (
        256,
        8,
        61,
        58,
        1,
    )
    assert row["quantisation"] == "fp8"
    assert rounded(row["expert_bytes"] / 1e6, "44.05") == "44.05"
    assert row["rest_parameters"] + 58 * 257 * 44_040_192 == row["total_parameters"]
    assert all(dtype in (pl.String, pl.Int64) for dtype in frame.schema.values())
    assert frame.null_count().sum_horizontal()[0] == 0
    assert tk.models(bits=4)["expert_bytes"].to_list() != frame["expert_bytes"].to_list()


def test_names_are_found_as_repositories_write_them() -> None:
    for name in ("deepseek-ai/DeepSeek-R1", "deepseek-v3", "DEEPSEEK-V3/"):
        assert tk.model(name).name == "DeepSeek-V3"
    with pytest.raises(SourceError, match="Did you mean 'Mixtral-8x7B'"):
        tk.model("Mixtral-8x7b-v")
    with pytest.raises(SourceError, match="neither a file nor the name"):
        tk.model("zzz")
    with pytest.raises(SourceError, match="cannot be read"):
        tk.model("missing/config.json")


# Sizes from a config

BASE = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}


def test_a_small_model_by_hand() -> None:
    model = describe(BASE)
    expert = 3 * 256 * 384
    attention = 256 * 256 * 2 + 256 * 128 * 2  # q and o; k and v with half the heads
    assert model.expert_parameters == expert
    assert model.rest_parameters == 4 * (8 * 256 + attention + 2 * 256) + 256 + 2 * 1000 * 256
    assert model.total_parameters == model.rest_parameters + 4 * 8 * expert
    assert model.active_parameters == model.rest_parameters + 4 * 2 * expert
    assert model.active_bytes == 2 * model.active_parameters
    assert [part.name for part in model.parts] == list(PARTS)


@pytest.mark.parametrize(
    ("fields", "shared", "number"),
    [
        ({"n_shared_experts": 2}, 2 * 3 * 256 * 384, 2),
        ({"num_shared_experts": 1}, 3 * 256 * 384, 1),
        ({"moe_num_shared_experts": 1}, 3 * 256 * 384, 1),
        ({"num_shared_expert": [1, 1, 1, 1]}, 3 * 256 * 384, 1),
        ({"shared_expert_intermediate_size": 100}, 3 * 256 * 100 + 256, 1),
        ({"shared_intermediate_size": 100}, 3 * 256 * 100, 1),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 1}, 3 * 256 * 384, 1),
        ({"n_shared_experts": None}, 0, 0),
    ],
)
def test_shared_experts(fields: dict[str, object], shared: int, number: int) -> None:
    model = describe({**BASE, **fields})
    assert (model.shared_parameters, model.shared_experts) == (shared, number)


def test_widths_and_nesting() -> None:
    assert describe({**BASE, "moe_intermediate_size": 100}).expert_parameters == 3 * 256 * 100
    assert describe({**BASE, "moe_intermediate_size": [100, 50]}).expert_width == 100
    nested = describe({"model_type": "vlm", "vision_config": {}, "text_config": BASE})
    assert nested.total_parameters == describe(BASE).total_parameters
    assert any("vision" in note for note in nested.notes)
    dense = describe({**BASE, "first_k_dense_replace": 1, "moe_intermediate_size": 100})
    assert dense.moe_layers == 3
    assert dense.total_parameters == describe(BASE).total_parameters - 4 * 8 * 3 * 256 * 384 + 3 * 8 * 3 * 256 * 100 + (
        3 * 256 * 384 - 8 * 256  # one layer has a dense MLP and no router
    )
    two = describe({**BASE, "model_type": "nemotron_h", "hybrid_override_pattern": "ME*E"})
    assert two.expert_parameters == 2 * 256 * 384
    assert two.moe_layers == 2


def test_what_is_not_known_is_said() -> None:
    without = describe({key: value for key, value in BASE.items() if key != "vocab_size"})
    assert without.expert_parameters == 3 * 256 * 384
    assert without.total_parameters is None
    assert without.active_bytes is None
    assert any("vocab_size" in note for note in without.notes)
    routing_only = describe(
        {"model_type": "mixtral", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    )
    assert routing_only.expert_bytes is None
    assert routing_only.parts == ()
    strange = describe({**BASE, "model_type": "new_thing"})
    assert strange.total_parameters is not None
    assert {part.name for part in strange.parts if part.estimated} == {"attention", "norms", "embeddings"}
    assert any("no rule for dense layers" in note for note in strange.notes)
    untold = describe({key: value for key, value in BASE.items() if key != "tie_word_embeddings"})
    assert "head" in str(next(part.estimated for part in untold.parts if part.name == "embeddings"))
    frame = parts(without)
    assert frame.filter(pl.col("part") == "embeddings")["estimate"][0] == "the config does not say"
    assert frame.filter(pl.col("part") == "total")["total_bytes"][0] is None


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", ["256", -1, 1.5, True, 1 << 30, {}])
def test_a_size_that_is_none(field: str, value: object) -> None:
    with pytest.raises(SourceError, match=field):
        describe({**BASE, field: value})


# Quantisation

EXPERT = 3 * 256 * 384


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, 4.5),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            4.5,
        ),
    ],
)
def test_the_config_says_how_it_is_quantised(quantisation: dict[str, object], bits: float) -> None:
    model = describe({**BASE, "quantization_config": quantisation})
    assert model.expert_bytes == EXPERT * bits / 8
    assert describe({**BASE, "quantization_config": quantisation}, quantisation="bf16").expert_bytes == 2 * EXPERT


def test_mlx_and_dtypes() -> None:
    assert describe({**BASE, "quantization": {"group_size": 64, "bits": 4}}).expert_bytes == EXPERT * 4.5 / 8
    assert describe({**BASE, "torch_dtype": "float32"}).expert_bytes == 4 * EXPERT
    assert describe({**BASE, "dtype": "float16"}).quantisation.name == "fp16"
    unknown = describe({**BASE, "quantization_config": {"quant_method": "quip"}})
    assert unknown.expert_bytes == 2 * EXPERT
    assert any("'quip'" in note for note in unknown.notes)


def test_what_a_scheme_leaves_alone() -> None:
    plain = describe(BASE)
    fp8 = describe(BASE, quantisation="fp8")
    attention = 4 * (256 * 256 * 2 + 256 * 128 * 2)
    blocks = 4 * (2 * 2 * 2 + 2 * 1 * 2)  # of 128 x 128, each with a 32-bit scale
    assert plain.rest_bytes is not None
    assert fp8.rest_bytes == plain.rest_bytes - attention + 4 * blocks
    assert describe(BASE, quantisation="mxfp4").rest_bytes == plain.rest_bytes
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn", "lm_head"]}
    assert describe({**BASE, "quantization_config": kept}).rest_bytes == plain.rest_bytes
    four = describe(BASE, bits=4)
    norms = (2 * 4 + 1) * 256
    assert four.total_bytes == (plain.total_parameters - norms) // 2 + 2 * norms


def test_published_quantised_sizes() -> None:
    assert tk.model("DeepSeek-V3").expert_bytes == 44_040_192 + 4 * 3 * 16 * 56
    assert tk.model("gpt-oss-20b").expert_bytes == 3 * 2880 * 2880 * 17 // 32 + 2 * 3 * 2880
    assert rounded(tk.model("gpt-oss-120b").expert_bytes / 1e6, "13.24") == "13.24"
    assert tk.model("Mixtral-8x7B", bits=4.85).expert_bytes == -(-176_160_768 * 485 // 800)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantisation": "fp5"}, "bf16, fp8, mxfp4, nvfp4"),
        ({"bits": 0.5}, "1 to 32"),
        ({"bits": float("nan")}, "1 to 32"),
        ({"bits": 4, "quantisation": "fp8"}, "one of the two"),
    ],
)
def test_quantisations_that_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tk.model("Mixtral-8x7B", **options)  # type: ignore[arg-type]


# Files, and whatever may stand in them


def test_a_file_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    assert tk.model(folder).name == tk.model(folder / "config.json").name == "my-model"
    (folder / "config.json").write_text(json.dumps({**BASE, "_name_or_path": "x/y"}))
    assert tk.model(folder).name == "x/y"


def test_small_real_models(shared: Path) -> None:
    """What transformers counted when it made them: 7.9 and 9.5 million parameters."""
    for name, millions in (("olmoe", "7.9"), ("glm4moe", "9.5")):
        model = tk.model(shared / "moe/models" / name)
        assert rounded(model.total_parameters / 1e6, millions) == millions
        size = (shared / "moe/models" / name / "model.safetensors").stat().st_size
        assert abs(size - model.total_bytes) < 0.02 * size


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 600)
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(-1, 9) | st.none() | st.sampled_from(["sparse", "moe", "attention", "dense"]), max_size=5)
    | st.dictionaries(st.sampled_from(["bits", "quant_method", "group_size", "moe_num_experts"]), st.integers(0, 9))
)
KEYS = sorted({key for model in bundled() for key in model.config} | {"text_config", "layer_types", "moe_layers"})


@given(
    st.sampled_from([dict(model.config) for model in bundled()]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)
def test_any_config_is_described_or_refused(config: dict[str, object], changes: dict[str, object]) -> None:
    try:
        model = describe({**config, **changes})
    except TracekitError:
        return
    assert model.total_parameters is None or model.total_parameters >= 0
    assert model.total_bytes is None or model.total_bytes >= 0
    assert parts(model).height >= 2


@given(st.integers(0, 2000), st.binary(max_size=8))
def test_any_bytes_for_a_config(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    data = json.dumps({**BASE, "quantization_config": {"quant_method": "fp8"}}).encode()
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        tk.model(path)
    except TracekitError as error:
        said = str(error)
    else:
        return
    assert "config.json" in said


# The command


def test_models_fit_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["models"], *(["models", name] for name in PUBLISHED), ["models", "--bits", "4.85"]):
        assert main([*args, "--quiet"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert max(map(display_width, out.splitlines())) <= 80
        assert "more column" not in out
        assert "…" not in out


def test_formats_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == tk.models().to_dicts()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE))
    for suffix in ("csv", "parquet", "md", "ndjson", "txt"):
        assert main(["models", "--config", str(path), "-o", str(tmp_path / f"x.{suffix}"), "-q"]) == 0
    rows = pl.read_parquet(tmp_path / "x.parquet").to_dicts()
    assert [row["part"] for row in rows] == ["expert", "router", "attention", "norms", "embeddings", "total", "active"]
    assert rows[0]["copies"] == 32
    assert rows[0]["total_bytes"] == 32 * 2 * EXPERT
    assert rows[-2]["total_parameters"] == sum(row["total_parameters"] for row in rows[:-2])


def test_one_model_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "DeepSeek-V3", "--quantisation", "nvfp4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("DeepSeek-V3: 8 of 256 experts and 1 shared in 58 of 61 layers, weights as nvfp4\n")
    assert "Note: layers for multi-token prediction are not counted" in err
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**BASE, "model_type": "new_thing"}))
    assert main(["models", "--config", str(path), "-q"]) == 0
    assert "[1] an estimate: not checked for new_thing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["Mixtral-8x7"], 1, "Did you mean 'Mixtral-8x7B'?"),
        (["--config", "nowhere.json"], 1, "cannot be read"),
        (["Mixtral-8x7B", "--config", "x"], 2, "one of them"),
        (["--bits", "40"], 2, "--bits"),
        (["--bits", "4", "--quantisation", "fp8"], 2, "one of them"),
        (["--quantisation", "fp88"], 2, "Did you mean 'fp8'?"),
    ],
)
def test_what_the_command_refuses(args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_ingest_takes_the_name_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.npz"
    assert main(["synth", "uniform", str(source), "--num-experts", "64", "--layers", "16", "--tokens", "20", "-q"]) == 0
    args = ["ingest", str(source), "--phase", "decode", "--store", str(tmp_path / "store"), "--config"]
    assert main([*args, "OLMoE-1B-7b-0924x"]) == 1
    assert "Did you mean 'OLMoE-1B-7B-0924'?" in capsys.readouterr().err
    assert main([*args, "OLMoE-1B-7B"]) == 0
    assert tk.open(tmp_path / "store").trace().meta.model == "OLMoE-1B-7B"
