"""Readers: from the files that engines leave behind to canonical requests, streaming."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tracekit.errors import SourceError, UsageError, did_you_mean
from tracekit.schema import Histogram, Request, SourceFile, TraceMeta
from tracekit.sources.base import IngestOptions, RawCounts, RawRequest, Reader, scalar_text
from tracekit.sources.canonical import Canonical
from tracekit.sources.config import ModelConfig, load_config
from tracekit.sources.files import file_size, is_endless, read_head, stem, walk
from tracekit.sources.identity import Candidate, Once
from tracekit.sources.readers import READERS, arrays
from tracekit.sources.unsupported import unrecognised

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "READERS",
    "IngestOptions",
    "ModelConfig",
    "RawCounts",
    "RawRequest",
    "Reader",
    "Share",
    "Source",
    "detect",
    "formats",
    "load_config",
    "open_source",
]


LOOKED_AT = 10_000
"""Files of a folder that are looked at in vain before it is refused: a disk is not a trace."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    format: str
    """Name of its reader."""
    size: int
    request_id: str
    """Default id of its requests."""
    name: str
    """Path below what was given."""
    parts: Sequence[Path]
    """The files that it is made of: itself, or those of a folder."""


class Source:
    """A trace source that is open: its provenance at once, its requests one by one."""

    def __init__(
        self,
        files: Sequence[_File],
        options: IngestOptions,
        notes: Sequence[str] = (),
        once: Once | None = None,
        canonical: Canonical | None = None,
    ) -> None:
        self.formats = {file.format for file in files}
        self.total_bytes = sum(file.size for file in files)
        self.done_bytes = 0
        """Bytes read so far, for a progress bar."""
        self._files = files
        self._options = options
        self._canonical = canonical or Canonical(options, files[0].format)
        self._canonical.notes.extend(notes)
        self._once = once
        self._stream = self._generate()
        self._begun: list[Request | Histogram | SourceFile] = []
        """Records up to the first request, which says what holds for the trace."""
        while self._canonical.meta is None and (record := next(self._stream, None)) is not None:
            self._begun.append(record)
        if self.empty and not self.left_out:
            raise SourceError("has no request with any routing", where=str(files[0].path))

    @property
    def meta(self) -> TraceMeta:
        """What holds for the whole trace; whether drafts are included is known after the last request."""
        assert self._canonical.meta is not None  # the first request made it
        return self._canonical.meta

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read: the trace has all of it already."""
        return self._canonical.meta is None

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about what was noticed, left out or assumed; complete after the last request."""
        return self._canonical.notes

    @property
    def left_out(self) -> list[str]:
        """Sentences about what the trace has already; complete after the last request."""
        return self._once.notes() if self._once else []

    def requests(self) -> Iterator[Request | Histogram]:
        """Yield the requests in order, or the records of a source of counts; to be called once."""
        return (record for record in self.records() if not isinstance(record, SourceFile))

    def records(self) -> Iterator[Request | Histogram | SourceFile]:
        """Yield the same, and each file after its last request where each is to be read once; to be called once."""
        while self._begun:
            yield self._begun.pop(0)
        yield from self._stream

    def shares(self, size: int) -> list[Share]:
        """Cut what is to be read into shares of about a size, in order, and end the reading here.

        Parameters
        ----------
        size
            Bytes with which a share ends, after a whole file; what is less than half of it at the end is part of the
            last share. So the cut hangs on the files alone.

        Returns
        -------
        list of Share
            None where there is too little for two, or where entries for requests count them over all files: then
            nothing has changed.
        """
        few = len(self._files) < 2 or 2 * self.total_bytes < 3 * size
        if few or self._once is None or self._options.requests is not None:
            return []
        files = [self._files[number] for number in self._once.chosen()]
        self._stream.close()
        self._begun.clear()
        ends, held = [0], 0
        for number, file in enumerate(files, 1):
            held += file.size
            if held >= size:
                ends.append(number)
                held = 0
        if 2 * held < size and len(ends) > 1:
            ends.pop()
        ends.append(len(files))
        return [Share(files[low:high], self._options, self._canonical.settled()) for low, high in pairwise(ends)]

    def _generate(self) -> Generator[Request | Histogram | SourceFile, None, None]:
        try:
            yield from self._files_once()
        finally:
            if self._once:
                self._once.close()
        self._canonical.finish()

    def _files_once(self) -> Iterator[Request | Histogram | SourceFile]:
        before = 0
        for number, file in enumerate(self._files):
            if self._once and not self._once.begin(number):
                if self._options.requests is not None:
                    raise SourceError(
                        "is in the trace already",
                        where=str(file.path),
                        expected="sources that are read, for --requests has an entry for each request",
                        remedy="Leave it and its entries out",
                    )
                before += file.size
                self.done_bytes = before
                continue
            for raw in _read(file, self._options):
                name = file.request_id if raw.part is None else f"{file.request_id}/{raw.part}"
                request = (
                    self._canonical.counts(raw, name)
                    if isinstance(raw, RawCounts)
                    else self._canonical.request(raw, name)
                )
                self.done_bytes = before + min(raw.consumed, file.size)
                if request is not None:
                    yield request
            before += file.size
            self.done_bytes = before
            if self._once:
                yield self._once.end(number)


@dataclass(frozen=True, slots=True)
class Share:
    """Consecutive files of a source, to be read by themselves as a part of it, in another process perhaps."""

    files: Sequence[_File]
    options: IngestOptions
    canonical: Canonical
    """What the first request of the source has settled."""

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return sum(file.size for file in self.files)

    def open(self) -> Source:
        """Open it, once."""
        return Source(self.files, self.options, (), Once(_candidates(self.files)), self.canonical)


def _candidates(files: Sequence[_File]) -> list[Candidate]:
    return [Candidate(file.name, file.parts, file.size) for file in files]


def _read(file: _File, options: IngestOptions) -> Iterator[RawRequest | RawCounts]:
    try:
        yield from READERS[file.format].read(file.path, options)
    except RecursionError as error:  # of a message that shows a value of a thousand levels
        raise SourceError("nests its values too deeply", where=str(file.path), expected="a routing trace") from error


def formats() -> pl.DataFrame:
    """Return the formats that can be ingested, in the order in which they are tried.

    Returns
    -------
    polars.DataFrame
        ``format`` (as ``source_format`` takes it), ``title``, and ``example``, one line that shows such a source.
    """
    import polars as pl

    columns = {"format": "name", "title": "title", "example": "example"}
    return pl.DataFrame({c: [getattr(reader, name) for reader in READERS.values()] for c, name in columns.items()})


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


def open_source(
    paths: Sequence[Path | str], options: IngestOptions | None = None, known: Iterable[SourceFile] | None = None
) -> Source:
    """Open files and folders as one trace.

    Parameters
    ----------
    paths
        Files; folders whose files (sorted, recursively) are the requests, or that are one source as a whole.
    options
        What the user says about them.
    known
        What the trace was read from so far, which is left out; default: all are read, and their digests not made.

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
            url = re.match(r"[a-z][a-z0-9+.-]+:/", str(path))  # a path has lost the second slash
            remedy = "It looks like a URL: copy the files to a disk first" if url else None
            raise SourceError("does not exist", where=str(path), remedy=remedy)
        if is_endless(path):
            raise SourceError(
                "is a device or a pipe",
                where=str(path),
                expected="a file or a folder",
                remedy="Save it to a file first",
            )
        whole = _whole(path, forced) if path.is_dir() else None
        if whole is not None:
            reader, parts = whole
            used = set(parts)
            _note_others(path, [file for file in islice(walk(path), LOOKED_AT) if file not in used], notes)
            size = sum(file_size(file) for file in parts)
            name = scalar_text(path.resolve().name) or "trace"
            files.append(_File(path, reader.name, size, name, name, parts))
            continue
        found = _folder(path, forced, notes) if path.is_dir() else [(path, forced or detect(path))]
        for file, reader in found:
            relative = (file if file.is_relative_to(base) else file.absolute()).relative_to(base)
            files.append(_File(file, reader.name, file_size(file), stem(relative), relative.as_posix(), [file]))
    formats = sorted({file.format for file in files})
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
    return Source(files, options, notes, None if known is None else Once(_candidates(files), tuple(known)))


def _forced(name: str | None) -> Reader | None:
    if name is None:
        return None
    if name not in READERS:
        expected = "one of " + ", ".join(READERS)
        raise UsageError(f"no source format {name!r}", expected=expected, remedy=did_you_mean(name, READERS))
    return READERS[name]


def _whole(folder: Path, forced: Reader | None) -> tuple[Reader, Sequence[Path]] | None:
    """Return the reader that takes the folder as one source, if there is one, and the files that it reads."""
    for reader in READERS.values() if forced is None else [forced]:
        if reader.folder is not None and (files := reader.folder(folder)):
            return reader, files
    return None


def _note_others(folder: Path, others: Sequence[Path], notes: list[str]) -> None:
    """Name the files of a folder that are not part of the trace; its config is looked at elsewhere."""
    if others := [path for path in others if path != folder / "config.json"]:
        names = ", ".join(repr(path.relative_to(folder).as_posix()) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"not part of the trace, left out: {names}{more}")


def _folder(folder: Path, forced: Reader | None, notes: list[str]) -> list[tuple[Path, Reader]]:
    """Files of a folder that a reader takes; others (manifests, configs, notes) are named in a note."""
    found: list[tuple[Path, Reader]] = []
    others: list[Path] = []
    for path in walk(folder):
        head = read_head(path) if path.suffix in (".npy", ".npz") or file_size(path) else b""
        readers = READERS.values() if forced is None else [forced]
        reader = next((reader for reader in readers if head and _takes(reader, path, head)), None)
        if reader is not None:
            found.append((path, reader))
        elif forced is None and path.suffix in (".npy", ".npz"):
            raise unrecognised(path, head)
        else:
            others.append(path)
        if not found and len(others) == LOOKED_AT:
            break
    if not found:
        raise SourceError(
            "holds no file that a reader takes"
            + (f" among its first {LOOKED_AT:,}" if len(others) == LOOKED_AT else ""),
            where=str(folder),
            expected="arrays, responses or CSV traces",
            remedy="Name the file itself to see what is wrong with it",
        )
    if not all(reader.beside for _, reader in found):
        others += [path for path, reader in found if reader.beside]
        found = [(path, reader) for path, reader in found if not reader.beside]
    _note_others(folder, others, notes)
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
