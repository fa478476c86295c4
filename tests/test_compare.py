"""Two traces compared: nothing where nothing differs, what was put in where something does, and intervals that hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import StoreError, TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.intervals import difference
from tracekit.reports.tables import render

HOSTILE = "a'b\"; DROP VIEW traces; -- \x1b[31m<script>"
N, K, LAYERS = 8, 3, 2


def draw(seed: int, requests: int = 12, tokens: int = 20, keep: float = 0.0) -> NDArray[np.uint8]:
    """Return routing ``[requests, tokens, layers, k]``: each token's set at random, or with ``keep`` the one before."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((requests, tokens, LAYERS, N)), axis=3)[..., :K].astype(np.uint8)
    for t in range(1, tokens):
        same = rng.random((requests, LAYERS)) < keep
        ids[:, t][same] = ids[:, t - 1][same]
    return ids


def save(
    store: Path,
    name: str,
    ids: NDArray[np.uint8],
    *,
    names: Sequence[str] | None = None,
    token_ids: NDArray[np.int64] | None = None,
    prompt: int = 0,
    **options: Any,
) -> None:
    """Ingest routing ``[requests, tokens, layers, k]``, the first ``prompt`` tokens of each request its prompt."""
    store.parent.mkdir(exist_ok=True)
    requests, tokens = ids.shape[:2]
    source = store.parent / f"source-{len(list(store.parent.iterdir()))}.npz"
    arrays: dict[str, Any] = {} if token_ids is None else {"token_ids": token_ids.reshape(-1)}
    lens = np.full(requests, tokens, np.int32)
    np.savez(source, expert_ids=ids.reshape(-1, *ids.shape[2:]), request_lens=lens, **arrays)
    sidecar = [{"request_id": i, "prompt_len": prompt} for i in names or [f"r{i}" for i in range(requests)]]
    tk.ingest(source, store, name=name, num_experts=N, requests=sidecar, **options)


def heard(*args: Any, **kwargs: Any) -> tuple[pl.DataFrame, list[str]]:
    """Return the comparison and what was warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        frame = tk.compare(*args, **kwargs)
    return frame, [str(w.message) for w in caught]


def figures(frame: pl.DataFrame) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    return {(row["section"], row["metric"], row["at"]): row for row in frame.iter_rows(named=True)}


# --- what is put in comes out -------------------------------------------------------------------


def test_identical_traces_differ_by_nothing(tmp_path: Path) -> None:
    ids, tokens = draw(1, keep=0.5), np.arange(12 * 20)
    save(tmp_path / "a", "first", ids, token_ids=tokens)
    order = np.random.default_rng(0).permutation(12)
    save(tmp_path / "b", "second", ids[order], names=[f"r{i}" for i in order], token_ids=tokens.reshape(12, 20)[order])
    for frame, notes in (
        heard(tmp_path / "a", tmp_path / "b"),
        heard(tmp_path / "a", trace_a="first", trace_b="first"),
    ):
        assert {*frame["section"]} == {"windows", "attribution", "batches", "autocorr", "load", "agreement"}
        assert frame.select(pl.col("paired").all()).item()
        for name in ("difference", "lo", "hi"):
            assert frame[name].to_list() == [0.0] * frame.height
        assert not frame["differs"].any()
        assert frame["differs"].null_count() == 0
        assert notes == ["intervals are rough with fewer than 30 requests: there are 12"]
        assert figures(frame)["agreement", "identical_sets", None]["b"] == 1


def test_each_side_is_what_the_metrics_say(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "a", draw(1, keep=0.3), router_order=True)
    save(store, "b", draw(2, keep=0.7, requests=9), names=[f"s{i}" for i in range(9)], router_order=True)
    frame, notes = heard(store, window=3, batch_size=[4])
    assert notes[0].startswith("no request id is in both traces: two samples of requests are compared")
    found = figures(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        for side, name in (("a", "a"), ("b", "b")):
            single, batch = (
                tk.windows(store, trace=name, max_window=3, batch_size=[1, 4]).filter(window=3).rows(named=True)
            )
            lags = {row["lag"]: row for row in tk.autocorr(store, trace=name, max_lag=16).rows(named=True)}
            causes = {row["cause"]: row for row in tk.attribution(store, trace=name, window=3).rows(named=True)}
            ratio = tk.expert_ratio(store, trace=name, max_window=3, batch_size=[4]).row(2, named=True)
            load = tk.load(store, trace=name)
            expected = {
                **{("windows", m, "window 3"): single[m] for m in ("observed", "per_top_k", "reduction_request")},
                ("batches", "observed", "window 3, batch size 4"): batch["observed"],
                ("batches", "reduction_uniform", "window 3, batch size 4"): batch["reduction_uniform"],
                ("batches", "expert_ratio", "window 3, batch size 4"): ratio["ratio"],
                **{("autocorr", "overlap", f"lag {lag}"): lags[lag]["overlap"] for lag in (1, 4, 16)},
                **{("autocorr", m, "lag 1"): lags[1][m] for m in ("rho", "rho_request", "rank0_repeat")},
                **{("attribution", f"share_{c}", "window 3"): causes[c]["share"] for c in ("request", "token_order")},
                **{("load", m, None): load[m].mean() for m in ("max_over_mean", "entropy_norm", "sum_p2_over_k")},
            }
            assert {key: found[key][side] for key in expected} == pytest.approx(expected)
            row = found["windows", "reduction_uniform", "window 3"]
            for end in ("lo", "hi"):
                assert row[f"{side}_{end}"] == pytest.approx(single[f"reduction_uniform_{end}"])
            assert found["batches", "expert_ratio", "window 3, batch size 4"][f"{side}_lo"] == pytest.approx(
                ratio["ratio_lo"]
            )
    assert frame["difference"].to_list() == pytest.approx((frame["b"] - frame["a"]).to_list())
    row = found["autocorr", "overlap", "lag 1"]
    # The truth: uniform .375 + keep (1 - .375), so .4 · .625 apart; a token's fate is independent of the others'.
    assert row["lo"] < 0.25 < row["hi"]
    assert row["differs"]
    assert not row["paired"]


def test_the_paired_interval_is_that_of_the_requests_differences(tmp_path: Path) -> None:
    """Requests of equal length: the mean over windows is the mean over requests, and its jackknife the t interval."""
    store = tmp_path / "store"
    ids = draw(5, keep=0.4)
    other = ids.copy()
    other[:, ::3] = draw(6)[:, ::3]  # the same requests, every third token routed anew
    save(store, "a", ids)
    extra = draw(7, requests=3)
    order = np.random.default_rng(1).permutation(15)
    names = np.array([*(f"r{i}" for i in range(12)), "x", "y", "z"])[order]
    save(store, "b", np.concatenate([other, extra])[order], names=names.tolist())
    frame, notes = heard(store)
    assert "12 requests are in both traces and are compared; left out are 3 of trace 'b'" in notes

    def unique(ids: NDArray[np.uint8]) -> Any:
        return np.array(
            [
                np.mean([len({*request[t : t + 4, layer].ravel()}) for t in range(17) for layer in range(LAYERS)])
                for request in ids
            ]
        )

    change = unique(other) - unique(ids)
    row = figures(frame)["windows", "observed", "window 4"]
    assert row["difference"] == pytest.approx(change.mean())
    half = 2.200985 * change.std(ddof=1) / np.sqrt(12)
    assert (row["lo"], row["hi"]) == pytest.approx((change.mean() - half, change.mean() + half), rel=1e-5)
    unpaired = figures(heard(store, paired=False)[0])["windows", "observed", "window 4"]
    assert not unpaired["paired"]
    assert unpaired["b"] != pytest.approx(row["b"])  # with the three that are only in b


def test_the_agreement_of_two_runs_over_the_same_tokens(tmp_path: Path) -> None:
    """Every fourth token has one of its three experts exchanged in layer 1; after token 15 the text differs."""
    store = tmp_path / "store"
    ids = draw(8)
    other = ids[..., ::-1].copy()  # another order of ranks is the same set
    for request, t in np.ndindex(12, 5):
        chosen = other[request, 4 * t, 1]
        chosen[0] = next(e for e in range(N) if e not in chosen)
    tokens = np.tile(np.arange(20), (12, 1))
    diverged = tokens.copy()
    diverged[:, 16] = 99  # what follows is the same again, but no longer after the same text
    save(store, "a", ids, token_ids=tokens, prompt=4)
    save(store, "b", other, token_ids=diverged, prompt=4)
    frame, _ = heard(store)
    found = figures(frame.filter(section="agreement"))
    # Decode tokens 4 .. 15: three of twelve are changed.
    assert found["agreement", "identical_sets", "layer 0"]["b"] == 1
    assert found["agreement", "identical_sets", "layer 1"]["b"] == 0.75
    assert found["agreement", "overlap", "layer 1"]["b"] == pytest.approx(1 - 1 / 12)
    row = found["agreement", "identical_sets", None]
    assert (row["a"], row["b"], row["difference"], row["differs"]) == (1, 0.875, -0.125, True)
    assert heard(store, phase="prefill", window=2)[0].filter(at="layer 1", metric="identical_sets")["b"].item() == 0.75
    # Without token ids nobody knows which tokens are the same.
    save(tmp_path / "other", "b", other, prompt=4)
    assert heard(store, tmp_path / "other", trace_a="a")[0].filter(section="agreement").is_empty()


# --- intervals ----------------------------------------------------------------------------------


def replicates(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a mean and the means with each value left out, ``[1 + G, 1]``."""
    return np.concatenate([[values.mean()], (values.sum() - values) / (len(values) - 1)])[:, None]


def drawn_of(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the points of the chart."""
    [points] = tk.charts.compare(frame).to_dict()["datasets"].values()
    rows: list[dict[str, Any]] = points
    return rows


def test_the_chart_draws_relative_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "s", HOSTILE, draw(1))
    save(tmp_path / "s", "b", draw(2, keep=0.7))
    frame, _ = heard(tmp_path / "s", trace_a=HOSTILE, trace_b="b", window=3, batch_size=[4])
    points = {row["name"]: row for row in drawn_of(frame)}
    for row in frame.filter(metric="overlap", at="lag 1").rows(named=True):
        drawn = points["overlap (autocorr, lag 1)"]
        assert drawn["x"] == pytest.approx(row["b"] / row["a"] - 1)
        assert drawn["lo"] == pytest.approx(row["lo"] / row["a"])
        assert drawn["hi"] == pytest.approx(row["hi"] / row["a"])
        assert drawn["kind"] == "differs"
    assert "observed (batches, T = 3, B = 4)" in points
    assert not any("layer" in name for name in points)
    bare, _ = heard(tmp_path / "s", trace_a=HOSTILE, trace_b="b", window=3, batch_size=[4], intervals=False)
    assert {row["kind"] for row in drawn_of(bare)} == {"not resolved"}
    with pytest.raises(UnsupportedError, match="nothing to draw"):
        tk.charts.compare(frame.clear())
    with pytest.raises(UsageError, match="without"):
        tk.charts.compare(frame.drop("hi"))
    asked = ["compare", str(tmp_path / "s"), "--trace-a", HOSTILE, "--trace-b", "b", "--window", "3", "--no-intervals"]
    assert main([*asked, "--chart", str(tmp_path / "c.json")]) == 0
    assert "DROP VIEW" in (tmp_path / "c.json").read_text(encoding="utf-8")
    assert main([*asked, "--chart", str(tmp_path / "c.json")]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_a_difference_cover_it(paired: bool) -> None:
    """Means over requests with an effect of their own, 12 against 12 or 8: about 95 of 100 intervals hold the truth."""
    rng = np.random.default_rng(3)
    held, widths = 0, []
    for _ in range(400):
        topic = rng.normal(0, 3, 12)
        x = topic + rng.normal(0, 1, 12)
        y = (topic + rng.normal(0.5, 1, 12)) if paired else rng.normal(0.5, 2, 8)
        interval = difference(replicates(x), replicates(y), paired=paired)
        held += interval.contains(0.5).item()
        widths.append((interval.hi - interval.lo).item())
    assert 0.92 <= held / 400 <= 0.98
    # Paired, the topics cancel: 2 · 2.2 · sqrt(2 / 12) = 1.8 instead of 4.
    assert np.mean(widths) == pytest.approx(1.76 if paired else 4.7, abs=0.3)


def test_two_samples_are_welchs() -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array([18.0, 19.0, 20.0, 24.0]), np.array([22.0, 23.0, 24.0, 21.0, 25.0, 20.0])
    interval = difference(replicates(x), replicates(y), paired=False)
    expected = stats.ttest_ind(y, x, equal_var=False).confidence_interval()
    assert (interval.lo.item(), interval.hi.item()) == pytest.approx((expected.low, expected.high))


def test_a_difference_without_spread_is_certain(tmp_path: Path) -> None:
    """A trace that repeats one token against one that cycles through two sets: every request says the same."""
    store = tmp_path / "store"
    same = np.tile(np.array([0, 1, 2], np.uint8), (6, 20, LAYERS, 1))
    turns = same.copy()
    turns[:, 1::2] += 3
    save(store, "repeat", same)
    save(store, "cycle", turns)
    for paired in (True, False):
        found = figures(heard(store, paired=paired)[0])
        row = found["windows", "observed", "window 4"]
        assert (row["a"], row["b"], row["difference"], row["lo"], row["hi"]) == (3, 6, 3, 3, 3)
        assert row["differs"]
        assert found["autocorr", "overlap", "lag 4"]["differs"] is False
        assert found["autocorr", "overlap", "lag 1"]["difference"] == -1


def test_few_requests_have_no_interval(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "a", draw(1, requests=1))
    save(store, "b", draw(2, requests=1))
    frame, notes = heard(store, batch_size=[])
    assert "no interval with fewer than 5 requests: there are 1" in notes
    assert frame["paired"].all()
    for name in ("lo", "hi", "a_lo", "b_hi", "differs"):
        assert frame[name].null_count() == frame.height
    assert frame["difference"].null_count() == 0
    assert "batches" not in frame["section"].to_list()
    frame, notes = heard(store, intervals=False)
    assert not any("interval" in note for note in notes)
    save(store, "long", draw(1, tokens=41), names=[f"l{i}" for i in range(12)])
    text = "\n".join(heard(store, trace_a="a", trace_b="long")[1])
    assert "requests have 20 and 41 decode tokens on average" in text
    # Of four shared ids among many no interval could be made: the traces are two samples then.
    save(store, "c", draw(3), names=[f"r{i}" if i < 4 else f"s{i}" for i in range(12)])
    save(store, "d", draw(4))
    frame, notes = heard(store, trace_a="c", trace_b="d")
    assert not frame["paired"].any()
    assert any(note.startswith("only 4 of the request ids are in both traces") for note in notes)
    assert heard(store, trace_a="c", trace_b="d", paired=True)[0]["paired"].all()


def test_more_than_200_requests_are_left_out_in_the_same_groups(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ids = draw(1, requests=230, tokens=6)
    order = np.random.default_rng(2).permutation(230)
    save(store, "a", ids)
    save(store, "b", ids[order], names=[f"r{i}" for i in order])
    frame, _ = heard(store, batch_size=[], seed=3)
    assert frame["hi"].to_list() == [0.0] * frame.height
    assert frame["a_hi"].null_count() == 0


# --- what would mislead -------------------------------------------------------------------------


def test_what_misleads_is_said(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "plain", draw(1), router_order=True, prompt=2)
    save(store, "physical", draw(1), id_space="physical", router_order=False, prompt=3)
    wide = draw(1)[..., :2]
    save(store, "k2", wide, prompt=2)
    save(store, "k2", draw(2, requests=1)[..., :2], names=["only here"], prompt=2, append=True)
    save(store, "one layer", draw(1)[:, :, :1], prompt=2, axes="tlk")
    np.savez(tmp_path / "prompts.npz", expert_ids=draw(1)[0], request_lens=np.array([20], np.int32))
    tk.ingest(tmp_path / "prompts.npz", store, name="prompts", num_experts=16, phase="prefill")

    def notes(b: str, **options: Any) -> str:
        return "\n".join(heard(store, trace_a="plain", trace_b=b, **options)[1])

    text = notes("physical")
    assert "trace 'physical' has physical ids: replicas of an expert count as several" in text
    assert "only trace 'plain' keeps the router's order of experts" in text
    assert "12 of 12 requests have prompts of another length under the same id" in text
    text = notes("k2")
    assert "experts per token (k) differ, 3 and 2" in text
    assert "left out are 1 of trace 'k2'" in text
    assert "the MoE layers differ, 2 and 1" in notes("one layer")
    text = notes("prompts")
    assert "routed experts per layer (N) differ, 8 and 16" in text
    assert "the phases differ, decode and prefill" in text


def test_a_reduced_run_and_another_model_are_said(tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = {"num_hidden_layers": LAYERS, "num_experts": N, "num_experts_per_tok": 4, "model_type": "qwen3_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save(store, "reduced", draw(1), config=tmp_path / "config.json", top_k=K)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmoe"}), encoding="utf-8")
    save(store, "other", draw(2), config=tmp_path / "config.json", top_k=K)
    text = "\n".join(heard(store)[1])
    assert "trace 'reduced' was run with k = 3 instead of the model's 4" in text
    assert "the models differ, 'qwen3_moe' and 'olmoe'" in text


def test_two_traces_are_found_or_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "a", draw(1))
    with pytest.raises(StoreError, match="holds one trace, 'a', and two are compared"):
        tk.compare(store)
    save(store, "b", draw(2))
    for named, names in (({}, ("a", "b")), ({"trace_a": "b"}, ("b", "a")), ({"trace_b": "a"}, ("b", "a"))):
        assert heard(store, **named)[0].select("trace_a", "trace_b").row(0) == names
    save(store, "c", draw(3))
    with pytest.raises(StoreError, match=r"holds 3 traces .*one is missing, --trace-b"):
        tk.compare(store, trace_a="a")
    with pytest.raises(StoreError, match="no trace named 'bb'"):
        tk.compare(store, trace_a="a", trace_b="bb")
    save(tmp_path / "other", "a", draw(4))
    assert heard(store, tmp_path / "other", trace_a="c")[0].select("trace_a", "trace_b").row(0) == ("c", "a")
    with pytest.raises(UsageError, match="windows of 1 tokens"):
        tk.compare(store, trace_a="a", trace_b="b", window=1)
    with pytest.raises(UsageError, match="batch size 1"):
        tk.compare(store, trace_a="a", trace_b="b", batch_size=[1, 4])
    with pytest.raises(UnsupportedError, match="no request has 21 consecutive decode tokens"):
        tk.compare(store, trace_a="a", trace_b="b", window=21)
    save(store, "far", draw(5), names=[f"s{i}" for i in range(12)])
    with pytest.raises(UsageError, match="no request id is in both traces"):
        tk.compare(store, trace_a="a", trace_b="far", paired=True)


def test_counts_cannot_be_compared(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "a", draw(1))
    rows = ["layer,expert,count", *(f"{layer},{e},{10 + e}" for layer in range(LAYERS) for e in range(N))]
    (tmp_path / "counts.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tk.ingest(tmp_path / "counts.csv", store, name="counts", num_experts=N)
    with pytest.raises(UnsupportedError, match="holds counts per expert only"):
        tk.compare(store)


def test_the_table_of_hostile_names_fits_and_drives_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    names = [f"{HOSTILE}{i}" for i in range(12)]
    save(store, HOSTILE, draw(1), names=names, token_ids=np.arange(240))
    save(store, "b", draw(2, keep=0.9), names=names, token_ids=np.arange(240))
    frame, _ = heard(store)
    text = render(frame, layout="compare")
    assert isinstance(text, str)
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "no room for" not in text
    assert "* differs: the interval leaves out 0" in text
    assert "agreement by layer" in text
    assert main(["compare", str(store), "--format", "json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["difference"] for row in rows] == frame["difference"].to_list()
    assert main(["compare", str(store), "--trace-a", "c", "-q"]) == 1
    assert main(["compare", str(store), "--batch-size", "1", "-q"]) == 2


# --- real traces --------------------------------------------------------------------------------


def test_an_engine_and_its_speculation_route_the_same_tokens_alike(shared: Path, tmp_path: Path) -> None:
    """vLLM with and without a draft model: greedy output is the same, and so is every expert set."""
    store = tmp_path / "store"
    for name in ("vllm_olmoe", "vllm_olmoe_spec"):
        tk.ingest(shared / "moe/traces" / name, store, name=name, num_experts=32)
    frame, notes = heard(store)
    assert any(note.startswith("42 requests are in both traces and are compared; left out are 14") for note in notes)
    found = figures(frame)
    assert found["agreement", "identical_sets", None]["b"] == 1
    row = found["windows", "reduction_uniform", "window 4"]
    assert row["paired"]
    assert row["lo"] < 0 < row["hi"]
    unpaired = figures(heard(store, paired=False)[0])["windows", "reduction_uniform", "window 4"]
    assert unpaired["hi"] - unpaired["lo"] > 3 * (row["hi"] - row["lo"])


def test_greedy_output_loops_and_sampled_output_does_not(shared: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    folder = shared / "moe/traces/olmoe"
    for name in ("sampled", "spec_greedy"):
        tk.ingest(sorted((folder / "npz").glob(f"{name}-*.npz")), store, name=name, config=folder / "config.json")
    found = figures(heard(store, trace_a="sampled")[0])
    row = found["autocorr", "overlap", "lag 1"]
    assert row["a"] == pytest.approx(0.217, abs=1e-3)
    assert row["b"] == pytest.approx(0.342, abs=1e-3)
    assert row["differs"]
    assert not row["paired"]
    assert found["attribution", "share_token_order", "window 4"]["differs"]


def test_verification_steps_are_compared(shared: Path, tmp_path: Path) -> None:
    folder = shared / "moe/traces/olmoe"
    steps = pl.read_parquet(folder / "verify_steps.parquet")
    for mode in ("greedy", "sampled"):
        steps.filter(pl.col("mode") == mode).write_parquet(tmp_path / f"{mode}.parquet")
        tk.ingest(tmp_path / f"{mode}.parquet", tmp_path / "store", name=mode, config=folder / "config.json")
    found = figures(heard(tmp_path / "store", trace_a="greedy")[0])
    row = found["verification", "acceptance_length", None]
    assert (round(row["a"], 3), round(row["b"], 3)) == (2.098, 2.020)
    assert row["differs"] is False
    assert row["b_hi"] - row["b_lo"] == pytest.approx(2 * 1.999 * 0.022, rel=0.05)
    row = found["verification", "unique", None]
    assert (round(row["a"], 1), round(row["b"], 1)) == (10.2, 12.0)
    assert row["differs"]
