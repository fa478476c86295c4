"""The store: what an ingest leaves behind, whatever happens to it, and what SQL over it can reach."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.errors import QueryError, SourceError, StoreError, UnsupportedError, UsageError
from tracekit.store import manifest, writer

HOSTILE = [
    "it's",
    'a "b"',
    "../../etc/x",
    "<script>alert(1)</script>",
    "a\nb",
    "🚀 trace",
    "007",
    "-",
    "'; DROP TABLE x --",
    "*",
]


def npz(
    path: Path,
    *,
    requests: int = 3,
    tokens: int = 6,
    layers: int = 2,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
) -> Path:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((requests * tokens, layers, num_experts)), axis=2)[:, :, :top_k]
    ids = ids.astype(np.uint8 if num_experts <= 256 else np.uint16)
    np.savez(path, expert_ids=ids, request_lens=np.full(requests, tokens, np.int32), num_experts=num_experts)
    return path


def ingest(source: Path, store: Path, **options: object) -> tk.TraceInfo:
    return tk.ingest(source, store, **{"phase": "decode", "axes": "tlk", **options})  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return npz(tmp_path / "trace.npz")


@pytest.fixture
def store(tmp_path: Path, source: Path) -> tk.Store:
    ingest(source, tmp_path / "S", name="t")
    return tk.open(tmp_path / "S")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def test_what_goes_in_comes_out(store: tk.Store, source: Path) -> None:
    ids = np.load(source)["expert_ids"]
    rows = store.sql("SELECT request, layer, pos, experts FROM routing ORDER BY request, layer, pos")
    back = np.array(rows["experts"].to_list()).reshape(3, 2, 6, 2).transpose(0, 2, 1, 3).reshape(18, 2, 2)
    assert np.array_equal(back, ids)
    long = store.sql("SELECT * FROM activations ORDER BY request, layer, pos, rank")
    assert np.array_equal(long["expert"].to_numpy().reshape(3, 2, 6, 2).transpose(0, 2, 1, 3).reshape(18, 2, 2), ids)
    assert long["phase"].unique().to_list() == ["decode"]
    trace = store.trace()
    assert (trace.requests, trace.tokens, trace.rows) == (3, 18, 36)
    assert store.sql("SELECT moe_layers, num_experts, top_k FROM traces").row(0) == (2, 8, 2)


def test_parts_hold_one_row_group_and_the_runs_lead_to_their_rows(
    store: tk.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = npz(tmp_path / "long.npz", requests=4, tokens=30, layers=5)
    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 70)  # a request has 150 rows: it is split between layers
    trace = ingest(source, store.path, name="split")
    parts = list((store.path / "segments" / trace.segments[0].id).glob("part-*.parquet"))
    assert len(parts) == len(trace.segments[0].parts) > 4
    for part in parts:
        groups = duckdb.sql(f"SELECT count(DISTINCT row_group_id) FROM parquet_metadata('{part}')").fetchall()
        assert groups == [(1,)]
    whole = ingest(source, store.path.with_name("W"), name="whole")
    for block in store.blocks(trace):
        ends = block.runs["row"] + block.runs["n"]
        assert ends[-1] == block.ids.shape[1]
    split = tk.windows(store, trace="split", max_window=4, intervals=False).drop("trace")
    assert split.equals(tk.windows(store.path.with_name("W"), max_window=4, intervals=False).drop("trace"))
    assert whole.tokens == trace.tokens


def test_ids_beyond_a_byte_and_traces_of_different_k_live_in_one_store(store: tk.Store, tmp_path: Path) -> None:
    ingest(npz(tmp_path / "wide.npz", num_experts=400, top_k=5, seed=1), store.path, name="wide")
    counted = store.sql(
        "SELECT trace, max(expert) AS m, max(rank) AS r, count(*) AS n FROM activations GROUP BY trace ORDER BY trace"
    )
    assert counted["r"].to_list() == [1, 4]
    assert counted["n"].to_list() == [72, 180]
    assert counted["m"][1] > 255
    assert store.sql("SELECT max(len(experts)) AS k FROM routing WHERE trace = 'wide'")["k"].to_list() == [5]
    assert tk.windows(store, trace="wide", max_window=2, intervals=False)["observed"][0] == 5


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_data(source: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "a *store* [x] 'q'"
    info = ingest(source, root, name=name, labels={"k": name})
    assert info.name == name
    store = tk.open(root)
    assert store.sql("SELECT DISTINCT trace FROM routing")["trace"].to_list() == [name]
    assert store.sql("SELECT DISTINCT label FROM requests")["label"].to_list() == [name]
    assert tk.windows(store, trace=name, max_window=2, intervals=False)["trace"].unique().to_list() == [name]
    assert store.sql("SELECT DISTINCT trace FROM windows")["trace"].to_list() == [name]
    assert {p.name for p in tmp_path.iterdir()} == {root.name, "trace.npz"}


def test_an_existing_name_needs_append_or_force(store: tk.Store, source: Path, tmp_path: Path) -> None:
    before = contents(store.path)
    with pytest.raises(StoreError, match=r"--append.*--force"):
        ingest(source, store.path, name="t")
    assert contents(store.path) == before
    first = tk.windows(store, max_window=2, intervals=False)
    appended = ingest(npz(tmp_path / "more.npz", seed=5), store.path, name="t", append=True)
    assert appended.requests == 6
    assert store.sql("SELECT request_id FROM requests ORDER BY request")["request_id"].n_unique() == 6
    assert not tk.windows(store, max_window=2, intervals=False).equals(first)
    replaced = ingest(source, store.path, name="t", force=True)
    assert replaced.requests == 3
    assert len(list((store.path / "segments").iterdir())) == 1
    assert tk.windows(store, max_window=2, intervals=False).equals(first)


def test_append_refuses_another_model_and_known_requests(store: tk.Store, tmp_path: Path) -> None:
    before = contents(store.path)
    with pytest.raises(SourceError, match="top_k is 3 here and 2"):
        ingest(npz(tmp_path / "k3.npz", top_k=3), store.path, name="t", append=True)
    with pytest.raises(StoreError, match="to append to"):
        ingest(npz(tmp_path / "x.npz"), store.path, name="u", append=True)
    named = tmp_path / "named.npz"
    npz(named)
    ids = [{"request_id": f"r{i}"} for i in range(3)]
    ingest(named, store.path, name="named", requests=ids)
    with pytest.raises(SourceError, match="'r0' is in the trace already"):
        ingest(npz(tmp_path / "others.npz", seed=6), store.path, name="named", requests=ids, append=True)
    with pytest.raises(UsageError, match="exclude"):
        ingest(named, store.path, name="t", append=True, force=True)
    tk.open(store.path)
    assert {k: v for k, v in contents(store.path).items() if "manifest" not in k}.items() >= {
        k: v for k, v in before.items() if "manifest" not in k
    }.items()


def test_a_failed_ingest_leaves_no_trace(tmp_path: Path, store: tk.Store) -> None:
    bad = tmp_path / "bad.npz"
    ids = np.load(npz(tmp_path / "good.npz", requests=5))["expert_ids"].copy()
    ids[-1, 0] = 7  # the same expert twice, in the last request
    np.savez(bad, expert_ids=ids, request_lens=np.full(5, 6), num_experts=8)
    before = contents(store.path)
    with pytest.raises(SourceError, match="twice"):
        ingest(bad, store.path, name="bad")
    assert contents(store.path) == before
    with pytest.raises(SourceError):
        ingest(bad, tmp_path / "new", name="bad")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prepare", ["nothing", "file", "folder", "foreign", "newer", "damaged", "binary", "list"])
def test_what_is_not_a_store_says_so(tmp_path: Path, source: Path, prepare: str) -> None:
    root = tmp_path / "x"
    if prepare == "file":
        root.write_text("hello")
    elif prepare != "nothing":
        root.mkdir()
        (root / "notes.txt").write_text("mine")
    texts = {
        "foreign": '{"format": "other"}',
        "newer": '{"format": "tracekit-store", "schema_version": 99, "traces": []}',
        "damaged": '{"format": "tracekit-store", "schema_version": 1, "traces": [{"name": 1}]}',
        "list": "[1]",
    }
    if prepare in texts:
        (root / "manifest.json").write_text(texts[prepare])
    if prepare == "binary":
        (root / "manifest.json").write_bytes(b"\xff\xfe\x00")
    expected = {"newer": "store schema 99", "nothing": "does not exist", "damaged": "damaged", "file": "is a file"}
    with pytest.raises(StoreError, match=expected.get(prepare, "not")):
        tk.open(root)
    if prepare != "nothing":
        before = root.read_bytes() if root.is_file() else contents(root)
        with pytest.raises(StoreError):
            ingest(source, root, name="t")
        assert (root.read_bytes() if root.is_file() else contents(root)) == before


def test_damaged_parts_are_named(store: tk.Store) -> None:
    [part] = (store.path / "segments").rglob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(StoreError, match=r"part-00000\.parquet"):
        tk.windows(store, max_window=2, intervals=False)
    part.unlink()
    with pytest.raises(StoreError, match=r"part-00000\.parquet"):
        tk.windows(store, max_window=2, intervals=False)


def test_ids_that_were_tampered_with_never_reach_the_kernels(store: tk.Store) -> None:
    [part] = (store.path / "segments").rglob("part-*.parquet")
    frame = pl.read_parquet(part)
    frame.with_columns(pl.lit(200, pl.UInt8).alias("e1")).write_parquet(part)
    with pytest.raises(StoreError, match="outside what the manifest says"):
        tk.windows(store, max_window=2, intervals=False)
    frame.write_parquet(part)
    [runs] = (store.path / "segments").rglob("runs.parquet")
    pl.read_parquet(runs).with_columns(pl.col("row") + 30).write_parquet(runs)
    with pytest.raises(StoreError, match="outside what the manifest says"):
        tk.windows(store, max_window=2, intervals=False)


@pytest.mark.parametrize("folder", ["layer=7", "request=5", "x=1"])
def test_a_folder_that_looks_like_a_partition_is_only_a_folder(source: Path, tmp_path: Path, folder: str) -> None:
    ingest(source, tmp_path / folder / "S", name="t")
    store = tk.open(tmp_path / folder / "S")
    assert store.sql("SELECT count(DISTINCT layer) AS n, count(DISTINCT request) AS r FROM routing").row(0) == (2, 3)
    assert "x" not in store.sql("SELECT * FROM requests").columns


def test_what_a_killed_commit_leaves_is_swept(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "S"
    root.mkdir()
    (root / f"{manifest.TEMPORARY}manifest.json.1").write_text("{")
    assert ingest(source, root, name="t").requests == 3
    assert sorted(p.name for p in root.iterdir()) == [".lock", "manifest.json", "segments"]


def test_a_broken_result_is_not_read(store: tk.Store) -> None:
    first = tk.windows(store, max_window=2, intervals=False)
    for result in (store.path / "results").iterdir():
        result.write_bytes(b"")
    assert store.sql("SELECT * FROM windows").is_empty()
    assert tk.windows(store, max_window=2, intervals=False).equals(first)


def test_result_views_follow_the_seed_and_the_intervals_asked_for(tmp_path: Path) -> None:
    ingest(npz(tmp_path / "many.npz", requests=230), tmp_path / "S", name="t")
    store = tk.open(tmp_path / "S")
    for seed in (2, 1):
        tk.windows(store, max_window=2, seed=seed)
    tk.windows(store, max_window=2, intervals=False)
    wanted = tk.windows(store, max_window=2, seed=2)["observed_lo"].to_list()
    statement = 'SELECT observed_lo FROM windows ORDER BY "window"'
    assert store.sql(statement, {"seed": 2})["observed_lo"].to_list() == wanted
    assert store.sql(statement, {"intervals": False})["observed_lo"].to_list() == [None, None]


def test_types_that_a_frame_cannot_hold_are_refused(store: tk.Store) -> None:
    with pytest.raises(QueryError, match="INTERVAL"):
        store.sql("SELECT interval 1 day AS i")
    assert store.sql("SELECT (interval 1 day)::VARCHAR AS i")["i"].to_list() == ["1 day"]


def test_unknown_traces_are_suggested(store: tk.Store, source: Path) -> None:
    ingest(source, store.path, name="second")
    with pytest.raises(StoreError, match="Did you mean 'second'"):
        tk.windows(store, trace="secnd")
    with pytest.raises(StoreError, match="holds 2 traces"):
        store.trace()


# --- killed, full, contended ---------------------------------------------------------------------

_INGEST = """
import sys, resource, tracekit as tk
if len(sys.argv) > 4: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    tk.ingest(sys.argv[1], sys.argv[2], name=sys.argv[3], phase="decode", axes="tlk", force=True)
except tk.TracekitError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_killed_at_any_moment_the_store_is_the_old_one_or_the_new_one(tmp_path: Path, store: tk.Store) -> None:
    big = npz(tmp_path / "big.npz", requests=40, tokens=400, layers=12, num_experts=64, top_k=4)
    command = [sys.executable, "-c", _INGEST, str(big), str(store.path), "t"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    took = time.perf_counter() - started
    outcomes = set()
    for i in range(8):
        ingest(tmp_path / "trace.npz", store.path, name="t", force=True)
        process = subprocess.Popen(command)
        time.sleep(took * (0.3 + 0.09 * i))
        process.send_signal(signal.SIGKILL)
        process.wait()
        outcomes.add(store.trace("t").requests)
        assert tk.windows(store, max_window=2, intervals=False)["n_windows"][0] in (18, 16000)
    assert outcomes <= {3, 40}
    ingest(tmp_path / "trace.npz", store.path, name="t", force=True)
    assert len(list((store.path / "segments").iterdir())) == 1


def test_a_first_ingest_that_is_killed_leaves_a_place_to_ingest_into(tmp_path: Path, source: Path) -> None:
    root = tmp_path / "S"
    (root / "segments" / "deadbeef").mkdir(parents=True)
    (root / "segments" / "deadbeef" / "part-00000.parquet").write_bytes(b"half")
    assert ingest(source, root, name="t").requests == 3
    assert len(list((root / "segments").iterdir())) == 1


def test_a_full_disk_is_said_and_leaves_the_store_as_it_was(tmp_path: Path, store: tk.Store) -> None:
    big = npz(tmp_path / "big.npz", requests=40, tokens=400, layers=12, num_experts=64, top_k=4)
    before = contents(store.path)
    command = [sys.executable, "-c", _INGEST, str(big), str(store.path), "u", "200000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "StoreError" in done.stderr
    assert "cannot be written" in done.stderr
    assert contents(store.path) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_two_writers_do_not_mix(store: tk.Store, source: Path) -> None:
    with manifest.locked(store.path), pytest.raises(StoreError, match="another ingest"):
        ingest(source, store.path, name="u")
    assert ingest(source, store.path, name="u").requests == 3


def test_a_store_that_cannot_be_written_is_still_read(store: tk.Store) -> None:
    results = store.path / "results"
    results.write_text("in the way")
    assert tk.windows(store, max_window=2, intervals=False).height == 2


# --- results -------------------------------------------------------------------------------------


def test_results_are_reused_and_keyed_by_content(store: tk.Store, tmp_path: Path) -> None:
    first = tk.windows(store, max_window=3, intervals=False)
    [part] = (store.path / "segments").rglob("part-*.parquet")
    hidden = part.rename(part.with_suffix(".hidden"))
    assert tk.windows(store, max_window=3, intervals=False).equals(first)
    with pytest.raises(StoreError):
        tk.windows(store, max_window=4, intervals=False)
    hidden.rename(part)
    copy = shutil.copytree(store.path, tmp_path / "copy")
    assert tk.windows(copy, max_window=3, intervals=False).equals(first)


def test_result_views_hold_one_row_a_key(store: tk.Store) -> None:
    tk.windows(store, max_window=3, intervals=False)
    tk.windows(store, max_window=5, intervals=False)
    tk.windows(store, max_window=5, intervals=False, overlapping=False)
    tk.windows(store, max_window=2, by="layer", intervals=False)
    rows = store.sql(
        'SELECT "by", overlapping, count(*) AS n, count(DISTINCT "window") AS d FROM windows GROUP BY ALL ORDER BY ALL'
    )
    assert rows.rows() == [("layer", True, 4, 2), ("trace", False, 5, 5), ("trace", True, 5, 5)]
    assert store.sql("SELECT * FROM autocorr").is_empty()


def test_the_views_run_in_a_plain_shell(store: tk.Store, tmp_path: Path) -> None:
    tk.windows(store, max_window=2, intervals=False)
    con = duckdb.connect(str(tmp_path / "plain.duckdb"))
    con.execute(store.views())
    for view in (
        "traces",
        "requests",
        "routing",
        "activations",
        "tokens",
        "windows",
        "autocorr",
        "attribution",
        "load",
    ):
        con.execute(f"SELECT * FROM {view}").fetchall()
    assert con.execute("SELECT count(*) FROM activations").fetchall() == [(72,)]


# --- SQL that reaches for more than the store ----------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "COPY (SELECT 1) TO '{out}'",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM parquet_scan('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM read_csv('https://example.com/x.csv')",
        "WITH x AS (COPY (SELECT 1) TO '{out}') SELECT * FROM x",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
        "EXPLAIN SELECT 1",
        "ATTACH '{out}' AS db",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET allowed_directories",
        "PRAGMA memory_limit = '1GB'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW routing",
        "CREATE OR REPLACE VIEW routing AS SELECT 1",
        "EXPORT DATABASE '{out}'",
        "SELECT 1; COPY (SELECT 1) TO '{out}'",
        "SELECT 1) TO '{out}'; --",
        "CALL pragma_version()",
        "SELECT getenv('HOME')",
        "COPY (SELECT 1) TO '{store}/segments/x.parquet'",
        "WITH x AS (COPY (SELECT 1) TO '{store}/manifest.json') SELECT 1",
        "SELECT * FROM '{store}/../secret.csv'",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')",
        "SELECT * FROM write_blob('{out}')",
        "",
        "   -- nothing",
        "SELEC 1",
    ],
)
def test_sql_cannot_leave_or_change_the_store(store: tk.Store, tmp_path: Path, attack: str) -> None:
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("password\nhunter2\n")
    before, outside = contents(store.path), {p.name for p in tmp_path.iterdir()}
    with pytest.raises(QueryError):
        store.sql(attack.format(secret=secret, out=out, folder=tmp_path, store=store.path))
    assert contents(store.path) == before
    assert {p.name for p in tmp_path.iterdir()} == outside


def test_a_link_out_of_the_store_is_not_a_way_out(store: tk.Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.csv").write_text("password\nhunter2\n")
    with pytest.raises(QueryError):
        store.sql(f"SELECT * FROM '{store.path}/segments/../../elsewhere/secret.csv'")


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 42 AS x",
        "FROM routing LIMIT 1",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a;",
        "VALUES (1, 2)",
        "SELECT 1 -- done",
        "SUMMARIZE routing",
        "DESCRIBE routing",
    ],
)
def test_reading_is_what_it_is_for(store: tk.Store, statement: str) -> None:
    try:
        assert store.sql(statement).height >= 1
    except QueryError:
        assert statement.split()[0] in ("SUMMARIZE", "DESCRIBE")


@pytest.mark.parametrize("lines", [1, 2, 9])
@pytest.mark.parametrize(("wrong", "at"), [("layr", "layr"), ("layer +", "FROM")])
def test_an_sql_error_shows_the_statement_as_it_was_given(store: tk.Store, wrong: str, at: str, lines: int) -> None:
    statement = "SELECT " + "layer,\n" * (lines - 1) + f"{wrong} FROM routing"
    with pytest.raises(QueryError) as caught:
        store.sql(statement)
    assert "tracekit_query" not in str(caught.value)
    *_, quoted, caret = str(caught.value).splitlines()
    assert quoted.split() == ["LINE", f"{lines}:", *statement.splitlines()[-1].split()]
    assert quoted[caret.index("^") :].startswith(at)


def test_a_statement_of_another_kind_is_refused_by_name(store: tk.Store) -> None:
    with pytest.raises(QueryError, match=r"^an EXPLAIN statement; expected a SELECT"):
        store.sql("EXPLAIN SELECT 1")


def test_variables_are_values(store: tk.Store) -> None:
    evil = "x'; DROP VIEW routing; --"
    assert store.sql("SELECT getvariable('a') AS a, getvariable('b') AS b", {"a": evil, "b": 3}).row(0) == (evil, 3)
    with pytest.raises(QueryError):
        store.sql("SELECT 1", {"a b": 1})


def test_token_ids_and_weights_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((5, 2, 6)), axis=2)[:, :, :2].astype(np.uint8)
    weights = np.sort(rng.random((5, 2, 2)), axis=2)[:, :, ::-1].astype(np.float32)
    np.savez(
        tmp_path / "r.npz",
        routed_experts=ids,
        router_weights=weights,
        token_ids=np.arange(6),
        prompt_len=3,
        num_experts=6,
    )
    trace = tk.ingest(tmp_path / "r.npz", tmp_path / "S", axes="tlk")
    assert trace.segments[0].has_weights
    assert trace.segments[0].has_token_ids
    store = tk.open(tmp_path / "S")
    rows = store.sql("SELECT weight FROM activations WHERE layer = 1 AND rank = 0 ORDER BY pos")
    np.testing.assert_allclose(rows["weight"].to_numpy(), weights[:, 1, 0])
    assert store.sql("SELECT token_id FROM tokens ORDER BY pos")["token_id"].to_list() == [0, 1, 2, 3, 4]
    assert store.sql("SELECT phase, count(*) AS n FROM routing GROUP BY phase ORDER BY phase").rows() == [
        ("decode", 4),
        ("prefill", 6),
    ]


def test_holes_are_kept_and_no_window_crosses_them(tmp_path: Path) -> None:
    from tracekit.schema import Request, TraceMeta

    meta = TraceMeta(6, 2, (0,), "test")
    positions = np.array([0, 1, 2, 7, 8])
    ids = np.array([[[0, 1]], [[0, 1]], [[0, 2]], [[3, 4]], [[3, 5]]], np.uint8)
    root = tmp_path / "S"
    writer.write_trace(root, "t", meta, [Request("r", ids, decode_start=0, positions=positions)])
    rows = tk.windows(root, max_window=3, intervals=False)
    assert rows["n_windows"].to_list() == [5, 3, 1]
    assert rows["observed"].to_list() == [2.0, (2 + 3 + 3) / 3, 3.0]
    with pytest.raises(UnsupportedError, match="no request has 4 consecutive decode tokens: the longest run has 3"):
        tk.windows(root, max_window=4, intervals=False)
    assert tk.open(root).sql("SELECT pos FROM routing ORDER BY pos")["pos"].to_list() == positions.tolist()


def test_the_manifest_is_plain_json(store: tk.Store) -> None:
    data = json.loads((store.path / "manifest.json").read_text())
    assert data["schema_version"] == 1
    assert [p.name for p in (store.path / "segments").iterdir()] == [data["traces"][0]["segments"][0]["id"]]
    frame = pl.read_parquet(store.path / "segments" / data["traces"][0]["segments"][0]["id"] / "part-00000.parquet")
    assert frame.columns == ["request", "layer", "pos", "decode", "e0", "e1"]
    assert frame.dtypes[4:] == [pl.UInt8, pl.UInt8]


def test_an_array_whose_axes_could_be_either_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((61, 50, 16)), axis=2)[:, :, :8].astype(np.uint8)
    np.save(tmp_path / "x.npy", ids)
    with pytest.raises(SourceError, match=r"does not say which axis.*--axes"):
        tk.ingest(tmp_path / "x.npy", tmp_path / "S", num_experts=16)
    assert tk.ingest(tmp_path / "x.npy", tmp_path / "S", num_experts=16, axes="ltk").tokens == 50


@pytest.mark.parametrize("prompt_len", [-3, 100])
def test_a_prompt_that_cannot_be_is_refused(tmp_path: Path, prompt_len: int) -> None:
    ids = np.argsort(np.random.default_rng(0).random((60, 2, 16)), axis=2)[:, :, :4].astype(np.uint8)
    np.savez(tmp_path / "x.npz", routed_experts=ids, prompt_len=prompt_len, num_experts=16)
    with pytest.raises(SourceError, match=f"{prompt_len}"):
        tk.ingest(tmp_path / "x.npz", tmp_path / "S", axes="tlk")
    assert not (tmp_path / "S").exists()


def test_a_name_that_nobody_sees_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a name that can be seen"):
        ingest(source, tmp_path / "S", name="  ")


def test_a_manifest_with_the_wrong_types_is_damaged(store: tk.Store) -> None:
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"top_k": 2', '"top_k": "2"'))
    with pytest.raises(StoreError, match="damaged manifest"):
        tk.open(store.path)
