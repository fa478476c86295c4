"""The query library: the files in ``queries/``, what their headers promise, and how to run them.

A query is one SELECT in DuckDB's SQL over the views of a store. It reads its parameters with
``getvariable('name')`` and holds their defaults, so the same file runs unchanged in a plain ``duckdb`` shell.
Its header is the documentation and is checked against the columns that the query really returns::

    -- One sentence that says what it answers.
    --
    -- What a row is, and what else to know.
    --
    -- needs: windows(by=label, max_window=$window), load        (results to compute first, or: nothing)
    -- param window INTEGER = 4: meaning [unit]
    -- column trace VARCHAR: meaning [unit]
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from tracekit.analysis.ensure import StoreLike, as_store, ensure, warn_of
from tracekit.analysis.gains import speedup, step_time
from tracekit.errors import QueryError, TracekitWarning, UsageError, did_you_mean
from tracekit.reports.files import shipped
from tracekit.schema import PHASES, Phase
from tracekit.store import results
from tracekit.store.answers import MODELLED

if TYPE_CHECKING:
    import polars as pl

    from tracekit.store import Store

Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a query."""

    name: str
    type: str
    """``VARCHAR``, ``INTEGER`` for a positive number, or ``DOUBLE`` for a number from 0 on."""
    default: Value
    text: str
    unit: str | None = None

    def parse(self, value: Any) -> Value:
        """Return a value given by the user as this parameter's type, None meaning the default.

        Raises
        ------
        UsageError
            The value is not of the type, not positive (a fraction: not in [0, 1]), or not a phase.
        """
        if value is None:
            return None
        if self.type == "INTEGER":
            if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
                return value
            raise UsageError(f"{self.name} = {value!r}", expected="a positive whole number")
        if self.type == "DOUBLE":
            return self._number(value)
        if not isinstance(value, str):
            raise UsageError(f"{self.name} = {value!r}", expected="text")
        if self.name == "phase" and value not in PHASES:
            raise UsageError(f"{self.name} = {value!r}", expected="one of " + ", ".join(PHASES))
        return value

    def _number(self, value: Any) -> float:
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
        most = 1.0 if self.unit == "fraction" else sys.float_info.max
        if not 0 <= number <= most:
            span = "from 0 to 1" if self.unit == "fraction" else "from 0 on"
            raise UsageError(f"{self.name} = {value!r}", expected=f"a number {span}")
        return number


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a query's result."""

    name: str
    type: str
    text: str
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """A result that a query reads: the metric and the arguments to compute it with."""

    metric: str
    arguments: Mapping[str, str]
    """As written: a word, a number or ``$parameter``; several, separated by blanks or ``1..256``, make a tuple."""

    def bind(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Return the arguments with the query's parameters put in, without those that are not given."""
        bound: dict[str, Any] = {}
        for name, text in self.arguments.items():
            items = [item for word in text.split() for item in _arguments(word, values) if item is not None]
            if items:
                bound[name] = tuple(dict.fromkeys(items)) if " " in text or ".." in text else items[0]
        return bound


@dataclass(frozen=True, slots=True)
class Query:
    """One file of the query library."""

    name: str
    title: str
    text: str
    """What a row is, and what else to know."""
    needs: tuple[Need, ...]
    parameters: tuple[Parameter, ...]
    columns: tuple[Column, ...]
    sql: str

    def bind(self, given: Mapping[str, Any]) -> dict[str, Value]:
        """Return the values of the parameters that were given, checked and of the right type.

        Raises
        ------
        UsageError
            There is no such parameter, or its value is of the wrong type.
        """
        known = {p.name: p for p in self.parameters}
        for name in given:
            if name not in known:
                raise _unknown(f"query {self.name!r} has no parameter {name!r}", name, list(known))
        parsed = {name: known[name].parse(value) for name, value in given.items()}
        return {name: value for name, value in parsed.items() if value is not None}


def queries() -> list[Query]:
    """Return the query library, by name."""
    return list(_library().values())


def find(name: str) -> Query:
    """Return one query of the library.

    Raises
    ------
    UsageError
        There is none of that name.
    """
    library = _library()
    if name not in library:
        raise _unknown(f"no query named {name!r}", name, list(library))
    return library[name]


def query(
    store: StoreLike,
    name: str,
    /,
    *,
    intervals: bool = True,
    seed: int = 0,
    **params: Any,
) -> pl.DataFrame:
    """Run a query of the library, after computing the results that it reads and the store does not hold yet.

    Parameters
    ----------
    name
        One of ``queries()``.
    intervals, seed
        How to compute missing results, as the metrics take them.
    params
        The query's parameters; a value may be text, as on the command line.

    Returns
    -------
    polars.DataFrame
        The columns that the query's header documents.

    Raises
    ------
    UsageError
        There is no such query or parameter, or a value is of the wrong type.
    StoreError
        There is no such trace.
    """
    store = as_store(store)
    prepare(store, name, params, intervals=intervals, seed=seed)
    return run(store, name, params, intervals=intervals, seed=seed)


def run(
    store: Store, name: str, params: Mapping[str, Any] | None = None, *, intervals: bool = True, seed: int = 0
) -> pl.DataFrame:
    """Run a query of the library over what the store holds now; nothing is computed first.

    Parameters
    ----------
    intervals, seed
        Which of several results to read, where a metric was computed in several ways.

    Raises
    ------
    UsageError
        There is no such query or parameter, or a value is of the wrong type.
    StoreError
        There is no such trace.
    """
    found = find(name)
    values = found.bind(params or {})
    if "trace" in values:
        store.trace(str(values["trace"]))
    return store.sql(found.sql, values | {"intervals": intervals, "seed": seed})


def prepare(store: Store, name: str, params: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Compute the results that a query needs; those that the store holds already cost nothing.

    A trace that cannot support a result (one without labels, say) is left out, with a warning, where another one can.
    The length of a window or a lag that was not given is the metric's own default, so that short traces have it.

    Parameters
    ----------
    options
        Passed on to the metrics that take them: ``intervals``, ``seed``.

    Raises
    ------
    UnsupportedError, UsageError
        No trace asked for supports the result.
    """
    found = find(name)
    values = found.bind(params or {})
    wanted = [(need.metric, need.bind(values)) for need in found.needs]
    trace, phase = (cast("Any", values.get(selector)) for selector in ("trace", "phase"))
    if wanted and wanted[0][0] in MODELLED:
        for kind, arguments in wanted:
            _ask(store, kind, arguments | {"trace": trace, "phase": phase}, options)
        return
    if wanted:
        ensure(store, wanted, trace=trace, phase=phase, **options)
        return
    for info in store.traces() if values.get("trace") is None else [store.trace(str(values["trace"]))]:
        warn_of(info)


def _ask(store: Store, kind: str, arguments: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Answer what needs a machine where one is given; without one there is what was asked for before."""
    if "hardware" in arguments:
        if kind == "speedup":
            speedup(store, **arguments, **options)
        else:
            step_time(store, **arguments)
    elif not any(results.saved(store.path, kind, info) for info in store.traces()):
        verb = {"step_time": "speedup --parts"}.get(kind, kind)
        first = "" if kind == "design" else ", or name a machine (hardware)"
        note = f"nothing was asked yet that this query could show: run tracekit {verb}{first}"
        warnings.warn(note, TracekitWarning, stacklevel=3)


def summary(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return the one page to read first: the query ``summary``.

    Parameters
    ----------
    store
        A store or its path.
    trace
        Name of one trace; default: every trace of the store that can answer.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    window
        Window length T in tokens. Default: 4, or what the trace has.
    intervals, seed
        As the metrics take them.
    """
    return query(store, "summary", intervals=intervals, seed=seed, trace=trace, phase=phase, window=window)


def _arguments(text: str, values: Mapping[str, Value]) -> Iterable[Value]:
    first, several, last = text.partition("..")
    if several:
        return range(int(first), int(last) + 1)
    if text.startswith("$"):
        return [values.get(text[1:])]
    if text in ("true", "false"):
        return [text == "true"]
    return [int(text) if text.isdigit() else text]


def _unknown(found: str, name: str, known: list[str]) -> UsageError:
    return UsageError(found, expected="one of " + ", ".join(known) if known else None, remedy=did_you_mean(name, known))


@cache
def _library() -> dict[str, Query]:
    return {
        path.stem: parse(path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(shipped("queries").glob("*.sql"))
    }


_PARAM = re.compile(r"(?P<name>\w+) (?P<type>\w+) = (?P<default>[\w.]+): (?P<text>.+)")
_COLUMN = re.compile(r"(?P<name>\w+) (?P<type>\w+): (?P<text>.+)")
_NEED = re.compile(r"(\w+)(?:\(([^()]*)\))?")
_UNIT = re.compile(r" \[([^\]]+)\]")


def parse(name: str, sql: str) -> Query:
    """Return the query that a file holds, documented by its header.

    Raises
    ------
    QueryError
        The header does not follow the form that this module documents.
    """
    prose: list[str] = []
    needs: tuple[Need, ...] = ()
    parameters: list[Parameter] = []
    columns: list[Column] = []
    for line in sql.splitlines():
        if not line.startswith("--"):
            break
        kind, _, rest = line[2:].strip().partition(" ")
        if kind == "needs:":
            needs = _needs(rest)
        elif kind == "param" and (match := _PARAM.fullmatch(rest)):
            default = match["default"]
            make = {"INTEGER": int, "DOUBLE": float}.get(match["type"], str)
            value = None if default == "NULL" else make(default)
            parameters.append(Parameter(match["name"], match["type"], value, *_unit(match["text"])))
        elif kind == "column" and (match := _COLUMN.fullmatch(rest)):
            columns.append(Column(match["name"], match["type"], *_unit(match["text"])))
        elif kind in ("param", "column"):
            raise QueryError(f"header line {line!r}", where=f"{name}.sql", expected="NAME TYPE [= DEFAULT]: MEANING")
        else:
            prose.append(line[2:].strip())
    title, _, text = "\n".join(prose).strip().partition("\n")
    if not title or not columns:
        raise QueryError("the header has no title or no columns", where=f"{name}.sql")
    return Query(name, title, text.strip(), needs, tuple(parameters), tuple(columns), sql)


def _unit(text: str) -> tuple[str, str | None]:
    match = _UNIT.search(text)
    return (text.replace(match[0], "", 1), match[1]) if match else (text, None)


def _needs(text: str) -> tuple[Need, ...]:
    if text == "nothing":
        return ()
    needs = []
    for metric, arguments in _NEED.findall(text):
        pairs = (pair.partition("=") for pair in arguments.split(",") if pair)
        needs.append(Need(metric, {key.strip(): value.strip() for key, _, value in pairs}))
    return tuple(needs)
