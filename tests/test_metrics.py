"""The kernels against the oracle: every metric, grouping and phase, on random small traces with borders and holes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracekit.errors import UnsupportedError, UsageError
from tracekit.metrics import kernels
from tracekit.metrics.measurement import Measurement
from tracekit.metrics.state import Accumulator, Spec, caveats, resolve_phase
from tracekit.schema import TraceMeta
from tracekit.store import Columns

Requests = list[dict[str, Any]]


def frame_of(requests: Requests) -> pl.DataFrame:
    """The ``requests`` view of a trace held in memory."""
    rows = []
    for r in requests:
        positions, start = np.array(oracle.positions(r)), r["decode_start"]
        decode = None if start is None else int((positions >= start).sum())
        rows.append((r["request_id"], r["label"], start, len(positions), decode))
    schema = {"request_id": pl.String, "label": pl.String, "decode_start": pl.UInt32, "n_tokens": pl.UInt32}
    return pl.DataFrame(rows, schema | {"n_decode": pl.UInt32}, orient="row")


def block_of(requests: Requests, numbers: Sequence[int], layers: Sequence[int]) -> Columns:
    """Routing rows of some of the requests, sorted by request, layer, position, cut into runs."""
    columns: list[np.ndarray] = []
    runs: list[tuple[int, ...]] = []
    row = 0
    for number in numbers:
        positions = np.array(oracle.positions(requests[number]))
        starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1), len(positions)]
        for i, layer in enumerate(layers):
            columns.append(np.asarray(requests[number]["ids"])[:, i, :])
            runs += [(row + a, number, layer, positions[a], b - a) for a, b in itertools.pairwise(starts) if b > a]
            row += len(positions)
    ids = np.ascontiguousarray(np.concatenate(columns).T)
    names = ("row", "request", "layer", "pos", "n")
    return Columns(tuple(ids), {n: np.array([r[i] for r in runs], np.int64) for i, n in enumerate(names)})


def measured(
    requests: Requests, num_experts: int, spec: Spec, *, router_order: bool = True, threads: int = 2
) -> Measurement:
    k, n_layers = np.asarray(requests[0]["ids"]).shape[2], np.asarray(requests[0]["ids"]).shape[1]
    layers = tuple(3 + 2 * i for i in range(n_layers))
    meta = TraceMeta(num_experts, k, layers, "test", router_order=router_order)
    half = len(requests) // 2
    blocks = [block_of(requests, part, layers) for part in (range(half), range(half, len(requests))) if len(part)]
    return Measurement.read(meta, frame_of(requests), spec, blocks, threads)


@st.composite
def traces(draw: st.DrawFn, min_requests: int = 1, max_requests: int = 4, long: bool = False) -> tuple[Requests, int]:
    k = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17]))  # 17 needs sums of five bits
    num_experts = draw(st.integers(k + 1, k + 6))
    n_layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    known = draw(st.booleans())
    labelled = draw(st.booleans())
    requests: Requests = []
    for i in range(draw(st.integers(min_requests, max_requests))):
        n = draw(st.integers(90, 140) if long else st.integers(1, 14))
        pool = np.stack([rng.permutation(num_experts)[:k] for _ in range(3)])
        ids = pool[rng.integers(0, 3, (n, n_layers))] if draw(st.booleans()) else None
        if ids is None:
            ids = np.stack([[rng.permutation(num_experts)[:k] for _ in range(n_layers)] for _ in range(n)])
        positions = np.cumsum(1 + (rng.random(n) < 0.15)) + draw(st.integers(0, 3)) - 1
        requests.append(
            {
                "request_id": f"r{i}",
                "label": ["a", "b", None][draw(st.integers(0, 2))] if labelled else None,
                "decode_start": int(rng.integers(0, positions[-1] + 2)) if known else None,
                "positions": positions,
                "ids": ids.astype(np.uint8),
            }
        )
    return requests, num_experts


def close(ours: Any, theirs: Any, tolerance: float = 1e-9) -> bool:
    if theirs is None or ours is None:
        return theirs is None and ours is None
    return math.isclose(float(ours), float(theirs), rel_tol=tolerance, abs_tol=tolerance)


def has_rows(requests: Requests, phase: str) -> bool:
    return any(oracle.rows(r, phase) for r in requests)


def groups(requests: Requests, by: str | None, phase: str) -> list[tuple[Any, Requests, Sequence[int]]]:
    return [g for g in oracle.grouped(requests, by) if has_rows(list(g[1]), phase)]


@given(
    traces(),
    st.sampled_from(["decode", "prefill", "all"]),
    st.booleans(),
    st.sampled_from([None, "layer", "request", "label"]),
)
def test_windows_equal_the_oracle(trace: tuple[Requests, int], phase: str, overlapping: bool, by: str | None) -> None:
    requests, num_experts = trace
    if by == "label" and all(r["label"] is None for r in requests):
        by = None
    spec = Spec(phase, max_window=5, overlapping=overlapping, batches=True, by=by, intervals=False)
    if not has_rows(requests, phase):
        assert measured(requests, num_experts, spec).windows([1, 2]).is_empty()
        return
    k = requests[0]["ids"].shape[2]
    rows = measured(requests, num_experts, spec).windows([1, 2, 3]).to_dicts()
    expected = [
        oracle.window_row(
            members,
            num_experts,
            k,
            window=t,
            batch_size=b,
            phase=phase,
            overlapping=overlapping,
            layers=layers,
            pool=requests,
        )
        | {"group": key}
        for key, members, layers in groups(requests, by, phase)
        for b in (1, 2, 3)
        for t in range(1, 6)
    ]
    assert len(rows) == len(expected)
    keys = {
        None: lambda r: None,
        "layer": lambda r: (r["layer"] - 3) // 2,
        "request": lambda r: r["request_id"],
        "label": lambda r: r["label"],
    }
    ours = {(keys[by](r), r["batch_size"], r["window"]): r for r in rows}
    for want in expected:
        key = "(none)" if by == "label" and want["group"] is None else want["group"]
        row = ours[key, want["batch_size"], want["window"]]
        for name, value in want.items():
            if name != "group":
                assert close(row[name], value), (name, row[name], value, want)


@given(traces(), st.sampled_from(["decode", "prefill", "all"]), st.sampled_from([None, "layer", "request"]))
def test_autocorr_equals_the_oracle(trace: tuple[Requests, int], phase: str, by: str | None) -> None:
    requests, num_experts = trace
    if not has_rows(requests, phase):
        return
    k = requests[0]["ids"].shape[2]
    spec = Spec(phase, max_lag=4, by=by, intervals=False)
    rows = iter(measured(requests, num_experts, spec).autocorr().to_dicts())
    for _, members, layers in groups(requests, by, phase):
        for lag in range(1, 5):
            row = next(rows)
            want = oracle.autocorr_row(members, num_experts, k, lag=lag, phase=phase, layers=layers, pool=requests)
            for name, value in want.items():
                assert close(row[name], value), (name, row[name], value)


@settings(max_examples=15)
@given(
    traces(min_requests=1, max_requests=2, long=True),
    st.booleans(),
    st.sampled_from([2, 17, 34, 40, 70]),
    st.sampled_from([1, 16, 33, 65]),
)
def test_long_windows_and_lags_cross_words_and_chunks(
    trace: tuple[Requests, int], overlapping: bool, max_window: int, max_lag: int
) -> None:
    requests, num_experts = trace
    k = requests[0]["ids"].shape[2]
    requests = [{**r, "positions": None, "first_pos": 0} for r in requests]
    m = measured(requests, num_experts, Spec("all", max_window, max_lag, overlapping, intervals=False))
    observed = m.windows()["observed"].to_list()
    overlap = m.autocorr()["overlap"].to_list()
    for t in {2, max_window // 2, max_window} - {0, 1}:
        want = oracle.window_row(requests, num_experts, k, window=t, phase="all", overlapping=overlapping)
        assert close(observed[t - 1], want["observed"]), t
    for d in {1, max_lag // 2, max_lag} - {0}:
        want = oracle.autocorr_row(requests, num_experts, k, lag=d, phase="all")
        assert close(overlap[d - 1], want["overlap"]), d


@pytest.mark.parametrize("n", [1, 2, 479, 480, 481, 960, 1007, 1008, 1009, 2500])
@pytest.mark.parametrize(("max_window", "max_lag"), [(8, 16), (20, 32)])
def test_runs_around_the_chunk_length(n: int, max_window: int, max_lag: int) -> None:
    rng = np.random.default_rng(n)
    ids = np.array([rng.permutation(300)[:3] for _ in range(n)], np.uint16)
    requests = [{"request_id": "0", "label": None, "decode_start": 0, "first_pos": 0, "ids": ids[:, None, :]}]
    m = measured(requests, 300, Spec("decode", max_window, max_lag, intervals=False))
    sets = [set(row) for row in ids.tolist()]
    for t, observed in enumerate(m.windows()["observed"].to_list(), 1):
        sizes = [len(set().union(*sets[a : a + t])) for a in range(n - t + 1)]
        assert close(observed, sum(sizes) / len(sizes) if sizes else None)
    for d, row in enumerate(m.autocorr().iter_rows(named=True), 1):
        pairs = [(sets[t], sets[t + d]) for t in range(n - d)]
        assert row["n_pairs"] == len(pairs)
        if pairs:
            assert close(row["overlap"], sum(len(a & b) for a, b in pairs) / len(pairs) / 3)
            assert close(row["jaccard"], sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
            assert close(row["rank0_repeat"], np.mean(ids[d:, 0] == ids[:-d, 0]))


@settings(max_examples=10)
@given(traces(min_requests=5, max_requests=7))
def test_intervals_equal_the_oracle(trace: tuple[Requests, int]) -> None:
    requests, num_experts = trace
    requests = [{**r, "decode_start": 0} for r in requests]
    k = requests[0]["ids"].shape[2]
    m = measured(requests, num_experts, Spec("decode", max_window=3, max_lag=2, batches=True))

    def held(row: dict[str, Any], name: str, statistic: Any) -> None:
        want = oracle.jackknife(requests, statistic)
        for suffix, part in (("_lo", "lo"), ("_hi", "hi"), ("_bias", "bias")):
            if want is not None and name + suffix in row:
                assert close(row[name + suffix], want[part], 1e-7), (name + suffix, row[name + suffix], want)

    for row in m.windows([1, 2]).iter_rows(named=True):
        t, b = row["window"], row["batch_size"]
        if sum(bool(oracle.windows(r, "decode", t)) for r in requests) < 5:
            assert row["observed_lo"] is row["reduction_uniform_lo"] is None
            continue
        if oracle.window_row(requests, num_experts, k, window=t, batch_size=b + 1, phase="decode")["observed"] is None:
            continue  # without a request there might be no batch of this size

        def value(subset: Sequence[Any], name: str = "observed", t: int = t, b: int = b) -> Any:
            return oracle.window_row(subset, num_experts, k, window=t, batch_size=b, phase="decode")[name]

        for name in ("observed", "reduction_uniform", "reduction_popularity", "reduction_label", "reduction_request"):
            held(row, name, lambda s, name=name: value(s, name))
    for row in m.autocorr().iter_rows(named=True):
        if sum(bool(oracle.pairs(r, "decode", row["lag"])) for r in requests) < 5:
            assert row["overlap_lo"] is None
            continue
        held(
            row,
            "overlap",
            lambda s, d=row["lag"]: oracle.autocorr_row(s, num_experts, k, lag=d, phase="decode")["overlap"],
        )


@settings(max_examples=10)
@given(traces(min_requests=5, max_requests=7))
def test_attribution_equals_the_oracle(trace: tuple[Requests, int]) -> None:
    requests, num_experts = trace
    requests = [{**r, "decode_start": 0, "positions": None, "first_pos": 0} for r in requests if len(r["ids"]) >= 3]
    if len(requests) < 5:
        return
    k = requests[0]["ids"].shape[2]
    for i in range(len(requests)):
        rungs = oracle.ladder(requests[:i] + requests[i + 1 :], num_experts, k, 2, "decode")
        if rungs["uniform"] == rungs["observed"]:
            return  # without this request there is nothing to attribute
    want = oracle.attribution(requests, num_experts, k, window=2, phase="decode")
    ours = measured(requests, num_experts, Spec("decode", max_window=3)).attribution(2).to_dicts()
    for row, expected in zip(ours, want, strict=True):
        for name in ("cause", "unique_before", "unique_after", "drop", "share", "resolved"):
            same = (
                row[name] == expected[name] if name in ("cause", "resolved") else close(row[name], expected[name], 1e-7)
            )
            assert same, (name, row, expected)


@given(traces(), st.booleans())
def test_load_equals_the_oracle(trace: tuple[Requests, int], by_label: bool) -> None:
    requests, num_experts = trace
    by = "label" if by_label and any(r["label"] is not None for r in requests) else None
    k = requests[0]["ids"].shape[2]
    rows = measured(requests, num_experts, Spec("all", by=by, intervals=False)).load().to_dicts()
    for key, members, _ in oracle.grouped(requests, by):
        mine = [r for r in rows if by is None or r["label"] == (key or "(none)")]
        for row, want in zip(mine, oracle.load_rows(members, num_experts, k, phase="all"), strict=True):
            for name, value in want.items():
                assert close(row[name], value), name


@given(traces(min_requests=2))
def test_two_tokens_and_lag_one_are_the_same_measurement(trace: tuple[Requests, int]) -> None:
    """U(2) = k (2 - overlap(1)), for the trace and for the popularity and request rungs."""
    requests, num_experts = trace
    k = requests[0]["ids"].shape[2]
    m = measured(requests, num_experts, Spec("all", 2, 1, intervals=False))
    window, lag = m.windows().row(1, named=True), m.autocorr().row(0, named=True)
    if not lag["n_pairs"]:
        return
    assert close(window["observed"], k * (2 - lag["overlap"]))
    assert close(window["expected_popularity"], k * (2 - lag["expected_popularity"]))
    assert close(window["expected_request"], k * (2 - lag["expected_request"]))


@given(traces())
def test_bounds(trace: tuple[Requests, int]) -> None:
    requests, num_experts = trace
    k = requests[0]["ids"].shape[2]
    spec = Spec("all", 6, by="request", intervals=False)
    for request, rows in measured(requests, num_experts, spec).windows().group_by("request_id"):
        observed = rows.sort("window")["observed"].drop_nulls().to_list()
        assert all(k - 1e-9 <= u <= min(num_experts, t * k) + 1e-9 for t, u in enumerate(observed, 1)), request
        holes = np.diff(oracle.positions(next(r for r in requests if r["request_id"] == request[0])))
        start = next(r for r in requests if r["request_id"] == request[0])["decode_start"]
        if start is None and (holes == 1).all():
            assert all(b >= a - 1e-9 for a, b in itertools.pairwise(observed))


@given(traces(min_requests=3, max_requests=4), st.sampled_from([None, "label", "request"]))
def test_states_merge_to_the_state_of_the_whole(trace: tuple[Requests, int], by: str | None) -> None:
    requests, num_experts = trace
    if by == "label" and all(r["label"] is None for r in requests):
        by = None
    k, n_layers = requests[0]["ids"].shape[2], requests[0]["ids"].shape[1]
    meta, spec = TraceMeta(num_experts, k, tuple(range(n_layers)), "test"), Spec("all", 4, 3, batches=True, by=by)
    parts = []
    for numbers in (range(len(requests)), [0], range(1, len(requests))):
        with Accumulator(meta, spec, frame_of(requests), 1) as accumulator:
            accumulator.add(block_of(requests, list(numbers), meta.layers))
        parts.append(accumulator.state)
    whole, first, rest = parts
    first.merge(rest)
    for name in first.__slots__:
        np.testing.assert_allclose(getattr(first, name), getattr(whole, name), rtol=1e-12, err_msg=name)
    assert np.array_equal(first.union_sum, whole.union_sum)


def test_blocks_that_overlap_in_time_add_up_to_the_whole() -> None:
    rng, meta = np.random.default_rng(2), TraceMeta(16, 3, (0, 1, 2, 5), "test")
    requests: Requests = [
        {
            "request_id": f"r{i}",
            "label": None,
            "decode_start": 0,
            "positions": np.arange(n),
            "ids": rng.permuted(np.tile(np.arange(16, dtype=np.uint8), (n, 4, 1)), axis=2)[:, :, :3],
        }
        for i, n in enumerate([60, 3, 200, 41, 77, 5, 120, 64, 90, 30])
    ]
    spec = Spec("all", max_window=5, max_lag=4)
    blocks = [block_of(requests, [i], meta.layers) for i in range(len(requests))]
    with Accumulator(meta, spec, frame_of(requests), 1) as whole:
        whole.add(block_of(requests, list(range(len(requests))), meta.layers))
    with Accumulator(meta, spec, frame_of(requests), 3) as parts:
        for block in 20 * blocks:  # as from a store: nobody else holds the columns, and the kernel reads by address
            parts.add(replace(block, columns=tuple(column.copy() for column in block.columns)))
    assert np.array_equal(parts.state.overlap_counts, 20 * whole.state.overlap_counts)
    assert np.array_equal(parts.state.union_sum, 20 * whole.state.union_sum)


def test_more_than_200_requests_share_jackknife_groups_by_a_seeded_hash() -> None:
    rng = np.random.default_rng(0)
    requests = [
        {
            "request_id": f"q{i}",
            "label": None,
            "decode_start": 0,
            "first_pos": 0,
            "ids": rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (6, 1, 1)), axis=2)[:, :, :2],
        }
        for i in range(450)
    ]
    rows = [measured(requests, 8, Spec("decode", 4, seed=seed)).windows().row(3, named=True) for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0]["observed"] == rows[2]["observed"]
    assert rows[0]["observed_lo"] != rows[2]["observed_lo"]
    assert rows[0]["observed_lo"] < rows[0]["observed"] < rows[0]["observed_hi"]


def test_few_requests_have_no_interval_and_it_is_said() -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[2, 3]]], np.uint8)
    requests = [{"request_id": str(i), "label": None, "decode_start": 0, "first_pos": 0, "ids": ids} for i in range(4)]
    assert measured(requests, 4, Spec("decode", 2)).windows()["observed_lo"].null_count() == 2
    assert caveats(frame_of(requests), Spec("decode")) == ["no interval with fewer than 5 requests: there are 4"]
    assert "rough" in caveats(frame_of(requests * 2), Spec("decode"))[0]


def test_a_window_longer_than_every_request_is_null_not_a_number() -> None:
    ids = np.array([[[0, 1]], [[1, 2]]], np.uint8)
    requests = [{"request_id": str(i), "label": None, "decode_start": 0, "first_pos": 0, "ids": ids} for i in range(6)]
    row = measured(requests, 4, Spec("decode", 3, 3)).windows().row(2, named=True)
    assert row["n_windows"] == 0
    assert row["observed"] is row["reduction_uniform"] is row["reduction_uniform_lo"] is None


def test_router_order_decides_whether_rank0_is_reported() -> None:
    ids = np.array([[[0, 1]], [[0, 2]]], np.uint8)
    requests = [{"request_id": "0", "label": None, "decode_start": 0, "first_pos": 0, "ids": ids}]
    spec = Spec("decode", 1, 1, intervals=False)
    assert measured(requests, 4, spec).autocorr()["rank0_repeat"].to_list() == [1.0]
    assert measured(requests, 4, spec, router_order=False).autocorr()["rank0_repeat"].to_list() == [None]


def test_the_phase_is_never_guessed() -> None:
    ids = np.zeros((3, 1, 1), np.uint8)
    known = frame_of([{"request_id": "0", "label": None, "decode_start": 3, "first_pos": 0, "ids": ids}])
    unknown = frame_of([{"request_id": "0", "label": None, "decode_start": None, "first_pos": 0, "ids": ids}])
    assert resolve_phase(known, None) == "prefill"
    assert resolve_phase(unknown, None) == "all"
    with pytest.raises(UnsupportedError, match="no decode tokens"):
        resolve_phase(known, "decode")
    with pytest.raises(UnsupportedError, match="does not say which rows are prompt"):
        resolve_phase(unknown, "decode")


def test_impossible_arguments_are_refused() -> None:
    ids = np.zeros((3, 1, 1), np.uint8)
    requests = [{"request_id": "0", "label": None, "decode_start": 0, "first_pos": 0, "ids": ids}]
    with pytest.raises(UsageError, match="window of 0"):
        Spec("decode", 0)
    with pytest.raises(UsageError, match="batch size 0"):
        measured(requests, 2, Spec("decode", 2)).windows([0])
    with pytest.raises(UsageError, match="window of 5"):
        measured(requests, 2, Spec("decode", 2)).attribution(5)
    with pytest.raises(UsageError, match="GiB"):
        measured(requests, 2, Spec("decode", 1 << 30))


def test_kernels_know_whether_they_are_compiled() -> None:
    measured(
        [{"request_id": "0", "label": None, "decode_start": 0, "first_pos": 0, "ids": np.zeros((3, 1, 1), np.uint8)}],
        2,
        Spec("all", 2),
    )
    assert kernels.compiled()
