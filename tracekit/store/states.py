"""Sums that a pass over the routing came to, kept so that the next pass reads only what was appended since.

One file a state: ``states/VERSION-CONTENT-KEY-EXTENT.state``, where CONTENT is the digest of the trace up to the
segment that the sums end with, KEY one of everything else that decides what the rows of the arrays stand for, and
EXTENT the sizes, such as the longest window, up to which they go. A state is therefore never stale, only unused.

A file holds a digest of its name and of the rest, the bytes of one number of each array, and the arrays, which have the
shapes that the reader expects. What is not exactly that is as if it were not there: the trace is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import id_dtype
from tracekit.store.location import Location, beside
from tracekit.store.manifest import STATES, TEMPORARY, VERSION, TraceInfo

_DIGEST = 16


@dataclass(frozen=True, slots=True)
class Kept:
    """A state that is kept, as its name says."""

    path: Path
    segments: int
    """How many of the trace's first segments it sums up."""
    extent: tuple[int, ...]

    def reaches(self, extent: Sequence[int]) -> bool:
        """Return whether it goes as far as these sizes."""
        return len(self.extent) == len(extent) and all(a >= b for a, b in zip(self.extent, extent, strict=True))


def kept(root: Location, trace: TraceInfo, parameters: Mapping[str, Any]) -> list[Kept]:
    """Return the states of the trace's first segments with these parameters, see :func:`save`; the longest first."""
    segments = {content: n for n, content in enumerate(trace.contents, 1)}
    found = []
    for path in (beside(root) / STATES).glob(f"{VERSION}-*-{_key(parameters)}-*.state"):
        _, content, _, *extent = path.stem.split("-")
        if content in segments and all(size.isdecimal() and len(size) < 10 for size in extent):
            found.append(Kept(path, segments[content], tuple(map(int, extent))))
    return sorted(found, key=lambda state: (-state.segments, state.extent))


def load(state: Kept, like: Sequence[NDArray[Any]]) -> list[NDArray[Any]] | None:
    """Return the arrays of a state, None if it has not exactly those that are expected.

    Parameters
    ----------
    like
        Arrays of int64 and float64 with the shapes that the saved ones have if the state is what its name says.

    Returns
    -------
    list of numpy.ndarray
        Arrays of these shapes that cannot be written to, what is int64 perhaps of a smaller unsigned type.
    """
    most = _DIGEST + len(like) + 8 * sum(array.size for array in like)
    try:
        if state.path.stat().st_size > most:
            return None
        data = memoryview(state.path.read_bytes())
    except OSError:
        return None
    widths, at = data[_DIGEST : _DIGEST + len(like)], _DIGEST + len(like)
    dtypes = [dtype for array, width in zip(like, widths, strict=False) if (dtype := _dtype(array, width))]
    if len(dtypes) < len(like) or data[:_DIGEST] != _digest(state.path, [data[_DIGEST:]]):
        return None
    sizes = [array.size * dtype.itemsize for array, dtype in zip(like, dtypes, strict=True)]
    if len(data) != at + sum(sizes):
        return None
    starts = accumulate([at, *sizes])
    return [
        np.frombuffer(data, dtype, array.size, start).reshape(array.shape)
        for array, dtype, start in zip(like, dtypes, starts, strict=False)
    ]


def save(
    root: Location,
    trace: TraceInfo,
    parameters: Mapping[str, Any],
    extent: Sequence[int],
    arrays: Sequence[NDArray[Any]],
) -> None:
    """Save the sums over a trace atomically; a store that cannot be written to is left as it is.

    Sums that take more bytes than the ids that they sum up are not kept: to read them would take longer than to read
    the trace. States of the trace's first segments that this one stands in for are removed.

    Parameters
    ----------
    parameters
        What decides the rows of the arrays besides the trace.
    extent
        Sizes up to which the arrays go: one that goes further can stand in for this one.
    arrays
        int64, none negative, and float64.
    """
    ids = trace.rows * trace.meta.top_k * np.dtype(id_dtype(trace.meta.num_experts)).itemsize
    if sum(array.size * _width(array) for array in arrays) >= ids:
        return
    narrow = [np.ascontiguousarray(array, _dtype(array, _width(array))) for array in arrays]
    name = f"{VERSION}-{trace.contents[-1]}-{_key(parameters)}-" + "-".join(map(str, extent))
    target = beside(root) / STATES / f"{name}.state"
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    rest: list[Any] = [
        bytes(array.itemsize for array in narrow),
        *(array.reshape(-1).view(np.uint8) for array in narrow),
    ]
    with contextlib.suppress(OSError):
        target.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines([_digest(target, rest), *rest])
            temporary.replace(target)  # not synced: the digest tells if a crash leaves half of it
        finally:
            temporary.unlink(missing_ok=True)
        new = Kept(target, len(trace.segments), tuple(extent))
        for state in kept(root, trace, parameters):
            if state.path != target and new.reaches(state.extent):
                state.path.unlink(missing_ok=True)


def _key(parameters: Mapping[str, Any]) -> str:
    text = json.dumps(dict(parameters), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _digest(path: Path, rest: Iterable[Any]) -> bytes:
    digest = hashlib.blake2b(path.name.encode(), digest_size=_DIGEST)
    for piece in rest:
        digest.update(piece)
    return digest.digest()


def _width(array: NDArray[Any]) -> int:
    """Return the bytes that a number of an array takes in a file: of counts, those of the largest; most are small."""
    return np.min_scalar_type(array.max(initial=0)).itemsize if array.dtype == np.int64 else array.itemsize


def _dtype(array: NDArray[Any], width: int) -> np.dtype[Any] | None:
    """Return the type that an array has in a file where its numbers take so many bytes, None if there is none."""
    known = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<i8"} if array.dtype == np.int64 else {8: "<f8"}
    return np.dtype(known[width]) if width in known else None
