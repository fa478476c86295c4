"""Reader of llama.cpp's ``layer,expert`` CSV, which has neither a token index nor k nor a phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader
from tracekit.sources.csvio import read_columns
from tracekit.sources.files import allocate, file_size

_COLUMNS = ("layer", "expert")
_MOST_GAPS, _FREE_CELLS = 4, 1 << 20
"""Cells (batch, layer) for each run of rows before a trace counts as damaged; only the last layer may be absent."""
_LARGEST = {"layer": 1 << 12, "expert": 1 << 16}
_NOTE = (
    "the CSV has no token index: rows were taken as k experts per token, layer by layer per batch; batches of more "
    "than one token as prompt, single tokens as decode, and a new request wherever a prompt follows decoding"
)


def _sniff(path: Path, head: bytes) -> bool:
    first = head.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace").strip().lower()
    return tuple(name.strip() for name in first.split(",")) == _COLUMNS


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    top_k = options.top_k or (None if options.config is None else options.config.top_k)
    if top_k is None:
        raise SourceError(
            "does not say how many experts a token takes",
            where=str(path),
            expected="k",
            remedy="Give --top-k K, or --config config.json",
        )
    layer, expert = _rows(path)
    batches = _Batches(layer, top_k, str(path))
    starts = np.flatnonzero(batches.begins_request)
    for part, (begin, end) in enumerate(zip(starts, [*starts[1:], len(batches.tokens)], strict=True)):
        yield _request(path, batches, expert, int(begin), int(end), part)


def _rows(path: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    layers, experts = [], []
    for line, columns, _ in read_columns(path, 1, _COLUMNS, dict.fromkeys(_COLUMNS, int)):
        for name, limit in _LARGEST.items():
            wrong = np.flatnonzero((columns[name] < 0) | (columns[name] >= limit))
            if wrong.size:
                raise SourceError(
                    f"{name} is {int(columns[name][wrong[0]])}",
                    where=f"{path}:{line + int(wrong[0])}",
                    expected=f"0 to {limit - 1}",
                )
        layers.append(columns["layer"].astype(np.uint16))
        experts.append(columns["expert"].astype(np.uint16))
    if not layers:
        raise SourceError("has a header but no rows", where=str(path), expected="a complete trace")
    return np.concatenate(layers), np.concatenate(experts)


class _Batches:
    """The batches (ubatches) of a trace: how many tokens each had, and where each layer's rows begin."""

    def __init__(self, layer: NDArray[np.uint16], top_k: int, where: str) -> None:
        self.where, self.top_k = where, top_k
        starts = np.concatenate([[0], np.flatnonzero(np.diff(layer.astype(np.int32))) + 1])
        sizes = np.diff(np.concatenate([starts, [len(layer)]]))
        odd = np.flatnonzero(sizes % top_k)
        if odd.size:
            raise SourceError(
                f"layer {int(layer[starts[odd[0]]])} has {int(sizes[odd[0]])} rows in one go, no multiple of k {top_k}",
                where=f"{where}:{int(starts[odd[0]]) + 2}",
                remedy="Give the right --top-k; a trace cut off while it was written ends like this too",
            )
        of_block = layer[starts].astype(np.int64)
        self.layers, at = np.unique(of_block, return_inverse=True)
        # A layer number that does not rise begins the next pass through the model.
        batch = np.cumsum(np.concatenate([[0], np.diff(of_block) <= 0]))
        shape = (int(batch[-1]) + 1, len(self.layers))
        if shape[0] * shape[1] > _MOST_GAPS * len(of_block) + _FREE_CELLS:
            raise SourceError(
                f"has {len(of_block)} runs of rows for {shape[0]} batches of {shape[1]} layers",
                where=where,
                expected="the layers of each batch in ascending order",
                remedy="Is it damaged? Copy it again from where it was made",
            )
        self.per_layer = np.zeros(shape, np.int64)
        self.row = np.zeros(shape, np.int64)
        self.per_layer[batch, at] = sizes // top_k
        self.row[batch, at] = starts
        self.tokens = self.per_layer.max(axis=1)
        """Tokens of each batch."""
        self.complete = self.per_layer[:, -1]
        """Tokens that have the last layer as well: those whose output was asked for, the batch's last."""
        self._check_complete()
        self.is_prompt = self.tokens > 1
        self.begins_request = np.concatenate([[True], self.is_prompt[1:] & ~self.is_prompt[:-1]])

    def _check_complete(self) -> None:
        short = self.per_layer != self.tokens[:, None]
        short[self.tokens > 1, -1] = False
        if short.any():
            batch, layer = (int(i) for i in np.argwhere(short)[0])
            raise SourceError(
                f"layer {int(self.layers[layer])} has {int(self.per_layer[batch, layer])} of {int(self.tokens[batch])} "
                f"tokens in batch {batch}",
                where=f"{self.where}:{int(self.row[batch].max()) + 2}",
                expected="every layer of a batch with the same tokens",
                remedy="Give the right --top-k; a trace cut off while it was written ends like this too",
            )


def _request(path: Path, batches: _Batches, expert: NDArray[Any], begin: int, end: int, part: int) -> RawRequest:
    tokens, complete = batches.tokens[begin:end], batches.complete[begin:end]
    total = int(complete.sum())
    if not total:
        raise SourceError("has no token with routing in every layer", where=f"{path}, request {part}")
    # Place j of the complete tokens of a batch: the batch's last ones.
    batch = np.repeat(np.arange(begin, end), complete)
    within = np.arange(total) - np.repeat(np.cumsum(complete) - complete, complete)
    first = np.cumsum(tokens) - tokens
    positions = np.repeat(first + tokens - complete, complete) + within
    ids = allocate((total, len(batches.layers), batches.top_k), np.uint16)
    ranks = np.arange(batches.top_k)
    for entry in range(len(batches.layers)):
        skipped = batches.per_layer[batch, entry] - batches.complete[batch]
        row = batches.row[batch, entry] + (skipped + within) * batches.top_k
        ids[:, entry] = expert[row[:, None] + ranks]
    notes: tuple[str, ...] = (_NOTE,)
    if total < tokens.sum():
        notes = (_NOTE, f"prompt tokens without routing in the last layer, {int(batches.layers[-1])}, were left out")
    whole = int(positions[-1] - positions[0]) + 1 == total
    prompt = batches.is_prompt[begin:end]
    known = bool(prompt[0]) and len(batches.layers) > 1  # one layer alone does not show where batches end
    return RawRequest(
        where=str(path),
        ids=ids,
        part=str(part),
        axes="tlk",
        prompt_len=int(tokens[prompt].sum()) if known else None,
        first_pos=int(positions[0]),
        positions=None if whole else positions.astype(np.int64),
        layer_ids=tuple(int(layer) for layer in batches.layers),
        engine="llama.cpp",
        id_space="logical",
        notes=notes,
        consumed=file_size(path),
    )


READER = Reader(
    name="llamacpp",
    title="llama.cpp layer,expert CSV (needs --top-k)",
    example="layer,expert",
    sniff=_sniff,
    read=_read,
)
