"""Synthetic traces: well-formed, reproducible, and true to the answers they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import UsageError
from tracekit.synthetic import KINDS, SynthTrace, synth

N, K = 32, 4


def hits(trace: SynthTrace) -> list[np.ndarray[Any, Any]]:
    """Decode tokens of each request as ``[tokens, layers, N]`` booleans."""
    n = trace.meta.num_experts
    return [(r.ids[trace.prompt :, ..., None] == np.arange(n)).any(axis=2) for r in trace.requests()]


def unique(hot: list[np.ndarray[Any, Any]], window: int) -> float:
    union = counts = 0
    for h in hot:
        starts = len(h) - window + 1
        if starts > 0:
            union += int(np.logical_or.reduce([h[i : i + starts] for i in range(window)]).sum())
            counts += starts
    return union / counts / hot[0].shape[1]


def overlap(hot: list[np.ndarray[Any, Any]], lag: int) -> float:
    both = sum(int((h[lag:] & h[:-lag]).sum()) for h in hot if len(h) > lag)
    pairs = sum(max(0, len(h) - lag) for h in hot)
    return both / pairs / hot[0].shape[1] / float(hot[0][0, 0].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_measured_equals_the_truth(kind: str) -> None:
    trace = synth(kind, num_experts=N, top_k=K, layers=4, requests=60, tokens=(60, 300), prompt=20, seed=7)
    hot = hits(trace)
    truth = trace.truth
    exact = kind in ("repeat", "cycle")
    for window in (1, 2, 4, 8):
        assert unique(hot, window) == pytest.approx(truth["unique"][window], rel=1e-12 if exact else 0.012)
    for lag in (1, 2, 8, 32):
        assert overlap(hot, lag) == pytest.approx(truth["overlap"][lag], abs=1e-12 if exact else 0.008)


def test_closed_forms() -> None:
    uniform = synth("uniform", num_experts=N, top_k=K).truth
    assert uniform["unique"][4] == pytest.approx(13.2421875)
    assert uniform["overlap"] == dict.fromkeys(range(1, 33), K / N)
    assert synth("repeat").truth["unique"] == dict.fromkeys(range(1, 9), 8.0)
    cycle = synth("cycle", num_experts=14, top_k=4).truth  # 3 disjoint sets, 2 experts unused
    assert [cycle["unique"][t] for t in (1, 2, 3, 4)] == [4, 8, 12, 12]
    assert [d for d, share in cycle["overlap"].items() if share] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    sticky = synth("sticky", num_experts=N, top_k=K, stay=0.5).truth
    assert sticky["overlap"][2] == pytest.approx(0.25 + 0.75 / 8)
    assert sticky["unique"][2] == pytest.approx(K * (2 - sticky["overlap"][1]))


def test_popularity_is_exact_not_estimated() -> None:
    trace = synth("skewed", num_experts=N, top_k=K, layers=2, requests=40, tokens=500, seed=3)
    used = np.concatenate(hits(trace)).mean(axis=0)
    assert used.sum(axis=1) == pytest.approx([K, K])
    lag = trace.truth["overlap"][1]
    assert (used**2).sum(axis=1).mean() / K == pytest.approx(lag, abs=0.002)
    assert trace.truth["popularity"] == pytest.approx(trace.truth["unique"])


def test_a_topical_trace_has_all_four_causes() -> None:
    truth = synth("topical", num_experts=N, top_k=K, layers=4, requests=40, tokens=200, seed=1).truth
    ladder = [N * (1 - (1 - K / N) ** 4)] + [truth[r][4] for r in ("popularity", "label", "request", "unique")]
    drops = -np.diff(ladder)
    assert (drops / drops.sum() > 0.05).all()


@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 5),
    spare=st.integers(0, 300),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**63),
)
def test_every_trace_is_well_formed(kind: str, k: int, spare: int, layers: int, seed: int) -> None:
    trace = synth(kind, num_experts=k + spare, top_k=k, layers=layers, requests=2, tokens=(3, 9), prompt=1, seed=seed)
    for request, length in zip(trace.requests(), trace.lengths, strict=True):
        ids = request.ids
        assert ids.shape == (length, layers, k)
        assert ids.dtype == (np.uint8 if k + spare <= 256 else np.uint16)
        assert ids.max() < k + spare
        assert (np.diff(np.sort(ids, axis=-1)) > 0).all()
        assert request.decode_start == request.prompt_len == 1


@pytest.mark.parametrize("kind", ["uniform", "sticky", "topical"])
def test_rank_0_is_a_uniform_member(kind: str) -> None:
    trace = synth(kind, num_experts=8, top_k=4, layers=1, requests=20, tokens=500)
    ids = np.concatenate([r.ids[:, 0] for r in trace.requests()])
    for expert in range(8):
        rank = np.nonzero(ids == expert)[1]
        assert np.bincount(rank, minlength=4) / len(rank) == pytest.approx([0.25] * 4, abs=0.05)


def test_same_seed_same_bytes_other_seed_other_trace(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"requests": 3, "tokens": (5, 20), "layers": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth("topical", **shape, seed=seed).save(tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_requests_can_be_drawn_again() -> None:
    trace = synth("sticky", requests=3, tokens=10)
    for first, second in zip(trace.requests(), trace.requests(), strict=True):
        assert np.array_equal(first.ids, second.ids)


def test_saved_files_hold_what_was_drawn(tmp_path: Path) -> None:
    trace = synth("topical", num_experts=300, top_k=3, requests=5, tokens=(4, 9), prompt=2)
    sidecar = trace.save(tmp_path / "deep" / "t.npz")
    files = trace.save_npy(tmp_path / "npy")
    with np.load(tmp_path / "deep" / "t.npz") as archive:
        assert int(archive["num_experts"]) == 300
        parts = np.split(archive["expert_ids"], np.cumsum(archive["request_lens"])[:-1])
    rows = json.loads(sidecar.read_text(encoding="utf-8"))
    assert sidecar.name == "t.requests.json"
    assert files == sorted(files)
    for request, part, path, row in zip(trace.requests(), parts, files, rows, strict=True):
        assert np.array_equal(request.ids, part)
        assert np.array_equal(request.ids, np.load(path))
        assert row == {"request_id": request.request_id, "prompt_len": 2, "label": request.label}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "zipf"}, "one of uniform"),
        ({"top_k": 9}, "top_k=9"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 70_000}, "num_experts=70000"),
        ({"layers": 0}, "layers=0"),
        ({"requests": 0}, "requests=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": (9, 3)}, "smaller first"),
        ({"prompt": 16}, "prompt=16"),
        ({"seed": -1}, "seed=-1"),
        ({"stay": 0.5}, "uniform takes none"),
        ({"kind": "sticky", "skew": 1.0}, "sticky takes stay"),
        ({"kind": "sticky", "stay": 1.0}, "below 1"),
        ({"kind": "topical", "labels": 1.5}, "whole number"),
        ({"kind": "skewed", "skew": float("nan")}, "0 to 10"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"kind": "uniform", "num_experts": 8, "top_k": 2, "tokens": 16, **change}
    with pytest.raises(UsageError, match=message):
        synth(arguments.pop("kind"), **arguments)


def test_save_wants_npz(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npz"):
        synth("uniform").save(tmp_path / "trace.npy")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_ingested_as_it_is_written(kind: str, tmp_path: Path) -> None:
    trace = synth(kind, requests=6, tokens=64)
    trace.save(tmp_path / "t.npz")
    info = tk.ingest(tmp_path / "t.npz", tmp_path / "store", requests=tmp_path / "t.requests.json")
    assert info.requests == 6
    assert "argsort-view" not in {finding.finding for finding in info.findings}
