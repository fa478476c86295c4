"""What a trace recorded of a predictor, request by request beside the routing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import UnsupportedError
from tracekit.metrics.state import layer_index
from tracekit.store import Store, TraceInfo
from tracekit.store.location import scan
from tracekit.store.manifest import SEGMENTS
from tracekit.store.predicted import prediction_rows, recorded_predictors
from tracekit.store.reader import unreadable

if TYPE_CHECKING:
    import polars as pl

    from tracekit.metrics.fetches import Predict
    from tracekit.metrics.streams import Rows


def recorded(store: Store, info: TraceInfo, predictor: str, distance: int, others: str) -> Predict:
    """Return a predictor of the trace's own: it has to be asked for requests in order.

    Parameters
    ----------
    others
        Predictors that need no recording, for the message.

    Raises
    ------
    UnsupportedError
        The trace holds nothing by this predictor at this distance.
    """
    there = recorded_predictors(store, info)
    width = there.get((predictor, distance))
    if width is None:
        own = ", ".join(f"{name} at distance {d}" for name, d in there) or "none"
        raise UnsupportedError(
            f"the trace has no predictions by {predictor!r} at distance {distance}",
            expected=f"{others}; a recall such as .9; of the trace's own: {own}",
            remedy=None if there else "Capture them with: tracekit capture transformers",
        )
    place = _Positions(store, info)
    index, L = layer_index(info.meta), len(info.meta.layers)
    waiting = _by_request(prediction_rows(store, info, [(predictor, distance)]))
    held: list[tuple[int, pl.DataFrame]] = []

    def predict(rows: Rows) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
        ids, known = np.zeros((len(rows.ids), L, width), np.uint16), np.zeros((len(rows.ids), L), bool)
        while not held or held[-1][0] < rows.request:
            found = next(waiting, None)
            if found is None:
                return ids, known
            held[:] = [found]
        number, frame = held[-1]
        if number == rows.request:
            row = np.searchsorted(place.of(number), frame["pos"].to_numpy())
            layer = index[frame["layer"].to_numpy()]
            named = [c for c in frame.columns if c[0] == "p" and c[1:].isdigit()]
            ids[row, layer, : len(named)] = frame.select(named).to_numpy()
            known[row, layer] = True
        return ids, known

    return predict


def _by_request(frames: Iterator[pl.DataFrame]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield the predictions of one request after the other, put together where a batch ends inside it."""
    import polars as pl

    last: tuple[int, pl.DataFrame] | None = None
    for frame in frames:
        for (number,), part in frame.group_by("request", maintain_order=True):
            if last is not None and last[0] == number:
                last = (last[0], pl.concat([last[1], part]))
                continue
            if last is not None:
                yield last
            last = (int(number), part)
    if last is not None:
        yield last


class _Positions:
    """The positions of a trace's rows, by request."""

    def __init__(self, store: Store, info: TraceInfo) -> None:
        import polars as pl

        frames = []
        for segment in info.segments:
            path = store.path / SEGMENTS / segment.id / "runs.parquet"
            runs = scan(path).filter(layer=info.meta.layers[0]).select("request", "pos", "n")
            try:
                frames.append(runs.collect())
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
        every = pl.concat(frames)
        self._request, self._pos, self._n = (every[c].to_numpy().astype(np.int64) for c in ("request", "pos", "n"))

    def of(self, request: int) -> NDArray[np.int64]:
        """Return the position of each of a request's rows, ascending."""
        first, end = np.searchsorted(self._request, [request, request + 1])
        runs = zip(self._pos[first:end], self._n[first:end], strict=True)
        return np.concatenate([np.arange(pos, pos + n) for pos, n in runs])
