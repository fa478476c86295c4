"""Reader of tables with a row per forward pass of a request, rejected drafts included: Parquet.

What a patched engine or an own speculative decoder logs: where the pass starts (``start_pos``), its routing
(``experts``, all rows of the pass one after the other, ``[rows, layers, k]``, as a list or as bytes), and what became
of its drafts. Two forms are told by their columns:

* verification steps alone: ``n_accepted``; routing begins with the first step;
* every pass of an engine: ``n_rejected``; passes that start behind the prompt are verification steps, the prompt ends
  where the first token is sampled (``n_sampled``) or as ``prompt_len`` says.

Of a draft tree ``depth`` says for each row how far it is from the first one, and ``kept`` which rows were kept. The
passes of requests may take turns, so a table is held in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import VerifySteps, id_dtype
from tracekit.sources.base import IngestOptions, RawRequest, Reader, scalar_text
from tracekit.sources.files import file_size
from tracekit.sources.tables import PARQUET, Block, Place, floats, integers, parquet_blocks, parquet_schema

if TYPE_CHECKING:
    import polars as pl

_START, _EXPERTS, _ACCEPTED, _REJECTED = "start_pos", "experts", "n_accepted", "n_rejected"
_SAMPLED, _PROMPT, _WEIGHTS, _DEPTH, _KEPT = "n_sampled", "prompt_len", "router_weights", "depth", "kept"
_REQUEST = ("request_id", "engine_request_id", "request")
_ROWS = {"n_tokens": 0, "n_rows": 0, "n_drafted": 1}
"""Columns that give the rows of a pass, and what they leave out."""
_FREE_VALUES, _VALUES_PER_BYTE = 1 << 24, 256
"""Values that a file may hold beyond those that its bytes pay for."""
_LARGEST = 1 << 32


@dataclass(slots=True)
class _Table:
    """Every pass of the file, in its order."""

    columns: dict[str, NDArray[np.int64]]
    """Whole numbers ``[passes]``; ``rows`` is the rows of each."""
    requests: NDArray[np.int64]
    """``[passes]`` index into ``names``."""
    names: list[str]
    labels: list[dict[str, str]]
    """Texts beside the first pass of each request."""
    ids: NDArray[Any]
    """``[rows, layers, k]``."""
    weights: NDArray[np.float32] | None
    depth: NDArray[np.int64] | None
    """``[rows]``, as ``kept``."""
    kept: NDArray[np.int64] | None

    @property
    def accepted(self) -> NDArray[np.int64]:
        """``[passes]`` drafts accepted."""
        if _ACCEPTED in self.columns:
            return self.columns[_ACCEPTED]
        return self.columns["rows"] - 1 - self.columns[_REJECTED]


def _sniff(path: Path, head: bytes) -> bool:
    if not head.startswith(PARQUET):
        return False
    schema = parquet_schema(path)
    return {_START, _EXPERTS} <= set(schema) and bool({_ACCEPTED, _REJECTED} & set(schema))


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    table = _load(path, options)
    order = np.argsort(table.requests, kind="stable")
    first = np.searchsorted(table.requests[order], np.arange(len(table.names) + 1))
    row_of = np.cumsum(table.columns["rows"]) - table.columns["rows"]
    drafted = bool((_steps_of(table) & (table.columns["rows"] > 1)).any())
    size = file_size(path)
    for number, name in enumerate(table.names):
        passes = order[first[number] : first[number + 1]]
        where = f"{path}, request {name!r}"
        yield _request(table, passes, row_of, name, drafted, where, size * (number + 1) // len(table.names))


def _request(
    table: _Table, passes: NDArray[np.int64], row_of: NDArray[np.int64], name: str, drafted: bool, where: str, done: int
) -> RawRequest:
    """Return one request: the rows that were kept, and its verification steps."""
    start, rows = table.columns[_START][passes], table.columns["rows"][passes]
    numbers = np.concatenate([np.arange(row_of[p], row_of[p] + n) for p, n in zip(passes, rows, strict=True)])
    every = VerifySteps(
        start_pos=start,
        n_rows=rows,
        n_accepted=table.accepted[passes],
        ids=table.ids[numbers],
        weights=None if table.weights is None else table.weights[numbers],
        depth=None if table.depth is None else table.depth[numbers],
        kept=None if table.kept is None else np.clip(table.kept[numbers], -2, 2).astype(np.int8),
    )
    kept = np.flatnonzero(every.kept_rows == 1)
    positions = (np.repeat(start, rows) + every.depths)[kept]
    # What was preempted is run again: the last row of a position is the one that stayed.
    positions, last = np.unique(positions[::-1], return_index=True)
    kept = kept[::-1][last]
    if not len(positions):
        raise SourceError("has no row that was kept", where=where, expected="the last committed token in every step")
    if positions[0] < 0 or positions[-1] >= _LARGEST:
        raise SourceError(
            f"has rows at positions {positions[0]} to {positions[-1]}", where=where, expected="0 to 2^32 - 1"
        )
    gapless = int(positions[-1]) - int(positions[0]) + 1 == len(positions)
    steps = _steps_of(table)[passes]
    return RawRequest(
        where=where,
        ids=every.ids[kept],
        request_id=name,
        axes="tlk",
        prompt_len=_prompt(table, passes),
        first_pos=int(positions[0]),
        positions=None if gapless else positions,
        weights=None if every.weights is None else every.weights[kept],
        steps=every.take(steps) if drafted and steps.any() else None,
        fields=table.labels[table.requests[passes[0]]],
        consumed=done,
    )


def _prompt(table: _Table, passes: NDArray[np.int64]) -> int | None:
    """Return where the prompt of the request with these passes ends."""
    if _PROMPT in table.columns:
        return int(table.columns[_PROMPT][passes[0]])
    if _SAMPLED not in table.columns:
        return None
    sampled = passes[table.columns[_SAMPLED][passes] > 0]
    if not len(sampled):
        return int((table.columns[_START] + table.columns["rows"])[passes].max())
    return int(table.columns[_START][sampled[0]] + table.columns["rows"][sampled[0]])


def _steps_of(table: _Table) -> NDArray[np.bool_]:
    """Return which passes are verification steps, ``[passes]``."""
    if _ACCEPTED in table.columns:
        return np.ones(len(table.requests), bool)
    found = np.zeros(len(table.requests), bool)
    end = np.zeros(len(table.names), np.int64)
    """Per request the position that follows its prompt or its last step."""
    order = np.argsort(table.requests, kind="stable")
    first = np.searchsorted(table.requests[order], np.arange(len(table.names) + 1))
    for number in range(len(table.names)):
        end[number] = _prompt(table, order[first[number] : first[number + 1]]) or 0
    start, following = table.columns[_START], table.columns[_START] + table.accepted + 1
    for one, number in enumerate(table.requests.tolist()):
        if start[one] >= end[number]:  # else it is prefill, or what was preempted is run again
            found[one] = True
            end[number] = following[one]
    return found


def _load(path: Path, options: IngestOptions) -> _Table:
    schema = parquet_schema(path)
    request = next((name for name in _REQUEST if name in schema), None)
    counted = [name for name in _ROWS if name in schema][:1]
    outcome = _ACCEPTED if _ACCEPTED in schema else _REJECTED
    numbers = [_START, outcome, *counted, *(name for name in (_SAMPLED, _PROMPT) if name in schema)]
    if request is None or not counted or (outcome == _REJECTED and not {_SAMPLED, _PROMPT} & set(schema)):
        raise SourceError(
            f"has the columns {', '.join(schema)[:200]}",
            where=str(path),
            expected="request_id, start_pos, experts, the rows of a pass (n_tokens, or n_drafted), and n_accepted; or "
            "n_rejected with n_sampled or prompt_len",
        )
    lists = [name for name in (_WEIGHTS, _DEPTH, _KEPT) if name in schema]
    texts = [n for n, kind in schema.items() if _is_text(kind) and n not in (request, *numbers, *lists, _EXPERTS)]
    held: dict[str, list[NDArray[Any]]] = {name: [] for name in [*numbers, *lists, _EXPERTS]}
    names: dict[str, int] = {}
    labels: list[dict[str, str]] = []
    of: list[int] = []
    total, most = 0, _FREE_VALUES + _VALUES_PER_BYTE * file_size(path)
    for block in parquet_blocks(path, [request, *numbers, *lists, _EXPERTS, *texts]):
        place, frame = Place(path, block.first, False), block.frame
        for name in numbers:
            held[name].append(_bounded(integers(frame[name], place), name, place))
        rows = held[counted[0]][-1] + _ROWS[counted[0]]
        total += sum(int(_lengths(frame[name]).sum()) for name in (*lists, _EXPERTS))
        if total > most:
            raise SourceError(
                f"unpacks {file_size(path)} bytes to {total} values or more: constant filler, not routing",
                where=str(path),
                expected="a real trace",
            )
        for name in (*lists, _EXPERTS):
            held[name].append(_flat(frame[name], name, rows, options, place))
        _name(block, request, texts, names, labels, of)
    if not of:
        raise SourceError("has no pass", where=str(path), expected="a row per forward pass of a request")
    columns = {name: np.concatenate(held[name]) for name in numbers}
    columns["rows"] = columns[counted[0]] + _ROWS[counted[0]]
    flat = {name: np.concatenate(held[name]) for name in (*lists, _EXPERTS)}
    _check(columns, outcome, path)
    shape = _shape(columns["rows"], flat[_EXPERTS], options, path)
    wrong = next(
        (name for name in lists if len(flat[name]) != (np.prod(shape) if name == _WEIGHTS else shape[0])), None
    )
    if wrong is not None:
        raise SourceError(
            f"has {len(flat[wrong])} values of {wrong} for {shape[0]} rows of {shape[1]} layers with k = {shape[2]}",
            where=str(path),
            expected="one for each expert" if wrong == _WEIGHTS else "one for each row",
        )
    return _Table(
        columns=columns,
        requests=np.array(of),
        names=list(names),
        labels=labels,
        ids=flat[_EXPERTS].reshape(shape),
        weights=flat[_WEIGHTS].astype(np.float32).reshape(shape) if _WEIGHTS in flat else None,
        depth=flat.get(_DEPTH),
        kept=flat.get(_KEPT),
    )


def _is_text(kind: pl.DataType) -> bool:
    import polars as pl

    return isinstance(kind, pl.String | pl.Categorical | pl.Enum)


def _name(
    block: Block, request: str, texts: list[str], names: dict[str, int], labels: list[dict[str, str]], of: list[int]
) -> None:
    """Give each pass of a block the number of its request: requests count in the order of their first passes."""
    beside = block.frame.select(texts).rows(named=True) if texts else None
    for row, value in enumerate(block.frame[request].to_list()):
        name = scalar_text(value)
        if name is None:
            raise SourceError(
                f"{request} is {value!r}", where=f"row {block.first + row}", expected="a text or a number"
            )
        if name not in names:
            names[name] = len(names)
            found = {} if beside is None else {key: scalar_text(text) for key, text in beside[row].items()}
            labels.append({key: text for key, text in found.items() if text is not None})
        of.append(names[name])


def _bounded(values: NDArray[np.int64], name: str, place: Place) -> NDArray[np.int64]:
    wrong = (values < 0) | (values >= _LARGEST)
    if values.ndim != 1 or wrong.any():
        row = int(np.argmax(wrong)) if values.ndim == 1 else 0
        raise SourceError(f"{name} is {values[row]}", where=place.row(row), expected="a whole number from 0 on")
    return values


def _lengths(column: pl.Series) -> NDArray[np.int64]:
    """Return how many values, or bytes, each row of a column of lists has; nothing of what is no list."""
    import polars as pl

    if column.dtype == pl.Binary:
        sizes = column.bin.size()
    elif isinstance(column.dtype, pl.List | pl.Array):
        sizes = (column.list if isinstance(column.dtype, pl.List) else column.arr).len()
    else:
        return np.zeros(0, np.int64)
    return sizes.fill_null(0).cast(pl.Int64).to_numpy()


def _flat(
    column: pl.Series, name: str, rows: NDArray[np.int64], options: IngestOptions, place: Place
) -> NDArray[np.int64] | NDArray[Any]:
    """Return the values of lists one after the other, after checking that lists grow with the rows of the pass."""
    import polars as pl

    if column.null_count():
        raise SourceError(f"{name} is empty", where=place.row(int(column.is_null().arg_max() or 0)), expected="a list")
    lengths = _lengths(column)
    if column.dtype == pl.Binary:
        known = options.num_experts or (options.config.num_experts if options.config else None)
        if known is None:
            raise SourceError(
                f"{name} are bytes, and how many experts a layer has is not known",
                where=str(place.path),
                remedy="Give --num-experts N, or --config config.json of the model: up to 256 take a byte an id",
            )
        size = np.dtype(id_dtype(known)).itemsize
        values: NDArray[Any] = np.frombuffer(b"".join(column.to_list()), np.uint8)
        lengths, odd = lengths // size, lengths % size != 0
        values = values if size == 1 or odd.any() else values.view("<u2")
    elif isinstance(column.dtype, pl.List | pl.Array):
        odd = lengths == 0
        inner = column.explode()
        values = (
            floats(inner, place)
            if name == _WEIGHTS
            else integers(inner.cast(pl.Int8) if inner.dtype == pl.Boolean and name == _KEPT else inner, place)
        )
        if name == _EXPERTS and len(values) and values.min() >= 0 and values.max() < 1 << 16:
            values = values.astype(np.uint16)
    else:
        raise SourceError(f"{name} is {column.dtype}", where=str(place.path), expected="lists, or bytes")
    # Every row of a pass has as many values.
    odd |= lengths * rows[0] != lengths[0] * rows if len(rows) else False
    if odd.any():
        row = int(np.argmax(odd))
        raise SourceError(
            f"{name} has {lengths[row]} values for {rows[row]} rows",
            where=place.row(row),
            expected="as many for each row of a pass as in the passes before",
        )
    return values


def _check(columns: dict[str, NDArray[np.int64]], outcome: str, path: Path) -> None:
    """Check the numbers of each pass against each other."""
    rows, drafts = columns["rows"], columns[outcome]
    for wrong, found in ((rows < 1, "0 rows"), (drafts >= rows, f"as many {outcome.replace('n_', '')} drafts as rows")):
        if wrong.any():
            raise SourceError(
                f"has {found}",
                where=f"{path}, row {int(np.argmax(wrong))}",
                expected="the last committed token and its drafts, which alone can be rejected",
            )


def _shape(rows: NDArray[np.int64], ids: NDArray[Any], options: IngestOptions, path: Path) -> tuple[int, int, int]:
    """Return rows, layers and k of all passes."""
    total = int(rows.sum())
    width, rest = divmod(len(ids), total)
    top_k = options.top_k or (options.config.top_k if options.config else None)
    if top_k is None:
        raise SourceError(
            f"has {width} experts for each row, and how many of them are a layer's is not known",
            where=str(path),
            remedy="Give --top-k K, or --config config.json of the model",
        )
    if rest or width % top_k or not width:
        raise SourceError(
            f"has {len(ids)} experts for {total} rows", where=str(path), expected=f"{top_k} for each row and layer"
        )
    return total, width // top_k, top_k


READER = Reader(
    name="step-table",
    title="Verification steps, or all passes of an engine, as a Parquet table, rejected drafts included",
    example="request_id, start_pos, n_drafted, n_accepted, experts; or request_id, start_pos, n_tokens, n_sampled, "
    "n_rejected, experts",
    sniff=_sniff,
    read=_read,
    beside=True,
)
