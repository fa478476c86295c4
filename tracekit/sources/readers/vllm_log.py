"""Reader of the JSON lines that patches of vLLM write under ``VLLM_LOG_MOE``.

The form is that of the patches that are public (vLLM-MoE-Logger, vllm-expert-profiler, vllm_moe_routelogging_patch and
others with the same fields): a line ``{"type": "meta", "model_id", "vllm_version", "layers_logged", "top_k", …}``, some
patches repeat it, then one line ``{"type": "route", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"}`` for
each token of each forward pass in each logged layer. Neither name means what it says: in these patches ``req_id`` is a
constant or the number of the pass, and ``token_idx`` counts the rows of the pass, or all rows. A row's neighbours are
mostly other requests. Sequences are therefore put together only where the log itself shows them:

1. ``req_id`` names requests if one comes back after another id or layer (the number of a pass cannot): each id is a
   request, ``token_idx`` its position, or, where it counts all rows, only the order.
2. Else the passes are told apart by ``token_idx`` starting anew, by the id, the layer, or a meta line. If no two passes
   of several rows follow each other, one request ran at a time: a prompt, then one row a pass.
3. Else rows of successive passes of the same size belong together: a request that joins brings its prompt, which makes
   the pass larger. Row j of each pass is then one sequence, up to the next change of size, after which nobody knows
   which request stands where. Speculative decoding would break this (several rows a request), so that it is believed
   only where the size also falls by one, which a single request with one row does when it ends.

Whatever else there is (prompts packed together, warm-up) is left out then, with a note. A log in which nothing of this
holds becomes counts per expert, which feed ``load`` and nothing that needs an order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawCounts, RawRequest, Reader, scalar_text
from tracekit.sources.cells import expert_ids, finite_numbers
from tracekit.sources.checks import CHUNK_IDS
from tracekit.sources.files import file_size
from tracekit.sources.jsonio import first_object, records
from tracekit.sources.readers.megatron import count_experts, known_experts, one_by_one

_ROUTE = frozenset({"layer", "token_idx", "topk_ids"})
_META = frozenset({"layers_logged", "top_k"})
_ROWS_AT_ONCE = 1 << 14
_BY_ID = "req_id was taken for the request: ids come back after others"
_BY_ORDER = "token_idx counts all rows of the log: positions are the order of each request's rows"
_SINGLE = "no two passes of several rows follow each other: taken for one request at a time, prompt then output"
_SLOTS = (
    "passes hold several requests: rows at the same place of passes of the same size were joined to sequences, "
    "which end where the size changes; positions count from the first row of each"
)
_PACKED = (
    "the log does not tell requests apart (req_id and token_idx are the pass's): kept as counts per expert, "
    "windows and lags cannot be asked of it"
)

Columns = NDArray[Any]


def _sniff(path: Path, head: bytes) -> bool:
    first = first_object(path, head)
    if first is None:
        return False
    return first.keys() >= _ROUTE or (first.get("type") == "meta" and first.keys() >= _META)


@dataclass(slots=True)
class _Log:
    """A whole log: its routes as records of a temporary file."""

    rows: Columns
    """``[rows]`` with the fields request, token, layer, gap, ids and weights."""
    names: list[str]
    """Values of ``req_id`` by number."""
    weighted: bool
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest | RawCounts]:
    with tempfile.TemporaryFile(prefix="tracekit-") as spool:
        log = _load(path, spool)
        layers = tuple(int(layer) for layer in np.unique(log.rows["layer"]))
        found: Iterator[RawRequest] | None = None
        if _names_requests(log):
            found = _by_request(log, layers, str(path))
        else:
            passes = _passes(log, layers)
            if passes is not None:
                found = _by_pass(log, passes, str(path))
        if found is None:
            yield _as_counts(log, layers, options, path)
            return
        for i, raw in enumerate(found):
            raw.where = str(path)
            raw.axes = "tlk"
            raw.part = raw.part or str(i)
            raw.layer_ids = layers
            raw.engine, raw.engine_version = "vllm", _text(log.meta, "vllm_version")
            raw.model = _text(log.meta, "model_id")
            raw.num_experts = _experts(log.meta, str(path))
            raw.consumed = file_size(path)
            yield raw


def _text(meta: dict[str, Any], key: str) -> str | None:
    value = meta.get(key)
    return scalar_text(value) if isinstance(value, str) else None


def _experts(meta: dict[str, Any], where: str) -> int | None:
    value = meta.get("num_experts")
    if value is not None and type(value) is not int:
        raise SourceError(f"num_experts is {str(value)[:40]}", where=where, expected="a whole number")
    return value


@dataclass(slots=True)
class _Spool:
    """Rows on their way into the file."""

    file: IO[bytes]
    top_k: int
    weighted: bool
    count: int = 0
    scalars: list[tuple[int, int, int, bool]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    @property
    def dtype(self) -> np.dtype[Any]:
        parts: list[Any] = [("request", "i4"), ("token", "i8"), ("layer", "i4"), ("gap", "?")]
        parts.append(("ids", "i4", (self.top_k,)))
        if self.weighted:
            parts.append(("weights", "f4", (self.top_k,)))
        return np.dtype(parts)

    def flush(self) -> None:
        if not self.scalars:
            return
        rows = np.empty(len(self.scalars), self.dtype)
        for at, name in enumerate(("request", "token", "layer", "gap")):
            rows[name] = [row[at] for row in self.scalars]
        rows["ids"] = self.ids
        if self.weighted:
            rows["weights"] = self.weights
        self.file.write(rows.tobytes())
        self.count += len(rows)
        self.scalars, self.ids, self.weights = [], [], []


def _load(path: Path, file: IO[bytes]) -> _Log:
    meta: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    spool: _Spool | None = None
    gap = True
    for where, record, _ in records(path):
        if not isinstance(record, dict):
            raise SourceError(f"is a {type(record).__name__}", where=where, expected="meta and route lines")
        if record.get("type") == "meta" or (not record.keys() >= _ROUTE and record.keys() >= _META):
            meta, gap = meta or record, True
            continue
        if not record.keys() >= _ROUTE:
            raise SourceError("is neither meta nor route", where=where, expected=f"{', '.join(sorted(_ROUTE))}")
        ids, weights = expert_ids(record["topk_ids"], where), record.get("topk_weights")
        if spool is None:
            spool = _Spool(file, len(ids), weights is not None)
        if len(ids) != spool.top_k or (weights is not None) != spool.weighted:
            raise SourceError(
                f"has {len(ids)} experts, {'with' if weights is not None else 'without'} weights, unlike the first",
                where=where,
                expected=f"{spool.top_k} experts in every line",
            )
        values = []
        for key, limit in (("token_idx", 1 << 60), ("layer", 1 << 16)):
            value = record[key]
            if type(value) is not int or not 0 <= value < limit:
                raise SourceError(f"{key} is {str(value)[:40]}", where=where, expected=f"0 to {limit - 1}")
            values.append(value)
        name = scalar_text(record.get("req_id")) or ""
        spool.scalars.append((numbers.setdefault(name, len(numbers)), values[0], values[1], gap))
        spool.ids.append(ids)
        if spool.weighted:
            spool.weights.append(finite_numbers(weights, spool.top_k, where))
        gap = False
        if len(spool.scalars) == _ROWS_AT_ONCE:
            spool.flush()
    if spool is None:
        raise SourceError("has no route line", where=str(path), expected="a log of routing")
    spool.flush()
    file.flush()
    rows = np.memmap(file, spool.dtype, "r", shape=(spool.count,))
    return _Log(np.asarray(rows), list(numbers), spool.weighted, meta)


def _changes(*columns: Columns) -> NDArray[np.int64]:
    """Where a value differs from the one before, the first row included."""
    changed = np.zeros(len(columns[0]), bool)
    changed[0] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changed)


def _names_requests(log: _Log) -> bool:
    """Whether ``req_id`` names requests: some id comes back, and its tokens go on where they stopped."""
    request, layer, token = (np.ascontiguousarray(log.rows[name]) for name in ("request", "layer", "token"))
    if len(log.names) < 2:
        return False
    starts = _changes(request, layer)
    pairs = np.stack([request[starts], layer[starts]])
    if np.unique(pairs, axis=1).shape[1] == pairs.shape[1]:
        return False
    order = np.lexsort((np.arange(len(token)), layer, request))
    same = (np.diff(request[order]) == 0) & (np.diff(layer[order]) == 0)
    return bool((np.diff(token[order])[same] > 0).all())


def _by_request(log: _Log, layers: tuple[int, ...], where: str) -> Iterator[RawRequest]:
    request, layer, token = (np.ascontiguousarray(log.rows[name]) for name in ("request", "layer", "token"))
    order = np.lexsort((token, layer, request))
    first = layer[order] == layers[0]
    counter = len(np.unique(token[order][first])) == int(first.sum())  # no two requests have a token of one number
    bounds = np.append(np.flatnonzero(np.diff(request[order], prepend=-1)), len(order))
    for begin, end in pairwise(bounds):
        rows = order[begin:end]
        tokens, rest = divmod(len(rows), len(layers))
        cube = rows[: tokens * len(layers)].reshape(len(layers), tokens)
        name = log.names[int(request[rows[0]])]
        positions = token[cube[0]] if tokens else np.zeros(0, np.int64)
        if rest or (layer[cube] != np.array(layers)[:, None]).any() or (token[cube] != positions).any():
            raise SourceError(
                f"request {name!r} has not the same tokens in every layer",
                where=where,
                expected=f"{len(layers)} layers of each token",
                remedy="A log cut off while it was written ends like this: cut its last pass",
            )
        counted = counter and len(log.names) > 1
        ids, weights = _taken(log, cube.T)
        whole = counted or int(positions[-1] - positions[0]) + 1 == tokens
        yield RawRequest(
            where=where,
            ids=ids,
            weights=weights,
            request_id=name or None,
            first_pos=0 if counted else int(positions[0]),
            positions=None if whole else positions.astype(np.int64),
            notes=(_BY_ID, _BY_ORDER) if counted else (_BY_ID,),
        )


def _taken(log: _Log, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Ids and weights ``[tokens, layers, k]`` of row numbers ``[tokens, layers]``."""
    return log.rows["ids"][rows], log.rows["weights"][rows] if log.weighted else None


@dataclass(slots=True)
class _Passes:
    """Forward passes: where the rows of each begin, layer by layer, and how many there are."""

    starts: NDArray[np.int64]
    """``[passes, layers]``."""
    sizes: NDArray[np.int64]
    """``[passes]``."""


def _passes(log: _Log, layers: tuple[int, ...]) -> _Passes | None:
    """Tell the passes apart; None where the layers do not agree about them."""
    request, layer, token = (np.ascontiguousarray(log.rows[name]) for name in ("request", "layer", "token"))
    jump = np.cumsum((np.diff(token, prepend=token[0] - 1) != 1) | log.rows["gap"])
    starts = _changes(request, layer, jump)
    sizes = np.diff(np.append(starts, len(token)))
    of_layer = [np.flatnonzero(layer[starts] == number) for number in layers]
    if any(not np.array_equal(sizes[blocks], sizes[of_layer[0]]) for blocks in of_layer):
        return None
    return _Passes(np.stack([starts[blocks] for blocks in of_layer], axis=1), sizes[of_layer[0]])


def _by_pass(log: _Log, passes: _Passes, where: str) -> Iterator[RawRequest] | None:
    """Return the sequences that the passes show; None where they show none."""
    warm = _warm_up(log, passes)
    sizes = passes.sizes[warm:].tolist()
    if one_by_one(sizes):
        return _singles(log, passes, warm, where)
    runs = _runs(passes.sizes.tolist())
    return _slots(log, passes, runs, where) if runs else None


def _warm_up(log: _Log, passes: _Passes) -> int:
    """Count the leading passes whose rows are all the same: an engine profiles itself with them."""
    for number, (start, size) in enumerate(zip(passes.starts[:, 0], passes.sizes, strict=True)):
        ids = log.rows["ids"][start : start + size]
        if size == 1 or (ids != ids[0]).any():
            return number
    return 0


def _left_out(rows: int) -> tuple[str, ...]:
    return (f"{rows} rows of other passes (warm-up, prompts packed together) were left out",) if rows else ()


def _singles(log: _Log, passes: _Passes, warm: int, where: str) -> Iterator[RawRequest]:
    sizes = passes.sizes
    begins = [p for p in range(warm, len(sizes)) if p == warm or sizes[p] > 1]
    notes = (_SINGLE, *_left_out(int(sizes[:warm].sum())))
    for begin, end in pairwise([*begins, len(sizes)]):
        rows = np.concatenate(
            [passes.starts[p] + np.arange(sizes[p])[:, None] for p in range(begin, end)],
        )
        ids, weights = _taken(log, rows)
        prompt = int(sizes[begin])
        yield RawRequest(where=where, ids=ids, weights=weights, prompt_len=prompt if prompt > 1 else None, notes=notes)


def _runs(sizes: list[int]) -> list[tuple[int, int]]:
    """Find the runs of passes of the same size in which a place is one request.

    Parameters
    ----------
    sizes
        Rows of each pass.

    Returns
    -------
    list
        First pass and the one after the last, of runs of at least two.
    """
    found: list[tuple[int, int]] = []
    chain: list[tuple[int, int]] = []
    falls_by_one = False
    begin = 0
    for end in range(1, len(sizes) + 1):
        if end < len(sizes) and sizes[end] == sizes[begin]:
            continue
        if end - begin > 1:
            chain.append((begin, end))
        # A prompt joins where the size rises; a steep fall is the end of prompts, not of requests.
        fall = sizes[begin] - sizes[end] if end < len(sizes) else 0
        falls_by_one = falls_by_one or fall == 1
        if end == len(sizes) or fall < 0 or fall * 2 > sizes[begin]:
            found += [run for run in chain if falls_by_one or sizes[run[0]] == 1]
            chain, falls_by_one = [], False
        begin = end
    return found


def _slots(log: _Log, passes: _Passes, runs: list[tuple[int, int]], where: str) -> Iterator[RawRequest]:
    kept = sum(int(passes.sizes[begin]) * (end - begin) for begin, end in runs)
    notes = (_SLOTS, *_left_out(int(passes.sizes.sum()) - kept))
    for begin, end in runs:
        for slot in range(int(passes.sizes[begin])):
            ids, weights = _taken(log, passes.starts[begin:end] + slot)
            yield RawRequest(
                where=where,
                ids=ids,
                weights=weights,
                part=f"pass{begin}-{end - 1}/{slot}",
                prompt_len=0,
                notes=notes,
            )


def _as_counts(log: _Log, layers: tuple[int, ...], options: IngestOptions, path: Path) -> RawCounts:
    experts = _experts(log.meta, str(path)) or known_experts(options, str(path))
    counts = np.zeros((len(layers), experts), np.int64)
    step = max(1, CHUNK_IDS // log.rows["ids"].shape[1])
    for start in range(0, len(log.rows), step):
        rows = log.rows[start : start + step]
        for entry, layer in enumerate(layers):
            ids = rows["ids"][rows["layer"] == layer]
            if ids.size:
                counts[entry] += count_experts(ids, experts, str(path))
    return RawCounts(
        where=str(path),
        counts=counts,
        layer_ids=layers,
        top_k=log.rows["ids"].shape[1],
        model=_text(log.meta, "model_id"),
        engine="vllm",
        engine_version=_text(log.meta, "vllm_version"),
        notes=(_PACKED,),
        consumed=file_size(path),
    )


READER = Reader(
    name="vllm-log",
    title="VLLM_LOG_MOE logs (meta and route lines), JSON lines",
    example='{"type": "route", "req_id": "r1", "token_idx": 0, "layer": 0, "topk_ids": [43, 5], "topk_weights": […]}',
    sniff=_sniff,
    read=_read,
)
