"""Beyond the trace: a law of routing fitted to it, and what other designs of the model would gain under that law."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.analysis.answers import keep, setting_of
from tracekit.analysis.ensure import StoreLike, as_store, ensure
from tracekit.economics.acceptance import acceptance_length as length_of
from tracekit.economics.cost import CONTEXT, CostModel
from tracekit.economics.design import Design, Hold, compare, designs, of_model
from tracekit.economics.hardware import Hardware
from tracekit.economics.hardware import hardware as machine
from tracekit.economics.law import PARAMETERS, RoutingLaw
from tracekit.economics.law_file import load as load_law
from tracekit.economics.law_fit import Targets, fit_layer, unbiased_popularity, with_figures
from tracekit.errors import TracekitWarning, UsageError
from tracekit.metrics.state import MIN_REQUESTS, phase_tokens, resolve_phase
from tracekit.schema import Phase
from tracekit.sources.sizes import Model, load_model
from tracekit.store import Store
from tracekit.store.answers import MODELLED

if TYPE_CHECKING:
    import polars as pl

_HELD = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes at which a fitted law is held against the trace."""

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes at which designs are compared by default."""


def fit_law(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int | None = None,
    max_lag: int | None = None,
) -> RoutingLaw:
    """Return a law of routing, a few parameters per layer, from which routing like the trace's can be drawn.

    Parameters
    ----------
    store
        A store or its path.
    trace
        Name of the trace; may be left out where the store holds one.
    phase
        ``decode``, ``prefill`` or ``all``; default: decode where the trace knows it, else what there is.
    max_window, max_lag
        Longest window T and largest lag, in tokens, to fit to. Default: 8 and 32, or what the trace has.

    Returns
    -------
    RoutingLaw
        Its ``figures`` say how well it gives back the trace, mean over layers: those it was fitted to (``target``), and
        the unique experts of larger batches, which it was not.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason.
    """
    import polars as pl

    store = as_store(store)
    info = store.trace(trace)
    requests = store.requests(info)
    phase = resolve_phase(requests, phase)
    lengths = phase_tokens(requests, phase)
    lengths = lengths[lengths > 0]
    sizes = [b for b in _HELD if b <= len(lengths)]
    autocorr, windows, batches, load = ensure(
        store,
        [
            ("autocorr", {"by": "layer", "max_lag": max_lag}),
            ("windows", {"by": "layer", "max_window": max_window}),
            ("windows", {"max_window": max_window, "batch_size": sizes}),
            ("load", {}),
        ],
        trace=info.name,
        phase=phase,
        intervals=False,
    )
    if len(lengths) < MIN_REQUESTS:
        few = "is one request" if len(lengths) == 1 else f"are {len(lengths)} requests"
        note = f"there {few}: how requests differ, and so the batch sizes above 1, are a guess"
        warnings.warn(note, TracekitWarning, stacklevel=2)
    targets = [
        _targets(
            autocorr.filter(layer=layer).drop_nulls("overlap"),
            windows.filter(layer=layer).drop_nulls("observed"),
            load.row(by_predicate=pl.col("layer") == layer, named=True),
            info.meta.num_experts,
            info.meta.top_k,
            lengths,
        )
        for layer in info.meta.layers
    ]
    source: dict[str, Any] = {"trace": info.name, "model": info.meta.model, "phase": phase}
    source |= {"requests": len(lengths), "tokens": int(lengths.sum())}
    law = RoutingLaw(info.meta.num_experts, info.meta.top_k, tuple(map(fit_layer, targets)), source)
    held = batches.drop_nulls("observed").select("window", "batch_size", "observed").rows()
    law = with_figures(law, targets, {(window, batch_size): value for window, batch_size, value in held})
    keep(store, info, "law", fit(law), max_window=max_window, max_lag=max_lag, phase=phase)
    return law


def fit(law: RoutingLaw) -> pl.DataFrame:
    """Return how well a law gives back what it was fitted to, one figure a row.

    Returns
    -------
    polars.DataFrame
        ``quantity`` at a lag or window ``at`` and ``batch_size``, mean over layers: ``observed``, by the ``law``, the
        relative ``error`` (law / observed - 1), and whether it was a ``target`` of the fit or is predicted.
    """
    import polars as pl

    about = {name: law.source.get(name) for name in ("trace", "phase")}
    rows = [about | asdict(figure) for figure in law.figures]
    texts = dict.fromkeys(("trace", "phase", "quantity"), pl.String)
    whole, numbers = dict.fromkeys(("at", "batch_size"), pl.Int64), dict.fromkeys(("observed", "law"), pl.Float64)
    frame = pl.DataFrame(rows, schema={**texts, **whole, **numbers, "target": pl.Boolean})
    error = pl.when(pl.col("observed") != 0).then(pl.col("law") / pl.col("observed") - 1)
    return frame.with_columns(error.alias("error"))


def parameters(law: RoutingLaw) -> pl.DataFrame:
    """Return the parameters of a law over its layers: ``mean``, ``least`` and ``most``."""
    import polars as pl

    rows = {name: law.parameter(name) for name in PARAMETERS}
    spread = [(name, float(v.mean()), float(v.min()), float(v.max())) for name, v in rows.items()]
    numbers = dict.fromkeys(("mean", "least", "most"), pl.Float64)
    return pl.DataFrame(spread, schema={"parameter": pl.String, **numbers}, orient="row")


def design(
    source: StoreLike | RoutingLaw,
    *,
    vary: Mapping[str, Iterable[int]],
    hold: Hold = "active",
    model: str | Path | Model | None = None,
    hardware: str | Hardware = "h100",
    routed_share: float | None = None,
    drafts: int = 3,
    batch_size: int | Iterable[int] = _BATCH_SIZES,
    acceptance_length: float | None = None,
    acceptance_rate: float | None = None,
    draft_cost: float = 0.0,
    context: int = CONTEXT,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    trace: str | None = None,
    phase: Phase | None = None,
) -> pl.DataFrame:
    """Return what verification costs other designs of a model, under the law of routing fitted to its trace.

    Nobody has trained these models: N, k and S are put into the law and the step's time with every other parameter
    held, attention and acceptance included. The rows say so (``extrapolated``).

    Parameters
    ----------
    source
        A store or its path, whose trace the law is fitted to; a law, or the JSON file of one.
    vary
        Values of ``N``, ``k`` and ``S`` (shared experts per layer); every combination is a design.
    hold
        ``active``: the size of an expert follows from (k + S) w, the weights that a token uses; ``total``: from
        (N + S) w, those of the layer. Shared experts are as large as routed ones.
    model
        A bundled model's name or a ``config.json``: the model of the trace. With it, time is the roofline's.
    hardware
        The machine: a name, or what ``tracekit.economics.hardware.hardware`` returns.
    routed_share
        Instead of a model: the routed experts' share of the time of the reference's step for one token (Amdahl).
        Without either there are unions only.
    drafts
        K, drafted tokens per step; the window is T = K + 1.
    batch_size
        B, requests verified together.
    acceptance_length, acceptance_rate
        Tokens that a step emits, or the chance that a draft is accepted; without either there is no speedup.
    draft_cost
        Cost of one draft, in steps of the target with one token per request.
    context, tensor_parallel, expert_parallel
        As in ``tracekit.economics.cost.CostModel``; only with a model.
    trace, phase
        Which trace of the store, and which tokens, as in :func:`fit_law`.

    Returns
    -------
    polars.DataFrame
        One row per design and batch size, the trace's own design first. ``expert_size`` is the width w in those of the
        trace's experts; ``unique`` is U(T, B), ``unique_single`` U(1, B), experts per layer by the law, ``union_ratio``
        the one over the other and ``union_ratio_uniform`` the same of uniform routing. ``routed_share`` of the step
        with one token per request at that B, ``verification_ratio`` V, ``regime`` of the verification, ``speedup``,
        and ``best_batch_size``, the B at which V is least and the speedup largest. Null where there is nothing to
        compute it from.

    Raises
    ------
    UsageError
        An argument is out of range, contradicts another one, or gives an impossible design.
    SourceError
        The file is not a law, or the config not one of a Mixture-of-Experts model.
    StoreError, UnsupportedError
        As in :func:`fit_law`.
    """
    import polars as pl

    for one, other, both in (
        ("a model", "a routed share", model is not None and routed_share is not None),
        ("an acceptance length", "an acceptance rate", acceptance_length is not None and acceptance_rate is not None),
    ):
        if both:
            raise UsageError(f"{one} and {other}", expected="one of them")
    sizes = list(dict.fromkeys(batch_size if isinstance(batch_size, Iterable) else [batch_size]))
    if not sizes or min(sizes) < 1:
        raise UsageError(f"batch sizes {sizes}", expected="whole numbers from 1 on")
    if drafts < 1:
        raise UsageError(f"{drafts} drafts", expected="at least 1")
    if not 0 <= draft_cost < float("inf"):
        raise UsageError(f"a draft cost of {draft_cost:g}", expected="0 or more steps of the target")
    if acceptance_length is not None and not 1 <= acceptance_length <= drafts + 1:
        raise UsageError(f"an acceptance length of {acceptance_length:g}", expected=f"1 to {drafts + 1} tokens")
    if acceptance_rate is not None:
        acceptance_length = float(length_of(acceptance_rate, drafts))
    law, store = _law_of(source, trace, phase)
    axes = {name: tuple(values) for name, values in vary.items()}
    cost = None
    reference = Design(law.num_experts, law.top_k)
    if model is not None:
        known = model if isinstance(model, Model) else load_model(model)
        reference = of_model(known, law)
        where = hardware if isinstance(hardware, Hardware) else machine(hardware)
        cost = CostModel(
            known, where, context=context, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel
        )
    rows = compare(
        law,
        designs(reference, axes, hold),
        sizes,
        drafts + 1,
        cost=cost,
        routed_share=routed_share,
        length=acceptance_length,
        draft_cost=drafts * draft_cost,
    )
    about = {"trace": law.source.get("trace"), "phase": law.source.get("phase"), "hold": hold}
    schema = {"trace": pl.String} | {n: getattr(pl, t) for n, t in MODELLED["design"].items()}
    frame = pl.DataFrame([about | row for row in rows], schema=schema)
    if store is not None:
        asked = {
            "vary": axes,
            "hold": hold,
            "batch_size": sizes,
            "drafts": drafts,
            "acceptance_length": acceptance_length,
            "draft_cost": draft_cost,
            "share": routed_share,
        }
        keep(store, store.trace(trace), "design", frame, **asked, phase=law.source["phase"], **setting_of(cost, {}))
    return frame


def _law_of(source: StoreLike | RoutingLaw, trace: str | None, phase: Phase | None) -> tuple[RoutingLaw, Store | None]:
    """Return the law, and the store of the trace that it is fitted to here."""
    if isinstance(source, RoutingLaw):
        return source, None
    if isinstance(source, str | Path) and Path(source).is_file():
        return load_law(source), None
    store = as_store(source)
    return fit_law(store, trace=trace, phase=phase), store


def _targets(
    autocorr: pl.DataFrame, windows: pl.DataFrame, load: dict[str, float], n: int, k: int, lengths: NDArray[np.int64]
) -> Targets:
    """Return what one layer's law has to give back."""
    request, pooled = autocorr["expected_request"][0], load["sum_p2_over_k"]
    alike = len(lengths) == 1
    popularity = pooled if alike else max(unbiased_popularity(pooled, request, lengths), k / n)
    # The entropy falls below ln N about as sum p^2 rises above k / N, by the same bias.
    spread = (popularity - k / n) / (pooled - k / n) if pooled > k / n else 0.0
    return Targets(
        num_experts=n,
        top_k=k,
        popularity_overlap=popularity,
        overlaps=dict(autocorr.select("lag", "overlap").rows()),
        unions=dict(windows.filter(windows["window"] > 1).select("window", "observed").rows()),
        entropy_norm=1 - (1 - load["entropy_norm"]) * spread if n > 1 else None,
        request_overlap=None if alike else request,
        lengths=lengths,
        alike=alike,
    )
