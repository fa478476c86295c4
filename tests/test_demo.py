"""The demo: what it leaves, that its commands are what ran, and that it overwrites nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tracekit as tk
from tracekit.cli import main

pytestmark = pytest.mark.filterwarnings("default::tracekit.TracekitWarning")


def test_the_commands_that_it_shows_are_those_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "first look"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "first look"
    pages = {"windows.html", "autocorr.html", "attribution.html", "report.html"}
    assert {path.name for path in folder.iterdir()} == {"olmoe-vllm", "store", *pages}
    assert [trace.name for trace in tk.open(folder / "store").traces()] == ["olmoe"]
    commands = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", said, re.MULTILINE)]
    assert [words[1] for words in commands] == ["ingest", "summary", "chart", "chart", "chart", "report"]
    assert max(len(line) for line in said.splitlines() if not line.startswith("$")) <= 80

    # Repeated as they are shown, in another folder: the same results.
    (tmp_path / "again").mkdir()
    for words in commands:
        again = [word.replace("first look/", "again/", 1) for word in words[1:]]
        again = [word.replace("again/olmoe-vllm", "first look/olmoe-vllm") for word in again]
        assert main(again) == 0
        printed = capsys.readouterr().out
        assert printed in said
        assert bool(printed) == (words[1] == "summary")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"store", *pages}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_there_is_left_alone(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    precious = tmp_path / "tracekit-demo"
    if what == "folder":
        precious.mkdir()
        precious /= "notes.txt"
    precious.write_text("mine")
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "will not overwrite: tracekit-demo" in err
    assert precious.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [precious]
