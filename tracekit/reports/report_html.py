"""A report as one page of HTML that needs nothing else: styles, charts and the library that draws them are inside.

Whatever a trace, a model or a label is called is text: everything passes :func:`html.escape`, or lies in JSON that
cannot end its script element. Beside that the page's own policy allows no request and no script but its own two.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from importlib.resources import files

from tracekit.reports.display import ScriptSafe
from tracekit.reports.grid import Block, Column
from tracekit.reports.report_charts import recoloured
from tracekit.reports.report_parts import Drawing, Figure, Part, Report, Section
from tracekit.reports.text import printable

MOST_LISTED = 3
"""Traces whose sections are in the table of contents."""

_WIDE = 60
"""Letters from which a cell of text gets room to wrap in."""


def page(report: Report) -> str:
    """Return a report as HTML."""
    drawings: list[Drawing] = []
    body = "\n".join([*_header(report), *_contents(report), "<main id=main>", *_main(report, drawings), "</main>"])
    data = {"charts": [drawing.spec for drawing in drawings], "colours": recoloured()}
    scripts = [_library(), _text("page.js")] if drawings else []
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_policy(scripts))}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta name="generator" content="{escape(report.made_by)}">',
            f"<title>{_said(report.title)}</title>",
            f"<style>{_text('page.css')}</style>",
            "</head>",
            "<body>",
            '<a class=skip href="#main">Skip to the report</a>',
            body,
            (
                f"<footer>Made by {_said(report.made_by)}. The page holds all its data and asks nothing of any server."
                "<noscript> The charts need JavaScript; their tables do not.</noscript></footer>"
            ),
            f'<script type="application/json" id=charts>{json.dumps(data, cls=ScriptSafe)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _policy(scripts: Sequence[str]) -> str:
    """Return a policy under which the page can load nothing and run nothing but these scripts."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    styles = "style-src 'unsafe-inline'; img-src data: blob:"
    return f"default-src 'none'; script-src {allowed}; {styles}; base-uri 'none'; form-action 'none'"


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    # The library holds no end of a script element, but nothing promises that the next version does not.
    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg] # the snippet has a default
    return bundle.replace("</script", "<\\/script")


def _text(name: str) -> str:
    return files("tracekit.reports").joinpath(name).read_text(encoding="utf-8")


def _said(text: str) -> str:
    return escape(printable(text).replace(" %", "\u00a0%"))


def _paragraphs(texts: Sequence[str], kind: str = "") -> Iterator[str]:
    start = f"<p class={kind}>" if kind else "<p>"
    return (f"{start}{_said(text)}</p>" for text in texts)


def _header(report: Report) -> Iterator[str]:
    yield f"<header><h1>{_said(report.title)}</h1>"
    yield from _paragraphs(report.lead, "lead")
    yield "</header>"


def _contents(report: Report) -> Iterator[str]:
    yield '<nav aria-label="Contents"><ol>'
    yield '<li><a href="#short">In short</a></li>'
    for section in report.common:
        yield f'<li><a href="#{section.key}">{_said(section.title)}</a></li>'
    for index, part in enumerate(report.parts):
        links = [f'<li><a href="#{_id(index, s)}">{_said(s.title)}</a></li>' for s in part.sections]
        if len(report.parts) > 1:
            # The sections of many traces would make a list too long to find anything in.
            inner = ["<ol>", *links, "</ol>"] if len(report.parts) <= MOST_LISTED else []
            links = [f'<li><a href="#trace-{index}">Trace “{_said(part.trace)}”</a>', *inner, "</li>"]
        yield from links
    yield '<li><a href="#methods">Methods</a></li>'
    yield from ['<li><a href="#sql">Queries</a></li>'] if report.queries else []
    yield "</ol></nav>"


def _id(index: int, section: Section) -> str:
    return f"{section.key}-{index}"


def _main(report: Report, drawings: list[Drawing]) -> Iterator[str]:
    several = len(report.parts) > 1
    yield "<section id=short class=short><h2>In short</h2>"
    for part in report.parts:
        yield from [f"<h3>Trace “{_said(part.trace)}”</h3>"] if several else []
        yield from _short(part)
    yield "</section>"
    for section in report.common:
        yield from _section(section, section.key, 2, drawings)
    for index, part in enumerate(report.parts):
        yield from [f"<article id=trace-{index}><h2>Trace “{_said(part.trace)}”</h2>"] if several else []
        for section in part.sections:
            yield from _section(section, _id(index, section), 2 + several, drawings)
        yield from ["</article>"] if several else []
    yield from _methods(report)
    yield from _queries(report)


def _short(part: Part) -> Iterator[str]:
    yield from _paragraphs(part.headline)
    yield from _paragraphs(part.alerts, "alert")
    if part.keys:
        yield "<dl class=keys>"
        for key in part.keys:
            interval = f"<span class=interval>95\u00a0%: {_said(key.interval)}</span>" if key.interval else ""
            yield f"<div><dt>{_said(key.what)}{interval}</dt><dd>{_said(key.value)}</dd></div>"
        yield "</dl>"


def _section(section: Section, name: str, level: int, drawings: list[Drawing]) -> Iterator[str]:
    yield f"<section id={name}><h{level}>{_said(section.title)}</h{level}>"
    yield from _paragraphs(section.prose)
    if section.reason is not None:
        yield f"<p class=reason>There is no answer here: {_said(section.reason)}.</p>"
    yield from _paragraphs(section.notes, "note")
    for figure in section.figures:
        yield from _figure(figure, drawings)
    yield "</section>"


def _figure(figure: Figure, drawings: list[Drawing]) -> Iterator[str]:
    drawing = figure.drawing
    if drawing is not None:
        index = len(drawings)
        drawings.append(drawing)
        label = escape(f"{printable(drawing.title)}. The table below has the numbers.")
        yield f"<figure><figcaption><strong>{_said(drawing.title)}</strong>"
        yield f"<span class=about>{_said(drawing.about)}</span></figcaption>"
        yield f"<div class=controls id=controls-{index}></div>"
        yield f'<div class=chart id=chart-{index} role=group aria-label="{label}"></div>'
        yield from _paragraphs([drawing.hint] if drawing.hint else [], "hint")
        yield "</figure>"
    if figure.tables:
        tables = [part for block in figure.tables for part in _table(block)]
        yield from tables if drawing is None else _more("Table", tables)
    made = "\n".join(filter(None, figure.commands))
    if made:
        link = ""
        if figure.query:
            link = f'<p>The numbers in SQL: <a href="#sql-{figure.query}">{_said(figure.query)}</a>.</p>'
        yield from _more("How to make this", [f"<pre><code>{_said_lines(made)}</code></pre>", link])


def _said_lines(text: str) -> str:
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def _more(title: str, content: Sequence[str], name: str = "", kind: str = "more") -> Iterator[str]:
    yield f'<details class="{kind}"{f" id={name}" if name else ""}><summary>{_said(title)}</summary>'
    yield from content
    yield "</details>"


def _table(block: Block) -> Iterator[str]:
    columns = list(block.columns)
    if columns:
        label = escape(printable(block.title) or "Table")
        yield f'<div class=scroll tabindex=0 role=region aria-label="{label}"><table>'
        yield from [f"<caption>{_said(block.title)}</caption>"] if block.title else []
        kinds = [_kind(column) for column in columns]
        if any(column.title for column in columns):
            heads = (f"<th scope=col{kind}>{_said(c.title)}</th>" for c, kind in zip(columns, kinds, strict=True))
            yield f"<thead><tr>{''.join(heads)}</tr></thead>"
        yield "<tbody>"
        for cells in zip(*(column.cells for column in columns), strict=True):
            first, *others = (_cell(text, c, kind) for text, c, kind in zip(cells, columns, kinds, strict=True))
            row = first.replace("<td", "<th scope=row", 1).replace("</td>", "</th>")
            yield f"<tr>{row}{''.join(others)}</tr>"
        yield "</tbody></table></div>"
    yield from _paragraphs(block.notes, "about")


def _kind(column: Column) -> str:
    if column.right:
        return " class=n"
    longest = max(map(len, column.cells), default=0)
    return " class=w" if longest > _WIDE else " class=s"


def _cell(text: str, column: Column, kind: str) -> str:
    """Return a cell; blanks that set decimal points in line become as wide as digits are."""
    bare = text.rstrip(" ") if column.right else text.replace("  ", "\u2003")
    blanks = len(text) - len(bare) if column.right else 0
    if blanks and "." not in bare:
        bare, blanks = bare + "\u2008", blanks - 1
    return f"<td{kind}>{escape(bare)}{chr(0x2007) * blanks}</td>"


def _methods(report: Report) -> Iterator[str]:
    yield "<section id=methods><h2>Methods</h2><dl class=methods>"
    for method in report.methods:
        yield f"<dt>{_said(method.term)}</dt><dd class=formula>{_said(method.formula)}</dd>"
        yield f"<dd>{_said(method.meaning)}</dd>"
    yield "</dl><h3>References</h3><ul>"
    for text, address in report.references:
        link = f' <a href="{escape(address)}" rel=noreferrer>{_said(address)}</a>' if address else ""
        yield f"<li>{_said(text)}{link}</li>"
    yield "</ul></section>"


def _queries(report: Report) -> Iterator[str]:
    if report.queries:
        yield "<section id=sql><h2>Queries</h2>"
        yield "<p>The SQL behind the charts: for DuckDB, over the views that <code>tracekit views</code> prints, or by "
        yield "name with <code>tracekit query</code>.</p>"
    for query in report.queries:
        sql = f"<pre><code>{_said_lines(query.sql.strip())}</code></pre>"
        yield from _more(f"{query.name}: {query.title}", [sql], f"sql-{query.name}", "more sql")
    yield from ["</section>"] if report.queries else []
