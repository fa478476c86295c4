"""Reader of the rollouts that slime and miles save for debugging: ``{"rollout_id", "samples": […]}`` in a ``.pt``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader, scalar_text
from tracekit.sources.bundle import Item, as_item, refuse_shared
from tracekit.sources.files import file_size
from tracekit.sources.torchfile import is_torch, load_torch, mentions

_KEY = "rollout_routed_experts"
_LONGEST_LABEL = 1 << 10


def _sniff(path: Path, head: bytes) -> bool:
    return is_torch(path, head) and mentions(path, "samples", _KEY)


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    content = load_torch(path)
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise SourceError(
            "has no list of samples", where=str(path), expected=f"samples with {_KEY}, as --save-debug-rollout-data"
        )
    routed = {i: _routing(sample, f"{path}, sample {i}") for i, sample in enumerate(samples)}
    present = {i: item for i, item in routed.items() if item is not None}
    if not present:
        raise SourceError(
            f"no sample has {_KEY}", where=str(path), remedy="Run the rollout with routing replay (R3) switched on"
        )
    refuse_shared(present.values(), path)
    notes: tuple[str, ...] = ()
    if len(present) < len(samples):
        first = next(i for i in routed if i not in present)
        notes = (f"samples without {_KEY} (aborted ones) were left out (sample {first} is the first)",)
    rollout, size = scalar_text(content.get("rollout_id")), file_size(path)
    seen = 0
    for i, item in present.items():
        where, sample = f"{path}, sample {i}", samples[i]
        tokens = as_item(sample.get("tokens"), where)
        if tokens is None or tokens.dtype.kind not in "ui" or len(tokens.shape) != 1:
            raise SourceError("has no tokens", where=where, expected="the token ids of prompt and response")
        count, output = tokens.shape[0], sample.get("response_length")
        seen += count
        if seen > size:
            raise SourceError(
                f"has more tokens, with the samples before it, than the file has bytes ({size})",
                where=where,
                expected="tokens of its own for each sample",
            )
        if type(output) is not int or not 0 <= output <= count:
            raise SourceError(
                f"has response_length {str(output)[:32]} and {count} tokens", where=where, expected="0 to all of them"
            )
        yield RawRequest(
            where=where,
            ids=item.load(),
            part=str(i),
            axes="tlk",
            prompt_len=count - output,
            output_len=output,
            expected_rows=max(count - 1, 0),
            token_ids=tokens.load().astype(np.int64),
            fields=_fields(sample, rollout),
            engine="sglang",
            extra={"framework": "slime or miles"},
            notes=notes,
            consumed=size * (i + 1) // len(samples),
        )


def _routing(sample: dict[Any, Any], where: str) -> Item | None:
    value = sample.get(_KEY)
    if value is None:
        return None
    item = as_item(value, where)
    if item is None or item.dtype.kind not in "ui" or len(item.shape) != 3:
        shape = f"a {type(value).__name__}" if item is None else f"{item.dtype} of shape {item.shape}"
        raise SourceError(f"has {shape} as {_KEY}", where=where, expected="integers [tokens - 1, layers, k]")
    return item


def _fields(sample: dict[Any, Any], rollout: str | None) -> dict[str, str]:
    """Candidate label fields: the sample's scalars, and those of its metadata."""
    metadata = sample.get("metadata")
    fields = {"rollout_id": rollout} if rollout is not None else {}
    for source in (sample, metadata if isinstance(metadata, dict) else {}):
        for key, value in source.items():
            text = scalar_text(value)
            if isinstance(key, str) and text is not None and len(text) <= _LONGEST_LABEL and key not in fields:
                fields[key] = text
    return fields


READER = Reader(
    name="slime",
    title="slime and miles debug rollouts (.pt) with rollout_routed_experts",
    example="--save-debug-rollout-data rollout_{rollout_id}.pt",
    sniff=_sniff,
    read=_read,
)
