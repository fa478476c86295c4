"""Charts of the time that a token takes where experts are offloaded: bars by mode, and one token on two engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.errors import UsageError
from tracekit.reports.drawing import INK, WIDTH, Row, page, panelled, panels_of, require

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

NAMES = {
    "on_demand": "on demand",
    "cache": "cache",
    "prefetch": "prefetch",
    "cache+prefetch": "cache + prefetch",
    "speculative": "speculative",
}
"""What the modes are called."""

_BAR, _ROW = 34, 22
"""Height of a bar, and of an engine's row."""

_PARTS = {"compute": "#0072B2", "both": "#009E73", "copies": "#E69F00"}
_WORDS = {
    "compute": "the device computes, nothing is copied",
    "both": "both at once",
    "copies": "the device waits for copies",
}

_SPANS = {
    "attention": ("#56B4E9", "attention and router"),
    "experts": ("#0072B2", "experts"),
    "head": ("#6b6b6b", "head"),
    "predictor": ("#CC79A7", "predictor"),
    "demand": ("#D55E00", "copied on demand"),
    "ahead": ("#E69F00", "copied ahead"),
}


def tpot(frame: pl.DataFrame) -> Chart:
    """Draw the time per token by mode, as what computes, what copies, and what does both at once.

    Parameters
    ----------
    frame
        As ``tk.tpot`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    import altair as alt

    require(frame, "tpot", "mode", "tpot_ms", "compute_ms", "copy_ms", "overlapped_ms", "saving", "lossy")
    about, panels = panels_of(frame.drop("model"))
    data = [part for title, rows in panels for row in rows for part in _bars(title, row)]
    modes = [_mode(row) for row in frame.unique("mode", maintain_order=True).iter_rows(named=True)]
    most = max(row["end"] for row in data)
    vertical = alt.Y("mode:N", title=None, sort=modes, axis=alt.Axis(labelLimit=220))
    across = alt.X(
        "start:Q", title="Milliseconds per token", scale=alt.Scale(domain=[0, most * 1.18]), axis=alt.Axis(tickCount=8)
    )
    tooltip = [
        alt.Tooltip("mode:N"),
        alt.Tooltip("words:N", title="while"),
        alt.Tooltip("ms:Q", title="ms", format=".2f"),
        alt.Tooltip("tpot:Q", title="ms per token", format=".2f"),
        alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("hits:Q", title="hit rate", format=".1%"),
    ]
    color = alt.Color(
        "part:N",
        title=None,
        sort=list(_WORDS.values()),
        scale=alt.Scale(domain=list(_WORDS.values()), range=list(_PARTS.values())),
        legend=alt.Legend(orient="top", direction="horizontal", labelLimit=300, offset=4),
    )
    base = alt.Chart().encode(y=vertical)
    layers = [
        base.mark_bar(height=_BAR - 12).encode(x=across, x2="end:Q", color=color, tooltip=tooltip),
        base.transform_filter("isValid(datum.text)")
        .mark_text(align="left", dx=6, fontSize=12, color=INK)
        .encode(x=alt.X("end:Q"), text="text:N"),
    ]
    chart = panelled(alt.LayerChart(layer=layers), data, [title for title, _ in panels], WIDTH, _BAR * len(modes))
    notes = ["* executes predicted experts: changes the output"] if frame["lossy"].any() else []
    return page(chart, ("Time per token with offloaded experts", about, " · ".join(_engines(frame)), *notes))


def _bars(panel: str, row: Row) -> list[Row]:
    """Return the three parts of one bar, the last one with what stands at its end."""
    sizes = {
        "compute": row["compute_ms"] - row["overlapped_ms"],
        "both": row["overlapped_ms"],
        "copies": row["copy_ms"] - row["overlapped_ms"],
    }
    interval = "none"
    if row["tpot_ms_lo"] is not None:
        interval = f"{row['tpot_ms_lo']:.2f} to {row['tpot_ms_hi']:.2f} ms"
    parts, start = [], 0.0
    for part, ms in sizes.items():
        parts.append(
            {
                "panel": panel,
                "mode": _mode(row),
                "part": _WORDS[part],
                "words": _WORDS[part],
                "start": start,
                "end": start + ms,
                "ms": ms,
                "tpot": row["tpot_ms"],
                "interval": interval,
                "hits": row["hit_rate"],
                "text": None,
            }
        )
        start += ms
    saved = "" if row["mode"] == "on_demand" else f"  {-100 * row['saving']:+.1f} %".replace("-", "−")
    parts[-1]["text"] = f"{row['tpot_ms']:.4g}{saved}"
    return parts


def _mode(row: Row) -> str:
    return NAMES[row["mode"]] + ("*" if row["lossy"] else "")


def _engines(frame: pl.DataFrame) -> list[str]:
    """Return in words what holds for every row."""
    words = []
    for column, said in (
        ("model", "{}"),
        ("hardware", "on {}"),
        ("link", "link {:.3g} GB/s"),
        ("capacity", "cache of {} experts per layer"),
        ("predictor", "predictor {}"),
    ):
        values = frame[column].drop_nulls().unique()
        if len(values) == 1:
            value = values[0] / 1e9 if column == "link" else values[0]
            words.append(said.format(str(value)[:40] if isinstance(value, str) else value))
    return words


def gantt(frame: pl.DataFrame) -> Chart:
    """Draw what both engines do during one token, one panel a mode.

    Parameters
    ----------
    frame
        As ``tk.token_schedule`` returns it, of one trace.

    Raises
    ------
    UsageError
        The frame has other columns, or several traces.
    UnsupportedError
        The frame is empty.
    """
    import altair as alt

    require(frame, "token_schedule", "mode", "engine", "layer", "part", "start_ms", "end_ms")
    if frame["trace"].n_unique() > 1:
        raise UsageError(f"{frame['trace'].n_unique()} traces", expected="one, as trace=… gives it")
    modes = frame["mode"].unique(maintain_order=True).to_list()
    data = [
        {
            "panel": NAMES[row["mode"]] + ("*" if row["mode"] == "speculative" else ""),
            "engine": "computes" if row["engine"] == "compute" else "copies",
            "part": _SPANS[row["part"]][1],
            "start": row["start_ms"],
            "end": row["end_ms"],
            "ms": row["end_ms"] - row["start_ms"],
            "layer": row["layer"],
        }
        | ({} if row["experts"] is None else {"experts": row["experts"]})
        for row in frame.iter_rows(named=True)
    ]
    kinds = [said for _, said in _SPANS.values() if any(row["part"] == said for row in data)]
    colours = {said: colour for colour, said in _SPANS.values()}
    bars = (
        alt.Chart()
        .mark_bar(height=_ROW - 6)
        .encode(
            x2="end:Q",
            # A white edge tells copies apart, and would hide short work.
            stroke=alt.condition("datum.engine === 'copies'", alt.value("white"), alt.value(None)),
            strokeWidth=alt.value(0.4),
            y=alt.Y("engine:N", title=None, sort=["computes", "copies"]),
            color=alt.Color(
                "part:N",
                title=None,
                sort=kinds,
                scale=alt.Scale(domain=kinds, range=[colours[said] for said in kinds]),
                legend=alt.Legend(orient="top", direction="horizontal", offset=4),
            ),
            tooltip=[
                alt.Tooltip("part:N"),
                alt.Tooltip("layer:Q", title="MoE layer, from 0"),
                alt.Tooltip("experts:Q", format=".3g"),
                alt.Tooltip("start:Q", title="from, ms", format=".3f"),
                alt.Tooltip("ms:Q", title="takes, ms", format=".3f"),
            ],
        )
    )
    panels = [NAMES[mode] + ("*" if mode == "speculative" else "") for mode in modes]
    last = 1.02 * max(row["end"] for row in data)
    plots = [
        bars.encode(
            x=alt.X(
                "start:Q",
                title="Milliseconds from the start of the token" if panel == panels[-1] else None,
                scale=alt.Scale(domain=[0, last], nice=False),
                axis=alt.Axis(tickCount=10, labels=panel == panels[-1]),
            )
        ).properties(
            data={"values": [row for row in data if row["panel"] == panel]},
            width=WIDTH + 180,
            height=2 * _ROW,
            title=alt.Title(panel, anchor="start", fontSize=12, fontWeight="normal", color=INK),
        )
        for panel in panels
    ]
    first = frame.row(0, named=True)
    about = f"{str(first['trace'])[:64]} · token {first['token']} of request {str(first['request_id'])[:64]}"
    notes = ["* executes predicted experts: changes the output"] if "speculative" in modes else []
    chart = alt.vconcat(*plots, spacing=4).resolve_scale(color="shared")
    return page(chart, ("One token with offloaded experts", about, *notes))
