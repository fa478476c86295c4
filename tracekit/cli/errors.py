"""From what went wrong to a message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable

import click

from tracekit.errors import TracekitError, TracekitWarning

DONE, AT_FAULT, CHECK_FAILED, MISSING_DEPENDENCY, INTERRUPTED = 0, 1, 3, 4, 130


def guarded(run: Callable[[], object]) -> int:
    """Run a command and return its exit code; no error that a user can cause shows a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TracekitWarning)
            warnings.showwarning = _warn_once()
            code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _fail("interrupted", INTERRUPTED)
    except TracekitError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "a module").partition(".")[0]
        if name == "tracekit":
            raise
        return _fail(f"{name} is not installed. Install it with: pip install {name}", MISSING_DEPENDENCY)
    except MemoryError:
        return _fail("out of memory", AT_FAULT)
    except OSError as error:
        if error.errno == errno.EPIPE:
            stop_writing()
            return DONE
        return _fail(_reason(error), AT_FAULT)


def _fail(text: str, code: int) -> int:
    say(text, heading="Error")
    return code


def say(text: str, *, heading: str) -> None:
    """Write ``heading: text`` to stderr, with nothing in it that drives a terminal."""
    from tracekit.reports.text import printable

    # Later lines are set in, so that no name in a message can pass for a message of its own.
    lines = [printable(line) for line in text.split("\n")]
    click.echo(f"{heading}: " + "\n  ".join(lines), err=True)


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def stop_writing() -> None:
    """Leave quietly what is left to write: whoever read the output (``head``) has had enough, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warn_once() -> Callable[..., None]:
    """Return what shows a warning: on a line of its own, the same one only once."""
    shown = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            say(str(message), heading="Warning")

    return show
