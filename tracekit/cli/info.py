"""The verb that says what a store holds."""

from __future__ import annotations

from pathlib import Path

import click

from tracekit.cli.completion import traces
from tracekit.cli.group import verb
from tracekit.cli.options import store_argument
from tracekit.cli.output import Output, output_options


@verb("info", examples=["tracekit info traces", "tracekit info traces --format json"])
@store_argument
@click.option("--trace", metavar="NAME", shell_complete=traces, help="Only this trace.")
@output_options
def info(store: Path, trace: str | None, out: Output) -> None:
    """Say what a store holds: its traces and their shape.

    Beside it the provenance, which decides what can be asked of a trace, its verification steps, the predictors whose
    predictions lie beside the routing (with how many MoE layers ahead they look), and what the check at ingest found.
    """
    import tracekit as tk
    from tracekit.errors import StoreError
    from tracekit.store.manifest import damaged

    opened = tk.open(store)
    for held in opened.traces() if trace is None else [opened.trace(trace)]:
        if files := damaged(opened.path, held):
            found = f"files missing or cut short: {len(files)}, the first is {files[0]}"
            remedy = "Restore them, or ingest the trace again with --force"
            raise StoreError(found, where=f"trace {held.name!r}", remedy=remedy)
    select = """
        SELECT
            traces.*,
            coalesce(verified.steps, 0) AS verification_steps,
            coalesce(foretold.predictors, 'none') AS predictors,
            coalesce(found.findings, 'none') AS findings
        FROM traces
        LEFT JOIN (
            SELECT trace, count(DISTINCT (request, step)) AS steps
            FROM verification
            WHERE "row" = 0
            GROUP BY trace
        ) AS verified USING (trace)
        LEFT JOIN (
            SELECT trace, string_agg(predictor || ' (' || ahead || ')', ', ' ORDER BY predictor) AS predictors
            FROM (
                SELECT trace, predictor, string_agg(distance, ', ' ORDER BY distance) AS ahead
                FROM (SELECT DISTINCT trace, predictor, distance FROM predictions)
                GROUP BY trace, predictor
            )
            GROUP BY trace
        ) AS foretold USING (trace)
        LEFT JOIN (
            SELECT trace, string_agg(severity || ': ' || finding || ' (' || "where" || ')', '; ') AS findings
            FROM findings
            GROUP BY trace
        ) AS found USING (trace)
        WHERE trace = coalesce(getvariable('trace')::VARCHAR, trace)
        ORDER BY trace
    """
    out.table(opened.sql(select, {"trace": trace}), "info")
