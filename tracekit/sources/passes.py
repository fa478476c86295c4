"""Forward passes of a serving engine put back into sequences, by position and by the order of the batch.

A recorder that keeps passes but no request ids says for each row only its position. What is known beside that: a
prefill starts a sequence (or continues the last one of the pass before, whose prompt was cut into chunks); each
decode pass has every running request, in the order of the pass before with new requests at the end; a request that
is missing has ended; a mixed pass has prompts first and then, a row each, the running requests. Where that leaves
more than one possibility, the sequences concerned end there. One thing is assumed: a single row behind the first
prompt of a mixed pass, at the position of a running request, is that request's, though a prompt of which all but one
token was cached looks the same.

Drafts may form a tree, breadth first, whose rows have their depth as position: where the next row starts tells how deep
the accepted path went, but not which of several rows at the same depth it went through; those places stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["extend", "mixed", "decode", "verify"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    kind: Kind
    first: int
    """Number of its first row among the rows of all passes."""
    positions: NDArray[np.int64]
    """``[rows]`` position of each row in its sequence."""
    lens: tuple[int, ...] | None = None
    """Rows of each request, in a pass that prefills."""


UNKNOWN = -1
_NO_TREE = "the drafts form trees of different sizes, so where one ends is not known"


@dataclass(frozen=True, slots=True)
class Step:
    """One verification step."""

    start: int
    """Position of row 0."""
    row: int
    """Number of row 0."""
    depth: NDArray[np.int64]
    """``[rows]`` positions of the rows, from that of row 0."""
    accepted: int
    """Drafts accepted; -1 as long as no row tells."""

    def kept(self) -> list[int]:
        """Return the number of the row that was kept at each depth; ``UNKNOWN`` where there are several."""
        at = [np.flatnonzero(self.depth == depth) for depth in range(self.accepted + 1)]
        return [self.row + int(rows[0]) if len(rows) == 1 else UNKNOWN for rows in at]


@dataclass(slots=True)
class Stitched:
    """One sequence."""

    first_pos: int
    rows: list[int] = field(default_factory=list)
    """Numbers of its rows, one a position from ``first_pos`` on; ``UNKNOWN`` where any of several may be it."""
    prompt_len: int | None = None
    steps: list[Step] = field(default_factory=list)
    cut: bool = False
    """True once it could not be told from another one."""
    decoded: bool = False
    pending: Step | None = None
    """The last verification step, whose accepted drafts the next row will tell."""

    def fits(self, start: int) -> bool:
        """Whether the next rows of the sequence may begin at a position."""
        if self.pending is not None:
            return self.pending.start < start <= self.pending.start + int(self.pending.depth[-1]) + 1
        return start == self.first_pos + len(self.rows)

    def take(self, start: int, row: int, count: int, depth: NDArray[np.int64] | None = None) -> None:
        """Add rows: prefilled or decoded ones, or those of a verification step with their depths."""
        self.settle(start)
        if depth is not None:
            self.pending = Step(start, row, depth, -1)
        else:
            self.rows.extend(range(row, row + count))

    def settle(self, start: int | None) -> None:
        """Keep the accepted rows of the last verification step; only its first one where no row follows."""
        step, self.pending = self.pending, None
        if step is None:
            return
        if start is None:
            self.rows.append(step.row)
            return
        step = replace(step, accepted=start - step.start - 1)
        self.steps.append(step)
        self.rows.extend(step.kept())


@dataclass(slots=True)
class Result:
    """What became of the rows."""

    sequences: list[Stitched]
    cut: int = 0
    """Sequences that were cut short because they could not be told from others."""
    reason: str | None = None
    """Why nothing can be put back into sequences; None where it was."""


def stitch(passes: Sequence[Pass]) -> Result:
    """Put the rows of forward passes back into sequences, drafts in chains where that explains them, else in trees."""
    chains = _draft_rows(passes)
    result = None if chains == 1 else _stitch(passes, chains, chains=True)
    if result is None or (result.reason is not None and chains):
        trees = _tree_rows(passes)
        result = _stitch(passes, trees, chains=False) if trees else result or Result([], reason=_NO_TREE)
    return result


def _stitch(passes: Sequence[Pass], draft_rows: int, *, chains: bool) -> Result:
    stitcher = _Stitcher(draft_rows, chains=chains)
    for index, one in enumerate(passes):
        reason = stitcher.prefill(one) if one.kind in ("extend", "mixed") else stitcher.decode(one)
        if reason is not None:
            return Result([], reason=f"forward pass {index}: {reason}")
    for sequence in stitcher.all:
        sequence.settle(None)
        if not sequence.decoded and sequence.prompt_len is None and sequence.rows:
            sequence.prompt_len = sequence.first_pos + len(sequence.rows)
    kept = [sequence for sequence in stitcher.all if sequence.rows]
    return Result(kept, cut=sum(sequence.cut for sequence in kept))


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the runs of consecutive positions as (first row, rows)."""
    starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return [(begin, end - begin) for begin, end in pairwise(starts) if end > begin]


def _draft_rows(passes: Sequence[Pass]) -> int:
    """Return the rows of a verification step: the largest number that explains all runs of positions."""
    return math.gcd(*(count for one in passes if one.kind == "verify" for _, count in _runs(one.positions)))


def _tree_rows(passes: Sequence[Pass]) -> int:
    """Return the rows of a verification step of trees: the largest number that explains all passes, 0 if there is none.

    SGLang lists a tree breadth first: after the first row come those one deeper, and no level is left out.
    """
    positions = [one.positions for one in passes if one.kind == "verify"]
    whole = math.gcd(*map(len, positions))
    for count in sorted((n for n in range(2, whole + 1) if whole % n == 0), reverse=True):
        blocks = [np.diff(rows.reshape(-1, count), axis=1) for rows in positions]
        if all((rise[:, 0] == 1).all() and ((rise == 0) | (rise == 1)).all() for rise in blocks):
            return count
    return 0


class _Stitcher:
    def __init__(self, draft_rows: int, *, chains: bool) -> None:
        self.all: list[Stitched] = []
        self._running: list[Stitched] = []
        """In the order of the last pass."""
        self._chunk: Stitched | None = None
        """The sequence whose prompt may go on in the next prefill."""
        self._draft_rows = draft_rows
        self._chains = chains

    def prefill(self, one: Pass) -> str | None:
        """Take a pass that prefills; return why it cannot be taken."""
        lens = one.lens or ()
        if sum(lens) != len(one.positions) or min(lens, default=1) < 1:
            return f"{len(one.positions)} rows, but requests of {sum(lens)} rows"
        firsts = np.cumsum([0, *lens])[:-1].tolist()
        for first, count in zip(firsts, lens, strict=True):
            if (np.diff(one.positions[first : first + count]) != 1).any():
                return "positions of one request do not follow each other"
        starts = [int(one.positions[first]) for first in firsts]
        decoding = 0
        if one.kind == "mixed":  # the running requests follow the new ones, of which there is at least one
            while decoding < len(lens) - 1 and lens[-1 - decoding] == 1 and starts[-1 - decoding] > 0:
                decoding += 1
        new = len(lens) - decoding
        chunk = self._chunk if self._chunk is not None and new and self._chunk.fits(starts[0]) else None
        running = [sequence for sequence in self._running if sequence is not chunk]
        partners = self._match(starts[new:], running) if one.kind == "mixed" else []
        taken: list[Stitched] = []
        for index, (start, first, count) in enumerate(zip(starts, firsts, lens, strict=True)):
            partner = partners[index - new] if index >= new else None
            if partner is not None:
                self._decodes(partner, start)
            elif index == 0 and chunk is not None:
                partner = chunk
            else:
                partner = self._new(start)
            partner.take(start, one.first + first, count)
            taken.append(partner)
        known = {id(sequence) for sequence in taken}
        self._running = taken if one.kind == "mixed" else [s for s in self._running if id(s) not in known] + taken
        fresh = [sequence for sequence in taken if not sequence.decoded]
        self._chunk = fresh[-1] if fresh else None
        return None

    def decode(self, one: Pass) -> str | None:
        """Take a pass of one row a request, or of one verification step a request."""
        verify = one.kind == "verify"
        size = self._draft_rows if verify else 1
        firsts = range(0, len(one.positions), size)
        starts = one.positions[::size].tolist()
        partners = self._match(starts, self._running)
        taken: list[Stitched] = []
        for index, (start, first) in enumerate(zip(starts, firsts, strict=True)):
            partner = partners[index]
            if partner is None:
                if verify and self._chains and index and starts[index - 1] < start < starts[index - 1] + size:
                    return _NO_TREE  # or of one size: that is tried next
                partner = self._new(start)
                partner.decoded = True
            else:
                self._decodes(partner, start)
            depth = one.positions[first : first + size] - start if verify else None
            partner.take(start, one.first + first, size, depth)
            taken.append(partner)
        self._running = taken
        if self._chunk is not None and (self._chunk.decoded or self._chunk.cut):
            self._chunk = None
        return None

    def _new(self, start: int) -> Stitched:
        self.all.append(Stitched(start))
        return self.all[-1]

    def _decodes(self, sequence: Stitched, start: int) -> None:
        if not sequence.decoded:
            sequence.decoded, sequence.prompt_len = True, start

    def _match(self, starts: list[int], running: list[Stitched]) -> list[Stitched | None]:
        """Return the running sequence that each row continues; None for a row that continues none.

        Sequences that cannot be told from each other are cut: they go on under another object, which stands for
        whichever of them it is and is never told.
        """
        if len(starts) == len(running) and all(s.fits(at) for s, at in zip(running, starts, strict=True)):
            return list(running)
        partners: list[Stitched | None] = [None] * len(starts)
        for row, candidates in _candidates(starts, running):
            if len(candidates) == 1:
                partners[row] = running[candidates[0]]
                continue
            for at in candidates:
                running[at].cut = True
            partners[row] = _shadow(starts[row])
        return [
            _shadow(at) if partner is not None and partner.cut else partner
            for at, partner in zip(starts, partners, strict=True)
        ]


def _shadow(start: int) -> Stitched:
    """Return a sequence that follows rows which nobody can name; it is not among the results."""
    return Stitched(start, decoded=True, prompt_len=start)


def _candidates(starts: list[int], running: list[Stitched]) -> list[tuple[int, list[int]]]:
    """Return, for each row that continues a running sequence, the numbers of those that it may continue."""
    rows = list(range(len(starts)))
    first = _greedy(starts, running)
    if first is None:
        rows = [row for row in rows if any(sequence.fits(starts[row]) for sequence in running)]
        first = _greedy([starts[row] for row in rows], running)
    last = _greedy([starts[row] for row in reversed(rows)], running[::-1])
    if first is not None and last is not None:
        ends = [len(running) - 1 - at for at in reversed(last)]
        spans = [range(low, high + 1) for low, high in zip(first, ends, strict=True)]
        return [
            (row, [at for at in span if running[at].fits(starts[row])]) for row, span in zip(rows, spans, strict=True)
        ]
    # The order is not what it should be: positions alone decide, where one row and one sequence have it.
    fitting = [[at for at, sequence in enumerate(running) if sequence.fits(starts[row])] for row in rows]
    wanted = [at for candidates in fitting for at in candidates]
    return [
        (row, candidates if wanted.count(candidates[0]) == 1 else candidates * 2)
        for row, candidates in zip(rows, fitting, strict=True)
    ]


def _greedy(starts: list[int], running: list[Stitched]) -> list[int] | None:
    """Give each row the first sequence that fits it, in the order of both; None where one finds none."""
    found: list[int] = []
    at = 0
    for start in starts:
        while at < len(running) and not running[at].fits(start):
            at += 1
        if at == len(running):
            return None
        found.append(at)
        at += 1
    return found
