"""Work on a store that is cut off at a chosen step: run as a program, with jobs as JSON on its standard input.

Every job is done by a fork of this process, which has the libraries but has not used them. A step is a call that
changes the disk. At the chosen one the fork is killed as by ``kill -9``, in the middle of what it writes, or the disk
is full from there on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

import tracekit as tk
from tracekit.store import segment, spool, writer
from tracekit.store.compaction import compact
from tracekit.store.writer import ingest

CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
WRITES = ("fsync", "mkdir", "write_parquet", "sink_parquet")


class Fault:
    """Counts the steps and fails at one of them."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step, self.done = kind, step, 0
        self._lock = threading.Lock()

    def wrap(self, owner: Any, name: str) -> None:
        """Count the calls of a function."""
        call: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.kind == "full" and name not in WRITES:
                return call(*args, **kwargs)
            with self._lock:
                self.done += 1
                here = self.done
            if self.kind == "full" and here >= self.step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if here == self.step:
                if name.endswith("_parquet"):  # half of the file is there
                    call(*args, **kwargs)
                    os.truncate(args[1], Path(args[1]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        setattr(owner, name, counted)


def work(job: dict[str, Any]) -> None:
    """Do a job in this process."""
    fault = Fault(job["kind"], job["step"])
    for name in CHANGES:
        fault.wrap(os, name)
    fault.wrap(pl.DataFrame, "write_parquet")
    fault.wrap(pl.LazyFrame, "sink_parquet")
    segment.GROUP_ROWS, spool.SPOOL_ROWS = 1, 20
    if job["shares"]:
        writer.SHARE_BYTES = 1
    result = {"steps": 0, "error": ""}
    try:
        if job["verb"] == "compact":
            compact(job["store"])
        else:
            with tk.running(threads=1):  # other processes have no fault
                ingest(job["sources"], job["store"], name="t", **job["options"])
    except tk.TracekitError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["steps"] = fault.done
    Path(job["report"]).write_text(json.dumps(result))


def main() -> None:
    """Do the jobs, each in a fork."""
    for job in json.load(sys.stdin):
        if job["from"]:
            shutil.copytree(job["from"], job["store"])
        pid = os.fork()
        if not pid:
            try:
                work(job)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
