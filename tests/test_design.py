"""Designs under a law of routing: sizes that are held, what they load and cost, tables, the chart and the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.economics import design as designing
from tracekit.economics.cost import CostModel
from tracekit.economics.design import Design, designs, of_model, reshape
from tracekit.economics.hardware import hardware
from tracekit.economics.law import LayerLaw, RoutingLaw
from tracekit.errors import UnsupportedError, UsageError
from tracekit.reports import charts
from tracekit.reports.rendering import render
from tracekit.reports.tables import render as table
from tracekit.sources.sizes import load_model

LAW = RoutingLaw(32, 4, (LayerLaw(1.1, 0.1, 0.15, 0.35, 0.95, 0.1),), {"trace": "chat", "phase": "decode"})
BASE = Design(32, 4)


# --- designs and their sizes -------------------------------------------------------------------


def test_the_size_of_an_expert_follows_from_what_is_held() -> None:
    [own, *others] = designs(Design(32, 4, 1.0), {"k": (4, 9), "S": (1, 0)}, "active")
    assert own == Design(32, 4, 1.0, 1.0, extrapolated=False)
    assert [(d.top_k, d.shared_experts, d.expert_size) for d in others] == [
        (4, 0, 5 / 4),
        (9, 1, 5 / 10),
        (9, 0, 5 / 9),
    ]
    assert all(d.extrapolated for d in others)
    found = designs(BASE, {"num_experts": (64, 32), "shared_experts": (0, 2)}, "total")
    assert [(d.num_experts, d.shared_experts, d.expert_size) for d in found] == [
        (32, 0, 1),
        (64, 0, 1 / 2),
        (64, 2, 32 / 66),
        (32, 2, 32 / 34),
    ]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "GLM-4.5-Air"])
@pytest.mark.parametrize("hold", ["active", "total"])
def test_a_reshaped_model_holds_its_parameters(name: str, hold: Any) -> None:
    model = load_model(name)
    config = model.config
    law = RoutingLaw(config.num_experts, config.top_k, (LayerLaw(),))
    reference = of_model(model, law)
    assert reference.shared_experts == (1 if name.startswith("GLM") else 0)

    def layer(of: Any, experts: int) -> float:
        known = {part.name: part for part in of.parts}
        weights = {part: sum(r * c for r, c in known[part].matrices) for part in ("expert", "shared")}
        return float(experts * weights["expert"] + weights["shared"] * bool(known["shared"].copies))

    for design in designs(reference, {"N": (64, 512), "k": (2, 16), "S": (0, 1, 3)}, hold)[1:]:
        other = reshape(model, design)
        before, after = (config.top_k, design.top_k) if hold == "active" else (config.num_experts, design.num_experts)
        assert layer(other, after) == pytest.approx(layer(model, before), rel=0.01)  # widths are whole numbers
        assert other.config.top_k == design.top_k
        known, theirs = ({part.name: part for part in m.parts} for m in (model, other))
        assert theirs["expert"].copies == model.moe_layers * design.num_experts
        assert theirs["router"].matrices == ((design.num_experts, model.hidden_size),)
        assert all(theirs[part] == known[part] for part in ("attention", "embeddings", "norms", "dense"))
    assert reshape(model, reference) == model


@pytest.mark.parametrize(
    ("vary", "hold", "message"),
    [
        ({"k": (64,)}, "active", "the design N = 32, k = 64"),
        ({"N": (70_000,)}, "active", "N = 70000"),
        ({"S": (-1,)}, "active", "S = -1"),
        ({"T": (4,)}, "active", "'T' to vary"),
        ({"k": ()}, "active", "nothing to vary"),
        ({"k": range(1, 30), "N": range(30, 60)}, "active", "more than 256 designs"),
        ({"k": (2,)}, "memory", "hold 'memory'"),
    ],
)
def test_impossible_designs(vary: Any, hold: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        designs(BASE, vary, hold)


# --- what they load and cost -------------------------------------------------------------------


def test_without_a_model_time_is_amdahls() -> None:
    """f1 = .30 at B = 4 with gpt-oss-20b's unions, 20.5959 and 12.1333: V = 1.394."""
    found = designing._linear(BASE, BASE, 0.3, np.array([20.5959]), np.array([12.1333]))
    assert found["verification_ratio"] == pytest.approx(1.394, abs=5e-4)
    # An expert of half the size in the place of one, and a shared one of the same size beside it.
    other = Design(32, 4, 1.0, 0.5, extrapolated=True)
    found = designing._linear(other, BASE, 0.4, np.array([8.0]), np.array([4.0]))
    assert found["verification_ratio"] == pytest.approx((0.6 + 0.05 + 0.4) / (0.6 + 0.05 + 0.2))
    assert found["routed_share"] == pytest.approx(0.2 / 0.85)


def test_rows_of_designs() -> None:
    frame = tk.design(LAW, vary={"k": (2, 8), "S": (0, 1)}, routed_share=0.4, acceptance_rate=0.6, draft_cost=0.05)
    assert frame.height == 5 * 9
    own = frame.filter(~pl.col("extrapolated"))
    assert own["design"].unique().to_list() == ["N = 32, k = 4"]
    assert own["unique"].to_list() == pytest.approx(LAW.unique(4, own["batch_size"].to_numpy()).tolist())
    assert own["unique_single"][0] == pytest.approx(4)
    ratio = frame["unique"] / frame["unique_single"]
    assert frame["union_ratio"].to_list() == pytest.approx(ratio.to_list())
    assert frame["acceptance_length"][0] == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    assert frame["draft_cost"][0] == pytest.approx(0.15)
    speedup = frame["acceptance_length"] / (frame["verification_ratio"] + 0.15)
    assert frame["speedup"].to_list() == pytest.approx(speedup.to_list())
    assert frame.select("trace", "phase", "hold").unique().rows() == [("chat", "decode", "active")]
    assert frame["total_parameters"].null_count() == frame["regime"].null_count() == frame.height


def test_sparser_designs_load_relatively_more_and_shared_experts_make_that_matter_less() -> None:
    vary = {"k": (2, 8), "S": (0, 1)}
    frame = tk.design(LAW, vary=vary, routed_share=0.4, batch_size=8).sort("top_k", "shared_experts")
    by = {(row["top_k"], row["shared_experts"]): row for row in frame.rows(named=True)}
    assert by[2, 0]["union_ratio"] > by[4, 0]["union_ratio"] > by[8, 0]["union_ratio"]
    assert by[2, 0]["union_ratio"] == by[2, 1]["union_ratio"]
    for k in (2, 8):
        assert by[k, 1]["verification_ratio"] < by[k, 0]["verification_ratio"]


def test_with_a_model_time_is_the_cost_models() -> None:
    frame = tk.design(LAW, vary={"N": (32, 128)}, hold="total", model="gpt-oss-20b", batch_size=(1, 8, 512))
    model = load_model("gpt-oss-20b")
    own = frame.filter(~pl.col("extrapolated"))
    cost = CostModel(model, hardware("h100"))
    B = np.array([1, 8, 512])
    expected = cost.seconds(B, 4, LAW.unique(4, B)) / cost.seconds(B, 1, LAW.unique(1, B))
    assert own["verification_ratio"].to_list() == pytest.approx(expected.tolist())
    assert own["total_parameters"][0] == model.total_parameters
    assert own["best_batch_size"][0] == B[np.argmin(expected)]
    wider = frame.filter(pl.col("extrapolated"))
    assert wider["total_parameters"][0] == pytest.approx(model.total_parameters, rel=0.01)
    assert wider["active_parameters"][0] < own["active_parameters"][0]
    assert wider["union_ratio"][0] > own["union_ratio"][0]


def test_without_time_there_are_unions_only() -> None:
    frame = tk.design(LAW, vary={"N": (64,)}, batch_size=(1, 4), acceptance_length=2.7)
    for name in ("verification_ratio", "speedup", "routed_share", "best_batch_size"):
        assert frame[name].null_count() == frame.height
    assert frame["union_ratio"].null_count() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt-oss-20b", "routed_share": 0.3}, "a model and a routed share"),
        ({"acceptance_rate": 0.3, "acceptance_length": 2.0}, "an acceptance length and an acceptance rate"),
        ({"acceptance_length": 4.5}, "1 to 4 tokens"),
        ({"acceptance_rate": 1.5}, "0 to 1"),
        ({"routed_share": 1.5}, "a share of 1.5"),
        ({"draft_cost": float("nan")}, "a draft cost of nan"),
        ({"drafts": 0}, "0 drafts"),
        ({"batch_size": ()}, "batch sizes"),
        ({"batch_size": 0}, "batch sizes"),
        ({"model": "Mixtral-8x7B"}, "has 8 experts and the law 32"),
    ],
)
def test_contradictions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tk.design(LAW, vary={"k": (2,)}, **arguments)


# --- tables, the chart and the verb ------------------------------------------------------------


def test_the_table_says_where_it_extrapolates() -> None:
    frame = tk.design(LAW, vary={"k": (2,), "S": (1,)}, model="gpt-oss-20b", acceptance_length=2.73)
    text = table(frame, layout="design")
    assert isinstance(text, str)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("extrapolated" in line for line in lines) == 1
    assert sum(line.startswith("N = 32, k = 2, S = 1") for line in lines) == 4
    assert "no such model was trained" in text


def test_the_chart_tells_what_is_extrapolated(tmp_path: Path) -> None:
    frame = tk.design(LAW, vary={"k": (2, 8)}, model="gpt-oss-20b")
    spec = json.loads(charts.design(frame).to_json())
    [rows] = spec["datasets"].values()
    assert {row["kind"] for row in rows} == {"the trace's own", "extrapolated"}
    assert {row["panel"].split()[0] for row in rows} == {"experts", "time"}
    best = {(row["design"], row["x"]) for row in rows if row["best"]}
    assert best == set(frame.select("design", "best_batch_size").unique().rows())
    assert any("no such model was trained" in line for line in spec["title"]["subtitle"])
    assert render(charts.design(frame), tmp_path / "d.svg").read_text().startswith("<svg")


def test_a_hostile_name_is_data_in_the_chart() -> None:
    law = RoutingLaw(32, 4, LAW.layers, {"trace": "</script>datum.x" + "y" * 90})
    spec = json.loads(charts.design(tk.design(law, vary={"k": (2,)})).to_json())
    assert spec["title"]["subtitle"][0].startswith("</script>datum.x")
    assert len(spec["title"]["subtitle"][0]) < 130


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UsageError, match="17 designs"):
        charts.design(tk.design(LAW, vary={"k": range(1, 18)}, batch_size=1))
    frame = tk.design(LAW, vary={"k": (2,)})
    with pytest.raises(UsageError, match="designs of 2 traces"):
        charts.design(pl.concat([frame.with_columns(trace=pl.lit(name)) for name in "ab"]))
    with pytest.raises(UsageError, match=r"the frame of tk\.design"):
        charts.design(pl.DataFrame({"trace": ["a"], "phase": ["decode"]}))
    with pytest.raises(UnsupportedError, match="no rows"):
        charts.design(tk.design(LAW, vary={"k": (2,)}).clear())


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = tmp_path / "law.json"
    law.write_text(LAW.to_json())
    chart = tmp_path / "d.json"
    call = ["design", str(law), "--vary", "k=2,8", "--vary", "S=0,1", "--routed-share", ".4", "--chart", str(chart)]
    assert main([*call, "--format", "csv", "--quiet"]) == 0
    frame = pl.read_csv(capsys.readouterr().out.encode())
    assert frame.height == 45
    assert frame["extrapolated"].sum() == 36
    assert "title" in json.loads(chart.read_text())
    assert main(call) == 2
    assert "will not overwrite" in capsys.readouterr().err
    for wrong, message in (
        (["--vary", "T=2"], "N, k, S"),
        (["--vary", "S=x"], "from 0 on"),
        (["--vary", "k=0"], "not at least 1"),
        (["--vary", "k=2", "--vary", "k=8"], "twice"),
        (["--vary", "k=2", "--model", "gpt-oss-20b", "--hardware", "abacus"], "abacus"),
    ):
        assert main(["design", str(law), *wrong]) == 2
        assert message in capsys.readouterr().err
    law.write_text("{}")
    assert main(["design", str(law), "--vary", "k=2"]) == 1
    assert "is not a law of routing" in capsys.readouterr().err
    assert main(["design", str(tmp_path / "nowhere"), "--vary", "k=2"]) == 1
