"""Time per token with offloaded experts: the two engines, what tokens have to fetch, and what was published."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.economics.cost import CostModel
from tracekit.economics.hardware import hardware
from tracekit.economics.offload import (
    LINKS,
    Compute,
    Copies,
    break_even,
    implied_cost,
    link,
    saving_bound,
    timeline,
    token_times,
)
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.sources.sizes import describe

# The engines

TIME = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0])


@st.composite
def schedules(draw: st.DrawFn, distance: int | None = None) -> tuple[Compute, Copies]:
    L = draw(st.integers(1, 6))

    def row() -> np.ndarray:
        return np.array(draw(st.lists(TIME, min_size=L, max_size=L)))

    compute = Compute(row(), row(), draw(TIME))
    d = draw(st.integers(1, 3)) if distance is None else distance
    return compute, Copies(row()[None], row()[None], d)


def by_hand(compute: Compute, copies: Copies, predictor: float = 0.0) -> float:
    """The same from the definition: orders in a queue, each begun when the one before is done and it was given."""
    L, d = len(compute.before), copies.distance
    now = free = 0.0
    there: dict[tuple[str, int], float] = {}

    def order(kind: str, layer: int) -> None:
        nonlocal free
        seconds = float(getattr(copies, kind)[0, layer])
        if seconds:
            free = max(free, now) + seconds
            there[kind, layer] = free

    for layer in range(min(d, L)):
        order("ahead", layer)
    for layer in range(L):
        now += float(compute.before[layer]) + predictor / L
        order("demand", layer)
        if layer + d < L:
            order("ahead", layer + d)
        now = max(now, there.get(("ahead", layer), 0.0), there.get(("demand", layer), 0.0))
        now += float(compute.after[layer])
    return now + compute.head


@given(schedules(), st.sampled_from([0.0, 0.75]))
def test_the_engines_agree_with_the_definition(case: tuple[Compute, Copies], predictor: float) -> None:
    compute, copies = case
    [found] = token_times(compute, copies, predictor)
    assert found == pytest.approx(by_hand(compute, copies, predictor))
    spans = list(timeline(compute, copies, predictor))
    assert sum(s.end - s.start for s in spans if s.engine == "copy") == pytest.approx(copies.seconds[0])
    assert sum(s.end - s.start for s in spans if s.engine == "compute") == pytest.approx(compute.seconds + predictor)
    for engine in ("compute", "copy"):
        mine = [s for s in spans if s.engine == engine]
        assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(mine)), "one thing at a time"
    assert max((s.end for s in spans), default=0.0) == pytest.approx(found)
    # One engine or the other always works.
    events = sorted({0.0, found, *(x for s in spans for x in (s.start, s.end))})
    for a, b in itertools.pairwise(events):
        assert b - a < 1e-9 or any(s.start <= a + 1e-12 and b <= s.end + 1e-12 for s in spans)


@given(schedules(distance=1))
def test_the_sum_over_layers_bounds_the_schedule_and_is_it_where_every_layer_misses(
    case: tuple[Compute, Copies],
) -> None:
    """metrics.md: the missed copies, and the larger of compute and the copies for the next layer."""
    compute, copies = case

    def formula(demand: np.ndarray, ahead: np.ndarray) -> float:
        windows = np.append(compute.windows[1:], 0.0)
        following = np.append(ahead[1:], 0.0)
        first = max(float(compute.before[0]), float(ahead[0]))  # known before the token
        last = float(compute.after[-1]) + compute.head
        return first + float(demand.sum() + np.maximum(windows, following).sum()) + last

    [found] = token_times(compute, copies)
    assert found <= formula(copies.demand[0], copies.ahead[0]) + 1e-9
    assert found >= max(compute.seconds, float(copies.seconds[0])) - 1e-9
    everywhere = Copies(copies.demand + 0.25, copies.ahead)
    assert token_times(compute, everywhere)[0] == pytest.approx(formula(everywhere.demand[0], everywhere.ahead[0]))


@given(schedules(distance=1), st.data())
def test_prefetching_saves_at_most_the_smaller_of_compute_and_copies(
    case: tuple[Compute, Copies], data: st.DataObject
) -> None:
    compute, copies = case
    needed = copies.demand
    foretold = np.array([data.draw(st.lists(st.floats(0, 1), min_size=needed.size, max_size=needed.size))])
    foretold[:, 0] = 0  # nothing was computed before the first layer
    right, wrong = foretold * needed, np.where(np.arange(needed.size) > 0, copies.ahead, 0.0)
    [plain] = token_times(compute, Copies(needed, np.zeros_like(needed)))
    assert plain == pytest.approx(compute.seconds + needed.sum())
    [ahead] = token_times(compute, Copies(needed - right, right + wrong))
    [bound] = saving_bound(compute, needed)
    assert plain - ahead <= bound + 1e-9
    # With all that is needed ordered ahead and nothing else, the bound is reached layer by layer but for the queue.
    [best] = token_times(compute, Copies(needed * (np.arange(needed.size) == 0), needed * (np.arange(needed.size) > 0)))
    assert best <= ahead + 1e-9


@given(schedules(), TIME, TIME)
def test_more_of_anything_takes_no_less_time(case: tuple[Compute, Copies], cost: float, more: float) -> None:
    compute, copies = case
    [base] = token_times(compute, copies, cost)
    assert token_times(compute, copies, cost + more)[0] >= base - 1e-12
    assert token_times(compute, copies, cost + more)[0] <= base + more + 1e-9
    assert token_times(compute, Copies(copies.demand + more, copies.ahead, copies.distance), cost)[0] >= base - 1e-12


@given(schedules(distance=1), st.floats(0.01, 3))
def test_at_the_break_even_the_predictor_neither_wins_nor_loses(case: tuple[Compute, Copies], gain: float) -> None:
    compute, copies = case

    def seconds(cost: float) -> float:
        return float(token_times(compute, copies, cost)[0])

    found = break_even(seconds, seconds(0.0) + gain)
    assert found >= gain - 1e-9, "a cost is hidden at best"
    assert seconds(found) == pytest.approx(seconds(0.0) + gain, rel=1e-6)
    assert break_even(seconds, seconds(0.0)) == 0
    assert break_even(seconds, seconds(0.0) / 2 - 1e-3) == 0


def test_a_token_by_hand() -> None:
    # Two layers: attention 1, experts 2, head 1. Layer 0 misses 3; 4 were foretold for layer 1, which misses 1 more.
    #   compute  A0 0-1            X0 4-6   A1 6-7          X1 9-11  head 11-12
    #   copy            demand 1-4 ahead 4-8     demand 8-9
    compute = Compute(np.ones(2), np.full(2, 2.0), 1.0)
    copies = Copies(np.array([[3.0, 1.0]]), np.array([[0.0, 4.0]]))
    spans = [(s.engine, s.layer, s.part, s.start, s.end) for s in timeline(compute, copies)]
    assert spans == [
        ("compute", 0, "attention", 0, 1),
        ("copy", 0, "demand", 1, 4),
        ("copy", 1, "ahead", 4, 8),
        ("compute", 0, "experts", 4, 6),
        ("compute", 1, "attention", 6, 7),
        ("copy", 1, "demand", 8, 9),
        ("compute", 1, "experts", 9, 11),
        ("compute", 1, "head", 11, 12),
    ]
    assert token_times(compute, copies).tolist() == [12]
    # Without it: 7 of compute and 3 + 5 copies, should all that was foretold be needed: 3 are saved, min(2 + 1, 5).
    needed = np.array([[3.0, 5.0]])
    assert token_times(compute, Copies(needed, np.zeros((1, 2)))).tolist() == [15]
    assert saving_bound(compute, needed).tolist() == [3]


def test_the_roofline_of_a_token_is_that_of_a_step() -> None:
    config = {
        "model_type": "glm4_moe",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "hidden_size": 8,
        "intermediate_size": 5,
        "moe_intermediate_size": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "vocab_size": 10,
    }
    cost = CostModel(describe(config), hardware(bandwidth=1e9, flops=1e11, overhead=1e-5), context=7)
    compute = Compute.of(cost)
    assert compute.seconds == pytest.approx(float(cost.seconds(1, 1, 2)))
    parts = {part.name: float(part.seconds) for part in cost.parts(1, 1, 2)}
    assert compute.after == pytest.approx([(parts["experts"] + parts["shared"]) / 3] * 3)
    assert compute.before[0] - compute.before[1] == pytest.approx(
        parts["dense"] + (parts["attention"] + parts["cache"]) / 4
    )
    assert compute.head == pytest.approx(parts["head"] + 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: link(0),
        lambda: link(-25e9),
        lambda: link(float("nan")),
        lambda: link("pcie9"),
        lambda: link(25),
        lambda: Compute.given(-1.0, 3),
        lambda: Compute.given([1.0, 2.0], 3),
        lambda: Compute.given(float("inf"), 3),
        lambda: Compute(np.ones(2), np.ones(3)),
        lambda: Copies(np.ones((2, 3)), np.ones((2, 4))),
        lambda: Copies(np.ones((2, 3)), -np.ones((2, 3))),
        lambda: Copies(np.ones((2, 3)), np.ones((2, 3)), 0),
        lambda: token_times(Compute.given(1.0, 2), Copies(np.ones((2, 3)), np.ones((2, 3)))),
        lambda: token_times(Compute.given(1.0, 3), Copies(np.ones((2, 3)), np.ones((2, 3))), -1.0),
        lambda: list(timeline(Compute.given(1.0, 3), Copies(np.ones((2, 3)), np.ones((2, 3))))),
        lambda: implied_cost(0, 0.1, 0.8),
        lambda: implied_cost(0.8, 1.1, 0.8),
    ],
)
def test_what_is_no_time_is_refused(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


def test_links_are_figures_or_names() -> None:
    assert link("PCIe4-x16") == LINKS["pcie4-x16"][0] == link(25e9) == link("25e9")


# What was published

# Madan et al., "Speculating Experts", arXiv 2603.19289: ms per token of Qwen3-30B-A3B on an A6000, batch 1, by context;
# on demand, and with predicted experts executed. Copies are 88 .. 84 % of the first.
PUBLISHED = {1024: (158.9, 144.4), 4096: (159.7, 145.7), 16384: (160.2, 145.7), 65536: (169.4, 146.0)}


def speculating(context: int, share: float) -> tuple[Compute, np.ndarray, float]:
    """Compute and copies of a token, by the copies' share of its time on demand."""
    model = tk.model("qwen3-30b-a3b")
    plain = PUBLISHED[context][0] / 1e3
    copies = np.full((1, model.moe_layers), share * plain / model.moe_layers)
    assert model.expert_bytes is not None
    rate = model.config.top_k * model.expert_bytes / copies[0, 0]
    return Compute.given(plain - float(copies.sum()), model.moe_layers), copies, rate


@pytest.mark.parametrize(("context", "share"), [(1024, 0.88), (65536, 0.84)])
def test_the_published_shares_are_one_link(context: int, share: float) -> None:
    """The bytes of 48 x 8 experts in that time: 25.7 GB/s within 1 %, what PCIe 4.0 x16 achieves."""
    assert speculating(context, share)[2] == pytest.approx(25.7e9, rel=0.01)


@pytest.mark.parametrize("context", PUBLISHED)
def test_the_published_times_are_copies_that_hide_compute(context: int) -> None:
    model = tk.model("qwen3-30b-a3b")
    assert model.expert_bytes == 9437184
    assert (model.moe_layers, model.config.top_k) == (48, 8)
    plain, published = PUBLISHED[context]
    copied = 48 * 8 * model.expert_bytes / 25.7e9  # 141.0 ms, whatever the context
    compute, copies, _ = speculating(context, 1e3 * copied / plain)
    first = np.arange(48) == 0
    [on_demand] = token_times(compute, Copies(copies, 0 * copies))
    [executed] = token_times(compute, Copies(copies * first, copies * ~first))
    assert on_demand == pytest.approx(plain / 1e3)
    # All but one layer's compute is hidden, so that the context hardly shows; what is left was not explained:
    # 3.0, 4.3, 4.3 and 4.4 ms, 60 to 90 microseconds a layer.
    assert executed == pytest.approx(copied + compute.seconds / 48)
    assert 2.9e-3 < published / 1e3 - executed < 4.5e-3
    [bound] = saving_bound(compute, copies)
    assert (plain - published) / 1e3 < bound == pytest.approx(compute.seconds * 47 / 48)
    assert 0.76 < (plain - published) / 1e3 / bound < 0.86
    # Fetching again what 10 % wrong predictions lack would leave 1 .. 8 % of the 9 .. 14 %.
    again = 0.1 * copies * ~first
    [exact] = token_times(compute, Copies(copies * first + again, copies * ~first))
    assert 0.01 < 1 - exact / on_demand < 0.085 < 1 - executed / on_demand


def test_the_roofline_has_most_of_what_the_context_adds() -> None:
    costs = {c: CostModel(tk.model("qwen3-30b-a3b"), hardware("a6000"), context=c) for c in PUBLISHED}
    grown = 1e3 * (Compute.of(costs[65536]).seconds - Compute.of(costs[1024]).seconds)
    assert grown == pytest.approx(8.26, abs=0.01)
    assert grown / (169.4 - 158.9) == pytest.approx(0.79, abs=0.01)


def test_what_a_predictor_cost_that_missed_less_and_lost() -> None:
    """10.6 % fewer misses, 18.5 % less throughput: 23 to 32 % of a token's time where copies are 86 % of it."""
    assert implied_cost(1 - 0.185, 0.106, 0.86) == pytest.approx((0.2270, 0.3181), abs=1e-4)
    assert implied_cost(1, 0, 0.5) == (0, 0)


# What tokens have to fetch

N, K, LAYERS, BYTES, RATE = 8, 2, 3, 1000, 1e6
LENGTHS, PROMPTS = (14, 9, 6, 12, 7), (4, 0, 3, 5, 2)


def routing(seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).random((sum(LENGTHS), LAYERS, N)) + 0.5 * np.sin(np.arange(N))
    order[1:] += order[:-1]
    return np.argsort(-order, axis=2)[:, :, :K].astype(np.uint8)


def foretold(seed: int) -> np.ndarray:
    """Three experts for every layer but the first."""
    return np.argsort(np.random.default_rng(seed).random((sum(LENGTHS), LAYERS, N)), axis=2)[:, :, :3].astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tpot")
    ids, ahead = routing(0), foretold(1)
    ends = np.cumsum(LENGTHS)
    (folder / "npz").mkdir()
    for r, (end, n, prompt) in enumerate(zip(ends, LENGTHS, PROMPTS, strict=True)):
        rows = slice(end - n, end)
        named = ahead[rows].copy()
        named[:, 0] = 255
        arrays = {"routed_experts": ids[rows], "predicted1": named, "prompt_len": prompt, "num_experts": N}
        np.savez(folder / "npz" / f"r{r}.npz", **arrays)
    tk.ingest(folder / "npz", folder / "S", name="t")
    return folder


@pytest.fixture
def store(folder: Path) -> tk.Store:
    return tk.open(folder / "S")


def ask(store: tk.Store, **arguments: Any) -> pl.DataFrame:
    return tk.tpot(store, **{"link": RATE, "compute": 6e-3, "expert_bytes": BYTES} | arguments)


def brute(
    capacity: int, start: str, ahead: np.ndarray | None, first: int = 1
) -> list[dict[str, list[tuple[int, int]]]]:
    """For each decode token and mode: experts copied on demand and ahead, by layer, with caches of ordered keys."""
    ids, tokens = routing(0), []
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(LAYERS)]
    large: list[set[int]] = [set() for _ in range(LAYERS)]
    row = 0
    for n, prompt in zip(LENGTHS, PROMPTS, strict=True):
        if start != "carry":
            caches, large = [OrderedDict() for _ in range(LAYERS)], [set() for _ in range(LAYERS)]
        events = [list(range(prompt))] * (prompt > 0 and start != "cold") + [[i] for i in range(prompt, n)]
        for event in events:
            token: dict[str, list[tuple[int, int]]] = {}
            for layer in range(LAYERS):
                needed = [int(e) for i in event for e in ids[row + i, layer]]
                there = set(list(caches[layer])[-capacity:]) | large[layer] if capacity else set()
                named = set() if ahead is None or layer < first else set(ahead[row + event[0], layer].tolist())
                missed = set(needed) - there
                modes = {
                    "on_demand": (len(set(needed)), 0),
                    "cache": (len(missed), 0),
                    "prefetch": (len(set(needed) - named), len(named)),
                    "cache+prefetch": (len(missed - named), len(named - there)),
                    "speculative": (0, min(K, len(named))) if named else (K, 0),
                }
                for mode, copies in modes.items():
                    token.setdefault(mode, []).append(copies)
                large[layer] = set(needed)
                for e in needed:
                    caches[layer].pop(e, None)
                    caches[layer][e] = None
            if event[0] >= prompt:
                tokens.append(token)
        row += n
    return tokens


@pytest.mark.parametrize("start", ["prompt", "cold", "carry"])
@pytest.mark.parametrize("capacity", [2, 5, 8])
def test_every_mode_is_every_tokens_copies_on_the_engines(store: tk.Store, start: Any, capacity: int) -> None:
    found = ask(store, capacity=capacity, start=start, predictor="next_gate", predictor_cost=1e-4)
    tokens = brute(capacity, start, foretold(1))
    assert found["n_tokens"].unique().to_list() == [len(tokens)] == [sum(LENGTHS) - sum(PROMPTS)]
    compute = Compute.given(6e-3, LAYERS)
    plain = 0.0
    for row in found.iter_rows(named=True):
        copies = np.array([token[row["mode"]] for token in tokens]) * (BYTES / RATE)
        cost = 0.0 if row["mode"] in ("on_demand", "cache") else 1e-4
        times = np.array([by_hand(compute, Copies(c[None, :, 0], c[None, :, 1]), cost) for c in copies])
        plain = plain or times.mean()
        assert row["tpot_ms"] == pytest.approx(1e3 * times.mean()), row["mode"]
        assert row["tpot_ms_p95"] == pytest.approx(1e3 * np.quantile(times, 0.95))
        assert row["saving"] == pytest.approx(1 - times.mean() / plain)
        assert row["copy_ms"] == pytest.approx(1e3 * copies.sum(axis=(1, 2)).mean())
        assert row["bytes"] == pytest.approx(copies.sum(axis=(1, 2)).mean() * RATE)
        assert row["overlapped_ms"] == pytest.approx(row["compute_ms"] + row["copy_ms"] - row["tpot_ms"])
        assert row["lossy"] == (row["mode"] == "speculative")


@pytest.mark.parametrize("start", ["prompt", "cold"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "belady"])
def test_what_a_cache_hits_is_what_the_replay_of_caches_says(store: tk.Store, policy: str, start: Any) -> None:
    rates = tk.cache(store, policy=policy, capacity=[3, 5], start=start, intervals=False)
    for capacity in (3, 5):
        found = ask(store, policy=policy, capacity=capacity, start=start).filter(mode="cache")
        expected = rates.filter(policy=policy, capacity=capacity)["hit_rate"][0]
        assert found["hit_rate"][0] == pytest.approx(expected), capacity
        best = ask(store, policy="belady", capacity=capacity, start=start).filter(mode="cache")
        assert found["tpot_ms"][0] >= best["tpot_ms"][0] - 1e-9


def test_with_other_policies_predictions_are_in_the_cache_as_often_as_the_tokens_own(store: tk.Store) -> None:
    found = {r["mode"]: r for r in ask(store, policy="belady", capacity=4, predictor="perfect").iter_rows(named=True)}
    # All that is missed behind the first layer is foretold, and foretold experts are missed as often as needed ones.
    assert found["cache+prefetch"]["bytes"] == pytest.approx(found["cache"]["bytes"])
    assert found["cache+prefetch"]["tpot_ms"] < found["cache"]["tpot_ms"]
    drawn = [ask(store, policy="random", capacity=4, seed=seed)["tpot_ms"][1] for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert min(drawn) >= found["cache"]["tpot_ms"] - 1e-9


@pytest.mark.parametrize("phase", ["all", "prefill"])
def test_other_phases_go_token_by_token(store: tk.Store, phase: Any) -> None:
    rates = [ask(store, policy=p, capacity=4, phase=phase, start="cold", intervals=False) for p in ("lru", "belady")]
    tokens = sum(LENGTHS) if phase == "all" else sum(PROMPTS)
    assert [r["n_tokens"][0] for r in rates] == [tokens, tokens]
    assert 0 < rates[0]["hit_rate"][1] <= rates[1]["hit_rate"][1]


def test_hits_and_waste_are_counted_by_hand(store: tk.Store) -> None:
    ids, ahead = routing(0), foretold(1)
    ends = np.cumsum(LENGTHS)
    rows = np.concatenate([np.arange(e - n + p, e) for e, n, p in zip(ends, LENGTHS, PROMPTS, strict=True)])
    both = (ids[rows, :, :, None] == ahead[rows, :, None, :]).any(axis=2)
    both[:, 0] = False
    found = {row["mode"]: row for row in ask(store, predictor="next_gate").iter_rows(named=True)}
    right = both.sum(axis=(1, 2)).mean()
    assert found["prefetch"]["hit_rate"] == pytest.approx(right / (K * LAYERS))
    assert found["prefetch"]["wasted_bytes"] == pytest.approx((3 * (LAYERS - 1) - right) * BYTES)
    executed = both[:, :, :K].sum(axis=(1, 2)).mean()
    assert found["speculative"]["hit_rate"] == pytest.approx(executed / (K * LAYERS))
    assert found["speculative"]["wasted_bytes"] == pytest.approx((K * (LAYERS - 1) - executed) * BYTES)
    fewer = ask(store, predictor="next_gate", m=2)
    assert fewer.filter(mode="prefetch")["hit_rate"][0] == pytest.approx(executed / (K * LAYERS))
    assert fewer.filter(mode="prefetch")["m"][0] == 2


def test_the_previous_token_is_foretold_from_the_first_layer_on(store: tk.Store) -> None:
    ids = routing(0)
    ends = np.cumsum(LENGTHS)
    rows = np.concatenate([np.arange(e - n + p, e) for e, n, p in zip(ends, LENGTHS, PROMPTS, strict=True)])
    first = np.isin(rows, ends - np.array(LENGTHS))  # of a request without a prompt
    shared = (ids[rows, :, :, None] == ids[rows - 1, :, None, :]).any(axis=3)
    expected = np.where(first[:, None, None], False, shared).mean()
    assert ask(store, predictor="previous_token").filter(mode="prefetch")["hit_rate"][0] == pytest.approx(expected)


def test_a_perfect_predictor_leaves_the_first_layer_on_demand(store: tk.Store) -> None:
    found = ask(store, predictor="perfect").filter(mode="prefetch")
    assert found["hit_rate"][0] == pytest.approx((LAYERS - 1) / LAYERS)
    assert found["wasted_bytes"][0] == 0
    # Copies take 2 ms a layer, compute 2 ms: all but the ends overlap, and the bound is reached.
    assert found["tpot_ms"][0] == pytest.approx(8)
    assert found["saving"][0] == pytest.approx(found["saving_most"][0]) == pytest.approx(4 / 12)


def test_a_supposed_recall_is_what_it_says_on_average(store: tk.Store) -> None:
    found = {row["mode"]: row for row in ask(store, predictor=0.75, capacity=4).iter_rows(named=True)}
    assert found["prefetch"]["hit_rate"] == pytest.approx(0.75 * 2 / 3)
    assert found["prefetch"]["wasted_bytes"] == pytest.approx(0.25 * K * 2 * BYTES)
    assert found["prefetch"]["predictor"] == "recall 0.75"
    each = ask(store, predictor=[np.nan, 1.0, 0.5], m=3).filter(mode="prefetch")
    assert each["hit_rate"][0] == pytest.approx(1.5 / 3)
    assert each["wasted_bytes"][0] == pytest.approx((1 + 2) * BYTES)
    missed = 1 - found["cache"]["hit_rate"]
    assert 1 - found["cache+prefetch"]["hit_rate"] < missed
    text = ask(store, predictor=".75").filter(mode="prefetch")
    assert text["tpot_ms"][0] == pytest.approx(found["prefetch"]["tpot_ms"])


@pytest.mark.parametrize("predictor", ["hot_list", "transition"])
def test_a_predictor_that_learns_comes_in_by_its_recall_in_each_layer(store: tk.Store, predictor: str) -> None:
    learned = tk.prefetch(store, predictor=predictor, m=3, by="layer", intervals=False)
    recall = [np.nan] * LAYERS
    for row in learned.iter_rows(named=True):
        recall[row["layer"]] = np.nan if row["recall"] is None else row["recall"]
    with pytest.warns(TracekitWarning, match="its mean recall in each layer"):
        found = ask(store, predictor=predictor, m=3)
    assert found.filter(mode="prefetch")["hit_rate"][0] == pytest.approx(np.nansum(recall) / LAYERS)
    assert found["predictor"].drop_nulls().unique().to_list() == [predictor]
    given = ask(store, predictor=recall, m=3)
    assert given["tpot_ms"].to_list() == pytest.approx(found["tpot_ms"].to_list())


def test_the_break_even_is_where_both_take_as_long(store: tk.Store) -> None:
    found = {row["mode"]: row for row in ask(store, predictor="perfect", capacity=3).iter_rows(named=True)}
    for mode, without in (("prefetch", "on_demand"), ("cache+prefetch", "cache"), ("speculative", "on_demand")):
        cost = found[mode]["break_even_ms"] / 1e3
        assert cost > 0
        again = ask(store, predictor="perfect", capacity=3, predictor_cost=cost).filter(mode=mode)
        assert again["tpot_ms"][0] == pytest.approx(found[without]["tpot_ms"])
    assert found["cache"]["break_even_ms"] is None


def test_intervals_leave_requests_out(store: tk.Store) -> None:
    found = ask(store, capacity=4).filter(mode="cache")
    tokens = [len(range(p, n)) for n, p in zip(LENGTHS, PROMPTS, strict=True)]
    compute = Compute.given(6e-3, LAYERS)
    times = [
        by_hand(compute, Copies(c[None, :, 0], c[None, :, 1]))
        for c in (np.array(token["cache"]) * (BYTES / RATE) for token in brute(4, "prompt", None))
    ]
    whole = np.split(np.array(times), np.cumsum(tokens)[:-1])
    without = [np.concatenate(whole[:g] + whole[g + 1 :]).mean() for g in range(5)]
    from tracekit.metrics.intervals import jackknife

    own = jackknife(np.array([np.mean(times), *without])[:, None])
    ends = (found["tpot_ms_lo"][0], found["tpot_ms_hi"][0])
    assert ends == pytest.approx((1e3 * own.lo[0], 1e3 * own.hi[0]))
    assert found["saving_lo"][0] < found["saving"][0] < found["saving_hi"][0]
    assert ask(store, capacity=4, intervals=False)["tpot_ms_lo"].null_count() == 2


def test_one_token_is_shown_in_every_mode(store: tk.Store) -> None:
    given = {"link": RATE, "compute": 6e-3, "expert_bytes": BYTES, "predictor": "next_gate", "capacity": 4}
    slow, fast = (tk.token_schedule(store, quantile=q, **given) for q in (1.0, 0.0))
    ends = [frame.group_by("mode").agg(pl.col("end_ms").max()).sort("mode") for frame in (slow, fast)]
    assert set(ends[0]["mode"]) == {"on_demand", "cache", "prefetch", "cache+prefetch", "speculative"}
    slowest, fastest = (dict(frame.iter_rows())["cache+prefetch"] for frame in ends)
    every = [
        by_hand(Compute.given(6e-3, LAYERS), Copies(c[None, :, 0], c[None, :, 1]))
        for c in (np.array(t["cache+prefetch"]) * (BYTES / RATE) for t in brute(4, "prompt", foretold(1)))
    ]
    assert (slowest, fastest) == pytest.approx((1e3 * max(every), 1e3 * min(every)))
    copied = slow.filter(engine="copy", mode="on_demand")
    assert copied["experts"].to_list() == pytest.approx([K] * LAYERS)
    assert slow.select("request_id", "token").n_unique() == 1


def test_with_a_model_the_sizes_and_the_compute_are_its_own(store: tk.Store, folder: Path) -> None:
    config = {
        "model_type": "olmoe",
        "num_hidden_layers": LAYERS,
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": N,
        "num_experts_per_tok": K,
        "vocab_size": 10,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    machine = {"bandwidth": 1e8, "flops": 1e11}
    found = tk.tpot(store, link=RATE, model=folder, **machine)
    cost = CostModel(describe(config), hardware(**machine))
    seconds = float(cost.seconds(1, 1, K))
    size = describe(config).expert_bytes
    assert size is not None
    assert found["expert_bytes"][0] == size
    assert found["compute_ms"][0] == pytest.approx(1e3 * seconds)
    assert found["tpot_ms"][0] == pytest.approx(1e3 * (seconds + LAYERS * K * size / RATE))
    half = tk.tpot(store, link=RATE, model=folder, bits=8, **machine)
    assert half["bytes"][0] == pytest.approx(found["bytes"][0] / 2)
    given = tk.tpot(store, link=RATE, model=folder, expert_bytes=10, **machine)
    assert given["bytes"][0] == LAYERS * K * 10
    config["num_hidden_layers"] = 2 * LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(TracekitWarning, match="3 MoE layers, .* 6"):
        double = tk.tpot(store, link=RATE, model=folder, capacity=4, **machine)
    single = ask(store, expert_bytes=size, capacity=4)
    assert double.filter(mode="cache")["bytes"][0] == pytest.approx(2 * single.filter(mode="cache")["bytes"][0])


@pytest.mark.parametrize(
    ("arguments", "error", "found"),
    [
        ({"link": 0}, UsageError, "a link of 0"),
        ({"compute": -1.0}, UsageError, "compute of -0.3"),
        ({"compute": None}, UsageError, "no time of compute"),
        ({"compute": 1e-3, "hardware": "h100"}, UsageError, "compute beside hardware"),
        ({"expert_bytes": None}, UsageError, "does not say how large an expert is"),
        ({"expert_bytes": -5}, UsageError, "-5"),
        ({"capacity": 1}, UsageError, "capacity"),
        ({"capacity": 9}, UsageError, "capacity"),
        ({"predictor_cost": 1e-3}, UsageError, "without a predictor"),
        ({"m": 2}, UsageError, "without a predictor"),
        ({"predictor": "perfect", "predictor_cost": -1.0}, UsageError, "predictor cost"),
        ({"predictor": 1.5}, UsageError, "recall"),
        ({"predictor": [0.5, 0.5]}, UsageError, "recalls of shape"),
        ({"predictor": 0.9, "m": 1}, UsageError, "recall of 0.9 with m = 1"),
        ({"predictor": "next_gate", "m": 4}, UsageError, "m of 4"),
        ({"predictor": "next_gate", "distance": 2}, UnsupportedError, "at distance 2"),
        ({"predictor": "crystal_ball"}, UnsupportedError, "crystal_ball"),
        ({"start": "warm"}, UsageError, "start 'warm'"),
        ({"policy": "static"}, UsageError, "policy 'static'"),
        ({"policy": "belady", "start": "carry"}, UsageError, "start 'carry' with the policy belady"),
        ({"tensor_parallel": 2}, UsageError, "one device"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    store: tk.Store, arguments: dict[str, Any], error: type[Exception], found: str
) -> None:
    with pytest.raises(error, match=found):
        ask(store, **arguments)


def test_a_long_trace_is_answered_by_some_of_its_requests(store: tk.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracekit.analysis import tpot as module

    monkeypatch.setattr(module, "MAX_TOKENS", 20)
    with pytest.warns(TracekitWarning, match=r"of its 5 requests, drawn at random"):
        found = ask(store, capacity=4, intervals=False)
    assert found["n_tokens"][0] <= 20
    with pytest.warns(TracekitWarning):
        assert ask(store, capacity=4, intervals=False).equals(found), "the seed decides"


def test_the_verb_and_its_charts(store: tk.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--link", "1e6", "--compute", "6e-3", "--expert-bytes", "1000", "--predictor", "next_gate"]
    verb = ["tpot", str(store.path), *given, "--capacity", "4"]
    assert main([*verb, "--chart", str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in ("on demand", "cache + prefetch", "speculative*", "break-even"))
    assert main([*verb, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads(json.dumps(ask(store, predictor="next_gate", capacity=4).to_dicts()))
    gantt = tmp_path / "b.json"
    assert main([*verb, "--schedule", "--format", "csv", "--chart", str(gantt), "--chart-kind", "gantt"]) == 0
    assert capsys.readouterr().out.startswith("trace,phase,mode,request_id,token,engine,layer,part,start_ms,end_ms")
    bars = json.loads((tmp_path / "a.json").read_text())
    parts = (
        [row for data in bars["datasets"].values() for row in data] if "datasets" in bars else bars["data"]["values"]
    )
    assert len(parts) == 3 * 5
    for row in rows:
        mine = [p for p in parts if p["tpot"] == row["tpot_ms"]]
        assert max(p["end"] for p in mine) == pytest.approx(row["tpot_ms"])
    assert len(json.loads(gantt.read_text())["vconcat"]) == 5
    assert main(["tpot", str(store.path), "--link", "0", "--compute", "1", "--expert-bytes", "1"]) == 2
    assert "a link of 0 bytes per second" in capsys.readouterr().err


# Real traces


def test_hit_rates_of_real_routing(shared: Path, tmp_path: Path) -> None:
    """The published hit rates of caches of 4 .. 24 experts, empty at the start of each request."""
    tk.ingest(shared / "traces" / "gptoss20b_subset64" / "trace.npz", tmp_path / "S", num_experts=32, phase="decode")
    rates = []
    for capacity in (4, 8, 12, 16, 24):
        asked = {"link": "pcie4-x16", "compute": 1e-3, "expert_bytes": 1e6, "capacity": capacity, "intervals": False}
        rates.append(tk.tpot(tmp_path / "S", **asked).filter(mode="cache")["hit_rate"][0])
    assert rates == pytest.approx([0.439, 0.654, 0.803, 0.894, 0.970], abs=5e-4)


def test_recorded_predictions_of_a_real_model(shared: Path, tmp_path: Path) -> None:
    """Next-gate recall .768 and .672, of the layers that have a prediction: 7 and 6 of 8."""
    tk.ingest(shared / "moe" / "traces" / "olmoe" / "npz", tmp_path / "S", name="olmoe")
    asked = {"link": 1e9, "compute": 2e-3, "expert_bytes": 2e5, "phase": "all", "intervals": False}
    for distance, published, layers in ((1, 0.768, 7), (2, 0.672, 6)):
        with pytest.warns(TracekitWarning, match="stand for all"):
            found = tk.tpot(tmp_path / "S", predictor="next_gate", distance=distance, **asked).filter(mode="prefetch")
        assert found["hit_rate"][0] * 8 / layers == pytest.approx(published, abs=0.005)
