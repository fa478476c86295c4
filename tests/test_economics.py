"""The models of time: machines, rooflines, acceptance, Amdahl's law, and the figures that others have published."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.economics import amdahl, speedup
from tracekit.economics.acceptance import Acceptance, acceptance_length, acceptance_rate, break_even_rate
from tracekit.economics.cost import CostModel, PartCost, total, uniform_unique
from tracekit.economics.hardware import HARDWARE, PRESETS, Hardware, hardware, ideal
from tracekit.economics.speedup import Unions, choices, gains, regime, verification
from tracekit.errors import SourceError, UnsupportedError, UsageError
from tracekit.sources.sizes import Cache, Model, describe, load_model

# 2 layers of hidden size 8, the first dense: 4 heads of which 2 keep keys and values, of 4 numbers each; 6 experts of
# width 3, 2 a token, and a shared one; 10 words, the head with weights of its own. Two bytes a parameter.
TINY = {
    "model_type": "glm4_moe",
    "num_hidden_layers": 2,
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
    "tie_word_embeddings": False,
}
SLOW = Hardware("slow", bandwidth=1e8, flops=1e9)
ATTENTION = 2 * (16 * 8 + 2 * 8 * 8 + 8 * 16)
EXPERT = 3 * 3 * 8


@pytest.fixture(scope="module")
def tiny() -> Model:
    return describe(TINY)


def part(parts: tuple[PartCost, ...], name: str) -> PartCost:
    return next(p for p in parts if p.name == name)


# --- machines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bandwidth", 0),
        ("bandwidth", -1e12),
        ("bandwidth", math.inf),
        ("bandwidth", math.nan),
        ("bandwidth", 3350),
        ("bandwidth", 1e20),
        ("bandwidth", True),
        ("bandwidth", "fast"),
        ("flops", 0),
        ("flops", 989),
        ("flops", math.inf),
        ("overhead", -1e-3),
        ("overhead", math.inf),
        ("overhead", 3600),
        ("launch", -1),
        ("sampling", math.nan),
        ("link", 0),
        ("bandwidth_share", 0),
        ("bandwidth_share", 1.1),
        ("flops_share", -0.5),
        ("overlap", 2),
    ],
)
def test_an_impossible_figure_is_refused(field: str, value: Any):
    with pytest.raises(UsageError, match=field):
        Hardware("x", **{"bandwidth": 1e12, "flops": 1e14} | {field: value})


def test_a_figure_in_another_unit_is_told_what_the_unit_is():
    with pytest.raises(UsageError, match=r"plain units, such as 3\.35e12 bytes per second"):
        hardware("h100", bandwidth=3.35)


def test_every_known_machine_is_possible_and_has_its_source():
    for name, entry in PRESETS.items():
        assert set(entry) <= {"title", "bandwidth", "bf16", "fp8", "link", "source"}
        assert entry["title"]
        assert entry["source"]
        made = hardware(name, flops=None if "bf16" in entry else 1e13)
        assert (name in HARDWARE) == ("bf16" in entry)
        assert made.overhead == 0
        # Sparse figures, which data sheets print as well, are twice the dense ones: fp8 would be four times bf16.
        assert entry.get("fp8", 0) <= 2.05 * entry.get("bf16", 1)


def test_a_machine_is_known_by_its_name_or_made_of_figures():
    assert hardware("H100").flops == 989.4e12
    assert hardware("h100", precision="fp8").flops == 1978.9e12
    assert hardware("RTX 4090", overhead=1e-3).overhead == 1e-3
    assert hardware(bandwidth=1e12, flops=1e14, launch=1e-6) == Hardware("custom", 1e12, 1e14, launch=1e-6)
    assert hardware("m3-ultra", flops=2e13).bandwidth == 819e9
    for wrong, said in (
        ({"name": "h10"}, "Did you mean 'h100'?"),
        ({"bandwidth": 1e12}, "without flops"),
        ({}, "without bandwidth and flops"),
        ({"name": "m3-ultra"}, "no bf16 FLOP per second is known"),
        ({"name": "a100", "precision": "fp8"}, "no fp8 FLOP per second is known"),
    ):
        with pytest.raises(UsageError, match=said):
            hardware(**wrong)


# --- the cost of a step ------------------------------------------------------------------------


def test_the_parts_of_a_step_worked_out_by_hand(tiny: Model):
    """Three requests of two tokens, 100 tokens of context, five experts loaded: bytes over 1e8, FLOPs over 1e9."""
    parts = CostModel(tiny, SLOW, context=100).parts(3, 2, 5)
    expected = {
        "attention": (2 * ATTENTION, 2 * ATTENTION * 6),
        # A layer keeps a key and a value of 2 heads of 4 numbers; each of 4 heads multiplies with 4 + 4 of them.
        "cache": (2 * 100 * 16 * 2 * 3, 2 * 2 * 100 * 32 * 6),
        "router": (2 * (6 * 8 + 6), 2 * 6 * 8 * 6),
        "shared": (2 * EXPERT, 2 * EXPERT * 6),
        "experts": (2 * EXPERT * 5, 2 * EXPERT * 6 * 2),
        "dense": (2 * 3 * 5 * 8, 2 * 3 * 5 * 8 * 6),
        "head": (2 * 10 * 8, 2 * 10 * 8 * 6),
        "overhead": (0, 0),
    }
    assert {p.name: (float(p.bytes), float(p.flops)) for p in parts} == expected
    for p in parts:
        assert float(p.seconds) == max(expected[p.name][0] / 1e8, expected[p.name][1] / 1e9)
    assert float(total(parts)) == pytest.approx(float(CostModel(tiny, SLOW, context=100).seconds(3, 2, 5)))


def test_without_overlap_reading_and_computing_add_up(tiny: Model):
    machine = Hardware("x", 1e8, 1e9, overlap=0, bandwidth_share=0.5, flops_share=0.25)
    for p in CostModel(tiny, machine).parts(3, 2, 5):
        assert float(p.seconds) == pytest.approx(float(p.bytes) / 0.5e8 + float(p.flops) / 0.25e9)


def test_fixed_costs_stand_by_themselves(tiny: Model):
    machine = Hardware("x", 1e8, 1e9, overhead=1e-3, launch=1e-5, sampling=1e-6)
    cost = CostModel(tiny, machine)
    # Attention and its cache in both layers, a dense MLP in one, router, shared and routed experts in one, a head.
    assert cost.launches == 2 + 2 + 1 + 3 + 1
    assert float(part(cost.parts(3, 2, 5), "overhead").seconds) == pytest.approx(1e-3 + 9e-5 + 6e-6)
    assert float(part(cost.on(ideal(machine)).parts(3, 2, 5), "overhead").seconds) == 0


def test_parallelism_divides(tiny: Model):
    alone = CostModel(tiny, SLOW).parts(8, 2, 5)
    split = CostModel(tiny, SLOW, tensor_parallel=4).parts(8, 2, 5)
    for name in ("attention", "experts", "dense", "head"):
        assert float(part(split, name).bytes) == float(part(alone, name).bytes) / 4
    # Two heads of keys and values go to two devices at most; the heads that attend to them to four.
    assert float(part(split, "cache").bytes) == float(part(alone, "cache").bytes) / 2
    assert float(part(split, "cache").flops) == float(part(alone, "cache").flops) / 4
    groups = CostModel(tiny, SLOW, expert_parallel=4).parts(8, 2, 5)
    assert float(part(groups, "attention").bytes) == float(part(alone, "attention").bytes)
    for name in ("experts", "cache"):
        assert float(part(groups, name).bytes) == float(part(alone, name).bytes) / 4
    assert float(part(groups, "attention").flops) == float(part(alone, "attention").flops) / 4
    # Fewer requests than groups: those that have one are no faster for it.
    few = CostModel(tiny, SLOW, expert_parallel=4).parts(1, 1, 2)
    assert float(part(few, "attention").flops) == 2 * ATTENTION


def test_devices_talk_only_where_the_link_is_known(tiny: Model):
    linked = Hardware("x", 1e8, 1e9, link=1e8)
    assert "communication" not in {p.name for p in CostModel(tiny, linked).parts(1, 1, 2)}
    assert "communication" not in {p.name for p in CostModel(tiny, SLOW, tensor_parallel=2).parts(1, 1, 2)}
    sent = part(CostModel(tiny, linked, tensor_parallel=2).parts(3, 2, 5), "communication")
    # Two all-reduces a layer, of 6 rows of 8 numbers of 2 bytes, each sent twice but for a half.
    assert float(sent.bytes) == 2 * 2 * (2 * 1 / 2) * 6 * 8 * 2
    assert float(sent.seconds) == float(sent.bytes) / 1e8


def test_arguments_out_of_range_and_models_of_unknown_size_are_refused(tiny: Model):
    for wrong in ({"tensor_parallel": 0}, {"expert_parallel": -1}, {"context": -1}, {"kv_bits": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CostModel(tiny, SLOW, **wrong)
    with pytest.raises(UnsupportedError, match="embeddings"):
        CostModel(describe({k: v for k, v in TINY.items() if k != "vocab_size"}), SLOW)


def test_quantisation_makes_a_step_shorter():
    at = [float(CostModel(load_model("Qwen3-30B-A3B", bits=b), hardware("h100")).seconds(1, 1, 8)) for b in (16, 8, 4)]
    assert at[0] > at[1] > at[2]


def test_what_a_cache_holds_is_read_in_the_config():
    assert describe(TINY).caches == (Cache(2, 16, 32, 2),)
    # Latent attention keeps one vector of 512 + 64, to which 128 heads attend.
    assert load_model("DeepSeek-V3").caches == (Cache(61, 576, 128 * (576 + 512), 1),)
    # Every other layer of gpt-oss looks back 128 tokens; 36 of Qwen3-Next's 48 keep a state of fixed size.
    assert {(c.layers, c.window) for c in load_model("gpt-oss-20b").caches} == {(12, None), (12, 128)}
    assert [c.layers for c in load_model("Qwen3-Next-80B-A3B").caches] == [12]
    long = CostModel(load_model("gpt-oss-20b"), hardware("h100"), context=128 * 9)
    near = CostModel(load_model("gpt-oss-20b"), hardware("h100"), context=128)
    assert float(part(long.parts(1, 1, 4), "cache").bytes) == 5 * float(part(near.parts(1, 1, 4), "cache").bytes)


def test_a_dense_model_is_one_expert_that_every_token_takes():
    dense = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 5,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "tie_word_embeddings": True,
    }
    with pytest.raises(SourceError, match="dense model"):
        describe(dense)
    model = describe(dense, dense=True)
    weights = 2 * (4 * 8 * 8 + 3 * 5 * 8 + 2 * 8) + 8 + 10 * 8
    assert model.total_parameters == model.active_parameters == weights
    cost = CostModel(model, SLOW, context=0)
    names = {p.name: float(p.bytes) for p in cost.parts(4, 1, 1)}
    assert names == {"attention": 1024, "experts": 2 * 2 * 3 * 5 * 8, "head": 160, "overhead": 0}


def test_the_uniform_formula():
    assert uniform_unique(128, 8, 4) == pytest.approx(29.123046875)
    assert uniform_unique(1, 1, [1, 5]).tolist() == [1, 1]


# --- acceptance --------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(0, 12))
def test_acceptance_length_is_the_sum_of_the_chances_and_has_an_inverse(rate: float, drafts: int):
    length = float(acceptance_length(rate, drafts))
    assert length == pytest.approx(sum(rate**i for i in range(drafts + 1)), rel=1e-12)
    if drafts:
        assert float(acceptance_length(acceptance_rate(length, drafts), drafts)) == pytest.approx(length, rel=1e-9)


def test_acceptance_at_its_ends():
    assert acceptance_length([0, 1, 1 - 1e-15], 3).tolist() == pytest.approx([1, 4, 4])
    assert acceptance_rate([1, 4, 2.73], 3).tolist() == pytest.approx([0, 1, 0.748954], abs=1e-5)
    assert break_even_rate([0.5, 1, 4, 4.0001], 3).tolist()[:3] == [0, 0, 1]
    assert np.isnan(break_even_rate(4.0001, 3))
    for rate in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="0 to 1"):
            acceptance_length(rate, 3)
    for length in (0.9, 4.1, math.nan):
        with pytest.raises(UsageError, match="the bonus token counts"):
            acceptance_rate(length, 3)
    with pytest.raises(UsageError, match="-1 drafts"):
        acceptance_length(0.5, -1)


def test_acceptance_is_given_in_one_way():
    assert Acceptance.given(None, None, None, [3]) is None
    assert Acceptance.given(0.5, None, None, [1, 3]) == Acceptance(0.5)
    of_one = Acceptance.given(None, 2.73, None, [3])
    assert of_one == Acceptance.given(None, 2.73, 3, [1, 3, 5])
    assert of_one is not None
    assert of_one.length(np.array([3, 1])).tolist() == pytest.approx([2.73, 1.748954], abs=1e-5)
    for wrong in ((0.5, 2.0, None, [3]), (None, 2.0, None, [1, 3]), (0.5, None, 3, [3]), (1.2, None, None, [3])):
        with pytest.raises(UsageError):
            Acceptance.given(*wrong)


def test_measured_acceptance_goes_on_at_a_constant_rate():
    rates = [0.5, 0.6, 0.4]
    found = Acceptance.measured(rates)
    lengths = found.length(np.array([1, 2, 3, 5]))
    assert lengths[:3].tolist() == pytest.approx([1.5, 1.8, 1.92])
    constant = float(acceptance_rate(1.92, 3))
    assert lengths[3] == pytest.approx(1.92 + 0.12 * (constant + constant**2))
    assert found.source(np.array([1, 3, 4])) == ["measured", "measured", "extrapolated"]
    assert Acceptance(0.7).source(np.array([9])) == ["given"]
    # Seven drafts in a tree that is three deep: their acceptance length is their own.
    tree = Acceptance(found.beyond, found.rates, {7: 2.5})
    assert tree.length(np.array([3, 7])).tolist() == pytest.approx([1.92, 2.5])
    assert tree.source(np.array([3, 5, 7])) == ["measured", "extrapolated", "measured"]


# --- Amdahl's law, and the published checks -------------------------------------------------------


def test_published_verification_ratios_and_speedups():
    ratio = 20.36 / 8
    assert amdahl.verification_ratio([0.30, 0.55], ratio).tolist() == pytest.approx([1.4635, 1.8498], abs=1e-4)
    assert float(amdahl.implied_share(1.25, ratio)) == pytest.approx(0.162, abs=5e-4)
    assert speedup.speedup(2.73, [1.25, 1.4635], 0).tolist() == pytest.approx([2.184, 1.865], abs=1e-3)
    assert float(speedup.speedup(2.73, 1.25, 0.143)) == pytest.approx(1.960, abs=1e-3)


def test_the_routed_share_grows_with_the_batch():
    """gpt-oss-20b's decode traces at B = 4: U(1, B) = 12.13 of 32, U(4, B) = 20.60."""
    share = amdahl.share_at(0.30, 12.13335 / 4)
    assert float(amdahl.verification_ratio(share, 20.59594 / 12.13335)) == pytest.approx(1.394, abs=5e-4)
    assert float(amdahl.verification_ratio(0.30, 20.59594 / 12.13335)) == pytest.approx(1.209, abs=5e-4)
    assert amdahl.share_at([0, 0.3, 1], 1).tolist() == pytest.approx([0, 0.3, 1])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="0 to 1"):
            amdahl.verification_ratio(wrong, 2)
    assert np.isnan(amdahl.implied_share(1.2, 1.0))


def test_the_fixed_cost_that_a_measured_ratio_implies_brings_the_model_there():
    model = load_model("Qwen3-30B-A3B")
    bare = CostModel(model, hardware("h100"))
    found = amdahl.decompose(bare, 4, 20.36, 1.25)
    assert found.verification_ratio == pytest.approx(
        float(amdahl.verification_ratio(found.routed_share, 20.36 / 8)), rel=1e-6
    )
    assert found.implied_share == pytest.approx(0.162, abs=5e-4)
    fixed = CostModel(model, hardware("h100", overhead=found.implied_overhead))
    there = amdahl.decompose(fixed, 4, 20.36, 1.25)
    assert there.verification_ratio_fixed == pytest.approx(1.25, rel=1e-6)
    assert there.overhead_share == pytest.approx(there.implied_overhead_share, rel=1e-6)
    assert there.routed_share == found.routed_share
    without = amdahl.decompose(bare, 4, 20.36)
    assert np.isnan([without.implied_share, without.implied_overhead]).all()
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(UsageError, match="measured"):
            amdahl.decompose(bare, 4, 20.36, wrong)


# --- gains -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some() -> Unions:
    sizes, windows = np.array([1, 1, 8, 8, 64, 64]), np.array([2, 4, 2, 4, 2, 4])
    single = np.array([8, 8, 45, 45, 110, 110.0])
    unique = np.array([13, 20, 62, 83, 120, 126.0])
    return Unions(sizes, windows, unique, single, unique / single - 0.05, unique / single + 0.05)


def test_gains_are_what_their_definitions_say(some: Unions):
    cost = CostModel(load_model("Qwen3-30B-A3B"), hardware("h100", overhead=1e-3))
    found = gains(cost, some, acceptance=Acceptance(0.6), draft_cost=0.05)
    V = cost.seconds(some.batch_size, some.window, some.unique) / cost.seconds(some.batch_size, 1, some.unique_single)
    assert found["verification_ratio"].tolist() == pytest.approx(V.tolist())
    assert found["target_efficiency"].tolist() == pytest.approx((1 / V).tolist())
    D = 0.05 * (some.window - 1)
    AL = acceptance_length(0.6, some.drafts)
    assert found["speedup"].tolist() == pytest.approx((AL / (V + D)).tolist())
    assert found["break_even_length"].tolist() == pytest.approx((V + D).tolist())
    again = acceptance_length(found["break_even_rate"], some.drafts)
    assert again.tolist() == pytest.approx((V + D).tolist())
    assert np.all(found["verification_ratio_lo"] < V)
    assert np.all(found["verification_ratio_hi"] > V)
    assert np.all(found["speedup_lo"] < found["speedup"])
    # Reading bounds all of it, so that Amdahl's law is exact.
    assert found["verification_ratio_amdahl"].tolist() == pytest.approx(V.tolist())
    assert found["arithmetic_intensity"].tolist() == pytest.approx(
        (some.batch_size * some.window * 8 / some.unique).tolist()
    )
    uniform = cost.seconds(some.batch_size, some.window, uniform_unique(128, 8, some.batch_size * some.window))
    uniform = uniform / cost.seconds(some.batch_size, 1, uniform_unique(128, 8, some.batch_size))
    assert found["verification_ratio_uniform"].tolist() == pytest.approx(uniform.tolist())


def test_without_acceptance_there_is_a_break_even_and_no_choice(some: Unions):
    found = gains(CostModel(load_model("Qwen3-30B-A3B"), hardware("h100")), some)
    assert np.isnan(found["speedup"]).all()
    assert not np.isnan(found["break_even_rate"]).any()
    assert not found["best"].any()
    assert np.isnan(found["regret"]).all()
    assert found["acceptance_source"] == [None] * 6


def test_a_draft_model_costs_its_steps(some: Unions):
    target = CostModel(load_model("Qwen3-30B-A3B"), hardware("h100"))
    draft = CostModel(load_model("OLMoE-1B-7B"), hardware("h100"))
    found = gains(target, some, draft=draft)
    single = draft.seconds(1, 1, 8) / target.seconds(1, 1, 8)
    assert found["draft_cost"][:2].tolist() == pytest.approx([float(single), 3 * float(single)])
    with pytest.raises(UsageError, match="draft cost"):
        gains(target, some, draft_cost=-1)


def test_a_dense_model_loses_with_the_batch_what_a_sparse_one_keeps(some: Unions):
    found = verification(CostModel(load_model("Qwen3-30B-A3B"), hardware("h100")), some)
    assert found["verification_ratio_dense"][:2].tolist() == pytest.approx([1, 1], rel=1e-3)
    large = Unions(np.array([256]), np.array([4]), np.array([128.0]), np.array([128.0]))
    found = verification(CostModel(load_model("Qwen3-30B-A3B"), hardware("h100")), large)
    assert found["verification_ratio_dense"][0] > 1.3 * found["verification_ratio"][0]


def test_regimes():
    model, one = load_model("Qwen3-30B-A3B"), Unions(*(np.array([x]) for x in (1, 4, 20.0, 8.0)))
    many = Unions(*(np.array([x]) for x in (4096, 4, 128.0, 128.0)))
    for machine, unions, expected in (
        ({}, one, "bandwidth"),
        ({}, many, "compute"),
        ({"overhead": 0.1}, one, "overhead"),
    ):
        cost = CostModel(model, hardware("h100", **machine), context=0)
        assert verification(cost, unions)["regime"] == [expected]
    cost = CostModel(model, hardware("h100"))
    assert len(regime(cost, cost.parts(np.ones((5,)), 2, 12))) == 5


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.2, 3), st.floats(0.2, 3)), min_size=1, max_size=12))
def test_choices_are_those_of_a_search(rows: list[tuple[int, float, float]]):
    sizes, measured, uniform = (np.array(column) for column in zip(*rows, strict=True))
    found = choices(sizes, measured, uniform)
    for size in set(sizes.tolist()):
        here = np.flatnonzero(sizes == size)
        options = {None: 1.0} | {int(i): float(measured[i]) for i in here}
        best = max(options.values())
        assert [measured[i] for i in here if found["best"][i]] == ([best] if best > 1 else [])
        promised = max([1.0, *(float(uniform[i]) for i in here)])
        chosen = next((int(i) for i in here if uniform[i] == promised and promised > 1), None)
        assert found["regret"][here].tolist() == pytest.approx([best / options[chosen] - 1] * len(here))
        assert min(found["regret"]) >= 0


# --- published curves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", checkout / "benchmarks" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_law_behind_coheres_curve_gives_back_its_figures(published: ModuleType):
    loaded = published.unions()
    assert loaded.unique_single[0] == pytest.approx(8)
    assert loaded.unique[0] == pytest.approx(published.UNION, rel=0.01)
    ratio = loaded.unique / loaded.unique_single
    assert np.all(np.diff(ratio) < 0)
    assert np.all(loaded.unique <= 128)


def test_coheres_curve_peaks_late_by_the_data_sheet_and_early_where_a_token_costs_time(published: ModuleType):
    sizes, loaded = published.BATCH_SIZES, published.unions()
    plain = published.curve(published.PLAIN, loaded)["speedup"]
    assert sizes[int(np.argmin(plain))] == 2
    assert 64 <= sizes[int(np.argmax(plain))] < 256
    assert plain[-1] < plain.max()
    columns = published.curve(published.MODERATE, loaded)
    early = columns["speedup"]
    assert published.peaks_early(early)
    assert early[sizes.index(16)] > early[sizes.index(32)] > early[sizes.index(64)]
    assert early[sizes.index(16)] > early[0] > early[sizes.index(2)]
    assert all(a > b for a, b in itertools.pairwise(columns["speedup_dense"][:7]))
    # What makes it early is the cost of a row: without it the same machine peaks past 32.
    late = published.curve(published.LATE, loaded)["speedup"]
    assert sizes[int(np.argmax(late))] > 32


def test_a_fixed_cost_lifts_one_request_and_leaves_a_dip(published: ModuleType):
    """What V = 1.25 at B = 1 implies gives the published 1.95 there, and 1.7, not 2.2, at B = 4."""
    loaded = published.unions()
    found = amdahl.decompose(CostModel(load_model("Qwen3-30B-A3B"), hardware("h100")), 4, 20.36, 1.25)
    fixed = published.Setting("", {"overhead": found.implied_overhead})
    curve = published.curve(fixed, loaded)["speedup"]
    assert curve[0] == pytest.approx(1.96, abs=0.01)
    assert curve[2] == pytest.approx(1.72, abs=0.02)


def test_the_curves_in_the_documentation_are_those_of_the_script(published: ModuleType, checkout: Path):
    rows = {}
    for line in (checkout / "docs" / "speculation.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells[1:]
    loaded = published.unions()
    assert rows["U(4, B) / U(1, B)"] == [f"{ratio:.2f}" for ratio in loaded.unique / loaded.unique_single]
    for setting in published.SETTINGS:
        assert rows[setting.name] == [f"{value:.2f}" for value in published.curve(setting, loaded)["speedup"]]
    for name, setting in (("data sheet", published.PLAIN), ("as in the line with 1.27", published.MODERATE)):
        dense = published.curve(setting, loaded)["speedup_dense"]
        assert rows[f"a dense model, {name}"] == [f"{value:.2f}" for value in dense]


def test_mlx_lm_measured_more_than_the_experts_reading_explains(published: ModuleType):
    for bits in (4.5, 8, 16):
        case = published.mlx(bits)
        assert case.verification_ratio == pytest.approx(1.37, abs=0.01)
        assert case.implied_share == pytest.approx(0.59 / 0.743)
        assert case.implied_overhead < 0
    assert 1.77 / published.mlx(4.5).verification_ratio == pytest.approx(1.28, abs=0.01)
