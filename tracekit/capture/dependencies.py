"""The optional libraries that capture needs, imported when a capture begins."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tracekit.errors import MissingDependencyError


def require(module: str) -> Any:
    """Import a library of the extra ``capture``.

    Raises
    ------
    MissingDependencyError
        It is not installed; the message names the pip command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingDependencyError(
            f"{missing} is not installed",
            remedy="Install what runs transformers models with: pip install 'moe-tracekit[capture]'",
        ) from error
