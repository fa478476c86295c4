"""Two traces compared: every headline figure of both, and whether they differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.analysis.answers import keep
from tracekit.analysis.ensure import StoreLike, as_store, check_tokens, warn_of
from tracekit.analysis.passes import local, with_steps
from tracekit.analysis.wants import WINDOW
from tracekit.errors import StoreError, TracekitWarning, UsageError
from tracekit.metrics.state import MIN_REQUESTS, ROUGH_REQUESTS, Cells, Spec, deal, phase_tokens, resolve_phase
from tracekit.schema import Phase
from tracekit.store import Store, TraceInfo
from tracekit.store.answers import MODELLED
from tracekit.store.runs import Runs

if TYPE_CHECKING:
    import polars as pl

LAGS = (1, 4, 16)
"""Lags whose overlaps are compared."""

BATCH_SIZES = (4, 16)
"""Batch sizes that are compared."""

_CHUNK = 1_000_000
"""Routing rows that are held against each other at once."""

Figures = dict[tuple[str, str, str | None], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two traces: which of its tokens are compared."""

    store: Store
    info: TraceInfo
    requests: pl.DataFrame
    """In order, as the store has them."""
    phase: Phase

    @classmethod
    def read(cls, store: Store, info: TraceInfo, phase: Phase | None) -> Side:
        """Read the trace's requests."""
        check_tokens(info, ["comparison"])
        requests = store.requests(info)
        return cls(store, info, requests, resolve_phase(requests, phase))

    def ids(self, requests: pl.DataFrame | None = None) -> list[str]:
        """Return the ids of requests that have tokens of the phase."""
        requests = self.requests if requests is None else requests
        return requests["request_id"].filter(phase_tokens(requests, self.phase) > 0).to_list()


def compare(
    store: StoreLike,
    other: StoreLike | None = None,
    *,
    trace_a: str | None = None,
    trace_b: str | None = None,
    phase: Phase | None = None,
    window: int | None = None,
    batch_size: Sequence[int] = BATCH_SIZES,
    paired: bool | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how two traces differ: every headline figure of both, the difference and its interval.

    Where both hold the same requests, only those are compared and each is left out of both traces together: what the
    prompts have in common cancels (a paired jackknife). Otherwise the traces are two samples, and the standard errors
    of both add up (Welch).

    Parameters
    ----------
    store, other
        The store of each trace, or its path; default: both are in one.
    trace_a, trace_b
        Their names; may be left out where there is no choice.
    phase
        ``decode``, ``prefill`` or ``all``; default: for each trace decode where it is known, else what there is.
    window
        Window length T in tokens. Default: 4, or what both traces have.
    batch_size
        Batch sizes B to compare, above 1; none for none.
    paired
        Whether to pair by request id. Default: where both traces hold at least 5 of the same ids, or the same ids.
    intervals
        95 % delete-a-group jackknife intervals over whole requests.
    seed
        Seed of the grouping of requests where there are more than 200.

    Returns
    -------
    polars.DataFrame
        One row per metric. ``section`` is the function and ``metric`` the column that it is known by elsewhere (in
        ``load`` averaged over layers), ``at`` the window, lag, batch size or layer; ``a`` and ``b`` are the figures of
        both traces with their intervals, ``difference`` is b - a with its interval ``lo`` to ``hi``; ``differs`` says
        whether that leaves out 0: null where there is none or where it leaves out the difference itself. Of 20 metrics
        that do not differ, one on average seems to. The section ``agreement`` holds the two traces against each other
        token by token, as far as their token ids are the same from the start of the request: a is what a trace has
        with itself, 1, and b what it has with the other; it is there where both keep such tokens of the same requests.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        A trace cannot be compared, with the reason: it holds counts only, or has no such phase or window.
    UsageError
        An argument is out of range, or pairing is asked for and no request is in both.
    """
    import polars as pl

    named = _named(as_store(store), None if other is None else as_store(other), trace_a, trace_b)
    a, b = (Side.read(*one, phase) for one in named)
    for side in (a, b) if a.info.content != b.info.content else (a,):
        warn_of(side.info)
    shared = _shared(a, b, paired)
    runs = [Runs.read(side.store, side.info, side.requests, side.phase) for side in (a, b)]
    length = min(r.fit(window, WINDOW, "windows", least=2) for r in runs)
    farthest = min(r.fit(None, max(LAGS), "lags", reach=1) for r in runs)
    lags = [lag for lag in LAGS if lag <= farthest]
    if any(size < 2 for size in batch_size):
        raise UsageError(f"batch size {min(batch_size)}", expected="at least 2: single requests are compared anyway")
    if intervals:
        runs[0].notes.extend(_few(min(len(side.ids()) for side in (a, b)) if shared is None else len(shared)))
    for note in dict.fromkeys([*cautions(a, b, shared), *(note for r in runs for note in r.notes)]):
        warnings.warn(note, TracekitWarning, stacklevel=2)
    groups = None if shared is None else deal(shared, seed)
    figures = _headlines(a, b, groups, length, batch_size, lags, intervals, seed)
    rows = [_row(key, *pair, shared is not None) for key, pair in figures.items()]
    if shared is not None and _alike(a, b):  # without any token that both route, no rows
        rows += [_row(*entry, True) for entry in _agreement(a, b, deal(shared, seed), intervals)]
    fixed = {"trace_a": a.info.name, "trace_b": b.info.name, "phase_a": a.phase, "phase_b": b.phase}
    schema = {"trace_a": pl.String} | {n: getattr(pl, t) for n, t in MODELLED["compare"].items()}
    frame = pl.DataFrame([fixed | row for row in rows], schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))
    asked = {"window": length, "batch_size": list(batch_size), "paired": shared is not None}
    asked |= {"phase_a": a.phase, "phase_b": b.phase, "intervals": intervals, "seed": seed}
    keep(a.store, a.info, "compare", frame, content_b=b.info.content, **asked)
    return frame


def _named(
    store: Store, other: Store | None, trace_a: str | None, trace_b: str | None
) -> tuple[tuple[Store, TraceInfo], tuple[Store, TraceInfo]]:
    """Return the two traces; of a store of two, the one that is not named is the other."""
    if other is not None:
        return (store, store.trace(trace_a)), (other, other.trace(trace_b))
    names = [info.name for info in store.traces()]
    if len(names) == 1 and (trace_a is None or trace_b is None):
        found = f"holds one trace, {names[0]!r}, and two are compared"
        raise StoreError(found, where=str(store.path), remedy="Name another store, or add a trace")
    if len(names) == 2:
        first = trace_a or next((n for n in names if n != trace_b), names[0])
        trace_a, trace_b = first, trace_b or next((n for n in names if n != first), names[1])
    for name, option in ((trace_a, "--trace-a"), (trace_b, "--trace-b")):
        if name is None and names:
            listed = ", ".join(repr(n) for n in names[:8]) + (", …" if len(names) > 8 else "")
            found = f"holds {len(names)} traces ({listed})"
            raise StoreError(found, where=str(store.path), remedy=f"Name the two to compare: one is missing, {option}")
    return (store, store.trace(trace_a)), (store, store.trace(trace_b))


def _shared(a: Side, b: Side, paired: bool | None) -> list[str] | None:
    """Return the ids of requests that are in both traces, or None where the traces are two samples."""
    ours, theirs = a.ids(), b.ids()
    both = set(theirs)
    shared = [request_id for request_id in ours if request_id in both]
    if paired and not shared:
        raise UsageError("no request id is in both traces, so none can be paired", remedy="Leave out the pairing")
    same = len(shared) == len(ours) == len(theirs)
    return shared if shared and (paired or (paired is None and (len(shared) >= MIN_REQUESTS or same))) else None


def _few(requests: int) -> Iterator[str]:
    """Yield what few requests do to the intervals."""
    if requests < MIN_REQUESTS:
        yield f"no interval with fewer than {MIN_REQUESTS} requests: there are {requests}"
    elif requests < ROUGH_REQUESTS:
        yield f"intervals are rough with fewer than {ROUGH_REQUESTS} requests: there are {requests}"


def _alike(a: Side, b: Side) -> bool:
    """Return whether sets of experts of both can be held against each other."""
    x, y = a.info.meta, b.info.meta
    same_shape = (x.num_experts, x.top_k, x.layers) == (y.num_experts, y.top_k, y.layers)
    return same_shape and a.phase == b.phase and "physical" not in (x.id_space, y.id_space)


def cautions(a: Side, b: Side, shared: list[str] | None) -> Iterator[str]:
    """Yield what would mislead a reader of the comparison, in sentences."""
    x, y = a.info.meta, b.info.meta
    for what, name in (("routed experts per layer (N)", "num_experts"), ("experts per token (k)", "top_k")):
        if getattr(x, name) != getattr(y, name):
            ours, theirs = getattr(x, name), getattr(y, name)
            yield f"{what} differ, {ours} and {theirs}: counts of experts and overlaps are not on one scale"
    if x.layers != y.layers:
        yield f"the MoE layers differ, {len(x.layers)} and {len(y.layers)}: averages are over other layers"
    if a.phase != b.phase:
        yield f"the phases differ, {a.phase} and {b.phase}: prompts and generated text are routed differently"
    if x.model and y.model and x.model != y.model:
        yield f"the models differ, {x.model!r} and {y.model!r}"
    for side in (a, b):
        meta, name = side.info.meta, f"trace {side.info.name!r}"
        if meta.native_top_k and meta.native_top_k != meta.top_k:
            yield f"{name} was run with k = {meta.top_k} instead of the model's {meta.native_top_k}"
        if meta.id_space == "physical":
            yield f"{name} has physical ids: replicas of an expert count as several"
    if bool(x.router_order) != bool(y.router_order):
        keeps = a if x.router_order else b
        yield f"only trace {keeps.info.name!r} keeps the router's order of experts: no rank-0 repeats"
    yield from _of_requests(a, b, shared)


def _of_requests(a: Side, b: Side, shared: list[str] | None) -> Iterator[str]:
    """Yield what the two traces' requests do not have in common."""
    import polars as pl

    if shared is None:
        both = set(a.ids()) & set(b.ids())
        some = f"only {len(both)} of the request ids are" if both else "no request id is"
        yield f"{some} in both traces: two samples of requests are compared, prompts and all"
        lengths = [_tokens_per_request(side) for side in (a, b)]
        if max(lengths) > 2 * min(lengths):
            ours, theirs = (f"{length:,.0f}" for length in lengths)
            yield f"requests have {ours} and {theirs} {a.phase} tokens on average: longer ones hold more topics"
        labels = [set(side.requests["label"].drop_nulls()) for side in (a, b)]
        if labels[0] != labels[1]:
            yield "the labels of the two traces differ: so do the mixes that the baselines are of"
        return
    others = [(len(side.ids()) - len(shared), side.info.name) for side in (a, b)]
    left = [f"{n} of trace {name!r}" for n, name in others if n]
    if left:
        yield f"{len(shared)} requests are in both traces and are compared; left out are {' and '.join(left)}"
    columns = ["request_id", "prompt_len"]
    pairs = a.requests.select(columns).join(b.requests.select(columns), on="request_id")
    other = pairs.filter(pl.col("request_id").is_in(shared), pl.col("prompt_len") != pl.col("prompt_len_right"))
    if other.height:
        yield (
            f"{other.height} of {len(shared)} requests have prompts of another length under the same id: other "
            "prompts, or another tokenizer"
        )


def _tokens_per_request(side: Side) -> float:
    tokens = phase_tokens(side.requests, side.phase)
    return float(tokens[tokens > 0].mean())


def _headlines(
    a: Side,
    b: Side,
    groups: Mapping[str, int] | None,
    window: int,
    batch_sizes: Sequence[int],
    lags: Sequence[int],
    intervals: bool,
    seed: int,
) -> dict[tuple[str, str, str | None], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return the figures that both traces have, each with its replicates."""
    from tracekit.metrics.headline import headline, label_resolved
    from tracekit.metrics.measurement import Measurement

    measured = []
    for side in (a, b):
        spec = Spec(
            side.phase, max_window=window, max_lag=max(lags), batches=bool(batch_sizes), intervals=intervals, seed=seed
        )
        columns = side.store.columns(side.info)
        measured.append(Measurement.read(side.info.meta, side.requests, spec, columns, local().threads, groups))
    label = all(label_resolved(m, window) for m in measured)
    x, y = (headline(m, window, batch_sizes, lags, label=label) for m in measured)
    if a.info.meta.drafts_included and b.info.meta.drafts_included:
        steps_x, steps_y = _verification(a, b, groups is not None, intervals, seed)
        x, y = x | steps_x, y | steps_y
    found = {key: (x[key], y[key]) for key in x if key in y}
    return {key: pair for key, pair in found.items() if not any(np.isnan(side[0]) for side in pair)}


def _verification(a: Side, b: Side, paired: bool, intervals: bool, seed: int) -> list[Figures]:
    """Return the figures of the verification steps of both traces."""
    from tracekit.metrics.headline import verification

    having = [with_steps(side.store, side.info, side.requests) for side in (a, b)]
    ids = [side.ids(requests) for side, requests in zip((a, b), having, strict=True)]
    groups = deal([i for i in ids[0] if i in set(ids[1])], seed) if paired else None
    found: list[Figures] = []
    for side, requests in zip((a, b), having, strict=True):
        spec = Spec(side.phase, intervals=intervals, seed=seed)
        cells = Cells.assign(requests, spec, groups)
        steps = side.store.steps(side.info)
        found.append(verification(side.info.meta, spec, cells, requests, steps) if cells.groups else {})
    return found


def _row(
    key: tuple[str, str, str | None], a: NDArray[np.float64], b: NDArray[np.float64], paired: bool
) -> dict[str, Any]:
    """Return one row of the comparison from the replicates of both traces."""
    from tracekit.metrics.intervals import difference, jackknife

    row: dict[str, Any] = dict(zip(("section", "metric", "at"), key, strict=True))
    for name, values in (("a", a), ("b", b)):
        interval = jackknife(values[:, None])
        row |= {name: interval.estimate.item(), f"{name}_lo": interval.lo.item(), f"{name}_hi": interval.hi.item()}
    change = difference(a[:, None], b[:, None], paired=paired)
    estimate, lo, hi = change.estimate.item(), change.lo.item(), change.hi.item()
    # Where the interval leaves out the plain estimate, its bias is too large to tell.
    resolved = lo <= estimate <= hi
    return row | {
        "difference": estimate,
        "lo": lo,
        "hi": hi,
        "paired": paired,
        "differs": (lo > 0 or hi < 0) if resolved else None,
    }


def _agreement(
    a: Side, b: Side, groups: Mapping[str, int], intervals: bool
) -> Iterator[tuple[tuple[str, str, str | None], NDArray[np.float64], NDArray[np.float64]]]:
    """Yield how far the routing of the same tokens agrees: over all layers, then layer by layer."""
    import polars as pl

    from tracekit.metrics.agreement import Agreement

    meta = a.info.meta
    pairs = _aligned(a, b, groups)
    if pairs.is_empty():
        return
    sums = Agreement(max(groups.values()) + 1, len(meta.layers))
    chunk = (pl.col("tokens").cast(pl.Int64).cum_sum() * len(meta.layers) - 1) // _CHUNK
    for _, some in pairs.with_columns(chunk=chunk).group_by("chunk", maintain_order=True):
        _hold(a, b, some, sums)
    shares = sums.shares(pairs.height if intervals else 0)
    for name, by_layer in shares.items():
        yield ("agreement", name, None), np.ones(len(by_layer)), by_layer.mean(axis=1)
    for name, by_layer in shares.items():
        for i, layer in enumerate(meta.layers):
            yield ("agreement", name, f"layer {layer}"), np.ones(len(by_layer)), by_layer[:, i]


def _aligned(a: Side, b: Side, groups: Mapping[str, int]) -> pl.DataFrame:
    """Return the requests with tokens to compare: their numbers in both, group, and the positions to compare.

    Up to ``until`` the token ids of both are the same; afterwards the context differs, whatever the tokens are.
    """
    import polars as pl

    from tracekit.store.rows import token_rows

    numbers = a.requests.select("request_id", "request", "decode_start").join(
        b.requests.select("request_id", other="request"), on="request_id"
    )
    numbers = numbers.with_columns(
        group=pl.col("request_id").replace_strict(dict(groups), default=None, return_dtype=pl.Int64)
    ).drop_nulls("group")
    ours = token_rows(a.store, a.info).join(numbers, on="request")
    theirs = token_rows(b.store, b.info).rename({"request": "other", "token_id": "other_token"})
    both = ours.join(theirs, on=["other", "pos"]).sort("request", "pos")
    same = (pl.col("token_id") == pl.col("other_token")).cum_prod().over("request") == 1
    start = pl.col("decode_start").cast(pl.Int64)
    of_phase = {"decode": pl.col("pos") >= start, "prefill": pl.col("pos") < start, "all": pl.lit(True)}[a.phase]
    return (
        both.filter(same)
        .filter(of_phase)
        .group_by("request", "other", "group", maintain_order=True)
        .agg(since=pl.col("pos").min(), until=pl.col("pos").max(), tokens=pl.len())
    )


def _hold(a: Side, b: Side, pairs: pl.DataFrame, sums: Any) -> None:
    """Add the tokens of some requests."""
    import polars as pl

    from tracekit.store.rows import routing_rows

    ranks = range(a.info.meta.top_k)
    ours = routing_rows(a.store, a.info, pairs["request"].to_list()).join(pairs, on="request")
    ours = ours.filter(pl.col("pos").is_between("since", "until"))
    theirs = routing_rows(b.store, b.info, pairs["other"].to_list())
    theirs = theirs.rename({"request": "other"} | {f"e{r}": f"o{r}" for r in ranks})
    rows = ours.join(theirs, on=["other", "layer", "pos"])
    layer = np.searchsorted(a.info.meta.layers, rows["layer"].to_numpy())
    left, right = (np.stack([rows[f"{letter}{r}"].to_numpy() for r in ranks]) for letter in "eo")
    sums.add(rows["group"].to_numpy(), layer, left, right)
