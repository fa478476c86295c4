"""Bytes of the experts of a trace: what the user says, what the trace says, or what its model's config says."""

from __future__ import annotations

import math
from pathlib import Path

from tracekit.errors import UnsupportedError, UsageError
from tracekit.sources.bundled import find
from tracekit.sources.sizes import Model
from tracekit.store import TraceInfo


def expert_sizes(
    info: TraceInfo, *, model: Model | str | Path | None = None, expert_bytes: float | None = None
) -> tuple[int, ...]:
    """Return the bytes of one expert of each MoE layer, ``L`` numbers; none where they are not known.

    Parameters
    ----------
    model
        A bundled model, a ``config.json`` or its folder. Default: what the trace itself says, else the model that it
        names.
    expert_bytes
        Bytes of one expert, in every layer, instead.

    Raises
    ------
    UsageError
        Both are given, the bytes are not positive, or the model is not the one that was traced.
    """
    layers = info.meta.layers
    if expert_bytes is not None:
        if model is not None:
            raise UsageError("a model and the bytes of an expert", expected="one of the two")
        if not (math.isfinite(expert_bytes) and expert_bytes >= 1):
            raise UsageError(f"experts of {expert_bytes:g} bytes", expected="at least 1")
        return (round(expert_bytes),) * len(layers)
    if model is None:
        told = info.meta.extra.get("expert_bytes")
        given = told if isinstance(told, dict) else {}
        sizes = [size for layer in layers if isinstance(size := given.get(str(layer)), int) and size > 0]
        if len(sizes) == len(layers):
            return tuple(sizes)
        if info.meta.model is None or find(info.meta.model) is None:
            return ()
    from tracekit.analysis.gains import traced_model

    size = traced_model(info, {"model": model}).expert_bytes
    if size is None and model is not None:
        raise UnsupportedError("the model's config does not say how large an expert is", remedy="Use --expert-bytes")
    return () if size is None else (size,) * len(layers)
