"""The journal of a capture: every response on its own line, as soon as it is there."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tracekit.errors import SourceError
from tracekit.sources.files import reading


class Journal:
    """A file of JSON lines that survives an interruption: a line that was cut off is dropped.

    Lines of other requests (another prompt, other sampling) stay and are not looked at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at: dict[str, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None

    @staticmethod
    def key(prompt_id: str, api: str, model: str, body: Mapping[str, Any]) -> str:
        """Return what identifies a request: all of it, but not the server's address."""
        text = json.dumps([prompt_id, api, model, body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __enter__(self) -> Journal:
        with reading(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise SourceError(
                    "another capture is writing to it",
                    where=str(self.path),
                    remedy="Try again when it ends, or name another file with --journal",
                ) from None
            self._file = file
            self._index(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        empty = self._file.seek(0, 2) == 0
        self._file.close()
        self._file = None
        if empty:
            self.path.unlink(missing_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def _index(self, file: IO[bytes]) -> None:
        file.seek(0)
        start = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(start)
                break
            key = _key_of(line)
            if key is not None:
                self._at[key] = (start, len(line))
            start += len(line)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Append a record and hand it to the operating system."""
        assert self._file is not None
        line = json.dumps({**record, "capture": {"key": key}}, ensure_ascii=True).encode() + b"\n"
        with reading(str(self.path)):
            start = self._file.seek(0, 2)
            self._file.write(line)
            self._file.flush()
        self._at[key] = (start, len(line))

    def response(self, key: str) -> Any:
        """Return the response to a request that is there."""
        assert self._file is not None
        start, length = self._at[key]
        with reading(str(self.path)):
            self._file.seek(start)
            return json.loads(self._file.read(length))["response"]


def _key_of(line: bytes) -> str | None:
    """Return the key of a whole record, None for any other line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("response"), dict):
        return None
    capture = record.get("capture")
    key = capture.get("key") if isinstance(capture, dict) else None
    return key if isinstance(key, str) else None
