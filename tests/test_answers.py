"""Answers that follow from results: kept with their setting, and in SQL what the functions returned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.analysis.design import fit
from tracekit.cli import main
from tracekit.economics.hardware import hardware
from tracekit.errors import TracekitWarning
from tracekit.reports import queries
from tracekit.store import results
from tracekit.store.answers import MODELLED

HOSTILE = "tiny'; DROP VIEW speedup; --\"<b>"
TINY: dict[str, Any] = {
    "model_type": "olmoe",
    "_name_or_path": HOSTILE,
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

pytestmark = pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two traces and of one with verification steps, and their model's config."""
    tmp_path = tmp_path_factory.mktemp("answers")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name, seed in (("a", 0), ("b", 1)):
        order = np.random.default_rng(seed).random((96, 2, 8)) + 0.3 * np.sin(np.arange(8))
        order[1:] += order[:-1]
        ids = np.argsort(-order, axis=2)[:, :, :2].astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", expert_ids=ids, request_lens=np.full(8, 12, np.int32))
        tk.ingest(tmp_path / f"{name}.npz", tmp_path / "S", name=name, num_experts=8, phase="decode")
    rows = []
    for request in range(6):
        start = 0
        for step in range(10):
            accepted = (step + request) % 4
            experts = np.random.default_rng(10 * request + step).random((4, 2, 8)).argsort(axis=2)[:, :, :2]
            rows.append((f"r{request}", start, 3, accepted, experts.astype(np.uint8).tobytes()))
            start += accepted + 1
    schema = {"request_id": pl.String, "start_pos": pl.Int64, "n_drafted": pl.Int64, "n_accepted": pl.Int64}
    pl.DataFrame(rows, schema | {"experts": pl.Binary}, orient="row").write_parquet(tmp_path / "c.parquet")
    tk.ingest(tmp_path / "c.parquet", tmp_path / "S", name="steps", num_experts=8, top_k=2, phase="decode")
    for trace in ("a", "steps"):
        tk.speedup(tmp_path / "S", trace=trace, model=tmp_path, **MACHINE)
    for answer in (tmp_path / "S" / "results").glob("speedup-*"):
        answer.unlink()
    return tmp_path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, in which unions are measured and nothing is answered."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def store(folder: Path) -> tk.Store:
    return tk.open(folder / "S")


def ask(store: tk.Store, folder: Path, **arguments: Any) -> pl.DataFrame:
    return tk.speedup(store, **{"model": folder, "trace": "a", "draft_cost": 0.1, **MACHINE} | arguments)


def answers(store: tk.Store, kind: str) -> pl.DataFrame:
    return store.sql(f'SELECT * FROM "{kind}"')


def measured(store: tk.Store, folder: Path) -> Any:
    bench = {"batch_size": [1, 1, 2, 4], "drafts": [0, 3, 3, 3], "verify_ms": [0.1, 0.15, 0.2, 0.24]}
    return tk.calibrate(store, pl.DataFrame(bench), trace="a", model=folder, **MACHINE)


FUNCTIONS: dict[str, Callable[[tk.Store, Path], pl.DataFrame]] = {
    "speedup": lambda store, folder: ask(store, folder, acceptance_rate=0.6),
    "step_time": lambda store, folder: tk.step_time(store, model=folder, **MACHINE),
    "amdahl": lambda store, folder: tk.amdahl(store, model=folder, measured_ratio=1.2, **MACHINE),
    "design": lambda store, folder: tk.design(store, trace="b", vary={"k": (1, 4)}, model=folder, acceptance_rate=0.5),
    "law": lambda store, folder: fit(tk.fit_law(store, trace="b")),
    "calibration": lambda store, folder: measured(store, folder).parameters,
    "calibration_points": lambda store, folder: measured(store, folder).points,
    "compare": lambda store, folder: tk.compare(store, trace_a="a", trace_b="b").rename({"trace_a": "trace"}),
}


@pytest.mark.parametrize("kind", MODELLED)
def test_a_view_of_answers_is_what_the_function_returned(store: tk.Store, folder: Path, kind: str):
    assert answers(store, kind).is_empty()
    frame = FUNCTIONS[kind](store, folder)
    found = answers(store, kind)
    assert found.select(frame.columns).equals(frame)
    assert set(found.columns) - set(frame.columns) <= {"trace", "phase", "setting", "asked"}
    assert found["asked"].unique().to_list() == [0]
    assert found.columns == ["trace", *results.columns(kind)]


def test_every_argument_is_in_the_setting(store: tk.Store, folder: Path):
    for changed in (
        *({"bandwidth": 2e8}, {"flops": 2e11}, {"overhead": 1e-3}, {"context": 7}, {"kv_bits": 8}, {"bits": 4}),
        *({"tensor_parallel": 2}, {"expert_parallel": 2}, {"draft_cost": 0.2}, {"acceptance_rate": 0.5}),
        *({"acceptance_length": 2, "at_drafts": 1}, {"acceptance_length": 2, "at_drafts": 2}),
        *({"draft_cost": None, "draft_model": folder}, {"drafts": [1]}, {"batch_size": [1]}, {"intervals": False}),
        *({"seed": 1}, {"phase": "all"}, {}),
        {"hardware": hardware("h100"), "bandwidth": None, "flops": None},
    ):
        before = answers(store, "speedup")
        asked = ask(store, folder, **changed)
        found = answers(store, "speedup")
        assert found["setting"].n_unique() == before["setting"].n_unique() + 1, changed
        assert found.filter(asked=found["asked"].max()).select(asked.columns).equals(asked)


def test_what_is_asked_again_is_the_last_answer_and_not_another(store: tk.Store, folder: Path):
    first, second = ask(store, folder, acceptance_rate=0.6), ask(store, folder, acceptance_rate=0.9)
    last = [queries.query(store, "speedup_by_batch", trace="a")["speedup"]]
    ask(store, folder, acceptance_rate=0.6)
    last.append(queries.query(store, "speedup_by_batch", trace="a")["speedup"])
    assert [values.to_list() for values in last] == [second["speedup"].to_list(), first["speedup"].to_list()]
    assert answers(store, "speedup").height == 2 * first.height
    chosen = queries.query(store, "speedup_by_batch", trace="a", acceptance_rate=".9")
    assert chosen["speedup"].to_list() == second["speedup"].to_list()


def test_a_setting_is_json_and_names_are_data(store: tk.Store, folder: Path):
    ask(store, folder)
    [setting] = answers(store, "speedup")["setting"].unique()
    said = json.loads(setting, parse_constant=pytest.fail)
    assert (said["model"], said["bandwidth"], said["link"], said["context"]) == (HOSTILE, 1e8, None, 1024)
    assert said["asked"] == {"model": str(folder), "hardware": None}
    assert queries.query(store, "best_draft_length", trace="a", model=HOSTILE)["model"].unique().to_list() == [HOSTILE]


def test_numbers_of_numpy_are_numbers(store: tk.Store, folder: Path):
    many: Any = {"batch_size": np.array([1, 4]), "drafts": np.int64(2)}
    tk.design(store, trace="a", vary={"k": np.array([1, 4])}, routed_share=np.float64(0.5), **many)
    said = json.loads(answers(store, "design")["setting"][0])
    assert (said["vary"], said["batch_size"], said["drafts"], said["share"]) == ({"k": [1, 4]}, [1, 4], 2, 0.5)
    tk.compare(store, trace_a="a", trace_b="b", batch_size=list(np.array([2])), window=np.int64(3))
    assert json.loads(answers(store, "compare")["setting"][0])["window"] == 3


def test_a_setting_is_the_same_in_every_run(folder: Path):
    code = """
import tracekit as tk
from tracekit.analysis.answers import setting_of_model
print(setting_of_model(tk.model("gpt-oss-20b")), setting_of_model(tk.model("deepseek-v3")))
"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_an_answer_belongs_to_what_the_trace_was(store: tk.Store, folder: Path):
    ask(store, folder)
    with np.load(folder / "a.npz") as held:
        np.savez(folder / "a.npz", expert_ids=held["expert_ids"][::-1], request_lens=held["request_lens"])
    tk.ingest(folder / "a.npz", folder / "S", name="a", num_experts=8, phase="decode", force=True)
    assert answers(tk.open(folder / "S"), "speedup").is_empty()


def test_a_comparison_says_what_the_other_trace_was(store: tk.Store, folder: Path):
    tk.compare(store, trace_a="a", trace_b="b")
    same = """
        SELECT count(*) AS rows, bool_and(c.setting ->> 'content_b' = t.content) AS same
        FROM compare AS c JOIN traces AS t ON c.trace_b = t.trace
    """
    [row] = store.sql(same).rows(named=True)
    assert row["rows"] > 10
    assert row["same"]


# --- the queries ---------------------------------------------------------------------------------


def test_a_query_computes_what_a_named_machine_asks_for(store: tk.Store, folder: Path):
    given: dict[str, Any] = {"trace": "a", "model": str(folder / "config.json"), "hardware": "H100"}
    found = queries.query(store, "speedup_by_batch", **given, acceptance_rate=0.6, draft_cost=0.05)
    frame = tk.speedup(store, **given, acceptance_rate=0.6, draft_cost=0.05)
    shared = [name for name in frame.columns if name in found.columns]
    assert found.select(shared).equals(frame.select(shared))
    assert found.select("num_experts", "top_k").unique().rows() == [(8, 2)]
    tk.speedup(store, **given, context=9000)  # asked for later
    assert queries.query(store, "speedup_by_batch", **given)["speedup"].null_count()
    again = queries.run(store, "speedup_by_batch", {"acceptance_rate": 0.6})
    assert again.equals(found)
    longer = queries.query(store, "regime_by_batch", **given, context=9000)
    assert longer["seconds_single"][0] > frame["seconds_single"][0]
    names = [name for name in longer.columns if name in frame.columns]
    regimes = queries.query(store, "regime_by_batch", **given, acceptance_rate=0.6, draft_cost=0.05)
    assert regimes.select(names).equals(frame.select(names))


@pytest.mark.parametrize("rate", [None, 0.2, 0.8])
@pytest.mark.parametrize("trace", ["a", "steps"])
def test_the_best_draft_length_is_the_fastest_row(store: tk.Store, folder: Path, trace: str, rate: float | None):
    frame = ask(store, folder, trace=trace, acceptance_rate=rate)
    found = queries.query(store, "best_draft_length", trace=trace)
    kinds = [("accepted-only",), ("steps", "extended")]
    expected = []
    for kind in kinds:
        for size in sorted({row["batch_size"] for row in frame.rows(named=True) if row["unions"] in kind}):
            rows = [r for r in frame.rows(named=True) if r["batch_size"] == size and r["unions"] in kind]
            known = rows[0]["speedup"] is not None
            # Not the lowest V + D: a longer draft may need more tokens and still a lower rate.
            row = max(rows, key=lambda r: r["speedup"]) if known else min(rows, key=lambda r: r["break_even_rate"] or 2)
            uniform = max(rows, key=lambda r: r["speedup_uniform"]) if known else None
            if uniform is not None and uniform["speedup_uniform"] <= 1:
                uniform = None
            promised = [uniform and uniform[name] for name in ("drafts", "speedup_uniform", "speedup")]
            had = 1.0 if uniform is None else uniform["speedup"]
            regret = max(1.0, row["speedup"]) / had - 1 if known else None
            expected.append(
                (row["unions"], size, row["drafts"], row["speedup"] > 1 if known else None, *promised, regret)
            )
    columns = ("unions", "batch_size", "drafts", "gains", "drafts_uniform", "speedup_promised", "speedup_had", "regret")
    for left, right in zip(found.select(columns).rows(), expected, strict=True):
        assert left == tuple(pytest.approx(v) if isinstance(v, float) else v for v in right)
    assert len(expected) > len(kinds) if trace == "steps" else len(expected)


def test_the_parts_of_a_step_and_how_they_grow(store: tk.Store, folder: Path):
    frame = tk.step_time(store, model=folder, trace="a", batch_size=[1, 4], drafts=3, overhead=1e-5, **MACHINE)
    found = queries.query(store, "step_time_by_part", trace="a")
    keys = ["batch_size", "tokens", "part"]
    shared = [name for name in frame.columns if name in found.columns]
    assert found.sort(keys).select(shared).equals(frame.sort(keys).select(shared))
    seconds = {row[:3]: row[3] for row in frame.select(*keys, "seconds").rows()}
    for row in found.rows(named=True):
        alone = seconds[row["batch_size"], 1, row["part"]]
        assert row["growth"] == (pytest.approx(row["seconds"] / alone) if alone else None)
    assert found.filter(part="experts", tokens=4, batch_size=1)["growth"].item() > 1.5


def test_design_points_mark_their_sweet_spot(store: tk.Store, folder: Path):
    frame = tk.design(store, trace="a", vary={"k": (1, 4)}, model=folder, acceptance_rate=0.5, batch_size=[1, 4, 16])
    found = queries.query(store, "design_points", trace="a")
    keys = ["design", "batch_size"]
    shared = [name for name in frame.columns if name in found.columns]
    assert found.sort(keys).select(shared).equals(frame.sort(keys).select(shared))
    least = frame.filter(pl.col("verification_ratio") == pl.col("verification_ratio").min().over("design"))
    assert set(found.filter("sweet_spot").select(keys).rows()) == set(least.select(keys).rows())
    assert found.select("model", "hardware").unique().rows() == [(HOSTILE, "h100")]
    assert not found["extrapolated"][0]


@pytest.mark.parametrize("name", ["speedup_by_batch", "best_draft_length", "step_time_by_part", "design_points"])
def test_a_query_of_answers_says_where_nothing_was_asked(folder: Path, name: str, capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        assert queries.query(tk.open(folder / "S"), name).is_empty()
    [note] = [str(w.message) for w in caught]
    verb = {"step_time_by_part": "speedup --parts", "design_points": "design"}.get(name, "speedup")
    assert note.startswith(f"nothing was asked yet that this query could show: run tracekit {verb}")
    assert main(["query", str(folder / "S"), name]) == 0
    assert note.split(":")[0] in capsys.readouterr().err.replace("\n", " ")
