"""Verification steps held against the routing: the rows that a step kept are rows of the trace."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.finding import Finding, counted, percent
from tracekit.checks.keys import set_keys
from tracekit.checks.sample import Ids
from tracekit.schema import Request, TraceMeta, VerifySteps

_ROWS = 512
"""Kept rows of a request that are compared, evenly spread."""
_OFFSETS = (-2, -1, 1, 2)
_NUMERICS = 0.05
"""Share of sets that may differ: who runs the kept tokens again, in other batches, rounds otherwise and gets a few."""
_ENOUGH = 32
"""Sets, or kept rows, below which nothing is said of shares."""
_REMEDY = (
    "Save steps and routing from one run, with positions in the sequence (prompt included), or leave the steps out"
)


class Steps:
    """Steps that contradict themselves or the rows of the trace, or that tell of a part of the decode alone.

    Row 0 of a step is the last committed token and its accepted drafts follow: they were kept, so that the trace has
    rows at their positions, with the same experts. Of a sound trace at most 5 % of the sets differ, where the routing
    is from another run than the steps; the last step of a request may reach beyond the rows, for what follows the end
    of the output is cut off. Rows of a tree of which it is not known whether they were kept are left aside.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.requests = self.steps = self.without = 0
        self.wrong: tuple[str, str] | None = None
        """The first request whose steps are impossible, and why."""
        self.compared = self.differing = 0
        """Sets: rows times layers."""
        self.moved = np.zeros(len(_OFFSETS), np.int64)
        self.moved_of = np.zeros(len(_OFFSETS), np.int64)
        """Sets that differ, of those compared, where positions are moved by an offset."""
        self.kept = self.outside = 0
        self.decode = self.covered = 0
        self.first_differing = self.first_outside = self.first_gap = ""
        self.in_prompt = 0
        self.first_in_prompt = ""

    def add(self, request: Request) -> None:
        """Take a request's steps."""
        steps = request.steps
        if steps is None or not len(steps.start_pos):
            self.without += 1
            return
        self.requests += 1
        self.steps += len(steps.start_pos)
        wrong = _wrong(steps, self.meta)
        if wrong:
            self.wrong = self.wrong or (request.request_id, wrong)
            return
        positions = request.positions
        if positions is None:
            positions = request.first_pos + np.arange(len(request.ids), dtype=np.int64)
        step = np.repeat(np.arange(len(steps.n_rows)), steps.n_rows)
        reached = steps.start_pos[step] + steps.depths
        kept = np.flatnonzero(steps.kept_rows == 1)
        pos = reached[kept]
        inside = np.isin(pos, positions)
        self.kept += len(pos)
        outside = int((~inside & (step[kept] < len(steps.n_rows) - 1)).sum())
        self.outside += outside
        self.first_outside = self.first_outside or (request.request_id if outside else "")
        start = int(steps.start_pos[0]) if request.decode_start is None else request.decode_start
        generated = positions[positions >= start]
        covered = int(np.isin(generated, reached[steps.kept_rows != 0]).sum())
        self.decode += len(generated)
        self.covered += covered
        self.first_gap = self.first_gap or (request.request_id if covered < len(generated) else "")
        if int(steps.start_pos[0]) < start - 1:  # the last committed token may be the last of the prompt
            self.in_prompt += 1
            self.first_in_prompt = self.first_in_prompt or request.request_id
        chosen = np.flatnonzero(inside)
        some = chosen[:: -(-len(chosen) // _ROWS) or 1]
        if len(some):
            self._compare(request, steps.ids[kept[some]], pos[some], positions)

    def _compare(self, request: Request, ids: Ids, pos: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Compare the sets of kept rows ``[rows, layers, k]`` with those of the trace at their positions ``[rows]``."""
        mine = set_keys(ids, self.meta.num_experts)

        def differing(offset: int) -> tuple[int, int]:
            at = np.minimum(np.searchsorted(positions, pos + offset), len(positions) - 1)
            there = positions[at] == pos + offset
            theirs = set_keys(request.ids[at[there]], self.meta.num_experts)
            return int((theirs != mine[there]).sum()), theirs.size

        wrong, of = differing(0)
        self.differing += wrong
        self.compared += of
        if wrong > _NUMERICS * of:
            self.first_differing = self.first_differing or request.request_id
            for i, offset in enumerate(_OFFSETS):
                moved, moved_of = differing(offset)
                self.moved[i] += moved
                self.moved_of[i] += moved_of

    def merge(self, other: Steps) -> None:
        """Add what was seen of the requests that follow."""
        for count in (
            *("requests", "steps", "without", "compared", "differing", "moved", "moved_of"),
            *("kept", "outside", "decode", "covered", "in_prompt"),
        ):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for first in ("wrong", "first_differing", "first_outside", "first_gap", "first_in_prompt"):
            setattr(self, first, getattr(self, first) or getattr(other, first))

    def findings(self) -> list[Finding]:
        """Return ``verification-steps``, ``verification-gaps`` and ``phase-contradicted``."""
        found = []
        if self.wrong:
            found.append(self._contradiction(True, f"request {self.wrong[0]!r}", self.wrong[1]))
        if self.compared >= _ENOUGH and self.differing > _NUMERICS * self.compared:
            shares = (self.moved + 1) / (self.moved_of + 1)
            best = int(shares.argmin())
            moved = ""
            if shares[best] < 0.5 * self.differing / self.compared:
                moved = f"; moved by {_OFFSETS[best]:+d} positions {percent(shares[best], 1)} do"
            found.append(
                self._contradiction(
                    2 * self.differing > self.compared,
                    f"request {self.first_differing!r} the first",
                    f"{percent(self.differing, self.compared)} of {self.compared:,} sets (rows x layers) of kept rows "
                    f"are not those of the trace at the same position{moved}",
                )
            )
        if self.kept >= _ENOUGH and self.outside > _NUMERICS * self.kept:
            found.append(
                self._contradiction(
                    2 * self.outside > self.kept,
                    f"request {self.first_outside!r} the first",
                    f"{self.outside:,} of {counted(self.kept, 'kept row')} are at positions of which the trace has no "
                    "row",
                )
            )
        if self.in_prompt:
            found.append(
                Finding(
                    "serious" if 2 * self.in_prompt > self.requests else "warning",
                    "phase-contradicted",
                    f"request {self.first_in_prompt!r}"
                    + (f", and {self.in_prompt - 1:,} more" if self.in_prompt > 1 else ""),
                    f"verification steps begin before the decode in {self.in_prompt:,} of "
                    f"{counted(self.requests, 'request')} with steps: rows called prefill were generated",
                    "results of decode leave out generated tokens, those of prefill hold them",
                    "Correct the prompt length, or leave out --phase prefill",
                )
            )
        elif self.decode >= _ENOUGH and self.covered < 0.9 * self.decode:
            found.append(
                Finding(
                    "warning",
                    "verification-gaps",
                    f"request {self.first_gap!r} the first",
                    f"{counted(self.steps, 'step')} of {counted(self.requests, 'request')} kept "
                    f"{percent(self.covered, self.decode)} of {counted(self.decode, 'generated row')}"
                    + (f"; {counted(self.without, 'more request')} without steps" if self.without else ""),
                    "acceptance and experts per step are those of a part of the decode",
                    "Keep every verification pass (a recorder that wrapped around, or started late, has lost some)",
                )
            )
        return found

    @staticmethod
    def _contradiction(serious: bool, where: str, evidence: str) -> Finding:
        return Finding(
            "serious" if serious else "warning",
            "verification-steps",
            where,
            evidence,
            "experts per step, rejected drafts and acceptance are those of other tokens than the trace's",
            _REMEDY,
        )


def _wrong(steps: VerifySteps, meta: TraceMeta) -> str:
    """Say what is impossible about steps, which a capture may hand over unchecked; nothing where they are sound."""
    start, rows, accepted = steps.start_pos, steps.n_rows, steps.n_accepted
    if not len(start) == len(rows) == len(accepted) or (rows < 1).any() or len(steps.ids) != rows.sum():
        return f"{len(steps.ids):,} rows of experts for {len(start):,} steps of {int(rows.sum()):,} rows in all"
    if any(column is not None and len(column) != len(steps.ids) for column in (steps.depth, steps.kept)):
        return f"not one depth, or mark of what was kept, for each of {len(steps.ids):,} rows"
    if ((accepted < 0) | (accepted >= rows)).any():
        step = int(np.argmax((accepted < 0) | (accepted >= rows)))
        return f"step {step} accepted {int(accepted[step])} of {int(rows[step]) - 1} drafts"
    overlap = start[1:] <= start[:-1] + accepted[:-1]
    if overlap.any():
        step = int(np.argmax(overlap)) + 1
        return f"step {step} starts at position {int(start[step])}, which the step before it kept"
    if steps.ids.size and int(steps.ids.max()) >= meta.num_experts:
        return f"expert id {int(steps.ids.max())} of {meta.num_experts} experts"
    return ""
