"""What people have measured: times of decoding steps by batch size and draft length, checked, one value a cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tracekit.economics.calibration.forms import Entry, entries
from tracekit.economics.calibration.names import (
    RATIO,
    REQUEST,
    REQUEST_THROUGHPUT,
    SPEEDUP,
    STEP,
    THROUGHPUT,
    TOKEN,
    VERIFICATION,
)
from tracekit.economics.calibration.rows import tables
from tracekit.errors import SourceError

if TYPE_CHECKING:
    from tracekit.economics.calibration.rows import Measured

QUANTITIES = (STEP, VERIFICATION, TOKEN, RATIO, SPEEDUP)
"""What a cell's value may be: seconds of a step with its drafting, of the verification alone, or of an output token of
one request; the verification ratio; the speedup."""

_MOST = 1 << 20
"""Largest batch, draft length or context that is believed."""

_ALIKE = 1e-9
_ALIKE_CONTEXTS = 1.1


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured at one batch size and draft length."""

    batch_size: int
    drafts: int
    """K; 0 without speculation."""
    quantity: str
    """One of `QUANTITIES`."""
    value: float
    """Seconds, or a ratio."""
    where: str
    acceptance_length: float | None = None
    context: float | None = None
    """Mean tokens of context per request, where the file tells its lengths."""
    repeats: int = 1
    """Runs that the value is the mean of."""
    spread: float | None = None
    """Their standard deviation, as a share of the value."""
    declared: bool = False
    """Whether the row says which repetition it is."""

    def __str__(self) -> str:
        return f"batch size {self.batch_size}, {self.drafts} drafts"

    @property
    def needs_acceptance(self) -> bool:
        """Whether it takes an acceptance length to make a step of it."""
        return self.drafts > 0 and self.quantity in (TOKEN, SPEEDUP) and self.acceptance_length is None

    @property
    def said(self) -> str:
        """What the cell says, as messages put it."""
        ratio = self.quantity in (RATIO, SPEEDUP)
        return f"a {self.quantity} of {self.value:.6g}" if ratio else f"{self.value:.6g} s a {self.quantity}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Measured cells, ordered by batch size, draft length and context, and what to know of them."""

    cells: tuple[Cell, ...]
    notes: tuple[str, ...]


def read_benchmark(measured: Measured, *, metric: str | None = None, repeats: bool = False) -> Benchmark:
    """Read measurements and check them.

    Parameters
    ----------
    measured
        A file, a frame, a mapping, or several of them. Files are CSV, TSV, JSON, JSON lines or Parquet with a row a
        measurement, or what vLLM's and SGLang's benchmarks write. ``FILE:key=value,…`` says of a file what it does not
        say itself, such as ``latency.json:batch_size=8,output_len=128``.
    metric
        The column that counts, where several say how long a step takes.
    repeats
        Whether rows of one cell are repetitions, to be averaged. Otherwise rows that differ contradict each other,
        unless a column (``repeat``, ``run``, ``seed``, …) numbers them.

    Raises
    ------
    SourceError
        A file is damaged, empty, ambiguous or contradicts itself, or holds what cannot be measured.
    UsageError
        Nothing is given.
    """
    cells: list[Cell] = []
    notes: dict[str, None] = {}
    for table in tables(measured):
        for entry in entries(table, metric):
            cells.append(_cell(entry, notes))
            notes.update(dict.fromkeys(entry.notes))
    return Benchmark(merged(_alike_contexts(cells), repeats=repeats), tuple(notes))


def _alike_contexts(cells: list[Cell]) -> list[Cell]:
    """Give cells whose contexts differ by little one context: lengths of outputs are never quite the same."""
    lengths = sorted({cell.context for cell in cells if cell.context is not None})
    shared: dict[float, float] = {}
    first = 0.0
    for length in lengths:
        first = first if shared and length <= _ALIKE_CONTEXTS * first else length
        shared[length] = first
    return [cell if cell.context is None else replace(cell, context=shared[cell.context]) for cell in cells]


def merged(cells: Sequence[Cell], *, repeats: bool = False) -> tuple[Cell, ...]:
    """Return one cell for each batch size, draft length, context and quantity: repetitions are averaged.

    Raises
    ------
    SourceError
        Two values are given for one cell, and nothing says that they are repetitions.
    """

    def key(cell: Cell) -> tuple[int, int, float, str]:
        return cell.batch_size, cell.drafts, -1.0 if cell.context is None else cell.context, cell.quantity

    return tuple(_mean(list(same), repeats) for _, same in groupby(sorted(cells, key=key), key))


def _mean(same: list[Cell], repeats: bool) -> Cell:
    first = same[0]
    if len(same) == 1:
        return first
    other = next((cell for cell in same if not math.isclose(cell.value, first.value, rel_tol=_ALIKE)), None)
    if other is not None and not repeats and not all(cell.declared for cell in same):
        raise SourceError(
            f"{first} has {first.said} in {first.where} and {other.said} in {other.where}",
            expected="one value a cell",
            remedy="Repetitions are averaged: say so with --repeats, or number them in a column 'repeat'",
        )
    runs = sum(cell.repeats for cell in same)
    mean = sum(cell.value * cell.repeats for cell in same) / runs
    # Runs within a file vary about its mean, and the files' means about theirs.
    square = sum(
        cell.repeats * (cell.value - mean) ** 2 + (cell.repeats - 1) * ((cell.spread or 0.0) * cell.value) ** 2
        for cell in same
    )
    lengths = [cell.acceptance_length for cell in same if cell.acceptance_length is not None]
    return replace(
        first,
        value=mean,
        repeats=runs,
        spread=math.sqrt(square / (runs - 1)) / mean,
        acceptance_length=sum(lengths) / len(lengths) if lengths else None,
    )


def _cell(entry: Entry, notes: dict[str, None]) -> Cell:
    read = _Reading(entry)
    batch = read.whole("batch_size", 1)
    if batch is None:
        raise SourceError(
            "does not say its batch size",
            where=entry.where,
            expected="a column batch_size",
            remedy="Or give it beside the file: FILE:batch_size=8",
        )
    length = read.number("acceptance_length", 1.0)
    drafts = _drafts(entry, read, length)
    if drafts is None:
        drafts = 0
        if entry.quantity in (RATIO, SPEEDUP):
            raise SourceError(
                f"has a {entry.quantity} but not the draft length",
                where=entry.where,
                expected="a column drafts",
                remedy="Or give it beside the file: FILE:drafts=3",
            )
        notes["rows that say nothing of drafts are taken as measured without speculation"] = None
    if length is not None and length > (drafts + 1) * (1 + 1e-6):
        raise SourceError(
            f"has the acceptance length {length:g} with {drafts} drafts",
            where=entry.where,
            expected=f"1 to {drafts + 1}: the tokens that a step emits, its own one included",
        )
    quantity, value = _value(entry, read, batch)
    if quantity in (RATIO, SPEEDUP) and drafts == 0:
        raise SourceError(f"has a {quantity} without drafts", where=entry.where, expected="drafts of at least 1")
    if quantity == VERIFICATION and drafts == 0:
        quantity = STEP
    prompt, output = read.number("input_len", 0.0), read.number("output_len", 0.0)
    context = read.number("context", 0.0)
    if context is None and prompt is not None and output is not None:
        context = prompt + output / 2
    return Cell(
        batch_size=batch,
        drafts=drafts,
        quantity=quantity,
        value=value,
        where=entry.where,
        acceptance_length=length if drafts else None,
        context=context,
        repeats=entry.runs,
        spread=entry.spread,
        declared="repeat" in entry.fields,
    )


def _drafts(entry: Entry, read: _Reading, length: float | None) -> int | None:
    drafts, window = read.whole("drafts", 0), read.whole("window", 1)
    if drafts is not None and window is not None and window != drafts + 1:
        raise SourceError(
            f"{entry.fields['drafts'][0]} is {drafts} and {entry.fields['window'][0]} is {window}",
            where=entry.where,
            expected="one token more than drafts, the last committed one",
        )
    if drafts is None and window is not None:
        drafts = window - 1
    if drafts is None and length is not None and length > 1:
        raise SourceError(
            f"has the acceptance length {length:g}, so it was measured with speculation, but not the draft length",
            where=entry.where,
            expected="a column drafts",
            remedy="Or give it beside the file: FILE:drafts=3",
        )
    return drafts


def _value(entry: Entry, read: _Reading, batch: int) -> tuple[str, float]:
    """Return the quantity of a cell and its value in seconds, or as a ratio."""
    value = read.positive(entry.column, entry.value) * entry.scale
    if entry.quantity == THROUGHPUT:
        return TOKEN, batch / value
    if entry.quantity == REQUEST_THROUGHPUT:
        return TOKEN, 1 / value
    if entry.quantity == REQUEST:
        return TOKEN, _per_token(entry, read, value)
    return entry.quantity, value


def _per_token(entry: Entry, read: _Reading, latency: float) -> float:
    """Return the seconds per output token of a request that took ``latency`` seconds."""
    output, first = read.number("output_len", 0.0), read.number("ttft_s", 0.0)
    if output is None:
        raise SourceError(
            f"{entry.column} may be of a step, a token or a whole request",
            where=entry.where,
            expected="the name step_…, tpot_… or verify_…, or for whole requests an output_len as well",
            remedy="The length of the outputs can be given beside the file: FILE:output_len=128",
        )
    tokens = output - (first is not None)
    if tokens < 1 or (first is not None and first >= latency):
        raise SourceError(
            f"a latency of {latency:g} s for {output:g} tokens"
            + (f", the first after {first:g} s" if first is not None else ""),
            where=entry.where,
            expected="time for at least one decoding step",
        )
    return (latency - (first or 0.0)) / tokens


class _Reading:
    """The fields of an entry as numbers."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def number(self, name: str, least: float) -> float | None:
        """Return a field as a number, None where it is not there."""
        found = self._entry.fields.get(name)
        if found is None:
            return None
        column, value = found
        number = self._parse(column, value)
        if not least <= number <= _MOST:
            raise self._wrong(column, value, f"{least:g} to {_MOST}")
        return number

    def whole(self, name: str, least: int) -> int | None:
        """Return a field as a whole number, None where it is not there."""
        number = self.number(name, least)
        if number is not None and not number.is_integer():
            raise self._wrong(*self._entry.fields[name], "a whole number")
        return None if number is None else int(number)

    def positive(self, column: str, value: Any) -> float:
        """Return a value that has to be a positive number."""
        number = self._parse(column, value)
        if not 1e-12 < number < 1e12:
            raise self._wrong(column, value, "a positive number")
        return number

    def _parse(self, column: str, value: Any) -> float:
        convert: Callable[[Any], float] = float
        try:
            number = math.nan if isinstance(value, bool) or value is None else convert(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(column, value, "a number")
        return number

    def _wrong(self, column: str, value: Any, expected: str) -> SourceError:
        empty = value is None or (isinstance(value, str) and not value.strip())
        return SourceError(
            f"{column} is {'empty' if empty else str(value)[:60]}", where=self._entry.where, expected=expected
        )
