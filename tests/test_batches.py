"""Batches: distinct requests against the recursion and brute force, the expert ratio, label mixes and thresholds."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis import heard, save
from test_metrics import Requests, close, frame_of, groups, has_rows, measured, traces

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.batches import DistinctBatches, full_activation, independent_union
from tracekit.metrics.state import Cells, Spec
from tracekit.reports.text import display_width
from tracekit.schema import TraceMeta

# The full-activation threshold


@pytest.mark.parametrize(
    ("num_experts", "top_k", "at_95", "at_99"),
    [(64, 8, 23, 35), (8, 2, 11, 17), (128, 8, 47, 72), (256, 8, 95, 146), (32, 4, 23, 35), (8, 8, 1, 1)],
)
def test_full_activation(num_experts: int, top_k: int, at_95: int, at_99: int) -> None:
    assert full_activation(num_experts, top_k, 0.95) == at_95
    assert full_activation(num_experts, top_k, 0.99) == at_99


def test_a_share_that_is_reached_exactly_is_reached() -> None:
    assert full_activation(10, 5, 0.5) == 1
    assert full_activation(10, 5, 0.875) == 3
    assert full_activation(10, 1, 0.1) == 1


@pytest.mark.parametrize("bad", [(8, 0, 0.5), (8, 9, 0.5), (8, 2, 0.0), (8, 2, 1.0), (8, 2, float("nan"))])
def test_an_impossible_threshold_is_refused(bad: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError):
        full_activation(*bad)


# Windows drawn independently


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8, unique=True), st.integers(0, 2**32))
def test_unions_of_many_batch_sizes_at_once(sizes: list[int], seed: int) -> None:
    shares = np.random.default_rng(seed).random((3, 7))
    shares[1, :2] = 0, 1
    shares[2, 3] = np.nan
    found = independent_union(shares, np.array(sorted(sizes)))
    for i, size in enumerate(sorted(sizes)):
        expected = (1 - (1 - shares) ** size).sum(axis=1)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9)


@settings(max_examples=5)
@given(traces(min_requests=5, max_requests=6))
def test_batch_sizes_asked_together_equal_those_asked_alone(trace: tuple[Requests, int]) -> None:
    requests, num_experts = trace
    m = measured(requests, num_experts, Spec("all", max_window=2, batches=True))
    sizes = [40, *range(1, 37), 200]
    together = m.windows(sizes)
    assert together["batch_size"].unique(maintain_order=True).to_list() == sizes
    for size in (1, 2, 17, 36, 200):
        alone, rows = m.windows([size]), together.filter(batch_size=size)
        assert rows.height == alone.height
        for a, b in zip(rows.iter_rows(), alone.iter_rows(), strict=True):
            assert all(close(x, y) if isinstance(x, float) else x == y for x, y in zip(a, b, strict=True))


# Distinct requests


@given(traces(max_requests=5), st.sampled_from(["decode", "prefill", "all"]), st.sampled_from([None, "layer", "label"]))
def test_distinct_requests_equal_the_recursion(trace: tuple[Requests, int], phase: str, by: str | None) -> None:
    requests, num_experts = trace
    if not has_rows(requests, phase) or (by == "label" and all(r["label"] is None for r in requests)):
        return
    spec = Spec(phase, max_window=4, distinct_batch=4, by=by, intervals=False)
    found = measured(requests, num_experts, spec).windows([1, 2, 4], distinct=True)
    assert found["distinct"].all()
    for name in ("observed_lo", "expected_label", "expected_request", "reduction_request"):
        assert found[name].null_count() == found.height
    k = requests[0]["ids"].shape[2]
    rows = found.iter_rows(named=True)
    for key, members, layers in groups(requests, by, phase):
        alike = [{**r, "ids": np.asarray(r["ids"])[:, list(layers)]} for r in members]
        for b, t in itertools.product((1, 2, 4), range(1, 5)):
            row = next(rows)
            assert (row["batch_size"], row["window"]) == (b, t)
            if by == "label":
                assert row["label"] == (key or "(none)")
            want = None
            if any(oracle.windows(r, phase, t) for r in alike):
                want = oracle.distinct_requests_unique(alike, num_experts, window=t, batch_size=b, phase=phase)
            assert close(row["observed"], want), (row, want)
            plain = oracle.window_row(
                members, num_experts, k, window=t, batch_size=b, phase=phase, layers=layers, pool=requests
            )
            for name in ("expected_uniform", "expected_popularity", "n_windows"):
                assert close(row[name], plain[name])


def many(n: int, seed: int = 0) -> Requests:
    """Requests of 1 to 6 decode tokens, N = 6, k = 2, 2 layers."""
    rng = np.random.default_rng(seed)
    return [
        {
            "request_id": f"r{i}",
            "label": None,
            "decode_start": 0,
            "positions": None,
            "first_pos": 0,
            "ids": np.argsort(rng.random((int(rng.integers(1, 7)), 2, 6)) * rng.random(6), axis=2)[..., :2],
        }
        for i in range(n)
    ]


def distinct(requests: Requests, sizes: list[int]) -> np.ndarray:
    """``[size, T]`` for windows of 1 .. 3 tokens."""
    spec = Spec("decode", max_window=3, distinct_batch=max(sizes), intervals=False)
    found = measured([{**r, "ids": r["ids"].astype(np.uint8)} for r in requests], 6, spec).windows(sizes, distinct=True)
    return found["observed"].to_numpy().reshape(len(sizes), 3)


def test_many_requests_are_added_in_portions() -> None:
    requests, sizes = many(180), [1, 2, 7, 64, 100]
    shares = np.full((180, 3, 2, 6), np.nan)
    for i, request in enumerate(requests):
        for t, layer in itertools.product(range(1, 4), range(2)):
            q = oracle.q_observed([request], 6, "decode", layer, t)
            shares[i, t - 1, layer] = np.nan if q is None else np.array(q, float)
    for t, row in enumerate(distinct(requests, sizes).T):
        q = shares[~np.isnan(shares[:, t, 0, 0]), t]
        f = np.zeros((101, 2, 6))
        f[0] = 1
        for r, here in enumerate(q, 1):
            for b in range(min(r, 100), 0, -1):
                f[b] = (r - b) / r * f[b] + b / r * (1 - here) * f[b - 1]
        expected = [(1 - f[b]).sum(axis=1).mean() if b <= len(q) else np.nan for b in sizes]
        np.testing.assert_allclose(row, expected, rtol=1e-10)


@given(st.permutations(range(9)))
def test_the_order_of_requests_does_not_matter(order: list[int]) -> None:
    requests, sizes = many(9, seed=1), [1, 3, 9]
    np.testing.assert_allclose(distinct([requests[i] for i in order], sizes), distinct(requests, sizes), rtol=1e-12)


def test_a_batch_of_all_requests_holds_what_any_of_them_may_load() -> None:
    """With every request in the batch nothing is drawn but the windows: the expert's chance is 1 - prod(1 - q)."""
    requests = many(12, seed=2)
    q = np.array([[oracle.q_observed([r], 6, "decode", layer, 1) for layer in range(2)] for r in requests], float)
    expected = (1 - np.prod(1 - q, axis=0)).sum(axis=-1).mean()
    assert distinct(requests, [12])[0, 0] == pytest.approx(expected)


def test_distinct_batches_that_need_too_much_memory_are_refused() -> None:
    requests = frame_of(many(300))
    meta = TraceMeta(512, 8, tuple(range(60)), "test")
    spec = Spec("decode", max_window=128, distinct_batch=256, intervals=False)
    with pytest.raises(UsageError, match=r"256 distinct requests need [\d.]+ GiB") as refusal:
        DistinctBatches(meta, spec, Cells.assign(requests, spec))
    assert "--batch-size" in str(refusal.value.remedy)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests with two labels, and two too short for a window of 4."""
    path = tmp_path_factory.mktemp("batches") / "store"
    lengths = [9, 12, 7, 30, 11, 8, 10, 14, 6, 9, 13, 20, 2, 3]
    save(path, "t", lengths, labels=["maths", "prose", "maths"] * 5, prompt=1)
    return path


def test_distinct_requests_have_no_interval_and_it_is_said(store: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        frame = tk.windows(store, distinct=True, max_window=4, batch_size=[1, 12, 13])
    notes = [str(w.message) for w in caught]
    assert "batches of distinct requests have no interval" in notes
    assert (
        "batch size 13 is null for windows of 4 tokens: fewer requests have one (12, with 101 windows per layer)"
        in notes
    )
    assert not any("rough" in note for note in notes)
    null = frame.filter(pl.col("observed").is_null())
    assert sorted(null.select("batch_size", "window").rows()) == [(13, 3), (13, 4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        tk.windows(store, distinct=True, max_window=1, intervals=False)
    assert not caught


def test_one_pass_measures_batches_of_distinct_requests(store: Path) -> None:
    found = heard(lambda: tk.measure(store, max_window=3, max_lag=0, distinct_batch=8))[0]
    asked = heard(lambda: tk.windows(store, distinct=True, max_window=3, batch_size=[2, 8]))[0]
    observed = found.windows([2, 8], distinct=True)["observed"].to_list()
    assert observed == pytest.approx(asked["observed"].to_list())
    with pytest.raises(UsageError, match="batches of 9 distinct requests; expected at most 8"):
        found.windows([9], distinct=True)


def test_a_batch_of_distinct_requests_within_a_request_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="by request"):
        tk.windows(store, distinct=True, by="request")


def test_both_ways_to_draw_are_kept_apart_in_the_store(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        drawn = {d: tk.windows(store, batch_size=[1, 4], max_window=4, distinct=d) for d in (True, False)}
        assert (drawn[True]["observed"] != drawn[False]["observed"]).any()
        for d, frame in drawn.items():
            kept = tk.open(store).sql(
                f'select * from windows where "distinct" = {d} and "by" = \'trace\' and batch_size in (1, 4) '
                'and "window" <= 4 order by batch_size, "window"'
            )
            assert kept["observed"].to_list() == frame["observed"].to_list()
        chart = tk.query(store, "chart_windows", batch_size=4)
    assert (
        chart.filter(window=4)["observed"].to_list()
        == drawn[False].filter(batch_size=4, window=4)["observed"].to_list()
    )


def test_a_result_of_an_older_version_is_left_alone(tmp_path: Path) -> None:
    """It may lack a column that views read now."""
    path = tmp_path / "store"
    save(path, "t", [9] * 6, phase="decode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.windows(path)
        [result] = (path / "results").glob("windows-*")
        version = result.name.split("-")[1]
        old = result.with_name(result.name.replace(f"windows-{version}-", f"windows-{int(version) - 1}-"))
        pl.read_parquet(result).drop("distinct").write_parquet(old)
        result.unlink()
        assert tk.open(path).sql("select * from windows").is_empty()
        assert tk.query(path, "chart_windows").height == 8


# The expert ratio


@settings(max_examples=10)
@given(traces(min_requests=5, max_requests=7), st.sampled_from([None, "layer", "label"]))
def test_the_expert_ratio_equals_the_oracle(trace: tuple[Requests, int], by: str | None) -> None:
    requests, num_experts = trace
    requests = [{**r, "decode_start": 0} for r in requests]
    if all(r["label"] is None for r in requests) and by == "label":
        by = None
    k = requests[0]["ids"].shape[2]
    m = measured(requests, num_experts, Spec("decode", max_window=3, batches=True, by=by))
    rows = m.expert_ratio([1, 2]).iter_rows(named=True)
    for _, members, layers in groups(requests, by, "decode"):
        for b, t in itertools.product((1, 2), (1, 2, 3)):
            row = next(rows)

            def value(t: int, b: int = b, members: Any = members, layers: Any = layers) -> dict[str, Any]:
                return oracle.window_row(
                    members, num_experts, k, window=t, batch_size=b, phase="decode", layers=layers, pool=requests
                )

            many, single = value(t), value(1)
            assert (row["batch_size"], row["window"]) == (b, t)
            assert close(row["unique"], many["observed"])
            assert close(row["unique_single"], single["observed"])
            assert close(row["ratio"], oracle.ratio(many["observed"], single["observed"]))
            for name in ("uniform", "popularity", "request"):
                expected = oracle.ratio(many[f"expected_{name}"], single[f"expected_{name}"])
                assert close(row[f"ratio_{name}"], expected), name
            if t == 1 and row["unique"] is not None:
                assert row["ratio"] == row["ratio_uniform"] == 1
            if b == 1 and row["unique"] is not None:
                assert close(row["ratio"], row["unique"] / k)


@settings(max_examples=10)
@given(traces(min_requests=6, max_requests=7))
def test_the_interval_of_the_ratio_is_paired(trace: tuple[Requests, int]) -> None:
    requests, num_experts = trace
    # Every request has a window of 2 tokens, also of those that are left after one is left out.
    requests = [{**r, "decode_start": 0, "positions": None, "first_pos": 0} for r in requests if len(r["ids"]) > 1]
    if len(requests) < 5:
        return
    k = requests[0]["ids"].shape[2]
    m = measured(requests, num_experts, Spec("decode", max_window=2, batches=True))
    row = m.expert_ratio([2]).row(1, named=True)

    def ratio(subset: Any) -> Any:
        of = [
            oracle.window_row(subset, num_experts, k, window=t, batch_size=2, phase="decode")["observed"]
            for t in (2, 1)
        ]
        return oracle.ratio(*of)

    want = oracle.jackknife(requests, ratio)
    assert close(row["ratio_lo"], want["lo"], 1e-7)
    assert close(row["ratio_hi"], want["hi"], 1e-7)


def test_the_expert_ratio_of_a_store(store: Path) -> None:
    frame, notes = heard(lambda: tk.expert_ratio(store, max_window=4))
    assert frame["batch_size"].unique().sort().to_list() == [1, 2, 4, 8, 16, 32, 64]
    which = "batch size 16, 32, 64 is null for windows of 4 tokens"
    assert f"{which}: fewer requests have one (12, with 101 windows per layer)" in notes
    assert "batch_size" in tk.open(store).sql("select * from expert_ratio limit 0").columns
    one = frame.filter(window=1, batch_size=8).row(0, named=True)
    assert one["ratio"] == one["ratio_lo"] == one["ratio_hi"] == 1
    unlabelled = heard(lambda: tk.expert_ratio(store, max_window=2, batch_size=2, by="label"))[0]
    assert unlabelled["label"].unique().sort().to_list() == ["maths", "prose"]


# Queries and the chart


def test_the_thresholds_of_a_trace(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = tk.query(store, "full_activation")
        singles = tk.windows(store, max_window=1, batch_size=range(1, 15), distinct=True)
        popularity = tk.query(store, "popularity_by_layer")
    assert found["share"].to_list() == [0.5, 0.9, 0.95, 0.99]
    assert found["largest"].unique().to_list() == [14]
    p = popularity.sort("layer", "expert")["popularity"].to_numpy().reshape(2, 8)
    for row in found.iter_rows(named=True):
        assert row["uniform"] == full_activation(8, 2, row["share"])
        active = next(t for t in itertools.count(1) if (1 - (1 - p) ** t).mean() >= row["share"])
        assert row["popularity"] == active
        enough = singles.filter(pl.col("observed") >= row["experts"])["batch_size"].min()
        assert row["observed"] == enough
    assert found["observed"].to_list()[0] is not None


def test_an_expert_that_nobody_chooses_leaves_a_share_out_of_reach(tmp_path: Path) -> None:
    ids = np.array([[[0, 1], [2, 3]]] * 20, np.uint8)
    np.savez(tmp_path / "t.npz", expert_ids=ids, request_lens=np.full(4, 5))
    tk.ingest(tmp_path / "t.npz", tmp_path / "s", name="t", num_experts=4, phase="decode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = tk.query(tmp_path / "s", "full_activation")
    never = [(t, None, None) for t in (4, 5, 7)]
    assert found.select("uniform", "popularity", "observed").rows() == [(1, 1, 1), *never]


def test_a_mixed_batch_against_batches_of_one_label(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = tk.query(store, "batch_mix", window=2)
        of_label = tk.windows(store, by="label", batch_size=[1, 4], max_window=2).filter(window=2)
        of_all = tk.windows(store, batch_size=[1, 4], max_window=2).filter(window=2)
    for size in (1, 4):
        rows = found.filter(batch_size=size)
        labels = of_label.filter(batch_size=size).sort("label")
        assert rows["label"].to_list() == ["maths", "prose", None]
        assert rows["mixed"].unique().to_list() == of_all.filter(batch_size=size)["observed"].to_list()
        assert rows["unique"].to_list()[:2] == labels["observed"].to_list()
        weights = labels["n_windows"].to_numpy()
        mean = rows.row(-1, named=True)
        assert mean["unique"] == pytest.approx(np.average(labels["observed"].to_numpy(), weights=weights))
        assert mean["extra"] == pytest.approx(mean["mixed"] / mean["unique"] - 1)
        assert mean["covered"] == pytest.approx(1)
        assert mean["n_windows"] == weights.sum()
    # At B = 1 the windows of all labels are the windows of the trace.
    assert found.filter(pl.col("label").is_null(), batch_size=1)["extra"].item() == pytest.approx(0)
    # Only "maths" has eight requests with a window: the mean is of its windows alone.
    partly = found.filter(pl.col("label").is_null(), batch_size=8)
    assert partly["covered"].item() == found.filter(label="maths", batch_size=8)["covered"].item() < 1


def test_a_trace_without_labels_has_no_mix(tmp_path: Path) -> None:
    save(tmp_path / "store", "t", [9] * 6, phase="decode")
    with pytest.raises(UnsupportedError, match="label"):
        tk.query(tmp_path / "store", "batch_mix")


# The worked figures


def test_the_worked_batches_of_gpt_oss(shared: Path, tmp_path: Path) -> None:
    folder = shared / "traces" / "gptoss20b_subset64"
    about: dict[str, Any] = {"requests": folder / "requests.json", "label_fields": ["dataset"], "num_experts": 32}
    tk.ingest(folder / "trace.npz", tmp_path / "s", name="gptoss", phase="decode", **about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        sizes = [1, 2, 4, 8, 16, 32, 64]
        at_4 = tk.windows(tmp_path / "s", batch_size=sizes, max_window=4, distinct=True).filter(window=4)
        ratios = tk.expert_ratio(tmp_path / "s", max_window=4).filter(window=4)
        thresholds = tk.query(tmp_path / "s", "full_activation")
    expected = [9.3305, 14.8083, 20.6415, 25.2918, 28.3066, 30.1550, 31.2102]
    assert [round(value, 4) for value in at_4["observed"]] == expected
    assert at_4["expected_popularity"][0] == pytest.approx(12.1333, abs=5e-5)

    # Single tokens drawn independently are what the popularity rung draws: U(1, 4) is its 12.1333 for T = 4.
    by_size = {row["batch_size"]: row for row in ratios.iter_rows(named=True)}
    assert by_size[1]["ratio"] == pytest.approx(9.3028 / 4, abs=2e-5)
    assert by_size[4]["unique_single"] == pytest.approx(12.1333, abs=5e-5)
    assert by_size[4]["ratio"] == pytest.approx(20.5959 / 12.1333, abs=2e-5)
    assert by_size[4]["ratio_lo"] < by_size[4]["ratio"] < by_size[4]["ratio_hi"]
    # With 30 % of a step's time in the routed experts at B = 1.
    share = 0.3 * by_size[4]["unique_single"] / 4
    share /= share + 0.7
    assert share * by_size[4]["ratio"] + 1 - share == pytest.approx(1.394, abs=5e-4)

    assert thresholds["uniform"].to_list() == [6, 18, 23, 35]
    assert thresholds["observed"].to_list() == [7, 52, None, None]


@pytest.mark.parametrize("by", [[], ["--by", "layer"], ["--by", "label"]])
def test_the_verb_shows_the_expert_ratio(store: Path, by: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["expert-ratio", str(store), "--batch-size", "1,2", "--max-window", "4", *by, "-q"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(display_width(line) <= 80 for line in lines)
    frame = heard(lambda: tk.expert_ratio(store, batch_size=[1, 2], max_window=4, by=by[1] if by else None))[0]  # type: ignore[arg-type]
    shown = frame.filter(pl.col("window") == 4 if by else pl.col("window") > 1)
    body = [line for line in lines if "[" in line]
    assert len(body) == shown["ratio_lo"].count()
    assert main([*asked, "--format", "json"]) == 0
    assert [row["ratio"] for row in json.loads(capsys.readouterr().out)] == frame["ratio"].to_list()
