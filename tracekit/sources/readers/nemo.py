"""Reader of NeMo-RL's routed experts: ``nrlre1:<dtype>:<S>x<L>x<K>:<base64>`` and the nested lists before it.

The string stands in ``choices[].routed_experts`` (or the choice's message) of an OpenAI-style response, or in any
object of a rollout record (NeMo Gym's ``response.output[]``, a message of a log), beside ``prompt_token_ids`` and
``generation_token_ids``. Every such object is one call of the model and becomes one request; a later turn repeats the
turns before it as its prompt.

NeMo fills: the rows after the last forwarded token are ``0 .. k-1`` in every layer, rows that were lost are -1. Both
are left out, the first at the end only, where no routing can follow; rows lost in between become holes in the
positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, IngestOptions, RawRequest, Reader
from tracekit.sources.choices import Routing, cut_padding, nested_ids, requests
from tracekit.sources.filler import HOLE_NOTE, TAIL_NOTE, counting_rows, missing_rows, rows_before_tail
from tracekit.sources.jsonio import first_object
from tracekit.sources.responses import Exchange, Json, decode_base64, mapping, token_list, unwrap
from tracekit.sources.streams import exchanges

MAGIC = "nrlre1:"
_FIELD = "routed_experts"
_HEADER = re.compile(r"nrlre1:([a-z0-9]{1,16}):(\d{1,12})x(\d{1,12})x(\d{1,12}):")
_DTYPES = {"int8": "<i1", "int16": "<i2", "int32": "<i4"}
_DEEPEST = 12
_TURNS = "a record with several calls of the model: later turns repeat the rows of the turns before them"


def _sniff(path: Path, head: bytes) -> bool:
    first = first_object(path, head)
    return first is not None and any(map(_is_ours, _parts(unwrap(first, str(path)).response)))


def _is_ours(part: Json) -> bool:
    value = part.get(_FIELD)
    if isinstance(value, str):
        return value.startswith(MAGIC)
    # Nested lists alone could be anybody's: NeMo's own name for the output tokens tells.
    return isinstance(value, list) and "generation_token_ids" in part


def _parts(value: Any, depth: int = 0) -> Iterator[Json]:
    """Yield the objects of a record that have routing, in order."""
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        if value.get(_FIELD) is not None:
            yield value
        for key, inner in value.items():
            if key != _FIELD and isinstance(inner, dict | list):
                yield from _parts(inner, depth + 1)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from _parts(inner, depth + 1)


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    for where, part, exchange, done in exchanges(path):
        if "choices" in exchange.response:
            found = requests(exchange, where, part, done, _decode_choice)
        else:
            found = _rollout(exchange, where, part, done)
        for raw in found:
            raw.id_space = "logical"  # NeMo hands them to another engine, which has no load balancer's replicas
            yield raw


def _decode_choice(choice: Json, exchange: Exchange, index: int, where: str) -> Routing:
    value = next((s[_FIELD] for s in (choice, mapping(choice, "message")) if s.get(_FIELD) is not None), None)
    tokens = [token_list(s, "generation_token_ids") for s in (choice, mapping(choice, "message"))]
    if "token_ids" not in choice and any(tokens):
        choice["token_ids"] = next(found for found in tokens if found)
    return _unfilled(_decoded(value, where))


def _rollout(exchange: Exchange, where: str, part: str, done: int) -> Iterator[RawRequest]:
    found = list(_parts(exchange.response))
    if not found:
        raise SourceError("is a record without routing", where=where, expected=f"{_FIELD} with a {MAGIC}… string")
    several = len(found) > 1
    for i, call in enumerate(found):
        at = f"{where}, call {i}" if several else where
        routing = _unfilled(_decoded(call[_FIELD], at))
        prompt, output = token_list(call, "prompt_token_ids"), token_list(call, "generation_token_ids")
        known = prompt is not None and output is not None
        raw = RawRequest(
            where=at,
            ids=routing.ids,
            part=f"{part}/{i}" if several else part,
            axes="tlk",
            prompt_len=None if prompt is None else len(prompt),
            output_len=None if output is None else len(output),
            positions=routing.positions,
            fields=exchange.fields,
            notes=routing.notes + ((_TURNS,) if several else ()),
            consumed=done,
        )
        if prompt is not None and output is not None:
            raw.expected_rows = len(prompt) + len(output) - 1
            raw.token_ids = np.array(prompt + output, np.int64)
        cut_padding(raw, routing)
        if routing.positions is not None:
            raw.first_pos = int(routing.positions[0]) if routing.positions.size else 0
        if not known:
            raw.notes += ("rollouts without token ids: rows could not be checked, prompt and output not told apart",)
        yield raw


def _decoded(value: Any, where: str) -> AnyArray:
    if isinstance(value, list):
        ids = nested_ids(value, where)
        if ids.ndim != 3:
            raise SourceError(f"routed_experts has shape {ids.shape}", where=where, expected="[tokens, layers, k]")
        return ids
    if not isinstance(value, str) or not value.startswith(MAGIC):
        raise SourceError(
            f"has routed_experts {str(value)[:40]!r}",
            where=where,
            expected="nrlre1:<dtype>:<S>x<L>x<K>:<base64>, or nested lists",
        )
    return parse_envelope(value, where)


def parse_envelope(text: str, where: str) -> AnyArray:
    """Decode an ``nrlre1`` string to signed ids ``[tokens, layers, k]``.

    Raises
    ------
    SourceError
        If the header is not of the form, or the data not as long as it says.
    """
    match = _HEADER.match(text)
    if match is None or match[1] not in _DTYPES:
        raise SourceError(
            f"has the header {text[:48]!r}", where=where, expected="nrlre1:<int8|int16|int32>:<S>x<L>x<K>:<base64>"
        )
    dtype, shape = np.dtype(_DTYPES[match[1]]), tuple(int(n) for n in match.groups()[1:])
    data = decode_base64(text[match.end() :], where)
    claimed = dtype.itemsize * shape[0] * shape[1] * shape[2]
    if len(data) != claimed:
        raise SourceError(
            f"claims shape {shape} of {match[1]} ({claimed} bytes) but holds {len(data)} bytes",
            where=where,
            remedy="A string that was cut off looks like this",
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _unfilled(ids: AnyArray) -> Routing:
    """Leave out NeMo's filler."""
    if ids.ndim != 3 or not ids.size:
        return Routing(ids)
    missing, counting = missing_rows(ids), counting_rows(ids)
    # With one layer, or k = 1, 0 .. k-1 may well be routing: only the token counts tell.
    certain = ids.shape[1] > 1 and ids.shape[2] > 1
    rows = rows_before_tail(counting | missing if certain else missing)
    notes = (TAIL_NOTE,) if rows < len(ids) else ()
    lost = bool(missing.any())
    ids, missing, counting = ids[:rows], missing[:rows], counting[:rows]
    if not lost:
        return Routing(ids, padding=None if certain else counting, notes=notes)
    positions = np.flatnonzero(~missing).astype(np.int64)
    return Routing(ids[~missing], positions=positions, notes=(*notes, *((HOLE_NOTE,) if missing.any() else ())))


READER = Reader(
    name="nemo",
    title="NeMo-RL rollouts and responses with nrlre1 strings, JSON or JSON lines",
    example='{"prompt_token_ids": […], "generation_token_ids": […], "routed_experts": "nrlre1:int16:112x48x8:BQA…"}',
    sniff=_sniff,
    read=_read,
)
