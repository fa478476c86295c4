"""The query library: headers that keep their promises, SQL that agrees with the oracle and with the kernels."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import QueryError, StoreError, TracekitWarning, UsageError
from tracekit.reports import queries
from tracekit.reports.files import shipped
from tracekit.reports.queries import Need, find, parse, prepare, query, run

NAMES = [q.name for q in queries.queries()]
HOSTILE = "a'b\"; DROP VIEW traces; -- <script>\n🦙"


# --- a store, and views made by hand -----------------------------------------------------------


def save(folder: Path, name: str, lengths: Sequence[int], num_experts: int, top_k: int, layers: int) -> Path:
    """Write an array trace in which neighbouring tokens share experts."""
    rng = np.random.default_rng(len(lengths))
    order = rng.random((sum(lengths), layers, num_experts)) + 0.4 * np.sin(np.arange(num_experts))
    order[1:] += 0.8 * order[:-1]
    ids = np.argsort(-order, axis=2)[:, :, :top_k].astype(np.uint8)
    path = folder / f"{name}.npz"
    np.savez(path, expert_ids=ids, request_lens=np.array(lengths, np.int32))
    return path


def save_steps(path: Path, requests: Mapping[str, tuple[np.ndarray, Sequence[int]]], **columns: Any) -> Path:
    """Write a table of verification steps that keep the rows of each request, so many at a time, and reject two."""
    rows = []
    for name, (ids, kept) in requests.items():
        for start, n in zip(np.cumsum([0, *kept[:-1]]).tolist(), kept, strict=True):
            experts = np.concatenate([ids[start : start + n], ids[:1], ids[-1:]])
            about = {key: value[name] if isinstance(value, dict) else value for key, value in columns.items()}
            rows.append({"request_id": name, "start_pos": start, "n_drafted": n + 1, "n_accepted": n - 1, **about})
            rows[-1] |= {"experts": experts.reshape(-1).tolist()}
            rows[-1] |= {"router_weights": np.resize([0.25, 0.75], experts.size).tolist()}
    pl.DataFrame(rows).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    """Two traces of different k: one with prompts and labels; one with neither and a hostile name, but with steps."""
    folder = tmp_path_factory.mktemp("queries")
    labelled = save(folder, "labelled", [12, 9, 20, 15, 7, 11, 16], 16, 3, 3)
    sidecar = [{"request_id": str(i), "prompt_len": 4, "dataset": HOSTILE if i % 3 else "maths"} for i in range(7)]
    tk.ingest(labelled, folder / "store", name="chat", num_experts=16, requests=sidecar, label_fields=["dataset"])
    more = save(folder, "more", [10], 16, 3, 3)
    sidecar = [{"request_id": "without a label", "prompt_len": 4}]
    tk.ingest(more, folder / "store", name="chat", num_experts=16, requests=sidecar, append=True)
    with np.load(save(folder, "bare", [9, 14, 30], 12, 2, 2)) as bare:
        ids = np.split(bare["expert_ids"], [9, 23])
    steps = {"0": (ids[0], [1, 2, 4, 2]), "1": (ids[1], [4, 4, 1, 4, 1]), "2": (ids[2], [3] * 10)}
    path = save_steps(folder / "bare.parquet", steps)
    tk.ingest(path, folder / "store", name=HOSTILE, num_experts=12, top_k=2)
    return tk.open(str(folder / "store"))


@pytest.fixture(scope="module")
def computed(store: tk.Store) -> tk.Store:
    """The store with everything computed that the queries need, and with results that they must not mix in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.windows(store, overlapping=False, intervals=False)
        tk.windows(store, phase="all", intervals=False)
        tk.windows(store, by="request", max_window=4)
        tk.autocorr(store, phase="all", max_lag=4)
        tk.load(store, trace="chat", by="label")
        for name in NAMES:
            prepare(store, name)
    return store


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    from tracekit.store import views

    con = views.connect(tmp_path_factory.mktemp("empty"), [])
    yield con
    con.close()


def by_hand(requests: Sequence[dict[str, Any]], num_experts: int, top_k: int) -> duckdb.DuckDBPyConnection:
    """Return tables with the names and columns of the views that the raw queries read."""
    con = duckdb.connect()
    con.execute(
        "CREATE TABLE traces (trace VARCHAR, num_experts INTEGER, top_k INTEGER, default_phase VARCHAR, "
        "histogram BOOLEAN, router_order BOOLEAN)"
    )
    con.execute("CREATE TABLE counts (trace VARCHAR, request UINTEGER, layer USMALLINT, expert USMALLINT, n UBIGINT)")
    con.execute("CREATE TABLE requests (trace VARCHAR, request UINTEGER, n_tokens UINTEGER, n_decode UINTEGER)")
    con.execute(
        "CREATE TABLE activations (trace VARCHAR, request UINTEGER, layer USMALLINT, pos UINTEGER, phase VARCHAR, "
        "rank UTINYINT, expert USMALLINT, weight FLOAT)"
    )
    phases = [p for p in ("decode", "prefill") if any(oracle.rows(r, p) for r in requests)]
    con.execute("INSERT INTO traces VALUES ('t', ?, ?, ?, false, true)", [num_experts, top_k, (phases or ["all"])[0]])
    rows = []
    for index, request in enumerate(requests):
        start = request["decode_start"]
        where = oracle.positions(request)
        decode = None if start is None else sum(p >= start for p in where)
        con.execute("INSERT INTO requests VALUES ('t', ?, ?, ?)", [index, len(where), decode])
        for pos, layers in zip(where, request["ids"], strict=True):
            phase = "NULL" if start is None else "'decode'" if pos >= start else "'prefill'"
            rows += [
                f"('t', {index}, {layer}, {pos}, {phase}, {rank}, {expert}, NULL)"
                for layer, experts in enumerate(layers)
                for rank, expert in enumerate(experts)
            ]
    con.execute("INSERT INTO activations VALUES " + ", ".join(rows))
    return con


def rows_of(con: duckdb.DuckDBPyConnection, name: str, **variables: Any) -> list[dict[str, Any]]:
    for variable, value in variables.items():
        con.execute(f"SET VARIABLE {variable} = {value!r}")
    result = con.execute(find(name).sql)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def agree(row: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in row.keys() & expected.keys():
        want = expected[name]
        assert row[name] == (want if want is None else pytest.approx(float(want), rel=1e-9, abs=1e-12)), name


# --- headers -----------------------------------------------------------------------------------


def test_the_library_has_the_queries_that_were_promised():
    assert set(NAMES) == {
        *("unique_experts_by_window", "overlap_by_lag", "popularity_by_layer", "imbalance_by_layer"),
        *("weight_kept_by_budget", "unique_experts_by_step", "chart_acceptance"),
        *("reuse_distance", "working_set", "adjacent_overlap", "recall_of_previous_token"),
        *("co_activation", "layer_transitions", "layer_information", "balancedness", "specialisation"),
        *("reduction_by_label", "batch_mix", "full_activation", "summary", "speculation"),
        *("speedup_by_batch", "best_draft_length", "regime_by_batch", "step_time_by_part", "design_points"),
        "cache_misses",
        "prefetch_recall",
        *("chart_windows", "chart_batch", "chart_autocorr", "chart_layer_lag", "chart_attribution"),
        *("chart_budget", "chart_reuse", "chart_locality", "chart_layer_budgets"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_the_parameters_that_the_sql_reads_with_their_defaults(name: str):
    sql = find(name).sql
    body = "\n".join(line for line in sql.splitlines() if not line.startswith("--"))
    assert set(re.findall(r"getvariable\('(\w+)'\)", body)) == {p.name for p in find(name).parameters}
    for parameter in find(name).parameters:
        # A default is a value, or for the length of a window the most that it may be.
        defaults = set(re.findall(rf"getvariable\('{parameter.name}'\), (?:[\w.]*\"window\" <= )?([\d.]+)\)", body))
        assert defaults == (set() if parameter.default is None else {str(parameter.default)})


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_the_columns_of_the_result_with_their_types(name: str, empty: Any, computed: tk.Store):
    documented = [(c.name, c.type) for c in find(name).columns]
    for con in (empty, computed.connect()):
        (statement,) = con.extract_statements(find(name).sql)
        described = con.execute(f"DESCRIBE {statement.query}").fetchall()
        assert [(row[0], row[1]) for row in described] == documented


@pytest.mark.parametrize("name", NAMES)
def test_a_query_over_nothing_is_an_empty_table(name: str, empty: Any):
    assert empty.execute(find(name).sql).fetchall() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_query_is_prose_and_documented(name: str):
    q = find(name)
    assert q.title.endswith(".")
    assert q.text
    assert all(c.text for c in q.columns)
    assert [p.name for p in q.parameters][:2] == ["trace", "phase"]


def test_a_header_is_read_into_units_and_needs():
    q = find("summary")
    assert q.needs[0] == Need("windows", {"max_window": "$window", "batch_size": "1 2 4 8 16 32 64"})
    assert q.needs[0].bind({"window": 5}) == {"max_window": 5, "batch_size": (1, 2, 4, 8, 16, 32, 64)}
    assert find("chart_windows").needs[0].bind({"batch_size": 1}) == {"batch_size": (1,)}
    assert find("reduction_by_label").needs[0].arguments["by"] == "label"
    singles = find("full_activation").needs[0].bind({})
    assert singles == {"max_window": 1, "batch_size": tuple(range(1, 257)), "distinct": True}
    assert {c.name: c.unit for c in find("unique_experts_by_window").columns}["observed"] == "experts"


@pytest.mark.parametrize("header", ["-- Title.\n-- column broken", "-- Title.\nselect 1", "select 1"])
def test_a_header_of_another_form_is_refused(header: str):
    with pytest.raises(QueryError):
        parse("q", header)


# --- parameters --------------------------------------------------------------------------------


def test_parameters_may_be_text_and_are_checked():
    q = find("unique_experts_by_window")
    assert q.bind({"max_window": "4", "phase": "all", "trace": HOSTILE}) == {
        "max_window": 4,
        "phase": "all",
        "trace": HOSTILE,
    }
    assert q.bind({"trace": None}) == {}
    for bad in ({"max_window": "x"}, {"max_window": 0}, {"max_window": True}, {"phase": "both"}, {"trace": 3}):
        with pytest.raises(UsageError):
            q.bind(bad)
    with pytest.raises(UsageError, match="Did you mean 'max_window'"):
        q.bind({"max_windw": 3})
    with pytest.raises(UsageError, match="Did you mean 'summary'"):
        find("sumary")


def test_a_trace_that_is_not_there_is_an_error(store: tk.Store):
    with pytest.raises(StoreError, match="chta"):
        run(store, "popularity_by_layer", {"trace": "chta"})


# --- the raw queries and the oracle ------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[dict[str, Any]], int, int]:
    """Traces with prompts, unknown phases, holes and requests of one token."""
    num_experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, num_experts))
    layers = draw(st.integers(1, 2))
    subset = st.permutations(range(num_experts)).map(lambda p: p[:top_k])
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        where = sorted(draw(st.sets(st.integers(0, 14), min_size=1, max_size=10)))
        ids = [[draw(subset) for _ in range(layers)] for _ in where]
        start = draw(st.none() | st.integers(0, 15))
        requests.append({"positions": where, "ids": ids, "decode_start": start, "label": None})
    return requests, num_experts, top_k


@given(traces(), st.sampled_from(["decode", "prefill", "all"]))
@settings(max_examples=15)
def test_raw_queries_agree_with_the_brute_force(trace: tuple[list[dict[str, Any]], int, int], phase: str):
    requests, num_experts, top_k = trace
    layers = range(oracle.num_layers(requests))
    con = by_hand(requests, num_experts, top_k)
    some = any(oracle.rows(r, phase) for r in requests)

    found = rows_of(con, "unique_experts_by_window", phase=phase, max_window=5)
    expected = [oracle.window_row(requests, num_experts, top_k, window=t, phase=phase) for t in range(1, 6)]
    there = [row for row in expected if row["n_windows"]]
    assert [row["window"] for row in found] == [row["window"] for row in there]
    for row, want in zip(found, there, strict=True):
        agree(row, want)

    found = rows_of(con, "overlap_by_lag", phase=phase, max_lag=6)
    expected = [oracle.autocorr_row(requests, num_experts, top_k, lag=d, phase=phase) for d in range(1, 7)]
    there = [row for row in expected if row["n_pairs"]]
    assert [row["lag"] for row in found] == [row["lag"] for row in there]
    for row, want in zip(found, there, strict=True):
        agree(row, want)

    pools = {layer: oracle.counts(requests, phase, layer) for layer in layers if some}
    found = rows_of(con, "imbalance_by_layer", phase=phase)
    assert [row["layer"] for row in found] == list(pools)
    for row in found:
        agree(row, oracle.load_row(*pools[row["layer"]], num_experts, top_k))

    found = rows_of(con, "popularity_by_layer", phase=phase)
    assert [(row["layer"], row["expert"]) for row in found] == [(la, e) for la in pools for e in range(num_experts)]
    for row in found:
        c, n = pools[row["layer"]]
        assert row["tokens"] == c[row["expert"]]
        assert row["popularity"] == pytest.approx(c[row["expert"]] / n)
        assert row["relative"] == pytest.approx(c[row["expert"]] / n * num_experts / top_k)
        ahead = [e for e in range(num_experts) if (-c[e], e) < (-c[row["expert"]], row["expert"])]
        assert row["rank"] == len(ahead) + 1
    con.close()


def test_the_phase_is_decode_where_it_is_known_and_else_what_there_is():
    def phases(*starts: int | None) -> set[str]:
        ids = [[[0]], [[1]], [[0]]]
        con = by_hand([{"ids": ids, "decode_start": start} for start in starts], 2, 1)
        return {row["phase"] for row in rows_of(con, "unique_experts_by_window")}

    assert phases(0) == phases(2) == phases(None, 2) == {"decode"}
    assert phases(3) == {"prefill"}
    assert phases(None) == {"all"}


# --- SQL and kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [None, "all", "decode", "prefill"])
def test_sql_and_kernels_agree(computed: tk.Store, phase: Any):
    params = {"trace": "chat", "phase": phase}

    def same(name: str, kernel: pl.DataFrame, keys: list[str]) -> None:
        sql = run(computed, name, params)
        assert sql.height == kernel.height > 0
        shared = [c for c in sql.columns if c in kernel.columns]
        pairs = zip(sql.sort(keys).select(shared).rows(), kernel.sort(keys).select(shared).rows(), strict=True)
        for left, right in pairs:
            assert left == tuple(pytest.approx(v) if isinstance(v, float) else v for v in right)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        same("unique_experts_by_window", tk.windows(computed, **params, intervals=False), ["window"])
        same("overlap_by_lag", tk.autocorr(computed, **params, intervals=False), ["lag"])
        same("imbalance_by_layer", tk.load(computed, **params), ["layer"])


@pytest.mark.parametrize("phase", [None, "all"])
def test_sql_and_kernels_agree_about_steps(computed: tk.Store, phase: Any):
    params = {"trace": HOSTILE, "phase": phase}
    sql, kernel = run(computed, "unique_experts_by_step", params), tk.steps(computed, **params, intervals=False)
    assert sql["window"].to_list() == kernel["window"].to_list() == [3, 4, 5, 6, None]
    for left, right in zip(sql.rows(named=True), kernel.drop("trace", "phase").rows(named=True), strict=True):
        agree(left, right)


@pytest.mark.parametrize("top_k", [3, None])
def test_traces_of_counts_are_answered_as_the_tokens_they_count(store: tk.Store, tmp_path: Path, top_k: int | None):
    tokens = run(store, "popularity_by_layer", {"trace": "chat", "phase": "all"})
    lines = [f"{row['layer']},{row['expert']},{row['tokens']}" for row in tokens.iter_rows(named=True) if row["tokens"]]
    (tmp_path / "counts.csv").write_text("\n".join(["layer_id,expert_id,count", *lines]))
    tk.ingest(tmp_path / "counts.csv", tmp_path / "S", name="chat", num_experts=16, top_k=top_k)
    counted = tk.open(tmp_path / "S")
    assert counted.trace().meta.histogram
    unknown = {"popularity", "relative"} if top_k is None else set()
    found = run(counted, "popularity_by_layer", {})
    assert found.drop(unknown).rows() == tokens.drop(unknown).rows()
    assert all(found[name].is_null().all() for name in unknown)
    unknown = {"tokens", "top_share", "sum_p2_over_k"} if top_k is None else set()
    imbalance = run(counted, "imbalance_by_layer", {})
    expected = run(store, "imbalance_by_layer", {"trace": "chat", "phase": "all"})
    for other in (expected, tk.load(counted).select(imbalance.columns)):
        for left, right in zip(imbalance.drop(unknown).rows(), other.drop(unknown).rows(), strict=True):
            assert left == tuple(pytest.approx(v) if isinstance(v, float) else v for v in right)
    assert all(imbalance[name].is_null().all() for name in unknown)
    for name in ("popularity_by_layer", "imbalance_by_layer"):
        assert run(counted, name, {"phase": "decode"}).is_empty()  # counts know no phase
        assert run(store, name, {"phase": "all"}).height  # the counts of a routed trace are not added to it


def test_chart_queries_return_the_metric_frames_of_one_phase(computed: tk.Store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        frames = {
            "chart_windows": tk.windows(computed, trace="chat"),
            "chart_batch": tk.windows(computed, trace="chat", batch_size=[2**i for i in range(9)]).filter(window=4),
            "chart_autocorr": tk.autocorr(computed, trace="chat"),
            "chart_layer_lag": tk.autocorr(computed, trace="chat", by="layer"),
            "chart_attribution": tk.attribution(computed, trace="chat"),
        }
    for name, frame in frames.items():
        found = run(computed, name, {"trace": "chat"})
        shape = found.select("num_experts", "top_k").unique().rows()
        assert shape == [(16, 3)]
        common = [c for c in frame.columns if c not in ("jaccard", "any_shared", "rank0_repeat")]
        assert set(found.columns) - set(common) == {"model", "num_experts", "top_k"}
        keys = [c for c in ("layer", "batch_size", "window", "lag", "cause") if c in frame.columns]
        assert found.sort(keys).select(common).equals(frame.sort(keys).select(common))


def test_parameters_select_rows(computed: tk.Store):
    both = run(computed, "chart_windows")
    assert set(both["trace"]) == {"chat", HOSTILE}
    assert set(both.filter(trace="chat")["phase"]) == {"decode"}
    assert set(both.filter(trace=HOSTILE)["phase"]) == {"all"}
    assert set(run(computed, "chart_windows", {"phase": "all"})["phase"]) == {"all"}
    assert set(run(computed, "chart_windows", {"trace": HOSTILE})["trace"]) == {HOSTILE}
    assert run(computed, "chart_autocorr", {"trace": "chat", "max_lag": 5})["lag"].to_list() == [1, 2, 3, 4, 5]
    assert set(run(computed, "chart_batch", {"window": 2})["window"]) == {2}


def test_the_reduction_by_label_has_a_row_per_label(computed: tk.Store):
    found = run(computed, "reduction_by_label")
    assert found["trace"].to_list() == ["chat"] * 3
    assert dict(found.select("label", "requests").rows()) == {"maths": 3, HOSTILE: 4, "(none)": 1}
    # Decode tokens: every request without its four prompt tokens.
    tokens = {"maths": 12 + 15 + 16 - 12, HOSTILE: 9 + 20 + 7 + 11 - 16, "(none)": 10 - 4}
    assert dict(found.select("label", "tokens").rows()) == tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        kernel = tk.windows(computed, trace="chat", by="label").filter(window=4).sort("label")
    names = ["label", "n_windows", "observed", "reduction_request", "reduction_popularity_lo"]
    assert found.sort("label").select(names).equals(kernel.select(names))


def test_the_summary_quotes_the_metrics(computed: tk.Store):
    found = run(computed, "summary", {"trace": "chat"})
    page = {(r["section"], r["measure"], r["baseline"]): r for r in found.rows(named=True)}
    assert len(page) == found.height
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        at_4 = tk.windows(computed, trace="chat").filter(window=4).row(0, named=True)
        lags = {r["lag"]: r for r in tk.autocorr(computed, trace="chat").rows(named=True)}
        causes = {r["cause"]: r for r in tk.attribution(computed, trace="chat").rows(named=True)}
        load = tk.load(computed, trace="chat")
    unique = "unique experts, T = 4"
    assert page["trace", "requests", None]["value"] == 8
    assert page["trace", "requests", None]["note"] == "fewer than 30: intervals are rough"
    assert page["trace", "tokens", None]["value"] == 68
    assert page[unique, "observed", None]["lo"] == at_4["observed_lo"]
    assert page[unique, "observed / k", None]["value"] == at_4["per_top_k"]
    for name in ("uniform", "popularity", "label", "request"):
        assert page[unique, "expected", name]["value"] == at_4[f"expected_{name}"]
        assert page[unique, "reduction", name]["hi"] == at_4[f"reduction_{name}_hi"]
    for cause, row in causes.items():
        figure = page["share of the drop, T = 4", cause.replace("_", " "), None]
        assert figure["value"] == row["share"]
        assert ("not resolved" in figure["note"]) != row["resolved"]
    assert page["overlap", "lag 8", None]["value"] == lags[8]["overlap"]
    assert page["overlap", "rho, lag 2", "popularity"]["value"] == lags[2]["rho"]
    assert page["reduction in a batch, T = 4", "4 requests", "uniform"]["unit"] == "fraction"
    # One of the 8 requests has three decode tokens and no window.
    assert ("reduction in a batch, T = 4", "8 requests", "uniform") not in page
    assert page["load", "entropy / ln N", None]["value"] == pytest.approx(load["entropy_norm"].mean())
    assert page["load", "dead experts", None]["value"] == load["dead_experts"].sum()
    assert page["load", "dead experts", None]["note"] == "of 48, in all layers"
    sections = found["section"].unique(maintain_order=True).to_list()
    assert sections[:3] == ["trace", unique, "share of the drop, T = 4"]


def test_a_query_computes_what_it_needs_and_leaves_out_traces_that_cannot_say(tmp_path: Path):
    first = save(tmp_path, "a", [9] * 6, 8, 2, 2)
    sidecar = [{"request_id": str(i), "prompt_len": 2} for i in range(6)]
    tk.ingest(first, tmp_path / "s", name="phased", num_experts=8, requests=sidecar)
    tk.ingest(first, tmp_path / "s", name="unphased", num_experts=8)
    fresh = tk.open(str(tmp_path / "s"))
    assert run(fresh, "chart_windows").is_empty()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = query(fresh, "chart_windows", intervals=False, phase="prefill")
        assert set(found["trace"]) == {"phased"}
        assert found["observed_lo"].null_count() == found.height
        with pytest.raises(tk.TracekitError, match="which rows are prompt"):
            query(fresh, "chart_windows", trace="unphased", phase="prefill")


# --- a trace small enough to check by hand ------------------------------------------------------


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    """Six decode tokens, two layers, N = 4, k = 2.

    Windows of 2: three in the first request, one in the second. Their unions hold 2, 3, 3 and 2 experts in layer 0
    and always 4 in layer 1: U(2) = (10/4 + 4) / 2 = 3.25, where uniform says 4 (1 - (1/2)^2) = 3. At lag 1 they share
    2, 1, 1, 2 of 2 experts in layer 0 and none in layer 1: overlap (6/8 + 0) / 2 = .375, and 2 (2 - .375) = 3.25.
    """
    first = [[[0, 1], [0, 1]], [[0, 1], [2, 3]], [[0, 2], [0, 1]], [[0, 1], [2, 3]]]
    second = [[[2, 3], [0, 2]], [[2, 3], [1, 3]]]
    folder = tmp_path_factory.mktemp("hand")
    steps = {"a": (np.array(first, np.uint8), [2, 2]), "b": (np.array(second, np.uint8), [1, 1])}
    path = save_steps(folder / "hand.parquet", steps, topic={"a": "maths", "b": "prose"}, prompt_len=0)
    tk.ingest(path, folder / "store", name="hand", num_experts=4, top_k=2, label_fields=["topic"])
    store = tk.open(str(folder / "store"))
    # A model of two layers of which a step reads experts and little else, so that V is near U(2, B) / U(1, B).
    sizes = {"num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 64, "num_attention_heads": 1}
    shape = {"model_type": "olmoe", "_name_or_path": "small", "num_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1, **shape, **sizes}))
    asked: dict[str, Any] = {"batch_size": [1, 2], "drafts": 1, "model": folder, "context": 0}
    asked |= {"bandwidth": 1e8, "flops": 1e12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.speedup(store, **asked, acceptance_rate=0.5, draft_cost=0.1)
        tk.step_time(store, **asked)
    return store


@pytest.mark.parametrize("name", NAMES)
def test_a_query_gives_its_golden_result(name: str, hand: tk.Store, checkout: Path):
    """UPDATE_GOLDEN=1 writes the files anew; a change to one is explained where it is committed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        frame = query(hand, name)
    frame = frame.with_columns(pl.selectors.float().round(6) + 0.0)  # no negative zero
    text = frame.write_csv(float_precision=6)
    path = checkout / "tests" / "golden" / f"{name}.csv"
    if "UPDATE_GOLDEN" in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# --- the duckdb shell --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell() -> str:
    return pytest.importorskip("duckdb_cli", reason="no duckdb shell: pip install duckdb-cli").__name__


def test_every_query_runs_unchanged_in_the_shell(shell: str, computed: tk.Store, tmp_path: Path):
    (tmp_path / "views.sql").write_text(computed.views(), encoding="utf-8")
    folder = shipped("queries")
    for name in NAMES:
        script = f".read '{folder / name}.sql'\n"
        if name == "unique_experts_by_window":
            script = "SET VARIABLE max_window = 3;\n" + script
        done = subprocess.run(
            [sys.executable, "-m", shell, "-init", str(tmp_path / "views.sql"), "-csv"],
            input=script,
            capture_output=True,
            text=True,
            check=True,
        )
        found = list(csv.reader(io.StringIO(done.stdout)))
        expected = run(computed, name, {"max_window": 3} if name == "unique_experts_by_window" else None)
        assert found[0] == expected.columns, done.stderr
        assert len(found) - 1 == expected.height


# --- the published figures ---------------------------------------------------------------------


def test_the_raw_queries_give_the_worked_figures_of_gpt_oss(shared: Path, tmp_path: Path):
    folder = shared / "traces" / "gptoss20b_subset64"
    tk.ingest(
        folder / "trace.npz",
        tmp_path / "s",
        name="gptoss",
        requests=folder / "requests.json",
        label_fields=["dataset"],
        num_experts=32,
        phase="decode",
    )
    gptoss = tk.open(str(tmp_path / "s"))
    at_4 = run(gptoss, "unique_experts_by_window", {"max_window": 4}).row(3, named=True)
    assert [round(at_4[f"{name}"], 4) for name in ("observed", "expected_uniform", "expected_popularity")] == [
        9.3028,
        13.2422,
        12.1333,
    ]
    lags = run(gptoss, "overlap_by_lag", {"max_lag": 32})
    at = {lag: round(overlap, 4) for lag, overlap in lags.select("lag", "overlap").rows()}
    assert [at[d] for d in (1, 2, 3, 4, 8, 16, 32)] == [0.4402, 0.3838, 0.3772, 0.3709, 0.3580, 0.3443, 0.3377]
    assert round(lags["expected_popularity"][0], 4) == 0.1869
