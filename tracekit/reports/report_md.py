"""A report as Markdown, for a pull request or an issue: the answer, the tables and the findings, without the charts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from tracekit.reports.export import markdown_text
from tracekit.reports.grid import Block
from tracekit.reports.report_parts import Part, Report, Section
from tracekit.reports.text import printable

_LONG = 12
"""Rows from which a table is folded away."""

_FENCE = "```"


def markdown(report: Report) -> str:
    """Return a report as Markdown that GitHub and GitLab show."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def _lines(report: Report) -> Iterator[str]:
    several = len(report.parts) > 1
    yield from [f"# {_said(report.title)}", ""]
    for part in report.parts:
        yield from [f"## Trace “{_said(part.trace)}”", ""] if several else []
        yield from _short(part)
    for section in report.common:
        yield from _section(section, 2)
    for part in report.parts:
        yield from [f"## Details of trace “{_said(part.trace)}”", ""] if several else []
        for section in part.sections:
            yield from _section(section, 2 + several)
    yield f"Made by {_said(report.made_by)}; `tracekit report --format html` adds the charts, the methods and the SQL."


def _said(text: str) -> str:
    """Return text that is no markup, and calls nobody, wherever the page is shown."""
    return re.sub(r"([*_\[\]~#@!])", r"\\\1", markdown_text(text))


def _summary(text: str) -> str:
    """Return the same within HTML, where a backslash is a letter."""
    return escape(printable(text)).replace("[", "&#91;").replace("@", "&#64;")


def _short(part: Part) -> Iterator[str]:
    for text in part.headline:
        yield from [_said(text), ""]
    for alert in part.alerts:
        yield from [f"> **Serious:** {_said(alert)}", ""]


def _section(section: Section, level: int) -> Iterator[str]:
    yield from ["#" * level + f" {_said(section.title)}", ""]
    for text in section.prose:
        yield from [_said(text), ""]
    if section.reason is not None:
        yield from [f"_There is no answer here: {_said(section.reason)}._", ""]
    for note in section.notes:
        yield from [f"> Note: {_said(note)}", ""]
    for figure in section.figures:
        for block in figure.tables:
            yield from _table(block)
        if made := [command for command in figure.commands if command and " chart " not in command]:
            yield from ["<details><summary>How to make this</summary>", "", *_code(made), "", "</details>", ""]


def _code(lines: Sequence[str]) -> list[str]:
    # A name may hold the fence.
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(len(_FENCE), longest + 1)
    return [f"{fence}sh", *(line.replace("\n", " ") for line in lines), fence]


def _table(block: Block) -> Iterator[str]:
    columns = list(block.columns)
    rows = list(zip(*(column.cells for column in columns), strict=True))
    fold = len(rows) >= _LONG
    if fold:
        yield from [f"<details><summary>{_summary(block.title) or 'Table'}</summary>", ""]
    elif block.title:
        yield from [_said(block.title), ""]
    if columns:
        yield "| " + " | ".join(_said(column.title) or " " for column in columns) + " |"
        yield "| " + " | ".join("---:" if column.right else "---" for column in columns) + " |"
        for cells in rows:
            yield "| " + " | ".join(_said(cell.strip()) for cell in cells) + " |"
        yield ""
    for note in block.notes:
        yield from [_said(note), ""]
    yield from ["</details>", ""] if fold else []
