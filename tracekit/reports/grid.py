"""Blocks of aligned columns that fit a given width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from tracekit.reports.text import align, display_width, fixed, interval, number, pad, scale, shorten

GAP = 2
SHORTEST = 12
"""Cells below which a text column is hidden rather than cut further."""

NAMED = 8
"""Hidden columns that are named."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading and a printable cell per row."""

    title: str
    cells: Sequence[str]
    right: bool = True
    """Numbers stand at the right, text at the left."""
    cut: bool = False
    """Whether entries may be cut where there is no room."""
    fold: bool = False
    """Whether what is cut goes on in a line below instead."""
    rank: int = 0
    """Where there is no room, columns of the highest rank go first, the last of them first."""
    gap: int = GAP
    """Blanks before the column."""
    name: str = ""
    """What a remark about hidden columns calls it; by default its heading."""

    @property
    def width(self) -> int:
        """Cells that the widest entry takes."""
        return max([display_width(self.title), *map(display_width, self.cells)])


@dataclass(frozen=True, slots=True)
class Block:
    """A titled table, with remarks under it."""

    columns: Sequence[Column]
    title: str = ""
    notes: Sequence[str] = field(default_factory=list)


def rounded(rows: Sequence[Mapping[str, Any]], name: str, *, factor: float = 1) -> list[str]:
    """Return one figure of each row, rounded as far as its interval (``name_lo``, ``name_hi``) says it is known."""
    cells = []
    for row in rows:
        low, high = (scale(row.get(f"{name}_{end}"), factor) for end in ("lo", "hi"))
        value = scale(row[name], factor)
        if factor == 100 and (low is None or high is None):
            cells.append(fixed(value, 1))  # percent of which nobody says how well it is known
        else:
            cells.append(number(value, None if low is None or high is None else (high - low) / 2))
    return align(cells)


def estimate(
    title: str, rows: Sequence[Mapping[str, Any]], name: str, *, factor: float = 1, rank: int = 0
) -> list[Column]:
    """Return a column of estimates, and if there are any the column of their intervals, of ``rank``."""
    pairs = [(scale(row.get(f"{name}_lo"), factor), scale(row.get(f"{name}_hi"), factor)) for row in rows]
    spans = [interval(low, high) for low, high in pairs]
    band = [Column("95 %", spans, right=False, rank=rank, gap=1, name=f"{name}_lo/hi")] if any(spans) else []
    return [Column(title, rounded(rows, name, factor=factor), name=name), *band]


def draw(blocks: Sequence[Block], width: int, *, bold: bool = False) -> str:
    """Return ``blocks`` as text no wider than ``width`` cells, headings in bold if ``bold``.

    A block that is too wide first has its columns of text cut (``…``), then columns hidden; the last line names them.
    """
    hidden: dict[str, None] = {}
    parts = ["".join(line.rstrip() + "\n" for line in _lines(block, width, bold, hidden)) for block in blocks]
    if hidden:
        names, rest = list(hidden)[:NAMED], len(hidden) - NAMED
        if rest > 0:
            names.append(f"{rest} more")
        remark = f"(no room for {', '.join(names)}; --format csv has every column)"
        parts.append("".join(line + "\n" for line in wrap(remark, width)))
    return "\n".join(parts)


def _lines(block: Block, width: int, bold: bool, hidden: dict[str, None]) -> list[str]:
    columns = list(block.columns)
    while len(columns) > 1 and _least(columns) > width:
        columns.pop(max(range(1, len(columns)), key=lambda i: (columns[i].rank, i)))
    hidden.update(dict.fromkeys(c.name or c.title for c in block.columns if not any(c is shown for shown in columns)))
    widths = _cut([min(column.width, width) for column in columns], columns, width)
    lines = [_strong(line, bold) for line in wrap(block.title, width)]
    if columns:
        if any(column.title for column in columns):
            lines.append(_strong(_row([c.title for c in columns], columns, widths), bold))
        lines += [
            line for cells in zip(*(c.cells for c in columns), strict=True) for line in _fold(cells, columns, widths)
        ]
    return lines + [line for note in block.notes for line in wrap(note, width)]


def _least(columns: Sequence[Column]) -> int:
    return sum(min(c.width, SHORTEST) if c.cut else c.width for c in columns) + _gaps(columns)


def _gaps(columns: Sequence[Column]) -> int:
    return sum(column.gap for column in columns[1:])


def _cut(widths: list[int], columns: Sequence[Column], width: int) -> list[int]:
    """Take what is too much from the widest column that may be cut, a cell at a time."""
    while sum(widths) + _gaps(columns) > width:
        texts = [i for i, column in enumerate(columns) if column.cut and widths[i] > SHORTEST]
        if not texts:
            break
        widths[max(texts, key=lambda i: widths[i])] -= 1
    return widths


def _fold(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    parts = [wrap(c, width) if column.fold else [c] for c, column, width in zip(cells, columns, widths, strict=True)]
    return [_row(line, columns, widths) for line in zip_longest(*(part or [""] for part in parts), fillvalue="")]


def _row(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    line = ""
    for i, (cell, column, width) in enumerate(zip(cells, columns, widths, strict=True)):
        line += " " * (column.gap if i else 0) + pad(shorten(cell, width), width, right=column.right)
    return line


def wrap(text: str, width: int) -> list[str]:
    """Return ``text`` as lines of at most ``width`` cells, broken between words where that is possible."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(shorten(word, width))
    return [line for line in lines if line]


def _strong(text: str, bold: bool) -> str:
    text = text.rstrip()
    return f"\x1b[1m{text}\x1b[0m" if bold and text else text
