"""Rows that trainers and engines fill in where they have no routing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.sources.checks import CHUNK_IDS

TAIL_NOTE = "padding at the end of requests (rows that are no routing) was cut off"
HOLE_NOTE = "rows without routing (-1) inside requests were left out: their positions are kept as holes"

Rows = NDArray[np.bool_]
Ids = NDArray[Any]


def zero_rows(ids: Ids) -> Rows:
    """Rows ``[tokens]`` of ``[tokens, layers, k]`` that are zero in every layer."""
    return _rows(ids, np.zeros(ids.shape[2], ids.dtype))


def missing_rows(ids: Ids) -> Rows:
    """Rows ``[tokens]`` that are -1 in every layer: not captured."""
    if ids.dtype.kind != "i":
        return np.zeros(len(ids), bool)
    return _rows(ids, np.full(ids.shape[2], -1, ids.dtype))


def counting_rows(ids: Ids) -> Rows:
    """Rows ``[tokens]`` that are ``0 .. k-1`` in every layer: what replay pads with."""
    return _rows(ids, np.arange(ids.shape[2]) & np.iinfo(ids.dtype).max)


def _rows(ids: Ids, pattern: NDArray[Any]) -> Rows:
    found = np.zeros(len(ids), bool)
    width = ids.shape[1] * ids.shape[2]
    step = max(1, CHUNK_IDS // max(1, width))
    for start in range(0, len(ids) if width else 0, step):
        found[start : start + step] = (ids[start : start + step] == pattern).all(axis=(1, 2))
    return found


def rows_before_tail(filler: Rows) -> int:
    """Rows before the run of filler at the end."""
    real = np.flatnonzero(~filler)
    return int(real[-1]) + 1 if real.size else 0
