"""The verb that puts the segments of a trace together."""

from __future__ import annotations

from pathlib import Path

import click

from tracekit.cli.completion import traces
from tracekit.cli.group import verb
from tracekit.cli.options import store_argument
from tracekit.cli.output import Output, output_options


@verb("compact", examples=["tracekit compact traces", "tracekit compact traces --trace chat"])
@store_argument
@click.option("--trace", metavar="NAME", shell_complete=traces, help="Only this trace.")
@output_options
def compact(store: str | Path, trace: str | None, out: Output) -> None:
    """Put the small segments of traces together.

    A trace that grew has one for each ingest, and many small files are slower to read than a few large ones.

    Requests, their order, findings and results stay as they are. The store changes in one step for each trace, and
    needs room for a second copy of it until then. Says how many segments and part files there were and are.
    """
    import tracekit as tk

    out.table(tk.compact(store, trace=trace))
