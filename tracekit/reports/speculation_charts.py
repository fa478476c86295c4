"""Charts of speculative decoding: what verification steps accept, load and cost, and what that gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracekit.errors import UnsupportedError
from tracekit.reports.drawing import (
    HEIGHT,
    INK,
    LINES,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    WIDTH,
    Line,
    Row,
    at_length,
    finite,
    ladder,
    lengths,
    line_chart,
    only,
    page,
    panelled,
    panels_of,
    point,
    require,
)

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

_PARTS = {"kept rows": "#0072B2", "rejected rows only": "#E69F00", "all rows": "#6b6b6b"}
"""What loads experts, and its colour; all rows where it is not known which were kept."""
_MARKS = {"accepted_only": "windows of accepted tokens", "expected_uniform": "uniform"}


def acceptance(frame: pl.DataFrame) -> Chart:
    """Draw the experts that verification steps load by the drafts they accept, with the share of such steps.

    Parameters
    ----------
    frame
        As ``tk.query(store, "chart_acceptance")`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    import altair as alt

    require(frame, 'query("chart_acceptance")', "accepted", "share", "unique", "rejected_unique", "accepted_only")
    about, panels = panels_of(frame)
    data = [bar for title, rows in panels for row in rows for bar in _bars(title, row)]
    data += [mark for title, rows in panels for mark in _marks(title, rows[-1])]
    width, height = (WIDTH - 140, HEIGHT) if len(panels) == 1 else (PANEL_WIDTH, PANEL_HEIGHT)
    base = alt.Chart().encode(
        x=alt.X("accepted:O", title="Accepted drafts", axis=alt.Axis(labelAngle=0)),
        tooltip=[
            alt.Tooltip("accepted:O", title="accepted drafts"),
            alt.Tooltip("share:Q", title="share of steps", format=".1%"),
            alt.Tooltip("interval:N", title="95 % interval"),
            alt.Tooltip("part:N", title="loaded by"),
            alt.Tooltip("experts:Q", title="experts", format=".2f"),
            alt.Tooltip("unique:Q", title="of", format=".2f"),
        ],
    )
    color = alt.Color(
        "part:N",
        title="Experts loaded by",
        sort=list(_PARTS),
        scale=alt.Scale(
            domain=(kinds := [p for p in _PARTS if any(r.get("part") == p for r in data)]),
            range=[_PARTS[p] for p in kinds],
        ),
        legend=alt.Legend(orient="top", direction="horizontal", titleOrient="left", offset=4),
    )
    experts = "Unique experts of a step (mean over layers)"
    top = max(row.get("unique") or row["y"] for row in data)
    vertical = alt.Scale(domain=[0, top * 1.12])
    bars = base.transform_filter("isValid(datum.part)")
    layers = [
        bars.mark_bar().encode(
            y=alt.Y("from:Q", title=experts, scale=vertical, axis=alt.Axis(tickCount=6)), y2="to:Q", color=color
        ),
        bars.transform_filter("datum.from === 0")
        .mark_text(dy=-10, fontSize=12, color="white")
        .encode(y=alt.Y("from:Q", title=experts), text=alt.Text("share:Q", format=".0%")),
    ]
    for name in _MARKS:
        line = LINES["uniform"].color if name == "expected_uniform" else INK
        mark = alt.Chart().transform_filter(f"datum.mark === '{name}'")
        tooltip = [alt.Tooltip("name:N"), alt.Tooltip("y:Q", title="experts", format=".2f")]
        layers.append(
            mark.mark_rule(strokeDash=[6, 3], strokeWidth=1.8, color=line).encode(
                y=alt.Y("y:Q", title=experts), tooltip=tooltip
            )
        )
        layers.append(
            mark.mark_text(align="left", dx=6, fontSize=12, color=line).encode(
                x=alt.value("width"), y=alt.Y("y:Q", title=experts), text="name:N"
            )
        )
    return page(
        panelled(alt.LayerChart(layer=layers), data, [title for title, _ in panels], width, height),
        (
            "What a verification step accepts and loads",
            about,
            *_subtitles(frame),
            "at the foot of the bars: share of steps",
        ),
    )


def _bars(panel: str, row: Row) -> list[Row]:
    """Return the parts of one bar, from the bottom up."""
    rejected = row["rejected_unique"]
    parts = {"all rows": row["unique"]}
    if rejected is not None:
        parts = {"kept rows": row["unique"] - rejected, "rejected rows only": rejected}
    if row["unique"] is None:
        return []
    interval = "none"
    if row["share_lo"] is not None:
        interval = f"{100 * row['share_lo']:.1f} to {100 * row['share_hi']:.1f} %"
    bars, bottom = [], 0.0
    for part, experts in parts.items():
        bars.append(
            {
                **{name: row[name] for name in ("accepted", "share", "unique")},
                "panel": panel,
                "interval": interval,
                "part": part,
                "experts": experts,
                "from": bottom,
                "to": bottom + experts,
            }
        )
        bottom += experts
    return bars


def _marks(panel: str, row: Row) -> list[Row]:
    """Return the lines that bars are compared with, and their names."""
    return [
        {"panel": panel, "mark": mark, "name": name, "y": row[mark]}
        for mark, name in _MARKS.items()
        if row[mark] is not None
    ]


def _subtitles(frame: pl.DataFrame) -> list[str]:
    """Return in words what holds for all steps, where the frame is of one trace."""
    if frame["trace"].n_unique() > 1:
        return []
    row = frame.row(0, named=True)
    length, drafted, unique = row["acceptance_length"], row["drafted"], row["mean_unique"]
    return [f"a step drafts {drafted:.3g} tokens, emits {length:.3g} and loads {unique:.1f} experts"]


# Cost and gain

_KEPT = {
    "weight kept": Line("#0072B2", (), "of the window's router weight, what the loaded experts carry"),
    "tokens intact": Line("#D55E00", (8, 3), "tokens of the window all of whose experts are loaded"),
}


def budget(frame: pl.DataFrame, *, window: int | None = None) -> Chart:
    """Draw what a window keeps of its router weight, and of its tokens, by the experts that may be loaded for it.

    Parameters
    ----------
    frame
        As ``tk.query(store, "chart_budget")`` or ``tk.budget`` returns it.
    window
        T, which rows to draw; default: 4, or the longest that a trace has.

    Raises
    ------
    UsageError
        The frame has other columns, or no row of this window length.
    UnsupportedError
        The frame is empty.
    """
    frame = at_length(frame, window, "budget", "budget", "weight_kept", "tokens_intact")
    about, panels = panels_of(frame)
    data = []
    for title, rows in panels:
        lines = {line: [point(r, r["budget"], line.replace(" ", "_")) for r in rows] for line in _KEPT}
        data += ladder(title, lines, lambda _, r: {"loaded": r["loaded"], "unique": r["unique"]}, styles=_KEPT)
    return line_chart(
        data,
        x=("Experts of a layer that may be loaded", "linear"),
        y=("Share kept", ".1%"),
        title=(f"What a budget of experts keeps, windows of {lengths(frame)} tokens", about),
        more=(("loaded", "experts loaded", ".2f"), ("unique", "of", ".2f")),
        styles=_KEPT,
    )


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""One for each draft length that is drawn, Okabe and Ito's."""

_ALONE = {
    "dense": Line("#999999", (8, 3), "a dense model with the same active weights"),
    "uniform": Line("#6b6b6b", (2, 3), "the same with the uniform formula in place of the trace"),
}
"""What one draft length is compared with; of several there are the dashed lines of the uniform formula alone."""


def speedup(frame: pl.DataFrame, *, drafts: int | None = None) -> Chart:
    """Draw the speedup against the batch size, one line a draft length, with that of the uniform formula.

    Parameters
    ----------
    frame
        As ``tk.speedup`` or ``tk.query(store, "speculation")`` returns it.
    drafts
        Draw this draft length alone, beside a dense model where the frame has it.

    Raises
    ------
    UsageError
        The frame has other columns, or not this draft length.
    UnsupportedError
        The frame is empty, or nothing is known of the acceptance.
    """
    return _by_batch_size(frame, "speedup", ("Speedup of speculative decoding", ".2f"), drafts)


def verification_ratio(frame: pl.DataFrame, *, drafts: int | None = None) -> Chart:
    """Draw the verification ratio against the batch size, one line a draft length, with that of the uniform formula.

    Parameters
    ----------
    frame, drafts
        As for :func:`speedup`.

    Raises
    ------
    UsageError
        The frame has other columns, or not this draft length.
    UnsupportedError
        The frame is empty.
    """
    title = ("Cost of a verification (steps without speculation)", ".2f")
    return _by_batch_size(frame, "verification_ratio", title, drafts)


def _by_batch_size(frame: pl.DataFrame, name: str, title: tuple[str, str], drafts: int | None) -> Chart:
    require(frame, "speedup", "batch_size", "drafts", name, f"{name}_uniform")
    if drafts is not None:
        frame = only(frame, "drafts", drafts, "speedup")
    lengths = frame["drafts"].unique().sort().to_list()
    every, most = len(lengths), len(_COLOURS)
    if every > most:
        lengths = [lengths[round(i * (every - 1) / (most - 1))] for i in range(most)]
    alone = every == 1
    styles: dict[str, Line] = dict(_ALONE) if alone else {}
    for K, color in zip(lengths, _COLOURS, strict=False):
        said = f"{K} drafted token" + ("s" if K > 1 else "")
        if not alone:
            styles[f"K = {K}, uniform"] = Line(color, (2, 3), f"{said}, by the uniform formula", named=False)
        styles[f"K = {K}"] = Line(color, (), said)
    about, panels = _panels(frame)
    data = []
    for panel, rows in panels:
        lines = {}
        for style in styles:
            K = lengths[0] if alone else int(style.split()[2].rstrip(","))
            column = name if style == f"K = {K}" else f"{name}_dense" if style == "dense" else f"{name}_uniform"
            lines[style] = [point(r, r["batch_size"], column) for r in rows if r["drafts"] == K and column in r]
        data += ladder(panel, lines, lambda _, r: {"expert_ratio": r["expert_ratio"]}, styles=styles)
    notes = [about] if alone else [about, "dotted: the uniform formula in place of the trace"]
    if every > most:
        notes.append(f"{most} of {every} draft lengths")
    return line_chart(
        data,
        x=("Batch size B (requests verified together)", "log"),
        y=title,
        title=(title[0].partition(" (")[0] + (f", {lengths[0]} drafts" if alone and lengths[0] > 1 else ""), *notes),
        more=(("expert_ratio", "experts loaded, times", ".2f"),),
        styles=styles,
        level=1.0,
    )


def speedup_map(frame: pl.DataFrame) -> Chart:
    """Draw the speedup by batch size and draft length as a heatmap, with what bounds the verification.

    Parameters
    ----------
    frame
        As for :func:`speedup`.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty, or nothing is known of the acceptance.
    """
    import altair as alt

    require(frame, "speedup", "batch_size", "drafts", "speedup")
    about, panels = _panels(frame)
    data = [
        {
            "panel": panel,
            "x": row["batch_size"],
            "y": row["drafts"],
            "value": row["speedup"],
            "ratio": row["verification_ratio"],
            "regime": row.get("regime"),
            "text": f"{row['speedup']:.2f}" + ("*" if row.get("best") else ""),
        }
        for panel, rows in panels
        for row in rows
        if finite(row["speedup"]) is not None
    ]
    if not data:
        raise UnsupportedError("nothing to draw: every speedup is null")
    low, high = min(0.8, *(row["value"] for row in data)), max(1.2, *(row["value"] for row in data))
    across, down = (sorted({row[name] for row in data}) for name in ("x", "y"))
    width = (WIDTH if len(panels) == 1 else PANEL_WIDTH + 60) // len(across) * len(across)
    base = alt.Chart().encode(
        x=alt.X("x:O", title="Batch size B", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        y=alt.Y("y:O", title="Drafts K", sort="descending", axis=alt.Axis(ticks=False, domain=False)),
        tooltip=[
            alt.Tooltip("x:O", title="batch size"),
            alt.Tooltip("y:O", title="drafts"),
            alt.Tooltip("value:Q", title="speedup", format=".3f"),
            alt.Tooltip("ratio:Q", title="verification ratio", format=".3f"),
            alt.Tooltip("regime:N", title="bound by"),
        ],
    )
    colour = alt.Color(
        "value:Q",
        title="Speedup",
        scale=alt.Scale(scheme="purpleorange", reverse=True, domain=[low, high], domainMid=1),
        legend=alt.Legend(orient="bottom", direction="horizontal", gradientLength=WIDTH // 2, format=".2~f"),
    )
    layers = [
        base.mark_rect().encode(color=colour),
        # A frame round what is not bound by the reading of weights: there a longer draft costs time of its own.
        base.transform_filter("datum.regime === 'compute' || datum.regime === 'overhead'")
        .mark_rect(filled=False, strokeWidth=2.2, xOffset=1, x2Offset=-1, yOffset=1, y2Offset=-1)
        .encode(
            stroke=alt.Stroke(
                "regime:N",
                title="Bound by",
                scale=alt.Scale(domain=["compute", "overhead"], range=[INK, "#56B4E9"]),
                legend=alt.Legend(orient="bottom", direction="horizontal", symbolType="square")
                if any(row["regime"] in ("compute", "overhead") for row in data)
                else None,
            )
        ),
        base.mark_text(fontSize=12).encode(
            text="text:N",
            color=alt.condition(
                f"datum.value > {1 + 0.6 * (high - 1):.4f} || datum.value < {1 - 0.6 * (1 - low):.4f}",
                alt.value("white"),
                alt.value(INK),
            ),
        ),
    ]
    notes = ["* the best draft length at its batch size"] if any("*" in row["text"] for row in data) else []
    titles = [panel for panel, _ in panels]
    return page(
        panelled(alt.LayerChart(layer=layers), data, titles, width, 34 * len(down)),
        ("Speedup by batch size and draft length", about, *notes),
    )


def _panels(frame: pl.DataFrame) -> tuple[str, Sequence[tuple[str, list[Row]]]]:
    """Return what is true of every row, and the rows of each trace and kind of unions."""
    keys = [key for key in ("unions", "hardware") if key in frame.columns]
    about, panels = panels_of(frame, "window")
    same = [key for key in keys if frame[key].n_unique() == 1]
    first = frame.row(0, named=True)
    about = " · ".join([about, *(str(first[key]) for key in same if first[key] is not None)])
    if "unions" not in frame.columns or "unions" in same:
        return about, panels
    apart = []
    for panel, rows in panels:
        for kinds, name in ((("accepted-only",), "accepted tokens"), (("steps", "extended"), "real steps")):
            part = [row for row in rows if row["unions"] in kinds]
            apart += [(" · ".join(filter(None, (panel, name))), part)] if part else []
    return about, apart
