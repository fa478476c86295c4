"""The report: one page about the traces of a store that a colleague can open anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import tracekit
from tracekit.analysis.comparison import compare
from tracekit.analysis.ensure import StoreLike, as_store, ensure
from tracekit.analysis.gains import CostOptions
from tracekit.analysis.wants import MAX_WINDOW
from tracekit.economics.offload import link as bytes_per_second
from tracekit.errors import StoreError, UnsupportedError, UsageError
from tracekit.reports import report_words as words
from tracekit.reports.files import check_writable, write
from tracekit.reports.grid import Block, Column, estimate
from tracekit.reports.report_charts import traces as traces_chart
from tracekit.reports.report_html import page
from tracekit.reports.report_md import markdown
from tracekit.reports.report_parts import Drawing, Figure, Report, Row, Section, Subject
from tracekit.reports.report_sections import BATCH_SIZES, at_window, part, told
from tracekit.reports.tables import blocks
from tracekit.reports.text import align, number, printable
from tracekit.schema import Phase
from tracekit.store import Store

FORMATS = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md"}
"""Formats of a report by the suffix of its file."""

MOST_COMPARED = 6
"""Traces that are compared with the first one."""


def report(
    store: StoreLike,
    output: str | Path | None = None,
    *,
    fmt: str | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int | None = None,
    intervals: bool = True,
    seed: int = 0,
    title: str | None = None,
    force: bool = False,
    acceptance_rate: float | None = None,
    acceptance_length: float | None = None,
    at_drafts: int | None = None,
    draft_cost: float | None = None,
    link: str | float | None = None,
    **cost: Unpack[CostOptions],
) -> str:
    """Write a report about the traces of a store: the answer in words, charts and tables, and what made them.

    What is missing in the store is measured first. A section that a trace cannot support says why.

    Parameters
    ----------
    store
        A store or its path.
    output
        The file to write; None: none.
    fmt
        ``html``, one page that needs nothing else and no network, or ``md``, for a pull request. Default: what the
        suffix of ``output`` says, else ``html``.
    trace
        Name of one trace; default: all.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    window
        Window length T in tokens that the report is about. Default: 4, or what the trace has.
    intervals, seed
        As in :func:`tracekit.windows`.
    title
        Heading of the report. Default: it names the model.
    force
        Replace the file if it exists.
    acceptance_rate, acceptance_length, at_drafts, draft_cost, **cost
        As in :func:`tracekit.speedup`: with a machine, the report says what speculative decoding gains on it, and how
        long a token takes with offloaded experts.
    link
        What these come over, as in :func:`tracekit.tpot`. Default: PCIe 4.0 x16.

    Returns
    -------
    str
        The report as text, HTML or Markdown.

    Raises
    ------
    StoreError
        There is no such trace, or none at all.
    UsageError
        An argument is out of range, the suffix names no format, or the file exists and ``force`` is not set.
    TracekitError
        The file cannot be written.
    """
    path = None if output is None else Path(output)
    fmt = fmt or ("html" if path is None else _format_of(path))
    if fmt not in FORMATS.values():
        raise UsageError(f"unknown format {fmt!r}", expected="html or md")
    if path is not None:
        check_writable(path, force=force)
    if link is not None:
        bytes_per_second(link)  # refuses what is no link before anything is measured
    drafting = {
        "acceptance_rate": acceptance_rate,
        "acceptance_length": acceptance_length,
        "at_drafts": at_drafts,
        "draft_cost": draft_cost,
    }
    gain = {name: value for name, value in {**drafting, **cost}.items() if value is not None}
    found = gather(
        as_store(store),
        trace,
        title=title,
        gain=gain,
        link=link,
        phase=phase,
        window=window,
        intervals=intervals,
        seed=seed,
    )
    text = page(found) if fmt == "html" else markdown(found)
    if path is not None:
        write(path, text.encode(), force=force)
    return text


def gather(
    store: Store,
    trace: str | None = None,
    *,
    title: str | None = None,
    gain: Mapping[str, Any] | None = None,
    **how: Any,
) -> Report:
    """Return what a report holds, whatever it will look like.

    Parameters
    ----------
    gain
        Arguments of :func:`tracekit.speedup` that were given.
    **how
        ``link``, ``phase``, ``window``, ``intervals`` and ``seed``.

    Raises
    ------
    StoreError
        There is no such trace, or none at all.
    """
    infos = [store.trace(trace)] if trace is not None else store.traces()
    if not infos:
        raise StoreError("holds no traces yet", where=str(store.path), remedy="Add one with: tracekit ingest")
    subjects = [Subject(store, info, gain=gain or {}, alone=len(infos) == 1, **how) for info in infos]
    for subject in subjects:
        _measure(subject)
    return Report(
        title or _title(subjects),
        words.LEAD,
        [part(subject) for subject in subjects],
        [_comparison(subjects)] if len(subjects) > 1 else [],
        words.METHODS,
        words.REFERENCES,
        f"tracekit {tracekit.__version__}",
    )


def _format_of(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"the name {path.name!r} says no report format",
            expected="a suffix of " + ", ".join(FORMATS),
            remedy="Or name the format: html or md",
        )
    return FORMATS[path.suffix.lower()]


def _title(subjects: Sequence[Subject]) -> str:
    models = dict.fromkeys(subject.info.meta.model or f"trace “{subject.info.name}”" for subject in subjects)
    if len(models) <= 2:
        return "What the routing of " + " and ".join(models) + " allows"
    return f"What the routing of {len(subjects)} traces allows"


def _measure(subject: Subject) -> None:
    """Measure in one pass over the trace what its sections will ask for one by one."""
    length = {"max_window": subject.window} if (subject.window or 0) > MAX_WINDOW else {}
    sizes = [size for size in BATCH_SIZES if size <= subject.info.requests]
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("windows", length),
        ("windows", length | {"batch_size": sizes}),
        ("autocorr", {}),
        ("attribution", {"window": subject.window} if subject.window else {}),
        ("load", {}),
    ]
    told(ensure, subject.store, wanted, **subject.measured)


def _comparison(subjects: Sequence[Subject]) -> Section:
    """Return the traces side by side, and what is different between the first and each of the others."""
    title = "The traces compared"
    rows: list[Row] = []
    notes: list[str] = []
    for subject in subjects:
        found, _ = told(at_window, subject)
        if isinstance(found, UnsupportedError):
            notes.append(f"trace “{subject.info.name}” is left out: {found}")
        else:
            rows.append(found)
    if len(rows) < 2:
        return Section("comparison", title, reason="fewer than two of the traces have windows", notes=notes)
    made = [shlex.join(["tracekit", "summary", subjects[0].store.path.name])]
    figures = [Figure(Drawing.of(traces_chart(rows)), [_overview(rows)], made, "chart_windows")]
    able = [subject for subject in subjects if any(row["trace"] == subject.info.name for row in rows)]
    for tables, refused, command in _pairs(able):
        notes += refused
        figures.append(Figure(None, tables, [command]))
    if len(able) > MOST_COMPARED:
        notes.append(f"the first trace is compared with {MOST_COMPARED - 1} others; tracekit compare takes any two")
    prose = [
        (
            "The reductions of all traces, and beneath them every headline figure of trace "
            f"“{able[0].info.name}” held against that of the other: a difference counts where its interval leaves out "
            "0."
        ),
    ]
    return Section("comparison", title, prose, figures, list(dict.fromkeys(notes)))


def _pairs(subjects: Sequence[Subject]) -> Iterator[tuple[list[Block], list[str], str]]:
    """Yield the comparison of the first trace with each of the others: tables, why there are none, and the command."""
    first = subjects[0]
    for other in subjects[1:MOST_COMPARED]:
        names = {"trace_a": first.info.name, "trace_b": other.info.name}
        options = {"phase": first.phase, "window": first.window, "intervals": first.intervals, "seed": first.seed}
        found, warned = told(compare, first.store, **names, **options)
        if isinstance(found, UnsupportedError):
            yield [], [f"“{first.info.name}” and “{other.info.name}” cannot be compared: {found}"], ""
        else:
            tables = [replace(table, notes=[*table.notes, *warned]) for table in blocks(found, "compare")]
            yield tables, [], first.compared_with(other)


def _overview(rows: Sequence[Row]) -> Block:
    columns = [
        Column("trace", [printable(row["trace"]) for row in rows], right=False),
        Column("phase", [row["phase"] for row in rows], right=False),
        *(
            Column(head, [str(row[name]) for row in rows])
            for head, name in (("N", "num_experts"), ("k", "top_k"), ("T", "window"))
        ),
        *estimate("observed", rows, "observed"),
        Column("× k", align([number(row["per_top_k"]) for row in rows])),
    ]
    for name in ("uniform", "popularity", "request"):
        columns += estimate(f"vs {name}, %", rows, f"reduction_{name}", factor=100)
    return Block(columns, "unique experts of a window, and how many fewer than expected")
