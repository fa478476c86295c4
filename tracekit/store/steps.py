"""Rows of verification steps as they are stored, a batch of whole steps at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import TraceMeta, id_dtype

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of verification steps, ordered by request, layer, step, row."""

    ids: NDArray[np.unsignedinteger[Any]]
    """Routed experts ``[k, rows]``, rejected drafts included."""
    request: NDArray[np.int64]
    """``[rows]``, as the others."""
    layer: NDArray[np.int64]
    step: NDArray[np.int64]
    pos: NDArray[np.int64]
    kept: NDArray[np.int8]
    """1: kept, 0: rejected, -1: not known."""
    weights: NDArray[np.float32]
    """Router weights ``[k, rows]``, or ``[0, rows]`` where they were not asked for."""

    @classmethod
    def of(cls, frame: pl.DataFrame, top_k: int, *, weights: bool = False) -> StepRows:
        """Return rows of ``steps.parquet``."""
        request, layer, step, pos, kept = (
            frame[name].cast(int).fill_null(-1).to_numpy() for name in ("request", "layer", "step", "pos", "kept")
        )
        ids = np.stack([frame[f"e{r}"].to_numpy() for r in range(top_k)])
        of_rank = [frame[f"w{r}"].to_numpy().astype(np.float32) for r in range(top_k if weights else 0)]
        weighed = np.stack(of_rank) if weights else np.empty((0, frame.height), np.float32)
        return cls(ids, request, layer, step, pos, kept.astype(np.int8), weighed)

    def __len__(self) -> int:
        return len(self.request)

    def fits(self, meta: TraceMeta, requests: int) -> bool:
        """Return whether ids, requests and layers are within the trace: kernels do not check bounds."""
        return bool(
            self.ids.dtype == id_dtype(meta.num_experts)
            and self.ids.max(initial=0) < meta.num_experts
            and self.request.min(initial=0) >= 0
            and self.request.max(initial=0) < requests
            and np.isin(np.unique(self.layer), meta.layers).all()
        )

    def first_rows(self) -> NDArray[np.int64]:
        """Return the number of the first row of each (request, layer, step)."""
        new = np.ones(len(self), bool)
        new[1:] = (np.diff(self.request) != 0) | (np.diff(self.layer) != 0) | (np.diff(self.step) != 0)
        return np.flatnonzero(new)

    def cut(self, begin: int, end: int) -> StepRows:
        """Return some consecutive rows."""
        return StepRows(*(getattr(self, field.name)[..., begin:end] for field in fields(self)))

    def after(self, other: StepRows) -> StepRows:
        """Return the rows of another batch and these behind them."""
        pairs = ((getattr(other, field.name), getattr(self, field.name)) for field in fields(self))
        return StepRows(*(np.concatenate(pair, axis=-1) for pair in pairs))


def whole_steps(batches: Iterable[StepRows]) -> Iterator[StepRows]:
    """Cut batches so that every (request, layer, step) is in one of them."""
    left: StepRows | None = None
    for batch in batches:
        rows = batch if left is None else batch.after(left)
        last = int(rows.first_rows()[-1]) if len(rows) else 0  # its other rows may be in the next batch
        left = rows.cut(last, len(rows))
        if last:
            yield rows.cut(0, last)
    if left is not None and len(left):
        yield left
