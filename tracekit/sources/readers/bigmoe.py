"""Reader of BigMoeOnEdge's ``route_trace v1`` CSV: one row per routed expert, one request per turn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.csvio import Columns, read_columns
from tracekit.sources.files import allocate, file_size, reading

_MAGIC = "# route_trace v1"
_WANTED = {"turn": int, "phase": int, "step": int, "layer": int, "slot": int, "expert": int, "weight": float}
_LONGEST_HEADER = 1 << 16
_MOST_GAPS, _FREE_CELLS = 4, 1 << 20
"""Cells for each row of a turn before it counts as damaged; prompts leave out at most the last layer."""
_LARGEST = {"turn": 1 << 31, "phase": 2, "step": 1 << 31, "layer": 1 << 12, "slot": 1 << 10, "expert": 1 << 16}


@dataclass
class _Header:
    """The ``#`` preamble."""

    lines: int = 0
    columns: tuple[str, ...] = ()
    model: str | None = None
    arch: str | None = None
    num_experts: int | None = None
    used: int | None = None
    """Routing width of the run, after an override of the model's own."""
    expert_bytes: dict[str, int] = field(default_factory=dict)
    dense_bytes: dict[str, int] = field(default_factory=dict)


def _sniff(path: Path, head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf").startswith(_MAGIC.encode())


def _header(path: Path) -> _Header:
    header, read = _Header(), 0
    with reading(str(path)), path.open("rb") as file:
        while line := file.readline(_LONGEST_HEADER):
            header.lines, read = header.lines + 1, read + len(line)
            text = line.decode("utf-8", "replace").strip()
            if not text.startswith("#"):
                header.columns = tuple(name.strip() for name in text.split(","))
                break
            # A path may hold blanks: a value runs to the next key.
            pairs = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|$)", text[1:].strip()))
            if "model" in pairs:
                header.model = re.split(r"[/\\]", pairs["model"])[-1]
                header.arch = pairs.get("arch")
                header.num_experts, header.used = (
                    _number(pairs, "n_expert", path),
                    _number(pairs, "n_expert_used", path),
                )
            elif "layer" in pairs:
                for key, store in (("expert_bytes", header.expert_bytes), ("dense_bytes", header.dense_bytes)):
                    value = _number(pairs, key, path)
                    if value is not None:
                        store[pairs["layer"]] = value
    missing = [name for name in _WANTED if name not in header.columns]
    if missing:
        raise SourceError(
            f"has no column {missing[0]!r}",
            where=f"{path}:{max(header.lines, 1)}",
            expected=f"the columns {','.join(_WANTED)}",
        )
    return header


def _number(pairs: dict[str, str], key: str, path: Path) -> int | None:
    if key not in pairs:
        return None
    if not pairs[key].isdecimal() or len(pairs[key]) > 18:
        raise SourceError(f"header says {key}={pairs[key]!r}", where=str(path), expected="a number")
    return int(pairs[key])


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    header = _header(path)
    pending: list[Columns] = []
    turn: int | None = None
    layers: NDArray[np.int64] | None = None
    done = 0
    for line, columns, done in read_columns(path, header.lines, header.columns, _WANTED):
        _check_columns(columns, path, line)
        turns = columns["turn"]
        cuts = [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist(), len(turns)]
        for begin, end in pairwise(cuts):
            if turn is not None and int(turns[begin]) != turn:
                raw = _turn(path, header, turn, pending, layers, done)
                layers = np.array(raw.layer_ids)
                yield raw
                pending = []
            turn = int(turns[begin])
            pending.append(_compact({name: values[begin:end] for name, values in columns.items()}))
    if turn is None:
        raise SourceError("has a header but no rows", where=str(path), expected="a complete trace")
    yield _turn(path, header, turn, pending, layers, file_size(path))


def _check_columns(columns: Columns, path: Path, line: int) -> None:
    for name, limit in _LARGEST.items():
        values = columns[name]
        wrong = np.flatnonzero((values < 0) | (values >= limit))
        if wrong.size:
            raise SourceError(
                f"{name} is {int(values[wrong[0]])}",
                where=f"{path}:{line + int(wrong[0])}",
                expected=f"0 to {limit - 1}",
            )


def _compact(columns: Columns) -> Columns:
    """Keep a turn's rows in a quarter of the memory until the turn is complete."""
    narrow = {"phase": "u1", "step": "i4", "layer": "u2", "slot": "u2", "expert": "u2", "weight": "f4"}
    return {name: columns[name].astype(dtype) for name, dtype in narrow.items()}


def _turn(
    path: Path, header: _Header, turn: int, pending: list[Columns], expected_layers: Any, done: int
) -> RawRequest:
    where = f"{path}, turn {turn}"
    rows = {name: np.concatenate([block[name] for block in pending]) for name in pending[0]}
    steps, at_step = np.unique(rows["step"], return_inverse=True)
    layers, at_layer = np.unique(rows["layer"], return_inverse=True)
    if expected_layers is not None and not np.array_equal(layers, expected_layers):
        raise SourceError("has other layers than the turns before it", where=where, expected="the same layers")
    width = int(rows["slot"].max()) + 1
    phase = np.zeros(len(steps), np.uint8)
    phase[at_step] = rows["phase"]
    if (phase[at_step] != rows["phase"]).any() or (np.diff(phase.astype(np.int8)) < 0).any():
        raise SourceError("has prefill steps after decode steps", where=where, expected="positions in order of phase")
    if len(steps) * len(layers) * width > _MOST_GAPS * len(rows["step"]) + _FREE_CELLS:
        raise SourceError(
            f"has {len(rows['step'])} rows for {len(steps)} steps, {len(layers)} layers and {width} slots",
            where=where,
            expected="a row for every slot of every layer",
            remedy="Is it damaged? Copy it again from where it was made",
        )
    ids, weights = allocate((len(steps), len(layers), width), np.int32), None
    ids[:] = -1
    ids[at_step, at_layer, rows["slot"]] = rows["expert"]
    filled = ids >= 0
    if int(filled.sum()) != len(rows["step"]):
        raise SourceError("has the same turn, step, layer and slot twice", where=where, expected="one row each")
    complete, notes = _complete_tokens(filled, phase, steps, layers, where)
    if not np.isnan(rows["weight"]).any():
        weights = np.zeros(ids.shape, np.float32)
        weights[at_step, at_layer, rows["slot"]] = rows["weight"]
        weights = weights[complete]
    steps, phase, ids = steps[complete].astype(np.int64), phase[complete], ids[complete]
    consecutive = len(steps) and int(steps[-1] - steps[0]) + 1 == len(steps)
    extra: dict[str, Any] = {"expert_bytes": header.expert_bytes, "dense_bytes": header.dense_bytes}
    if header.arch is not None:
        extra["arch"] = header.arch
    decode = np.flatnonzero(phase == 1)
    return RawRequest(
        where=where,
        ids=ids,
        part=str(turn),
        axes="tlk",
        prompt_len=int(steps[decode[0]]) if decode.size else int(steps[-1]) + 1,
        first_pos=int(steps[0]),
        positions=None if consecutive else steps,
        weights=weights,
        layer_ids=tuple(int(layer) for layer in layers),
        num_experts=header.num_experts,
        native_top_k=header.used if header.used is not None and header.used > width else None,
        model=header.model,
        engine="BigMoeOnEdge",
        id_space="logical",
        router_order=True,
        extra={key: value for key, value in extra.items() if value},
        notes=notes,
        consumed=done,
    )


def _complete_tokens(
    filled: NDArray[np.bool_], phase: NDArray[np.uint8], steps: NDArray[Any], layers: NDArray[Any], where: str
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Find the tokens that have all their rows.

    llama.cpp computes the last layer of a prompt only for the tokens whose output is asked
    for, so prompt tokens without it are left out; any other gap is a damaged trace.
    """
    cells: NDArray[np.bool_] = np.all(filled, axis=2)
    partly: NDArray[np.bool_] = np.any(filled, axis=2) & ~cells
    missing = np.logical_not(cells)
    missing[phase == 0, -1] &= partly[phase == 0, -1]
    if missing.any():
        token, layer = (int(i) for i in np.argwhere(missing)[0])
        raise SourceError(
            f"has {int(filled[token, layer].sum())} of {filled.shape[2]} experts",
            where=f"{where}, step {int(steps[token])}, layer {int(layers[layer])}",
            expected="a row for every slot of every layer",
            remedy="A trace cut off while it was written ends like this: cut its last step",
        )
    complete: NDArray[np.bool_] = np.all(cells, axis=1)
    if not complete.any():
        raise SourceError("has no token with routing in every layer", where=where)
    left_out = int((~complete).sum())
    if not left_out:
        return complete, ()
    return complete, (f"prompt tokens without routing in the last layer, {int(layers[-1])}, were left out",)


READER = Reader(
    name="bigmoe",
    title="BigMoeOnEdge route_trace v1 CSV",
    example="# route_trace v1 … turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
    sniff=_sniff,
    read=_read,
)
