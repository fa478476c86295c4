"""Making the next thing ready while one is worked on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SMALL = 0.005
"""Seconds for which small items are made at a time."""


def ahead(items: Iterable[T], seconds: float = 0) -> Iterator[T]:
    """Yield items in their order; the next one is made in a thread meanwhile.

    Parameters
    ----------
    seconds
        As many as are made in this time, at least one, are handed over together: waking a thread costs more than
        making a small one. Only for items that later ones do not overwrite.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="tracekit-ahead") as pool:
        coming = pool.submit(_made, source, seconds)
        while True:
            made, end = coming.result()
            if end is None:
                coming = pool.submit(_made, source, seconds)
            yield from made
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end


def _made(source: Iterator[T], seconds: float) -> tuple[list[T], Exception | None]:
    """Return the next items and what ended them."""
    made: list[T] = []
    until = time.monotonic() + seconds
    try:
        while not made or time.monotonic() < until:
            made.append(next(source))
    except Exception as error:  # it is raised where the items are used, after those before it
        return made, error
    return made, None
