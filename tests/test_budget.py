"""Expert budgets: the kernel, the SQL and a brute force with exact fractions agree; weights decide, not their scale."""

from __future__ import annotations

import warnings
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
from tracekit.metrics.budget import Budgets, BudgetSpec
from tracekit.reports.queries import query, run
from tracekit.reports.tables import render
from tracekit.schema import TraceMeta
from tracekit.store import Block
from tracekit.store.steps import StepRows

NUMBER = ("unique", "loaded", "weight_kept", "tokens_intact", "experts_for_share")
COARSE = pl.selectors.float().round(9)


DYADIC = {1: [[1], [3]], 2: [[1, 1], [0.25, 0.75], [4, 0]], 3: [[2, 1, 1], [5, 2, 1], [1, 1, 6]]}
"""Weights of a token by k, whose shares are not rounded: so ties are ties."""


def brute_force(
    requests: list[dict[str, Any]], phase: str, layer: int, length: int, budget: int, share: Fraction
) -> dict[str, Any]:
    """One row from the definition: windows, the experts of each by weight, and what the first m of them keep."""
    sums: dict[str, Any] = dict.fromkeys(NUMBER, Fraction(0))
    n = left_out = 0
    for request in requests:
        for window in oracle.windows(request, phase, length):
            weights = [[Fraction(float(w)) for w in request["weights"][row][layer]] for row in window]
            if any(min(w) < 0 or sum(w) == 0 for w in weights):
                left_out += 1
                continue
            ids = [[int(e) for e in request["ids"][row][layer]] for row in window]
            mass = {e: Fraction(0) for token in ids for e in token}
            for token, w in zip(ids, weights, strict=True):
                for e, part in zip(token, w, strict=True):
                    mass[e] += part / sum(w)
            best = sorted(mass, key=lambda e: (-mass[e], e))
            n += 1
            sums["unique"] += len(mass)
            sums["loaded"] += min(budget, len(mass))
            sums["weight_kept"] += sum(mass[e] for e in best[:budget]) / length
            sums["tokens_intact"] += Fraction(sum(set(token) <= set(best[:budget]) for token in ids), length)
            sums["experts_for_share"] += next(
                m for m in range(1, len(best) + 1) if sum(mass[e] for e in best[:m]) >= share * length
            )
    return {"n_windows": n, "n_left_out": left_out} | {name: s / n if n else None for name, s in sums.items()}


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[dict[str, Any]], int, int]:
    """Requests of 2 layers; some tokens have no weights."""
    top_k = draw(st.integers(1, 3))
    num_experts = draw(st.integers(top_k, 6))
    weight = st.sampled_from(DYADIC[top_k]).flatmap(st.permutations)
    requests = []
    for i in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(1, 7))
        ids = [[draw(st.permutations(range(num_experts)))[:top_k] for _ in range(2)] for _ in range(tokens)]
        weights = np.array([[draw(weight) for _ in range(2)] for _ in range(tokens)], float)
        if draw(st.integers(0, 3)) == 0:
            weights[draw(st.integers(0, tokens - 1)), draw(st.integers(0, 1))] = draw(st.sampled_from([-1.0, 0.0]))
        start = draw(st.sampled_from([0, 2]))
        requests.append(
            {"request_id": f"r{i}", "label": None, "decode_start": start, "ids": ids, "weights": weights.tolist()}
        )
    return requests, num_experts, top_k


def frame_of(requests: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "request_id": [r["request_id"] for r in requests],
            "label": pl.Series([None] * len(requests), dtype=pl.String),
            "decode_start": [r["decode_start"] for r in requests],
            "n_tokens": [len(r["ids"]) for r in requests],
            "n_decode": [max(0, len(r["ids"]) - r["decode_start"]) for r in requests],
        }
    )


def measured(requests: list[dict[str, Any]], num_experts: int, spec: BudgetSpec, *, nan: bool = False) -> pl.DataFrame:
    """Run the kernel over the requests, layer by layer in one block; negative weights are NaN if so asked."""
    top_k = len(requests[0]["ids"][0][0])
    meta = TraceMeta(num_experts, top_k, (0, 1), "test")
    ids, weights, runs = [], [], []
    for number, request in enumerate(requests):
        for layer in (0, 1):
            n = len(request["ids"])
            runs.append((sum(map(len, ids)), number, layer, 0, n))
            ids.append(np.array(request["ids"], np.uint8)[:, layer])
            weights.append(np.array(request["weights"], np.float32)[:, layer])
    columns = dict(zip(("row", "request", "layer", "pos", "n"), np.array(runs, np.int64).T, strict=True))
    of_rank = np.ascontiguousarray(np.concatenate(weights).T)
    if nan:
        of_rank[of_rank < 0] = np.nan
    block = Block(np.ascontiguousarray(np.concatenate(ids).T), columns, of_rank)
    return Budgets(meta, frame_of(requests), spec, [block], 2).budget()


@given(traces(), st.sampled_from(["decode", "all"]), st.booleans(), st.sampled_from([Fraction(1, 2), Fraction(1)]))
def test_budgets_equal_the_brute_force(
    trace: tuple[list[dict[str, Any]], int, int], phase: Any, nan: bool, share: Fraction
) -> None:
    requests, num_experts, _ = trace
    if not any(oracle.rows(r, phase) for r in requests):
        return
    lengths, budgets = (1, 2, 4), tuple(range(1, num_experts + 1))
    spec = BudgetSpec(phase, max_window=4, lengths=lengths, budgets=budgets, share=float(share), by="layer")
    frame = measured(requests, num_experts, spec, nan=nan)
    assert frame.height == 2 * len(lengths) * len(budgets)
    for row in frame.iter_rows(named=True):
        expected = brute_force(requests, phase, row["layer"], row["window"], row["budget"], share)
        for name, value in expected.items():
            assert row[name] == (value if value is None else pytest.approx(float(value), rel=1e-9)), (name, row)


@given(traces(), st.sampled_from(["decode", "all"]))
def test_steps_are_windows_of_their_own(trace: tuple[list[dict[str, Any]], int, int], phase: Any) -> None:
    """Each request is one step of as many rows as it has tokens, which begins at its first token."""
    requests, num_experts, top_k = trace
    begun = [r for r in requests if phase == "all" or r["decode_start"] == 0]
    if not begun:
        return
    rows = [(i, layer, t) for i, r in enumerate(requests) for layer in (0, 1) for t in range(len(r["ids"]))]
    number, layers, pos = np.array(rows, np.int64).T

    def columns(name: str, dtype: Any) -> Any:
        return np.ascontiguousarray(np.array([requests[i][name][t][layer] for i, layer, t in rows], dtype).T)

    kept = np.ones(len(rows), np.int8)
    steps = StepRows(columns("ids", np.uint8), number, layers, 0 * pos, pos, kept, columns("weights", np.float32))
    lengths, budgets = tuple(range(1, 8)), tuple(range(1, num_experts + 1))
    spec = BudgetSpec(phase, max_window=7, lengths=lengths, budgets=budgets, share=0.5, by="layer", steps=True)
    meta = TraceMeta(num_experts, top_k, (0, 1), "test")
    try:
        frame = Budgets(meta, frame_of(requests), spec, [steps], 2).budget()
    except UnsupportedError:
        unusable = [[min(t[layer]) < 0 or sum(t[layer]) == 0 for t in r["weights"]] for r in begun for layer in (0, 1)]
        assert all(any(tokens) for tokens in unusable)
        return
    for row in frame.iter_rows(named=True):
        mine = [{**r, "decode_start": 0} for r in begun if len(r["ids"]) == row["window"]]
        expected = brute_force(mine, "decode", row["layer"], row["window"], row["budget"], Fraction(1, 2))
        for name, value in expected.items():
            assert row[name] == (value if value is None else pytest.approx(float(value), rel=1e-9)), (name, row)


def test_a_window_worked_by_hand() -> None:
    """Two tokens choose {0, 1} and {0, 2} with weights .75, .25 and .5, .5: expert 0 has .625 of the weight, 2 has .25
    and 1 has .125. One expert keeps .625 and no whole token, two keep .875 and the second token."""
    request = {
        "request_id": "r",
        "decode_start": 0,
        "ids": [[[0, 1], [0, 1]], [[0, 2], [0, 2]]],
        "weights": [[[0.75, 0.25], [3, 1]], [[0.5, 0.5], [7, 7]]],  # layer 1: the same, not normalised
    }
    spec = BudgetSpec("decode", max_window=2, lengths=(2,), budgets=(1, 2, 3, 4), share=0.9)
    frame = measured([request], 4, spec)
    assert frame["weight_kept"].to_list() == [0.625, 0.875, 1.0, 1.0]
    assert frame["tokens_intact"].to_list() == [0.0, 0.5, 1.0, 1.0]
    assert frame["loaded"].to_list() == [1.0, 2.0, 3.0, 3.0]
    assert frame["per_top_k"].to_list() == [0.5, 1.0, 1.5, 1.5]
    assert frame["experts_for_share"].to_list() == [3.0] * 4
    assert frame["unique"].to_list() == [3.0] * 4


def make(folder: Path, name: str, weights: Any, *, requests: int = 8, tokens: int = 12, **options: Any) -> tk.Store:
    rng = np.random.default_rng(len(name))
    ids = np.argsort(rng.random((requests * tokens, 2, 8)) + 0.3 * np.sin(np.arange(8)), axis=2)[:, :, :3]
    arrays = {} if weights is None else {"router_weights": weights(rng, ids.shape).astype(np.float32)}
    lens = np.full(requests, tokens, np.int32)
    np.savez(folder / f"{name}.npz", expert_ids=ids.astype(np.uint8), request_lens=lens, **arrays)
    tk.ingest(folder / f"{name}.npz", folder / "store", name=name, num_experts=8, phase="decode", **options)
    return tk.open(str(folder / "store"))


def dyadic(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Weights of which no sum of shares is rounded: 1/2, 1/4, 1/4 in some order, in several scales."""
    order = rng.permuted(np.broadcast_to([0.5, 0.25, 0.25], shape), axis=2)
    return order * 2.0 ** rng.integers(-2, 3, (*shape[:2], 1))


def quiet(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        return call()


def test_sql_and_kernel_agree(tmp_path: Path) -> None:
    def holes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        weights = dyadic(rng, shape)
        weights[[5, 17, 40], 0] = 0
        return weights

    store = make(tmp_path, "hostile 'name'; --", holes)
    for window, percent in ((1, 90), (3, 75), (4, 90)):
        raw = run(store, "weight_kept_by_budget", {"window": window, "percent": percent})
        most = raw["budget"].to_list()
        kernel = quiet(lambda w=window, p=percent, m=most: tk.budget(store, window=w, budget=m, share=p / 100))
        kernel = kernel.rename({"unique": "unique_experts"}).select(raw.columns)
        assert_frame_equal(raw.with_columns(COARSE), kernel.with_columns(COARSE), check_dtypes=False, abs_tol=1e-9)
        # "all" is the decode phase of this trace under another name.
        raw = run(store, "weight_kept_by_budget", {"window": window, "percent": percent, "phase": "all"})
        assert raw["weight_kept"].to_list() == pytest.approx(kernel["weight_kept"].to_list())


def test_a_result_is_saved_and_read_again_and_read_by_sql(tmp_path: Path) -> None:
    store = make(tmp_path, "t", dyadic)
    first = quiet(lambda: tk.budget(store, window=[2, 4], by="layer"))
    # k, 2 k, … up to what each window can use, and never more than there are.
    assert first["budget"].unique().to_list() == [3, 6, 8]
    assert first.filter(window=2)["budget"].unique().to_list() == [3, 6]
    assert quiet(lambda: tk.budget(store, window=[2, 4], by="layer")).equals(first)
    saved = store.sql("""SELECT * FROM budget WHERE "by" = 'layer' ORDER BY layer, "window", budget""")
    assert saved["weight_kept"].to_list() == first["weight_kept"].to_list()
    asked = quiet(lambda: tk.budget(store, window=4, budget=5, share=0.5))
    assert asked.select("window", "budget", "share").row(0) == (4, 5, 0.5)
    assert asked["experts_for_share"][0] < first["experts_for_share"].min()


def test_the_interval_is_the_jackknife_over_requests(tmp_path: Path) -> None:
    store = make(tmp_path, "t", dyadic)
    [row] = quiet(lambda: tk.budget(store, window=4, budget=4)).rows(named=True)
    each = quiet(lambda: tk.budget(store, window=4, budget=4, by="request"))
    values = np.array(each["weight_kept"])  # requests of one length: every one weighs the same
    without = (values.sum() - values) / (len(values) - 1)
    half = 2.3646 * np.sqrt((len(values) - 1) / len(values) * np.square(without - without.mean()).sum())
    assert row["weight_kept_hi"] - row["weight_kept_lo"] == pytest.approx(2 * half, rel=1e-4)
    assert each["weight_kept_lo"].null_count() == each.height
    few = quiet(lambda: tk.budget(make(tmp_path, "few", dyadic, requests=4), trace="few", window=4))
    assert few["weight_kept_lo"].null_count() == few.height


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path, "bare", None)
    with pytest.raises(UnsupportedError, match=r"^the trace has no router weights.*Capture them with") as caught:
        tk.budget(store)
    assert "expected" in str(caught.value)
    make(tmp_path, "weighed", dyadic)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always", TracekitWarning)
        assert tk.budget(store)["trace"].unique().to_list() == ["weighed"]
    assert "trace 'bare' is left out: the trace has no router weights" in [str(w.message) for w in caught_warnings]
    source, sidecar = tmp_path / "bare.npz", [{"request_id": f"more{i}"} for i in range(8)]
    make(tmp_path, "mixed", dyadic)
    tk.ingest(source, store.path, name="mixed", num_experts=8, phase="decode", requests=sidecar, append=True)
    with pytest.raises(UnsupportedError, match="1 of the trace's 2 ingests have no router weights"):
        tk.budget(store, trace="mixed")
    for ask, found in (
        ({"budget": 0}, "a budget of 0 experts"),
        ({"budget": [2, 9]}, "a budget of 9 experts; expected 1 to 8"),
        ({"budget": []}, "no budget"),
        ({"share": 0}, "a share of 0 of the router weight"),
        ({"share": float("nan")}, "a share of nan of the router weight"),
        ({"window": 0}, "windows of 0 tokens"),
        ({"window": [0, 4]}, "windows of 0 tokens"),
    ):
        with pytest.raises(UsageError, match=found):
            quiet(lambda ask=ask: tk.budget(store, trace="weighed", **ask))
    with pytest.raises(UnsupportedError, match="no request has 13 consecutive decode tokens"):
        tk.budget(store, trace="weighed", window=13)


def test_the_tables_fit_and_name_the_share(tmp_path: Path) -> None:
    store = make(tmp_path, "t", dyadic)
    text = render(quiet(lambda: tk.budget(store, share=0.75)), layout="budget")
    assert isinstance(text, str)
    assert "carry 75 % of the weight" in " ".join(text.split())
    grouped = render(quiet(lambda: tk.budget(store, by="layer", budget=6)), layout="budget")
    assert isinstance(grouped, str)
    assert "budget 6" in grouped
    assert max(len(line) for line in (text + grouped).splitlines()) <= 80


def test_a_query_over_traces_without_weights_is_empty(tmp_path: Path) -> None:
    assert query(make(tmp_path, "bare", None), "weight_kept_by_budget").is_empty()


def test_real_weights(shared: Path, tmp_path: Path) -> None:
    """Sampled output of a trained model: 12 of 32 experts keep 97 % of the weight of 4 tokens, 8 of them 82 %."""
    files = sorted((shared / "moe/traces/olmoe/npz").glob("sampled-*.npz"))
    config = shared / "moe/traces/olmoe/config.json"
    tk.ingest(files, tmp_path / "store", name="olmoe", config=config)
    rows = {row["budget"]: row for row in quiet(lambda: tk.budget(tmp_path / "store", window=4)).rows(named=True)}
    assert rows[4]["unique"] == pytest.approx(tk.windows(tmp_path / "store", max_window=4)["observed"][3])
    assert rows[4]["experts_for_share"] == pytest.approx(9.935, abs=1e-3)
    assert [round(rows[m]["weight_kept"], 3) for m in (4, 8, 12, 16)] == [0.554, 0.816, 0.971, 1.0]
    assert [round(rows[m]["tokens_intact"], 3) for m in (4, 8, 12, 16)] == [0.049, 0.331, 0.846, 1.0]


def test_real_steps(shared: Path, tmp_path: Path) -> None:
    """Rejected drafts included: 12 of 32 experts keep as much of the weight as in windows of committed tokens."""
    folder = shared / "moe/traces/olmoe"
    store = tmp_path / "store"
    tk.ingest(
        folder / "verify_steps.parquet", store, name="olmoe", config=folder / "config.json", label_fields=["mode"]
    )
    frame = quiet(lambda: tk.budget(store, steps=True, by="label", budget=[8, 12]))
    sampled = frame.filter(label="sampled", window=4)
    assert sampled["n_windows"].to_list() == [6037, 6037]
    assert round(sampled["unique"][0], 2) == 12.01
    assert [round(share, 3) for share in sampled["weight_kept"]] == [0.813, 0.971]
    with pytest.raises(UnsupportedError, match="no verification step of 9 decode tokens has router weights"):
        tk.budget(store, steps=True, window=9)
