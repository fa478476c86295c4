"""Next-gate predictions: what the routers of later layers choose for the input of the gate that runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

import tracekit as tk
from tracekit.capture.ahead import ahead
from tracekit.capture.hooks import tapped
from tracekit.capture.recorder import record
from tracekit.capture.speculative import Sampling, speculate
from tracekit.cli import main
from tracekit.errors import UnsupportedError, UsageError
from tracekit.schema import Request

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
TEXT = list(range(10, 22))


@pytest.fixture(scope="module")
def olmoe(models: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(models / "olmoe", dtype=torch.float32).eval()
    model.config.output_router_logits = False
    return model


def stored(shared: Path, kind: str, count: int) -> list[Any]:
    files = sorted((shared / "moe" / "traces" / "olmoe" / "npz").glob(f"{kind}-*.npz"))
    return [np.load(path) for path in files[:: max(1, len(files) // count)][:count]]


def assert_same_sets(request: Request, z: Any) -> None:
    """Compare with recordings whose layers without a prediction are 255."""
    assert [(p.predictor, p.distance) for p in request.predictions] == [("next_gate", 1), ("next_gate", 2)]
    for predictions in request.predictions:
        expected = z[f"predicted{predictions.distance}"]
        np.testing.assert_array_equal(predictions.known, (expected != 255).all(2))
        known = predictions.known
        np.testing.assert_array_equal(np.sort(predictions.ids[known]), np.sort(expected[known]))


def test_the_command_predicts_as_the_stored_captures(models: Path, shared: Path, tmp_path: Path) -> None:
    held_out = stored(shared, "prefill", 10)
    texts = [z["token_ids"][: int(z["prompt_len"])].tolist() for z in held_out]
    prompts = tmp_path / "held-out.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": f"r{i}", "token_ids": t}) for i, t in enumerate(texts)))
    command = f"capture transformers {models / 'olmoe'} --prompts {prompts} --store {tmp_path / 'S'} --quiet"
    options = "--teacher-forcing --dtype float32 --predict next-gate --predict-distance 2"
    assert main([*command.split(), *options.split()]) in (0, 3)
    store = tk.open(tmp_path / "S")
    frame = store.sql("SELECT request, distance, layer, pos, predicted FROM predictions ORDER BY ALL")
    assert frame.height == sum(map(len, texts)) * (7 + 6)
    for (request, distance, layer), rows in frame.group_by("request", "distance", "layer"):
        expected = held_out[request][f"predicted{distance}"][:, layer]
        np.testing.assert_array_equal(np.sort(np.array(rows["predicted"].to_list())), np.sort(expected))
    capture = store.trace().meta.extra["capture"]
    assert (capture["predict"], capture["predict_distance"]) == (["next-gate"], 2)


def test_generation_predicts_as_the_stored_captures(olmoe: Any, shared: Path) -> None:
    (z,) = stored(shared, "sampled", 1)
    text = z["token_ids"][:-1].astype(int).tolist()
    with torch.no_grad(), record(olmoe, predict="next-gate", predict_distance=2) as trace:
        cache = olmoe(torch.tensor([text[:-3]]), use_cache=True).past_key_values
        for token in text[-3:]:  # the cache continues the request, a token a forward
            cache = olmoe(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    (request,) = trace.requests
    np.testing.assert_array_equal(np.sort(request.ids), np.sort(z["routed_experts"]))
    assert_same_sets(request, z)


def test_speculation_predicts_for_the_rows_that_were_kept(olmoe: Any, models: Path, shared: Path) -> None:
    draft = AutoModelForCausalLM.from_pretrained(models / "draft", dtype=torch.float32).eval()
    (z,) = stored(shared, "prefill", 1)
    prompt = z["token_ids"][:40].tolist()
    with torch.inference_mode():
        with tapped(olmoe, ahead=ahead("next-gate")) as taps:
            done = speculate(
                olmoe,
                draft,
                taps,
                prompt,
                max_new_tokens=12,
                draft_tokens=3,
                sampling=Sampling(0.0),
                rng=np.random.default_rng(0),
            )
        with record(olmoe, predict="next-gate") as trace:
            olmoe(torch.tensor([done.tokens[:-1]]))
    predicted = np.concatenate([piece.predicted for piece in done.pieces])
    assert done.steps.n_accepted.sum() < (done.steps.n_rows - 1).sum()  # some drafts were rejected
    (alone,) = trace.requests[0].predictions
    np.testing.assert_array_equal(np.sort(predicted[:, 0, 1:]), np.sort(alone.ids[:, 1:]))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if len(f.layers) > 1])
def test_a_prediction_is_what_the_next_router_says_of_this_ones_input(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs: dict[int, torch.Tensor] = {}
    hooks = []
    with torch.no_grad():
        with record(model, predict="next-gate") as trace:
            for layer, router in routers(model).items():
                hooks.append(router.register_forward_pre_hook(lambda _, a, at=layer: inputs.update({at: a[0]})))
            model(input_ids=torch.tensor([TEXT]))
        (predictions,) = trace.requests[0].predictions
        for hook in hooks:
            hook.remove()
        # Given the earlier layer's gate input, the later block must run what was predicted.
        numbers = family.layers
        for entry, (source, target) in enumerate(pairwise(numbers), start=1):
            expected = chosen(model, family, target, inputs[source])
            np.testing.assert_array_equal(np.sort(predictions.ids[:, entry], 1), expected)
    np.testing.assert_array_equal(predictions.known, np.arange(len(numbers)) >= np.ones((len(TEXT), 1)))


def routers(model: Any) -> dict[int, Any]:
    found = {}
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        if child in ("gate", "router") and hasattr(model.get_submodule(parent), "experts"):
            found[next(int(part) for part in name.split(".") if part.isdigit())] = module
    return found


def chosen(model: Any, family: Any, layer: int, hidden: torch.Tensor) -> np.ndarray:
    """Sets of experts by the family's definition, from the router's weight alone."""
    router = routers(model)[layer]
    module = next(m for m in model.modules() if router in (getattr(m, "gate", None), getattr(m, "router", None)))
    linear = router if hasattr(router, "weight") else next(m for m in router.modules() if isinstance(m, nn.Linear))
    logits = hidden.reshape(-1, hidden.shape[-1]).double() @ linear.weight.double().T
    if getattr(linear, "bias", None) is not None:
        logits = logits + linear.bias.double()
    return family.chosen(logits.numpy(), module, family.top_k)


def test_recording_without_predictions_has_none(olmoe: Any) -> None:
    with torch.no_grad(), record(olmoe) as trace:
        olmoe(torch.tensor([TEXT]))
    assert trace.requests[0].predictions == ()


def test_predicting_changes_nothing_else_and_leaves_the_model_as_it_was(olmoe: Any) -> None:
    with torch.no_grad():
        before = olmoe(torch.tensor([TEXT])).logits
        with record(olmoe, predict="next-gate", predict_distance=7) as trace:
            during = olmoe(torch.tensor([TEXT])).logits
    assert torch.equal(before, during)
    assert [p.distance for p in trace.requests[0].predictions] == list(range(1, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in olmoe.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"predict": "oracle"}, "predict 'oracle'; expected next-gate"),
        ({"predict": "next-gate", "predict_distance": 0}, "predict_distance is 0"),
        ({"predict": "next-gate", "predict_distance": 8}, "8 MoE layers ahead in a model of 8"),
    ],
)
def test_what_cannot_be_predicted_is_refused(olmoe: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said), record(olmoe, **options):
        pass


def test_a_router_that_is_not_all_there_is_to_the_choice_is_refused() -> None:
    model = FAMILIES["olmoe"].build()
    block = model.model.layers[1].mlp

    # The block runs other experts than its router names, as where a bias is added outside of the router.
    block.experts.register_forward_pre_hook(lambda _, a: (a[0], (a[1] + 1) % 12, a[2]))
    with (
        pytest.raises(UnsupportedError, match="chooses other experts than those that ran"),
        torch.no_grad(),
        record(model, predict="next-gate"),
    ):
        model(input_ids=torch.tensor([TEXT]))


def test_a_router_that_looks_at_more_than_its_layers_input_is_refused() -> None:
    model = FAMILIES["olmoe"].build()
    gate = model.model.layers[1].mlp.gate
    ask = gate.forward
    # The state of an earlier router, say: at the time of the prediction it was not there yet.
    gate.forward = lambda hidden, state=None: ask(hidden if state is None else hidden + state)
    gate.register_forward_pre_hook(lambda _, a, k: (a, {"state": a[0] * 0}), with_kwargs=True)
    with (
        pytest.raises(UnsupportedError, match="looks at more than one input"),
        torch.no_grad(),
        record(model, predict="next-gate"),
    ):
        model(input_ids=torch.tensor([TEXT]))
