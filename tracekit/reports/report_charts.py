"""Charts that only a report has: layers to pick from, and traces side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracekit.errors import UnsupportedError
from tracekit.reports.drawing import FAINT, HEIGHT, INK, LINES, WIDTH, Row, finite, page

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

_LOWER = 170
"""Height of the plot that shows what was picked in the other."""


def layers(windows: pl.DataFrame, lags: pl.DataFrame) -> Chart:
    """Draw the reduction of every layer, and beneath it the overlap by lag of the layer that is picked.

    Parameters
    ----------
    windows
        As ``tk.windows(store, by="layer")`` returns it, of one trace, at one window length.
    lags
        As ``tk.autocorr(store, by="layer")`` returns it, of the same trace.

    Raises
    ------
    UnsupportedError
        There is nothing to draw.
    """
    import altair as alt

    baselines = [name for name in LINES if windows.get_column(f"reduction_{name}", default=None) is not None]
    above = [
        {
            "layer": row["layer"],
            "series": name,
            "meaning": LINES[name].meaning,
            "y": row[f"reduction_{name}"],
            "interval": _interval(row, f"reduction_{name}"),
            "observed": row["observed"],
        }
        for row in windows.iter_rows(named=True)
        for name in baselines
        if finite(row[f"reduction_{name}"]) is not None
    ]
    below = [
        {"layer": row["layer"], "lag": row["lag"], "overlap": row["overlap"], "interval": _interval(row, "overlap")}
        for row in lags.iter_rows(named=True)
        if finite(row["overlap"]) is not None
    ]
    if not above or not below:
        raise UnsupportedError("nothing to draw: every value is null")
    names = sorted({row["layer"] for row in above})
    drawn = [name for name in baselines if any(row["series"] == name for row in above)]
    picked = alt.selection_point(
        name="picked",
        fields=["layer"],
        on="click",
        bind=alt.binding_select(options=[None, *names], labels=["all", *map(str, names)], name="Layer: "),
    )
    across = alt.X(
        "layer:Q",
        title="Layer",
        scale=alt.Scale(domain=[names[0], max(names[-1], names[0] + 1)], nice=False, zero=False, padding=12),
        axis=alt.Axis(format="d", grid=False, tickMinStep=1),
    )
    color = alt.Color(
        "series:N",
        title="Against",
        scale=alt.Scale(domain=drawn, range=[LINES[name].color for name in drawn]),
        legend=alt.Legend(orient="top", direction="horizontal", titleOrient="left", offset=4, symbolOpacity=1),
    )
    upper = alt.Chart({"values": above}).encode(
        x=across, y=alt.Y("y:Q", title="Reduction", axis=alt.Axis(format="%", tickCount=6)), color=color
    )
    top = alt.layer(
        upper.mark_line(strokeWidth=1.5, opacity=0.5),
        upper.mark_point(filled=True, size=55)
        .encode(
            opacity=alt.condition(picked, alt.value(1), alt.value(0.2)),
            tooltip=[
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("series:N", title="against"),
                alt.Tooltip("meaning:N"),
                alt.Tooltip("y:Q", title="reduction", format=".1%"),
                alt.Tooltip("interval:N", title="95 % interval"),
                alt.Tooltip("observed:Q", title="unique experts", format=".2f"),
            ],
        )
        .add_params(picked),
    ).properties(width=WIDTH + 60, height=HEIGHT - 60)
    lower = alt.Chart({"values": below}).encode(
        x=alt.X("lag:Q", title="Lag d (tokens)", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(grid=False)),
        y=alt.Y("overlap:Q", title="Overlap", axis=alt.Axis(format="%", tickCount=5)),
        detail="layer:N",
        tooltip=[
            alt.Tooltip("layer:Q", format="d"),
            alt.Tooltip("lag:Q", format="d"),
            alt.Tooltip("overlap:Q", format=".3f"),
            alt.Tooltip("interval:N", title="95 % interval"),
        ],
    )
    strength = alt.condition(picked, alt.value(0.75), alt.value(0.06))
    observed = LINES["observed"].color
    bottom = alt.layer(
        lower.mark_line(strokeWidth=1.4, color=observed).encode(opacity=strength),
        lower.mark_point(filled=True, size=30, color=observed).encode(opacity=strength),
    ).properties(width=WIDTH + 60, height=_LOWER)
    length = windows.row(0, named=True)["window"]
    title = f"Fewer experts than expected in windows of {length} tokens, by layer; beneath, the overlap by lag"
    return page(alt.concat(top, bottom, columns=1, spacing=24), (title, "the interval of a point is in its tooltip"))


def traces(rows: Sequence[Row]) -> Chart:
    """Draw the reductions of several traces side by side.

    Parameters
    ----------
    rows
        Of the query ``chart_windows``, one of each trace, at the window length that the report is about.

    Raises
    ------
    UnsupportedError
        There is nothing to draw.
    """
    import altair as alt

    data: list[dict[str, Any]] = [
        {
            "trace": row["trace"],
            "series": name,
            "meaning": LINES[name].meaning,
            "y": row[f"reduction_{name}"],
            "lo": finite(row[f"reduction_{name}_lo"]),
            "hi": finite(row[f"reduction_{name}_hi"]),
            "interval": _interval(row, f"reduction_{name}"),
            "about": f"N = {row['num_experts']}, k = {row['top_k']}, T = {row['window']}",
        }
        for row in rows
        for name in LINES
        if name != "observed" and finite(row[f"reduction_{name}"]) is not None
    ]
    if not data:
        raise UnsupportedError("nothing to draw: every value is null")
    drawn = [name for name in LINES if any(row["series"] == name for row in data)]
    base = alt.Chart({"values": data}).encode(
        y=alt.Y(
            "trace:N",
            sort=[row["trace"] for row in rows],
            title=None,
            axis=alt.Axis(labelLimit=180, ticks=False, grid=True),
        ),
        yOffset=alt.YOffset("series:N", sort=drawn),
        color=alt.Color(
            "series:N",
            title="Against",
            scale=alt.Scale(domain=drawn, range=[LINES[name].color for name in drawn]),
            legend=alt.Legend(orient="top", direction="horizontal", titleOrient="left", offset=4),
        ),
        tooltip=[
            alt.Tooltip("trace:N"),
            alt.Tooltip("about:N", title="shape"),
            alt.Tooltip("series:N", title="against"),
            alt.Tooltip("meaning:N"),
            alt.Tooltip("y:Q", title="reduction", format=".1%"),
            alt.Tooltip("interval:N", title="95 % interval"),
        ],
    )
    title = "Reduction against each baseline"
    marks: list[alt.Chart] = [
        base.transform_filter("isValid(datum.lo)")
        .mark_rule(strokeWidth=2)
        .encode(x=alt.X("lo:Q", title=title), x2="hi:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=alt.X("y:Q", title=title, axis=alt.Axis(format="%", tickCount=6))
        ),
    ]
    chart = alt.layer(*marks).properties(width=WIDTH - 40, height=max(120, 64 * len(rows)))
    return page(chart, ("Traces side by side", "lines: 95 % intervals"))


def zoomable(spec: dict[str, Any]) -> dict[str, Any]:
    """Let a reader zoom and move along the horizontal axis of a chart of lines, and return it.

    A wheel alone goes on scrolling the page, and so does a finger.
    """
    zoom = {
        "name": "zoom",
        "select": {
            "type": "interval",
            "encodings": ["x"],
            "zoom": "wheel![event.shiftKey]",
            "translate": "[pointerdown, window:pointerup] > window:pointermove",
        },
        "bind": "scales",
    }
    for layer in spec["layer"]:
        mark = layer["mark"] if isinstance(layer["mark"], dict) else {"type": layer["mark"]}
        layer["mark"] = mark | {"clip": True}
    spec["layer"][0].setdefault("params", []).append(zoom)
    return spec


def recoloured() -> dict[str, str]:
    """Return what each colour of the charts becomes on a dark page."""
    return {
        INK: "#e3e6ea",
        FAINT: "#a3abb5",
        "#e8e8e8": "#333a43",
        "#999999": "#7d8691",
        LINES["observed"].color: "#5cb3f0",
        LINES["popularity"].color: "#f28e4b",
        LINES["label"].color: "#35c79b",
        LINES["request"].color: "#e3a3c6",
    }


def _interval(row: Row, name: str) -> str:
    low, high = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    return "none" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"
