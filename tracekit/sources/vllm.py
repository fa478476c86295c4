"""Reader of vLLM responses: base64 ``.npy`` in ``choices[].routed_experts`` (0.22 and later)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.schema import IdSpace
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.jsonio import records
from tracekit.sources.npy import parse_npy
from tracekit.sources.responses import (
    Exchange,
    Json,
    choices,
    count,
    decode_base64,
    mapping,
    sniff_record,
    token_list,
    unwrap,
)
from tracekit.sources.sglang import is_sglang

NPY_BASE64 = "k05VTVBZ"
_FIELD = "routed_experts"
_START = "routed_experts_prompt_start"
_VERSION = re.compile(r"vllm-(\d+)\.(\d+)(?:\.(\d+))?")


def _sniff(path: Path, head: bytes) -> bool:
    response = sniff_record(path, head)
    return response is not None and "choices" in response and not is_sglang(response)


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    for number, (where, record, done) in enumerate(records(path)):
        yield from _requests(unwrap(record, where), where, str(number), done)


def _requests(exchange: Exchange, where: str, part: str, done: int) -> Iterator[RawRequest]:
    response, usage = exchange.response, mapping(exchange.response, "usage")
    found = choices(response, where)
    start = count(exchange.request, _START, where)
    name = response.get("id")
    version = _version(response.get("system_fingerprint"))
    generated = 0
    for i, choice in enumerate(found):
        at = where if len(found) == 1 else f"{where}, choice {i}"
        ids = _ids(choice, response, at)
        if ids.ndim != 3:
            raise SourceError(f"routed_experts has shape {ids.shape}", where=at, expected="[tokens, layers, k]")
        prompt = token_list(choice, "prompt_token_ids") or token_list(response, "prompt_token_ids")
        output = token_list(choice, "token_ids")
        prompt_len = _prompt_len(prompt, count(usage, "prompt_tokens", at), len(found), at)
        if output is not None:
            output_len: int | None = len(output)
        elif len(found) == 1:
            output_len = count(usage, "completion_tokens", at)
        else:  # the usage counts all choices together: it is checked after the last one
            output_len = None if prompt_len is None else max(0, len(ids) + 1 + (start or 0) - prompt_len)
        generated += output_len or 0
        unknown = prompt_len is None or output_len is None
        yield RawRequest(
            where=at,
            ids=ids,
            request_id=None if not isinstance(name, str) else name if len(found) == 1 else f"{name}/{i}",
            part=part if len(found) == 1 else f"{part}/{i}",
            axes="tlk",
            prompt_len=prompt_len,
            output_len=output_len,
            expected_rows=None if prompt_len is None or output_len is None else prompt_len + output_len - 1,
            first_pos=start,
            token_ids=np.array(prompt + output, np.int64) if prompt is not None and output is not None else None,
            fields=exchange.fields,
            model=response.get("model") if isinstance(response.get("model"), str) else None,
            engine="vllm",
            engine_version=version,
            id_space=_id_space(version),
            notes=_notes(version, unknown),
            consumed=done,
        )
    total = count(usage, "completion_tokens", where)
    if total is not None and generated != total and all(token_list(c, "token_ids") is None for c in found):
        raise SourceError(
            f"its {len(found)} choices have routing for {generated} output tokens but completion_tokens is {total}",
            where=where,
            expected="rows that equal prompt + output - 1 in each choice",
            remedy="Ask the server for return_token_ids, so that each choice says its own counts",
        )


def _ids(choice: Json, response: Json, where: str) -> Any:
    value = choice.get(_FIELD)
    if isinstance(value, str) and value.startswith(NPY_BASE64):
        return parse_npy(decode_base64(value, where), where)
    raise SourceError(
        _what_it_is(value, choice, response),
        where=where,
        expected="base64 of a .npy in routed_experts",
        remedy="Start the server with --enable-return-routed-experts (vLLM 0.22 or newer) and keep whole "
        "responses of requests that are not streamed",
    )


def _what_it_is(value: Any, choice: Json, response: Json) -> str:
    if isinstance(value, list) or isinstance(response.get("prompt_routed_experts"), list):
        return "has nested lists as of vLLM 0.21 or lmdeploy, which are not supported yet"
    if isinstance(value, dict) and "data" in value:
        return "has a {data, shape} object as of prime-rl or Dynamo, which is not supported yet"
    if isinstance(value, str) and value.startswith("nrlre1:"):
        return "has a NeMo-RL string (nrlre1), which is not supported yet"
    if isinstance(value, str):
        return (
            f"has routed_experts that start {value[:8]!r}, which is no .npy in base64 (a key of a Ray store looks so)"
        )
    if "routed_experts" in mapping(response, "nvext"):
        return "has Dynamo's nvext.routed_experts, which is not supported yet"
    if "delta" in choice:
        return "is a chunk of a stream: streams carry no routing"
    reason = choice.get("finish_reason")
    return f"is a response without routing (finish_reason {reason!r})"


def _prompt_len(tokens: list[int] | None, counted: int | None, n_choices: int, where: str) -> int | None:
    if tokens is None:
        return counted
    if counted is not None and counted != len(tokens) and n_choices == 1:
        raise SourceError(f"has {len(tokens)} prompt_token_ids but usage.prompt_tokens is {counted}", where=where)
    return len(tokens)


def _version(fingerprint: Any) -> str | None:
    match = _VERSION.match(fingerprint) if isinstance(fingerprint, str) else None
    return ".".join(part for part in match.groups() if part is not None) if match else None


def _minor(version: str | None) -> tuple[int, int] | None:
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _id_space(version: str | None) -> IdSpace:
    # This HTTP field came with 0.22, and ids are captured before the load balancer's mapping since 0.16.
    minor = _minor(version)
    return "logical" if minor is None or minor >= (0, 16) else "unknown"


def _notes(version: str | None, counts_unknown: bool) -> tuple[str, ...]:
    notes = []
    if counts_unknown:
        notes.append("responses without token counts: rows could not be checked, prompt and output are not told apart")
    minor = _minor(version)
    if minor is not None and minor < (0, 26):
        notes.append(f"vLLM {version}: a draft model's router may have overwritten layer 0 (fixed in 0.26)")
    return tuple(notes)


READER = Reader(
    name="vllm",
    title="vLLM responses, JSON or JSON lines",
    example='{"id": …, "choices": [{"routed_experts": "k05VTVBZ…", …}], "usage": {…}}',
    sniff=_sniff,
    read=_read,
)
