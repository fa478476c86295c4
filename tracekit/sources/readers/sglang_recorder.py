"""Reader of SGLang's expert distribution recorder: the ``.pt`` files of its per_token, per_pass and stat modes.

Each rank writes its own file. A folder of several ranks is one source: what they hold of the same tokens counts once
(`tracekit.sources.ranks`); a file by itself is read as it is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import VerifySteps, id_dtype
from tracekit.sources.base import IngestOptions, RawCounts, RawRequest, Reader
from tracekit.sources.bundle import Item, as_item, refuse_shared
from tracekit.sources.checks import CHUNK_IDS
from tracekit.sources.files import allocate, file_size, reading
from tracekit.sources.passes import UNKNOWN, Kind, Pass, Step, Stitched, stitch
from tracekit.sources.ranks import EMPTY, RankDump, merged
from tracekit.sources.torchfile import is_torch, load_torch, mentions

_RECORDS, _MAP, _STAT, _PER_TOKEN, _PER_PASS = (
    "records",
    "last_physical_to_logical_map",
    "logical_count",
    "topk_ids_of_layer",
    "global_physical_count",
)
_DECODE, _MIXED, _VERIFY = 2, 3, 5
"""SGLang's ``ForwardMode``; other modes are told by their lengths."""
_ENGINE = "sglang"
_MOST_EXPERTS = 1 << 16
_NAME = re.compile(r"expert_distribution_recorder_([\d.]{1,32})_(\d{1,6})\.pt")


def _sniff(path: Path, head: bytes) -> bool:
    return is_torch(path, head) and (mentions(path, _RECORDS, _MAP) or mentions(path, _STAT))


def _ranks(folder: Path) -> list[Path]:
    """Return the files of a folder that holds those of several ranks, in the order of ranks and times."""
    with reading(str(folder)):
        named = [(int(found[2]), found[1], path) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted(named)] if len({rank for rank, _, _ in named}) > 1 else []


@dataclass(frozen=True, slots=True)
class _Dump:
    """What is in a file of records."""

    path: Path
    records: list[dict[Any, Any]]
    items: list[Item]
    location: _Location
    per_token: bool

    def tokens(self) -> bytes:
        """Return a digest of the tokens that the passes had, and of their positions."""
        digest = hashlib.blake2b()
        for i, (record, item) in enumerate(zip(self.records, self.items, strict=True)):
            digest.update(str(record.get("forward_mode")).encode())
            for key in ("input_ids", "positions"):
                digest.update(_column(record, key, item.shape[1], f"{self.path}, record {i}").tobytes())
        return digest.digest()


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest | RawCounts]:
    if not path.is_dir():
        yield from _requests([_open(path)])
        return
    groups: dict[tuple[bytes, int], list[Path]] = {}
    seen: Counter[tuple[bytes, str]] = Counter()
    for file in _ranks(path):
        dump = _open(file)
        alike = dump.tokens() if isinstance(dump, _Dump) and dump.per_token else file.name.encode()
        # A rank that recorded the same twice did run it twice.
        rank = alike, file.stem.rpartition("_")[2]
        groups.setdefault((alike, seen[rank]), []).append(file)
        seen[rank] += 1
    before = 0
    for files in groups.values():
        for raw in _requests([_open(file) for file in files]):
            if len(groups) > 1:
                raw.part = "/".join(part for part in (files[0].stem, raw.part) if part is not None)
            raw.consumed += before
            yield raw
        before += sum(map(file_size, files))


def _requests(dumps: Sequence[_Dump | RawCounts]) -> Iterator[RawRequest | RawCounts]:
    """Yield what is in a file, or in those of several ranks that had the same tokens."""
    dump = dumps[0]
    if isinstance(dump, RawCounts):
        yield dump
        return
    if not dump.per_token:
        yield _per_pass(dump.path, dump.items, dump.location)
        return
    ranks = [RankDump(d.path, d.items, d.location.table) for d in dumps if isinstance(d, _Dump)]
    for i, item in enumerate(dump.items):
        dump.location.check(item.shape, f"{dump.path}, record {i}")
    items, copies = merged(ranks) if len(ranks) > 1 else (dump.items, [])
    for raw in _per_token(dump.path, dump.records, items, dump.location):
        if copies:
            raw.notes += (f"ranks with the same tokens as another one count once: {_names(copies)} left out",)
        if stages := [rank.path for rank in ranks[1:] if rank.path not in copies]:
            raw.notes += (f"layers of the same tokens were put together from several ranks: {_names(stages)}",)
        yield raw


def _names(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(path.name for path in paths[:5]) + more


def _open(path: Path) -> _Dump | RawCounts:
    content = load_torch(path)
    where = str(path)
    if not isinstance(content, dict):
        raise SourceError(
            f"holds a {type(content).__name__}", where=where, expected="what SGLang's recorder dumps: a dict"
        )
    if _STAT in content:
        return _stat(path, _numbers(content, _STAT, where, (2, 3)))
    records = content.get(_RECORDS)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise SourceError("has no list of records", where=where, expected=f"{_RECORDS} and {_MAP}, or {_STAT}")
    if not records:
        raise SourceError(
            "has no records: nothing was recorded between start and dump",
            where=where,
            remedy="Call /start_expert_distribution_record before the requests",
        )
    location = _Location(_numbers(content, _MAP, where, (2,)).load(), where)
    key = _PER_TOKEN if _PER_TOKEN in records[0] else _PER_PASS
    items = [
        _numbers(record, key, f"{where}, record {i}", (3,) if key == _PER_TOKEN else (2,))
        for i, record in enumerate(records)
    ]
    refuse_shared(items, path)
    return _Dump(path, records, items, location, key == _PER_TOKEN)


def _numbers(source: dict[Any, Any], key: str, where: str, axes: tuple[int, ...]) -> Item:
    item = as_item(source.get(key), where)
    if item is None or item.dtype.kind not in "ui" or len(item.shape) not in axes:
        shape = "nothing" if item is None else f"{item.dtype} of shape {item.shape}"
        raise SourceError(f"has {shape} as {key}", where=where, expected=f"whole numbers of {axes[-1]} axes")
    return item


class _Location:
    """Which logical expert each physical one is: ``[layers, physical experts]``."""

    def __init__(self, table: NDArray[Any], where: str) -> None:
        self.table = np.ascontiguousarray(table)
        self.layers, self.physical = self.table.shape
        if not self.table.size or self.table.min() < 0 or self.table.max() >= _MOST_EXPERTS:
            raise SourceError(
                f"its {_MAP} of shape {table.shape} holds impossible experts",
                where=where,
                expected="logical expert ids",
            )
        self.num_experts = int(self.table.max()) + 1
        """N: a logical expert without a replica could not be served."""
        self.identity = bool((self.table == np.arange(self.physical)).all())
        lacking = [i for i, row in enumerate(self.table) if len(np.unique(row)) != self.num_experts]
        if lacking:
            raise SourceError(
                f"its {_MAP} leaves out experts in layer {lacking[0]}",
                where=where,
                expected=f"each of {self.num_experts} logical experts in every layer",
            )

    def check(self, shape: tuple[int, ...], where: str) -> None:
        if shape[0] != self.layers:
            raise SourceError(
                f"has {shape[0]} layers, its {_MAP} {self.layers}", where=where, expected="the same layers in both"
            )

    @property
    def extra(self) -> dict[str, Any]:
        """Provenance of the ids."""
        return {"recorded_id_space": "physical", "physical_experts": self.physical}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about them."""
        if self.identity:
            return ()
        note = (
            f"physical ids were mapped to {self.num_experts} logical experts by the last map of the recording: "
            "a rebalance while it ran would make earlier rows wrong"
        )
        return (note,)


def _stat(path: Path, item: Item) -> RawCounts:
    if 0 in item.shape:
        raise SourceError(f"has {_STAT} of shape {item.shape}: nothing was counted", where=str(path))
    counts = item.load()
    steps = counts.shape[0] if counts.ndim == 3 else 1
    total = counts.reshape(-1, *counts.shape[-2:]).sum(axis=0, dtype=np.int64)
    return RawCounts(
        where=str(path),
        counts=total,
        engine=_ENGINE,
        id_space="logical",
        extra={"recorder_mode": "stat", "buffered_steps": int(steps)},
        consumed=file_size(path),
    )


def _per_pass(path: Path, items: Sequence[Item], location: _Location) -> RawCounts:
    total = np.zeros((location.layers, location.num_experts), np.int64)
    for i, item in enumerate(items):
        if item.shape != location.table.shape:
            raise SourceError(
                f"{_PER_PASS} has shape {item.shape}, {_MAP} {location.table.shape}",
                where=f"{path}, record {i}",
                expected="[layers, physical experts] in both",
            )
        np.add.at(total, (np.arange(location.layers)[:, None], location.table), item.load().astype(np.int64))
    return RawCounts(
        where=str(path),
        counts=total,
        engine=_ENGINE,
        id_space="logical",
        extra={"recorder_mode": "per_pass", "passes": len(items), **location.extra},
        notes=location.notes,
        consumed=file_size(path),
    )


@dataclass(slots=True)
class _Rows:
    """The rows of all passes that routed anything."""

    ids: NDArray[np.unsignedinteger[Any]]
    """``[rows, MoE layers, k]``, logical."""
    complete: NDArray[np.bool_]
    """``[rows]`` whether every MoE layer has all its experts."""
    tokens: NDArray[np.int64]
    passes: list[Pass]
    layers: tuple[int, ...]


def _per_token(
    path: Path, records: Sequence[dict[Any, Any]], items: Sequence[Item], location: _Location
) -> Iterator[RawRequest | RawCounts]:
    rows, reason = _rows(path, records, items, location)
    result = None if reason else stitch(rows.passes)
    reason = reason or (result.reason if result is not None else None)
    total = int(rows.complete.sum())
    if not total:
        raise SourceError("has no row with routing in every MoE layer", where=str(path))
    placed = [] if result is None else [_placed(sequence, rows) for sequence in result.sequences]
    count = sum(len(numbers) for numbers, _ in placed)
    # Rows of steps that are kept in no place are rejected drafts, or those of which nobody knows.
    count += sum(len(s.depth) for sequence in (result.sequences if result else ()) for s in sequence.steps)
    count -= sum(row != UNKNOWN for q in (result.sequences if result else ()) for s in q.steps for row in s.kept())
    if reason is None and 2 * count < total:
        reason = "requests at equal positions cannot be told from each other"
    if reason is not None or result is None:
        yield _counts_of(path, rows, location, f"its rows cannot be put back into sequences ({reason})")
        return
    notes = list(location.notes)
    if result.cut:
        notes.append(
            f"{result.cut} requests were cut where requests at the same position ended or began together: which row is "
            "whose is not recorded"
        )
    if any(UNKNOWN in sequence.rows for sequence in result.sequences):
        notes.append(
            "drafts form trees: which of several rows at the same depth was accepted is not recorded, so those "
            "positions are missing from the routing; the verification steps are complete"
        )
    if any(sequence.prompt_len is None for sequence in result.sequences):
        notes.append(
            "requests that were running when the recording began have no phase: --phase decode says that theirs are "
            "decode rows"
        )
    if total < len(rows.complete):
        notes.append(f"{len(rows.complete) - total} rows without routing in every MoE layer were left out")
    size = file_size(path)
    for number, (sequence, (numbers, positions)) in enumerate(zip(result.sequences, placed, strict=True)):
        if not len(numbers):
            continue
        gaps = bool(len(positions) and (np.diff(positions) != 1).any())
        yield RawRequest(
            where=f"{path}, sequence {number}",
            ids=rows.ids[numbers],
            part=str(number),
            axes="tlk",
            prompt_len=sequence.prompt_len,
            first_pos=int(positions[0]),
            positions=positions if gaps else None,
            token_ids=None if gaps else rows.tokens[numbers],
            tokens_by_row=True,
            steps=_steps(sequence, rows),
            layer_ids=rows.layers,
            num_experts=location.num_experts,
            engine=_ENGINE,
            id_space="logical",
            extra={"recorder_mode": "per_token", **location.extra},
            notes=tuple(notes),
            consumed=size * (number + 1) // len(result.sequences),
        )


def _placed(sequence: Stitched, rows: _Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers and the positions of a sequence's complete rows."""
    numbers = np.asarray(sequence.rows, np.int64)
    complete = (numbers != UNKNOWN) & rows.complete[numbers]
    positions = sequence.first_pos + np.arange(len(numbers))
    return numbers[complete], positions[complete]


def _steps(sequence: Stitched, rows: _Rows) -> VerifySteps | None:
    whole = [step for step in sequence.steps if rows.complete[step.row : step.row + len(step.depth)].all()]
    if not whole:
        return None
    numbers = np.concatenate([np.arange(step.row, step.row + len(step.depth)) for step in whole])
    return VerifySteps(
        start_pos=np.array([step.start for step in whole]),
        n_rows=np.array([len(step.depth) for step in whole]),
        n_accepted=np.array([step.accepted for step in whole]),
        ids=rows.ids[numbers],
        depth=np.concatenate([step.depth for step in whole]) if any(map(_is_tree, whole)) else None,
    )


def _is_tree(step: Step) -> bool:
    return bool((np.diff(step.depth) != 1).any())


def _counts_of(path: Path, rows: _Rows, location: _Location, reason: str) -> RawCounts:
    counts = np.zeros((location.layers, location.num_experts), np.int64)
    for entry, layer in enumerate(rows.layers):
        counts[layer] = np.bincount(rows.ids[rows.complete, entry].reshape(-1), minlength=location.num_experts)
    return RawCounts(
        where=str(path),
        counts=counts,
        top_k=rows.ids.shape[2],
        engine=_ENGINE,
        id_space="logical",
        extra={"recorder_mode": "per_token", **location.extra},
        notes=(*location.notes, f"{reason}: they were kept as counts, without any order"),
        consumed=file_size(path),
    )


def _rows(
    path: Path, records: Sequence[dict[Any, Any]], items: Sequence[Item], location: _Location
) -> tuple[_Rows, str | None]:
    """Return the rows of all passes; and why they have no order, where that shows already."""
    if len({item.shape[2] for item in items}) > 1:
        raise SourceError(
            f"has records of {' and '.join(str(k) for k in sorted({item.shape[2] for item in items})[:8])} columns",
            where=str(path),
            expected="the same k in all records",
        )
    used = [_used(item, location, f"{path}, record {i}") for i, item in enumerate(items)]
    layers = np.flatnonzero(np.any([layers for layers, _ in used], axis=0))
    columns = np.flatnonzero(np.any([columns for _, columns in used], axis=0))
    if not layers.size:
        raise SourceError(
            "every id is -1: no layer's routing was captured",
            where=str(path),
            remedy="Models need SGLang's expert location hooks for this recorder; see its list of supported models",
        )
    top_k = int(columns[-1]) + 1
    # Passes of a draft model, and idle ones, route nothing.
    routed = [i for i, (some, _) in enumerate(used) if some.any()]
    total = sum(items[i].shape[1] for i in routed)
    ids = allocate((total, layers.size, top_k), id_dtype(location.num_experts))
    complete, tokens = np.zeros(total, bool), np.zeros(total, np.int64)
    passes: list[Pass] = []
    reason: str | None = None
    first = 0
    for i in routed:
        where, count = f"{path}, record {i}", items[i].shape[1]
        span = slice(first, first + count)
        _fill(items[i], layers, top_k, location, ids[span], complete[span])
        tokens[span] = _column(records[i], "input_ids", count, where)
        one, why = _pass(records[i], first, count, where)
        reason = reason or why
        if one is not None:
            passes.append(one)
        first += count
    return _Rows(ids, complete, tokens, passes, tuple(int(layer) for layer in layers)), reason


def _used(item: Item, location: _Location, where: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which layers, and which columns, hold anything but -1."""
    table = item.load()
    if table.dtype.kind == "u":
        raise SourceError(f"{_PER_TOKEN} is {table.dtype}", where=where, expected="signed integers, -1 for nothing")
    if table.size and (table.min() < EMPTY or table.max() >= location.physical):
        worst = int(table.min()) if table.min() < EMPTY else int(table.max())
        raise SourceError(
            f"physical expert {worst} of {location.physical}",
            where=where,
            expected=f"0 to {location.physical - 1}, or -1",
            remedy="A fused shared expert does this: record with --disable-shared-experts-fusion",
        )
    layers, columns = np.zeros(table.shape[0], bool), np.zeros(table.shape[2], bool)
    step = max(1, CHUNK_IDS // max(1, math.prod(table.shape[::2])))
    for start in range(0, table.shape[1], step):
        filled = table[:, start : start + step] != EMPTY
        layers |= filled.any(axis=(1, 2))
        columns |= filled.any(axis=(0, 1))
    return layers, columns


def _fill(
    item: Item,
    layers: NDArray[np.int64],
    top_k: int,
    location: _Location,
    ids: NDArray[Any],
    complete: NDArray[np.bool_],
) -> None:
    """Write the logical ids of one pass, and which of its rows are complete."""
    table, missing = item.load(), np.zeros(len(complete), bool)
    for entry, layer in enumerate(layers):
        physical = table[layer, :, :top_k]
        absent = physical == EMPTY
        missing |= absent.any(axis=1)
        ids[:, entry] = location.table[layer][np.where(absent, 0, physical)]
    complete[:] = ~missing


def _column(record: dict[Any, Any], key: str, count: int, where: str) -> NDArray[np.int64]:
    item = as_item(record.get(key), where)
    if item is None or item.dtype.kind not in "ui" or item.shape != (count,):
        raise SourceError(
            f"has {key} of shape {None if item is None else item.shape} for {count} rows",
            where=where,
            expected="a whole number for each row",
        )
    return item.load().astype(np.int64)


def _pass(record: dict[Any, Any], first: int, count: int, where: str) -> tuple[Pass | None, str | None]:
    positions = _column(record, "positions", count, where)
    if positions.min() < 0 or positions.max() >= 1 << 32:
        raise SourceError("has negative or absurd positions", where=where, expected="positions in a sequence")
    mode, lens = record.get("forward_mode"), as_item(record.get("extend_seq_lens"), where)
    if mode == _VERIFY:
        return Pass("verify", first, positions), None
    if mode == _DECODE:
        return Pass("decode", first, positions), None
    if lens is None:
        return None, f"forward_mode {str(mode)[:16]} without extend_seq_lens"
    if lens.dtype.kind not in "ui" or len(lens.shape) != 1 or lens.shape[0] > count:
        raise SourceError(
            f"has extend_seq_lens {lens.dtype} of shape {lens.shape} for {count} rows",
            where=where,
            expected="a whole number for each request",
        )
    kind: Kind = "mixed" if mode == _MIXED else "extend"
    return Pass(kind, first, positions, tuple(int(n) for n in lens.load())), None


READER = Reader(
    name="sglang-recorder",
    title="SGLang's expert distribution recorder (.pt): per_token as routing; per_pass and stat as counts",
    example="sglang … --expert-distribution-recorder-mode per_token: expert_distribution_recorder_TIME_RANK.pt",
    sniff=_sniff,
    read=_read,
    folder=_ranks,
)
