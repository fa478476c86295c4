"""Locality: kernels and brute force agree; closed forms; the split of a budget is the best one; queries in SQL too."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import tracekit as tk
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.layer_budgets import split
from tracekit.metrics.locality import Locality, LocalitySpec, LocalityState
from tracekit.reports.queries import query
from tracekit.reports.tables import render
from tracekit.schema import TraceMeta
from tracekit.store import Block

LENGTHS = (1, 2, 3, 5)


# --- SRP and SCH from their definitions --------------------------------------------------------


def best_f1(requests: list[dict[str, Any]], phase: str, layers: list[int], m: int) -> tuple[Fraction, Fraction] | None:
    """Every threshold tried on every pair of a segment and an expert; SRP and the experts kept by it."""
    uses: Counter[int] = Counter()
    segments = total = 0
    for request in requests:
        for window in oracle.windows(request, phase, m):
            segments += 1
            for layer in layers:
                counts = Counter(e for row in window for e in oracle.experts(request, row, layer))
                uses.update(counts.values())
                total += sum(counts.values())
    if not segments:
        return None
    found = []
    for theta in range(1, m + 1):
        kept = sum(n for c, n in uses.items() if c >= theta)
        right = sum(c * n for c, n in uses.items() if c >= theta)
        found.append((Fraction(2 * right, m * kept + total), -kept))
    best, kept = max(found)
    return best, Fraction(-kept, segments * len(layers))


def best_fixed(requests: list[dict[str, Any]], phase: str, layer: int, m: int, size: int) -> Fraction | None:
    """The uses that the best set of so many experts covers, every set tried, over all uses."""
    right = total = 0
    for request in requests:
        num_experts = 1 + max(e for token in request["ids"] for ids in token for e in ids)
        for window in oracle.windows(request, phase, m):
            counts = Counter(e for row in window for e in oracle.experts(request, row, layer))
            sets = itertools.combinations(range(num_experts), min(size, num_experts))
            right += max(sum(counts[e] for e in chosen) for chosen in sets)
            total += sum(counts.values())
    return Fraction(right, total) if total else None


def best_cache(requests: list[dict[str, Any]], phase: str, layer: int, m: int, size: int) -> Fraction | None:
    """A cache that is emptied before each run, with lists and sets."""
    hits = total = 0
    for request in requests:
        for run in oracle.segments(request, phase):
            if len(run) < m:
                continue
            cache: list[int] = []  # in the order of their last use
            for t, row in enumerate(run):
                own = [int(e) for e in request["ids"][row][layer]]
                hits += len(set(own) & set(cache))
                total += len(own)
                cache = [e for e in cache if e not in own] + own
                ahead = Counter(e for later in run[t + 1 : t + 1 + m] for e in oracle.experts(request, later, layer))
                while len(cache) > size:
                    cache.remove(min((e for e in cache if e not in own), key=lambda e: ahead[e]))
    return Fraction(hits, total) if total else None


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[dict[str, Any]], int, int]:
    """Requests of 2 layers, with holes."""
    top_k = draw(st.integers(1, 3))
    num_experts = draw(st.integers(top_k, 6))
    subset = st.permutations(range(num_experts)).map(lambda p: p[:top_k])
    requests = []
    for i in range(draw(st.integers(1, 4))):
        positions = sorted(draw(st.sets(st.integers(0, 14), min_size=1, max_size=12)))
        ids = [[draw(subset) for _ in range(2)] for _ in positions]
        start = draw(st.sampled_from([0, 4]))
        requests.append(
            {"request_id": f"r{i}", "label": None, "decode_start": start, "positions": positions, "ids": ids}
        )
    return requests, num_experts, top_k


def frame_of(requests: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "request_id": [r["request_id"] for r in requests],
            "label": pl.Series([None] * len(requests), dtype=pl.String),
            "decode_start": [r["decode_start"] for r in requests],
            "n_tokens": [len(r["ids"]) for r in requests],
            "n_decode": [sum(p >= r["decode_start"] for p in r["positions"]) for r in requests],
        }
    )


def block_of(requests: list[dict[str, Any]], numbers: list[int]) -> Block:
    """Some requests, layer by layer, a run for each stretch of positions."""
    ids, runs, row = [], [], 0
    for number in numbers:
        request = requests[number]
        where = np.array(request["positions"])
        cuts = np.flatnonzero(np.diff(where) > 1) + 1
        for layer in (0, 1):
            for rows in np.split(np.arange(len(where)), cuts):
                runs.append((row, number, layer, where[rows[0]], len(rows)))
                ids.append(np.array(request["ids"], np.uint8)[rows, layer])
                row += len(rows)
    columns = dict(zip(("row", "request", "layer", "pos", "n"), np.array(runs, np.int64).T, strict=True))
    return Block(np.ascontiguousarray(np.concatenate(ids).T), columns)


def measured(requests: list[dict[str, Any]], num_experts: int, spec: LocalitySpec) -> Locality:
    meta = TraceMeta(num_experts, len(requests[0]["ids"][0][0]), (0, 1), "test")
    blocks = [block_of(requests, [number]) for number in range(len(requests))]
    return Locality(meta, frame_of(requests), spec, blocks, 2)


@given(traces(), st.sampled_from(["decode", "all"]))
def test_locality_equals_the_brute_force(trace: tuple[list[dict[str, Any]], int, int], phase: Any) -> None:
    requests, num_experts, top_k = trace
    if not any(oracle.rows(r, phase) for r in requests):
        return
    capacities = tuple(range(top_k, num_experts + 1))
    spec = LocalitySpec(phase, max_window=5, lengths=LENGTHS, capacities=capacities, by="layer")
    by_layer = measured(requests, num_experts, spec).locality()
    assert by_layer.height == 2 * len(LENGTHS) * len(capacities)
    pooled = measured(requests, num_experts, LocalitySpec(phase, max_window=5, lengths=LENGTHS, capacities=capacities))
    for row in (*by_layer.iter_rows(named=True), *pooled.locality().iter_rows(named=True)):
        layers, m, size = [0, 1] if row["layer"] is None else [row["layer"]], row["segment"], row["capacity"]
        f1 = best_f1(requests, phase, layers, m)
        assert row["n_segments"] == sum(len(oracle.windows(r, phase, m)) for r in requests)
        assert row["srp"] == (None if f1 is None else pytest.approx(float(f1[0]), rel=1e-12))
        assert row["size_ratio"] == (None if f1 is None else pytest.approx(float(f1[1] / top_k), rel=1e-12))
        for name, brute in (("fixed_hit_rate", best_fixed), ("sch", best_cache)):
            rates = [brute(requests, phase, layer, m, size) for layer in layers]
            want = None if rates[0] is None else pytest.approx(float(sum(rates) / len(rates)), rel=1e-12)  # type: ignore[arg-type]
            assert row[name] == want, (name, row)


@given(traces())
def test_parts_merge_to_the_whole(trace: tuple[list[dict[str, Any]], int, int]) -> None:
    requests, num_experts, top_k = trace
    spec = LocalitySpec("all", max_window=5, lengths=LENGTHS, capacities=(top_k, num_experts))
    whole = measured(requests, num_experts, spec)
    meta, frame = whole.meta, frame_of(requests)
    total = LocalityState.empty(meta, spec, len(requests))
    for number in range(len(requests)):
        total.merge(Locality(meta, frame, spec, [block_of(requests, [number])], 1).state)
    for name in ("n_segments", "tokens", "uses", "filled", "hits"):
        assert (getattr(total, name) == getattr(whole.state, name)).all()


# --- closed forms ------------------------------------------------------------------------------


def save(folder: Path, ids: Any, lengths: list[int], num_experts: int, **more: Any) -> tk.Store:
    array = np.asarray(ids, np.uint8)
    np.savez(folder / "t.npz", expert_ids=array, request_lens=np.array(lengths, np.int32))
    tk.ingest(folder / "t.npz", folder / "S", name="t", num_experts=num_experts, phase="decode", axes="tlk", **more)
    return tk.open(folder / "S")


def quiet(function: Any, *args: Any, **options: Any) -> pl.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        return function(*args, **options)


def test_one_token_repeated_is_known_for_ever(tmp_path: Path) -> None:
    store = save(tmp_path, np.tile([[[1, 4], [0, 7]]], (40, 1, 1)), [40], 8)
    for row in quiet(tk.locality, store, segment=[1, 4, 16]).iter_rows(named=True):
        assert (row["srp"], row["size_ratio"], row["fixed_hit_rate"]) == (1, 1, 1)
        assert row["sch"] == pytest.approx(39 / 40)  # the first touch is a miss


def test_disjoint_sets_in_turn_are_known_as_far_as_they_fit() -> None:
    """P = 4 sets of 2 experts in turn: a segment of 4 tokens uses each of 8 experts once."""
    ids = [[[2 * (t % 4), 2 * (t % 4) + 1]] * 2 for t in range(64)]
    request = {"request_id": "r", "label": None, "decode_start": 0, "positions": range(64), "ids": ids}
    spec = LocalitySpec("decode", max_window=4, lengths=(4,), capacities=(2, 4, 6, 8))
    frame = measured([request], 8, spec).locality()
    # All 8 kept for 4 tokens: 8 of 32 are right, none is missed, so F1 is 2 * 8 / (4 * 8 + 8) = .4.
    assert frame["srp"].to_list() == pytest.approx([0.4] * 4)
    assert frame["size_ratio"].to_list() == pytest.approx([4.0] * 4)
    assert frame["fixed_hit_rate"].to_list() == pytest.approx([0.25, 0.5, 0.75, 1])
    # All experts look alike to a cache that sees 4 tokens ahead, so it is LRU: nothing until all of them fit, but at
    # the very end, where it sees that some do not come any more.
    sch = frame["sch"].to_list()
    assert sch[0] == 0
    assert max(sch[:3]) <= 4 / 64
    assert sch[3] == 60 / 64


def test_a_segment_of_one_token_is_the_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((50, 2, 16)), axis=-1)[..., :3]
    frame = quiet(tk.locality, save(tmp_path, ids, [50], 16), segment=1, cache_ratio=1)
    assert frame.select("srp", "size_ratio", "fixed_hit_rate").row(0) == (1, 1, 1)
    # With room for one token, what hits is what two tokens in a row share.
    overlap = quiet(tk.autocorr, tk.open(tmp_path / "S"), max_lag=1)["overlap"][0]
    assert frame["sch"][0] == pytest.approx(overlap * 49 / 50)


@given(st.data())
def test_more_room_and_shorter_segments_never_hurt(data: st.DataObject) -> None:
    requests, num_experts, top_k = data.draw(traces())
    capacities = tuple(range(top_k, num_experts + 1))
    spec = LocalitySpec("all", max_window=4, lengths=(1, 2, 4), capacities=capacities)
    frame = measured(requests, num_experts, spec).locality().drop_nulls("srp")
    for _, part in frame.group_by("segment"):
        assert part["fixed_hit_rate"].is_sorted()
    assert frame["fixed_hit_rate"].is_between(0, 1 + 1e-12).all()
    assert frame.filter(capacity=num_experts)["fixed_hit_rate"].to_list() == pytest.approx(
        [1.0] * frame["segment"].n_unique()
    )


# --- what the layers share ---------------------------------------------------------------------


def best_split(curve: np.ndarray, costs: list[int], total: int) -> int:
    """Every split of a small budget tried."""
    sizes, layers = curve.shape
    return max(
        sum(int(curve[n, layer]) for layer, n in enumerate(chosen))
        for chosen in itertools.product(range(sizes), repeat=layers)
        if sum(n * c for n, c in zip(chosen, costs, strict=True)) <= total
    )


@given(st.data())
def test_a_split_is_the_best_one_of_concave_curves_and_bounded_else(data: st.DataObject) -> None:
    layers, sizes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    steps = [data.draw(st.lists(st.integers(0, 9), min_size=sizes, max_size=sizes)) for _ in range(layers)]
    concave = data.draw(st.booleans())
    steps = [sorted(s, reverse=True) if concave else s for s in steps]
    curve = np.concatenate([np.full((1, layers), 5), 5 + np.cumsum(np.array(steps).T, axis=0)]).astype(np.int64)
    equal = data.draw(st.booleans())
    costs = [3] * layers if equal else [data.draw(st.integers(1, 4)) for _ in range(layers)]
    totals = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)), np.int64)
    out, bound = np.zeros((len(totals), layers), np.int64), np.zeros(len(totals))
    split(curve, np.array(costs, np.int64), totals, out, bound)
    for b, total in enumerate(totals.tolist()):
        assert (out[b] * costs).sum() <= total
        found, best = int(curve[out[b], np.arange(layers)].sum()), best_split(curve, costs, total)
        assert found <= best <= bound[b] + 1e-9
        if concave and equal:
            assert found == best
        if found == pytest.approx(bound[b], abs=1e-9):
            assert found == best


def test_the_layer_that_gains_gets_the_experts(tmp_path: Path) -> None:
    """Layer 0 repeats one token; layer 1 draws from all 8 experts: all that is left over is worth more there."""
    rng = np.random.default_rng(1)
    ids = np.stack([np.tile([2, 5], (600, 1)), np.argsort(rng.random((600, 8)), axis=-1)[:, :2]], axis=1)
    store = save(tmp_path, ids, [50] * 12, 8)
    frame = quiet(tk.layer_budgets, store, capacity=[2, 4, 5])
    experts = {
        c: part["experts"].to_list() for (c,), part in frame.filter(pl.col("layer").is_not_null()).group_by("capacity")
    }
    assert experts == {2.0: [2, 2], 4.0: [2, 6], 5.0: [2, 8]}
    over_all = frame.filter(pl.col("layer").is_null())
    assert over_all["total"].to_list() == [4, 8, 10]
    assert over_all["gain"].to_list()[0] == 0
    assert (over_all["gain"][1:] > 0.04).all()
    assert (over_all["gain_lo"][1:] > 0).all()
    # Everybody's split is the same here, so it hits of others what it hits of those it was learned from.
    assert over_all["hit_rate"].to_list() == pytest.approx(over_all["hit_rate_learned"].to_list())
    reuse = quiet(tk.reuse, store, by="layer").filter(layer=1, capacity=6)["hit_rate"][0]
    assert frame.filter(layer=1, capacity=4.0)["hit_rate_learned"][0] == pytest.approx(reuse)
    text = render(frame, layout="layer_budgets")
    assert "experts of each layer" in str(text)
    # The same budget in bytes and as a share.
    same = quiet(tk.layer_budgets, store, capacity=0.5, unit="share")
    in_bytes = quiet(tk.layer_budgets, store, capacity=8000, unit="bytes", expert_bytes=1000)
    for other in (same, in_bytes):
        assert_frame_equal(
            other.select("layer", "experts", "hit_rate", "uniform", "gain"),
            frame.filter(capacity=4.0).select("layer", "experts", "hit_rate", "uniform", "gain"),
        )


def test_a_split_of_one_request_is_learned_but_not_judged(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    store = save(tmp_path, np.argsort(rng.random((60, 2, 8)), axis=-1)[..., :2], [60], 8)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        frame = tk.layer_budgets(store, capacity=4)
    assert any("no other request to judge a split by" in str(note.message) for note in notes)
    assert frame["hit_rate"].null_count() == frame["gain"].null_count() == frame.height
    assert frame["hit_rate_learned"].null_count() == frame["uniform"].null_count() == 0
    assert "–" in str(render(frame, layout="layer_budgets"))


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    store = save(tmp_path, np.tile([[[1, 4]]], (12, 1, 1)), [12], 8)
    for options in (
        {"segment": 0},
        {"segment": [4, -1]},
        {"cache_ratio": 0.5},
        {"cache_ratio": [1, 5]},
        {"cache_ratio": []},
    ):
        with pytest.raises(UsageError):
            quiet(tk.locality, store, **options)
    with pytest.raises(UnsupportedError, match="no request has 13"):
        quiet(tk.locality, store, segment=13)
    assert set(quiet(tk.locality, store)["segment"]) == {12}  # 16 by default, or what there is
    for options in (
        {"capacity": 1},
        {"capacity": 9},
        {"capacity": 10, "unit": "bytes", "expert_bytes": 100},
        {"unit": "share"},
    ):
        with pytest.raises(UsageError):
            quiet(tk.layer_budgets, store, **options)
    with pytest.raises(UnsupportedError, match="how large its experts are"):
        quiet(tk.layer_budgets, store, capacity=1000, unit="bytes")


# --- real traces -------------------------------------------------------------------------------


def test_gpt_oss_is_local(shared: Path, tmp_path: Path) -> None:
    """Bounds that hold by definition, and SRP(16) as a brute force on some of the requests has it."""
    with np.load(shared / "traces" / "gptoss20b_subset64" / "trace.npz") as trace:
        lengths = trace["request_lens"][:8].tolist()
        ids = trace["expert_ids"][: sum(lengths), :3]
    store = save(tmp_path, ids, lengths, 32)
    frame = quiet(tk.locality, store, segment=16, cache_ratio=[1, 2, 4])
    requests = [
        {"decode_start": 0, "ids": part.tolist(), "first_pos": 0} for part in np.split(ids, np.cumsum(lengths)[:-1])
    ]
    expected = best_f1(requests, "decode", [0, 1, 2], 16)
    assert expected is not None
    assert frame["srp"][0] == pytest.approx(float(expected[0]))
    # A cache that sees 16 tokens ahead is between LRU, which sees none, and Belady, which sees all.
    for size in (8, 16):
        rates = dict(
            quiet(tk.cache, store, policy=["lru", "belady"], capacity=size).select("policy", "hit_rate").rows()
        )
        assert rates["lru"] < frame.filter(capacity=size)["sch"][0] <= rates["belady"]


# --- the queries -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[tk.Store, np.ndarray, list[int]]:
    """Seven requests of 3 layers, N = 10, k = 3, in router order, with two labels."""
    rng = np.random.default_rng(5)
    lengths = [9, 14, 5, 11, 8, 1, 12]
    taste = rng.random((2, 1, 3, 10))
    ids = np.concatenate(
        [np.argsort(rng.random((n, 3, 10)) + taste[i % 2], axis=-1)[..., :3] for i, n in enumerate(lengths)]
    )
    labels = [{"request_id": str(i), "topic": "ab"[i % 2]} for i in range(7)]
    folder = tmp_path_factory.mktemp("labelled")
    store = save(folder, ids, lengths, 10, requests=labels, label_fields=["topic"], router_order=True)
    return store, ids, lengths


def pairs_of(ids: np.ndarray, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [(part[t], part[t + 1]) for part in parts for t in range(len(part) - 1)]


def test_the_reuse_distance_counts_tokens(labelled: Any) -> None:
    store, ids, lengths = labelled
    found: Counter[int] = Counter()
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        for layer in range(3):
            last: dict[int, int] = {}
            for t, token in enumerate(part[:, layer].tolist()):
                found.update(t - last[e] for e in token if e in last)
                last |= dict.fromkeys(token, t)
    frame = quiet(query, store, "reuse_distance")
    assert dict(frame.filter(pl.col("uses") > 0).select("distance", "uses").rows()) == found
    assert frame["within"][-1] == pytest.approx(sum(found.values()) / ids.size)
    assert quiet(query, store, "reuse_distance", max_distance=3)["distance"].to_list() == [1, 2, 3]
    overlap = quiet(query, store, "adjacent_overlap")["overlap"].mean()
    pairs = len(pairs_of(ids, lengths))
    assert frame["share"][0] == pytest.approx(overlap * pairs / len(ids))


def test_adjacent_overlap_is_the_overlap_at_lag_1(labelled: Any) -> None:
    store, ids, lengths = labelled
    frame = quiet(query, store, "adjacent_overlap")
    kernel = quiet(tk.autocorr, store, max_lag=1, by="layer").sort("layer")
    for name in ("n_pairs", "overlap", "any_shared", "expected_uniform", "expected_popularity"):
        assert frame[name].to_list() == pytest.approx(kernel[name].to_list()), name
    same = [np.mean([set(a[la]) == set(b[la]) for a, b in pairs_of(ids, lengths)]) for la in range(3)]
    assert frame["all_shared"].to_list() == pytest.approx(same)


def test_recall_of_the_previous_token(labelled: Any) -> None:
    store, ids, lengths = labelled
    frame = quiet(query, store, "recall_of_previous_token")
    assert frame.height == 9
    for row in frame.iter_rows(named=True):
        both = [(a[row["layer"]], b[row["layer"]]) for a, b in pairs_of(ids, lengths)]
        m, right = row["m"], [len(set(a[: row["m"]]) & set(b)) for a, b in both]
        assert (row["recall"], row["precision"]) == pytest.approx((np.mean(right) / 3, np.mean(right) / m))
        assert row["first_found"] == pytest.approx(np.mean([b[0] in a[:m] for a, b in both]))
        assert row["n_pairs"] == len(both)


def test_the_working_set_is_the_windows_curve(labelled: Any) -> None:
    store, _, _ = labelled
    frame = quiet(query, store, "working_set", max_window=5)
    kernel = quiet(tk.windows, store, max_window=5)
    mean = frame.filter(pl.col("layer").is_null())
    assert mean["unique"].to_list() == kernel["observed"].to_list()
    overlap = quiet(tk.autocorr, store, max_lag=1)["overlap"][0]
    assert mean["miss_rate"][0] == pytest.approx(1 - overlap)  # U(2) = k (2 - overlap)
    assert mean["miss_rate"][-1] is None
    assert frame.filter(layer=2, window=1)["share"][0] == pytest.approx(0.3)
    assert frame.height == 4 * 5


def test_pairs_transitions_and_information(labelled: Any) -> None:
    store, ids, _ = labelled
    n = len(ids)
    chosen = np.zeros((n, 3, 10), int)
    np.put_along_axis(chosen, ids, 1, axis=-1)
    counts = chosen.sum(axis=0)
    frame = quiet(query, store, "co_activation", top=100)
    for row in frame.iter_rows(named=True):
        la, i, j = row["layer"], row["expert"], row["other"]
        both = int((chosen[:, la, i] & chosen[:, la, j]).sum())
        want = (both, both / counts[la, i], both / counts[la, j], both * n / counts[la, i] / counts[la, j])
        assert tuple(row[c] for c in ("tokens", "given_expert", "given_other", "lift")) == pytest.approx(want)
    assert frame["tokens"].sum() == 3 * 3 * n  # each token chooses 3 pairs at each of 3 layers
    beyond = frame.with_columns(beyond=pl.col("tokens") * (1 - 1 / pl.col("lift"))).sort("layer", "rank")
    assert all(part["beyond"].round(9).is_sorted(descending=True) for _, part in beyond.group_by("layer"))
    assert quiet(query, store, "co_activation")["rank"].max() == 5

    frame = quiet(query, store, "layer_transitions", top=10)
    for row in frame.iter_rows(named=True):
        la, i, j = row["layer"], row["expert"], row["next_expert"]
        both = int((chosen[:, la, i] & chosen[:, la + 1, j]).sum())
        assert (row["next_layer"], row["tokens"]) == (la + 1, both)
        assert row["probability"] == pytest.approx(both / counts[la, i])
        assert row["lift"] == pytest.approx(both / counts[la, i] * n / counts[la + 1, j])
    assert frame["tokens"].sum() == 2 * 9 * n

    frame = quiet(query, store, "layer_information")
    for row in frame.iter_rows(named=True):
        joint = np.einsum("ti,tj->ij", chosen[:, row["layer"]], chosen[:, row["layer"] + 1]) / (9 * n)
        p, q = joint.sum(axis=1), joint.sum(axis=0)
        there = joint > 0
        information = (joint[there] * np.log(joint[there] / np.outer(p, q)[there])).sum()
        assert row["information"] == pytest.approx(information)
        assert row["entropy_next"] == pytest.approx(-(q[q > 0] * np.log(q[q > 0])).sum())
        assert row["bias"] == pytest.approx((np.sum(p > 0) - 1) * (np.sum(q > 0) - 1) / 2 / n)


def test_information_of_a_copied_layer_is_its_entropy_but_for_the_draw(tmp_path: Path) -> None:
    """With k = 1 the next layer's expert is known: all of its entropy is explained."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, 6, (80, 1, 1))
    row = quiet(query, save(tmp_path, np.concatenate([first, 5 - first], axis=1), [80], 6), "layer_information").row(
        0, named=True
    )
    assert row["explained"] == pytest.approx(1)
    assert row["information"] == pytest.approx(row["entropy_next"])


def test_balancedness_and_specialisation(labelled: Any) -> None:
    store, ids, lengths = labelled
    frame = quiet(query, store, "balancedness", devices=3)
    for row in frame.iter_rows(named=True):
        loads = np.bincount(ids[:, row["layer"]].reshape(-1) * 3 // 10, minlength=3)
        assert row["balancedness"] == pytest.approx(loads.mean() / loads.max())
        assert (row["busiest"], row["busiest_share"]) == (loads.argmax(), pytest.approx(loads.max() / loads.sum()))
    assert set(quiet(query, store, "balancedness", devices=99)["devices"]) == {10}

    frame = quiet(query, store, "specialisation", top=10)
    label = np.repeat(["ab"[i % 2] for i in range(7)], lengths)
    for row in frame.iter_rows(named=True):
        here = (ids[:, row["layer"]] == row["expert"]).any(axis=1)
        mine = label == row["label"]
        assert row["tokens"] == (here & mine).sum()
        assert (row["share"], row["popularity"]) == pytest.approx((here[mine].mean(), here.mean()))
        assert row["lift"] == pytest.approx(here[mine].mean() / here.mean())
    assert quiet(query, store, "specialisation")["rank"].max() == 3
