"""Reader of TensorRT-LLM's expert statistics: a folder of counts per iteration and layer, one file a rank."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawCounts, Reader
from tracekit.sources.files import fault, file_size, reading
from tracekit.sources.safetensors import read_safetensors
from tracekit.sources.tensors import Tensor

_META = "meta_info.json"
_LONGEST_META = 1 << 20
_RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,4})")

Tables = dict[tuple[int, int], Tensor]
"""Counts of one rank by (iteration, layer)."""


def _ranks(folder: Path) -> list[Path]:
    numbered = [(int(found[1]), path) for path in folder.glob("rank*") if (found := _RANK.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _files(folder: Path) -> list[Path]:
    ranks = _ranks(folder)
    return [folder / _META, *ranks] if ranks and (folder / _META).is_file() else []


def _read(folder: Path, options: IngestOptions) -> Iterator[RawCounts]:
    if not folder.is_dir():
        raise SourceError("is a file", where=str(folder), expected=f"the folder that holds {_META}")
    slots, top_k = _meta(folder / _META)
    paths = _ranks(folder)
    ranks = [_tables(path, slots) for path in paths]
    size, order = sum(map(file_size, paths)), sorted({iteration for rank in ranks for iteration, _ in rank})
    if not order:
        raise SourceError("holds no counts", where=str(folder), expected="a run that reached the end of its range")
    layers_at: dict[int, set[int]] = {iteration: set() for iteration in order}
    for rank in ranks:
        for at, layer in rank:
            layers_at[at].add(layer)
    for done, iteration in enumerate(order, start=1):
        layers = sorted(layers_at[iteration])
        held = [_stack(rank, iteration, layers, slots) for rank in ranks]
        shared = len(held) > 1 and all((other == held[0]).all() for other in held[1:])
        yield RawCounts(
            where=f"{folder}, iteration {iteration}",
            counts=held[0] if shared else np.sum(held, axis=0),
            layer_ids=tuple(layers),
            part=str(iteration),
            fields={"iteration": str(iteration)},
            top_k=top_k,
            engine="TensorRT-LLM",
            extra={"ranks": len(ranks)},
            notes=("the ranks counted the same tokens (tensor parallelism): they were taken once",) if shared else (),
            consumed=size * done // len(order),
        )


def _meta(path: Path) -> tuple[int, int]:
    """Return the expert slots of a layer, and k."""
    with reading(str(path)), path.open("rb") as file:
        text = file.read(_LONGEST_META)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not JSON ({fault(error)})", where=str(path)) from error
    found = document if isinstance(document, dict) else {}
    values = []
    for key, most in (("num_experts", 1 << 16), ("num_experts_per_token", 1 << 10)):
        value = found.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise SourceError(f"{key} is {str(value)[:40]}", where=str(path), expected=f"a number from 1 to {most}")
        values.append(value)
    return values[0], values[1]


def _tables(path: Path, slots: int) -> Tables:
    tables: Tables = {}
    for name, tensor in read_safetensors(path)[0].items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise SourceError(f"holds {name[:60]!r}", where=str(path), expected="keys of the form iteration_layer")
        if tensor.shape != (slots,) or tensor.dtype.kind not in "ui":
            raise SourceError(
                f"is {tensor.dtype} of shape {tensor.shape}",
                where=tensor.where,
                expected=f"a whole number for each of the {slots} experts that {_META} names",
            )
        tables[int(key[1]), int(key[2])] = tensor
    return tables


def _stack(tables: Tables, iteration: int, layers: list[int], slots: int) -> NDArray[np.int64]:
    """Return a rank's counts ``[layers, slots]`` of one iteration, 0 for the layers of other pipeline stages."""
    out = np.zeros((len(layers), slots), np.int64)
    for entry, layer in enumerate(layers):
        tensor = tables.get((iteration, layer))
        if tensor is not None:
            out[entry] = tensor.load()
    return out


READER = Reader(
    name="tensorrt-llm",
    title="TensorRT-LLM expert statistics (counts only): a folder",
    example="EXPERT_STATISTIC_PATH/meta_info.json, rank0.safetensors {'100_3': int64[experts], …}",
    sniff=lambda path, head: False,
    read=_read,
    folder=_files,
)
