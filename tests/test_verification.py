"""Verification steps measured: against sets, against SQL, in closed form, and the published figures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import TracekitWarning, UnsupportedError
from tracekit.metrics.state import Cells, Spec
from tracekit.metrics.verification import AcceptanceState, StepSums, step_unions
from tracekit.reports.charts import chart
from tracekit.reports.tables import render
from tracekit.schema import VerifySteps
from tracekit.sources import READERS, RawRequest, Reader
from tracekit.store import spool

N, K, LAYERS = 9, 2, 2


def quiet(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        return run()


def ingest(folder: Path, raws: Sequence[RawRequest], **options: Any) -> tk.Store:
    """Ingest raw requests as if a reader had yielded them."""
    folder.mkdir(exist_ok=True)
    (folder / "source").write_text("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "made", Reader("made", "", "", lambda *_: False, lambda *_: iter(raws)))
        fixed = {"source_format": "made", "name": "t", "num_experts": N}
        tk.ingest(folder / "source", folder / "S", **fixed | options)
    return tk.open(folder / "S")


def routing(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((rows, LAYERS, N)), axis=2)[:, :, :K].astype(np.uint8)


# A step by hand: the depths of its rows, the drafts accepted, and the row kept at each depth (None: not known).
Made = tuple[list[int], int, list[int | None]]


@st.composite
def steps(draw: st.DrawFn, *, unknown: bool = True) -> Made:
    """A chain, or a tree in any order in which a parent comes before its children."""
    depths = [0]
    for _ in range(draw(st.integers(0, 5))):
        depths.append(draw(st.integers(1, max(depths) + 1)) if draw(st.booleans()) else max(depths) + 1)
    accepted = draw(st.integers(0, max(depths)))
    kept: list[int | None] = []
    for depth in range(accepted + 1):
        rows = [row for row, d in enumerate(depths) if d == depth]
        kept.append(None if unknown and len(rows) > 1 and draw(st.booleans()) else draw(st.sampled_from(rows)))
    return depths, accepted, kept


def request(name: str, made: Sequence[Made], seed: int, start: int = 2, label: str = "x") -> RawRequest:
    """A request with these steps, whose prompt has ``start`` tokens; what is not known is missing from its rows."""
    starts = start + np.cumsum([0, *(accepted + 1 for _, accepted, _ in made)])
    ids = routing(sum(len(depths) for depths, _, _ in made), seed)
    flags, committed = [], dict(enumerate(routing(start, seed + 1)))
    row = 0
    for at, (depths, accepted, kept) in zip(starts.tolist(), made, strict=False):
        for r, depth in enumerate(depths):
            known = depth <= accepted and kept[depth] is None
            flags.append(-1 if known else int(depth <= accepted and kept[depth] == r))
            if flags[-1] == 1:
                committed[at + depth] = ids[row + r]
        row += len(depths)
    positions = sorted(committed)
    return RawRequest(
        where="made",
        ids=np.stack([committed[p] for p in positions]),
        request_id=name,
        axes="tlk",
        prompt_len=start,
        positions=None if positions == list(range(len(positions))) else np.array(positions),
        steps=VerifySteps(
            start_pos=starts[:-1].astype(np.int64),
            n_rows=np.array([len(depths) for depths, _, _ in made]),
            n_accepted=np.array([accepted for _, accepted, _ in made]),
            ids=ids,
            depth=np.concatenate([depths for depths, _, _ in made]).astype(np.int64),
            kept=np.array(flags, np.int8),
        ),
        fields={"label": label},
    )


def each_step(raws: Sequence[RawRequest]) -> Iterator[tuple[int, int, int, int, bool, list[int], list[int]]]:
    """Rows, deepest draft, accepted drafts, request, whether all is known, unions by layer: of all and of kept rows."""
    for number, raw in enumerate(raws):
        s = raw.steps
        assert s is not None
        assert s.depth is not None
        assert s.kept is not None
        row = 0
        for n, accepted in zip(s.n_rows.tolist(), s.n_accepted.tolist(), strict=True):
            span = range(row, row + n)
            every = [len({e for r in span for e in s.ids[r, layer].tolist()}) for layer in range(LAYERS)]
            own = [len({e for r in span if s.kept[r] == 1 for e in s.ids[r, at].tolist()}) for at in range(LAYERS)]
            yield n, int(s.depth[row : row + n].max()), accepted, number, (s.kept[row : row + n] >= 0).all(), every, own
            row += n


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def close(found: float | None, wanted: float | None) -> bool:
    return found is wanted if wanted is None else found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


# --- the kernel and the state --------------------------------------------------------------------


def test_the_kernel_counts_the_experts_of_all_rows_and_of_kept_ones():
    ids = np.array([[0, 1, 2, 5, 5], [1, 2, 3, 6, 7]], np.uint8)
    kept = np.array([1, 1, 0, 1, -1], np.int8)
    assert step_unions(ids, kept, np.array([0, 3]), 8).tolist() == [[4, 3], [3, 2]]


def test_states_merge_whatever_their_depth():
    one, two = AcceptanceState.empty(2, 2, 3), AcceptanceState.empty(2, 4, 3)
    one.unique += 1
    two.n += 2
    two.merge(one)
    assert two.unique.sum(axis=(0, 2)).tolist() == [6, 6, 0, 0]
    assert (one.grown(4).unique == two.unique).all()
    assert two.n.sum() == 16
    assert one.grown(2) is one


@given(data=st.data())
@settings(max_examples=10)
def test_parts_of_a_trace_add_up_to_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Each batch of steps in a state of its own, merged in any order, is the state of one pass."""
    drawn = data.draw(st.lists(st.lists(steps(), min_size=1, max_size=4), min_size=2, max_size=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "SPOOL_ROWS", 5)
        raws = [request(f"r{i}", made, 10 * i) for i, made in enumerate(drawn)]
        store = ingest(tmp_path_factory.mktemp("m"), raws)
    info, requests = store.trace(), store.requests(store.trace())
    cells = Cells.assign(requests, Spec("decode"))

    def empty() -> StepSums:
        return StepSums(info.meta, cells, requests, "decode")

    whole, parts = empty(), []
    for rows in store.steps(info):
        whole.add(rows)
        parts.append(empty())
        parts[-1].add(rows)
    merged = empty()
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert merged.by_window.keys() == whole.by_window.keys()
    pairs = [(merged.by_window[w], state) for w, state in whole.by_window.items()]
    for left, right in [(merged.acceptance, whole.acceptance), *pairs]:
        for field in fields(left):
            assert (getattr(left, field.name) == getattr(right, field.name)).all()


# --- against sets and SQL ------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40)
def test_steps_and_acceptance_are_what_sets_say(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("v")
    unknown = data.draw(st.booleans())
    drawn = data.draw(st.lists(st.lists(steps(unknown=unknown), min_size=1, max_size=4), min_size=1, max_size=3))
    raws = [request(f"r{i}", made, 10 * i) for i, made in enumerate(drawn)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "SPOOL_ROWS", data.draw(st.sampled_from([1, 3, 1000])))  # steps lie across row groups
        store = ingest(folder, raws)
    every = list(each_step(raws))
    found = quiet(lambda: tk.steps(store, intervals=False))
    windows = sorted({s[0] for s in every})
    assert found["window"].to_list() == [*windows, None]
    for row in found.rows(named=True):
        mine = [s for s in every if row["window"] in (None, s[0])]
        assert row["n_steps"] == len(mine)
        assert close(row["drafted"], mean([s[0] - 1 for s in mine]))
        assert close(row["accepted"], mean([s[2] for s in mine]))
        assert close(row["acceptance_length"], mean([s[2] + 1 for s in mine]))
        assert close(row["unique"], mean([u for s in mine for u in s[5]]))
        kept = mean([u for s in mine for u in s[6]]) if all(s[4] for s in mine) else None
        assert close(row["unique_kept"], kept)
        uniform = mean([N * (1 - (1 - K / N) ** s[0]) for s in mine])
        assert close(row["expected_uniform"], uniform)
        assert (row["bias"] is None) == (row["accepted_only"] is None)
    found = quiet(lambda: tk.acceptance(store, intervals=False))
    assert found["accepted"].to_list() == list(range(max(s[1] for s in every) + 1))
    for row in found.rows(named=True):
        n = row["accepted"]
        mine, more = [s for s in every if s[2] == n], [s for s in every if s[2] >= n]
        tried = [s for s in every if s[2] >= n - 1 and s[1] >= n]
        assert (row["n_steps"], row["share"]) == (len(mine), pytest.approx(len(mine) / len(every)))
        assert close(row["at_least"], len(more) / len(every))
        assert close(row["rate"], len(more) / len(tried) if n and tried else None)
        assert close(row["unique"], mean([u for s in mine for u in s[5]]))
        own = mean([a - b for s in mine for a, b in zip(s[5], s[6], strict=True)]) if all(s[4] for s in mine) else None
        assert close(row["rejected_unique"], own)
    sql = tk.query(store, "unique_experts_by_step")
    kernel = quiet(lambda: tk.steps(store, intervals=False)).select(sql.columns)
    for left, right in zip(sql.rows(), kernel.rows(), strict=True):
        assert all(close(a, b) if isinstance(b, float) else a == b for a, b in zip(left, right, strict=True))


def chains(seed: int, requests: int = 8, drafts: int = 3) -> list[RawRequest]:
    """Requests of chains, labelled by turns."""
    rng = np.random.default_rng(seed)
    raws = []
    for i in range(requests):
        accepted = rng.integers(0, drafts + 1, 6).tolist()
        made: list[Made] = [(list(range(drafts + 1)), a, list(range(a + 1))) for a in accepted]
        raws.append(request(f"r{i}", made, 100 * i, label="xy"[i % 2]))
    return raws


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    return ingest(tmp_path_factory.mktemp("chained"), chains(1), label_fields=["label"])


def test_accepted_only_is_the_windows_of_the_same_requests(tmp_path: Path) -> None:
    raws = chains(2)
    others = [request("other", [([0], 0, [0])] * 40, 7)]
    others[0].steps = None  # a request without steps is no part of it
    store = ingest(tmp_path, [*raws, *others])
    alone = ingest(tmp_path / "alone", raws)
    windows = quiet(lambda: tk.windows(alone, max_window=4)).filter(window=4).row(0, named=True)
    [row, _] = quiet(lambda: tk.steps(store)).rows(named=True)
    assert row["accepted_only"] == windows["observed"]
    assert row["expected_popularity"] == windows["expected_popularity"]
    assert row["bias"] == pytest.approx(row["unique"] / windows["observed"] - 1)
    assert (row["window"], row["n_steps"], row["drafted"]) == (4, 48, 3)


def test_intervals_leave_out_whole_requests(tmp_path: Path) -> None:
    """Eight groups of one request: the t quantile with 7 degrees of freedom is 2.3646."""
    raws = chains(3)
    row = quiet(lambda: tk.steps(ingest(tmp_path / "all", raws))).row(0, named=True)
    accepted = quiet(lambda: tk.acceptance(tk.open(tmp_path / "all" / "S"))).row(1, named=True)
    without = []
    for i in range(len(raws)):
        rest = ingest(tmp_path / str(i), [*raws[:i], *raws[i + 1 :]])
        some = quiet(lambda rest=rest: (tk.steps(rest, intervals=False), tk.acceptance(rest, intervals=False)))
        without.append({**some[0].row(0, named=True), "rate": some[1]["rate"][1], "own": some[1]["rejected_unique"][1]})
    for name, frame, column in (
        *((name, row, name) for name in ("acceptance_length", "unique", "unique_kept", "rejected_share", "bias")),
        ("rate", accepted, "rate"),
        ("own", accepted, "rejected_unique"),
    ):
        left_out = np.array([other[name] for other in without])
        half = 2.364624 * np.sqrt(7 / 8 * np.square(left_out - left_out.mean()).sum())
        centre = 8 * frame[column] - 7 * left_out.mean()
        assert (frame[f"{column}_lo"], frame[f"{column}_hi"]) == (
            pytest.approx(centre - half, rel=1e-5),
            pytest.approx(centre + half, rel=1e-5),
        )


def test_groups_are_those_of_the_parts(chained: tk.Store, tmp_path: Path) -> None:
    by_label = quiet(lambda: tk.steps(chained, by="label"))
    assert by_label["label"].to_list() == ["x", "x", "y", "y"]
    half = ingest(tmp_path / "half", chains(1)[::2])
    alone = quiet(lambda: tk.steps(half))
    names = ["acceptance_length", "unique", "unique_kept", "accepted_only", "bias"]
    assert by_label.filter(label="x").select(names).rows() == [pytest.approx(r) for r in alone.select(names).rows()]
    by_layer = quiet(lambda: tk.steps(chained, by="layer")).filter(pl.col("window").is_null())
    whole = quiet(lambda: tk.steps(chained)).filter(pl.col("window").is_null())
    for name in ("unique", "unique_kept", "accepted_only"):
        assert by_layer[name].mean() == pytest.approx(whole[name].item())
    by_request = quiet(lambda: tk.acceptance(chained, by="request"))
    assert by_request["request_id"].n_unique() == 8
    assert by_request["n_steps"].sum() == 48
    layers = quiet(lambda: tk.acceptance(chained, by="layer"))
    assert layers.filter(layer=0)["share"].to_list() == layers.filter(layer=1)["share"].to_list()


def test_the_acceptance_length_is_the_sum_of_what_acceptance_says(chained: tk.Store) -> None:
    at_least = quiet(lambda: tk.acceptance(chained))["at_least"].to_list()
    assert at_least[0] == 1
    assert 1 + sum(at_least[1:]) == pytest.approx(quiet(lambda: tk.steps(chained))["acceptance_length"][0])


def test_accepting_the_most_or_more_is_accepting_the_most(chained: tk.Store) -> None:
    found = quiet(lambda: tk.acceptance(chained))
    ends = ("", "_lo", "_hi")
    last = found.row(-1, named=True)
    assert [last[f"at_least{end}"] for end in ends] == [last[f"share{end}"] for end in ends]
    assert last["share_lo"] is not None
    # One draft or more is not none: the interval is the other's mirrored.
    none, one = found.rows(named=True)[:2]
    mirrored = [1 - none["share_hi"], 1 - none["share_lo"]]
    assert [one["at_least_lo"], one["at_least_hi"]] == pytest.approx(mirrored)


def test_every_draft_accepted_or_none(tmp_path: Path) -> None:
    """All accepted: the kept rows are all rows. None: k experts are kept, and a step emits one token."""
    all_: list[Made] = [([0, 1, 2], 2, [0, 1, 2])] * 5
    row = quiet(lambda: tk.steps(ingest(tmp_path / "a", [request("r", all_, 0)]))).row(0, named=True)
    assert (row["acceptance_length"], row["rejected_share"], row["unique"]) == (3, 0, row["unique_kept"])
    none: list[Made] = [([0, 1, 2], 0, [0])] * 5
    row = quiet(lambda: tk.steps(ingest(tmp_path / "n", [request("r", none, 0)]))).row(0, named=True)
    assert (row["acceptance_length"], row["unique_kept"]) == (1, K)
    shares = quiet(lambda: tk.acceptance(tk.open(tmp_path / "n" / "S")))
    assert shares["share"].to_list() == [1, 0, 0]
    assert shares["rate"].to_list() == [None, 0, None]  # no step had the first draft accepted


# --- trees ---------------------------------------------------------------------------------------


def test_a_tree_by_hand(tmp_path: Path) -> None:
    """Root, two children, one grandchild of each; the path through the second child is kept.

    In layer 0 the rows choose {0,1} {1,2} {1,3} {4,5} {6,7}: 8 experts, of which the kept rows 0, 2, 4 need
    {0,1,3,6,7}. In layer 1 every row chooses {0,1}.
    """
    layer0 = [[0, 1], [1, 2], [1, 3], [4, 5], [6, 7]]
    ids = np.array([[row, [0, 1]] for row in layer0], np.uint8)
    tree = VerifySteps(
        start_pos=np.array([3]),
        n_rows=np.array([5]),
        n_accepted=np.array([2]),
        ids=ids,
        depth=np.array([0, 1, 1, 2, 2]),
        kept=np.array([1, 0, 1, 0, 1], np.int8),
    )
    raw = RawRequest(
        where="made", ids=np.concatenate([ids[:1]] * 3 + [ids[[0, 2, 4]]]), request_id="r", axes="tlk", prompt_len=3
    )
    raw.steps = tree
    store = ingest(tmp_path, [raw])
    rows = store.sql('SELECT "row", pos, kept FROM verification WHERE layer = 0 ORDER BY ALL').rows()
    assert rows == [(0, 3, True), (1, 4, False), (2, 4, True), (3, 5, False), (4, 5, True)]
    row = quiet(lambda: tk.steps(store)).row(0, named=True)
    assert (row["window"], row["drafted"], row["acceptance_length"]) == (5, 4, 3)
    assert (row["unique"], row["unique_kept"]) == ((8 + 2) / 2, (5 + 2) / 2)
    assert row["accepted_only"] is None  # three decode tokens hold no window of five
    assert row["expected_popularity"] is not None
    [*_, last] = quiet(lambda: tk.acceptance(store)).rows(named=True)
    assert (last["accepted"], last["share"], last["rejected_unique"]) == (2, 1, 1.5)


def test_which_of_two_drafts_was_kept_may_be_unknown(tmp_path: Path) -> None:
    """The load of the step and the tokens that it emits are known all the same."""
    known: Made = ([0, 1, 1, 2], 0, [0])
    unknown: Made = ([0, 1, 1, 2], 2, [0, None, 3])
    raws = [request("a", [known, known], 1), request("b", [unknown, known], 2)]
    store = ingest(tmp_path, raws)
    assert store.sql("SELECT count(*) FROM verification WHERE kept IS NULL").item() == 2 * LAYERS
    row = quiet(lambda: tk.steps(store)).row(0, named=True)
    assert row["acceptance_length"] == 1 + 2 / 4
    assert row["unique"] == mean([u for s in each_step(raws) for u in s[5]])
    assert (row["unique_kept"], row["rejected_share"]) == (None, None)
    shares = quiet(lambda: tk.acceptance(store))
    assert shares["share"].to_list() == [0.75, 0, 0.25]
    assert shares["rejected_unique"].is_null().to_list() == [False, True, True]
    text = render(quiet(lambda: tk.steps(store)), layout="steps")
    assert isinstance(text, str)
    assert "kept" not in text


# --- what has no steps ---------------------------------------------------------------------------


def test_a_trace_without_steps_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = request("r", [([0], 0, [0])] * 9, 0)
    raw.steps = None
    store = ingest(tmp_path, [raw])
    for ask in (tk.steps, tk.acceptance):
        with pytest.raises(UnsupportedError, match="no verification steps: its tokens are those that were") as caught:
            ask(store)
        assert "--draft MODEL" in str(caught.value)
    assert main(["steps", str(tmp_path / "S")]) == 1
    assert "tracekit windows" in capsys.readouterr().err
    note = quiet(lambda: tk.summary(store)).filter(measure="observed")["note"].item()
    assert note == "accepted-only: the trace has no rejected drafts"


def test_steps_are_of_the_phase_that_they_begin_in(chained: tk.Store) -> None:
    with pytest.raises(UnsupportedError, match="no verification step begins among the prefill tokens"):
        quiet(lambda: tk.steps(chained, phase="prefill"))
    whole = quiet(lambda: tk.acceptance(chained, phase="all"))
    assert whole.drop("phase").equals(quiet(lambda: tk.acceptance(chained)).drop("phase"))
    note = quiet(lambda: tk.summary(chained)).filter(measure="observed")["note"].item()
    assert note == "accepted-only; tracekit steps has the steps with rejected drafts"


def test_few_requests_with_steps_have_no_interval(tmp_path: Path) -> None:
    """Four of eight requests have steps."""
    raws = chains(4)
    for raw in raws[4:]:
        raw.steps = None
    store = ingest(tmp_path, raws)
    with pytest.warns(TracekitWarning, match="fewer than 5 requests: there are 4"):
        row = tk.steps(store).row(0, named=True)
    assert row["unique_lo"] is None


# --- tables and the chart ------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, "layer", "label", "request"])
def test_tables_fit_the_screen(chained: tk.Store, by: Any) -> None:
    frames = {"steps": tk.steps, "acceptance": tk.acceptance}
    for layout, ask in frames.items():
        text = render(quiet(lambda ask=ask: ask(chained, by=by)), layout=layout)
        assert isinstance(text, str)
        assert max(map(len, text.splitlines())) <= 80
        assert "emit" in text


def test_one_length_of_step_is_one_line(chained: tk.Store, tmp_path: Path) -> None:
    text = render(quiet(lambda: tk.steps(chained)), layout="steps")
    assert isinstance(text, str)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("   4")] == ["4", "4"]
    several = ingest(tmp_path, [request("r", [([0, 1], 0, [0]), ([0, 1, 2], 1, [0, 1])] * 3, 0)])
    text = render(quiet(lambda: tk.steps(several)), layout="steps")
    assert isinstance(text, str)
    assert [line.split()[0] for line in text.splitlines() if " 6 " in line] == ["all"]


def test_the_chart_stacks_what_kept_and_rejected_rows_load(chained: tk.Store) -> None:
    drawn = json.loads(quiet(lambda: chart(chained, "acceptance")).to_json())
    [data] = drawn["datasets"].values()
    bars = [row for row in data if "part" in row]
    frame = quiet(lambda: tk.acceptance(chained))
    for row in frame.rows(named=True):
        mine = [bar for bar in bars if bar["accepted"] == row["accepted"]]
        assert [bar["part"] for bar in mine] == ["kept rows", "rejected rows only"]
        assert mine[1]["to"] == pytest.approx(row["unique"])
        assert mine[0]["to"] == mine[1]["from"] == pytest.approx(row["unique"] - row["rejected_unique"])
    marks = {row["mark"]: row["y"] for row in data if "mark" in row}
    steps = quiet(lambda: tk.steps(chained)).row(-1, named=True)
    assert marks == {name: steps[name] for name in ("accepted_only", "expected_uniform")}
    titles = {layer["encoding"]["y"]["title"] for layer in drawn["layer"]}
    assert titles == {"Unique experts of a step (mean over layers)"}


# --- the published figures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def olmoe(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tk.Store:
    store = tmp_path_factory.mktemp("olmoe") / "S"
    folder = shared / "moe" / "traces"
    tk.ingest(folder / "olmoe" / "verify_steps.parquet", store, name="olmoe", label_fields=["mode"])
    tk.ingest(folder / "vllm_olmoe_spec" / "engine_steps.parquet", store, name="vllm", num_experts=32, top_k=4)
    return tk.open(store)


def test_the_figures_of_the_trained_model(olmoe: tk.Store) -> None:
    steps = quiet(lambda: tk.steps(olmoe, trace="olmoe", by="label")).filter(window=4)
    greedy, sampled = steps.sort("label").rows(named=True)
    assert (greedy["n_steps"], sampled["n_steps"]) == (3178, 6037)
    assert round(sampled["acceptance_length"], 3) == 2.020
    assert round(greedy["acceptance_length"], 3) == 2.098
    half = (sampled["acceptance_length_hi"] - sampled["acceptance_length_lo"]) / 2
    assert round(half / 1.99897, 3) == 0.022  # the standard error over 63 requests
    assert (round(sampled["unique"], 2), round(greedy["unique"], 2)) == (12.01, 10.18)
    assert round(sampled["unique_kept"], 2) == 6.89
    shares = quiet(lambda: tk.acceptance(olmoe, trace="olmoe", by="label")).filter(label="sampled")
    assert [round(share, 2) for share in shares["share"]] == [0.46, 0.23, 0.14, 0.17]
    assert [round(own, 1) for own in shares["rejected_unique"]] == [8.0, 4.8, 2.2, 0.0]
    # As many committed tokens load as much: rejected drafts are routed like accepted ones here.
    assert sampled["bias_lo"] < 0 < sampled["bias_hi"]
    assert abs(sampled["bias"]) < 0.01


def test_the_steps_of_a_real_engine(olmoe: tk.Store, shared: Path) -> None:
    row = quiet(lambda: tk.steps(olmoe, trace="vllm")).row(0, named=True)
    raw = pl.read_parquet(shared / "moe" / "traces" / "vllm_olmoe_spec" / "engine_steps.parquet")
    verified = raw.filter(pl.col("start_pos") > 0)
    assert row["n_steps"] == verified.height == 4765
    assert row["acceptance_length"] == pytest.approx((verified["n_tokens"] - verified["n_rejected"]).mean())
    unions = []
    for n, experts in verified.select("n_tokens", "experts").rows():
        table = np.frombuffer(experts, np.uint8).reshape(n, 8, 4)
        unions.append(np.mean([len(set(table[:, layer].ravel().tolist())) for layer in range(8)]))
    assert row["unique"] == pytest.approx(np.mean(unions))
    # What it kept is what the engine returned for the request.
    folder = shared / "moe" / "traces" / "vllm_olmoe_spec"
    index = {entry["engine_request_id"]: entry for entry in json.loads((folder / "index.json").read_text())["requests"]}
    kept = olmoe.sql(
        "SELECT split_part(q.request_id, '-', 1) AS id, r.layer, r.pos, r.experts, r.phase FROM routing AS r "
        "JOIN requests AS q USING (trace, request) WHERE r.trace = 'vllm' AND r.request < 6 ORDER BY ALL"
    )
    for key, rows in kept.partition_by("id", as_dict=True).items():
        entry = index[key[0]]
        with np.load(folder / "npz" / f"{entry['id']}.npz") as stored:
            returned = stored["routed_experts"]
        mine = np.array(rows.sort("pos", "layer")["experts"].to_list()).reshape(-1, 8, 4)
        assert (np.sort(mine[: len(returned)], axis=2) == np.sort(returned, axis=2)).all()
        assert rows.filter(phase="prefill", layer=0).height == entry["prompt_len"]
