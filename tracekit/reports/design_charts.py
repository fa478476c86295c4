"""The chart of designs: how sparsity and shared experts move the batch size at which verification is cheapest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.errors import UsageError
from tracekit.reports.drawing import HEIGHT, INK, PANEL_HEIGHT, PANEL_WIDTH, WIDTH, Row, page, panelled, require

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

_MOST = 10
"""Lines that can be told apart."""

_LONGEST_NAME = 64

_PANELS = {
    "union_ratio": "experts that a window loads, over one token's",
    "verification_ratio": "time of a verification, over one token's",
    "speedup": "speedup of speculative decoding",
}


def design(frame: pl.DataFrame) -> Chart:
    """Draw what designs load, cost and gain by batch size; a large point is the design's best batch size.

    Parameters
    ----------
    frame
        As ``tk.design`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns, several traces, or too many designs to tell apart.
    UnsupportedError
        The frame is empty.
    """
    import altair as alt

    require(frame, "design", "design", "batch_size", "extrapolated", "best_batch_size", *_PANELS)
    names = frame["design"].unique(maintain_order=True).to_list()
    if len(names) > _MOST:
        raise UsageError(f"{len(names)} designs", expected=f"at most {_MOST} in one chart", remedy="Vary fewer values")
    if (traces := frame["trace"].n_unique()) > 1:
        raise UsageError(f"designs of {traces} traces", expected="those of one", remedy="Name the trace")
    known = [name for name in _PANELS if frame[name].null_count() == 0]
    shown = list(dict.fromkeys([known[0], known[-1]]))  # the speedup says what the time says
    data: list[Row] = [
        {
            "panel": _PANELS[name],
            "x": row["batch_size"],
            "y": row[name],
            "design": row["design"],
            "kind": "extrapolated" if row["extrapolated"] else "the trace's own",
            # Experts alone would always say the largest.
            "best": name != "union_ratio" and row["batch_size"] == row["best_batch_size"],
        }
        for name in shown
        for row in frame.rows(named=True)
    ]
    sizes = sorted({row["x"] for row in data})
    first = frame.row(0, named=True)
    across = alt.X(
        "x:Q",
        title="Batch size B (requests verified together)",
        scale=alt.Scale(type="log", base=2, domain=[sizes[0], max(sizes[-1], sizes[0] + 1)], nice=False),
        axis=alt.Axis(values=sizes, format="d", grid=False, labelOverlap=True),
    )
    vertical = alt.Y("y:Q", title="Ratio", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6, format="~g"))
    # The trace's own design stands out in ink; the others follow the order in which they were asked for.
    others = [name for name in names if name != first["design"]]
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31", "#999999"]
    scale = alt.Scale(domain=[first["design"], *others], range=[INK, *colours[: len(others)]])
    base = alt.Chart().encode(
        x=across,
        y=vertical,
        color=alt.Color(
            "design:N",
            title=None,
            scale=scale,
            sort=names,
            legend=alt.Legend(orient="bottom", columns=4, symbolType="stroke", labelLimit=240, symbolStrokeWidth=3),
        ),
        tooltip=[
            alt.Tooltip("design:N"),
            alt.Tooltip("kind:N", title="this design is"),
            alt.Tooltip("x:Q", title="batch size", format="d"),
            alt.Tooltip("y:Q", title="ratio", format=".3f"),
        ],
    )
    dash = alt.StrokeDash(
        "kind:N",
        legend=None,
        scale=alt.Scale(domain=["the trace's own", "extrapolated"], range=[[1, 0], [7, 3]]),
    )
    layers = [
        base.mark_line(strokeWidth=2.2).encode(strokeDash=dash),
        base.mark_point(filled=True, size=30),
        base.transform_filter("datum.best").mark_point(filled=True, size=130),
    ]
    panels = [_PANELS[name] for name in shown]
    width, height = (WIDTH, HEIGHT) if len(panels) == 1 else (PANEL_WIDTH, PANEL_HEIGHT)
    about = [first["trace"][:_LONGEST_NAME]] if first["trace"] else []
    about += [f"{first['phase']} tokens"] if first["phase"] else []
    about += [str(first["design"]), f"windows of T = {first['window']}", f"{first['hold']} parameters held"]
    notes = ["dashed: extrapolated, the law of routing held; no such model was trained"]
    if any(row["best"] for row in data):
        notes.append("large points: the batch size at which verification costs least")
    title = ("Other designs: what verification loads and costs", " · ".join(about), *notes)
    return page(panelled(alt.LayerChart(layer=layers), data, panels, width, height), title)
