"""The check of a trace: every detector over one stream of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from tracekit.checks import order, provenance
from tracekit.checks.finding import Finding, ordered
from tracekit.checks.keys import request_keys
from tracekit.checks.repeats import Copies, Loops, RepeatedRows, leading_run
from tracekit.checks.replicas import physical, replicas
from tracekit.checks.rows import Rows
from tracekit.checks.sample import Sample
from tracekit.checks.steps import Steps
from tracekit.checks.weights import Weights
from tracekit.schema import Histogram, Phase, Request, TraceMeta

WHOLE_IDS = 1 << 23
"""Ids that are looked at one by one; of the requests after that, one in ``THINNED``: faults of a capture go through
it, and a check that costs as much as the ingest would be turned off."""
THINNED = 16


OF_INGEST = frozenset({"phase-ignored", "engine-version"})
"""Findings that rest on what was said at an ingest, by the user or the source, and is not kept with the trace."""


class Checker:
    """Take the canonical requests of a trace one by one; then say what is wrong with it.

    What it keeps does not grow with the rows of the trace: sums, a key per request, examples, and a sample of
    some 25,000 rows. Checkers of the parts of a trace can be merged, in the order of the parts.

    Parameters
    ----------
    meta
        What holds for the whole trace.
    native_top_k
        The model's own k, where it is known from elsewhere than the trace.
    native_experts
        The model's own N, likewise.
    phase
        The phase that the user gave all rows, where he did.
    """

    def __init__(
        self,
        meta: TraceMeta,
        native_top_k: int | None = None,
        native_experts: int | None = None,
        phase: Phase | None = None,
    ) -> None:
        self.meta = meta if native_top_k is None else replace(meta, native_top_k=native_top_k)
        self.sample = Sample()
        self._experts = native_experts
        self._repeated = RepeatedRows(meta)
        self._copies = Copies(meta)
        self._loops = Loops(meta)
        self._rows = Rows(meta)
        self._phases = provenance.Phases(meta, phase)
        self._steps = Steps(meta)
        self._weights = Weights(meta)
        self._seen = self._looked = self._ids = 0

    @property
    def requests(self) -> int:
        """Return the requests that were taken."""
        return self._seen

    def add(self, request: Request | Histogram) -> None:
        """Take one request; its arrays are not kept. Counts without tokens show nothing that is looked for here."""
        if isinstance(request, Histogram):
            return
        self._seen += 1
        if self._ids >= WHOLE_IDS and self._seen % THINNED:
            return
        self._looked += 1
        self._ids += request.ids.size
        keys = request_keys(request.ids)
        self._repeated.add(request, keys)
        self._copies.add(request, keys)
        self._loops.add(request, leading_run(keys.rows))
        self._rows.add(request)
        self._phases.add(request)
        self._steps.add(request)
        self._weights.add(request)
        gaps = np.zeros(0, np.int64)
        if request.positions is not None:
            gaps = np.flatnonzero(np.diff(request.positions) != 1) + 1
        self.sample.add(request.request_id, request.ids, gaps)

    def merge(self, other: Checker) -> None:
        """Add what another checker saw of the requests that follow this one's, in the same trace.

        The findings are those of one pass over all of them, as long as no part has more than ``WHOLE_IDS`` ids, nor the
        trace: which requests are looked at beyond depends on where it was cut.
        """
        self.sample.merge(other.sample)
        self._repeated.merge(other._repeated)
        self._copies.merge(other._copies)
        self._loops.merge(other._loops)
        self._rows.merge(other._rows)
        self._phases.merge(other._phases)
        self._steps.merge(other._steps)
        self._weights.merge(other._weights)
        self._seen += other._seen
        self._looked += other._looked
        self._ids += other._ids

    def findings(self, notes: Iterable[str] = ()) -> list[Finding]:
        """Return what was found, the serious first.

        Parameters
        ----------
        notes
            What the reader noted: layers that it left out as dense become a finding.
        """
        meta, sample = self.meta, self.sample
        found = [
            *provenance.counts_only(meta),
            *provenance.reduced(meta),
            *physical(meta, self._experts),
            *provenance.engine_notes(meta),
            *_dense(notes),
        ]
        if sample.rows:
            found += self._rows.findings() + self._phases.findings(self._copies.heads()) + self._repeated.findings()
            found += self._steps.findings() + self._weights.findings()
        if sample.rows and meta.num_experts > meta.top_k:  # else every row is the same and shows nothing
            found += self._copies.findings(sample, sample.keys())
            found += self._loops.findings(sample)
            found += provenance.constant_layers(meta, sample)
            if not any(f.finding == "physical-ids" for f in found):
                found += replicas(sample, meta)
            if not any(f.finding == "argsort-view" for f in found):
                found += order.interleaved(sample, meta) + order.shifted_layers(sample, meta)
        if self._looked < self._seen:
            part = f"{self._looked:,} of {self._seen:,} requests looked at"
            found = [replace(f, evidence=f"{f.evidence}; {part}") if f.severity != "note" else f for f in found]
        return ordered(found)


def findings_of_parts(parts: Sequence[Checker], notes: Iterable[str] = ()) -> list[Finding]:
    """Return what is wrong with a trace of several ingests: with all of it, and with parts where the whole hides it.

    Shares, copies and statistics are those of all requests. What is found in a part and not in the whole (a few
    interleaved requests among many others) is named with the part's requests.

    Parameters
    ----------
    parts
        A checker of each ingest, in order; the first one takes in all others.
    notes
        As in :meth:`Checker.findings`.
    """
    whole, *others = parts
    if not others:
        return whole.findings(notes)
    of_part, low = [], 0
    for part in parts:
        of_part += [(low, low + part.requests - 1, f) for f in part.findings()]
        low += part.requests
    for other in others:
        whole.merge(other)
    found = whole.findings(notes)
    known = {f.finding for f in found}
    found += [
        replace(f, where=f"requests {first}-{last} of {low:,}: {f.where}")
        for first, last, f in of_part
        if f.finding not in known
    ]
    return ordered(found)


def _dense(notes: Iterable[str]) -> list[Finding]:
    return [
        Finding(
            "note",
            "dense-layers",
            note.partition(" is dense")[0].partition(" are dense")[0],
            note,
            "none: averages run over the layers with experts",
            "Nothing to do; give --config if one of them should have experts",
        )
        for note in notes
        if "dense (all zero)" in note
    ]
