"""Verification steps and counts in the store: what is kept of them, what SQL sees, and what is refused."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import QueryError, SourceError, StoreError, UnsupportedError
from tracekit.schema import VerifySteps
from tracekit.sources import READERS, RawCounts, RawRequest, Reader
from tracekit.store import spool

Raw = RawRequest | RawCounts
Ingest = Callable[..., tk.TraceInfo]


def routing(rows: int, layers: int = 2, top_k: int = 2, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    order = np.random.default_rng(seed).random((rows, layers, num_experts))
    return np.argsort(order, axis=2)[:, :, :top_k].astype(np.uint8)


def verify(start: int, rows: Sequence[int], accepted: Sequence[int], *, seed: int = 0, **shape: int) -> VerifySteps:
    """Steps that follow each other: a step starts at the token that the one before it sampled last."""
    kept = np.cumsum([0, *[a + 1 for a in accepted[:-1]]])
    return VerifySteps(
        start_pos=start + kept[: len(rows)].astype(np.int64),
        n_rows=np.array(rows, np.int64),
        n_accepted=np.array(accepted, np.int64),
        ids=routing(sum(rows), seed=seed, **shape),
    )


def request(name: str = "a", rows: int = 6, steps: VerifySteps | None = None, **fields: object) -> RawRequest:
    return RawRequest(where="made", ids=routing(rows), request_id=name, axes="tlk", steps=steps, **fields)  # type: ignore[arg-type]


@pytest.fixture
def ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    """Ingest raw requests or counts as if a reader had yielded them."""
    source, made = tmp_path / "source", itertools.count()

    def run(raws: Sequence[Raw], store: str = "S", **options: object) -> tk.TraceInfo:
        reader = Reader("made", "", "", lambda *_: False, lambda *_: iter(raws))
        monkeypatch.setitem(READERS, "made", reader)
        fixed = {"source_format": "made", "name": "t"}
        source.write_text(f"made {next(made)}")  # not what the trace has already
        return tk.ingest(source, tmp_path / store, **fixed | options)  # type: ignore[arg-type]

    return run


# --- verification steps ------------------------------------------------------------------------


def test_the_rows_of_rejected_drafts_are_kept_beside_the_routing(ingest: Ingest, tmp_path: Path) -> None:
    # Two steps from position 2 on: one committed token and two drafts of which one is accepted (kept rows 0 and 1, so
    # positions 2 and 3), then one committed token at 4 and one draft, rejected.
    steps = verify(2, [3, 2], [1, 0])
    trace = ingest([request(steps=steps, prompt_len=2), request("b")], num_experts=8)
    assert trace.meta.drafts_included
    assert [s.has_steps for s in trace.segments] == [True]
    store = tk.open(tmp_path / "S")
    assert store.trace().meta.drafts_included
    rows = store.sql("SELECT * FROM verification")
    assert rows.columns == ["trace", "request", "step", "layer", "row", "pos", "kept", "experts"]
    expected = [
        ("t", 0, step, layer, row, pos, kept, steps.ids[at, layer].tolist())
        for layer in (0, 1)
        for at, (step, row, pos, kept) in enumerate(
            [(0, 0, 2, True), (0, 1, 3, True), (0, 2, 4, False), (1, 0, 4, True), (1, 1, 5, False)]
        )
    ]
    assert rows.rows() == expected
    assert store.sql("SELECT drafts_included, histogram FROM traces").row(0) == (True, False)
    assert store.sql("SELECT count(*) FROM routing").item() == 2 * 2 * 6  # nothing of the steps is in the routing


def test_info_counts_the_verification_steps(ingest: Ingest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest([request(steps=verify(2, [3, 2], [1, 0]), prompt_len=2), request("b")], num_experts=8)
    ingest([request("c", steps=verify(0, [3], [1]))], num_experts=8, append=True)
    ingest([request("d")], num_experts=8, name="u")
    assert main(["info", str(tmp_path / "S"), "--format", "json"]) == 0
    assert [row["verification_steps"] for row in json.loads(capsys.readouterr().out)] == [3, 0]


def test_trees_are_kept_with_their_depths_and_what_is_not_known(ingest: Ingest, tmp_path: Path) -> None:
    tree = replace(verify(2, [4, 2], [1, 0]), depth=np.array([0, 1, 1, 2, 0, 1]))
    sure = replace(tree, kept=np.array([1, 0, 1, 0, 1, 0]))
    ingest([request("a", steps=tree), request("b", steps=sure)], num_experts=8)
    store = tk.open(tmp_path / "S")
    rows = store.sql('SELECT request, step, "row", pos, kept FROM verification WHERE layer = 1 ORDER BY ALL').rows()
    expected = [(0, 0, 2, True), (0, 1, 3, None), (0, 2, 3, None), (0, 3, 4, False), (1, 0, 4, True), (1, 1, 5, False)]
    assert rows[:6] == [(0, *row) for row in expected]
    assert [kept for *_, kept in rows[6:]] == [True, False, True, False, True, False]
    (tmp_path / "source").touch()
    again = ingest([request("a", steps=tree), request("b", steps=tree)], "other", num_experts=8)
    assert again.content != store.trace().content  # only what is known of b differs


def test_steps_enter_no_metric_of_today(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request(steps=verify(2, [3, 2], [1, 0]))], "with", num_experts=8)
    ingest([request()], "without", num_experts=8)
    for metric in (tk.load, lambda s: tk.windows(s, max_window=3, intervals=False)):
        assert metric(tmp_path / "with").equals(metric(tmp_path / "without"))
    digests = [tk.open(tmp_path / name).trace().content for name in ("with", "without")]
    assert digests[0] != digests[1]  # but the content is another one


def test_the_file_is_sorted_and_its_columns_are_flat(ingest: Ingest, tmp_path: Path) -> None:
    steps = replace(verify(0, [3, 2], [2, 1]), weights=np.full((5, 2, 2), 0.25, np.float16))
    trace = ingest([request("b", steps=steps), request("a", steps=verify_weighted())], num_experts=8)
    frame = pl.read_parquet(tmp_path / "S" / "segments" / trace.segments[0].id / "steps.parquet")
    assert dict(frame.schema) == {
        "request": pl.UInt32,
        "step": pl.UInt32,
        "layer": pl.UInt16,
        "row": pl.UInt16,
        "pos": pl.UInt32,
        "kept": pl.Boolean,
        "e0": pl.UInt8,
        "e1": pl.UInt8,
        "w0": pl.Float32,
        "w1": pl.Float32,
    }
    assert frame.equals(frame.sort("request", "layer", "step", "row"))
    assert frame.filter(request=0)["w0"].unique().to_list() == [0.25]


def verify_weighted() -> VerifySteps:
    return replace(verify(0, [1], [0]), weights=np.ones((1, 2, 2), np.float32))


def test_dense_layers_are_left_out_of_the_steps_too(ingest: Ingest, tmp_path: Path) -> None:
    steps = verify(0, [2], [1])
    steps.ids[:, 0] = 0
    raw = request(steps=steps)
    raw.ids[:, 0] = 0
    ingest([raw], num_experts=8)
    assert tk.open(tmp_path / "S").sql("SELECT DISTINCT layer FROM verification").rows() == [(1,)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_rows": np.array([3, 3])}, r"ids are uint8 of shape \(5, 2, 2\); expected integers \[6, 2, 2\]"),
        ({"n_rows": np.array([5, 0])}, "step 1 has 0 rows"),
        ({"n_accepted": np.array([1, 2])}, "step 1 has 2 accepted drafts"),
        ({"n_accepted": np.array([-1, 0])}, "step 0 has -1 accepted drafts"),
        ({"start_pos": np.array([2, 3])}, "step 1 has 3 as its first position; expected one after"),
        ({"start_pos": np.array([-1, 4])}, "step 0 has -1 as its first position"),
        ({"start_pos": np.array([2, 1 << 32])}, "step 1 has 4294967296 as its first position"),
        ({"start_pos": np.array([2.0, 4.0])}, "start_pos is float64"),
        ({"n_rows": np.array([5])}, "n_rows is int64 of shape .1,. for 2 steps"),
        ({"ids": routing(5, layers=3)}, r"shape \(5, 3, 2\)"),
        ({"ids": routing(5) + 7}, "of 8 experts"),
        ({"ids": np.zeros((5, 2, 2), int)}, "twice in one row"),
        ({"ids": np.full((5, 2, 2), -1)}, "negative expert id"),
        ({"weights": np.zeros((5, 2, 1))}, "weights are float64 of shape"),
        ({"depth": np.arange(4)}, "depth is int64 of shape .4,. for 5 rows"),
        ({"kept": np.ones(5)}, "kept is float64 of shape"),
        ({"depth": np.array([1, 1, 2, 0, 1])}, r"step 0 has rows of depth \[1, 1, 2\]"),
        ({"depth": np.array([0, 2, 1, 0, 1])}, r"step 0 has rows of depth \[0, 2, 1\]"),
        ({"depth": np.array([0, 1, 1, 0, 0])}, r"step 1 has rows of depth \[0, 0\]"),
        (
            {"depth": np.array([0, 1, 1, 0, 1]), "n_accepted": np.array([2, 0]), "start_pos": np.array([2, 5])},
            "step 0 has 2 accepted drafts; expected at most 1, the depth of its tree",
        ),
        ({"kept": np.array([1, 1, 1, 1, 0])}, r"step 0 has 1 accepted drafts, but kept \[1, 1, 1\]"),
        ({"kept": np.array([1, -1, 0, 1, 0])}, r"kept \[1, -1, 0\] of its rows of depth \[0, 1, 2\]"),
        ({"kept": np.array([1, 1, 0, 0, 0])}, r"step 1 has 0 accepted drafts, but kept \[0, 0\]"),
        ({"kept": np.array([1, 2, 0, 1, 0])}, r"kept \[1, 2, 0\]"),
    ],
)
def test_steps_that_contradict_themselves_are_refused(
    ingest: Ingest, tmp_path: Path, change: dict[str, np.ndarray], said: str
) -> None:
    steps = replace(verify(2, [3, 2], [1, 0]), **change)
    with pytest.raises(SourceError, match=said) as caught:
        ingest([request(steps=steps)], num_experts=8)
    assert "verification steps" in str(caught.value)
    assert not (tmp_path / "S").exists()


def test_steps_without_any_step_are_none(ingest: Ingest) -> None:
    trace = ingest([request(steps=verify(0, [], []))], num_experts=8)
    assert not trace.meta.drafts_included
    assert not trace.segments[0].has_steps


def test_step_weights_are_in_all_requests_or_in_none(ingest: Ingest) -> None:
    with pytest.raises(SourceError, match="some requests' verification steps only"):
        ingest([request("a", steps=verify(0, [1], [0])), request("b", steps=verify_weighted())], num_experts=8)


def test_appending_steps_to_a_trace_without_them(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request("a")], num_experts=8)
    trace = ingest([request("b", steps=verify(0, [3], [1]))], num_experts=8, append=True)
    assert [s.has_steps for s in trace.segments] == [False, True]
    store = tk.open(tmp_path / "S")
    assert store.trace().meta.drafts_included
    assert store.sql("SELECT DISTINCT request FROM verification").rows() == [(1,)]
    ingest([request("c")], num_experts=8, append=True)
    assert store.trace().meta.drafts_included


@given(data=st.data())
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("s")
    (folder / "source").write_text("made")
    raws, expected = [], []
    for i in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.lists(st.integers(1, 5), max_size=6))
        accepted = [data.draw(st.integers(0, n - 1)) for n in rows]
        steps = verify(data.draw(st.integers(0, 9)), rows, accepted, seed=i)
        raws.append(request(f"r{i}", steps=steps))
        at = 0
        for s, (n, a) in enumerate(zip(rows, accepted, strict=True)):
            for row in range(n):
                for layer in (0, 1):
                    ids = steps.ids[at, layer].tolist()
                    expected.append((i, layer, s, row, int(steps.start_pos[s]) + row, row <= a, ids))
                at += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "SPOOL_ROWS", data.draw(st.sampled_from([1, 7, 1000])))
        patch.setitem(READERS, "made", Reader("made", "", "", lambda *_: False, lambda *_: iter(raws)))
        trace = tk.ingest(folder / "source", folder / "S", source_format="made", num_experts=8)
    rows = tk.open(folder / "S").sql('SELECT request, layer, step, "row", pos, kept, experts FROM verification')
    assert sorted(rows.rows()) == sorted(expected)
    segment = folder / "S" / "segments" / trace.segments[0].id
    assert {path.name for path in segment.iterdir()} >= ({"steps.parquet"} if expected else set())
    assert not list(segment.glob("*piece*"))
    if expected:
        stored = pl.read_parquet(segment / "steps.parquet")
        assert stored.equals(stored.sort("request", "layer", "step", "row"))


def test_many_steps_stream(tmp_path: Path) -> None:
    """20 million step rows are written by a process that may not have the memory to hold half of them."""
    script = """
import resource, sys
import numpy as np, polars
from pathlib import Path
from tracekit.schema import VerifySteps
from tracekit.store.spool import Spool, step_columns
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
spool = Spool(Path(sys.argv[1]))
steps, rows = 5000, 4
ids = np.tile(np.arange(8, dtype=np.uint8), (steps * rows, 10, 1))
for request in range(100):
    made = VerifySteps(np.arange(steps) * 4, np.full(steps, rows), np.full(steps, 3), ids)
    for columns in step_columns(request, made, tuple(range(10)), 64):
        spool.add(columns)
spool.finish()
print(spool.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    path = tmp_path / "steps.parquet"
    out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True).stdout
    rows, grown = map(int, out.split())
    assert rows == 20_000_000
    assert pl.scan_parquet(path).select(pl.len()).collect().item() == rows
    held = rows * (4 + 4 + 2 + 2 + 4 + 1 + 8)
    unit = 1024 if sys.platform != "darwin" else 1
    assert grown * unit < held, f"{grown * unit / 2**20:.0f} MiB"
    assert resource.getpagesize()


def test_a_failed_ingest_leaves_no_steps(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request()], num_experts=8)
    before = sorted(p.name for p in (tmp_path / "S").rglob("*"))
    bad = request("b", steps=replace(verify(0, [2], [0]), n_accepted=np.array([2])))
    with pytest.raises(SourceError):
        ingest([request("a", steps=verify(0, [3], [1])), bad], num_experts=8, name="u")
    assert sorted(p.name for p in (tmp_path / "S").rglob("*")) == before


def test_sql_over_the_new_views_stays_in_the_sandbox(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request(steps=verify(2, [3, 2], [1, 0]))], num_experts=8)
    store = tk.open(tmp_path / "S")
    kept = store.sql("SELECT kept, count(*) AS n FROM verification GROUP BY kept ORDER BY kept")
    assert kept.rows() == [(False, 4), (True, 6)]
    for attack in (
        "SELECT * FROM verification UNION ALL SELECT * FROM read_parquet('/etc/passwd')",
        "COPY (SELECT * FROM verification) TO 'x.parquet'",
        "COPY (SELECT * FROM counts) TO 'x.parquet'",
    ):
        with pytest.raises(QueryError):
            store.sql(attack)


def test_the_views_are_there_and_typed_without_any_rows(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request()], num_experts=8)
    store = tk.open(tmp_path / "S")
    empty = store.sql("SELECT * FROM verification")
    assert empty.is_empty()
    assert empty.schema["experts"] == pl.List(pl.UInt16)
    assert empty.schema["kept"] == pl.Boolean
    assert store.sql("SELECT experts[1] FROM verification WHERE kept AND step > 3").is_empty()


def test_a_store_of_the_version_before_opens(ingest: Ingest, tmp_path: Path) -> None:
    """Its manifest says nothing of steps, of drafts or of counts."""
    ingest([request(), request("b")], num_experts=8)
    path = tmp_path / "S" / "manifest.json"
    data = json.loads(path.read_text())
    for trace in data["traces"]:
        del trace["meta"]["histogram"]
        for segment in trace["segments"]:
            del segment["has_steps"]
    path.write_text(json.dumps(data))
    store = tk.open(tmp_path / "S")
    assert not store.trace().segments[0].has_steps
    assert not store.trace().meta.histogram
    assert store.sql("SELECT count(*) FROM verification").item() == 0
    assert store.sql("SELECT sum(n) FROM counts").item() == 2 * 6 * 2 * 2
    trace = ingest([request("c", steps=verify(0, [3], [1]))], num_experts=8, append=True)
    assert trace.requests == 3


# --- counts ------------------------------------------------------------------------------------


def counts(name: str = "a", values: object = ((3, 1, 0, 2), (2, 2, 2, 0)), **fields: object) -> RawCounts:
    return RawCounts(where="made", counts=np.array(values), request_id=name, **fields)  # type: ignore[arg-type]


def test_counts_are_stored_and_feed_load(ingest: Ingest, tmp_path: Path) -> None:
    trace = ingest([counts(top_k=2), counts("b", ((1, 1, 0, 0), (0, 1, 0, 1)), top_k=2)])
    assert (trace.requests, trace.tokens, trace.rows) == (2, 4, 0)
    assert trace.meta.histogram
    store = tk.open(tmp_path / "S")
    assert store.sql("SELECT histogram, top_k, num_experts, tokens FROM traces").row(0) == (True, 2, 4, 4)
    rows = store.sql("SELECT * FROM counts ORDER BY request, layer, expert")
    assert rows.columns == ["trace", "request", "layer", "expert", "n"]
    assert rows.rows()[:3] == [("t", 0, 0, 0, 3), ("t", 0, 0, 1, 1), ("t", 0, 0, 3, 2)]
    assert len(rows) == 6 + 4  # no row for an expert that no token chose
    assert store.sql("SELECT request_id, n_tokens, n_decode FROM requests").rows() == [("a", 3, None), ("b", 1, None)]
    for view in ("routing", "activations", "verification", "tokens"):
        assert store.sql(f"SELECT * FROM {view}").is_empty()
    # Layer 0 in all: 4, 2, 0, 2 of 8; the mean over experts is 2.
    first = tk.load(store).row(0, named=True)
    assert first["phase"] == "all"
    assert (first["tokens"], first["max_over_mean"], first["dead_experts"]) == (4, 2.0, 1)
    assert first["effective_experts"] == pytest.approx(2**1.5)  # entropy of 1/2, 1/4, 1/4
    assert first["top_share"] == pytest.approx(6 / 8)
    assert first["sum_p2_over_k"] == pytest.approx((1 + 0.25 + 0.25) / 2)


def test_load_of_counts_is_that_of_the_tokens_they_count(ingest: Ingest, tmp_path: Path) -> None:
    ids = {name: routing(40, layers=3, num_experts=6, seed=i) for i, name in enumerate("abc")}
    raws = [RawRequest("made", x, request_id=n, axes="tlk", fields={"d": n}) for n, x in ids.items()]
    ingest(raws, "tokens", num_experts=6, label_fields=["d"])
    table = {n: [np.bincount(x[:, layer].ravel(), minlength=6) for layer in range(3)] for n, x in ids.items()}
    ingest([counts(n, t, top_k=2, fields={"d": n}) for n, t in table.items()], "counts", label_fields=["d"])
    a, b = (tk.open(tmp_path / name) for name in ("tokens", "counts"))
    for by in (None, "layer", "label"):
        assert tk.load(a, by=by).equals(tk.load(b, by=by))
        assert tk.load(b, by=by).equals(tk.load(b, by=by))  # computed, then saved
    select = "SELECT * FROM counts ORDER BY request, layer, expert"
    assert a.sql(select).equals(b.sql(select))


def test_without_k_what_needs_it_is_null(ingest: Ingest, tmp_path: Path) -> None:
    trace = ingest([counts()])
    assert trace.meta.top_k == 0
    assert any("k is not known" in note for note in trace.notes)
    store = tk.open(tmp_path / "S")
    assert store.sql("SELECT top_k, tokens FROM traces").row(0) == (None, None)
    assert store.sql("SELECT n_tokens FROM requests").item() is None
    row = tk.load(store).row(0, named=True)
    assert [name for name, value in row.items() if value is None] == ["tokens", "top_share", "sum_p2_over_k"]
    assert row["max_over_mean"] == 2.0


@pytest.mark.parametrize(
    "ask",
    [tk.windows, tk.autocorr, tk.attribution, tk.summary, tk.measure, lambda s: tk.chart(s, "windows")],
    ids=["windows", "autocorr", "attribution", "summary", "measure", "chart"],
)
def test_everything_else_refuses(ingest: Ingest, tmp_path: Path, ask: Callable[[tk.Store], object]) -> None:
    ingest([counts(top_k=2)])
    with pytest.raises(UnsupportedError, match="holds counts per expert only"):
        ask(tk.open(tmp_path / "S"))


def test_a_phase_or_a_label_that_is_not_there_is_refused(ingest: Ingest, tmp_path: Path) -> None:
    ingest([counts(top_k=2)])
    with pytest.raises(UnsupportedError, match="which rows are prompt"):
        tk.load(tmp_path / "S", phase="decode")
    with pytest.raises(UnsupportedError, match="no request of this trace has a label"):
        tk.load(tmp_path / "S", by="label")


def test_beside_a_trace_of_tokens_counts_are_left_out_with_a_warning(ingest: Ingest, tmp_path: Path) -> None:
    ingest([counts(top_k=2)])
    ingest([request(rows=9)], name="tokens", num_experts=8)
    with pytest.warns(tk.TracekitWarning, match="trace 't' is left out: the trace holds counts"):
        frame = tk.windows(tmp_path / "S", max_window=2, intervals=False)
    assert frame["trace"].unique().to_list() == ["tokens"]
    assert tk.load(tmp_path / "S")["trace"].unique(maintain_order=True).to_list() == ["t", "tokens"]


def test_counts_append_and_large_ones_stay_exact(ingest: Ingest, tmp_path: Path) -> None:
    large = 3 * 2**53 + 2
    ingest([counts(values=((large, large), (large, large)), top_k=2)])
    ingest([counts("b", ((1, 1), (1, 1)), top_k=2)], append=True)
    store = tk.open(tmp_path / "S")
    assert store.sql("SELECT max(n) FROM counts").item() == large
    assert tk.load(store)["tokens"].to_list() == [large + 1] * 2
    with pytest.raises(SourceError, match="histogram is False here and True"):
        ingest([RawRequest("made", routing(3, num_experts=2), request_id="c", axes="tlk")], append=True, num_experts=2)


def test_dense_layers_and_numbers_of_layers(ingest: Ingest, tmp_path: Path) -> None:
    values = ((0, 0, 0, 0), (3, 1, 0, 2), (2, 2, 2, 0))
    assert ingest([counts(values=values, top_k=2)]).meta.layers == (1, 2)
    ids = (3, 4, 5)
    trace = ingest([counts(values=values, top_k=2, layer_ids=ids)], name="u")
    assert trace.meta.layers == (4, 5)
    assert tk.open(tmp_path / "S").sql("SELECT DISTINCT layer FROM counts WHERE trace = 'u' ORDER BY 1").rows() == [
        (4,),
        (5,),
    ]


@pytest.mark.parametrize(
    ("raws", "options", "said"),
    [
        ([counts(values=((1, -1),))], {}, "the count -1 is negative"),
        ([counts(values=((1, 0.5),))], {}, "the count 0.5 is a fraction"),
        ([counts(values=((1, np.nan),))], {}, "the count nan is beyond all counting"),
        ([counts(values=((1, np.inf),))], {}, "beyond all counting"),
        ([counts(values=((1, 2**63),))], {}, "beyond all counting"),
        ([counts(values=(1, 2))], {}, "the counts are int64 of shape .2,."),
        ([counts(values=(("a", "b"),))], {}, "the counts are <U1"),
        ([counts(values=((4, 1, 0, 2),), top_k=2)], {}, "layer 0 has 7 routed experts in all, no multiple of k 2"),
        ([counts(values=((5, 1, 0, 0),), top_k=2)], {}, "layer 0 has an expert with 5 of 3 tokens"),
        ([counts(top_k=5)], {}, "5 experts per token of 4"),
        ([counts(top_k=2)], {"num_experts": 8}, "--num-experts says 8, the counts says 4"),
        ([counts(top_k=2)], {"top_k": 3}, "contradiction about experts per token"),
        ([counts(top_k=2)], {"phase": "decode"}, "counts have no tokens that could be in a phase"),
        ([counts(top_k=2), counts("b", ((1, 1),), top_k=2)], {}, "num_experts is 2, in the first request 4"),
        ([counts(top_k=2), counts(top_k=2)], {}, "the same id"),
        ([counts(top_k=2), request("b")], {"num_experts": 4}, "counts and routing in one source"),
        ([request("b"), counts(top_k=2)], {"num_experts": 8}, "counts and routing in one source"),
        ([counts(values=((0, 0, 0, 0),))], {}, "no request with any routing"),
        (
            [counts(values=((0, 0), (1, 1)), top_k=2), counts("b", ((1, 1), (1, 1)), top_k=2)],
            {},
            "layer 0 has tokens in this record but none in the first one",
        ),
    ],
)
def test_counts_that_cannot_be_right_are_refused(
    ingest: Ingest, tmp_path: Path, raws: list[Raw], options: dict[str, object], said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        ingest(raws, **options)
    assert not (tmp_path / "S").exists()


def test_rounded_counts_are_taken_as_they_are_and_said_to_be_rounded(ingest: Ingest) -> None:
    values = np.array([[2**24 + 1, 2**25, 3, 0]], np.float32)  # the first cannot be held: it becomes 2^24
    assert values[0, 0] == 2**24
    trace = ingest([counts(values=np.array([[2**24 + 2, 2**24 + 5, 3, 0]], np.float32), top_k=2)])
    assert any("rounded in the file" in note for note in trace.notes)


def test_damaged_counts_are_an_error(ingest: Ingest, tmp_path: Path) -> None:
    trace = ingest([counts(top_k=2)])
    path = tmp_path / "S" / "segments" / trace.segments[0].id / "counts.parquet"
    good = pl.read_parquet(path)
    for column, value in (("expert", 4), ("layer", 9), ("request", 1)):
        good.with_columns(pl.lit(value).cast(good.schema[column]).alias(column)).write_parquet(path)
        with pytest.raises(StoreError, match="outside what the manifest says"):
            tk.load(tmp_path / "S")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match="cannot be read"):
        tk.load(tmp_path / "S")


def test_real_verification_steps(ingest: Ingest, tmp_path: Path, shared: Path) -> None:
    """35 greedy requests with a draft model: 10.18 unique experts per window of four rows, rejected ones included."""
    folder = shared / "moe" / "traces" / "olmoe"
    if not (folder / "verify_steps.parquet").is_file():
        pytest.skip(f"no verification steps in {folder}")
    columns = ["request_id", "mode", "step", "start_pos", "n_accepted", "experts"]
    steps = pl.read_parquet(folder / "verify_steps.parquet", columns=columns).filter(pl.col("mode") == "greedy")
    raws = []
    for (name,), rows in steps.sort("request_id", "step").group_by("request_id", maintain_order=True):
        with np.load(folder / "npz" / f"{name}.npz") as held:
            ids, prompt = held["routed_experts"], int(held["prompt_len"])
        made = VerifySteps(
            start_pos=rows["start_pos"].cast(pl.Int64).to_numpy(),
            n_rows=np.full(rows.height, 4),
            n_accepted=rows["n_accepted"].to_numpy(),
            ids=rows["experts"].to_numpy().reshape(-1, 8, 4),
        )
        raws.append(RawRequest("made", ids, request_id=str(name), axes="tlk", prompt_len=prompt, steps=made))
    trace = ingest(raws, num_experts=32)
    assert (trace.requests, trace.meta.drafts_included) == (35, True)
    store = tk.open(tmp_path / "S")
    unique = """
        SELECT avg(n) FROM (
            SELECT count(DISTINCT expert) AS n
            FROM (SELECT request, step, layer, unnest(experts) AS expert FROM verification)
            GROUP BY request, step, layer
        )
    """
    assert store.sql(unique).item() == pytest.approx(10.18, abs=0.005)
    accepted = (
        "SELECT avg(kept) FROM (SELECT count(*) FILTER (kept) / 8.0 AS kept FROM verification GROUP BY request, step)"
    )
    assert store.sql(accepted).item() == pytest.approx(2.098, abs=0.005)
    # What was kept is what the routing has at that position.
    differ = """
        SELECT count(*), count(*) FILTER (list_sort(v.experts) <> list_sort(r.experts))
        FROM verification AS v JOIN routing AS r USING (request, layer, pos) WHERE v.kept
    """
    joined, other = store.sql(differ).row(0)
    assert joined > 8 * steps.height
    assert other == 0
