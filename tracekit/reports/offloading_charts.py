"""Charts of experts that do not fit: locality, caches, what layers share, and prefetch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.errors import UnsupportedError
from tracekit.metrics.locality import SEGMENT
from tracekit.reports.drawing import INK, Line, ladder, line_chart, only, panels_of, point, require

if TYPE_CHECKING:
    import polars as pl

    from tracekit.reports.drawing import Chart

_POLICIES = {
    "belady": Line(INK, (2, 3), "the expert that is needed again last goes: knows the future"),
    "lru": Line("#0072B2", (), "the least recently used goes"),
    "lfu": Line("#D55E00", (8, 3), "the least often used goes"),
    "lfru": Line("#009E73", (4, 2), "the fewest uses for the time since the last goes"),
    "static": Line("#CC79A7", (8, 3, 2, 3), "a hot list learned from other requests, loaded beforehand"),
    "random": Line("#6b6b6b", (8, 4), "any goes"),
}
_SIZE = "Size of the cache (experts per layer)"
_PARTS = ("cold", "working_set", "policy_excess", "misses_per_token")
_SCOPES = {"layer": "a cache for each layer", "all": "one cache for all layers"}
_STARTS = {
    "cold": "each request begins with an empty cache",
    "prompt": "each request begins with what its prompt left",
    "carry": "each request begins with what the one before it left",
}


def cache(frame: pl.DataFrame) -> Chart:
    """Draw the hit rate against the size of the cache, a line for each policy.

    Parameters
    ----------
    frame
        As ``tk.query(store, "cache_misses")`` or ``tk.cache`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    require(frame, "cache", "policy", "scope", "start", "capacity", "hit_rate", "cold", "working_set", "policy_excess")
    about, panels = panels_of(frame)
    data = []
    for title, rows in panels:
        lines = {
            policy: [point(r, round(r["capacity"]), "hit_rate") for r in rows if r["policy"] == policy]
            for policy in _POLICIES
        }
        data += ladder(title, lines, lambda _, r: {name: r[name] for name in _PARTS}, styles=_POLICIES)
    return line_chart(
        data,
        x=(_SIZE, "linear"),
        y=("Hit rate", ".1%"),
        title=("What a cache of experts hits", about, _rules(frame)),
        more=(
            ("cold", "misses: cold", ".1%"),
            ("working_set", "misses: working set", ".1%"),
            ("policy_excess", "misses: policy", ".1%"),
            ("misses_per_token", "misses per token", ".1f"),
        ),
        styles=_POLICIES,
    )


def _rules(frame: pl.DataFrame) -> str:
    """Return in words how the caches of a frame are laid out, and what they begin with."""
    return ", ".join(
        "; ".join(names[value] for value in frame[column].unique(maintain_order=True))
        for column, names in (("scope", _SCOPES), ("start", _STARTS))
        if column in frame.columns
    )


_REUSE = {"LRU": Line("#0072B2", (), "the least recently used goes", named=False)}


def reuse(frame: pl.DataFrame) -> Chart:
    """Draw the reuse-distance curve: what LRU caches of every size hit.

    Parameters
    ----------
    frame
        As ``tk.query(store, "chart_reuse")`` or ``tk.reuse`` returns it.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    require(frame, "reuse", "scope", "start", "capacity", "share", "hit_rate")
    about, panels = panels_of(frame)
    data = []
    for title, rows in panels:
        points = [point(r, r["capacity"], "hit_rate") for r in rows]
        data += ladder(title, {"LRU": points}, lambda _, r: {"share": r["share"]}, styles=_REUSE)
    return line_chart(
        data,
        x=(_SIZE, "linear"),
        y=("Hit rate of LRU", ".1%"),
        title=("How far reuse reaches", about, _rules(frame)),
        more=(("share", "hit only from this size on", ".1%"),),
        styles=_REUSE,
    )


_LOCALITY = {
    "SCH": Line("#0072B2", (), "a cache that evicts what the next segment needs least"),
    "fixed set": Line("#D55E00", (8, 3), "the best fixed set of experts of each segment"),
}


def locality(frame: pl.DataFrame, *, segment: int | None = None) -> Chart:
    """Draw what caches that see a segment ahead hit, by their size.

    Parameters
    ----------
    frame
        As ``tk.query(store, "chart_locality")`` or ``tk.locality`` returns it.
    segment
        Segment length m, which rows to draw; default: 16, or the longest up to it.

    Raises
    ------
    UsageError
        The frame has other columns, or no row of this segment length.
    UnsupportedError
        The frame is empty.
    """
    import polars as pl

    require(frame, "locality", "segment", "capacity", "srp", "sch", "fixed_hit_rate")
    if segment is None:
        shorter = frame.filter(pl.col("segment") <= SEGMENT)
        segment = frame["segment"].min() if shorter.is_empty() else shorter["segment"].max()  # type: ignore[assignment]
        assert segment is not None
    frame = only(frame, "segment", segment, "locality")
    about, panels = panels_of(frame)
    names = {"SCH": "sch", "fixed set": "fixed_hit_rate"}
    data = []
    for title, rows in panels:
        lines = {line: [point(r, r["capacity"], name) for r in rows] for line, name in names.items()}
        data += ladder(title, lines, lambda _, r: {n: r[n] for n in ("cache_ratio", "srp")}, styles=_LOCALITY)
    known = [f"{100 * value:.1f} %" for value in frame["srp"].drop_nulls().unique()]
    srp = [f"a router that keeps experts for whole segments scores {known[0]} (SRP)"] if len(known) == 1 else []
    return line_chart(
        data,
        x=(_SIZE, "linear"),
        y=("Hit rate", ".1%"),
        title=(f"What segments of {segment} tokens have in common", about, *srp),
        more=(("cache_ratio", "size over k", ".3~g"), ("srp", "SRP", ".1%")),
        styles=_LOCALITY,
    )


_BUDGETS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#6b6b6b")
"""Colours of as many budgets as are drawn."""


def layer_budgets(frame: pl.DataFrame) -> Chart:
    """Draw how many experts each layer's cache gets, a line for each budget.

    Parameters
    ----------
    frame
        As ``tk.query(store, "chart_layer_budgets")`` or ``tk.layer_budgets`` returns it; the first eight budgets are
        drawn.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty.
    """
    import polars as pl

    require(frame, "layer_budgets", "layer", "capacity", "unit", "experts", "hit_rate", "uniform")
    frame = frame.filter(pl.col("layer").is_not_null())
    if frame.is_empty():
        raise UnsupportedError("nothing to draw: the frame has no layers")
    names = {key: _budget(*key) for key in frame.select("unit", "capacity").unique(maintain_order=True).rows()}
    names = dict(list(names.items())[: len(_BUDGETS)])
    styles = {
        name: Line(colour, (), f"a budget of {name}") for name, colour in zip(names.values(), _BUDGETS, strict=False)
    }
    about, panels = panels_of(frame, "layer")
    data = []
    for title, rows in panels:
        lines = {
            name: [(r["layer"], r["experts"], None, None, r) for r in rows if (r["unit"], r["capacity"]) == key]
            for key, name in names.items()
        }
        data += ladder(title, lines, lambda _, r: {n: r[n] for n in ("hit_rate", "uniform")}, styles=styles)
    return line_chart(
        data,
        x=("Layer", "linear"),
        y=("Experts that the layer's cache gets", ".0f"),
        title=("How layers share a budget of cached experts", about, _rules(frame)),
        more=(("hit_rate", "hit rate of the layer", ".1%"), ("uniform", "with equal parts", ".1%")),
        styles=styles,
    )


def _budget(unit: str, capacity: float) -> str:
    match unit:
        case "bytes":
            return f"{capacity / 1e9:.4g} GB"
        case "share":
            return f"{capacity:.3g} of all"
    return f"{capacity:.4g} per layer"


_PREDICTORS = {
    "previous_token": ("previous", Line("#0072B2", (), "the experts of the token before, the same layer's")),
    "hot_list": ("hot list", Line("#6b6b6b", (2, 3), "the experts that other requests use most")),
    "transition": ("transition", Line("#D55E00", (8, 3), "what follows the experts of an earlier layer")),
    "token_id": ("token id", Line("#009E73", (4, 2), "what the same token uses in other requests")),
    "token_id+transition": ("token + layer", Line("#CC79A7", (8, 3, 2, 3), "token id and transition together")),
}
_RECORDED = (INK, "#E69F00", "#56B4E9", "#8B5A2B")
_NAME_LETTERS = 14


def prefetch(frame: pl.DataFrame) -> Chart:
    """Draw the recall by layer, a line for each predictor and distance.

    Parameters
    ----------
    frame
        As ``tk.query(store, "prefetch_recall")`` or ``tk.prefetch(store, by="layer")`` returns it; of several m the
        smallest is drawn.

    Raises
    ------
    UsageError
        The frame has other columns.
    UnsupportedError
        The frame is empty, or nothing is predicted.
    """
    import polars as pl

    require(frame, 'prefetch(by="layer")', "layer", "predictor", "distance", "m", "recall", "precision", "exact")
    frame = frame.filter(pl.col("m") == pl.col("m").min())
    styles: dict[str, Line] = {}
    series: dict[tuple[str, int | None], str] = {}
    for name, distance in frame.select("predictor", "distance").unique(maintain_order=True).iter_rows():
        short = str(name) if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 1]}…"
        colour = _RECORDED[len(styles) % len(_RECORDED)]
        shown, line = _PREDICTORS.get(name, (short, Line(colour, (), "recorded in the trace")))
        shown += "" if distance in (None, 1) else f" {distance}"
        while shown in styles:
            shown += " "
        series[name, distance], styles[shown] = shown, line
    about, panels = panels_of(frame, "layer")
    data = []
    for title, rows in panels:
        lines = {
            shown: [point(r, r["layer"], "recall") for r in rows if (r["predictor"], r["distance"]) == key]
            for key, shown in series.items()
        }
        data += ladder(title, lines, lambda _, r: {name: r[name] for name in ("precision", "exact")}, styles=styles)
    m = frame["m"][0]
    return line_chart(
        data,
        x=("Layer", "linear"),
        y=("Recall (share of the k experts)", ".1%"),
        title=(f"What predictors foretell of a layer's experts, {m} prefetched", about),
        more=(("precision", "precision", ".1%"), ("exact", "all k predicted", ".1%")),
        styles=styles,
    )
