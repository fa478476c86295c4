"""The verb that says what a store holds."""

from __future__ import annotations

from pathlib import Path

import click

from tracekit.cli.group import verb
from tracekit.cli.options import store_argument
from tracekit.cli.output import Output, output_options


@verb("info", examples=["tracekit info traces", "tracekit info traces --format json"])
@store_argument
@click.option("--trace", metavar="NAME", help="Only this trace.")
@output_options
def info(store: Path, trace: str | None, out: Output) -> None:
    """Say what a store holds: its traces and their shape.

    Beside it the provenance, which decides what can be asked of a trace.
    """
    import tracekit as tk

    opened = tk.open(store)
    if trace is not None:
        trace = opened.trace(trace).name
    select = "SELECT * FROM traces WHERE trace = coalesce(getvariable('trace'), trace) ORDER BY trace"
    out.table(opened.sql(select, {"trace": trace}), "info")
