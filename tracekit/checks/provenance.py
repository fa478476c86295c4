"""What a trace's provenance says: a reduced k, missing prompts, phases, and what engine versions got wrong."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from tracekit.checks.finding import Finding, counted, layers_without
from tracekit.checks.keys import set_keys
from tracekit.checks.repeats import enough_choices
from tracekit.checks.sample import Sample
from tracekit.schema import Phase, Request, TraceMeta

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


def constant_layers(meta: TraceMeta, sample: Sample) -> list[Finding]:
    """Return ``constant-layer``: one set in every row of a layer, while most other layers vary.

    Dense layers that an engine fills with a constant look like this (those filled with zeros are refused or left out).
    At least 64 rows, and in most layers no set in more than half of the rows: a router that sends all tokens to one set
    while its neighbours spread them does not come out of training.
    """
    layers = len(meta.layers)
    if sample.rows < 64 or layers < 3 or meta.num_experts < meta.top_k + 2:
        return []
    ids = sample.ids()
    first = set_keys(ids[:64], meta.num_experts)  # few rows show that most layers are not
    if not (first == first[0]).all(axis=0).any():
        return []
    keys = set_keys(ids, meta.num_experts)
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
    """Prompts and phases: whether the prompts' rows are there, and whether rows can be of the phase that was claimed.

    Parameters
    ----------
    claimed
        The phase that the user gave all rows, where he did.
    """

    def __init__(self, meta: TraceMeta, claimed: Phase | None) -> None:
        self.judged = enough_choices(meta)
        self.claimed = claimed
        self.known = self.dropped = self.cut = self.requests = self.contradicted = 0
        self.first_dropped = self.first_cut = self.first_contradicted = ""

    def add(self, request: Request) -> None:
        """Take a request."""
        self.requests += 1
        if len(request.ids) == 0:
            return
        first = first_position(request)
        prompt = request.prompt_len
        if prompt is None and request.decode_start is not None and request.decode_start > first:
            prompt = request.decode_start  # --phase prefill: all rows are of the prompt
        if not prompt:
            return
        self.known += 1
        if first >= prompt or (request.decode_start is not None and first >= request.decode_start):
            self.dropped += 1
            self.first_dropped = self.first_dropped or request.request_id
        elif first:
            self.cut += 1
            self.first_cut = self.first_cut or request.request_id
        if self.claimed == "decode" and first < prompt:
            self.contradicted += 1
            self.first_contradicted = self.first_contradicted or request.request_id

    def merge(self, other: Phases) -> None:
        """Add what was seen of the requests that follow."""
        for count in ("known", "dropped", "cut", "requests", "contradicted"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for first in ("first_dropped", "first_cut", "first_contradicted"):
            setattr(self, first, getattr(self, first) or getattr(other, first))

    def findings(self, heads: Counter[int]) -> list[Finding]:
        """Return ``prompt-dropped`` (known prompts lack rows), ``phase-ignored`` and ``phase-contradicted``.

        Parameters
        ----------
        heads
            Different requests by the key of their first row, of those that are decode because the user said so.
        """
        return [*self._missing(), *self._contradictions(heads)]

    def _missing(self) -> list[Finding]:
        found = []
        if self.dropped:
            found.append(
                Finding(
                    "warning" if 2 * self.dropped > self.known else "note",
                    "prompt-dropped",
                    _and_more(self.first_dropped, self.dropped),
                    f"{self.dropped:,} of {counted(self.requests, 'request')} have a prompt but no rows of it",
                    "prefill cannot be measured, and load is that of generated tokens alone",
                    "Capture prompts too (no routed_experts_prompt_start) if prefill matters; decode is not affected",
                )
            )
        if self.cut:
            found.append(
                Finding(
                    "note",
                    "prompt-dropped",
                    _and_more(self.first_cut, self.cut),
                    f"{self.cut:,} of {counted(self.requests, 'request')} lack the first rows of their prompt",
                    "prefill is that of the later rows alone, which have more context before them",
                    "Capture whole prompts (no routed_experts_prompt_start) if prefill matters; decode is not affected",
                )
            )
        return found

    def _contradictions(self, heads: Counter[int]) -> list[Finding]:
        """Report rows that cannot be of the phase claimed.

        Prompt lengths decide where there are any. Where there are none, different requests that start with the same
        row, in every layer and rank, start with the same token and nothing before it: with a prompt. Half of 8 or more
        requests must do so; the first generated token has its whole prompt before it.
        """
        found = []
        if self.contradicted:
            found.append(
                Finding(
                    "warning",
                    "phase-ignored",
                    _and_more(self.first_contradicted, self.contradicted),
                    f"--phase decode, but {self.contradicted:,} of {counted(self.requests, 'request')} have rows of "
                    "their prompt, by its length",
                    "phases follow the prompt lengths: if all rows were generated, decode lacks some of them",
                    "Leave out --phase if the prompt lengths are right; if rows begin after the prompt, give its "
                    "length as first_pos in --requests",
                )
            )
        different = heads.total()
        same = max(heads.values(), default=0)
        if self.judged and different >= 8 and 2 * same >= different:
            found.append(
                Finding(
                    "warning",
                    "phase-contradicted",
                    f"{same:,} of {counted(different, 'request')} that differ",
                    "--phase decode, but they start with the same row, as prompts do that begin with the same token",
                    "results of decode hold the rows of prompts",
                    "Give prompt lengths (--requests) instead of --phase, or leave the prompts' rows out",
                )
            )
        return found


def first_position(request: Request) -> int:
    """Return the position of a request's first row."""
    return request.first_pos if request.positions is None else int(request.positions[0])


def _and_more(request_id: str, requests: int) -> str:
    return f"request {request_id!r}" + (f", and {requests - 1:,} more" if requests > 1 else "")
