"""Reader of numpy arrays ``[tokens, layers, k]``: ``.npy``, and ``.npz`` of one request or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawRequest, Reader, scalar_text
from tracekit.sources.files import file_size, reading
from tracekit.sources.npy import MAGIC, Member, map_npy, npy_shape, open_npz

ID_KEYS = ("routed_experts", "expert_ids", "topk_ids", "indices", "rollout_routed_experts")
PROMPT_KEY = "prompt_routed_experts"
_LAYER_KEYS = ("layer_ids", "moe_layer_ids")
_NAME_KEYS = ("request_ids", "request_id")
_KNOWN = frozenset({*ID_KEYS, PROMPT_KEY, *_LAYER_KEYS, "router_weights", "token_ids", "prompt_token_ids"})
_LARGEST_TEXT = 1 << 26
_SHAPES_LOOKED_AT = 32

_GiveRows = Callable[[int], NDArray[Any]]


def _sniff(path: Path, head: bytes) -> bool:
    if head.startswith(MAGIC):
        return True
    if not head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return False
    try:
        archive, members = open_npz(path)
    except SourceError:
        return path.suffix == ".npz"
    archive.close()
    return path.suffix == ".npz" or (bool(members) and all(i.filename.endswith(".npy") for i in members.values()))


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    with reading(str(path)), path.open("rb") as file:
        is_npy = file.read(len(MAGIC)) == MAGIC
    if is_npy:
        yield RawRequest(where=str(path), ids=map_npy(path), consumed=file_size(path))
        return
    with reading(str(path)), _Side(path) as side:
        lens = side.array("request_lens")
        if lens is None:
            yield _one(path, side)
        else:
            yield from _many(path, side, _lengths(lens, side.where), options)


def _lengths(lens: NDArray[Any], where: str) -> list[int]:
    if lens.dtype.kind not in "ui" or lens.ndim != 1:
        raise SourceError(
            f"request_lens is {lens.dtype} of shape {lens.shape}", where=where, expected="one row count per request"
        )
    counts = [int(n) for n in lens]
    if any(n < 0 for n in counts):
        raise SourceError(f"request_lens holds {min(counts)}", where=where, expected="row counts of 0 or more")
    return counts


class _Side:
    """What an ``.npz`` holds: the ids and everything beside them."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        self.archive, self.members = open_npz(path)
        self._open: dict[str, Member] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._open.values():
            member.close()
        self.archive.close()

    def member(self, key: str) -> Member | None:
        if key not in self.members:
            return None
        if key not in self._open:
            self._open[key] = Member(self.path, self.archive, self.members[key])
        return self._open[key]

    def array(self, key: str) -> NDArray[Any] | None:
        member = self.member(key)
        return None if member is None else member.load()

    def ints(self, key: str) -> NDArray[np.int64] | None:
        array = self.array(key)
        if array is None:
            return None
        if array.dtype.kind not in "ui" or array.ndim > 1:
            raise SourceError(
                f"{key} is {array.dtype} of shape {array.shape}", where=self.where, expected="whole numbers, one axis"
            )
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise SourceError(f"{key} holds {array.max()}", where=self.where, expected="numbers that fit 63 bits")
        return array.astype(np.int64)

    def scalar(self, key: str) -> int | None:
        array = self.ints(key)
        if array is None:
            return None
        if array.size != 1:
            raise SourceError(f"{key} has {array.size} entries", where=self.where, expected="one number")
        return int(array.reshape(-1)[0])

    def layer_ids(self) -> tuple[int, ...] | None:
        for key in _LAYER_KEYS:
            array = self.ints(key)
            if array is not None:
                return tuple(int(n) for n in array.reshape(-1))
        return None

    def id_members(self) -> list[Member]:
        """Return the routing array, or the prompt part and the output part to be joined."""
        keys = [key for key in ID_KEYS if key in self.members]
        if len(keys) > 1:
            raise SourceError(
                f"holds {len(keys)} routing arrays: {', '.join(keys)}", where=self.where, expected="one of them"
            )
        if PROMPT_KEY in self.members:
            keys.insert(0, PROMPT_KEY)
        if keys:
            return [member for key in keys if (member := self.member(key)) is not None]
        others = {key: member for key in self.members if (member := self.member(key)) is not None}
        cubes = [member for member in others.values() if len(member.shape) == 3 and member.dtype.kind in "ui"]
        if len(cubes) == 1:
            return cubes
        held = ", ".join(f"{key} {member.shape}" for key, member in others.items())
        raise SourceError(
            f"holds no routing array ({held or 'no arrays at all'})",
            where=self.where,
            expected=f"one named {', '.join(ID_KEYS)}",
        )

    def texts(self, requests: int | None) -> dict[str, list[str]]:
        """Strings beside the ids: scalars, and arrays with one entry per request."""
        found: dict[str, list[str]] = {}
        for key, info in self.members.items():
            if info.file_size > _LARGEST_TEXT or not info.filename.endswith(".npy") or key in _KNOWN:
                continue
            member = self.member(key)
            if member is None or member.dtype.kind not in "US":
                continue
            if member.shape != () and (requests is None or member.shape != (requests,)):
                continue
            values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in member.load().reshape(-1)]
            found[key] = [scalar_text(str(v)) or "" for v in values]
        return found


def _one(path: Path, side: _Side) -> RawRequest:
    parts = [member.load() for member in side.id_members()]
    prompt_rows = None
    if len(parts) == 2:
        prompt, output = parts
        if prompt.ndim != 3 or prompt.shape[1:] != output.shape[1:] or "f" in (prompt.dtype.kind, output.dtype.kind):
            raise SourceError(
                f"{PROMPT_KEY} {prompt.shape} and the output part {output.shape} do not join", where=side.where
            )
        prompt_rows = len(prompt)
        ids: NDArray[Any] = np.concatenate(parts)
    else:
        ids = parts[0]
        prompt_rows = len(ids) if PROMPT_KEY in side.members and ids.ndim == 3 else None
    prompt_ids = side.ints("prompt_token_ids")
    prompt_len = _agreed(
        side.where,
        prompt_len=side.scalar("prompt_len"),
        prompt_token_ids=None if prompt_ids is None else prompt_ids.size,
        **{PROMPT_KEY: prompt_rows},
    )
    texts = {key: values[0] for key, values in side.texts(None).items()}
    weights = side.member("router_weights")
    if weights is not None and weights.shape != ids.shape:
        raise SourceError(f"router_weights {weights.shape} beside ids {ids.shape}", where=side.where)
    raw = RawRequest(
        where=side.where,
        ids=ids,
        request_id=next((texts[key] for key in _NAME_KEYS if key in texts), None),
        axes="tlk" if prompt_rows is not None else None,
        prompt_len=prompt_len,
        output_len=side.scalar("output_len"),
        weights=None if weights is None else weights.load(),
        fields=texts,
        layer_ids=side.layer_ids(),
        num_experts=side.scalar("num_experts"),
        model=texts.get("model"),
        consumed=file_size(path),
    )
    _sequence(raw, side.ints("token_ids"), prompt_ids)
    return raw


def _agreed(where: str, **said: int | None) -> int | None:
    """Return the one number that several fields state, or raise an error that names who says what."""
    known = {key: value for key, value in said.items() if value is not None}
    if len(set(known.values())) > 1:
        claims = ", ".join(f"{key} says {value}" for key, value in known.items())
        raise SourceError(f"contradicts itself about the prompt's length: {claims}", where=where)
    return next(iter(known.values()), None)


def _sequence(raw: RawRequest, tokens: NDArray[np.int64] | None, prompt: NDArray[np.int64] | None) -> None:
    """Decide by lengths whether ``token_ids`` is the whole sequence or the output, as a RequestOutput has it.

    A capture has a row for every token but the last sampled one; a forward pass over a
    finished text has one for that too.
    """
    P, N = raw.prompt_len, raw.output_len
    if P is not None and N is not None:
        raw.expected_rows = P + max(N - 1, 0)
    if tokens is None:
        return
    n = tokens.size
    if P is not None and (n == N or (N is None and not _is_whole(raw.ids, tokens, P, prompt))):
        raw.output_len, raw.expected_rows = n, P + max(n - 1, 0)
        raw.token_ids = np.concatenate([prompt, tokens]) if prompt is not None else None
    elif P is None or N is None or n == P + N:
        raw.token_ids = tokens
        if raw.expected_rows is None:
            raw.expected_rows = n if n in raw.ids.shape and n - 1 not in raw.ids.shape else n - 1
    else:
        raise SourceError(
            f"{n} token_ids fit neither the whole sequence ({P} prompt + {N} output) nor the output ({N})",
            where=raw.where,
        )


def _is_whole(ids: NDArray[Any], tokens: NDArray[np.int64], prompt_len: int, prompt: NDArray[np.int64] | None) -> bool:
    """Whether ``tokens`` is the whole sequence of these rows, and not the output after the prompt."""
    n = tokens.size
    if n <= prompt_len or prompt_len + n - 1 in ids.shape or not {n, n - 1} & set(ids.shape):
        return False
    return prompt is None or bool((tokens[:prompt_len] == prompt).all())


def _many(path: Path, side: _Side, lens: Sequence[int], options: IngestOptions) -> Iterator[RawRequest]:
    members = side.id_members()
    if len(members) > 1:
        raise SourceError(f"joins {PROMPT_KEY} with request_lens, which is not a known layout", where=side.where)
    ids, count, total = members[0], len(lens), sum(lens)
    axis = _token_axis(ids, total, options, side.where)
    per_request = {key: side.ints(key) for key in ("prompt_len", "output_len", "first_pos")}
    for key, values in per_request.items():
        if values is not None and values.size not in (1, count):
            raise SourceError(f"{key} has {values.size} entries for {count} requests", where=side.where)
    texts = side.texts(count)
    weights = side.member("router_weights")
    if weights is not None and weights.shape != ids.shape:
        raise SourceError(f"router_weights {weights.shape} beside ids {ids.shape}", where=side.where)
    layer_ids, num_experts = side.layer_ids(), side.scalar("num_experts")
    next_tokens = _token_rows(side, count, total)
    next_ids = _row_giver(ids, axis)
    next_weights = None if weights is None else _row_giver(weights, axis)
    size, done = file_size(path), 0

    def number(key: str, i: int) -> int | None:
        values = per_request[key]
        return None if values is None else int(values.reshape(-1)[i if values.size == count else 0])

    for i, rows in enumerate(lens):
        done += rows
        fields = {key: values[i if len(values) == count else 0] for key, values in texts.items()}
        prompt_len, output_len = number("prompt_len", i), number("output_len", i)
        raw = RawRequest(
            where=side.where,
            ids=next_ids(rows),
            request_id=next((fields[key] for key in _NAME_KEYS if len(texts.get(key, ())) == count), None),
            part=str(i),
            token_axis=axis,
            prompt_len=prompt_len,
            output_len=output_len,
            first_pos=number("first_pos", i),
            weights=None if next_weights is None else next_weights(rows),
            fields=fields,
            layer_ids=layer_ids,
            num_experts=num_experts,
            model=fields.get("model"),
            consumed=size * done // max(total, 1),
        )
        if prompt_len is not None and output_len is not None:
            raw.expected_rows = prompt_len + max(output_len - 1, 0)
        if next_tokens is not None:
            raw.token_ids, raw.tokens_by_row = next_tokens(rows), True
        yield raw


def _token_axis(ids: Member, total: int, options: IngestOptions, where: str) -> int:
    """Return the axis that request_lens cuts: the one whose size it adds up to."""
    if len(ids.shape) != 3:
        raise SourceError(f"ids have shape {ids.shape}", where=where, expected="three axes [tokens, layers, k]")
    if options.axes is not None and "t" in options.axes and len(options.axes) == 3:
        axis = options.axes.index("t")
    else:
        axis = next((axis for axis, size in enumerate(ids.shape) if size == total), 0)
    if ids.shape[axis] != total:
        raise SourceError(
            f"request_lens adds up to {total} rows but the ids have shape {ids.shape}",
            where=where,
            expected="request lengths that add up to the number of tokens",
        )
    return axis


def _row_giver(member: Member, axis: int) -> _GiveRows:
    if axis == 0:
        return member.rows()
    array, done = member.load(), 0

    def give(count: int) -> NDArray[Any]:
        nonlocal done
        done += count
        return array[(slice(None),) * axis + (slice(done - count, done),)]

    return give


def _token_rows(side: _Side, count: int, total: int) -> _GiveRows | None:
    """Token ids of many requests: one a row, or one more a request (its last sampled token)."""
    tokens = side.ints("token_ids")
    if tokens is None:
        return None
    if tokens.size not in (total, total + count):
        raise SourceError(
            f"{tokens.size} token_ids for {count} requests of {total} rows",
            where=side.where,
            expected=f"{total}, or {total + count} with the last sampled token of each request",
        )
    extra, done = (1 if tokens.size == total + count else 0), 0

    def give(rows: int) -> NDArray[Any]:
        nonlocal done
        done += rows + extra
        return tokens[done - rows - extra : done]

    return give


def varying_axis(paths: Sequence[Path]) -> int | None:
    """Return the one axis whose size differs between the single-request arrays of a folder: the tokens.

    None where something else may differ: the last axis would be top-k, and a middle axis shorter
    than the first one layers.
    """
    shapes: set[tuple[int, ...]] = set()
    for path in paths[:_SHAPES_LOOKED_AT]:
        if path.suffix == ".npy":
            shapes.add(npy_shape(path))
            continue
        with _Side(path) as side:
            if "request_lens" in side.members:
                return None
            shapes.update(member.shape for member in side.id_members())
    if len(shapes) < 2 or {len(shape) for shape in shapes} != {3}:
        return None
    axes = [axis for axis in range(3) if len({shape[axis] for shape in shapes}) > 1]
    if axes == [0] or (axes == [1] and all(shape[1] >= shape[0] for shape in shapes)):
        return axes[0]
    return None


READER = Reader(
    name="arrays",
    title="numpy arrays [tokens, layers, k]: .npy, .npz, or a folder of them",
    example="numpy.savez('req0.npz', routed_experts=ids, prompt_len=P, token_ids=tokens)",
    sniff=_sniff,
    read=_read,
)
