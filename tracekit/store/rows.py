"""Rows of some requests of a trace: what two traces of the same requests are held against each other by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracekit.store.location import scan
from tracekit.store.manifest import SEGMENTS, TraceInfo, part_name
from tracekit.store.reader import Store, read_file, unreadable

if TYPE_CHECKING:
    import polars as pl


def token_rows(store: Store, trace: TraceInfo) -> pl.DataFrame:
    """Return the token ids that a trace keeps: ``request``, ``pos``, ``token_id``; no rows where it keeps none."""
    import polars as pl

    schema = {"request": pl.UInt32, "pos": pl.UInt32, "token_id": pl.Int64}
    frames = [pl.DataFrame(schema=schema)]
    for segment in trace.segments:
        if segment.has_token_ids:
            path = store.path / SEGMENTS / segment.id / "tokens.parquet"
            frames.append(read_file(path, list(schema)))
    return pl.concat(frames, how="vertical_relaxed")


def routing_rows(store: Store, trace: TraceInfo, requests: Sequence[int]) -> pl.DataFrame:
    """Return the routing rows of some requests: ``request``, ``layer``, ``pos`` and ``e0`` .. ``e{k-1}``.

    Only the parts that hold them are read.
    """
    import polars as pl

    columns = ["request", "layer", "pos", *(f"e{r}" for r in range(trace.meta.top_k))]
    mine = pl.col("request").is_in(list(requests))
    frames = []
    for segment in trace.segments:
        folder = store.path / SEGMENTS / segment.id
        try:
            runs = scan(folder / "runs.parquet").filter(mine)
            parts = runs.select(pl.col("part").unique().sort()).collect()["part"].to_list()
            files = [scan(folder / part_name(part)) for part in parts]
            frames += [file.select(columns).filter(mine).collect() for file in files]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise unreadable(folder, error) from None
    return pl.concat(frames)
