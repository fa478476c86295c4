"""Verification steps of speculative decoding, checked like routing: the rows of rejected drafts included."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import TraceMeta, VerifySteps
from tracekit.sources import checks
from tracekit.sources.layers import LayerPlan

_MOST_POSITIONS = 1 << 32
_MOST_ROWS = 1 << 16


def checked_steps(steps: VerifySteps, plan: LayerPlan, meta: TraceMeta, where: str) -> VerifySteps | None:
    """Check the verification steps of a request and take their MoE layers.

    Parameters
    ----------
    steps
        As the reader tells them: ``ids`` ``[rows, layers, k]`` with the layer axis of the source.
    plan
        Which entries of that axis are MoE layers.
    meta
        The trace's shape.
    where
        File and request, for messages.

    Returns
    -------
    VerifySteps or None
        In canonical form; None where there is no step.

    Raises
    ------
    SourceError
        Naming the first step whose numbers contradict each other, or the first id at fault.
    """
    where = f"{where}, verification steps"
    columns = {name: getattr(steps, name) for name in ("start_pos", "n_rows", "n_accepted")}
    for name, column in columns.items():
        if column.ndim != 1 or column.dtype.kind not in "ui" or len(column) != len(steps.start_pos):
            raise SourceError(
                f"{name} is {column.dtype} of shape {column.shape} for {len(steps.start_pos)} steps",
                where=where,
                expected="one whole number a step",
            )
    start, rows, accepted = (column.astype(np.int64) for column in columns.values())
    if not len(start):
        return None
    _check_numbers(start, rows, accepted, where)
    total, ids = int(rows.sum()), steps.ids
    expected = (total, plan.size, meta.top_k)
    for name, array, kinds in (("ids", ids, "ui"), ("weights", steps.weights, "f")):
        if array is not None and (array.shape != expected or array.dtype.kind not in kinds):
            raise SourceError(
                f"{name} are {array.dtype} of shape {array.shape}",
                where=where,
                expected=f"{'integers' if kinds == 'ui' else 'floats'} {list(expected)} [rows of all steps, layers, k]",
            )
    return VerifySteps(
        start_pos=start,
        n_rows=rows,
        n_accepted=accepted,
        ids=checks.checked_ids(plan.take(ids), meta.num_experts, meta.layers, where),
        weights=None if steps.weights is None else plan.take(steps.weights),
    )


def _check_numbers(start: NDArray[np.int64], rows: NDArray[np.int64], accepted: NDArray[np.int64], where: str) -> None:
    """Check ``[steps]`` of start positions, rows and accepted drafts against each other."""
    overlap = np.zeros(len(start), bool)
    overlap[1:] = start[1:] <= start[:-1] + accepted[:-1]
    faults: tuple[tuple[NDArray[np.bool_], NDArray[Any], str, str], ...] = (
        ((rows < 1) | (rows > _MOST_ROWS), rows, "rows", f"1 to {_MOST_ROWS}: the last committed token and its drafts"),
        ((accepted < 0) | (accepted >= rows), accepted, "accepted drafts", "fewer than the step has rows"),
        ((start < 0) | (start + rows > _MOST_POSITIONS), start, "as its first position", "0 to 2^32 - 1"),
        (overlap, start, "as its first position", "one after the rows that the step before it kept"),
    )
    for wrong, values, what, expected in faults:
        if wrong.any():
            step = int(np.argmax(wrong))
            raise SourceError(f"step {step} has {int(values[step])} {what}", where=where, expected=expected)
