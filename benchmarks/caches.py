"""Measure the replay of expert caches on a DeepSeek-V3-shaped trace and print its table of README.md.

    python benchmarks/caches.py                   # 8 requests of 500 tokens: 58 layers, k = 8, N = 256
    python benchmarks/caches.py --requests 2      # a quick look

One core, in processor time: waiting for a core does not count. Every request is a stream of its own, from cold. The
hits of the plain Python replay are compared with the kernels' before any rate is printed.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import run

import tracekit as tk
from tracekit.metrics import replay
from tracekit.metrics.replay import Stream
from tracekit.metrics.streams import stream, whole_requests

LAYERS, TOP_K, EXPERTS = 58, 8, 256
ROOM = 64
"""Experts per layer where one capacity is replayed."""


def streams_of(requests: int, build: Path) -> list[Stream]:
    shape = {"layers": LAYERS, "top_k": TOP_K, "num_experts": EXPERTS, "tokens": 500}
    _, folder, _ = run.generate(argparse.Namespace(requests=requests, **shape), build)
    store = build / f"caches-{requests}-store"
    run.ingest(folder, store, EXPERTS)
    opened = tk.open(str(store))
    info = opened.trace()
    everyone = np.ones(info.requests, bool)
    rows = whole_requests(info.meta, opened.requests(info), opened.blocks(info), everyone)
    return [stream(info.meta, [one], "decode", "cold", 0) for one in rows]


def ordered_dict(events: list[list[list[int]]], room: int) -> int:
    """An LRU cache for each layer, as people write it; ``events`` by step and layer."""
    hits = 0
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in events[0]]
    for step in events:
        for cache, experts in zip(caches, step, strict=True):
            for e in experts:
                if e in cache:
                    hits += 1
            for e in experts:
                cache[e] = None
                cache.move_to_end(e)
            while len(cache) > room:
                cache.popitem(last=False)
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--build", type=Path, default=run.HERE.parent / "build" / "bench")
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    streams = streams_of(options.requests, options.build)
    accesses = sum(len(s.experts) for s in streams)
    ones, one32 = np.ones(LAYERS, np.int64), np.ones(LAYERS, np.int32)
    alone, together = np.full(LAYERS, ROOM), np.array([ROOM * LAYERS])
    place = -(-np.arange(EXPERTS * LAYERS + 1) // LAYERS)
    place = np.maximum(place - 1, 0).astype(np.int32)
    none = np.zeros(0, np.int32)
    events = [[a.tolist() for a in np.split(s.experts, s.offsets[1:-1])] for s in streams[:1]]
    by_step = [[one[i : i + LAYERS] for i in range(0, len(one), LAYERS)] for one in events]

    def curve() -> int:
        hist = np.zeros((1, LAYERS, EXPERTS + 1), np.int64)
        for s in streams:
            replay.lru_by_layer(*s[:3], EXPERTS, hist)
        return int(hist[..., :ROOM].sum())

    def curve_of_all() -> int:
        hist = np.zeros((1, LAYERS, EXPERTS + 1), np.int64)
        for s in streams:
            replay.lru_of_all(*s[:3], EXPERTS, one32, place, hist)
        return int(hist[..., :ROOM].sum())

    def single(policy: int, budget: np.ndarray) -> int:
        hits = np.zeros((1, LAYERS), np.int64)
        for s in streams:
            following = replay.next_uses(*s[:2], LAYERS, EXPERTS) if policy == replay.BELADY else none
            replay.replay(*s[:3], following, EXPERTS, ones, budget, policy, hits)
        return int(hits.sum())

    def lfru(budget: np.ndarray, some: list[Stream]) -> int:
        hits = np.zeros((1, LAYERS), np.int64)
        for s in some:
            replay.replay_lfru(*s[:3], EXPERTS, ones, budget, hits)
        return int(hits.sum())

    def chance(budget: np.ndarray) -> int:
        hits = np.zeros((1, LAYERS), np.int64)
        for s in streams:
            replay.replay_random(*s[:3], EXPERTS, ones, budget, 0, hits)
        return int(hits.sum())

    first = len(streams[0].experts)
    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "**LRU, a cache per layer, all 256 sizes**": (accesses, curve),
        "LRU, one cache, 256 sizes": (accesses, curve_of_all),
        "**Belady, a cache per layer of 64, next uses included**": (accesses, partial(single, replay.BELADY, alone)),
        "Belady, one cache of 64 per layer": (accesses, partial(single, replay.BELADY, together)),
        "LFU, a cache per layer of 64": (accesses, partial(single, replay.LFU, alone)),
        "LFU, one cache": (accesses, partial(single, replay.LFU, together)),
        "LFRU, a cache per layer of 64": (accesses, partial(lfru, alone, streams)),
        "LFRU, one cache, 1 request": (first, partial(lfru, together, streams[:1])),
        "random, a cache per layer of 64": (accesses, partial(chance, alone)),
        "plain Python `OrderedDict`, LRU, one size of 64, 1 request": (
            first,
            lambda: sum(ordered_dict(one, ROOM) for one in by_step),
        ),
    }
    hits = np.zeros((1, LAYERS), np.int64)
    replay.replay(*streams[0][:3], none, EXPERTS, ones, alone, replay.LRU, hits)
    if curve() != single(replay.LRU, alone) or ordered_dict(by_step[0], ROOM) != hits.sum():
        raise SystemExit("the replays of LRU disagree")
    if curve_of_all() != single(replay.LRU, together):
        raise SystemExit("the replays of one LRU cache disagree")
    times = run.timed(options.repeats, tasks, time.thread_time)
    table = run.Table()
    for name, timing in times.items():
        table.add(name, timing)
    lru, _, belady, *_, python = times.values()
    factor = python.slower_than(lru)
    bounds = [
        ("LRU, all sizes, M accesses/s", run.median_and_best(lru), "≥ 50"),
        ("Belady, M accesses/s", run.median_and_best(belady), "≥ 10"),
        ("times as fast as `OrderedDict` for the same 256 sizes", factor * EXPERTS, "≥ 100"),
        ("the same as one size in `OrderedDict`", factor, ""),
    ]
    print(table.render(bounds, options.repeats).replace("benchmarks/run.py", "benchmarks/caches.py"))


if __name__ == "__main__":
    main()
