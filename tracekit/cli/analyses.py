"""The verbs that measure: windows, autocorr, attribution, load and their summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import running_options, selectors, store_argument, whole_numbers
from tracekit.cli.output import Output, output_options

window_option = click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens in the verification window. [default: 4, or the most that a request has]",
)

max_window_option = click.option(
    "--max-window",
    type=click.IntRange(min=1),
    help="Longest window, in tokens. [default: 8, or the most that a request has]",
)


@verb(
    "windows",
    examples=[
        "tracekit windows traces --max-window 8 --batch-size 1,4,16",
        "tracekit windows traces --batch-size 1,8,64,256 --distinct",
        "tracekit windows traces --by layer --format csv -o windows.csv",
    ],
)
@store_argument
@max_window_option
@click.option(
    "--batch-size",
    metavar="N,N,…",
    type=whole_numbers,
    default="1",
    show_default=True,
    help="Requests verified together, a window each.",
)
@click.option("--non-overlapping", is_flag=True, help="Windows that start every T tokens instead of at every token.")
@click.option(
    "--distinct",
    is_flag=True,
    help="Batches of distinct requests, each equally likely, instead of windows drawn independently; no intervals.",
)
@selectors()
@running_options(cluster=True)
@output_options
def windows(store: str | Path, batch_size: tuple[int, ...], non_overlapping: bool, out: Output, **options: Any) -> None:
    """Count the unique experts of a verification window.

    For windows of 1..T tokens, beside what to expect if tokens were independent: uniform over experts, by popularity,
    by popularity within the label, and within the request. The reductions say how far below it is.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.windows(tk.open(store), batch_size=batch_size, overlapping=not non_overlapping, **options)
    out.table(frame, "windows")


@verb("autocorr", examples=["tracekit autocorr traces --max-lag 16", "tracekit autocorr traces --by layer -o lags.csv"])
@store_argument
@click.option(
    "--max-lag",
    type=click.IntRange(min=1),
    help="Longest lag, in tokens. [default: 32, or the most that a request has]",
)
@selectors()
@running_options(cluster=True)
@output_options
def autocorr(store: str | Path, out: Output, **options: Any) -> None:
    """Measure the overlap of experts between tokens.

    By the lag between two tokens of a request, beside what to expect of independent ones.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.autocorr(tk.open(store), **options)
    out.table(frame, "autocorr")


@verb("attribution", examples=["tracekit attribution traces --window 4", "tracekit attribution traces --by label"])
@store_argument
@window_option
@selectors()
@running_options(cluster=True)
@output_options
def attribution(store: str | Path, out: Output, **options: Any) -> None:
    """Split the drop in unique experts into its causes.

    The drop is that below uniform routing. The causes: skewed experts (popularity), the domain (label), the topic
    (request), and the order of the tokens, which alone is temporal correlation. A cause is unresolved
    where its interval leaves out the estimate, and a label also where the data cannot tell it from none.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.attribution(tk.open(store), **options)
    out.table(frame, "attribution")


@verb("load", examples=["tracekit load traces", "tracekit load traces --by label -o load.parquet"])
@store_argument
@selectors(by=["layer", "label"], intervals=False)
@running_options(cluster=True)
@output_options
def load(store: str | Path, out: Output, **options: Any) -> None:
    """Measure how evenly each layer loads its experts."""
    import tracekit as tk

    announce_compilation(out)
    frame = tk.load(tk.open(store), **options)
    out.table(frame, "load")


@verb("summary", examples=["tracekit summary traces", "tracekit summary traces --trace chat -o summary.md"])
@store_argument
@window_option
@selectors(by=[])
@running_options(cluster=True)
@output_options
def summary(store: str | Path, out: Output, **options: Any) -> None:
    """Print the one page to read first.

    What the trace is, what its routing allows, and why.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.summary(tk.open(store), **options)
    out.table(frame, "summary")
