"""The verb that says what is wrong with a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.bars import progress_bar
from tracekit.cli.completion import traces
from tracekit.cli.errors import CHECK_FAILED
from tracekit.cli.group import verb
from tracekit.cli.options import StorePath
from tracekit.cli.output import Output, output_options
from tracekit.cli.reading import reading_options


@verb(
    "check",
    examples=[
        "tracekit check responses.jsonl --config config.json",
        "tracekit check trace.npz --num-experts 64 --phase decode --deinterleave 8",
        "tracekit check traces --trace chat --format json",
    ],
)
@click.argument("source", metavar="SOURCE|STORE...", nargs=-1, required=True, type=StorePath())
@click.option(
    "--trace",
    metavar="NAME",
    shell_complete=traces,
    help="Only the trace of this name, of a store. [default: all]",
)
@reading_options
@output_options
def check(source: tuple[str | Path, ...], trace: str | None, reading: dict[str, Any], out: Output) -> int:
    """Find what is wrong with a trace, before it is believed.

    Looks for warm-up passes, filler, interleaved and batch-major rows, copies of layers and requests, shifted layers,
    loops, lost ranks, reduced top-k, missing prompts, physical ids and more, in a source (with the options that ingest
    takes) or in a store. What ingest would refuse is a finding too.

    Serious: headline numbers would be wrong; warning: some questions cannot be asked, or some rows are at fault; note:
    worth knowing. The exit code is 3 when something serious is found.
    """
    import tracekit as tk

    with progress_bar("check", shown=not out.quiet) as progress:
        frame = tk.check(list(source), trace=trace, progress=progress, **reading)
    out.table(frame, "check")
    if frame.is_empty() and (out.fmt != "table" or out.path is not None):
        out.note("nothing was found")
    return CHECK_FAILED if "serious" in frame["severity"] else 0
