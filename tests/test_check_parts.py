"""The check in parts: halves that are merged, requests that are appended, a store that was put together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_check import Ids, dummy, meta, names, routed, save, take_turns

import tracekit as tk
from tracekit.checks import Checker, Finding, findings_of_parts, sample
from tracekit.schema import Request, VerifySteps
from tracekit.store import recheck, writer

ARRAYS = {"axes": "tlk", "phase": "decode"}


@pytest.fixture(scope="module")
def clean() -> list[Ids]:
    return routed()


def checker(requests: Sequence[Request], **more: Any) -> Checker:
    made = Checker(meta(**more))
    for request in requests:
        made.add(request)
    return made


@lru_cache
def _arrays(seed: int) -> list[Ids]:
    return routed(10, 120, seed=seed)


def faulty_requests(seed: int) -> list[Request]:
    """Requests with one fault or another each, so that many findings have a share to get right."""
    rng = np.random.default_rng(seed)
    arrays = _arrays(seed % 3)
    made = []
    for i, plain in enumerate(arrays):
        ids, weights = plain.copy(), np.sort(rng.random(plain.shape), axis=2)[..., ::-1].astype(np.float32)
        positions, steps = None, None
        match int(rng.integers(9)):
            case 0:
                ids = np.concatenate([dummy(60), ids])
            case 1:
                ids = np.concatenate([ids, np.repeat(ids[-1:], 30, axis=0)])
            case 2:
                ids = arrays[int(rng.integers(len(arrays)))].copy()
            case 3:
                ids[40:] = ids[40 + np.arange(80) % 7]
            case 4:
                ids = np.sort(ids, axis=2)
            case 5:
                ids[20:40] = np.arange(4)
            case 6:
                positions = np.r_[0:50, 70:140].astype(np.int64)
            case 7:
                weights[30:60] = 0
            case 8:
                at = np.arange(40, 100, 3)
                rows = (at[:, None] + np.arange(2)).reshape(-1)
                steps = VerifySteps(at, np.full(20, 2), np.full(20, 1), arrays[0][rows])
        weights = np.resize(weights, ids.shape)
        first = 0 if positions is not None else int(rng.integers(3)) * 20
        made.append(
            Request(f"r{i}", ids, first, 40, 40, positions=positions, weights=weights, steps=steps),
        )
    return made


@given(
    seed=st.integers(0, 200),
    cuts=st.lists(st.integers(0, 10), max_size=3),
    rows=st.sampled_from([100, 500, 100_000]),
)
def test_merged_parts_find_what_one_pass_finds(seed: int, cuts: list[int], rows: int) -> None:
    """Also where the sample, of ``rows`` at most, holds a part of the trace only."""
    requests = faulty_requests(seed)
    edges = [0, *sorted(cuts), len(requests)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "MOST_ROWS", rows)
        whole = checker(requests, router_order=True)
        first, *others = [checker(requests[low:high], router_order=True) for low, high in itertools.pairwise(edges)]
        for other in others:
            first.merge(other)
    assert [s.request_id for s in first.sample.stretches] == [s.request_id for s in whole.sample.stretches]
    assert np.array_equal(first.sample.ids(), whole.sample.ids())
    assert first.findings() == whole.findings()
    assert first.requests == whole.requests == len(requests)


def test_the_faulty_requests_have_faults() -> None:
    found = {f.finding for seed in range(12) for f in checker(faulty_requests(seed), router_order=True).findings()}
    assert found >= {
        *("warm-up", "filler-rows", "identical-requests", "loops", "sorted-ids", "missing-rows", "prompt-dropped"),
        *("invalid-weights", "verification-steps", "verification-gaps"),
    }


def test_the_sample_is_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_ROWS", 1000)
    arrays = routed(20, 90, seed=3)
    forward, backward = sample.Sample(), sample.Sample()
    numbered = list(enumerate(arrays))
    for made, order in ((forward, numbered), (backward, numbered[::-1])):
        for i, ids in order:
            made.add(f"r{i}", ids, np.zeros(0, np.int64))
    assert 900 < forward.rows <= 1000
    assert [s.request_id for s in backward.stretches] == [s.request_id for s in forward.stretches][::-1]


def test_faults_of_a_part_are_not_hidden_by_the_whole(clean: list[Ids]) -> None:
    sound = [Request(f"a{i}", ids) for i, ids in enumerate(clean)]
    mixed = [Request(f"b{i}", ids) for i, ids in enumerate(take_turns(routed(4, 240, seed=5), 4))]
    assert "interleaved" not in {f.finding for f in checker([*sound, *mixed]).findings()}
    [found] = [f for f in findings_of_parts([checker(sound), checker(mixed)]) if f.finding == "interleaved"]
    assert found.where.startswith("requests 12-12 of 13: all requests: 4 sequences take turns")


# --- appended requests ------------------------------------------------------------------------------------------------


def append(source: Path, store: Path, **more: Any) -> tuple[Finding, ...]:
    return tk.ingest(source, store, name="t", append=store.exists(), **ARRAYS | more).findings


def test_copies_of_stored_requests_are_found(clean: list[Ids], tmp_path: Path) -> None:
    assert append(save(tmp_path / "old.npz", clean[:8]), tmp_path / "S") == ()
    [found] = append(save(tmp_path / "new.npz", [*clean[8:], clean[2], clean[5]]), tmp_path / "S")
    assert (found.severity, found.finding) == ("warning", "identical-requests")
    assert found.where == "request 'new/4' equals 'old/2', and 1 more do"
    assert found.evidence.startswith("2 requests of 14 (14.3 % of the rows)")
    assert tk.check(tmp_path / "S")["evidence"].to_list() == [found.evidence]


def test_shares_are_those_of_all_rows(clean: list[Ids], tmp_path: Path) -> None:
    [old] = append(save(tmp_path / "old.npz", [np.concatenate([dummy(60), clean[0]]), clean[1]]), tmp_path / "S")
    assert (old.severity, "60 rows (11.1 %)" in old.evidence) == ("serious", True)
    more = routed(20, 240, seed=8)
    [both] = append(save(tmp_path / "new.npz", more), tmp_path / "S")
    assert (both.severity, both.finding) == ("warning", "warm-up")  # 60 of 5,340 rows move no headline number
    assert "60 rows (1.12 %)" in both.evidence


def test_a_fault_of_what_is_appended_stays_known(clean: list[Ids], tmp_path: Path) -> None:
    store = tmp_path / "S"
    append(save(tmp_path / "old.npz", clean), store)
    [found] = append(save(tmp_path / "mixed.npz", take_turns(routed(4, 240, seed=5), 4)), store)
    assert (found.severity, found.finding) == ("serious", "interleaved")
    assert found.where.startswith("requests 12-12 of 13: ")
    [still] = append(save(tmp_path / "more.npz", routed(6, 240, seed=6)), store)
    assert still.where.startswith("requests 12-12 of 19: ")
    assert tk.check(store)["where"].to_list() == [still.where]
    assert tk.open(store).trace().findings == (still,)


def test_many_ingests_are_checked_in_a_few_parts(clean: list[Ids], tmp_path: Path) -> None:
    store = tmp_path / "S"
    for i in range(9):
        tk.store.writer.write_trace(store, "t", meta(), [Request(f"r{i}", clean[i][:40])], append=i > 0)
    parts = recheck.checkers(tk.open(store), tk.open(store).trace())
    assert [part.requests for part in parts] == [2, 2, 2, 2, 1]


def test_what_was_said_at_an_ingest_is_kept(clean: list[Ids], tmp_path: Path) -> None:
    shape = meta(engine="vllm", engine_version="0.25.1")
    writer.write_trace(tmp_path / "S", "t", shape, [Request("a", clean[0])])
    newer = replace(shape, engine_version="0.30.0")
    info = writer.write_trace(tmp_path / "S", "t", newer, [Request("b", clean[1])], append=True)
    assert names(info.findings) == {("note", "engine-version")}
    assert tk.check(tmp_path / "S")["where"].to_list() == ["vllm 0.25.1"]


def test_a_stored_trace_gives_its_steps_and_weights_back(
    clean: list[Ids], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 700)  # 240 tokens x 6 layers are 1,440 rows
    rng = np.random.default_rng(0)
    requests = []
    for i, ids in enumerate(clean[:3]):
        at = np.array([100, 102, 105])
        steps = VerifySteps(at, np.array([2, 3, 1]), np.array([1, 2, 0]), clean[5][:6])
        weights = rng.random(ids.shape).astype(np.float32)
        requests.append(
            Request(f"r{i}", ids, prompt_len=99, decode_start=99, weights=weights, steps=None if i == 1 else steps)
        )
    writer.write_trace(tmp_path / "S", "t", meta(), requests)
    store = tk.open(tmp_path / "S")
    for request, again in zip(requests, recheck.requests(store, store.trace()), strict=True):
        assert np.array_equal(again.ids, request.ids)
        assert np.array_equal(again.weights, request.weights)
        assert (again.steps is None) == (request.steps is None)
        if request.steps is not None:
            for name in ("start_pos", "n_rows", "n_accepted", "ids"):
                assert np.array_equal(getattr(again.steps, name), getattr(request.steps, name))
            assert np.array_equal(again.steps.kept_rows, request.steps.kept_rows)
    said = [f.evidence for f in store.trace().findings]
    assert tk.check(store)["evidence"].to_list() == said
    assert names(store.trace().findings) == {("serious", "verification-steps"), ("warning", "verification-gaps")}
