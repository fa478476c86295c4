"""Numbers that stand for rows of ids: equal rows have equal keys, and unequal ones almost never."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_CHUNK_IDS = 1 << 18
"""Ids worked on at once: a long request, or a memory map, is never copied as a whole."""


def scramble(values: Keys) -> Keys:
    """Return 64 well-mixed bits for each number (the finaliser of splitmix64, Steele et al. 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


@lru_cache(maxsize=64)
def _scrambled(start: int, count: int) -> Keys:
    bits = scramble(np.arange(start, start + count, dtype=np.uint64))
    bits.flags.writeable = False  # it is shared
    return bits


def odd_weights(start: int, count: int) -> Keys:
    """Return random odd factors for the numbers from ``start`` on."""
    return np.asarray(_scrambled(start, count) | np.uint64(1))


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """Keys of one request."""

    rows: Keys
    """``[tokens]``: one per token, over all layers and ranks."""
    layers: Keys
    """``[layers]``: one per layer, over all tokens and ranks, in their order."""

    @property
    def request(self) -> int:
        """Return the key of the whole request."""
        return int((self.layers * odd_weights(1 << 40, len(self.layers))).sum(dtype=np.uint64))


def row_keys(ids: NDArray[np.unsignedinteger[Any]]) -> Keys:
    """Return a key for each ``[tokens, layers]`` row of ``ids[tokens, layers, k]``, in the order of its ranks."""
    top_k, size = ids.shape[2], ids.dtype.itemsize
    if top_k * size in (1, 2, 4, 8) and sys.byteorder == "little":  # the bytes of a row are its key
        keys = np.ascontiguousarray(ids).view(f"<u{top_k * size}")[..., 0]
        return keys.astype(np.uint64, copy=False)
    exact = top_k * size <= 8
    keys = np.zeros(ids.shape[:2], np.uint64)
    for rank in range(top_k):
        if exact:
            keys |= ids[..., rank].astype(np.uint64) << np.uint64(8 * size * rank)
        else:
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys += ids[..., rank]
    return keys if exact else scramble(keys)


def request_keys(ids: NDArray[np.unsignedinteger[Any]]) -> RequestKeys:
    """Return the keys of a request ``ids[tokens, layers, k]``, reading it once in pieces that fit the cache."""
    tokens, layers, top_k = ids.shape
    rows = np.empty(tokens, np.uint64)
    fingerprints = np.zeros(layers, np.uint64)
    by_layer = odd_weights(1 << 48, layers)
    step = max(1, _CHUNK_IDS // (layers * top_k))
    for start in range(0, tokens, step):
        keys = row_keys(ids[start : start + step])
        rows[start : start + step] = (keys * by_layer).sum(axis=1, dtype=np.uint64)
        fingerprints += (keys * odd_weights(start, len(keys))[:, None]).sum(axis=0, dtype=np.uint64)
    return RequestKeys(rows, fingerprints)


def set_keys(ids: NDArray[np.unsignedinteger[Any]], num_experts: int) -> Keys:
    """Return a key for each ``[tokens, layers]`` set of ``ids[tokens, layers, k]``, whatever the order of its ranks."""
    table = _scrambled(0, num_experts)
    keys: Keys = table.take(ids[..., 0])
    for rank in range(1, ids.shape[2]):
        keys += table.take(ids[..., rank])
    return keys


def probes(layers: int, most: int) -> NDArray[np.intp]:
    """Return at most ``most`` layers, evenly spread over all of them."""
    return np.unique(np.linspace(0, layers - 1, min(layers, most)).round().astype(np.intp))
