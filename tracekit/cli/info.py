"""The verb that says what a store holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracekit.cli.completion import traces
from tracekit.cli.group import verb
from tracekit.cli.options import store_argument
from tracekit.cli.output import Output, output_options

if TYPE_CHECKING:
    from tracekit.store import Store, TraceInfo


@verb("info", examples=["tracekit info traces", "tracekit info traces --format json"])
@store_argument
@click.option("--trace", metavar="NAME", shell_complete=traces, help="Only this trace.")
@output_options
def info(store: str | Path, trace: str | None, out: Output) -> None:
    """Say what a store holds: its traces and their shape.

    Beside it the provenance, which decides what can be asked of a trace, its verification steps, the predictors whose
    predictions lie beside the routing (with how many MoE layers ahead they look), and what the check at ingest found.
    """
    import polars as pl

    import tracekit as tk
    from tracekit.errors import StoreError
    from tracekit.store.manifest import damaged

    opened = tk.open(store)
    held = opened.traces() if trace is None else [opened.trace(trace)]
    for each in held:
        if files := damaged(opened.path, each):
            found = f"files missing or cut short: {len(files)}, the first is {files[0]}"
            remedy = "Restore them, or ingest the trace again with --force"
            raise StoreError(found, where=f"trace {each.name!r}", remedy=remedy)
    beside = pl.DataFrame(
        [(each.name, opened.step_count(each), _predictors(opened, each), _findings(each)) for each in held],
        schema={"trace": pl.String, "verification_steps": pl.Int64, "predictors": pl.String, "findings": pl.String},
        orient="row",
    )
    out.table(opened.sql("FROM traces ORDER BY trace").join(beside, on="trace", maintain_order="left"), "info")


def _predictors(store: Store, trace: TraceInfo) -> str:
    """Return each predictor with how many MoE layers ahead it looks."""
    from tracekit.store.predicted import recorded_predictors

    ahead: dict[str, list[str]] = {}
    for name, distance in recorded_predictors(store, trace):
        ahead.setdefault(name, []).append(str(distance))
    return ", ".join(f"{name} ({', '.join(distances)})" for name, distances in ahead.items()) or "none"


def _findings(trace: TraceInfo) -> str:
    return "; ".join(f"{found.severity}: {found.finding} ({found.where})" for found in trace.findings) or "none"
