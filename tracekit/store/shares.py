"""Shares of a trace, each ingested into a segment of its own: by processes at the same time, or one after the other.

A process is a fresh interpreter, not a fork, which threads of this one could leave with locks that nobody opens. It
gets shares through a socket and ends with it: as soon as this process has ended, however that came. In the order of
the shares alone is known which number the first request of each has, so a process says how many it has read, and
learns how many are before them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tracekit.checks import Checker
from tracekit.errors import StoreError, TracekitError
from tracekit.execution import current
from tracekit.schema import Phase, SourceFile
from tracekit.sources.mend import Share
from tracekit.sources.released import released_experts, released_top_k
from tracekit.store.ahead import SMALL, ahead
from tracekit.store.manifest import Segment
from tracekit.store.segment import SegmentWriter, number

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SHARE_BYTES = 512 << 20
"""Bytes of files with which a share ends."""

_WORKER_BYTES = 300 << 20
"""Memory that a process takes, about."""
_REPORT = 0.1
"""Seconds after which a process says again how far it is."""
# An interrupt from the keyboard reaches all processes; who started them ends them.
_PROGRAM = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from tracekit.store.shares import work; work(int(sys.argv[2]))"
)

Report = Callable[[int, int], None]
"""Called with bytes read and tokens taken so far, of all shares."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done."""

    root: Path
    share: Share
    phase: Phase | None


@dataclass(frozen=True, slots=True)
class Done:
    """What was done."""

    segment: Segment | None
    """None: no file had a request."""
    sources: tuple[SourceFile, ...]
    checker: Checker
    notes: tuple[str, ...]
    ids: Mapping[str, str]
    """Ids of the requests, and where they were found."""


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a share is."""

    bytes: int
    tokens: int
    requests: int | None = None
    """How many there are, once all are read."""


def write_shares(tasks: Sequence[Task], first: int, report: Report) -> Generator[Done, None, None]:
    """Write a segment of each share and yield what was done, in the order of the shares; the caller commits them.

    Where the iterator ends early, by an error or because it is closed, nothing writes any more.

    Parameters
    ----------
    tasks
        The shares in order.
    first
        Number of the first request of all.
    report
        Called now and then.

    Raises
    ------
    TracekitError, OSError
        That of the first share in order that has one.
    """
    running = current()
    most = len(tasks) if running.memory is None else running.memory // _WORKER_BYTES
    workers = min(running.threads, len(tasks), most)
    # A program in one file is no interpreter, and Windows hands no sockets on.
    fresh = bool(sys.executable) and not getattr(sys, "frozen", False) and os.name == "posix"
    if workers > 1 and fresh:
        crew = _Crew(tasks, first, report, workers)
        try:
            yield from crew.run()
        finally:
            crew.stop()
        return
    size = tokens = 0
    for task in tasks:

        def tell(progress: _Progress, size: int = size, tokens: int = tokens) -> None:
            report(size + progress.bytes, tokens + progress.tokens)

        done = _write(task, number(first), tell)
        yield done
        first += len(done.ids)
        size += task.share.size
        tokens += done.segment.tokens if done.segment else 0


def _write(task: Task, first: Future[int], tell: Callable[[_Progress], None]) -> Done:
    """Write the segment of a share."""
    stream = task.share.open()
    meta = stream.meta
    checker = Checker(meta, released_top_k(meta), released_experts(meta), task.phase)
    with SegmentWriter(task.root, meta, first) as writer:
        for record in ahead(stream.records(), SMALL):
            if isinstance(record, SourceFile):
                writer.end_file(record)
            else:
                writer.add(record)
                checker.add(record)
            tell(_Progress(stream.done_bytes, writer.tokens))
        tell(_Progress(stream.done_bytes, writer.tokens, writer.requests))
        segment = writer.finish() if writer.requests else None
    return Done(segment, writer.sources, checker, tuple(stream.notes), writer.ids)


class _Worker:
    """A process that writes one share after the other."""

    def __init__(self) -> None:
        from multiprocessing.connection import Pipe

        self.connection, theirs = Pipe()
        arguments = [json.dumps([p for p in sys.path if isinstance(p, str)]), str(theirs.fileno())]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"POLARS_MAX_THREADS": "2"},  # there are as many processes as there are to be threads
        )
        theirs.close()

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self.connection.close()
        self._process.wait()

    def death(self, task: Task) -> StoreError:
        """Return the error for a process that ended by itself."""
        code = self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return StoreError(
            f"a process that read a share of the sources was ended {how}",
            where=str(task.root),
            remedy="Was memory short? Fewer --threads take less. What was committed is safe",
        )


@dataclass
class _Crew:
    """Processes, and what they do."""

    tasks: Sequence[Task]
    first: int
    report: Report
    size: int
    _busy: dict[Connection, tuple[int, _Worker]] = field(default_factory=dict)
    """Which share each process is at."""
    _idle: list[_Worker] = field(default_factory=list)
    _progress: dict[int, _Progress] = field(default_factory=dict)
    """Of each share that was begun."""
    _told: set[int] = field(default_factory=set)
    """Shares whose process knows the number of their first request."""
    _ended: dict[int, Done | Exception] = field(default_factory=dict)

    def run(self) -> Iterator[Done]:
        """Yield what was done, in order."""
        from multiprocessing.connection import wait

        for _ in range(self.size):
            self._idle.append(_Worker())
        begun, wanted, end = 0, 0, len(self.tasks)
        while wanted < end:
            while self._idle and begun < end:
                self._begin(begun)
                begun += 1
            ready = wait(list(self._busy))
            for connection in [connection for connection in self._busy if connection in ready]:
                if connection in self._busy:  # it may have been stopped meanwhile
                    failed = self._hear(connection)
                    end = end if failed is None else min(end, failed + 1)  # an earlier one may fail still
            while wanted in self._ended:
                ended = self._ended.pop(wanted)
                if isinstance(ended, Exception):
                    raise ended
                yield ended
                wanted += 1

    def stop(self) -> None:
        """End all processes."""
        for worker in [*self._idle, *(worker for _, worker in self._busy.values())]:
            worker.stop()

    def _begin(self, share: int) -> None:
        worker = self._idle.pop()
        self._busy[worker.connection] = share, worker
        self._progress[share] = _Progress(0, 0)
        _send(worker.connection, self.tasks[share])
        self._tell()

    def _hear(self, connection: Connection) -> int | None:
        """Take what a process says; return the share that has failed, if it has."""
        share, worker = self._busy[connection]
        try:
            said = connection.recv()
        except (EOFError, OSError):
            said = worker.death(self.tasks[share])
        if isinstance(said, _Progress):
            self._progress[share] = said
            if said.requests is not None:
                self._tell()
            self.report(sum(p.bytes for p in self._progress.values()), sum(p.tokens for p in self._progress.values()))
            return None
        del self._busy[connection]
        self._ended[share] = said
        if isinstance(said, Done):
            self._idle.append(worker)
            return None
        for other, (later, busy) in list(self._busy.items()):
            if later > share:
                del self._busy[other]
                busy.stop()
        worker.stop()
        return share

    def _tell(self) -> None:
        """Tell each process the number of its share's first request as soon as it is known."""
        at = {share: connection for connection, (share, _) in self._busy.items()}
        first = self.first
        for share, progress in sorted(self._progress.items()):
            if share in at and share not in self._told:
                _send(at[share], first)
                self._told.add(share)
            if progress.requests is None:
                return
            first += progress.requests


def _send(connection: Connection, message: Task | int) -> None:
    with contextlib.suppress(OSError):  # the process has ended, which is heard of next
        connection.send(message)


def work(descriptor: int) -> None:
    """Write the shares that come through a socket, until it is closed: what a process is started with."""
    from multiprocessing.connection import Connection

    connection = Connection(descriptor)
    tasks: SimpleQueue[tuple[Task, Future[int]]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    while True:
        task, first = tasks.get()
        latest = 0.0

        def tell(progress: _Progress) -> None:
            nonlocal latest
            if progress.requests is not None or time.monotonic() - latest > _REPORT:
                latest = time.monotonic()
                connection.send(progress)

        try:
            done: Done | Exception = _write(task, first, tell)
        except (TracekitError, OSError, MemoryError) as error:
            done = error
        connection.send(done)


def _listen(connection: Connection, tasks: SimpleQueue[tuple[Task, Future[int]]]) -> None:
    """Take shares and the numbers of their first requests; end the process with the socket, wherever it is."""
    first = Future[int]()
    while True:
        try:
            said = connection.recv()
        except (EOFError, OSError):
            os._exit(1)
        if isinstance(said, Task):
            first = Future[int]()
            tasks.put((said, first))
        else:
            first.set_result(said)
