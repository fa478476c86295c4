"""Reader of FLAME-MoE's Parquet traces: a folder per training iteration with a file per layer, beside the samples.

Row i of every file is token i of the samples. Nothing in the files says where one text ends and another begins, and one
sequence over all of them would be wrong, so borders are asked for: lengths in ``--requests``, or the end-of-text token
of ``--config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.files import allocate, file_size
from tracekit.sources.sidecar import entry_count
from tracekit.sources.tables import parquet_schema, polars_reading

_ITERATION = re.compile(r"iter_(\d{1,9})")
_LAYER = re.compile(r"layer_(\d{1,4})\.parquet")
_LENGTHS = ("n_tokens", "num_tokens", "rows")
_BLOCK_IDS = 1 << 25
_MOST_EXPERTS_PER_TOKEN = 1 << 10


@dataclass(frozen=True, slots=True)
class _Trace:
    """The files of one training iteration."""

    folder: Path
    layers: dict[int, Path]
    samples: list[Path]
    rows: int
    top_k: int
    scored: bool
    """Whether router scores lie beside the ids."""
    notes: tuple[str, ...] = ()

    def read(self, column: str, dtype: Any, start: int, count: int) -> NDArray[Any]:
        """Return a column of every layer, ``[count, layers, k]``, one layer in memory at a time."""
        out = allocate((count, len(self.layers), self.top_k), dtype)
        for entry, path in enumerate(self.layers.values()):
            out[:, entry] = _lists(path, column, self.top_k, start, count)
        return out


def _layer_files(folder: Path) -> dict[int, Path]:
    numbered = {int(found[1]): path for path in folder.glob("layer_*") if (found := _LAYER.fullmatch(path.name))}
    return dict(sorted(numbered.items()))


def _iterations(folder: Path) -> list[Path]:
    candidates = sorted((folder / "actives").glob("iter_*"))
    return [path for path in candidates if _ITERATION.fullmatch(path.name) and _layer_files(path)]


def _files(folder: Path) -> list[Path]:
    if layers := _layer_files(folder):
        return list(layers.values())
    layers_of = [path for iteration in _iterations(folder) for path in _layer_files(iteration).values()]
    return [*layers_of, *sorted((folder / "samples").glob("*.parquet"))] if layers_of else []


def _numbered(layers: dict[int, Path], options: IngestOptions) -> tuple[dict[int, Path], tuple[str, ...]]:
    """Return the files by the numbers that the config gives the layers: Megatron counts them from 1."""
    moe = None if options.config is None else options.config.moe_layers
    if moe is None or set(layers) <= set(moe) or not {number - 1 for number in layers} <= set(moe):
        return layers, ()
    note = "the files number layers from 1 and the config from 0: its numbers were taken"
    return {number - 1: path for number, path in layers.items()}, (note,)


def _open(folder: Path, options: IngestOptions) -> _Trace:
    iterations = [folder] if _layer_files(folder) else _iterations(folder)
    if len(iterations) != 1:
        names = ", ".join(path.name for path in iterations[:8]) or "none"
        raise SourceError(
            f"holds {len(iterations)} training iterations ({names})",
            where=str(folder),
            expected="one: each is a model of its own",
            remedy="Name the folder of one, such as actives/iter_0001, and ingest each as its own trace",
        )
    layers = _layer_files(iterations[0])
    rows, widths, scored = set(), set(), []
    for path in layers.values():
        schema = parquet_schema(path)
        if "indices" not in schema:
            raise SourceError(
                f"has the columns {', '.join(schema)[:200]}", where=str(path), expected="indices, and scores"
            )
        rows.add(_count(path))
        widths.add(_width(path))
        scored.append("scores" in schema)
    if len(rows) > 1 or len(widths) > 1 or len(set(scored)) > 1:
        raise SourceError(
            f"has layers of {sorted(rows)[:8]} rows and {sorted(widths)[:8]} experts each, {sum(scored)} with scores",
            where=str(iterations[0]),
            expected="the same tokens in every layer",
            remedy="Are all files downloaded completely?",
        )
    near = iterations[0].parent.parent / "samples"
    samples = sorted(near.glob("*.parquet")) if iterations[0].parent.name == "actives" else []
    known = sum(_count(path) for path in samples)
    if samples and known != max(rows):
        raise SourceError(
            f"has {known} tokens for {max(rows)} rows of routing", where=str(near), expected="a token for every row"
        )
    layers, notes = _numbered(layers, options)
    return _Trace(iterations[0], layers, samples, max(rows), widths.pop(), all(scored), notes)


def _count(path: Path) -> int:
    import polars as pl

    with polars_reading(str(path)):
        return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())


def _width(path: Path) -> int:
    import polars as pl

    with polars_reading(str(path)):
        first = pl.scan_parquet(path, glob=False).select("indices").head(1).collect()["indices"]
    if not isinstance(first.dtype, pl.List | pl.Array) or not len(first):
        found = f"indices of type {first.dtype}" if len(first) else "no rows"
        raise SourceError(f"has {found}", where=str(path), expected="a list of experts for each token")
    width = len(first.explode())
    if not 1 <= width <= _MOST_EXPERTS_PER_TOKEN:
        raise SourceError(f"has {width} experts in the first row", where=str(path), expected="k of them")
    return width


def _lists(path: Path, column: str, width: int, start: int, count: int) -> NDArray[Any]:
    """Return rows of a column of lists as ``[count, width]``."""
    import polars as pl

    with polars_reading(str(path)):
        values = pl.scan_parquet(path, glob=False).select(column).slice(start, count).collect()[column]
    lists = isinstance(values.dtype, pl.List | pl.Array)
    kinds = values.dtype.inner if lists else values.dtype  # type: ignore[attr-defined]
    wanted = kinds.is_integer() if column == "indices" else kinds.is_float()
    if not lists or not wanted or len(values) != count:
        raise SourceError(f"has {column} of type {values.dtype}", where=str(path), expected="lists of numbers")
    lengths = values.arr.len() if isinstance(values.dtype, pl.Array) else values.list.len()
    odd = (lengths != width).fill_null(True)
    flat = values.explode()
    if odd.any() or flat.null_count():
        row = int(odd.arg_max() or 0) if odd.any() else int(flat.is_null().arg_max() or 0) // width
        raise SourceError(
            f"has {column} {values[row].to_list() if values[row] is not None else 'missing'}",
            where=f"{path}, row {start + row}",
            expected=f"{width} numbers",
        )
    array = flat.to_numpy()
    if column == "indices" and len(array) and not 0 <= int(array.min()) <= int(array.max()) < 1 << 16:
        row = int(np.argmax((array < 0) | (array >= 1 << 16))) // width
        raise SourceError(
            f"has the experts {array.reshape(-1, width)[row].tolist()}",
            where=f"{path}, row {start + row}",
            expected="ids from 0 on",
        )
    return array.reshape(count, width)


def _tokens(samples: Sequence[Path], start: int, count: int) -> NDArray[np.int64]:
    """Return the token ids of some rows; the files follow each other."""
    import polars as pl

    with polars_reading(str(samples[0].parent)):
        frame = pl.scan_parquet(list(samples), glob=False).select("token_id").slice(start, count).collect()
        found = frame["token_id"].cast(pl.Int64).to_numpy()
    if len(found) != count or found.dtype != np.int64:
        raise SourceError("has empty token ids", where=str(samples[0].parent), expected="one for every row")
    return found


def _borders(trace: _Trace, options: IngestOptions) -> tuple[list[int] | None, tuple[int, ...], str]:
    """Return the lengths of the requests, or the tokens that end one, and a note about them."""
    if options.requests is not None:
        lengths = []
        for number, entry in enumerate(options.requests):
            length = entry_count(entry, _LENGTHS, str(entry.get("request_id", number)))
            if not length:
                raise SourceError(
                    "does not say how many tokens it has",
                    where=f"--requests, entry {number}",
                    expected=f"{_LENGTHS[0]} above 0 in every entry",
                )
            lengths.append(length)
        if sum(lengths) != trace.rows:
            raise SourceError(
                f"has {trace.rows} rows for requests of {sum(lengths)} tokens in all",
                where=str(trace.folder),
                expected=f"{_LENGTHS[0]} of all entries that add up to the rows",
            )
        return lengths, (), ""
    ends = () if options.config is None else options.config.eos_token_ids
    if ends and trace.samples:
        listed = ", ".join(map(str, ends))
        return None, ends, f"requests end with the token {listed}: the files do not say where a sequence was cut"
    raise SourceError(
        "does not say where one text ends and another begins",
        where=str(trace.folder),
        expected="borders between requests: without them windows would reach from one text into the next",
        remedy=f'Give --requests with {{"{_LENGTHS[0]}": …}} for each, or a --config with eos_token_id and the samples '
        "beside the actives",
    )


def _read(folder: Path, options: IngestOptions) -> Iterator[RawRequest]:
    if not folder.is_dir():
        raise SourceError("is a file", where=str(folder), expected="the folder that holds layer_NN.parquet")
    trace = _open(folder, options)
    lengths, ends, note = _borders(trace, options)
    size = sum(file_size(path) for path in [*trace.layers.values(), *trace.samples])
    pending = iter(lengths or ())
    left, number = next(pending, 0), 0
    held: list[tuple[NDArray[Any], ...]] = []
    step = max(1, _BLOCK_IDS // (len(trace.layers) * trace.top_k))
    for start in range(0, trace.rows, step):
        block = _block(trace, start, min(step, trace.rows - start))
        cuts = []
        if lengths is None:
            cuts = (np.flatnonzero(np.isin(block[-1], ends)) + 1).tolist()
        else:
            at = 0
            while left and at + left <= len(block[0]):
                at += left
                left = next(pending, 0)
                cuts.append(at)
            left -= len(block[0]) - at if left else 0
        begin = 0
        for cut in cuts:
            held.append(tuple(part[begin:cut] for part in block))
            yield _request(trace, held, number, note, size * (start + cut) // trace.rows)
            held, begin, number = [], cut, number + 1
        if begin < len(block[0]):
            held.append(tuple(part[begin:].copy() for part in block))
    if held:
        yield _request(trace, held, number, note, size)


def _block(trace: _Trace, start: int, count: int) -> tuple[NDArray[Any], ...]:
    """Return ids, then scores and tokens where there are some, of rows from ``start`` on."""
    parts: list[NDArray[Any]] = [trace.read("indices", np.uint16, start, count)]
    if trace.scored:
        parts.append(trace.read("scores", np.float32, start, count))
    if trace.samples:
        parts.append(_tokens(trace.samples, start, count))
    return tuple(parts)


def _request(trace: _Trace, pieces: list[tuple[NDArray[Any], ...]], number: int, note: str, done: int) -> RawRequest:
    parts = [part[0] if len(part) == 1 else np.concatenate(part) for part in zip(*pieces, strict=True)]
    found = _ITERATION.fullmatch(trace.folder.name)
    return RawRequest(
        where=f"{trace.folder}, request {number}",
        ids=parts[0],
        part=str(number),
        axes="tlk",
        weights=parts[1] if trace.scored else None,
        token_ids=parts[-1] if trace.samples else None,
        tokens_by_row=True,
        layer_ids=tuple(trace.layers),
        id_space="logical",
        router_order=None if trace.scored else True,  # sorted by score, which the scores prove
        extra={"iteration": int(found[1])} if found else {},
        notes=(*trace.notes, note) if note else trace.notes,
        consumed=done,
    )


READER = Reader(
    name="flame",
    title="FLAME-MoE Parquet: a folder (needs --requests with n_tokens, or a --config with eos_token_id)",
    example="actives/iter_0100/layer_02.parquet {indices: int16[6], scores: float16[6]}, samples/*.parquet {token_id}",
    sniff=lambda path, head: False,
    read=_read,
    folder=_files,
)
