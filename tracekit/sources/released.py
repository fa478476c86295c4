"""The N and k with which a model was released, known from its name: what shows that a run used other numbers."""

from __future__ import annotations

import re

from tracekit.schema import TraceMeta
from tracekit.sources.bundled import bundled
from tracekit.sources.config import parse_config

_ALSO = {"gemma-4-26b-a4b": (128, 8)}
"""Experts per layer and per token of models whose sizes are not bundled, by name."""


def released_top_k(meta: TraceMeta) -> int | None:
    """Return the model's own k: what the trace says, else that of the model whose name is part of the trace's.

    A file name such as ``google_gemma-4-26B-A4B-it-Q4_K_M.gguf`` holds the name; N has to agree. None where the model
    is not known.
    """
    if meta.native_top_k is not None or meta.model is None:
        return meta.native_top_k
    released = [top_k for num_experts, top_k in _released(meta.model) if num_experts == meta.num_experts]
    return released[0] if released else None


def released_experts(meta: TraceMeta) -> int | None:
    """Return the experts per layer of the model whose name is part of the trace's; None where it is not known."""
    released = _released(meta.model) if meta.model is not None else []
    return released[0][0] if released else None


def _released(model: str) -> list[tuple[int, int]]:
    """Return N and k of the models whose names are part of a name, the longest name first."""
    text = model.casefold().replace("_", "-")
    known = dict(_ALSO)
    for entry in bundled():
        config = parse_config(entry.config, where=entry.name)
        for name in (entry.name, *entry.also):
            known[name.casefold()] = (config.num_experts, config.top_k)
    fits = [name for name in known if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text)]
    return [known[name] for name in sorted(fits, key=len, reverse=True)]
