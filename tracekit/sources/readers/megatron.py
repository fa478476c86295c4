"""Reader of Megatron-LM's ``router_trace_rank{r}.jsonl`` (``--moe-routing-trace-path``), one file or a folder of ranks.

A line is one layer of one step on one rank: ``{"step", "block", "layer", "rank", "num_tokens", "topk",
"top_indices"}``. It has neither requests nor positions, and the tokens of a step are a packed batch: micro-batches of a
training step, whose samples alternate, or all requests that an engine step served. So

* where the steps themselves show that one request runs at a time (each step of several tokens is followed by steps of
  one token), every such run becomes a request: the prompt, then its output;
* all else becomes counts per expert, one record a step, which feed ``load`` and nothing that needs an order.

Ranks: files that are equal but for the rank number (tensor parallelism) count once. Ranks with the same layers saw
different tokens; ranks with other layers are pipeline stages of the same tokens; a mix is refused. ``layer`` is the
layer's number from 0 where hooks wrote it, else the ordinal of the MoE layer, or counts from 1: with a config the
numbers are put right, without one they are kept. Blocks other than ``decoder`` (``mtp``) are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, IngestOptions, RawCounts, RawRequest, Reader
from tracekit.sources.files import file_size, reading
from tracekit.sources.jsonio import first_object

_NAME = re.compile(r"router_trace_rank(\d{1,6})\.jsonl")
_RANK = re.compile(rb'"rank":\s*-?\d+')
_HEAD = {key: re.compile(rb'"%b":\s*(\d{1,12})\b' % key.encode()) for key in ("step", "layer", "num_tokens")}
_BLOCK = re.compile(rb'"block":\s*"(\w{1,32})"')
_LONGEST = 1 << 30
_DECODER = "decoder"
_PACKED = (
    "steps are packed batches without request ids or positions: kept as counts per expert, "
    "windows and lags cannot be asked of them"
)
_DROPPED = "steps whose layers have different numbers of tokens (dropped or cut off) were left out"
_ONE_BY_ONE = "steps of several tokens were taken for prompts, the steps of one token after them for their output"


def _sniff(path: Path, head: bytes) -> bool:
    first = first_object(path, head)
    return first is not None and "top_indices" in first and "layer" in first


def _ranks(folder: Path) -> list[Path]:
    with reading(str(folder)):
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


@dataclass(slots=True)
class _Rank:
    """What a first look at a file shows."""

    path: Path
    layers: tuple[int, ...] = ()
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Number and tokens of each step."""
    repeats: bool = False
    """Whether a layer comes more than once in a step: micro-batches."""
    left_out: set[str] = field(default_factory=set)
    """Blocks other than the decoder."""
    digest: bytes = b""


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest | RawCounts]:
    paths = _ranks(path) if path.is_dir() else [path]
    every = [_look(file) for file in paths if file_size(file)]
    ranks = list({rank.digest: rank for rank in reversed(every)}.values())[::-1]
    ranks = [rank for rank in ranks if rank.steps]
    if not ranks:
        raise SourceError(
            "has no record of the decoder's layers", where=str(path), expected="one line a layer and step"
        )
    notes = _notes(every, ranks)
    stages = _check_stages(ranks)
    numbers, more = _numbers(sorted({layer for rank in ranks for layer in rank.layers}), options, str(path))
    total = sum(file_size(rank.path) for rank in ranks)
    if len(stages) == 1 and all(
        not rank.repeats and one_by_one([tokens for _, tokens in rank.steps]) for rank in ranks
    ):
        yield from _sequences(ranks, numbers, (*notes, *more, _ONE_BY_ONE))
    else:
        yield from _counts(ranks, numbers, options, (*notes, *more, _PACKED), str(path), total)


def _lines(path: Path) -> Iterator[tuple[str, bytes, int]]:
    with reading(str(path)), path.open("rb") as file:
        yield from _numbered(file, str(path))


def _numbered(file: IO[bytes], name: str) -> Iterator[tuple[str, bytes, int]]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
        if line.strip():
            yield f"{name}:{number}", line, file.tell()


def _look(path: Path) -> _Rank:
    """Look through a file without parsing its indices."""
    rank, digest = _Rank(path), hashlib.blake2b()
    layers: set[int] = set()
    of_step: set[int] = set()
    for where, line, _ in _lines(path):
        head = line[: line.find(b'"top_indices"')]
        found = {key: pattern.search(head) for key, pattern in _HEAD.items()}
        block = _BLOCK.search(head)
        if all(found.values()):
            step, layer, tokens = (int(match[1]) for match in found.values() if match is not None)
            name = block[1].decode() if block is not None else _DECODER
        else:
            record = _record(line, where)
            step, layer, tokens = record.step, record.layer, len(record.ids)
            name = record.block
        # Replicas differ in their rank alone.
        digest.update(_RANK.sub(b"", head, count=1) + line[len(head) :])
        if name != _DECODER:
            rank.left_out.add(name)
            continue
        if not rank.steps or step != rank.steps[-1][0]:
            if rank.steps and step < rank.steps[-1][0]:
                raise SourceError(
                    f"has step {step} after step {rank.steps[-1][0]}",
                    where=where,
                    expected="steps in order",
                    remedy="Two runs in one file: cut it in two",
                )
            rank.steps.append((step, tokens))
            of_step = set()
        rank.repeats = rank.repeats or layer in of_step
        of_step.add(layer)
        layers.add(layer)
    rank.layers, rank.digest = tuple(sorted(layers)), digest.digest()
    return rank


@dataclass(slots=True)
class _Record:
    step: int
    layer: int
    block: str
    ids: AnyArray


def _record(line: bytes, where: str) -> _Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"is not JSON ({error})",
            where=where,
            expected="one record a line",
            remedy="A trace cut off while it was written ends like this: cut its last line",
        ) from error
    if not isinstance(record, dict) or "top_indices" not in record:
        raise SourceError("is no record of a router", where=where, expected="step, layer and top_indices")
    numbers = []
    for key, limit in (("step", 1 << 40), ("layer", 1 << 16)):
        value = record.get(key)
        if type(value) is not int or not 0 <= value < limit:
            raise SourceError(f"{key} is {str(value)[:40]}", where=where, expected=f"0 to {limit - 1}")
        numbers.append(value)
    try:
        ids = np.asarray(record["top_indices"])
    except (ValueError, OverflowError) as error:
        raise SourceError(f"top_indices is no array ({error})", where=where, expected="[tokens][k]") from error
    if not ids.size:
        ids = np.empty((0, 0), np.int64)
    if ids.ndim != 2 or ids.dtype.kind not in "ui":
        raise SourceError(
            f"top_indices is {ids.dtype} of shape {ids.shape}", where=where, expected="whole numbers [tokens][k]"
        )
    for key, size in (("num_tokens", len(ids)), ("topk", ids.shape[1])):
        said = record.get(key)
        if said is not None and said != size and ids.size:
            raise SourceError(f"{key} is {str(said)[:40]} but top_indices has {size}", where=where)
    block = record.get("block", _DECODER)
    return _Record(numbers[0], numbers[1], block if isinstance(block, str) else _DECODER, ids)


def _notes(every: list[_Rank], ranks: list[_Rank]) -> tuple[str, ...]:
    notes = []
    names = sorted({name for rank in every for name in rank.left_out})
    if names:
        notes.append(f"blocks other than the decoder were left out: {', '.join(names)}")
    kept = {rank.path for rank in ranks}
    copies = [rank.path.name for rank in every if rank.path not in kept and rank.steps]
    if copies:
        more = f" and {len(copies) - 5} more" if len(copies) > 5 else ""
        notes.append(f"ranks with the same routing as another one count once: {', '.join(copies[:5])}{more} left out")
    return tuple(notes)


def _check_stages(ranks: list[_Rank]) -> set[tuple[int, ...]]:
    """Return the different sets of layers, after checking that each is a pipeline stage of its own."""
    stages = {rank.layers: rank for rank in ranks}
    for a, b in ((a, b) for a in stages for b in stages if a < b):
        if set(a) & set(b):
            raise SourceError(
                f"{stages[a].path.name} has {len(a)} layers, {stages[b].path.name} {len(b)}, some of them the same",
                where=str(ranks[0].path.parent),
                expected="the same layers in every rank, or none in common",
                remedy="Numbers that are local to a pipeline stage look like this: read one stage's files as a trace",
            )
    return set(stages)


def _numbers(layers: list[int], options: IngestOptions, where: str) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return each layer's number in the model."""
    config = options.config
    moe = None if config is None else config.moe_layers
    if moe is None or layers == list(moe):
        return {layer: layer for layer in layers}, ()
    if layers == list(range(len(moe))):
        return dict(zip(layers, moe, strict=True)), ("layer counted the MoE layers: their numbers are the config's",)
    if layers == [layer + 1 for layer in moe]:
        return dict(zip(layers, moe, strict=True)), ("layers were numbered from 1: they are numbered from 0",)
    raise SourceError(
        f"has the layers {layers[:16]}, which are not the config's MoE layers",
        where=where,
        expected=f"{list(moe[:16])}, their ordinals, or the same counted from 1",
        remedy="Numbers local to a pipeline stage, and layers under CUDA graphs, unseen by hooks, look like this",
    )


def one_by_one(sizes: list[int]) -> bool:
    """Whether steps of these sizes are one request at a time: no two of several tokens follow each other."""
    return 1 in sizes and all(min(a, b) <= 1 for a, b in pairwise(sizes))


def _steps(rank: _Rank) -> Iterator[tuple[int, list[_Record], str, int]]:
    """Yield the decoder's records step by step."""
    step: list[_Record] = []
    at, done = "", 0
    for where, line, now in _lines(rank.path):
        record = _record(line, where)
        if record.block != _DECODER:
            continue
        if step and record.step != step[0].step:
            yield step[0].step, step, at, done
            step = []
        if not step:
            at = where
        step.append(record)
        done = now
    if step:
        yield step[0].step, step, at, done


def _sequences(ranks: list[_Rank], numbers: dict[int, int], notes: tuple[str, ...]) -> Iterator[RawRequest]:
    before = 0
    for rank in ranks:
        match = _NAME.fullmatch(rank.path.name)
        prefix = f"rank{match[1]}/" if match is not None and len(ranks) > 1 else ""
        cubes: list[AnyArray] = []
        part, at, done = 0, "", 0
        for _, records, where, now in _steps(rank):
            cube = _cube(records, rank.layers, where)
            if cubes and len(cube) > 1:
                yield _request(cubes, rank, numbers, f"{prefix}{part}", at, before + done, notes)
                part, cubes = part + 1, []
            if not cubes:
                at = where
            cubes.append(cube)
            done = now
        if cubes:
            yield _request(cubes, rank, numbers, f"{prefix}{part}", at, before + done, notes)
        before += file_size(rank.path)


def _cube(records: list[_Record], layers: tuple[int, ...], where: str) -> AnyArray:
    """``[tokens, layers, k]`` of one step."""
    by_layer = {record.layer: record.ids for record in records}
    missing = [layer for layer in layers if layer not in by_layer]
    shapes = {ids.shape for ids in by_layer.values()}
    if missing or len(shapes) > 1:
        found = f"has no layer {missing[0]}" if missing else f"has layers of shapes {sorted(shapes)[:4]}"
        raise SourceError(
            f"step {records[0].step} {found}",
            where=where,
            expected="every layer of a step with the same tokens",
            remedy="Megatron drops records whose count is wrong; a trace cut off while it was written ends like this",
        )
    return np.stack([by_layer[layer] for layer in layers], axis=1)


def _request(
    cubes: list[AnyArray], rank: _Rank, numbers: dict[int, int], part: str, at: str, done: int, notes: tuple[str, ...]
) -> RawRequest:
    if len({cube.shape[2] for cube in cubes}) > 1:
        raise SourceError("k differs between its steps", where=at, expected="the same k everywhere")
    prompt = len(cubes[0]) if len(cubes[0]) > 1 else None
    return RawRequest(
        where=at,
        ids=np.concatenate(cubes),
        part=part,
        axes="tlk",
        prompt_len=prompt,
        layer_ids=tuple(numbers[layer] for layer in rank.layers),
        engine="megatron",
        id_space="logical",
        notes=notes,
        consumed=done,
    )


def _counts(
    ranks: list[_Rank],
    numbers: dict[int, int],
    options: IngestOptions,
    notes: tuple[str, ...],
    where: str,
    total: int,
) -> Iterator[RawCounts]:
    """Add up the ranks step by step."""
    experts = known_experts(options, where)
    layers = sorted(numbers)
    place = {layer: entry for entry, layer in enumerate(layers)}
    streams = [_steps(rank) for rank in ranks]
    heads = [next(stream, None) for stream in streams]
    done = [0] * len(ranks)
    yielded = False
    while any(head is not None for head in heads):
        step = min(head[0] for head in heads if head is not None)
        counts = np.zeros((len(layers), experts), np.int64)
        widths: set[int] = set()
        at = ""
        for i, head in enumerate(heads):
            if head is None or head[0] != step:
                continue
            _, records, at, done[i] = head
            for record in records:
                if record.layer not in place:
                    raise SourceError(f"names layer {record.layer} and another", where=at, expected="one layer a line")
                if record.ids.size:
                    counts[place[record.layer]] += count_experts(record.ids, experts, at)
                    widths.add(record.ids.shape[1])
            heads[i] = next(streams[i], None)
        if len(widths) > 1:
            raise SourceError(f"step {step} has k {sorted(widths)}", where=at, expected="the same k everywhere")
        tokens = counts.sum(axis=1)
        if not tokens.any() or (tokens != tokens[0]).any():
            notes = (*notes, _DROPPED) if _DROPPED not in notes else notes
            continue
        yielded = True
        yield RawCounts(
            where=at,
            counts=counts,
            layer_ids=tuple(numbers[layer] for layer in layers),
            part=str(step),
            top_k=widths.pop(),
            engine="megatron",
            id_space="logical",
            notes=notes,
            consumed=sum(done),
        )
    if not yielded:
        raise SourceError(
            "has no step in which every layer has the same tokens",
            where=where,
            expected="complete steps",
            remedy="Megatron drops records whose count is wrong, and hooks do not see layers under CUDA graphs",
        )


def known_experts(options: IngestOptions, where: str) -> int:
    """Return N from the options or the config: counts per expert need it.

    Raises
    ------
    SourceError
        If neither says it.
    """
    experts = options.num_experts or (None if options.config is None else options.config.num_experts)
    if experts is None:
        raise SourceError(
            "does not say how many experts a layer has",
            where=where,
            remedy="Give --num-experts N, or --config config.json of the model",
        )
    if not 1 <= experts <= 1 << 16:
        raise SourceError(f"{experts} experts per layer", where=where, expected=f"1 to {1 << 16}")
    return experts


def count_experts(ids: AnyArray, experts: int, where: str) -> NDArray[np.int64]:
    """Return how often each expert is in ``[tokens, k]``.

    Raises
    ------
    SourceError
        If an id is negative or not below N, or an expert is in a row twice.
    """
    if int(ids.min()) < 0 or int(ids.max()) >= experts:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise SourceError(
            f"expert id {wrong} of {experts} experts",
            where=where,
            expected=f"0 to {experts - 1}",
            remedy="Give the right --num-experts; -1 marks padding",
        )
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise SourceError("an expert is twice in one row", where=where, expected="k different experts")
    return np.bincount(ids.reshape(-1), minlength=experts).astype(np.int64)


READER = Reader(
    name="megatron",
    title="Megatron-LM router traces, JSON lines, one file a rank (needs --num-experts)",
    example='{"step": 0, "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 99, "topk": 8, "top_indices": [[…]]}',
    sniff=_sniff,
    read=_read,
    folder=_ranks,
)
