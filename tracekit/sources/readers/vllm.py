"""Reader of vLLM responses, of every generation that returns routing over HTTP.

========== =========================================================================================================
0.14-0.20  Python only: arrays that a script saves (``arrays``), never a field of a response
0.21       nested lists: ``prompt_routed_experts`` beside the choices, the output's rows in each choice; MoE layers
           packed to the front of the layer axis (mended by `tracekit.sources.layers`)
0.22-      base64 of a ``.npy`` in ``choices[].routed_experts``; ``routed_experts_prompt_start`` leaves out the first
           rows and is not echoed, so it is taken from the logged request or inferred from the token counts
========== =========================================================================================================

Streams of ``/inference/v1/generate`` have it in their last chunk; streams of the OpenAI endpoints have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.schema import IdSpace
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.choices import Routing, nested_ids, requests
from tracekit.sources.layers import release
from tracekit.sources.npy import parse_npy
from tracekit.sources.responses import Exchange, Json, count, decode_base64, mapping, token_list
from tracekit.sources.streams import exchanges, sniff_record

NPY_BASE64 = "k05VTVBZ"
_FIELD = "routed_experts"
_PROMPT_FIELD = "prompt_routed_experts"
_VERSION = re.compile(r"vllm-(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")


def _sniff(path: Path, head: bytes) -> bool:
    response = sniff_record(path, head)
    return response is not None and "choices" in response


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    for where, part, exchange, done in exchanges(path):
        if exchange.streamed and not _has_routing(exchange.response):
            raise SourceError(
                "is a stream without routing: streams carry no routing on /v1/chat/completions and /v1/completions",
                where=where,
                expected="the last chunk of /inference/v1/generate, or whole responses",
                remedy="Ask without stream, or record /inference/v1/generate up to the end",
            )
        version = fingerprint_version(exchange.response)
        packed = isinstance(exchange.response.get(_PROMPT_FIELD), list)
        for raw in requests(exchange, where, part, done, _decode):
            if version is not None or packed or not _is_nested(exchange.response):
                raw.engine, raw.engine_version = "vllm", version or ("0.21" if packed else None)
                raw.id_space = _id_space(raw.engine_version)
                raw.notes += version_notes(raw.engine_version)
            yield raw


def _has_routing(response: Json) -> bool:
    found = response.get("choices")
    listed = found if isinstance(found, list) else []
    return any(isinstance(c, dict) and c.get(_FIELD) is not None for c in listed)


def _is_nested(response: Json) -> bool:
    return any(isinstance(choice.get(_FIELD), list) for choice in response["choices"])


def _decode(choice: Json, exchange: Exchange, index: int, where: str) -> Routing:
    value, response = choice.get(_FIELD), exchange.response
    if isinstance(value, str) and value.startswith(NPY_BASE64):
        return Routing(parse_npy(decode_base64(value, where), where))
    if isinstance(value, list) or (value is None and isinstance(response.get(_PROMPT_FIELD), list)):
        return _nested(value or [], choice, response, index, where)
    raise SourceError(
        _what_it_is(value, choice),
        where=where,
        expected="base64 of a .npy in routed_experts",
        remedy="Start the server with --enable-return-routed-experts (vLLM 0.22 or newer) and keep whole "
        "responses of requests that are not streamed",
    )


def _nested(value: list[Any], choice: Json, response: Json, index: int, where: str) -> Routing:
    """Join the prompt's rows with those of the first choice: the others do not repeat them."""
    output, prompt = nested_ids(value, where), response.get(_PROMPT_FIELD)
    if not isinstance(prompt, list):
        # lmdeploy has every row here; without the prompt's rows the counts say which ones there are.
        counted = count(mapping(response, "usage"), "completion_tokens", where)
        tokens = token_list(choice, "token_ids")
        if tokens is not None:
            counted = len(tokens)
        prompt_len = count(mapping(response, "usage"), "prompt_tokens", where)
        several = len(response["choices"]) > 1 and tokens is None
        short = counted is not None and not several and bool(prompt_len) and len(output) == counted - 1
        return Routing(output, output_only=short)
    before = nested_ids(prompt, f"{where}, {_PROMPT_FIELD}")
    if index > 0:
        return Routing(output if output.size else np.empty((0, *before.shape[1:]), np.int64), output_only=True)
    if not output.size:
        return Routing(before)
    if before.ndim != 3 or before.shape[1:] != output.shape[1:]:
        raise SourceError(
            f"{_PROMPT_FIELD} {before.shape} and routed_experts {output.shape} do not join",
            where=where,
            expected="[tokens][layers][k] in both",
        )
    return Routing(np.concatenate([before, output]))


def _what_it_is(value: Any, choice: Json) -> str:
    if isinstance(value, dict) and "data" in value:
        return "has a {data, shape} object as of prime-rl or Dynamo: --source-format dynamo reads it"
    if isinstance(value, str) and value.startswith("nrlre1:"):
        return "has a NeMo-RL string (nrlre1): --source-format nemo reads it"
    if isinstance(value, str):
        return (
            f"has routed_experts that start {value[:8]!r}, which is no .npy in base64: lmdeploy returns the key of an "
            "object in a Ray store, and the routing itself is not in the response"
        )
    if value is not None:
        return f"has routed_experts of type {type(value).__name__}"
    if "delta" in choice:
        return "is a chunk of a stream: streams carry no routing"
    return f"is a response without routing (finish_reason {choice.get('finish_reason')!r})"


def fingerprint_version(response: Json) -> str | None:
    """Return vLLM's version out of ``system_fingerprint`` (``vllm-0.32.0-…``), None where it does not say it."""
    fingerprint = response.get("system_fingerprint")
    match = _VERSION.match(fingerprint) if isinstance(fingerprint, str) else None
    return ".".join(part for part in match.groups() if part is not None) if match else None


def _id_space(version: str | None) -> IdSpace:
    # The HTTP fields came with 0.21, and ids are captured before the load balancer's mapping since 0.16.
    known = release(version)
    return "logical" if known is None or known >= (0, 16) else "unknown"


def version_notes(version: str | None) -> tuple[str, ...]:
    """Return what is known to be wrong with the routing that a version of vLLM returns."""
    known = release(version)
    if known is None or known >= (0, 26):
        return ()
    notes = [f"vLLM {version}: a draft model's router (MTP) may have overwritten layer 0 (fixed in 0.26)"]
    if known < (0, 16):
        notes.append(f"vLLM {version}: ids are physical where expert-parallel load balancing was on (fixed in 0.16)")
    return tuple(notes)


READER = Reader(
    name="vllm",
    title="vLLM responses, JSON or JSON lines",
    example='{"id": …, "choices": [{"routed_experts": "k05VTVBZ…", …}], "usage": {…}}',
    sniff=_sniff,
    read=_read,
)
