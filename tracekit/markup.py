"""HTML for Jupyter: tables whose every text is escaped, for names come out of files that somebody else wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

MISSING = "–"
"""What a table shows where there is no value."""

Cell = str | int | float | bool | None


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, title: str = "", notes: Iterable[str] = ()) -> str:
    """Return an HTML table with its title above and its notes below; numbers stand on the right.

    Floats are shown with four significant digits; columns without names have no heading.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    parts = [f"<p>{escape(title)}</p>"] if title else []
    parts += [f"<table>{f'<thead><tr>{head}</tr></thead>' if any(columns) else ''}<tbody>{body}</tbody></table>"]
    parts += [f"<p><small>{escape(note)}</small></p>" for note in notes]
    return f"<div>{''.join(parts)}</div>"


def _cell(value: Cell) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, int | float):
        return f'<td style="text-align: right">{_number(value)}</td>'
    return f'<td style="text-align: left">{escape(MISSING if value is None else value)}</td>'


def _number(value: int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else MISSING
