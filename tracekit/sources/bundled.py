"""The models that tracekit knows by name: the relevant fields of their ``config.json``, as data."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("models.toml")
"""The data: readable, and the only place where a model's shape is written down."""


@dataclass(frozen=True, slots=True)
class Bundled:
    """One model of the table."""

    name: str
    also: tuple[str, ...]
    """Other names under which the same shape is found."""
    source: str
    """Where the fields were read."""
    config: Mapping[str, Any]
    """Fields of its ``config.json``."""


@functools.cache
def bundled() -> tuple[Bundled, ...]:
    """Return the models of the table, in its order."""
    with TABLE.open("rb") as file:
        entries = tomllib.load(file)
    return tuple(
        Bundled(name, tuple(entry.get("also", ())), entry["source"], entry["config"]) for name, entry in entries.items()
    )


def find(name: str) -> Bundled | None:
    """Return the model of this name, None where there is none; the owner of a repository and case do not matter."""
    return _names().get(name.rstrip("/").rpartition("/")[2].casefold())


def spellings() -> list[str]:
    """Return every name under which a model of the table is found."""
    return [spelling for model in bundled() for spelling in (model.name, *model.also)]


@functools.cache
def _names() -> dict[str, Bundled]:
    return {name.casefold(): model for model in bundled() for name in (model.name, *model.also)}
