"""Requests out of the choices of an OpenAI-style response: their counts, their starts, and the prompt that they share.

With ``n > 1`` every choice repeats the rows of the prompt. They are kept once, with the first choice: the other choices
become requests that begin at the first output token (``first_pos`` is the prompt's length), so that the prompt is
counted once in everything that counts tokens, and every decode window, which never reaches into the prompt, is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, RawRequest
from tracekit.sources.filler import TAIL_NOTE
from tracekit.sources.responses import Exchange, Json, asked, choices, count, mapping, token_list

START = "routed_experts_prompt_start"
_INFERRED = (
    f"rows begin inside the prompt: {START} was inferred from the token counts, because the log holds no requests"
)
_SHARED = "responses with several choices repeat the prompt: its rows are kept once, with the first choice"
_UNKNOWN = "responses without token counts: rows could not be checked, prompt and output are not told apart"
_REPEATED = "responses with several choices but without token counts: the prompt's rows are counted once per choice"


@dataclass(slots=True)
class Routing:
    """The routing of one choice, decoded."""

    ids: AnyArray
    """``[rows, layers, k]``."""
    start: int | None = None
    """Position of the first row, where the format says it."""
    positions: NDArray[np.int64] | None = None
    """Positions ``[rows]`` where rows are missing in between."""
    output_only: bool = False
    """Whether the prompt's rows are not among them."""
    padding: NDArray[np.bool_] | None = None
    """Rows ``[rows]`` that are padding if they stand after the last row that the token counts allow."""
    notes: tuple[str, ...] = ()


Decode = Callable[[Json, Exchange, int, str], "Routing | None"]
"""Routing of a choice, given the choice, the exchange, the choice's number, and where it stands; None: it has none."""


def requests(exchange: Exchange, where: str, part: str, done: int, decode: Decode) -> Iterator[RawRequest]:
    """Yield the requests of a response, one per choice.

    Parameters
    ----------
    exchange
        The response, with the request where it was logged.
    where
        File and line, for messages.
    part
        Number of the response in its file.
    done
        Bytes of the file read so far.
    decode
        Reads the routing of one choice.

    Raises
    ------
    SourceError
        If the response has no choices, or the counts, the token ids and the request contradict each other.
    """
    response, usage = exchange.response, mapping(exchange.response, "usage")
    found = choices(response, where)
    several = len(found) > 1
    start = asked(exchange, START, where=where)
    name = next((response[key] for key in ("id", "request_id") if isinstance(response.get(key), str)), None)
    model = response.get("model")
    generated, counted, kept = 0, True, False
    for i, choice in enumerate(found):
        at = f"{where}, choice {i}" if several else where
        routing = decode(choice, exchange, i, at)
        if routing is None:
            counted = False
            continue
        if routing.ids.ndim != 3:
            raise SourceError(f"routed_experts has shape {routing.ids.shape}", where=at, expected="[tokens, layers, k]")
        prompt, output = _tokens(choice, exchange)
        prompt_len = _prompt_len(prompt, count(usage, "prompt_tokens", at), several, exchange, at)
        output_len = len(output) if output is not None else None
        if output_len is None and not several:
            output_len = count(usage, "completion_tokens", at)
        elif output_len is None and routing.output_only:
            output_len = len(routing.ids) + 1
        elif output_len is None and prompt_len is not None:
            # The usage counts all choices together: it is checked after the last one.
            output_len = max(0, len(routing.ids) + 1 + (start or routing.start or 0) - prompt_len)
        generated += output_len or 0
        counted = counted and token_list(choice, "token_ids") is None
        raw = RawRequest(
            where=at,
            ids=routing.ids,
            request_id=None if name is None else f"{name}/{i}" if several else name,
            part=f"{part}/{i}" if several else part,
            axes="tlk",
            prompt_len=prompt_len,
            output_len=output_len,
            positions=routing.positions,
            fields=exchange.fields,
            model=model if isinstance(model, str) else None,
            notes=routing.notes,
            consumed=done,
        )
        if prompt_len is None or output_len is None:
            raw.notes += (_REPEATED if several else _UNKNOWN,)
        else:
            raw.expected_rows = prompt_len + output_len - 1
        if prompt is not None and output is not None:
            raw.token_ids = np.array(prompt + output, np.int64)
        cut_padding(raw, routing)
        _place(raw, routing, start, exchange)
        if kept:
            drop_prompt(raw)
        kept = True
        yield raw
    total = count(usage, "completion_tokens", where)
    if counted and total is not None and generated != total:
        raise SourceError(
            f"its {len(found)} choices have routing for {generated} output tokens but completion_tokens is {total}",
            where=where,
            expected="rows that equal prompt + output - 1 in each choice",
            remedy="Ask the server for return_token_ids, so that each choice says its own counts",
        )


def _tokens(choice: Json, exchange: Exchange) -> tuple[list[int] | None, list[int] | None]:
    """Token ids of prompt and output, from the choice, the response, or the request that was logged."""
    response, request = exchange.response, exchange.request
    nvext = mapping(response, "nvext")
    prompts: list[tuple[Json, str]] = [(choice, "prompt_token_ids"), (response, "prompt_token_ids")]
    if "id" not in response:  # /inference/v1/generate takes tokens and does not echo them
        prompts.append((request, "token_ids"))
    prompts.append((mapping(request, "nvext"), "token_data"))
    prompt = next((found for source, key in prompts if (found := token_list(source, key)) is not None), None)
    output = token_list(choice, "token_ids")
    total = mapping(response, "usage").get("completion_tokens")
    if output is None and len(response["choices"]) == 1:
        listed = token_list(nvext, "completion_token_ids")
        output = listed if listed is not None and (total is None or total == len(listed)) else None
    return prompt, output


def _prompt_len(
    tokens: list[int] | None, counted: int | None, several: bool, exchange: Exchange, where: str
) -> int | None:
    if tokens is None:
        return counted
    if counted is not None and counted != len(tokens) and not several:
        raise SourceError(f"has {len(tokens)} prompt_token_ids but usage.prompt_tokens is {counted}", where=where)
    return len(tokens)


def cut_padding(raw: RawRequest, routing: Routing) -> None:
    """Cut off the rows after the last one that the token counts allow, where they look like padding."""
    if routing.padding is None or raw.expected_rows is None:
        return
    rows = max(0, raw.expected_rows - (routing.start or 0))
    if len(raw.ids) > rows and routing.padding[rows:].all():
        raw.ids = raw.ids[:rows]
        raw.notes += (TAIL_NOTE,)


def _place(raw: RawRequest, routing: Routing, asked_for: int | None, exchange: Exchange) -> None:
    """Find the position of the first row: said, asked for, or the only one that the counts allow."""
    said = routing.start
    if said is not None and asked_for is not None and said != asked_for:
        raise SourceError(
            f"says its rows start at {said}, but the request asked for {asked_for}",
            where=raw.where,
            expected="the same start in both",
        )
    if routing.positions is not None:
        raw.first_pos = int(routing.positions[0]) if len(routing.positions) else 0
        return
    raw.first_pos = said if said is not None else asked_for
    if routing.output_only:
        if raw.prompt_len is None:
            raise SourceError(
                "has routing of the output only, and no token counts",
                where=raw.where,
                expected="usage.prompt_tokens, or prompt_token_ids",
            )
        raw.first_pos = raw.prompt_len
        return
    if TAIL_NOTE in raw.notes:
        return  # where the end was cut, it is the end that may lack rows
    if raw.first_pos is None and not exchange.logged and raw.prompt_len is not None and raw.expected_rows is not None:
        missing = raw.expected_rows - len(raw.ids)
        # A row that was lost is zero in these arrays, not absent: only a later start makes them shorter.
        if 0 < missing <= raw.prompt_len and len(raw.ids):
            raw.first_pos = missing
            raw.notes += (_INFERRED,)


def drop_prompt(raw: RawRequest) -> None:
    """Leave out the prompt's rows, which the first choice has."""
    if raw.prompt_len is None:
        return
    first = raw.first_pos or 0
    cut = max(0, raw.prompt_len - first)
    if raw.positions is not None:
        cut = int(np.searchsorted(raw.positions, raw.prompt_len))
        raw.positions = raw.positions[cut:]
    raw.ids, raw.first_pos = raw.ids[cut:], max(first, raw.prompt_len)
    raw.notes += (_SHARED,)


def nested_ids(value: Any, where: str) -> AnyArray:
    """Return nested lists of whole numbers as an array.

    Raises
    ------
    SourceError
        If the lists are ragged, or hold anything but whole numbers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise SourceError(
            f"routed_experts is a list that is no array ({error})", where=where, expected="lists [tokens][layers][k]"
        ) from error
    if array.size and array.dtype.kind not in "ui":
        raise SourceError(
            f"routed_experts is a list of {array.dtype}", where=where, expected="whole numbers [tokens][layers][k]"
        )
    return array.astype(np.int64) if not array.size else array
