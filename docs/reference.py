"""The pages that say what the package says itself: every command, every query, every view."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import duckdb

from tracekit.cli import command
from tracekit.reports.queries import Parameter, Query, queries
from tracekit.store import results
from tracekit.store.views import definitions


def write(folder: Path) -> None:
    """Write the pages; one that is as it was is left alone, so that a second build is quick."""
    folder.mkdir(exist_ok=True)
    for name, page in (("commands", commands()), ("queries", library()), ("results", result_views())):
        path, text = folder / f"{name}.md", "\n".join(page) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def plain(text: str) -> str:
    """Return text in which nothing is taken for markup but `code`."""
    pieces = re.split(r"(`[^`|]+`)", text)
    pieces[::2] = (re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", piece) for piece in pieces[::2])
    return "".join(pieces)


def code(text: str) -> str:
    """Return text as code inside a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a table, and none if it has no rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    if body:
        names = list(head)
        yield from ("", f"| {' | '.join(names)} |", "|" + "---|" * len(names), *body, "")


def commands() -> Iterator[str]:
    """Yield the page of the commands, from click."""
    context = click.Context(command, info_name="tracekit", **command.context_settings)
    yield from ("# Commands", "", *_paragraphs(command.help or ""))
    yield from _verbs(command, context, 2)


def _verbs(group: click.Group, context: click.Context, level: int) -> Iterator[str]:
    for name in group.list_commands(context):
        verb = group.get_command(context, name)
        assert verb is not None
        inner = click.Context(verb, info_name=name, parent=context)
        yield from (f"{'#' * level} {inner.command_path}", "", *_paragraphs(verb.help or ""))
        usage = " ".join([inner.command_path, *verb.collect_usage_pieces(inner)])
        yield from ("```text", usage, "```", "")
        records = [parameter.get_help_record(inner) for parameter in verb.get_params(inner)]
        options = ((code(names), plain(text)) for names, text in filter(None, records) if text)
        yield from table(("option", "meaning"), options)
        yield from _paragraphs(verb.epilog or "")
        if isinstance(verb, click.Group):
            yield from _verbs(verb, inner, level + 1)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a help text: paragraphs, and as they stand those that click is told to leave as they are."""
    for part in re.split(r"\n\s*\n", "\n".join(line.rstrip() for line in text.splitlines()).strip()):
        if part.lstrip().startswith("\b"):
            yield from ("```text", part.replace("\b", "").strip("\n"), "```", "")
        else:
            yield from (plain(" ".join(part.split())), "")


def library() -> Iterator[str]:
    """Yield the page of the queries, from their headers."""
    yield from ("# Queries", "")
    yield "Run one with `tracekit query STORE NAME`, or its SQL in a plain `duckdb` shell: see [SQL](../sql.md)."
    yield ""
    for query in queries():
        yield from (f"## {query.name}", "", f"**{plain(query.title)}**", "")
        for paragraph in re.split(r"\n\s*\n", query.text):
            yield from (plain(" ".join(paragraph.split())), "")
        if query.needs:
            yield from ("Needs " + ", ".join(dict.fromkeys(f"`{n.metric}`" for n in query.needs)) + ".", "")
        yield from table(("parameter", "type", "default", "meaning"), map(_parameter, query.parameters))
        yield from table(
            ("column", "type", "meaning"), ((code(c.name), c.type, plain(_said(c.text, c.unit))) for c in query.columns)
        )
        yield from _statement(query)


def _parameter(parameter: Parameter) -> tuple[str, str, str, str]:
    default = "" if parameter.default is None else code(str(parameter.default))
    return code(parameter.name), parameter.type, default, plain(_said(parameter.text, parameter.unit))


def _said(text: str, unit: str | None) -> str:
    return text if unit is None or f"[{unit}]" in text else f"{text} [{unit}]"


def _statement(query: Query) -> Iterator[str]:
    lines = query.sql.splitlines()
    start = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    yield from ("<details><summary>SQL</summary>", "", "```sql", *lines[start:], "```", "", "</details>", "")


def result_views() -> Iterator[str]:
    """Yield the tables of the views of results, by what they really have."""
    yield from ("# Views of results", "", "What they have in common is said in [the store](../store.md).", "")
    with duckdb.connect() as connection:
        for name, body in definitions(Path(), []).items():
            if name in results.KINDS:
                described = connection.execute(f"DESCRIBE {body}").fetchall()
                kinds: dict[str, list[str]] = {}
                for column, kind, *_ in described:
                    kinds.setdefault(kind, []).append(code(column))
                yield from (f"## {name}", "")
                yield from table(("type", "columns"), ((kind, ", ".join(columns)) for kind, columns in kinds.items()))
