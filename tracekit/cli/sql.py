"""The verbs of the SQL surface: sql, query and views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli import completion
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import StorePath, key_value, mapping, running_options, selectors, store_argument
from tracekit.cli.output import Output, output_options
from tracekit.store.results import KINDS


@verb(
    "sql",
    examples=[
        'tracekit sql traces "SELECT layer, count(DISTINCT expert) FROM activations GROUP BY layer"',
        'tracekit sql traces "SELECT * FROM requests" -o requests.csv',
        'tracekit sql traces "DESCRIBE windows"',
    ],
)
@store_argument
@click.argument("statement", metavar="SQL")
@running_options("SQL")
@output_options
def sql(store: str | Path, statement: str, out: Output) -> None:
    """Run one SELECT over the views of a store.

    The SQL is DuckDB's. The views of traces: traces, requests, routing (a row per token and layer), activations (a row
    per routed expert), counts, tokens, verification (steps with their rejected drafts), predictions and findings. The
    views of results, with what was computed so far: RESULTS.

    The statement can read the store and nothing else, and cannot write.
    """
    import tracekit as tk
    from tracekit.reports.tables import MAX_ROWS
    from tracekit.store.views import run

    if out.fmt != "table":
        out.table(tk.open(store).sql(statement))
        return
    with tk.open(store).connect() as connection:
        out.table(run(connection, statement, MAX_ROWS + 1))  # one more says that there are more


assert sql.help is not None
sql.help = sql.help.replace("RESULTS", ", ".join(KINDS))


@verb("views", examples=["tracekit views traces > views.sql"])
@store_argument
def views(store: str | Path) -> None:
    """Print the views' SQL for a plain duckdb shell."""
    import tracekit as tk

    Output("table").write(tk.open(store).views())


@verb(
    "query",
    examples=[
        "tracekit query --list",
        "tracekit query --describe unique_experts_by_window",
        "tracekit query traces unique_experts_by_window --param max_window=4 --format csv",
    ],
)
@click.argument("store", required=False, type=StorePath())
@click.argument("name", required=False, shell_complete=completion.queries)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    type=key_value,
    help="A parameter of the query; may be repeated.",
)
@click.option("--list", "listed", is_flag=True, help="List the queries.")
@click.option(
    "--describe",
    metavar="NAME",
    shell_complete=completion.queries,
    help="Show what a query yields and the parameters it takes.",
)
@selectors(by=[])
@running_options("the sums of a pass, and for SQL")
@output_options
def query(
    store: str | Path | None,
    name: str | None,
    params: tuple[tuple[str, str], ...],
    listed: bool,
    describe: str | None,
    trace: str | None,
    phase: str | None,
    out: Output,
    **options: Any,
) -> None:
    """Run a query of the library over a store.

    Results that the query reads and the store does not hold yet are computed first. --trace and --phase are
    short for the parameters of these names.
    """
    import tracekit as tk

    if listed:
        _list(out)
    elif describe is not None:
        _describe(describe, out)
    elif store is None or name is None:
        raise click.UsageError("Give a STORE and the NAME of a query, or --list, or --describe NAME.")
    else:
        given: dict[str, Any] = mapping(params, "--param")
        given |= {key: value for key, value in (("trace", trace), ("phase", phase)) if value is not None}
        announce_compilation(out)
        out.table(tk.query(tk.open(store), name, **options, **given), "summary" if name == "summary" else None)


def _list(out: Output) -> None:
    import polars as pl

    from tracekit.reports.queries import queries
    from tracekit.reports.tables import listing

    found = queries()
    if out.fmt == "table":
        out.write(listing(found))
        return
    rows = [(query.name, query.title, [p.name for p in query.parameters]) for query in found]
    schema: dict[str, Any] = {"name": pl.String, "title": pl.String, "parameters": pl.List(pl.String)}
    out.table(pl.DataFrame(rows, schema=schema, orient="row"))


def _describe(name: str, out: Output) -> None:
    import polars as pl

    from tracekit.reports.queries import find
    from tracekit.reports.tables import description

    query = find(name)
    if out.fmt == "table":
        out.write(description(query))
        return
    fields: list[tuple[Any, ...]] = [("parameter", p.name, p.type, p.default, p.unit, p.text) for p in query.parameters]
    fields += [("column", c.name, c.type, None, c.unit, c.text) for c in query.columns]
    names = ("kind", "name", "type", "default", "unit", "meaning")
    rows = [[None if value is None else str(value) for value in field] for field in fields]
    out.table(pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row"))
