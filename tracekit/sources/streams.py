"""Responses of a log one by one, streamed ones put together from their chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tracekit.sources.files import reading
from tracekit.sources.jsonio import Listed, first_object, is_events, listed_records, records
from tracekit.sources.responses import Exchange, Json, mapping, unwrap

_WAITING = 8
"""Finished streams that wait for a last chunk (usage, extensions), where the chunks of several are mixed."""

Numbered = tuple[str, str, Exchange, int]
"""Where a response stands, its number in the file, the exchange, and the bytes read so far."""


@dataclass(slots=True)
class _Stream:
    """A response whose chunks are still arriving."""

    where: str
    exchange: Exchange
    response: Json = field(default_factory=dict)
    choices: dict[Any, Json] = field(default_factory=dict)

    def add(self, chunk: Json) -> None:
        for key, value in chunk.items():
            if key == "choices":
                for choice in value if isinstance(value, list) else ():
                    if isinstance(choice, dict):
                        self._add_choice(choice)
            elif isinstance(value, dict) and isinstance(self.response.get(key), dict):
                self.response[key].update(_given(value))
            elif value is not None or key not in self.response:
                self.response[key] = value

    def _add_choice(self, choice: Json) -> None:
        index = choice.get("index", 0)
        merged = self.choices.setdefault(index if isinstance(index, int) else 0, {})
        for key, value in choice.items():
            if key == "token_ids" and isinstance(value, list):
                if not isinstance(merged.get(key), list):
                    merged[key] = []
                merged[key].extend(value)
            elif isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key].update(_given(value))
            elif value is not None or key not in merged:
                merged[key] = value

    @property
    def finished(self) -> bool:
        if "meta_info" in self.response:
            return mapping(self.response, "meta_info").get("finish_reason") is not None
        return bool(self.choices) and all(c.get("finish_reason") is not None for c in self.choices.values())

    def begins_anew(self, chunk: Json) -> bool:
        """Whether a chunk generates on in a choice that has finished: another stream has the same name, or none."""
        found = chunk.get("choices")
        if not isinstance(found, list):
            return "meta_info" in chunk and _unfinished(mapping(chunk, "meta_info"))
        generating = (part for part in found if isinstance(part, dict) and _unfinished(part))
        return any(
            part.get("index", 0) in self.choices
            and any((part.get("text"), part.get("token_ids"), *mapping(part, "delta").values()))
            for part in generating
        )

    def whole(self) -> Exchange:
        response = dict(self.response)
        if "choices" in response or self.choices or "meta_info" not in response:
            response["choices"] = [self.choices[index] for index in sorted(self.choices)]
        return replace(self.exchange, response=response, streamed=True)


def _given(values: Json) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def exchanges(path: Path) -> Iterator[Numbered]:
    """Yield the responses of a file of JSON, JSON lines or server-sent events.

    Chunks of a stream (``/inference/v1/generate`` of vLLM, ``/generate`` of SGLang, Dynamo) are put together by their
    id: token ids are joined, for anything else the last value that is not null counts. Streams may be mixed with each
    other and with whole responses; memory holds the open ones.

    Raises
    ------
    SourceError
        Naming the line that is not JSON or not an object.
    """
    with reading(str(path)), path.open("rb") as file:
        events = is_events(file.read(64))
    streams: dict[str, _Stream] = {}
    finished: dict[str, _Stream] = {}
    streaming = events
    number = done = 0
    for where, record, done, batch in _responses(path):
        exchange = replace(unwrap(record, where), batch=batch)
        name = _name(exchange.response)
        if streaming and name not in streams and _is_trailer(exchange.response):
            continue  # the usage of a stream that waited long enough for it
        if not (events or name in streams or _is_chunk(exchange.response)):
            yield where, str(number), exchange, done
            number += 1
            continue
        streaming = True
        if name in finished and finished[name].begins_anew(exchange.response):
            ended = finished.pop(name)  # its id, or its lack of one, comes again
            streams.pop(name)
            yield ended.where, str(number), ended.whole(), done
            number += 1
        streams.setdefault(name, _Stream(where, exchange)).add(exchange.response)
        if streams[name].finished:
            finished[name] = streams[name]
        if len(finished) > _WAITING:
            key = next(iter(finished))
            ended = finished.pop(key)
            streams.pop(key)
            yield ended.where, str(number), ended.whole(), done
            number += 1
    for stream in streams.values():
        yield stream.where, str(number), stream.whole(), done
        number += 1


def _responses(path: Path) -> Iterator[Listed]:
    """Yield the records of a file, those whose response is a list once for each of its entries."""
    for where, record, done, batch in listed_records(path):
        listed = record.get("response") if isinstance(record, dict) else None
        if isinstance(listed, list):
            for i, response in enumerate(listed):
                yield f"{where}, response {i}", {**record, "response": response}, done, where
        else:
            yield where, record, done, batch


def sniff_record(path: Path, head: bytes) -> Json | None:
    """Return the first response of what looks like JSON or a stream, None for anything else."""
    events = is_events(head)
    first = next((value for _, value, _ in records(path)), None) if events else first_object(path, head)
    if not isinstance(first, dict):
        return None
    response = unwrap(first, str(path)).response
    if events or _is_chunk(response) or isinstance(first.get("response"), list):
        response = next((exchange.response for _, _, exchange, _ in exchanges(path)), response)
    return response


def _name(response: Json) -> str:
    for value in (response.get("id"), response.get("request_id"), mapping(response, "meta_info").get("id")):
        if isinstance(value, str):
            return value
    return ""


def _is_chunk(response: Json) -> bool:
    """Whether a response is part of one: it has not finished, and has no routing yet."""
    if str(response.get("object", "")).endswith("chunk"):
        return True
    found = response.get("choices")
    if isinstance(found, list):
        return any(isinstance(choice, dict) and ("delta" in choice or _unfinished(choice)) for choice in found)
    return "meta_info" in response and _unfinished(mapping(response, "meta_info"))


def _is_trailer(response: Json) -> bool:
    return response.get("choices") == [] and isinstance(response.get("usage"), dict)


def _unfinished(part: Json) -> bool:
    return "finish_reason" in part and part["finish_reason"] is None and part.get("routed_experts") is None
