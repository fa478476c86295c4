"""Prefetch predictors: by hand, by brute force, against published figures; what is learned never judges itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import StoreError, TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.prefetch import Prefetch, PrefetchSpec
from tracekit.reports import charts
from tracekit.reports.queries import query
from tracekit.reports.tables import render
from tracekit.schema import TraceMeta
from tracekit.store import Block

# Traces of few requests have no intervals, or rough ones, and none here supports every predictor.
pytestmark = pytest.mark.filterwarnings("ignore::tracekit.TracekitWarning")

F = np.float32
FIGURES = ("n", "recall", "precision", "exact", "weight_covered", "rank_match")
TABLES = ("hot_list", "transition", "token_id", "token_id+transition")

Trace = list[dict[str, Any]]


def frame_of(requests: Trace) -> pl.DataFrame:
    decode = [sum(p >= r["decode_start"] for p in oracle.positions(r)) for r in requests]
    return pl.DataFrame(
        {
            "request_id": [r["request_id"] for r in requests],
            "label": pl.Series([None] * len(requests), dtype=pl.String),
            "decode_start": [r["decode_start"] for r in requests],
            "n_tokens": [len(r["ids"]) for r in requests],
            "n_decode": decode,
        }
    )


def blocks_of(requests: Trace, a_block: int) -> list[Block]:
    """Return the routing layer by layer: blocks of some layers of one request, or with 0 one block of everything."""
    layers, k = len(requests[0]["ids"][0]), len(requests[0]["ids"][0][0])
    parts = [(i, range(layers)) for i in range(len(requests))]
    if a_block:
        parts = [(i, range(low, min(low + a_block, layers))) for i, _ in parts for low in range(0, layers, a_block)]
    blocks = []
    for group in [parts] if not a_block else [[part] for part in parts]:
        ids, weights, runs, row = [], [], [], 0
        for i, some in group:
            where = oracle.positions(requests[i])
            starts = [j for j, p in enumerate(where) if j == 0 or p != where[j - 1] + 1] + [len(where)]
            for layer in some:
                for begin, end in pairwise(starts):
                    runs.append((row, i, layer, where[begin], end - begin))
                    row += end - begin
                ids.append(np.array(requests[i]["ids"], np.uint8)[:, layer])
                weights.append(np.array(requests[i]["weights"], np.float32)[:, layer])
        columns = dict(zip(("row", "request", "layer", "pos", "n"), np.array(runs, np.int64).T, strict=True))
        of_rank = [np.ascontiguousarray(np.concatenate(a).T.reshape(k, -1)) for a in (ids, weights)]
        blocks.append(Block(of_rank[0], columns, of_rank[1]))
    return blocks


def tokens_of(requests: Trace) -> pl.DataFrame:
    rows = [
        (i, pos, token)
        for i, r in enumerate(requests)
        for pos, token in zip(oracle.positions(r), r["token_ids"], strict=True)
    ]
    schema = {"request": pl.UInt32, "pos": pl.UInt32, "token_id": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def predictions_of(requests: Trace) -> Iterator[pl.DataFrame]:
    """Yield what was recorded, a request a frame: rows by layer and position."""
    for i, r in enumerate(requests):
        rows = []
        where = oracle.positions(r)
        for (t, layer), named in sorted(r["recorded"].items(), key=lambda item: (item[0][1], item[0][0])):
            rows.append((i, "gate", 1, layer, where[t], *named))
        if rows:
            named = [f"p{rank}" for rank in range(len(rows[0]) - 5)]
            yield pl.DataFrame(rows, schema=["request", "predictor", "distance", "layer", "pos", *named], orient="row")


def measured(requests: Trace, num_experts: int, *, a_block: int = 0, **spec: Any) -> pl.DataFrame:
    k, layers = len(requests[0]["ids"][0][0]), len(requests[0]["ids"][0])
    meta = TraceMeta(num_experts, k, tuple(range(layers)), "test", router_order=True)
    fixed = {"intervals": False, "by": "layer", "weights": True}
    made = PrefetchSpec(**fixed | spec)
    tokens, held = tokens_of(requests), predictions_of(requests)
    blocks = lambda: iter(blocks_of(requests, a_block))  # noqa: E731
    return Prefetch(meta, frame_of(requests), made, blocks, 2, tokens, held).prefetch()


def shares(values: Sequence[float]) -> list[float] | None:
    return [v / sum(values) for v in values] if min(values) >= 0 and sum(values) > 0 else None


def named_by(
    requests: Trace, phase: str, name: str, distance: int, i: int, run: list[int], t: int, layer: int, n: int
) -> list[int] | None:
    """Rank the experts of a layer for one token, from the definition alone; None where nothing is predicted."""
    mine = requests[i]
    if name == "gate":
        return mine["recorded"].get((run[t], layer))
    if name == "previous_token":
        if t == 0:
            return None
        before = [e for row in reversed(run[:t]) for e in mine["ids"][row][layer]]
        return list(dict.fromkeys(before))
    learned = [
        (r["ids"][row], r["token_ids"][row])
        for r in requests
        if r is not mine
        for part in oracle.segments(r, phase)
        for row in part
    ]
    if not learned or (name in ("transition", "token_id+transition") and layer < distance):
        return None
    k = len(mine["ids"][0][0])
    chosen = np.array([[e in token[layer] for e in range(n)] for token, _ in learned], np.int64)
    p = chosen.sum(axis=0).astype(F) * F(k) / F(chosen.sum())
    by_layer = np.zeros(n, F)
    if layer >= distance:
        rest = F(0)
        for e in mine["ids"][run[t]][layer - distance]:
            used = np.array([e in token[layer - distance] for token, _ in learned])
            share = F(1) / F(used.sum() + 1)
            rest += share
            by_layer = by_layer + chosen[used].sum(axis=0).astype(F) * share
        by_layer = by_layer + p * rest
    word = mine["token_ids"][run[t]]
    same = np.array([w == word for _, w in learned])
    by_token = chosen[same].sum(axis=0).astype(F) + p
    both = by_token * by_layer / np.maximum(p, F(1e-20))
    score = dict(zip(TABLES, (p, by_layer, by_token, both), strict=True))[name]
    if name == "hot_list":
        score = chosen.sum(axis=0)
    return sorted(range(n), key=lambda e: (-score[e], e))


def brute_force(
    requests: Trace, phase: str, name: str, distance: int, layer: int, m: int, num_experts: int
) -> dict[str, Any]:
    k = len(requests[0]["ids"][0][0])
    n = weighed = named = found = exact = aligned = 0
    mass = 0.0
    for i, r in enumerate(requests):
        for run in oracle.segments(r, phase):
            for t, row in enumerate(run):
                ranked = named_by(requests, phase, name, distance, i, run, t, layer, num_experts)
                if ranked is None:
                    continue
                true, first = r["ids"][row][layer], ranked[:m]
                n += 1
                named += len(first)
                found += len(set(first) & set(true))
                exact += set(true) <= set(first)
                aligned += sum(a == b for a, b in zip(first, true, strict=False))
                if (part := shares(r["weights"][row][layer])) is not None:
                    weighed += 1
                    mass += sum(w for e, w in zip(true, part, strict=True) if e in first)
    return {
        "n": n,
        "recall": found / (n * k) if n else None,
        "precision": found / named if named else None,
        "exact": exact / n if n else None,
        "weight_covered": mass / weighed if weighed else None,
        "rank_match": aligned / (n * k) if n else None,
    }


@st.composite
def traces(draw: st.DrawFn) -> tuple[Trace, int]:
    """Requests of 3 layers, with holes, prompts, tokens without weights and predictions of m = k + 1."""
    k = draw(st.integers(1, 3))
    num_experts = draw(st.integers(k + 1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    requests = []
    for i in range(draw(st.integers(1, 4))):
        tokens = int(rng.integers(1, 9))
        ids = np.argsort(rng.random((tokens, 3, num_experts)) + 0.3 * np.arange(num_experts), axis=2)[..., :k]
        steps = np.where(rng.random(tokens) < 0.2, 3, 1)
        weights = rng.integers(1, 5, (tokens, 3, k)).astype(float)
        weights[rng.random((tokens, 3)) < 0.1] = -1.0
        recorded = {
            (t, layer): rng.permutation(num_experts)[: k + 1].tolist()
            for t in range(tokens)
            for layer in (1, 2)
            if rng.random() < 0.8
        }
        requests.append(
            {
                "request_id": f"r{i}",
                "decode_start": int(rng.integers(0, 4)),
                "positions": (np.cumsum(steps) - steps[0]).tolist(),
                "ids": ids.tolist(),
                "weights": weights.tolist(),
                "token_ids": rng.integers(0, 4, tokens).tolist(),
                "recorded": recorded,
            }
        )
    return requests, num_experts


@given(traces(), st.sampled_from(["decode", "prefill", "all"]), st.integers(0, 2))
def test_every_predictor_equals_the_brute_force(trace: tuple[Trace, int], phase: Any, a_block: int) -> None:
    requests, num_experts = trace
    if not any(oracle.segments(r, phase) for r in requests):
        return
    k = len(requests[0]["ids"][0][0])
    built_in = [("previous_token", None), *((name, d) for name in TABLES for d in (1, 2))]
    built_in = [(name, d if "transition" in name else None) for name, d in built_in]
    grid = tuple(sorted({1, k, k + 1, num_experts}))
    frame = measured(
        requests,
        num_experts,
        a_block=a_block,
        phase=phase,
        predictors=tuple(dict.fromkeys(built_in)),
        recorded=(("gate", 1, k + 1),),
        m=grid,
    )
    assert frame.height == 3 * (7 * len(grid) + sum(m <= k + 1 for m in grid))
    for row in frame.iter_rows(named=True):
        want = brute_force(requests, phase, row["predictor"], row["distance"] or 1, row["layer"], row["m"], num_experts)
        for figure in FIGURES:
            value = want[figure]
            assert row[figure] == (None if value is None else pytest.approx(value, rel=1e-6)), (figure, row, want)


# --- by hand -------------------------------------------------------------------------------------


def plain(ids: list[Any], token_ids: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    weights = [[[1.0] * len(layer) for layer in token] for token in ids]
    fixed = {"decode_start": 0, "token_ids": token_ids or [0] * len(ids), "weights": weights, "recorded": {}}
    return fixed | {"ids": ids} | fields


# 4 experts, k = 2, 2 layers. By layer: a is {0,1} {0,1} {2,3} in layer 0 and {0,2} {0,2} {1,3} in layer 1;
# b is {0,1} {2,3} in layer 0 and {0,2} {1,3} in layer 1.
A = plain([[[0, 1], [2, 0]], [[1, 0], [0, 2]], [[2, 3], [1, 3]]], [7, 8, 9], request_id="a")
B = plain([[[1, 0], [0, 2]], [[3, 2], [3, 1]]], [9, 7], request_id="b")
HAND = [A, B]


def by_hand(name: str, distance: int | None, **spec: Any) -> dict[int, dict[str, Any]]:
    frame = measured(HAND, 4, phase="decode", predictors=((name, distance),), m=(2,), **spec)
    return {row["layer"]: row for row in frame.iter_rows(named=True)}


def test_previous_token_by_hand() -> None:
    # Layer 0: a's second token has both experts of its first, its third none, b's second none: 2 of 3 x 2.
    # Ranks: the second token of a is [1, 0] after [0, 1]: none match.
    zero, one = by_hand("previous_token", None).values()
    assert (zero["n"], zero["recall"], zero["exact"], zero["rank_match"]) == (3, 1 / 3, 1 / 3, 0)
    assert (one["n"], one["recall"], one["precision"]) == (3, 1 / 3, 1 / 3)


def test_the_hot_list_is_of_the_other_requests_by_hand() -> None:
    # For a the list is b's: in layer 0 all four experts once, of equal ones the lowest: 0, 1. a hits 2 + 2 + 0 of 6.
    # For b it is a's: 0 and 1 twice, 2 and 3 once: 0, 1. b hits 2 + 0 of 4. Together 6 of 10.
    zero, one = by_hand("hot_list", None).values()
    assert zero["recall"] == pytest.approx(6 / 10)
    # In layer 1 b's list is 0, 1 again: a hits 1 + 1 + 1; a's is 0 and 2: b hits 2 + 0. Together 5 of 10.
    assert one["recall"] == pytest.approx(5 / 10)
    assert one["exact"] == pytest.approx(1 / 5)


def test_transitions_by_hand() -> None:
    # Both requests follow {0,1} by {0,2} and {2,3} by {1,3}: each learns it from the other.
    zero, one = by_hand("transition", 1).values()
    assert (zero["n"], zero["recall"]) == (0, None)
    assert (one["n"], one["recall"], one["exact"]) == (5, 1.0, 1.0)
    # Of b's {0,1} from a, where 0 was used twice and followed by 0 and 2: both score 2 * (2 + p) / 3, and 0 is named
    # first; so of b's [0, 2] both ranks match. b's {2,3}: 1 and 3 alike, 1 first, against [3, 1]: none.
    # a from b: all alike: [2, 0] none, [0, 2] both, [1, 3] both. 6 of 10.
    assert one["rank_match"] == pytest.approx(6 / 10)


def test_token_ids_by_hand() -> None:
    # a's tokens 7, 8, 9; b's 9, 7. In layer 0 b's 7 is {2,3}, b's 9 is {0,1}; 8 is nowhere else: b's hot list, 0 and 1.
    # a: 7 hits none of {0,1}, 8 both, 9 none. b: a's 9 is {2,3}, 7 is {0,1}: none. 2 of 10.
    zero, _ = by_hand("token_id", None).values()
    assert zero["recall"] == pytest.approx(2 / 10)


def test_both_tables_by_hand() -> None:
    # a's first token, {0,1} in layer 0 and of id 7: layer 0 says 0 and 2 by (1 + .5) + (1 + .5) over 2 = 1.5 each, and
    # .5 for the others (p = .5 each). The id says 1 and 3 by 1.5 each, and .5 for 0 and 2. The products are alike,
    # .75 / .5: the lowest ids win, 0 and 1, of [2, 0]: 1. The third, {2,3} of id 9: layer 0 says 1 and 3, the id 0 and
    # 2: 0 and 1 again, of {1,3}: 1. The second, of id 8 that b lacks: 0 and 2, both. a: 4 of 6.
    # b from a, p = (2, 1, 2, 1) / 3: {0,1} of id 9, which is {1,3} there: layer 0 says (2 + 2/3) / 3 * 2 = 1.78 for 0
    # and 2, and (0 + 1/3) / 3 * 2 = .22 for 1 and 3; the id .67 and 1.33; over p: 1.78 and .89: 0 and 2, both.
    # {2,3} of id 7, which is {0,2} there: layer 0 (0 + 2/3) / 2 * 2 = .67 and (1 + 1/3) / 2 * 2 = 1.33; the id 1.67 and
    # .33; over p: 1.67 and 1.33: 0 and 2, of {1,3} none. b: 2 of 4. Together 6 of 10.
    _, one = by_hand("token_id+transition", 1).values()
    assert one["recall"] == pytest.approx(6 / 10)


def test_recorded_predictions_by_hand() -> None:
    # Three named, the routed experts [2, 0] at ranks 2 and 0; with m = 2 one of them, with m = 3 both.
    a = A | {"recorded": {(0, 1): [0, 1, 2]}}
    frame = measured([a, B], 4, phase="decode", predictors=(), recorded=(("gate", 1, 3),), m=(2, 3, 4))
    rows = {(r["layer"], r["m"]): r for r in frame.iter_rows(named=True)}
    assert set(rows) == {(layer, m) for layer in (0, 1) for m in (2, 3)}  # no more than were named
    assert [rows[1, m]["recall"] for m in (2, 3)] == [1 / 2, 1]
    assert [rows[1, m]["precision"] for m in (2, 3)] == [1 / 2, 2 / 3]
    assert [rows[1, m]["exact"] for m in (2, 3)] == [0, 1]
    assert rows[0, 2]["n"] == 0


def test_bytes_are_those_of_the_predicted_layers() -> None:
    # Layer 1 alone is predicted: 2 experts of 100 bytes a token, all of them right.
    frame = measured(HAND, 4, phase="decode", predictors=(("transition", 1),), m=(2, 3), sizes=(10, 100), by=None)
    assert frame["bytes_fetched"].to_list() == [200, 300]
    assert frame["bytes_wasted"].to_list() == pytest.approx([0, 100])
    frame = measured(HAND, 4, phase="decode", predictors=(("hot_list", None),), m=(2,), sizes=(10, 100), by=None)
    assert frame["bytes_fetched"].to_list() == [220]
    assert frame["bytes_wasted"].to_list() == pytest.approx([220 - 20 * 0.6 - 200 * 0.5])


# --- what is learned does not judge itself --------------------------------------------------------


def test_a_table_of_ids_that_one_request_has_alone_foretells_nothing() -> None:
    # Every token has an id of its own and random experts: a table that had seen them would be perfect.
    rng = np.random.default_rng(0)
    requests = []
    for i in range(6):
        ids = np.argsort(rng.random((40, 2, 16)), axis=2)[..., :4].tolist()
        requests.append(plain(ids, list(range(40 * i, 40 * i + 40)), request_id=f"r{i}"))
    named = (("token_id", None), ("hot_list", None))
    frame = measured(requests, 16, phase="decode", predictors=named, m=(4,), by=None)
    token, hot = frame["recall"].to_list()
    assert token == hot  # it falls back to popularity
    assert token == pytest.approx(4 / 16, abs=0.05)


def test_requests_that_share_no_expert_learn_nothing_from_each_other() -> None:
    halves = [[[[0, 1], [2, 0]]] * 5, [[[3, 4], [5, 3]]] * 5]
    requests = [plain(ids, [1] * 5, request_id=str(i)) for i, ids in enumerate(halves)]
    named = tuple((name, 1 if "transition" in name else None) for name in TABLES)
    frame = measured(requests, 6, phase="decode", predictors=named, m=(2,), by=None)
    assert frame["recall"].to_list() == [0, 0, 0, 0]


# --- closed forms, and the other metrics ---------------------------------------------------------


def ingested(folder: Path, kind: str, name: str = "t", **shape: Any) -> tk.Store:
    trace = tk.synth(kind, num_experts=16, top_k=4, layers=3, **{"requests": 8, "tokens": 60} | shape)
    sidecar = trace.save(folder / f"{name}.npz")
    tk.ingest(folder / f"{name}.npz", folder / "store", name=name, num_experts=16, requests=sidecar, axes="tlk")
    return tk.open(folder / "store")


def test_of_a_trace_that_repeats_one_token_everything_is_known(tmp_path: Path) -> None:
    store = ingested(tmp_path, "repeat")
    frame = tk.prefetch(store, predictor="previous_token", m=4)
    assert frame.select("recall", "precision", "exact", "rank_match").rows() == [(1, 1, 1, None)]  # sets have no ranks


def test_of_a_cycle_the_token_before_knows_nothing_and_the_cycle_before_all() -> None:
    sets = [[4 * (t % 4) + r for r in range(4)] for t in range(60)]  # 4 disjoint sets of 4 experts
    requests = [plain([[experts, experts[::-1]] for experts in sets], request_id=str(i)) for i in range(3)]
    named = (("previous_token", None), ("transition", 1))
    frame = measured(requests, 16, phase="decode", predictors=named, m=(4, 12, 16), by=None)
    recall = {(row["predictor"], row["m"]): row["recall"] for row in frame.iter_rows(named=True)}
    assert recall["previous_token", 4] == recall["previous_token", 12] == 0
    assert recall["previous_token", 16] == pytest.approx(56 / 59)  # the first cycle has 3 that know too little
    assert recall["transition", 4] == 1  # which set follows which does not change


def test_the_token_before_foretells_a_sticky_trace_as_often_as_it_stays(tmp_path: Path) -> None:
    store = ingested(tmp_path, "sticky", requests=40, tokens=400, stay=0.5)
    [row] = tk.prefetch(store, predictor="previous_token", m=4).iter_rows(named=True)
    # Kept with probability .5, else drawn again from all 16.
    assert row["recall_lo"] <= 0.5 + 0.5 * 4 / 16 <= row["recall_hi"]
    [row] = tk.prefetch(store, predictor="hot_list", m=4).iter_rows(named=True)
    assert row["recall"] == pytest.approx(4 / 16, abs=0.02)


def as_autocorr(store: tk.Store, phase: Any, by: Any) -> None:
    lag = tk.autocorr(store, phase=phase, by=by, max_lag=1)
    ours = tk.prefetch(store, phase=phase, by=by, predictor="previous_token", m=store.trace().meta.top_k)
    assert ours["n"].to_list() == lag["n_pairs"].to_list()
    for end in ("", "_lo", "_hi"):
        theirs = lag[f"overlap{end}"].to_list()
        assert ours[f"recall{end}"].to_list() == [v if v is None else pytest.approx(v, abs=1e-12) for v in theirs]


@pytest.mark.parametrize("by", [None, "layer", "request"])
def test_recall_of_the_token_before_is_the_overlap_at_lag_1(tmp_path: Path, by: Any) -> None:
    as_autocorr(ingested(tmp_path, "topical"), None, by)


def test_recall_of_the_token_before_is_the_overlap_at_lag_1_of_real_traces(tmp_path: Path, shared: Path) -> None:
    folder = shared / "traces" / "gptoss20b_subset64"
    tk.ingest(folder / "trace.npz", tmp_path / "S", num_experts=32, requests=folder / "requests.json")
    store = tk.open(tmp_path / "S")
    as_autocorr(store, None, "layer")
    assert tk.prefetch(store, predictor="previous_token")["recall"][0] == pytest.approx(0.4402, abs=5e-5)


def test_the_recordings_of_the_small_olmoe_have_the_published_recall(tmp_path: Path, shared: Path) -> None:
    tk.ingest(shared / "moe" / "traces" / "olmoe" / "npz", tmp_path / "S", num_experts=32)
    store = tk.open(tmp_path / "S")
    asked = {"phase": "all", "predictor": "next_gate", "m": 4, "distance": (1, 2), "intervals": False}
    frame = tk.prefetch(store, **asked)  # type: ignore[arg-type]
    assert frame["recall"].to_list() == pytest.approx([0.768, 0.672], abs=5e-4)
    assert frame["n"].to_list() == [96_034, 96_034]
    by_layer = tk.prefetch(store, by="layer", **asked).filter(pl.col("distance") == 1)  # type: ignore[arg-type]
    published = [None, 0.618, 0.741, 0.789, 0.800, 0.831, 0.785, 0.809]
    assert by_layer["recall"].to_list() == [p if p is None else pytest.approx(p, abs=5e-4) for p in published]
    # Where the token is known the layers before it add to what its id says, and both to popularity.
    frame = tk.prefetch(store, by="layer", predictor=TABLES, m=4, intervals=False)
    of = {name: part["recall"].to_list()[1:] for (name,), part in frame.group_by("predictor")}
    ranked = [of[name] for name in ("hot_list", "transition", "token_id", "token_id+transition")]
    assert all(a < b for low, high in pairwise(ranked) for a, b in zip(low, high, strict=True))


# --- what a trace does not support ---------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> tk.Store:
    return ingested(tmp_path, "topical")


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"predictor": "next_gate"}, UsageError, "no predictor named 'next_gate'; expected one of previous_token"),
        ({"predictor": "token_id"}, UnsupportedError, "the trace has no token ids"),
        ({"predictor": "transition", "distance": 3}, UnsupportedError, "no layer lies 3 MoE layers after another"),
        ({"predictor": ()}, UsageError, "no predictor"),
        ({"distance": 0}, UsageError, "a distance of 0 MoE layers; expected at least 1"),
        ({"m": 0}, UsageError, "0 experts prefetched per layer; expected 1 to 16"),
        ({"m": (4, 17)}, UsageError, "17 experts prefetched"),
        ({"m": ()}, UsageError, "no number of experts to prefetch"),
        ({"expert_bytes": 0.0}, UsageError, "experts of 0 bytes"),
        ({"expert_bytes": 1e6, "model": "qwen3-30b-a3b"}, UsageError, "a model and the bytes of an expert"),
        ({"model": "qwen3-30b-a3b"}, UsageError, "routes to 8 of 128 experts, the trace to 4 of 16"),
        ({"phase": "prefill"}, UnsupportedError, "no prefill tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(store: tk.Store, asked: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        tk.prefetch(store, **asked)
    assert said in str(caught.value)


def test_predictors_that_the_trace_lacks_are_left_out_with_a_note(store: tk.Store) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        frame = tk.prefetch(store)
    notes = [str(w.message) for w in caught]
    assert "without the predictor token_id: the trace has no token ids" in notes
    assert frame["predictor"].unique(maintain_order=True).to_list() == ["previous_token", "hot_list", "transition"]
    assert frame["m"].unique().sort().to_list() == [4, 6, 8]


def test_nothing_is_learned_from_one_request(tmp_path: Path) -> None:
    one = ingested(tmp_path, "topical", requests=1)
    with pytest.raises(UnsupportedError, match="there is one request"):
        tk.prefetch(one, predictor="hot_list")
    with pytest.warns(TracekitWarning, match="without the predictor transition: there is one request"):
        frame = tk.prefetch(one, intervals=False)
    assert frame["predictor"].unique().to_list() == ["previous_token"]


def test_a_request_of_one_token_has_no_token_before(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no request has 2 consecutive tokens"):
        tk.prefetch(ingested(tmp_path, "uniform", tokens=1), predictor="previous_token")


@pytest.fixture
def recorded(tmp_path: Path) -> tk.Store:
    """A trace with next-gate predictions that are always right, of two requests."""
    rng = np.random.default_rng(1)
    (tmp_path / "npz").mkdir()
    for i in range(2):
        ids = np.argsort(rng.random((9, 3, 8)), axis=2)[..., :2].astype(np.uint8)
        said = ids.copy()
        said[:, 0] = 255
        about = {"prompt_len": 3, "token_ids": np.arange(9), "moe_layer_ids": np.arange(3), "num_experts": 8}
        np.savez(tmp_path / "npz" / f"{i}.npz", routed_experts=ids, predicted1=said, **about)
    tk.ingest(tmp_path / "npz", tmp_path / "S", name="t", num_experts=8)
    return tk.open(tmp_path / "S")


def test_a_recording_at_another_distance_or_of_fewer_experts_is_refused(recorded: tk.Store) -> None:
    frame = tk.prefetch(recorded, predictor="next_gate", intervals=False)
    assert frame.select("distance", "m", "n", "recall").rows() == [(1, 2, 12, 1.0)]
    with pytest.raises(UnsupportedError, match="'next_gate' look ahead 1 MoE layers, not 2"):
        tk.prefetch(recorded, predictor="next_gate", distance=2)
    with pytest.raises(UnsupportedError, match="'next_gate' name 2 experts, fewer than 3"):
        tk.prefetch(recorded, predictor="next_gate", m=3)


@pytest.mark.parametrize("column", ["p0", "layer"])
def test_predictions_outside_the_trace_are_damage(recorded: tk.Store, column: str) -> None:
    [path] = recorded.path.glob("segments/*/predicted.parquet")
    frame = pl.read_parquet(path)
    frame.with_columns(pl.lit(200).cast(frame.schema[column]).alias(column)).write_parquet(path)
    with pytest.raises(StoreError, match=r"predicted\.parquet.*outside what the manifest says"):
        tk.prefetch(recorded, predictor="next_gate")


# --- tables, queries, charts ---------------------------------------------------------------------


def test_the_query_the_view_and_the_function_agree(store: tk.Store) -> None:
    ours = tk.prefetch(store, by="layer", m=6, expert_bytes=1000)
    asked = query(store, "prefetch_recall", m=6)
    keys = ["layer", "predictor", "distance"]
    columns = [*keys, "m", *FIGURES, "recall_lo", "recall_hi"]
    assert asked.select(columns).sort(keys).equals(ours.select(columns).sort(keys))
    assert query(store, "prefetch_recall", phase="decode")["m"].unique().to_list() == [4]
    view = store.sql("FROM prefetch WHERE \"by\" = 'layer' AND m = 6")
    assert view.height == ours.height


def test_the_table_fits_a_terminal(store: tk.Store, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tk.prefetch(store, distance=(1, 2), expert_bytes=2.5e6)
    for frame in (wide, tk.prefetch(store, by="layer"), tk.prefetch(store, by="request", m=4)):
        text = render(frame, layout="prefetch")
        assert isinstance(text, str)
        assert max(map(len, text.splitlines())) <= 80
    text = str(render(wide, layout="prefetch"))
    assert "m = 4 95 %" in text
    assert "MB/token" in text
    assert main(["prefetch", str(store.path), "--predictor", "previous_token,hot_list", "--m", "4", "-q"]) == 0
    assert "previous_token" in capsys.readouterr().out
    assert main(["prefetch", str(store.path), "--predictor", "token_id"]) == 1
    assert "no token ids" in capsys.readouterr().err


def test_the_chart_has_a_line_for_each_predictor(store: tk.Store, recorded: tk.Store) -> None:
    chart = json.loads(charts.chart(store, "prefetch").to_json())
    [data] = [d for d in chart["datasets"].values() if "series" in d[0]]
    lines = {row["series"] for row in data}
    assert lines == {"previous", "hot list", "transition"}
    want = tk.prefetch(store, by="layer", predictor="previous_token", m=4)["recall"].to_list()
    assert [row["y"] for row in data if row["series"] == "previous"] == pytest.approx(want)
    frame = tk.prefetch(recorded, by="layer", predictor="next_gate", intervals=False)
    [data] = json.loads(charts.prefetch(frame).to_json())["datasets"].values()
    assert [(row["x"], row["y"]) for row in data] == [(1, 1.0), (2, 1.0)]
    with pytest.raises(UnsupportedError):
        charts.prefetch(frame.head(0))
    with pytest.raises(UsageError):
        charts.prefetch(tk.load(store))
