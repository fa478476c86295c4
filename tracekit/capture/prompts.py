"""Prompt files: what a model is asked, and the labels of the requests that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracekit.errors import SourceError, did_you_mean
from tracekit.sources.base import scalar_text
from tracekit.sources.files import reading
from tracekit.sources.jsonio import records

_TEXT = ("prompt", "text")
_TOKENS = ("prompt_token_ids", "token_ids")
_IDS = ("request_id", "id")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: exactly one of ``text``, ``messages`` and ``token_ids`` is given."""

    request_id: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    """Messages of a chat, for the model's chat template."""
    token_ids: tuple[int, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    """File and line, for messages."""


def read_prompts(
    paths: str | Path | Sequence[str | Path],
    *,
    label_fields: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Read prompts, in the order of the files.

    A ``.json`` or ``.jsonl`` file holds strings, or objects with ``prompt`` or ``text``, ``messages``, or
    ``token_ids``; ``request_id`` or ``id`` names the request, and any other field can be part of its label. Any other
    file is text with one prompt a line.

    Parameters
    ----------
    paths
        The files.
    label_fields
        Fields that make up the label, in this order.
    labels
        Labels of every request.

    Raises
    ------
    SourceError
        A file cannot be read, a record is no prompt, two requests have the same id, or there is no prompt at all.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for path in files:
        found = _records(path) if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else _lines(path)
        for number, (where, value) in enumerate(found):
            prompt = _prompt(value, f"{path.name.split('.')[0]}-{number}", where, label_fields, labels or {})
            if prompt.request_id in seen:
                raise SourceError(
                    f"has the request id {prompt.request_id!r}",
                    where=where,
                    expected=f"another id than in {seen[prompt.request_id]}",
                )
            seen[prompt.request_id] = where
            prompts.append(prompt)
    if not prompts:
        raise SourceError("no prompt", where=", ".join(map(str, files)) or None, expected="at least one")
    return prompts


def _lines(path: Path) -> list[tuple[str, Any]]:
    with reading(str(path)):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"is not UTF-8 ({error})", where=str(path), expected="text, one prompt a line") from error
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}:{number}", line.rstrip("\r")) for number, line in lines if line.strip()]


def _records(path: Path) -> list[tuple[str, Any]]:
    return [(where, value) for where, value, _ in records(path)]


def _prompt(
    value: Any, default_id: str, where: str, label_fields: Sequence[str], constant: Mapping[str, str]
) -> Prompt:
    entry: Mapping[str, Any] = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        raise SourceError(f"is a {type(value).__name__}", where=where, expected="a string or an object with a prompt")
    given = [key for key in (*_TEXT, "messages", *_TOKENS) if entry.get(key) is not None]
    if not given:
        raise SourceError("has no prompt", where=where, expected="one of prompt, text, messages and token_ids")
    request_id = next((scalar_text(entry[key]) for key in _IDS if entry.get(key) is not None), None)
    fields = {key: text for key, item in entry.items() if key not in given and (text := scalar_text(item)) is not None}
    missing = next((name for name in label_fields if name not in fields), None)
    if missing is not None:
        raise SourceError(
            f"has no label field {missing!r}",
            where=where,
            expected=f"one of {', '.join(sorted(fields))}" if fields else "a field beside the prompt",
            remedy=did_you_mean(missing, fields) or "Name another field with --label-fields",
        )
    labels = {**{name: fields[name] for name in label_fields}, **constant}
    key, content = given[0], entry[given[0]]
    text = messages = tokens = None
    if key in _TEXT:
        text = scalar_text(content) if isinstance(content, str) else None
    elif key == "messages":
        ok = isinstance(content, list) and content and all(isinstance(m, dict) and "role" in m for m in content)
        messages = content if ok else None
    elif isinstance(content, list) and content and all(type(t) is int and 0 <= t < 1 << 31 for t in content):
        tokens = tuple(content)
    if not text and messages is None and tokens is None:
        expected = {"messages": "messages with a role each"}.get(
            key, "token ids, at least one" if key in _TOKENS else "text that is not empty"
        )
        raise SourceError(f"{key} is not what it should be", where=where, expected=expected)
    return Prompt(request_id or default_id, text, messages, tokens, labels, where)
