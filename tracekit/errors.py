"""Errors that tracekit raises on purpose.

Every message says what was found, where, what was expected and what to do about it.
Each class also inherits from the builtin a caller would expect, and carries the exit code
of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the question that proposes the closest of the known names, None where none is; case does not matter."""
    folded = {spelling.casefold(): spelling for spelling in known}
    close = difflib.get_close_matches(name.casefold(), folded, 1)
    return f"Did you mean {folded[close[0]]!r}?" if close else None


class TracekitError(Exception):
    """Base of everything tracekit raises on purpose.

    Parameters
    ----------
    found
        What was found, as a clause without a final full stop.
    where
        File, line, row, request or layer at which it was found.
    expected
        What was expected instead.
    remedy
        What the user can do about it, naming the option that helps.
    """

    exit_code = 1

    def __init__(
        self,
        found: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.found = found
        self.where = where
        self.expected = expected
        self.remedy = remedy
        text = f"{where}: {found}" if where else found
        if expected:
            text += f"; expected {expected}"
        if remedy:
            text += f". {remedy}"
        super().__init__(text)


class SourceError(TracekitError, ValueError):
    """A trace source is malformed, ambiguous or contradicts itself."""


class StoreError(TracekitError, ValueError):
    """A store is missing, damaged, of a newer schema, or refuses the change asked for."""


class UnsupportedError(TracekitError, ValueError):
    """The trace's provenance does not support the question asked of it."""


class QueryError(TracekitError, ValueError):
    """An SQL statement or a named query was refused or failed."""


class UsageError(TracekitError, ValueError):
    """An argument is outside what the function or command takes."""

    exit_code = 2


class MissingDependencyError(TracekitError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""

    exit_code = 4


class TracekitWarning(UserWarning):
    """Something about a result that its reader should know."""
