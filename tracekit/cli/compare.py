"""The verb that compares two traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.analyses import window_option
from tracekit.cli.completion import traces
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import StorePath, running_options, store_argument, whole_numbers
from tracekit.cli.output import Output, output_options
from tracekit.reports.files import check_writable


@verb(
    "compare",
    examples=[
        "tracekit compare traces --trace-a bf16 --trace-b int4 --chart compared.png",
        "tracekit compare traces others --trace-a chat --trace-b chat -o compared.csv",
    ],
)
@store_argument
@click.argument("other", required=False, type=StorePath())
@click.option(
    "--trace-a",
    metavar="NAME",
    shell_complete=traces,
    help="The first trace. [default: the only one there is to choose]",
)
@click.option(
    "--trace-b", metavar="NAME", shell_complete=traces, help="The second trace, of OTHER where that is given."
)
@click.option(
    "--phase",
    type=click.Choice(["decode", "prefill", "all"]),
    help="Which tokens. [default: decode where the store knows it, else what there is]",
)
@window_option
@click.option(
    "--batch-size",
    metavar="N,N,…",
    type=whole_numbers,
    default="4,16",
    show_default=True,
    help="Requests verified together, a window each.",
)
@click.option(
    "--paired/--unpaired",
    default=None,
    help="Compare the requests that both traces hold, or the traces as two samples. "
    "[default: paired where there are 5 or all are the same]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the grouping of requests for the intervals.",
)
@click.option("--no-intervals", is_flag=True, help="Leave the intervals out.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw it, too: .html, .png, .svg, .pdf or .json.")
@running_options()
@output_options
def compare(
    store: str | Path, other: str | Path | None, no_intervals: bool, chart: Path | None, out: Output, **options: Any
) -> None:
    """Say in which headline figures two traces differ.

    Two models, quantisations, engines or workloads; of one store, or of STORE and OTHER. Traces of the same requests
    are compared request by request, others as two samples, and where both keep the same tokens, their experts are held
    against each other token by token.
    """
    import tracekit as tk

    if chart is not None:
        check_writable(chart, force=out.force)
    announce_compilation(out)
    second = None if other is None else tk.open(other)
    frame = tk.compare(tk.open(store), second, intervals=not no_intervals, **options)
    out.table(frame, "compare")
    if chart is not None:
        from tracekit.reports.charts import render

        render(tk.charts.compare(frame), chart, force=out.force)
        out.note(f"wrote {chart}")
