"""The check of what a trace claims: phases, logical ids, verification steps, router weights; options at odds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_check import LAYERS, READ, Ids, K, N, findings, meta, names, routed, run, save

import tracekit as tk
from tracekit.checks import Checker, Finding
from tracekit.errors import UsageError
from tracekit.schema import Request, VerifySteps
from tracekit.synthetic import synth


@pytest.fixture(scope="module")
def clean() -> list[Ids]:
    return routed()


def found_in(requests: Sequence[Request], phase: Any = None, **more: Any) -> list[Finding]:
    checker = Checker(meta(**more), phase=phase)
    for request in requests:
        checker.add(request)
    return checker.findings()


# --- replicas ---------------------------------------------------------------------------------------------------------


def replicated(arrays: Sequence[Ids], slots: int, num_experts: int, choose: str) -> list[Ids]:
    """Number the experts as physical slots: each layer's most frequent ones have two, one of which a row takes."""
    rng = np.random.default_rng(0)
    made = [ids.astype(np.uint16) for ids in arrays]
    for layer in range(arrays[0].shape[1]):
        counts = np.bincount(np.concatenate([ids[:, layer].ravel() for ids in arrays]), minlength=num_experts)
        hot = np.argsort(-counts)[:slots]
        slot = rng.permutation(num_experts + slots)
        for ids, out in zip(arrays, made, strict=True):
            rows = ids[:, layer].astype(int)
            second = {
                "random": rng.random(rows.shape) < 0.5,
                "rank": (np.arange(rows.size).reshape(rows.shape) % 2).astype(bool),  # by its place in the batch
            }[choose]
            for i, expert in enumerate(hot):
                rows = np.where((ids[:, layer] == expert) & second, num_experts + i, rows)
            out[:, layer] = slot[rows]
    return made


@pytest.mark.parametrize("choose", ["random", "rank"])
def test_replicas_are_noticed(choose: str) -> None:
    arrays = routed(24, 240, seed=4)
    shape = meta(num_experts=N + 8)
    [found] = findings(replicated(arrays, 8, N, choose), shape)
    assert (found.severity, found.finding) == ("warning", "physical-ids")
    assert found.where.startswith("layers 0, 2, 5 of the 3 looked at" if choose == "random" else "layers ")
    assert "are never in one row, though frequent and in the same company" in found.evidence
    assert "--id-space logical" in found.remedy
    told = replace(shape, id_space="logical")
    assert findings(replicated(arrays, 8, N, choose), told) == []
    assert findings(replicated(arrays, 8, N, choose), replace(shape, native_top_k=K)) == []  # N is that of its config
    assert findings(arrays, shape) == []  # N is too large, but no two experts are one


def test_replicas_of_a_released_model(shared: Path) -> None:
    with np.load(shared / "traces/gptoss20b_subset64/trace.npz") as file:
        ids, lens = file["expert_ids"], file["request_lens"]
    arrays = np.split(ids, np.cumsum(lens)[:-1])
    shape = meta(24, num_experts=36)
    [found] = [f for f in findings(replicated(arrays, 4, 32, "random"), shape) if f.finding == "physical-ids"]
    assert found.evidence.startswith("12 pairs of ids")  # 4 in each of 3 layers, and no other


@given(
    kind=st.sampled_from(["uniform", "skewed", "sticky", "topical"]),
    shape=st.sampled_from([(16, 2), (64, 8), (128, 4), (40, 8), (300, 6)]),
    seed=st.integers(0, 2**63),
)
def test_no_replicas_in_clean_traces(kind: str, shape: tuple[int, int], seed: int) -> None:
    trace = synth(kind, num_experts=shape[0], top_k=shape[1], layers=3, requests=12, tokens=(200, 400), seed=seed)
    checker = Checker(replace(trace.meta, id_space="unknown"))
    for request in trace.requests():
        checker.add(request)
    assert "physical-ids" not in {f.finding for f in checker.findings()}


def test_more_experts_than_the_model_has(clean: list[Ids], tmp_path: Path) -> None:
    record = {
        "model": "Qwen/Qwen3-30B-A3B",
        "usage": {"prompt_tokens": 40, "completion_tokens": 201},
        "choices": [{"index": 0, "routed_experts": clean[0].tolist()}],
    }
    (tmp_path / "responses.json").write_text(json.dumps(record))
    found = tk.check(tmp_path / "responses.json", num_experts=160, axes="tlk")
    [row] = found.filter(finding="physical-ids").iter_rows(named=True)
    assert (row["severity"], row["where"]) == ("warning", "whole trace")
    assert row["evidence"] == "160 experts per layer, where 'Qwen/Qwen3-30B-A3B' was released with 128"
    assert tk.check(tmp_path / "responses.json", num_experts=128, axes="tlk").filter(finding="physical-ids").is_empty()


# --- phases -----------------------------------------------------------------------------------------------------------


def test_rows_of_prompts_that_are_called_decode(clean: list[Ids]) -> None:
    requests = [Request(f"r{i}", ids, prompt_len=40, decode_start=40) for i, ids in enumerate(clean)]
    [found] = found_in(requests, phase="decode")
    assert (found.severity, found.finding) == ("warning", "phase-ignored")
    assert found.where == "request 'r0', and 11 more"
    assert found.evidence.startswith("--phase decode, but 12 of 12 requests have rows of their prompt")
    assert found_in(requests, phase=None) == []
    output = [replace(request, first_pos=40) for request in requests]
    assert names(found_in(output, phase="decode")) == {("warning", "prompt-dropped")}


def test_prompts_that_begin_alike_and_are_called_decode(clean: list[Ids]) -> None:
    alike = [np.concatenate([clean[0][:1], ids[1:]]) for ids in clean]  # the token that begins every text
    [found] = findings(alike, decode_start=0)
    assert (found.severity, found.finding) == ("warning", "phase-contradicted")
    assert found.where == "12 of 12 requests that differ"
    assert findings(alike) == []  # nothing was said of them
    assert findings(alike, decode_start=1, prompt_len=1) == []
    assert findings(alike[:7], decode_start=0) == []
    few = [*alike[:5], *clean[5:]]
    assert findings(few, decode_start=0) == []
    copies = findings([clean[0]] * 10, decode_start=0)
    assert "phase-contradicted" not in {f.finding for f in copies}


def test_a_prompt_that_lacks_its_first_rows(clean: list[Ids]) -> None:
    [found] = findings(clean, prompt_len=64, first_pos=16, decode_start=64)
    assert (found.severity, found.finding) == ("note", "prompt-dropped")
    assert found.evidence == "12 of 12 requests lack the first rows of their prompt"
    assert names(findings(clean, first_pos=16, decode_start=256)) == {("note", "prompt-dropped")}  # --phase prefill


def test_generated_rows_that_are_called_prefill(clean: list[Ids]) -> None:
    requests = [
        Request(f"r{i}", ids, decode_start=len(ids) if i else 40, steps=steps_of(ids, 40))
        for i, ids in enumerate(clean)
    ]
    [found] = found_in(requests)
    assert (found.severity, found.finding) == ("serious", "phase-contradicted")
    assert found.where == "request 'r1', and 10 more"
    assert found_in(requests[:1]) == []


def test_a_claimed_phase_is_kept_with_the_trace(clean: list[Ids], tmp_path: Path) -> None:
    source = save(tmp_path / "trace.npz", clean)
    entries = [{"prompt_len": 40, "first_pos": 0}] * len(clean)
    reading: dict[str, Any] = {"axes": "tlk", "phase": "decode", "requests": entries}
    assert tk.check(source, **reading)["finding"].to_list() == ["phase-ignored"]
    info = tk.ingest(source, tmp_path / "S", **reading)
    assert names(info.findings) == {("warning", "phase-ignored")}
    assert tk.check(tmp_path / "S")["evidence"].to_list() == [info.findings[0].evidence]
    more = save(tmp_path / "more.npz", routed(3, seed=9))
    both = tk.ingest(more, tmp_path / "S", name="trace", axes="tlk", phase="decode", append=True)
    assert both.findings == info.findings  # of the requests that it was said of


# --- verification steps -----------------------------------------------------------------------------------------------


def steps_of(ids: Ids, start: int, drafts: int = 2, seed: int = 0) -> VerifySteps:
    """Steps that kept every row of a request from a position on, with the rows of rejected drafts beside them."""
    rng = np.random.default_rng(seed)
    starts, accepted, pos = [], [], start
    while pos < len(ids):
        starts.append(pos)
        accepted.append(min(int(rng.integers(drafts + 1)), len(ids) - pos - 1))
        pos += accepted[-1] + 1
    rows = np.concatenate([p + np.arange(1 + drafts) for p in starts])
    kept = np.concatenate([np.arange(1 + drafts) <= a for a in accepted])
    out = ids[np.minimum(rows, len(ids) - 1)].copy()
    out[~kept] = np.argsort(rng.random((int((~kept).sum()), ids.shape[1], N)), axis=2)[..., :K]
    return VerifySteps(np.array(starts), np.full(len(starts), 1 + drafts), np.array(accepted), out)


def with_steps(clean: Sequence[Ids], change: Callable[[VerifySteps], VerifySteps]) -> list[Finding]:
    return found_in(
        [
            Request(f"r{i}", ids, prompt_len=60, decode_start=60, steps=change(steps_of(ids, 60, seed=i)))
            for i, ids in enumerate(clean)
        ]
    )


def test_sound_steps_are_silent(clean: list[Ids]) -> None:
    assert with_steps(clean, lambda steps: steps) == []
    assert with_steps(clean, lambda s: replace(s, ids=s.ids[..., ::-1])) == []  # the same sets
    few = np.random.default_rng(1).random(1000) < 0.03

    def rounded(steps: VerifySteps) -> VerifySteps:
        ids = steps.ids.copy()
        ids[few[: len(ids)]] = ids[::-1][few[: len(ids)]]
        return replace(steps, ids=ids)

    assert with_steps(clean, rounded) == []


def test_trees_of_which_it_is_not_known_what_was_kept(clean: list[Ids]) -> None:
    """Of two drafts for the second token one was accepted: its position is covered, its experts are not known."""
    at = np.arange(60, 240, 2)
    steps = VerifySteps(at, np.full(90, 3), np.full(90, 1), clean[0][np.repeat(at, 3)], depth=np.tile([0, 1, 1], 90))
    assert found_in([Request("r", clean[0], prompt_len=60, decode_start=60, steps=steps)]) == []
    known = replace(steps, kept=np.tile([1, 0, 1], 90).astype(np.int8))  # and these have other experts
    found = found_in([Request("r", clean[0], prompt_len=60, decode_start=60, steps=known)])
    assert names(found) == {("warning", "verification-steps")}  # half of the rows


@pytest.mark.parametrize("offset", [-2, 1])
def test_steps_at_other_positions(clean: list[Ids], offset: int) -> None:
    found = with_steps(clean, lambda steps: replace(steps, start_pos=steps.start_pos + offset))
    assert {f.finding for f in found if f.severity == "serious"} == (
        {"verification-steps"} if offset > 0 else {"verification-steps", "phase-contradicted"}
    )
    moved = next(f for f in found if f.finding == "verification-steps")
    assert moved.severity == "serious"
    assert moved.where == "request 'r0' the first"
    assert f"moved by {-offset:+d} positions" in moved.evidence


def test_steps_of_another_request(clean: list[Ids]) -> None:
    others = [*clean[1:], clean[0]]
    [found] = found_in(
        [
            Request(f"r{i}", ids, prompt_len=60, decode_start=60, steps=steps_of(other, 60))
            for i, (ids, other) in enumerate(zip(clean, others, strict=True))
        ]
    )
    assert (found.severity, found.finding) == ("serious", "verification-steps")
    assert "moved" not in found.evidence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_accepted": np.array([1, 3])}, "step 1 accepted 3 of 2 drafts"),
        ({"start_pos": np.array([60, 61])}, "step 1 starts at position 61, which the step before it kept"),
        ({"n_rows": np.array([3, 2])}, "6 rows of experts for 2 steps of 5 rows in all"),
        ({"ids": np.full((6, LAYERS, K), N, np.uint8)}, f"expert id {N} of {N} experts"),
    ],
)
def test_impossible_steps(clean: list[Ids], change: dict[str, Any], said: str) -> None:
    """A reader refuses them; what is captured is stored as it is handed over."""
    steps = VerifySteps(np.array([60, 62]), np.array([3, 3]), np.array([1, 0]), clean[0][60:66])
    assert found_in([Request("r", clean[0][:66], prompt_len=60, decode_start=60, steps=steps)]) == []
    [found] = found_in([Request("r", clean[0], steps=replace(steps, **change))])
    assert (found.severity, found.finding, found.where) == ("serious", "verification-steps", "request 'r'")
    assert found.evidence == said


def test_steps_beyond_the_rows(clean: list[Ids]) -> None:
    steps = [steps_of(ids, 60, seed=i) for i, ids in enumerate(clean)]
    cut = [
        Request(f"r{i}", ids[:180], prompt_len=60, decode_start=60, steps=s)
        for i, (ids, s) in enumerate(zip(clean, steps, strict=True))
    ]
    [found] = found_in(cut)
    assert (found.severity, found.finding) == ("warning", "verification-steps")
    assert "at positions of which the trace has no row" in found.evidence


def test_steps_of_a_part_of_the_decode(clean: list[Ids]) -> None:
    [found] = with_steps(clean, lambda steps: steps.take(np.arange(len(steps.n_rows)) < 30))
    assert (found.severity, found.finding) == ("warning", "verification-gaps")
    assert found.where == "request 'r0' the first"
    sound = [Request(f"r{i}", ids, decode_start=60, prompt_len=60) for i, ids in enumerate(clean)]
    sound[3].steps = steps_of(clean[3], 60)
    assert found_in(sound) == []  # the others were generated without drafts


def test_real_steps_are_sound(shared: Path) -> None:
    folder = shared / "moe/traces/olmoe"
    table = pl.read_parquet(folder / "verify_steps.parquet").cast({"request_id": pl.String})
    requests = []
    for (request_id,), steps in table.group_by("request_id", maintain_order=True):
        with np.load(folder / f"npz/{request_id}.npz") as file:
            ids, prompt, weights = file["routed_experts"], int(file["prompt_len"]), file["router_weights"]
        requests.append(
            Request(
                request_id,
                ids,
                prompt_len=prompt,
                decode_start=prompt,
                weights=weights,
                steps=VerifySteps(
                    start_pos=steps["start_pos"].to_numpy().astype(np.int64),
                    n_rows=1 + steps["n_drafted"].to_numpy().astype(np.int64),
                    n_accepted=steps["n_accepted"].to_numpy().astype(np.int64),
                    ids=steps["experts"].to_numpy().reshape(-1, 8, 4),
                ),
            )
        )
    found = found_in(requests, layers=8, router_order=True)
    assert names(found) == {("warning", "loops")}  # of the greedy ones
    later = [replace(r, steps=replace(r.steps, start_pos=r.steps.start_pos + 1)) for r in requests]
    moved = next(f for f in found_in(later, layers=8) if f.finding == "verification-steps")
    assert "moved by -1 positions 0" in moved.evidence


def test_what_ingest_refuses_about_steps_is_named(tmp_path: Path, clean: list[Ids], monkeypatch: Any) -> None:
    from tracekit.sources import READERS, RawRequest, Reader

    steps = VerifySteps(np.array([60]), np.array([2]), np.array([2]), clean[0][60:62])
    raw = RawRequest(where="made", ids=clean[0], request_id="a", axes="tlk", num_experts=N, steps=steps)
    monkeypatch.setitem(READERS, "made", Reader("made", "", "", lambda *_: False, lambda *_: iter([raw])))
    (tmp_path / "source").write_text("made")
    [row] = tk.check(tmp_path / "source", source_format="made").iter_rows(named=True)
    assert (row["severity"], row["finding"]) == ("serious", "verification-steps")
    assert "step 0 has 2 accepted drafts" in row["evidence"]


# --- weights ----------------------------------------------------------------------------------------------------------


def routers(arrays: Sequence[Ids], seed: int = 0) -> list[Ids]:
    """Positive weights that fall with rank, as a softmax leaves them, not normalised."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.gamma(1.0, 0.1, ids.shape), axis=2)[..., ::-1].astype(np.float16) for ids in arrays]


def weighed(arrays: Sequence[Ids], weights: Sequence[Ids], **more: Any) -> list[Finding]:
    requests = [Request(f"r{i}", ids, weights=w) for i, (ids, w) in enumerate(zip(arrays, weights, strict=True))]
    return found_in(requests, **{"router_order": True} | more)


def normalised(weights: Ids, scale: float = 1.0) -> Ids:
    wide = weights.astype(np.float64)
    return (scale * wide / wide.sum(axis=2, keepdims=True)).astype(np.float16)


def test_weights_of_every_family_are_silent(clean: list[Ids]) -> None:
    weights = routers(clean)
    rng = np.random.default_rng(1)
    assert weighed(clean, weights) == []
    assert weighed(clean, [normalised(w) for w in weights]) == []
    assert weighed(clean, [normalised(w, 2.5) for w in weights]) == []
    # A bias chose: weights are those of the scores without it, and fall with rank in most rows only.
    biased = [np.clip(w + 0.1 * rng.standard_normal(w.shape), 1e-3, None).astype(np.float16) for w in weights]
    assert weighed(clean, [normalised(w) for w in biased]) == []
    # A router that is nearly always sure: the sums come close to 1 and thin out below it.
    sure = [normalised(w) * (1 - rng.exponential(0.002, w.shape[:2]))[..., None] for w in weights]
    assert weighed(clean, [w.astype(np.float32) for w in sure]) == []
    one = [ids[..., :1] for ids in clean]
    assert weighed(one, [np.ones(ids.shape, np.float32) for ids in one], top_k=1) == []


def test_weights_that_are_none(clean: list[Ids]) -> None:
    weights = [w.copy() for w in routers(clean)]
    weights[3][0, 2] = np.nan
    weights[3][5] = 0
    weights[4][7, 1, 0] = -0.5
    [found] = weighed(clean, weights)
    assert (found.severity, found.finding) == ("warning", "invalid-weights")
    assert found.where == "request 'r3', row 0, layer 2: nan nan nan nan"
    assert found.evidence.startswith("8 of 17,280 sets looked at")  # 1 + 6 layers + 1


def test_weights_that_are_all_equal(clean: list[Ids]) -> None:
    assert names(weighed(clean, [np.full(ids.shape, 0.25, np.float16) for ids in clean])) == {
        ("warning", "equal-weights")
    }


@pytest.mark.parametrize("order", ["rising", "any"])
def test_weights_in_another_order_than_claimed(clean: list[Ids], order: str) -> None:
    weights = [w[..., ::-1] for w in routers(clean)]
    if order == "any":
        rng = np.random.default_rng(2)
        weights = [rng.permuted(w, axis=2) for w in weights]
    [found] = weighed(clean, weights)
    assert (found.severity, found.finding) == ("warning", "weights-out-of-order")
    assert weighed(clean, weights, router_order=None) == []


def test_sums_off_the_one_that_all_others_have(clean: list[Ids]) -> None:
    weights = [normalised(w, 2.5) for w in routers(clean)]
    weights[5][40:60] /= 3
    [found] = weighed(clean, weights)
    assert (found.severity, found.finding) == ("warning", "weight-sums")
    assert found.where == "request 'r5'"
    assert found.evidence.startswith("120 of 17,280 sets looked at have weights that do not sum to about 2.5")


def test_weights_that_a_reader_refuses_are_named(clean: list[Ids], tmp_path: Path) -> None:
    weights = routers(clean[:1])[0]
    weights[9, 1, 2] = np.inf
    np.savez(tmp_path / "t.npz", routed_experts=clean[0], router_weights=weights, num_experts=N, prompt_len=3)
    found = tk.check(tmp_path / "t.npz", axes="tlk")
    assert found["finding"].to_list() == ["invalid-weights"]


# --- options that contradict each other -------------------------------------------------------------------------------


def test_options_that_contradict_each_other_are_a_usage_error(
    clean: list[Ids], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the source says: nobody could say which of the two is meant. Nothing is read, nothing is stored."""
    source = save(tmp_path / "trace.npz", clean)
    config = {"model_type": "olmoe", "num_hidden_layers": LAYERS, "num_experts": 64, "num_experts_per_tok": K}
    (tmp_path / "model.json").write_text(json.dumps(config))
    told = ["--config", tmp_path / "model.json", "--num-experts", 32]
    for command in (["check", source], ["ingest", source, "--store", tmp_path / "S"]):
        code, out, err = run(capsys, *command, *READ, *told)
        assert (code, out) == (2, "")
        assert "--num-experts 32, but --config" in err
        assert "says 64" in err
    assert not (tmp_path / "S").exists()
    with pytest.raises(UsageError, match="Leave out --num-experts"):
        tk.check(source, config=tmp_path / "model.json", num_experts=32)
    # The source is at fault, or the option: a contradiction with what a file says stays one of the data.
    found = tk.check(source, config=tmp_path / "model.json", axes="tlk", phase="decode")
    assert found["finding"].to_list() == ["contradiction"]
    assert run(capsys, "check", source, *READ, "--config", tmp_path / "model.json")[0] == 3
