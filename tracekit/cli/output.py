"""Where results go: one set of options for every verb that yields a table."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracekit.cli.errors import say, stop_writing
from tracekit.errors import UsageError
from tracekit.reports.files import check_writable, write

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "ndjson", "markdown", "parquet")
SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".md": "markdown",
    ".parquet": "parquet",
    ".txt": "table",
}
"""File suffixes that name a format."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the user said about the output: format, file and how much to say."""

    fmt: str
    path: Path | None = None
    force: bool = False
    quiet: bool = False

    def table(self, frame: pl.DataFrame, layout: str | None = None) -> None:
        """Write a frame: to the file that was named, else to stdout."""
        from tracekit.reports.tables import WIDTH, render

        screen = self.path is None and sys.stdout.isatty()
        width = max(40, shutil.get_terminal_size((WIDTH, 24)).columns) if self.path is None else WIDTH
        bold = screen and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.write(render(frame, self.fmt, layout=layout, width=width, bold=bold))

    def write(self, content: str | bytes) -> None:
        """Write text or bytes: to the file that was named, else to stdout."""
        if self.path is not None:
            write(self.path, content.encode() if isinstance(content, str) else content, force=self.force)
            self.note(f"wrote {self.path}")
            return
        try:
            # Bytes keep exported data exact whatever the terminal's encoding; text may lose a sign it cannot show.
            click.echo(_encodable(content) if isinstance(content, str) else content, nl=False)
        except BrokenPipeError:
            stop_writing()

    def note(self, text: str) -> None:
        """Say something on stderr, unless asked to be quiet."""
        if not self.quiet:
            say(text, heading="Note")


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--format``, ``--output``, ``--force`` and ``--quiet``; the function gets them as ``out``."""

    @click.option(
        "--format",
        "fmt",
        type=click.Choice(FORMATS),
        help="Format of the result; the suffix of --output names it too. [default: table, which is rounded and fits "
        "the screen; every other format has all columns and exact values]",
    )
    @click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the result to this file.")
    @click.option("--force", is_flag=True, help="Overwrite the file named by --output.")
    @quiet_option
    @wraps(function)
    def wrapper(*args: Any, fmt: str | None, output: Path | None, force: bool, quiet: bool, **kwargs: Any) -> Any:
        path = None if output == Path("-") else output
        fmt = fmt or _format_of(path)
        if path is not None:
            check_writable(path, force=force)
        elif fmt == "parquet" and sys.stdout.isatty():
            raise UsageError("parquet is binary and stdout is a terminal", remedy="Name a file with --output")
        return function(*args, out=Output(fmt, path, force, quiet), **kwargs)

    return wrapper


def quiet_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--quiet``."""
    return click.option(
        "--quiet", "-q", is_flag=True, callback=_silence, help="No progress, notes or warnings on stderr."
    )(function)


def _silence(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        warnings.simplefilter("ignore")
    return value


def _format_of(path: Path | None) -> str:
    if path is None:
        return "table"
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"the name {path.name!r} says no format",
            expected="a suffix of " + ", ".join(SUFFIXES),
            remedy="Or name the format with --format",
        )
    return SUFFIXES[suffix]
