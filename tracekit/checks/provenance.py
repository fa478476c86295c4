"""What a trace's provenance says: a reduced k, ids of replicas, missing prompts, and what engine versions got wrong."""

from __future__ import annotations

import re

import numpy as np

from tracekit.checks.finding import Finding, counted, layers_without
from tracekit.checks.keys import set_keys
from tracekit.checks.sample import Sample
from tracekit.schema import Request, TraceMeta

_CAPTURE_AGAIN = "Capture again with a newer version if that was the case"

_VERSIONS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], str, str], ...] = (
    (
        "vllm",
        (0, 14),
        (0, 15),
        "ids were captured after the mapping to physical experts",
        "with expert-parallel load balancing on, ids number replicas: unique experts are too many",
    ),
    (
        "vllm",
        (0, 14),
        (0, 26),
        "a draft model's router (MTP) wrote over layer 0",
        "with speculative decoding, results of layer 0 are those of the draft",
    ),
    (
        "sglang",
        (0, 5),
        (0, 5, 12),
        "ids were captured after the mapping to physical experts",
        "with redundant experts, ids number replicas: unique experts are too many",
    ),
    (
        "sglang",
        (0, 5),
        (0, 5, 15),
        "a draft model's router wrote over the first layer",
        "with speculative decoding, results of the first layer are those of the draft",
    ),
)
"""Engine, first version, first version without the fault, fault, effect: known from the engines' own source."""


def engine_notes(meta: TraceMeta) -> list[Finding]:
    """Return notes on what the engine's version is known to get wrong."""
    numbers = re.match(r"\D{0,5}(\d+(?:\.\d+){1,3})", meta.engine_version or "")
    if meta.engine is None or numbers is None:
        return []
    version = tuple(int(part) for part in numbers[1].split("."))
    return [
        Finding(
            "note",
            "engine-version",
            f"{meta.engine} {meta.engine_version}",
            f"before {'.'.join(map(str, fixed))} {fault}",
            effect,
            _CAPTURE_AGAIN,
        )
        for engine, since, fixed, fault, effect in _VERSIONS
        if engine == meta.engine.lower() and since <= version < fixed
    ]


def counts_only(meta: TraceMeta) -> list[Finding]:
    """Return ``counts-only`` for a source of counts without tokens: hardly anything can be looked for in it."""
    if not meta.histogram:
        return []
    return [
        Finding(
            "note",
            "counts-only",
            "whole trace",
            "tokens per expert, without the tokens themselves: no row could be looked at",
            "load can be measured; windows, overlap and attribution cannot",
            "Nothing to do for load; else capture the ids of each token",
        )
    ]


def reduced(meta: TraceMeta) -> list[Finding]:
    """Return ``reduced-top-k`` where the run used fewer experts per token than the model's own number."""
    if meta.native_top_k is None or meta.top_k >= meta.native_top_k:
        return []
    return [
        Finding(
            "warning",
            "reduced-top-k",
            "whole trace",
            f"{meta.top_k} experts per token; the model's own number is {meta.native_top_k}",
            "unique experts, overlap and load are those of the reduced run, not of the model as it is released",
            "Capture with the model's own top-k, or name the reduction wherever the numbers are quoted",
        )
    ]


def physical(meta: TraceMeta) -> list[Finding]:
    """Return ``physical-ids`` where ids number replicas of experts."""
    if meta.id_space != "physical":
        return []
    return [
        Finding(
            "serious",
            "physical-ids",
            "whole trace",
            f"ids number {meta.num_experts} physical slots: replicas of an expert have different ids",
            "unique experts and N are too large, overlap too small, load is that after balancing",
            "Map ids with the physical-to-logical map, or capture with load balancing off",
        )
    ]


def constant_layers(meta: TraceMeta, sample: Sample) -> list[Finding]:
    """Return ``constant-layer``: one set in every row of a layer, while most other layers vary.

    Dense layers that an engine fills with a constant look like this (those filled with zeros are refused or left out).
    At least 64 rows, and in most layers no set in more than half of the rows: a router that sends all tokens to one set
    while its neighbours spread them does not come out of training.
    """
    layers = len(meta.layers)
    if sample.rows < 64 or layers < 3 or meta.num_experts < meta.top_k + 2:
        return []
    keys = set_keys(sample.ids(), meta.num_experts)
    constant = [meta.layers[entry] for entry in np.flatnonzero((keys == keys[0]).all(axis=0)).tolist()]
    if not constant:
        return []
    shares = np.array([np.unique(keys[:, layer], return_counts=True)[1].max() / len(keys) for layer in range(layers)])
    if float(np.median(shares)) > 0.5:
        return []
    return [
        Finding(
            "serious",
            "constant-layer",
            f"layer {layer}",
            f"the same experts in every row ({sample.said()})",
            "averages over layers hold a layer without routing: overlap and reductions are overstated",
            f"Ingest with {layers_without(meta.layers, constant)}",
        )
        for layer in constant
    ]


class Phases:
    """Prompts: whether their rows are there, and whether rows that are called prefill can be."""

    def __init__(self) -> None:
        self.known = self.dropped = self.requests = 0
        self.first = ""

    def add(self, request: Request) -> None:
        """Take a request."""
        self.requests += 1
        if not request.prompt_len or len(request.ids) == 0:
            return
        self.known += 1
        first = request.first_pos if request.positions is None else int(request.positions[0])
        if first >= request.prompt_len or (request.decode_start is not None and first >= request.decode_start):
            self.dropped += 1
            self.first = self.first or request.request_id

    def findings(self) -> list[Finding]:
        """Return ``prompt-dropped`` where prompts are known to exist but have no rows."""
        if not self.dropped:
            return []
        return [
            Finding(
                "warning" if 2 * self.dropped > self.known else "note",
                "prompt-dropped",
                f"request {self.first!r}" + (f", and {self.dropped - 1:,} more" if self.dropped > 1 else ""),
                f"{self.dropped:,} of {counted(self.requests, 'request')} have a prompt but no rows of it",
                "prefill cannot be measured, and load is that of generated tokens alone",
                "Capture prompts too (no routed_experts_prompt_start) if prefill matters; decode is not affected",
            )
        ]
