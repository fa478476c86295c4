"""How work is run: threads, memory, and the engine that reads the routing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

from tracekit.errors import UsageError

Progress = Callable[[int, int], None]

Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")

ON_CLUSTERS = ("windows", "autocorr", "attribution", "load", "expert-ratio", "summary")
"""The verbs whose pass can be run on a cluster: their sums over parts of a trace add up."""

STATE_BYTES = 4 << 30
"""What the sums of one pass may take where nothing else is said."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True, slots=True)
class Running:
    """How work is run."""

    threads: int
    """Threads at most."""
    memory: int | None = None
    """Bytes that the sums of a pass may take, and SQL; None: 4 GiB, and what DuckDB takes by itself."""
    engine: Engine = "local"
    """Where the routing is read."""
    address: str | None = None
    """The Ray cluster; None: one on this machine."""
    progress: Progress | None = None
    """What passes over a store in this process report to."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"{self.threads} threads", expected="at least 1")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"{self.memory} bytes of memory", expected="at least 1")
        if self.engine not in ENGINES:
            raise UsageError(f"engine {self.engine!r}", expected="one of " + ", ".join(ENGINES))
        if self.address is not None and self.engine != "ray":
            raise UsageError(
                f"the address {self.address!r} without a cluster", remedy="Add --engine ray, or leave --address out"
            )


def _processors() -> int:
    """Return the processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_current: ContextVar[Running | None] = ContextVar("running", default=None)


def current() -> Running:
    """Return how work is run here."""
    return _current.get() or Running(_processors())


@contextlib.contextmanager
def running(
    *,
    threads: int | None = None,
    memory: int | str | None = None,
    engine: Engine | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Running]:
    """Run what is within the block so; what is left out stays as it is outside.

    Parameters
    ----------
    threads
        Threads of a pass and of SQL; default: the processors that this process may run on. Polars takes its own number
        when it is imported, from ``POLARS_MAX_THREADS``.
    memory
        Bytes that the sums of a pass may take, and SQL: a number or a size such as ``8GB`` or ``512MiB``. Default:
        4 GiB of sums, and 80 % of the machine's memory for SQL.
    engine
        ``local`` reads the routing in this process, ``ray`` on a cluster.
    address
        ``HOST:PORT`` of the Ray cluster; default: the one that this machine belongs to, else one that is started.
    progress
        Called as a pass goes on, from a thread of its own, with the expert ids that have been read and those that there
        are; each pass begins with 0.

    Raises
    ------
    UsageError
        A value is not possible.
    """
    size = parse_size(memory) if isinstance(memory, str) else memory
    given = {"threads": threads, "memory": size, "engine": engine, "address": address, "progress": progress}
    chosen = replace(current(), **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)


def on_this_machine() -> UsageError:
    """Return what is raised where work that cannot be run on a cluster is to be."""
    found = "this cannot be run on a Ray cluster"
    return UsageError(found, expected="one of " + ", ".join(ON_CLUSTERS), remedy="Use --engine local")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``8GB`` (10⁹), ``512MiB`` (2²⁰), ``1.5 g`` or ``4096``.

    Raises
    ------
    UsageError
        It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) *([a-z]*)", text.strip().lower(), re.ASCII)
    if not match or match[2] not in _UNITS:
        raise UsageError(f"memory {text!r}", expected="a size such as 8GB, 512MiB or 4096 (bytes)")
    return int(float(match[1]) * _UNITS[match[2]])


def check_state(size: float, found: str, remedy: str) -> None:
    """Refuse sums of a pass that would take more memory than they may.

    Parameters
    ----------
    size
        Bytes.
    found
        What needs them: ``these metrics need``.
    remedy
        What the user can do about it, beside giving it more memory.

    Raises
    ------
    UsageError
        The size is above :attr:`Running.memory`, by default 4 GiB.
    """
    most = current().memory or STATE_BYTES
    if size > most:
        raise UsageError(f"{found} {_shown(size)} of memory", expected=f"at most {_shown(most)}", remedy=remedy)


def _shown(size: float) -> str:
    name, unit = ("GiB", 1 << 30) if size >= 1 << 30 else ("MiB", 1 << 20) if size >= 1 << 20 else ("bytes", 1)
    return f"{size / unit:.3g} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
