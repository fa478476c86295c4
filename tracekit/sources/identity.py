"""Which file is which: by content, so that none is read into a trace again, whatever it is called."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tracekit.errors import SourceError
from tracekit.execution import current
from tracekit.schema import SourceFile
from tracekit.sources.files import reading

_NAMED = 5
_PIECE = 1 << 18
"""Bytes that are read at a time for a digest."""
_LARGE = 4 << 20
"""Bytes from which a file's digest is made in a thread: for less, waking the thread costs more than the digest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source of a trace: a file, or the files of a folder that are one source."""

    name: str
    paths: Sequence[Path]
    size: int


@dataclass
class _Reading:
    """A candidate from when its digest is asked for to when it was read."""

    candidate: Candidate
    states: list[tuple[int, int]]
    """Size and time of the last change of each file."""
    digest: Future[str]


@dataclass
class Once:
    """Leaves out what a trace has already: as many sources of a content as it was read from.

    Requests may be the same, of the same prompt: what is given twice and in the trace once is read once more.

    Digests of large files are made in a thread, one source ahead of the reader; what has the size of nothing in the
    trace is read meanwhile.

    Parameters
    ----------
    candidates
        What is to be read, in order.
    known
        What the trace was read from so far.
    """

    candidates: Sequence[Candidate]
    known: Iterable[SourceFile] = ()
    left_out: list[str] = field(default_factory=list)
    """Names of those that the trace has already."""

    def __post_init__(self) -> None:
        known = tuple(self.known)
        self._digests = Counter(file.digest for file in known if file.digest is not None)
        self._sizes = {file.size for file in known}
        self._readings: dict[int, _Reading] = {}
        self._begun: list[int] = []
        self._next = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tracekit-digest")
        # One for the thread and one for the reader, for all files: new memory has to be cleared.
        self._buffers = [memoryview(bytearray(_PIECE)) for _ in range(2)]

    def begin(self, number: int) -> bool:
        """Return whether the candidate of that number is to be read; they are asked for in order."""
        for n in range(number, min(number + 2, len(self.candidates))):
            candidate = self.candidates[n]
            if n not in self._readings and (n == number or candidate.size > _LARGE):
                states = _states(candidate.paths)
                self._readings[n] = _Reading(candidate, states, self._digest(candidate))
        here = self._readings[number]
        self._next = number + 1
        if here.candidate.size in self._sizes and self._has(here.candidate, here.digest.result()):
            del self._readings[number]
            return False
        self._begun.append(number)
        return True

    def _has(self, candidate: Candidate, digest: str) -> bool:
        """Return whether the trace has the candidate, which then is left out."""
        if not self._digests[digest]:
            return False
        self._digests[digest] -= 1
        self.left_out.append(candidate.name)
        return True

    def chosen(self) -> list[int]:
        """Return the candidates that are to be read, those that were begun among them; nothing is read here then."""
        rest = range(self._next, len(self.candidates))
        asked = [number for number in rest if self.candidates[number].size in self._sizes]
        with ThreadPoolExecutor(current().threads, thread_name_prefix="tracekit-digest") as pool:
            digests = dict(zip(asked, pool.map(self._whole_digest, asked), strict=True))
        new = [n for n in rest if n not in digests or not self._has(self.candidates[n], digests[n])]
        return self._begun + new

    def _whole_digest(self, number: int) -> str:
        return _digest(self.candidates[number].paths, memoryview(bytearray(_PIECE)))

    def _digest(self, candidate: Candidate) -> Future[str]:
        if candidate.size > _LARGE:
            return self._pool.submit(_digest, candidate.paths, self._buffers[0])
        digest: Future[str] = Future()
        digest.set_result(_digest(candidate.paths, self._buffers[1]))
        return digest

    def end(self, number: int) -> SourceFile:
        """Return what was read.

        Raises
        ------
        SourceError
            It was written to meanwhile: nobody knows what of it was read.
        """
        here = self._readings.pop(number)
        file = SourceFile(here.candidate.name, here.candidate.size, here.digest.result())
        for path, before, now in zip(here.candidate.paths, here.states, _states(here.candidate.paths), strict=True):
            if before != now:
                raise SourceError(
                    "was written to while it was read",
                    where=str(path),
                    expected="a file that is complete",
                    remedy="Ingest it when its writer is done; a writer that renames what is complete makes this sure",
                )
        return file

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def notes(self) -> list[str]:
        """Return the sentence about what was left out."""
        return [f"in the trace already, left out: {_names(self.left_out)}"] if self.left_out else []


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _states(paths: Sequence[Path]) -> list[tuple[int, int]]:
    found = []
    for path in paths:
        with reading(str(path)):
            state = path.stat()
        found.append((state.st_size, state.st_mtime_ns))
    return found


def _digest(paths: Sequence[Path], buffer: memoryview) -> str:
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with reading(str(path)), path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
        digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
