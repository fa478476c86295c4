"""Charts: functions that take a frame of a metric or of a chart query and return an Altair chart.

The frame's rows become plain data inside the chart; nothing that a trace, a model or a label is called becomes a
field name or an expression. Rows of several traces, phases or groups become one panel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracekit.errors import UnsupportedError, UsageError, did_you_mean
from tracekit.reports import queries
from tracekit.reports.comparison_charts import compare
from tracekit.reports.design_charts import design
from tracekit.reports.drawing import (
    LINES,
    Line,
    Point,
    Row,
    at_length,
    finite,
    heatmap,
    ladder,
    lengths,
    line_chart,
    only,
    panels_of,
    point,
    require,
    rounded,
    waterfall,
)
from tracekit.reports.offloading_charts import cache, layer_budgets, locality, prefetch, reuse
from tracekit.reports.rendering import render
from tracekit.reports.speculation_charts import acceptance, budget, speedup, speedup_map, verification_ratio
from tracekit.reports.timing_charts import gantt, tpot

if TYPE_CHECKING:
    import polars as pl

    from tracekit.analysis.ensure import StoreLike
    from tracekit.reports.drawing import Chart

__all__ = [
    "KINDS",
    "ChartKind",
    "acceptance",
    "attribution",
    "autocorr",
    "batch",
    "batch_mix",
    "budget",
    "cache",
    "chart",
    "compare",
    "design",
    "gantt",
    "layer_budgets",
    "layer_lag",
    "locality",
    "popularity",
    "prefetch",
    "render",
    "reuse",
    "speedup",
    "speedup_map",
    "tpot",
    "verification_ratio",
    "windows",
]

_CAUSES = {
    "popularity": "popularity (skewed experts)",
    "label": "label (domain)",
    "request": "request (topic)",
    "token_order": "token order (correlation)",
}

_LABEL_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#6b6b6b")
_MOST_LABELS = 10
"""Labels that are drawn at most: the names at the ends of their lines need room."""
_LABEL_LETTERS = 14
"""Letters of a label that fit beside the plot."""
_COVERED = 0.9
"""Share of the windows whose labels have enough requests for a batch, below which a mean over labels says little."""


def windows(frame: pl.DataFrame, *, batch_size: int = 1) -> Chart:
    """Draw the unique experts against the window length, with the ladder of baselines.

    Parameters
    ----------
    frame
        As ``tk.windows`` returns it.
    batch_size
        B, which rows to draw.

    Raises
    ------
    UsageError
        The frame has other columns, or no row of this batch size.
    UnsupportedError
        The frame is empty.
    """
    frame = only(frame, "batch_size", batch_size, "windows", "window", "observed", "expected_uniform")
    about, panels = panels_of(frame, "window")
    data = []
    for title, rows in panels:
        lines: dict[str, list[Point]] = {
            name: [(r["window"], r[f"expected_{name}"], None, None, r) for r in rows] for name in _baselines(frame)
        }
        lines["observed"] = [point(r, r["window"], "observed") for r in rows]
        data += ladder(title, lines, lambda y, r: {"per_top_k": y / k if (k := _top_k(r)) else None})
    what = f"Unique experts in {batch_size} windows" if batch_size > 1 else "Unique experts in a verification window"
    return line_chart(
        data,
        x=("Window length T (tokens)", "linear"),
        y=("Unique experts" + _mean_over_layers(frame), ".2f"),
        title=(what, about),
        more=(("per_top_k", "in loads of one token", ".2f"),),
    )


def batch(frame: pl.DataFrame, *, window: int | None = None) -> Chart:
    """Draw the reduction against every baseline by batch size.

    Parameters
    ----------
    frame
        As ``tk.windows`` returns it for several batch sizes.
    window
        T, which rows to draw; default: 4, or the longest that a trace has.

    Raises
    ------
    UsageError
        The frame has other columns, or no row of this window length.
    UnsupportedError
        The frame is empty.
    """
    frame = at_length(frame, window, "windows", "batch_size", "reduction_uniform")
    about, panels = panels_of(frame, "batch_size")
    data = []
    for title, rows in panels:
        lines = {name: [point(r, r["batch_size"], f"reduction_{name}") for r in rows] for name in _baselines(frame)}
        data += ladder(title, lines, lambda _, r: {"observed": r["observed"]}, prefix="vs ")
    return line_chart(
        data,
        x=("Batch size B (requests verified together)", "log"),
        y=("Reduction against the baseline", ".1%"),
        title=(f"Fewer experts than expected, windows of {lengths(frame)} tokens", about),
        more=(("observed", "unique experts", ".2f"),),
    )


def batch_mix(frame: pl.DataFrame) -> Chart:
    """Draw how many more experts a batch of all requests loads than a batch of one label, by batch size.

    Of the labels those with the most windows; the mean as far as it is one of nearly all windows.

    Parameters
    ----------
    frame
        As ``tk.query(store, "batch_mix")`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    import polars as pl

    require(frame, 'query("batch_mix")', "window", "batch_size", "label", "unique", "extra", "covered")
    largest = (
        frame.filter(pl.col("label").is_not_null(), pl.col("batch_size") == 1)
        .filter(pl.col("covered").rank("ordinal", descending=True).over("trace") <= _MOST_LABELS)
        .sort("covered", descending=True)["label"]
        .unique(maintain_order=True)
        .to_list()
    )
    mean = "mean"
    while mean in largest:
        mean += " "
    styles = {
        label: Line(_LABEL_COLORS[i % len(_LABEL_COLORS)], ((4, 2), (2, 2))[i // len(_LABEL_COLORS) % 2], str(label))
        for i, label in enumerate(largest)
    }
    styles[mean] = Line(LINES["observed"].color, (), "mean over labels, weighted by their windows")
    about, panels = panels_of(frame, "label")
    data = []
    for title, rows in panels:
        lines = {
            name: [
                (r["batch_size"], r["extra"], None, None, r)
                for r in rows
                if (r["label"] == name if name != mean else r["label"] is None and r["covered"] >= _COVERED)
            ]
            for name in styles
        }
        data += ladder(title, lines, lambda _, r: {"unique": r["unique"], "mixed": r["mixed"]}, styles=styles)
    for row in data:
        if len(row.get("name", "")) > _LABEL_LETTERS:
            row["name"] = row["name"][: _LABEL_LETTERS - 1] + "…"
    notes = [f"mean: while labels with {_COVERED:.0%} of the windows have as many requests"]
    if frame["label"].n_unique() > len(styles):
        notes.append(f"labels: the {_MOST_LABELS} with the most windows")
    return line_chart(
        data,
        x=("Batch size B (requests verified together)", "log"),
        y=("More experts in a batch of all requests", ".1%"),
        title=(f"What mixing labels in a batch costs, windows of {lengths(frame)} tokens", about, *notes),
        more=(("unique", "experts, one label", ".2f"), ("mixed", "experts, all requests", ".2f")),
        styles=styles,
    )


def autocorr(frame: pl.DataFrame) -> Chart:
    """Draw the overlap of the experts of two tokens by the lag between them, with its baselines.

    Parameters
    ----------
    frame
        As ``tk.autocorr`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    require(frame, "autocorr", "lag", "overlap", "expected_uniform")
    about, panels = panels_of(frame)
    data = []
    for title, rows in panels:
        lines: dict[str, list[Point]] = {
            name: [(r["lag"], r[f"expected_{name}"], None, None, r) for r in rows] for name in _baselines(frame)
        }
        lines["observed"] = [point(r, r["lag"], "overlap") for r in rows]
        data += ladder(title, lines, lambda _, r: {"rho": r["rho"]})
    return line_chart(
        data,
        x=("Lag d (tokens)", "linear"),
        y=("Overlap (share of the k experts)", ".3f"),
        title=("Overlap of the experts of two tokens", about),
        more=(("rho", "ρ against popularity", ".3f"),),
    )


def layer_lag(frame: pl.DataFrame) -> Chart:
    """Draw the overlap by layer and lag as a heatmap.

    Parameters
    ----------
    frame
        As ``tk.autocorr(store, by="layer")`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    require(frame, 'autocorr(by="layer")', "layer", "lag", "overlap", "rho")
    about, panels = panels_of(frame, "layer")
    data = [
        {"panel": title, "x": r["lag"], "y": r["layer"], "value": finite(r["overlap"]), "more": finite(r["rho"])}
        for title, rows in panels
        for r in rows
    ]
    return heatmap(
        data,
        x="Lag d (tokens)",
        y="Layer",
        value=("Overlap (share of the k experts)", ".3f"),
        more=("ρ against popularity", ".3f"),
        title=("Overlap of the experts of two tokens, by layer", about),
        labels=rounded([row["value"] for row in data if row["value"] is not None]),
    )


def popularity(frame: pl.DataFrame) -> Chart:
    """Draw how popular every expert is in every layer as a heatmap.

    Parameters
    ----------
    frame
        As ``tk.query(store, "popularity_by_layer")`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    import polars as pl

    require(frame, 'query("popularity_by_layer")', "layer", "expert", "popularity", "relative")
    # Every expert has a row and popularity sums to k.
    frame = frame.with_columns(
        num_experts=pl.col("expert").max().over("trace") + 1,
        top_k=pl.col("popularity").sum().over("trace", "phase", "layer").round().cast(pl.Int64),
    )
    about, panels = panels_of(frame, "layer")
    data = [
        {"panel": title, "x": r["expert"], "y": r["layer"], "value": finite(r["relative"]), "more": r["popularity"]}
        for title, rows in panels
        for r in rows
    ]
    most = max([1.0, *(row["value"] for row in data if row["value"] is not None)])
    most = math.ceil(most * 10) / 10
    return heatmap(
        data,
        x="Expert",
        y="Layer",
        value=("Popularity relative to an even load (k/N)", ".2f"),
        more=("share of tokens", ".2%"),
        title=("Popularity of the experts, by layer", about),
        # A few very popular experts would leave the rest in one colour on a linear scale.
        kind="sqrt",
        labels=[*(v for v in (0, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64) if v <= 0.8 * most), most],
    )


def attribution(frame: pl.DataFrame) -> Chart:
    """Draw what the reduction is made of: the drop of each cause, from uniform down to the trace as observed.

    Parameters
    ----------
    frame
        As ``tk.attribution`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    require(frame, "attribution", "window", "cause", "unique_before", "unique_after", "share", "resolved")
    about, panels = panels_of(frame)
    data = [step for title, rows in panels for step in _steps(title, rows)]
    notes = ["drop in unique experts = share of the whole drop (its 95 % interval)"]
    if not frame["resolved"].all():
        notes.append("not resolved: the interval leaves out the estimate, or the data cannot tell the label from none")
    return waterfall(
        data,
        "Unique experts in a window" + _mean_over_layers(frame),
        (
            f"Where the reduction comes from, windows of {lengths(frame)} tokens",
            about,
            *notes,
        ),
    )


@dataclass(frozen=True, slots=True)
class ChartKind:
    """A chart that ``tracekit chart`` draws."""

    name: str
    title: str
    draw: Callable[..., Chart]
    query: str
    """Query whose frame is drawn and whose parameters the chart takes."""
    selects: str | None = None
    """Parameter of the query that ``draw`` takes too."""

    @property
    def parameters(self) -> tuple[queries.Parameter, ...]:
        """Parameters of the query."""
        return queries.find(self.query).parameters


KINDS: dict[str, ChartKind] = {
    kind.name: kind
    for kind in (
        ChartKind("windows", "unique experts against window length", windows, "chart_windows", "batch_size"),
        ChartKind("batch", "reduction by batch size", batch, "chart_batch", "window"),
        ChartKind("batch-mix", "what mixing labels in a batch costs", batch_mix, "batch_mix"),
        ChartKind("autocorr", "overlap by lag", autocorr, "chart_autocorr"),
        ChartKind("layer-lag", "overlap by layer and lag", layer_lag, "chart_layer_lag"),
        ChartKind("popularity", "popularity of every expert by layer", popularity, "popularity_by_layer"),
        ChartKind("attribution", "what the reduction is made of", attribution, "chart_attribution"),
        ChartKind("speedup", "speedup by batch size and draft length", speedup, "speculation"),
        ChartKind("verification-ratio", "cost of a verification by batch size", verification_ratio, "speculation"),
        ChartKind("speedup-map", "speedup by batch size and draft length, as a map", speedup_map, "speculation"),
        ChartKind("regime-map", "speedup on a machine, and what bounds it, as a map", speedup_map, "speedup_by_batch"),
        ChartKind("design", "what verification costs other designs of the model", design, "design_points"),
        ChartKind("acceptance", "experts loaded by accepted drafts", acceptance, "chart_acceptance"),
        ChartKind("budget", "what a budget of experts keeps of a window", budget, "chart_budget", "window"),
        ChartKind("reuse", "hit rate of LRU caches of every size", reuse, "chart_reuse"),
        ChartKind("locality", "what segments of tokens have in common", locality, "chart_locality", "segment"),
        ChartKind("cache", "hit rate of expert caches by size and policy", cache, "cache_misses"),
        ChartKind("layer-budgets", "experts of each layer's cache by budget", layer_budgets, "chart_layer_budgets"),
        ChartKind("prefetch", "recall of prefetch predictors by layer", prefetch, "prefetch_recall"),
    )
}
"""The charts by name."""


def chart(store: StoreLike, kind: str, /, **params: Any) -> Chart:
    """Run a chart's query and draw what it returns.

    Parameters
    ----------
    kind
        One of ``KINDS``.
    params
        As :func:`tracekit.reports.queries.query` takes them.

    Raises
    ------
    UsageError
        There is no such chart or parameter.
    UnsupportedError
        There is nothing to draw.
    """
    found = KINDS.get(kind.replace("_", "-"))
    if found is None:
        expected = "one of " + ", ".join(KINDS)
        raise UsageError(f"no chart named {kind!r}", expected=expected, remedy=did_you_mean(kind, KINDS))
    frame = queries.query(store, found.query, **params)
    return found.draw(frame, **queries.find(found.query).bind({k: v for k, v in params.items() if k == found.selects}))


def _baselines(frame: pl.DataFrame) -> list[str]:
    return [name for name in LINES if f"expected_{name}" in frame.columns]


def _mean_over_layers(frame: pl.DataFrame) -> str:
    return "" if "layer" in frame.columns else " (mean over layers)"


def _top_k(row: Row) -> float | None:
    return row["observed"] / row["per_top_k"] if row["observed"] and row["per_top_k"] else None


def _steps(panel: str, rows: Sequence[Row]) -> list[Row]:
    """Return the bars of one panel, from the uniform expectation down to the trace as observed."""
    first, last = rows[0]["unique_before"], rows[-1]["unique_after"]
    if last is None:
        raise UnsupportedError("nothing to draw: no request has as many tokens as the window")
    steps = [{"step": "uniform", "from": first, "to": first, "kind": "uniform", "text": f"{first:.2f} unique experts"}]
    for row in rows:
        interval = "none"
        # An unresolved label has neither a drop nor a share.
        text = f"{0.0 - row['drop']:+.2f}" if row["drop"] or row["share"] is not None else ""
        if row["share"] is not None:
            text += f" = {row['share']:.1%}"
        if row["share_lo"] is not None:
            interval = f"{100 * row['share_lo']:.1f} to {100 * row['share_hi']:.1f}"
            text += f" ({interval})"
        text = text.replace("-", "−")
        if not row["resolved"]:
            text = f"{text}, not resolved".removeprefix(", ")
        step = _CAUSES.get(row["cause"], row["cause"])
        steps.append(
            {
                "step": step,
                "from": row["unique_before"],
                "to": row["unique_after"],
                "kind": row["cause"],
                "text": text,
                "interval": interval,
            }
        )
    steps.append({"step": "observed", "from": last, "to": last, "kind": "observed", "text": f"{last:.2f}"})
    following = [*(step["step"] for step in steps[1:]), None]
    return [
        {"panel": panel, "interval": "none", **step, "next": after}
        for step, after in zip(steps, following, strict=True)
    ]
