"""What a report is made of, before anything is said about how it looks: text, tables, charts, and what made them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracekit.reports import queries
from tracekit.reports.text import decimals, fixed, number, scale
from tracekit.schema import Phase

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart
    from tracekit.reports.grid import Block
    from tracekit.store import Store, TraceInfo

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart as Vega-Lite, its title apart so that a page can set it as text."""

    spec: dict[str, Any]
    title: str
    about: str
    """What is true of all that is drawn, and how to read it."""
    hint: str = ""
    """What a reader can do with it."""

    @classmethod
    def of(cls, chart: Chart, hint: str = "") -> Drawing:
        """Take the title off a chart."""
        spec = chart.to_dict()
        title = spec.pop("title")
        return cls(spec, title["text"], " · ".join(filter(None, title.get("subtitle", []))), hint)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart or none, the tables of its numbers, and what makes them."""

    drawing: Drawing | None
    tables: Sequence[Block]
    commands: Sequence[str]
    """Command lines that give the same numbers and the same chart."""
    query: str | None = None
    """The query of the library whose SQL yields the numbers."""


@dataclass(frozen=True, slots=True)
class Section:
    """One question about a trace, and its answer or why there is none."""

    key: str
    title: str
    prose: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    """What to know before quoting it."""
    reason: str | None = None
    """Why the trace cannot answer."""


@dataclass(frozen=True, slots=True)
class Key:
    """One number worth remembering."""

    value: str
    what: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """All that is said about one trace."""

    trace: str
    headline: Sequence[str]
    keys: Sequence[Key]
    alerts: Sequence[str]
    """What the check found serious."""
    sections: Sequence[Section]


@dataclass(frozen=True, slots=True)
class Method:
    """A term, its formula and what it means."""

    term: str
    formula: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Report:
    """A report: what holds for all traces, the traces one by one, and how the numbers came about."""

    title: str
    lead: Sequence[str]
    parts: Sequence[Part]
    common: Sequence[Section]
    """Sections about several traces."""
    methods: Sequence[Method]
    references: Sequence[tuple[str, str]]
    """Text and address."""
    made_by: str

    @property
    def queries(self) -> list[queries.Query]:
        """The queries of the library that the figures name, each once."""
        sections = [*self.common, *(section for part in self.parts for section in part.sections)]
        names = dict.fromkeys(f.query for section in sections for f in section.figures if f.query)
        return [queries.find(name) for name in names]


@dataclass(frozen=True, slots=True)
class Subject:
    """One trace of a store, and how it is asked."""

    store: Store
    info: TraceInfo
    phase: Phase | None = None
    window: int | None = None
    intervals: bool = True
    seed: int = 0
    gain: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of :func:`tracekit.speedup` that say what runs on what and how drafts are accepted."""
    link: str | float | None = None
    """What offloaded experts come over."""
    alone: bool = True
    """Whether it is the report's only trace."""

    @property
    def has_machine(self) -> bool:
        """Whether it is said what the model runs on."""
        return any(name in self.gain for name in ("hardware", "bandwidth", "flops"))

    @property
    def selectors(self) -> dict[str, Any]:
        """Arguments that the functions for analysis share."""
        return {"trace": self.info.name, "phase": self.phase}

    @property
    def measured(self) -> dict[str, Any]:
        """The same for functions with intervals."""
        return self.selectors | {"intervals": self.intervals, "seed": self.seed}

    def query(self, name: str, **params: Any) -> pl.DataFrame:
        """Run a query of the library on the trace."""
        given = {key: value for key, value in (self.selectors | params).items() if value is not None}
        return queries.query(self.store, name, intervals=self.intervals, seed=self.seed, **given)

    def command(self, verb: str, *words: str, intervals: bool = True, **options: Any) -> str:
        """Return the command line that asks the same, from beside the store."""
        line = ["tracekit", verb, self.store.path.name, *words, "--trace", self.info.name]
        options |= {"phase": self.phase}
        if intervals:
            options |= {"seed": self.seed or None, "no_intervals": not self.intervals}
        return shlex.join([*line, *_options(options)])

    def compared_with(self, other: Subject) -> str:
        """Return the command line that compares the trace with another."""
        line = ["tracekit", "compare", self.store.path.name, "--trace-a", self.info.name, "--trace-b", other.info.name]
        options = {"phase": self.phase, "window": self.window, "seed": self.seed or None}
        return shlex.join([*line, *_options(options | {"no_intervals": not self.intervals})])


def _options(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return words


def figure(row: Row, name: str, factor: float = 1) -> str:
    """Return a figure of a row as a sentence has it, rounded by its interval; percent where the factor is 100."""
    value = scale(row[name], factor)
    if value is None or not math.isfinite(value):
        return number(value)
    return fixed(value, _places(row, name, factor)) + (" %" if factor == 100 else "")


def _places(row: Row, name: str, factor: float) -> int:
    """Return the decimals of a figure in a sentence: what its interval allows, and no more than can be remembered."""
    low, high = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    most = 1 if factor == 100 else 2
    return most if low is None or high is None or low == high else min(most, decimals((high - low) / 2 * factor))


def span(row: Row, name: str, factor: float = 1) -> str:
    """Return the interval of a figure of a row in words, empty where there is none."""
    low, high = (scale(row.get(f"{name}_{end}"), factor) for end in ("lo", "hi"))
    if low is None or high is None:
        return ""
    places = _places(row, name, factor)
    return f"{fixed(low, places)} to {fixed(high, places)}"


def said(row: Row, name: str, factor: float = 1) -> str:
    """Return a figure of a row as a sentence has it, with its interval where there is one."""
    ends = span(row, name, factor)
    return figure(row, name, factor) + (f" (95 % interval {ends})" if ends else "")
