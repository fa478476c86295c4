"""The oracle itself: against closed forms, against enumeration, against hand-worked numbers and published ones."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

F = Fraction


def hand() -> list[dict[str, Any]]:
    """The trace of sample_traces/hand, written out."""
    a = [[[0, 1], [0, 1]], [[1, 0], [3, 2]], [[0, 2], [0, 1]], [[3, 2], [3, 2]]]
    b = [[[1, 3], [0, 2]], [[1, 3], [2, 1]]]
    return [
        {"request_id": "a", "label": "code", "decode_start": 0, "ids": a},
        {"request_id": "b", "label": "prose", "decode_start": 0, "ids": b},
    ]


@st.composite
def traces(draw: st.DrawFn, min_requests: int = 1, max_requests: int = 4, max_tokens: int = 7) -> Any:
    """A small trace with prompts, holes and unequal lengths: ``(requests, N, k)``."""
    k = draw(st.integers(1, 3))
    N = draw(st.integers(k, 7))
    layers = draw(st.integers(1, 2))
    row = st.permutations(range(N)).map(lambda p: p[:k])
    requests = []
    for i in range(draw(st.integers(min_requests, max_requests))):
        tokens = draw(st.integers(1, max_tokens))
        gaps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 3]), min_size=tokens, max_size=tokens))
        positions = list(np.cumsum(gaps))
        requests.append(
            {
                "request_id": str(i),
                "label": draw(st.sampled_from("xy")),
                "positions": positions,
                "decode_start": draw(st.integers(0, 3)),
                "ids": [[draw(row) for _ in range(layers)] for _ in range(tokens)],
            }
        )
    return requests, N, k


# --- hand-worked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "n", "observed", "ladder"),
    [
        # uniform, popularity, label, request
        (1, 6, F(2), [F(2), F(2), F(2), F(2)]),
        (2, 4, F(25, 8), [F(10, 3), F(53, 18), F(177, 64), F(49, 16)]),
        (3, 2, F(15, 4), [F(38, 9), F(41, 12), F(109, 32), F(31, 8)]),
        (4, 1, F(4), [F(130, 27), F(2375, 648), F(935, 256), F(4)]),
    ],
)
def test_hand_windows(window: int, n: int, observed: F, ladder: list[F]) -> None:
    row = oracle.window_row(hand(), 6, 2, window=window)
    assert (row["n_windows"], row["observed"]) == (n, observed)
    assert [row[f"expected_{b}"] for b in ("uniform", "popularity", "label", "request")] == ladder
    assert row["reduction_popularity"] == 1 - observed / ladder[1]


def test_hand_overlaps() -> None:
    rows = [oracle.autocorr_row(hand(), 6, 2, lag=d) for d in (1, 2, 3, 4)]
    assert [r["n_pairs"] for r in rows] == [4, 2, 1, 0]
    assert [r["overlap"] for r in rows] == [F(7, 16), F(5, 8), F(0), None]
    assert [r["jaccard"] for r in rows[:3]] == [F(3, 8), F(7, 12), F(0)]
    assert [r["any_shared"] for r in rows[:3]] == [F(5, 8), F(3, 4), F(0)]
    assert [r["rank0_repeat"] for r in rows[:3]] == [F(1, 8), F(3, 4), F(0)]
    assert [r["expected_request"] for r in rows[:3]] == [F(15, 32), F(3, 8), F(3, 8)]
    assert rows[0]["expected_popularity"] == F(19, 36)
    assert rows[0]["rho"] == F(-13, 68)


def test_hand_by_layer() -> None:
    by_layer = {
        key: oracle.window_row(rs, 6, 2, window=2, layers=ls, pool=hand())
        for key, rs, ls in oracle.grouped(hand(), "layer")
    }
    assert {key: row["observed"] for key, row in by_layer.items()} == {0: F(5, 2), 1: F(15, 4)}


def test_hand_load() -> None:
    for row in oracle.load_rows(hand(), 6, 2):  # both layers have the counts 2, 3, 3, 4 and two dead experts
        assert row["max_over_mean"] == 2
        assert row["gini"] == F(5, 12)
        assert row["dead_experts"] == 2
        assert row["top_share"] == F(7, 12)
        assert row["sum_p2_over_k"] == F(19, 36)
        assert row["cv"] == pytest.approx(math.sqrt(7 / 3) / 2)


# --- windows and segments ----------------------------------------------------------------------


def test_windows_stay_inside_phase_and_holes() -> None:
    request = {"positions": [3, 4, 5, 6, 8, 9], "decode_start": 5, "ids": [[[0]]] * 6}
    assert oracle.segments(request, "prefill") == [[0, 1]]
    assert oracle.segments(request, "decode") == [[2, 3], [4, 5]]
    assert oracle.segments(request, "all") == [[0, 1], [2, 3], [4, 5]]
    assert oracle.windows(request, "decode", 2) == [[2, 3], [4, 5]]
    assert oracle.pairs(request, "decode", 1) == [(2, 3), (4, 5)]
    assert oracle.windows(request, "decode", 3) == []


def test_non_overlapping_windows_drop_the_tail() -> None:
    request = {"first_pos": 4, "decode_start": 4, "ids": [[[0]]] * 7}
    assert oracle.windows(request, "decode", 3, overlapping=False) == [[0, 1, 2], [3, 4, 5]]


def test_unknown_phase_has_no_decode() -> None:
    request = {"first_pos": 0, "decode_start": None, "ids": [[[0]]] * 3}
    assert oracle.rows(request, "decode") == []
    assert oracle.segments(request, "all") == [[0, 1, 2]]
    assert oracle.default_phase([request]) == "all"


# --- identities --------------------------------------------------------------------------------


@given(traces())
def test_two_token_identity_and_bounds(trace: Any) -> None:
    requests, N, k = trace
    two = oracle.window_row(requests, N, k, window=2)
    lag = oracle.autocorr_row(requests, N, k, lag=1)
    if two["observed"] is None:
        assert lag["overlap"] is None
        return
    for unique, overlap in (("observed", "overlap"), *((f"expected_{b}",) * 2 for b in ("popularity", "request"))):
        assert two[unique] == k * (2 - lag[overlap])
    for T in range(1, 5):
        row = oracle.window_row(requests, N, k, window=T)
        if row["observed"] is not None:
            assert k <= row["observed"] <= min(N, T * k)
            assert row["expected_uniform"] >= row["expected_popularity"]


@given(traces(max_requests=1))
def test_union_grows_with_the_window_inside_one_segment(trace: Any) -> None:
    requests, N, k = trace
    requests[0]["positions"] = None
    requests[0]["decode_start"] = 0
    sizes = [oracle.window_row(requests, N, k, window=T)["observed"] for T in range(1, len(requests[0]["ids"]) + 1)]
    assert sizes == sorted(sizes)


@given(traces(min_requests=2, max_requests=3, max_tokens=4), st.integers(1, 2), st.integers(2, 3))
def test_batch_formulas_equal_enumeration(trace: Any, window: int, batch: int) -> None:
    requests, N, k = trace
    requests = [r for r in requests if oracle.windows(r, "decode", window)]
    if len(requests) < batch:
        return
    row = oracle.window_row(requests, N, k, window=window, batch_size=batch)
    assert row["observed"] == oracle.enumerate_batches(requests, window=window, batch_size=batch)
    distinct = oracle.distinct_requests_unique(requests, N, window=window, batch_size=batch)
    assert distinct == oracle.enumerate_batches(requests, window=window, batch_size=batch, distinct=True)


def test_request_rung_is_the_mean_over_all_shuffles() -> None:
    request = {"request_id": "a", "label": None, "decode_start": 0, "ids": [[[0, 1]], [[0, 2]], [[3, 4]], [[0, 4]]]}
    unions = []
    overlaps = []
    for order in permutations(request["ids"]):
        shuffled = [{**request, "ids": list(order)}]
        unions.append(oracle.window_row(shuffled, 5, 2, window=3)["observed"])
        overlaps.append(oracle.autocorr_row(shuffled, 5, 2, lag=1)["overlap"])
    assert oracle.window_row([request], 5, 2, window=3)["expected_request"] == oracle.mean(unions)
    assert oracle.autocorr_row([request], 5, 2, lag=1)["expected_request"] == oracle.mean(overlaps)


def test_uniform_rung_is_the_mean_over_all_subsets() -> None:
    every = [set(s) for s in combinations(range(5), 2)]
    pairs = [len(a | b) for a in every for b in every]
    row = oracle.window_row([{**hand()[0], "ids": [[[0, 1]]] * 2}], 5, 2, window=2)
    assert row["expected_uniform"] == F(sum(pairs), len(pairs))


def test_undefined_rows() -> None:
    row = oracle.window_row(hand(), 6, 2, window=5)
    assert (row["n_windows"], row["observed"], row["reduction_uniform"]) == (0, None, None)
    assert oracle.window_row(hand(), 6, 2, window=2, batch_size=3)["observed"] is None
    assert (
        oracle.window_row(hand(), 6, 2, window=3, batch_size=2)["observed"] is None
    )  # only one request is long enough
    unlabelled = [{**r, "label": None} for r in hand()]
    assert oracle.window_row(unlabelled, 6, 2, window=2)["expected_label"] is None
    assert oracle.autocorr_row(hand(), 6, 2, lag=1, router_order=False)["rank0_repeat"] is None


def test_groups_keep_the_traces_popularity() -> None:
    rows = {
        by: [oracle.window_row(rs, 6, 2, window=2, layers=ls, pool=hand()) for _, rs, ls in oracle.grouped(hand(), by)]
        for by in ("label", "request")
    }
    for by in ("label", "request"):
        assert [r["expected_popularity"] for r in rows[by]] == [F(53, 18)] * 2
        assert [r["n_windows"] for r in rows[by]] == [3, 1]
        assert sum(r["n_windows"] * r["observed"] for r in rows[by]) / 4 == F(25, 8)


# --- closed forms ------------------------------------------------------------------------------


def test_repeat_and_cycle() -> None:
    repeat = [{"request_id": "r", "label": None, "decode_start": 0, "ids": [[[4, 1]]] * 9}]
    cycle = [
        {
            "request_id": "c",
            "label": None,
            "decode_start": 0,
            "ids": [[[2 * (t % 3), 2 * (t % 3) + 1]] for t in range(9)],
        }
    ]
    for T in range(1, 6):
        assert oracle.window_row(repeat, 7, 2, window=T)["observed"] == 2
        assert oracle.window_row(cycle, 7, 2, window=T)["observed"] == 2 * min(T, 3)
    for d in range(1, 7):
        assert oracle.autocorr_row(repeat, 7, 2, lag=d)["overlap"] == 1
        assert oracle.autocorr_row(cycle, 7, 2, lag=d)["overlap"] == (1 if d % 3 == 0 else 0)


# --- uncertainty and attribution ---------------------------------------------------------------


@pytest.mark.parametrize(("df", "t"), [(4, 2.7764451), (9, 2.2621572), (63, 1.9983405), (199, 1.9719565)])
def test_student_quantile(df: int, t: float) -> None:
    assert oracle._t975(df) == pytest.approx(t, abs=1e-6)


def test_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    requests = [{"value": v} for v in values]
    interval = oracle.jackknife(requests, lambda rs: sum(r["value"] for r in rs) / len(rs))
    assert interval is not None
    se = float(np.std(values, ddof=1)) / math.sqrt(5)
    assert interval["se"] == pytest.approx(se)
    assert interval["bias"] == pytest.approx(0)
    assert interval["lo"] == pytest.approx(4 - 2.7764451 * se, abs=1e-6)
    assert oracle.jackknife(requests[:4], lambda rs: 1.0) is None


def test_jackknife_removes_the_bias_of_a_plug_in_variance() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 0.5]
    interval = oracle.jackknife([{"value": v} for v in values], lambda rs: float(np.var([r["value"] for r in rs])))
    assert interval is not None
    assert interval["theta_bc"] == pytest.approx(float(np.var(values, ddof=1)))


def test_attribution_telescopes() -> None:
    rng = np.random.default_rng(5)
    requests = []
    for i in range(8):
        favourites = rng.permutation(8)[:4]
        ids = [[sorted(rng.permutation(favourites)[:2].tolist())] for _ in range(12)]
        requests.append({"request_id": str(i), "label": "xy"[i % 2], "decode_start": 0, "ids": ids})
    rows = oracle.attribution(requests, 8, 2, window=3)
    full = oracle.ladder(requests, 8, 2, 3)
    assert [r["cause"] for r in rows] == list(oracle.CAUSES)
    assert sum(r["drop"] for r in rows) == full["uniform"] - full["observed"]  # type: ignore[operator]
    assert sum(r["share"] for r in rows if r["share"] is not None) == pytest.approx(1)
    for before, after in pairwise(rows):
        assert before["unique_after"] == after["unique_before"]


# --- published numbers -------------------------------------------------------------------------


@cache
def gptoss(folder: Path) -> list[dict[str, Any]]:
    with np.load(folder / "trace.npz") as archive:
        ids, lens = archive["expert_ids"], archive["request_lens"]
    entries = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    parts = np.split(ids, np.cumsum(lens)[:-1])
    return [
        {"request_id": str(i), "label": entry["dataset"], "decode_start": 0, "ids": part}
        for i, (entry, part) in enumerate(zip(entries, parts, strict=True))
    ]


def one_hot(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (ids[..., None] == np.arange(32)).any(axis=2)  # [tokens, layers, N]


def window_hits(requests: Sequence[dict[str, Any]], window: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Windows that contain each expert ``[requests, layers, N]``, and windows ``[requests]``."""
    hits, n = [], []
    for r in requests:
        hot = one_hot(r["ids"])
        starts = len(hot) - window + 1
        union = np.logical_or.reduce([hot[i : i + starts] for i in range(window)])
        hits.append(union.sum(axis=0))
        n.append(starts)
    return np.array(hits), np.array(n)


def test_gptoss_published_windows(shared: Path) -> None:
    requests = gptoss(shared / "traces" / "gptoss20b_subset64")
    hits, n = window_hits(requests, 4)
    q = hits.sum(axis=0) / n.sum()
    unions = [float((1 - (1 - q) ** B).sum(axis=-1).mean()) for B in (1, 2, 4, 8, 16, 32, 64)]
    assert unions == pytest.approx([9.3028, 14.7748, 20.5959, 25.2105, 28.1778, 29.9856, 31.0305], abs=6e-5)
    uniform = [32 * (1 - (7 / 8) ** (4 * B)) for B in (1, 2, 4, 8, 16, 32, 64)]
    reductions = [1 - u / v for u, v in zip(unions, uniform, strict=True)]
    assert reductions == pytest.approx([0.297, 0.297, 0.270, 0.201, 0.119, 0.063, 0.030], abs=6e-4)

    absent = 1 - hits / n[:, None, None]
    f = [np.ones(absent.shape[1:])] + [np.zeros(absent.shape[1:]) for _ in range(64)]
    for r in range(1, 65):
        for b in range(r, 0, -1):
            f[b] = (r - b) / r * f[b] + b / r * absent[r - 1] * f[b - 1]
    distinct = [float((1 - f[B]).sum(axis=-1).mean()) for B in (1, 2, 4, 8, 16, 32, 64)]
    assert distinct == pytest.approx([9.3305, 14.8083, 20.6415, 25.2918, 28.3066, 30.1550, 31.2102], abs=6e-5)

    # The oracle, exact and slow, on one layer and a few requests, by the same formulas.
    few = [{**r, "ids": r["ids"][:40, :1]} for r in requests[:5]]
    hits, n = window_hits(few, 4)
    assert float(oracle.window_row(few, 32, 4, window=4)["observed"]) == pytest.approx(hits.sum() / n.sum())


def test_gptoss_published_ladder_overlaps_and_interval(shared: Path) -> None:
    requests = gptoss(shared / "traces" / "gptoss20b_subset64")
    # Exact on one layer; the trace's figures are means over 24 such layers.
    per_layer: list[list[float]] = []
    labels = sorted({r["label"] for r in requests})
    hot = [one_hot(r["ids"]) for r in requests]
    counts = np.array([h.sum(axis=0) for h in hot])
    n = np.array([len(h) for h in hot])
    w = n - 3
    for layer in range(24):
        c = counts[:, layer]
        popularity = np.sum(1 - (1 - c.sum(axis=0) / n.sum()) ** 4)
        label = 0.0
        for name in labels:
            mine = [i for i, r in enumerate(requests) if r["label"] == name]
            label += w[mine].sum() * np.sum(1 - (1 - c[mine].sum(axis=0) / n[mine].sum()) ** 4)
        request = sum(
            w[i] * (1 - math.comb(int(n[i] - v), 4) / math.comb(int(n[i]), 4)) for i in range(64) for v in c[i]
        )
        per_layer.append([popularity, label / w.sum(), request / w.sum()])
    assert np.mean(per_layer, axis=0) == pytest.approx([12.1333, 11.7213, 10.3467], abs=6e-5)

    overlaps = []
    for d in (1, 2, 3, 4, 8, 16, 32):
        shared_experts = sum(int((h[d:] & h[:-d]).sum()) for h in hot)
        overlaps.append(shared_experts / (4 * 24 * sum(len(h) - d for h in hot)))
    assert overlaps == pytest.approx([0.4402, 0.3838, 0.3772, 0.3709, 0.3580, 0.3443, 0.3377], abs=6e-5)

    # The oracle on one whole layer, all requests.
    one = [{**r, "ids": r["ids"][:, :1].tolist()} for r in requests]
    row = oracle.window_row(one, 32, 4, window=4)
    exact = [float(row[f"expected_{b}"]) for b in ("popularity", "label", "request")]
    assert exact == pytest.approx(per_layer[0])
    assert float(row["expected_uniform"]) == pytest.approx(13.2422, abs=6e-5)
    assert float(oracle.autocorr_row(one, 32, 4, lag=1)["overlap"]) == pytest.approx(
        sum(int((h[1:, 0] & h[:-1, 0]).sum()) for h in hot) / (4 * sum(len(h) - 1 for h in hot))
    )

    hits, windows = window_hits(requests, 4)
    unions = hits.sum(axis=(1, 2)) / 24
    interval = oracle.jackknife(
        [{"unions": u, "windows": v} for u, v in zip(unions, windows, strict=True)],
        lambda rs: 1 - sum(r["unions"] for r in rs) / sum(r["windows"] for r in rs) / 13.2421875,
    )
    assert interval is not None
    assert (interval["lo"], interval["hi"]) == pytest.approx((0.290, 0.305), abs=6e-4)
    assert interval["theta"] == pytest.approx(0.2975, abs=6e-5)


def test_olmoe_reference_load(shared: Path) -> None:
    data = json.loads((shared / "traces" / "olmoe_counts" / "counts.json").read_text(encoding="utf-8"))
    rows = [oracle.load_row(Counter(dict(enumerate(c))), sum(c) // 8, 64, 8) for c in data["olmoe/c4"]]
    for name, expected in {
        "max_over_mean": [3.017, 2.658, 2.499],
        "cv": [0.324, 0.402, 0.512],
        "gini": [0.137, 0.212, 0.288],
        "entropy_norm": [0.9897, 0.9817, 0.9683],
        "sum_p2_over_k": [0.1381, 0.1452, 0.1578],
    }.items():
        digits = 6e-5 if name in ("entropy_norm", "sum_p2_over_k") else 6e-4
        assert [float(r[name]) for r in rows] == pytest.approx(expected, abs=digits)
