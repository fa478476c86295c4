"""The reference: every definition once more, with Python sets and exact fractions.

Slow on purpose and written from the definitions alone; it shares no code with the library.
A request is a dict with

``request_id``, ``label`` (or None), ``decode_start`` (or None: phase unknown),
``first_pos`` or ``positions``, and ``ids[token][layer][rank]`` (an array or nested lists).

Counts, means and baselines are ``Fraction``; logarithms, roots and intervals are floats. ``None``
stands where a number is undefined. Conventions that the definitions leave open are marked with
"Convention:".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from typing import Any

TraceRequest = dict[str, Any]
Number = Fraction | float | None


# --- what may be looked at ---------------------------------------------------------------------


def positions(request: TraceRequest) -> list[int]:
    if request.get("positions") is not None:
        return [int(p) for p in request["positions"]]
    first = int(request.get("first_pos", 0))
    return list(range(first, first + len(request["ids"])))


def default_phase(requests: Sequence[TraceRequest]) -> str:
    """Decode where the trace knows it, else what there is."""
    return "all" if any(r.get("decode_start") is None for r in requests) else "decode"


def segments(request: TraceRequest, phase: str) -> list[list[int]]:
    """Row numbers of each run of consecutive positions inside one phase.

    Convention: ``all`` takes both phases, and no run crosses the border between them.
    """
    start = request.get("decode_start")
    runs: list[list[int]] = []
    last: tuple[int, bool | None] | None = None
    for row, pos in enumerate(positions(request)):
        decode = None if start is None else pos >= start
        if phase != "all" and decode is not (phase == "decode"):
            last = None
            continue
        if last != (pos - 1, decode):
            runs.append([])
        runs[-1].append(row)
        last = (pos, decode)
    return runs


def parts(request: TraceRequest, phase: str) -> list[str]:
    """The phases inside which the request's tokens may be shuffled: ``all`` is prefill and decode, each by itself."""
    return ["prefill", "decode"] if phase == "all" and request.get("decode_start") is not None else [phase]


def rows(request: TraceRequest, phase: str) -> list[int]:
    return [row for run in segments(request, phase) for row in run]


def windows(request: TraceRequest, phase: str, window: int, overlapping: bool = True) -> list[list[int]]:
    step = 1 if overlapping else window
    return [run[i : i + window] for run in segments(request, phase) for i in range(0, len(run) - window + 1, step)]


def pairs(request: TraceRequest, phase: str, lag: int) -> list[tuple[int, int]]:
    """Convention: both tokens of a pair lie in one run, like the tokens of a window."""
    return [(run[i], run[i + lag]) for run in segments(request, phase) for i in range(len(run) - lag)]


def experts(request: TraceRequest, row: int, layer: int) -> set[int]:
    return {int(e) for e in request["ids"][row][layer]}


def union(request: TraceRequest, window: list[int], layer: int) -> set[int]:
    return set().union(*(experts(request, row, layer) for row in window))


def counts(requests: Sequence[TraceRequest], phase: str, layer: int) -> tuple[Counter[int], int]:
    """Return c_e and n of a pool of requests."""
    c: Counter[int] = Counter()
    n = 0
    for request in requests:
        for row in rows(request, phase):
            c.update(experts(request, row, layer))
            n += 1
    return c, n


def num_layers(requests: Sequence[TraceRequest]) -> int:
    return len(requests[0]["ids"][0])


def mean(values: Sequence[Number]) -> Number:
    if not values or any(v is None for v in values):
        return None
    return sum(values) / Fraction(len(values))  # type: ignore[arg-type]


def ratio(a: Number, b: Number) -> Number:
    return None if a is None or b is None or b == 0 else a / b


def reduction(observed: Number, baseline: Number) -> Number:
    share = ratio(observed, baseline)
    return None if share is None else 1 - share


# --- 1. unique experts per window --------------------------------------------------------------


def n_windows(requests: Sequence[TraceRequest], phase: str, window: int, overlapping: bool = True) -> int:
    return sum(len(windows(r, phase, window, overlapping)) for r in requests)


def observed_unique(
    requests: Sequence[TraceRequest], phase: str, layer: int, window: int, overlapping: bool = True
) -> Number:
    """U(T, l): the mean size of the union over all windows, every window weighing the same."""
    sizes = [len(union(r, w, layer)) for r in requests for w in windows(r, phase, window, overlapping)]
    return Fraction(sum(sizes), len(sizes)) if sizes else None


def q_observed(
    requests: Sequence[TraceRequest], num_experts: int, phase: str, layer: int, window: int, overlapping: bool = True
) -> list[Fraction] | None:
    """q_e: the share of windows that contain expert e."""
    c: Counter[int] = Counter()
    n = 0
    for request in requests:
        for w in windows(request, phase, window, overlapping):
            c.update(union(request, w, layer))
            n += 1
    return [Fraction(c[e], n) for e in range(num_experts)] if n else None


def q_popularity(c: Counter[int], n: int, num_experts: int, window: int) -> list[Fraction]:
    return [1 - (1 - Fraction(c[e], n)) ** window for e in range(num_experts)]


def q_rarefied(c: Counter[int], n: int, num_experts: int, window: int) -> list[Fraction]:
    """Share of the T-subsets of n tokens that contain expert e: sampling without replacement."""
    return [1 - Fraction(math.comb(n - c[e], window), math.comb(n, window)) for e in range(num_experts)]


def q_label(
    requests: Sequence[TraceRequest],
    pool: Sequence[TraceRequest],
    num_experts: int,
    phase: str,
    layer: int,
    window: int,
    overlapping: bool = True,
) -> list[Fraction] | None:
    """q_e of each label, weighted by the windows that ``requests`` have in it; p_e is the label's in ``pool``.

    Convention: requests without a label are one label more; undefined where no request has one.
    """
    if all(r.get("label") is None for r in pool):
        return None
    total = [Fraction(0)] * num_experts
    weight = 0
    for label in {r["label"] for r in requests}:
        w = n_windows([r for r in requests if r["label"] == label], phase, window, overlapping)
        if w:
            c, n = counts([r for r in pool if r["label"] == label], phase, layer)
            total = [t + w * q for t, q in zip(total, q_popularity(c, n, num_experts, window), strict=True)]
            weight += w
    return [t / weight for t in total] if weight else None


def q_request(
    requests: Sequence[TraceRequest], num_experts: int, phase: str, layer: int, window: int, overlapping: bool = True
) -> list[Fraction] | None:
    """Rarefaction inside each request, weighted by its windows.

    Convention: n and c_e are those of all the request's tokens in the phase, holes or not.
    """
    total = [Fraction(0)] * num_experts
    weight = 0
    for request, part in ((r, part) for r in requests for part in parts(r, phase)):
        w = len(windows(request, part, window, overlapping))
        if w:
            c, n = counts([request], part, layer)
            total = [t + w * q for t, q in zip(total, q_rarefied(c, n, num_experts, window), strict=True)]
            weight += w
    return [t / weight for t in total] if weight else None


def batch_union(q: Sequence[Fraction] | None, batch_size: int) -> Number:
    """Union of ``batch_size`` windows drawn independently: sum over e of 1 - (1 - q_e)^B."""
    return None if q is None else sum((1 - (1 - x) ** batch_size for x in q), Fraction(0))


def window_row(
    requests: Sequence[TraceRequest],
    num_experts: int,
    top_k: int,
    *,
    window: int,
    batch_size: int = 1,
    phase: str | None = None,
    overlapping: bool = True,
    layers: Sequence[int] | None = None,
    pool: Sequence[TraceRequest] | None = None,
) -> dict[str, Any]:
    """One row of ``windows``: ``requests`` are the group's, ``pool`` is the whole trace."""
    pool = requests if pool is None else pool
    phase = default_phase(pool) if phase is None else phase
    layers = range(num_layers(pool)) if layers is None else layers
    T, B = window, batch_size
    # Convention: a request counts for "B exceeds the number of requests" if it has a window of length T.
    drawable = sum(1 for r in requests if windows(r, phase, T, overlapping))

    observed: list[Number] = []
    popularity: list[Number] = []
    label: list[Number] = []
    request: list[Number] = []
    for layer in layers:
        if B == 1:
            observed.append(observed_unique(requests, phase, layer, T, overlapping))
        else:
            observed.append(batch_union(q_observed(requests, num_experts, phase, layer, T, overlapping), B))
        c, n = counts(pool, phase, layer)
        popularity.append(sum(q_popularity(c, n, num_experts, T * B), Fraction(0)) if n else None)
        label.append(batch_union(q_label(requests, pool, num_experts, phase, layer, T, overlapping), B))
        request.append(batch_union(q_request(requests, num_experts, phase, layer, T, overlapping), B))

    there = drawable >= B and drawable > 0
    row: dict[str, Any] = {
        "batch_size": B,
        "window": T,
        "n_windows": n_windows(requests, phase, T, overlapping),
        "observed": mean(observed) if there else None,
        "expected_uniform": num_experts * (1 - (1 - Fraction(top_k, num_experts)) ** (T * B)),
        "expected_popularity": mean(popularity),
        "expected_label": mean(label) if there else None,
        "expected_request": mean(request) if there else None,
    }
    row["per_top_k"] = ratio(row["observed"], Fraction(top_k))
    for name in ("uniform", "popularity", "label", "request"):
        row[f"reduction_{name}"] = reduction(row["observed"], row[f"expected_{name}"])
    return row


def distinct_requests_unique(
    requests: Sequence[TraceRequest],
    num_experts: int,
    *,
    window: int,
    batch_size: int,
    phase: str | None = None,
) -> Number:
    """Union of a random window from each of B distinct requests: the recursion over f_b."""
    phase = default_phase(requests) if phase is None else phase
    requests = [r for r in requests if windows(r, phase, window)]
    if batch_size > len(requests):
        return None
    per_layer: list[Number] = []
    for layer in range(num_layers(requests)):
        total = Fraction(0)
        q = [q_observed([r], num_experts, phase, layer, window) for r in requests]
        for e in range(num_experts):
            f = [Fraction(1)] + [Fraction(0)] * batch_size
            for r, q_r in enumerate(q, start=1):
                assert q_r is not None
                for b in range(min(batch_size, r), 0, -1):
                    f[b] = Fraction(r - b, r) * f[b] + Fraction(b, r) * (1 - q_r[e]) * f[b - 1]
            total += 1 - f[batch_size]
        per_layer.append(total)
    return mean(per_layer)


def enumerate_batches(
    requests: Sequence[TraceRequest], *, window: int, batch_size: int, phase: str | None = None, distinct: bool = False
) -> Number:
    """Batched unions by listing every possible batch, to check the closed forms against."""
    phase = default_phase(requests) if phase is None else phase
    per_layer: list[Number] = []
    for layer in range(num_layers(requests)):
        by_request = [[union(r, w, layer) for w in windows(r, phase, window)] for r in requests]
        if distinct:
            choices = [
                mean([Fraction(len(set().union(*batch))) for batch in product(*chosen)])
                for chosen in combinations(by_request, batch_size)
            ]
        else:
            everything = [u for unions in by_request for u in unions]
            choices = [Fraction(len(set().union(*batch))) for batch in product(everything, repeat=batch_size)]
        per_layer.append(mean(choices))
    return mean(per_layer)


# --- 2. temporal autocorrelation ---------------------------------------------------------------


def autocorr_row(
    requests: Sequence[TraceRequest],
    num_experts: int,
    top_k: int,
    *,
    lag: int,
    phase: str | None = None,
    layers: Sequence[int] | None = None,
    pool: Sequence[TraceRequest] | None = None,
    router_order: bool = True,
) -> dict[str, Any]:
    """One row of ``autocorr``: ``requests`` are the group's, ``pool`` is the whole trace."""
    pool = requests if pool is None else pool
    phase = default_phase(pool) if phase is None else phase
    layers = range(num_layers(pool)) if layers is None else layers
    columns: dict[str, list[Number]] = {
        name: [] for name in ("overlap", "jaccard", "any_shared", "rank0_repeat", "popularity", "request")
    }
    n_pairs = sum(len(pairs(r, phase, lag)) for r in requests)
    for layer in layers:
        overlap: list[Number] = []
        jaccard: list[Number] = []
        any_shared: list[Number] = []
        rank0: list[Number] = []
        expected = Fraction(0)
        for request in requests:
            for a, b in pairs(request, phase, lag):
                x, y = experts(request, a, layer), experts(request, b, layer)
                overlap.append(Fraction(len(x & y), top_k))
                jaccard.append(Fraction(len(x & y), len(x | y)))
                any_shared.append(Fraction(int(bool(x & y))))
                first = int(request["ids"][a][layer][0]), int(request["ids"][b][layer][0])
                rank0.append(Fraction(int(first[0] == first[1])))
            for part in parts(request, phase):
                weight = len(pairs(request, part, lag))
                if weight:
                    c, n = counts([request], part, layer)
                    same = sum(v * (v - 1) for v in c.values())
                    expected += weight * Fraction(same, n * (n - 1) * top_k)
        c, n = counts(pool, phase, layer)
        columns["popularity"].append(sum(Fraction(v, n) ** 2 for v in c.values()) / Fraction(top_k) if n else None)
        columns["request"].append(expected / n_pairs if n_pairs else None)
        for name, values in (
            ("overlap", overlap),
            ("jaccard", jaccard),
            ("any_shared", any_shared),
            ("rank0_repeat", rank0),
        ):
            columns[name].append(mean(values))

    row: dict[str, Any] = {
        "lag": lag,
        "n_pairs": n_pairs,
        "overlap": mean(columns["overlap"]),
        "expected_uniform": Fraction(top_k, num_experts),
        "expected_popularity": mean(columns["popularity"]),
        "expected_request": mean(columns["request"]),
        "jaccard": mean(columns["jaccard"]),
        "any_shared": mean(columns["any_shared"]),
        "rank0_repeat": mean(columns["rank0_repeat"]) if router_order else None,
    }
    row["rho"] = _rho(row["overlap"], row["expected_popularity"])
    row["rho_request"] = _rho(row["overlap"], row["expected_request"])
    return row


def _rho(overlap: Number, expected: Number) -> Number:
    return None if overlap is None or expected is None or expected == 1 else (overlap - expected) / (1 - expected)


# --- uncertainty -------------------------------------------------------------------------------


def jackknife(
    requests: Sequence[TraceRequest],
    statistic: Callable[[Sequence[TraceRequest]], Number],
    groups: Sequence[Sequence[int]] | None = None,
) -> dict[str, float] | None:
    """Delete-a-group jackknife over whole requests; None below 5 groups or where undefined.

    ``groups`` lists the request numbers of each group; default: one request a group.
    ``bias`` is the estimated bias of the plain estimate, ``theta - theta_bc``.
    """
    if groups is None:
        groups = [[i] for i in range(len(requests))]
    G = len(groups)
    if G < 5:
        return None
    theta = statistic(requests)
    without = [statistic([r for i, r in enumerate(requests) if i not in set(group)]) for group in groups]
    if theta is None or any(v is None for v in without):
        return None
    values = [float(v) for v in without if v is not None]
    centre = sum(values) / G
    corrected = G * float(theta) - (G - 1) * centre
    se = math.sqrt((G - 1) / G * sum((v - centre) ** 2 for v in values))
    half = _t975(G - 1) * se
    return {
        "theta": float(theta),
        "theta_bc": corrected,
        "bias": float(theta) - corrected,
        "se": se,
        "lo": corrected - half,
        "hi": corrected + half,
    }


@cache
def _t975(df: int) -> float:
    """Return the .975 quantile of Student's t by bisection on its integrated density."""

    def tail(x: float) -> float:
        # P(t > x) by Simpson's rule in the angle u = atan(t / sqrt(df)): the integrand is cos^(df-1).
        lo, hi, steps = math.atan(x / math.sqrt(df)), math.pi / 2, 2000
        h = (hi - lo) / steps
        total = 0.0
        for i in range(steps + 1):
            w = 1 if i in (0, steps) else 4 if i % 2 else 2
            total += w * max(0.0, math.cos(lo + i * h)) ** (df - 1)
        norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
        return norm * total * h / 3

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 0.025 else (low, middle)
    return (low + high) / 2


# --- attribution -------------------------------------------------------------------------------

CAUSES = ("popularity", "label", "request", "token_order")


def ladder(
    requests: Sequence[TraceRequest], num_experts: int, top_k: int, window: int, phase: str | None = None
) -> dict[str, Number]:
    row = window_row(requests, num_experts, top_k, window=window, phase=phase)
    rungs: dict[str, Number] = {name: row[f"expected_{name}"] for name in ("uniform", "popularity", "label", "request")}
    return {**rungs, "observed": row["observed"]}


def attribution(
    requests: Sequence[TraceRequest], num_experts: int, top_k: int, *, window: int = 4, phase: str | None = None
) -> list[dict[str, Any]]:
    """The telescoping shares with their intervals and what is resolved; needs 5 requests or more.

    Convention: ``resolved`` is True where the interval contains the plain estimate, and for the label
    cause also only where popularity >= label >= request and the interval of its share excludes 0.
    """
    ladders = {
        frozenset(r["request_id"] for r in subset): ladder(subset, num_experts, top_k, window, phase)
        for subset in _with_each_left_out(requests)
    }

    def at(subset: Sequence[TraceRequest]) -> dict[str, Number]:
        return ladders[frozenset(r["request_id"] for r in subset)]

    full = at(requests)
    total = jackknife(requests, lambda s: at(s)["uniform"] - at(s)["observed"])  # type: ignore[operator]
    assert total is not None, "the oracle attributes only with intervals"
    total_resolved = not total["lo"] <= 0 <= total["hi"]

    def share(before: str, after: str) -> dict[str, float] | None:
        return jackknife(
            requests,
            lambda s: (at(s)[before] - at(s)[after]) / (at(s)["uniform"] - at(s)["observed"]),  # type: ignore[operator]
        )

    use_label = full["label"] is not None and full["popularity"] >= full["label"] >= full["request"]  # type: ignore[operator]
    if use_label:
        interval = share("popularity", "label")
        use_label = interval is not None and not interval["lo"] <= 0 <= interval["hi"] and _contains(interval)
    steps = {
        "popularity": ("uniform", "popularity"),
        "label": ("popularity", "label") if use_label else None,
        "request": ("label" if use_label else "popularity", "request"),
        "token_order": ("request", "observed"),
    }
    out: list[dict[str, Any]] = []
    for cause in CAUSES:
        step = steps[cause]
        row: dict[str, Any] = {"cause": cause, "window": window}
        if step is None:
            row |= {"unique_before": full["popularity"], "unique_after": full["popularity"], "drop": Fraction(0)}
            row |= {"share": None, "share_lo": None, "share_hi": None, "resolved": False}
        else:
            before, after = full[step[0]], full[step[1]]
            interval = share(*step)
            assert before is not None
            assert after is not None
            assert interval is not None
            row |= {"unique_before": before, "unique_after": after, "drop": before - after}
            row |= {"share": interval["theta"], "share_lo": interval["lo"], "share_hi": interval["hi"]}
            row["resolved"] = _contains(interval)
        if not total_resolved:
            row |= {"share": None, "share_lo": None, "share_hi": None, "resolved": False}
        out.append(row)
    return out


def _contains(interval: dict[str, float]) -> bool:
    return interval["lo"] <= interval["theta"] <= interval["hi"]


def _with_each_left_out(requests: Sequence[TraceRequest]) -> Iterator[list[TraceRequest]]:
    yield list(requests)
    for i in range(len(requests)):
        yield [r for j, r in enumerate(requests) if j != i]


# --- 6. load -----------------------------------------------------------------------------------


def load_row(c: Counter[int], n: int, num_experts: int, top_k: int, top: int | None = None) -> dict[str, Any]:
    """Balance of one layer from its counts.

    Population standard deviation, uncorrected Gini, natural logarithms. Convention: ``top_share`` is
    the share of all activations that the ``top`` most used experts get; ``top`` is k by default.
    """
    every = sorted(c[e] for e in range(num_experts))
    total = sum(every)
    average = Fraction(total, num_experts)
    variance = sum((v - average) ** 2 for v in every) / num_experts
    entropy = -sum(v / total * math.log(v / total) for v in every if v)
    differences = sum(abs(a - b) for a in every for b in every)
    return {
        "tokens": n,
        "max_over_mean": max(every) / average,
        "cv": math.sqrt(variance) / float(average),
        "gini": Fraction(differences, 2 * num_experts * total),
        "entropy": entropy,
        "entropy_norm": entropy / math.log(num_experts),
        "effective_experts": math.exp(entropy),
        "dead_experts": every.count(0),
        "top_share": Fraction(sum(every[-(top or top_k) :]), total),
        "sum_p2_over_k": sum(Fraction(v, n) ** 2 for v in every) / top_k,
    }


def load_rows(
    requests: Sequence[TraceRequest], num_experts: int, top_k: int, *, phase: str | None = None
) -> list[dict[str, Any]]:
    phase = default_phase(requests) if phase is None else phase
    return [load_row(*counts(requests, phase, layer), num_experts, top_k) for layer in range(num_layers(requests))]


# --- groups ------------------------------------------------------------------------------------


def grouped(
    requests: Sequence[TraceRequest], by: str | None
) -> Iterator[tuple[Any, Sequence[TraceRequest], Sequence[int]]]:
    """Yield each group's key, requests and layers, for ``window_row`` and ``autocorr_row`` with ``pool=requests``."""
    every = range(num_layers(requests))
    if by is None:
        yield None, requests, every
    elif by == "layer":
        for layer in every:
            yield layer, requests, [layer]
    else:
        for key in dict.fromkeys(r["request_id" if by == "request" else "label"] for r in requests):
            yield key, [r for r in requests if r["request_id" if by == "request" else "label"] == key], every
