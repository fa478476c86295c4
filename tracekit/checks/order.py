"""Whether neighbours are neighbours: rows in the order of their sequences, layers aligned with each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.chance import z_limit, z_score
from tracekit.checks.finding import Finding, counted, layers_without, numbers
from tracekit.checks.rows import ARGSORT_EFFECT, ARGSORT_REMEDY
from tracekit.checks.sample import Sample, masks, shared, thin
from tracekit.schema import TraceMeta

Floats = NDArray[np.float64]

_LAGS = 64
_STRIDES = range(2, _LAGS // 2 + 1)
_PROBES = 8
_BATCH = 64
"""Rows of a batch: long beside the correlation of neighbouring rows."""
_BATCHES = 16
"""Batches that are wanted; shorter ones are made of a small sample."""
_ENOUGH = 1 << 17
"""Rows, counted in each layer looked at, beyond which more of them add cost and no certainty."""
_OFFSETS = (-3, -2, -1, 1, 2, 3)
_PARTNERS = (7, 11, 17, 23, 31, 41, 53, 71)
"""Distances of the rows that are compared: farther than the offsets, without a common period."""


def lag_overlaps(sample: Sample, meta: TraceMeta) -> Floats:
    """Return the overlap of rows with the rows after them, in shares of k: ``[lags, batches]``.

    The mean over some layers and the rows of a batch whose later row is of the same stretch; NaN where these are less
    than half of it. Copies of earlier rows are left out, and stretches that repeat themselves at some lag (loops,
    warm-up), for at that lag they would drown the rest.
    """
    ids, _ = thin(sample.ids(), min(_PROBES, max(2, _ENOUGH // sample.rows)))
    sets, unit = masks(ids, meta.num_experts), sample.unit()
    fresh, starts = sample.fresh(), np.flatnonzero(np.diff(unit, prepend=-1))
    rows = len(unit)
    sums = np.zeros((_LAGS, rows), np.float32)
    known = np.zeros((_LAGS, rows), np.float32)
    for lag in range(1, min(_LAGS, rows - 1) + 1):
        inside = np.equal(unit[lag:], unit[:-lag])
        known[lag - 1, :-lag] = inside
        sums[lag - 1, :-lag] = shared(sets[..., lag:], sets[..., :-lag]).sum(axis=0, dtype=np.float32) * inside
    sums /= meta.top_k * ids.shape[1]
    of_unit = np.add.reduceat(sums, starts, axis=1) / np.maximum(np.add.reduceat(known, starts, axis=1), 1)
    sound = np.take(of_unit.max(axis=0) <= 0.8, unit)
    length = _batch(rows)
    use = sound & fresh
    total, number = _by_batch(sums * use, length), _by_batch(known * use, length)
    return np.where(number * 2 >= length, total / np.maximum(number, 1), np.nan)


def _batch(rows: int) -> int:
    return max(8, min(_BATCH, rows // _BATCHES))


def _by_batch(values: NDArray[np.float32], length: int) -> Floats:
    """Return sums over consecutive batches of the last axis; what is left over is dropped."""
    count = values.shape[-1] // length
    cut = values[..., : count * length].reshape(*values.shape[:-1], count, length)
    return np.asarray(cut.sum(axis=-1, dtype=np.float64))


def interleaved(sample: Sample, meta: TraceMeta) -> list[Finding]:
    """Find rows whose neighbours belong to other requests: a scan over lags.

    In a sequence the overlap falls with the lag (or is level), so that at any lag d >= 2 it does not stand above both
    neighbours. Interleaved with stride B, the true lag 1 is found at lag B, 2B, …, and all others compare different
    requests; batch-major rows are the same with the batch size as stride. The statistic is
    ``o(d) - (o(d-1) + o(d+1)) / 2`` over batches of rows, as a normal deviate; over all strides it exceeds its limit
    with a chance of 1e-6 in a trace whose overlaps do not peak. Text with a period peaks too: so the excess at lag 1
    must also be at most half of that at d, and the peak must be in three of four batches.
    """
    rows = sample.rows
    if rows < 64:
        return []
    overlaps = lag_overlaps(sample, meta)
    counts = (~np.isnan(overlaps)).sum(axis=1)
    lags = np.flatnonzero(counts >= 4) + 1
    if len(lags) < 3 or lags[-1] != len(lags):
        return []
    means = np.nansum(overlaps, axis=1)[lags - 1] / counts[lags - 1]
    if pieces := _pieces_of_rankings(overlaps[0], sample, meta):
        return pieces
    level = float(np.quantile(means, 0.25))
    peaks: dict[int, tuple[float, float]] = {}
    for stride in _STRIDES:
        if stride + 1 > len(lags):
            break
        contrast = overlaps[stride - 1] - (overlaps[stride - 2] + overlaps[stride]) / 2
        batches = contrast[~np.isnan(contrast)]
        z = z_score(batches)
        excess = float(means[stride - 1]) - level
        if z < z_limit(len(_STRIDES)) or (batches > 0).mean() < 0.75 or float(means[0]) - level > 0.5 * excess:
            continue
        peaks[stride] = (z, float(means[stride - 1]))
    if not peaks:
        return _unlike_neighbours(overlaps, sample)
    highest = max(mean for _, mean in peaks.values())
    # Multiples of the stride peak as well, and one of them may be the highest by chance.
    stride = min(lag for lag, (_, mean) in peaks.items() if mean - level >= 0.7 * (highest - level))
    z, peak = peaks[stride]
    return [
        Finding(
            "serious",
            "interleaved",
            f"all requests: {stride} sequences take turns, row by row (or batches of {stride})",
            f"overlap {means[0]:.3f} at lag 1, {peak:.3f} at lag {stride}, level {level:.3f} "
            f"({z:.0f} standard errors; {sample.said()})",
            "overlap and unique experts of neighbouring tokens compare different requests: correlation in time is lost",
            f"Ingest with --deinterleave {stride} if the same sequences take turns throughout; where the requests of a "
            "batch come and go, put rows back into their sequences by request id before saving",
        )
    ]


def _pieces_of_rankings(neighbours: Floats, sample: Sample, meta: TraceMeta) -> list[Finding]:
    """Find rows that share less with their neighbours than half of what rows drawn at random do.

    Unrelated rows share at least k / N, pieces of one ranking nothing. Half of it is undercut with a chance of 1e-6.
    """
    batches = neighbours[~np.isnan(neighbours)]
    chance = meta.top_k / meta.num_experts
    if z_score(chance / 2 - batches) < z_limit(1):
        return []
    return [
        Finding(
            "serious",
            "argsort-view",
            "all requests",
            f"overlap {batches.mean():.3f} at lag 1, where unrelated rows share {chance:.3f} or more: neighbouring "
            f"rows are pieces of one ranking ({sample.said()})",
            ARGSORT_EFFECT,
            ARGSORT_REMEDY,
        )
    ]


def _unlike_neighbours(overlaps: Floats, sample: Sample) -> list[Finding]:
    """Find rows that are less like their neighbours than like rows further on: batches of changing size.

    Of two consecutive batches of rows the first names the lag from 2 to 32 with the largest overlap, the second tells
    by how much the overlap there is above that at lag 1. Where rows stand in the order of their sequence this is at
    most 0 in the mean; it exceeds its limit with a chance of 1e-6. Text with a changing period could do so as well: it
    must be so in three of four batches, and remains a warning.
    """
    pairs = overlaps[: _STRIDES.stop - 1]
    pairs = pairs[:, : pairs.shape[1] // 2 * 2].reshape(len(pairs), -1, 2)
    pairs = pairs[:, ~np.isnan(pairs).any(axis=(0, 2))]
    lags = pairs[1:, :, 0].argmax(axis=0) + 1
    gains = np.take_along_axis(pairs[:, :, 1], lags[None], axis=0)[0] - pairs[0, :, 1]
    z = z_score(gains)
    if z < z_limit(1) or (gains > 0).mean() < 0.75:
        return []
    return [
        Finding(
            "warning",
            "batch-major",
            "all requests: neighbouring rows seem to be of different requests, without a fixed stride",
            f"overlap {pairs[0].mean():.3f} at lag 1, {gains.mean():.3f} more at lags of {lags.min() + 1} to "
            f"{lags.max() + 1} that change ({z:.0f} standard errors; {sample.said()})",
            "overlap and unique experts of neighbouring tokens compare different requests: correlation in time is lost",
            "Put the rows of each batch back into their sequences, by request id, before saving",
        )
    ]


def _alignment(sample: Sample, meta: TraceMeta) -> dict[int, Floats]:
    """Return the dependence of each pair of adjacent layers at each offset, ``[layers - 1, batches]``.

    The similarity of two rows in a layer is the number of experts that they share. Where layer l+1 follows from
    layer l, rows that are alike in one are alike in the other: the mean product of the two centred similarities is
    the dependence (Hilbert-Schmidt) of the layers; row t of layer l is held against row t + offset of layer l+1.
    """
    ids, unit = sample.ids(), sample.unit()
    sets = masks(ids, meta.num_experts)
    rows, layers = ids.shape[:2]
    reach, length = max(_OFFSETS), _batch(rows)
    batches = rows // length
    sums = {offset: np.zeros((layers - 1, batches)) for offset in (0, *_OFFSETS)}
    number, fresh = np.zeros(batches), sample.fresh()
    # A large sample needs fewer partners of each row for the same certainty.
    for partner in _PARTNERS[: max(2, 4 * _ENOUGH // (rows * layers))]:
        last = rows - partner - reach
        if last <= reach:
            break
        # Row and partner, and both moved by any offset, have to lie in one stretch.
        inside = np.zeros(rows, np.float32)
        inside[reach:last] = (unit[: last - reach] == unit[2 * reach + partner :]) & fresh[reach:last]
        if inside.sum() < 32:
            continue
        alike = np.zeros((layers, rows + 2 * reach), np.float32)
        here = alike[:, reach : reach + rows]
        here[:, :-partner] = shared(sets[..., partner:], sets[..., :-partner])
        here -= ((here @ inside) / inside.sum())[:, None]
        first = _cut(here[:-1] * inside, batches, length)
        for offset, total in sums.items():
            second = _cut(alike[1:, reach + offset : reach + offset + rows], batches, length)
            total += np.einsum("lbt,lbt->lb", first, second)
        number += _cut(inside[None], batches, length).sum(axis=-1)[0]
    enough = number * 2 >= length
    return {offset: total[:, enough] / number[enough] for offset, total in sums.items()}


def _cut(values: NDArray[np.float32], batches: int, length: int) -> NDArray[np.float32]:
    return values[:, : batches * length].reshape(len(values), batches, length)


def shifted_layers(sample: Sample, meta: TraceMeta) -> list[Finding]:
    """Find layers that are some tokens off: the dependence between adjacent layers must peak at offset 0.

    For each pair of adjacent layers the dependence (see ``_alignment``) at the offsets -3 .. 3 is compared
    with that at 0, in batches of rows. The excess exceeds its limit at any offset of any pair with a chance of 1e-6
    where the true peak is at 0, or where the layers are independent. A layer that depends on neither neighbour, while
    most pairs do clearly, is named too: a draft's router that overwrote it, or a shift by more.
    """
    rows, layers = sample.rows, len(meta.layers)
    if layers < 2 or rows < 64:
        return []
    dependence = _alignment(sample, meta)
    limit = z_limit((layers - 1) * len(_OFFSETS))
    offsets: dict[int, tuple[int, float]] = {}
    peaks: dict[int, int] = {}
    strengths = np.zeros(layers - 1)
    for pair in range(layers - 1 if dependence[0].shape[1] >= 3 else 0):
        strengths[pair] = z_score(dependence[0][pair])
        at = {offset: float(batches[pair].mean()) for offset, batches in dependence.items()}
        peaks[pair] = peak = max(at, key=lambda offset: at[offset])
        if peak == 0:
            continue
        z = z_score(dependence[peak][pair] - dependence[0][pair])
        if z > limit and at[peak] > 0:
            offsets[pair] = (peak, z)
    found = _shifts(offsets, peaks, meta, sample)
    # A layer of one set depends on nothing; it is a finding of its own.
    ids = sample.ids()
    foreign = [
        meta.layers[layer]
        for layer in _foreign(strengths, offsets, limit)
        if (np.sort(ids[:, layer], axis=1) != np.sort(ids[0, layer])).any()
    ]
    if foreign:
        found.append(
            Finding(
                "warning",
                "foreign-layer",
                f"layer {numbers(foreign)}, all requests",
                f"does not depend on its neighbours, while other adjacent layers do by {np.median(strengths):.0f} "
                f"standard errors ({sample.said()})",
                "per-layer results of this layer, and averages over layers, hold something else than its routing",
                "A draft's router that overwrites a layer does this (vLLM before 0.26, SGLang before 0.5.15), and a "
                f"shift by many tokens: capture again, or ingest with {layers_without(meta.layers, foreign)}",
            )
        )
    return found


def _shifts(
    offsets: dict[int, tuple[int, float]], peaks: dict[int, int], meta: TraceMeta, sample: Sample
) -> list[Finding]:
    found, done = [], set()
    for pair, (offset, z) in offsets.items():
        if pair in done:
            continue
        if peaks.get(pair + 1) == -offset:
            done.add(pair + 1)
            off = meta.layers[pair + 1 : pair + 2]
        elif pair == 0 and len(meta.layers) > 2:
            off = meta.layers[:1]
            offset = -offset
        else:
            off = meta.layers[pair + 1 :]
        found.append(
            Finding(
                "serious",
                "shifted-layers",
                f"layer{'s' if len(off) > 1 else ''} {numbers(off)}, all requests: "
                f"{counted(abs(offset), 'row')} too {'late' if offset > 0 else 'early'}",
                f"layers {meta.layers[pair]} and {meta.layers[pair + 1]} depend on each other most at an offset of "
                f"{offsets[pair][0]:+d} rows ({z:.0f} standard errors above 0; {sample.said()})",
                "results across layers (prefetch, cache with layers in turn) compare different tokens",
                f"Shift them back before saving, or ingest with {layers_without(meta.layers, off)}",
            )
        )
    return found


def _foreign(strengths: Floats, offsets: dict[int, tuple[int, float]], limit: float) -> list[int]:
    """Return layers without dependence on either neighbour where most pairs are far above the limit."""
    if len(strengths) < 4 or np.median(strengths) < 1.5 * limit or offsets:
        return []
    weak = strengths < 3
    layers = len(strengths) + 1
    return [
        layer for layer in range(layers) if all(weak[pair] for pair in (layer - 1, layer) if 0 <= pair < layers - 1)
    ]
