"""Reader of CSV tables of counts, one row per layer and expert, as SGLang's first recorder wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawCounts, Reader
from tracekit.sources.csvio import read_columns
from tracekit.sources.files import file_size, reading

_NAMES = {"layer": ("layer_id", "layer"), "expert": ("expert_id", "expert"), "count": ("count", "counts")}
_LARGEST = {"layer": 1 << 12, "expert": 1 << 16, "count": 1 << 62}
_MOST_ROWS = 1 << 26


def _header(head: bytes) -> tuple[str, ...]:
    first = head.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace").strip().lower()
    return tuple(name.strip() for name in first.split(","))


def _named(header: tuple[str, ...]) -> dict[str, str] | None:
    """Return which column is layer, expert and count; None where there are others or some are missing."""
    found = {what: [name for name in names if name in header] for what, names in _NAMES.items()}
    if len(header) != len(_NAMES) or any(len(names) != 1 for names in found.values()):
        return None
    return {what: names[0] for what, names in found.items()}


def _sniff(path: Path, head: bytes) -> bool:
    return _named(_header(head)) is not None


def _read(path: Path, options: IngestOptions) -> Iterator[RawCounts]:
    with reading(str(path)), path.open("rb") as file:
        header = _header(file.readline(1 << 16))
    named = _named(header)
    if named is None:
        raise SourceError(f"has the columns {','.join(header)[:80]}", where=f"{path}:1", expected="layer,expert,count")
    blocks: dict[str, list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = {what: [] for what in named}
    total = 0
    for line, columns, _ in read_columns(path, 1, header, dict.fromkeys(header, int)):
        for what, name in named.items():
            values = columns[name]
            wrong = np.flatnonzero((values < 0) | (values >= _LARGEST[what]))
            if wrong.size:
                raise SourceError(
                    f"{name} is {int(values[wrong[0]])}",
                    where=f"{path}:{line + int(wrong[0])}",
                    expected=f"0 to {_LARGEST[what] - 1}",
                )
            blocks[what].append(values)
        total += len(columns[header[0]])
        if total > _MOST_ROWS:
            raise SourceError(f"has more than {_MOST_ROWS} rows", where=str(path), expected="one per layer and expert")
    if not total:
        raise SourceError("has a header but no rows", where=str(path), expected="one row per layer and expert")
    layer, expert, count = (np.concatenate(blocks[what]) for what in ("layer", "expert", "count"))
    layers, at = np.unique(layer, return_inverse=True)
    experts = _width(len(layers), expert, options, path)
    cell = at * experts + expert
    if len(np.unique(cell)) != total:
        raise SourceError("has the same layer and expert twice", where=str(path), expected="one row for each")
    counts = np.zeros(len(layers) * experts, np.int64)
    counts[cell] = count
    yield RawCounts(
        where=str(path),
        counts=counts.reshape(len(layers), experts),
        layer_ids=tuple(int(number) for number in layers),
        consumed=file_size(path),
    )


def _width(layers: int, expert: np.ndarray[tuple[int], np.dtype[np.int64]], options: IngestOptions, path: Path) -> int:
    """Return N: as given, else the width of a table that is complete; the largest id alone would be a guess."""
    known = options.num_experts or (None if options.config is None else options.config.num_experts)
    largest = int(expert.max())
    if known is None:
        if len(expert) != layers * (largest + 1):
            raise SourceError(
                "does not say how many experts a layer has: experts without tokens are left out",
                where=str(path),
                remedy="Give --num-experts N, or --config config.json of the model",
            )
        return largest + 1
    if largest >= known:
        raise SourceError(f"expert id {largest} of {known} experts", where=str(path), expected=f"0 to {known - 1}")
    return known


READER = Reader(
    name="counts-csv",
    title="CSV of counts per layer and expert (counts only; give --top-k)",
    example="layer_id,expert_id,count",
    sniff=_sniff,
    read=_read,
)
