"""The verb that says what speculative decoding gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.machine import acceptance_options, cost_options
from tracekit.cli.options import running_options, selectors, store_argument, whole_numbers
from tracekit.cli.output import Output, output_options
from tracekit.errors import UsageError
from tracekit.reports.files import check_writable

CHARTS = ("speedup", "verification-ratio", "speedup-map")


@verb(
    "speedup",
    examples=[
        "tracekit speedup traces --model gpt-oss-20b --hardware h100 --acceptance-rate .7 --draft-cost .05",
        "tracekit speedup traces --model gpt-oss-20b --hardware h100 --parts --drafts 3",
        "tracekit speedup traces --model config.json --bandwidth 2e12 --flops 4e14 --chart speedup.png",
    ],
)
@store_argument
@cost_options
@click.option(
    "--batch-size",
    metavar="B,B,…",
    type=whole_numbers,
    help="Requests verified together. [default: 1,2,4 … 64, as far as the trace has requests]",
)
@click.option(
    "--drafts",
    metavar="K,K,…",
    type=whole_numbers,
    help="Drafted tokens per step. [default: 1,2,3,4,5,7, as far as the trace has windows]",
)
@acceptance_options
@click.option("--draft-model", metavar="NAME|CONFIG", help="Instead: the model that drafts, dense or not.")
@click.option("--parts", is_flag=True, help="Show what each part of a step costs, instead.")
@click.option("--amdahl", is_flag=True, help="Take a step at batch size 1 apart by Amdahl's law, instead.")
@click.option(
    "--measured-ratio",
    type=float,
    metavar="V",
    help="With --amdahl: the verification's time over a step's as it was measured, for the fixed cost that it implies.",
)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw it, too: .html, .png, .svg, .pdf or .json.")
@click.option("--chart-kind", type=click.Choice(CHARTS), default=CHARTS[0], show_default=True, help="What to draw.")
@click.option(
    "--measured",
    metavar="FILE[:KEY=VALUE,…]",
    multiple=True,
    help="Fit the machine's figures and the cost of a draft to these benchmark results first, and take the acceptance "
    "from them where they say it: see tracekit calibrate.",
)
@selectors(by=[])
@running_options()
@output_options
def speedup(
    store: str | Path,
    parts: bool,
    amdahl: bool,
    chart: Path | None,
    chart_kind: str,
    measured: tuple[str, ...],
    measured_ratio: float | None,
    draft_model: str | None,
    batch_size: tuple[int, ...] | None,
    drafts: tuple[int, ...] | None,
    cost: dict[str, Any],
    drafting: dict[str, Any],
    out: Output,
    **options: Any,
) -> None:
    """Say what speculative decoding gains on a machine.

    For each batch size and draft length: what verification costs in steps without speculation, from a roofline over
    the parts of the model in which the routed experts are those that the trace loads; the speedup; and from which
    acceptance rate on it gains. Beside it what the uniform formula would have said. The acceptance is that of the
    trace's own steps where none is given; drafts are free, with a note, where no cost of theirs is.
    """
    import tracekit as tk

    asked = {"measured_ratio": measured_ratio, "batch_size": batch_size, "draft_model": draft_model, "chart": chart}
    _refuse_contradictions(parts, amdahl, asked if measured else asked | drafting)
    if chart is not None:
        check_writable(chart, force=out.force)
    announce_compilation(out)
    opened = tk.open(store)
    where = {name: options[name] for name in ("trace", "phase")}
    if measured:
        found = tk.calibrate(opened, list(measured), **where, **drafting, **cost)
        for note in found.notes:
            out.note(note)
        if found.hardware is None:
            raise UsageError("--measured without a machine", expected="--hardware, or --bandwidth and --flops")
        cost = {name: value for name, value in cost.items() if name not in _MACHINE} | {"hardware": found.hardware}
        if draft_model is None and found.draft_cost is not None:
            drafting = drafting | {"draft_cost": found.draft_cost}
        if found.acceptance_rate is not None and not drafting.keys() & {"acceptance_rate", "acceptance_length"}:
            drafting = drafting | {"acceptance_rate": found.acceptance_rate}
            out.note(f"the acceptance rate is that of the measured acceptance lengths, {found.acceptance_rate:.3f}")
    if parts:
        frame = tk.step_time(opened, batch_size=batch_size, drafts=drafts, **where, **cost)
        out.table(frame, "step_time")
    elif amdahl:
        frame = tk.amdahl(opened, drafts=drafts, measured_ratio=measured_ratio, **where, **cost)
        out.table(frame, "amdahl")
    else:
        frame = tk.speedup(
            opened, batch_size=batch_size, drafts=drafts, draft_model=draft_model, **options, **drafting, **cost
        )
        out.table(frame, "speedup")
    if chart is not None:
        from tracekit.reports.charts import KINDS, render

        render(KINDS[chart_kind].draw(frame), chart, force=out.force)
        out.note(f"wrote {chart}")


_MACHINE = ("hardware", "bandwidth", "flops", "overhead", "precision")


def _refuse_contradictions(parts: bool, amdahl: bool, given: dict[str, Any]) -> None:
    """Refuse options that have no use beside each other."""
    if parts and amdahl:
        raise click.UsageError("--parts and --amdahl each show something else: give one of them.")
    shown = "parts" if parts else "amdahl" if amdahl else None
    useful = {"parts": {"batch_size"}, "amdahl": {"measured_ratio"}, None: given.keys() - {"measured_ratio"}}[shown]
    for name, value in given.items():
        if value is not None and name not in useful:
            option = name.replace("_", "-")
            raise click.UsageError(
                f"--{option} is for --amdahl." if shown is None else f"--{option} says nothing to --{shown}."
            )
