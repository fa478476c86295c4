"""Answers that are kept beside the results they follow from, so that SQL can read them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tracekit.economics.cost import CostModel
from tracekit.economics.hardware import Hardware
from tracekit.sources.sizes import Model
from tracekit.store import Store, TraceInfo, results

if TYPE_CHECKING:
    import polars as pl

    from tracekit.analysis.gains import CostOptions


def keep(store: Store, info: TraceInfo, kind: str, frame: pl.DataFrame, **setting: Any) -> None:
    """Save an answer about a trace, with everything that it depends on besides the trace.

    Parameters
    ----------
    kind
        One of ``tracekit.store.answers.MODELLED``; ``frame`` has its columns.
    **setting
        What was asked: numbers (numpy's, too), text, None, and lists and dictionaries of them.
    """
    import polars as pl

    text = json.dumps(setting, sort_keys=True, allow_nan=False, default=lambda number: number.item())
    names = [name for name in results.columns(kind) if name != "asked"]
    results.save(store.path, kind, info, {"setting": text}, frame.with_columns(setting=pl.lit(text)).select(names))


def setting_of(costs: CostModel | None, cost: CostOptions) -> dict[str, Any]:
    """Return what a model of time depends on: the model and how it is stored, the machine's figures, the context.

    ``asked`` has the model and the machine as they were named.
    """
    if costs is None:
        return {}
    machine = asdict(costs.hardware)
    # JSON has no infinity, the bandwidth of a link that is left out.
    figures = {name: None if value == math.inf else value for name, value in machine.items() if name != "name"}
    named = {name: cost.get(name) for name in ("model", "hardware")}
    return {
        "asked": {
            name: value.name if isinstance(value, Model | Hardware) else None if value is None else str(value)
            for name, value in named.items()
        },
        **setting_of_model(costs.model),
        "hardware": costs.hardware.name,
        **figures,
        "context": costs.context,
        "kv_bits": costs.kv_bits,
        "tensor_parallel": costs.tensor_parallel,
        "expert_parallel": costs.expert_parallel,
    }


def setting_of_model(model: Model, prefix: str = "") -> dict[str, Any]:
    """Return a model's name, its quantisation, and a digest of its sizes: two files may have the same name."""
    scheme = model.quantisation
    sizes = (model.config, model.parts, model.caches, sorted(scheme.parts), scheme.block, scheme.base_bits)
    named = {"model": model.name, "quantisation": scheme.name, "bits": scheme.bits, "sizes": digest(sizes)}
    return {prefix + name: value for name, value in named.items()}


def digest(value: object) -> str:
    """Return a short digest of a value's representation, which has to be the same in every run."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
