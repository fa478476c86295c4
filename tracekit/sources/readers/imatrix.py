"""Reader of llama.cpp's importance matrix (GGUF), which counts how often each expert was chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawCounts, Reader, scalar_text
from tracekit.sources.files import file_size
from tracekit.sources.gguf import MAGIC, TensorInfo, load_f32, read_gguf

_COUNTS = re.compile(r"blk\.(\d{1,4})\.ffn_(gate|gate_up|up|down)_exps\.weight\.counts")
_MATRICES = ("gate", "gate_up", "up", "down")
_KEPT = ("imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets")


def _sniff(path: Path, head: bytes) -> bool:
    return head.startswith(MAGIC) and b"imatrix" in head


def _read(path: Path, options: IngestOptions) -> Iterator[RawCounts]:
    metadata, tensors = read_gguf(path)
    if metadata.get("general.type") != "imatrix":
        raise SourceError(
            f"is a GGUF of type {str(metadata.get('general.type'))[:40]!r}", where=str(path), expected="type 'imatrix'"
        )
    by_layer: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if found := _COUNTS.fullmatch(name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = info
    if not by_layer:
        raise SourceError(
            "holds no counts of experts",
            where=str(path),
            expected="tensors named blk.N.ffn_gate_exps.weight.counts",
            remedy="Make it from a Mixture-of-Experts model, with llama.cpp's imatrix of 2025 or later",
        )
    claimed = sum(math.prod(info.shape) * 4 for found in by_layer.values() for info in found.values())
    if claimed > file_size(path):
        raise SourceError(
            f"claims {claimed} bytes of counts in a file of {file_size(path)}", where=str(path), expected="a whole file"
        )
    layers = sorted(by_layer)
    rows, agree = zip(*(_layer(path, by_layer[layer]) for layer in layers), strict=True)
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise SourceError(f"has layers of {sorted(widths)[:8]} experts", where=str(path), expected="one number of them")
    extra = {key: metadata[key] for key in _KEPT if key in metadata}
    yield RawCounts(
        where=str(path),
        counts=np.stack(rows),
        layer_ids=tuple(layers),
        fields=_fields(metadata),
        engine="llama.cpp",
        id_space="logical",
        extra=extra,
        notes=() if all(agree) else ("the matrices of some layers differ in their counts: the first one was taken",),
        consumed=file_size(path),
    )


def _layer(path: Path, matrices: Mapping[str, TensorInfo]) -> tuple[NDArray[np.float32], bool]:
    """Return the counts of a layer's experts, and whether its matrices agree on them."""
    loaded = []
    for name in _MATRICES:
        if name not in matrices:
            continue
        info = matrices[name]
        if len(info.shape) < 2 or info.shape[0] != 1 or any(n != 1 for n in info.shape[2:]):
            raise SourceError(f"has shape {info.shape}", where=info.where, expected="(1, experts)")
        loaded.append(load_f32(path, info))
    first = loaded[0]
    return first, all(len(other) == len(first) and (other == first).all() for other in loaded[1:])


def _fields(metadata: Mapping[str, Any]) -> dict[str, str]:
    datasets = metadata.get("imatrix.datasets")
    if not isinstance(datasets, list) or len(datasets) != 1:
        return {}
    text = scalar_text(datasets[0])
    return {} if text is None else {"dataset": text}


READER = Reader(
    name="imatrix",
    title="llama.cpp importance matrix, GGUF (counts only; give --top-k)",
    example="general.type = imatrix, blk.0.ffn_gate_exps.weight.counts f32[1, experts]",
    sniff=_sniff,
    read=_read,
)
