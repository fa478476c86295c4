"""Ids that number replicas of experts: two that are never chosen together, in the same company."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.chance import LOG_ALPHA
from tracekit.checks.finding import Finding, counted, numbers
from tracekit.checks.keys import probes
from tracekit.checks.sample import Ids, Sample
from tracekit.schema import TraceMeta

Floats = NDArray[np.float32]

_LAYERS = 3
_PAIRS = 1 << 19
"""Pairs of ids that are counted in a layer at most."""
_MOST_EXPERTS = 1024
"""Experts of a layer beyond which a table of all pairs is too large, and no model is known."""
_EXPECTED = 6.0
"""Common rows that chance would give two experts that are judged: independent ones have none with exp(-6) = 0.25 %."""
_ALIKE = 0.6
_OTHERS = 8


def physical(meta: TraceMeta, experts: int | None) -> list[Finding]:
    """Return ``physical-ids`` where the source says so, or where N is more than the model has.

    Parameters
    ----------
    experts
        Experts per layer of the model as it was released, where its name is known.
    """
    effect = "unique experts and N are too large, overlap too small, load is that after balancing"
    remedy = "Map ids with the physical-to-logical map, or capture with load balancing off"
    if meta.id_space == "physical":
        found = f"ids number {meta.num_experts} physical slots: replicas of an expert have different ids"
        return [Finding("serious", "physical-ids", "whole trace", found, effect, remedy)]
    if experts is not None and meta.num_experts > experts:
        found = f"{meta.num_experts} experts per layer, where {meta.model!r} was released with {experts}"
        return [Finding("warning", "physical-ids", "whole trace", found, effect, remedy)]
    return []


def replicas(sample: Sample, meta: TraceMeta) -> list[Finding]:
    """Find experts with replicas, each of which has an id of its own (redundant experts of load balancing).

    Replicas of an expert are never in one row, though their frequencies would put them there; and the other experts of
    their rows, and those of the next layer, are the same. In a sound trace experts in the same company are chosen
    together more often than others. So each expert is held against the one whose company is most like its own (a
    correlation of 0.6 or more): how many of these pairs have no row in common, where 6 or more would be expected? The
    rate among the next 8 of each is that of a sound trace; it explains the number found with a chance of 1e-6.
    Half of the layers looked at must have such a pair: redundant slots are added to each layer. One permutation of
    all experts, without redundant ones, changes no number and cannot be seen.
    """
    layers = len(meta.layers)
    # Where the model is known (by a config, or its name), N is its own, and no id is left for a redundant slot.
    known = meta.id_space != "unknown" or meta.native_top_k is not None
    if known or meta.top_k < 2 or sample.rows < 64 or meta.num_experts > _MOST_EXPERTS:
        return []
    ids = sample.ids()[: _PAIRS // meta.top_k**2]
    pairs = alone = others = others_alone = 0
    found: dict[int, list[tuple[int, int]]] = {}
    looked = probes(layers, _LAYERS).tolist()
    for layer in looked:
        beside = layer + 1 if layer + 1 < layers else layer - 1 if layers > 1 else None
        expected, together, alike = _company(ids[:, layer], None if beside is None else ids[:, beside], meta)
        at = np.arange(meta.num_experts)[:, None]
        near = np.argpartition(-alike, min(_OTHERS, meta.num_experts - 1), axis=1)[:, : 1 + _OTHERS]
        near = near[at, np.argsort(-alike[at, near], axis=1, kind="stable")]
        judged = expected[at, near] >= _EXPECTED
        apart = judged & (together[at, near] == 0) & (alike[at, near] >= _ALIKE)
        others += int(judged[:, 1:].sum())
        others_alone += int(apart[:, 1:].sum())
        nearest = np.stack([np.minimum(at[:, 0], near[:, 0]), np.maximum(at[:, 0], near[:, 0])], axis=1)
        pairs += len(np.unique(nearest[judged[:, 0]], axis=0))
        found[meta.layers[layer]] = list(map(tuple, np.unique(nearest[apart[:, 0]], axis=0).tolist()))
        alone += len(found[meta.layers[layer]])
    with_pairs = [layer for layer, some in found.items() if some]
    if 2 * len(with_pairs) < len(looked) or alone < 2:
        return []
    if _log_tail(alone, pairs, (others_alone + 1) / (others + 2)) > LOG_ALPHA:
        return []
    first = with_pairs[0]
    named = ", ".join(f"{a} and {b}" for a, b in found[first][:3])
    return [
        Finding(
            "warning",
            "physical-ids",
            f"layer{'s' if len(with_pairs) > 1 else ''} {numbers(with_pairs)} of the {len(looked)} looked at, "
            f"in layer {first} ids {named}",
            f"{counted(alone, 'pair')} of ids are never in one row, though frequent and in the same company, as "
            f"replicas of one expert are; of other pairs {others_alone:,} of {others:,} ({len(ids):,} rows)",
            "unique experts and N are too large, overlap too small, load is that after balancing",
            "Map ids with the physical-to-logical map, or capture with load balancing off; if they are logical, "
            "--id-space logical says so",
        )
    ]


def _company(ids: Ids, beside: Ids | None, meta: TraceMeta) -> tuple[Floats, Floats, Floats]:
    """Return of any two experts of a layer ``[N, N]``: common rows expected, common rows, likeness of their company.

    Parameters
    ----------
    ids
        ``[rows, k]``.
    beside
        The same of the next layer.
    """
    n, k, rows = meta.num_experts, meta.top_k, len(ids)
    first, second = np.triu_indices(k, 1)
    half = _counts(ids[:, first], ids[:, second], n)
    together = half + half.T
    frequency = np.bincount(ids.reshape(-1), minlength=n).astype(np.float32)
    # Of k that differ, a second one is among k - 1.
    expected = np.outer(frequency, frequency * np.float32((k - 1) / k / rows))
    np.fill_diagonal(expected, 0)
    own = _excess(together, expected)
    company = own
    if beside is not None:
        ranks = np.arange(k * k)  # k times as many pairs as in a row: half of the rows do
        next_to = _counts(ids[::2, ranks // k], beside[::2, ranks % k], n)
        company = np.concatenate([own, _independent(next_to)], axis=1)
    # A pair's own rows are no company of it.
    size = (company**2).sum(axis=1)
    rest = np.sqrt(np.maximum((size[:, None] - own**2) * (size - own**2), 1e-9))
    alike = company @ company.T / rest
    np.fill_diagonal(alike, -2)
    return expected, together, alike


def _independent(counts: Floats) -> Floats:
    """Return a table of counts as deviates of what its margins make expected."""
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0) / np.maximum(counts.sum(), 1))
    return _excess(counts, expected)


def _excess(found: Floats, expected: Floats) -> Floats:
    """Return counts as deviates of those expected; 0 where nothing is."""
    return np.where(expected > 0, (found - expected) / np.sqrt(np.maximum(expected, 1e-9)), np.float32(0))


def _counts(a: Ids, b: Ids, n: int) -> Floats:
    """Return how often an expert of ``a[rows, m]`` is beside one of ``b[rows, m]``, ``[n, n]``."""
    both = a.astype(np.int64)
    both *= n
    both += b
    return np.bincount(both.reshape(-1), minlength=n * n).reshape(n, n).astype(np.float32)


def _log_tail(hits: int, of: int, rate: float) -> float:
    """Return the log chance of so many hits or more among so many, at a rate (Chernoff's bound)."""
    share = hits / of
    if share <= rate:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / (1 - rate)) if share < 1 else 0.0
    return -of * (share * math.log(share / rate) + rest)
