"""Rows, layers and requests that are copies of others: warm-up, filler, loops, byte-identical parts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tracekit.checks.chance import LOG_ALPHA, log_chance_of_repeats, log_sets
from tracekit.checks.finding import Finding, Severity, counted, layers_without, numbers, percent
from tracekit.checks.keys import Keys, RequestKeys, probes, set_keys
from tracekit.checks.sample import Ids, Sample
from tracekit.schema import Request, TraceMeta

Floats = NDArray[np.float64]

SHORTEST_RUN = 16
"""Identical rows in a row below which nothing is said or mended: a few spaces in a prompt make as many."""
_POOL = 200
"""Rows of other requests that count as evidence about one: requests differ, so the pool proves no more."""
_SHARE = 0.02
"""Share of the rows from which on copies move a headline number by as much as its interval is wide."""
_ROWS_KEPT = 16_384
_MANY = 200_000
"""Requests whose keys are kept; later ones are not compared with each other."""


def enough_choices(meta: TraceMeta) -> bool:
    """Return whether a router has at least 2^16 choices per token over all layers: with fewer, repeats mean nothing."""
    return len(meta.layers) * log_sets(meta.num_experts, meta.top_k) >= 16 * math.log(2)


def leading_run(rows: Keys) -> int:
    """Return the rows of the run at the start, 0 where it is too short to mean anything."""
    other = np.flatnonzero(rows[: 2 * SHORTEST_RUN] != rows[0]) if len(rows) else np.zeros(0)
    if len(rows) < SHORTEST_RUN or (len(other) and other[0] < SHORTEST_RUN):
        return 0
    other = np.flatnonzero(rows != rows[0])
    return int(other[0]) if len(other) else len(rows)


def run_starts(rows: Keys) -> NDArray[np.intp]:
    """Return where runs of equal rows start, ``[runs]``, the first at 0."""
    return np.concatenate([[0], np.flatnonzero(rows[1:] != rows[:-1]) + 1]).astype(np.intp)


@dataclass(slots=True)
class _Runs:
    """Long runs of one row at the start (or end) of requests, that wait for the rate of repeats in the whole trace."""

    requests: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    """Request id, row value, rows of the run, and how many of its other pairs repeat, of how many."""

    def significant(self, pool: tuple[int, int], tests: int) -> list[tuple[str, int, int]]:
        """Return id, value and rows of the runs that are no chance, with the trace's ``pool`` as weak evidence."""
        repeats, pairs = pool
        scale = min(1.0, _POOL / pairs) if pairs else 0.0
        limit = LOG_ALPHA - math.log(max(1, tests))
        return [
            (request_id, value, run)
            for request_id, value, run, x, n in self.requests
            if log_chance_of_repeats(run, x + round(scale * repeats), n + round(scale * pairs)) < limit
        ]


class RepeatedRows:
    """Warm-up rows before, and filler rows after, the routing of real tokens.

    A warm-up or profiling pass routes one dummy token again and again: a request starts with (or is) a run of one row,
    equal in every layer and rank. In a sound trace the next row repeats this one at a rate that is estimated from the
    request's other rows (and, as at most 200 rows, from the rest of the trace); a run longer than that
    rate allows with a chance of 1e-6 per trace is a finding. Trainers and servers that pad copy the last
    row: the same at the end; where token ids say that one token was generated again and again, it is not filler.
    Routers that have fewer than 2^16 choices per token over all layers are not judged.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.judged = enough_choices(meta)
        self.tokens = self.requests = 0
        self.leading, self.trailing = _Runs(), _Runs()
        self.repeats = self.pairs = 0
        self.long_runs: Counter[int] = Counter()
        """Rows in long runs, by value of the row."""
        self.single: list[Keys] = []
        """Some rows of the trace, for the share of its most frequent one."""
        self.kept = 0

    def add(self, request: Request, keys: RequestKeys) -> None:
        """Take a request's rows."""
        rows = keys.rows
        n = len(rows)
        self.requests += 1
        self.tokens += n
        if not self.judged or n < 2:
            return
        starts = run_starts(rows)
        lengths = np.diff(np.append(starts, n))
        first, last = int(lengths[0]), int(lengths[-1])
        head, tail = first >= SHORTEST_RUN, last >= SHORTEST_RUN and len(lengths) > 1
        long = np.flatnonzero(lengths >= SHORTEST_RUN)
        for run in long[:64].tolist():
            if len(self.long_runs) < 4096 or int(rows[starts[run]]) in self.long_runs:
                self.long_runs[int(rows[starts[run]])] += int(lengths[run])
        # Pairs outside the runs in question, and outside others of the same rows.
        inner = lengths[(1 if head else 0) : len(lengths) - (1 if tail else 0)]
        values = rows[starts][(1 if head else 0) : len(lengths) - (1 if tail else 0)]
        other = inner[~np.isin(values, rows[starts[long]])] if len(long) else inner
        pairs, repeats = int(other.sum()), int((other - 1).sum())
        self.pairs += pairs
        self.repeats += repeats
        if head and len(self.leading.requests) < 4096:
            self.leading.requests.append((request.request_id, int(rows[0]), first, repeats, pairs))
        if tail and len(self.trailing.requests) < 4096 and not _one_token(request, n - last):
            self.trailing.requests.append((request.request_id, int(rows[-1]), last, repeats, pairs))
        self._keep(rows[:: max(1, n // 128)])

    def merge(self, other: RepeatedRows) -> None:
        """Add what was seen of the requests that follow."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.repeats += other.repeats
        self.pairs += other.pairs
        self.long_runs += other.long_runs
        self.leading.requests += other.leading.requests
        self.trailing.requests += other.trailing.requests
        for rows in other.single:
            self._keep(rows)

    def _keep(self, rows: Keys) -> None:
        if self.kept < _ROWS_KEPT:
            self.single.append(rows)
            self.kept += len(rows)

    def findings(self) -> list[Finding]:
        """Return ``warm-up`` and ``filler-rows``."""
        pool = (self.repeats, self.pairs)
        found = []
        heads = self.leading.significant(pool, self.requests)
        if heads:
            values = {value for _, value, _ in heads}
            rows = max(sum(run for *_, run in heads), sum(self.long_runs[value] for value in values))
            found.append(
                Finding(
                    self._severity(rows),
                    "warm-up",
                    _places([request_id for request_id, *_ in heads]) + ", leading rows",
                    f"{counted(rows, 'row')} ({percent(rows, self.tokens)}) in runs of up to "
                    f"{max(r for *_, r in heads)} identical rows; "
                    f"{percent(self.repeats, self.pairs)} of the other rows repeat the row before",
                    "overlap and reductions are those of a dummy token; popularity and load are skewed to its experts",
                    "Ingest with --drop-warmup",
                )
            )
        elif modal := self._modal():
            found.append(modal)
        tails = self.trailing.significant(pool, self.requests)
        tails = [t for t in tails if t[1] not in {value for _, value, _ in heads}]
        if tails:
            rows = sum(run - 1 for *_, run in tails)
            found.append(
                Finding(
                    self._severity(rows),
                    "filler-rows",
                    _places([request_id for request_id, *_ in tails]) + ", last rows",
                    f"{counted(rows, 'row')} ({percent(rows, self.tokens)}) are copies of the row before, "
                    f"in runs of up to {max(r for *_, r in tails)}",
                    "overlap and reductions are overstated, load is skewed to the copied experts",
                    "Cut each request at its real length (prompt + output - 1) before saving",
                )
            )
        return found

    def _severity(self, rows: int) -> Severity:
        return "serious" if rows >= _SHARE * self.tokens else "warning"

    def _modal(self) -> Finding | None:
        """Find one routing that makes up much of the trace without standing at the start of requests.

        Padding slots of a batch look like this. It must be at least a fifth of the rows, come back in many places, and
        be ten times as frequent as the next: a router with as many choices does not do that for different tokens.
        """
        if not self.single:
            return None
        rows = np.concatenate(self.single)
        values, counts = np.unique(rows, return_counts=True)
        top = int(counts.argmax())
        share, second = counts[top] / len(rows), np.partition(counts, -2)[-2] / len(rows) if len(counts) > 1 else 0.0
        runs = sum(int((piece[run_starts(piece)] == values[top]).sum()) for piece in self.single)
        if len(rows) < 128 or share < 0.2 or second > share / 10 or runs < 8:
            return None
        return Finding(
            "serious",
            "warm-up",
            f"one routing in {counted(runs, 'place')} of the rows looked at",
            f"it makes up {100 * share:.3g} % of {len(rows):,} rows, the next most frequent {100 * second:.2g} %",
            "overlap and reductions are those of a dummy token; popularity and load are skewed to its experts",
            "Rows of padding slots or profiling passes: leave them out before saving",
        )


def _one_token(request: Request, start: int) -> bool:
    return request.token_ids is not None and bool((request.token_ids[start:] == request.token_ids[start]).all())


def _places(request_ids: list[str]) -> str:
    some = ", ".join(repr(name) for name in request_ids[:2])
    more = f" and {len(request_ids) - 2:,} more" if len(request_ids) > 2 else ""
    return f"request{'s' if len(request_ids) > 1 else ''} {some}{more}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A request that others are compared with."""

    number: int
    """Which of the trace it is."""
    request_id: str
    rows: int
    distinct: int
    """Rows that differ from the one before."""
    head: int | None
    """Key of its first row, where all rows are decode, from position 0 on, and no prompt is known."""


class Copies:
    """Layers that are copies of other layers, and requests that are copies of other requests.

    Compared by key, over every row, ids and ranks. Two layers (requests) agree in every one of d rows that differ from
    the row before with a chance of at most m^d, where m is the share of the most frequent set (row) in the sample;
    over all pairs this must be below 1e-6.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.layers: Counter[tuple[int, int]] = Counter()
        """Tokens for which a layer equals the next layer with the same key."""
        self.changes: Counter[tuple[int, int]] = Counter()
        self.first: dict[int, _Seen] = {}
        """The first request of each key."""
        self.copies: list[tuple[int, _Seen]] = []
        """Key and request of those that were there before."""
        self.requests = self.tokens = 0

    def add(self, request: Request, keys: RequestKeys) -> None:
        """Take a request's keys."""
        n = len(keys.rows)
        self.requests += 1
        self.tokens += n
        distinct = len(run_starts(keys.rows)) if n else 0
        order = np.argsort(keys.layers, kind="stable")
        same = np.flatnonzero(keys.layers[order][1:] == keys.layers[order][:-1])
        for at in same.tolist():
            pair = (int(order[at]), int(order[at + 1]))
            self.layers[pair] += n
            of_pair = request.ids[:, pair[0]]
            self.changes[pair] += 1 + int((of_pair[1:] != of_pair[:-1]).any(axis=1).sum())
        if n == 0:
            return
        claimed = request.prompt_len is None and request.decode_start == 0
        head = int(keys.rows[0]) if claimed and not leading_run(keys.rows) else None
        self._compare(keys.request, _Seen(self.requests, request.request_id, n, distinct, head))

    def heads(self) -> Counter[int]:
        """Return how many different requests start with which row, of those that are called decode without a prompt."""
        return Counter(seen.head for seen in self.first.values() if seen.head is not None)

    def _compare(self, key: int, seen: _Seen) -> None:
        if key in self.first:
            if len(self.copies) < 4096:
                self.copies.append((key, seen))
        elif len(self.first) < _MANY:
            self.first[key] = seen

    def merge(self, other: Copies) -> None:
        """Add what was seen of the requests that follow: those equal to one of these are copies."""
        theirs = sorted([*other.first.items(), *other.copies], key=lambda pair: pair[1].number)
        for key, seen in theirs:
            self._compare(key, replace(seen, number=self.requests + seen.number))
        self.layers += other.layers
        self.changes += other.changes
        self.requests += other.requests
        self.tokens += other.tokens

    def findings(self, sample: Sample, rows: Keys) -> list[Finding]:
        """Return ``identical-layers`` and ``identical-requests``.

        Parameters
        ----------
        rows
            Keys of some rows of the trace.
        """
        found = []
        layers = len(self.meta.layers)
        if self.layers:
            ids = sample.ids()
            modal = {
                layer: _modal_share(set_keys(ids[:, [layer]], self.meta.num_experts)[:, 0]) for layer, _ in self.layers
            }
            limit = LOG_ALPHA - 2 * math.log(layers)
            pairs = [p for p in self.layers if self.changes[p] * math.log(modal[p[0]]) < limit]
            groups: list[set[int]] = []
            for pair in sorted(pairs):
                joined = next((g for g in groups if g & set(pair)), None)
                if joined is None:
                    groups.append(set(pair))
                else:
                    joined.update(pair)
            for group in groups:
                tokens = max(self.layers[p] for p in pairs if p[0] in group)
                same = sorted(self.meta.layers[layer] for layer in group)
                found.append(
                    Finding(
                        "serious",
                        "identical-layers",
                        f"layers {numbers(same)}",
                        f"byte-identical in {tokens:,} of {self.tokens:,} rows",
                        "averages over layers count one layer several times, and intervals are too narrow",
                        f"Ingest with {layers_without(self.meta.layers, same[1:])} if layer {same[0]} is right; "
                        "better capture again",
                    )
                )
        share = _modal_share(rows) if len(rows) else 1.0
        limit = LOG_ALPHA - 2 * math.log(max(1, self.requests))
        copies = [c for c in self.copies if share < 1 and c[1].distinct * math.log(share) < limit]
        if copies:
            total = sum(seen.rows for _, seen in copies)
            first, second = self.first[copies[0][0]].request_id, copies[0][1].request_id
            found.append(
                Finding(
                    "serious" if total >= 0.25 * self.tokens else "warning",
                    "identical-requests",
                    f"request {second!r} equals {first!r}"
                    + (f", and {len(copies) - 1:,} more do" if len(copies) > 1 else ""),
                    f"{counted(len(copies), 'request')} of {self.requests:,} ({percent(total, self.tokens)} of the "
                    "rows) equal an earlier one in every id",
                    "they count several times: intervals are too narrow, batches share more experts than they would",
                    "Leave the copies out before saving (n > 1 greedy choices, or a response saved twice)",
                )
            )
        return found


def _modal_share(keys: Keys) -> float:
    """Return a cautious share of the most frequent key."""
    _, counts = np.unique(keys, return_counts=True)
    most = int(counts.max())
    return min(1.0, (most + 3 * math.sqrt(most) + 3) / len(keys)) if len(keys) > 16 else 1.0


class Loops:
    """Generations that repeat themselves: at some lag p, and at 2p, 3p, …, the sets are the same.

    In blocks of 64 generated rows, for every lag of 1 to 32, the share of layers (some of them) whose whole set is that
    of the row ``lag`` later; the score of a period is the least share over its multiples. In sampled and in human text
    the worst blocks of real models score 0.2 (32 experts, 24 layers) to 0.4 (small ones), greedy loops 0.6 to 1. A
    block is a loop from 0.6 on, or from q + 0.46 where far rows of the trace agree at a rate q: by Hoeffding's bound 48
    rows (the shortest block) that agree at a rate q do so with a chance below exp(-2 * 48 * 0.46^2) = 2e-9, and they
    would have to do so at every multiple of the period. Of longer periods, up to a third of a piece of 4,096 rows,
    the one is tried at which most runs of four sets of one layer come back; there a block must be like those one and
    two periods later, so that a passage that is quoted once is no loop.
    Prompts are not judged: what repeats there was asked for. Nor are routers with fewer than 2^16 choices per token.
    """

    BLOCK, LAGS, BINS = 64, 32, 50
    LAYERS = 6
    THRESHOLD, MARGIN = 0.6, 0.46

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.judged = enough_choices(meta)
        self.layers = probes(len(meta.layers), self.LAYERS)
        self.generated = 0
        self.scores = np.zeros(self.BINS + 1, np.int64)
        """Rows of blocks by score."""
        self.worst: list[tuple[float, str, int, int]] = []
        """Score, request id, first row and period of some of the worst blocks."""

    def add(self, request: Request, leading: int) -> None:
        """Take a request: its generated rows after a leading run, all of them where the phase is not known."""
        start = max(_first_generated(request), leading)
        ids = request.ids[start:]
        n = len(ids)
        self.generated += n
        if n < self.BLOCK + self.LAGS // 2 or not self.judged:
            return
        step = 64 * self.BLOCK
        for low in range(0, n, step):
            self._scan(request.request_id, start + low, ids[low : low + step + self.LAGS][:, self.layers])

    def merge(self, other: Loops) -> None:
        """Add what was seen of the requests that follow."""
        self.generated += other.generated
        self.scores += other.scores
        self.worst += other.worst
        self._prune()

    def _prune(self) -> None:
        if len(self.worst) > 4096:
            self.worst = sorted(self.worst, reverse=True)[:2048]

    def _scan(self, request_id: str, start: int, ids: Ids) -> None:
        keys = set_keys(ids, self.meta.num_experts)
        n = len(keys)
        if n < self.LAGS + self.BLOCK // 2:
            return
        blocks = max(1, round((n - self.LAGS) / self.BLOCK))
        size = (n - self.LAGS) // blocks
        shares = self._shares(keys, blocks, size)
        best, period = np.zeros(blocks), np.ones(blocks, np.int64)
        if shares.max() >= self.THRESHOLD:
            best, period = self._periods(shares)
        weights = np.full(blocks, size)
        weights[-1] += self.LAGS if n < 64 * self.BLOCK + self.LAGS else 0
        np.add.at(self.scores, (best * self.BINS).astype(int), weights)
        for at in np.flatnonzero(best >= self.THRESHOLD).tolist():
            self.worst.append((float(best[at]), request_id, start + at * size, int(period[at])))
        if best.max() < self.THRESHOLD:
            self._scan_long(request_id, start, keys)
        self._prune()

    def _shares(self, keys: Keys, blocks: int, size: int) -> Floats:
        """Return which share of a block's sets is that of the row some rows later, ``[lags, blocks]``."""
        by_layer = np.ascontiguousarray(keys.T)
        layers, rows = len(by_layer), blocks * size
        step, one = by_layer.strides
        shape = (self.LAGS, layers, rows)
        later: Keys = np.ndarray(shape, by_layer.dtype, by_layer, one, (one, step, one))  # a view, moved by 1, 2, …
        same = (later == by_layer[:, :rows]).view(np.uint8)
        equal = same.sum(axis=1, dtype=np.min_scalar_type(layers))  # the smallest type is the fastest
        return np.asarray(equal.reshape(self.LAGS, blocks, size).sum(axis=2) / (layers * size))

    def _scan_long(self, request_id: str, start: int, keys: Keys) -> None:
        """Look for a period above ``LAGS // 2`` in ``[rows, layers]`` keys."""
        one = keys[:, keys.shape[1] // 2]
        runs = one[:-3] + (one[1:-2] << np.uint64(1)) + (one[2:-1] << np.uint64(2)) + (one[3:] << np.uint64(3))
        order = np.argsort(runs, kind="stable")
        # From each run of four sets to the next equal one.
        far = np.diff(order)[runs[order][1:] == runs[order][:-1]]
        counts = np.bincount(far[(far > self.LAGS // 2) & (far <= len(keys) // 3)], minlength=1)
        period = int(counts.argmax())
        if counts[period] < self.BLOCK // 2:
            return
        cycles = keys[: len(keys) - 2 * period], keys[period : len(keys) - period], keys[2 * period :]
        blocks = max(1, len(cycles[0]) // self.BLOCK)
        size = len(cycles[0]) // blocks
        same = np.stack([cycles[0] == later for later in cycles[1:]])[:, : blocks * size]
        scores = same.reshape(2, blocks, -1).mean(axis=2).min(axis=0)
        looped = np.zeros(len(keys), bool)
        for at in np.flatnonzero(scores >= self.THRESHOLD).tolist():
            looped[at * size : (at + 1) * size + 2 * period] = True
            self.worst.append((float(scores[at]), request_id, start + at * size, period))
        if looped.any():
            least = scores[scores >= self.THRESHOLD].min()
            rows = int(looped[: 64 * self.BLOCK].sum())
            self.scores[0] -= rows
            self.scores[int(least * self.BINS)] += rows

    def _periods(self, shares: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Return score and period of each block from its ``[lags, blocks]`` shares of equal sets."""
        best, period = np.zeros(shares.shape[1]), np.ones(shares.shape[1], np.int64)
        for p in range(1, self.LAGS // 2 + 1):
            least = shares[p - 1 :: p].min(axis=0)
            # Where neighbours are more alike than rows a period apart, the overlap falls with the lag: no loop.
            least = np.where(least >= shares[:p].max(axis=0) - 0.1, least, 0)
            better = least > best + 1e-9
            best[better], period[better] = least[better], p
        return best, period

    def findings(self, sample: Sample) -> list[Finding]:
        """Return ``loops``: serious where a third of what was generated is in them."""
        if not self.worst:
            return []
        sets = set_keys(sample.ids()[:, self.layers], self.meta.num_experts)
        threshold = max(self.THRESHOLD, _agreement(sets) + self.MARGIN)
        looped = int(self.scores[math.ceil(threshold * self.BINS - 1e-9) :].sum())
        worst = [w for w in self.worst if w[0] >= threshold]
        if not worst or not looped:
            return []
        score, request_id, row, period = max(worst)
        requests = len({name for _, name, *_ in worst})
        return [
            Finding(
                "serious" if looped >= self.generated / 3 else "warning",
                "loops",
                f"request {request_id!r} from row {row}"
                + (f", and {counted(requests - 1, 'more request')}" if requests > 1 else ""),
                f"{percent(looped, self.generated)} of {self.generated:,} generated rows repeat earlier ones "
                f"again and again; the clearest every {counted(period, 'row')} "
                f"({100 * score:.0f} % equal sets)",
                "overlap and reductions are overstated: they measure the loop, not the workload",
                "Sample with a temperature or a repetition penalty, or leave these requests out",
            )
        ]


def _first_generated(request: Request) -> int:
    """Return the first row at or after the start of decode; 0 where the phase is not known."""
    if request.decode_start is None:
        return 0
    if request.positions is None:
        return min(len(request.ids), max(0, request.decode_start - request.first_pos))
    return int(np.searchsorted(request.positions, request.decode_start))


def _agreement(keys: Keys) -> float:
    """Return the mean rate at which two far rows of a layer have the same set, from ``[rows, layers]`` keys."""
    rates = []
    for layer in range(keys.shape[1]):
        _, counts = np.unique(keys[:, layer], return_counts=True)
        rates.append(float((counts * (counts - 1.0)).sum() / max(1, len(keys) * (len(keys) - 1))))
    return float(np.mean(rates))
