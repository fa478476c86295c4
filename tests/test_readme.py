"""What the README shows is run, block by block and in its order, in an empty folder beside the sample traces."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tracekit.cli import main

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(checkout: Path) -> list[dict[str, str | None]]:
    return [m.groupdict() for m in _BLOCK.finditer((checkout / "README.md").read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    return [shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.filterwarnings("default::tracekit.TracekitWarning")
def test_every_block_runs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample_traces").symlink_to(checkout / "sample_traces")
    names: dict[str, object] = {}
    ran = 0
    for block in blocks(checkout):
        if block["mark"]:
            assert re.fullmatch(r"set-up|needs .+", block["mark"])
            continue
        if block["language"] == "python":
            exec(compile(block["text"] or "", "README.md", "exec"), names)  # noqa: S102 - our own README
            ran += 1
        for command in commands(block["text"] or "") if block["language"] == "console" else []:
            assert command[0] == "tracekit"
            assert main([*command[1:], "--quiet"] if command[1] in ("ingest", "chart") else command[1:]) == 0, command
            ran += 1
    assert ran > 10
    assert "<html" in (tmp_path / "windows.html").read_text(encoding="utf-8")


def test_the_table_on_top_is_what_the_command_prints(
    checkout: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gptoss20b_subset64").symlink_to(shared / "traces" / "gptoss20b_subset64")
    [block] = [b for b in blocks(checkout) if b["mark"] == "needs gptoss20b_subset64"]
    ingest, attribution = commands(block["text"] or "")
    assert main([*ingest[1:], "--quiet"]) == 0
    capsys.readouterr()
    assert main(attribution[1:]) == 0
    shown = (block["text"] or "").split("$ tracekit attribution traces\n")[1]
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


def test_every_link_leads_somewhere(checkout: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (checkout / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (checkout / target).exists(), target
