"""The k with which a model was released, known from its name: what shows that a run used fewer experts."""

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
    text = meta.model.casefold().replace("_", "-")
    known: dict[str, tuple[int, int | None]] = dict(_ALSO)
    for entry in bundled():
        config = parse_config(entry.config, where=entry.name)
        for name in (entry.name, *entry.also):
            known[name.casefold()] = (config.num_experts, config.top_k)
    fits = [
        name
        for name, (num_experts, _) in known.items()
        if num_experts == meta.num_experts and re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text)
    ]
    return known[max(fits, key=len)][1] if fits else None
