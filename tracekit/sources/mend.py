"""Mends: what is safe to put right while a trace is read, on request, and never without saying what was touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.finding import counted, numbers
from tracekit.checks.keys import request_keys
from tracekit.checks.repeats import SHORTEST_RUN, run_starts
from tracekit.errors import SourceError, UsageError
from tracekit.schema import Histogram, Predictions, Request, SourceFile, TraceMeta, VerifySteps

Record = Request | Histogram


class Share(Protocol):
    """A part of a trace that can be opened by itself, in another process perhaps."""

    @property
    def size(self) -> int: ...  # noqa: D102
    def open(self) -> Stream: ...  # noqa: D102


class Stream(Protocol):
    """A trace that can be read once: an open source, or a mended one."""

    @property
    def meta(self) -> TraceMeta: ...  # noqa: D102
    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def done_bytes(self) -> int: ...  # noqa: D102
    @property
    def total_bytes(self) -> int: ...  # noqa: D102
    @property
    def empty(self) -> bool: ...  # noqa: D102
    @property
    def left_out(self) -> Sequence[str]: ...  # noqa: D102
    def requests(self) -> Iterator[Record]: ...  # noqa: D102
    def records(self) -> Iterator[Record | SourceFile]: ...  # noqa: D102
    def shares(self, size: int) -> Sequence[Share]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Mends:
    """What the user asked to have mended."""

    drop_warmup: bool = False
    """Leave out runs of identical rows at the start of requests, and wherever the same rows come back."""
    deinterleave: int | None = None
    """Sequences that take turns in each request, row by row: each becomes a request."""
    layers: tuple[int, ...] | None = None
    """Layer numbers to keep."""


class Mended:
    """A stream of requests with the mends applied.

    Parameters
    ----------
    source
        The open source.
    mends
        What to mend.

    Raises
    ------
    UsageError
        A layer is not in the trace, or a stride is below 2.
    SourceError
        The mend does not fit what the source holds.
    """

    def __init__(self, source: Stream, mends: Mends) -> None:
        self._source = source
        self._mends = mends
        self._steps: list[_Layers | _Deinterleave | _DropWarmup] = []
        if mends.layers is not None:
            self._steps.append(_Layers(source.meta, mends.layers))
        if mends.deinterleave is not None:
            self._steps.append(_Deinterleave(mends.deinterleave))
        if mends.drop_warmup:
            self._steps.append(_DropWarmup())
        if source.meta.histogram and (mends.deinterleave is not None or mends.drop_warmup):
            raise SourceError(
                "counts have no rows to mend",
                expected="a trace of tokens",
                remedy="Leave out --drop-warmup and --deinterleave",
            )

    @property
    def meta(self) -> TraceMeta:
        """What holds for the whole trace."""
        meta = self._source.meta
        for step in self._steps:
            meta = step.meta(meta)
        return meta

    @property
    def notes(self) -> list[str]:
        """The notes of the source, and one per mend on what it touched; complete after the last request."""
        return [*self._source.notes, *(step.note() for step in self._steps)]

    @property
    def done_bytes(self) -> int:
        """Bytes read so far."""
        return self._source.done_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes in all."""
        return self._source.total_bytes

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return self._source.empty

    @property
    def left_out(self) -> Sequence[str]:
        """Sentences about what was not read."""
        return self._source.left_out

    def requests(self) -> Iterator[Record]:
        """Yield the mended requests in order; to be called once."""
        return (record for record in self.records() if not isinstance(record, SourceFile))

    def records(self) -> Iterator[Record | SourceFile]:
        """Yield the same, and each file after its last request."""
        stream = self._source.records()
        for step in self._steps:
            stream = _applied(step.apply, stream)
        yield from stream

    def shares(self, size: int) -> Sequence[Share]:
        """Cut what is to be read into shares, as the source does; none where a mend looks at all requests in order."""
        if any(not isinstance(step, _Layers) for step in self._steps):
            return []
        return [_MendedShare(share, self._mends) for share in self._source.shares(size)]


@dataclass(frozen=True, slots=True)
class _MendedShare:
    share: Share
    mends: Mends

    @property
    def size(self) -> int:
        return self.share.size

    def open(self) -> Mended:
        return Mended(self.share.open(), self.mends)


def _applied(
    apply: Callable[[Record], Iterator[Record]], stream: Iterator[Record | SourceFile]
) -> Iterator[Record | SourceFile]:
    for record in stream:
        if isinstance(record, SourceFile):
            yield record
        else:
            yield from apply(record)


class _Layers:
    """Keep some layers."""

    def __init__(self, meta: TraceMeta, layers: Sequence[int]) -> None:
        unknown = sorted(set(layers) - set(meta.layers))
        if unknown or not layers:
            raise UsageError(
                f"--layers names layers that the trace does not have: {numbers(unknown)}" if unknown else "no layers",
                expected=f"some of {numbers(meta.layers)}",
            )
        self._layers = tuple(sorted(set(layers)))
        self._of = len(meta.layers)
        self._entries = [meta.layers.index(layer) for layer in self._layers]

    def meta(self, meta: TraceMeta) -> TraceMeta:
        return replace(meta, layers=self._layers)

    def apply(self, record: Record) -> Iterator[Record]:
        if isinstance(record, Histogram):
            yield replace(record, counts=record.counts[self._entries])
            return
        steps = record.steps
        if steps is not None:
            steps = replace(steps, ids=self._take(steps.ids), weights=self._maybe(steps.weights))
        yield replace(
            record,
            ids=self._take(record.ids),
            weights=self._maybe(record.weights),
            steps=steps,
            predictions=tuple(replace(p, ids=self._take(p.ids), known=self._take(p.known)) for p in record.predictions),
        )

    def _take(self, array: NDArray[Any]) -> NDArray[Any]:
        low, high = self._entries[0], self._entries[-1] + 1
        return array[:, low:high] if high - low == len(self._entries) else array[:, self._entries]

    def _maybe(self, array: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if array is None else self._take(array)

    def note(self) -> str:
        return f"--layers kept {len(self._layers)} of {counted(self._of, 'layer')}: {numbers(self._layers)}"


class _Deinterleave:
    """Make of each request the sequences that take turns in it."""

    def __init__(self, stride: int) -> None:
        if stride < 2:
            raise UsageError(f"--deinterleave {stride}", expected="at least 2 sequences")
        self._stride = stride
        self._requests = self._made = self._rows = 0

    def meta(self, meta: TraceMeta) -> TraceMeta:
        return meta

    def apply(self, record: Record) -> Iterator[Record]:
        assert isinstance(record, Request)
        if record.positions is not None or record.steps is not None:
            raise SourceError(
                "rows are missing" if record.steps is None else "the request has verification steps",
                where=f"{record.where}, request {record.request_id!r}",
                expected="rows without a gap to take turns in",
                remedy="Leave out --deinterleave",
            )
        stride, rows = self._stride, len(record.ids)
        self._requests += 1
        self._rows += rows
        for turn in range(min(stride, rows)):
            self._made += 1
            # Of the positions in each sequence only their order is known: they count from 0.
            decode = None if record.decode_start is None else record.decode_start - record.first_pos - turn
            yield replace(
                record,
                request_id=f"{record.request_id}/{turn}",
                ids=record.ids[turn::stride],
                first_pos=0,
                prompt_len=None,
                decode_start=None if decode is None else max(0, -(-decode // stride)),
                token_ids=None if record.token_ids is None else record.token_ids[turn::stride],
                weights=None if record.weights is None else record.weights[turn::stride],
                predictions=_predictions_at(record, slice(turn, None, stride)),
            )

    def note(self) -> str:
        made = f"{counted(self._made, 'request')} of {counted(self._requests, 'request')}"
        return f"--deinterleave {self._stride} made {made}: {counted(self._rows, 'row')} were put into their sequences"


class _DropWarmup:
    """Drop runs of identical rows at the start of requests, and later long runs of the same rows."""

    def __init__(self) -> None:
        self._values: set[int] = set()
        self._rows = self._requests = self._whole = 0

    def meta(self, meta: TraceMeta) -> TraceMeta:
        return meta

    def apply(self, record: Record) -> Iterator[Record]:
        assert isinstance(record, Request)
        keep = self._keep(record)
        if keep is None:
            yield record
            return
        dropped = int((~keep).sum())
        if record.steps is not None:
            record = replace(record, steps=_steps_at(record, keep))
        self._rows += dropped
        self._requests += 1
        if dropped == len(keep):
            self._whole += 1
            return
        positions = record.first_pos + np.arange(len(keep)) if record.positions is None else record.positions
        positions = positions[keep].astype(np.int64)
        first = int(positions[0])
        gapless = int(positions[-1]) - first + 1 == len(positions)
        rows: slice | NDArray[np.bool_] = slice(dropped, None) if keep[dropped:].all() else keep
        yield replace(
            record,
            ids=record.ids[rows],
            first_pos=first,
            positions=None if gapless else positions,
            token_ids=None if record.token_ids is None else record.token_ids[rows],
            weights=None if record.weights is None else record.weights[rows],
            predictions=_predictions_at(record, rows),
        )

    def _keep(self, request: Request) -> NDArray[np.bool_] | None:
        """Return which rows stay ``[tokens]``, None for all of them."""
        if len(request.ids) < SHORTEST_RUN:
            return None
        rows = request_keys(request.ids).rows
        starts = run_starts(rows)
        lengths = np.diff(np.append(starts, len(rows)))
        leading = 0
        while leading < len(lengths) and lengths[leading] >= SHORTEST_RUN:
            self._values.add(int(rows[starts[leading]]))
            leading += 1
        known = np.fromiter(self._values, np.uint64, len(self._values))
        drop = (lengths >= SHORTEST_RUN) & np.isin(rows[starts], known)
        if not drop.any():
            return None
        return np.repeat(~drop, lengths)

    def note(self) -> str:
        whole = f", {self._whole} of them as a whole" if self._whole else ""
        return f"--drop-warmup dropped {counted(self._rows, 'row')} of {counted(self._requests, 'request')}{whole}"


def _predictions_at(request: Request, rows: slice | NDArray[np.bool_]) -> tuple[Predictions, ...]:
    """Return what was predicted about the rows that stay."""
    return tuple(replace(p, ids=p.ids[rows], known=p.known[rows]) for p in request.predictions)


def _steps_at(request: Request, keep: NDArray[np.bool_]) -> VerifySteps | None:
    """Return the verification steps that start at rows that stay."""
    steps = request.steps
    assert steps is not None
    positions = request.first_pos + np.arange(len(keep)) if request.positions is None else request.positions
    stay = np.isin(steps.start_pos, positions[keep])
    return steps.take(stay) if stay.any() else None


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer numbers and ranges: ``3-60,62``.

    Raises
    ------
    UsageError
        It is something else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isdecimal() and (high.isdecimal() or not dash)) or len(low) > 5 or len(high) > 5:
            raise UsageError(f"{part.strip()!r} in --layers {text!r}", expected="numbers and ranges such as 3-60,62")
        layers.update(range(int(low), int(high or low) + 1))
    if not layers:
        raise UsageError(f"--layers {text!r} names no layer", expected="numbers and ranges such as 3-60,62")
    return tuple(sorted(layers))
