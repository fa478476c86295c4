"""The sections of a report about one trace: each asks the store, and says what came out or why nothing could."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from tracekit.analysis.ensure import warn_of
from tracekit.analysis.gains import CostOptions
from tracekit.analysis.wants import MAX_WINDOW, WINDOW
from tracekit.economics.offload import LINK
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.reports import report_words as words
from tracekit.reports.charts import KINDS
from tracekit.reports.grid import Block, Column, estimate
from tracekit.reports.report_charts import layers as layers_chart
from tracekit.reports.report_charts import zoomable
from tracekit.reports.report_parts import Drawing, Figure, Part, Row, Section, Subject
from tracekit.reports.tables import blocks
from tracekit.reports.text import MISSING, align, count, fixed, number, printable, scale

if TYPE_CHECKING:
    import polars as pl

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

MOST_CELLS = 20_000
"""Cells of a heatmap in a report: more would make the page heavy, and be smaller than its pixels."""

_SOURCES = 6
"""Source files that are named."""

ZOOM = "Drag along the axis to move; shift and the wheel zoom; a double click resets."
PICK = "Choose a layer in the list or click on a point; “all” or a double click shows every layer again."


def part(subject: Subject) -> Part:
    """Return all that a report says about one trace."""
    serious = told(warn_of, subject.info)[1]
    sections = []
    said = set(serious)
    for key, (title, make) in SECTIONS.items():
        section, notes = told(make, subject)
        fresh = [note for note in notes if note not in said]
        said.update(fresh)
        if isinstance(section, UnsupportedError):
            sections.append(Section(key, title, reason=str(section)))
        else:
            sections.append(Section(key, title, *section, notes=fresh))
    answer, _ = told(_headline, subject)
    headline, keys = ([str(answer)], []) if isinstance(answer, UnsupportedError) else answer
    return Part(
        subject.info.name,
        headline,
        keys,
        [note.removeprefix(f"trace {subject.info.name!r}: ") for note in serious],
        sections,
    )


Content = tuple[list[str], list[Figure]]
"""Prose and figures."""

T = TypeVar("T")


def told(make: Callable[..., T], *args: Any, **options: Any) -> tuple[T | UnsupportedError, list[str]]:
    """Return what a function returns, or why it cannot, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: T | UnsupportedError = make(*args, **options)
        except UnsupportedError as error:
            result = error
    notes = []
    for warning in caught:
        if issubclass(warning.category, TracekitWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, list(dict.fromkeys(notes))


def at_window(subject: Subject) -> Row:
    """Return the row of the window length that the report is about.

    Raises
    ------
    UnsupportedError
        The trace has no windows.
    """
    frame = _windows_of(subject)
    rows = {row["window"]: row for row in frame.iter_rows(named=True) if row["observed"] is not None}
    if not rows:
        raise UnsupportedError("no request has two consecutive tokens")
    wanted = subject.window or WINDOW
    return rows[wanted] if wanted in rows else rows[max(T for T in rows if max(wanted, min(rows)) >= T)]


def _headline(subject: Subject) -> tuple[list[str], list[Any]]:
    if subject.info.meta.histogram:
        return words.of_counts(subject), []
    try:
        row = at_window(subject)
    except UnsupportedError as error:
        return [f"Of trace “{subject.info.name}” nothing can be said about windows: {error}."], []
    causes = _rows(subject, "chart_attribution", window=row["window"])
    lag = next(iter(_rows(subject, "chart_autocorr", max_lag=1)), None)
    return words.headline(subject, row, causes, batches(subject).rows(named=True)), words.keys(
        subject, row, causes, lag
    )


def _rows(subject: Subject, query: str, **params: Any) -> list[Row]:
    try:
        return subject.query(query, **params).rows(named=True)
    except UnsupportedError:
        return []


def _attribution(subject: Subject) -> Content:
    frame = subject.query("chart_attribution", window=subject.window)
    prose = [
        (
            "The way from uniform routing down to the trace as observed is a ladder of baselines, each of which knows "
            "more. What a step takes off is owed to what it knows: that some experts are popular everywhere, the label "
            "of the request, the request itself, and at last the order of its tokens."
        ),
        (
            "Only that last step is temporal correlation in the strict sense: to put the tokens of a request in random "
            "order destroys it and nothing else. Published work often gives its name to the whole drop."
        ),
    ]
    return prose, [_figure(subject, "attribution", frame, "attribution", window=subject.window)]


def _windows(subject: Subject) -> Content:
    row = at_window(subject)
    frame, longest = _windows_of(subject), _longest(subject)
    made = [subject.command("windows", max_window=longest), *([] if longest else _chart(subject, "windows"))]
    drawing = Drawing.of(KINDS["windows"].draw(frame))
    return words.windows(row), [Figure(drawing, blocks(frame, "windows"), made, "chart_windows")]


def _windows_of(subject: Subject, batch_size: int | Sequence[int] = 1) -> pl.DataFrame:
    """Return the unique experts of windows, with what the charts say of the trace."""
    import polars as pl

    from tracekit.analysis.routing import windows

    meta = subject.info.meta
    frame = windows(subject.store, **subject.measured, max_window=_longest(subject), batch_size=batch_size)
    about = {"model": pl.lit(meta.model, pl.String), "num_experts": pl.lit(meta.num_experts)}
    return frame.with_columns(**about, top_k=pl.lit(meta.top_k))


def _longest(subject: Subject) -> int | None:
    """Return the longest window to ask for: past the default where the report is about a longer one."""
    return subject.window if (subject.window or 0) > MAX_WINDOW else None


def _batches(subject: Subject) -> Content:
    frame = batches(subject)
    rows = frame.rows(named=True)
    drawing = Drawing.of(KINDS["batch"].draw(frame))
    sizes, length = [row["batch_size"] for row in rows], rows[0]["window"]
    command = subject.command("windows", max_window=length, batch_size=sizes)
    figure = Figure(drawing, [_batch_block(rows)], [command, *_chart(subject, "batch", window=length)], "chart_batch")
    return words.batches(rows), [figure]


def batches(subject: Subject) -> pl.DataFrame:
    """Return the windows of the report's length for all batch sizes that the trace has requests for."""
    import polars as pl

    length = at_window(subject)["window"]
    frame = _windows_of(subject, [size for size in BATCH_SIZES if size <= subject.info.requests])
    return frame.filter(pl.col("window") == length, pl.col("observed").is_not_null())


def _batch_block(rows: Sequence[Row]) -> Block:
    columns = [Column("B", [str(row["batch_size"]) for row in rows]), *estimate("observed", rows, "observed")]
    columns.append(Column("uniform", align([number(row["expected_uniform"]) for row in rows])))
    for name in ("uniform", "popularity", "request"):
        if any(row[f"reduction_{name}"] is not None for row in rows):
            columns += estimate(f"vs {name}, %", rows, f"reduction_{name}", factor=100)
    return Block(columns, f"windows of {rows[0]['window']} tokens: unique experts of B of them, and how many fewer")


def _autocorr(subject: Subject) -> Content:
    from tracekit.analysis.routing import autocorr

    frame = subject.query("chart_autocorr")
    drawing = Drawing.of(KINDS["autocorr"].draw(frame), ZOOM)
    zoomable(drawing.spec)
    made = [subject.command("autocorr"), *_chart(subject, "autocorr")]
    tables = blocks(autocorr(subject.store, **subject.measured), "autocorr")
    return words.autocorr(frame.rows(named=True)), [Figure(drawing, tables, made, "chart_autocorr")]


def _layers(subject: Subject) -> Content:
    import polars as pl

    from tracekit.analysis.routing import autocorr, windows

    length = at_window(subject)["window"]
    frame = windows(subject.store, **subject.measured, max_window=length, by="layer")
    lags = autocorr(subject.store, **subject.measured, by="layer")
    one = frame.filter(pl.col("window") == length)
    drawing = Drawing.of(layers_chart(one, lags), PICK)
    made = [subject.command("windows", max_window=length, by="layer"), subject.command("autocorr", by="layer")]
    figures = [Figure(drawing, [_layer_block(one.rows(named=True))], made)]
    if lags["layer"].n_unique() > 1:
        map_of_lags = Drawing.of(KINDS["layer-lag"].draw(subject.query("chart_layer_lag")))
        table = blocks(lags, "autocorr")
        made = [subject.command("autocorr", by="layer"), *_chart(subject, "layer-lag")]
        figures.append(Figure(map_of_lags, table, made, "chart_layer_lag"))
    return words.layers(one.rows(named=True)), figures


def _layer_block(rows: Sequence[Row]) -> Block:
    columns = [Column("layer", [str(row["layer"]) for row in rows]), *estimate("observed", rows, "observed")]
    for name in ("uniform", "popularity", "label", "request"):
        if any(row[f"reduction_{name}"] is not None for row in rows):
            columns += estimate(f"vs {name}, %", rows, f"reduction_{name}", factor=100)
    return Block(columns, f"windows of {rows[0]['window']} tokens: unique experts, and how many fewer than expected")


def _load(subject: Subject) -> Content:
    from tracekit.analysis.routing import load

    meta = subject.info.meta
    frame = load(subject.store, **subject.selectors)
    made = [subject.command("load", intervals=False)]
    drawing, prose = None, words.load(frame.rows(named=True), meta)
    cells = meta.num_experts * len(meta.layers)
    if cells > MOST_CELLS:
        prose.append(f"The map of {count(cells)} experts is too large for this page; the command makes it.")
    elif meta.top_k:
        drawing = Drawing.of(KINDS["popularity"].draw(subject.query("popularity_by_layer")))
    made += _chart(subject, "popularity", intervals=False) if meta.top_k else []
    return prose, [Figure(drawing, blocks(frame, "load"), made, "popularity_by_layer" if meta.top_k else None)]


def _speculation(subject: Subject) -> Content:
    import polars as pl

    from tracekit.analysis.speculation import expert_ratio

    length = at_window(subject)["window"]
    ratios = expert_ratio(subject.store, **subject.measured, max_window=length)
    ratios = ratios.filter(pl.col("window") == length, pl.col("ratio").is_not_null())
    prose = words.ratio(ratios.rows(named=True))
    made = [subject.command("expert-ratio", max_window=length)]
    figures = [Figure(None, blocks(ratios, "expert_ratio"), made)]
    if subject.info.meta.drafts_included:
        said, figure = _acceptance(subject)
        prose += said
        figures.append(figure)
    else:
        prose.append(
            "The trace holds accepted tokens only. Verification also reads the experts of drafts that are rejected, "
            "which a trace with verification steps would show."
        )
    said, gains = _gain(subject)
    return prose + said, figures + gains


def _acceptance(subject: Subject) -> tuple[list[str], Figure]:
    from tracekit.analysis.speculation import acceptance, steps

    found = steps(subject.store, **subject.measured)
    drawing = Drawing.of(KINDS["acceptance"].draw(subject.query("chart_acceptance")))
    tables = blocks(acceptance(subject.store, **subject.measured), "acceptance") + blocks(found, "steps")
    made = [subject.command("acceptance"), subject.command("steps"), *_chart(subject, "acceptance")]
    return words.accepted(found.rows(named=True)), Figure(drawing, tables, made, "chart_acceptance")


def _gain(subject: Subject) -> tuple[list[str], list[Figure]]:
    from tracekit.analysis.gains import speedup

    gain = subject.gain
    if not subject.has_machine:
        return [words.NO_MACHINE], []
    try:
        frame = speedup(subject.store, **subject.measured, **gain)
    except UsageError as error:
        if subject.alone:
            raise
        return [f"What speculation gains cannot be said of this trace: {error}."], []
    made = [subject.command("speedup", **gain)]
    figures = [Figure(Drawing.of(KINDS["verification-ratio"].draw(frame)), blocks(frame, "speedup"), made)]
    if frame["speedup"].is_not_null().any():
        figures.insert(0, Figure(Drawing.of(KINDS["speedup"].draw(frame)), blocks(frame, "speedup"), made))
    return words.gain(frame.rows(named=True)), figures


def _budget(subject: Subject) -> Content:
    import polars as pl

    from tracekit.analysis.speculation import budget

    length = at_window(subject)["window"]
    frame = budget(subject.store, **subject.measured, window=length).filter(pl.col("window") == length)
    made = [subject.command("budget", window=length), *_chart(subject, "budget", window=length)]
    figure = Figure(Drawing.of(KINDS["budget"].draw(frame)), blocks(frame, "budget"), made, "chart_budget")
    return words.budget(frame.rows(named=True), subject.info.meta), [figure]


def _reuse(subject: Subject) -> Content:
    from tracekit.analysis.offloading import reuse

    frame = reuse(subject.store, **subject.measured)
    made = [subject.command("reuse"), *_chart(subject, "reuse")]
    figures = [Figure(Drawing.of(KINDS["reuse"].draw(frame)), blocks(frame, "reuse"), made, "chart_reuse")]
    sets, _ = told(_windows_of, subject)
    if isinstance(sets, UnsupportedError):
        return words.reuse(frame.rows(named=True)), figures
    rows = [row for row in sets.iter_rows(named=True) if row["observed"] is not None]
    made = [subject.command("windows", max_window=_longest(subject))]
    figures.append(Figure(None, [_working_set(rows)], made, "working_set"))
    return words.reuse(frame.rows(named=True)) + words.working_set(rows), figures


def _working_set(rows: Sequence[Row]) -> Block:
    columns = [Column("tokens", [str(row["window"]) for row in rows]), *estimate("experts", rows, "observed")]
    shares = [fixed(scale(row["observed"] / row["num_experts"], 100), 1) for row in rows]
    added = [number(after["observed"] - row["observed"]) for row, after in pairwise(rows)] + [MISSING]
    columns += [Column("of N, %", shares), Column("the next token adds", align(added))]
    return Block(columns, "the working set: distinct experts of a layer in so many consecutive tokens")


def _locality(subject: Subject) -> Content:
    from tracekit.analysis.offloading import locality

    frame = locality(subject.store, **subject.measured)
    made = [subject.command("locality"), *_chart(subject, "locality")]
    figure = Figure(Drawing.of(KINDS["locality"].draw(frame)), blocks(frame, "locality"), made, "chart_locality")
    return words.locality(frame.rows(named=True)), [figure]


def _layer_budgets(subject: Subject) -> Content:
    from tracekit.analysis.offloading import layer_budgets

    frame = layer_budgets(subject.store, **subject.measured)
    made = [subject.command("layer-budgets"), *_chart(subject, "layer-budgets")]
    drawing = Drawing.of(KINDS["layer-budgets"].draw(frame))
    figure = Figure(drawing, blocks(frame, "layer_budgets"), made, "chart_layer_budgets")
    return words.layer_budgets([row for row in frame.iter_rows(named=True) if row["layer"] is None]), [figure]


def _offloading(subject: Subject) -> Content:
    from tracekit.analysis.tpot import tpot
    from tracekit.reports.timing_charts import tpot as tpot_chart

    if not subject.has_machine:
        raise UnsupportedError(words.NO_TIMES)
    meta = subject.info.meta
    asked: dict[str, Any] = {"link": subject.link or LINK, "capacity": max(meta.num_experts // 2, meta.top_k)}
    asked |= {name: value for name, value in subject.gain.items() if name in CostOptions.__annotations__}
    asked |= _best_predictor(subject)
    try:
        frame = tpot(subject.store, **subject.measured, **asked)
    except UsageError as error:
        raise UnsupportedError(str(error)) from None
    made = [subject.command("tpot", **asked)]
    return words.offloading(frame.rows(named=True)), [
        Figure(Drawing.of(tpot_chart(frame)), blocks(frame, "tpot"), made)
    ]


def _best_predictor(subject: Subject) -> dict[str, Any]:
    """Return the predictor, and how far it looks ahead, that foretells most of a token's k experts, if any."""
    from tracekit.analysis.offloading import prefetch

    frame, _ = told(prefetch, subject.store, **subject.measured)
    if isinstance(frame, UnsupportedError):
        return {}
    rows = [r for r in frame.iter_rows(named=True) if r["m"] == subject.info.meta.top_k and r["recall"] is not None]
    if not rows:
        return {}
    best = max(rows, key=lambda row: row["recall"])
    return {"predictor": best["predictor"]} | ({} if best["distance"] is None else {"distance": best["distance"]})


def _cache(subject: Subject) -> Content:
    from tracekit.analysis.offloading import cache

    frame = cache(subject.store, **subject.measured)
    made = [subject.command("cache"), *_chart(subject, "cache")]
    figure = Figure(Drawing.of(KINDS["cache"].draw(frame)), blocks(frame, "cache"), made, "cache_misses")
    return words.cache(frame.rows(named=True), subject.info.meta), [figure]


def _prefetch(subject: Subject) -> Content:
    from tracekit.analysis.offloading import prefetch

    frame = prefetch(subject.store, **subject.measured)
    drawing = Drawing.of(KINDS["prefetch"].draw(subject.query("prefetch_recall")))
    made = [subject.command("prefetch"), *_chart(subject, "prefetch")]
    figure = Figure(drawing, blocks(frame, "prefetch"), made, "prefetch_recall")
    return words.prefetch(frame.rows(named=True), subject.info.meta), [figure]


def _provenance(subject: Subject) -> Content:
    info, meta = subject.info, subject.info.meta
    sources = list(dict.fromkeys(PurePath(file.name).name for file in info.sources))
    if len(sources) > _SOURCES:
        sources[_SOURCES - 1 :] = [f"{len(sources) - _SOURCES + 1:,} more"]
    ranks = {True: "the router's order", False: "sorted: the router's order is lost", None: None}[meta.router_order]
    facts: Mapping[str, Any] = {
        "model": meta.model,
        "engine": " ".join(filter(None, [meta.engine, meta.engine_version])) or None,
        "experts per layer, N": meta.num_experts,
        "experts per token, k": meta.top_k or None,
        "the model's own k": meta.native_top_k,
        "MoE layers": f"{len(meta.layers)} ({meta.layers[0]} to {meta.layers[-1]})",
        "requests": info.requests,
        "tokens": info.tokens,
        "of which decode, prefill": _phases(subject),
        "phase that is reported": subject.phase or info.default_phase,
        "expert ids": meta.id_space,
        "ranks": ranks,
        "rejected drafts": "kept, as verification steps" if meta.drafts_included else "not in the trace",
        "read from": f"{', '.join(sources)} ({meta.source_format})",
        "ingested": info.created,
        "content": info.content,
        "seed of the intervals": subject.seed if subject.intervals else "no intervals",
    }
    names = list(facts)
    values = [_fact(value) for value in facts.values()]
    about = Block([Column("", names, right=False), Column("", values, right=False)], "What the trace is")
    tables = [about, *([_findings(subject)] if info.findings else [])]
    found = len(info.findings)
    checked = f"{found} {'thing' if found == 1 else 'things'} to look at, in the table" if found else "nothing amiss"
    prose = [
        "Which questions may be asked of a trace depends on what its source kept.",
        f"The check at ingest found {checked}.",
        *(f"Noted at ingest: {note}." for note in info.notes),
    ]
    commands = [subject.command("info", intervals=False), subject.command("check", intervals=False)]
    return prose, [Figure(None, tables, [c.split(" --phase ")[0] for c in commands])]


def _phases(subject: Subject) -> str | None:
    decode, prefill = (sum(getattr(s, f"{p}_tokens") for s in subject.info.segments) for p in ("decode", "prefill"))
    return f"{count(decode)}, {count(prefill)}" if decode or prefill else None


def _fact(value: Any) -> str:
    if value is None:
        return "not known"
    return count(value) if isinstance(value, int) else printable(str(value))


def _findings(subject: Subject) -> Block:
    names = ("severity", "finding", "where", "evidence", "effect", "remedy")
    found = subject.info.findings
    columns = [Column(name, [printable(getattr(f, name)) or MISSING for f in found], right=False) for name in names]
    return Block(columns, "What the check found")


def _figure(subject: Subject, kind: str, frame: Any, verb: str, **params: Any) -> Figure:
    """Return a chart of its query's frame, with the table of the verb that says the same."""
    made = [subject.command(verb, **params), *_chart(subject, kind, **params)]
    return Figure(Drawing.of(KINDS[kind].draw(frame)), blocks(frame, verb), made, KINDS[kind].query)


def _chart(subject: Subject, kind: str, intervals: bool = True, **params: Any) -> list[str]:
    """Return the command that draws a chart alone, where the report can be told how."""
    given = [word for name, value in params.items() if value is not None for word in ("--param", f"{name}={value}")]
    return [subject.command("chart", kind, *given, "-o", f"{kind}.html", intervals=intervals)]


SECTIONS: dict[str, tuple[str, Callable[[Subject], Content]]] = {
    "attribution": ("What the reduction is made of", _attribution),
    "windows": ("Verification windows", _windows),
    "batches": ("Batch sizes", _batches),
    "autocorr": ("How long the correlation lasts", _autocorr),
    "layers": ("Layer by layer", _layers),
    "load": ("How evenly the experts are used", _load),
    "speculation": ("What speculative decoding gains", _speculation),
    "budget": ("What a budget of experts keeps", _budget),
    "reuse": ("How far reuse reaches", _reuse),
    "locality": ("How local the routing is", _locality),
    "cache": ("What a cache of experts hits", _cache),
    "layer-budgets": ("How layers should share a cache", _layer_budgets),
    "prefetch": ("How well the experts are foretold", _prefetch),
    "offloading": ("How long a token takes with offloaded experts", _offloading),
    "provenance": ("Where the numbers come from", _provenance),
}
"""The sections by key, in their order."""
