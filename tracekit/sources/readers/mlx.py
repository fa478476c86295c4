"""Reader of moe-trace's JSON lines from MLX: one event for each token and layer.

``{"phase": "prefill"|"decode", "token_index", "layer", "expert_ids", "scores"}``, and in a collection of many prompts
also ``prompt_id``, ``workload`` and ``model``. MLX takes its top-k with ``argpartition``, in no order; where the events
have scores the experts are put in the order of these, largest first, else their order counts as lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader, scalar_text
from tracekit.sources.cells import Cells, consecutive
from tracekit.sources.jsonio import first_object, records

_WANTED = frozenset({"phase", "token_index", "layer", "expert_ids"})
_NAMES = ("prompt_id", "request_id")
_PHASES = {"prefill": 0, "decode": 1}
_ORDERED = "experts were put in the order of their scores: MLX stores them in none"
_DECODE_ONLY = "requests without prefill events: positions count from the first event"


def _sniff(path: Path, head: bytes) -> bool:
    first = first_object(path, head)
    return first is not None and first.keys() >= _WANTED


@dataclass(slots=True)
class _Request:
    """A request whose events are still arriving."""

    where: str
    name: str | None
    fields: dict[str, str]
    begin: tuple[Any, Any]
    """Token and layer of its first event: where they come again, the next request begins."""
    cells: Cells = field(default_factory=Cells)
    last_prompt: int = -1
    first_output: int | None = None

    def add(self, event: dict[str, Any], phase: int, where: str) -> None:
        token = event["token_index"]
        self.cells.add(token, event["layer"], event["expert_ids"], event.get("scores"), where)
        if phase == 0:
            self.last_prompt = max(self.last_prompt, token)
        elif self.first_output is None or token < self.first_output:
            self.first_output = token


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    open_: _Request | None = None
    part = 0
    done = 0
    for where, event, now in records(path):
        if not isinstance(event, dict) or not event.keys() >= _WANTED:
            raise SourceError("is no routing event", where=where, expected=f"the fields {', '.join(sorted(_WANTED))}")
        phase = event["phase"] if isinstance(event["phase"], str) else None
        if phase not in _PHASES:
            raise SourceError(f"phase is {str(event['phase'])[:40]!r}", where=where, expected="prefill or decode")
        name = next((text for key in _NAMES if (text := scalar_text(event.get(key))) is not None), None)
        if open_ is not None and _is_over(open_, event, name, _PHASES[phase]):
            yield _finished(open_, part, done)
            part, open_ = part + 1, None
        if open_ is None:
            open_ = _Request(where, name, _fields(event), (event["token_index"], event["layer"]))
        open_.add(event, _PHASES[phase], where)
        done = now
    if open_ is not None:
        yield _finished(open_, part, done)


def _is_over(request: _Request, event: dict[str, Any], name: str | None, phase: int) -> bool:
    if name is not None or request.name is not None:
        return name != request.name
    return (event["token_index"], event["layer"]) == request.begin or (phase == 0 and request.first_output is not None)


def _fields(event: dict[str, Any]) -> dict[str, str]:
    texts = {key: scalar_text(value) for key, value in event.items() if key not in _WANTED}
    return {key: text for key, text in texts.items() if text is not None}


def _finished(request: _Request, part: int, done: int) -> RawRequest:
    tokens, layers, ids, weights = request.cells.cube(request.where)
    if request.first_output is not None and request.first_output <= request.last_prompt:
        raise SourceError(
            f"has decode token {request.first_output} before prefill token {request.last_prompt}",
            where=request.where,
            expected="token_index that counts on from the prompt to the output",
        )
    notes: tuple[str, ...] = ()
    if weights is not None:
        order = np.argsort(-weights, axis=2, kind="stable")
        ids, weights = np.take_along_axis(ids, order, axis=2), np.take_along_axis(weights, order, axis=2)
        notes = (_ORDERED,)
    if request.last_prompt < 0:
        notes += (_DECODE_ONLY,)
    return RawRequest(
        where=request.where,
        ids=ids,
        request_id=request.name,
        part=str(part),
        axes="tlk",
        prompt_len=request.last_prompt + 1 if request.last_prompt >= 0 else int(tokens[0]),
        first_pos=int(tokens[0]),
        positions=None if consecutive(tokens) else tokens,
        weights=weights,
        fields=request.fields,
        layer_ids=layers,
        model=request.fields.get("model"),
        engine="mlx",
        id_space="logical",
        router_order=weights is not None,
        notes=notes,
        consumed=done,
    )


READER = Reader(
    name="mlx",
    title="MLX moe-trace events, JSON lines",
    example='{"phase": "decode", "token_index": 12, "layer": 0, "expert_ids": [5, 97, …], "scores": [0.3, …]}',
    sniff=_sniff,
    read=_read,
)
