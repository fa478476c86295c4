"""A model of time held against measurements: the public function that fits what benchmarks tell of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from tracekit.analysis import gains
from tracekit.analysis.answers import digest, keep, setting_of
from tracekit.analysis.ensure import StoreLike, as_store, ensure
from tracekit.economics.acceptance import Acceptance
from tracekit.economics.acceptance import acceptance_rate as acceptance_rate_of
from tracekit.economics.calibration.benchmarks import Benchmark, Cell, read_benchmark
from tracekit.economics.calibration.fits import HOLDABLE, Points, resolved
from tracekit.economics.calibration.result import Calibration, calibrated
from tracekit.economics.cost import CONTEXT, CostModel
from tracekit.economics.speedup import Unions
from tracekit.errors import UnsupportedError, UsageError
from tracekit.metrics.state import resolve_phase
from tracekit.schema import Phase
from tracekit.store import Store, TraceInfo

if TYPE_CHECKING:
    from tracekit.analysis.gains import CostOptions
    from tracekit.economics.calibration.rows import Measured


def calibrate(
    store: StoreLike,
    measured: Measured,
    *,
    acceptance_rate: float | None = None,
    acceptance_length: float | None = None,
    at_drafts: int | None = None,
    draft_cost: float | None = None,
    hold: str | Sequence[str] = (),
    metric: str | None = None,
    repeats: bool = False,
    trace: str | None = None,
    phase: Phase | None = None,
    **cost: Unpack[CostOptions],
) -> Calibration:
    """Fit a model of time to measured steps, with the experts that the trace says they load.

    With a machine (``hardware``, or ``bandwidth`` and ``flops``) the model is the roofline of :func:`tracekit.speedup`:
    fitted are the effective bandwidth, the fixed overhead of a step, the FLOP per second where points are bound by
    compute, and the cost of a draft. Without one it is Amdahl's law, V = f(B) x + 1 - f(B), which needs no sizes:
    fitted are f, the routed experts' share of a step of one token, and the cost of a draft.

    Parameters
    ----------
    store
        A store or its path.
    measured
        Measurements by batch size and draft length: a file, a frame, a mapping, or several of them. Files are CSV, TSV,
        JSON, JSON lines or Parquet with a row a measurement, or what ``vllm bench`` and SGLang's benchmarks write; see
        :func:`tracekit.economics.calibration.benchmarks.read_benchmark`. ``FILE:key=value,…`` says what a file does not
        say itself.
    acceptance_rate, acceptance_length, at_drafts
        As in :func:`tracekit.speedup`, for rows that tell the time of a token under speculation and no acceptance
        length: a step takes that many times the token. Default: as the trace's own steps accepted.
    draft_cost
        Cost of one draft, in steps of the target with one token per request, where it is known; else it is fitted.
    hold
        What keeps the machine's figure instead of being fitted: ``bandwidth``, ``overhead``, ``flops``.
    metric
        The column that counts, where several of a file say how long a step takes.
    repeats
        Whether rows of one batch size and draft length are repetitions, to be averaged.
    trace
        Name of the trace; may be left out where the store holds one.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    **cost
        What runs on what, as in :func:`tracekit.speedup`. ``context`` is the file's own where that tells its lengths.

    Returns
    -------
    Calibration
        ``parameters`` (``parameter``, ``estimate``, ``lo``, ``hi``, ``unit``) and ``points`` are frames, ``notes`` says
        what the points do not tell and where the model does not hold. ``hardware`` is the machine with the fitted
        figures, ``draft_cost`` the cost of a draft and ``acceptance_rate`` the mean of what the measured acceptance
        lengths imply, for :func:`tracekit.speedup`. Intervals are of the measurements' scatter about the model; the
        trace's unions are taken as exact.

    Raises
    ------
    SourceError
        Measurements cannot be read, are ambiguous or contradict themselves.
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: its windows are too short or its requests too few.
    UsageError
        An argument is out of range, two contradict each other, or the model is not the one that was traced.
    """
    import polars as pl

    held = [hold] if isinstance(hold, str) else list(hold)
    for name in held:
        if name not in HOLDABLE:
            raise UsageError(f"{name!r} is held", expected=", ".join(HOLDABLE))
    if draft_cost is not None and not 0 <= draft_cost < 1e6:
        raise UsageError(f"a draft cost of {draft_cost:g}", expected="0 or more steps of the target")
    machine = any(cost.get(name) is not None for name in ("hardware", "bandwidth", "flops"))
    if not machine and cost.get("model") is not None:
        raise UsageError(
            "a model without a machine",
            expected="hardware beside it, or bandwidth and flops",
            remedy="Without either Amdahl's law is fitted",
        )
    if held and not machine:
        raise UsageError(f"{held[0]!r} is held", expected="a machine whose figure it keeps")
    benchmark = read_benchmark(measured, metric=metric, repeats=repeats)
    store = as_store(store)
    info = store.trace(trace)
    lengths = sorted({cell.drafts for cell in benchmark.cells if cell.drafts})
    accepted = Acceptance.given(acceptance_rate, acceptance_length, at_drafts, lengths)
    if accepted is None and any(cell.needs_acceptance for cell in benchmark.cells):
        accepted = gains.accepted_of(store, info, phase)
    known = resolved(benchmark.cells, None if accepted is None else accepted.length)
    points, notes = _points(store, info, phase, replace(benchmark, cells=known))
    costs = _costs(info, points.cells, cost) if machine else None
    said = [(c.acceptance_length, c.drafts) for c in benchmark.cells if c.acceptance_length is not None]
    rate = float(np.mean([acceptance_rate_of(*pair) for pair in said])) if said else None
    found = calibrated(points, costs, hold=held, draft_cost=draft_cost, acceptance_rate=rate, notes=notes)
    asked = {
        "measured": digest(points.cells),
        "acceptance_rate": acceptance_rate,
        "acceptance_length": acceptance_length,
        "at_drafts": at_drafts,
        "draft_cost": draft_cost,
        "hold": held,
        "phase": resolve_phase(store.requests(info), phase),
        **setting_of(None if costs is None else costs[0], cost),
    }
    for kind, frame in (("calibration", found.parameters), ("calibration_points", found.points)):
        keep(store, info, kind, frame.with_columns(phase=pl.lit(asked["phase"])), **asked)
    return found


def _points(store: Store, info: TraceInfo, phase: Phase | None, benchmark: Benchmark) -> tuple[Points, list[str]]:
    """Return what was measured with the experts that the trace's windows, or its own steps, load."""
    notes = list(benchmark.notes)
    most = store.requests(info).height
    sizes = sorted({1} | {cell.batch_size for cell in benchmark.cells if cell.batch_size <= most})
    asked = {"batch_size": sizes, "max_window": max(cell.drafts for cell in benchmark.cells) + 1}
    [ratios] = ensure(store, [("expert_ratio", asked)], trace=info.name, phase=phase, intervals=False)
    unions: dict[tuple[int, int], tuple[float, str]] = {}
    for labels, found in gains.unions_of(store, info, ratios, phase, False, 0):
        unions |= _by_cell(found, labels)
    single = {row["batch_size"]: row["unique_single"] for row in ratios.iter_rows(named=True)}
    kept: list[Cell] = []
    unique: list[float] = []
    kinds = set()
    for cell in benchmark.cells:
        alone = single.get(cell.batch_size)
        loaded, kind = unions.get((cell.batch_size, cell.drafts), (None, "")) if cell.drafts else (alone, "")
        if alone is None or loaded is None or np.isnan(loaded):
            continue
        kept.append(cell)
        unique.append(loaded)
        kinds.add(kind)
    if out := len(benchmark.cells) - len(kept):
        beyond = f"{out} of {len(benchmark.cells)} points are at batch sizes beyond the trace's requests"
        if not kept:
            raise UnsupportedError(beyond, where=f"trace {info.name!r}", expected=f"at most {most} requests a batch")
        notes.append(f"{beyond} and are left out")
    if "accepted-only" in kinds:
        notes.append("the experts are those of windows of committed tokens: rejected drafts load more than they show")
    one = [single[cell.batch_size] for cell in kept]
    return Points(tuple(kept), np.array(unique), np.array(one, np.float64), info.meta.top_k), notes


def _by_cell(unions: Unions, kind: Sequence[str]) -> dict[tuple[int, int], tuple[float, str]]:
    keys = zip(unions.batch_size.tolist(), unions.drafts.tolist(), strict=True)
    return dict(zip(keys, zip(unions.unique.tolist(), kind, strict=True), strict=True))


def _costs(info: TraceInfo, cells: Sequence[Cell], cost: CostOptions) -> list[CostModel]:
    """Return the model of time of each cell: they differ in their context only."""
    machine, asked = gains.chosen_hardware(cost), cost.get("context")
    made: dict[int, CostModel] = {}
    costs = []
    for cell in cells:
        context = asked if asked is not None else CONTEXT if cell.context is None else round(cell.context)
        if context not in made:
            made[context] = gains.cost_model(info, machine, {**cost, "context": context})
        costs.append(made[context])
    return costs
