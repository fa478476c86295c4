"""Bars for passes over a store: only on a terminal, only for what takes long, and one for every pass."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click
import pytest

import tracekit as tk
from tracekit.cli import bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def seconds(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """The times at which the passes report, one after the other; click has a clock of its own."""
    clock = iter(times)
    monkeypatch.setattr(bars, "monotonic", lambda: next(clock))


def test_a_long_pass_shows_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    seconds(monkeypatch, 0.0, 0.0, 2.0, 4.0)
    with bars.pass_bar(shown=True) as report:
        assert report
        report(0, 40_000_000)
        report(20_000_000, 40_000_000)
        report(40_000_000, 40_000_000)
    shown = click.unstyle(screen.getvalue())
    assert "reading" in shown
    assert "20 M ids, 10 M/s" in shown
    assert max(len(line) for line in shown.replace("\r", "\n").split("\n")) < 80
    assert shown.count("\n") == 1, "the bar is ended once"


def test_short_passes_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    seconds(monkeypatch, 0.0, 0.0, 0.5, 10.0, 10.0, 10.5)
    with bars.pass_bar(shown=True) as report:
        assert report
        for done in (0, 5, 0, 5):  # two passes: the first is over long before the second ends
            report(done, 10)
    assert screen.getvalue() == ""


def test_without_a_terminal_or_quiet_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    with bars.pass_bar(shown=False) as report:
        assert report is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bars.pass_bar(shown=True) as report:
        assert report is None


def test_a_pass_reports_every_part(tmp_path: Path) -> None:
    trace = tk.synth("uniform", requests=4, tokens=30, layers=2, num_experts=8, top_k=2, seed=1)
    trace.save(tmp_path / "t.npz")
    tk.ingest(tmp_path / "t.npz", tmp_path / "S", num_experts=8, phase="decode")
    told: list[tuple[int, int]] = []
    with tk.running(progress=lambda done, total: told.append((done, total))):
        tk.windows(tmp_path / "S", max_window=2, intervals=False)
    assert told == [(0, 480), (480, 480)]
