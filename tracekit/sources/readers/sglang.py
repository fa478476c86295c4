"""Reader of SGLang responses: base64 of raw int32, without a shape, in ``meta_info.routed_experts``.

Besides the native form (``/generate``, also streamed or in lists) the string stands in the OpenAI form: in ``sglext``
(or ``sgl_ext``) beside the choices or in one, in ``choices[].meta_info``, or, behind Dynamo, in
``nvext.routed_experts`` or ``engine_data.routed_experts``. A string beside several choices is the first one's. Choices
that each have their own string repeat the prompt, and so do the entries of the list that ``/generate`` returns for
``n`` above 1; its rows are kept once, with the first of them, as `tracekit.sources.choices` explains.

A start (``routed_experts_start_len``) is taken from the logged request or the sidecar, never inferred: the number of
rows is the only check that the config is that of the model that was served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, IngestOptions, RawRequest, Reader
from tracekit.sources.choices import drop_prompt
from tracekit.sources.responses import (
    Exchange,
    Json,
    asked,
    choices,
    count,
    decode_base64,
    mapping,
    token_list,
)
from tracekit.sources.streams import exchanges, sniff_record

_FIELD = "routed_experts"
_START = "routed_experts_start_len"
_EXTENSIONS = ("sglext", "sgl_ext")
_OTHERS = ("k05VTVBZ", "nrlre1:")


def is_sglang(response: Json) -> bool:
    """Whether a response is SGLang's, native or in OpenAI form."""
    if "meta_info" in response or any(key in response for key in _EXTENSIONS):
        return True
    found = response.get("choices")
    parts = [response, *(part for part in found if isinstance(part, dict))] if isinstance(found, list) else []
    return any("meta_info" in part or _extension(part) is not None for part in parts)


def _extension(part: Json) -> str | None:
    """Return the string that an extension of a response or of a choice holds."""
    nvext = mapping(part, "nvext")
    places = [*(mapping(part, key) for key in _EXTENSIONS), nvext]
    places += [mapping(part, "engine_data"), mapping(nvext, "engine_data")]
    found = next((place[_FIELD] for place in places if isinstance(place.get(_FIELD), str)), None)
    return None if found is None or found.startswith(_OTHERS) else found


def _sniff(path: Path, head: bytes) -> bool:
    response = sniff_record(path, head)
    return response is not None and is_sglang(response)


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    first: tuple[str | None, RawRequest] | None = None
    for where, part, exchange, done in exchanges(path):
        captures = list(_captures(exchange, where))
        for i, found in enumerate(captures):
            raw = _request(found, options, part if len(captures) == 1 else f"{part}/{i}", done)
            whole = replace(raw)
            if i > 0 or (first is not None and _repeats(exchange, raw, *first)):
                drop_prompt(raw)
            else:
                first = exchange.batch, whole
            yield raw


def _repeats(exchange: Exchange, raw: RawRequest, batch: str | None, first: RawRequest) -> bool:
    """Whether a response is another output for the prompt of an earlier one: of the same call, with the same rows.

    Nothing else in the list that ``/generate`` returns for ``n`` above 1 says which outputs share a prompt.
    """
    if exchange.batch is None or exchange.batch != batch or raw.prompt_len is None:
        return False
    parameters = exchange.request.get("sampling_params")
    each = parameters if isinstance(parameters, list) else [parameters]
    if exchange.logged and not any(isinstance(one, dict) and one.get("n") not in (None, 1) for one in each):
        return False
    if (raw.prompt_len, raw.first_pos, raw.ids.shape[1:]) != (first.prompt_len, first.first_pos, first.ids.shape[1:]):
        return False
    rows = raw.prompt_len - (raw.first_pos or 0)
    return 0 < rows <= min(len(raw.ids), len(first.ids)) and bool((raw.ids[:rows] == first.ids[:rows]).all())


@dataclass(frozen=True, slots=True)
class _Capture:
    """One routing string and the counts that belong to it."""

    where: str
    data: Any
    request_id: str | None
    prompt_len: int | None
    output_len: int | None
    tokens: list[int] | None
    model: str | None
    exchange: Exchange


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _captures(exchange: Exchange, where: str) -> Iterator[_Capture]:
    response = exchange.response
    if "choices" not in response:
        meta = mapping(response, "meta_info")
        prompt, output = token_list(exchange.request, "input_ids"), token_list(response, "output_ids")
        if output is not None and len(output) != meta.get("completion_tokens", len(output)):
            output = None  # the last chunk of a stream that sends its tokens one by one
        yield _Capture(
            where,
            meta.get(_FIELD),
            _text(meta.get("id")),
            count(meta, "prompt_tokens", where),
            count(meta, "completion_tokens", where),
            prompt + output if prompt and output else None,
            _text(response.get("model")),
            exchange,
        )
        return
    found, usage = choices(response, where), mapping(response, "usage")
    name, model = _text(response.get("id")), _text(response.get("model"))
    own = [choice for choice in found if _FIELD in mapping(choice, "meta_info")]
    for i, choice in enumerate(own):
        meta = mapping(choice, "meta_info")
        yield _Capture(
            f"{where}, choice {i}" if len(own) > 1 else where,
            meta[_FIELD],
            f"{name}/{i}" if name is not None and len(own) > 1 else name,
            count(meta, "prompt_tokens", where),
            count(meta, "completion_tokens", where),
            None,
            model,
            exchange,
        )
    if own:
        return
    # An extension beside the choices belongs to the first one, whose own length n > 1 hides.
    holders = [response] if _extension(response) is not None else found
    data = next((text for part in holders if (text := _extension(part)) is not None), None)
    output_len = count(usage, "completion_tokens", where) if len(found) == 1 else None
    yield _Capture(where, data, name, count(usage, "prompt_tokens", where), output_len, None, model, exchange)


def _request(found: _Capture, options: IngestOptions, part: str, done: int) -> RawRequest:
    where = found.where
    if not isinstance(found.data, str) or not found.data:
        raise SourceError(
            "is a stream without routing" if found.exchange.streamed else "is a response without routing",
            where=where,
            expected="base64 in meta_info.routed_experts",
            remedy="Start SGLang with --enable-return-routed-experts and ask for return_routed_experts",
        )
    data = decode_base64(found.data, where)
    if data.startswith(b"\x93NUMPY") or len(data) % 4:
        kind = "a .npy" if data.startswith(b"\x93NUMPY") else f"{len(data)} bytes"
        raise SourceError(f"routed_experts is {kind}", where=where, expected="raw 32-bit integers, as SGLang returns")
    flat: AnyArray = np.frombuffer(data, "<i4")
    start = asked(found.exchange, _START, "routed_experts_prompt_start", where=where)
    expected = None
    if found.prompt_len is not None and found.output_len is not None:
        expected = found.prompt_len + found.output_len - 1
    ids = _shaped(flat, None if expected is None else expected - (start or 0), options, where)
    return RawRequest(
        where=where,
        ids=ids,
        request_id=found.request_id,
        part=part,
        axes="tlk",
        prompt_len=found.prompt_len,
        output_len=found.output_len,
        expected_rows=expected,
        first_pos=start,
        token_ids=None if found.tokens is None else np.array(found.tokens, np.int64),
        fields=found.exchange.fields,
        model=found.model,
        engine="sglang",
        notes=() if expected is not None else ("responses without token counts: rows could not be checked",),
        consumed=done,
    )


def _shaped(flat: AnyArray, rows: int | None, options: IngestOptions, where: str) -> AnyArray:
    """Give the flat ids their shape: layers and k by the config, or k by --top-k and layers by the counts."""
    config = options.config
    top_k = options.top_k or (None if config is None else config.top_k)
    if config is not None and top_k is not None:
        layers: int | None = config.num_hidden_layers
    elif top_k is not None and rows:
        layers = flat.size // (rows * top_k) or None
    else:
        layers = None
    if top_k is None or layers is None:
        raise SourceError(
            f"holds {flat.size} ids without a shape",
            where=where,
            expected="layers and top-k from the model's config",
            remedy="Give --config config.json (or put it beside the trace), or --top-k where the counts are known",
        )
    if not flat.size or flat.size % (layers * top_k):
        counted = "" if rows is None else f", {rows} rows by the token counts"
        raise SourceError(
            f"{flat.size} ids are not whole rows of {layers} layers x {top_k} experts{counted}",
            where=where,
            remedy="Give the --config of the model that was served; a cut-off response looks like this too",
        )
    return flat.reshape(-1, layers, top_k)


READER = Reader(
    name="sglang",
    title="SGLang responses, JSON or JSON lines (needs the model's config)",
    example='{"meta_info": {"routed_experts": "BQAAAB…", "prompt_tokens": …, …}}',
    sniff=_sniff,
    read=_read,
)
