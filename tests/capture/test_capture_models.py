"""The small trained models: capture from the command line and from Python against what was captured before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracekit as tk
from tracekit.capture.hooks import tapped
from tracekit.capture.recorder import record
from tracekit.capture.speculative import Sampling, Speculated, speculate
from tracekit.cli import main
from tracekit.errors import SourceError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(scope="module")
def olmoe(models: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(models / "olmoe", dtype=torch.float32).eval()
    model.config.output_router_logits = False  # its loss fails on one new token with a mask
    return model


@pytest.fixture(scope="module")
def draft(models: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(models / "draft", dtype=torch.float32).eval()


def stored(shared: Path, kind: str, count: int) -> list[Any]:
    files = sorted((shared / "moe" / "traces" / "olmoe" / "npz").glob(f"{kind}-*.npz"))
    return [np.load(path) for path in files[:: max(1, len(files) // count)][:count]]


def prompts_file(path: Path, texts: list[list[int]]) -> Path:
    lines = (
        json.dumps({"id": f"r{i}", "token_ids": text, "domain": "even" if i % 2 == 0 else "odd"})
        for i, text in enumerate(texts)
    )
    path.write_text("\n".join(lines))
    return path


def routed(store: Path, name: str) -> dict[str, np.ndarray]:
    """Return ``[tokens, layers, k]`` of each request, sorted by number within a token."""
    opened = tk.open(store)
    layers = len(opened.trace(name).meta.layers)
    frame = opened.sql(
        f"SELECT q.request_id, r.layer, r.pos, r.experts FROM routing r JOIN requests q USING (trace, request) "
        f"WHERE r.trace = '{name}' ORDER BY ALL"
    )
    out: dict[str, np.ndarray] = {}
    for request_id in frame["request_id"].unique().to_list():
        ids = np.array(frame.filter(frame["request_id"] == request_id)["experts"].to_list())
        out[request_id] = np.sort(ids.reshape(layers, -1, ids.shape[1]).transpose(1, 0, 2), 2)
    return out


@pytest.mark.parametrize("batch_size", [1, 5])
def test_teacher_forcing_routes_as_the_stored_captures(
    models: Path, shared: Path, tmp_path: Path, batch_size: int
) -> None:
    held_out = stored(shared, "prefill", 10)
    texts = [z["token_ids"][: int(z["prompt_len"])].tolist() for z in held_out]
    info = tk.capture_transformers(
        models / "olmoe",
        prompts_file(tmp_path / "held-out.jsonl", texts),
        tmp_path / "store",
        teacher_forcing=True,
        batch_size=batch_size,
        dtype="float32",
        label_fields=["domain"],
        labels={"by": "test"},
    )
    assert (info.name, info.requests, info.tokens) == ("olmoe", 10, sum(map(len, texts)))
    assert (info.meta.model, info.meta.num_experts, info.meta.top_k, info.default_phase) == ("olmoe", 32, 4, "prefill")
    found = routed(tmp_path / "store", "olmoe")
    for number, z in enumerate(held_out):
        np.testing.assert_array_equal(found[f"r{number}"], np.sort(z["routed_experts"], 2))
    labels = tk.open(tmp_path / "store").sql("SELECT label FROM requests ORDER BY request LIMIT 2")["label"].to_list()
    assert labels == ["even / test", "odd / test"]


def test_weights_and_order_are_those_of_the_stored_captures(olmoe: Any, shared: Path) -> None:
    (z,) = stored(shared, "sampled", 1)
    with torch.no_grad(), record(olmoe) as trace:
        olmoe(torch.tensor([z["token_ids"][:-1].astype(int).tolist()]))
    (request,) = trace.requests
    np.testing.assert_array_equal(request.ids, z["routed_experts"])
    assert request.weights is not None
    np.testing.assert_allclose(request.weights, z["router_weights"].astype(np.float32), atol=5e-4)


def test_glm_routes_by_its_biased_sigmoids(models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "glm4moe", dtype=torch.float32).eval()
    text = AutoTokenizer.from_pretrained(models / "glm4moe")("static int probe(struct device *dev)\n{\n")["input_ids"]
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda gate, args: seen.append(args[0]))
        for layer in model.model.layers[1:]
    ]
    with torch.no_grad(), record(model) as trace:
        model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    (request,) = trace.requests
    assert trace.meta.layers == (1, 2, 3, 4, 5)
    plain = 0
    for layer, hidden in enumerate(seen):
        gate = model.model.layers[layer + 1].mlp.gate
        logits = hidden.reshape(-1, hidden.shape[-1]).double() @ gate.weight.detach().double().T
        chosen = (logits.sigmoid() + gate.e_score_correction_bias).topk(6).indices.sort().values
        np.testing.assert_array_equal(np.sort(request.ids[:, layer], 1), chosen)
        plain += int((logits.topk(6).indices.sort().values != chosen).any(1).sum())
    assert plain > 0


def test_the_command_generates_from_text(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("import os\n\n#include <stdio.h>\nSELECT a\n")
    common = ["capture", "transformers", str(models / "olmoe"), "--prompts", str(prompts), "--store"]
    options = ["--dtype", "float32", "--max-new-tokens", "12"]
    assert main([*common, str(tmp_path / "s"), *options, "--name", "one", "--no-tokens"]) == 0
    assert "trace 'one' has 3 requests" in capsys.readouterr().err
    assert main([*common, str(tmp_path / "s"), *options, "--name", "three", "--batch-size", "3", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    one, three = routed(tmp_path / "s", "one"), routed(tmp_path / "s", "three")
    assert sorted(one) == ["p-0", "p-1", "p-2"]
    for name, ids in one.items():
        np.testing.assert_array_equal(ids, three[name])
    store = tk.open(tmp_path / "s")
    decode = store.sql("SELECT DISTINCT n_decode FROM requests WHERE trace = 'one'")["n_decode"].to_list()
    assert decode == [11]
    assert not store.trace("one").segments[0].has_token_ids
    assert store.trace("three").segments[0].has_token_ids


def test_sampling_depends_on_the_seed_alone(models: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.jsonl", [[20, 30, 40], [50, 60]])
    state = torch.random.get_rng_state()

    def sampled(name: str, seed: int) -> str:
        info = tk.capture_transformers(
            models / "olmoe",
            prompts,
            tmp_path / "s",
            name=name,
            temperature=0.8,
            seed=seed,
            max_new_tokens=6,
            dtype="float32",
        )
        assert info.meta.extra["capture"]["temperature"] == 0.8
        assert info.meta.extra["capture"]["seed"] == seed
        return info.content

    first, again, other = sampled("a", 1), sampled("b", 1), sampled("c", 2)
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def speculated(olmoe: Any, draft: Any, text: list[int], temperature: float = 0.0, **options: Any) -> Speculated:
    with torch.no_grad(), tapped(olmoe) as taps:
        return speculate(
            olmoe,
            draft,
            taps,
            text,
            sampling=Sampling(temperature),
            rng=np.random.default_rng(5),
            **{"max_new_tokens": 40, "draft_tokens": 3, **options},
        )


def forced(model: Any, text: list[int]) -> np.ndarray:
    with torch.no_grad(), record(model) as trace:
        model(torch.tensor([text]))
    return np.sort(trace.requests[0].ids, 2)


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_greedy_speculation_is_greedy_decoding(olmoe: Any, draft: Any, shared: Path, draft_tokens: int) -> None:
    accepted = 0
    for z in stored(shared, "prefill", 2):
        text = z["token_ids"][:40].tolist()
        plain = olmoe.generate(
            torch.tensor([text]), attention_mask=torch.ones((1, 40), dtype=torch.long), max_new_tokens=40,
            do_sample=False, eos_token_id=None, top_k=None,
        )[0].tolist()  # fmt: skip
        done = speculated(olmoe, draft, text, draft_tokens=draft_tokens)
        assert done.tokens == plain
        accepted += int(done.steps.n_accepted.sum())
    assert accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_hold_what_was_verified(olmoe: Any, draft: Any, shared: Path, temperature: float) -> None:
    (z,) = stored(shared, "sampled", 1)
    text = z["token_ids"][:30].tolist()
    done = speculated(olmoe, draft, text, temperature)
    steps, sets = done.steps, forced(olmoe, done.tokens[:-1])
    kept = np.concatenate([np.sort(piece.ids, 2) for piece in done.pieces])
    np.testing.assert_array_equal(kept, sets)
    assert len(done.tokens) == 70
    assert steps.start_pos[0] == 30
    np.testing.assert_array_equal(np.diff(steps.start_pos), steps.n_accepted[:-1] + 1)
    assert (steps.n_accepted < steps.n_rows).all()
    assert (steps.n_rows <= 4).all()
    assert (steps.n_accepted < steps.n_rows - 1).any(), "no draft was rejected"
    assert steps.ids.shape == (steps.n_rows.sum(), 8, 4)
    assert steps.weights is not None
    assert steps.weights.shape == steps.ids.shape
    ends = np.cumsum(steps.n_rows)
    for start, end, rows, accepted in zip(steps.start_pos, ends, steps.n_rows, steps.n_accepted, strict=True):
        first = end - rows
        window = np.sort(steps.ids[first : first + accepted + 1], 2)
        np.testing.assert_array_equal(window, sets[start : start + accepted + 1])


def test_an_end_among_the_drafts_ends_the_request(olmoe: Any, draft: Any, shared: Path) -> None:
    (z,) = stored(shared, "prefill", 1)
    text = z["token_ids"][:40].tolist()
    free = speculated(olmoe, draft, text)
    step = int(np.flatnonzero(free.steps.n_accepted)[0])  # its first draft was accepted: let that be the end
    end = free.tokens[int(free.steps.start_pos[step]) + 1]
    until = free.tokens.index(end, 40)
    done = speculated(olmoe, draft, text, eos=frozenset({end}))
    assert done.tokens == free.tokens[: until + 1]
    assert sum(len(piece.ids) for piece in done.pieces) == until
    if len(done.steps.n_rows):
        assert int(done.steps.start_pos[-1] + done.steps.n_accepted[-1]) == until - 1


def test_speculation_from_the_command_line(models: Path, tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path / "p.jsonl", [[20, 30, 40], [50, 60]])
    common = ["capture", "transformers", str(models / "olmoe"), "--prompts", str(prompts), "--dtype", "float32"]
    common += ["--store", str(tmp_path / "s"), "--max-new-tokens", "20", "--quiet"]
    assert main([*common, "--name", "greedy"]) == 0
    assert main([*common, "--name", "spec", "--draft", str(models / "draft"), "--draft-tokens", "2"]) == 0
    greedy, spec = routed(tmp_path / "s", "greedy"), routed(tmp_path / "s", "spec")
    for name, ids in greedy.items():
        np.testing.assert_array_equal(ids, spec[name])
    trace = tk.open(tmp_path / "s").trace("spec")
    assert trace.meta.drafts_included
    assert trace.meta.extra["capture"]["draft"] == "draft"
    assert list((tmp_path / "s" / "segments" / trace.segments[0].id).glob("steps.parquet"))


def test_what_does_not_fit_is_said_and_nothing_is_written(models: Path, tmp_path: Path) -> None:
    store, olmoe = tmp_path / "s", models / "olmoe"
    good = prompts_file(tmp_path / "good.jsonl", [[1, 2, 3]])

    def fails(match: str, error: type[Exception] = SourceError, model: Path = olmoe, **options: Any) -> None:
        with pytest.raises(error, match=match):
            tk.capture_transformers(model, options.pop("prompts", good), store, **options)
        assert not store.exists()

    fails("no layer has routed experts", Exception, models / "draft")
    fails("does not exist", model=tmp_path / "nothing")
    fails("cannot be loaded", model=tmp_path)
    fails("tokens 1 to 4096", prompts=prompts_file(tmp_path / "big.jsonl", [[1, 4096]]))
    fails("at most 1024.*--max-prompt-tokens", prompts=prompts_file(tmp_path / "long.jsonl", [[5] * 1000]))
    fails("batch_size is 0", UsageError, batch_size=0)
    fails("a draft model with teacher forcing", UsageError, draft=models / "draft", teacher_forcing=True)
    assert tk.capture_transformers(
        olmoe, prompts_file(tmp_path / "long.jsonl", [[5] * 1000]), store, max_prompt_tokens=8, max_new_tokens=2
    ).notes == ("1 prompts were cut to 8 tokens",)
