"""Sums that are kept in the store: an appended trace reads only what is new, and nothing stale or damaged is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import tracekit as tk
from tracekit.analysis import summing
from tracekit.metrics.measurement import Measurement
from tracekit.metrics.state import Cells, Spec, State, Sums, deal
from tracekit.schema import By, Phase, TraceMeta
from tracekit.store import TraceInfo, compact
from tracekit.store.manifest import STATES, TEMPORARY

N, K, LAYERS, PROMPT = 8, 2, 2, 25
ROUGH = pytest.mark.filterwarnings("ignore:.*interval:tracekit.TracekitWarning")


def add(store: Path, first: int, end: int, tokens: int = 70, **options: Any) -> TraceInfo:
    """Ingest requests ``first`` to ``end - 1`` of one endless trace: most of label a, every third token a repeat."""
    rng = [np.random.default_rng(r) for r in range(first, end)]
    lengths = [tokens + r % 7 for r in range(first, end)]
    ids = [np.argsort(g.random((n, LAYERS, N)), axis=2)[..., :K] for g, n in zip(rng, lengths, strict=True)]
    for request in ids:
        request[2::3] = request[1:-1:3]
    source = store.parent / f"{store.name}-{first}-{end}.npz"
    np.savez(source, expert_ids=np.concatenate(ids).astype(np.uint8), request_lens=np.array(lengths, np.int32))
    requests = [
        {"request_id": f"r{r}", "prompt_len": PROMPT, "label": "b" if r % 5 == 0 else "a"} for r in range(first, end)
    ]
    given: dict[str, Any] = {"num_experts": N, "requests": requests, "label_fields": ["label"], "router_order": True}
    return tk.ingest(source, store, name="t", **given | options)


def kept(store: Path) -> list[Path]:
    return sorted((store / STATES).glob("*"))


@contextmanager
def away(store: Path, segments: slice) -> Iterator[None]:
    """Take the part files of some segments away, so that nobody can read them."""
    folders = [store / "segments" / s.id for s in tk.open(store).trace().segments[segments]]
    parts = [part for folder in folders for part in folder.glob("part-*")]
    for part in parts:
        part.rename(part.with_name(f"away-{part.name}"))
    try:
        yield
    finally:
        for part in parts:
            part.with_name(f"away-{part.name}").rename(part)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The ranges of part files that were read."""
    ranges: list[range] = []
    read = summing.read

    def spied(*args: Any) -> Sums:
        ranges.append(args[-1])
        return read(*args)

    monkeypatch.setattr(summing, "read", spied)
    return ranges


def frames(m: Measurement) -> list[pl.DataFrame]:
    load = [] if m.spec.by == "request" else [m.load()]
    return [m.windows(), m.autocorr(), m.attribution(3), *load]


def assert_same(found: Measurement, expected: Measurement) -> None:
    """Counts bit for bit, all else but for rounding."""
    for field in fields(State):
        ours, theirs = (getattr(m.state, field.name) for m in (found, expected))
        assert ours.dtype == theirs.dtype
        if ours.dtype == np.int64:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=field.name)
    for ours, theirs in zip(frames(found), frames(expected), strict=True):
        assert_frame_equal(ours, theirs, rel_tol=1e-12, abs_tol=1e-12)


def measure(store: Path, **asked: Any) -> Measurement:
    return tk.measure(store, **{"max_window": 4, "max_lag": 3} | asked)


# --- the increment -------------------------------------------------------------------------------


@ROUGH
@pytest.mark.parametrize(
    ("by", "sizes"),
    [
        (None, (20, 34, 40)),
        (None, (180, 300, 310)),
        (None, (260, 300)),
        ("layer", (180, 220)),
        ("label", (180, 300, 310)),
        ("request", (20, 34, 40)),
    ],
    ids=str,
)
def test_an_appended_trace_has_the_sums_of_one_ingest(
    by: By | None, sizes: Sequence[int], tmp_path: Path, reads: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more than 200 requests, of the trace or of a label, begin to share jackknife groups."""
    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 2000)  # several parts a segment
    phases: tuple[Phase, ...] = ("decode", "prefill", "all")
    grown, whole, first = tmp_path / "grown", tmp_path / "whole", 0
    for n, end in enumerate(sizes):
        info = add(grown, first, end, append=n > 0)
        first, parts = end, [len(segment.parts) for segment in info.segments]
        reads.clear()
        with away(grown, slice(n)):
            last = [measure(grown, by=by, phase=phase) for phase in phases]
        assert reads == [range(sum(parts[:n]), sum(parts))] * 3
    add(whole, 0, first)
    assert parts[0] > 1
    for found, phase in zip(last, phases, strict=True):
        assert_same(found, measure(whole, by=by, phase=phase))


@ROUGH
def test_requests_of_one_group_stay_together_whatever_is_added() -> None:
    ids = [f"r{i}" for i in range(2000)]
    before: dict[str, int] = {}
    for n in (1, 150, 200, 201, 256, 400, 2000):
        groups = deal(ids[:n], 3)
        assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))
        merged = {(before[i], groups[i]) for i in before}
        assert len(merged) == len(set(before.values()))
        before = groups
    assert len(set(before.values())) == 200
    assert len(set(deal(ids[:200], 3).values())) == 200
    assert deal(ids, 3) != deal(ids, 4)


@ROUGH
def test_every_result_comes_from_the_increment(tmp_path: Path, reads: list[range]) -> None:
    store = tmp_path / "store"
    add(store, 0, 40)
    tk.windows(store)
    add(store, 40, 50, append=True)
    with away(store, slice(1)):
        found = tk.windows(store)
    assert reads == [range(1), range(1, 2)]
    add(tmp_path / "whole", 0, 50)
    assert_frame_equal(found, tk.windows(tmp_path / "whole"), rel_tol=1e-12, abs_tol=1e-12)


@ROUGH
def test_what_goes_less_far_is_answered_without_reading(tmp_path: Path, reads: list[range]) -> None:
    store = tmp_path / "store"
    add(store, 0, 30, tokens=400)
    widest = measure(store, max_window=4, max_lag=3, batches=True)
    assert reads == [range(1)]
    asked: list[dict[str, Any]] = [
        {},
        {"by": "layer"},
        {"max_window": 3, "max_lag": 2, "batches": True},
        {"max_window": 1, "max_lag": 0},
        {"intervals": False},
    ]
    with away(store, slice(None)):
        answers = [measure(store, **one) for one in asked]
        ratio = tk.expert_ratio(store, max_window=4, batch_size=[1, 4])
        tk.load(store)
    assert reads == [range(1)]
    shutil.rmtree(store)
    add(store, 0, 30, tokens=400)
    for one, answer in zip(asked, answers, strict=True):
        fresh = measure(store, **one)
        shutil.rmtree(store / STATES, ignore_errors=True)
        for field in fields(State):
            np.testing.assert_allclose(getattr(answer.state, field.name), getattr(fresh.state, field.name), rtol=1e-12)
        assert_frame_equal(answer.windows(), fresh.windows(), rel_tol=1e-12, abs_tol=1e-12)
    assert_frame_equal(ratio, tk.expert_ratio(store, max_window=4, batch_size=[1, 4]), rel_tol=1e-12, abs_tol=1e-12)
    assert_frame_equal(widest.windows([2]), measure(store, batches=True).windows([2]))


@ROUGH
def test_what_goes_further_or_has_other_windows_or_groups_is_read(tmp_path: Path, reads: list[range]) -> None:
    store = tmp_path / "store"
    add(store, 0, 30)
    measure(store)
    asked: list[dict[str, Any]] = [
        {"max_window": 5},
        {"max_lag": 4},
        {"batches": True},
        {"overlapping": False},
        {"by": "label"},
        {"by": "request"},
        {"phase": "prefill"},
        {"seed": 1},
        {"distinct_batch": 4},
    ]
    for n, one in enumerate(asked, 2):
        measure(store, **one)
        assert len(reads) == n, one
    shutil.rmtree(store / STATES)
    measure(store, distinct_batch=4)
    measure(store)  # all but these batches was kept
    assert len(reads) == n + 1


@ROUGH
def test_states_that_another_stands_in_for_are_removed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    add(store, 0, 30)
    measure(store, max_window=2)
    [small] = kept(store)
    measure(store, max_window=4, max_lag=0)
    assert len(kept(store)) == 2  # one has lags, the other longer windows
    measure(store)
    [old] = kept(store)
    assert old != small
    add(store, 30, 40, append=True)
    assert kept(store) == [old]
    measure(store, max_window=2)
    assert len(kept(store)) == 2
    measure(store)
    [new] = kept(store)
    assert new != old


@ROUGH
def test_sums_as_large_as_the_ids_are_not_kept(tmp_path: Path) -> None:
    store = tmp_path / "store"
    info = add(store, 0, 30)
    measure(store, by="request", batches=True, max_window=8)
    [file] = kept(store)
    assert file.stat().st_size < info.rows * K
    shutil.rmtree(store)
    add(store, 0, 30, tokens=30)
    measure(store, phase="all", max_lag=20)
    assert kept(store) == []


# --- never stale ---------------------------------------------------------------------------------


@ROUGH
def test_a_trace_that_was_replaced_is_measured_again(tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    add(store, 0, 30)
    measure(store)
    copies = [(path.name, path.read_bytes()) for path in kept(store)]
    add(store, 100, 130, force=True)
    assert kept(store) == []
    (store / STATES).mkdir(exist_ok=True)
    for name, data in copies:
        (store / STATES / name).write_bytes(data)
    add(other, 100, 130)
    assert_same(measure(store), measure(other))


@ROUGH
def test_a_trace_of_the_same_requests_in_another_order_is_another(tmp_path: Path, reads: list[range]) -> None:
    store = tmp_path / "store"
    add(store, 0, 30)
    add(store, 30, 60, append=True)
    measure(store)
    states = [(path.name, path.read_bytes()) for path in kept(store)]
    add(store, 30, 60, force=True)
    add(store, 0, 30, append=True)
    (store / STATES).mkdir(exist_ok=True)
    for name, data in states:
        (store / STATES / name).write_bytes(data)
    reads.clear()
    measure(store)
    assert reads == [range(2)]


@ROUGH
def test_segments_that_are_put_together_keep_their_sums(tmp_path: Path, reads: list[range]) -> None:
    store = tmp_path / "store"
    add(store, 0, 20)
    measure(store, by="label")  # of a part of what will be one segment
    add(store, 20, 40, append=True)
    before = measure(store)
    reads.clear()
    compact(store)
    assert len(tk.open(store).trace().segments) == 1
    assert_same(measure(store), before)
    assert reads == []
    measure(store, by="label")
    assert reads == [range(1)]
    assert len(kept(store)) == 2


# --- damaged, foreign, half-written --------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes, Measurement]:
    """A store, the one state that it keeps, what is in it, and what it is of."""
    store = tmp_path_factory.mktemp("measured") / "store"
    add(store, 0, 30)
    found = measure(store)
    [state] = kept(store)
    return store, state, state.read_bytes(), found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@ROUGH
def test_a_damaged_state_is_as_if_it_were_not_there(
    data: st.DataObject, measured: tuple[Path, Path, bytes, Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state, good, expected = measured
    at = data.draw(st.integers(0, len(good) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "grow", "drop"]))
    bad = bytearray(good)
    if damage == "flip":
        bad[at] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del bad[at:]
    elif damage == "grow":
        bad[at:at] = b"\0" * data.draw(st.integers(1, 9))
    else:
        del bad[at : at + 8]
    state.write_bytes(bad)
    ranges: list[range] = []

    def read(*args: Any) -> Sums:
        ranges.append(args[-1])
        return Sums(expected.cells, expected.state, expected._longest_run, None)

    monkeypatch.setattr(summing, "read", read)
    measure(store)
    assert ranges == [range(1)]
    assert state.read_bytes() == good


@ROUGH
@pytest.mark.parametrize("name", ["extent", "key", "huge", "words", "folder"])
def test_a_state_under_a_false_name_is_not_used(
    name: str, measured: tuple[Path, Path, bytes, Measurement], tmp_path: Path, reads: list[range]
) -> None:
    origin, state, good, expected = measured
    store = tmp_path / "store"
    shutil.copytree(origin, store, ignore=shutil.ignore_patterns(STATES))
    version, content, key, *_ = state.stem.split("-")
    names = {
        "extent": f"{version}-{content}-{key}-5-3-0.state",
        "key": f"{version}-{content}-{'0' * len(key)}-4-3-0.state",
        "huge": f"{version}-{content}-{key}-999999999-999999999-1.state",
        "words": f"{version}-{content}-{key}-4-x-²-../..-.state".replace("/", "_"),
        "folder": state.name,
    }
    (store / STATES).mkdir()
    if name == "folder":
        (store / STATES / names[name]).mkdir()
    else:
        (store / STATES / names[name]).write_bytes(good)
    assert_same(measure(store), expected)
    assert reads == [range(1)]


KILLED = """
import os, signal, sys
from pathlib import Path
import tracekit as tk
from tracekit.analysis import routing, summing  # noqa: F401
import tracekit.metrics.measurement

store = sys.argv[1]
for step in range(100):
    pid = os.fork()
    if not pid:
        left = step

        def hook(event, arguments):
            global left
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and "states" in str(arguments[0]):
                left -= 1
                if left < 0:
                    if event == "os.rename":  # half of it had reached the disk
                        os.truncate(arguments[0], os.stat(arguments[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        tk.measure(store, max_window=4, max_lag=3)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print("killed" if killed else "done", *sorted(p.name for p in Path(store, "states").glob("*")))
    if not killed:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@ROUGH
def test_killed_at_any_step_of_saving_the_next_answer_is_right(
    measured: tuple[Path, Path, bytes, Measurement], tmp_path: Path
) -> None:
    """Kill a process at every step in turn, in one store: each begins with what the one before it left."""
    origin, state, good, expected = measured
    store = tmp_path / "store"
    shutil.copytree(origin, store, ignore=shutil.ignore_patterns(STATES))
    program = [sys.executable, "-W", "ignore", "-c", KILLED, str(store)]
    lines = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["killed"] * (len(lines) - 1)
    assert len(lines) > 3  # the folder, the file, its name
    assert any(TEMPORARY in line for line in lines[:-1])
    assert (store / STATES / state.name).read_bytes() == good
    assert_same(measure(store), expected)
    add(store, 30, 32, append=True)
    assert [path.name for path in kept(store)] == [state.name]  # an ingest sweeps what killed ones left


@ROUGH
def test_a_store_that_cannot_be_written_to_answers_all_the_same(
    measured: tuple[Path, Path, bytes, Measurement], tmp_path: Path, reads: list[range]
) -> None:
    origin, _, _, expected = measured
    store = tmp_path / "store"
    shutil.copytree(origin, store, ignore=shutil.ignore_patterns(STATES))
    (store / STATES).write_text("no folder can be here")  # as root, permissions would not stop anything
    assert_same(measure(store), expected)
    assert_same(measure(store), expected)
    assert reads == [range(1)] * 2


# --- sums that are added up ----------------------------------------------------------------------


def test_cells_that_would_be_torn_apart_are_not_added() -> None:
    meta = TraceMeta(N, K, tuple(range(LAYERS)), "test")
    requests = pl.DataFrame({"request_id": ["a", "b"], "label": ["x", "y"], "decode_start": [0, 0], "n_tokens": [4, 4]})
    requests = requests.with_columns(n_decode=pl.col("n_tokens"))

    def empty(spec: Spec) -> Sums:
        cells = Cells.assign(requests, spec)
        return Sums(cells, State.empty(meta, spec, cells), np.ones(2, np.int64), None)

    apart, together = empty(Spec("decode")), empty(Spec("decode", intervals=False))
    apart.state.counts += 1
    together.state.counts += 1
    assert not summing.add(apart, together)
    assert (apart.state.counts == 1).all()
    assert summing.add(together, apart)
    assert (together.state.counts == 2).all()
