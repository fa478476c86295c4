"""How work is run: threads, memory and engine, in the library and on the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import UsageError
from tracekit.execution import ON_CLUSTERS, current, parse_size


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("running")
    trace = tk.synth("skewed", num_experts=8, top_k=2, layers=2, requests=8, tokens=12, seed=1)
    trace.save_npy(folder / "arrays")
    tk.ingest(folder / "arrays", folder / "store", num_experts=8, axes="tlk", phase="decode")
    return folder / "store"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4096 B", 4096),
        ("8GB", 8 * 10**9),
        ("8 g", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5kib", 1536),
        (".5tb", 5 * 10**11),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "8 GB each", "-1", "1e9", "1,5GB", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="8GB, 512MiB"):
        parse_size(text)


def test_what_is_left_out_stays_as_it_is_outside() -> None:
    outside = current()
    assert (outside.memory, outside.engine, outside.address) == (None, "local", None)
    with tk.running(threads=3, memory="1MB"):
        with tk.running(threads=5):
            assert (current().threads, current().memory) == (5, 10**6)
        assert current().threads == 3
    assert current() == outside


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError), tk.running(threads=3):
        raise RuntimeError
    assert current().threads != 3 or os.cpu_count() == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "0 threads"),
        ({"memory": 0}, "0 bytes"),
        ({"engine": "spark"}, "engine 'spark'; expected one of local, ray"),
        ({"address": "host:1"}, "Add --engine ray"),
    ],
)
def test_what_cannot_be(options: dict[str, object], said: str) -> None:
    before = current()
    with pytest.raises(UsageError, match=said), tk.running(**options):  # type: ignore[arg-type]
        pass
    assert current() == before


def test_sums_are_refused_that_take_more_memory(store: Path) -> None:
    with tk.running(memory="1KiB"), pytest.raises(UsageError, match="expected at most 1,024 bytes"):
        tk.measure(store, intervals=False)
    tk.measure(store, intervals=False)


def test_sql_takes_what_it_may(store: Path) -> None:
    settings = "SELECT current_setting('memory_limit') AS memory, current_setting('threads') AS threads"
    with tk.running(threads=1, memory=100 * 2**20):
        assert tk.open(store).sql(settings).row(0) == ("100.0 MiB", 1)


def test_numbers_do_not_depend_on_threads(store: Path) -> None:
    with tk.running(threads=1):
        one = tk.measure(store, intervals=False).windows()
    for kept in store.iterdir():  # else nothing is read
        if kept.is_dir() and kept.name != "segments":
            shutil.rmtree(kept)
    with tk.running(threads=4):
        assert tk.measure(store, intervals=False).windows().equals(one)


# The command


def test_the_options_reach_the_library(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = "SELECT current_setting('memory_limit') AS memory, current_setting('threads') AS threads"
    assert main(["sql", str(store), settings, "--threads", "1", "--memory", "64MiB", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["memory,threads", "64.0 MiB,1"]


def test_polars_has_as_many_threads(tmp_path: Path, store: Path) -> None:
    script = "import sys; from tracekit.cli import main; code = main(sys.argv[1:])\n"
    script += "import polars; print(polars.thread_pool_size()); sys.exit(code)"
    call = [sys.executable, "-c", script, "windows", str(store), "--threads", "1", "-o", str(tmp_path / "w.csv")]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["windows", "--memory", "much"], "8GB, 512MiB"),
        (["windows", "--threads", "0"], "--threads"),
        (["windows", "--address", "host:1"], "Add --engine ray"),
        (["load", "--engine", "spark"], "--engine"),
    ],
)
def test_wrong_options(arguments: list[str], said: str, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([arguments[0], str(store), *arguments[1:]]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["cache", "steps", "budget", "compare", "prefetch", "locality"])
def test_verbs_that_run_here_only_name_those_that_do_not(
    verb: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(store), "--engine", "ray"]) == 2
    assert ", ".join(ON_CLUSTERS) in " ".join(capsys.readouterr().err.split())


def test_functions_that_run_here_only_say_so(store: Path) -> None:
    with tk.running(engine="ray"), pytest.raises(UsageError, match="expert-ratio"):
        tk.cache(store, policy="lru", intervals=False)
