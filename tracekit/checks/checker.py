"""The check of a trace: every detector over one stream of requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tracekit.checks import order, provenance
from tracekit.checks.finding import Finding, ordered
from tracekit.checks.keys import request_keys
from tracekit.checks.repeats import Copies, Loops, RepeatedRows, leading_run
from tracekit.checks.rows import Rows
from tracekit.checks.sample import Sample
from tracekit.schema import Histogram, Request, TraceMeta

WHOLE_IDS = 1 << 23
"""Ids that are looked at one by one; of the requests after that, one in ``THINNED``: faults of a capture go through
it, and a check that costs as much as the ingest would be turned off."""
THINNED = 16


class Checker:
    """Take the canonical requests of a trace one by one; then say what is wrong with it.

    What it keeps does not grow with the rows of the trace: sums, a key per request, examples, and a sample of
    some 30,000 rows.

    Parameters
    ----------
    meta
        What holds for the whole trace.
    native_top_k
        The model's own k, where it is known from elsewhere than the trace.
    """

    def __init__(self, meta: TraceMeta, native_top_k: int | None = None) -> None:
        self.meta = meta if native_top_k is None else replace(meta, native_top_k=native_top_k)
        self.sample = Sample()
        self._repeated = RepeatedRows(meta)
        self._copies = Copies(meta)
        self._loops = Loops(meta)
        self._rows = Rows(meta)
        self._phases = provenance.Phases()
        self._seen = self._looked = self._ids = 0

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
        gaps = np.zeros(0, np.int64)
        if request.positions is not None:
            gaps = np.flatnonzero(np.diff(request.positions) != 1) + 1
        self.sample.add(request.request_id, request.ids, gaps)

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
            *provenance.physical(meta),
            *provenance.engine_notes(meta),
            *_dense(notes),
        ]
        if sample.rows:
            found += self._rows.findings() + self._phases.findings() + self._repeated.findings()
        if sample.rows and meta.num_experts > meta.top_k:  # else every row is the same and shows nothing
            found += self._copies.findings(sample, sample.keys())
            found += self._loops.findings(sample)
            found += provenance.constant_layers(meta, sample)
            if not any(f.finding == "argsort-view" for f in found):
                found += order.interleaved(sample, meta) + order.shifted_layers(sample, meta)
        if self._looked < self._seen:
            part = f"{self._looked:,} of {self._seen:,} requests looked at"
            found = [replace(f, evidence=f"{f.evidence}; {part}") if f.severity != "note" else f for f in found]
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
