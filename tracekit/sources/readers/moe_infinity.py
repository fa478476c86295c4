"""Reader of MoE-Infinity's activation matrices: an array of counts per sequence, without the order of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawCounts, Reader
from tracekit.sources.files import RELEASE_BYTES, file_size, release
from tracekit.sources.npy import MAGIC, map_npy

_LOOKED_AT = 1 << 16


def _sniff(path: Path, head: bytes) -> bool:
    # Only floats need a look at the data: whole numbers are expert ids, which the array reader takes.
    if not head.startswith(MAGIC) or b"'<f" not in head[:128]:
        return False
    try:
        array = map_npy(path)
    except SourceError:
        return False
    return array.ndim == 3 and array.dtype.kind == "f" and 0 not in array.shape and _looks_counted(array)


def _looks_counted(array: NDArray[Any]) -> bool:
    """Whether the first values are whole numbers that repeat within rows: neither logits nor ids."""
    rows = np.asarray(array[: max(1, _LOOKED_AT // (array.shape[1] * array.shape[2]))]).reshape(-1, array.shape[2])
    if not np.isfinite(rows).all() or (rows < 0).any() or (rows != np.floor(rows)).any() or not rows.any():
        return False
    ordered = np.sort(rows, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _read(path: Path, options: IngestOptions) -> Iterator[RawCounts]:
    array = map_npy(path)
    if array.ndim != 3 or array.dtype.kind not in "fui" or not array.size:
        raise SourceError(
            f"the array is {array.dtype} of shape {array.shape}",
            where=str(path),
            expected="counts [sequences, layers, experts]",
        )
    size, touched, empty = file_size(path), 0, 0
    for i in range(len(array)):
        counts = np.array(array[i])
        touched += counts.nbytes
        if touched >= RELEASE_BYTES:
            release(array)
            touched = 0
        if not counts.any():
            empty += 1  # the array is allocated for more sequences than were traced
            continue
        yield RawCounts(
            where=f"{path}, sequence {i}",
            counts=counts,
            part=str(i),
            engine="MoE-Infinity",
            id_space="logical",
            consumed=size * (i + 1) // len(array),
        )
    if empty == len(array):
        raise SourceError("holds no counts: every entry is 0", where=str(path), expected="a run that was traced")


READER = Reader(
    name="moe-infinity",
    title="MoE-Infinity activation matrices, .npy (counts only; give --top-k)",
    example="numpy.save('trace.npy', counts)  # float [sequences, layers, experts]",
    sniff=_sniff,
    read=_read,
)
