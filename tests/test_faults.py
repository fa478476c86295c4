"""Faults: an ingest or a compaction that is killed at any step, a full disk, files that are damaged."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import StoreError
from tracekit.store import manifest, writer
from tracekit.store.writer import ingest

READING: dict[str, Any] = {"num_experts": 8, "top_k": 2, "axes": "tlk", "phase": "decode"}
FILES = 3
TRIALS = 500 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 14
"""Steps that a piece of work is cut off at, spread over all of them; there are some 60."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of two requests each, with token ids and predictions, so that every kind of file is written."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    paths = []
    for number in range(FILES):
        ids = np.argsort(rng.random((24, 3, 8)), axis=2).astype(np.uint8)
        more: Any = {"token_ids": rng.integers(0, 99, 24), "predicted1": ids[..., 3:6]}
        path = folder / f"shard-{number}.npz"
        np.savez(path, routed_experts=ids[..., :2], request_lens=np.array([11, 13]), **more)
        paths.append(str(path))
    return paths


@pytest.fixture
def grown(shards: list[str], tmp_path: Path) -> Path:
    """A store of as many segments as files."""
    for number, path in enumerate(shards):
        ingest(path, tmp_path / "grown", name="t", append=number > 0, **READING)
    return tmp_path / "grown"


def held(store: Path) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """Return every routing row of the store, by request id."""
    opened = tk.open(store)
    names = opened.requests(opened.trace())["request_id"].to_list()
    rows = []
    for block in opened.blocks(opened.trace()):
        for row, request, layer, pos, n in zip(*block.runs.values(), strict=True):
            experts = zip(range(pos, pos + n), block.ids[:, row : row + n].T.tolist(), strict=True)
            rows += [(names[request], int(layer), at, tuple(ids)) for at, ids in experts]
    return rows


def beside(store: Path) -> list[Any]:
    """Return the rows of requests, token ids and predictions."""
    segments = [store / "segments" / segment.id for segment in tk.open(store).trace().segments]
    return [
        pl.concat([pl.read_parquet(segment / name) for segment in segments]).rows()
        for name in ("requests.parquet", "tokens.parquet", "predicted.parquet")
    ]


def is_there(store: Path) -> bool:
    """Whether anything was committed."""
    return (store / manifest.MANIFEST).exists()


class Trials:
    """One piece of work, cut off at each of its steps in turn, always from the same store."""

    def __init__(
        self,
        folder: Path,
        verb: str,
        begin: Path | None,
        sources: list[str],
        *,
        shares: bool = False,
        **options: Any,
    ) -> None:
        self._folder = folder
        self._begin = begin
        self._job = {"verb": verb, "sources": sources, "shares": shares, "options": {**READING, **options}}

    def run(self, kind: str) -> list[tuple[Path, dict[str, Any]]]:
        """Return each store and, unless it was killed, how the work ended."""
        [(_, whole)] = self._run(kind, [1 << 30])
        assert whole["error"] == ""
        assert whole["steps"] > 5
        steps = np.linspace(1, whole["steps"], min(TRIALS, whole["steps"])).round().astype(int)
        return self._run(kind, steps.tolist())

    def _run(self, kind: str, steps: Any) -> list[tuple[Path, dict[str, Any]]]:
        jobs = [
            {
                **self._job,
                "kind": kind,
                "step": step,
                "from": self._begin and str(self._begin),
                "store": str(self._folder / f"{kind}-{step}"),
                "report": str(self._folder / f"{kind}-{step}.json"),
            }
            for step in steps
        ]
        program = Path(__file__).with_name("faulty.py")
        subprocess.run([sys.executable, str(program)], input=json.dumps(jobs).encode(), check=True)
        reports = [Path(str(job["report"])) for job in jobs]
        assert (kind == "kill" and len(jobs) > 1) or all(report.exists() for report in reports)
        return [
            (Path(str(job["store"])), json.loads(report.read_text()) if report.exists() else {})
            for job, report in zip(jobs, reports, strict=True)
        ]


@pytest.mark.parametrize("shares", [False, True])
def test_a_first_ingest_that_is_killed_is_all_or_nothing(shards: list[str], tmp_path: Path, shares: bool) -> None:
    ingest(shards, tmp_path / "whole", name="t", **READING)
    outcomes = set()
    for store, _ in Trials(tmp_path, "ingest", None, shards, shares=shares).run("kill"):
        outcomes.add(is_there(store))
        if is_there(store):
            assert held(store) == held(tmp_path / "whole")
        ingest(shards, store, name="t", force=True, **READING)
        assert beside(store) == beside(tmp_path / "whole")
    assert outcomes == {False, True}


@pytest.mark.parametrize("options", [{"append": True}, {"force": True}, {"append": True, "shares": True}])
def test_an_append_or_replacement_that_is_killed_is_all_or_nothing(
    shards: list[str], tmp_path: Path, options: dict[str, bool]
) -> None:
    ingest(shards[:1], tmp_path / "old", name="t", **READING)
    ingest(shards if "append" in options else shards[1:], tmp_path / "new", name="t", **READING)
    old, new = held(tmp_path / "old"), held(tmp_path / "new")
    outcomes = []
    for store, _ in Trials(tmp_path, "ingest", tmp_path / "old", shards[1:], **options).run("kill"):
        assert held(store) in (old, new)
        outcomes.append(held(store) == new)
    assert set(outcomes) == {False, True}
    assert outcomes == sorted(outcomes)  # one step commits


def test_a_resumed_ingest_loses_and_doubles_nothing_wherever_it_is_killed(shards: list[str], tmp_path: Path) -> None:
    ingest(shards, tmp_path / "whole", name="t", **READING)
    whole = held(tmp_path / "whole")
    seen = set()
    for store, _ in Trials(tmp_path, "ingest", None, shards, resume=True).run("kill"):
        if is_there(store):
            trace = tk.open(store).trace()
            seen.add(len(trace.segments))
            assert trace.requests == 2 * len(trace.sources)
            assert held(store) == whole[: len(held(store))]
            unfinished = trace.requests < 2 * FILES
            assert (writer.UNCHECKED in trace.findings) == unfinished
        again = ingest(shards, store, name="t", resume=True, **READING)
        assert held(store) == whole
        assert beside(store) == beside(tmp_path / "whole")
        assert again.findings == tk.open(tmp_path / "whole").trace().findings
        assert len(list((store / "segments").iterdir())) == len(again.segments)
    assert seen > {FILES}


def test_a_compaction_that_is_killed_changes_nothing_that_can_be_asked(grown: Path, tmp_path: Path) -> None:
    before, content = (held(grown), beside(grown)), tk.open(grown).trace().content
    segments = set()
    for store, _ in Trials(tmp_path, "compact", grown, []).run("kill"):
        assert (held(store), beside(store)) == before
        assert tk.open(store).trace().content == content
        segments.add(len(tk.open(store).trace().segments))
        tk.compact(store)
        assert len(list((store / "segments").iterdir())) == 1
        assert (held(store), beside(store)) == before
    assert segments == {1, FILES}


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    ("verb", "options"),
    [("ingest", {"append": True}), ("ingest", {"append": True, "shares": True}), ("compact", {})],
)
def test_a_disk_that_is_full_at_any_write_leaves_the_store_as_it_was(
    grown: Path, shards: list[str], tmp_path: Path, verb: str, options: dict[str, bool]
) -> None:
    begin = grown
    if verb == "ingest":
        ingest(shards[:1], tmp_path / "old", name="t", **READING)
        begin = tmp_path / "old"
    before = files(begin)
    for store, ended in Trials(tmp_path, verb, begin, shards[1:], **options).run("full"):
        committed = files(store)["manifest.json"] != before["manifest.json"]
        assert committed or ended["error"].startswith("StoreError")
        assert committed or files(store) == before
        assert "No space left" in ended["error"]


def test_a_disk_that_fills_up_stops_a_resumed_ingest_after_whole_files(shards: list[str], tmp_path: Path) -> None:
    ingest(shards, tmp_path / "whole", name="t", **READING)
    whole = held(tmp_path / "whole")
    for store, ended in Trials(tmp_path, "ingest", None, shards, resume=True).run("full"):
        assert ended["error"].startswith("StoreError")
        if is_there(store):
            assert held(store) == whole[: len(held(store))]
            assert tk.open(store).trace().requests == 2 * len(tk.open(store).trace().sources)


# --- damage --------------------------------------------------------------------------------------

VERBS = {
    "summary": [],
    "windows": ["--no-intervals"],
    "expert-ratio": ["--no-intervals"],
    "autocorr": ["--no-intervals"],
    "attribution": [],
    "load": [],
    "cache": ["--no-intervals"],
    "reuse": ["--no-intervals"],
    "layer-budgets": [],
    "locality": ["--no-intervals"],
    "prefetch": ["--no-intervals"],
    "check": [],
    "compact": [],
    "report": ["--output", "-"],
}
"""Verbs that read the routing, and what keeps them short."""


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two segments, each of two requests that are long enough for every verb."""
    folder, rng = tmp_path_factory.mktemp("damage"), np.random.default_rng(0)
    for number in range(2):
        ids = np.argsort(rng.random((80, 3, 8)), axis=2)[..., :2].astype(np.uint8)
        np.savez(folder / f"{number}.npz", routed_experts=ids, request_lens=np.array([40, 40]))
        ingest(folder / f"{number}.npz", folder / "S", name="t", append=number > 0, **READING)
    return folder / "S"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(("part-00000.parquet", "requests.parquet", "runs.parquet"), ("missing", "cut")),
        ("part-00000.parquet", "one id"),
    ],
)
@pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")
def test_every_verb_that_reads_a_damaged_file_names_it(
    two_parts: Path, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(two_parts, tmp_path / "S")
    path = store / "segments" / tk.open(store).trace().segments[1].id / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:  # another expert, in range and once in the row
        frame = pl.read_parquet(path)
        rank = next(e for e in range(8) if e not in frame.select("e0", "e1").row(7))
        changed = pl.when(pl.int_range(pl.len()) == 7).then(rank).otherwise(pl.col("e0")).cast(pl.UInt8)
        frame.with_columns(changed.alias("e0")).write_parquet(path)
    silent = []
    for verb, options in VERBS.items():
        code = main([verb, str(store), *options])
        said = capsys.readouterr()
        if code != 1 or name not in said.err:
            silent.append((verb, code, said.err[-200:]))
    assert not silent
    assert not list((store / "results").glob("*"))


def test_two_that_write_at_once_do_not_mix(grown: Path, shards: list[str], tmp_path: Path) -> None:
    with manifest.locked(grown):
        for work in (
            lambda: ingest(shards[0], grown, name="u", **READING),
            lambda: ingest(shards, grown, name="t", resume=True, **READING),
            lambda: tk.compact(grown),
        ):
            before = files(grown)
            with pytest.raises(StoreError, match="another"):
                work()
            assert files(grown) == before
    assert ingest(shards[0], grown, name="u", **READING).requests == 2
