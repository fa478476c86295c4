"""The benchmark over sizes runs as it is described, and compares the scripts of peers before it times them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import csv, sys
rows = [line for line in open(sys.argv[1]) if line[0] != "#"]
chosen = {}
for row in csv.DictReader(rows):
    chosen.setdefault((int(row["layer"]), int(row["step"])), set()).add(int(row["expert"]))
cells = []
for lag in 1, 2, 4, 8:
    shared = [len(s & chosen[l, t - lag]) / len(s) for (l, t), s in chosen.items() if t >= lag]
    cells.append(sum(shared) / len(shared) * FACTOR)
print("  ALL " + " ".join(f"{100 * cell:8.1f}%" for cell in cells))
"""
"""Prints overlaps as ``route-analyze.py --view overlap`` of BigMoeOnEdge does, times a factor."""


def scale(checkout, tmp_path, *arguments):
    command = [checkout / "benchmarks" / "scale.py", "--tokens", 20, "--repeats", 1, "--build", tmp_path / "build"]
    return subprocess.run(
        [sys.executable, *map(str, [*command, *arguments])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def with_script(tmp_path, factor):
    script = tmp_path / "peers" / "BigMoeOnEdge" / "scripts" / "route-analyze.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.replace("FACTOR", factor))
    return tmp_path / "peers"


def test_tables_have_every_size_and_rival_and_the_scripts_that_are_there_and_run(checkout, tmp_path):
    peers = with_script(tmp_path, "1")
    (peers / "BigMoeOnEdge" / "scripts" / "route-replay.py").write_text("import not_there")
    done = scale(checkout, tmp_path, "--sizes", "2e4,4e4,6e4", "--peers", peers)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r" *\| *", line)[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    for task in ("ingest, fresh process", "one pass", "expert caches, LRU, every size"):
        assert len(table[task]) == 4
    for rival in ("reading alone", "DuckDB SQL, bit masks", "Polars, bit masks", "plain Python sets"):
        assert float(table[rival][1].replace(",", "")) > 0
    [script] = [name for name in table if "BigMoeOnEdge" in name]
    assert float(table[script][1].replace(",", "")) > 0
    assert "No module named 'not_there'" in done.stderr
    assert "no ljcleo/moe-lrc" in done.stderr


def test_a_script_that_finds_something_else_stops_the_benchmark(checkout, tmp_path):
    done = scale(checkout, tmp_path, "--sizes", "2e4,4e4,6e4", "--peers", with_script(tmp_path, "1.05"))
    assert done.returncode == 1
    assert "route-analyze.py" in done.stderr
    assert "and the library finds" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("sizes", ["2e4", "2e4,2e4,4e4"])
def test_a_slope_takes_three_sizes(checkout, tmp_path, sizes):
    done = scale(checkout, tmp_path, "--sizes", sizes)
    assert done.returncode != 0
    assert "three sizes" in done.stderr
