"""Charts: specifications as JSON, never pixels; and what reaches the page from a trace is data."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import TracekitError, TracekitWarning, UnsupportedError, UsageError
from tracekit.reports import charts, drawing, queries
from tracekit.reports.charts import KINDS, render
from tracekit.reports.rendering import SUFFIXES

HOSTILE = "</script><script>alert(1)</script>\n\"'`${datum.x} [a.b] 🦙"
BASELINES = ("uniform", "popularity", "label", "request")


# --- frames with the columns of the metrics ----------------------------------------------------


def windows_frame(trace: str = "chat", *, intervals: bool = True, batch_size: int = 1) -> pl.DataFrame:
    rows = []
    for window in range(1, 9):
        expected = [32 * (1 - (1 - 4 / 32) ** (window * (1 - 0.1 * i))) for i in range(4)]
        observed = 0.9 * expected[-1]
        row: dict[str, Any] = {
            "trace": trace,
            "phase": "decode",
            "batch_size": batch_size,
            "window": window,
            "n_windows": 100 - window,
            "observed": observed,
            "observed_lo": observed - 0.3 if intervals else None,
            "observed_hi": observed + 0.3 if intervals else None,
            "per_top_k": observed / 4,
        }
        row |= {f"expected_{b}": e for b, e in zip(BASELINES, expected, strict=True)}
        for baseline, e in zip(BASELINES, expected, strict=True):
            reduction = 1 - observed / e
            row |= {f"reduction_{baseline}": reduction, f"reduction_{baseline}_bias": 0.0}
            row |= {f"reduction_{baseline}_lo": reduction - 0.02, f"reduction_{baseline}_hi": reduction + 0.02}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def autocorr_frame(trace: str = "chat", layer: int | None = None) -> pl.DataFrame:
    rows = [
        {
            "trace": trace,
            "phase": "decode",
            **({} if layer is None else {"layer": layer}),
            "lag": lag,
            "n_pairs": 100 - lag,
            "overlap": 0.3 + 0.1 / lag,
            "overlap_lo": 0.29 + 0.1 / lag,
            "overlap_hi": 0.31 + 0.1 / lag,
            "expected_uniform": 0.125,
            "expected_popularity": 0.18,
            "expected_request": 0.3,
            "rho": 0.2,
            "rho_request": 0.1,
        }
        for lag in range(1, 33)
    ]
    return pl.DataFrame(rows)


def attribution_frame(trace: str = "chat") -> pl.DataFrame:
    steps = [13.24, 12.13, 12.13, 10.35, 9.30]
    return pl.DataFrame(
        [
            {
                "trace": trace,
                "phase": "decode",
                "window": 4,
                "cause": cause,
                "unique_before": steps[i],
                "unique_after": steps[i + 1],
                "drop": steps[i] - steps[i + 1],
                "share": None if cause == "label" else (steps[i] - steps[i + 1]) / 3.94,
                "share_lo": None if cause == "label" else 0.2,
                "share_hi": None if cause == "label" else 0.5,
                "resolved": cause != "label",
            }
            for i, cause in enumerate(("popularity", "label", "request", "token_order"))
        ]
    )


def popularity_frame(layers: int, experts: int, trace: str = "chat") -> pl.DataFrame:
    share = np.random.default_rng(0).dirichlet(np.ones(experts), layers)
    return pl.DataFrame(
        {
            "trace": trace,
            "phase": "decode",
            "layer": np.repeat(np.arange(layers), experts),
            "expert": np.tile(np.arange(experts), layers),
            "popularity": share.ravel() * 4,
            "relative": share.ravel() * experts,
        }
    )


def mix_frame(trace: str = "chat", labels: int = 3) -> pl.DataFrame:
    names = [f"a label with a long name {i}" for i in range(labels)]
    rows = []
    for size in (1, 2, 4):
        for i, name in enumerate([*names, None]):
            covered = (i + 1) / sum(range(labels + 1)) if name else 1.0 if size < 4 else 0.5
            common = {"trace": trace, "phase": "decode", "window": 4, "batch_size": size, "label": name}
            rows.append(common | {"unique": 9.0, "mixed": 10.0, "extra": i / 10, "covered": covered})
    return pl.DataFrame(rows)


def acceptance_frame(trace: str = "chat") -> pl.DataFrame:
    each = {"accepted": [0, 1, 2, 3], "n_steps": 10, "share": 0.25, "share_lo": 0.2, "share_hi": 0.3}
    each |= {"unique": 12.0, "rejected_unique": [6.0, 4.0, 2.0, 0.0]}
    every = {"drafted": 3.0, "acceptance_length": 2.5, "mean_unique": 12.0}
    return pl.DataFrame(
        {"trace": trace, "phase": "decode", **each, **every, "accepted_only": 11.0, "expected_uniform": 13.2}
    )


def speedup_frame(trace: str = "chat") -> pl.DataFrame:
    rows = [
        {
            "trace": trace,
            "phase": "decode",
            "batch_size": size,
            "drafts": drafts,
            "window": drafts + 1,
            "expert_ratio": 1 + drafts / (2 + size),
            **{name: 1.2 + step for name, step in (("verification_ratio", 0.0), ("verification_ratio_uniform", 0.1))},
            **dict.fromkeys(("speedup", "speedup_uniform"), 1.1 + drafts / size),
        }
        for size in (1, 2, 4, 8)
        for drafts in (1, 3)
    ]
    return pl.DataFrame(rows)


def design_frame(trace: str = "chat") -> pl.DataFrame:
    rows = [
        {"trace": trace, "phase": "decode", "design": f"N = 8, k = {k}", "hold": "active", "extrapolated": k != 3}
        | {"batch_size": size, "window": 4, "best_batch_size": 4, "union_ratio": 2.0 / size, "speedup": 1 + k / size}
        | {"verification_ratio": 2.0 / size}
        for k in (3, 1)
        for size in (1, 4)
    ]
    return pl.DataFrame(rows)


def cache_frame(trace: str = "chat") -> pl.DataFrame:
    parts = {"cold": 0.02, "working_set": 0.2, "policy_excess": 0.1, "misses_per_token": 30.0}
    rows = [
        {"trace": trace, "phase": "decode", "scope": "layer", "start": "cold", "policy": policy, "capacity": capacity}
        | {"hit_rate": 1 - 1 / capacity, "hit_rate_lo": 0.9 - 1 / capacity, "hit_rate_hi": 1.0, **parts}
        for policy in ("lru", "belady", "static")
        for capacity in (4.0, 8.0, 16.0)
    ]
    return pl.DataFrame(rows)


def prefetch_frame(trace: str = "chat") -> pl.DataFrame:
    rows = [
        {"trace": trace, "phase": "decode", "layer": layer, "predictor": name, "distance": distance, "m": 8}
        | {"exact": 0.1, "recall": 0.5 + layer / 10, "recall_lo": 0.4, "recall_hi": 0.9, "precision": 0.5}
        for name, distance in (("previous_token", None), ("transition", 1), ("next_gate", 1), ("next_gate", 2))
        for layer in range(4)
    ]
    return pl.DataFrame(rows, schema_overrides={"distance": pl.Int64})


def budget_frame(trace: str = "chat") -> pl.DataFrame:
    kept = {"weight_kept": [0.5, 0.7, 0.9], "weight_kept_lo": [0.4, 0.6, 0.8], "weight_kept_hi": [0.6, 0.8, 1.0]}
    more = {"tokens_intact": [0.1, 0.3, 0.8], "loaded": [4.0, 6.0, 7.5], "unique": 9.0}
    return pl.DataFrame({"trace": trace, "phase": "decode", "window": 4, "budget": [4, 6, 8], **kept, **more})


def reuse_frame(trace: str = "chat") -> pl.DataFrame:
    at = {"capacity": [3, 4, 5], "share": [0.2, 0.2, 0.1], "hit_rate": [0.2, 0.4, 0.5]}
    ends = {"hit_rate_lo": [0.1, 0.3, 0.4], "hit_rate_hi": [0.3, 0.5, 0.6]}
    return pl.DataFrame({"trace": trace, "phase": "decode", "scope": "layer", "start": "prompt", **at, **ends})


def locality_frame(trace: str = "chat") -> pl.DataFrame:
    rows = [
        {"trace": trace, "phase": "decode", "segment": m, "srp": m / 100, "capacity": 4 * ratio, "cache_ratio": ratio}
        | {"sch": 0.2 * ratio, "sch_lo": 0.1, "sch_hi": 0.9, "fixed_hit_rate": 0.22 * ratio}
        | {"fixed_hit_rate_lo": None, "fixed_hit_rate_hi": None}
        for m in (8, 16, 32)
        for ratio in (1, 2, 4)
    ]
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("fixed_hit_rate_lo", "fixed_hit_rate_hi"), pl.Float64))


def layer_budgets_frame(trace: str = "chat") -> pl.DataFrame:
    rows = [
        {"trace": trace, "phase": "decode", "start": "cold", "unit": "experts", "capacity": size, "layer": layer}
        | {"experts": size + (layer or 0) - 1, "hit_rate": 0.5, "uniform": 0.4}
        for size in (8.0, 12.0)
        for layer in (None, 0, 1, 2)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def draw(kind: str, trace: str = "chat") -> drawing.Chart:
    frames = {
        "windows": windows_frame,
        "batch": windows_frame,
        "batch-mix": mix_frame,
        "autocorr": autocorr_frame,
        "layer-lag": lambda trace: pl.concat([autocorr_frame(trace, layer=i) for i in range(3)]),
        "popularity": lambda trace: popularity_frame(3, 8, trace),
        "attribution": attribution_frame,
        "acceptance": acceptance_frame,
        "speedup": speedup_frame,
        "verification-ratio": speedup_frame,
        "speedup-map": speedup_frame,
        "regime-map": speedup_frame,
        "design": design_frame,
        "budget": budget_frame,
        "reuse": reuse_frame,
        "locality": locality_frame,
        "layer-budgets": layer_budgets_frame,
        "cache": cache_frame,
        "prefetch": prefetch_frame,
    }
    return KINDS[kind].draw(frames[kind](trace))


def spec(chart: drawing.Chart) -> dict[str, Any]:
    return json.loads(chart.to_json())


def data(chart: drawing.Chart) -> list[dict[str, Any]]:
    (rows,) = spec(chart)["datasets"].values()
    return rows


def marks(chart: dict[str, Any]) -> list[str]:
    return [layer["mark"]["type"] for layer in chart.get("layer", [chart])]


def strings(node: Any) -> set[str]:
    """Every string of a specification but those of its data and its titles."""
    if isinstance(node, dict):
        skipped = ("datasets", "title", "subtitle", "sort")
        return set().union(*(strings(v) for k, v in node.items() if k not in skipped), set())
    if isinstance(node, list):
        return set().union(*map(strings, node), set())
    return {node} if isinstance(node, str) else set()


# --- what the charts say -----------------------------------------------------------------------


def test_windows_is_a_ladder_with_names_and_a_band():
    chart = spec(charts.windows(windows_frame()))
    assert marks(chart) == ["area", "line", "point", "rule", "text"]
    said = ["chat · decode tokens", "shaded: 95 % interval"]
    assert chart["title"] == {"text": "Unique experts in a verification window", "subtitle": said}
    points = chart["layer"][2]["encoding"]
    assert points["x"]["title"] == "Window length T (tokens)"
    assert points["y"]["title"] == "Unique experts (mean over layers)"
    assert points["color"]["scale"]["domain"] == [*BASELINES, "observed"]
    titles = [t.get("title") for t in points["tooltip"]]
    assert "in loads of one token" in titles
    assert "95 % interval" in titles
    rows = data(charts.windows(windows_frame()))
    assert len(rows) == 5 * 8
    assert {r["name"]: r["x"] for r in rows if "name" in r} == dict.fromkeys((*BASELINES, "observed"), 8)
    at_8 = next(r for r in rows if r["series"] == "observed" and r["x"] == 8)
    frame = windows_frame().row(7, named=True)
    assert (at_8["y"], at_8["lo"], at_8["hi"]) == (frame["observed"], frame["observed_lo"], frame["observed_hi"])
    assert at_8["per_top_k"] == pytest.approx(frame["per_top_k"])


def test_without_intervals_there_is_no_band():
    chart = charts.windows(windows_frame(intervals=False))
    assert marks(spec(chart)) == ["line", "point", "rule", "text"]
    assert spec(chart)["title"]["subtitle"] == ["chat · decode tokens"]
    assert {r["interval"] for r in data(chart)} == {"none"}


def test_a_name_that_had_to_move_is_led_to_its_line():
    alike = windows_frame().with_columns(expected_popularity=pl.col("expected_uniform") - 0.01)
    named = {r["series"]: r for r in data(charts.windows(alike)) if "name" in r}
    assert named["uniform"]["led"]
    assert named["popularity"]["led"]
    assert named["uniform"]["name_y"] > named["uniform"]["y"]
    assert named["popularity"]["name_y"] < named["popularity"]["y"]
    assert not named["observed"]["led"]
    assert {r["name_x"] > 8 for r in named.values()} == {True}
    # A line that ends earlier than the others is led to the column of names.
    ends = windows_frame().with_columns(expected_request=pl.when(pl.col("window") < 5).then(pl.col("expected_request")))
    named = {r["series"]: r for r in data(charts.windows(ends)) if "name" in r}
    assert named["request"]["x"] == 4
    assert named["request"]["led"]
    assert len({r["name_x"] for r in named.values()}) == 1


def test_a_baseline_that_is_null_is_not_drawn():
    frame = windows_frame().with_columns(expected_label=pl.lit(None, pl.Float64))
    assert {r["series"] for r in data(charts.windows(frame))} == {"uniform", "popularity", "request", "observed"}


def test_batch_is_on_a_log_axis_and_names_what_it_is_against():
    frame = pl.concat([windows_frame(batch_size=b) for b in (1, 2, 4, 8)])
    chart = charts.batch(frame, window=4)
    encoding = spec(chart)["layer"][2]["encoding"]
    assert encoding["x"]["scale"]["type"] == "log"
    assert encoding["x"]["scale"]["base"] == 2
    assert encoding["x"]["axis"]["values"] == [1, 2, 4, 8]
    assert encoding["y"]["axis"]["format"] == "%"
    assert {r["name"] for r in data(chart) if "name" in r} == {f"vs {b}" for b in BASELINES}
    assert "windows of 4 tokens" in spec(chart)["title"]["text"]


def test_batch_sizes_without_room_are_powers_of_two():
    frame = pl.concat([windows_frame(batch_size=b) for b in [*range(1, 33), 64, 128, 256]])
    axis = spec(charts.batch(frame, window=4))["layer"][2]["encoding"]["x"]["axis"]
    assert axis["values"] == [2**i for i in range(9)]
    panels = pl.concat([frame, frame.with_columns(trace=pl.lit("other"))])
    axis = spec(charts.batch(panels, window=4))["spec"]["layer"][2]["encoding"]["x"]["axis"]
    assert axis["values"] == [1, 4, 16, 64, 256]


def test_a_mix_has_a_line_for_each_large_label_and_the_mean():
    found = data(charts.batch_mix(mix_frame()))
    assert {row["series"] for row in found} == {*(f"a label with a long name {i}" for i in range(3)), "mean"}
    # At B = 4 too few windows are left for a mean.
    assert sorted(row["x"] for row in found if row["series"] == "mean") == [1, 2]
    names = [row["name"] for row in found if "name" in row]
    assert len(names) == 4
    assert all(len(name) <= 14 for name in names)
    crowded = charts.batch_mix(mix_frame(labels=12))
    assert len({row["series"] for row in data(crowded)} - {f"a label with a long name {i}" for i in (0, 1)}) == 11
    assert "labels: the 10 with the most windows" in spec(crowded)["title"]["subtitle"]
    misnamed = mix_frame().with_columns(label=pl.col("label").replace("a label with a long name 0", "mean"))
    assert len({row["series"] for row in data(charts.batch_mix(misnamed))}) == 4


def test_the_rows_to_draw_are_chosen_and_not_guessed():
    frame = pl.concat([windows_frame(batch_size=b) for b in (1, 4)])
    assert len(data(charts.windows(frame))) == 5 * 8
    assert spec(charts.windows(frame, batch_size=4))["title"]["text"] == "Unique experts in 4 windows"
    with pytest.raises(UsageError, match="1, 4"):
        charts.windows(frame, batch_size=2)
    with pytest.raises(UsageError, match="window = 9"):
        charts.batch(frame, window=9)


def test_autocorr_draws_the_overlap_over_its_baselines():
    chart = charts.autocorr(autocorr_frame())
    assert {r["series"] for r in data(chart)} == {"uniform", "popularity", "request", "observed"}
    assert spec(chart)["layer"][1]["encoding"]["x"]["title"] == "Lag d (tokens)"
    assert spec(chart)["layer"][1]["encoding"]["x"]["axis"]["values"] == [1, 4, 8, 12, 16, 20, 24, 28, 32]


def test_heatmaps_have_a_cell_for_every_row_beyond_the_limit_of_altair():
    import altair as alt

    chart = spec(charts.popularity(popularity_frame(92, 512)))
    assert len(next(iter(chart["datasets"].values()))) == 92 * 512
    assert marks(chart) == ["rect"]
    assert chart["width"] % 512 == chart["height"] % 92 == 0
    assert chart["encoding"]["color"]["scale"]["scheme"] == "viridis"
    assert chart["title"]["subtitle"] == ["chat · decode tokens · N = 512, k = 4"]
    assert alt.data_transformers.active == "default"

    lags = charts.layer_lag(pl.concat([autocorr_frame(layer=i) for i in (3, 4, 10)]))
    assert {r["y"] for r in data(lags)} == {3, 4, 10}
    assert spec(lags)["encoding"]["color"]["title"] == "Overlap (share of the k experts)"


@pytest.mark.parametrize("kind", ["layer-lag", "popularity"])
def test_the_ends_of_the_colours_are_labelled_and_hold_every_value(kind: str):
    chart = draw(kind)
    color = spec(chart)["encoding"]["color"]
    labels, values = color["legend"]["values"], [r["value"] for r in data(chart)]
    assert color["scale"]["domain"] == [labels[0], labels[-1]]
    assert labels[0] <= min(values) <= max(values) <= labels[-1]
    assert labels == sorted(set(labels))
    assert len(labels) <= 8


def test_heatmaps_of_several_traces_have_their_own_layers_and_one_legend():
    both = pl.concat([popularity_frame(24, 32, "large"), popularity_frame(4, 8, "small")])
    chart = spec(charts.popularity(both))
    large, small = chart["concat"]
    assert [panel["title"]["text"] for panel in (large, small)] == ["large", "small"]
    assert large["height"] == 24 / 4 * small["height"]
    assert small["encoding"]["y"]["axis"]["values"] == [0, 1, 2, 3] or small["encoding"]["y"]["axis"]["values"] == [
        0,
        2,
    ]
    assert small["encoding"]["x"]["axis"]["values"] == list(range(8))
    assert large["encoding"]["color"] == small["encoding"]["color"]


def test_attribution_falls_from_uniform_to_observed_and_says_what_is_not_resolved():
    chart = charts.attribution(attribution_frame())
    rows = data(chart)
    assert [r["kind"] for r in rows] == ["uniform", "popularity", "label", "request", "token_order", "observed"]
    assert [r["to"] for r in rows] == [13.24, 12.13, 12.13, 10.35, 9.30, 9.30]
    assert rows[1]["text"] == "−1.11 = 28.2% (20.0 to 50.0)"
    assert rows[2]["text"] == "not resolved"
    title = spec(chart)["title"]
    assert title["text"] == "Where the reduction comes from, windows of 4 tokens"
    assert any(line.startswith("not resolved:") for line in title["subtitle"])
    resolved = charts.attribution(attribution_frame().with_columns(resolved=True))
    assert not any(line.startswith("not resolved:") for line in spec(resolved)["title"]["subtitle"])


def test_reuse_is_one_line_without_a_name_and_its_interval():
    drawn = spec(draw("reuse"))
    assert marks(drawn) == ["area", "line", "point", "rule", "text"]
    rows = data(draw("reuse"))
    assert [(r["x"], r["y"], r["share"]) for r in rows] == [(3, 0.2, 0.2), (4, 0.4, 0.2), (5, 0.5, 0.1)]
    assert not any("name" in r for r in rows)
    assert "a cache for each layer, each request begins with what its prompt left" in drawn["title"]["subtitle"]


def test_locality_draws_one_segment_length_and_says_what_the_router_scores():
    drawn = spec(draw("locality"))
    assert "segments of 16 tokens" in drawn["title"]["text"]
    assert "scores 16.0 % (SRP)" in drawn["title"]["subtitle"][1]
    rows = data(draw("locality"))
    assert [(r["x"], r["y"]) for r in rows if r["series"] == "fixed set"] == [(4, 0.22), (8, 0.44), (16, 0.88)]
    assert "segments of 32 tokens" in spec(charts.locality(locality_frame(), segment=32))["title"]["text"]
    longer = locality_frame().filter(pl.col("segment") > 16)
    assert "segments of 32 tokens" in spec(charts.locality(longer))["title"]["text"]
    with pytest.raises(UsageError, match="8, 16, 32"):
        charts.locality(locality_frame(), segment=4)


def test_layers_share_each_budget_on_a_line_of_its_own():
    rows = data(draw("layer-budgets"))
    assert {r["series"] for r in rows} == {"8 per layer", "12 per layer"}
    assert [(r["x"], r["y"]) for r in rows if r["series"] == "8 per layer"] == [(0, 7), (1, 8), (2, 9)]
    of_bytes = layer_budgets_frame().with_columns(unit=pl.lit("bytes"), capacity=pl.col("capacity") * 1e9)
    assert {r["series"] for r in data(charts.layer_budgets(of_bytes))} == {"8 GB", "12 GB"}
    many = pl.concat([layer_budgets_frame().with_columns(capacity=pl.lit(float(i))) for i in range(20)])
    assert len({r["series"] for r in data(charts.layer_budgets(many))}) == 8
    with pytest.raises(UnsupportedError, match="no layers"):
        charts.layer_budgets(layer_budgets_frame().filter(pl.col("layer").is_null()))


def test_a_budget_keeps_weight_and_tokens():
    rows = data(draw("budget"))
    assert [r["y"] for r in rows if r["series"] == "weight kept"] == [0.5, 0.7, 0.9]
    assert [(r["y"], "lo" in r) for r in rows if r["series"] == "tokens intact"] == [
        (0.1, False),
        (0.3, False),
        (0.8, False),
    ]
    assert "windows of 4 tokens" in spec(draw("budget"))["title"]["text"]


def test_several_traces_and_layers_are_panels_in_order():
    both = spec(charts.windows(pl.concat([windows_frame("b"), windows_frame("a")])))
    assert both["facet"]["sort"] == ["b", "a"]
    assert both["title"]["subtitle"] == ["decode tokens", "shaded: 95 % interval"]
    assert both["resolve"]["axis"]["x"] == "independent"
    frame = pl.concat([windows_frame().with_columns(layer=pl.lit(i)) for i in (2, 10)])
    layers = spec(charts.windows(frame))
    assert layers["facet"]["sort"] == ["layer 2", "layer 10"]
    assert layers["spec"]["layer"][2]["encoding"]["y"]["title"] == "Unique experts"
    assert "facet" in spec(charts.attribution(pl.concat([attribution_frame("b"), attribution_frame("a")])))


def test_model_and_shape_are_named_where_the_frame_has_them():
    frame = windows_frame().with_columns(model=pl.lit("gpt-oss"), num_experts=pl.lit(32), top_k=pl.lit(4))
    assert spec(charts.windows(frame))["title"]["subtitle"][0] == "chat · gpt-oss · decode tokens · N = 32, k = 4"


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_of_something_else_or_without_rows_is_refused(kind: str):
    with pytest.raises(UsageError, match=r"the frame of tk\."):
        KINDS[kind].draw(pl.DataFrame({"trace": ["a"], "phase": ["decode"]}))
    frames = [windows_frame(), mix_frame(), autocorr_frame(layer=0), attribution_frame(), popularity_frame(1, 4)]
    frames.append(speedup_frame())
    frames.append(acceptance_frame())
    frames.append(cache_frame())
    frames.append(prefetch_frame())
    frames += [budget_frame(), locality_frame(), layer_budgets_frame(), design_frame()]
    columns = {name: dtype for frame in frames for name, dtype in frame.schema.items()}
    with pytest.raises(UnsupportedError, match="no rows"):
        KINDS[kind].draw(pl.DataFrame(schema=columns))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chart_is_the_same_every_time(kind: str):
    assert draw(kind).to_json() == draw(kind).to_json()


@given(st.lists(st.floats(0, 30), min_size=1, max_size=6), st.floats(0.1, 3))
def test_names_do_not_cover_each_other(values: list[float], gap: float):
    placed = drawing._apart(values, gap)
    order = sorted(range(len(values)), key=values.__getitem__)
    for a, b in itertools.pairwise(order):
        assert placed[b] - placed[a] >= gap - 1e-6
    assert sum(placed) == pytest.approx(sum(values), abs=1e-6)
    floored = drawing._apart(values, gap, floor=5.0)
    assert min(floored) >= 5.0
    assert all(floored[b] - floored[a] >= gap - 1e-6 for a, b in itertools.pairwise(order))
    assert drawing._apart([0.0, 9.0], 1.0, floor=5.0) == [5.0, 9.0], "only names that collide move"


# --- whatever things are called ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_name_is_data(kind: str):
    chart = spec(draw(kind, HOSTILE))
    assert any(HOSTILE in line for line in chart["title"]["subtitle"])
    assert strings(chart) == strings(spec(draw(kind))), "a name became part of the drawing"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    chart = charts.windows(pl.concat([windows_frame("plain"), windows_frame(HOSTILE)]))
    return render(chart, tmp_path_factory.mktemp("page") / "chart.html").read_text(encoding="utf-8")


def test_a_hostile_name_survives_and_cannot_leave_its_script(hostile_page: str):
    assert "<script>alert" not in hostile_page
    held = re.search(r"const spec = (\{.*\});\n", hostile_page)
    assert held is not None
    (rows,) = json.loads(held[1])["datasets"].values()
    assert {row["panel"] for row in rows} == {"plain", HOSTILE}


def test_html_loads_nothing_from_elsewhere(hostile_page: str):
    outside = re.sub(r"<script[^>]*>.*?</script>", "", hostile_page, flags=re.DOTALL)
    assert "http" not in outside
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)\s*=", outside) == []
    assert re.findall(r"<script[^>]*\bsrc\s*=", hostile_page) == []
    assert '"editor": false' in hostile_page  # which would send the data to another site


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_chart_can_be_drawn(kind: str, tmp_path: Path):
    svg = render(draw(kind), tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "chat · decode tokens" in svg


def test_every_format_is_what_its_suffix_says(tmp_path: Path):
    chart = charts.windows(windows_frame())
    files = {suffix: render(chart, tmp_path / f"chart{suffix}").read_bytes() for suffix in SUFFIXES}
    assert files[".png"].startswith(b"\x89PNG")
    assert files[".pdf"].startswith(b"%PDF")
    assert files[".svg"].startswith(b"<svg")
    assert json.loads(files[".json"]) == spec(chart)
    assert files[".html"].startswith(b"<!DOCTYPE html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"chart{s}" for s in SUFFIXES)


def test_a_file_is_overwritten_only_by_force(tmp_path: Path):
    chart = charts.windows(windows_frame())
    path = tmp_path / "chart.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match=f"will not overwrite without --force: {re.escape(str(path))}"):
        render(chart, path)
    assert path.read_text() == "mine"
    render(chart, path, force=True)
    assert json.loads(path.read_text()) == spec(chart)


def test_an_unknown_suffix_or_folder_is_refused(tmp_path: Path):
    chart = charts.windows(windows_frame())
    with pytest.raises(UsageError, match=r"\.html, \.png, \.svg, \.pdf, \.json"):
        render(chart, tmp_path / "chart.gif")
    with pytest.raises(TracekitError, match="no such folder"):
        render(chart, tmp_path / "nowhere" / "chart.png")


# --- from a store ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    folder = tmp_path_factory.mktemp("charts")
    ids = np.argsort(np.random.default_rng(0).random((90, 2, 8)), axis=2)[:, :, :3].astype(np.uint8)
    # Verification steps of three rows: 0, 1 and 2 drafts accepted by turns, so that a request has 15 tokens.
    rows = []
    steps = [(0, 0), (1, 1), (3, 2), (6, 0), (7, 1), (9, 2), (12, 2)]
    for i, (start, accepted) in itertools.product(range(6), steps):
        step = {"request_id": str(i), "topic": ["prose", HOSTILE][i % 2], "start_pos": start, "n_drafted": 2}
        experts = np.resize(ids[15 * i + start :], (3, 2, 3)).reshape(-1).tolist()
        weights = np.resize([0.5, 0.3, 0.2], len(experts)).tolist()
        rows.append(step | {"n_accepted": accepted, "experts": experts, "router_weights": weights})
    pl.DataFrame(rows).write_parquet(folder / "trace.parquet")
    about: dict[str, Any] = {"num_experts": 8, "top_k": 3, "label_fields": ["topic"]}
    tk.ingest(folder / "trace.parquet", folder / "store", name=HOSTILE, phase="decode", **about)
    store = tk.open(str(folder / "store"))
    shape = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2, "vocab_size": 9}
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(shape | sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.speedup(store, model=folder, bandwidth=1e8, flops=1e11)
        tk.design(store, vary={"k": (1, 4)}, routed_share=0.4)
    return store


@pytest.mark.parametrize("kind", KINDS)
def test_a_chart_of_a_store_is_its_query_drawn(store: tk.Store, kind: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        chart = spec(charts.chart(store, kind))
        drawn = spec(KINDS[kind].draw(queries.query(store, KINDS[kind].query)))
    assert chart == drawn
    assert "N = 8, k = 3" in chart["title"]["subtitle"][0]
    assert {p.name for p in KINDS[kind].parameters} >= {"trace", "phase"}


def test_the_parameters_of_a_chart_are_those_of_its_query(store: tk.Store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        assert {r["x"] for r in data(charts.chart(store, "autocorr", max_lag="3"))} == {1, 2, 3}
        assert "windows of 2 tokens" in spec(charts.chart(store, "batch", window=2))["title"]["text"]
        assert spec(charts.chart(store, "windows", batch_size=4))["title"]["text"] == "Unique experts in 4 windows"
    with pytest.raises(UsageError, match="windows, batch, batch-mix, autocorr, layer-lag"):
        charts.chart(store, "pie")
    with pytest.raises(UsageError, match="max_lag"):
        charts.chart(store, "autocorr", maxlag=3)


def test_the_frames_of_the_metrics_can_be_drawn(store: tk.Store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        assert "layer" in charts.windows(tk.windows(store)).to_dict()
        assert "facet" in charts.windows(tk.windows(store, by="layer")).to_dict()
        charts.batch(tk.windows(store, batch_size=[1, 2, 4])).to_dict()
        charts.autocorr(tk.autocorr(store)).to_dict()
        charts.layer_lag(tk.autocorr(store, by="layer")).to_dict()
        charts.attribution(tk.attribution(store)).to_dict()


def test_charts_are_imported_without_altair():
    code = "import sys, tracekit.reports.charts; sys.exit(bool({'altair', 'polars', 'duckdb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
