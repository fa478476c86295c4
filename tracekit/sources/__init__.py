"""Readers: from the files that engines leave behind to canonical requests, streaming."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tracekit.errors import SourceError, UsageError
from tracekit.schema import Request, TraceMeta
from tracekit.sources import arrays, bigmoe, llamacpp, sglang, vllm
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.canonical import Canonical
from tracekit.sources.config import ModelConfig, load_config
from tracekit.sources.files import file_size, read_head, stem, walk
from tracekit.sources.unsupported import unrecognised

__all__ = [
    "READERS",
    "IngestOptions",
    "ModelConfig",
    "RawRequest",
    "Reader",
    "Source",
    "detect",
    "load_config",
    "open_source",
]

READERS: dict[str, Reader] = {module.READER.name: module.READER for module in (arrays, bigmoe, llamacpp, sglang, vllm)}
"""The readers by name, in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    reader: Reader
    size: int
    request_id: str
    """Default id of its requests."""


class Source:
    """A trace source that is open: its provenance at once, its requests one by one."""

    def __init__(self, files: Sequence[_File], options: IngestOptions, notes: Sequence[str]) -> None:
        self.formats = {file.reader.name for file in files}
        self.total_bytes = sum(file.size for file in files)
        self.done_bytes = 0
        """Bytes read so far, for a progress bar."""
        self._files = files
        self._options = options
        self._canonical = Canonical(options, files[0].reader.name)
        self._canonical.notes.extend(notes)
        self._stream = self._generate()
        self._first: Request | None = next(self._stream, None)
        if self._first is None or self._canonical.meta is None:
            raise SourceError("has no request with any routing", where=str(files[0].path))
        self.meta: TraceMeta = self._canonical.meta
        """What holds for the whole trace."""

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about what was noticed, left out or assumed; complete after the last request."""
        return self._canonical.notes

    def requests(self) -> Iterator[Request]:
        """Yield the requests in order; to be called once."""
        first, self._first = self._first, None
        if first is not None:
            yield first
            del first
            yield from self._stream

    def _generate(self) -> Iterator[Request]:
        before = 0
        for file in self._files:
            for raw in file.reader.read(file.path, self._options):
                name = file.request_id if raw.part is None else f"{file.request_id}/{raw.part}"
                request = self._canonical.request(raw, name)
                self.done_bytes = before + min(raw.consumed, file.size)
                if request is not None:
                    yield request
            before += file.size
            self.done_bytes = before
        self._canonical.finish()


def detect(path: Path) -> Reader:
    """Return the reader for a file, judged by its content.

    Raises
    ------
    SourceError
        If no reader takes it, saying what the file is where that can be seen.
    """
    head = read_head(path)
    for reader in READERS.values():
        if reader.sniff(path, head):
            return reader
    raise unrecognised(path, head)


def open_source(paths: Sequence[Path | str], options: IngestOptions | None = None) -> Source:
    """Open files and folders as one trace.

    Parameters
    ----------
    paths
        Files, or folders whose files (sorted, recursively) are the requests.
    options
        What the user says about them.

    Raises
    ------
    SourceError
        If a path is missing, not recognised, or the first request is at fault.
    UsageError
        If the format asked for does not exist.
    """
    options = options or IngestOptions()
    given = [Path(path) for path in paths]
    if not given:
        raise UsageError("no source given", expected="at least one file or folder")
    forced = _forced(options.source_format)
    notes: list[str] = []
    files: list[_File] = []
    bases = [path if path.is_dir() else path.parent for path in given]
    base = bases[0] if len(set(bases)) == 1 else Path(os.path.commonpath([path.absolute() for path in bases]))
    for path in given:
        if not path.exists():
            raise SourceError("does not exist", where=str(path))
        found = _folder(path, forced, notes) if path.is_dir() else [(path, forced or detect(path))]
        for file, reader in found:
            relative = file if base in file.parents else file.absolute()
            files.append(_File(file, reader, file_size(file), stem(relative, base)))
    formats = sorted({file.reader.name for file in files})
    if len(formats) > 1:
        raise SourceError(
            f"holds files of several formats: {', '.join(formats)}",
            where=", ".join(str(path) for path in given),
            expected="one format per trace",
            remedy="Choose with --source-format, or ingest them as separate traces",
        )
    if options.config is None:
        options = replace(options, config=_config_beside(given[0], notes))
    if len(files) > 1 and formats == ["arrays"] and options.axes is None:
        options = replace(options, token_axis=arrays.varying_axis([file.path for file in files]))
    return Source(files, options, notes)


def _forced(name: str | None) -> Reader | None:
    if name is None:
        return None
    if name not in READERS:
        raise UsageError(f"no source format {name!r}", expected=", ".join(READERS))
    return READERS[name]


def _folder(folder: Path, forced: Reader | None, notes: list[str]) -> list[tuple[Path, Reader]]:
    """Files of a folder that a reader takes; others (manifests, configs, notes) are named in a note."""
    found: list[tuple[Path, Reader]] = []
    others: list[str] = []
    for path in walk(folder):
        head = read_head(path) if path.suffix in (".npy", ".npz") or file_size(path) else b""
        readers = READERS.values() if forced is None else [forced]
        reader = next((reader for reader in readers if head and _takes(reader, path, head)), None)
        if reader is not None:
            found.append((path, reader))
        elif forced is None and path.suffix in (".npy", ".npz"):
            raise unrecognised(path, head)
        else:
            others.append(path.relative_to(folder).as_posix())
    if not found:
        raise SourceError(
            "holds no file that a reader takes",
            where=str(folder),
            expected="arrays, responses or CSV traces",
            remedy="Name the file itself to see what is wrong with it",
        )
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"not part of the trace, left out: {', '.join(map(repr, others[:5]))}{more}")
    return found


def _takes(reader: Reader, path: Path, head: bytes) -> bool:
    try:
        return reader.sniff(path, head)
    except SourceError:
        return False  # a damaged JSON of another kind does not stop a folder


def _config_beside(path: Path, notes: list[str]) -> ModelConfig | None:
    """Load the config.json that lies beside the trace, or in or beside its folder."""
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        file = folder / "config.json"
        if file.is_file():
            try:
                return load_config(file)
            except SourceError as error:
                notes.append(f"the config.json beside the trace was not used: {error}")
    return None
