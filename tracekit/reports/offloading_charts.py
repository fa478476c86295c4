"""Charts of experts that do not fit: caches and prefetch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.reports.drawing import INK, Line, ladder, line_chart, panels_of, require

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
            policy: [
                (round(r["capacity"]), *(r[f"hit_rate{end}"] for end in ("", "_lo", "_hi")), r)
                for r in rows
                if r["policy"] == policy
            ]
            for policy in _POLICIES
        }
        data += ladder(title, lines, lambda _, r: {name: r[name] for name in _PARTS}, styles=_POLICIES)
    notes = [
        "; ".join(names[value] for value in frame[column].unique(maintain_order=True))
        for column, names in (("scope", _SCOPES), ("start", _STARTS))
    ]
    return line_chart(
        data,
        x=("Size of the cache (experts per layer)", "linear"),
        y=("Hit rate", ".1%"),
        title=("What a cache of experts hits", about, ", ".join(notes)),
        more=(
            ("cold", "misses: cold", ".1%"),
            ("working_set", "misses: working set", ".1%"),
            ("policy_excess", "misses: policy", ".1%"),
            ("misses_per_token", "misses per token", ".1f"),
        ),
        styles=_POLICIES,
    )


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
            shown: [
                (r["layer"], *(r[f"recall{end}"] for end in ("", "_lo", "_hi")), r)
                for r in rows
                if (r["predictor"], r["distance"]) == key
            ]
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
