"""The model of time against what others have published about speculative decoding of Mixture-of-Experts models.

    python benchmarks/published.py                        # Cohere's curve, assumption by assumption; mlx-lm's case
    python benchmarks/published.py --search               # which settings of a grid come near Cohere's curve
    python benchmarks/published.py --chart curve.png

Cohere, "Why MoE models get more from speculative decoding" (2026-04-21): 128 experts of which a token takes 8, three
drafts. What is taken from it: the overlap of tokens 1 .. 4 apart, the union of 4 tokens, acceptance length, draft cost,
verification ratio at B = 1, and the speedup by batch size: 1.95 at B = 1, about 2.2 at B = 4 .. 16, falling from 32.
Its model's shape, machine, engine and length of context are not used. So the shape is that of Qwen3-30B-A3B, which has
as many experts, on one H100 as its data sheet has it, and every other figure is an assumption, named where it is made.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.economics import amdahl
from tracekit.economics.acceptance import Acceptance
from tracekit.economics.cost import CostModel
from tracekit.economics.hardware import hardware
from tracekit.economics.law import RoutingLaw
from tracekit.economics.speedup import Unions, gains
from tracekit.sources.sizes import load_model

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
N, K, DRAFTS, WINDOW = 128, 8, 3, 4
OVERLAPS = (0.381, 0.329, 0.301, 0.299)
POPULARITY_OVERLAP = 0.118
UNION = 20.36
ACCEPTANCE_LENGTH = 2.73
DRAFT_COST = 0.143
"""Of all three drafts, in steps of the target."""
VERIFICATION_RATIO = 1.25
"""As measured at B = 1."""


@dataclass(frozen=True)
class Setting:
    """One set of assumptions."""

    name: str
    machine: dict[str, float] = field(default_factory=dict)
    """Fields of Hardware that differ from the data sheet's."""
    bits: float = 16
    context: int = 1024


PLAIN = Setting("data sheet: plain roofline, bf16")
LATE = Setting("the same in 8 bits, half of peak FLOPs", {"flops_share": 0.5}, bits=8)
MODERATE = Setting("and 0.1 ms per row of logits", {"flops_share": 0.5, "sampling": 1e-4}, bits=8)
SETTINGS = (
    PLAIN,
    Setting("32 k tokens of context", context=32768),
    Setting("fixed cost of 5 ms a step", {"overhead": 5e-3}),
    Setting("no overlap of reading and computing", {"overlap": 0.0}),
    Setting("a quarter of peak FLOPs", {"flops_share": 0.25}),
    Setting("weights in 4.25 bits", bits=4.25),
    Setting("0.1 ms per row of logits", {"sampling": 1e-4}),
    LATE,
    MODERATE,
    Setting("and fixed cost of 3 ms a step", {**MODERATE.machine, "overhead": 3e-3}, bits=8),
)


def unions() -> Unions:
    """Return U(4, B) and U(1, B) of requests that are drawn independently, by a law fitted to the published figures."""
    law = RoutingLaw.from_summary(N, K, OVERLAPS, POPULARITY_OVERLAP, {WINDOW: UNION})
    loaded = {
        tokens: np.array([float(np.mean(law.unique(tokens, size))) for size in BATCH_SIZES]) for tokens in (1, WINDOW)
    }
    sizes = np.array(BATCH_SIZES)
    return Unions(sizes, np.full(len(sizes), WINDOW), loaded[WINDOW], loaded[1])


def curve(setting: Setting, loaded: Unions) -> dict[str, Any]:
    """Return the columns of `gains` by batch size under one set of assumptions."""
    model = load_model("Qwen3-30B-A3B", bits=None if setting.bits == 16 else setting.bits)
    cost = CostModel(model, hardware("h100", **setting.machine), context=setting.context)
    accepted = Acceptance.given(None, ACCEPTANCE_LENGTH, DRAFTS, [DRAFTS])
    return gains(cost, loaded, acceptance=accepted, draft_cost=DRAFT_COST / DRAFTS)


def grid() -> Iterator[Setting]:
    """Yield the settings that `--search` goes through."""
    for bits, share, overlap, context, overhead, sampling in itertools.product(
        (16, 8, 4.25), (1, 0.5, 0.25), (1, 0), (1024, 8192, 32768), (0, 1e-3, 3e-3, 5e-3), (0, 2e-5, 5e-5, 1e-4, 2e-4)
    ):
        machine = {"flops_share": share, "overlap": overlap, "overhead": overhead, "sampling": sampling}
        yield Setting("", machine, bits, context)


def peaks_early(speedup: np.ndarray) -> bool:
    """Whether a curve's highest point is at B = 4 .. 16, and it has fallen by 32."""
    best = BATCH_SIZES[int(np.argmax(speedup))]
    return 4 <= best <= 16 and speedup[BATCH_SIZES.index(32)] < speedup.max()


def search(loaded: Unions) -> dict[str, int]:
    """Count the settings of the grid by which features of the published curve they have."""
    found = {"settings": 0, "peak at 4 .. 16 and fall by 32": 0, "1.9 or more at B = 1": 0, "both": 0}
    for setting in grid():
        speedup = curve(setting, loaded)["speedup"]
        early, high = peaks_early(speedup), speedup[0] >= 1.9
        found["settings"] += 1
        found["peak at 4 .. 16 and fall by 32"] += early
        found["1.9 or more at B = 1"] += bool(high)
        found["both"] += early and bool(high)
    return found


def mlx(bits: float) -> amdahl.Decomposition:
    """Return mlx-lm's pull request 1485: GLM-4.7-Flash, one draft, tokens that share .257 of their 4 experts."""
    # At B = 1 only the bandwidth counts, and it cancels: the machine is of no account.
    cost = CostModel(load_model("GLM-4.7-Flash", bits=bits), hardware(bandwidth=819e9, flops=28e12))
    return amdahl.decompose(cost, 2, 4 * (2 - 0.257), 1.59)


def draw(loaded: Unions, path: Path) -> None:
    """Draw the curves of three settings, and of a dense model under the last."""
    from tracekit.reports.drawing import Line, ladder, line_chart
    from tracekit.reports.rendering import render

    styles = {
        "dense": Line("#999999", (8, 3), "a dense model with the same active weights, " + MODERATE.name),
        "data sheet": Line("#0072B2", (), PLAIN.name),
        "5 ms fixed": Line("#D55E00", (4, 2), SETTINGS[2].name),
        "slow tokens": Line("#009E73", (), f"{LATE.name} {MODERATE.name}"),
    }
    chosen = {"data sheet": PLAIN, "5 ms fixed": SETTINGS[2], "slow tokens": MODERATE}
    curves = {name: curve(setting, loaded) for name, setting in chosen.items()}
    lines = {name: columns["speedup"] for name, columns in curves.items()}
    lines["dense"] = curves["slow tokens"]["speedup_dense"]
    ratio = dict(zip(BATCH_SIZES, loaded.unique / loaded.unique_single, strict=True))
    points = {
        name: [
            (size, float(y), None, None, {"expert_ratio": float(ratio[size])})
            for size, y in zip(BATCH_SIZES, values, strict=True)
        ]
        for name, values in lines.items()
    }
    data = ladder("", points, lambda _, row: row, styles=styles)
    chart = line_chart(
        data,
        x=("Batch size B (requests verified together)", "log"),
        y=("Speedup of speculative decoding, 3 drafts", ".2f"),
        title=(
            "Where the speedup peaks hinges on what a token costs",
            "Cohere's routing, acceptance and draft cost on the shape of Qwen3-30B-A3B, one H100",
            "5 ms fixed: per step · slow tokens: 0.1 ms per row of logits, 8-bit weights, half of peak FLOPs",
        ),
        more=(("expert_ratio", "experts loaded, times", ".2f"),),
        styles=styles,
        level=0.75,
    )
    render(chart, path, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    loaded = unions()
    if given.search:
        for what, count in search(loaded).items():
            print(f"{count:6,}  {what}")
        return
    if given.chart is not None:
        draw(loaded, given.chart)
        return

    def line(name: str, values: Any) -> None:
        print(f"{name:42}" + "".join(f"{value:7.2f}" for value in values))

    print(f"{'B':42}" + "".join(f"{size:7}" for size in BATCH_SIZES))
    line("U(4, B)", loaded.unique)
    line("U(1, B)", loaded.unique_single)
    line("U(4, B) / U(1, B)", loaded.unique / loaded.unique_single)
    print("\nspeedup")
    for setting in SETTINGS:
        columns = curve(setting, loaded)
        line(setting.name, columns["speedup"])
    line(f"dense model, {PLAIN.name.partition(':')[0]}", curve(PLAIN, loaded)["speedup_dense"])
    line(f"dense model, {MODERATE.name[4:]}", curve(MODERATE, loaded)["speedup_dense"])
    model = load_model("Qwen3-30B-A3B")
    found = amdahl.decompose(CostModel(model, hardware("h100")), WINDOW, UNION, VERIFICATION_RATIO)
    print(
        f"\nB = 1: f by bytes {found.routed_share:.3f}, V {found.verification_ratio:.3f}; measured {VERIFICATION_RATIO}"
    )
    print(f"implies f {found.implied_share:.3f}: {1e3 * found.implied_overhead:.2f} ms of fixed cost")
    share = float(amdahl.share_at(found.implied_share, loaded.unique_single[2] / K))
    ratio = float(amdahl.verification_ratio(share, (loaded.unique / loaded.unique_single)[2]))
    print(f"the same f at B = 4: {share:.3f}, V {ratio:.2f}, S {ACCEPTANCE_LENGTH / (ratio + DRAFT_COST):.2f}")
    print("\nmlx-lm 1485: V measured 1.59, S 1.11 with AL 1.77")
    for bits in (16, 8, 4.5):
        case = mlx(bits)
        print(
            f"{bits:4} bits: f {case.routed_share:.3f} by bytes, V {case.verification_ratio:.3f}, "
            f"S {1.77 / case.verification_ratio:.2f}; f {case.implied_share:.3f} as measured"
        )


if __name__ == "__main__":
    main()
