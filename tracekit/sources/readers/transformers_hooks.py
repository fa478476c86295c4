"""Reader of what hooks in transformers models leave: arrays per layer in ``.pt``, ``.npz`` or ``.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.base import AnyArray, IngestOptions, RawRequest, Reader
from tracekit.sources.bundle import TORCH_VALUES, Bundle, Item, as_item, refuse_shared
from tracekit.sources.files import allocate, file_size, read_head, reading
from tracekit.sources.logits import ids_dtype, require_plain, top_k
from tracekit.sources.readers.arrays import ID_KEYS, PROMPT_KEY
from tracekit.sources.safetensors import is_safetensors
from tracekit.sources.tensors import Held
from tracekit.sources.torchfile import ZIP_MAGIC, is_torch

_NUMBER = re.compile(r"\d+")
_NAMED = re.compile(r"(?:layers?|blocks?|\bh)[._\[/-]?(?=\d)", re.IGNORECASE)
_MOST_COLUMNS = 1 << 12
_SIDE = frozenset({"attention_mask", "input_ids", "token_ids", "prompt_len", "num_experts"})
_NESTING = 3


@dataclass(slots=True)
class _Call:
    """What one call of one layer's router or experts left: ids, or logits."""

    ids: Item | None = None
    logits: Item | None = None
    weights: Item | None = None

    @property
    def rows(self) -> int:
        """Tokens of the call."""
        item = self.ids or self.logits
        return item.shape[0] if item is not None else 0


@dataclass(slots=True)
class _Layer:
    name: str
    calls: list[_Call] = field(default_factory=list)


def _sniff(path: Path, head: bytes) -> bool:
    torch = is_torch(path, head)
    if not torch and not is_safetensors(head) and not head.startswith(ZIP_MAGIC):
        return False
    try:
        bundle = Bundle(path, head)
    except SourceError:
        if torch:
            raise
        return False  # the reader of arrays says what is wrong with an archive
    with bundle:
        if any(key in bundle for key in (*ID_KEYS, PROMPT_KEY)) or isinstance(bundle.content, TORCH_VALUES):
            return False
        return torch or _looks_captured(bundle)


def _looks_captured(bundle: Bundle) -> bool:
    """Whether the arrays are one of ids, or one of logits, for each layer; not weights of a model."""
    layers: dict[int, list[Item]] = {}
    for name in bundle.names():
        numbers = _numbers(name)
        item = bundle.item(name) if numbers else None
        if item is not None and len(item.shape) == 2:
            layers.setdefault(numbers[0], []).append(item)
    if not layers:
        return False
    if all(any(item.dtype.kind in "ui" for item in items) for items in layers.values()):
        return True
    widths = {items[0].shape[1] for items in layers.values()}
    return all(len(items) == 1 for items in layers.values()) and len(widths) == 1 and min(widths) <= _MOST_COLUMNS


def _numbers(name: str) -> tuple[int, ...]:
    """Return the layer's number in a name, and the numbers behind it; the model's name may have some before it."""
    named = _NAMED.search(name)
    return tuple(int(number[:9]) for number in _NUMBER.findall(name, named.end() if named is not None else 0))


def _read(path: Path, options: IngestOptions) -> Iterator[RawRequest]:
    with reading(str(path)), Bundle(path, read_head(path)) as bundle:
        layers, numbers = _layers(bundle)
        _check_layers(layers, bundle.where)
        calls = [call.rows for call in layers[0].calls]
        refuse_shared(
            [
                item
                for layer in layers
                for call in layer.calls
                for item in (call.ids, call.logits, call.weights)
                if item
            ],
            path,
        )
        ids, weights, notes = _stack(layers, options, bundle.where)
        mask = bundle.array("attention_mask")
        tokens = bundle.array("input_ids" if "input_ids" in bundle else "token_ids")
        parts, note = _requests(calls, mask, tokens, bundle.where)
        single = len(parts) == 1
        for i, part in enumerate(parts):
            yield RawRequest(
                where=bundle.where,
                ids=ids[part.rows],
                part=None if single else str(i),
                axes="tlk",
                prompt_len=bundle.scalar("prompt_len") if single and "prompt_len" in bundle else part.prompt_len,
                token_ids=part.tokens,
                tokens_by_row=True,
                weights=None if weights is None else weights[part.rows],
                layer_ids=numbers,
                num_experts=bundle.scalar("num_experts"),
                engine="transformers",
                id_space="logical",
                router_order=True if layers[0].calls[0].ids is None else None,
                notes=(*notes, *note),
                consumed=file_size(path) * (i + 1) // len(parts),
            )


# What the file holds


def _layers(bundle: Bundle) -> tuple[list[_Layer], tuple[int, ...] | None]:
    """Return the layers in order, and their numbers where names give them."""
    content, seen = bundle.content, set[int]()
    if isinstance(content, list | tuple):
        places = ((f"layer {i}", value, f"{bundle.where}[{i}]") for i, value in enumerate(content))
        return [_Layer(name, _calls(value, where, seen)) for name, value, where in places], None
    layers: dict[int, _Layer] = {}
    parts: dict[int, list[tuple[tuple[int, ...], Item]]] = {}
    for name in content if isinstance(content, dict) else bundle.names():
        numbered = _numbers(str(name))
        if not numbered or name in _SIDE:
            continue
        layer, order = numbered[0], numbered[1:]
        value, item = content[name] if isinstance(content, dict) else None, bundle.item(str(name))
        if item is not None:
            parts.setdefault(layer, []).append((order, item))
        elif isinstance(value, list | tuple) and layer not in layers:
            layers[layer] = _Layer(str(name)[:100], _calls(value, f"{bundle.where}[{str(name)[:100]}]", seen))
        elif isinstance(value, list | tuple):
            raise SourceError(f"has layer {layer} twice", where=bundle.where, expected="one entry per layer")
    for layer, found in parts.items():
        if layer in layers:
            raise SourceError(f"has layer {layer} twice", where=bundle.where, expected="one entry per layer")
        where = f"{bundle.where}, layer {layer}"
        groups: dict[tuple[int, ...], list[Item]] = {}
        for order, item in found:
            groups.setdefault(order, []).append(item)
        layers[layer] = _Layer(f"layer {layer}", [_call(groups[order], where) for order in sorted(groups)])
    if not layers:
        held = ", ".join(str(name)[:60] for name in list(content if isinstance(content, dict) else bundle.names())[:8])
        raise SourceError(
            f"holds no routing ({held or type(content).__name__})",
            where=bundle.where,
            expected=f"an array named {ID_KEYS[0]}, or one per layer named like model.layers.0.mlp.experts",
        )
    numbers = tuple(sorted(layers))
    return [layers[number] for number in numbers], numbers


def _calls(value: Any, where: str, seen: set[int], depth: int = 0) -> list[_Call]:
    """Return the calls of one layer: an array is one, a list one each; a tuple is a router's output.

    ``seen`` holds what was there before: a few bytes can name one list in a list in a list a million times.
    """
    if id(value) in seen:
        raise SourceError("holds the same array or list twice", where=where, expected="an array of its own each")
    seen.add(id(value))
    item = as_item(value, where)
    if item is not None:
        return [_call([item], where)]
    if isinstance(value, tuple):
        return [_call([part for entry in value if (part := as_item(entry, where)) is not None], where)]
    if isinstance(value, list) and depth < _NESTING:
        return [call for entry in value for call in _calls(entry, where, seen, depth + 1)]
    raise SourceError(
        f"holds a {type(value).__name__}", where=where, expected="an array [tokens, k] per layer, or a list of them"
    )


def _call(items: Sequence[Item], where: str) -> _Call:
    """Tell ids, weights and logits of one call apart; a router's output has them in any order."""
    flat = [_squeezed(item) for item in items]
    ids = [item for item in flat if item is not None and item.dtype.kind in "ui"]
    floats = [item for item in flat if item is not None and item.dtype.kind == "f"]
    if len(ids) == 1:
        weights = [item for item in floats if item.shape == ids[0].shape]
        return _Call(ids=ids[0], weights=weights[0] if len(weights) == 1 else None)
    if not ids and floats:
        return _Call(logits=floats[0])
    shapes = ", ".join(f"{item.dtype} {item.shape}" for item in items[:8])
    raise SourceError(
        f"holds {shapes or 'no array'}", where=where, expected="one array of ids [tokens, k], or of logits [tokens, N]"
    )


def _squeezed(item: Item) -> Item | None:
    """Return ``[tokens, columns]``, also of a batch of one; None for anything else."""
    if len(item.shape) == 2:
        return item
    if len(item.shape) == 3 and item.shape[0] == 1:
        return Held(item.load()[0], item.where)
    return None


def _check_layers(layers: Sequence[_Layer], where: str) -> None:
    if not layers or not layers[0].calls:
        raise SourceError("holds no call of any layer", where=where, expected="arrays [tokens, k] per layer")
    first = layers[0]
    shapes = [(call.rows, call.ids is None) for call in first.calls]
    if not any(rows for rows, _ in shapes):
        raise SourceError("holds calls without any row", where=where, expected="arrays [tokens, k] per layer")
    for layer in layers:
        if [(call.rows, call.ids is None) for call in layer.calls] != shapes:
            raise SourceError(
                f"{layer.name} has {len(layer.calls)} calls of {sum(call.rows for call in layer.calls)} rows, "
                f"{first.name} {len(first.calls)} of {sum(call.rows for call in first.calls)}",
                where=where,
                expected="the same tokens in every layer",
                remedy="Clear the record between runs, and hook every layer before the first",
            )


# Its arrays


def _stack(
    layers: Sequence[_Layer], options: IngestOptions, where: str
) -> tuple[AnyArray, AnyArray | None, tuple[str, ...]]:
    """Return ids and weights ``[tokens, layers, k]`` of all calls, one after the other."""
    rows = sum(call.rows for call in layers[0].calls)
    if layers[0].calls[0].ids is None:
        config = require_plain(options.config, where)
        out: NDArray[Any] = allocate((rows, len(layers), config.top_k), ids_dtype(config))
        ties = 0
        for entry, layer in enumerate(layers):
            at = 0
            for call in layer.calls:
                assert call.logits is not None
                ties += top_k(call.logits.load(), config, out[at : at + call.rows, entry], f"{where}, {layer.name}")
                at += call.rows
        notes = ["ids were made of router logits, by top-k"]
        if ties:
            notes.append(
                f"{ties} of {rows * len(layers)} rows had a tie at the k-th logit, where the lower id was taken"
            )
        return out, None, tuple(notes)
    calls = [call for layer in layers for call in layer.calls]
    kept = [call.ids for call in calls if call.ids is not None]
    if len(kept) != len(calls) or len({item.shape[1] for item in kept}) != 1:
        raise SourceError(
            f"layers of different k ({sorted({item.shape[1] for item in kept})[:8]})", where=where, expected="one k"
        )
    weighed = [call.weights for call in calls if call.weights is not None]
    ids = _joined(layers, kept, rows)
    return ids, _joined(layers, weighed, rows) if len(weighed) == len(calls) else None, ()


def _joined(layers: Sequence[_Layer], items: Sequence[Item], rows: int) -> AnyArray:
    """Stack the arrays of all calls, listed layer by layer, to ``[tokens, layers, k]``."""
    dtype = np.result_type(*{item.dtype for item in items})
    out = allocate((rows, len(layers), items[0].shape[1]), np.int64 if dtype.kind not in "uif" else dtype)
    source = iter(items)
    for entry, layer in enumerate(layers):
        at = 0
        for call in layer.calls:
            out[at : at + call.rows, entry] = next(source).load()
            at += call.rows
    return out


# Its requests


@dataclass(slots=True)
class _Part:
    """The rows of one request."""

    rows: NDArray[np.int64] | slice
    prompt_len: int | None = None
    tokens: AnyArray | None = None


def _requests(
    calls: Sequence[int], mask: AnyArray | None, tokens: AnyArray | None, where: str
) -> tuple[list[_Part], tuple[str, ...]]:
    """Cut the rows of all calls into requests.

    A call has the tokens of one forward pass, batch-major and with padding: the whole prompt, then a row per step.
    """
    starts = np.cumsum([0, *calls]).tolist()
    if mask is not None:
        return _masked(calls, starts, mask, tokens, where), ()
    if tokens is not None and tokens.ndim == 2 and tokens.shape[0] > 1:
        raise _batch(tokens.shape[0], where)
    later = set(calls[1:])
    if len(later) == 1 and later != {1} and calls[0] > calls[1] and calls[0] % calls[1] == 0:
        raise _batch(calls[1], where)
    # A call with several rows is a prompt; the steps that follow have one each.
    firsts = [i for i, rows in enumerate(calls) if i == 0 or rows > 1]
    parts = []
    for i, end in zip(firsts, [*firsts[1:], len(calls)], strict=True):
        prompt = calls[i] if end - i > 1 and calls[i] > 1 else None
        parts.append(_Part(slice(starts[i], starts[end]), prompt))
    if len(parts) > 1:
        return parts, ("each call with more than one row was taken as the prompt of a new request",)
    flat = None if tokens is None or tokens.dtype.kind not in "ui" else tokens.reshape(-1)
    parts[0].tokens = flat if flat is not None and flat.size in (starts[-1], starts[-1] + 1) else None
    if len(calls) == 1:
        return parts, ("the rows were taken as one sequence: save attention_mask beside them where they are a batch",)
    return parts, ()


def _batch(size: int, where: str) -> SourceError:
    return SourceError(
        f"looks like a batch of {size} requests, whose padding is not told from tokens",
        where=where,
        expected="one request, or attention_mask [requests, tokens] beside the layers",
        remedy="Save attention_mask with them, or run one request at a time",
    )


def _masked(
    calls: Sequence[int], starts: Sequence[int], mask: AnyArray, tokens: AnyArray | None, where: str
) -> list[_Part]:
    """Cut a batch by its attention mask, over the prompt alone or over the whole sequence."""
    if mask.ndim == 1:
        mask = mask[None]
    batch, steps = mask.shape[0], list(calls[1:])
    prompt, rest = divmod(calls[0], batch) if batch else (0, 1)
    if mask.ndim != 2 or rest or any(rows != batch for rows in steps) or mask.shape[1] < prompt:
        raise SourceError(
            f"attention_mask {mask.shape} for calls of {', '.join(map(str, calls[:4]))} rows",
            where=where,
            expected="[requests, tokens]: so many rows in the first call, and a row for each request in the others",
        )
    if tokens is not None and tokens.shape != mask.shape:
        tokens = None
    parts = []
    for request in range(batch):
        known = mask[request, : prompt + len(steps)].astype(bool)
        on = np.ones(prompt + len(steps), bool)
        on[: len(known)] = known
        rows = np.concatenate(
            [starts[0] + request * prompt + np.arange(prompt), np.asarray(starts[1:-1], np.int64) + request]
        )
        inside = np.flatnonzero(on)
        if inside.size and int(inside[-1] - inside[0]) + 1 != inside.size:
            raise SourceError("an attention mask with a gap", where=f"{where}, request {request} of the batch")
        length = int(on[:prompt].sum())
        row_tokens = None if tokens is None or len(known) < len(on) else tokens[request, : len(on)][on]
        parts.append(_Part(rows[on].astype(np.int64), length if steps else None, row_tokens))
    return parts


READER = Reader(
    name="transformers-hooks",
    title="hooks in transformers models, per layer: ids [tokens, k] or router logits; .pt, .npz, .safetensors",
    example="torch.save({'model.layers.0.mlp.experts': ids, …}, 'hooks.pt')",
    sniff=_sniff,
    read=_read,
)
