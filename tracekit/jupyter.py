"""The IPython extension: ``%load_ext tracekit`` makes the cell magic ``%%tracekit_sql``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracekit.errors import TracekitError, UsageError
from tracekit.reports.text import printable
from tracekit.store import Store

if TYPE_CHECKING:
    import polars as pl

MAGIC = "tracekit_sql"
_FORM = f"%%{MAGIC} STORE [VARIABLE | NAME=VALUE]… [--out NAME]"
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


def load_ipython_extension(shell: Any) -> None:
    """Make ``%%tracekit_sql``, a cell of which is one SELECT over the views of a store.

    ::

        %%tracekit_sql store window label='prose' --out found
        SELECT … WHERE "window" = getvariable('window') AND label = getvariable('label')

    STORE is a variable that holds a store or its path, or else a path. ``window`` passes the Python variable of that
    name on to the statement, ``label='prose'`` a literal. The cell's value is a Polars frame, and ``--out`` also gives
    it a name. What is at fault is said in a sentence, without a traceback.
    """

    def tracekit_sql(line: str, cell: str) -> pl.DataFrame:
        try:
            return run(line, cell, shell.user_ns)
        except TracekitError as error:
            lines = [printable(part) for part in f"{type(error).__name__}: {error}".splitlines()]
            error._render_traceback_ = lambda: lines  # type: ignore[attr-defined] # what IPython shows instead
            raise

    tracekit_sql.__doc__ = load_ipython_extension.__doc__
    shell.register_magic_function(tracekit_sql, "cell", MAGIC)


def run(line: str, statement: str, names: dict[str, Any]) -> pl.DataFrame:
    """Run the statement of a cell.

    Parameters
    ----------
    line
        What follows the magic's name: ``STORE [VARIABLE | NAME=VALUE]… [--out NAME]``.
    statement
        One SELECT.
    names
        The notebook's variables; gets the one that ``--out`` names.

    Raises
    ------
    UsageError
        The line does not have this form, or names no variable.
    StoreError
        STORE is none.
    QueryError
        The statement is not a SELECT, reaches outside the store, or fails.
    """
    if _WORD.sub("", line).strip() or not line.strip():
        raise UsageError(f"{line.strip()!r}" if line.strip() else "no store is named", expected=_FORM)
    where, *words = _WORD.findall(line)
    out = None
    if "--out" in words:
        at = words.index("--out")
        out = words[at + 1] if at + 1 < len(words) else ""
        if not out.isidentifier():
            raise UsageError(f"--out {out}".strip(), expected="--out NAME, a variable's name")
        del words[at : at + 2]
    variables = dict(_variable(word, names) for word in words)
    frame = _store(where, names).sql(statement, variables)
    if out is not None:
        names[out] = frame
    return frame


def _store(where: str, names: Mapping[str, Any]) -> Store:
    """Return the store that a variable holds or names; a path may be quoted."""
    held = names.get(where, _unquoted(where))
    if isinstance(held, Store):
        return held
    if isinstance(held, str | Path):
        return Store(held)
    found = f"the variable {where} is a {type(held).__name__}"
    raise UsageError(found, expected="a store, or the path of one", remedy=f"For a folder of that name: '{where}'")


def _variable(word: str, names: Mapping[str, Any]) -> tuple[str, Any]:
    name, given, text = word.partition("=")
    if not name.isidentifier():
        raise UsageError(f"{word!r}", expected=_FORM)
    if not given:
        if name not in names:
            raise UsageError(f"no variable is named {name!r}", expected=f"one of the notebook's, or {name}=VALUE")
        value = names[name]
        value = value.item() if isinstance(value, np.generic) else value
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
    if not isinstance(value, str | Path | int | float | None) or (isinstance(value, float) and not isfinite(value)):
        found = f"{name} is {value}" if isinstance(value, float) else f"{name} is a {type(value).__name__}"
        raise UsageError(found, expected="a text, a finite number, true, false or nothing")
    return name, value


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
