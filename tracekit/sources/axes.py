"""Which axis of an array is tokens, which is layers, which is top-k."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.config import ModelConfig

Order = tuple[int, int, int]
"""Axis numbers of tokens, layers and top-k."""

_SAMPLE = 64
_LARGEST_K = 512
_FEWEST_LAYERS, _MOST_LAYERS = 16, 128


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about the sizes of the axes."""

    axes: str | None = None
    config: ModelConfig | None = None
    layer_ids: tuple[int, ...] | None = None
    rows: int | None = None
    """Tokens, where counts of the source say it."""
    token_axis: int | None = None
    top_k: int | None = None
    num_experts: int | None = None
    settled: Order | None = None
    """The order that earlier requests of the trace had."""


def parse_axes(axes: str) -> Order:
    """Return the axis numbers of tokens, layers and top-k for an order like ``tlk``."""
    if sorted(axes) != ["k", "l", "t"]:
        raise SourceError(
            f"--axes {axes!r}", expected="the letters t (tokens), l (layers) and k (top-k) in the array's order, as tlk"
        )
    return axes.index("t"), axes.index("l"), axes.index("k")


def name_axes(order: Order) -> str:
    """Return the order as ``--axes`` takes it."""
    return "".join(letter for _, letter in sorted(zip(order, "tlk", strict=True)))


def resolve_axes(ids: NDArray[Any], facts: Facts, where: str) -> Order:
    """Find the order of a three-dimensional array's axes.

    What is given decides; else sizes that the config, the layer ids and the token counts
    must explain; else the axis that varies between files; else ``tlk`` where it is plain.

    Raises
    ------
    SourceError
        If no order fits what is known, or more than one does.
    """
    shape = ids.shape
    if facts.axes is not None:
        order = parse_axes(facts.axes)
        _check_given(shape, order, facts, where)
        return order
    orders = _possible(shape, facts, where)
    if facts.settled in orders:
        return facts.settled
    orders = [order for order in orders if _plausible_k(ids, order[2])] or orders
    evidence = any(x is not None for x in (facts.config, facts.layer_ids, facts.rows, facts.token_axis))
    if evidence and len(orders) == 1:
        return orders[0]
    plain = (0, 1, 2)
    tokens_known = evidence and len({order[0] for order in orders}) == 1
    k_is_last = shape[2] <= min(shape[tokens_known:2]) or all(order[2] == 2 for order in orders)
    # Models have up to about a hundred layers: two such axes could be either.
    either = all(_FEWEST_LAYERS <= size <= _MOST_LAYERS for size in shape[:2])
    if plain in orders and (tokens_known or (shape[0] > shape[1] and not either)) and k_is_last:
        return plain
    candidates = ", ".join(name_axes(order) for order in orders)
    raise SourceError(
        f"shape {shape} does not say which axis is tokens, layers, top-k (possible: {candidates})",
        where=where,
        expected="[tokens, layers, k]",
        remedy="Say it with --axes, for example --axes tlk, or give --config",
    )


def _check_given(shape: tuple[int, ...], order: Order, facts: Facts, where: str) -> None:
    sizes = _layer_sizes(facts.config)
    if sizes and shape[order[1]] not in sizes:
        raise _contradiction(shape, f"--axes {facts.axes} makes {shape[order[1]]} layers", facts, where)


def _layer_sizes(config: ModelConfig | None) -> set[int]:
    if config is None:
        return set()
    return {config.num_hidden_layers, len(config.moe_layers or range(config.num_hidden_layers))}


def _contradiction(shape: tuple[int, ...], found: str, facts: Facts, where: str) -> SourceError:
    config = facts.config
    assert config is not None
    moe = "" if config.moe_layers is None else f", {len(config.moe_layers)} of them with experts"
    return SourceError(
        f"shape {shape} contradicts the config: {found}",
        where=where,
        expected=f"{config.num_hidden_layers} layers{moe}, and {config.top_k} experts per token",
        remedy="Give the --config of the model that was traced",
    )


def _possible(shape: tuple[int, ...], facts: Facts, where: str) -> list[Order]:
    """Orders that the known sizes leave, most binding fact first."""
    orders: list[Order] = list(itertools.permutations(range(3)))  # type: ignore[arg-type]
    sizes = _layer_sizes(facts.config)
    if sizes:
        orders = [order for order in orders if shape[order[1]] in sizes]
        if not orders:
            raise _contradiction(shape, "no axis has its number of layers", facts, where)
    if facts.top_k is not None:
        orders = [order for order in orders if shape[order[2]] == facts.top_k]
        if not orders:
            raise SourceError(
                f"shape {shape} has no axis of {facts.top_k} experts per token",
                where=where,
                remedy="Give the right --top-k, or leave it out",
            )

    def prefer(axis: int, fits: Callable[[int], bool]) -> None:
        nonlocal orders
        orders = [order for order in orders if fits(shape[order[axis]])] or orders

    if facts.layer_ids is not None:
        prefer(1, len(facts.layer_ids).__eq__)
    if facts.config is not None:
        prefer(2, facts.config.top_k.__ge__)
        prefer(2, facts.config.top_k.__eq__)
    if facts.rows is not None:
        prefer(0, facts.rows.__eq__)
    if facts.token_axis is not None:
        orders = [order for order in orders if order[0] == facts.token_axis] or orders
    if facts.num_experts is not None:
        prefer(2, facts.num_experts.__ge__)
    return orders


def _plausible_k(ids: NDArray[Any], axis: int) -> bool:
    """Whether entries along an axis differ from each other, as the experts of one token must."""
    size = ids.shape[axis]
    if size > _LARGEST_K:
        return False
    if size == 1:
        return True
    rows = np.moveaxis(ids, axis, -1)[:_SAMPLE, :_SAMPLE].reshape(-1, size)
    rows = np.sort(rows[rows.any(axis=1)], axis=1)  # rows of zeros are dense layers
    return not (rows[:, 1:] == rows[:, :-1]).any()
