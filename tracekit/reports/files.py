"""Files that appear in one step, and are never overwritten by accident; and folders that come with the package."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tracekit.errors import TracekitError, UsageError


def shipped(folder: str) -> Path:
    """Return a folder that an installed package carries as its own data, and that is at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / f"_{folder}"
    return installed if installed.is_dir() else package.parent / folder


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse a file that cannot or must not be written, before any work is done.

    Raises
    ------
    UsageError
        If the file exists and ``force`` is not set.
    TracekitError
        If the path is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise TracekitError("is a folder", where=str(path), expected="a file to write")
    if path.is_file() and not force:
        raise UsageError(f"will not overwrite without --force: {path}")
    if not path.parent.is_dir():
        raise TracekitError("no such folder", where=str(path.parent), remedy="Create it first")


def write(path: Path, content: bytes, *, force: bool = False) -> None:
    """Write a file so that whoever looks finds the old one or the whole new one.

    Raises
    ------
    UsageError
        If the file exists and ``force`` is not set.
    TracekitError
        If it cannot be written.
    """
    check_writable(path, force=force)
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():  # a device or a pipe has no old content to protect
            target.write_bytes(content)
        else:
            _replace(target, content)
    except OSError as error:
        raise TracekitError(f"cannot be written ({error.strerror or error})", where=str(path)) from None


def _replace(target: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".tracekit-", suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        part.chmod(0o644)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
