"""Quasi-hidden-state predictions: default vectors, and what the next routers say of the state that they stand in."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import tracekit as tk
from tracekit.capture.ahead import ahead
from tracekit.capture.calibration import calibrate
from tracekit.capture.default_vectors import DefaultVectors
from tracekit.capture.hooks import tapped
from tracekit.capture.recorder import record
from tracekit.capture.speculative import Sampling, speculate
from tracekit.cli import main
from tracekit.errors import SourceError, UnsupportedError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
TEXT = list(range(10, 22))
BOTH = ("next-gate", "quasi-hidden")
REFUSED = ("minimax", "cohere2_moe")
"""Families whose layers weight the residual, or whose experts run beside the attention."""


def load(models: Path, name: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval()
    model.config.output_router_logits = False
    return model


@pytest.fixture(scope="module", params=["olmoe", "glm4moe"])
def model(request: pytest.FixtureRequest, models: Path) -> Any:
    return load(models, request.param)


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[list[int]]:
    files = sorted((shared / "moe" / "traces" / "olmoe" / "npz").glob("prefill-*.npz"))[::20]
    held_out = [np.load(path) for path in files]
    return [z["token_ids"][: int(z["prompt_len"])].astype(int).tolist() for z in held_out]


def blocks(model: Any) -> list[Any]:
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def seen(model: Any, text: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, of each MoE layer, the residual stream after attention and the input of the experts, in float64."""
    out: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(norm: Any, args: Any, output: torch.Tensor) -> None:
        out.append((args[0][0].double(), output[0].double()))

    hooks = [layer.post_attention_layernorm.register_forward_hook(keep) for layer in blocks(model)]
    with torch.no_grad():
        model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return out


def chosen(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights by the definition of the family."""
    gate = layer.mlp.gate
    logits = hidden @ gate.weight.double().T
    if not hasattr(gate, "e_score_correction_bias"):
        weights, ids = logits.softmax(-1).topk(gate.top_k)
        return ids, weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights
    scores = logits.sigmoid()
    assert gate.num_group == 1
    ids = (scores + gate.e_score_correction_bias.double()).topk(gate.top_k).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor


def expert(layer: Any, number: int, hidden: torch.Tensor) -> torch.Tensor:
    experts = layer.mlp.experts
    gate, up = (hidden @ experts.gate_up_proj[number].double().T).chunk(2, -1)
    return (silu(gate) * up) @ experts.down_proj[number].double().T


def normed(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    norm = layer.post_attention_layernorm
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return norm.weight.double() * hidden * torch.rsqrt(variance + norm.variance_epsilon)


@torch.no_grad()
def means(model: Any, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return default vectors and tokens by their definition, expert by expert."""
    of = [seen(model, text) for text in texts]
    vectors, tokens = [], []
    for entry, layer in enumerate(blocks(model)):
        hidden = torch.cat([layers[entry][1] for layers in of])
        ids, _ = chosen(layer, hidden)
        outputs = [expert(layer, e, hidden[(ids == e).any(1)]) for e in range(layer.mlp.experts.num_experts)]
        tokens.append([len(output) for output in outputs])
        vectors.append(torch.stack([o.mean(0) if len(o) else o.new_zeros(o.shape[1]) for o in outputs]))
    return torch.stack(vectors).numpy(), np.array(tokens)


def test_default_vectors_are_the_mean_outputs_of_the_experts(model: Any, texts: list[list[int]]) -> None:
    found = calibrate(model, [texts[0], texts[1][:9]])
    vectors, tokens = means(model, [texts[0], texts[1][:9]])
    assert found.layers == tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    np.testing.assert_array_equal(found.tokens, tokens)
    assert (tokens == 0).any()
    np.testing.assert_allclose(found.vectors, vectors, rtol=0, atol=1e-5 * np.abs(vectors).max())


@torch.no_grad()
def test_predictions_are_what_the_formula_says(model: Any, texts: list[list[int]]) -> None:
    vectors, tokens = means(model, texts[:3])
    numbers = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    given = DefaultVectors(numbers, vectors.astype(np.float32), tokens)
    text = texts[4]
    with record(model, predict=BOTH, predict_distance=2, default_vectors=given) as trace:
        model(torch.tensor([text]))
    predictions = {(p.predictor, p.distance): p for p in trace.requests[0].predictions}
    assert list(predictions) == [(name, distance) for name in ("next_gate", "quasi_hidden") for distance in (1, 2)]
    layers, of = blocks(model), seen(model, text)
    for distance in (1, 2):
        found = predictions["quasi_hidden", distance]
        np.testing.assert_array_equal(found.known, np.tile(np.arange(len(layers)) >= distance, (len(text), 1)))
        for target in range(distance, len(layers)):
            residual, hidden = of[target - distance]
            ids, weights = chosen(layers[target - distance], hidden)
            added = (weights[:, :, None] * torch.from_numpy(vectors[target - distance])[ids]).sum(1)
            expected, _ = chosen(layers[target], normed(layers[target], residual + added))
            np.testing.assert_array_equal(np.sort(found.ids[:, target]), expected.sort().values)
    # Beside it, next-gate says what it says alone.
    with record(model, predict="next-gate", predict_distance=2) as trace:
        model(torch.tensor([text]))
    for alone in trace.requests[0].predictions:
        np.testing.assert_array_equal(alone.ids, predictions["next_gate", alone.distance].ids)


def recall(store: Path, predictor: str) -> float:
    """Share of the routed experts that were predicted one layer ahead."""
    (found,) = tk.open(store).sql(
        "SELECT avg(len(list_intersect(predicted, experts)) / len(experts)) AS recall "
        "FROM predictions JOIN routing USING (trace, request, layer, pos) "
        f"WHERE predictor = '{predictor}' AND distance = 1"
    )["recall"]
    return float(found)


def test_the_command_calibrates_keeps_and_reuses_default_vectors(
    models: Path, texts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, some in (("one", texts[:4]), ("two", texts[4:])):
        lines = (json.dumps({"id": f"r{i}", "token_ids": text}) for i, text in enumerate(some))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def capture(name: str, *options: str) -> int:
        common = f"capture transformers {models / 'olmoe'} --prompts {tmp_path / name}.jsonl --quiet --teacher-forcing"
        store = f"--store {tmp_path / name} --dtype float32 --predict next-gate --predict quasi-hidden"
        return main([*common.split(), *store.split(), *options])

    saved = str(tmp_path / "v.npz")
    assert capture("one", "--save-default-vectors", saved, "--calibration-share", "0.5") in (0, 3)
    known = tk.open(tmp_path / "one").trace().meta.extra["capture"]
    vectors = DefaultVectors.read(saved)
    assert known["predict"] == ["next-gate", "quasi-hidden"]
    assert known["default_vectors"] == dict(vectors.described)
    np.testing.assert_array_equal(vectors.vectors, calibrate(load(models, "olmoe"), texts[:4:2]).vectors)
    assert capture("two", "--default-vectors", saved) in (0, 3)
    assert recall(tmp_path / "two", "quasi_hidden") > recall(tmp_path / "two", "next_gate") > 0.7
    assert capture("two", "--save-default-vectors", saved, "--force") == 1
    assert "is there already" in capsys.readouterr().err


def test_a_cache_and_padding_predict_as_the_whole_text_does(models: Path, texts: list[list[int]]) -> None:
    model = load(models, "olmoe")
    given = calibrate(model, texts[:1])
    text = texts[1][:20]

    def predicted(trace: Any, number: int = 0) -> np.ndarray:
        return np.sort(trace.requests[number].predictions[0].ids[:, 1:], 2)

    options = {"predict": "quasi-hidden", "default_vectors": given}
    with torch.no_grad():
        with record(model, **options) as trace:
            model(torch.tensor([text]))
        whole = predicted(trace)
        with record(model, **options) as trace:
            cache = model(torch.tensor([text[:-2]]), use_cache=True).past_key_values
            for token in text[-2:]:
                cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        np.testing.assert_array_equal(predicted(trace), whole)
        mask = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with record(model, **options) as trace:
            model(torch.tensor([[0] * 5 + text[:15], text]), attention_mask=mask, position_ids=positions)
        np.testing.assert_array_equal(predicted(trace), whole[:15])
        np.testing.assert_array_equal(predicted(trace, 1), whole)


def test_speculation_predicts_for_the_rows_that_were_kept(models: Path, texts: list[list[int]]) -> None:
    model, draft = load(models, "olmoe"), load(models, "draft")
    given = calibrate(model, texts[:1])
    with torch.inference_mode():
        with tapped(model, ahead=ahead("quasi-hidden", 1, given)) as taps:
            done = speculate(
                model,
                draft,
                taps,
                texts[1][:40],
                max_new_tokens=12,
                draft_tokens=3,
                sampling=Sampling(0.0),
                rng=np.random.default_rng(0),
            )
        with record(model, predict="quasi-hidden", default_vectors=given) as trace:
            model(torch.tensor([done.tokens[:-1]]))
    predicted = np.concatenate([piece.predicted for piece in done.pieces])
    assert done.steps.n_accepted.sum() < (done.steps.n_rows - 1).sum()  # some drafts were rejected
    (alone,) = trace.requests[0].predictions
    np.testing.assert_array_equal(np.sort(predicted[:, 0, 1:]), np.sort(alone.ids[:, 1:]))


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_do_more_than_to_add_are_refused(name: str) -> None:
    model = FAMILIES[name].build()
    given = calibrate(model, [TEXT])
    with torch.no_grad(), record(model, predict="next-gate", default_vectors=given) as trace:
        model(torch.tensor([TEXT]))  # asks for no quasi-hidden state
    assert [p.predictor for p in trace.requests[0].predictions] == ["next_gate"]
    with (
        torch.no_grad(),
        record(model, predict="quasi-hidden", default_vectors=given),
        pytest.raises(UnsupportedError, match="does more than to add what its experts return"),
    ):
        model(torch.tensor([TEXT]))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if len(f.layers) > 1 and n not in REFUSED])
def test_families_predict_with_perfect_vectors_what_runs(name: str) -> None:
    """One token is its own mean: the state after a layer is then the real one, shared experts and attention aside."""
    family = FAMILIES[name]
    model = family.build()
    with torch.no_grad():
        for layer in layers_of(model):  # without attention, the next MoE layer sees the state as it was left
            for part, module in layer.named_children():
                if "attn" in part or "attention" in part:
                    silence(module)
            for part in ("shared_experts", "shared_expert", "shared_mlp"):
                if hasattr(block_of(layer), part):
                    silence(getattr(block_of(layer), part))
        given = calibrate(model, [TEXT[:1]])
        before = model(torch.tensor([TEXT[:1]])).logits
        with record(model, predict="quasi-hidden", default_vectors=given) as trace:
            during = model(torch.tensor([TEXT[:1]])).logits
    assert torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    (request,) = trace.requests
    (predictions,) = request.predictions
    near = [entry for entry, (a, b) in enumerate(pairwise(family.layers), start=1) if b == a + 1]
    np.testing.assert_array_equal(np.sort(predictions.ids[:, near]), np.sort(request.ids[:, near]))


def layers_of(model: Any) -> list[Any]:
    body = getattr(model, "transformer", None) or model.model
    return list(getattr(body, "blocks", None) or body.layers)


def block_of(layer: Any) -> Any:
    return next(
        module for name, module in layer.named_children() if name in ("mlp", "ffn", "feed_forward", "block_sparse_moe")
    )


def silence(module: Any) -> None:
    """Make a module return nothing but zeros: its last layers have no weight."""
    for name, value in module.named_parameters():
        if any(part in name for part in ("o_proj", "out_proj", "dense", "down_proj", "sinks")):
            value.zero_()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "quasi-hidden predictions without default vectors"),
        ({"default_vectors": ((0, 1), 12, 16)}, r"12 experts in the layers \[0, 1\]; expected those of OlmoeForCausal"),
        ({"default_vectors": ((0, 1, 2), 8, 16)}, r"8 experts in the layers \[0, 1, 2\]"),
        ({"default_vectors": ((0, 1, 2), 12, 8)}, "default vectors of 8 elements; expected 16"),
    ],
)
def test_default_vectors_that_are_not_the_models_are_refused(options: dict[str, Any], said: str) -> None:
    model = FAMILIES["olmoe"].build()
    if options:
        layers, experts, hidden = options["default_vectors"]
        zeros = np.zeros((len(layers), experts, hidden), np.float32)
        options = {"default_vectors": DefaultVectors(layers, zeros, np.ones(zeros.shape[:2], np.int64))}
    with pytest.raises(UsageError, match=said), record(model, predict="quasi-hidden", **options), torch.no_grad():
        model(torch.tensor([TEXT]))


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no token to calibrate"):
        calibrate(FAMILIES["olmoe"].build(), [])
    with pytest.raises(UnsupportedError, match="layer 1: its experts do not show what each of them returns"):
        calibrate(FAMILIES["llama4_text"].build(), [TEXT])
    model = FAMILIES["olmoe"].build()
    experts = model.model.layers[1].mlp.experts
    whole = experts.forward
    experts.forward = lambda hidden, ids, weights: whole(hidden, ids, weights) + hidden  # not their sum alone
    with pytest.raises(UnsupportedError, match="layer 1: its experts do not show"):
        calibrate(model, [TEXT])
    with (
        pytest.raises(SourceError, match="cannot be read"),
        record(model, predict="quasi-hidden", default_vectors=tmp_path / "none.npz"),
    ):
        pass
