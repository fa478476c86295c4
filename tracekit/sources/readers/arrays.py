"""Reader of arrays ``[tokens, layers, k]``: ``.npy``, ``.npz``, ``.safetensors`` and ``.pt``, one request or many."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import IngestOptions, RawPredictions, RawRequest, Reader
from tracekit.sources.batches import SIDE_KEYS, cut_batch
from tracekit.sources.bundle import TORCH_VALUES, Bundle, Item, as_item
from tracekit.sources.files import file_size, read_head, reading
from tracekit.sources.npy import MAGIC, map_npy, npy_shape, open_npz
from tracekit.sources.safetensors import is_safetensors, read_safetensors
from tracekit.sources.torchfile import is_torch, load_torch

ID_KEYS = ("routed_experts", "expert_ids", "topk_ids", "indices", "rollout_routed_experts")
PROMPT_KEY = "prompt_routed_experts"
_LAYER_KEYS = ("layer_ids", "moe_layer_ids")
_NAME_KEYS = ("request_ids", "request_id")
_KNOWN = frozenset({*ID_KEYS, PROMPT_KEY, *_LAYER_KEYS, "router_weights", "token_ids", "prompt_token_ids", *SIDE_KEYS})
_PREDICTED = re.compile(r"predicted(?:_([a-z][a-z0-9_]*)_)?([1-9][0-9]{0,3})")
"""Arrays of predictions: ``predicted1``, or with the predictor's name ``predicted_NAME_1``, by the distance."""
_NEXT_GATE = "next_gate"
"""The predictor of arrays that name none."""
_SHAPES_LOOKED_AT = 32

_GiveRows = Callable[[int], NDArray[Any]]


def _sniff(path: Path, head: bytes) -> bool:
    if head.startswith(MAGIC):
        return True
    if is_safetensors(head):
        return any(key in read_safetensors(path)[0] for key in (*ID_KEYS, PROMPT_KEY))
    if is_torch(path, head):
        content = load_torch(path)
        if isinstance(content, dict):
            return any(key in content for key in (*ID_KEYS, PROMPT_KEY))
        return isinstance(content, TORCH_VALUES) and len(content.shape) >= 3
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
        ids = map_npy(path)
        if ids.ndim == 4:
            yield from _batch(None, ids, options, str(path))
        else:
            yield RawRequest(where=str(path), ids=ids, consumed=file_size(path))
        return
    with reading(str(path)), Bundle(path, read_head(path)) as side:
        lens = side.array("request_lens")
        if lens is not None:
            yield from _many(path, side, _lengths(lens, path, side.where), options)
            return
        items = _id_items(side)
        if len(items) == 1 and len(items[0].shape) == 4:
            yield from _batch(side, items[0].load(), options)
        else:
            yield _one(path, side, items)


def _batch(side: Bundle | None, ids: NDArray[Any], options: IngestOptions, where: str = "") -> Iterator[RawRequest]:
    """Cut a padded batch into its requests; ``options.axes`` may not reorder it."""
    where = where if side is None else side.where
    if options.axes not in (None, "tlk"):
        raise SourceError(
            f"a batch of shape {ids.shape} with --axes {options.axes}",
            where=where,
            expected="[requests, tokens, layers, k]",
            remedy="Transpose it before saving",
        )
    beside: dict[str, NDArray[Any]] = {}
    if side is not None:
        found = {key: side.array(key) for key in SIDE_KEYS}
        beside = {key: array for key, array in found.items() if array is not None and array.dtype.kind in "uib"}
    layer_ids = None if side is None else layer_ids_of(side)
    num_experts = None if side is None else side.scalar("num_experts")
    fields = {} if side is None else {key: values[0] for key, values in side.texts(None, _KNOWN).items()}
    predicted = [] if side is None else [(name, far, item.load()) for name, far, item in _predicted_items(side)]
    for name, far, array in predicted:
        if array.shape[:3] != ids.shape[:3] or array.ndim != 4:
            raise _unlike(name, far, array.shape, ids.shape, where)
    size = 0 if side is None else file_size(side.path)
    for i, cut in enumerate(cut_batch(ids, beside, where)):
        yield RawRequest(
            where=where,
            ids=ids[i, cut.first : cut.last],
            part=str(i),
            axes="tlk",
            prompt_len=cut.prompt_len,
            token_ids=cut.token_ids,
            predictions=tuple(
                RawPredictions(name, far, array[i, cut.first : cut.last]) for name, far, array in predicted
            ),
            fields=fields,
            layer_ids=layer_ids,
            num_experts=num_experts,
            model=fields.get("model"),
            consumed=size * (i + 1) // ids.shape[0],
        )


def _lengths(lens: NDArray[Any], path: Path, where: str) -> list[int]:
    if lens.dtype.kind not in "ui" or lens.ndim != 1:
        raise SourceError(
            f"request_lens is {lens.dtype} of shape {lens.shape}", where=where, expected="one row count per request"
        )
    if lens.size > file_size(path):
        raise SourceError(
            f"request_lens has {lens.size} entries, more than the file has bytes", where=where, expected="real requests"
        )
    counts = [int(n) for n in lens]
    if any(n < 0 for n in counts):
        raise SourceError(f"request_lens holds {min(counts)}", where=where, expected="row counts of 0 or more")
    return counts


def layer_ids_of(side: Bundle) -> tuple[int, ...] | None:
    """Return the layer numbers that a file gives beside its routing."""
    for key in _LAYER_KEYS:
        array = side.ints(key)
        if array is not None:
            return tuple(int(n) for n in array.reshape(-1))
    return None


def _id_items(side: Bundle) -> list[Item]:
    """Return the routing array, or the prompt part and the output part to be joined."""
    keys = [key for key in ID_KEYS if key in side]
    if len(keys) > 1:
        raise SourceError(
            f"holds {len(keys)} routing arrays: {', '.join(keys)}", where=side.where, expected="one of them"
        )
    if PROMPT_KEY in side:
        keys.insert(0, PROMPT_KEY)
    if keys:
        return [item for key in keys if (item := side.item(key)) is not None]
    single = as_item(side.content, side.where)
    if single is not None:
        return [single]
    others = {key: item for key in side.names() if (item := side.item(key)) is not None}
    cubes = [
        item
        for key, item in others.items()
        if len(item.shape) in (3, 4) and item.dtype.kind in "ui" and not _PREDICTED.fullmatch(key)
    ]
    if len(cubes) == 1:
        return cubes
    held = ", ".join(f"{key} {item.shape}" for key, item in list(others.items())[:16])
    raise SourceError(
        f"holds no routing array ({held or 'no arrays at all'})",
        where=side.where,
        expected=f"one named {', '.join(ID_KEYS)}",
    )


def _predicted_items(side: Bundle) -> list[tuple[str, int, Item]]:
    """Return the arrays of predictions: predictor, MoE layers ahead, and the array."""
    found = []
    for key in side.names():
        match, item = _PREDICTED.fullmatch(key), side.item(key) if key.startswith("predicted") else None
        if match is not None and item is not None:
            found.append((match[1] or _NEXT_GATE, int(match[2]), item))
    return found


def _unlike(name: str, far: int, found: tuple[int, ...], ids: tuple[int, ...], where: str) -> SourceError:
    return SourceError(
        f"predictions of {name!r} from {far} MoE layers before have shape {found}, the ids {ids}",
        where=where,
        expected="the same shape but for the number of experts",
    )


def _one(path: Path, side: Bundle, items: Sequence[Item]) -> RawRequest:
    parts = [item.load() for item in items]
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
        prompt_rows = len(ids) if PROMPT_KEY in side and ids.ndim == 3 else None
    prompt_ids = side.ints("prompt_token_ids")
    prompt_len = _agreed(
        side.where,
        prompt_len=side.scalar("prompt_len"),
        prompt_token_ids=None if prompt_ids is None else prompt_ids.size,
        **{PROMPT_KEY: prompt_rows},
    )
    texts = {key: values[0] for key, values in side.texts(None, _KNOWN).items()}
    weights = side.item("router_weights")
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
        predictions=tuple(RawPredictions(name, far, item.load()) for name, far, item in _predicted_items(side)),
        fields=texts,
        layer_ids=layer_ids_of(side),
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


def _many(path: Path, side: Bundle, lens: Sequence[int], options: IngestOptions) -> Iterator[RawRequest]:
    members = _id_items(side)
    if len(members) > 1:
        raise SourceError(f"joins {PROMPT_KEY} with request_lens, which is not a known layout", where=side.where)
    ids, count, total = members[0], len(lens), sum(lens)
    axis = _token_axis(ids, total, options, side.where)
    per_request = {key: side.ints(key) for key in ("prompt_len", "output_len", "first_pos")}
    for key, values in per_request.items():
        if values is not None and values.size not in (1, count):
            raise SourceError(f"{key} has {values.size} entries for {count} requests", where=side.where)
    texts = side.texts(count, _KNOWN)
    weights = side.item("router_weights")
    if weights is not None and weights.shape != ids.shape:
        raise SourceError(f"router_weights {weights.shape} beside ids {ids.shape}", where=side.where)
    layer_ids, num_experts = layer_ids_of(side), side.scalar("num_experts")
    next_tokens = _token_rows(side, count, total)
    next_ids = _row_giver(ids, axis)
    next_weights = None if weights is None else _row_giver(weights, axis)
    predicted = _predicted_items(side)
    for name, far, item in predicted:
        if len(item.shape) != 3 or item.shape[axis] != total:
            raise _unlike(name, far, item.shape, ids.shape, side.where)
    next_predicted = [(name, far, _row_giver(item, axis)) for name, far, item in predicted]
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
            predictions=tuple(RawPredictions(name, far, give(rows)) for name, far, give in next_predicted),
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


def _token_axis(ids: Item, total: int, options: IngestOptions, where: str) -> int:
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


def _row_giver(member: Item, axis: int) -> _GiveRows:
    if axis == 0:
        return member.rows()
    array, done = member.load(), 0

    def give(count: int) -> NDArray[Any]:
        nonlocal done
        done += count
        return array[(slice(None),) * axis + (slice(done - count, done),)]

    return give


def _token_rows(side: Bundle, count: int, total: int) -> _GiveRows | None:
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
        head = read_head(path)
        if head.startswith(MAGIC):
            shapes.add(npy_shape(path))
            continue
        with Bundle(path, head) as side:
            if "request_lens" in side:
                return None
            shapes.update(item.shape for item in _id_items(side))
    if len(shapes) < 2 or {len(shape) for shape in shapes} != {3}:
        return None
    axes = [axis for axis in range(3) if len({shape[axis] for shape in shapes}) > 1]
    if axes == [0] or (axes == [1] and all(shape[1] >= shape[0] for shape in shapes)):
        return axes[0]
    return None


READER = Reader(
    name="arrays",
    title="arrays [tokens, layers, k], or verl's [requests, tokens, layers, k]: .npy, .npz, .safetensors, .pt, folders",
    example="numpy.savez('req0.npz', routed_experts=ids, prompt_len=P, token_ids=tokens)",
    sniff=_sniff,
    read=_read,
)
