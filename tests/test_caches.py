"""Expert caches: published curves, events by hand, and every policy against a plain Python replay."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics import caches, replay
from tracekit.metrics.cache_spec import POLICIES, CacheSpec
from tracekit.metrics.replay import Stream
from tracekit.metrics.streams import whole_requests
from tracekit.reports.queries import query
from tracekit.reports.tables import render
from tracekit.schema import TraceMeta
from tracekit.store import Block

Event = tuple[int, list[int]]
"""Layer, and its experts, the last used one last."""


# --- the oracle: one cache, lists and loops ---------------------------------------------------


def brute(events: list[Event], policy: str, budget: int, cost: list[int]) -> list[list[bool]]:
    """Return which experts of each event hit, in a cache of so much room, from the rules."""
    there: list[tuple[int, int]] = []
    used: dict[tuple[int, int], int] = {}
    total: dict[tuple[int, int], int] = {}
    since: dict[tuple[int, int], int] = {}
    now = 0
    found = []
    for number, (layer, experts) in enumerate(events):
        keys = [(layer, e) for e in experts]
        found.append([key in there for key in keys])
        for key in keys:
            if key not in there:
                there.append(key)
                since[key] = 0

        def value(key: tuple[int, int], number: int = number, now: int = now) -> Any:
            match policy:
                case "lru":
                    return used[key]
                case "lfu":
                    return (total[key], used[key])
                case "lfru":
                    return (since[key] / (now - used[key] + 1), used[key])
                case _:
                    later = [i for i, (at, es) in enumerate(events) if i > number and at == key[0] and key[1] in es]
                    return -min(later, default=10**6)

        while sum(cost[key[0]] for key in there) > budget and set(there) - set(keys):
            # Equals of Belady are those never used again: which goes changes no hit.
            there.remove(min(sorted(set(there) - set(keys)), key=value))
        for key in keys:
            now += 1
            used[key] = now
            total[key] = total.get(key, 0) + 1
            since[key] += 1
    return found


def hits_of(steps: list[list[list[int]]], policy: str, budgets: list[int], cost: list[int], alone: bool) -> list[int]:
    """Return the hits in each layer, with one cache or one for each."""
    layers = len(cost)
    flat = [(layer, event) for step in steps for layer, event in enumerate(step)]
    if not alone:
        found = brute(flat, policy, budgets[0], cost)
        return [
            sum(sum(hit) for hit, (at, _) in zip(found, flat, strict=True) if at == layer) for layer in range(layers)
        ]
    return [
        sum(map(sum, brute([e for e in flat if e[0] == layer], policy, budgets[layer], cost)))
        for layer in range(layers)
    ]


def as_stream(steps: list[list[list[int]]]) -> Stream:
    events = [event for step in steps for event in step]
    experts = np.array([e for event in events for e in event], np.uint16)
    offsets = np.cumsum([0, *map(len, events)]).astype(np.int64)
    return Stream(experts, offsets, np.zeros(len(steps), np.int64), np.ones(len(steps), np.int64))


@st.composite
def some_steps(draw: st.DrawFn) -> tuple[list[list[list[int]]], int, int]:
    n, layers = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    event = st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)
    step = st.lists(event, min_size=layers, max_size=layers)
    return draw(st.lists(step, min_size=1, max_size=12)), n, layers


def kernel_hits(stream: Stream, policy: str, n: int, cost: list[int], budgets: list[int]) -> list[int]:
    seen = stream[:3]
    hits, costs, budget = np.zeros((1, len(cost)), np.int64), np.array(cost, np.int64), np.array(budgets, np.int64)
    if policy == "lfru":
        replay.replay_lfru(*seen, n, costs, budget, hits)
        return hits[0].tolist()
    following = replay.next_uses(*seen[:2], len(cost), n) if policy == "belady" else np.zeros(0, np.int32)
    kind = {"lru": replay.LRU, "lfu": replay.LFU, "belady": replay.BELADY}[policy]
    replay.replay(*seen, following, n, costs, budget, kind, hits)
    return hits[0].tolist()


@given(some_steps(), st.data())
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "belady"])
def test_a_replay_is_what_the_rules_say(policy: str, some: Any, data: st.DataObject):
    steps, n, layers = some
    # Belady is greedy where sizes differ, and which of two that are never needed again goes then matters.
    sizes = st.just(1) if policy == "belady" else st.integers(1, 3)
    cost = data.draw(st.lists(sizes, min_size=layers, max_size=layers))
    alone = data.draw(st.booleans()) and layers > 1
    budgets = data.draw(
        st.lists(st.integers(1, 3 * n), min_size=layers if alone else 1, max_size=layers if alone else 1)
    )
    assert kernel_hits(as_stream(steps), policy, n, cost, budgets) == hits_of(steps, policy, budgets, cost, alone)


@given(some_steps(), st.integers(0, 5))
def test_belady_is_best_and_lru_never_loses_by_more_room(some: Any, seed: int):
    steps, n, layers = some
    stream, ones = as_stream(steps), [1] * layers
    seen, cost = stream[:3], np.ones(layers, np.int64)
    largest = max(len(event) for step in steps for event in step)
    for alone in {False, layers > 1}:
        before = 0
        for room in range(largest, n + 1):
            budgets = [room] * layers if alone else [room * layers]
            random_hits = np.zeros((1, layers), np.int64)
            replay.replay_random(*seen, n, cost, np.array(budgets), seed, random_hits)
            found = {p: sum(kernel_hits(stream, p, n, ones, budgets)) for p in ("lru", "lfu", "lfru", "belady")}
            assert found["belady"] >= max(*found.values(), random_hits.sum())
            assert found["lru"] >= before
            before = found["lru"]


@given(some_steps(), st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_one_pass_gives_what_lru_hits_at_every_size(some: Any, sizes: list[int]):
    steps, n, layers = some
    stream = as_stream(steps)
    meta = TraceMeta(n, 1, tuple(range(layers)), "npy")
    whole = sum(sizes[:layers]) * n
    for scope, unit in (("layer", "experts"), ("all", "experts"), ("layer", "bytes"), ("all", "bytes")):
        capacities = range(1, n + 1) if unit == "experts" else range(layers, whole + 1)
        spec = CacheSpec(
            "decode", policies=("lru",), capacities=(*capacities,), unit=unit, scope=scope, sizes=(*sizes[:layers],)
        )
        curve = object.__new__(caches.Caches)
        curve.meta, curve.spec, curve._budgets, curve._costs = meta, spec, spec.budgets(meta), spec.costs(meta)
        hits = np.zeros((1, len(spec.capacities), layers), np.int64)
        assert curve._lru_curve(stream, hits)
        for g, budget in enumerate(spec.budgets(meta)):
            assert hits[0, g].tolist() == kernel_hits(stream, "lru", n, spec.costs(meta).tolist(), budget.tolist())


def test_random_evicts_anything_but_the_event_and_repeats_with_its_seed():
    steps = [[[0, i % 3 + 1]] for i in range(400)]
    stream, cost, budget = as_stream(steps), np.ones(1, np.int64), np.array([2])
    found = []
    for seed in (1, 1, 2):
        hits = np.zeros((1, 1), np.int64)
        replay.replay_random(*stream[:3], 4, cost, budget, seed, hits)
        found.append(int(hits[0, 0]))
    assert found == [399] * 3  # expert 0 is in every event, the other one gets pushed out by the next: no choice
    budget, found = np.array([3]), []
    for seed in (1, 1, 2, 3, 4):
        hits = np.zeros((1, 1), np.int64)
        replay.replay_random(*stream[:3], 4, cost, budget, seed, hits)
        found.append(int(hits[0, 0]))
    assert found[0] == found[1]
    assert len(set(found)) > 1
    # One of the two that are not needed goes: the one that is needed next, or the one that was used last.
    assert all(399 + 60 < hits < 399 + 340 for hits in found)


# --- events by hand ---------------------------------------------------------------------------

# One layer, N = 6, k = 2, five decode tokens after a prompt of three; a cache of 3 experts.
PROMPT = [[0, 1], [2, 1], [0, 3]]
DECODE = [[3, 0], [4, 0], [1, 2], [4, 0], [0, 5]]


def save(
    folder: Path, requests: list[tuple[list[Any], int]], num_experts: int, labels: list[str] | None = None
) -> tk.Store:
    """Ingest requests of one or more layers: rows ``[tokens][layers][k]`` and the prompt's length."""
    lens = [len(rows) for rows, _ in requests]
    ids = np.concatenate([np.array(rows, np.uint8) for rows, _ in requests])
    np.savez(folder / "t.npz", expert_ids=ids, request_lens=np.array(lens, np.int32))
    sidecar = [{"request_id": f"r{i}", "prompt_len": prompt} for i, (_, prompt) in enumerate(requests)]
    for entry, label in zip(sidecar, labels or [], strict=False):
        entry["topic"] = label
    fields = ["topic"] if labels else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.ingest(
            folder / "t.npz",
            folder / "store",
            name="t",
            num_experts=num_experts,
            requests=sidecar,
            label_fields=fields,
            axes="tlk",
        )
    return tk.open(folder / "store")


@pytest.fixture
def hand(tmp_path: Path) -> tk.Store:
    return save(tmp_path, [([[row] for row in PROMPT + DECODE], len(PROMPT))], 6)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(no interval|intervals|a static list|batches are|less than)", TracekitWarning
        )
        yield


def figures(frame: pl.DataFrame, column: str = "hit_rate") -> dict[str, float]:
    return dict(zip(frame["policy"], frame[column], strict=True))


def test_events_by_hand(hand: tk.Store):
    """Room for three. Hits are marked *, what is there afterwards stands in the order of its last use.

    The prompt is one event: by last use 2 1 0 3 (0 is used again by the last token). It is larger than the cache and
    stays as a whole until the next event, whose own experts do not go.

    event     LRU, from the prompt          LRU, from cold               Belady, from the prompt
    3 0       3* 0*, 2 goes: 1 3 0          3 0                          3* 0*, 1 or 2 goes (needed together): 1 3 0
    4 0       0*, 1 goes: 3 4 0             0*: 3 4 0                    0*, 3 (never needed) goes: 1 4 0
    1 2       3 and 4 go: 0 1 2             3 and 4 go: 0 1 2            1*, 4 or 0 goes (needed together): 0 1 2
    4 0       0*, 1 goes: 2 4 0             0*, 1 goes: 2 4 0            0* (or 4*), 1 or 2 goes
    0 5       0*, 2 goes                    0*, 2 goes                   0*
    hits      5 of 10; new: 4 5             3 of 10; new: 3 0 4 1 2 5    6 of 10; new: 4 5
    """
    frame = tk.cache(hand, policy=("lru", "belady"), capacity=3)
    assert frame["start"].unique().to_list() == ["prompt"]
    assert figures(frame) == {"lru": 0.5, "belady": 0.6}
    assert figures(frame, "cold") == {"lru": 0.2, "belady": 0.2}
    assert figures(frame, "working_set") == pytest.approx({"lru": 0.2, "belady": 0.2})
    assert figures(frame, "policy_excess") == pytest.approx({"lru": 0.1, "belady": 0.0})
    assert figures(frame, "misses_per_token") == {"lru": 1.0, "belady": 0.8}
    cold = tk.cache(hand, policy="lru", capacity=3, start="cold")
    assert cold["hit_rate"].to_list() == [0.3]
    assert cold["cold"].to_list() == [0.6]
    # With the prompt counted: its 4 experts are misses, 14 accesses by 8 tokens.
    whole = tk.cache(hand, policy="lru", capacity=3, phase="all")
    assert whole.select("accesses", "tokens").row(0) == (14, 8)
    assert whole["hit_rate"][0] == pytest.approx(5 / 14)
    assert whole["cold"][0] == pytest.approx(6 / 14)


def test_lfu_and_lfru_by_hand(tmp_path: Path):
    """k = 1, room for 2, in brackets who goes; where it is decided, uses over age of what is there.

    access    0  0  0  1  2                 0    1                2
    LRU          *  *     [0]               [1]  [2]              [0]               2 hits
    LFU          *  *     [1]: 3 and 1      *    [2]: 4 and 1     [1]: 4 and 2      3 hits
    LFRU         *  *     [1]: 3/2 and 1/1  *    [2]: 4/1 and 1/2 [1]: 4/2 and 1/1  3 hits
    """
    store = save(tmp_path, [([[[e]] for e in (0, 0, 0, 1, 2, 0, 1, 2)], 0)], 3)
    frame = tk.cache(store, policy=("lru", "lfu", "lfru"), capacity=2)
    assert figures(frame) == {"lru": 2 / 8, "lfu": 3 / 8, "lfru": 3 / 8}


def test_batches_are_unions_up_to_the_shortest_request(tmp_path: Path):
    """Steps of r0 and r1: {0,1} {0,2} {3}: of three experts' room; r2 has no partner."""
    requests = [([[[0]], [[0]], [[3]], [[1]]], 0), ([[[1]], [[2]], [[3]]], 0), ([[[0]]], 0)]
    store = save(tmp_path, requests, 4)
    frame = tk.cache(store, policy="lru", capacity=3, batch_size=2)
    assert frame.select("accesses", "tokens").row(0) == (5, 6)
    assert frame["hit_rate"][0] == 1 / 5
    assert frame["misses_per_token"][0] == 4 / 6
    with pytest.raises(UnsupportedError, match="a batch of 4 requests"):
        tk.cache(store, batch_size=4)
    with pytest.raises(UsageError, match="by request"):
        tk.cache(store, batch_size=2, by="request")


def test_a_cache_that_is_carried_on_keeps_what_the_request_before_left(tmp_path: Path):
    store = save(tmp_path, [([[[0]], [[1]]], 0), ([[[1]], [[0]]], 0)], 3)
    rate = {start: tk.cache(store, policy="lru", capacity=2, start=start)["hit_rate"][0] for start in ("cold", "carry")}
    assert rate == {"cold": 0.0, "carry": 0.5}
    each = tk.cache(store, policy="lru", capacity=2, start="carry", by="request")
    assert dict(zip(each["request_id"], each["hit_rate"], strict=True)) == {"r0": 0.0, "r1": 1.0}


def test_prompts_count_only_where_the_cache_is_carried_on(tmp_path: Path):
    store = save(tmp_path, [([[[0]], [[1]], [[2]]], 2), ([[[1]], [[0]], [[2]]], 2)], 3)
    frame = tk.cache(store, policy="lru", capacity=3, phase="prefill")
    assert (frame["start"][0], frame["hit_rate"][0], frame["accesses"][0]) == ("carry", 0.5, 4)
    with pytest.raises(UsageError, match="nothing can hit"):
        tk.cache(store, phase="prefill", start="cold")


def test_a_static_list_is_judged_on_other_requests(tmp_path: Path):
    """Each request has an expert of its own and shares expert 0: only the shared one can be on its list."""
    requests = [([[[0]], [[0]], [[r + 1]], [[r + 1]], [[r + 1]]], 0) for r in range(6)]
    store = save(tmp_path, requests, 8)
    frame = tk.cache(store, policy=("static", "lru"), capacity=1)
    assert figures(frame)["static"] == 2 / 5
    assert figures(tk.cache(store, policy=("static", "lru"), capacity=1, scope="all"))["static"] == 2 / 5
    alone = tk.cache(save(tmp_path / "store", requests[:1], 8), policy="static", capacity=1)
    assert alone["hit_rate"].to_list() == [None]


# --- other ways to the same numbers -----------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    rng = np.random.default_rng(7)
    lens = rng.integers(3, 30, 9)
    requests = []
    for n in lens:
        order = rng.random((n, 3, 10)) + np.sin(np.arange(10))
        requests.append((np.argsort(-order, axis=2)[:, :, :2].tolist(), int(rng.integers(0, 3))))
    return save(tmp_path_factory.mktemp("mixed"), requests, 10, ["a", "b", "a"] * 3)


def of_store(store: tk.Store, start: str) -> Iterator[tuple[str, list[list[list[int]]], int]]:
    """Yield each request's steps, read with SQL, and how many of them warm the cache up."""
    rows = store.sql(
        "SELECT request, phase, pos, layer, rank, expert FROM activations ORDER BY request, pos, layer, rank"
    )
    layers = rows["layer"].unique().sort().to_list()
    for _, one in rows.group_by("request", maintain_order=True):
        prompt = one.filter(pl.col("phase") == "prefill")
        first = []
        for layer in layers:
            used = prompt.filter(pl.col("layer") == layer)["expert"].to_list()
            first.append(list(dict.fromkeys(used[::-1]))[::-1])
        steps = [
            [step.filter(pl.col("layer") == layer)["expert"].to_list() for layer in layers]
            for _, step in one.filter(pl.col("phase") == "decode").group_by("pos", maintain_order=True)
        ]
        warm = prompt.height > 0 and start == "prompt"
        yield str(one["request"][0]), ([first] if warm else []) + steps, int(warm)


@pytest.mark.parametrize("start", ["cold", "prompt"])
@pytest.mark.parametrize("scope", ["layer", "all"])
def test_a_store_gives_what_its_rows_give(mixed: tk.Store, start: Any, scope: Any):
    for policy in ("lru", "lfu", "lfru", "belady"):
        frame = tk.cache(mixed, policy=policy, capacity=4, start=start, scope=scope, by="layer")
        hits = np.zeros(3)
        for _, steps, warm in of_store(mixed, start):
            budgets = [4] * 3 if scope == "layer" else [12]
            whole = hits_of(steps, policy, budgets, [1] * 3, scope == "layer")
            hits += whole
            assert not warm or hits_of(steps[:1], policy, budgets, [1] * 3, scope == "layer") == [0, 0, 0]
        assert (frame["hit_rate"] * frame["accesses"]).round(6).to_list() == hits.tolist()


def test_shares_and_bytes_are_the_same_caches(mixed: tk.Store):
    experts = tk.cache(mixed, capacity=(4, 6), scope="all", expert_bytes=7)
    share = tk.cache(mixed, capacity=(0.4, 0.6), unit="share", scope="all", expert_bytes=7)
    size = tk.cache(mixed, capacity=(4 * 21, 6 * 21), unit="bytes", scope="all", expert_bytes=7)
    assert experts["capacity_bytes"].unique().sort().to_list() == [84, 126]
    assert experts.drop("unit").equals(share.drop("unit"))
    assert experts.drop("unit").equals(size.drop("unit"))
    assert (experts["bytes_per_token"] / experts["misses_per_token"]).round(9).unique().to_list() == [7.0]
    linked = tk.cache(mixed, capacity=4, expert_bytes=7, link=70.0)
    assert (linked["seconds_per_token"] * 10 - linked["misses_per_token"]).abs().max() < 1e-12


def test_reuse_is_the_lru_curve(mixed: tk.Store):
    for scope in ("layer", "all"):
        curve = tk.reuse(mixed, scope=scope)
        assert curve["capacity"].to_list() == list(range(2, 11))
        frame = tk.cache(mixed, policy="lru", capacity=range(2, 11), scope=scope)
        for column in ("hit_rate", "hit_rate_lo", "hit_rate_hi", "accesses"):
            assert curve[column].to_list() == pytest.approx(frame[column].to_list(), rel=1e-12)
        assert curve["share"].sum() == pytest.approx(1 - frame["cold"][0])


def test_misses_add_up_and_groups_to_the_whole(mixed: tk.Store):
    frame = tk.cache(mixed, capacity=(3, 5))
    parts = frame["cold"] + frame["working_set"] + frame["policy_excess"]
    assert (parts - (1 - frame["hit_rate"])).abs().max() < 1e-12
    for by in ("layer", "label", "request"):
        each = tk.cache(mixed, capacity=(3, 5), by=by)
        hits = pl.col("hit_rate") * pl.col("accesses")
        summed = (
            each.filter(pl.col("policy") != "static")
            .group_by("policy", "capacity")
            .agg(hits.sum() / pl.col("accesses").sum())
        )
        whole = frame.join(summed.rename({"hit_rate": "again"}), on=["policy", "capacity"])
        assert whole.height == 10
        assert (whole["hit_rate"] - whole["again"]).abs().max() < 1e-12


def test_a_request_that_is_split_between_blocks_is_put_together():
    """Two layers of one request in two blocks, with a hole in its positions."""
    meta = TraceMeta(8, 2, (3, 5), "npy")
    runs = [{"row": [0, 2], "request": [0, 0], "layer": [layer] * 2, "pos": [4, 9], "n": [2, 1]} for layer in (3, 5)]
    blocks = [
        Block(np.array(ids, np.uint8), {name: np.array(v, np.int64) for name, v in run.items()})
        for ids, run in zip(([[0, 1, 2], [4, 5, 6]], [[7, 6, 5], [3, 2, 1]]), runs, strict=True)
    ]
    requests = pl.DataFrame({"n_tokens": [3], "decode_start": [5]})
    [rows] = whole_requests(meta, requests, blocks, np.array([True]))
    assert rows.ids.tolist() == [[[0, 4], [7, 3]], [[1, 5], [6, 2]], [[2, 6], [5, 1]]]
    assert (rows.request, rows.prompt) == (0, 1)


def test_threads_and_seeds_change_nothing_but_random(mixed: tk.Store):
    a, b = (tk.cache(mixed, capacity=4, seed=seed, intervals=False) for seed in (0, 1))
    same = pl.col("policy") != "random"
    assert a.filter(same).equals(b.filter(same))
    assert not a.filter(~same).equals(b.filter(~same))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 1}, "1 experts per layer; expected 2 .k.* to 10 .N"),
        ({"capacity": 11}, "11 experts per layer"),
        ({"capacity": 0}, "more than 0"),
        ({"capacity": 2.5}, "a whole number"),
        ({"capacity": float("nan")}, "more than 0"),
        ({"capacity": ()}, "no capacity"),
        ({"capacity": 0.1, "unit": "share"}, "a share that is 2"),
        ({"capacity": 1.2, "unit": "share"}, "a share that is"),
        ({"unit": "share"}, "no capacity in share"),
        ({"capacity": 1e9, "unit": "bytes", "expert_bytes": 7}, "at most the 210 bytes"),
        ({"capacity": -1, "unit": "bytes", "expert_bytes": 7}, "more than 0"),
        ({"expert_bytes": 0}, "at least 1"),
        ({"expert_bytes": 7, "model": "gpt-oss-20b"}, "one of the two"),
        ({"link": 0.0}, "0 bytes per second"),
        ({"link": float("inf")}, "more than 0"),
        ({"policy": "mru"}, "policy 'mru'.*lru, lfu"),
        ({"policy": ()}, "no policy"),
        ({"scope": "rack"}, "scope 'rack'"),
        ({"unit": "litres"}, "unit 'litres'"),
        ({"start": "warm"}, "start 'warm'"),
        ({"start": "prompt", "phase": "all"}, "counts prompts"),
        ({"batch_size": 0}, "batch sizes"),
    ],
)
def test_what_is_out_of_range_is_refused(mixed: tk.Store, arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        tk.cache(mixed, **arguments)


def test_bytes_without_sizes_ask_for_them(mixed: tk.Store):
    for arguments in ({"capacity": 100, "unit": "bytes"}, {"link": 1e9}):
        with pytest.raises(UnsupportedError, match=r"--model.*--expert-bytes"):
            tk.cache(mixed, **arguments)


def test_a_trace_too_large_to_be_carried_on_is_refused(mixed: tk.Store):
    with tk.running(memory="16KiB"), pytest.raises(UsageError, match="whole trace at once"):
        tk.cache(mixed, policy="lru", capacity=7, start="carry", intervals=False)


# --- tables and the query ------------------------------------------------------------------------


def test_tables_fit_and_say_what_the_misses_are(mixed: tk.Store):
    text = render(tk.cache(mixed, capacity=(3, 5), expert_bytes=7e6, link=1e9), layout="cache")
    assert isinstance(text, str)
    assert max(map(len, text.splitlines())) <= 80
    assert "the misses of lru are" in text
    assert "ms/token" in text
    for by in ("layer", "label", "request"):
        assert "by experts per" in render(tk.cache(mixed, capacity=(3, 5), by=by), layout="cache")  # type: ignore[operator]
    assert "first touches" in render(tk.reuse(mixed), layout="reuse")  # type: ignore[operator]
    assert "by experts" in render(tk.reuse(mixed, by="layer"), layout="reuse")  # type: ignore[operator]


def test_the_command(mixed: tk.Store, capsys: pytest.CaptureFixture[str]):
    store = str(mixed.path)
    assert (
        main(["cache", store, "--policy", "lru,belady", "--capacity", "3,5", "--scope", "all", "--format", "csv"]) == 0
    )
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    frame = tk.cache(mixed, policy=("lru", "belady"), capacity=(3, 5), scope="all")
    assert [(r["policy"], float(r["hit_rate"])) for r in rows] == frame.select("policy", "hit_rate").rows()
    assert main(["reuse", store, "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 9
    for wrong in (["--policy", "mru"], ["--capacity", "many"], ["--capacity", "11"], ["--link", "0"]):
        assert main(["cache", store, *wrong]) == 2
    assert main(["cache", store, "--unit", "bytes", "--capacity", "1e9"]) == 1
    assert "--expert-bytes" in capsys.readouterr().err


def test_the_query_has_every_policy_once(mixed: tk.Store):
    tk.cache(mixed, start="cold", scope="all")
    tk.cache(mixed, expert_bytes=3)
    frame = query(mixed, "cache_misses")
    assert frame.select("policy", "capacity").is_unique().all()
    assert set(frame["policy"]) == set(POLICIES)
    assert frame["start"].unique().to_list() == ["prompt"]
    assert query(mixed, "cache_misses", scope="all", start="cold")["scope"].unique().to_list() == ["all"]


# --- published ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    folder = tmp_path_factory.mktemp("gemma")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.ingest(shared / "traces" / "gemma4_26b_route_trace" / "gemma.route.csv", folder / "store", name="gemma")
    return tk.open(folder / "store")


@pytest.mark.parametrize(("phase", "column"), [("all", "hit_pct_cum"), ("decode", "hit_pct_decode")])
def test_the_published_curves_of_bigmoeonedge(gemma: tk.Store, shared: Path, phase: Any, column: str):
    """Every budget, from the stored trace: LRU, LFU and Belady of one cache, LRU and LFU of one per layer."""
    path = shared / "traces" / "gemma4_26b_route_trace" / "published_cache_curve.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    budgets = sorted({int(row["budget_mib"]) << 20 for row in rows})
    found = {}
    for scope, names in (("all", {}), ("layer", {"lru": "layer", "lfu": "layerlfu"})):
        policies = ("lru", "lfu", "belady", "random") if scope == "all" else ("lru", "lfu")
        frame = tk.cache(gemma, policy=policies, capacity=budgets, unit="bytes", scope=scope, phase=phase)
        for policy in policies:
            rates = frame.filter(pl.col("policy") == policy).sort("capacity")["hit_rate"]
            found |= {(b, names.get(policy, policy)): 100 * r for b, r in zip(budgets, rates, strict=True)}
    assert len(rows) >= 6 * 11
    for row in rows:
        # Its random numbers are not ours.
        off = 1.0 if row["policy"] == "random" else 0.0006
        assert found[int(row["budget_mib"]) << 20, row["policy"]] == pytest.approx(float(row[column]), abs=off), row


def test_lru_hits_nothing_below_one_cycle_of_a_token(gemma: tk.Store):
    """One cache for all layers: when a layer comes again, all others were there since, and its own experts are gone."""
    sizes = list(gemma.trace().meta.extra["expert_bytes"].values())
    cycle = 6 * sum(sizes)
    frame = tk.cache(
        gemma, policy="lru", capacity=(cycle // 3, cycle - 6 * max(sizes)), unit="bytes", scope="all", start="cold"
    )
    assert frame["hit_rate"].to_list() == [0.0, 0.0]
    assert (
        tk.cache(gemma, policy="lru", capacity=2 * cycle, unit="bytes", scope="all", start="cold")["hit_rate"][0] > 0.3
    )


def test_the_published_hit_rates_of_gpt_oss_20b(shared: Path, tmp_path: Path):
    path = shared / "traces" / "gptoss20b_subset64" / "trace.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        tk.ingest(path, tmp_path / "store", name="gptoss", num_experts=32, phase="decode")
    frame = tk.cache(tmp_path / "store", policy="lru", capacity=(4, 8, 12, 16, 24))
    assert frame["hit_rate"].round(3).to_list() == [0.439, 0.654, 0.803, 0.894, 0.970]
    curve = tk.reuse(tmp_path / "store").filter(pl.col("capacity").is_in([4, 8, 12, 16, 24]))
    assert curve["hit_rate"].to_list() == frame["hit_rate"].to_list()


# --- an established simulator ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy"), [("LRU", "lru"), ("Belady", "belady")])
def test_libcachesim_says_the_same_of_single_accesses(name: str, policy: str):
    """At k = 1 an event is an access, as a cache simulator has it; its Belady wants the time of the next access."""
    lcs = pytest.importorskip("libcachesim", reason="no libcachesim: pip install libcachesim")
    draw = random.Random(3)
    keys = [min(int(draw.expovariate(0.12)), 39) for _ in range(4000)]
    following, coming = [], {}
    for at in range(len(keys) - 1, -1, -1):
        following.append(coming.get(keys[at], (1 << 63) - 1))
        coming[keys[at]] = at
    following.reverse()
    stream = as_stream([[[key]] for key in keys])
    for room in (1, 5, 12, 30):
        simulated = getattr(lcs, name)(room)
        hits = 0
        for at, key in enumerate(keys):
            request = lcs.Request()
            request.obj_id, request.obj_size, request.clock_time = key, 1, at
            request.next_access_vtime = following[at]
            hits += simulated.get(request)
        assert kernel_hits(stream, policy, 40, [1], [room]) == [hits]
