"""A model of time held against measurements: what was put in comes back, and what the data do not tell is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.economics import amdahl
from tracekit.economics.acceptance import acceptance_length, acceptance_rate
from tracekit.economics.calibration.benchmarks import Cell
from tracekit.economics.calibration.fits import Points, resolved
from tracekit.economics.calibration.least_squares import fit, trend
from tracekit.economics.calibration.result import calibrated
from tracekit.economics.cost import CostModel, uniform_unique
from tracekit.economics.hardware import BANDWIDTH, FLOPS, hardware
from tracekit.errors import SourceError, StoreError, UnsupportedError, UsageError
from tracekit.reports.text import display_width

NOMINAL = hardware("h100")
TRUE = replace(NOMINAL, bandwidth=2.4e12, overhead=1.5e-3, flops=NOMINAL.flops / 2)
DRAFT = 0.05
MODEL = tk.model("Qwen3-30B-A3B")
N, K = 128, 8
SMALL, LARGE = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64, 128, 256, 512)


def loaded(tokens):
    """Experts of so many tokens, some fewer than independent ones load."""
    return K if tokens == 1 else 0.85 * float(uniform_unique(N, K, tokens))


def points(value, batch_sizes=SMALL, drafts=(0, 1, 3, 5), noise=0.02, seed=0, quantity="step"):
    """Points whose values are ``value(B, K, U, U1)``, with relative noise."""
    rng = np.random.default_rng(seed)
    cells, unique, single = [], [], []
    for B in batch_sizes:
        for k in drafts:
            U, one = loaded(B * (k + 1)), loaded(B)
            cells.append(Cell(B, k, quantity, float(value(B, k, U, one) * np.exp(noise * rng.normal())), "here"))
            unique.append(U)
            single.append(one)
    return Points(tuple(cells), np.array(unique), np.array(single), K)


def by_roofline(cost):
    return lambda B, k, U, one: cost.seconds(B, k + 1, U) + DRAFT * k * cost.seconds(B, 1, one)


def by_amdahl(f, level=5e-3, d=DRAFT):
    def step(B, k, U, one):
        V = amdahl.verification_ratio(amdahl.share_at(f, one / K), U / one)
        return level * (1 + B / 10) * (V + d * k)

    return step


def of_roofline(**options):
    found = points(by_roofline(CostModel(MODEL, TRUE)), **options)
    return found, [CostModel(MODEL, NOMINAL)] * len(found.cells)


def within(found, name, true):
    [parameter] = [p for p in found.fitted if p.name == name]
    return (parameter.lo or 0.0) <= true <= (parameter.hi if parameter.hi is not None else np.inf)


def said(found, text):
    return [note for note in found.notes if text in note]


# What was put in comes back


def test_without_noise_the_machine_is_found_exactly():
    found = calibrated(*of_roofline(batch_sizes=LARGE, noise=0.0))
    assert found.value("bandwidth") == pytest.approx(TRUE.bandwidth, rel=1e-5)
    assert found.value("overhead") == pytest.approx(TRUE.overhead, rel=1e-5)
    assert found.value("flops") == pytest.approx(TRUE.flops, rel=1e-5)
    assert found.draft_cost == pytest.approx(DRAFT, rel=1e-5)
    parts = CostModel(MODEL, TRUE).parts(1, 1, K)
    routed = next(part for part in parts if part.name == "experts").seconds / sum(part.seconds for part in parts)
    assert found.routed_share == pytest.approx(float(routed), rel=1e-5)
    assert found.r_squared == pytest.approx(1)
    assert found.hardware is not None
    assert found.hardware.bandwidth == found.value("bandwidth")
    assert not found.flagged.any()
    assert not said(found, "does not hold")


def test_intervals_of_the_machine_hold_the_truth():
    names = {"bandwidth": TRUE.bandwidth, "overhead": TRUE.overhead, "flops": TRUE.flops, "draft_cost": DRAFT}
    hits = dict.fromkeys(names, 0)
    for seed in range(10):
        found = calibrated(*of_roofline(batch_sizes=LARGE, seed=seed))
        for name, true in names.items():
            hits[name] += within(found, name, true)
    assert all(hit >= 8 for hit in hits.values()), hits


@pytest.mark.parametrize(("bandwidth", "flops"), [(BANDWIDTH[0], FLOPS[0]), (BANDWIDTH[1], FLOPS[1])])
def test_no_machine_comes_out_that_cannot_be(bandwidth, flops):
    """The search stays within what `Hardware` takes, from a machine at its limits on and with points far from it."""
    found, _ = of_roofline(batch_sizes=(1, 4, 16, 64))
    costs = [CostModel(MODEL, replace(NOMINAL, bandwidth=bandwidth, flops=flops))] * len(found.cells)
    result = calibrated(found, costs)
    assert result.hardware is not None
    if result.value("bandwidth") is not None:
        assert BANDWIDTH[0] <= result.hardware.bandwidth <= BANDWIDTH[1]
    slow = replace(found, cells=tuple(replace(cell, value=100 * cell.value) for cell in found.cells))
    assert calibrated(slow, costs).hardware is not None


def test_where_no_point_is_bound_by_compute_the_flops_are_held():
    found = calibrated(*of_roofline(batch_sizes=(1, 2, 4, 8), seed=1))
    assert found.value("flops") is None
    assert said(found, "FLOP per second are held")
    assert found.hardware is not None
    assert found.hardware.flops == NOMINAL.flops
    assert within(found, "bandwidth", TRUE.bandwidth)


def test_intervals_of_amdahl_hold_the_truth():
    hits = {"routed_share": 0, "draft_cost": 0}
    for seed in range(40):
        found = calibrated(points(by_amdahl(0.35), seed=seed))
        hits["routed_share"] += within(found, "routed_share", 0.35)
        hits["draft_cost"] += within(found, "draft_cost", DRAFT)
    assert all(34 <= hit <= 40 for hit in hits.values()), hits
    assert found.hardware is None


@pytest.mark.parametrize("f", [0.0, 0.35, 1.0])
def test_without_noise_amdahl_is_found_exactly(f):
    found = calibrated(points(by_amdahl(f), noise=0.0))
    assert found.routed_share == pytest.approx(f, abs=1e-6)
    assert found.draft_cost == pytest.approx(DRAFT, abs=1e-6)


def test_verifications_alone_tell_f_whatever_drafts_cost():
    found = calibrated(points(by_amdahl(0.35, d=0.0), noise=0.0, quantity="verification"))
    assert found.routed_share == pytest.approx(0.35, abs=1e-6)
    assert found.draft_cost is None
    assert "draft_cost" not in found.parameters["parameter"]


def test_what_a_draft_costs_can_be_known():
    found = calibrated(points(by_amdahl(0.35), noise=0.0), draft_cost=DRAFT)
    assert found.routed_share == pytest.approx(0.35, abs=1e-6)
    assert found.parameters.height == 1


def test_a_measured_ratio_implies_f():
    """Of the definitions: U/k = 2.545 and V = 1.25 imply f = .162."""
    cell = Cell(1, 3, "verification ratio", 1.25, "here")
    found = calibrated(Points((cell,), np.array([2.545 * K]), np.array([8.0]), K))
    assert found.routed_share == pytest.approx(0.162, abs=5e-4)
    assert found.fitted[0].lo is None
    assert said(found, "there are no intervals")


def test_a_speedup_is_a_relative_step():
    """S = AL / (V + D) with AL = 2.73, V = 1.25 and D = .143 is 1.960."""
    cell = Cell(1, 3, "speedup", 1.960, "here", acceptance_length=2.73)
    [step] = resolved([cell], None)
    assert (step.quantity, round(step.value, 3)) == ("relative step", 1.393)
    found = calibrated(Points((step,), np.array([2.545 * K]), np.array([8.0]), K), draft_cost=0.143 / 3)
    assert found.routed_share == pytest.approx(0.162, abs=1e-3)


def test_ratios_tell_the_roofline_no_level():
    cost = CostModel(MODEL, replace(TRUE, flops=NOMINAL.flops))
    found = points(
        lambda B, k, U, one: cost.seconds(B, k + 1, U) / cost.seconds(B, 1, one),
        drafts=(1, 3),
        noise=0.0,
        quantity="verification ratio",
    )
    fitted = calibrated(found, [CostModel(MODEL, NOMINAL)] * len(found.cells), hold=["flops", "bandwidth"])
    # With the bandwidth taken for the nominal one, the overhead is as large beside it as the true one was.
    assert fitted.value("overhead") == pytest.approx(TRUE.overhead * TRUE.bandwidth / NOMINAL.bandwidth, rel=0.02)
    free = calibrated(found, [CostModel(MODEL, NOMINAL)] * len(found.cells), hold=["flops"])
    assert said(free, "bandwidth and the overhead are not identified") or said(free, "the bandwidth is not identified")


# What the data do not tell


def test_one_point_tells_nothing():
    found = calibrated(*of_roofline(batch_sizes=(4,), drafts=(0,)))
    assert found.value("bandwidth") is found.value("overhead") is None
    assert found.parameters["estimate"].null_count() == found.parameters.height
    assert said(found, "the bandwidth and the overhead are not identified")
    assert found.hardware == replace(NOMINAL)


def test_one_point_tells_the_bandwidth_where_the_overhead_is_known():
    found, _ = of_roofline(batch_sizes=(4,), drafts=(0,), noise=0.0)
    known = CostModel(MODEL, replace(NOMINAL, overhead=TRUE.overhead))
    fitted = calibrated(found, [known], hold=["overhead", "flops"])
    assert fitted.value("bandwidth") == pytest.approx(TRUE.bandwidth, rel=1e-6)
    assert said(fitted, "there are no intervals")


def test_one_batch_size_and_draft_length_cannot_tell_f_from_the_drafts():
    found = calibrated(points(by_amdahl(0.35), batch_sizes=(1,), drafts=(0, 3)))
    assert found.routed_share is found.draft_cost is None
    assert said(found, "the routed share and the cost of a draft are not identified")


def test_steps_without_speculation_tell_amdahl_nothing():
    found = calibrated(points(by_amdahl(0.35), drafts=(0,)))
    assert found.routed_share is None
    assert said(found, "the routed share is not identified: no point depends on it")
    assert said(found, "have no other of their batch size")


def test_an_interval_over_every_share_is_none():
    found = calibrated(points(by_amdahl(0.4), batch_sizes=(1, 2), drafts=(0, 1), noise=0.5, seed=3), draft_cost=0.0)
    assert found.routed_share is None
    assert said(found, "its interval holds every value")


# Where the model does not hold


def test_a_point_that_is_off_is_named():
    found, costs = of_roofline(batch_sizes=LARGE)
    cells = list(found.cells)
    cells[9] = replace(cells[9], value=cells[9].value * 1.3)
    fitted = calibrated(replace(found, cells=tuple(cells)), costs)
    assert fitted.flagged[9]
    assert said(fitted, f"batch size {cells[9].batch_size}, {cells[9].drafts} drafts: +")


def test_trends_are_named():
    cost, law = CostModel(MODEL, NOMINAL), by_amdahl(0.35)
    growing = points(lambda B, k, U, one: cost.seconds(B, k + 1, U) * B**0.2)
    [note] = said(calibrated(growing, [cost] * len(growing.cells)), "does not hold along the batch size:")
    assert "rises against it" in note
    deeper = points(lambda B, k, U, one: cost.seconds(B, k + 1, U) * (1 + 0.1 * k**2))
    assert said(calibrated(deeper, [cost] * len(deeper.cells)), "does not hold along the draft length:")
    both = points(lambda B, k, U, one: law(B, k, U, one) * (B**0.1 if k else 1.0))
    assert said(calibrated(both), "does not hold along the batch size of steps with drafts:")


def test_trends_are_rarely_found_where_there_are_none():
    found = sum(bool(said(calibrated(points(by_amdahl(0.35), seed=seed)), "does not hold")) for seed in range(40))
    assert found <= 4


def test_a_bandwidth_beyond_the_machine_is_named():
    fast = CostModel(MODEL, replace(NOMINAL, bandwidth=2 * NOMINAL.bandwidth))
    found = points(by_roofline(fast))
    assert said(calibrated(found, [CostModel(MODEL, NOMINAL)] * len(found.cells)), "2.0")


def test_a_model_worse_than_the_noise_of_repetitions_is_named():
    found, costs = of_roofline()
    noisy = [replace(cell, repeats=5, spread=0.02 * 5**0.5) for cell in found.cells]
    assert not said(calibrated(replace(found, cells=tuple(noisy)), costs), "by their repetitions")
    exact = [replace(cell, repeats=5, spread=0.001) for cell in found.cells]
    assert said(calibrated(replace(found, cells=tuple(exact)), costs), "by their repetitions")


# Least squares


def test_a_line_is_fitted_as_in_the_textbook():
    rng = np.random.default_rng(0)
    x, y = np.arange(12.0), 3 + 0.5 * np.arange(12.0) + rng.normal(size=12)
    found = fit(lambda v: y - v[0] - v[1] * x, [[1, 1]], [(0, 100), (0, 100)])
    design = np.column_stack([np.ones(12), x])
    exact, [squares], *_ = np.linalg.lstsq(design, y)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * squares / 10)
    assert found.values == pytest.approx(exact, rel=1e-6)
    assert found.dof == 10
    assert found.hi - found.values == pytest.approx(2.228139 * errors, rel=1e-5)
    hat = np.diag(design @ np.linalg.inv(design.T @ design) @ design.T)
    residuals = y - design @ exact
    assert found.standardised == pytest.approx(residuals / np.sqrt(squares / 10 * (1 - hat)), rel=1e-4)


def test_the_trend_is_that_of_the_larger_model():
    rng = np.random.default_rng(1)
    x = np.arange(12.0)
    y = 3 + 0.5 * x + 0.1 * x**2 + 0.1 * rng.normal(size=12)
    found = fit(lambda v: y - v[0] - v[1] * x, [[1, 1]], [(-100, 100), (-100, 100)])
    exact = np.linalg.lstsq(np.column_stack([np.ones(12), x, x**2]), y)[0]
    slope, chance = trend(found, x**2)
    assert slope == pytest.approx(exact[2], rel=1e-5)
    assert chance < 1e-6
    assert trend(found, x) is None  # the model has that one


def test_what_moves_alike_is_told_from_what_does_not():
    x = np.arange(6.0)
    found = fit(lambda v: 7 + 2 * x - (v[0] + v[1]) - v[2] * x - 0 * v[3], [[1, 1, 1, 1]], [(0, 50)] * 4)
    assert sorted(found.alike) == [(0, 1), (3,)]
    assert list(found.identified) == [False, False, True, False]
    assert found.values[2] == pytest.approx(2)


# With a store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """40 requests of a sticky trace, k = 8 of 64 experts."""
    folder = tmp_path_factory.mktemp("calibrate")
    tk.synth("sticky", layers=16, num_experts=64, top_k=8, requests=40, tokens=60, seed=1).save(folder / "t.npz")
    tk.ingest(folder / "t.npz", folder / "store", name="t", requests=folder / "t.requests.json")
    return folder / "store"


@pytest.fixture(scope="module")
def measured(store):
    """Rows of a benchmark on a machine that reads at 1.2 TB/s, with 2 ms of overhead and 2 % noise."""
    ratios = tk.expert_ratio(store, max_window=6, batch_size=(1, 2, 4, 8, 16, 32), intervals=False)
    cost = CostModel(tk.model("OLMoE-1B-7B"), replace(hardware("a100"), bandwidth=1.2e12, overhead=2e-3))
    rng = np.random.default_rng(4)
    rows = []
    for row in ratios.filter(pl.col("window").is_in([1, 2, 4, 6])).iter_rows(named=True):
        B, k = row["batch_size"], row["window"] - 1
        step = cost.seconds(B, k + 1, row["unique"]) + DRAFT * k * cost.seconds(B, 1, row["unique_single"])
        length = 1 + 0.4 * k
        tpot = float(step) / length * np.exp(0.02 * rng.normal())
        rows.append({"batch_size": B, "drafts": k, "tpot_ms": 1e3 * tpot, "acceptance_length": length})
    return pl.DataFrame(rows)


def test_a_table_against_a_trace(store, measured):
    found = tk.calibrate(store, measured, model="OLMoE-1B-7B", hardware="a100")
    assert within(found, "bandwidth", 1.2e12)
    assert within(found, "overhead", 2e-3)
    assert within(found, "draft_cost", DRAFT)
    frame = found.points
    assert frame.columns[:4] == ["batch_size", "drafts", "context", "quantity"]
    assert frame.height == 24
    steps = measured["tpot_ms"] * measured["acceptance_length"] / 1e3
    assert frame["measured"].to_list() == pytest.approx(steps.to_list())
    assert (frame["measured"] / frame["predicted"] - 1).to_list() == pytest.approx(frame["residual"].to_list())
    # What was found is what speedup takes.
    gained = tk.speedup(
        store,
        model="OLMoE-1B-7B",
        hardware=found.hardware,
        draft_cost=found.draft_cost,
        acceptance_rate=0.7,
        drafts=3,
        batch_size=1,
        intervals=False,
    )
    one = frame.filter(batch_size=1, drafts=0)["predicted"][0]
    assert gained["seconds_single"][0] == pytest.approx(one, rel=1e-9)


def test_without_a_machine_it_is_amdahl(store, measured):
    found = tk.calibrate(store, measured)
    assert found.parameters["parameter"].to_list() == ["draft_cost", "routed_share"]
    assert found.hardware is None
    assert said(found, "rejected drafts load more")


def test_the_acceptance_length_may_be_given(store, measured):
    bare = measured.drop("acceptance_length").filter(pl.col("drafts").is_in([0, 3]))
    with pytest.raises(SourceError, match=r"batch size 1, 3 drafts.*without the acceptance length"):
        tk.calibrate(store, bare)
    given = tk.calibrate(store, bare, acceptance_length=2.2)
    whole = tk.calibrate(store, measured.filter(pl.col("drafts").is_in([0, 3])))
    assert given.routed_share == pytest.approx(whole.routed_share)
    with pytest.raises(UsageError, match="an acceptance length for several"):
        tk.calibrate(store, measured.drop("acceptance_length"), acceptance_length=2.2)
    with pytest.raises(UsageError, match="acceptance length of 5 with 3 drafts"):
        tk.calibrate(store, bare, acceptance_length=5)


def test_the_context_is_the_file_s_own(store, measured):
    near, far = ({"model": "OLMoE-1B-7B", "hardware": "a100"} | more for more in ({}, {"context": 100_000}))
    lengths = measured.with_columns(input_len=pl.lit(99_000), output_len=pl.lit(2_000))
    own = tk.calibrate(store, lengths, **near)
    assert own.value("bandwidth") == pytest.approx(tk.calibrate(store, measured, **far).value("bandwidth"))
    assert own.value("bandwidth") != pytest.approx(tk.calibrate(store, measured, **near).value("bandwidth"), rel=0.05)


def test_points_beyond_the_trace_are_left_out(store, measured):
    more = pl.concat([measured, measured.tail(4).with_columns(batch_size=pl.lit(64, pl.Int64))])
    found = tk.calibrate(store, more)
    assert len(found.cells) == 24
    assert said(found, "4 of 28 points are at batch sizes beyond the trace's requests and are left out")
    with pytest.raises(UnsupportedError, match="beyond the trace's requests; expected at most 40 requests"):
        tk.calibrate(store, more.tail(4))
    with pytest.raises(UnsupportedError, match="101 consecutive"):
        tk.calibrate(store, measured.with_columns(drafts=pl.lit(100), acceptance_length=pl.lit(2.0)).head(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "OLMoE-1B-7B"}, "a model without a machine"),
        ({"hold": "overhead"}, "'overhead' is held"),
        ({"hold": "colour", "hardware": "a100"}, "'colour' is held"),
        ({"draft_cost": -1}, "a draft cost of -1"),
        ({"hardware": "a100"}, "does not name its model"),
        ({"hardware": "a100", "model": "Qwen3-30B-A3B"}, "8 of 128 experts, the trace to 8 of 64"),
        ({"hardware": "a1000", "model": "OLMoE-1B-7B"}, "no machine 'a1000'"),
        ({"hardware": "a100", "model": "OLMoE-1B-7B", "bandwidth": -1}, "bandwidth of -1"),
        ({"acceptance_rate": 0.5, "acceptance_length": 2}, "rate and an acceptance length"),
    ],
)
def test_contradictions(store, measured, options, said):
    with pytest.raises(UsageError, match=said):
        tk.calibrate(store, measured, **options)


def test_an_unknown_trace(store, measured):
    with pytest.raises(StoreError, match="other"):
        tk.calibrate(store, measured, trace="other")


def test_the_command(store, measured, tmp_path, capsys):
    measured.write_csv(tmp_path / "b.csv")
    base = ["calibrate", str(store), "--measured", str(tmp_path / "b.csv")]
    assert main([*base, "--model", "OLMoE-1B-7B", "--hardware", "a100"]) == 0
    shown = capsys.readouterr()
    assert "bandwidth" in shown.out
    assert "GB/s" in shown.out
    assert "standard deviation" in shown.err
    assert main([*base, "--points", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["batch", "drafts", "quantity", "AL", "measured", "predicted", "residual,", "%"]
    assert all(display_width(line) <= 80 for line in lines)
    assert main([*base, "-q", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["parameter"] for row in rows] == ["draft_cost", "routed_share"]
    assert main([*base, "--measured", str(tmp_path / "none.csv")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(base[:2]) == 2


def test_speedups_take_the_acceptance_that_was_measured(store, measured, tmp_path, capsys):
    lengths = measured.filter(pl.col("drafts") > 0).select("acceptance_length", "drafts").rows()
    rate = tk.calibrate(store, measured).acceptance_rate
    assert rate == pytest.approx(np.mean([acceptance_rate(*pair) for pair in lengths]))
    steps = pl.DataFrame({"batch_size": [1, 1], "drafts": [0, 3], "step_ms": [5, 7]})
    assert tk.calibrate(store, steps).acceptance_rate is None
    measured.write_csv(tmp_path / "b.csv")
    asked = ["--model", "OLMoE-1B-7B", "--hardware", "a100", "--drafts", "3", "--batch-size", "1", "--format", "json"]
    base = ["speedup", str(store), "--measured", str(tmp_path / "b.csv"), *asked]
    assert main(base) == 0
    shown = capsys.readouterr()
    assert f"measured acceptance lengths, {rate:.3f}" in shown.err
    assert json.loads(shown.out)[0]["acceptance_length"] == pytest.approx(float(acceptance_length(rate, 3)))
    assert main([*base, "--acceptance-rate", ".5", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["acceptance_length"] == pytest.approx(1.875)


def test_an_unknown_parameter_is_shown_as_such(store, capsys, tmp_path):
    (tmp_path / "b.csv").write_text("batch_size,step_ms\n1,5\n")
    assert main(["calibrate", str(store), "--measured", str(tmp_path / "b.csv")]) == 0
    shown = capsys.readouterr()
    assert "–" in shown.out
    assert "(–: the points do not tell)" in shown.out
    assert "no point depends on it" in shown.err


@pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")
def test_a_trace_with_steps_knows_its_acceptance_and_its_rejected_drafts(shared, tmp_path):
    folder = shared / "moe"
    source = folder / "traces" / "olmoe" / "verify_steps.parquet"
    if not source.is_file():
        pytest.skip(f"no {source}")
    config = folder / "models" / "olmoe" / "config.json"
    tk.ingest(source, tmp_path / "store", name="olmoe", config=config)
    rows = [{"batch_size": 1, "drafts": 0, "tpot_ms": 5.0}, {"batch_size": 1, "drafts": 3, "tpot_ms": 4.0}]
    found = tk.calibrate(tmp_path / "store", rows, draft_cost=0.0)
    steps = tk.steps(tmp_path / "store", intervals=False).filter(window=4)
    ratio = steps["unique"][0] / 4
    length = steps["acceptance_length"][0]
    assert found.cells[1].acceptance_length == pytest.approx(length, rel=0.02)
    V = 4.0 * found.cells[1].acceptance_length / 5.0
    assert found.routed_share == pytest.approx((V - 1) / (ratio - 1), rel=1e-6)
    assert not said(found, "rejected drafts load more")
