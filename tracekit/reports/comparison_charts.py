"""The chart of a comparison: how far apart two traces are in each headline figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.errors import UnsupportedError, UsageError
from tracekit.reports.drawing import INK, WIDTH, Row, finite, page, panelled
from tracekit.reports.text import printable

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

_LETTERS = 24
"""Letters of a trace's name that fit into the title."""
_KINDS = {"differs": "#D55E00", "may be chance": "#0072B2", "not resolved": "#999999"}
"""What an interval says of a difference, and its colour; none, or one that leaves out the estimate, says nothing."""
_STEP = 19
"""Height of a line, in pixels."""


def compare(frame: pl.DataFrame) -> Chart:
    """Draw the difference of two traces in each figure, relative to the first, with its interval.

    Figures that are 0 in the first trace, and those of single layers, are left out.

    Parameters
    ----------
    frame
        As ``tk.compare`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        There is nothing to draw.
    """
    import altair as alt

    needed = {"trace_a", "trace_b", "section", "at", "metric", "a", "difference", "lo", "hi", "differs"}
    if missing := needed - set(frame.columns):
        raise UsageError(f"a frame without {', '.join(sorted(missing))}", expected="the frame of tk.compare")
    data = [_point(row) for row in frame.rows(named=True) if _drawable(row)]
    if not data:
        raise UnsupportedError("nothing to draw: no figure has a difference")
    names = [row["name"] for row in data]
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in data)]
    base = alt.Chart().encode(
        y=alt.Y(
            "name:N",
            title=None,
            sort=names,
            scale=alt.Scale(domain=names),
            axis=alt.Axis(ticks=False, domain=False, labelLimit=300, labelPadding=8, grid=True),
        ),
        color=alt.Color(
            "kind:N",
            title=None,
            scale=alt.Scale(domain=kinds, range=[_KINDS[kind] for kind in kinds]),
            legend=alt.Legend(orient="bottom", direction="horizontal"),
        ),
        tooltip=[
            alt.Tooltip("name:N", title="figure"),
            alt.Tooltip("a:Q", format=".4g"),
            alt.Tooltip("b:Q", format=".4g"),
            alt.Tooltip("x:Q", title="difference", format="+.2%"),
            alt.Tooltip("lo:Q", title="from", format="+.2%"),
            alt.Tooltip("hi:Q", title="to", format="+.2%"),
        ],
    )
    across = alt.X("x:Q", title="(b - a) / a", axis=alt.Axis(format="+.0%", tickCount=6))
    layers = [
        alt.Chart().mark_rule(color=INK, strokeWidth=1).encode(x=alt.datum(0)),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("lo:Q", title="(b - a) / a"), x2="hi:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(x=across),
    ]
    first = frame.row(0, named=True)
    a, b = (printable(first[f"trace_{side}"])[:_LETTERS] for side in "ab")
    notes = ["lines: 95 % interval of the difference"] if any(row["lo"] is not None for row in data) else []
    return page(
        panelled(alt.LayerChart(layer=layers), data, [""], WIDTH - 120, _STEP * len(data)),
        ("How two traces differ", f"a: {a} · b: {b}", *notes),
    )


def _drawable(row: Row) -> bool:
    whole = not (row["at"] or "").startswith("layer ")
    return whole and bool(finite(row["a"])) and finite(row["difference"]) is not None


def _point(row: Row) -> Row:
    where = f", {row['at']}".replace("window ", "T = ").replace("batch size ", "B = ") if row["at"] else ""
    level = abs(row["a"])
    lo, hi = (None if finite(row[end]) is None else row[end] / level for end in ("lo", "hi"))
    # An unresolved difference differs neither way: null.
    kind = {True: "differs", False: "may be chance", None: "not resolved"}[None if lo is None else row["differs"]]
    return {
        "name": printable(f"{row['metric'].replace('_', ' ')} ({row['section']}{where})"),
        "a": row["a"],
        "b": row["a"] + row["difference"],
        "x": row["difference"] / level,
        "lo": lo,
        "hi": hi,
        "kind": kind,
    }
