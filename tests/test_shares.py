"""Ingests of many files in shares: at once or one after the other, they give what one segment gives, or nothing."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.errors import SourceError, StoreError
from tracekit.schema import Predictions, Request, TraceMeta, VerifySteps
from tracekit.sources import Source
from tracekit.store import writer
from tracekit.store.manifest import Segment
from tracekit.store.segment import SegmentWriter, number

OPTIONS: dict[str, Any] = {"num_experts": 8, "top_k": 2}


def routing(seed: int, tokens: int = 20) -> np.ndarray[Any, Any]:
    return np.argsort(np.random.default_rng(seed).random((tokens, 3, 8)), axis=2)[..., :2].astype(np.uint8)


def responses(folder: Path) -> None:
    """Five files of vLLM's responses, three in each, one of which has no row."""
    for file in range(5):
        lines = []
        for turn in range(3):
            data = io.BytesIO()
            tokens = 0 if (file, turn) == (3, 1) else 20 + file
            np.save(data, routing(3 * file + turn, tokens))
            choice = {"index": 0, "routed_experts": base64.b64encode(data.getvalue()).decode()}
            usage = {"prompt_tokens": min(9, tokens), "completion_tokens": max(1, tokens - 8)}
            usage = usage if tokens else {"prompt_tokens": 1, "completion_tokens": 0}
            lines.append(json.dumps({"id": f"{file}-{turn}", "model": "m", "choices": [choice], "usage": usage}))
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")


def arrays(folder: Path) -> None:
    for file in range(5):
        np.save(folder / f"{file}.npy", routing(file, 30 + file))


def table(folder: Path) -> None:
    for file in range(5):
        rows = ["request_id,layer,pos,rank,expert"]
        rows += [
            f"{file}-{request},{layer},{pos},{rank},{expert}"
            for request in range(2)
            for (pos, layer, rank), expert in np.ndenumerate(routing(2 * file + request))
        ]
        (folder / f"{file}.csv").write_text("\n".join(rows) + "\n")


def counts(folder: Path) -> None:
    for file in range(5):
        rows = ["layer,expert,count", *(f"{layer},{e},{file + e + 1}" for layer in (0, 1) for e in range(8))]
        (folder / f"{file}.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file a share."""
    monkeypatch.setattr(writer, "SHARE_BYTES", 1)


def ingest(sources: Any, store: Path, threads: int = 1, **options: Any) -> tk.TraceInfo:
    with tk.running(threads=threads):
        return tk.ingest(sources, store, name="t", **{**OPTIONS, **options})


def everything(store: Path) -> tuple[Any, ...]:
    """Return all rows of a store's one trace, what was found and noted, and where it is from."""
    opened, trace = tk.open(store), tk.open(store).trace()
    views = ("routing", "requests", "tokens", "predictions", "verification", "counts")
    rows = [opened.sql(f"SELECT * FROM {view} ORDER BY ALL").rows() for view in views]
    numbers = opened.requests(trace)["request"].to_list()
    assert numbers == list(range(trace.requests))
    if not trace.meta.histogram:
        assert sum(len(block.runs["row"]) for block in opened.blocks(trace)) > 0  # numbers and checksums fit
    return rows, trace.findings, trace.notes, trace.sources, trace.meta


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.mark.parametrize("write", [responses, arrays, table, counts])
def test_shares_give_what_one_segment_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    write(folder)
    assert len(ingest(folder, tmp_path / "whole").segments) == 1
    monkeypatch.setattr(writer, "SHARE_BYTES", 2 * max(p.stat().st_size for p in folder.iterdir()))
    alone, at_once = (ingest(folder, tmp_path / str(threads), threads) for threads in (1, 2))
    assert len(at_once.segments) > 1
    assert everything(tmp_path / "1") == everything(tmp_path / "2") == everything(tmp_path / "whole")
    assert alone.content == at_once.content
    if write is not counts:
        tables = [tk.windows(tmp_path / name, max_window=4, intervals=False) for name in ("1", "2", "whole")]
        assert tables[0].equals(tables[1])
        assert tables[0].equals(tables[2])


def test_where_it_is_cut_hangs_on_the_sizes_alone(folder: Path) -> None:
    sizes = []
    for file, tokens in enumerate((20, 20, 200, 20, 20, 20, 20, 4)):
        np.save(folder / f"{file}.npy", routing(file, tokens))
        sizes.append((folder / f"{file}.npy").stat().st_size)
    paths = sorted(folder.iterdir())

    def cut(paths: list[Path], size: int) -> list[list[str]]:
        source = tk.sources.open_source(paths, tk.sources.IngestOptions(num_experts=8, axes="tlk"), known=())
        return [[file.name[0] for file in share.files] for share in source.shares(size)]

    assert cut(paths, 2 * sizes[0]) == [["0", "1"], ["2"], ["3", "4"], ["5", "6", "7"]]
    assert cut(paths, 3 * sizes[0]) == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert cut(paths, sum(sizes)) == []
    assert cut(paths[:1], 1) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "options",
    [
        {"requests": [{"domain": "a"}] * 5, "label_fields": ["domain"]},
        {"drop_warmup": True},
        {"deinterleave": 2},
    ],
)
def test_what_needs_all_in_order_is_not_cut(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    arrays(folder)
    assert len(ingest(folder, tmp_path / "S", 2, **options).segments) == 1
    assert len(ingest(folder, tmp_path / "R", 2, resume=True).segments) == 1


@pytest.mark.usefixtures("small")
def test_layers_are_chosen_in_every_share(folder: Path, tmp_path: Path) -> None:
    responses(folder)
    trace = ingest(folder, tmp_path / "S", 2, layers=[1, 2])
    assert len(trace.segments) == 5
    assert trace.meta.layers == (1, 2)
    assert [note for note in trace.notes if "--layers" in note] == ["--layers kept 2 of 3 layers: 1-2"]
    assert tk.open(tmp_path / "S").sql("SELECT DISTINCT layer FROM routing ORDER BY ALL").rows() == [(1,), (2,)]


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_file_at_fault_is_named_and_the_store_stays_as_it_was(
    folder: Path, tmp_path: Path, threads: int
) -> None:
    arrays(folder)
    ingest(folder / "0.npy", tmp_path / "S", phase="decode")
    before = files(tmp_path / "S")
    for bad in ("4.npy", "2.npy"):
        np.save(folder / bad, np.full((40, 3, 2), 7, np.uint8))  # twice the same expert
        with pytest.raises(SourceError, match=rf"{bad}.* twice in one row"):
            ingest(folder, tmp_path / "S", threads, append=True)
        with pytest.raises(SourceError, match=rf"{bad}.* twice in one row"):
            ingest(folder, tmp_path / "new", threads)
    assert files(tmp_path / "S") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_of_another_shape_than_the_first_is_refused(folder: Path, tmp_path: Path, threads: int) -> None:
    arrays(folder)
    np.save(folder / "3.npy", routing(0, 40)[:, :2])
    with pytest.raises(SourceError, match=r"3\.npy.* number of layers is 2, in the first request 3"):
        ingest(folder, tmp_path / "S", threads, axes="tlk")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_id_in_two_shares_is_refused(folder: Path, tmp_path: Path, threads: int) -> None:
    responses(folder)
    text = (folder / "4.jsonl").read_text()
    (folder / "4.jsonl").write_text(text.replace('"4-1"', '"1-2"'))
    with pytest.raises(SourceError, match=r"4\.jsonl.*'1-2'.* same id; expected another id than in .*1\.jsonl"):
        ingest(folder, tmp_path / "S", threads)
    (folder / "4.jsonl").write_text(text)
    ingest(folder / "4.jsonl", tmp_path / "S")
    (folder / "4.jsonl").write_text(text + " \n")  # another content with the same requests
    with pytest.raises(SourceError, match=r"4\.jsonl.*request '4-0' is in the trace already"):
        ingest(folder, tmp_path / "S", threads, append=True)


@dataclass(frozen=True)
class Deadly:
    """A share that kills who reads it."""

    size: int = 1

    def open(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("small")
def test_a_process_that_is_killed_is_an_error_in_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays(folder)
    ingest(folder / "0.npy", tmp_path / "S")
    before = files(tmp_path / "S")
    cut = Source.shares
    monkeypatch.setattr(Source, "shares", lambda source, size: [*cut(source, size)[:2], Deadly(), Deadly()])
    with pytest.raises(StoreError, match="was ended by SIGKILL") as caught:
        ingest(folder, tmp_path / "S", 2, append=True)
    assert str(tmp_path / "S") in str(caught.value)
    assert files(tmp_path / "S") == before


PROGRAM = """
import os, resource, signal, sys
import tracekit as tk
from tracekit.store import writer

writer.SHARE_BYTES = 1
fault, source, store = sys.argv[1:]
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

def progress(done, total, tokens):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

with tk.running(threads=2):
    tk.ingest(source, store, name="t", num_experts=8, top_k=2, append=True, progress=progress)
"""


def run(fault: str, source: Path, store: Path) -> subprocess.CompletedProcess[str]:
    """Ingest in a program of its own; it has ended, and all that it started, when this returns."""
    arguments = [sys.executable, "-c", PROGRAM, fault, str(source), str(store)]
    # Its processes hold on to the standard error, too: the end of the pipe is theirs.
    return subprocess.run(arguments, stderr=subprocess.PIPE, text=True, timeout=120, check=False)


def test_processes_end_with_the_one_that_started_them(folder: Path, tmp_path: Path) -> None:
    responses(folder)
    ingest(folder / "0.jsonl", tmp_path / "S")
    before = everything(tmp_path / "S")
    assert run("kill", folder, tmp_path / "S").returncode == -signal.SIGKILL
    assert everything(tmp_path / "S") == before
    assert ingest(folder, tmp_path / "S", append=True).requests == 14
    assert len(list((tmp_path / "S" / "segments").iterdir())) == 2


def test_a_disk_that_is_full_for_a_process_is_an_error_in_words(folder: Path, tmp_path: Path) -> None:
    for file in range(4):
        np.save(folder / f"{file}.npy", routing(file, 4000))
    ingest(folder / "0.npy", tmp_path / "S")
    before = files(tmp_path / "S")
    ended = run("full", folder, tmp_path / "S")
    assert ended.returncode == 1
    assert "StoreError" in ended.stderr.splitlines()[-1]
    assert "File too large" in ended.stderr
    assert files(tmp_path / "S") == before


# --- growing -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_each_content_is_taken_once_in_whatever_share_it_is(folder: Path, tmp_path: Path, threads: int) -> None:
    arrays(folder)
    shutil.copy(folder / "1.npy", folder / "5.npy")  # the same content twice is two requests
    ingest(folder, tmp_path / "whole")
    ingest([folder / "0.npy", folder / "3.npy"], tmp_path / "S")
    (folder / "3.npy").rename(folder / "9.npy")
    trace = ingest(folder, tmp_path / "S", threads, append=True)
    assert [file.name for file in trace.sources] == ["0.npy", "3.npy", "1.npy", "2.npy", "4.npy", "5.npy"]
    assert trace.notes[-1] == "in the trace already, left out: '0.npy', '9.npy'"
    assert len(trace.segments) == 2 + 4  # one file each
    again = ingest(folder, tmp_path / "S", threads, append=True)
    assert again.notes[-1] == "nothing is new: no request was added"
    shutil.copy(folder / "1.npy", folder / "a.npy")
    one_more = ingest(folder, tmp_path / "S", threads, append=True)
    assert (one_more.requests, len(one_more.segments)) == (7, 7)
    assert tk.compact(tmp_path / "S")["segments"].to_list() == [1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_files_without_a_request_are_taken_too(folder: Path, tmp_path: Path, threads: int) -> None:
    """They are known later, and change nothing."""
    responses(folder)
    empty = [json.loads(line) for line in (folder / "3.jsonl").read_text().splitlines()][1]
    for file in ("00", "2x", "2y", "9"):
        empty["id"] = file
        (folder / f"{file}.jsonl").write_text(json.dumps(empty) + "\n")
    trace = ingest(folder, tmp_path / "S", threads)
    assert [file.name.split(".")[0] for file in trace.sources] == ["0", "00", "1", "2", "2x", "2y", "3", "4", "9"]
    assert (trace.requests, len(trace.segments)) == (14, 5)
    assert ingest(folder, tmp_path / "S", threads, append=True).notes[-1].startswith("nothing is new")


@pytest.mark.usefixtures("small")
def test_progress_goes_on_to_the_end(folder: Path, tmp_path: Path) -> None:
    responses(folder)
    for threads in (1, 2):
        seen: list[tuple[int, int, int]] = []
        ingest(folder, tmp_path / str(threads), threads, progress=lambda *now: seen.append(now))  # noqa: B023
        assert seen == sorted(seen)
        total = sum(path.stat().st_size for path in folder.iterdir())
        assert seen[-1] == (total, total, tk.open(tmp_path / str(threads)).trace().tokens)


def test_requests_get_their_numbers_whenever_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts wait for the number of the first request, and are what they would have been."""
    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 100)
    monkeypatch.setattr("tracekit.store.spool.SPOOL_ROWS", 50)
    meta = TraceMeta(8, 2, (0, 1, 2), "arrays")
    steps = VerifySteps(np.array([3, 9]), np.array([4, 2]), np.array([2, 1]), routing(99, 6))

    def written(first: Future[int], later: bool) -> tuple[Segment, dict[str, pl.DataFrame]]:
        rng = np.random.default_rng(0)
        with SegmentWriter(tmp_path, meta, first) as segment:
            for request in range(5):
                ids = routing(request, 25)
                segment.add(
                    Request(
                        f"r{request}",
                        ids,
                        decode_start=None if request == 3 else 7,
                        positions=np.arange(25) + (np.arange(25) > 11),
                        token_ids=np.arange(25),
                        weights=None if request == 2 else rng.random(ids.shape).astype(np.float32),
                        steps=steps,
                        predictions=(Predictions("gate", 1, ids, np.ones((25, 3), bool)),),
                    )
                )
                if later and request == 3:
                    first.set_result(1000)
            if not first.done():
                first.set_result(1000)
            made = segment.finish()
        return made, {path.name: pl.read_parquet(path) for path in segment.directory.iterdir()}

    known, frames = written(number(1000), later=False)
    assert len(known.parts) == 5
    assert frames["part-00003.parquet"]["request"].unique().to_list() == [1003]
    for later in (False, True):
        waited, others = written(Future(), later)
        assert (waited.content, waited.sums) == (known.content, known.sums)
        assert sorted(others) == sorted(frames)
        for name, frame in others.items():
            assert frame.equals(frames[name]), name
            assert frame["request"].is_between(1000, 1004).all(), name
