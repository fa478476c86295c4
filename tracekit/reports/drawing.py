"""Drawing: what the charts have in common, from rows of a frame to lines, heatmaps and waterfalls.

The rows become plain data inside the chart; nothing that a trace, a model or a label is called becomes a field name or
an expression. Rows of several traces, phases or groups become one panel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tracekit.analysis.wants import WINDOW
from tracekit.errors import UnsupportedError, UsageError
from tracekit.reports.display import script_safe

if TYPE_CHECKING:
    import altair as alt
    import polars as pl

    Chart: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart | alt.ConcatChart

Row = dict[str, Any]
Panel = tuple[str, list[Row]]

WIDTH, HEIGHT = 480, 300
PANEL_WIDTH, PANEL_HEIGHT = 300, 200
"""Size of the plot, and of each plot where there are several."""

LEADER = 14
"""Width of what leads from a line's end to its name."""

INK, FAINT = "#333333", "#6b6b6b"


@dataclass(frozen=True, slots=True)
class Line:
    """How a line of a ladder looks: Okabe and Ito's colours, told apart by dashes as well."""

    color: str
    dash: tuple[int, ...]
    meaning: str
    named: bool = True
    """Whether its name stands at its end."""


LINES = {
    "uniform": Line("#6b6b6b", (2, 3), "expected if every k-subset were equally likely"),
    "popularity": Line("#D55E00", (8, 3), "expected of independent tokens with the trace's popularity"),
    "label": Line("#009E73", (8, 3, 2, 3), "expected of independent tokens with the label's popularity"),
    "request": Line("#CC79A7", (4, 2), "expected of the request's own tokens in random order"),
    "observed": Line("#0072B2", (), "the trace as observed"),
}
# From frame to panels


def require(frame: pl.DataFrame, source: str, *columns: str) -> None:
    """Refuse a frame without those columns or without rows; ``source`` names what makes such frames."""
    missing = [name for name in ("trace", "phase", *columns) if name not in frame.columns]
    if missing:
        raise UsageError(f"a frame without {', '.join(missing)}", expected=f"the frame of tk.{source}")
    if frame.is_empty():
        raise UnsupportedError("nothing to draw: the frame has no rows")


def only(frame: pl.DataFrame, column: str, value: int, source: str, *columns: str) -> pl.DataFrame:
    """Return the rows with one batch size or window length."""
    require(frame, source, column, *columns)
    chosen = frame.filter(frame[column] == value)
    if chosen.is_empty():
        held = ", ".join(str(v) for v in frame[column].unique().sort())
        raise UsageError(f"no rows with {column} = {value}", expected=f"{column} among those of the frame: {held}")
    return chosen


def at_length(frame: pl.DataFrame, window: int | None, source: str, *columns: str) -> pl.DataFrame:
    """Return the rows with one window length; by default 4, or the longest up to it that a trace has."""
    import polars as pl

    if window is not None:
        return only(frame, "window", window, source, *columns)
    require(frame, source, "window", *columns)
    frame = frame.filter(pl.col("window") <= WINDOW)
    return frame.filter(pl.col("window") == pl.col("window").max().over("trace"))


def lengths(frame: pl.DataFrame) -> str:
    """Return the window lengths of a frame as text."""
    return ", ".join(str(T) for T in frame["window"].unique().sort())


def panels_of(frame: pl.DataFrame, axis: str = "") -> tuple[str, list[Panel]]:
    """Return what is true of every row, as one line of text, and the rows of each panel with what sets it apart."""
    keys = [k for k in ("trace", "phase", "layer", "label", "request_id", "window") if k in frame.columns and k != axis]
    apart = [k for k in keys if frame[k].n_unique() > 1]
    first = frame.row(0, named=True)
    about = [_said(k, first[k]) for k in keys if k not in apart and k != "window"]
    if "model" in first and "trace" not in apart and first["model"]:
        about.insert(1, str(first["model"]))
    if "num_experts" in first and "trace" not in apart:
        about.append(f"N = {first['num_experts']}, k = {first['top_k']}")
    if not apart:
        return " · ".join(about), [("", frame.rows(named=True))]
    parts = frame.group_by(apart, maintain_order=True)
    return " · ".join(about), [
        (" · ".join(_said(k, v) for k, v in zip(apart, values, strict=True)), part.rows(named=True))
        for values, part in parts
    ]


_LONGEST_NAME = 64


def _said(key: str, value: Any) -> str:
    match key:
        case "phase":
            return f"{value} tokens"
        case "layer":
            return f"layer {value}"
        case "window":
            return f"T = {value}"
    # A title that the renderer has to cut may be cut inside a character.
    text = "(none)" if value is None else str(value)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


# Lines


Point = tuple[int, float | None, float | None, float | None, Row]
"""x, y, the ends of its interval, and the row that it is from."""


def point(row: Row, x: int, y: str) -> Point:
    """Return the point of a row at x: the column ``y`` and the ends of its interval, where the row has them."""
    return x, row[y], row.get(f"{y}_lo"), row.get(f"{y}_hi"), row


def ladder(
    panel: str,
    lines: Mapping[str, Iterable[Point]],
    more: Callable[[float, Row], Row],
    prefix: str = "",
    styles: Mapping[str, Line] = LINES,
) -> list[Row]:
    """Return the points of one panel, each line's last one with the line's name; ``styles`` say what a line means."""
    data: list[Row] = []
    for name, points in lines.items():
        drawn = [point for point in sorted(points, key=lambda p: p[0]) if finite(point[1]) is not None]
        for x, y, lo, hi, row in drawn:
            assert y is not None
            band = finite(lo) is not None and finite(hi) is not None
            data.append(
                {
                    "panel": panel,
                    "series": name,
                    "x": x,
                    "y": y,
                    "lo": lo if band else None,
                    "hi": hi if band else None,
                    "meaning": styles[name].meaning,
                    **more(y, row),
                }
            )
        if drawn and styles[name].named:
            data[-1]["name"] = prefix + name
    return data


def _apart(values: Sequence[float], gap: float, floor: float = -math.inf) -> list[float]:
    """Return positions in the order of ``values``, ``gap`` apart and from ``floor`` up, as near to them as may be."""

    def lowest(group: list[int]) -> float:
        return max(floor, sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2)

    groups: list[list[int]] = []
    for i in sorted(range(len(values)), key=values.__getitem__):
        groups.append([i])
        # Groups that collide become one, around its members' mean.
        while len(groups) > 1 and lowest(groups[-1]) < lowest(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    placed = {i: lowest(group) + gap * rank for group in groups for rank, i in enumerate(group)}
    return [placed[i] for i in range(len(values))]


def line_chart(
    data: list[Row],
    *,
    x: tuple[str, str],
    y: tuple[str, str],
    title: tuple[str, ...],
    more: Sequence[tuple[str, str, str]],
    styles: Mapping[str, Line] = LINES,
    level: float = 0,
) -> Chart:
    """Return lines with their bands and names, a plot for each panel.

    Parameters
    ----------
    data
        Points, as :func:`ladder` returns them.
    x
        Title of the axis, and ``linear`` or ``log``.
    y
        Title of the axis, and the format of its values.
    title
        Title and subtitles.
    more
        Field, name and format of what else a point's tooltip shows.
    styles
        How each line looks, in the order in which they are drawn; the first that are drawn lie below.
    level
        Where the vertical axis starts, or below where a line goes there.
    """
    import altair as alt

    if not data:
        raise UnsupportedError("nothing to draw: every value is null")
    panels = list(dict.fromkeys(row["panel"] for row in data))
    width, height = (WIDTH, HEIGHT) if len(panels) == 1 else (PANEL_WIDTH, PANEL_HEIGHT)
    top = max(max(row["y"], row["hi"] or 0) for row in data)
    bottom = min(level, *(min(row["y"], row["y"] if row["lo"] is None else row["lo"]) for row in data))
    at = sorted({row["x"] for row in data})
    # Room for the lines' names to the right of the last point.
    room = (85 + LEADER) / width
    if x[1] == "log":
        end = at[-1] * (at[-1] / at[0] + 1) ** (room / (1 - room))
        scale = alt.Scale(type="log", base=2, domain=[at[0], end])
    else:
        end = at[-1] + max(1, at[-1] - at[0]) * room / (1 - room)
        scale = alt.Scale(domain=[at[0], end], nice=False, zero=False)
    for panel in panels:
        rows = [row for row in data if row["panel"] == panel]
        named = [row for row in rows if "name" in row]
        last = max(row["x"] for row in rows)
        beside = last * (end / at[0]) ** (LEADER / width) if x[1] == "log" else last + (end - at[0]) * LEADER / width
        gap = 15 / height * (top - bottom)
        places = _apart([row["y"] for row in named], gap, bottom + gap / 2)
        for row, place in zip(named, places, strict=True):
            led = row["x"] < last or abs(place - row["y"]) > gap / 4
            row |= {"name_x": beside, "name_y": place, "led": led}
    for row in data:
        # A null interval would be shown as zeros by a tooltip's number format.
        row["interval"] = "none" if row["lo"] is None else f"{row['lo']:{y[1]}} to {row['hi']:{y[1]}}"

    series = [name for name in styles if any(row["series"] == name for row in data)]
    axis = alt.Axis(values=(_powers if x[1] == "log" else _ticks)(at, width), format="d", grid=False, labelFlush=False)
    base = alt.Chart().encode(
        x=alt.X("x:Q", title=x[0], scale=scale, axis=axis),
        color=alt.Color(
            "series:N",
            scale=alt.Scale(domain=series, range=[styles[s].color for s in series]),
            legend=None,
        ),
    )
    look: dict[str, Any] = {
        "title": y[0],
        "scale": alt.Scale(domain=[bottom, top * 1.05], zero=False),
        "axis": alt.Axis(format="%" if "%" in y[1] else "~g", tickCount=6),
    }
    vertical = alt.Y("y:Q", **look)
    tooltip = [
        alt.Tooltip("series:N", title="line"),
        alt.Tooltip("meaning:N"),
        alt.Tooltip("x:Q", title=x[0], format="d"),
        alt.Tooltip("y:Q", title=y[0], format=y[1]),
        alt.Tooltip("interval:N", title="95 % interval"),
        *(alt.Tooltip(f"{field}:Q", title=name, format=fmt) for field, name, fmt in more),
    ]
    dash = alt.StrokeDash(
        "series:N", scale=alt.Scale(domain=series, range=[list(styles[s].dash) or [1, 0] for s in series]), legend=None
    )
    layers: list[alt.Chart] = []
    banded = any(row["lo"] is not None for row in data)
    if banded:
        layers.append(
            base.transform_filter("isValid(datum.lo)")
            .mark_area(opacity=0.18)
            .encode(y=alt.Y("lo:Q", **look), y2="hi:Q")
        )
    # Where points stand close, those of the baselines are there for their tooltips only.
    crowded = len(at) > 12
    hidden = alt.condition("datum.series === 'observed'", alt.value(1), alt.value(0)) if crowded else alt.value(1)
    layers += [
        base.mark_line(strokeWidth=2.2).encode(y=vertical, strokeDash=dash),
        base.mark_point(filled=True, size=42).encode(y=vertical, opacity=hidden, tooltip=tooltip),
        base.transform_filter("datum.led").mark_rule(opacity=0.6).encode(y=vertical, x2="name_x:Q", y2="name_y:Q"),
        base.transform_filter("isValid(datum.name)")
        .mark_text(align="left", dx=3, fontSize=12)
        .encode(x="name_x:Q", y=alt.Y("name_y:Q", title=y[0]), text="name:N"),
    ]
    subtitles = (*title, "shaded: 95 % interval") if banded else title
    return page(panelled(alt.LayerChart(layer=layers), data, panels, width, height), subtitles)


def _ticks(values: Sequence[int], width: int) -> list[int]:
    """Return as many of the values as have room for their numbers: the first, the last and every n-th."""
    most = max(2, width // 34)
    if len(values) <= most:
        return list(values)
    step = next(s for m in range(8) for s in (10**m, 2 * 10**m, 4 * 10**m, 5 * 10**m) if len(values) <= most * s)
    round_ones = [v for v in values if v % step == 0]
    # The first one too, unless its number would run into the next.
    return [values[0], *round_ones] if 2 * (round_ones[0] - values[0]) > step else round_ones


def _powers(values: Sequence[int], width: int) -> list[int]:
    """Return as many of the values as have room for their numbers on a logarithmic axis: powers of two come first."""
    most = width // 34
    chosen = list(values) if len(values) <= most else [v for v in values if v.bit_count() == 1]
    return chosen[:: math.ceil(len(chosen) / most)] if chosen else _ticks(values, width)


# Heatmaps


def heatmap(
    data: list[Row],
    *,
    x: str,
    y: str,
    value: tuple[str, str],
    more: tuple[str, str],
    title: tuple[str, str],
    labels: Sequence[float],
    kind: Literal["linear", "sqrt"] = "linear",
) -> Chart:
    """Return a heatmap for each panel, cells of one height; ``labels`` of the colours include their ends."""
    import altair as alt

    panels = list(dict.fromkeys(row["panel"] for row in data))
    color = alt.Color(
        "value:Q",
        title=value[0],
        scale=alt.Scale(scheme="viridis", type=kind, domain=[labels[0], labels[-1]], nice=False),
        legend=alt.Legend(
            orient="bottom",
            direction="horizontal",
            gradientLength=WIDTH // 2,
            titleLimit=0,
            format=".3~g",
            values=list(labels),
        ),
    )
    tallest = max(len({row["y"] for row in data if row["panel"] == panel}) for panel in panels)
    cell = min(max(4, WIDTH // tallest), 14)
    charts = []
    for panel in panels:
        rows = [row for row in data if row["panel"] == panel]
        across, down = (sorted({row[field] for row in rows}) for field in ("x", "y"))
        # Cells of whole pixels: others leave seams.
        width = len(across) * max(1, (WIDTH if len(panels) == 1 else PANEL_WIDTH) // len(across))
        height = len(down) * cell
        cells = alt.Chart().properties(data=_values(rows), width=width, height=height).mark_rect()
        cells = cells.encode(
            x=alt.X("x:O", title=x, axis=alt.Axis(values=_ticks(across, width), labelAngle=0)),
            y=alt.Y("y:O", title=y, axis=alt.Axis(values=_ticks(down, 2 * height))),
            color=color,
            tooltip=[
                alt.Tooltip("y:O", title=y),
                alt.Tooltip("x:O", title=x),
                alt.Tooltip("value:Q", title=value[0], format=value[1]),
                alt.Tooltip("more:Q", title=more[0], format=more[1]),
            ],
        )
        charts.append(cells)
    if len(panels) == 1:
        return page(charts[0], title)
    for chart, panel in zip(charts, panels, strict=True):
        chart.title = alt.Title(panel, fontSize=13, fontWeight="normal", frame="group", offset=8, limit=PANEL_WIDTH)
    return page(alt.concat(*charts, columns=2), title)


def rounded(values: Sequence[float]) -> list[float]:
    """Return round numbers from below the least of the values to above the largest."""
    low, high = min(values), max(values)
    step = _step(low, high)
    return [round(step * i, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


# The waterfall


def waterfall(data: list[Row], axis_title: str, title: tuple[str, ...]) -> Chart:
    """Return bars that go on where the one before ends, a plot for each panel."""
    import altair as alt

    panels = list(dict.fromkeys(row["panel"] for row in data))
    low, high = min(min(r["from"], r["to"]) for r in data), max(max(r["from"], r["to"]) for r in data)
    left = low - 0.05 * ((high - low) or 1.0)
    width = WIDTH - 110
    span = 0.0
    for row in data:
        row["right"] = max(row["from"], row["to"])
        # Room for the text to the right of the bar, at 6.4 units a letter.
        room = min(0.9, (10 + 6.4 * len(row["text"])) / width)
        span = max(span, (row["right"] - left) / (1 - room))
    kinds = {**{name: line.color for name, line in LINES.items()}, "token_order": "#0072B2"}
    base = alt.Chart().encode(
        y=alt.Y("step:N", sort=None, title=None, axis=alt.Axis(labelLimit=240, ticks=False, domain=False)),
        tooltip=[
            alt.Tooltip("step:N", title="step"),
            alt.Tooltip("from:Q", title="unique experts before", format=".3f"),
            alt.Tooltip("to:Q", title="unique experts after", format=".3f"),
            alt.Tooltip("text:N", title="drop"),
            alt.Tooltip("interval:N", title="95 % interval of the share"),
        ],
    )
    across = alt.X(
        "from:Q",
        title=axis_title,
        scale=alt.Scale(domain=[left, left + span], nice=False, zero=False),
        axis=alt.Axis(values=_between(low, high), grid=False, titleAnchor="start", format="~g"),
    )
    color = alt.Color("kind:N", scale=alt.Scale(domain=list(kinds), range=list(kinds.values())), legend=None)
    ends = alt.FieldOneOfPredicate(field="kind", oneOf=["uniform", "observed"])
    layers = [
        base.transform_filter("isValid(datum.next)")
        .mark_rule(strokeDash=[2, 2], color="#999999")
        .encode(x=alt.X("to:Q", title=axis_title), y2="next:N"),
        base.mark_bar(height=20).encode(x=across, x2="to:Q", color=color),
        base.transform_filter(ends).mark_tick(thickness=4, size=24, opacity=1).encode(x=across, color=color),
        base.mark_text(align="left", dx=8, fontSize=12, color=INK).encode(
            x=alt.X("right:Q", title=axis_title), text="text:N"
        ),
    ]
    return page(panelled(alt.LayerChart(layer=layers), data, panels, width, 200, own_scales=True), title)


def _between(low: float, high: float) -> list[float]:
    """Return at most six round numbers from ``low`` to ``high``."""
    step = _step(low, high)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(low: float, high: float) -> float:
    """Return the distance of at most six round numbers between two values."""
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 6))
    return next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 6)


# The page


def _values(data: list[Row]) -> dict[str, list[Row]]:
    """Return data for a chart."""
    # Data given as values are not subject to Altair's limit on rows, which is a global setting.
    # As a mapping they are not checked row by row either, which takes 20 s for 92 layers of 512 experts.
    return {"values": [{k: v for k, v in row.items() if v is not None} for row in data]}


def panelled(
    body: alt.LayerChart, data: list[Row], panels: Sequence[str], width: int, height: int, *, own_scales: bool = False
) -> Chart:
    """Return the plot with its data, in panels where there are several: side by side if they share their scales."""
    import altair as alt

    body = body.properties(width=width, height=height)
    if len(panels) == 1:
        return body.properties(data=_values(data))
    header = alt.Header(title=None, labelFontSize=13, labelColor=INK, labelLimit=width, labelAnchor="start")
    facet = alt.Facet("panel:N", sort=list(panels), header=header)
    facets = body.facet(facet=facet, columns=1 if own_scales else 2, data=_values(data))
    resolved: Chart = (
        facets.resolve_scale(x="independent", y="independent") if own_scales else facets.resolve_axis(x="independent")
    )
    return resolved


def page(chart: Chart, title: tuple[str, ...]) -> Chart:
    """Put a title on a chart and give it the look of all."""
    import altair as alt

    chart = chart.properties(title=alt.Title(title[0], subtitle=list(title[1:])))
    styled: Chart = (
        chart.configure(background="white", font="Helvetica, Arial, sans-serif", padding=10)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight="normal",
            titlePadding=8,
            gridColor="#e8e8e8",
            domainColor="#999999",
            tickColor="#999999",
            labelColor=INK,
            titleColor=INK,
        )
        .configure_legend(
            labelFontSize=12, titleFontSize=12.5, titleFontWeight="normal", labelColor=INK, titleColor=INK
        )
        .configure_title(
            anchor="start",
            fontSize=16,
            subtitleFontSize=12.5,
            subtitleColor=FAINT,
            color=INK,
            offset=12,
            limit=WIDTH + 140,
        )
    )
    return script_safe(styled)
