"""The verb that says how long a token takes where experts are offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.machine import device_options
from tracekit.cli.options import running_options, selectors, store_argument
from tracekit.cli.output import Output, output_options
from tracekit.economics.offload import LINKS
from tracekit.metrics.cache_spec import POLICIES, STARTS
from tracekit.reports.files import check_writable

FOLLOWED = [policy for policy in POLICIES if policy != "static"]
"""Caches that are followed token by token."""


@verb(
    "tpot",
    examples=[
        "tracekit tpot traces --model gpt-oss-20b --hardware rtx-3090 --link pcie4-x16 --capacity 12",
        "tracekit tpot traces --compute .018 --expert-bytes 9437184 --link 25e9 --predictor .9",
        "tracekit tpot traces --model gpt-oss-20b --hardware l4 --link 25e9 --chart token.png --chart-kind gantt",
    ],
)
@store_argument
@click.option("--link", metavar="NAME|BYTES/S", required=True, help=f"What experts come over: {', '.join(LINKS)}.")
@click.option(
    "--compute",
    metavar="SECONDS",
    type=float,
    help="That a token computes, copies not counted, as measured. [default: the model's roofline on --hardware]",
)
@click.option("--expert-bytes", metavar="BYTES", type=float, help="Of an expert. [default: as the model or trace says]")
@click.option(
    "--predictor",
    metavar="NAME|RECALL",
    help="One that the trace recorded, previous_token, perfect, one that learns (hot_list, transition, token_id, "
    "token_id+transition; see tracekit prefetch), or a recall such as .9.",
)
@click.option(
    "--distance",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Layers from the prediction to the layer that it is about.",
)
@click.option(
    "--m",
    metavar="M",
    type=click.IntRange(min=1),
    help="Experts copied ahead per layer. [default: all predicted]",
)
@click.option(
    "--predictor-cost",
    metavar="SECONDS",
    type=float,
    default=0.0,
    show_default=True,
    help="Per token, on the engine that computes.",
)
@click.option("--capacity", metavar="N", type=click.IntRange(min=1), help="Experts per layer that a cache holds.")
@click.option("--policy", type=click.Choice(FOLLOWED), default="lru", show_default=True, help="Of the cache.")
@click.option(
    "--start",
    type=click.Choice(STARTS),
    default="prompt",
    show_default=True,
    help="What a request's cache begins with: nothing, what its prompt left, or what the request before left.",
)
@device_options
@click.option("--schedule", is_flag=True, help="Show what both engines do during one token, instead.")
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Which token, with --schedule and the gantt chart, by its time.",
)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw it, too: .html, .png, .svg, .pdf or .json.")
@click.option(
    "--chart-kind", type=click.Choice(["tpot", "gantt"]), default="tpot", show_default=True, help="What to draw."
)
@selectors(by=[])
@running_options()
@output_options
def tpot(
    store: str | Path,
    cost: dict[str, Any],
    schedule: bool,
    quantile: float,
    chart: Path | None,
    chart_kind: str,
    intervals: bool,
    out: Output,
    **options: Any,
) -> None:
    """Say how long a token takes with offloaded experts.

    One request, batch size 1. Every token of the trace is put through two engines: one computes layer after layer, one
    copies experts over the link in the order in which they are asked for. What is asked for depends on the mode: all
    experts (on_demand), those that a cache lacks (cache), predicted ones ahead and the missed ones on demand
    (prefetch), both (cache+prefetch), or predicted ones alone, executed whatever the router says (speculative: lossy).
    The break-even is what the predictor may cost per token before it loses.
    """
    import tracekit as tk
    from tracekit.reports.charts import render

    if chart is not None:
        check_writable(chart, force=out.force)
    announce_compilation(out)
    opened = tk.open(store)
    drawn = chart_kind if chart is not None else None
    one: Any = None
    frame: Any = None
    if schedule or drawn == "gantt":
        one = tk.token_schedule(opened, quantile=quantile, **options, **cost)
    if not schedule or drawn == "tpot":
        frame = tk.tpot(opened, intervals=intervals, **options, **cost)
    if chart is not None:
        render(tk.charts.gantt(one) if chart_kind == "gantt" else tk.charts.tpot(frame), chart, force=out.force)
        out.note(f"wrote {chart}")
    if schedule:
        out.table(one)
    else:
        out.table(frame, "tpot")
