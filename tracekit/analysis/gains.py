"""What speculative decoding gains on a machine: the public functions that put a trace's unions into a model of time."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from tracekit.analysis.answers import keep, setting_of, setting_of_model
from tracekit.analysis.ensure import StoreLike, as_store, ensure
from tracekit.analysis.wants import BATCH_SIZES, WINDOW
from tracekit.economics.acceptance import Acceptance
from tracekit.economics.amdahl import decompose
from tracekit.economics.cost import CONTEXT, CostModel
from tracekit.economics.hardware import Hardware, Precision
from tracekit.economics.hardware import hardware as machine
from tracekit.economics.speedup import Unions, gains
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.schema import Phase
from tracekit.sources.bundled import find
from tracekit.sources.sizes import Model, load_model
from tracekit.store import Store, TraceInfo

if TYPE_CHECKING:
    import polars as pl

DRAFTS = (1, 2, 3, 4, 5, 7)
"""Draft lengths K by default."""

_COMMON_STEPS = 0.1
"""Share of a trace's steps that those of one length need to stand for it: others are cut short by a request's end."""


class CostOptions(TypedDict, total=False):
    """Arguments that say what runs on what."""

    model: Model | str | Path | None
    """A bundled model, a ``config.json`` or its folder; default: the model that the trace names."""
    quantisation: str | None
    bits: float | None
    """Of the weights, as :func:`tracekit.model` takes them."""
    hardware: Hardware | str | None
    """A known machine; ``tracekit.economics.hardware.PRESETS`` lists them."""
    bandwidth: float | None
    flops: float | None
    overhead: float | None
    """Figures of the machine, in place of the known ones: bytes per second, FLOP per second, seconds per step."""
    precision: Precision
    """``bf16`` or ``fp8``: in which a known machine multiplies."""
    context: int
    """Tokens of context per request."""
    kv_bits: float
    tensor_parallel: int
    expert_parallel: int


def speedup(
    store: StoreLike,
    *,
    batch_size: int | Iterable[int] | None = None,
    drafts: int | Iterable[int] | None = None,
    acceptance_rate: float | None = None,
    acceptance_length: float | None = None,
    at_drafts: int | None = None,
    draft_cost: float | None = None,
    draft_model: Model | str | Path | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    intervals: bool = True,
    seed: int = 0,
    **cost: Unpack[CostOptions],
) -> pl.DataFrame:
    """Return what speculative decoding gains, S = AL / (V + D), by batch size and draft length.

    V, the verification's cost in steps without speculation, is a roofline over the parts of the model, in which the
    routed experts are those that the trace's windows load (:func:`tracekit.expert_ratio`).

    Parameters
    ----------
    store
        A store or its path.
    batch_size
        Batch sizes B, windows drawn independently. Default: 1, 2, 4 … 64, as far as the trace has requests.
    drafts
        Draft lengths K; a verification holds K + 1 tokens. Default: 1, 2, 3, 4, 5, 7, as far as the trace has windows.
    acceptance_rate
        a, chance that a draft is accepted once those before it were.
    acceptance_length
        AL, tokens that a step emits, the bonus token included, with ``at_drafts`` drafts; a follows from it.
        Default: as the trace's own verification steps accepted; null where it has none.
    at_drafts
        K that the acceptance length belongs to; may be left out where there is one draft length.
    draft_cost
        Cost of one draft, in steps of the target with one token per request; D is K times it. Default: 0, with a note.
    draft_model
        The draft model's config in place of the cost, dense or not; it runs on the same machine, undivided.
    trace
        Name of one trace; default: every trace of the store that can answer.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    intervals
        95 % intervals of the unions, over whole requests; the machine and the acceptance are taken as exact.
    seed
        Seed of the grouping of requests where there are more than 200.
    **cost
        What runs on what: ``model``, ``quantisation``, ``bits``, ``hardware``, ``bandwidth``, ``flops``, ``overhead``,
        ``precision``, ``context`` (1024 tokens), ``kv_bits`` (16), ``tensor_parallel``, ``expert_parallel``; see
        `CostOptions`, :func:`tracekit.economics.hardware.hardware` and :class:`tracekit.economics.cost.CostModel`.

    Returns
    -------
    polars.DataFrame
        One row per trace, kind of unions, batch size and draft length. ``unions`` is ``accepted-only`` (windows of
        committed tokens); where the trace has verification steps also ``steps`` (what they loaded, rejected drafts
        included, at B = 1) and ``extended`` (the same at larger B: windows of committed tokens as long as to load as
        much). The other columns are those of :func:`tracekit.economics.speedup.gains`, and ``acceptance_source``:
        ``given``, ``measured``, or ``extrapolated`` beyond the drafts of the trace's steps.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: its windows are too short or its requests too few.
    SourceError
        The model's config cannot be read.
    UsageError
        An argument is out of range, two contradict each other, or the model is not the one that was traced.
    """
    import polars as pl

    store = as_store(store)
    sizes, lengths = _whole(batch_size, "batch sizes"), _whole(drafts, "drafts")
    given = Acceptance.given(acceptance_rate, acceptance_length, at_drafts, lengths or DRAFTS)
    if draft_cost is not None and draft_model is not None:
        raise UsageError("a draft cost and a draft model", expected="one of the two")
    if draft_cost is not None and not 0 <= draft_cost < 1e6:
        raise UsageError(f"a draft cost of {draft_cost:g}", expected="0 or more steps of the target")
    drafter = None if draft_model is None else _model(draft_model, dense=True)
    asked = {
        "batch_size": sizes,
        "drafts": lengths,
        "acceptance_rate": acceptance_rate,
        "acceptance_length": acceptance_length,
        "at_drafts": at_drafts,
        "draft_cost": draft_cost,
        **({} if drafter is None else setting_of_model(drafter, "draft_")),
        "intervals": intervals,
        "seed": seed,
    }
    frames = []
    for info, costs, ratios in _traces(store, trace, phase, sizes, lengths, intervals, seed, cost):
        accepted = given or accepted_of(store, info, phase)
        draft = None if drafter is None else CostModel(drafter, costs.hardware, context=costs.context)
        if accepted is None:
            _warn(f"no acceptance rate is given, and trace {info.name!r} has none of its own: speedups are null")
        if draft is None and draft_cost is None:
            _warn("the drafts are taken as free: neither their cost nor the draft model is given")
        gained = []
        for kind, unions in unions_of(store, info, ratios, phase, intervals, seed):
            kept = np.isin(unions.drafts, lengths or DRAFTS)
            if sizes:
                kept &= np.isin(unions.batch_size, sizes)
            if given is None and accepted is not None and "steps" in kind:
                accepted = replace(accepted, trees=_trees(store, info, phase, len(accepted.rates)))
            gained.append(
                _gains(costs, unions.only(kept), accepted, draft_cost or 0.0, draft).select(
                    pl.lit(info.name).alias("trace"),
                    pl.lit(ratios["phase"][0]).alias("phase"),
                    pl.Series("unions", kind, dtype=pl.String).filter(pl.Series(kept)),
                    pl.all(),
                    pl.lit(costs.model.name).alias("model"),
                    pl.lit(costs.hardware.name).alias("hardware"),
                )
            )
        frames.append(pl.concat(gained))
        keep(store, info, "speedup", frames[-1], **asked, **_phase(ratios), **setting_of(costs, cost))
    return pl.concat(frames)


def step_time(
    store: StoreLike,
    *,
    batch_size: int | Iterable[int] | None = None,
    drafts: int | Iterable[int] | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    **cost: Unpack[CostOptions],
) -> pl.DataFrame:
    """Return what each part of a step costs: of a step of one token per request, and of verifications.

    Parameters
    ----------
    store, batch_size, drafts, trace, phase, **cost
        As in :func:`speedup`.

    Returns
    -------
    polars.DataFrame
        One row per trace, batch size, number of ``tokens`` per request and ``part``: ``bytes`` that a device reads (or
        sends), ``flops``, ``seconds``, its ``share`` of the step, and what it is ``bound`` by (``bandwidth``,
        ``compute`` or ``overhead``). The unions are those of committed tokens.

    Raises
    ------
    StoreError, UnsupportedError, SourceError, UsageError
        As :func:`speedup`.
    """
    import polars as pl

    store = as_store(store)
    sizes, lengths = _whole(batch_size, "batch sizes"), _whole(drafts, "drafts")
    frames = []
    for info, costs, ratios in _traces(store, trace, phase, sizes, lengths, False, 0, cost):
        rows: list[dict[str, Any]] = []
        shown = [1, *(K + 1 for K in lengths or DRAFTS)]
        for row in ratios.filter(pl.col("window").is_in(shown)).iter_rows(named=True):
            parts = costs.parts(row["batch_size"], row["window"], row["unique"])
            step = sum(float(part.seconds) for part in parts)
            rows += [
                {
                    "trace": info.name,
                    "phase": row["phase"],
                    "batch_size": row["batch_size"],
                    "tokens": row["window"],
                    "part": part.name,
                    "bytes": float(part.bytes),
                    "flops": float(part.flops),
                    "seconds": float(part.seconds),
                    "share": float(part.seconds) / step,
                    "bound": str(costs.bound(part)),
                    "model": costs.model.name,
                    "hardware": costs.hardware.name,
                }
                for part in parts
            ]
        frames.append(pl.DataFrame(rows))
        asked = {"batch_size": sizes, "drafts": lengths, **_phase(ratios)}
        keep(store, info, "step_time", frames[-1], **asked, **setting_of(costs, cost))
    return pl.concat(frames)


def amdahl(
    store: StoreLike,
    *,
    drafts: int | Iterable[int] | None = None,
    measured_ratio: float | None = None,
    trace: str | None = None,
    phase: Phase | None = None,
    **cost: Unpack[CostOptions],
) -> pl.DataFrame:
    """Return a step at B = 1 taken apart by Amdahl's law, and how much fixed cost a measured ratio points to.

    Parameters
    ----------
    store, trace, phase, **cost
        As in :func:`speedup`.
    drafts
        Draft lengths K. Default: 3, or what the trace has.
    measured_ratio
        V as it was measured at B = 1, with one draft length: time of a verification over that of a step of one token.

    Returns
    -------
    polars.DataFrame
        One row per trace and draft length: ``unique``, ``expert_ratio`` U(T) / k, and the fields of
        :class:`tracekit.economics.amdahl.Decomposition`. The unions are those of committed tokens.

    Raises
    ------
    StoreError, UnsupportedError, SourceError, UsageError
        As :func:`speedup`.
    """
    import polars as pl

    store = as_store(store)
    lengths = _whole(drafts, "drafts")
    if measured_ratio is not None and lengths is not None and len(lengths) > 1:
        raise UsageError(f"a measured ratio and {len(lengths)} draft lengths", expected="the one that it belongs to")
    frames = []
    for info, costs, ratios in _traces(store, trace, phase, [1], lengths, False, 0, cost):
        rows: list[dict[str, Any]] = []
        most = int(ratios["window"].max())  # type: ignore[arg-type] # a number
        for K in lengths or [min(WINDOW, most) - 1]:
            row = ratios.row(by_predicate=pl.col("window") == K + 1, named=True)
            found = asdict(decompose(costs, K + 1, row["unique"], measured_ratio))
            head = {"trace": info.name, "phase": row["phase"], "drafts": K, "window": K + 1, "unique": row["unique"]}
            measured = {"measured_ratio": measured_ratio}
            names = {"model": costs.model.name, "hardware": costs.hardware.name}
            rows.append(head | {"expert_ratio": row["ratio"]} | found | measured | names)
        frame = pl.DataFrame(rows, schema_overrides={"measured_ratio": pl.Float64})
        frames.append(frame.with_columns(pl.col(pl.Float64).fill_nan(None)))
        asked = {"drafts": lengths, "measured_ratio": measured_ratio, **_phase(ratios)}
        keep(store, info, "amdahl", frames[-1], **asked, **setting_of(costs, cost))
    return pl.concat(frames)


def _traces(
    store: Store,
    trace: str | None,
    phase: Phase | None,
    sizes: list[int] | None,
    lengths: list[int] | None,
    intervals: bool,
    seed: int,
    cost: CostOptions,
) -> Iterator[tuple[TraceInfo, CostModel, pl.DataFrame]]:
    """Yield the traces that can answer, the model of time of each, and its expert ratios."""
    import polars as pl

    hardware = chosen_hardware(cost)
    asked = {"max_window": max(lengths) + 1 if lengths else None, "batch_size": sizes or BATCH_SIZES}
    [frame] = ensure(store, [("expert_ratio", asked)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    for name in frame["trace"].unique(maintain_order=True):
        info = store.trace(name)
        ratios = frame.filter(trace=name)
        none = ratios.filter(pl.col("ratio").is_null(), pl.col("window").is_in([K + 1 for K in lengths or DRAFTS]))
        if none.height and sizes:
            B, T, n = none.select("batch_size", "window", "n_windows").row(0)
            raise UnsupportedError(
                f"batch size {B} of windows of {T} tokens: fewer than {B} requests have one",
                where=f"trace {name!r}",
                expected=f"at most as many as its requests, {store.requests(info).height:,}; there are {n:,} such "
                "windows per layer",
            )
        yield info, cost_model(info, hardware, cost), ratios.filter(pl.col("ratio").is_not_null())


def unions_of(
    store: Store, info: TraceInfo, ratios: pl.DataFrame, phase: Phase | None, intervals: bool, seed: int
) -> Iterator[tuple[list[str], Unions]]:
    """Yield what verifications load: windows of committed tokens, and real steps where the trace has them."""
    import polars as pl

    def column(name: str, frame: pl.DataFrame) -> np.ndarray:
        return frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy()

    def of(frame: pl.DataFrame) -> Unions:
        whole = (frame[name].to_numpy() for name in ("batch_size", "window"))
        return Unions(*whole, *(column(name, frame) for name in ("unique", "unique_single", "ratio_lo", "ratio_hi")))

    drafted = ratios.filter(pl.col("window") > 1)
    yield ["accepted-only"] * drafted.height, of(drafted)
    if not info.meta.drafts_included:
        return
    steps = _common_steps(store, info, phase, intervals, seed)
    sizes = ratios["batch_size"].unique().sort().to_list()
    # Longer windows than were asked for, since rejected drafts may load more than accepted ones.
    [longer] = _again(store, [("expert_ratio", {"batch_size": sorted({1, *sizes})})], info, phase, False)
    curves = {size: longer.filter(pl.col("batch_size") == size).drop_nulls("unique").sort("window") for size in sizes}
    alone = longer.filter(pl.col("batch_size") == 1).sort("window")
    rows: list[dict[str, Any]] = []
    for step, size in itertools.product(steps.iter_rows(named=True), sizes):
        curve = curves[size]
        row = {"batch_size": size, "window": step["window"], "unique_single": curve["unique_single"][0]}
        row |= {"ratio_lo": None, "ratio_hi": None}
        if size == 1:
            ends = {end: step[f"unique_{end}"] for end in ("lo", "hi")}
            single = row["unique_single"]
            row |= {f"ratio_{end}": None if value is None else value / single for end, value in ends.items()}
            row |= {"unique": step["unique"], "kind": "steps"}
        else:
            length = np.interp(step["unique"], alone["unique"], alone["window"], right=np.inf)
            if length > curve["window"][-1]:
                continue
            row |= {"unique": float(np.interp(length, curve["window"], curve["unique"])), "kind": "extended"}
        rows.append(row)
    if rows:
        frame = pl.DataFrame(rows, schema_overrides={"ratio_lo": pl.Float64, "ratio_hi": pl.Float64})
        yield frame["kind"].to_list(), of(frame)


def _common_steps(store: Store, info: TraceInfo, phase: Phase | None, intervals: bool, seed: int) -> pl.DataFrame:
    """Return what the trace's verification steps of its usual lengths load and accept."""
    import polars as pl

    [steps] = _again(store, [("steps", {})], info, phase, intervals, seed)
    every = int(steps.filter(pl.col("window").is_null())["n_steps"].sum())
    return steps.filter(pl.col("window") > 1, pl.col("n_steps") >= _COMMON_STEPS * every)


def _trees(store: Store, info: TraceInfo, phase: Phase | None, deepest: int) -> dict[int, float]:
    """Return the acceptance length of steps that draft more tokens than they are deep, by the drafts."""
    steps = _common_steps(store, info, phase, False, 0)
    lengths = dict(steps.select("window", "acceptance_length").drop_nulls().rows())
    return {window - 1: length for window, length in lengths.items() if window - 1 > deepest}


def _again(
    store: Store,
    wanted: list[tuple[str, dict[str, Any]]],
    info: TraceInfo,
    phase: Phase | None,
    intervals: bool,
    seed: int = 0,
) -> list[pl.DataFrame]:
    """Return further results of a trace that was asked before, without its notes a second time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        return ensure(store, wanted, trace=info.name, phase=phase, intervals=intervals, seed=seed)


def _gains(
    costs: CostModel, unions: Unions, accepted: Acceptance | None, draft_cost: float, draft: CostModel | None
) -> pl.DataFrame:
    import polars as pl

    columns = gains(costs, unions, acceptance=accepted, draft_cost=draft_cost, draft=draft)
    ratio = unions.unique / unions.unique_single
    head = {
        "batch_size": unions.batch_size,
        "drafts": unions.drafts,
        "window": unions.window,
        "unique": unions.unique,
        "unique_single": unions.unique_single,
        "expert_ratio": ratio,
    }
    frame = pl.DataFrame(head | columns, schema_overrides={"acceptance_source": pl.String})
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def accepted_of(store: Store, info: TraceInfo, phase: Phase | None) -> Acceptance | None:
    """Return the acceptance of a trace's own steps, None where it has none."""
    import polars as pl

    if not info.meta.drafts_included:
        return None
    [frame] = _again(store, [("acceptance", {})], info, phase, False)
    rates = frame.filter(pl.col("accepted") > 0).sort("accepted")["rate"].fill_null(0.0)
    return Acceptance.measured(rates.to_list()) if len(rates) else None


def cost_model(info: TraceInfo, hardware: Hardware, options: CostOptions) -> CostModel:
    """Return the model of time for a trace's model, which has to be the one that was traced."""
    model = traced_model(info, options)
    if len(info.meta.layers) != model.moe_layers:
        few = f"{len(info.meta.layers)} MoE layers, {model.name} {model.moe_layers}"
        _warn(f"trace {info.name!r} has {few}: the mean of those traced stands for all")
    return CostModel(
        model,
        hardware,
        context=options.get("context", CONTEXT),
        kv_bits=options.get("kv_bits", 16),
        tensor_parallel=options.get("tensor_parallel", 1),
        expert_parallel=options.get("expert_parallel", 1),
    )


def traced_model(info: TraceInfo, options: CostOptions) -> Model:
    """Return the sizes of a trace's model, which has to be the one that was traced."""
    named = options.get("model")
    if named is None:
        name = info.meta.model
        if name is None or find(name) is None:
            said = f"the trace's model, {name!r}, is not bundled" if name else "the trace does not name its model"
            raise UsageError(said, where=f"trace {info.name!r}", expected="model: a bundled one or its config.json")
        named = name
    model = _model(named, options.get("quantisation"), options.get("bits"))
    theirs, ours = (model.config.num_experts, model.config.top_k), (info.meta.num_experts, info.meta.top_k)
    if theirs != ours:
        raise UsageError(
            f"{model.name} routes to {theirs[1]} of {theirs[0]} experts, the trace to {ours[1]} of {ours[0]}",
            where=f"trace {info.name!r}",
            expected="the model that was traced",
        )
    return model


def chosen_hardware(options: CostOptions) -> Hardware:
    """Return the machine that the options name, with their figures."""
    unknown = sorted(options.keys() - CostOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}")
    chosen = options.get("hardware")
    figures = {name: options.get(name) for name in ("bandwidth", "flops", "overhead")}
    if not isinstance(chosen, Hardware):
        return machine(chosen, precision=options.get("precision", "bf16"), **figures)  # type: ignore[arg-type]
    if any(value is not None for value in figures.values()):
        raise UsageError("figures beside a Hardware", expected="them in it")
    return chosen


def _model(
    model: Model | str | Path, quantisation: str | None = None, bits: float | None = None, *, dense: bool = False
) -> Model:
    if not isinstance(model, Model):
        return load_model(model, quantisation=quantisation, bits=bits, dense=dense)
    if quantisation is not None or bits is not None:
        raise UsageError("a quantisation beside a Model", expected="it in the model")
    return model


def _whole(values: int | Iterable[int] | None, what: str) -> list[int] | None:
    """Return whole numbers from 1 on, each once and in order; None for the default."""
    if values is None:
        return None
    numbers = sorted({int(v) for v in (values if isinstance(values, Iterable) else [values])})
    if not numbers or numbers[0] < 1:
        raise UsageError(f"{what} {numbers}", expected="whole numbers from 1 on")
    return numbers


def _phase(ratios: pl.DataFrame) -> dict[str, Any]:
    return {"phase": ratios["phase"][0]}


def _warn(note: str) -> None:
    warnings.warn(note, TracekitWarning, stacklevel=3)
