"""Traces that grow: each content once, ingests that go on where they were, and compaction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import SourceError, StoreError, UsageError
from tracekit.sources import IngestOptions, open_source
from tracekit.store import compaction, manifest
from tracekit.store.sums import checksum

READING: dict[str, Any] = {"num_experts": 8, "axes": "tlk", "phase": "decode"}
TYPED = ["--num-experts", "8", "--axes", "tlk", "--phase", "decode", "--name", "t"]


def shard(path: Path, seed: int, tokens: int = 20, **more: Any) -> Path:
    """Write the routing of one request."""
    ids = np.argsort(np.random.default_rng(seed).random((tokens, 3, 8)), axis=2)[..., :2].astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    np.savez(path, routed_experts=ids, **more)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of five requests, each of another length."""
    for number in range(5):
        shard(tmp_path / "shards" / f"r{number}.npz", number, 20 + number)
    return tmp_path / "shards"


def ingest(sources: Any, store: Path, **options: Any) -> tk.TraceInfo:
    return tk.ingest(sources, store, name="t", **READING, **options)


def everything(store: Path) -> tuple[Any, ...]:
    """Return the rows of a store's one trace, what is beside them, and what was found."""
    opened = tk.open(store)
    rows = opened.sql("SELECT * FROM routing ORDER BY request, layer, pos").rows()
    requests = opened.sql("SELECT * FROM requests ORDER BY request").rows()
    beside = [
        opened.sql(f"SELECT * FROM {view}").sort(pl.all()).rows() for view in ("tokens", "predictions", "verification")
    ]
    return rows, requests, beside, opened.trace().findings, opened.trace().notes


# --- once by content -----------------------------------------------------------------------------


def test_a_trace_takes_a_content_once_whatever_the_file_is_called(shards: Path, tmp_path: Path) -> None:
    ingest(shards, tmp_path / "S")
    before = everything(tmp_path / "S")
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    (moved / "r0.npz").rename(moved / "renamed.npz")
    again = ingest(moved, tmp_path / "S", append=True)
    assert everything(tmp_path / "S") == before
    assert again.notes == (
        "in the trace already, left out: 'r1.npz', 'r2.npz', 'r3.npz', 'r4.npz', 'renamed.npz'",
        "nothing is new: no request was added",
    )
    shard(moved / "r9.npz", 9)
    more = ingest(moved, tmp_path / "S", append=True)
    assert more.requests == 6
    assert more.sources[-1].name == "r9.npz"
    assert "left out" in more.notes[-1]
    assert tk.open(tmp_path / "S").trace().notes == ()  # what was left out says nothing of the trace


def test_of_files_of_one_content_as_many_are_left_out_as_were_read(shards: Path, tmp_path: Path) -> None:
    shutil.copy(shards / "r1.npz", shards / "z.npz")
    trace = ingest(shards, tmp_path / "S")
    assert trace.requests == 6
    shutil.copy(shards / "r1.npz", shards / "zz.npz")
    more = ingest(shards, tmp_path / "S", append=True)
    assert (more.requests, more.sources[-1].name) == (7, "zz.npz")
    assert ingest(shards, tmp_path / "S", append=True).requests == 7


def test_files_of_one_size_are_told_apart(tmp_path: Path) -> None:
    for number in range(4):
        ids = np.argsort(np.random.default_rng(number).random((9, 2, 8)), axis=2)[..., :2].astype(np.uint8)
        np.save(tmp_path / f"{number}.npy", ids)
    assert ingest([tmp_path / f"{n}.npy" for n in (0, 1)], tmp_path / "S").requests == 2
    more = ingest([tmp_path / f"{n}.npy" for n in (1, 2, 3)], tmp_path / "S", append=True)
    assert [file.name for file in more.sources] == ["0.npy", "1.npy", "2.npy", "3.npy"]
    assert len({file.digest for file in more.sources}) == 4


def test_entries_for_requests_cannot_go_with_files_that_are_left_out(shards: Path, tmp_path: Path) -> None:
    entries = [{"domain": str(n)} for n in range(5)]
    ingest(shards, tmp_path / "S", requests=entries, label_fields=["domain"])
    with pytest.raises(SourceError, match=r"r0\.npz: is in the trace already"):
        ingest(shards, tmp_path / "S", requests=entries, label_fields=["domain"], append=True)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.npz", 0)
    records = open_source([path], IngestOptions(**READING), known=()).records()
    next(records)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="was written to while it was read"):
        list(records)


def test_a_store_that_knows_names_only_opens_and_takes_more(shards: Path, tmp_path: Path) -> None:
    ingest(shards / "r0.npz", tmp_path / "S")
    path = tmp_path / "S" / "manifest.json"
    data = json.loads(path.read_text())
    [segment] = data["traces"][0]["segments"]
    segment["sources"] = ["r0.npz"]  # as it was before contents were kept
    del segment["merged"], segment["sums"]
    path.write_text(json.dumps(data))
    assert [file.name for file in tk.open(tmp_path / "S").trace().sources] == ["r0.npz"]
    with pytest.raises(SourceError, match="'r0' is in the trace already"):
        ingest(shards, tmp_path / "S", append=True)
    assert ingest(shards / "r1.npz", tmp_path / "S", append=True).requests == 2
    assert tk.compact(tmp_path / "S")["segments"].to_list() == [1]


@pytest.mark.parametrize("sources", [[1], [{"name": 1}], [{"name": "x", "digest": 5}], [{"other": "x"}], 7])
def test_sources_of_another_kind_are_a_damaged_manifest(shards: Path, tmp_path: Path, sources: Any) -> None:
    ingest(shards / "r0.npz", tmp_path / "S")
    path = tmp_path / "S" / "manifest.json"
    data = json.loads(path.read_text())
    data["traces"][0]["segments"][0]["sources"] = sources
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="damaged manifest"):
        tk.open(tmp_path / "S")


# --- resume --------------------------------------------------------------------------------------


def test_resuming_again_and_again_gives_what_one_ingest_gives(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(shards, tmp_path / "whole")
    monkeypatch.setattr("tracekit.store.segment.GROUP_ROWS", 100)  # two files
    partial = tmp_path / "arriving"
    partial.mkdir()
    segments = []
    for number in range(5):
        shutil.copy(shards / f"r{number}.npz", partial)
        if number in (2, 4):
            segments.append(len(ingest(partial, tmp_path / "S", resume=True).segments))
    assert segments == [2, 3]
    assert everything(tmp_path / "S") == everything(tmp_path / "whole")
    before = (tmp_path / "S" / "manifest.json").read_bytes()
    assert ingest(partial, tmp_path / "S", resume=True).notes[-1] == "nothing is new: no request was added"
    assert (tmp_path / "S" / "manifest.json").read_bytes() == before


def test_a_fault_keeps_the_files_before_it_and_says_that_they_are_not_checked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracekit.store.segment.GROUP_ROWS", 1)
    whole = ingest(shards, tmp_path / "whole")
    (shards / "r3.npz").rename(tmp_path / "r3.npz")
    np.savez(shards / "r3.npz", routed_experts=np.full((9, 3, 2), 7, np.uint8))  # twice the same expert
    with pytest.raises(SourceError, match="twice"):
        ingest(shards, tmp_path / "S", resume=True)
    left = tk.open(tmp_path / "S").trace()
    assert left.requests == 2  # r2 waits for the request after it
    assert [f.finding for f in left.findings].count("not-checked") == 1
    (shards / "r3.npz").unlink()
    (shards / "r4.npz").rename(tmp_path / "r4.npz")
    checked = ingest(shards, tmp_path / "S", resume=True)  # nothing is new, but the check is still to be done
    assert "not-checked" not in [f.finding for f in checked.findings]
    assert tk.open(tmp_path / "S").trace().findings == checked.findings
    for name in ("r3.npz", "r4.npz"):
        shutil.copy(tmp_path / name, shards)
    assert ingest(shards, tmp_path / "S", resume=True).findings == whole.findings


def test_what_does_not_go_with_resume_is_a_usage_error(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ({"append": True}, {"force": True}):
        with pytest.raises(UsageError, match="exclude each other"):
            ingest(shards, tmp_path / "S", resume=True, **options)
    with pytest.raises(UsageError, match="--resume with --requests"):
        ingest(shards, tmp_path / "S", resume=True, requests=[])
    assert main(["ingest", str(shards), "--store", str(tmp_path / "S"), *TYPED, "--resume", "--append"]) == 2
    assert not (tmp_path / "S").exists()
    assert main(["ingest", str(shards), "--store", str(tmp_path / "S"), *TYPED, "--resume"]) == 0
    capsys.readouterr()
    assert main(["ingest", str(shards), "--store", str(tmp_path / "S"), *TYPED, "--append"]) == 0
    assert "nothing is new" in capsys.readouterr().err
    wide = np.argsort(np.random.default_rng(0).random((9, 3, 8)), axis=2)[..., :3].astype(np.uint8)
    np.savez(tmp_path / "wide.npz", routed_experts=wide)
    with pytest.raises(SourceError, match="top_k"):
        ingest(tmp_path / "wide.npz", tmp_path / "S", resume=True)


# --- compaction ----------------------------------------------------------------------------------


def grown(folder: Path, store: Path, **more: Any) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        ingest(path, store, append=number > 0, **more)


def test_compaction_keeps_everything_and_the_results(shards: Path, tmp_path: Path) -> None:
    shutil.rmtree(shards)
    for number in range(6):
        ids = np.argsort(np.random.default_rng(number).random((30, 3, 8)), axis=2).astype(np.uint8)
        weights = np.sort(np.random.default_rng(number).random((30, 3, 2)), axis=2)[..., ::-1].astype(np.float32)
        more = {"token_ids": np.arange(30) + number, "predicted1": ids[..., 2:5], "router_weights": weights}
        shard(shards / f"r{number}.npz", number, 30, **more)
    grown(shards, tmp_path / "S")
    before, info = everything(tmp_path / "S"), tk.open(tmp_path / "S").trace()
    windows = tk.windows(tmp_path / "S", max_window=3, intervals=False)
    weighed = tk.open(tmp_path / "S").sql("SELECT weight FROM activations ORDER BY ALL")
    compacted = tk.compact(tmp_path / "S")
    assert compacted.rows() == [("t", 6, 1, 6, 1)]
    after = tk.open(tmp_path / "S").trace()
    assert everything(tmp_path / "S") == before
    assert tk.open(tmp_path / "S").sql("SELECT weight FROM activations ORDER BY ALL").equals(weighed)
    assert (after.content, after.sources, after.tokens, after.rows) == (
        info.content,
        info.sources,
        info.tokens,
        info.rows,
    )
    assert [p.name for p in (tmp_path / "S" / "segments").iterdir()] == [after.segments[0].id]
    for result in (tmp_path / "S" / "results").iterdir():
        assert pl.read_parquet(result).height == windows.height  # it is still there: its key is the same
    assert tk.windows(tmp_path / "S", max_window=3, intervals=False).equals(windows)
    shutil.rmtree(tmp_path / "S" / "results")
    assert tk.windows(tmp_path / "S", max_window=3, intervals=False).equals(windows)
    again = (tmp_path / "S" / "manifest.json").read_bytes()
    assert tk.compact(tmp_path / "S").rows() == [("t", 1, 1, 1, 1)]
    assert (tmp_path / "S" / "manifest.json").read_bytes() == again
    shard(tmp_path / "new.npz", 99)
    assert ingest(shards, tmp_path / "S", append=True).requests == 6  # contents are still known


def test_parts_of_the_usual_size_are_made_of_whole_parts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A request has 60 to 72 rows: a part for every two of three layers.
    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 50)
    grown(shards, tmp_path / "S")
    before = everything(tmp_path / "S")
    rows = [n for segment in tk.open(tmp_path / "S").trace().segments for n in segment.parts]
    monkeypatch.setattr(compaction, "PART_ROWS", 150)
    tk.compact(tmp_path / "S", trace="t")
    [segment] = tk.open(tmp_path / "S").trace().segments
    assert sum(segment.parts) == sum(rows)
    assert max(segment.parts) <= 150
    assert all(a + b > 150 for a, b in zip(segment.parts, segment.parts[1:], strict=False))
    assert everything(tmp_path / "S") == before
    wide = ingest(shards, tmp_path / "W")
    assert wide.tokens == segment.tokens
    assert tk.windows(tmp_path / "S", max_window=3, intervals=False).equals(
        tk.windows(tmp_path / "W", max_window=3, intervals=False)
    )


def test_segments_that_hold_other_things_stay_apart(tmp_path: Path) -> None:
    weights = np.sort(np.random.default_rng(0).random((20, 3, 2)), axis=2)[..., ::-1].astype(np.float32)
    shard(tmp_path / "f" / "a.npz", 1)
    shard(tmp_path / "f" / "b.npz", 2)
    shard(tmp_path / "f" / "c.npz", 3, router_weights=weights)
    shard(tmp_path / "f" / "d.npz", 4, token_ids=np.arange(20))
    grown(tmp_path / "f", tmp_path / "S")
    before = everything(tmp_path / "S")
    assert tk.compact(tmp_path / "S").rows() == [("t", 4, 3, 4, 3)]
    assert everything(tmp_path / "S") == before
    assert [s.has_weights for s in tk.open(tmp_path / "S").trace().segments] == [False, True, False]


def test_counts_are_compacted_too(tmp_path: Path) -> None:
    for number in range(3):
        rows = ["layer,expert,count", *(f"{layer},{e},{number + e + 1}" for layer in (0, 1) for e in range(4))]
        (tmp_path / f"{number}.csv").write_text("\n".join(rows) + "\n")
        tk.ingest(tmp_path / f"{number}.csv", tmp_path / "S", name="t", top_k=2, append=number > 0)
    before = tk.open(tmp_path / "S").sql("SELECT * FROM counts ORDER BY ALL")
    load = tk.load(tmp_path / "S")
    assert tk.compact(tmp_path / "S").rows() == [("t", 3, 1, 0, 0)]
    assert tk.open(tmp_path / "S").sql("SELECT * FROM counts ORDER BY ALL").equals(before)
    shutil.rmtree(tmp_path / "S" / "results")
    assert tk.load(tmp_path / "S").equals(load)


def test_compaction_names_the_file_that_cannot_be_read_and_changes_nothing(shards: Path, tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / "f" / f"{number}.npz", number, token_ids=np.arange(20))
    grown(tmp_path / "f", tmp_path / "S")
    first = tmp_path / "S" / "segments" / tk.open(tmp_path / "S").trace().segments[0].id
    listed = (tmp_path / "S" / "manifest.json").read_bytes()
    for name in ("part-00000.parquet", "requests.parquet", "runs.parquet", "tokens.parquet"):
        held = (first / name).read_bytes()
        (first / name).write_bytes(held[: len(held) // 2])
        with pytest.raises(StoreError, match=name):
            tk.compact(tmp_path / "S")
        (first / name).write_bytes(held)
        assert (tmp_path / "S" / "manifest.json").read_bytes() == listed
        assert len(list((tmp_path / "S" / "segments").iterdir())) == 3
    with manifest.locked(tmp_path / "S"), pytest.raises(StoreError, match="another"):
        tk.compact(tmp_path / "S")
    with pytest.raises(StoreError, match="no trace named 'u'"):
        tk.compact(tmp_path / "S", trace="u")


def test_the_verb_says_what_it_did(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown(shards, tmp_path / "S")
    assert main(["compact", str(tmp_path / "S"), "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["trace,segments_before,segments,parts_before,parts", "t,5,1,5,1"]


# --- checksums -----------------------------------------------------------------------------------


def test_a_checksum_tells_any_one_change_and_any_exchange_of_columns() -> None:
    rng = np.random.default_rng(0)
    for dtype, rows in ((np.uint8, 37), (np.uint16, 37), (np.float32, 5), (np.uint8, 0)):
        columns = [rng.integers(0, 8, rows).astype(dtype) for _ in range(3)]
        known = checksum(columns)
        assert known == checksum([column.copy() for column in columns])
        assert rows == 0 or known != checksum([columns[1], columns[0], columns[2]])
        for rank in range(3):
            for row in range(rows):
                changed = [column.copy() for column in columns]
                changed[rank][row] += 1
                assert checksum(changed) != known
