"""The committed sample traces: remade byte for byte, free of text, and measured as their READMEs say."""

from __future__ import annotations

import base64
import io
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from polars.testing import assert_frame_equal

FOLDERS = ("hand", "synthetic", "olmoe-vllm", "olmoe-sglang", "olmoe-steps", "olmoe-predicted", "olmoe-weights")


@pytest.fixture(scope="module")
def samples(checkout: Path) -> Path:
    return checkout / "sample_traces"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def made(samples: Path, out: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error", str(samples / "make.py"), "--out", str(out), *arguments],
        check=True,
        capture_output=True,
        cwd=samples.parent,
        env={"PYTHONPATH": str(samples.parent)},
    )


def same(samples: Path, out: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        committed = {n: b for n, b in files(samples / folder).items() if n != "README.md"}
        again = files(out / folder)
        for name in [name for name in again if name.endswith(".parquet")]:  # whose bytes depend on the Polars' version
            assert_frame_equal(pl.read_parquet(io.BytesIO(again.pop(name))), pl.read_parquet(committed.pop(name)))
        assert again == committed, f"{folder} is not what make.py writes"


def test_hand_and_synthetic_are_what_make_writes(samples: Path, tmp_path: Path) -> None:
    made(samples, tmp_path)
    same(samples, tmp_path, ("hand", "synthetic"))


def test_captured_are_what_make_writes(samples: Path, shared: Path, tmp_path: Path) -> None:
    made(samples, tmp_path, "--captures", str(shared / "moe"))
    same(samples, tmp_path, FOLDERS)


def test_every_folder_explains_itself(samples: Path) -> None:
    assert sorted(p.name for p in samples.iterdir() if p.is_dir() and not p.name.startswith("__")) == sorted(FOLDERS)
    for folder in FOLDERS:
        text = (samples / folder / "README.md").read_text(encoding="utf-8")
        assert "Apache-2.0" in text
        assert "tracekit ingest" in text
    assert sum(len(b) for b in files(samples).values()) < 3_000_000


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {k for v in value.values() for k in keys(v)}
    if isinstance(value, list):
        return {k for v in value for k in keys(v)}
    return set()


@pytest.mark.parametrize("folder", ["olmoe-vllm", "olmoe-sglang"])
def test_captured_responses_hold_no_text(samples: Path, folder: str) -> None:
    lines = [json.loads(line) for line in (samples / folder / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 28
    assert not keys(lines) & {"text", "prompt", "token_ids", "prompt_token_ids", "output_ids", "input_ids", "logprobs"}


def test_captured_arrays_hold_no_text(samples: Path) -> None:
    steps = pl.read_parquet_schema(samples / "olmoe-steps" / "steps.parquet")
    assert set(steps) == {"request_id", "domain", "prompt_len", "start_pos", "n_drafted", "n_accepted", "experts"}
    with np.load(samples / "olmoe-predicted" / "trace.npz") as archive:
        assert set(archive) == {"expert_ids", "request_lens", "predicted1", "predicted2"}
    with np.load(samples / "olmoe-weights" / "trace.npz") as archive:
        assert set(archive) == {"expert_ids", "request_lens", "router_weights"}
    for folder in ("olmoe-steps", "olmoe-predicted", "olmoe-weights"):
        assert sum(len(b) for b in files(samples / folder).values()) < 400_000


def test_steps_are_as_their_readme_says(samples: Path) -> None:
    text = (samples / "olmoe-steps" / "README.md").read_text(encoding="utf-8")
    frame = pl.read_parquet(samples / "olmoe-steps" / "steps.parquet")
    assert f"{frame.height:,} verification steps" in text
    assert frame["n_drafted"].unique().to_list() == [3]
    ids = np.stack([np.frombuffer(row, np.uint8).reshape(4, 8, 4) for row in frame["experts"]])
    hot = (ids[..., None] == np.arange(32)).any(axis=3)
    accepted = frame["n_accepted"].to_numpy()
    kept = (np.arange(4) <= accepted[:, None])[:, :, None, None]
    for value in (1 + accepted.mean(), hot.any(axis=1).sum(axis=-1).mean(), (hot & kept).any(axis=1).sum(-1).mean()):
        assert f"| {value:.4f} |" in text
    shares = np.bincount(accepted) / len(accepted)
    assert " ".join(f"{share:.4f}"[1:] for share in shares) in text


def test_predictions_are_as_their_readme_says(samples: Path) -> None:
    text = (samples / "olmoe-predicted" / "README.md").read_text(encoding="utf-8")
    with np.load(samples / "olmoe-predicted" / "trace.npz") as archive:
        arrays = dict(archive)
    assert f"| {arrays['request_lens'].sum():,} |" in text
    assert len(arrays["expert_ids"]) == arrays["request_lens"].sum()
    hot = (arrays["expert_ids"][..., None] == np.arange(32)).any(axis=2)
    for distance in (1, 2):
        ids = arrays[f"predicted{distance}"]
        known = (ids != 255).all(axis=2)
        assert known.all(axis=0).tolist() == [layer >= distance for layer in range(8)]
        recall = (hot & (ids[..., None] == np.arange(32)).any(axis=2)).sum(axis=-1)[known].mean() / 4
        assert f"| {recall:.4f} |".replace("0.", ".") in text


def test_weights_are_as_their_readme_says(samples: Path) -> None:
    text = (samples / "olmoe-weights" / "README.md").read_text(encoding="utf-8")
    with np.load(samples / "olmoe-weights" / "trace.npz") as archive:
        arrays = dict(archive)
    with np.load(samples / "olmoe-predicted" / "trace.npz") as archive:
        assert np.array_equal(arrays["expert_ids"], archive["expert_ids"])
    weights = arrays["router_weights"].astype(np.float64)
    assert f"| {len(weights):,} |" in text
    assert (np.diff(weights, axis=2) <= 0).all()  # the router's order
    assert f"| {weights.sum(axis=2).mean():.4f} |".replace("0.", ".") in text
    shares = (weights / weights.sum(axis=2, keepdims=True)).mean(axis=(0, 1))
    assert " ".join(f"{share:.4f}"[1:] for share in shares) in text


def hand(samples: Path) -> list[dict[str, Any]]:
    rows = json.loads((samples / "hand" / "requests.json").read_text(encoding="utf-8"))
    with np.load(samples / "hand" / "trace.npz") as archive:
        assert int(archive["num_experts"]) == 6
        parts = np.split(archive["expert_ids"], np.cumsum(archive["request_lens"])[:-1])
    return [
        {"request_id": r["request_id"], "label": r["label"], "decode_start": r["prompt_len"], "ids": ids}
        for r, ids in zip(rows, parts, strict=True)
    ]


def test_hand_numbers_are_those_of_its_readme(samples: Path) -> None:
    text = (samples / "hand" / "README.md").read_text(encoding="utf-8")
    trace = hand(samples)
    for window in (2, 3):
        row = oracle.window_row(trace, 6, 2, window=window)
        values = [
            row[c] for c in ("observed", *(f"expected_{b}" for b in ("uniform", "popularity", "label", "request")))
        ]
        cells = " | ".join(f"{v.numerator}/{v.denominator} = {float(v):.4f}" for v in values)
        assert f"| {window} | {cells} |" in text
    batch = oracle.window_row(trace, 6, 2, window=2, batch_size=2)
    assert str(batch["observed"]) in text
    assert str(oracle.distinct_requests_unique(trace, 6, window=2, batch_size=2)) in text


def vllm(samples: Path) -> list[dict[str, Any]]:
    out = []
    for line in (samples / "olmoe-vllm" / "responses.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        response = record["response"]
        ids = np.load(io.BytesIO(base64.b64decode(response["choices"][0]["routed_experts"])), allow_pickle=False)
        assert ids.shape == (response["usage"]["total_tokens"] - 1, 8, 4)
        start = response["usage"]["prompt_tokens"]
        out.append({"request_id": response["id"], "label": record["domain"], "decode_start": start, "ids": ids})
    return out


def sglang(samples: Path) -> list[dict[str, Any]]:
    sidecar = json.loads((samples / "olmoe-sglang" / "requests.json").read_text(encoding="utf-8"))
    domain = {row["request_id"]: row["domain"] for row in sidecar}
    out = []
    for line in (samples / "olmoe-sglang" / "responses.jsonl").read_text(encoding="utf-8").splitlines():
        meta = json.loads(line)["meta_info"]
        flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4")
        ids = flat.reshape(meta["prompt_tokens"] + meta["completion_tokens"] - 1, 8, 4)
        start = meta["prompt_tokens"]
        out.append({"request_id": meta["id"], "label": domain[meta["id"]], "decode_start": start, "ids": ids})
    return out


@pytest.mark.parametrize(("folder", "load"), [("olmoe-vllm", vllm), ("olmoe-sglang", sglang)])
def test_captured_numbers_are_those_of_their_readme(samples: Path, folder: str, load: Any) -> None:
    text = (samples / folder / "README.md").read_text(encoding="utf-8")
    trace = load(samples)
    assert len({r["label"] for r in trace}) == 7
    hot = [(r["ids"][r["decode_start"] :, ..., None] == np.arange(32)).any(axis=2) for r in trace]
    assert f"{sum(len(h) for h in hot):,} decode" in text
    union = sum(int((h[:-3] | h[1:-2] | h[2:-1] | h[3:]).sum()) for h in hot) / sum(len(h) - 3 for h in hot) / 8
    assert f"{union:.4f}" in text
    for lag in (1, 2, 8):
        pairs = sum(len(h) - lag for h in hot)
        overlap = sum(int((h[lag:] & h[:-lag]).sum()) for h in hot) / pairs / 8 / 4
        assert f"{overlap:.4f}"[1:] in text


def test_make_has_the_hand_trace_of_the_oracle_test(samples: Path) -> None:
    import test_oracle

    namespace = runpy.run_path(str(samples / "make.py"))
    assert namespace["HAND"] == {r["request_id"]: r["ids"] for r in test_oracle.hand()}
    assert {r["request_id"]: r["label"] for r in test_oracle.hand()} == namespace["HAND_LABELS"]


def readme_commands(samples: Path) -> list[list[str]]:
    """The ``tracekit ingest`` lines of the READMEs, as arguments."""
    lines = [
        line.strip()
        for folder in FOLDERS
        for line in (samples / folder / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    tracekit ingest ")
    ]
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def store(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sample traces in one store, ingested as their READMEs say."""
    from tracekit.cli import main

    path = tmp_path_factory.mktemp("samples") / "S"
    folder = samples / "synthetic"
    more = [
        [
            "ingest",
            f"{folder / kind}.npz",
            "--requests",
            f"{folder / kind}.requests.json",
            "--store",
            "S",
            "--name",
            kind,
        ]
        for kind in ("uniform", "skewed", "sticky")
    ]
    for command in [*readme_commands(samples), *more]:
        arguments = [
            str(path) if a == "S" else str(samples.parent / a) if a.startswith("sample_") else a for a in command
        ]
        assert main(arguments) == 0
    return path


@pytest.mark.parametrize(("name", "load"), [("hand", hand), ("olmoe-vllm", vllm), ("olmoe-sglang", sglang)])
def test_ingested_samples_are_what_the_files_hold(samples: Path, store: Path, name: str, load: Any) -> None:
    import tracekit as tk

    opened = tk.open(str(store))
    rows = opened.sql(
        "SELECT request_id, label, decode_start, layer, experts FROM routing JOIN requests USING (trace, request) "
        f"WHERE trace = '{name}' ORDER BY request_id, pos, layer"
    )
    expected = [
        (r["request_id"], r["label"], r["decode_start"], layer, [int(e) for e in experts])
        for r in sorted(load(samples), key=lambda r: r["request_id"])
        for token in r["ids"]
        for layer, experts in enumerate(token)
    ]
    assert rows.rows() == expected


@pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")
@pytest.mark.parametrize("kind", ["uniform", "skewed", "sticky", "topical"])
def test_truth_lies_in_the_measured_interval(samples: Path, store: Path, kind: str) -> None:
    import tracekit as tk

    rows = json.loads((samples / "synthetic" / "truth.json").read_text(encoding="utf-8"))
    truth = {row["quantity"]: row["value"] for row in rows if row["trace"] == kind}
    windows = tk.windows(store, trace=kind, max_window=8).filter(pl.col("window") > 1)
    inside = [
        r["observed_lo"] <= truth["unique"][str(r["window"])] <= r["observed_hi"] for r in windows.iter_rows(named=True)
    ]
    autocorr = tk.autocorr(store, trace=kind, max_lag=32)
    inside += [
        r["overlap_lo"] <= truth["overlap"][str(r["lag"])] <= r["overlap_hi"] for r in autocorr.iter_rows(named=True)
    ]
    assert sum(inside) / len(inside) > 0.85  # 95 % intervals, strongly dependent on each other
