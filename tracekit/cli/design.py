"""The verbs that go beyond the trace: its law of routing, and other designs under that law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.completion import machines, models
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import StorePath, one_trace, store_argument, whole_numbers
from tracekit.cli.output import FORMATS, Output, output_options, quiet_option
from tracekit.reports.files import check_writable, write

AXES = ("N", "k", "S")


def axis(value: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``k=2,4,8``: what to vary, and its values."""
    name, _, values = value.partition("=")
    if name not in AXES:
        raise click.BadParameter(f"{value!r} is not of the form k=2,4,8 with one of {', '.join(AXES)}")
    if name == "S":
        try:
            shared = tuple(int(part) for part in values.split(","))
        except ValueError:
            shared = (-1,)
        if min(shared) < 0:
            raise click.BadParameter(f"{values!r} is not a list of whole numbers from 0 on, such as 0,1,2")
        return name, shared
    return name, whole_numbers(values)


@verb(
    "law",
    examples=["tracekit law traces", "tracekit law traces --trace chat -o law.json"],
)
@store_argument
@click.option(
    "--max-window",
    type=click.IntRange(min=2),
    help="Longest window to fit, in tokens. [default: 8, or the most that a request has]",
)
@click.option(
    "--max-lag",
    type=click.IntRange(min=1),
    help="Longest lag to fit, in tokens. [default: 32, or the most that a request has]",
)
@one_trace
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the law to this file, as JSON.")
@click.option("--force", is_flag=True, help="Overwrite the file named by --output.")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Format of how well it fits, on stdout.",
)
@quiet_option
def law(store: str | Path, output: Path | None, force: bool, fmt: str, quiet: bool, **options: Any) -> None:
    """Fit a law of routing to a trace.

    Six parameters a layer, from which a simulator draws routing like the trace's: how unequal the experts are, how
    much requests differ, and how long experts persist. Prints how well the law gives back the trace; --output writes
    the law for simulators, tracekit synth and tracekit design.
    """
    import tracekit as tk
    from tracekit.analysis.design import fit, parameters

    if output is not None:
        check_writable(output, force=force)
    out = Output(fmt, quiet=quiet)
    announce_compilation(out)
    found = tk.fit_law(tk.open(store), **options)
    if output is not None:
        write(output, found.to_json().encode(), force=force)
        out.note(f"wrote {output}")
    out.table(fit(found), "law")
    if fmt == "table":
        out.write("\n")
        out.table(parameters(found))


@verb(
    "design",
    examples=[
        "tracekit design traces --vary k=2,4,8 --model gpt-oss-20b",
        "tracekit design law.json --vary N=64,128,256 --vary S=0,1 --hold total --routed-share .4",
    ],
)
@click.argument("source", metavar="STORE|LAW", type=StorePath())
@click.option(
    "--vary",
    multiple=True,
    required=True,
    metavar="N|k|S=V,V,…",
    type=axis,
    help="Experts N, experts per token k, or shared experts S; repeated, every combination is a design.",
)
@click.option(
    "--hold",
    type=click.Choice(["active", "total"]),
    default="active",
    show_default=True,
    help="Parameters of a MoE layer that the size of an expert keeps: those of one token, or all.",
)
@click.option(
    "--model",
    metavar="NAME|CONFIG",
    shell_complete=models,
    help="The trace's model: see tracekit models, or its config.json.",
)
@click.option(
    "--hardware",
    metavar="NAME",
    default="h100",
    show_default=True,
    shell_complete=machines,
    help="The machine, with --model.",
)
@click.option(
    "--routed-share",
    type=click.FloatRange(0, 1),
    help="Instead of --model: routed experts' share of the time of one token's step.",
)
@click.option("--drafts", type=click.IntRange(min=1), default=3, show_default=True, help="Drafted tokens per step.")
@click.option(
    "--batch-size",
    metavar="N,N,…",
    type=whole_numbers,
    default="1,2,4,8,16,32,64,128,256",
    show_default=True,
    help="Requests verified together.",
)
@click.option("--acceptance-length", type=float, help="Tokens that a step emits, for the speedup.")
@click.option("--acceptance-rate", type=float, help="Instead: chance that a draft is accepted.")
@click.option(
    "--draft-cost", type=float, default=0.0, show_default=True, help="Cost of one draft, in steps of the target."
)
@click.option(
    "--context", type=click.IntRange(min=0), default=1024, show_default=True, help="Tokens of context, with --model."
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Devices among which each weight is divided, with --model.",
)
@click.option(
    "--expert-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Groups of devices among which the experts are divided, with --model.",
)
@one_trace
@click.option("--chart", type=click.Path(path_type=Path), help="Draw it, too: .html, .png, .svg, .pdf or .json.")
@output_options
def design(
    source: str | Path, vary: tuple[tuple[str, tuple[int, ...]], ...], chart: Path | None, out: Output, **options: Any
) -> None:
    """Ask what other designs of the model would gain.

    Puts other N, k and shared experts into the trace's law of routing and into the time of a step, everything else
    held: how sparsity moves the batch size at which verification is cheapest. Nobody has trained these models; rows
    say where they extrapolate.
    """
    import tracekit as tk
    from tracekit.reports.charts import render

    axes = dict(vary)
    if len(axes) < len(vary):
        raise click.UsageError("--vary names the same thing twice: give all of its values at once.")
    if chart is not None:
        check_writable(chart, force=out.force)
    if not Path(source).is_file():
        announce_compilation(out)
    frame = tk.design(source, vary=axes, **options)
    if chart is not None:
        render(tk.charts.design(frame), chart, force=out.force)
        out.note(f"wrote {chart}")
    out.table(frame, "design")
