"""The published and independently computed figures, from the traces that others made, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tracekit.cli import main
from tracekit.metrics.load import balance


@pytest.fixture(scope="module")
def store(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, traces = tmp_path_factory.mktemp("published") / "S", shared / "traces"
    gptoss = traces / "gptoss20b_subset64"
    about = ["--requests", gptoss / "requests.json", "--label-fields", "dataset", "--num-experts", "32"]
    sources: list[list[Any]] = [
        [gptoss / "trace.npz", *about, "--phase", "decode", "--name", "gptoss"],
        [traces / "gemma4_26b_route_trace" / "gemma.route.csv", "--name", "gemma"],
        [traces / "glm45air_decode" / "trace.npz", "--num-experts", "128", "--phase", "decode", "--name", "glm"],
    ]
    for source in sources:
        assert main(["ingest", *map(str, source), "--store", str(root), "--quiet"]) == 0
    return root


def table(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--format", "json", "--quiet"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_gptoss_ladder(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = [r for r in table(capsys, "windows", store, "--trace", "gptoss") if r["window"] == 4]
    expected = {
        "expected_uniform": 13.2422,
        "expected_popularity": 12.1333,
        "expected_label": 11.7213,
        "expected_request": 10.3467,
        "observed": 9.3028,
        "reduction_uniform": 0.2975,
        "reduction_popularity": 0.2333,
        "reduction_request": 0.1009,
    }
    assert {name: round(row[name], 4) for name in expected} == expected
    assert (round(row["reduction_uniform_lo"], 3), round(row["reduction_uniform_hi"], 3)) == (0.290, 0.305)


def test_gptoss_overlaps(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {r["lag"]: r for r in table(capsys, "autocorr", store, "--trace", "gptoss")}
    found = [round(rows[d]["overlap"], 4) for d in (1, 2, 3, 4, 8, 16, 32)]
    assert found == [0.4402, 0.3838, 0.3772, 0.3709, 0.3580, 0.3443, 0.3377]
    baselines = [round(rows[1][f"expected_{name}"], 4) for name in ("uniform", "popularity", "request")]
    assert baselines == [0.1250, 0.1869, 0.3201]


def test_gptoss_batches(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "windows", store, "--trace", "gptoss", "--batch-size", "1,2,4,8,16,32,64")
    at_four = [r for r in rows if r["window"] == 4]
    assert [round(100 * r["reduction_uniform"], 1) for r in at_four] == [29.7, 29.7, 27.0, 20.1, 11.9, 6.3, 3.0]
    observed = [9.3028, 14.7748, 20.5959, 25.2105, 28.1778, 29.9856, 31.0305]
    assert [round(r["observed"], 4) for r in at_four] == observed


def test_gptoss_attribution(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, "attribution", store, "--trace", "gptoss")
    assert [(r["cause"], round(100 * r["share"], 1)) for r in rows] == [
        ("popularity", 28.1),
        ("label", 10.5),
        ("request", 34.9),
        ("token_order", 26.5),
    ]


def test_a_label_that_holds_one_request_is_not_resolved(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gptoss = shared / "traces" / "gptoss20b_subset64"
    options = ["--requests", gptoss / "requests.json", "--label-fields", "dataset,category", "--num-experts", "32"]
    arguments = [gptoss / "trace.npz", *options, "--phase", "decode", "--store", tmp_path / "S", "--quiet"]
    assert main(["ingest", *map(str, arguments)]) == 0
    [window] = [r for r in table(capsys, "windows", tmp_path / "S") if r["window"] == 4]
    assert round(window["expected_label"], 4) == 10.3249
    rows = {r["cause"]: r for r in table(capsys, "attribution", tmp_path / "S")}
    assert (rows["label"]["drop"], rows["label"]["share"], rows["label"]["resolved"]) == (0, None, False)
    assert rows["request"]["unique_before"] == rows["popularity"]["unique_after"]


def test_gemma(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [window] = [r for r in table(capsys, "windows", store, "--trace", "gemma") if r["window"] == 4]
    assert round(window["observed"], 2) == 15.70
    assert round(window["expected_uniform"], 2) == 22.36
    assert round(100 * window["reduction_uniform"], 1) == 29.8
    assert window["observed_lo"] is None
    assert round(table(capsys, "autocorr", store, "--trace", "gemma")[0]["overlap"], 4) == 0.3571


def test_glm(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [window] = [r for r in table(capsys, "windows", store, "--trace", "glm") if r["window"] == 4]
    assert round(window["observed"], 4) == 21.2793
    assert round(window["expected_uniform"], 3) == 29.123
    first = table(capsys, "autocorr", store, "--trace", "glm")[0]
    assert round(first["overlap"], 4) == 0.3774
    assert first["rank0_repeat"] is None


def test_olmoe_load(shared: Path) -> None:
    """OLMoE's published counts on C4: layers 0, 7 and 15."""
    data = json.loads((shared / "traces" / "olmoe_counts" / "counts.json").read_text())
    measured = balance(np.array(data["olmoe/c4"]), 8)
    expected = {
        "max_over_mean": [3.017, 2.658, 2.499],
        "cv": [0.324, 0.402, 0.512],
        "gini": [0.137, 0.212, 0.288],
    }
    for name, values in expected.items():
        assert np.round(measured[name], 3).tolist() == values
    assert np.round(measured["entropy_norm"], 4).tolist() == [0.9897, 0.9817, 0.9683]
    assert np.round(measured["sum_p2_over_k"], 4).tolist() == [0.1381, 0.1452, 0.1578]
