"""Completion in the shell: what is proposed where, and never what a shell would carry out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.shell_completion import BashComplete

import tracekit as tk
from tracekit.cli import VERBS, command, main
from tracekit.reports.charts import KINDS

NAMES = ("chat", "chat-int4", "$(touch carried-out)", "two words", "it's", "*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store ``S``, whose traces have names good and bad, and the store ``other``."""
    folder = tmp_path_factory.mktemp("completion")
    ids = np.argsort(np.random.default_rng(0).random((20, 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    np.savez(folder / "trace.npz", routed_experts=ids, prompt_len=4)
    for store, names in (("S", NAMES), ("other", ["chat-fp8"])):
        for name in names:
            tk.ingest(folder / "trace.npz", folder / store, name=name, num_experts=8, axes="tlk")
    return folder


def proposed(line: str) -> set[str]:
    *words, incomplete = line.split(" ")
    made = BashComplete(command, {}, "tracekit", "_TRACEKIT_COMPLETE")
    return {item.value for item in made.get_completions(words, incomplete) if item.type == "plain"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("win", {"windows"}),
        ("--v", {"--version"}),
        ("capture o", {"openai"}),
        ("windows S --max-w", {"--max-window"}),
        ("windows S --trace ", {"chat", "chat-int4"}),
        ("windows --trace c", set()),
        ("windows nowhere --trace ", set()),
        ("windows trace.npz --trace ", set()),
        ("info S --format json --trace chat-", {"chat-int4"}),
        ("cache S --trace ", {"chat", "chat-int4"}),
        ("check S --trace chat-", {"chat-int4"}),
        ("compare S other --trace-a chat --trace-b ", {"chat", "chat-int4", "chat-fp8"}),
        ("windows S --phase de", {"decode"}),
        ("chart S win", {"windows"}),
        ("synth sti", {"sticky"}),
        ("query S unique_experts_by_w", {"unique_experts_by_window"}),
        ("query --describe summ", {"summary"}),
        ("speedup S --hardware h1", {"h100", "h100-pcie"}),
        ("speedup S --quantisation mx", {"mxfp4"}),
        ("models gpt-oss-2", {"gpt-oss-20b"}),
        ("windos S --trace ", set(VERBS)),
    ],
)
def test_what_is_proposed(line: str, expected: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert proposed(line) == expected


def test_every_kind_of_chart_is_proposed() -> None:
    assert proposed("chart S ") == set(KINDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert f"_TRACEKIT_COMPLETE={shell}_complete" in out
    assert err == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_with_the_script(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "tracekit.bash").write_text(capsys.readouterr().out)
    program = tmp_path / "tracekit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tracekit "$@"\n')
    program.chmod(0o755)
    script = """
        source "$1"
        COMP_WORDS=(tracekit windows S --trace "") COMP_CWORD=4
        _tracekit_completion tracekit
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(tk.__file__).parent.parent),
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", str(tmp_path / "tracekit.bash")],
        check=True,
        capture_output=True,
        cwd=folder,
        env=environment,
        text=True,
    )
    assert done.stdout.split() == ["chat", "chat-int4"]
    assert done.stderr == ""
    assert not (folder / "carried-out").exists()
