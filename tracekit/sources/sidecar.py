"""The ``--requests`` sidecar: what the user knows about the requests of a source, and the labels made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tracekit.errors import SourceError, did_you_mean
from tracekit.sources.base import scalar_text

Entry = Mapping[str, Any]

PROMPT_LEN_KEYS = ("prompt_len", "prompt_tokens", "prompt_length", "num_prompt_tokens")
_WHERE = "--requests"


class Sidecar:
    """Matches requests with the entries of the sidecar: by id if the entries have ids, else in order."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._used = 0
        named = ["request_id" in entry for entry in entries]
        self._by_id: dict[str, Entry] | None = None
        if any(named):
            if not all(named):
                raise SourceError(
                    f"entry {named.index(False)} has no request_id but others have",
                    where=_WHERE,
                    expected="a request_id in every entry, or in none",
                )
            self._by_id = {str(entry["request_id"]): entry for entry in entries}
            if len(self._by_id) < len(entries):
                raise SourceError("has the same request_id twice", where=_WHERE, expected="one entry per request")

    def match(self, request_id: str, named: bool, where: str) -> tuple[str, Entry]:
        """Return the final id of a request, and its entry.

        Parameters
        ----------
        request_id
            The id the request would have.
        named
            Whether the source itself gives that id; else the sidecar's ids name the requests in order.
        where
            For messages.
        """
        if self._by_id is not None and named:
            entry = self._by_id.get(request_id)
            if entry is None:
                raise SourceError(
                    f"no entry of the sidecar has request_id {request_id!r}",
                    where=where,
                    expected="an entry for every request",
                    remedy="Leave request_id out of every entry to match in request order",
                )
        elif self._used < len(self._entries):
            entry = self._entries[self._used]
            request_id = str(entry.get("request_id", request_id))
        else:
            raise SourceError(
                f"the sidecar has {len(self._entries)} entries but the source has more requests",
                where=where,
                expected="one entry per request",
            )
        self._used += 1
        return request_id, entry

    def finish(self) -> None:
        """Check, after the last request, that every entry was used."""
        if self._used != len(self._entries):
            raise SourceError(
                f"has {len(self._entries)} entries but the source has {self._used} requests",
                where=_WHERE,
                expected="one entry per request",
            )


def entry_count(entry: Entry, keys: Sequence[str], request_id: str) -> int | None:
    """Return a whole number that an entry gives under one of several names."""
    for key in keys:
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
            raise SourceError(
                f"{key} is {value!r:.60}", where=f"{_WHERE}, request {request_id!r}", expected="a whole number"
            )
        return value
    return None


def labels_of(
    names: Sequence[str], entry: Entry, fields: Mapping[str, str], constant: Mapping[str, str], where: str
) -> dict[str, str]:
    """Make a request's labels of the fields asked for, in that order, and the constant ones."""
    labels: dict[str, str] = {}
    for name in names:
        value = scalar_text(entry.get(name))
        value = fields.get(name) if value is None else value
        if value is None:
            there = sorted({key for key in entry if scalar_text(entry[key]) is not None} | set(fields))
            raise SourceError(
                f"has no label field {name!r}",
                where=where,
                expected=f"one of {', '.join(there)}" if there else "a field in the records or in the sidecar",
                remedy=did_you_mean(name, there) or "Name another field with --label-fields, or give --requests",
            )
        labels[name] = value
    labels.update(constant)
    return labels
