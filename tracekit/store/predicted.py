"""Predictions as they are stored, in the order of requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tracekit.store.location import scan
from tracekit.store.manifest import SEGMENTS, TraceInfo
from tracekit.store.reader import Store, unreadable
from tracekit.store.spool import PREDICTED

if TYPE_CHECKING:
    import polars as pl


def recorded_predictors(store: Store, trace: TraceInfo) -> dict[tuple[str, int], int]:
    """Return the experts that each prediction names, m, at most, by predictor and distance."""
    import polars as pl

    found: dict[tuple[str, int], int] = {}
    for segment in trace.segments:
        if segment.has_predictions:
            path = store.path / SEGMENTS / segment.id / PREDICTED
            try:
                pairs = scan(path).select("predictor", "distance").unique().collect()
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
            for pair in pairs.iter_rows():
                found[pair] = max(found.get(pair, 0), segment.predicted)
    return dict(sorted(found.items()))


def prediction_rows(store: Store, trace: TraceInfo, wanted: Iterable[tuple[str, int]]) -> Iterator[pl.DataFrame]:
    """Return the predictions of some predictors and distances in bounded memory, ordered by request.

    Within a request and predictor they are ordered by layer and pos. The columns are those of ``predicted.parquet``:
    ``request``, ``predictor``, ``distance``, ``layer``, ``pos`` and ``p0`` .. ``p{m-1}``.
    """
    import polars as pl

    pairs = [(pl.col("predictor") == name) & (pl.col("distance") == distance) for name, distance in wanted]
    meta = trace.meta
    for segment in trace.segments:
        if not segment.has_predictions:
            continue
        path = store.path / SEGMENTS / segment.id / PREDICTED
        experts = [f"p{rank}" for rank in range(segment.predicted)]
        try:
            rows = scan(path).filter(pl.any_horizontal(pairs))
            for frame in rows.collect_batches(maintain_order=True):
                largest = max((int(frame[e].max()) for e in experts if frame.height), default=0)  # type: ignore[arg-type]
                fits = frame["request"].is_sorted() and frame["layer"].is_in(list(meta.layers)).all()
                if not fits or largest >= meta.num_experts or frame.null_count().sum_horizontal().item():
                    raise unreadable(path, "its ids, requests or layers are outside what the manifest says")
                yield frame
        except (OSError, pl.exceptions.PolarsError) as error:
            raise unreadable(path, error) from None
