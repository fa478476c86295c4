"""Text for a terminal: safe characters, display width, and numbers rounded as far as they are known."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import accumulate

NOISE = 1e-12
"""What is smaller comes from rounding in the arithmetic."""

MISSING = "–"
"""What a table shows where there is no value."""

_JOINERS = "\u200c\u200d"  # part of ordinary words and emoji; they move no cursor


def printable(text: str) -> str:
    r"""Return ``text`` with every character that could drive a terminal escaped (``\n``, ``\x1b``, ``\u202e``).

    Names come out of files that somebody else wrote: control characters, line breaks and marks that
    reorder text stay visible instead of taking effect.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) for char in text)


def _escape(char: str) -> str:
    if char in _JOINERS or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
        return char
    return char.encode("unicode_escape").decode("ascii")


def display_width(text: str) -> int:
    """Return the number of terminal cells that ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(_cells(char) for char in text)


def _cells(char: str) -> int:
    if char in _JOINERS or unicodedata.category(char) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """Return ``text`` cut to ``width`` cells, ``…`` in its middle: what tells names apart is often at their end."""
    if display_width(text) <= width:
        return text
    head = _first(text, width // 2)
    return head + "…" + _first(text[::-1], width - 1 - display_width(head))[::-1]


def _first(text: str, width: int) -> str:
    """Return the first characters of ``text``, as many as ``width`` cells hold."""
    used = accumulate(map(_cells, text))
    return "".join(char for char, cells in zip(text, used, strict=True) if cells <= width)


def pad(text: str, width: int, *, right: bool) -> str:
    """Return ``text`` filled with blanks to ``width`` cells, on its left if ``right``."""
    blanks = " " * max(0, width - display_width(text))
    return blanks + text if right else text + blanks


def decimals(half_width: float) -> int:
    """Return the decimals that show two significant digits of an interval's half-width."""
    return min(8, max(0, 1 - math.floor(math.log10(half_width))))


def number(value: float | None, half_width: float | None = None) -> str:
    """Return ``value`` rounded by the half-width of its interval, or to four significant digits without one."""
    if value is None or math.isnan(value):
        return MISSING
    if isinstance(value, int):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if half_width is not None and math.isfinite(half_width) and half_width > max(NOISE, abs(value) * 1e-9):
        return fixed(value, decimals(half_width))
    if abs(value) < NOISE:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:.3g}" if magnitude < -5 else fixed(value, max(0, 3 - magnitude))


def fixed(value: float | None, places: int) -> str:
    """Return ``value`` with a number of decimals."""
    if value is None:
        return MISSING
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text


def count(value: int | None) -> str:
    """Return an integer with its thousands set apart."""
    return MISSING if value is None else f"{value:,}"


def interval(low: float | None, high: float | None) -> str:
    """Return ``[low, high]`` rounded to two significant digits of its half-width, empty where there is none."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    half = (high - low) / 2
    return f"[{number(low, half)}, {number(high, half)}]"


def align(cells: Sequence[str]) -> list[str]:
    """Return ``cells`` filled on the right so that their decimal points stand in one line."""
    tails = [len(cell) - cell.find(".") if "." in cell else 0 for cell in cells]
    longest = max(tails, default=0)
    return [cell + " " * (longest - tail) for cell, tail in zip(cells, tails, strict=True)]


def scale(value: float | None, factor: float) -> float | None:
    """Return ``value * factor``, None where there is no value."""
    return None if value is None else value * factor
