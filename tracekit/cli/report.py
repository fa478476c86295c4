"""The verb that writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.analyses import window_option
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.machine import acceptance_options, cost_options
from tracekit.cli.options import running_options, selectors, store_argument
from tracekit.cli.output import Output, quiet_option
from tracekit.economics.offload import LINK, LINKS
from tracekit.reports.files import check_writable


@verb(
    "report",
    examples=[
        "tracekit report traces -o report.html",
        "tracekit report traces --trace chat --format md",
        "tracekit report traces -o report.html --model gpt-oss-20b --hardware h100 --acceptance-rate .7",
    ],
)
@store_argument
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="File to write, .html or .md. [default: stdout, as Markdown]",
)
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["html", "md"]),
    help="One page with charts that needs nothing else, or Markdown for a pull request. [default: as the suffix says]",
)
@click.option("--title", help="Heading of the report. [default: it names the model]")
@window_option
@selectors(by=[])
@cost_options
@acceptance_options
@click.option(
    "--link", metavar="NAME|BYTES/S", help=f"What offloaded experts come over: {', '.join(LINKS)}. [default: {LINK}]"
)
@click.option("--force", is_flag=True, help="Overwrite the file named by --output.")
@running_options()
@quiet_option
def report(
    store: str | Path,
    output: Path | None,
    fmt: str | None,
    force: bool,
    quiet: bool,
    cost: dict[str, Any],
    drafting: dict[str, Any],
    **options: Any,
) -> None:
    """Write a report that a colleague can open anywhere.

    The answer in words, with intervals and baselines; what the reduction is made of, windows, batches, autocorrelation,
    layers, load; budgets, reuse, locality, caches and prefetch; what speculation gains and what offloading costs, where
    a machine is named; the traces compared; where the numbers come from and how they are made. What a trace cannot
    answer says why.
    """
    import tracekit as tk

    path = None if output is None or output == Path("-") else output
    if path is not None:
        check_writable(path, force=force)
    out = Output("table", quiet=quiet)
    announce_compilation(out)
    fmt = fmt or ("md" if path is None else None)
    text = tk.report(tk.open(store), path, fmt=fmt, force=force, **options, **cost, **drafting)
    if path is None:
        out.write(text)
    else:
        out.note(f"wrote {path}")
