"""What the README and the manual show is run, block by block and in order, in an empty folder beside the samples."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.store import results

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
_COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[dict[str, str | None]]:
    return [m.groupdict() for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def session(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield the commands of a console block, each with the output that is shown below it."""
    for match in _COMMAND.finditer(text):
        yield shlex.split(match["command"].replace("\\\n", " "), comments=True), match["output"].strip("\n")


def run(text: str, capsys: pytest.CaptureFixture[str]) -> int:
    """Run the commands of a console block, and return how many of them printed what is shown below them."""
    compared = 0
    for command, shown in session(text):
        assert command[0] == "tracekit"
        capsys.readouterr()
        assert main([*command[1:], "--quiet"] if command[1] in ("ingest", "chart") else command[1:]) == 0, command
        if shown:
            printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()).strip("\n")
            # A line of dots stands for lines that are left out.
            pieces = (re.escape(piece.strip("\n")) for piece in re.split(r"^…$", shown, flags=re.MULTILINE))
            assert re.fullmatch(r"\n*(?:.*\n)*.*".join(pieces), printed), f"{command}\n{printed}"
            compared += 1
    return compared


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("default::tracekit.TracekitWarning")
def test_every_block_runs(
    page: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    # A reader has the command on the path, and make runs the tests without activating the environment.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (tmp_path / "sample_traces").symlink_to(checkout / "sample_traces")
    names: dict[str, object] = {}
    for block in blocks(checkout / page):
        text = block["text"] or ""
        if block["mark"]:
            assert re.fullmatch(r"set-up|needs .+", block["mark"])
            continue
        if block["language"] == "python":
            exec(compile(text, page, "exec"), names)  # noqa: S102 - our own pages
        if block["language"] == "console":
            run(text, capsys)
    if page == "README.md":
        assert "<html" in (tmp_path / "windows.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/validation.md"])
@pytest.mark.filterwarnings("default::tracekit.TracekitWarning")
def test_what_is_shown_of_real_traces_is_what_the_commands_print(
    page: str,
    checkout: Path,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for folder in (shared / "traces").iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    compared = 0
    for block in blocks(checkout / page):
        mark = (block["mark"] or "").removeprefix("needs ")
        if block["language"] == "console" and mark and (shared / "traces" / mark).is_dir():
            compared += run(block["text"] or "", capsys)
    assert compared


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str, checkout: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (checkout / page).read_text(encoding="utf-8")):
        built = target.startswith("generated/")  # by docs/reference.py, which the build of the manual checks
        assert built or target.startswith("https://") or (checkout / page).parent.joinpath(target).exists(), target


def test_the_manual_names_every_column_of_the_views_of_a_trace(checkout: Path, tmp_path: Path) -> None:
    source = checkout / "sample_traces" / "olmoe-predicted"
    tk.ingest(source / "trace.npz", store=tmp_path / "S", config=source / "config.json")
    page = (checkout / "docs" / "store.md").read_text(encoding="utf-8")
    documented = {
        match["view"]: re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", match["table"], re.MULTILINE)
        for match in re.finditer(r"^### (?P<view>\w+)\n(?P<table>.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    }
    with tk.open(tmp_path / "S").connect() as connection:
        for view, columns in documented.items():
            described = connection.execute(f"DESCRIBE {view}").fetchall()
            assert [(name, kind) for name, kind, *_ in described] == columns, view
        views = {
            name for (name,) in connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        }
    assert views == documented.keys() | set(results.KINDS)
