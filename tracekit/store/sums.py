"""Checksums of a part's columns, so cheap that every reading compares them: a disk that forgets a bit is noticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ODD = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def checksum(columns: Iterable[NDArray[Any]]) -> str:
    """Return a checksum of columns, 16 hex digits.

    The 64-bit words of each are added up, and the sums are weighted by an odd number for each column. It changes with
    every word that changes alone, and with columns that change places; it is no protection against a forger.
    """
    total = 0
    for rank, column in enumerate(columns):
        data = np.ascontiguousarray(column).view(np.uint8)
        whole = len(data) // 8 * 8
        words = int(data[:whole].view(np.uint64).sum(dtype=np.uint64))
        rest = int.from_bytes(data[whole:].tobytes(), "little")
        total += (2 * rank * _ODD + 1) * (words + rest + len(data))
    return f"{total % _WORD:016x}"
