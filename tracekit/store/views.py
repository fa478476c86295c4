"""DuckDB views over a store, and a connection that can read the store and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.checks import Finding
from tracekit.errors import QueryError, UnsupportedError
from tracekit.execution import current
from tracekit.store import results
from tracekit.store.answers import MODELLED
from tracekit.store.location import temporary
from tracekit.store.manifest import SEGMENTS, TraceInfo, part_name
from tracekit.store.spool import COUNTS, PREDICTED, STEPS

if TYPE_CHECKING:
    import duckdb
    import polars as pl

_SQL_TYPES = {
    "UInt16": "USMALLINT",
    "String": "VARCHAR",
    "Boolean": "BOOLEAN",
    "Int64": "BIGINT",
    "Float64": "DOUBLE",
}


def quote(value: object) -> str:
    """Return a value as an SQL literal."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Path):
        value = value.as_posix()
    text = str(value).replace("'", "''")
    return f"'{text}'"


def _parquet(paths: list[Path]) -> str:
    """Return the table function that reads the files, and reads nothing into the names of their folders."""
    files = ", ".join(quote(_glob_escaped(p)) for p in paths)
    return f"read_parquet([{files}], union_by_name = true, hive_partitioning = false)"


def _glob_escaped(path: Path) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path.as_posix())


def _union(selects: list[str], empty: str) -> str:
    return "\nUNION ALL BY NAME\n".join(selects) if selects else empty


def _empty(columns: Mapping[str, str]) -> str:
    return "SELECT " + ", ".join(f'NULL::{sql} AS "{name}"' for name, sql in columns.items()) + " WHERE false"


def definitions(root: Path, traces: list[TraceInfo], *, rows: bool = True) -> dict[str, str]:
    """Return the body of every view, by name, over the files that the store holds now.

    Paths are absolute, names and paths are literals: nothing that a trace or a folder is called can become SQL.

    Parameters
    ----------
    rows
        Whether the views of rows are among them.
    """
    views = {"traces": _traces(traces), "requests": _requests(root, traces)}
    if rows:
        views |= {name: of(root, traces) for name, of in _ROWS.items()}
    views["findings"] = _findings(traces)
    return views | {kind: _result(root, traces, kind) for kind in results.KINDS}


def script(root: Path, traces: list[TraceInfo], *, rows: bool = True) -> str:
    """Return the views as a script for a plain ``duckdb`` shell; ``rows`` as in `definitions`."""
    views = definitions(root, traces, rows=rows)
    return "\n".join(f'CREATE OR REPLACE VIEW "{name}" AS\n{body};\n' for name, body in views.items())


def _traces(traces: list[TraceInfo]) -> str:
    columns = {
        "trace": "VARCHAR",
        "model": "VARCHAR",
        "engine": "VARCHAR",
        "engine_version": "VARCHAR",
        "source_format": "VARCHAR",
        "num_experts": "INTEGER",
        "top_k": "INTEGER",
        "native_top_k": "INTEGER",
        "moe_layers": "INTEGER",
        "requests": "BIGINT",
        "tokens": "BIGINT",
        "rows": "BIGINT",
        "id_space": "VARCHAR",
        "router_order": "BOOLEAN",
        "drafts_included": "BOOLEAN",
        "predicted": "INTEGER",
        "histogram": "BOOLEAN",
        "default_phase": "VARCHAR",
        "content": "VARCHAR",
        "created": "VARCHAR",
    }
    selects = []
    for trace in traces:
        values = {
            "trace": trace.name,
            "moe_layers": len(trace.meta.layers),
            "top_k": trace.meta.top_k or None,
            "predicted": max(s.predicted for s in trace.segments) or None,
            **{n: getattr(trace, n) for n in ("requests", "tokens", "rows", "default_phase", "content", "created")},
            **({} if trace.meta.top_k else {"tokens": None}),
        }
        items = (
            f'{quote(values[name] if name in values else getattr(trace.meta, name))}::{sql} AS "{name}"'
            for name, sql in columns.items()
        )
        selects.append("SELECT " + ", ".join(items))
    return _union(selects, _empty(columns))


def _requests(root: Path, traces: list[TraceInfo]) -> str:
    selects = [
        f"SELECT {quote(t.name)} AS trace, * FROM "
        f"{_parquet([root / SEGMENTS / s.id / 'requests.parquet' for s in t.segments])}"
        for t in traces
    ]
    columns = {
        "trace": "VARCHAR",
        "request": "UINTEGER",
        "request_id": "VARCHAR",
        "label": "VARCHAR",
        "labels": "VARCHAR",
        **dict.fromkeys(("prompt_len", "decode_start", "first_pos", "n_tokens", "n_decode"), "UINTEGER"),
    }
    return _union(selects, _empty(columns))


_PHASE = "CASE WHEN decode THEN 'decode' WHEN NOT decode THEN 'prefill' END AS phase"
_ROW = {
    "trace": "VARCHAR",
    "request": "UINTEGER",
    "layer": "USMALLINT",
    "pos": "UINTEGER",
    "phase": "VARCHAR",
}


def _routed(traces: list[TraceInfo]) -> list[TraceInfo]:
    """Return the traces that have routing rows, and not counts only."""
    return [trace for trace in traces if not trace.meta.histogram]


def _parts(root: Path, trace: TraceInfo) -> str:
    paths = [root / SEGMENTS / s.id / part_name(i) for s in trace.segments for i in range(len(s.parts))]
    return _parquet(paths)


def _routing(root: Path, traces: list[TraceInfo]) -> str:
    selects = [
        f"SELECT {quote(t.name)} AS trace, request, layer, pos, {_PHASE}, "
        f"[{', '.join(f'e{r}::USMALLINT' for r in range(t.meta.top_k))}] AS experts FROM {_parts(root, t)}"
        for t in _routed(traces)
    ]
    return _union(selects, _empty({**_ROW, "experts": "USMALLINT[]"}))


def _activations(root: Path, traces: list[TraceInfo]) -> str:
    selects = []
    for t in _routed(traces):
        weighted = any(s.has_weights for s in t.segments)
        for rank in range(t.meta.top_k):
            weight = f"w{rank}" if weighted else "NULL::FLOAT"
            selects.append(
                f"SELECT {quote(t.name)} AS trace, request, layer, pos, {_PHASE}, {rank}::UTINYINT AS rank, "
                f"e{rank}::USMALLINT AS expert, {weight} AS weight FROM {_parts(root, t)}"
            )
    return _union(selects, _empty({**_ROW, "rank": "UTINYINT", "expert": "USMALLINT", "weight": "FLOAT"}))


def _tokens(root: Path, traces: list[TraceInfo]) -> str:
    selects = []
    for t in traces:
        paths = [root / SEGMENTS / s.id / "tokens.parquet" for s in t.segments if s.has_token_ids]
        if paths:
            selects.append(f"SELECT {quote(t.name)} AS trace, * FROM {_parquet(paths)}")
    columns = {"trace": "VARCHAR", "request": "UINTEGER", "pos": "UINTEGER", "token_id": "BIGINT"}
    return _union(selects, _empty(columns))


def _verification(root: Path, traces: list[TraceInfo]) -> str:
    selects = []
    for t in traces:
        paths = [root / SEGMENTS / s.id / STEPS for s in t.segments if s.has_steps]
        if paths:
            experts = ", ".join(f"e{r}::USMALLINT" for r in range(t.meta.top_k))
            selects.append(
                f'SELECT {quote(t.name)} AS trace, request, step, layer, "row", pos, kept, [{experts}] AS experts '
                f"FROM {_parquet(paths)}"
            )
    columns = {
        "trace": "VARCHAR",
        "request": "UINTEGER",
        "step": "UINTEGER",
        "layer": "USMALLINT",
        "row": "USMALLINT",
        "pos": "UINTEGER",
        "kept": "BOOLEAN",
        "experts": "USMALLINT[]",
    }
    return _union(selects, _empty(columns))


def _predictions(root: Path, traces: list[TraceInfo]) -> str:
    selects = []
    for t in traces:
        for s in t.segments:
            if s.has_predictions:  # a segment by itself: the next one may have named more or fewer experts
                predicted = ", ".join(f"p{r}::USMALLINT" for r in range(s.predicted))
                selects.append(
                    f"SELECT {quote(t.name)} AS trace, request, predictor, distance, layer, pos, "
                    f"[{predicted}] AS predicted FROM {_parquet([root / SEGMENTS / s.id / PREDICTED])}"
                )
    columns = {
        "trace": "VARCHAR",
        "request": "UINTEGER",
        "predictor": "VARCHAR",
        "distance": "UTINYINT",
        "layer": "USMALLINT",
        "pos": "UINTEGER",
        "predicted": "USMALLINT[]",
    }
    return _union(selects, _empty(columns))


def _counts(root: Path, traces: list[TraceInfo]) -> str:
    selects = []
    for t in traces:
        if t.meta.histogram:
            stored = _parquet([root / SEGMENTS / s.id / COUNTS for s in t.segments])
            selects.append(f"SELECT {quote(t.name)} AS trace, request, layer, expert, n FROM {stored}")
            continue
        ranks = _union(
            [f"SELECT request, layer, e{r}::USMALLINT AS expert FROM {_parts(root, t)}" for r in range(t.meta.top_k)],
            "",
        )
        selects.append(
            f"SELECT {quote(t.name)} AS trace, request, layer, expert, count(*)::UBIGINT AS n "
            f"FROM ({ranks}) GROUP BY request, layer, expert"
        )
    columns = {"trace": "VARCHAR", "request": "UINTEGER", "layer": "USMALLINT", "expert": "USMALLINT", "n": "UBIGINT"}
    return _union(selects, _empty(columns))


_ROWS: dict[str, Callable[[Path, list[TraceInfo]], str]] = {
    "routing": _routing,
    "activations": _activations,
    "tokens": _tokens,
    "verification": _verification,
    "predictions": _predictions,
    "counts": _counts,
}
"""The views of rows, which take DuckDB reading the trace."""

COPY = "Copy the store to a disk with a tool of its storage, and open the copy"
"""What to do where DuckDB is to read a store at a URL."""


def _findings(traces: list[TraceInfo]) -> str:
    columns = {"trace": "VARCHAR", **dict.fromkeys(Finding.__slots__, "VARCHAR")}
    selects = []
    for trace in traces:
        for finding in trace.findings:
            values = {"trace": trace.name, **{name: getattr(finding, name) for name in Finding.__slots__}}
            selects.append("SELECT " + ", ".join(f'{quote(value)} AS "{name}"' for name, value in values.items()))
    return _union(selects, _empty(columns))


def _result(root: Path, traces: list[TraceInfo], kind: str) -> str:
    columns = {"trace": "VARCHAR", **{c: _SQL_TYPES[t] for c, t in results.columns(kind).items()}}
    order = "asked" if kind in MODELLED else "computed"
    names = ", ".join(f'"{c}"' for c in columns)
    selects = [
        f"SELECT {quote(t.name)} AS trace, *, {age}::BIGINT AS {order} FROM {_parquet([path])}"
        for t in traces
        for age, path in enumerate(results.saved(root, kind, t))
    ]
    if not selects:
        return _empty(columns)
    if kind in MODELLED:
        return f"SELECT {names} FROM (\n" + "\nUNION ALL BY NAME\n".join(selects) + "\n)"
    key = ", ".join(f'"{c}"' for c in ("trace", "phase", "by", "layer", "label", "request_id", *results.KEYS[kind]))
    # The same may have been computed several times: with and without intervals, with another seed, in a longer run.
    best = (
        "(\"intervals\" = coalesce(getvariable('intervals'), true)) DESC, "
        "(\"seed\" = coalesce(getvariable('seed'), 0)) DESC, computed DESC"
    )
    return (
        f"SELECT {names} FROM (\n"
        + "\nUNION ALL BY NAME\n".join(selects)
        + f"\n)\nQUALIFY rank() OVER (PARTITION BY {key} ORDER BY {best}) = 1"
    )


def connect(
    root: Path, traces: list[TraceInfo], variables: Mapping[str, Any] | None = None, *, rows: bool = True
) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB connection with the store's views that can read the store and nothing else.

    Parameters
    ----------
    variables
        DuckDB variables, which SQL reads with ``getvariable('name')``.
    rows
        As in `definitions`.

    Notes
    -----
    The order of the settings matters: views first, then the directories, then external access, then the lock.
    """
    import duckdb

    con = duckdb.connect()
    try:
        # Larger than memory is the normal case; what does not fit is spilled to a private directory.
        con.execute("SET temp_directory = ?", [str(temporary())])
        con.execute("SET threads = ?", [current().threads])
        if memory := current().memory:
            con.execute("SET memory_limit = ?", [f"{memory}B"])
        con.execute(script(root, traces, rows=rows))
        for name, value in (variables or {}).items():
            if not name.isidentifier():
                raise QueryError(f"{name!r} is not a variable name")
            con.execute(f'SET VARIABLE "{name}" = {quote(value)}')
        # A pattern is held against the directories as it is written, so a root with glob characters is listed twice.
        directories = {root.as_posix() + "/", _glob_escaped(root) + "/"}
        con.execute("SET allowed_directories = [" + ", ".join(map(quote, sorted(directories))) + "]")
        con.execute("SET enable_external_access = false")
        con.execute("SET lock_configuration = true")
    except duckdb.Error as error:
        con.close()
        found = _damage(error) or f"the store cannot be read: {error}"
        raise QueryError(found, where=str(root), remedy=_NAMING if _damage(error) else None) from None
    except QueryError:
        con.close()
        raise
    return con


_NO_POLARS_TYPE = ("INTERVAL", "TIME_NS", "TIMETZ", "TIME WITH TIME ZONE", "UNION(", "MAP(", "BIT", "BIGNUM", "VARINT")


def run(con: duckdb.DuckDBPyConnection, sql: str, rows: int | None = None) -> pl.DataFrame:
    """Run one SELECT on a connection made by :func:`connect` and return its rows, or the first of them.

    Raises
    ------
    QueryError
        It is not exactly one statement, not a SELECT, reaches outside the store, or fails.
    UnsupportedError
        It reads a view of rows that the connection was made without.
    """
    import duckdb
    import polars as pl

    try:
        # A line before the statement here as in the view below, so that every message counts lines alike.
        statements = con.extract_statements("\n" + sql.lstrip())
        if len(statements) != 1:
            raise QueryError(f"{len(statements)} SQL statements", expected="exactly one SELECT")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            found = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind} statement"
            raise QueryError(found, expected="a SELECT", remedy="The store is read-only for SQL")
        # As the body of a view, a statement cannot write: COPY, EXPLAIN ANALYZE and data-changing WITH are refused.
        con.execute(f"CREATE OR REPLACE TEMP VIEW tracekit_query AS\n{statements[0].query.lstrip()}")
        types = {row[0]: row[1] for row in con.execute("DESCRIBE tracekit_query").fetchall()}
        foreign = [name for name, kind in types.items() if any(word in kind for word in _NO_POLARS_TYPE)]
        if foreign:
            found = f"column {foreign[0]!r} is of type {types[foreign[0]]}, which a data frame cannot hold"
            raise QueryError(found, remedy="Cast it in the SELECT, for example to VARCHAR")
        limit = "" if rows is None else f" LIMIT {rows:d}"
        return pl.DataFrame(pl.scan_arrow_c_stream(con.sql(f"FROM tracekit_query{limit}")).collect())
    except (duckdb.Error, pl.exceptions.PolarsError) as error:
        if damage := _damage(error):
            raise QueryError(damage, remedy=_NAMING) from None
        if (lacking := _LACKING.search(str(error))) and lacking[1] in _ROWS:
            found = f"SQL cannot read {lacking[1]} of a store at a URL, only its requests, findings and results"
            raise UnsupportedError(found, remedy=COPY) from None
        raise QueryError(f"SQL failed: {_LINE.sub(_one_up, str(error))}") from None


_NAMING = "tracekit check STORE names it"


def _damage(error: Exception) -> str | None:
    """Return what an error of DuckDB's Parquet reader says; those of SQL and of files have classes of their own."""
    import duckdb

    return f"a file of the store is damaged ({error})" if type(error) is duckdb.Error else None


_LACKING = re.compile(r"^Catalog Error: Table with name (\w+) does not exist")
_LINE = re.compile(r"^LINE (\d+):", re.MULTILINE)


def _one_up(match: re.Match[str]) -> str:
    """Return the line's number in the statement as it was given, as wide as before: a caret stands below the line."""
    return f"LINE {int(match[1]) - 1}:".ljust(len(match[0]))
