"""Rows beside the routing, written to one Parquet file in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import Histogram, Predictions, VerifySteps, id_dtype

if TYPE_CHECKING:
    import polars as pl

STEPS = "steps.parquet"
PREDICTED = "predicted.parquet"
COUNTS = "counts.parquet"
SPOOL_ROWS = 500_000
"""Rows that are held in memory, and rows of a row group."""

Columns = Mapping[str, NDArray[Any] | str]
"""Columns by name; a text is that of every row, what is masked is null."""


class Spool:
    """Takes columns of rows in their final order; the file is there, in one piece, once it is finished.

    Requests are numbered from 0 on here.

    What does not fit into memory waits in pieces beside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._digest = hashlib.sha256()
        self._held: list[pl.DataFrame] = []
        self._held_rows = 0
        self._pieces: list[Path] = []

    def add(self, columns: Columns) -> None:
        """Take some rows; the columns must be the same every time."""
        import polars as pl

        for column in columns.values():
            self._digest.update(column.encode() if isinstance(column, str) else np.ascontiguousarray(column).data)
            if np.ma.is_masked(column):
                self._digest.update(np.ma.getmaskarray(column).data)
        frame = pl.DataFrame({name: _with_nulls(column) for name, column in columns.items()})
        self._held.append(frame)
        self._held_rows += frame.height
        self.rows += frame.height
        if self._held_rows >= SPOOL_ROWS:
            piece = self.path.with_name(f"{self.path.stem}-piece-{len(self._pieces):05d}.parquet")
            self._write(piece)
            self._pieces.append(piece)

    def finish(self, first: int = 0) -> str:
        """Write the file and return the digest of its rows; without any row there is no file.

        Parameters
        ----------
        first
            Is added to the numbers of requests.
        """
        if not self._pieces:
            if self._held:
                self._write(self.path, first)
            return self._digest.hexdigest()
        if self._held:
            piece = self.path.with_name(f"{self.path.stem}-piece-{len(self._pieces):05d}.parquet")
            self._write(piece)
            self._pieces.append(piece)
        join(self._pieces, self.path, first)
        for piece in self._pieces:
            piece.unlink()
        return self._digest.hexdigest()

    def _write(self, path: Path, first: int = 0) -> None:
        import polars as pl

        try:
            pl.concat(self._held).with_columns(_from(first)).write_parquet(
                path, compression_level=1, statistics=False, row_group_size=max(1, min(self._held_rows, SPOOL_ROWS))
            )
        except pl.exceptions.PolarsError as error:
            raise OSError(f"{path.name}: {error}") from error
        self._held, self._held_rows = [], 0


def join(pieces: Sequence[Path], path: Path, first: int = 0) -> None:
    """Write the rows of some files to one, in their order and in bounded memory.

    Parameters
    ----------
    first
        Is added to the numbers of requests.
    """
    import polars as pl

    try:
        pl.scan_parquet(list(pieces), glob=False).with_columns(_from(first)).sink_parquet(
            path, compression_level=1, statistics=False, row_group_size=SPOOL_ROWS, maintain_order=True
        )
    except pl.exceptions.PolarsError as error:
        raise OSError(f"{path.name}: {error}") from error


def _from(first: int) -> pl.Expr:
    import polars as pl

    return pl.col("request") + pl.lit(first, pl.UInt32)


def _with_nulls(column: NDArray[Any] | str) -> Any:
    import polars as pl

    if not np.ma.is_masked(column):
        return column
    return pl.select(pl.when(pl.Series(~np.ma.getmaskarray(column))).then(pl.Series(np.ma.getdata(column)))).to_series()


def step_columns(request: int, steps: VerifySteps, layers: tuple[int, ...], num_experts: int) -> Iterator[Columns]:
    """Yield the rows of ``steps.parquet`` of one request, a layer at a time: sorted by layer, step, row.

    Parameters
    ----------
    request
        Number of the request.
    steps
        Its steps in canonical form.
    layers
        Layer numbers, one per entry of the layer axis of ``steps.ids``.
    num_experts
        N, which decides the type of the ids.
    """
    step = np.repeat(np.arange(len(steps.n_rows), dtype=np.uint32), steps.n_rows)
    first = np.repeat(np.cumsum(steps.n_rows) - steps.n_rows, steps.n_rows)
    kept = steps.kept_rows
    fixed: dict[str, NDArray[Any]] = {
        "request": np.full(len(step), request, np.uint32),
        "step": step,
        "row": (np.arange(len(step)) - first).astype(np.uint16),
        "pos": (np.repeat(steps.start_pos, steps.n_rows) + steps.depths).astype(np.uint32),
        "kept": np.ma.array(kept == 1, mask=kept < 0) if (kept < 0).any() else kept == 1,
    }
    for entry, number in enumerate(layers):
        ids = steps.ids[:, entry].astype(id_dtype(num_experts))
        columns = {
            "request": fixed["request"],
            "step": fixed["step"],
            "layer": np.full(len(step), number, np.uint16),
            "row": fixed["row"],
            "pos": fixed["pos"],
            "kept": fixed["kept"],
            **{f"e{rank}": np.ascontiguousarray(ids[:, rank]) for rank in range(ids.shape[1])},
        }
        if steps.weights is not None:
            weights = steps.weights[:, entry].astype(np.float32)
            columns |= {f"w{rank}": np.ascontiguousarray(weights[:, rank]) for rank in range(weights.shape[1])}
        yield columns


def prediction_columns(
    request: int, predictions: Predictions, positions: NDArray[np.int64], layers: tuple[int, ...], num_experts: int
) -> Iterator[Columns]:
    """Yield the rows of ``predicted.parquet`` of one predictor and request, a layer at a time: sorted by layer, pos.

    Parameters
    ----------
    request
        Number of the request.
    predictions
        In canonical form; rows without a prediction are left out.
    positions
        ``[tokens]`` of the request.
    layers
        Layer numbers, one per entry of the layer axis.
    num_experts
        N, which decides the type of the ids.
    """
    for entry, number in enumerate(layers):
        rows = np.flatnonzero(predictions.known[:, entry])
        if not len(rows):
            continue
        ids = predictions.ids[rows, entry].astype(id_dtype(num_experts))
        yield {
            "request": np.full(len(rows), request, np.uint32),
            "predictor": predictions.predictor,
            "distance": np.full(len(rows), predictions.distance, np.uint8),
            "layer": np.full(len(rows), number, np.uint16),
            "pos": positions[rows].astype(np.uint32),
            **{f"p{rank}": np.ascontiguousarray(ids[:, rank]) for rank in range(ids.shape[1])},
        }


def count_columns(request: int, histogram: Histogram, layers: tuple[int, ...]) -> Columns:
    """Return the rows of ``counts.parquet`` of one record: experts that some token chose, by layer and expert."""
    entry, expert = np.nonzero(histogram.counts)
    return {
        "request": np.full(len(entry), request, np.uint32),
        "layer": np.array(layers, np.uint16)[entry],
        "expert": expert.astype(np.uint16),
        "n": histogram.counts[entry, expert].astype(np.uint64),
    }
