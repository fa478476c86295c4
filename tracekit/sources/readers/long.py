"""Reader of tables in long form: CSV, JSON lines or Parquet whose rows say token, layer and experts.

A row holds one routed expert, or all k of a token in a layer: as a list, or in the columns ``e0``, ``e1``, …
The names of the columns are looked up in ``ALIASES``, in any case of letters. The rows of a request stand together;
inside it they may have any order. Where no column names the request, another one begins wherever the token falls back
while the layer does not rise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader, scalar_text
from tracekit.sources.files import read_head
from tracekit.sources.pivot import TOGETHER, one_axis, order_rows, prompt_length, take
from tracekit.sources.tables import (
    PARQUET,
    Block,
    Place,
    csv_blocks,
    csv_header,
    floats,
    integers,
    json_blocks,
    parquet_blocks,
    parquet_schema,
)

if TYPE_CHECKING:
    import polars as pl

ALIASES: dict[str, tuple[str, ...]] = {
    "request": ("request_id", "req_id", "request", "sequence_id", "seq_id", "sequence", "seq", "sample_id", "sample"),
    "token": ("token_index", "token_idx", "position", "pos", "token_pos", "token_position", "token"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "experts": (
        *("expert_ids", "topk_ids", "top_k_ids", "selected_experts", "routed_experts", "experts", "indices"),
        *("expert", "expert_id", "expert_idx", "expert_index"),
    ),
    "weights": (
        *("topk_weights", "router_weights", "expert_weights", "weights", "weight", "scores", "score"),
        *("probs", "prob"),
    ),
    "rank": ("rank", "slot"),
    "phase": ("phase", "stage"),
}
"""What each column may be called; of several that are there the first one counts."""

_PHASES = {
    **dict.fromkeys(("0", "prefill", "prompt", "context", "extend"), 0),
    **dict.fromkeys(("1", "decode", "decoding", "generate", "generation", "output"), 1),
}
_LARGEST = {"token": 1 << 32, "layer": 1 << 12, "rank": 1 << 10}
_MOST_EXPERTS = 1 << 16
_FLAT = re.compile(r"([ew])(\d{1,3})")


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which column of the file is what."""

    token: str
    layer: str
    experts: tuple[str, ...]
    """One column, or one per rank."""
    weights: tuple[str, ...] = ()
    request: str | None = None
    rank: str | None = None
    phase: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All columns to be read."""
        optional = (self.request, self.rank, self.phase)
        return list(
            dict.fromkeys(
                [
                    self.token,
                    self.layer,
                    *self.experts,
                    *self.weights,
                    *(name for name in optional if name is not None),
                    *self.labels,
                ]
            )
        )


def _columns(names: Sequence[str], labels: Sequence[str] = ()) -> _Columns | None:
    """Find the columns by their names; None where token, layer or experts are missing."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)

    def find(what: str) -> str | None:
        return next((lower[alias] for alias in ALIASES[what] if alias in lower), None)

    flat: dict[str, list[tuple[int, str]]] = {"e": [], "w": []}
    for alias, name in lower.items():
        if match := _FLAT.fullmatch(alias):
            flat[match[1]].append((int(match[2]), name))
    ranks = {letter: tuple(name for _, name in sorted(found)) for letter, found in flat.items()}
    complete = all([n for n, _ in sorted(found)] == list(range(len(found))) for found in flat.values())
    token, layer, experts, weights = find("token"), find("layer"), find("experts"), find("weights")
    if token is None or layer is None or (experts is None and not (ranks["e"] and complete)):
        return None
    if experts is None:
        several = ranks["w"] if len(ranks["w"]) == len(ranks["e"]) else ()
        return _Columns(token, layer, ranks["e"], several, find("request"), None, find("phase"), _there(labels, lower))
    single = () if weights is None else (weights,)
    return _Columns(
        token, layer, (experts,), single, find("request"), find("rank"), find("phase"), _there(labels, lower)
    )


def _there(labels: Sequence[str], lower: dict[str, str]) -> tuple[str, ...]:
    return tuple(lower[label.lower()] for label in labels if label.lower() in lower)


def _names(path: Path, head: bytes) -> tuple[str, list[str]]:
    """Return the kind of file, and its column names as far as they can be seen."""
    if head.startswith(PARQUET):
        return "parquet", list(parquet_schema(path))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        return "json", _first_fields(text.decode("utf-8", "replace"))
    return "csv", csv_header(head)


def _first_fields(text: str) -> list[str]:
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip("[ \t\r\n"))
    except (ValueError, RecursionError):
        return []
    return [str(name) for name in value] if isinstance(value, dict) else []


def _sniff(path: Path, head: bytes) -> bool:
    return _columns(_names(path, head)[1]) is not None


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    kind, names = _names(path, read_head(path))
    columns = _columns(names, options.label_fields)
    if columns is None:
        raise SourceError(
            f"has the columns {', '.join(names)[:200] or '(none)'}",
            where=str(path),
            expected="; ".join(f"{what}: {', '.join(ALIASES[what])}" for what in ("token", "layer", "experts")),
            remedy="Rename the columns",
        )
    seen: set[str] = set()
    for number, pieces in enumerate(_requests(_blocks(path, kind, columns), columns, path)):
        name = pieces[0].request
        where = f"{path}, request {number if name is None else repr(name)}"
        if name is not None and name in seen:
            raise SourceError("its rows do not stand together", where=where, remedy=TOGETHER)
        if name is not None:
            seen.add(name)
        yield _request(pieces, columns, name, number, where)


@dataclass(slots=True)
class _Rows:
    """Consecutive rows of one request, in compact types."""

    request: str | None
    token: NDArray[np.int64]
    layer: NDArray[np.uint16]
    ids: NDArray[np.uint16]
    """``[rows]`` one expert each, or ``[rows, k]``."""
    weights: NDArray[np.float32] | None
    rank: NDArray[np.uint16] | None
    phase: NDArray[np.int8] | None
    labels: dict[str, str] = field(default_factory=dict)
    done: int = 0

    def part(self, begin: int, end: int) -> _Rows:
        """Return some of the rows; copied, so that the block can be freed."""

        def cut(array: Any) -> Any:
            return None if array is None else array[begin:end].copy()

        return _Rows(
            self.request,
            cut(self.token),
            cut(self.layer),
            cut(self.ids),
            cut(self.weights),
            cut(self.rank),
            cut(self.phase),
            self.labels,
            self.done,
        )


def _blocks(path: Path, kind: str, columns: _Columns) -> Iterator[tuple[Block, Place]]:
    if kind == "csv":
        numbers: dict[str, type] = dict.fromkeys((columns.token, columns.layer), int)
        numbers |= {} if columns.rank is None else {columns.rank: int}
        if len(columns.experts) > 1:
            numbers |= dict.fromkeys(columns.experts, int) | dict.fromkeys(columns.weights, float)
        blocks = csv_blocks(path, columns.names, numbers)
    else:
        blocks = (parquet_blocks if kind == "parquet" else json_blocks)(path, columns.names)
    for block in blocks:
        yield block, Place(path, block.first, kind == "csv")


def _requests(blocks: Iterator[tuple[Block, Place]], columns: _Columns, path: Path) -> Iterator[list[_Rows]]:
    """Yield the rows of one request after the other, in pieces as they came."""
    held: list[_Rows] = []
    for block, place in blocks:
        rows = _rows(block, place, columns)
        names = None if columns.request is None else _texts(block.frame[columns.request], place)
        begins = _begins(rows, names, held[-1] if held else None)
        cuts = [0, *[int(i) for i in np.flatnonzero(begins) if i], len(begins)]
        for begin, end in pairwise(cuts):
            if begins[begin] and held:
                yield held
                held = []
            piece = rows.part(begin, end)
            piece.request = None if names is None else names[begin]
            piece.labels = {name: _label(block.frame[name][begin:end], place, begin) for name in columns.labels}
            held.append(piece)
    if not held:
        raise SourceError("has no rows", where=str(path), expected="a complete trace")
    yield held


def _label(column: pl.Series, place: Place, begin: int) -> str:
    """Return the one value of a label that some rows of a request have."""
    values = [scalar_text(value) or "" for value in column.to_list()]
    for row, value in enumerate(values):
        if value != values[0]:
            found = f"{column.name} is {value[:60]!r} after {values[0][:60]!r}"
            raise SourceError(found, where=place.row(begin + row), expected="one label for all rows of a request")
    return values[0]


def _texts(column: pl.Series, place: Place) -> list[str]:
    values = [scalar_text(value) for value in column.to_list()]
    if None in values:
        row = values.index(None)
        raise SourceError(f"{column.name} is {column[row]!r:.60}", where=place.row(row), expected="a name or a number")
    return [value for value in values if value is not None]


def _rows(block: Block, place: Place, columns: _Columns) -> _Rows:
    frame = block.frame
    token, layer = _counted(frame, columns.token, "token", place), _counted(frame, columns.layer, "layer", place)
    ids = _matrix(frame, columns.experts, place, integers)
    wrong = (ids < 0) | (ids >= _MOST_EXPERTS)
    if wrong.any():
        row = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise SourceError(f"expert id {int(ids[row])}", where=place.row(row[0]), expected=f"0 to {_MOST_EXPERTS - 1}")
    weights = _matrix(frame, columns.weights, place, floats).astype(np.float32) if columns.weights else None
    if weights is not None and weights.shape != ids.shape:
        raise SourceError(
            f"{columns.weights[0]} has shape {weights.shape[1:]} beside experts {ids.shape[1:]}",
            where=place.row(0),
            expected="a weight for every expert",
        )
    rank = None if columns.rank is None or ids.ndim == 2 else _counted(frame, columns.rank, "rank", place)
    return _Rows(
        request=None,
        token=token,
        layer=layer.astype(np.uint16),
        ids=ids.astype(np.uint16),
        weights=weights,
        rank=None if rank is None else rank.astype(np.uint16),
        phase=None if columns.phase is None else _phases(frame[columns.phase], place),
        done=block.done,
    )


def _matrix(frame: pl.DataFrame, names: Sequence[str], place: Place, parse: Any) -> Any:
    arrays = [parse(frame[name], place) for name in names]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)


def _counted(frame: pl.DataFrame, name: str, what: str, place: Place) -> NDArray[np.int64]:
    values = integers(frame[name], place)
    if values.ndim != 1:
        raise SourceError(f"{name} is a list", where=place.row(0), expected="a whole number")
    wrong = (values < 0) | (values >= _LARGEST[what])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise SourceError(f"{name} is {int(values[row])}", where=place.row(row), expected=f"0 to {_LARGEST[what] - 1}")
    return values


def _phases(column: pl.Series, place: Place) -> NDArray[np.int8]:
    texts = _texts(column, place)
    known = {text: _PHASES.get(text.strip().lower()) for text in set(texts)}
    for row, text in enumerate(texts if None in known.values() else ()):
        if known[text] is None:
            raise SourceError(
                f"{column.name} is {text[:60]!r}", where=place.row(row), expected=", ".join(sorted(_PHASES))
            )
    return np.array([known[text] for text in texts], np.int8)


def _begins(rows: _Rows, names: list[str] | None, before: _Rows | None) -> NDArray[np.bool_]:
    """Return the rows that begin a request; ``before`` are the rows before these."""
    n = len(rows.token)
    begins = np.zeros(n, bool)
    begins[0] = before is None
    if names is not None:
        begins[1:] = [name != last for name, last in zip(names[1:], names, strict=False)]
        if before is not None:
            begins[0] = names[0] != before.request
        return begins

    def with_last(values: NDArray[Any], last: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([last[-1:], values[:-1]])

    if before is None:
        before = rows.part(0, 1)
    falls: NDArray[np.bool_] = (rows.token < with_last(rows.token, before.token)) & (
        rows.layer <= with_last(rows.layer, before.layer)
    )
    if rows.phase is None or before.phase is None:
        return begins | falls
    last = with_last(rows.phase, before.phase)
    # Tracers that number the tokens of each phase from 0 let them fall where decoding begins.
    falls &= ~((rows.phase == 1) & (last == 0))
    falls |= (rows.phase == 0) & (last == 1)
    return begins | falls


def _request(pieces: list[_Rows], columns: _Columns, name: str | None, number: int, where: str) -> RawRequest:
    def joined(what: str) -> Any:
        parts = [getattr(piece, what) for piece in pieces]
        return None if parts[0] is None else np.concatenate(parts)

    widths = {piece.ids.shape[1:] for piece in pieces}
    if len(widths) > 1:
        raise SourceError("has rows of different k", where=where, expected="the same number of experts in every row")
    token, layer, ids, phase = joined("token"), joined("layer"), joined("ids"), joined("phase")
    notes: tuple[str, ...] = ()
    if phase is not None:
        token, notes = one_axis(token, phase)
    tokens, at_token = np.unique(token, return_inverse=True)
    layers, at_layer = np.unique(layer, return_inverse=True)
    order, k = order_rows(at_token * len(layers) + at_layer, tokens, layers, joined("rank"), ids, where)
    shape = (len(tokens), len(layers), k)
    weights = joined("weights")
    labels = pieces[0].labels
    for piece in pieces:
        if piece.labels != labels:
            raise SourceError(f"has several labels: {labels} and {piece.labels}", where=where, expected="one each")
    consecutive = int(tokens[-1] - tokens[0]) + 1 == len(tokens)
    return RawRequest(
        where=where,
        ids=take(ids, order, shape, np.uint16),
        request_id=name,
        part=None if name is not None else str(number),
        axes="tlk",
        prompt_len=None if phase is None else prompt_length(token, phase, where),
        first_pos=int(tokens[0]),
        positions=None if consecutive else tokens,
        weights=None if weights is None else take(weights, order, shape, np.float32),
        layer_ids=tuple(int(number) for number in layers),
        router_order=True if columns.rank is not None and columns.rank.lower() == "rank" else None,
        fields=labels,
        notes=notes,
        consumed=pieces[-1].done,
    )


READER = Reader(
    name="long",
    title="tables with a row per token and layer (or expert): CSV, JSON lines, Parquet",
    example='{"request_id": 7, "phase": "decode", "token_index": 12, "layer": 3, "expert_ids": [5, 1]}',
    sniff=_sniff,
    read=_read,
)
