"""Passes on a local Ray cluster of two workers: the numbers of one pass, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from storage import serving

import tracekit as tk
from tracekit.analysis import cluster
from tracekit.errors import MissingDependencyError, StoreError, UsageError
from tracekit.metrics.measurement import Measurement
from tracekit.metrics.state import Spec, Sums, accumulate
from tracekit.store import Store
from tracekit.store.location import location

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'moe-tracekit[ray]'")

SPECS = {
    "windows and lags": Spec("decode", max_window=6, max_lag=9),
    "prompts": Spec("prefill", max_window=3, max_lag=4),
    "batches": Spec("all", max_window=4, batches=True),
    "by label": Spec("decode", max_window=4, max_lag=3, batches=True, by="label"),
    "by request": Spec("decode", max_window=4, max_lag=3, by="request"),
    "without intervals": Spec("decode", max_window=4, overlapping=False, intervals=False),
}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Variables that keep Ray out of the home directory and /tmp/ray."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # paths of sockets must be short
        token = Path(folder, "token")
        token.write_text(uuid4().hex)
        yield {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }


@pytest.fixture(scope="module")
def workers(environment: dict[str, str]) -> Iterator[None]:
    """A cluster of two workers, for this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=2, _temp_dir=environment["RAY_TMPDIR"], **quiet)
        yield
        ray.shutdown()


def ingest(folder: Path, i: int) -> None:
    """Ingest 12 requests with prompts and labels, some too long for all of their layers to be in one part."""
    rng = np.random.default_rng(i)
    lens = rng.integers(12, 40, 12)
    ids = np.argsort(rng.random((lens.sum(), 3, 16)), axis=2)[:, :, :4].astype(np.uint8)
    source = folder / f"{i}.npz"
    np.savez(source, expert_ids=ids, request_lens=lens.astype(np.int32), num_experts=16)
    requests = [{"id": f"{i}-{j}", "prompt_len": int(lens[j]) // 3, "topic": "abc"[j % 3]} for j in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracekit.store.segment.PART_ROWS", 100)
        tk.ingest(source, folder / "S", name="t", axes="tlk", requests=requests, label_fields=["topic"], append=i > 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one trace in two segments of several parts."""
    folder = tmp_path_factory.mktemp("made")
    ingest(folder, 0)
    ingest(folder, 1)
    return folder / "S"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """A copy of that store."""
    return Store(shutil.copytree(made, tmp_path / "S"))


def all_parts(store: Store) -> range:
    return range(sum(len(segment.parts) for segment in store.trace().segments))


def on_ray(store: Store, spec: Spec, parts: range | None = None) -> Sums:
    info = store.trace()
    return cluster.sums(store, info, store.requests(info), spec, parts or all_parts(store))


def here(store: Store, spec: Spec) -> Sums:
    info = store.trace()
    return accumulate(info.meta, store.requests(info), spec, store.columns(info), threads=2)


def assert_same(found: Sums, expected: Sums) -> None:
    for field in fields(expected.state):
        one, other = getattr(found.state, field.name), getattr(expected.state, field.name)
        if one.dtype.kind == "i":
            np.testing.assert_array_equal(one, other, field.name)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-12, err_msg=field.name)
    np.testing.assert_array_equal(found.longest_run, expected.longest_run)


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_counts_are_those_of_one_pass_bit_for_bit(store: Store, spec: Spec) -> None:
    assert len(all_parts(store)) > 4
    found, expected = on_ray(store, spec), here(store, spec)
    assert expected.state.n_windows.any()
    assert_same(found, expected)
    meta = store.trace().meta
    one, other = Measurement(meta, spec, found), Measurement(meta, spec, expected)
    sizes = (1, 3) if spec.batches else (1,)
    assert_frame_equal(one.windows(sizes), other.windows(sizes), rel_tol=1e-9, abs_tol=1e-9)
    if spec.max_lag:
        assert_frame_equal(one.autocorr(), other.autocorr(), rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.usefixtures("workers")
def test_expectations_are_the_same_in_every_run(store: Store) -> None:
    spec = SPECS["windows and lags"]
    first, second = on_ray(store, spec).state, on_ray(store, spec).state
    assert first.request_union_sum.any()
    np.testing.assert_array_equal(first.request_union_sum, second.request_union_sum)
    np.testing.assert_array_equal(first.request_overlap_sum, second.request_overlap_sum)


@pytest.mark.usefixtures("workers")
def test_workers_read_a_store_at_a_url(made: Path) -> None:
    spec = SPECS["windows and lags"]
    with serving(made.parent.parent) as server:
        there = Store(f"{server.url}/{made.parent.name}/{made.name}")
        assert_same(on_ray(there, spec), here(Store(made), spec))
        info = there.trace()
        elsewhere = there.path.replace(made.name, "elsewhere")
        with pytest.raises(StoreError, match=r"elsewhere: is not a tracekit store.*of the cluster.*Check the URL"):
            cluster.read_parts(range(1), location(elsewhere), info, there.requests(info), spec, None)


@pytest.mark.usefixtures("workers")
def test_the_parts_that_are_asked_for_and_no_others_are_read(store: Store) -> None:
    spec, parts = SPECS["windows and lags"], all_parts(store)
    some = on_ray(store, spec, parts[:2])
    assert some.state.n_windows.sum() < here(store, spec).state.n_windows.sum()
    some.merge(on_ray(store, spec, parts[2:]))
    assert_same(some, here(store, spec))


@pytest.mark.usefixtures("workers")
def test_of_an_appended_trace_the_new_rows_alone_are_read_on_ray(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "grown"
    folder.mkdir()
    ingest(folder, 0)
    grown = Store(folder / "S")
    tk.windows(grown, intervals=False)
    ingest(folder, 1)
    old, _ = grown.trace().segments
    for part in grown.path.glob(f"segments/{old.id}/part-*.parquet"):
        part.unlink()
    with tk.running(engine="ray"):
        assert_frame_equal(tk.windows(grown, intervals=False), tk.windows(store, intervals=False))


@pytest.mark.parametrize(("parts", "bound"), [(1, 32), (31, 32), (32, 32), (1000, 1000), (1000, 33)])
def test_ranges_are_all_parts_in_order(parts: int, bound: int, made: Path) -> None:
    """Sums as large as the ids of all parts but one in ``bound``: never below the least number of ranges."""
    store = Store(made)
    info = store.trace()
    state = accumulate(info.meta, store.requests(info), SPECS["by label"], (), threads=1).state
    size = sum(getattr(state, field.name).nbytes for field in fields(state))
    rows = -(-size * bound // (info.meta.top_k * parts))
    sized = replace(info, segments=(replace(info.segments[0], parts=(rows,) * parts),))
    found = list(cluster.ranges(sized, state, range(parts)))
    assert [i for piece in found for i in piece] == list(range(parts))
    assert len(found) == min(parts, bound)
    lengths = [len(piece) for piece in found]
    assert max(lengths) - min(lengths) <= 1


def holding(file: os.stat_result) -> list[int]:
    """Processes, others than this one, that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it may have ended, or be another user's
            there = link.stat()
            if (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino):
                found.append(int(link.parts[2]))
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.usefixtures("workers")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the worker is found in /proc, which is not there")
def test_a_worker_that_is_killed_costs_a_retry(store: Store) -> None:
    """Workers are kept at a pipe in place of the manifest, killed there, and find the manifest when tried again."""
    spec, manifest = SPECS["windows and lags"], store.path / "manifest.json"
    expected, info, requests, parts = here(store, spec), store.trace(), store.requests(store.trace()), all_parts(store)
    real = manifest.rename(store.path / "real")
    os.mkfifo(manifest)
    pipe, this = os.open(manifest, os.O_RDWR), manifest.stat()  # as it is open for writing, too, readers wait
    found: list[Sums] = []
    run = threading.Thread(target=lambda: found.append(cluster.sums(store, info, requests, spec, parts)))
    run.start()
    while not holding(this) and run.is_alive():
        time.sleep(0.01)
    real.replace(manifest)
    killed = holding(this)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    run.join()
    os.close(pipe)
    assert killed
    assert_same(found[0], expected)


@pytest.mark.usefixtures("workers")
def test_a_store_that_workers_cannot_see_is_refused(store: Store) -> None:
    info, requests = store.trace(), store.requests(store.trace())
    moved = store.path.rename(store.path.parent / "elsewhere")
    with pytest.raises(StoreError, match="a machine of the cluster") as refused:
        cluster.sums(store, info, requests, SPECS["prompts"], range(2))
    assert refused.value.where == str(store.path)
    moved.rename(store.path)
    replaced = replace(info, segments=(replace(info.segments[0], id="0"),))
    with pytest.raises(StoreError, match="does not hold trace 't'"):
        cluster.sums(store, replaced, requests, SPECS["prompts"], range(1))


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("damage", ["missing", "cut short", "another's"])
def test_a_damaged_part_is_named(store: Store, damage: str) -> None:
    parts = sorted(store.path.glob("segments/*/part-*.parquet"))
    part = parts[-2]
    if damage == "missing":
        part.unlink()
    elif damage == "cut short":
        part.write_bytes(part.read_bytes()[:-20])
    else:
        pl.read_parquet(part).head(3).write_parquet(part)
    with pytest.raises(StoreError) as refused:
        on_ray(store, SPECS["prompts"])
    assert type(refused.value) is StoreError
    assert refused.value.where == str(part)


@pytest.mark.usefixtures("workers")
def test_workers_of_another_version_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "__version__", "99.9")
    with pytest.raises(MissingDependencyError, match=rf"tracekit {tk.__version__} on .*99\.9.*pip install") as refused:
        on_ray(store, SPECS["prompts"])
    assert refused.value.exit_code == 4


@pytest.mark.usefixtures("workers")
def test_batches_of_distinct_requests_are_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="distinct"):
        on_ray(store, Spec("decode", max_window=3, distinct_batch=2))


@pytest.mark.usefixtures("workers")
def test_workers_that_die_again_and_again_are_an_error_in_words(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(task: object) -> None:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(tk.TracekitError, match=r"gave up .*died unexpectedly.* killed again and again") as refused:
        on_ray(store, SPECS["prompts"])
    assert refused.value.exit_code == 1


def test_what_ray_says_of_workers_is_not_among_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"is_initialized": False, "init": None, "shutdown": None}.items():
        monkeypatch.setattr(ray, name, lambda value=value, **_: value)
    with cluster.connected(None):
        print("a worker died")
    print("data")
    assert capsys.readouterr() == ("data\n", "a worker died\n")


def test_without_ray_the_command_that_installs_it_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="pip install") as refused:
        on_ray(store, SPECS["prompts"])
    assert "moe-tracekit[ray]" in str(refused.value)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no such place"])
def test_an_address_without_a_cluster_is_refused_at_once(store: Store, environment: Any, address: str) -> None:
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        address = address.format(port=taken.getsockname()[1])
        done = command(environment, "windows", str(store.path), "--engine", "ray", "--address", address)
    assert done.returncode == 2, done.stderr
    assert address in done.stderr
    assert "Traceback" not in done.stderr


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tracekit", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_the_command_starts_a_cluster_and_ends_it(made: Path, store: Store, environment: dict[str, str]) -> None:
    untouched = shutil.copytree(made, store.path.parent / "untouched")
    folder = Path(environment["RAY_TMPDIR"], "own")
    folder.mkdir()
    expected = command(environment, "windows", str(store.path))
    found = command(environment | {"RAY_TMPDIR": str(folder)}, "windows", str(untouched), "--engine", "ray")
    assert found.returncode == 0, found.stderr
    assert "uniform" in found.stdout
    assert (found.stdout, found.stderr) == (expected.stdout, expected.stderr)
    assert list(folder.glob("ray/session_2*"))  # it was there
    assert not [line for line in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in said(line)]


def said(line: Path) -> str:
    """Return the command line of a process, which may have ended."""
    with contextlib.suppress(OSError):
        return line.read_text(encoding="utf-8", errors="replace")
    return ""
