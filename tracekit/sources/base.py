"""What readers and the canonical step agree on: options, the raw request, the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tracekit.schema import IdSpace, VerifySteps
from tracekit.sources.config import ModelConfig

AnyArray = NDArray[Any]


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What the user says about a source, beyond what the source says itself."""

    config: ModelConfig | None = None
    """The model's ``config.json``; None: one beside the trace is used where there is one."""
    num_experts: int | None = None
    top_k: int | None = None
    axes: str | None = None
    """Order of the axes of an array, a permutation of ``tlk`` (tokens, layers, top-k)."""
    phase: Literal["decode", "prefill"] | None = None
    router_order: bool | None = None
    id_space: IdSpace | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Constant labels of every request of this source."""
    label_fields: tuple[str, ...] = ()
    """Fields of the sidecar or of the records that make up the label."""
    requests: Sequence[Mapping[str, Any]] | None = None
    """The ``--requests`` sidecar, parsed."""
    source_format: str | None = None
    """Name of a reader; None: detected by content."""
    name: str | None = None
    """Name of the trace."""
    token_axis: int | None = None
    """The axis whose size varies between the files of a folder; `open_source` finds it."""


@dataclass(frozen=True, slots=True)
class RawPredictions:
    """What one predictor said, as its file tells it."""

    predictor: str
    distance: int
    ids: AnyArray
    """Any integers, axes as those of ``RawRequest.ids`` with the m predicted experts in the place of the k that ran;
    the layer axis is that of the layer predicted. A row that is nothing but the largest value of its unsigned type
    (255, 65535), or -1, is no prediction."""


@dataclass(slots=True)
class RawRequest:
    """One request as its file tells it, before it is made canonical."""

    where: str
    """File, and line or member, for messages."""
    ids: AnyArray
    """Expert ids, any dtype, any order of axes."""
    request_id: str | None = None
    """The id the source itself gives; None: named after the file."""
    part: str | None = None
    """Which of several unnamed requests of the file this is."""
    axes: str | None = None
    """Order of the axes where the format fixes it; None: to be found out."""
    token_axis: int | None = None
    """The axis of the tokens, where the source shows it."""
    prompt_len: int | None = None
    output_len: int | None = None
    expected_rows: int | None = None
    """Rows of a complete capture from position 0; None where the source does not say."""
    first_pos: int | None = None
    positions: NDArray[np.int64] | None = None
    """Strictly increasing positions where tokens are missing."""
    token_ids: AnyArray | None = None
    """Token ids of the sequence from position 0 on."""
    tokens_by_row: bool = False
    """True where ``token_ids`` start with the first row instead."""
    weights: AnyArray | None = None
    steps: VerifySteps | None = None
    """Verification steps; their layer axis is that of ``ids``."""
    predictions: tuple[RawPredictions, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    """Candidate label fields."""
    layer_ids: tuple[int, ...] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    native_top_k: int | None = None
    model: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    id_space: IdSpace | None = None
    router_order: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Provenance worth keeping, JSON-serialisable."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about what was assumed."""
    consumed: int = 0
    """Bytes of the file that have been read once this request is done, for the progress bar."""


@dataclass(slots=True)
class RawCounts:
    """Counts per expert as a file tells them, before they are made canonical."""

    where: str
    """File, and record, for messages."""
    counts: AnyArray
    """``[layers, experts]`` tokens that chose each expert, any integer or integral float dtype."""
    layer_ids: tuple[int, ...] | None = None
    request_id: str | None = None
    part: str | None = None
    """Which of several unnamed records of the file this is."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Candidate label fields."""
    top_k: int | None = None
    model: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    id_space: IdSpace | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    consumed: int = 0
    """Bytes of the file that have been read once this record is done, for the progress bar."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One input format."""

    name: str
    """As ``--source-format`` takes it."""
    title: str
    example: str
    """One line that shows what such a source looks like."""
    sniff: Callable[[Path, bytes], bool]
    """Whether a file with this beginning is of the format."""
    read: Callable[[Path, IngestOptions], Iterator[RawRequest | RawCounts]]
    """Yield the requests (or the counts) of one file, in order."""
    folder: Callable[[Path], Sequence[Path]] | None = None
    """The files of a folder that as a whole is one source of the format: ``read`` then gets the folder. None of them:
    it is not one."""
    beside: bool = False
    """Whether such files may lie beside the routing of the same requests in another format: a folder that has both is
    then read without them."""


def scalar_text(value: object) -> str | None:
    """Return a label value as text, None for what cannot be one.

    Lone surrogates (from JSON escapes or undecodable file names) cannot be stored as UTF-8
    and become replacement characters; all else is kept as it is.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int | float):
        return str(value)
    return None
