"""JSON documents, JSON lines and streams of server-sent events, one value at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tracekit.errors import SourceError
from tracekit.sources.files import fault, reading

_LONGEST = 1 << 30
"""Longest single record that is read into memory."""
_PIECE = 1 << 20
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")

Record = tuple[str, Any, int]
"""Where a value stands, the value, and the bytes read so far."""
Listed = tuple[str, Any, int, str | None]
"""The same, and which list the value is an entry of."""


def records(path: Path) -> Iterator[Record]:
    """Yield the records of JSON arrays, of JSON lines, of one JSON object, or of server-sent events.

    Raises
    ------
    SourceError
        Naming the line (or the entry of an array) that is not JSON.
    """
    return ((where, value, done) for where, value, done, _ in listed_records(path))


def listed_records(path: Path) -> Iterator[Listed]:
    """Yield the same, and for each the list that it is an entry of, None where it is in none."""
    with reading(str(path)), path.open("rb") as file:
        first = _first_byte(file)
        if first == b"[":
            found: Iterator[Listed] = _entries(file, str(path))
        else:
            parse = _lines if first == b"{" or not _at_event(file) else _events
            found = ((*record, None) for record in parse(file, str(path)))
        for where, value, done, inside in found:
            # A batch call's log has one list of responses a line.
            if isinstance(value, list):
                yield from ((f"{where}, entry {i}", item, done, where) for i, item in enumerate(value))
            else:
                yield where, value, done, inside


def first_object(path: Path, head: bytes) -> dict[str, Any] | None:
    """Return the first record of what looks like JSON where it is an object, None for anything else."""
    if head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] not in (b"{", b"["):
        return None
    first = next((value for _, value, _ in records(path)), None)
    return first if isinstance(first, dict) else None


def is_events(head: bytes) -> bool:
    """Whether a file that begins so is a stream of server-sent events, as ``curl`` leaves it."""
    return head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(_EVENT_FIELDS)


def _at_event(file: IO[bytes]) -> bool:
    start = file.tell()
    found = file.read(16).startswith(_EVENT_FIELDS)
    file.seek(start)
    return found


def _first_byte(file: IO[bytes]) -> bytes:
    """Return the first byte that is not white space and rewind to it."""
    if file.read(3) != codecs.BOM_UTF8:
        file.seek(0)
    while byte := file.read(1):
        if not byte.isspace():
            file.seek(-1, 1)
            return byte
    return b""


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"is not JSON ({fault(error)})", where=where, expected="complete responses, one a line or in an array"
        ) from error


def _lines(file: IO[bytes], name: str) -> Iterator[Record]:
    """JSON lines; a first line that is no complete value begins one object over many lines."""
    start = file.tell()
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if len(line) == _LONGEST:
            raise SourceError(f"has a line of more than {_LONGEST} bytes", where=where, expected="JSON lines")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number > 1:
                _parse(line, where)
            file.seek(start)
            value, where = _parse(file.read(_LONGEST), name), name
        yield where, value, file.tell()


def _events(file: IO[bytes], name: str) -> Iterator[Record]:
    """Server-sent events: their ``data:`` lines; servers of the OpenAI API end them with ``[DONE]``."""
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
        line = line.strip()
        if not line or (line.startswith(_EVENT_FIELDS) and not line.startswith(b"data:")):
            continue
        where = f"{name}:{number}"
        if not line.startswith(b"data:"):
            raise SourceError(f"line {line[:40]!r} is no event", where=where, expected="data: lines of a stream")
        data = line.removeprefix(b"data:").strip()
        if data != b"[DONE]":
            yield where, _parse(data, where), file.tell()


def _entries(file: IO[bytes], name: str) -> Iterator[Listed]:
    """Entries of one JSON array or several in a row, decoded as they arrive."""
    decode, parse = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
    buffer, at, entry, piece, inside, arrays = "", 0, 0, _PIECE, False, 0
    while True:
        while at < len(buffer) and (buffer[at].isspace() or (inside and buffer[at] == ",")):
            at += 1
        if at < len(buffer) and buffer[at] == ("]" if inside else "["):
            inside, at = not inside, at + 1
            arrays += inside
            continue
        where = f"{name}, entry {entry}"
        if at < len(buffer):
            try:
                if not inside:
                    raise SourceError("has text after the array", where=where, expected="one JSON array")
                value, end = parse(buffer, at)
                if end < len(buffer):
                    yield where, value, file.tell(), f"{name}, array {arrays}"
                    at, entry, piece = end, entry + 1, _PIECE
                    continue
            except RecursionError as error:
                raise SourceError("is nested too deeply", where=where) from error
            except json.JSONDecodeError:
                pass  # perhaps only not complete yet
            except ValueError as error:
                raise SourceError(f"is not JSON ({fault(error)})", where=where) from error
        data = file.read(piece)
        if not data and not inside and at == len(buffer):
            return
        if not data or len(buffer) - at > _LONGEST:
            _parse(buffer[at:].encode(), where)
            raise SourceError("is cut off: the array does not end", where=where)
        try:
            buffer, at = buffer[at:] + decode(data), 0
        except UnicodeDecodeError as error:
            raise SourceError(f"is not UTF-8 ({error})", where=where) from error
        piece *= 2  # keeps the retries of one long record linear in its length
