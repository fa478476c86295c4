"""Bars that show how far long work has come, on a terminal alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click

_PATIENCE = 1.0
"""Seconds that a pass takes before it gets a bar: most are over by then."""


@contextmanager
def progress_bar(label: str, *, shown: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """Yield what the library reports to: a bar with rate and time left on a terminal, or nothing."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    bar, began = _bar(label, "tokens"), monotonic()
    with bar:

        def report(done: int, total: int, tokens: int) -> None:
            bar.length = max(total, done, 1)
            bar.update(done - bar.pos, (tokens, monotonic() - began))

        yield report


@contextmanager
def pass_bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield what passes over a store report to: on a terminal, a bar for each that takes longer than a second."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    bar: Any = None
    began = 0.0

    def report(done: int, total: int) -> None:
        nonlocal bar, began
        if done == 0:
            bar, began = None, monotonic()
        taken = monotonic() - began
        if bar is None and taken >= _PATIENCE and done < total:
            bar = _bar("reading", "ids")
            bar.length = total
        if bar:
            bar.update(done - bar.pos, (done, taken))
            if done == total:
                bar.render_finish()
                bar = None

    try:
        yield report
    finally:
        if bar:
            bar.render_finish()


def _bar(label: str, unit: str) -> Any:
    def shown(item: tuple[int, float] | None) -> str:
        count, seconds = item or (0, 0.0)
        return f"{_short(count)} {unit}" + (f", {_short(count / seconds)}/s" if count and seconds >= _PATIENCE else "")

    return click.progressbar(length=1, label=label, file=sys.stderr, item_show_func=shown, width=24)


def _short(number: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 10 * unit:
            return f"{number / unit:,.0f}{name}"
    return f"{number:,.0f}"
