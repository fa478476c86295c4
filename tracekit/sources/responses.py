"""What the responses of all engines have in common: envelopes, counts, base64, label fields."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracekit.errors import SourceError
from tracekit.sources.base import scalar_text

Json = dict[str, Any]

_PROTOCOL = frozenset(
    {
        "request",
        "response",
        "body",
        "choices",
        "meta_info",
        "usage",
        "metrics",
        "sglext",
        "sgl_ext",
        "nvext",
        "engine_data",
    }
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A response, the request that caused it where the log has it, and the record's own label fields."""

    request: Json
    response: Json
    fields: Mapping[str, str]
    logged: bool = False
    """Whether the record holds the request, so that what it does not ask for was not asked for."""
    streamed: bool = False
    """Whether the response was put together from the chunks of a stream."""
    batch: str | None = None
    """The list of which the response is an entry: one call may have returned all of it."""


def unwrap(record: Any, where: str) -> Exchange:
    """Take a response out of the ``{"request", "response"}`` and ``{"body"}`` envelopes of logs and batch files."""
    if not isinstance(record, dict):
        raise SourceError(f"is a {type(record).__name__}, not an object", where=where, expected="a response")
    request: Json = {}
    logged = False
    response: Json = record
    while "choices" not in response and "meta_info" not in response:
        inner = response.get("response", response.get("body"))
        if not isinstance(inner, dict):
            break
        if isinstance(response.get("request"), dict):
            request, logged = response["request"], True
        response = inner
    if isinstance(request.get("body"), dict):
        request = request["body"]
    fields: dict[str, str] = {}
    nested = (value for key, value in record.items() if isinstance(value, dict) and key not in _PROTOCOL)
    for source in (record, *nested, request):
        for key, value in source.items():
            text = scalar_text(value)
            if text is not None and key not in fields:
                fields[key] = text
    return Exchange(request, response, fields, logged)


def count(source: Mapping[str, Any], key: str, where: str) -> int | None:
    """Return a count of a response, None where it is absent or null."""
    value = source.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise SourceError(f"{key} is {value!r:.60}", where=where, expected="a count")
    return value


def token_list(source: Mapping[str, Any], key: str) -> list[int] | None:
    """Return a list of token ids, None where there is none."""
    value = source.get(key)
    if not isinstance(value, list):
        return None
    if not all(isinstance(v, int) and not isinstance(v, bool) and -(1 << 62) < v < 1 << 62 for v in value):
        return None
    return value


def mapping(source: Mapping[str, Any], key: str) -> Json:
    """Return a nested object, an empty one where there is none."""
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def asked(exchange: Exchange, *keys: str, where: str) -> int | None:
    """Return a count that the request asked for: on top, among its sampling parameters, or in an extension."""
    request = exchange.request
    nested = (mapping(request, key) for key in ("sampling_params", "nvext", "extra_body"))
    for source in (request, *nested):
        for key in keys:
            value = count(source, key, where)
            if value is not None:
                return value
    return None


def choices(response: Json, where: str) -> list[Json]:
    """Return the choices of an OpenAI-style response."""
    found = response.get("choices")
    if not isinstance(found, list) or not found or not all(isinstance(choice, dict) for choice in found):
        error = response.get("error")
        detail = f": {str(error)[:200]}" if error else ""
        raise SourceError(
            f"is not a response with choices{detail}",
            where=where,
            expected="whole responses of the OpenAI API",
            remedy="Leave out failed requests",
        )
    return found


def decode_base64(text: str, where: str) -> bytes:
    """Decode base64 strictly."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SourceError(
            f"routed_experts is not base64 ({error})",
            where=where,
            expected="the string that the engine returned, complete",
        ) from error
