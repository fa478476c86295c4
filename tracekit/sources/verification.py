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
    depth, kept = _of_rows(steps, where)
    _check_numbers(start, rows, accepted, where)
    if depth is not None:
        _check_tree(rows, accepted, depth, where)
    if kept is not None:
        _check_kept(VerifySteps(start, rows, accepted, steps.ids, depth=depth), kept, where)
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
        depth=depth,
        kept=kept,
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


def _of_rows(steps: VerifySteps, where: str) -> tuple[NDArray[np.int64] | None, NDArray[np.int8] | None]:
    """Return the depth of each row and whether it was kept, where the source says so."""
    total = int(steps.n_rows.sum(dtype=np.int64))
    for name, column in (("depth", steps.depth), ("kept", steps.kept)):
        if column is not None and (column.shape != (total,) or column.dtype.kind not in "uib"):
            raise SourceError(
                f"{name} is {column.dtype} of shape {column.shape} for {total} rows",
                where=where,
                expected="one whole number a row",
            )
    depth = None if steps.depth is None else steps.depth.astype(np.int64)
    return depth, None if steps.kept is None else steps.kept.astype(np.int8)


def _check_tree(rows: NDArray[np.int64], accepted: NDArray[np.int64], depth: NDArray[np.int64], where: str) -> None:
    """Check ``[rows]`` of depths: each row but the first is a child of a row before it."""
    ends = np.cumsum(rows)
    for step, (begin, end) in enumerate(zip(ends - rows, ends, strict=True)):
        mine = depth[begin:end]
        deepest = np.maximum.accumulate(mine)
        if mine[0] or (mine[1:] < 1).any() or (mine[1:] > deepest[:-1] + 1).any():
            raise SourceError(
                f"step {step} has rows of depth {_short(mine)}",
                where=where,
                expected="0 for its first row, and each other row one deeper than some row before it",
            )
        if accepted[step] > deepest[-1]:
            raise SourceError(
                f"step {step} has {accepted[step]} accepted drafts",
                where=where,
                expected=f"at most {deepest[-1]}, the depth of its tree",
            )


def _check_kept(steps: VerifySteps, kept: NDArray[np.int8], where: str) -> None:
    """Check ``[rows]`` of what was kept: of each depth up to the accepted drafts one row, or not known which."""
    step = np.repeat(np.arange(len(steps.n_rows)), steps.n_rows)
    depth, accepted = steps.depths, np.repeat(steps.n_accepted, steps.n_rows)
    level = np.cumsum(steps.n_accepted + 1) - steps.n_accepted - 1
    reached = depth <= accepted
    place = level[step[reached]] + depth[reached]
    size = int((steps.n_accepted + 1).sum())
    sure = np.bincount(place[kept[reached] == 1], minlength=size)
    unsure = np.bincount(place[kept[reached] == -1], minlength=size)
    wrong = np.zeros(len(steps.n_rows), bool)
    wrong[step[(kept < -1) | (kept > 1) | (~reached & (kept != 0))]] = True
    wrong[
        np.repeat(np.arange(len(level)), steps.n_accepted + 1)[np.where(sure == 0, unsure < 2, sure + unsure > 1)]
    ] = True
    if wrong.any():
        first = int(np.argmax(wrong))
        raise SourceError(
            f"step {first} has {steps.n_accepted[first]} accepted drafts, but kept {_short(kept[step == first])} "
            f"of its rows of depth {_short(depth[step == first])}",
            where=where,
            expected="one kept row (1) of each depth up to the accepted drafts, or at least two of which one was (-1)",
        )


def _short(values: NDArray[Any]) -> str:
    return f"{values[:16].tolist()}" + (" …" if len(values) > 16 else "")
