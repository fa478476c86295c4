"""The requests of a stored trace as they were ingested, and a checker for each ingest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.checks import Checker
from tracekit.errors import StoreError
from tracekit.schema import Request, VerifySteps
from tracekit.sources.released import released_experts, released_top_k
from tracekit.store.location import Location, scan
from tracekit.store.manifest import SEGMENTS, TraceInfo
from tracekit.store.reader import Block, Store, unreadable
from tracekit.store.steps import StepRows

TOKENS = "tokens.parquet"
_PARTS = 8
"""Parts of a trace that are checked by themselves as well; of more ingests, neighbouring ones are put together."""


def checkers(store: Store, info: TraceInfo) -> list[Checker]:
    """Return a checker of each ingest of a trace that took its requests, in order; none of a trace of counts.

    Raises
    ------
    StoreError
        A file of the store cannot be read.
    """
    ends = np.cumsum([segment.requests for segment in info.segments])
    together = _together(len(ends))
    ends = np.append(ends[together - 1 :: together], ends[-1])
    native = released_top_k(info.meta), released_experts(info.meta)
    parts = [Checker(info.meta, *native) for _ in np.unique(ends)]
    for number, request in enumerate(requests(store, info)):
        parts[int(np.searchsorted(ends, number, side="right"))].add(request)
    return parts


def merged(parts: Sequence[Checker]) -> list[Checker]:
    """Return checkers of parts of a trace with neighbouring ones put together as `checkers` does; they are used up."""
    together = _together(len(parts))
    for number, part in enumerate(parts):
        if number % together:
            parts[number - number % together].merge(part)
    return list(parts[::together])


def _together(ingests: int) -> int:
    """Return how many neighbouring ingests, or shares of one, are one part."""
    return max(1, -(-ingests // _PARTS))


def requests(store: Store, info: TraceInfo) -> Iterator[Request]:
    """Yield the requests of a trace again, in order; none of a trace of counts.

    With what the check looks at: ids, positions, phase, token ids, verification steps, and router weights where every
    ingest had them. Ids and weights are overwritten when later requests are asked for: copy what is to be kept.

    Raises
    ------
    StoreError
        A file of the store cannot be read.
    """
    if info.meta.histogram:
        return
    rows = {row["request"]: row for row in store.requests(info).iter_rows(named=True)}
    tokens, steps = _Tokens(store, info), _Steps(store, info)
    begun: list[_Layers] = []  # layers of a request that goes on in the next block
    for block in store.blocks(info, weights=all(segment.has_weights for segment in info.segments)):
        for number in np.unique(block.runs["request"]).tolist():
            here = _Layers(block, number)
            begun.append(here)
            if sum(part.ids.shape[1] for part in begun) < len(info.meta.layers):
                here.keep()
                continue
            row = rows[number]
            yield Request(
                request_id=row["request_id"],
                ids=_joined([part.ids for part in begun]),
                first_pos=int(here.positions[0]),
                prompt_len=row["prompt_len"],
                decode_start=row["decode_start"],
                positions=here.positions if here.gaps else None,
                token_ids=tokens.of(number, len(here.positions)),
                weights=_weights(begun),
                steps=steps.of(number),
            )
            begun = []


class _Layers:
    """Some layers of a request, in one block."""

    def __init__(self, block: Block, number: int) -> None:
        runs = block.runs
        of_request = np.flatnonzero(runs["request"] == number)
        layers = np.unique(runs["layer"][of_request])
        of_layer = of_request[runs["layer"][of_request] == layers[0]]
        low, count = int(runs["row"][of_request[0]]), int(runs["n"][of_layer].sum())
        shape = (-1, len(layers), count)

        def columns(values: NDArray[Any]) -> NDArray[Any]:
            return values[:, low : low + count * len(layers)].reshape(shape).transpose(2, 1, 0)

        self.ids = columns(block.ids)
        """``[tokens, layers, k]``, as the weights."""
        self.weights = None if block.weights is None else columns(block.weights)
        pieces = zip(runs["pos"][of_layer].tolist(), runs["n"][of_layer].tolist(), strict=True)
        self.positions = np.concatenate([np.arange(pos, pos + n, dtype=np.int64) for pos, n in pieces])
        self.gaps = len(of_layer) > 1

    def keep(self) -> None:
        self.ids = self.ids.copy()
        self.weights = None if self.weights is None else self.weights.copy()


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


def _weights(parts: list[_Layers]) -> NDArray[np.float32] | None:
    """Return the weights of a request; None where the source had none, for then they are all no number."""
    weights = [part.weights for part in parts if part.weights is not None]
    return None if not weights or np.isnan(weights[0]).all() else _joined(weights)


class _Steps:
    """The verification steps of a trace's requests, read along with its rows."""

    def __init__(self, store: Store, info: TraceInfo) -> None:
        self._layers = len(info.meta.layers)
        self._where = str(store.path)
        self._batches = store.steps(info)
        self._rows: StepRows | None = None

    def of(self, request: int) -> VerifySteps | None:
        """Return the steps of a request that is not before the last one asked for, None where it has none."""
        while self._rows is None or not len(self._rows) or self._rows.request[-1] <= request:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._rows = batch if self._rows is None else batch.after(self._rows)
        if self._rows is None:
            return None
        low, high = np.searchsorted(self._rows.request, [request, request + 1]).tolist()
        rows, self._rows = self._rows.cut(low, high), self._rows.cut(high, len(self._rows))
        return self._steps(rows) if len(rows) else None

    def _steps(self, rows: StepRows) -> VerifySteps:
        """Return the steps of one request, whose rows stand layer by layer."""
        count, rest = divmod(len(rows), self._layers)
        if rest:
            raise StoreError("has verification steps of some layers only", where=self._where)
        step, pos, kept = rows.step[:count], rows.pos[:count], rows.kept[:count]
        starts = np.flatnonzero(np.diff(step, prepend=-1))
        n_rows = np.diff(np.append(starts, count))
        depth = pos - np.repeat(pos[starts], n_rows)
        return VerifySteps(
            start_pos=pos[starts],
            n_rows=n_rows,
            n_accepted=np.maximum.reduceat(np.where(kept == 0, 0, depth), starts),
            ids=rows.ids.reshape(-1, self._layers, count).transpose(2, 1, 0),
            depth=depth,
            kept=kept,
        )


class _Tokens:
    """The token ids of a trace's requests, read along with its rows."""

    def __init__(self, store: Store, info: TraceInfo) -> None:
        self._batches = self._read([store.path / SEGMENTS / s.id / TOKENS for s in info.segments if s.has_token_ids])
        self._requests = np.zeros(0, np.int64)
        self._ids = np.zeros(0, np.int64)

    def of(self, request: int, count: int) -> NDArray[np.int64] | None:
        """Return the token ids of a request that is not before the last one asked for, None where it has none."""
        while not len(self._requests) or self._requests[-1] <= request:
            batch = next(self._batches, None)
            if batch is None:
                break
            keep = self._requests >= request
            self._requests = np.concatenate([self._requests[keep], batch[0]])
            self._ids = np.concatenate([self._ids[keep], batch[1]])
        low, high = np.searchsorted(self._requests, [request, request + 1])
        return self._ids[low:high] if high - low == count else None

    @staticmethod
    def _read(paths: list[Location]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        import polars as pl

        for path in paths:
            try:
                for frame in scan(path).collect_batches(maintain_order=True):
                    yield frame["request"].to_numpy().astype(np.int64), frame["token_id"].to_numpy()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
