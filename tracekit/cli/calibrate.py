"""The verb that holds a model of time against measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.machine import acceptance_options, cost_options
from tracekit.cli.options import one_trace, store_argument
from tracekit.cli.output import Output, output_options


@verb(
    "calibrate",
    examples=[
        "tracekit calibrate traces --measured bench.csv",
        "tracekit calibrate traces --measured bench.csv --model gpt-oss-20b --hardware h100 --points",
        "tracekit calibrate traces --measured serve-b1.json --measured serve-b8.json --hardware h100",
    ],
)
@store_argument
@click.option(
    "--measured",
    metavar="FILE[:KEY=VALUE,…]",
    multiple=True,
    required=True,
    help="Benchmark results: a table by batch_size and drafts, or what vLLM's and SGLang's benchmarks write. May be "
    "repeated; KEY=VALUE says what a file does not, as in latency.json:batch_size=8,output_len=128.",
)
@click.option("--metric", metavar="COLUMN", help="The column that counts, where several tell the time of a step.")
@click.option("--repeats", is_flag=True, help="Average rows of the same batch size and draft length.")
@cost_options
@acceptance_options
@click.option(
    "--hold",
    type=click.Choice(["bandwidth", "overhead", "flops"]),
    multiple=True,
    help="Keep the machine's figure instead of fitting it; may be repeated.",
)
@click.option("--points", is_flag=True, help="Show each point and how far it lies from the fit, not the parameters.")
@one_trace
@output_options
def calibrate(
    store: str | Path,
    measured: tuple[str, ...],
    points: bool,
    cost: dict[str, Any],
    drafting: dict[str, Any],
    out: Output,
    **options: Any,
) -> None:
    """Fit a model of time to measured steps.

    With --hardware: the roofline of the model on the machine, whose effective bandwidth, fixed overhead and cost of
    a draft are fitted, and its FLOP/s where points are bound by them. Without: Amdahl's law, V = f x + 1 - f, whose
    routed share f is fitted. The experts that a step loads are the trace's. What the measurements do not tell is
    said and left empty.

    A table has columns such as batch_size, drafts (0: no speculation), and tpot_ms with acceptance_length, or step_ms
    (a step with its drafting), verify_ms (without), output_throughput (tokens per second of all requests),
    verification_ratio or speedup.
    """
    import tracekit as tk

    announce_compilation(out)
    found = tk.calibrate(tk.open(store), list(measured), **options, **drafting, **cost)
    for note in found.notes:
        out.note(note)
    if points:
        out.table(found.points, "calibration_points")
    else:
        out.table(found.parameters, "calibration")
