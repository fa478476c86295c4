"""The check: every fault is found where it was planted, and a sound trace stays silent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.checks import Checker, Finding
from tracekit.checks.chance import log_chance_of_repeats, z_limit, z_score
from tracekit.checks.keys import request_keys
from tracekit.checks.sample import masks
from tracekit.cli import main
from tracekit.errors import SourceError, StoreError, TracekitWarning, UsageError
from tracekit.schema import Histogram, Request, TraceMeta, VerifySteps
from tracekit.sources.mend import Mended, Mends, parse_layers
from tracekit.synthetic import synth

N, K, LAYERS = 32, 4, 6
Ids = np.ndarray[Any, Any]


def routed(requests: int = 12, tokens: int = 240, seed: int = 0, layers: int = LAYERS) -> list[Ids]:
    """Routing as a trained router makes it: a topic per request, memory over some tokens, layers that agree.

    A hidden state of 12 numbers (request + AR(1) + fresh) passes through a fixed random router per layer; a part of it
    is drawn anew for each layer.
    """
    rng = np.random.default_rng(seed)
    routers = rng.standard_normal((layers, 12, N))
    made = []
    for _ in range(requests):
        state, slow = np.empty((tokens, 12)), rng.standard_normal(12)
        noise = rng.standard_normal((tokens, 12))
        for t in range(tokens):
            slow = 0.7 * slow + 0.7 * noise[t]
            state[t] = slow
        state += 0.4 * rng.standard_normal(12) + 0.6 * rng.standard_normal((tokens, 12))
        hidden = state[:, None] + 0.7 * rng.standard_normal((tokens, layers, 12))
        logits = np.einsum("tld,lde->tle", hidden, routers)
        made.append(np.argsort(-logits, axis=2)[..., :K].astype(np.uint8))
    return made


def meta(layers: int = LAYERS, **more: Any) -> TraceMeta:
    return TraceMeta(**{"num_experts": N, "top_k": K, "layers": tuple(range(layers)), "source_format": "arrays"} | more)


def findings(arrays: Sequence[Ids], shape: TraceMeta | None = None, **request: Any) -> list[Finding]:
    checker = Checker(shape or meta(arrays[0].shape[1]))
    for i, ids in enumerate(arrays):
        checker.add(Request(f"r{i}", ids, **request))
    return checker.findings()


def names(found: Sequence[Finding]) -> set[tuple[str, str]]:
    return {(f.severity, f.finding) for f in found}


@pytest.fixture(scope="module")
def clean() -> list[Ids]:
    return routed()


def test_a_sound_trace_is_silent(clean: list[Ids]) -> None:
    assert findings(clean) == []
    assert findings(clean, decode_start=40, prompt_len=40) == []
    assert findings(clean[:1]) == []
    assert findings(routed(40, 30, seed=1)) == []


# --- copies of rows ---------------------------------------------------------------------------------------------------


def dummy(rows: int, seed: int = 99) -> Ids:
    return np.repeat(routed(1, 1, seed=seed)[0], rows, axis=0)


def test_warm_up_rows_at_the_start(clean: list[Ids]) -> None:
    [found] = findings([clean[0], np.concatenate([dummy(500), clean[1]]), *clean[2:]])
    assert (found.severity, found.finding) == ("serious", "warm-up")
    assert found.where == "request 'r1', leading rows"
    assert "500 rows (14.8 %)" in found.evidence
    assert "--drop-warmup" in found.remedy


def test_warm_up_requests_and_two_thirds_of_the_rows(clean: list[Ids]) -> None:
    passes = [dummy(2000), dummy(2000)]
    [found] = findings([*passes, *clean[:8]])
    assert (found.severity, found.finding) == ("serious", "warm-up")
    assert found.where == "requests 'r0' and 'r1', leading rows".replace(" and ", ", ")
    assert "4,000 rows (67.6 %)" in found.evidence


def test_padding_slots_among_the_rows(clean: list[Ids]) -> None:
    rng = np.random.default_rng(3)
    holed = [np.where((rng.random(len(ids)) < 0.5)[:, None, None], dummy(1), ids) for ids in clean]
    assert ("serious", "warm-up") in names(findings(holed))


def test_a_few_equal_rows_at_the_start_are_no_warm_up(clean: list[Ids]) -> None:
    assert findings([np.concatenate([dummy(12), clean[0]]), *clean[1:]]) == []
    few = findings([np.concatenate([dummy(30), clean[0]]), *clean[1:]])
    assert names(few) == {("warning", "warm-up")}  # 1 % of the rows: it moves no headline number


def test_copies_of_the_last_row(clean: list[Ids]) -> None:
    padded = [np.concatenate([ids, np.repeat(ids[-1:], 40, axis=0)]) for ids in clean[:3]] + clean[3:]
    found = next(f for f in findings(padded) if f.finding == "filler-rows")
    assert found.severity == "serious"
    assert found.where == "requests 'r0', 'r1' and 1 more, last rows"
    assert "120 rows" in found.evidence


def test_one_token_again_and_again_is_not_filler(clean: list[Ids]) -> None:
    ids = np.concatenate([clean[0], np.repeat(clean[0][-1:], 40, axis=0)])
    tokens = np.concatenate([np.arange(len(clean[0]) - 1), np.full(41, 7)])
    checker = Checker(meta())
    checker.add(Request("r", ids, token_ids=tokens))
    for i, other in enumerate(clean[1:]):
        checker.add(Request(f"o{i}", other))
    assert "filler-rows" not in {f.finding for f in checker.findings()}


def test_rows_of_consecutive_ids(clean: list[Ids]) -> None:
    ids = clean[2].copy()
    ids[100:130] = np.arange(K)
    [found] = findings([*clean[:2], ids, *clean[3:]])
    assert found.finding == "filler-rows"
    assert found.where == "request 'r2' from row 100"
    assert "30 rows" in found.evidence


@pytest.mark.parametrize("period", [1, 5, 12, 20, 40])
def test_loops(clean: list[Ids], period: int) -> None:
    rng = np.random.default_rng(period)

    def loop(ids: Ids) -> Ids:
        repeated = ids[100 + np.arange(len(ids) - 100) % period]
        other = (rng.random(repeated.shape[:2]) < 0.1)[..., None]  # some sets differ, as in real loops
        return np.concatenate([ids[:100], np.where(other, ids[100:], repeated)])

    one = findings([loop(clean[0]), *clean[1:]], decode_start=20)
    assert names(one) == {("warning", "loops")}
    assert "request 'r0' from row" in one[0].where
    many = findings([loop(ids) for ids in clean], decode_start=20)
    assert ("serious", "loops") in names(many)
    assert findings([loop(clean[0]), *clean[1:]], decode_start=240) == []  # a prompt may repeat itself


def test_loops_of_a_long_period_come_back_twice(clean: list[Ids]) -> None:
    thrice = [np.tile(ids[:150], (3, 1, 1)) for ids in clean]
    [found] = findings(thrice)
    assert (found.severity, found.finding) == ("serious", "loops")
    assert found.evidence.startswith("100 % of 5,400 generated rows repeat earlier ones again and again; the clearest")
    assert "every 150 rows (100 % equal sets)" in found.evidence
    assert findings([np.concatenate([ids, ids[:150]]) for ids in clean]) == []  # a quotation


def test_identical_layers(clean: list[Ids]) -> None:
    copied = [ids.copy() for ids in clean]
    for ids in copied:
        ids[:, 4] = ids[:, 1]
    [found] = [f for f in findings(copied) if f.finding == "identical-layers"]
    assert found.remedy.startswith("Ingest with --layers 0-3,5 if layer 1 is right")
    assert (found.severity, found.where) == ("serious", "layers 1, 4")
    assert "2,880 of 2,880 rows" in found.evidence


def test_identical_requests(clean: list[Ids]) -> None:
    [few] = findings([*clean, clean[3]])
    assert (few.severity, few.finding) == ("warning", "identical-requests")
    assert few.where == "request 'r12' equals 'r3'"
    [many] = findings(clean + clean)
    assert many.severity == "serious"
    assert "12 requests of 24 (50 % of the rows)" in many.evidence


def test_constant_layers(clean: list[Ids]) -> None:
    dense = [ids.copy() for ids in clean]
    for ids in dense:
        ids[:, 0] = [3, 9, 20, 5]
    [found] = findings(dense)  # it depends on no other layer, which is no second finding
    assert (found.severity, found.finding, found.where) == ("serious", "constant-layer", "layer 0")
    assert found.remedy == "Ingest with --layers 1-5"


# --- order ------------------------------------------------------------------------------------------------------------


def take_turns(arrays: Sequence[Ids], stride: int) -> list[Ids]:
    groups = [arrays[i : i + stride] for i in range(0, len(arrays) - stride + 1, stride)]
    return [np.stack(group, axis=1).reshape(-1, *group[0].shape[1:]) for group in groups]


@pytest.mark.parametrize("stride", [2, 3, 8, 12, 32])
def test_interleaved_requests(stride: int) -> None:
    arrays = routed(max(stride, 12), 300, seed=stride)
    [found] = findings(take_turns(arrays, stride))
    assert (found.severity, found.finding) == ("serious", "interleaved")
    assert f": {stride} sequences" in found.where
    assert found.remedy.startswith(f"Ingest with --deinterleave {stride} if the same sequences take turns throughout")


def test_batches_of_changing_size() -> None:
    rng = np.random.default_rng(0)
    arrays = routed(48, 300, seed=2)
    sizes = [int(size) for size in rng.integers(5, 14, size=10)]
    pieces = [take_turns([ids[30 * i : 30 * i + 30] for ids in arrays[:s]], s)[0] for i, s in enumerate(sizes)]
    found = findings([np.concatenate(pieces)])
    assert names(found) == {("warning", "batch-major")}


@pytest.mark.parametrize("offset", [-3, -1, 2])
def test_a_shifted_layer(clean: list[Ids], offset: int) -> None:
    shifted = []
    for ids in clean:
        moved = ids.copy()
        moved[:, 3] = np.roll(ids[:, 3], offset, axis=0)
        shifted.append(moved[4:-4])
    [found] = findings(shifted)
    assert (found.severity, found.finding) == ("serious", "shifted-layers")
    word = "late" if offset > 0 else "early"
    rows = f"{abs(offset)} row{'s' if abs(offset) > 1 else ''}"
    assert found.where == f"layer 3, all requests: {rows} too {word}"


def test_all_layers_from_one_on_are_shifted(clean: list[Ids]) -> None:
    shifted = [np.concatenate([ids[1:, :2], ids[:-1, 2:]], axis=1) for ids in clean]
    [found] = findings(shifted)
    assert found.where == "layers 2-5, all requests: 1 row too late"
    assert found.remedy == "Shift them back before saving, or ingest with --layers 0-1"


def test_a_layer_of_another_model(clean: list[Ids]) -> None:
    other = routed(12, 240, seed=77)
    foreign = [np.concatenate([o[:, :1], ids[:, 1:]], axis=1) for o, ids in zip(other, clean, strict=True)]
    [found] = findings(foreign)
    assert (found.severity, found.finding, found.where) == ("warning", "foreign-layer", "layer 0, all requests")


# --- ids and provenance -----------------------------------------------------------------------------------------------


def test_sorted_ids(clean: list[Ids]) -> None:
    [found] = findings([np.sort(ids, axis=2) for ids in clean])
    assert (found.severity, found.finding) == ("warning", "sorted-ids")


@pytest.mark.parametrize("experts", [32, 30])  # 30 is no multiple of k: rows hold the end of one ranking and the next
def test_whole_rankings_cut_into_rows(experts: int) -> None:
    rng = np.random.default_rng(0)
    rankings = rng.permuted(np.tile(np.arange(experts, dtype=np.uint8), (200, LAYERS, 1)), axis=2)
    flat = rankings.transpose(1, 0, 2).reshape(LAYERS, -1)
    ids = flat.reshape(LAYERS, -1, K).transpose(1, 0, 2)
    for rows in (ids, ids[3:]):  # the second starts in the middle of a ranking
        assert names(findings([rows], meta(num_experts=experts))) == {("serious", "argsort-view")}


def test_missing_rows(clean: list[Ids]) -> None:
    keep = np.r_[0:50, 90:240]
    checker = Checker(meta())
    for i, ids in enumerate(clean):
        positions = keep.astype(np.int64) if i == 4 else None
        checker.add(Request(f"r{i}", ids[keep] if i == 4 else ids, positions=positions))
    [found] = checker.findings()
    assert (found.severity, found.finding) == ("note", "missing-rows")
    assert found.where == "request 'r4', 40 rows from position 50"


def test_prompts_without_rows(clean: list[Ids]) -> None:
    [found] = findings(clean, prompt_len=64, first_pos=64, decode_start=64)
    assert (found.severity, found.finding) == ("warning", "prompt-dropped")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"native_top_k": 8}, ("warning", "reduced-top-k")),
        ({"id_space": "physical"}, ("serious", "physical-ids")),
        ({"engine": "vllm", "engine_version": "0.25.1"}, ("note", "engine-version")),
        ({"engine": "sglang", "engine_version": "v0.5.11"}, ("note", "engine-version")),
        ({"engine": "vllm", "engine_version": "0.26.0"}, None),
        ({"engine": "sglang", "engine_version": "0.5.15"}, None),
        ({"engine": "vllm", "engine_version": "nightly"}, None),
    ],
)
def test_provenance(clean: list[Ids], more: dict[str, Any], expected: tuple[str, str] | None) -> None:
    assert names(findings(clean, meta(**more))) == ({expected} if expected else set())


# --- no false alarms --------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["uniform", "skewed", "sticky", "topical"]),
    k=st.sampled_from([1, 2, 4, 8]),
    spare=st.sampled_from([0, 1, 2, 8, 56, 120, 300]),
    layers=st.integers(1, 6),
    requests=st.integers(1, 16),
    tokens=st.sampled_from([(3, 9), (20, 60), (100, 300)]),
    seed=st.integers(0, 2**63),
)
def test_clean_traces_are_never_serious(
    kind: str, k: int, spare: int, layers: int, requests: int, tokens: tuple[int, int], seed: int
) -> None:
    trace = synth(kind, num_experts=k + spare, top_k=k, layers=layers, requests=requests, tokens=tokens, seed=seed)
    checker = Checker(trace.meta)
    for request in trace.requests():
        checker.add(request)
    assert [f for f in checker.findings() if f.severity == "serious"] == []


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("traces/gptoss20b_subset64/trace.npz", {"num_experts": 32, "phase": "decode"}, set()),
        ("traces/glm45air_decode/trace.npz", {"num_experts": 128, "phase": "decode"}, {("warning", "sorted-ids")}),
        ("traces/gemma4_26b_route_trace/gemma.route.csv", {}, {("warning", "reduced-top-k")}),
        ("moe/traces/olmoe/npz/sampled-*", {}, set()),
        ("moe/traces/olmoe/npz/prefill-*", {}, {("warning", "identical-requests")}),  # four texts were drawn twice
        ("moe/traces/olmoe/npz/spec_greedy-*", {}, {("warning", "loops")}),
        ("moe/traces/vllm_olmoe", {"num_experts": 32}, {("warning", "loops")}),  # half of it is greedy
    ],
)
def test_real_traces(shared: Path, path: str, options: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    folder, _, pattern = path.rpartition("/")
    paths = sorted((shared / folder).glob(pattern))
    found = tk.check(paths, **options)
    assert set(zip(found["severity"], found["finding"], strict=True)) == expected


def test_copies_do_not_make_chance_significant() -> None:
    """Forty copies of the same independent rows, a row further each time, show as little as one."""
    rng = np.random.default_rng(0)
    once = np.argsort(rng.random((500, 20, 64)), axis=2)[..., :4].astype(np.uint8)
    found = findings([np.roll(once, i, axis=0) for i in range(40)], meta(20, num_experts=64))
    assert found == []


# --- chances ----------------------------------------------------------------------------------------------------------


def test_deviates_of_few_batches_are_cautious() -> None:
    assert z_limit(1) == pytest.approx(4.753, abs=1e-3)
    # t of 3 batches: mean 1, deviation 0.1 -> t = 17.3 with 2 degrees of freedom, a two-sided chance of 0.0033: z = 2.9
    assert z_score(np.array([0.9, 1.0, 1.1])) == pytest.approx(2.9, abs=0.15)
    rng = np.random.default_rng(0)
    scores = np.array([z_score(rng.standard_normal(20)) for _ in range(4000)])
    assert scores.mean() == pytest.approx(0, abs=0.06)
    assert scores.std() == pytest.approx(1, abs=0.05)


def test_the_chance_of_a_run_is_a_product() -> None:
    # 3 of 10 pairs repeat: 4/12 * 5/13 * 6/14 for a run of 4 rows
    assert np.exp(log_chance_of_repeats(4, 3, 10)) == pytest.approx(4 / 12 * 5 / 13 * 6 / 14)
    assert log_chance_of_repeats(1, 0, 0) == 0


@pytest.mark.parametrize(("k", "dtype"), [(1, np.uint8), (4, np.uint8), (8, np.uint8), (6, np.uint16), (10, np.uint16)])
def test_keys_are_equal_where_rows_are(k: int, dtype: type) -> None:
    rng = np.random.default_rng(k)
    ids = rng.integers(0, 250, (60, 3, k)).astype(dtype)
    ids[40] = ids[7]
    keys = request_keys(ids)
    assert keys.rows[40] == keys.rows[7]
    assert len(np.unique(keys.rows)) == 59
    swapped = ids.copy()
    swapped[[3, 4]] = ids[[4, 3]]
    assert (request_keys(swapped).layers != keys.layers).all()
    assert request_keys(swapped).request != keys.request
    assert request_keys(np.asfortranarray(ids)).request == keys.request


# --- sources, stores, mends -------------------------------------------------------------------------------------------


def save(path: Path, arrays: Sequence[Ids], **more: Any) -> Path:
    lens = np.array([len(ids) for ids in arrays], np.int32)
    np.savez(path, **{"expert_ids": np.concatenate(arrays), "request_lens": lens, "num_experts": N} | more)
    return path


READ = ["--axes", "tlk", "--phase", "decode"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def duplicate(ids: Ids) -> Ids:
    ids[5, 2] = 7
    return ids


def beyond(ids: Ids) -> Ids:
    ids[9, 1, 0] = N + 3
    return ids


def negative(ids: Ids) -> Ids:
    ids = ids.astype(np.int16)
    ids[3] = -1
    return ids


def zero_rows(ids: Ids) -> Ids:
    ids[17] = 0
    return ids


def padded(ids: Ids) -> Ids:
    ids[-9:] = np.arange(K)
    return ids


@pytest.mark.parametrize(
    ("fault", "name", "place"),
    [
        (duplicate, "duplicate-ids", "request 'trace/0', token row 5, layer 2"),
        (beyond, "ids-out-of-range", "token row 9, layer 1"),
        (negative, "negative-ids", "token row 3, layer 0"),
        (zero_rows, "duplicate-ids", "token row 17, layer 0"),
        (padded, "filler-rows", "request 'trace/0'"),
    ],
)
def test_what_ingest_refuses_is_a_finding(
    clean: list[Ids],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Ids], Ids],
    name: str,
    place: str,
) -> None:
    source = save(tmp_path / "trace.npz", [fault(clean[0].copy())])
    frame = tk.check(source, axes="tlk", phase="decode")
    assert frame.select("trace", "severity", "finding").row(0) == ("trace", "serious", name)
    assert frame["where"][0].endswith(place)
    with pytest.raises(SourceError) as refusal:
        tk.ingest(source, tmp_path / "S", axes="tlk", phase="decode")
    assert refusal.value.found in frame["evidence"][0]
    code, out, err = run(capsys, "check", source, *READ)
    assert (code, err) == (3, "")
    assert name in out


def test_ambiguous_axes_are_a_finding(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", np.argsort(np.random.default_rng(0).random((6, 6, 6, 8)), axis=3)[0, :, :, :4])
    found = tk.check(tmp_path / "trace.npy", num_experts=8)
    assert (found["severity"][0], found["finding"][0]) == ("serious", "ambiguous-axes")


def test_a_source_may_have_a_manifest_of_its_own(tmp_path: Path, clean: list[Ids]) -> None:
    save(tmp_path / "trace.npz", clean)
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert tk.check(tmp_path, axes="tlk", phase="decode").is_empty()
    (tmp_path / "manifest.json").write_text('{"format": "tracekit-store"}')
    with pytest.raises(StoreError):
        tk.check(tmp_path)
    with pytest.raises(UsageError, match="a store beside other sources"):
        tk.check([tmp_path, tmp_path / "trace.npz"])


def test_counts_show_little() -> None:
    checker = Checker(meta(histogram=True))
    checker.add(Histogram("a", np.ones((LAYERS, N), np.int64)))
    assert names(checker.findings()) == {("note", "counts-only")}


def test_masks_hold_each_expert_once() -> None:
    ids = np.array([[[0, 63]], [[64, 299]]], np.uint16)
    assert masks(ids, 300)[:, 0].T.tolist() == [[1 | 1 << 63, 0, 0, 0, 0], [0, 1, 0, 0, 1 << 43]]
    assert masks(np.array([[[1, 1025]]], np.uint16), 2000)[:1].tolist() == [[[2]]]  # shared from 1,024 experts on


def test_what_is_no_trace_is_an_error(tmp_path: Path, clean: list[Ids]) -> None:
    (tmp_path / "notes.txt").write_text("no trace")
    for path in (tmp_path / "notes.txt", tmp_path / "nothing"):
        with pytest.raises(SourceError):
            tk.check(path)
    np.savez(tmp_path / "n.npz", expert_ids=clean[0])
    with pytest.raises(SourceError, match="--num-experts"):  # an option is missing: nothing is known to be wrong
        tk.check(tmp_path / "n.npz", axes="tlk")
    with pytest.raises(UsageError, match="names a trace of a store"):
        tk.check(tmp_path / "n.npz", trace="t")


def test_dense_layers_are_noted(clean: list[Ids], tmp_path: Path) -> None:
    source = save(tmp_path / "trace.npz", [np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1) for ids in clean])
    found = tk.check(source, axes="tlk", phase="decode")
    assert found.select("severity", "finding", "where").rows() == [("note", "dense-layers", "layer 0")]


@pytest.fixture
def faulty(clean: list[Ids], tmp_path: Path) -> Path:
    arrays = take_turns(clean, 4)
    return save(tmp_path / "trace.npz", [np.sort(ids, axis=2) for ids in arrays])


def test_ingest_keeps_findings_and_later_commands_repeat_them(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "S"
    code, out, err = run(capsys, "ingest", faulty, *READ, "--store", store, "--name", "chat")
    assert (code, out) == (3, "")
    assert "Serious: interleaved: all requests: 4 sequences" in err
    assert "Warning: sorted-ids" in err
    info = tk.open(store).trace()
    assert names(info.findings) == {("serious", "interleaved"), ("warning", "sorted-ids")}
    view = tk.open(store).sql("SELECT * FROM findings ORDER BY severity")
    assert view.columns == ["trace", "severity", "finding", "where", "evidence", "effect", "remedy"]
    assert view["finding"].to_list() == ["interleaved", "sorted-ids"]
    for command in (
        ["windows", store],
        ["autocorr", store],
        ["attribution", store],
        ["load", store],
        ["summary", store],
        ["chart", store, "windows", "-o", tmp_path / "c.json"],
        ["query", store, "unique_experts_by_window"],
        ["query", store, "summary"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 0
        lines = [line for line in err.splitlines() if "interleaved" in line]
        assert len(lines) == 1
        assert lines[0].startswith("Warning: trace 'chat': interleaved")
        assert "sorted-ids" not in err
    assert "interleaved" not in run(capsys, "windows", store, "--quiet")[2]
    with pytest.warns(TracekitWarning, match="deinterleave 4"):
        tk.windows(store, intervals=False)
    code, out, _ = run(capsys, "info", store)
    assert "serious: interleaved" in " ".join(out.split())
    code, out, err = run(capsys, "check", store)
    assert (code, err) == (3, "")
    same = tk.check(store)
    assert same["finding"].to_list() == ["interleaved", "sorted-ids"]
    assert same["evidence"].to_list() == [f.evidence for f in info.findings]


def test_the_table_fits_a_terminal(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", faulty, *READ)
    assert code == 3
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("serious: interleaved\n  where     all requests: 4 sequences take turns")
    assert out.count("\n  remedy ") == 2
    code, out, _ = run(capsys, "check", faulty, *READ, "--format", "json")
    assert [row["finding"] for row in json.loads(out)] == ["interleaved", "sorted-ids"]


def test_warnings_alone_exit_with_0(clean: list[Ids], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "trace.npz", [np.sort(ids, axis=2) for ids in clean])
    assert run(capsys, "check", source, *READ)[0] == 0
    assert run(capsys, "ingest", source, *READ, "--store", tmp_path / "S")[0] == 0
    assert "warning: sorted-ids" in run(capsys, "info", tmp_path / "S")[1]
    sound = save(tmp_path / "sound.npz", clean)
    assert run(capsys, "check", sound, *READ) == (0, "nothing was found\n", "")
    assert run(capsys, "check", sound, *READ, "--format", "json") == (0, "[]\n", "Note: nothing was found\n")
    _, _, err = run(capsys, "ingest", save(tmp_path / "one.npz", clean[:1]), *READ, "--store", tmp_path / "S1")
    assert "has 1 request, 240 tokens" in err
    assert run(capsys, "info", tmp_path / "S1")[1].split()[-2:] == ["findings", "none"]
    frame = tk.check(sound, axes="tlk", phase="decode")
    assert frame.is_empty()
    assert frame.schema == dict.fromkeys(frame.columns, pl.String)


def test_deinterleave(faulty: Path, clean: list[Ids], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "ingest", faulty, *READ, "--store", tmp_path / "S", "--deinterleave", 4)
    assert code == 0
    note = "Note: --deinterleave 4 made 12 requests of 3 requests: 2,880 rows were put into their sequences"
    assert note in err
    store = tk.open(tmp_path / "S")
    assert "interleaved" not in {f.finding for f in store.trace().findings}
    requests = store.sql("SELECT * FROM requests ORDER BY request")
    assert requests["request_id"].to_list()[:5] == ["trace/0/0", "trace/0/1", "trace/0/2", "trace/0/3", "trace/1/0"]
    assert requests["first_pos"].unique().to_list() == [0]
    assert requests["n_decode"].to_list() == [240] * 12
    rows = store.sql("SELECT experts FROM routing WHERE request = 6 ORDER BY pos, layer")["experts"].to_list()
    assert np.array_equal(np.array(rows).reshape(240, LAYERS, K), np.sort(clean[6], axis=2))


def test_drop_warmup(clean: list[Ids], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = np.concatenate([clean[1][:100], dummy(60), clean[1][100:]])
    arrays = [dummy(400), np.concatenate([dummy(300), clean[0]]), late, *clean[2:]]
    source = save(tmp_path / "trace.npz", arrays)
    assert run(capsys, "check", source, *READ)[0] == 3
    assert run(capsys, "check", source, *READ, "--drop-warmup")[0] == 0
    code, _, err = run(capsys, "ingest", source, *READ, "--store", tmp_path / "S", "--drop-warmup")
    assert code == 0
    assert "Note: --drop-warmup dropped 760 rows of 3 requests, 1 of them as a whole" in err
    store = tk.open(tmp_path / "S")
    assert "warm-up" not in {f.finding for f in store.trace().findings}
    requests = store.sql("SELECT request_id, first_pos, n_tokens FROM requests ORDER BY request").rows()
    assert requests[:2] == [("trace/1", 300, 240), ("trace/2", 0, 240)]
    positions = store.sql("SELECT pos FROM routing WHERE request = 1 AND layer = 0 ORDER BY pos")["pos"]
    assert positions.to_list() == [*range(100), *range(160, 300)]


def test_layers(clean: list[Ids], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = [np.concatenate([ids, ids[:, 2:3]], axis=1) for ids in clean]
    source = save(tmp_path / "trace.npz", copied)
    assert tk.check(source, axes="tlk", phase="decode")["finding"].to_list() == ["identical-layers"]
    code, _, err = run(capsys, "ingest", source, *READ, "--store", tmp_path / "S", "--layers", "0-1,3-6")
    assert code == 0
    assert "Note: --layers kept 6 of 7 layers: 0-1, 3-6" in err
    store = tk.open(tmp_path / "S")
    assert store.trace().meta.layers == (0, 1, 3, 4, 5, 6)
    rows = store.sql("SELECT experts FROM routing WHERE request = 3 AND layer = 6 ORDER BY pos")["experts"].to_list()
    assert np.array_equal(np.array(rows), clean[3][:, 2])
    code, _, err = run(capsys, "ingest", source, *READ, "--store", tmp_path / "T", "--layers", "0-9")
    assert (code, (tmp_path / "T").exists()) == (2, False)
    assert "does not have: 7-9; expected some of 0-6" in err


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2", "5-2", "1-999999", "1 2"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--layers"):
        parse_layers(text)


class Given:
    """A source of requests that are given."""

    done_bytes = total_bytes = 0
    notes: Sequence[str] = ()

    def __init__(self, shape: TraceMeta, *requests: Request) -> None:
        self.meta, self._requests = shape, requests

    def records(self) -> Any:
        return iter(self._requests)


def test_mends_keep_what_belongs_to_the_rows(clean: list[Ids]) -> None:
    ids = np.concatenate([dummy(20), clean[0][:30]])
    steps = VerifySteps(
        start_pos=np.array([5, 28]),
        n_rows=np.array([2, 3]),
        n_accepted=np.array([0, 2]),
        ids=np.concatenate([ids[5:7], ids[28:31]]),
    )
    weights = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    request = Request("r", ids, prompt_len=25, decode_start=25, token_ids=np.arange(50), weights=weights, steps=steps)
    [one] = Mended(Given(meta(), request), Mends(drop_warmup=True)).requests()
    assert (one.first_pos, one.positions, one.decode_start, len(one.ids)) == (20, None, 25, 30)
    assert one.token_ids.tolist() == list(range(20, 50))
    assert np.array_equal(one.weights, weights[20:])
    assert (one.steps.start_pos.tolist(), len(one.steps.ids)) == ([28], 3)
    [two] = Mended(Given(meta(), request), Mends(layers=(1, 4))).requests()
    assert np.array_equal(two.ids, ids[:, [1, 4]])
    assert np.array_equal(two.weights, weights[:, [1, 4]])
    assert two.steps.ids.shape == (5, 2, K)
    parts = list(Mended(Given(meta(), replace(request, steps=None)), Mends(deinterleave=3)).requests())
    assert [len(p.ids) for p in parts] == [17, 17, 16]
    # Decode begins at row 25: rows 25, 28, … are number 8 on of the second sequence, 27 is number 9 of the first.
    assert [p.decode_start for p in parts] == [9, 8, 8]
    assert parts[1].token_ids.tolist() == list(range(1, 50, 3))
    with pytest.raises(SourceError, match="verification steps"):
        list(Mended(Given(meta(), request), Mends(deinterleave=3)).requests())


def test_a_store_without_findings_opens_as_before(clean: list[Ids], tmp_path: Path) -> None:
    tk.ingest(save(tmp_path / "trace.npz", clean), tmp_path / "S", axes="tlk", phase="decode")
    path = tmp_path / "S" / "manifest.json"
    data = json.loads(path.read_text())
    assert data["traces"][0].pop("findings") == []
    path.write_text(json.dumps(data))
    store = tk.open(tmp_path / "S")
    assert store.trace().findings == ()
    assert store.sql("SELECT * FROM findings").is_empty()
    data["traces"][0]["findings"] = [{"severity": 3}]
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="damaged manifest"):
        tk.open(tmp_path / "S")


def test_appending_adds_findings(clean: list[Ids], faulty: Path, tmp_path: Path) -> None:
    store = tmp_path / "S"
    tk.ingest(save(tmp_path / "sound.npz", clean), store, name="t", axes="tlk", phase="decode", router_order=False)
    assert tk.open(store).trace().findings == ()
    appended = tk.ingest(faulty, store, name="t", axes="tlk", phase="decode", append=True)
    assert names(appended.findings) == {("serious", "interleaved"), ("warning", "sorted-ids")}


def test_a_store_is_checked_as_its_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: list[Ids]) -> None:
    """Requests that are split between parts, with gaps and token ids, come back whole."""
    from tracekit.store import recheck, writer

    monkeypatch.setattr("tracekit.store.segment.PART_ROWS", 700)  # 240 tokens x 6 layers are 1,440 rows
    keep = np.r_[0:50, 90:240].astype(np.int64)
    requests = [
        Request("a", clean[0], first_pos=7, decode_start=50, prompt_len=50, token_ids=np.arange(240)),
        Request("b", clean[1][keep], positions=keep),
        Request("c", clean[2][:20], token_ids=np.arange(20)),
    ]
    writer.write_trace(tmp_path / "S", "t", meta(), requests)
    store = tk.open(tmp_path / "S")
    back = [replace(r, ids=r.ids.copy()) for r in recheck.requests(store, store.trace())]
    for request, again in zip(requests, back, strict=True):
        assert np.array_equal(again.ids, request.ids)
        assert (again.request_id, again.decode_start, again.prompt_len) == (
            request.request_id,
            request.decode_start,
            request.prompt_len,
        )
        assert (again.positions is None) == (request.positions is None)
        assert again.positions is None or again.positions.tolist() == keep.tolist()
        assert (again.token_ids is None) == (request.token_ids is None)
        assert again.token_ids is None or again.token_ids.tolist() == request.token_ids.tolist()
    assert back[0].first_pos == 7
