"""What a trace gains from speculation: the functions that ask a store, the verb, the query and the charts."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.economics import amdahl
from tracekit.economics.acceptance import acceptance_length
from tracekit.economics.cost import CostModel, uniform_unique
from tracekit.economics.hardware import hardware
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.metrics.intervals import jackknife
from tracekit.reports import charts, queries
from tracekit.reports.charts import KINDS
from tracekit.sources.sizes import describe

TINY = {
    "model_type": "olmoe",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
MACHINE: dict[str, Any] = {"bandwidth": 1e8, "flops": 1e11}


def ids(rows: int, seed: int) -> np.ndarray:
    """Routing in which neighbours are alike and experts unequal."""
    order = np.random.default_rng(seed).random((rows, 2, 8)) + 0.3 * np.sin(np.arange(8))
    order[1:] += order[:-1]
    return np.argsort(-order, axis=2)[:, :, :2].astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of nine requests, seven of which have 12 tokens; one with verification steps; and the model's config."""
    folder = tmp_path_factory.mktemp("gains")
    (folder / "config.json").write_text(json.dumps(TINY))
    lengths = [12] * 7 + [5, 3]
    np.savez(folder / "a.npz", expert_ids=ids(sum(lengths), 0), request_lens=np.array(lengths, np.int32))
    tk.ingest(folder / "a.npz", folder / "S", name="plain", num_experts=8, phase="decode")
    return folder


@pytest.fixture(scope="module")
def stepped(folder: Path) -> tk.Store:
    """Six requests of ten steps that verify four rows each, of which 0 .. 3 drafts are accepted in turn."""
    rows = []
    for r in range(6):
        start = 0
        for step in range(10):
            accepted = (step + r) % 4
            experts = ids(4, 100 + 17 * r + step)
            rows.append((f"r{r}", start, 3, accepted, experts.tobytes()))
            start += accepted + 1
    schema = {"request_id": pl.String, "start_pos": pl.Int64, "n_drafted": pl.Int64, "n_accepted": pl.Int64}
    pl.DataFrame(rows, schema | {"experts": pl.Binary}, orient="row").write_parquet(folder / "steps.parquet")
    tk.ingest(folder / "steps.parquet", folder / "T", name="steps", num_experts=8, top_k=2, phase="decode")
    return tk.open(folder / "T")


@pytest.fixture
def store(folder: Path) -> tk.Store:
    return tk.open(folder / "S")


def ask(store: tk.Store, folder: Path, **arguments: Any) -> pl.DataFrame:
    given = {"model": folder, "batch_size": [1, 4], "drafts": [1, 3], "draft_cost": 0.1, **MACHINE} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        return tk.speedup(store, **given)


def test_a_speedup_is_the_cost_model_over_the_traces_unions(store: tk.Store, folder: Path):
    found = ask(store, folder, acceptance_rate=0.6, overhead=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        ratios = tk.expert_ratio(store, max_window=4, batch_size=[1, 4])
    cost = CostModel(describe(TINY), hardware(overhead=1e-4, **MACHINE))
    assert found.select("batch_size", "drafts").rows() == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for row in found.iter_rows(named=True):
        B, K = row["batch_size"], row["drafts"]
        [measured] = ratios.filter(batch_size=B, window=K + 1).rows(named=True)
        assert (row["unique"], row["expert_ratio"]) == pytest.approx((measured["unique"], measured["ratio"]))
        before = float(cost.seconds(B, 1, measured["unique_single"]))
        V = float(cost.seconds(B, K + 1, measured["unique"])) / before
        assert row["verification_ratio"] == pytest.approx(V)
        low = float(cost.seconds(B, K + 1, measured["unique_single"] * measured["ratio_lo"])) / before
        assert row["verification_ratio_lo"] == pytest.approx(low)
        S = float(acceptance_length(0.6, K)) / (V + 0.1 * K)
        assert row["speedup"] == pytest.approx(S)
        uniform = cost.seconds(B, K + 1, uniform_unique(8, 2, B * (K + 1))) / cost.seconds(
            B, 1, uniform_unique(8, 2, B)
        )
        assert row["verification_ratio_uniform"] == pytest.approx(float(uniform))
        assert (row["unions"], row["acceptance_source"], row["hardware"]) == ("accepted-only", "given", "custom")
    assert ask(store, folder, intervals=False)["verification_ratio_lo"].null_count() == 4


def test_the_interval_of_the_verification_ratio_is_close_to_its_own_jackknife(shared: Path, tmp_path: Path):
    """V put through every replicate of the unions, against the interval of the expert ratio put through V."""
    from tracekit.metrics.ladder import ladders
    from tracekit.metrics.replicates import Replicates, layer_mean

    gptoss = shared / "traces" / "gptoss20b_subset64"
    tk.ingest(gptoss / "trace.npz", tmp_path / "S", name="gptoss", num_experts=32, phase="decode")
    found = tk.speedup(
        tmp_path / "S",
        model="gpt-oss-20b",
        hardware="h100",
        drafts=3,
        batch_size=[1, 4, 16],
        acceptance_rate=0.7,
        draft_cost=0,
    )
    m = tk.measure(tmp_path / "S", max_window=4, max_lag=0, batches=True)
    r = Replicates(m.meta, m.spec, m.cells, m.state, 0)
    cost = CostModel(tk.model("gpt-oss-20b"), hardware("h100"))
    every = np.arange(len(m.meta.layers))
    for size, rungs in ladders(r, [1, 4, 16], np.full(4, 64)):
        mean = layer_mean(rungs["observed"], every)
        V = cost.seconds(size, 4, mean[:, 3]) / cost.seconds(size, 1, mean[:, 0])
        own = jackknife(V[:, None])
        [row] = found.filter(batch_size=size).rows(named=True)
        width = float(own.hi[0] - own.lo[0])
        assert row["verification_ratio"] == pytest.approx(float(V[0]))
        for end, name in ((own.lo, "lo"), (own.hi, "hi")):
            assert row[f"verification_ratio_{name}"] == pytest.approx(float(end[0]), abs=0.15 * width)


def test_gptoss_on_an_h100(shared: Path, tmp_path: Path):
    gptoss = shared / "traces" / "gptoss20b_subset64"
    tk.ingest(gptoss / "trace.npz", tmp_path / "S", name="gptoss", num_experts=32, phase="decode")
    store = tk.open(tmp_path / "S")
    found = tk.speedup(store, model="gpt-oss-20b", hardware="h100", acceptance_rate=0.7, draft_cost=0.05)
    assert found.height == 7 * 6
    best = {row["batch_size"]: row for row in found.filter("best").iter_rows(named=True)}
    # Without the trace two drafts would be chosen at B = 1, where four are best; at B = 16 the formula is right.
    uniform = {row["batch_size"]: row["drafts"] for row in found.filter("best_uniform").iter_rows(named=True)}
    assert (best[1]["drafts"], uniform[1]) == (4, 2)
    assert best[1]["regret"] == pytest.approx(0.0416, abs=1e-3)
    assert (best[16]["drafts"], uniform[16]) == (5, 5)
    # Skewed experts keep the ratio up in large batches, where the formula says that all are loaded anyway.
    large = found.filter(batch_size=32, drafts=3).row(0, named=True)
    assert large["verification_ratio"] > large["verification_ratio_uniform"] + 0.05
    by_share = queries.query(store, "speculation", routed_share=0.30, max_window=4)
    [four] = by_share.filter(batch_size=4, drafts=3).rows(named=True)
    assert four["verification_ratio"] == pytest.approx(1.394, abs=5e-4)


def test_what_the_trace_cannot_answer_is_refused_with_how_much_there_is(store: tk.Store, folder: Path):
    with pytest.raises(UnsupportedError, match=r"batch size 9 of windows of 4 tokens.*requests, 9; there are \d+ such"):
        ask(store, folder, batch_size=9, drafts=3)
    with pytest.raises(UnsupportedError, match="no request has 21 consecutive decode tokens: the longest run has 12"):
        ask(store, folder, drafts=20)
    # Seven requests have 12 tokens: as many windows of 12, and none of 21.
    with pytest.raises(UnsupportedError, match="the trace has 7 such windows per layer, and 0 of 21"):
        ask(store, folder, drafts=20)
    defaults = ask(store, folder, batch_size=None, drafts=None)
    assert defaults["batch_size"].max() == 8
    assert defaults.filter(batch_size=8)["drafts"].to_list() == [1, 2, 3, 4]


def test_contradictions_and_other_models_are_refused(store: tk.Store, folder: Path):
    other = folder / "other.json"
    other.write_text(json.dumps(TINY | {"num_experts": 16}))
    for wrong, said in (
        ({"model": other}, "routes to 2 of 16 experts, the trace to 2 of 8"),
        ({"model": None}, "'olmoe', is not bundled"),
        ({"acceptance_rate": 0.5, "acceptance_length": 2}, "one of the two"),
        ({"acceptance_length": 2}, "at_drafts"),
        ({"acceptance_rate": 1.5}, "0 to 1"),
        ({"draft_cost": 0.1, "draft_model": folder}, "one of the two"),
        ({"draft_cost": -0.1}, "0 or more"),
        ({"bandwidth": 0}, "bandwidth of 0"),
        ({"flops": None}, "without flops"),
        ({"flops": None, "bandwidth": None}, "Name it with hardware"),
        ({"hardware": hardware("h100")}, "figures beside a Hardware"),
        ({"batch_size": []}, "whole numbers"),
        ({"drafts": [0]}, "whole numbers"),
        ({"context": -1}, "context"),
    ):
        with pytest.raises(UsageError, match=said):
            ask(store, folder, **wrong)
    with pytest.raises(TypeError, match="bandwith"):
        ask(store, folder, bandwith=1e12)


def test_what_is_not_known_is_said(store: tk.Store, folder: Path):
    with pytest.warns(TracekitWarning) as said:
        found = tk.speedup(store, model=folder, drafts=3, batch_size=1, intervals=False, **MACHINE)
    notes = [str(warning.message) for warning in said]
    assert any("no acceptance rate is given" in note for note in notes)
    assert any("taken as free" in note for note in notes)
    assert found["speedup"].to_list() == [None]
    assert found["break_even_length"][0] == found["verification_ratio"][0]


def test_a_trace_with_steps_shows_them_beside_its_accepted_tokens(stepped: tk.Store, folder: Path):
    found = ask(stepped, folder, batch_size=[1, 4])
    assert found["unions"].to_list() == ["accepted-only"] * 4 + ["steps", "extended"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        steps = tk.steps(stepped).filter(window=4).row(0, named=True)
        windows = tk.expert_ratio(stepped, max_window=8, batch_size=[1, 4])
    real = found.filter(unions="steps").row(0, named=True)
    assert real["unique"] == pytest.approx(steps["unique"])
    assert real["expert_ratio"] == pytest.approx(steps["unique"] / 2)
    assert real["verification_ratio_lo"] < real["verification_ratio"] < real["verification_ratio_hi"]
    # At B = 4: as windows of committed tokens so long that they load as much at B = 1.
    alone, four = (windows.filter(batch_size=size).sort("window") for size in (1, 4))
    length = np.interp(steps["unique"], alone["unique"], alone["window"])
    extended = found.filter(unions="extended").row(0, named=True)
    assert extended["unique"] == pytest.approx(np.interp(length, four["window"], four["unique"]))
    assert extended["verification_ratio_lo"] is None
    assert ask(stepped, folder, batch_size=4)["unions"].to_list() == ["accepted-only"] * 2 + ["extended"]
    # Of 60 steps 15 accept each of 0 .. 3 drafts, so that the first is accepted by 3/4, the second then by 2/3.
    lengths = dict(found.filter(unions="accepted-only", batch_size=1).select("drafts", "acceptance_length").rows())
    assert lengths == pytest.approx({1: 1.75, 3: 2.5}, abs=0.05)
    assert set(found["acceptance_source"]) == {"measured"}
    assert set(ask(stepped, folder, drafts=5)["acceptance_source"]) == {"extrapolated"}
    assert set(ask(stepped, folder, acceptance_rate=0.5)["acceptance_source"]) == {"given"}


def test_real_steps_with_rejected_drafts_beside_accepted_tokens_alone(shared: Path, tmp_path: Path):
    """The trained OLMoE of 9,215 steps: 11.38 experts a step of four rows, 11.32 a window of four accepted tokens."""
    moe = shared / "moe"
    config = moe / "models" / "olmoe" / "config.json"
    tk.ingest(moe / "traces" / "olmoe" / "verify_steps.parquet", tmp_path / "S", name="olmoe", config=config)
    found = tk.speedup(tmp_path / "S", model=config, hardware="h100", batch_size=1, drafts=3, draft_cost=0.05)
    unique = dict(found.select("unions", "unique").rows())
    assert unique["steps"] == pytest.approx(11.38, abs=0.01)
    assert unique["accepted-only"] == pytest.approx(11.32, abs=0.01)
    assert found["acceptance_length"].to_list() == pytest.approx([2.047, 2.047], abs=1e-3)


def test_the_parts_of_a_step_add_up(store: tk.Store, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        parts = tk.step_time(store, model=folder, batch_size=[1, 4], drafts=3, **MACHINE)
    whole = ask(store, folder)
    for size in (1, 4):
        single, verify = (parts.filter(batch_size=size, tokens=n) for n in (1, 4))
        row = whole.filter(batch_size=size, drafts=3).row(0, named=True)
        assert single["seconds"].sum() == pytest.approx(row["seconds_single"])
        assert verify["seconds"].sum() == pytest.approx(row["seconds_verify"])
        assert single["share"].sum() == pytest.approx(1)
        assert single.filter(part="experts")["share"][0] == pytest.approx(row["routed_share"])
    assert set(parts["bound"]) <= {"bandwidth", "compute", "overhead"}


def test_amdahl_of_a_trace(store: tk.Store, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = tk.amdahl(store, model=folder, measured_ratio=1.2, overhead=1e-5, **MACHINE).row(0, named=True)
        with pytest.raises(UsageError, match="the one that it belongs to"):
            tk.amdahl(store, model=folder, measured_ratio=1.2, drafts=[1, 3], **MACHINE)
        assert tk.amdahl(store, model=folder, drafts=[1, 2], **MACHINE)["implied_share"].to_list() == [None, None]
    assert found["drafts"] == 3
    assert found["implied_share"] == pytest.approx(0.2 / (found["expert_ratio"] - 1))
    assert 0 < found["overhead_share"] < 1


def test_measurements_come_before_the_gain(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path):
    """Step times made with twice the bandwidth of the data sheet: the verb gains what that machine does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        parts = tk.step_time(folder / "S", model=folder, batch_size=[1, 2, 4], drafts=[1, 3], bandwidth=2e9, flops=1e11)
    steps = parts.group_by("batch_size", "tokens").agg(pl.col("seconds").sum()).sort("batch_size", "tokens")
    bench = steps.select("batch_size", drafts=pl.col("tokens") - 1, verify_ms=pl.col("seconds") * 1e3)
    bench.write_csv(tmp_path / "bench.csv")
    given = ["--acceptance-rate", ".7", "--draft-cost", ".05", "--drafts", "3", "--batch-size", "1,4"]
    given += ["--bandwidth", "1e9", "--measured", str(tmp_path / "bench.csv"), "--format", "json"]
    code, out, err = run(capsys, folder, *given)
    assert code == 0, err
    fast = ask(tk.open(folder / "S"), folder, drafts=3, acceptance_rate=0.7, draft_cost=0.05, bandwidth=2e9)
    found = {row["batch_size"]: row["seconds_verify"] for row in json.loads(out)}
    assert found == pytest.approx(dict(fast.select("batch_size", "seconds_verify").rows()), rel=1e-3)


# --- the query -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "rate", "cost"), [(0.3, 0.6, 0.05), (1.0, 1.0, 0.0), (0.0, 0.0, 0.1)])
def test_the_query_and_the_functions_agree(store: tk.Store, share: float, rate: float, cost: float):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        params = {"routed_share": share, "acceptance_rate": rate, "draft_cost": cost, "max_window": 4}
        found = queries.query(store, "speculation", **params)
        ratios = tk.expert_ratio(store, max_window=4, batch_size=(1, 2, 4, 8, 16, 32, 64)).drop_nulls("ratio")
    rows = {(row["batch_size"], row["window"]): row for row in ratios.iter_rows(named=True) if row["window"] > 1}
    assert {(row["batch_size"], row["window"]) for row in found.iter_rows(named=True)} >= rows.keys()
    for row in found.filter(pl.col("batch_size").is_in(ratios["batch_size"].implode())).iter_rows(named=True):
        measured = rows[row["batch_size"], row["window"]]
        f = float(amdahl.share_at(share, measured["unique_single"] / 2))
        V = {end: float(amdahl.verification_ratio(f, measured[f"ratio{end}"])) for end in ("", "_lo", "_hi")}
        D, AL = cost * row["drafts"], float(acceptance_length(rate, row["drafts"]))
        assert row["routed_share"] == pytest.approx(f)
        assert [row[f"verification_ratio{end}"] for end in V] == pytest.approx(list(V.values()))
        assert row["acceptance_length"] == pytest.approx(AL)
        assert row["speedup"] == pytest.approx(AL / (V[""] + D))
        assert row["speedup_lo"] == pytest.approx(AL / (V["_hi"] + D))
        assert row["break_even_length"] == pytest.approx(V[""] + D)
        B, T = row["batch_size"], row["window"]
        one, many = (float(uniform_unique(8, 2, tokens)) for tokens in (B, B * T))
        uniform = amdahl.verification_ratio(amdahl.share_at(share, one / 2), many / one)
        assert row["verification_ratio_uniform"] == pytest.approx(float(uniform))


def test_published_figures_through_sql(store: tk.Store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        found = queries.query(store, "speculation", acceptance_length="2.73", draft_cost=0.143 / 3, max_window=4)
    row = found.filter(batch_size=1, drafts=3).row(0, named=True)
    assert row["acceptance_length"] == 2.73
    assert row["speedup"] == pytest.approx(2.73 / (row["expert_ratio"] + 0.143))


def test_numbers_with_a_fraction_are_parameters():
    q = queries.find("speculation")
    assert q.bind({"routed_share": "0.3", "draft_cost": 2, "acceptance_length": 1.5}) == {
        "routed_share": 0.3,
        "draft_cost": 2.0,
        "acceptance_length": 1.5,
    }
    for wrong in ({"routed_share": 1.1}, {"routed_share": -0.1}, {"acceptance_rate": "x"}, {"draft_cost": "nan"}):
        with pytest.raises(UsageError, match="a number from 0"):
            q.bind(wrong)
    for wrong in ({"draft_cost": True}, {"draft_cost": float("inf")}, {"draft_cost": [1]}):
        with pytest.raises(UsageError, match="a number from 0 on"):
            q.bind(wrong)


# --- the verb ------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, store: str = "S") -> tuple[int, str, str]:
    machine = ["--model", str(folder / "config.json"), "--bandwidth", "1e8", "--flops", "1e11"]
    code = main(["speedup", str(folder / store), *machine, *options])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "options",
    [
        ("--acceptance-rate", ".7", "--draft-cost", ".05"),
        ("--draft-cost", ".05", "--drafts", "3", "--no-intervals"),
        ("--parts", "--drafts", "1,3", "--batch-size", "1,4"),
        ("--parts",),
        ("--amdahl", "--measured-ratio", "1.2", "--overhead", "1e-5"),
        ("--amdahl", "--measured-ratio", ".9"),
    ],
)
def test_the_verb_prints_tables_that_fit_a_terminal(
    capsys: pytest.CaptureFixture[str], folder: Path, stepped: tk.Store, options: tuple[str, ...]
):
    for store in ("S", "T"):
        code, out, _ = run(capsys, folder, *options, store=store)
        assert code == 0
        assert max(len(line) for line in out.splitlines()) <= 80
        assert "config.json" in out or "gains" in out


def test_the_verb_exports_every_column_and_draws(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path):
    chart = tmp_path / "map.json"
    given = ["--acceptance-rate", ".7", "--draft-cost", ".05", "--drafts", "1,3", "--batch-size", "1,4"]
    code, out, err = run(
        capsys, folder, *given, "--format", "json", "--chart", str(chart), "--chart-kind", "speedup-map"
    )
    rows = json.loads(out)
    assert code == 0
    assert f"wrote {chart}" in " ".join(err.split())
    assert len(rows) == 4
    assert {"regret", "arithmetic_intensity", "speedup_lo", "acceptance_source"} <= rows[0].keys()
    assert json.loads(chart.read_text())["title"]["text"] == "Speedup by batch size and draft length"
    code, _, err = run(capsys, folder, *given, "--chart", str(chart))
    assert (code, "will not overwrite" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--parts", "--amdahl"), 2, "give one of them"),
        (("--measured-ratio", "1.2"), 2, "--measured-ratio is for --amdahl"),
        (("--parts", "--acceptance-rate", ".5"), 2, "--acceptance-rate says nothing to --parts"),
        (("--amdahl", "--batch-size", "4"), 2, "--batch-size says nothing to --amdahl"),
        (("--acceptance-rate", "1.5"), 2, "expected 0 to 1"),
        (("--acceptance-rate", ".5", "--acceptance-length", "2"), 2, "expected one of the two"),
        (("--hardware", "h10"), 2, "Did you mean 'h100'?"),
        (("--overhead", "-1"), 2, "overhead of -1 seconds"),
        (("--batch-size", "64"), 1, "fewer than 64 requests have one"),
        (("--drafts", "50"), 1, "the longest run has 12"),
    ],
)
def test_the_verb_refuses(
    capsys: pytest.CaptureFixture[str], folder: Path, options: tuple[str, ...], code: int, said: str
):
    found, _, err = run(capsys, folder, *options)
    assert found == code
    assert said in " ".join(err.split())


# --- charts --------------------------------------------------------------------------------------


def values(chart: Any) -> list[dict[str, Any]]:
    spec = json.loads(chart.to_json())
    return list(itertools.chain.from_iterable(spec.get("datasets", {}).values())) or spec["data"]["values"]


def test_a_line_for_each_draft_length_beside_the_uniform_formula(store: tk.Store, folder: Path):
    found = ask(store, folder, acceptance_rate=0.7)
    data = values(charts.speedup(found))
    assert {row["series"] for row in data} == {"K = 1", "K = 3", "K = 1, uniform", "K = 3, uniform"}
    drawn = {(row["series"], row["x"]): row["y"] for row in data}
    for row in found.iter_rows(named=True):
        assert drawn[f"K = {row['drafts']}", row["batch_size"]] == row["speedup"]
        assert drawn[f"K = {row['drafts']}, uniform", row["batch_size"]] == row["speedup_uniform"]
    assert {row.get("name") for row in data} == {None, "K = 1", "K = 3"}
    alone = values(charts.verification_ratio(found, drafts=3))
    assert {row["series"] for row in alone} == {"K = 3", "uniform", "dense"}
    with pytest.raises(UsageError, match="no rows with drafts = 2"):
        charts.speedup(found, drafts=2)
    many = ask(store, folder, acceptance_rate=0.7, drafts=[1, 2, 3, 4, 5, 7], batch_size=[1, 2])
    spec = json.loads(charts.speedup(many).to_json())
    assert "4 of 6 draft lengths" in spec["title"]["subtitle"]
    with pytest.raises(UnsupportedError, match="every value is null"):
        charts.speedup(ask(store, folder))


def test_the_map_says_what_bounds_a_verification_and_which_is_best(store: tk.Store, folder: Path):
    found = ask(store, folder, acceptance_rate=0.7, flops=1e9, overhead=1e-6)
    data = values(charts.speedup_map(found))
    assert {(row["x"], row["y"]): row["regime"] for row in data} == {
        (row["batch_size"], row["drafts"]): row["regime"] for row in found.iter_rows(named=True)
    }
    assert {(row["x"], row["y"]) for row in data if row["text"].endswith("*")} == {
        (row["batch_size"], row["drafts"]) for row in found.filter("best").iter_rows(named=True)
    }
    with pytest.raises(UnsupportedError, match="every speedup is null"):
        charts.speedup_map(ask(store, folder))


def test_real_steps_have_a_panel_of_their_own(stepped: tk.Store, folder: Path):
    data = values(charts.speedup(ask(stepped, folder, drafts=3)))
    assert {row["panel"] for row in data} == {"accepted tokens", "real steps"}


def test_the_charts_are_registered():
    assert {"speedup", "verification-ratio", "speedup-map"} <= KINDS.keys()
