"""Lengths, phases and labels that a trace does not have: refused if asked for, said if it is the default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.errors import TracekitWarning, UnsupportedError, UsageError
from tracekit.reports.charts import chart


def save(
    store: Path, name: str, lengths: Sequence[int], *, labels: Sequence[str] = (), prompt: int = 0, phase: Any = None
) -> None:
    """Ingest requests of these lengths, the first tokens of each its prompt, N = 8, k = 2, 2 layers."""
    ids = np.argsort(np.random.default_rng(0).random((sum(lengths), 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    source = store.parent / f"{name}.npz"
    np.savez(source, expert_ids=ids, request_lens=np.array(lengths, np.int32))
    sidecar = [{"request_id": f"{name}{i}", "prompt_len": prompt} for i in range(len(lengths))]
    for entry, label in zip(sidecar, labels, strict=False):
        entry["label"] = label  # type: ignore[assignment]
    known = {} if phase else {"requests": sidecar, "label_fields": ["label"] if labels else []}
    tk.ingest(source, store, name=name, num_experts=8, phase=phase, **known)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of 5, 5, 5, 5, 2 and 3 decode tokens after a prompt of 2."""
    store = tmp_path_factory.mktemp("short") / "store"
    save(store, "short", [7, 7, 7, 7, 4, 5], labels=["a", "a", "a", "a", "b", "b"], prompt=2)
    return store


def heard(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return a result and what was warned about, but for what holds of any few requests."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracekitWarning)
        result = run()
    return result, [text for w in caught if "interval" not in (text := str(w.message))]


def windows_of(store: Path, **arguments: Any) -> list[int]:
    return tk.windows(store, **arguments)["window"].unique().sort().to_list()


# Lengths


@pytest.mark.parametrize(
    ("ask", "tokens", "remedy"),
    [
        (lambda s: tk.windows(s, max_window=9), 9, "windows of at most 5 tokens"),
        (lambda s: tk.windows(s, max_window=6, overlapping=False), 6, "windows of at most 5 tokens"),
        (lambda s: tk.windows(s, max_window=6, by="label"), 6, "windows of at most 5 tokens"),
        (lambda s: tk.attribution(s, window=6), 6, "windows of at most 5 tokens"),
        (lambda s: tk.summary(s, window=6), 6, "windows of at most 5 tokens"),
        (lambda s: chart(s, "batch", window=6), 6, "windows of at most 5 tokens"),
        (lambda s: tk.autocorr(s, max_lag=5), 6, "lags of at most 4 tokens"),
        (lambda s: chart(s, "layer-lag", max_lag=7), 8, "lags of at most 4 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_length_that_no_request_has_is_refused(ask: Any, tokens: int, remedy: str, short: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ask(short)
    found = f"no request has {tokens} consecutive decode tokens: the longest run has 5"
    lag = remedy.startswith("lags")
    # What there is of the longest is what it finds, once asked for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracekitWarning)
        longest = tk.autocorr(short, max_lag=4)["n_pairs"] if lag else tk.windows(short, max_window=5)["n_windows"]
    there = f"the trace has {longest.min()} such {'pairs' if lag else 'windows'} per layer, and 0 of {tokens - lag}"
    assert str(caught.value) == f"{found}. Use {remedy}: {there}"


def test_the_phase_decides_what_fits(short: Path) -> None:
    with pytest.raises(UnsupportedError, match="3 consecutive prefill tokens: the longest run has 2"):
        tk.windows(short, phase="prefill", max_window=3)
    with pytest.raises(UnsupportedError, match="6 consecutive tokens: the longest run has 5"):
        tk.windows(short, phase="all", max_window=6)
    with pytest.raises(UsageError, match="at least 1"):
        tk.windows(short, max_window=0)
    with pytest.raises(UsageError, match="at least 2"):
        tk.attribution(short, window=1)


def test_a_default_is_as_long_as_the_trace_has(short: Path) -> None:
    few = "no request has 6 consecutive decode tokens"
    frame, notes = heard(lambda: tk.windows(short))
    assert frame["window"].to_list() == [1, 2, 3, 4, 5]
    assert frame["observed"].null_count() == 0
    assert notes == [f"windows of at most 5 tokens instead of 8: {few}"]
    frame, notes = heard(lambda: tk.autocorr(short))
    assert frame["lag"].to_list() == [1, 2, 3, 4]
    assert notes == [f"lags of at most 4 tokens instead of 32: {few}"]
    frame, notes = heard(lambda: tk.attribution(short, phase="prefill"))
    assert frame["window"].unique().to_list() == [2]
    assert notes == ["windows of at most 2 tokens instead of 4: no request has 3 consecutive prefill tokens"]


def test_requests_that_are_too_short_are_counted(short: Path) -> None:
    assert heard(lambda: tk.windows(short, max_window=2))[1] == []
    for ask in (lambda: tk.windows(short, max_window=4), lambda: tk.autocorr(short, max_lag=3)):
        notes = heard(ask)[1]
        name = "windows" if "window" in notes[0] else "lags"
        assert notes == [f"fewer than 4 consecutive decode tokens in 2 of 6 requests: longer {name} leave them out"]


def test_a_batch_larger_than_the_requests_is_said_to_be_null(short: Path) -> None:
    frame, notes = heard(lambda: tk.windows(short, max_window=3, batch_size=[2, 6, 64]))
    which = "batch size 6, 64 is null for windows of 3 tokens"
    n_windows = frame.filter(batch_size=2, window=3)["n_windows"].item()
    assert notes[-1] == f"{which}: fewer requests have one (5, with {n_windows} windows per layer)"
    null = frame.filter(pl.col("observed").is_null(), window=3)
    assert null["batch_size"].to_list() == [6, 64]
    notes = heard(lambda: tk.windows(short, max_window=2, batch_size=4, by="label"))[1]
    assert notes[-1] == "batch size 4 is null for windows of 2 tokens: fewer requests have one (2 under some labels)"


def test_the_summary_and_the_charts_of_short_requests_take_what_there_is(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "short", [3] * 6, phase="decode")
    save(store, "long", [9] * 6, phase="decode")
    page, notes = heard(lambda: tk.summary(store))
    assert (
        "trace 'short': windows of at most 3 tokens instead of 4: no request has 4 consecutive decode tokens" in notes
    )
    sections = {trace: " ".join(part["section"].unique()) for (trace,), part in page.group_by("trace")}
    for name, window in (("short", 3), ("long", 4)):
        for section in ("unique experts", "share of the drop", "reduction in a batch"):
            assert f"{section}, T = {window}" in sections[name]
    drawn = {kind: heard(lambda kind=kind: chart(store, kind))[0].to_dict() for kind in ("batch", "attribution")}  # type: ignore[misc]
    for kind, spec in drawn.items():
        assert "windows of 3, 4 tokens" in spec["title"]["text"], kind
        assert [panel.split(" · ")[1] for panel in spec["facet"]["sort"]] == ["T = 4", "T = 3"]
    [only] = heard(lambda: tk.query(store, "chart_batch", window=4))[0]["trace"].unique()
    assert only == "long"


# Shares below zero


def test_neighbours_that_avoid_each_other_are_a_negative_cause(tmp_path: Path) -> None:
    """Two pairs of experts in turn: 4 experts in 4 tokens, where a shuffle of them now and then misses a pair."""
    ids = np.tile(np.array([[[0, 1]], [[2, 3]]], np.uint8), (60, 1, 1))
    np.savez(tmp_path / "turns.npz", expert_ids=ids, request_lens=np.full(6, 20, np.int32))
    tk.ingest(tmp_path / "turns.npz", tmp_path / "store", num_experts=8, phase="decode", axes="tlk")
    page, _ = heard(lambda: tk.summary(tmp_path / "store", intervals=False))
    row = page.row(by_predicate=pl.col("measure") == "token order", named=True)
    assert row["value"] < 0
    assert row["note"].endswith("; negative: neighbours share fewer experts than in random order")


# Traces that cannot answer


def test_a_trace_that_cannot_answer_is_left_out_of_several(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, "labelled", [9] * 5, labels="abbab", prompt=2)
    save(store, "bare", [6] * 5, phase="decode")
    for ask, who, why in (
        ({"by": "label"}, "bare", "no request of this trace has a label"),
        ({"phase": "prefill", "max_window": 2}, "bare", "no prefill tokens in this trace"),
        ({"max_window": 7}, "bare", "no request has 7 consecutive decode tokens: the longest run has 6"),
    ):
        frame, notes = heard(lambda ask=ask: tk.windows(store, **ask))  # type: ignore[misc]
        assert frame["trace"].unique().to_list() == ["labelled"]
        assert f"trace {who!r} is left out: {why}" in notes
        with pytest.raises(UnsupportedError, match=f"^{why}"):
            tk.windows(store, trace=who, **ask)
    with pytest.raises(UnsupportedError, match=r"^trace 'labelled': no request has 8 consecutive"):
        tk.windows(store, max_window=8)
