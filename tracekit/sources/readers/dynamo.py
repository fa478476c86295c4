"""Reader of the ``{data, shape, start, dtype}`` objects of prime-rl and of NVIDIA Dynamo's vLLM backend.

``data`` is base64 of the raw array (base85 before 2026-05, then without ``dtype``: it follows from the length),
``start`` the position of the first row. prime-rl has it in ``choices[].routed_experts``, Dynamo in
``nvext.routed_experts`` or ``engine_data.routed_experts``, of the response or of a choice; one that stands beside
several choices is the first one's. prime-rl pads the end with rows of zeros, which are no routing and are cut off.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, IngestOptions, RawRequest, Reader
from tracekit.sources.choices import Routing, requests
from tracekit.sources.filler import TAIL_NOTE, rows_before_tail, zero_rows
from tracekit.sources.readers.vllm import fingerprint_version, version_notes
from tracekit.sources.responses import Exchange, Json, count, mapping
from tracekit.sources.streams import exchanges, sniff_record

_FIELD = "routed_experts"
_BY_NAME = {"uint8": "<u1", "uint16": "<u2", "int16": "<i2", "int32": "<i4", "uint32": "<u4", "int64": "<i8"}
_BY_SIZE = {1: "<u1", 2: "<u2", 4: "<i4", 8: "<i8"}
_OTHERS = "has routing beside its choices only: it was taken for the first choice's, as Dynamo returns it"


def _sniff(path: Path, head: bytes) -> bool:
    response = sniff_record(path, head)
    found = response.get("choices") if response is not None else None
    if response is None or not isinstance(found, list):
        return False
    return any(isinstance(part, dict) and _packed(part) is not None for part in (response, *found))


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    for where, part, exchange, done in exchanges(path):
        version, named = fingerprint_version(exchange.response), _names_type(exchange.response)
        for raw in requests(exchange, where, part, done, _decode):
            raw.engine, raw.engine_version = "vllm", version
            raw.notes += version_notes(version)
            # Only the current form, which names its type, is sure to be of a vLLM that captures logical ids.
            raw.id_space = "logical" if named else "unknown"
            yield raw


def _packed(part: Json) -> Json | None:
    """Return the object with the routing, wherever a response or a choice keeps it."""
    nvext = mapping(part, "nvext")
    for source in (part, mapping(part, "engine_data"), nvext, mapping(nvext, "engine_data")):
        value = source.get(_FIELD)
        if isinstance(value, dict) and "data" in value and "shape" in value:
            return value
    return None


def _names_type(response: Json) -> bool:
    found = response.get("choices")
    parts = [response, *found] if isinstance(found, list) else [response]
    return any(bool((_packed(part) or {}).get("dtype")) for part in parts if isinstance(part, dict))


def _decode(choice: Json, exchange: Exchange, index: int, where: str) -> Routing | None:
    packed, notes = _packed(choice), []
    if packed is None:
        packed = _packed(exchange.response)
        several = len(exchange.response["choices"]) > 1
        if packed is not None and several and index > 0:
            return None
        if several:
            notes.append(f"a response with several choices {_OTHERS}")
    if packed is None:
        raise SourceError(
            "is a response without routing",
            where=where,
            expected="an object {data, shape, start, dtype} in routed_experts or nvext.routed_experts",
            remedy='Ask Dynamo for it: "nvext": {"extra_fields": ["routed_experts"]}',
        )
    ids, start = unpack(packed, where), count(packed, "start", where)
    zero = zero_rows(ids)
    rows = rows_before_tail(zero)
    if rows < len(ids) and ids.shape[2] > 1 and rows:
        return Routing(ids[:rows], start=start, notes=(*notes, TAIL_NOTE))
    # With k = 1 zeros may be routing: only the token counts tell.
    return Routing(ids, start=start, padding=zero if ids.shape[2] == 1 else None, notes=tuple(notes))


def unpack(packed: Json, where: str) -> AnyArray:
    """Decode ``{data, shape, dtype}`` to ``[tokens, layers, k]``.

    Raises
    ------
    SourceError
        If the shape is no shape, the type unknown, or the data is not as long as both say.
    """
    data, shape, name = packed.get("data"), packed.get("shape"), packed.get("dtype")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise SourceError(f"routed_experts has shape {str(shape)[:80]}", where=where, expected="[tokens, layers, k]")
    if not isinstance(data, str):
        raise SourceError(f"routed_experts.data is a {type(data).__name__}", where=where, expected="base64")
    if name is not None and name not in _BY_NAME:
        raise SourceError(
            f"routed_experts.dtype is {str(name)[:80]!r}", where=where, expected=f"one of {', '.join(_BY_NAME)}"
        )
    ids = math.prod(shape)
    sizes = [np.dtype(_BY_NAME[name]).itemsize] if name is not None else list(_BY_SIZE)
    found = []
    for decode in (_base64, _base85):
        raw = decode(data)
        if raw is not None:
            found.append(len(raw))
            size = next((size for size in sizes if len(raw) == size * ids), None)
            if size is not None:
                dtype = _BY_NAME[name] if name is not None else _BY_SIZE[size]
                return np.frombuffer(raw, dtype).reshape(shape)
    held = " or ".join(f"{n} bytes" for n in found) or "no base64"
    raise SourceError(
        f"routed_experts.data holds {held} for shape {shape}" + ("" if name is None else f" of {name}"),
        where=where,
        expected=f"{sizes[0] * ids} bytes" if len(sizes) == 1 else f"a multiple of {ids} bytes",
        remedy="A response that was cut off looks like this",
    )


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _base85(text: str) -> bytes | None:
    try:
        return base64.b85decode(text)
    except ValueError:
        return None


READER = Reader(
    name="dynamo",
    title="prime-rl and Dynamo responses, JSON or JSON lines",
    example='{"choices": [{"routed_experts": {"data": "BQc…", "shape": [12, 48, 8], "start": 0, "dtype": "uint8"}}]}',
    sniff=_sniff,
    read=_read,
)
