"""Events of one token in one layer each, in any order, put together to ``[tokens, layers, k]``."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import allocate

_LARGEST_TOKEN = 1 << 40
_LARGEST_LAYER = 1 << 16
_LARGEST_ID = 1 << 20
_LARGEST_K = 1 << 10
_LARGEST_WEIGHT = 1e30


class Cells:
    """The cells of one request, compact until it is complete."""

    def __init__(self) -> None:
        self._tokens, self._layers = array("q"), array("i")
        self._ids, self._weights = array("i"), array("d")
        self._k: int | None = None
        self._weighted: bool | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, token: Any, layer: Any, ids: Any, weights: Any, where: str) -> None:
        """Add an event.

        Raises
        ------
        SourceError
            If a number is none or too large, or k or the presence of weights differ from the events before.
        """
        for what, value, limit in (("token", token, _LARGEST_TOKEN), ("layer", layer, _LARGEST_LAYER)):
            if type(value) is not int or not 0 <= value < limit:
                raise SourceError(f"{what} is {str(value)[:40]}", where=where, expected=f"0 to {limit - 1}")
        checked = expert_ids(ids, where)
        if self._k is None:
            self._k, self._weighted = len(checked), weights is not None
        if len(checked) != self._k:
            raise SourceError(f"has {len(checked)} experts, events before it {self._k}", where=where)
        if (weights is not None) != self._weighted:
            raise SourceError("router weights are in some events only", where=where, expected="in all, or in none")
        if weights is not None:
            self._weights.extend(finite_numbers(weights, len(checked), where))
        self._tokens.append(token)
        self._layers.append(layer)
        self._ids.extend(checked)

    def cube(self, where: str) -> tuple[NDArray[np.int64], tuple[int, ...], NDArray[Any], NDArray[Any] | None]:
        """Return tokens ``[tokens]``, layers, ids ``[tokens, layers, k]`` and weights of the same shape or None.

        Raises
        ------
        SourceError
            Naming the first token and layer that are missing or there twice.
        """
        tokens, at_token = np.unique(np.frombuffer(self._tokens, np.int64), return_inverse=True)
        layers, at_layer = np.unique(np.frombuffer(self._layers, np.intc), return_inverse=True)
        cell = at_token * len(layers) + at_layer
        different, first = np.unique(cell, return_index=True)
        if len(different) < len(cell):
            again = int(np.setdiff1d(np.arange(len(cell)), first)[0])
            raise SourceError(
                f"has token {self._tokens[again]} of layer {self._layers[again]} twice",
                where=where,
                expected="one event for each token and layer",
            )
        short = np.flatnonzero(np.bincount(at_token, minlength=len(tokens)) < len(layers))
        if short.size:
            token = int(short[0])
            missing = np.setdiff1d(np.arange(len(layers)), at_layer[at_token == token])
            raise SourceError(
                f"has no event of token {int(tokens[token])} in layer {int(layers[missing[0]])}",
                where=where,
                expected=f"each token in all {len(layers)} layers",
                remedy="A trace cut off while it was written ends like this: cut its last token",
            )
        k = self._k or 0
        shape = (len(tokens), len(layers), k)
        ids = allocate(shape, np.int32)
        ids.reshape(-1, k)[cell] = np.frombuffer(self._ids, np.intc).reshape(-1, k)
        weights = None
        if self._weighted:
            weights = allocate(shape, np.float32)
            weights.reshape(-1, k)[cell] = np.frombuffer(self._weights).reshape(-1, k)
        return tokens, tuple(int(layer) for layer in layers), ids, weights


def expert_ids(value: Any, where: str) -> list[int]:
    """Return the experts of one event.

    Raises
    ------
    SourceError
        If they are no list of whole numbers.
    """
    if not isinstance(value, list) or not 0 < len(value) <= _LARGEST_K:
        raise SourceError(f"has the experts {str(value)[:80]}", where=where, expected="a list of ids")
    for item in value:
        if type(item) is not int or not -_LARGEST_ID < item < _LARGEST_ID:
            raise SourceError(f"has the expert {str(item)[:40]}", where=where, expected="whole numbers")
    return value


def finite_numbers(value: Any, count: int, where: str) -> list[float]:
    """Return the weights of one event.

    Raises
    ------
    SourceError
        If they are not as many finite numbers as there are experts.
    """
    if not isinstance(value, list) or len(value) != count:
        raise SourceError(f"has the weights {str(value)[:80]}", where=where, expected=f"{count} numbers")
    for item in value:
        if type(item) not in (int, float) or not abs(item) < _LARGEST_WEIGHT:
            raise SourceError(f"has the weight {str(item)[:40]}", where=where, expected="finite numbers")
    return value


def consecutive(tokens: NDArray[np.int64]) -> bool:
    """Whether positions have no holes."""
    return bool(tokens.size) and int(tokens[-1] - tokens[0]) + 1 == tokens.size
