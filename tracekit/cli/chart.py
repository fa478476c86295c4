"""The verb that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import OneOf, key_value, mapping, running_options, selectors, store_argument
from tracekit.cli.output import Output, quiet_option
from tracekit.reports.charts import KINDS
from tracekit.reports.files import check_writable


@verb(
    "chart",
    examples=[
        "tracekit chart traces windows -o windows.html",
        "tracekit chart traces batch --param window=8 -o batch.svg",
    ],
    kinds={kind.name: kind.title for kind in KINDS.values()},
)
@store_argument
@click.argument("kind", metavar="KIND", type=OneOf(KINDS))
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; its suffix names the format: .html, .png, .svg, .pdf or .json.",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    type=key_value,
    help="A parameter of the chart; may be repeated.",
)
@selectors(by=[])
@click.option("--force", is_flag=True, help="Overwrite the file named by --output.")
@running_options()
@quiet_option
def chart(
    store: str | Path,
    kind: str,
    output: Path,
    params: tuple[tuple[str, str], ...],
    trace: str | None,
    phase: str | None,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw a result as a chart.

    Its data is a query, whose parameters it takes with --param: see tracekit query --describe. HTML files are
    self-contained. Results that are not in the store yet are computed first.
    """
    import tracekit as tk
    from tracekit.reports.charts import render

    check_writable(output, force=force)
    out = Output("table", quiet=quiet)
    given = mapping(params, "--param")
    given |= {key: value for key, value in (("trace", trace), ("phase", phase)) if value is not None}
    announce_compilation(out)
    render(tk.chart(tk.open(store), kind, **options, **given), output, force=force)
    out.note(f"wrote {output}")
