"""The verbs about speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.analyses import max_window_option
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import running_options, selectors, store_argument, whole_numbers
from tracekit.cli.output import Output, output_options


@verb(
    "expert-ratio",
    examples=[
        "tracekit expert-ratio traces --batch-size 1,8,64 --max-window 4",
        "tracekit expert-ratio traces --by layer --format csv -o ratios.csv",
    ],
)
@store_argument
@max_window_option
@click.option(
    "--batch-size",
    metavar="B,B,…",
    type=whole_numbers,
    default="1,2,4,8,16,32,64",
    show_default=True,
    help="Requests verified together, a window each.",
)
@selectors()
@running_options(cluster=True)
@output_options
def expert_ratio(store: str | Path, out: Output, **options: Any) -> None:
    """Say how many more experts a verification loads than a step.

    U(T, B) / U(1, B): the experts of windows of T tokens of B requests over those of one token of each, which is how
    much more of the experts' weights a verification reads than a step without speculation. Beside it what the
    baselines would say; the uniform one needs no trace.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.expert_ratio(tk.open(store), **options)
    out.table(frame, "expert_ratio")


@verb(
    "budget",
    examples=[
        "tracekit budget traces --window 4,8",
        "tracekit budget traces --budget 6,8,12,16 --share .95 --by layer -o budget.csv",
    ],
)
@store_argument
@click.option(
    "--window",
    metavar="T,T,…",
    type=whole_numbers,
    help="Tokens in the verification window. [default: 4, or the most that a request has]",
)
@click.option(
    "--budget",
    metavar="M,M,…",
    type=whole_numbers,
    help="Experts per layer that may be loaded. [default: k, 2k, 3k, … up to what the window can use]",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Count the experts that carry this share of a window's router weight.",
)
@click.option("--steps", is_flag=True, help="Verification steps as they ran, with their rejected drafts.")
@selectors()
@running_options()
@output_options
def budget(store: str | Path, out: Output, **options: Any) -> None:
    """Say what a budget of experts keeps of a verification window.

    If at most M experts per layer are loaded, those with the most router weight in the window: how much of the weight
    they carry, and how many tokens keep all of their experts (MoE-Spec). Needs router weights in the trace.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.budget(tk.open(store), **options)
    out.table(frame, "budget")


@verb("steps", examples=["tracekit steps traces", "tracekit steps traces --by label --format csv -o steps.csv"])
@store_argument
@selectors()
@running_options()
@output_options
def steps(store: str | Path, out: Output, **options: Any) -> None:
    """Count the experts that real verification steps load.

    The rows of rejected drafts are routed too, so a step loads more than the tokens it emits. The bias says how much
    more it loads than a window of as many accepted tokens, which is all that other traces show. Needs verification
    steps in the trace.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.steps(tk.open(store), **options)
    out.table(frame, "steps")


@verb("acceptance", examples=["tracekit acceptance traces", "tracekit acceptance traces --by label -o accepted.csv"])
@store_argument
@selectors()
@running_options()
@output_options
def acceptance(store: str | Path, out: Output, **options: Any) -> None:
    """Say how many drafts verification steps accept.

    For each number of drafts: the share of steps that accept so many, the chance that one more is accepted, and the
    experts that were loaded for rejected drafts alone. Needs verification steps in the trace.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.acceptance(tk.open(store), **options)
    out.table(frame, "acceptance")
