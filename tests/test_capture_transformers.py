"""Capture from transformers as far as it goes without torch: what is missing, prompts, and the rule of acceptance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.capture.default_vectors import DefaultVectors
from tracekit.capture.prompts import read_prompts
from tracekit.capture.speculative import Sampling, draw, verify
from tracekit.capture.transformers import Run
from tracekit.cli import main
from tracekit.errors import MissingDependencyError, SourceError, StoreError, TracekitError, UsageError
from tracekit.schema import Request, TraceMeta
from tracekit.store import write_trace

META = TraceMeta(num_experts=8, top_k=2, layers=(1, 3), source_format="transformers", engine="transformers")


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_is_named_with_the_pip_command(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "p.txt").write_text("hello\n")
    arguments = ["transformers", "some/model", "--prompts", str(tmp_path / "p.txt"), "--store", str(tmp_path / "s")]
    assert main(["capture", *arguments]) == 4
    error = capsys.readouterr().err
    assert f"{missing} is not installed" in error
    assert "pip install 'moe-tracekit[capture]'" in error
    assert not (tmp_path / "s").exists()


def test_recording_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="torch is not installed"), tk.record(object()):
        pass


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tracekit.cli import main\n"
        "assert main(['capture', 'transformers', '--help']) == 0\n"
        "import tracekit; tracekit.record, tracekit.capture_transformers\n"
        "assert not {'torch', 'transformers', 'polars', 'duckdb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--append", "--force"], "give one of them"),
        (["--draft", "d", "--teacher-forcing"], "give one of them"),
        (["--draft", "d", "--batch-size", "2"], "leave out --batch-size"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--label", "x"], "key=value"),
        (["--predict", "oracle"], "next-gate"),
        (["--predict-distance", "2"], "give --predict too"),
        (["--predict", "next-gate", "--predict-distance", "0"], "predict-distance"),
        (["--predict", "next-gate", "--default-vectors", "v.npz"], "give --predict quasi-hidden too"),
        (["--save-default-vectors", "v.npz"], "give --predict quasi-hidden too"),
        (["--predict", "quasi-hidden", "--default-vectors", "v", "--calibration-share", "1"], "give it alone"),
        (["--predict", "quasi-hidden", "--calibration-share", "0"], "calibration-share"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["capture", "transformers", "m", "--prompts", "p.txt", "--store", str(tmp_path / "s")]
    assert main([*common, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"draft_tokens": 2, "batch_size": 2},
        {"draft_tokens": 2, "teacher_forcing": True},
        {"predict": ("oracle",)},
        {"predict": ("next-gate",), "predict_distance": 0},
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Run(**wrong)  # type: ignore[arg-type]


def test_prompts_are_read_in_order_with_ids_and_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst line\r\n\nsecond\n")
    records = [
        "just text",
        {"prompt": "p", "id": 7, "domain": "code", "n": 3},
        {"messages": [{"role": "user", "content": "hi"}], "domain": "chat", "n": 4},
        {"token_ids": [1, 2], "request_id": "own", "domain": "raw", "n": 5},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r) for r in records[1:]))
    (tmp_path / "c.json").write_text(json.dumps(records[:1]))
    plain = read_prompts([tmp_path / "a.txt", tmp_path / "c.json"], labels={"x": "y"})
    assert [(p.request_id, p.text, dict(p.labels)) for p in plain] == [
        ("a-0", "first line", {"x": "y"}),
        ("a-1", "second", {"x": "y"}),
        ("c-0", "just text", {"x": "y"}),
    ]
    assert plain[1].where.endswith("a.txt:3")
    rich = read_prompts(tmp_path / "b.jsonl", label_fields=["n", "domain"])
    assert [(p.request_id, list(p.labels.items())) for p in rich] == [
        ("7", [("n", "3"), ("domain", "code")]),
        ("b-1", [("n", "4"), ("domain", "chat")]),
        ("own", [("n", "5"), ("domain", "raw")]),
    ]
    assert rich[1].messages == [{"role": "user", "content": "hi"}]
    assert rich[2].token_ids == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt"),
        ('{"prompt": ""}', "prompt is not what it should be"),
        ('{"prompt": 5}', "prompt is not what it should be"),
        ('{"token_ids": [1, -2]}', "token_ids is not what it should be"),
        ('{"token_ids": [true]}', "token_ids is not what it should be"),
        ('{"messages": [{"content": "x"}]}', "messages with a role each"),
        ('{"question": "x"}', "has no prompt"),
        ("[5]", "is a int"),
        ('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}', "request id '1'.*another id than in .*:1"),
        ('{"prompt": "x"', "is not JSON"),
    ],
)
def test_what_is_no_prompt_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_label_field_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "domain": "d", "lang": "l"}')
    with pytest.raises(SourceError, match=r"p\.jsonl:1: has no label field 'topic'; expected one of domain, lang"):
        read_prompts(tmp_path / "p.jsonl", label_fields=["topic"])


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".json", ".jsonl"]))
def test_any_bytes_are_prompts_or_an_error(data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    try:
        prompts = read_prompts(path)
    except TracekitError:
        return
    assert all((p.text is not None) + (p.messages is not None) + (p.token_ids is not None) == 1 for p in prompts)


def test_greedy_is_the_largest_logit() -> None:
    p = Sampling().distribution(np.array([[0.0, 2.0, 1.0], [5.0, 5.0, 4.0]]))
    np.testing.assert_array_equal(p, [[0, 1, 0], [1, 0, 0]])


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(Sampling(1.0).distribution(logits), [0.5, 0.3, 0.15, 0.05])
    # At temperature 1/2 probabilities are squared: .25 .09 .0225 .0025, of .365.
    np.testing.assert_allclose(Sampling(0.5).distribution(logits), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365)
    # .5 + .3 reaches .7, so two tokens are left.
    np.testing.assert_allclose(Sampling(1.0, 0.7).distribution(logits), [0.625, 0.375, 0, 0])
    # A draft model with one token less, and one with one more.
    np.testing.assert_allclose(Sampling(1.0).distribution(logits, 5), [0.5, 0.3, 0.15, 0.05, 0])
    np.testing.assert_allclose(Sampling(1.0).distribution(logits, 2), [0.625, 0.375])


def test_greedy_acceptance_takes_drafts_while_they_agree() -> None:
    def one(*tokens: int) -> np.ndarray:
        return np.eye(5)[list(tokens)]

    rng = np.random.default_rng(0)
    assert verify(one(1, 2, 3, 4), one(1, 2, 3), [1, 2, 3], rng) == (3, 4)
    assert verify(one(1, 2, 3, 4), one(1, 0, 3), [1, 0, 3], rng) == (1, 2)
    assert verify(one(1, 2, 3, 4), one(0, 2, 3), [0, 2, 3], rng) == (0, 1)
    assert verify(one(1), one()[:0].reshape(0, 5), [], rng) == (0, 1)


def test_sampled_acceptance_leaves_the_models_distribution() -> None:
    # Two drafts over four tokens. Whatever the draft model is, the first token out must be distributed as p0 and,
    # where the first draft was accepted, the second as p1; a draft is accepted with probability sum min(p, q).
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    q = np.array([[0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.5, 0.0]])
    rng, n = np.random.default_rng(11), 40_000
    first, second, accepted = np.zeros(4), np.zeros(4), np.zeros(3)
    for _ in range(n):
        drafts = [draw(q[0], rng), draw(q[1], rng)]
        count, after = verify(p, q, drafts, rng)
        accepted[count] += 1
        out = [*drafts[:count], after]
        first[out[0]] += 1
        if count:
            second[out[1]] += 1
    overlap = np.minimum(p[:2], q).sum(1)  # .6 and .2
    tolerance = 4 * 0.5 / np.sqrt(n * 0.6)  # four standard errors
    np.testing.assert_allclose(accepted / n, [0.4, 0.6 * 0.8, 0.6 * 0.2], atol=tolerance)
    np.testing.assert_allclose(overlap, [0.6, 0.2])
    np.testing.assert_allclose(first / n, p[0], atol=tolerance)
    np.testing.assert_allclose(second / second.sum(), p[1], atol=tolerance)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(any), st.integers(0, 2**32))
def test_a_draw_has_a_positive_probability(weights: list[float], seed: int) -> None:
    p = np.array(weights) / sum(weights)
    assert p[draw(p, np.random.default_rng(seed))] > 0


def default_vectors(**changed: Any) -> dict[str, Any]:
    """Arrays of a file of default vectors: two layers, three experts, four elements."""
    arrays = {
        "vectors": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "tokens": np.array([[5, 0, 1], [2, 2, 2]]),
        "layers": np.array([1, 3]),
    } | changed
    return {name: array for name, array in arrays.items() if array is not None}


def test_default_vectors_come_back_from_their_file(tmp_path: Path) -> None:
    arrays = default_vectors()
    held = DefaultVectors((1, 3), arrays["vectors"], arrays["tokens"])
    held.save(tmp_path / "v.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["v.npz"]
    with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
        assert {name: file[name].tolist() for name in file} == {n: a.tolist() for n, a in arrays.items()}
    read = DefaultVectors.read(tmp_path / "v.npz")
    assert read.layers == (1, 3)
    np.testing.assert_array_equal(read.vectors, held.vectors)
    np.testing.assert_array_equal(read.tokens, held.tokens)
    assert read.described == {"activations": 6, "experts": 6, "without_tokens": 1}
    with pytest.raises(SourceError, match=r"v\.npz: is there already.*--default-vectors"):
        held.save(tmp_path / "v.npz")
    with pytest.raises(SourceError, match="cannot be written"):
        held.save(tmp_path / "no folder" / "v.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": None}, "has no array 'tokens'; expected default vectors"),
        ({"vectors": np.zeros((2, 3, 4), np.int8)}, r"v\.npz\[vectors\]: is int8 of shape \(2, 3, 4\)"),
        ({"vectors": np.zeros((2, 3))}, r"is float64 of shape \(2, 3\); expected floats of 3 axes"),
        ({"vectors": np.zeros((2, 4, 4))}, r"has vectors \(2, 4, 4\), tokens \(2, 3\) and 2 layers"),
        ({"layers": np.array([1, 2, 3])}, "and 3 layers"),
        ({"layers": np.array([3, 1])}, r"has the layers \[3, 1\]"),
        ({"layers": np.array([-1, 1])}, r"has the layers \[-1, 1\]"),
        ({"vectors": np.full((2, 3, 4), np.nan)}, "not finite"),
        ({"vectors": np.zeros((2, 3, 0))}, r"has vectors \(2, 3, 0\)"),
        ({"vectors": np.full((2, 3, 4), None)}, "Python objects"),
    ],
)
def test_what_are_no_default_vectors_is_said(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "v.npz", **default_vectors(**changed))
    with pytest.raises(SourceError, match=message):
        DefaultVectors.read(tmp_path / "v.npz")


@given(places=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_default_vectors_are_an_error_or_default_vectors(
    places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez(path, **default_vectors())
    content = bytearray(path.read_bytes())
    for at, byte in places:
        content[at % len(content)] = byte
    path.write_bytes(content)
    try:
        read = DefaultVectors.read(path)
    except TracekitError:
        return
    assert read.vectors.shape[:2] == read.tokens.shape == (len(read.layers), read.tokens.shape[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict": "next-gate", "default_vectors": "v.npz"}, "which nothing needs"),
        ({"predict": "quasi-hidden", "default_vectors": "a", "save_default_vectors": "b"}, "one of the two"),
        ({"predict": ["next-gate", "quasi-hidden"], "calibration_share": 0}, "calibration_share is 0"),
    ],
)
def test_default_vectors_that_cannot_be_are_refused_before_the_model_is_loaded(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(UsageError, match=message):
        tk.capture_transformers("some/model", tmp_path / "p.txt", tmp_path / "s", **options)


def requests(count: int, ids: np.ndarray | None = None) -> list[Request]:
    rows = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[7, 0], [1, 2]]], np.uint8) if ids is None else ids
    return [Request(f"r{i}", rows, prompt_len=2, decode_start=2) for i in range(count)]


def test_requests_from_no_file_become_a_trace(tmp_path: Path) -> None:
    notes: list[str] = []

    def made() -> object:
        yield from requests(2)
        notes.append("made two")

    info = write_trace(tmp_path, "live", META, made(), sources=["p.txt"], notes=notes)  # type: ignore[arg-type]
    assert (info.requests, info.tokens, info.notes, [s.name for s in info.segments[0].sources]) == (
        2,
        6,
        ("made two",),
        ["p.txt"],
    )
    found = tk.open(tmp_path).sql("SELECT layer, pos, experts FROM routing WHERE request = 1 ORDER BY ALL").rows()
    assert [(layer, pos, list(experts)) for layer, pos, experts in found] == [
        (1, 0, [0, 1]), (1, 1, [4, 5]), (1, 2, [7, 0]), (3, 0, [2, 3]), (3, 1, [6, 7]), (3, 2, [1, 2]),
    ]  # fmt: skip
    more = [Request("r2", requests(1)[0].ids)]
    assert write_trace(tmp_path, "live", META, more, append=True).requests == 3
    assert write_trace(tmp_path, "live", META, requests(1), force=True).requests == 1


def test_a_trace_that_fails_midway_leaves_no_store(tmp_path: Path) -> None:
    def failing() -> object:
        yield from requests(1)
        raise RuntimeError("the model fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_trace(tmp_path / "s", "live", META, failing())  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "ids", [np.zeros((3, 2, 3), np.uint8), np.zeros((3, 1, 2), np.uint8), np.full((3, 2, 2), 8, np.uint8)]
)
def test_requests_that_do_not_fit_the_trace_are_refused(tmp_path: Path, ids: np.ndarray) -> None:
    with pytest.raises(SourceError, match=r"expected \[tokens, 2, 2\] below 8"):
        write_trace(tmp_path / "s", "live", META, requests(1, ids))
    assert not (tmp_path / "s").exists()


def test_a_name_that_is_taken_is_refused_before_the_first_request(tmp_path: Path) -> None:
    write_trace(tmp_path, "live", META, requests(1))
    untouched = iter(requests(1))
    with pytest.raises(StoreError, match="there already"):
        write_trace(tmp_path, "live", META, untouched)
    assert next(untouched).request_id == "r0"
    with pytest.raises(StoreError, match="no trace named 'other'"):
        write_trace(tmp_path, "other", META, untouched, append=True)
    with pytest.raises(UsageError):
        write_trace(tmp_path, " ", META, untouched)
