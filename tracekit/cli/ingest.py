"""The verb that reads engine output into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.bars import progress_bar
from tracekit.cli.group import verb
from tracekit.cli.options import existing_options, running_options, store_option
from tracekit.cli.output import quiet_option
from tracekit.cli.reading import reading_options
from tracekit.cli.stored import say_stored


@verb(
    "ingest",
    examples=[
        "tracekit ingest responses.jsonl --config config.json --store traces --name chat",
        "tracekit ingest trace.npz --requests requests.json --label-fields dataset --num-experts 32 \\",
        "                 --phase decode --store traces",
    ],
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@store_option
@click.option("--name", help="Name of the trace. [default: that of the first source]")
@reading_options
@existing_options
@click.option("--resume", is_flag=True, help="Create the trace or go on with it: take the files it does not have yet.")
@running_options(None, threads="Threads, and processes that read many files,")
@quiet_option
def ingest(
    sources: tuple[Path, ...],
    store: str | Path,
    name: str | None,
    reading: dict[str, Any],
    quiet: bool,
    **existing: Any,
) -> int:
    """Read traces of an inference engine into a store.

    The format is detected: arrays, responses of servers, tables, route traces, counts (tracekit formats lists them
    all). All sources together become one trace. The store changes in one step at the end, or not at all; with --resume
    it is added to as files end, and the same command goes on after an interruption or when there are more files.

    Files whose content the trace has already, under any name, are left out.

    The trace is checked as it is read, and what is found is kept with it (see tracekit check). What cannot be right is
    refused; a serious finding that is no reason to refuse makes the exit code 3, after the trace was stored.
    """
    import tracekit as tk

    with progress_bar("ingest", shown=not quiet) as progress:
        trace = tk.ingest(list(sources), store, name=name, progress=progress, **existing, **reading)
    return say_stored(store, trace, quiet=quiet)
