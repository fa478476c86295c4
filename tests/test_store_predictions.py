"""Predictions beside the routing: what is checked, what the store keeps of them, and what SQL sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import SourceError
from tracekit.schema import Predictions, Request, TraceMeta
from tracekit.sources import READERS, RawRequest, Reader
from tracekit.sources.base import RawPredictions
from tracekit.store import spool, write_trace
from tracekit.store.manifest import damaged, read_manifest

Ingest = Callable[..., tk.TraceInfo]
NONE = 255


def routing(rows: int, layers: int = 3, top_k: int = 2, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    order = np.random.default_rng(seed).random((rows, layers, num_experts))
    return np.argsort(order, axis=2)[:, :, :top_k].astype(np.uint8)


def predicted(rows: int = 4, distance: int = 1, seed: int = 1, **shape: int) -> np.ndarray:
    ids = routing(rows, seed=seed, **shape)
    ids[:, :distance] = NONE
    return ids


def request(name: str = "a", rows: int = 4, *predictions: RawPredictions, **fields: object) -> RawRequest:
    fixed = {"ids": routing(rows), "axes": "tlk"}
    return RawRequest(where="made", request_id=name, predictions=predictions, **fixed | fields)  # type: ignore[arg-type]


def next_gate(rows: int = 4, distance: int = 1, **shape: int) -> RawPredictions:
    return RawPredictions("next_gate", distance, predicted(rows, distance, **shape))


@pytest.fixture
def ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    """Ingest raw requests as if a reader had yielded them."""
    source, made = tmp_path / "source", itertools.count()

    def run(raws: Sequence[RawRequest], store: str = "S", **options: object) -> tk.TraceInfo:
        reader = Reader("made", "", "", lambda *_: False, lambda *_: iter(raws))
        monkeypatch.setitem(READERS, "made", reader)
        fixed = {"source_format": "made", "name": "t", "num_experts": 8}
        source.write_text(f"made {next(made)}")  # not what the trace has already
        return tk.ingest(source, tmp_path / store, **fixed | options)  # type: ignore[arg-type]

    return run


def rows_of(store: Path) -> list[tuple[object, ...]]:
    return tk.open(store).sql("SELECT * FROM predictions ORDER BY request, distance DESC, layer, pos").rows()


# --- the store -----------------------------------------------------------------------------------


def test_a_prediction_is_a_row_of_the_layer_that_it_is_about(ingest: Ingest, tmp_path: Path) -> None:
    ids = np.array([[[NONE, NONE], [1, 5], [7, 0]], [[NONE, NONE], [NONE, NONE], [3, 4]]], np.uint8)
    raw = request("a", 2, RawPredictions("next_gate", 1, ids), first_pos=10)
    trace = ingest([raw, request("b")])
    assert trace.segments[0].has_predictions
    rows = tk.open(tmp_path / "S").sql("SELECT * FROM predictions ORDER BY ALL")
    assert rows.columns == ["trace", "request", "predictor", "distance", "layer", "pos", "predicted"]
    assert rows.rows() == [
        ("t", 0, "next_gate", 1, 1, 10, [1, 5]),
        ("t", 0, "next_gate", 1, 2, 10, [7, 0]),
        ("t", 0, "next_gate", 1, 2, 11, [3, 4]),
    ]


def test_info_and_the_view_traces_say_what_is_predicted(
    ingest: Ingest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RawPredictions("quasi_hidden", 1, predicted(seed=3))
    ingest([request("a", 4, next_gate(), next_gate(distance=2), other), request("b", 4, next_gate())])
    ingest([request("a")], name="without")
    store = tk.open(tmp_path / "S")
    assert store.sql("SELECT trace, predicted FROM traces ORDER BY trace").rows() == [("t", 2), ("without", None)]
    assert main(["info", str(tmp_path / "S"), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["predictors"] for row in rows] == ["next_gate (1, 2), quasi_hidden (1)", "none"]
    assert main(["info", str(tmp_path / "S"), "--trace", "t"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["predictors", "next_gate (1, 2), quasi_hidden (1)"] in lines


def test_the_file_is_sorted_and_its_columns_are_flat(ingest: Ingest, tmp_path: Path) -> None:
    other = RawPredictions("quasi_hidden", 1, predicted(seed=3))
    trace = ingest([request("a", 4, next_gate(), next_gate(distance=2), other), request("b", 4, next_gate())])
    frame = pl.read_parquet(tmp_path / "S" / "segments" / trace.segments[0].id / "predicted.parquet")
    assert dict(frame.schema) == {
        "request": pl.UInt32,
        "predictor": pl.String,
        "distance": pl.UInt8,
        "layer": pl.UInt16,
        "pos": pl.UInt32,
        "p0": pl.UInt8,
        "p1": pl.UInt8,
    }
    assert frame.equals(frame.sort("request", "predictor", "distance", "layer", "pos"))
    counts = frame.group_by("request", "predictor", "distance").len().sort("request", "predictor", "distance")
    assert counts["len"].to_list() == [8, 4, 8, 8]


def test_without_predictions_there_is_no_file_and_the_view_is_empty_and_typed(ingest: Ingest, tmp_path: Path) -> None:
    trace = ingest([request()])
    assert not trace.segments[0].has_predictions
    assert not (tmp_path / "S" / "segments" / trace.segments[0].id / "predicted.parquet").exists()
    assert dict(tk.open(tmp_path / "S").sql("FROM predictions").schema) == {
        "trace": pl.String,
        "request": pl.UInt32,
        "predictor": pl.String,
        "distance": pl.UInt8,
        "layer": pl.UInt16,
        "pos": pl.UInt32,
        "predicted": pl.List(pl.UInt16),
    }


def test_predictions_enter_no_metric_but_the_content(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request("a", 4, next_gate())], "with")
    ingest([request("a", 4, RawPredictions("other", 1, predicted()))], "named")
    ingest([request()], "without")
    assert tk.load(tmp_path / "with").equals(tk.load(tmp_path / "without"))
    digests = {tk.open(tmp_path / name).trace().content for name in ("with", "named", "without")}
    assert len(digests) == 3


def test_old_manifests_open(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request()])
    manifest = tmp_path / "S" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["traces"][0]["segments"][0]["predicted"]
    manifest.write_text(json.dumps(data))
    assert not tk.open(tmp_path / "S").trace().segments[0].has_predictions


def test_a_missing_file_is_damage(ingest: Ingest, tmp_path: Path) -> None:
    trace = ingest([request("a", 4, next_gate())])
    path = tmp_path / "S" / "segments" / trace.segments[0].id / "predicted.parquet"
    assert damaged(tmp_path / "S", read_manifest(tmp_path / "S")[0]) == []
    path.unlink()
    assert damaged(tmp_path / "S", read_manifest(tmp_path / "S")[0]) == [path]


def test_appended_requests_may_have_more_predicted_experts_or_none(ingest: Ingest, tmp_path: Path) -> None:
    ingest([request("a", 1, next_gate(1))])
    ingest([request("b", 1, next_gate(1, top_k=3))], append=True)
    ingest([request("c", 1)], append=True)
    sizes = tk.open(tmp_path / "S").sql("SELECT request, len(predicted) FROM predictions ORDER BY ALL").rows()
    assert sizes == [(0, 2), (0, 2), (1, 3), (1, 3)]


def test_what_does_not_fit_into_memory_waits_in_pieces(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raws = [request(f"r{i}", 4, next_gate(seed=i), next_gate(distance=2)) for i in range(9)]
    whole = ingest(raws, "whole")
    monkeypatch.setattr(spool, "SPOOL_ROWS", 10)
    pieces = ingest(raws, "pieces")
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "pieces")
    assert whole.content == pieces.content
    assert not list((tmp_path / "pieces").rglob("*piece*"))


def test_requests_from_no_file_are_held_against_the_trace(tmp_path: Path) -> None:
    meta = TraceMeta(num_experts=8, top_k=2, layers=(0, 1, 2), source_format="made")
    known = np.ones((4, 3), bool)
    for ids in (routing(3), routing(4) + 7):
        wrong = Request("a", routing(4), predictions=(Predictions("next_gate", 1, ids, known[: len(ids)]),))
        with pytest.raises(SourceError, match=r"predictions .* by 'next_gate'; expected \[4, 3, m\] below 8"):
            write_trace(tmp_path / "S", "t", meta, [wrong])


@given(data=st.data())
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("p")
    (folder / "source").write_text("made")
    m, raws, expected = data.draw(st.integers(2, 5)), [], []
    for i in range(data.draw(st.integers(1, 3))):
        rows, far = data.draw(st.integers(1, 6)), data.draw(st.sets(st.integers(1, 3), max_size=3))
        given_ = {d: routing(rows, top_k=m, seed=7 * i + d) for d in sorted(far)}
        for distance, ids in given_.items():
            holes = data.draw(st.lists(st.booleans(), min_size=rows * 3, max_size=rows * 3))
            ids[np.reshape(holes, (rows, 3))] = NONE
            for layer in range(3):
                for pos in range(rows):
                    if ids[pos, layer, 0] != NONE:
                        expected.append(("t", i, "next_gate", distance, layer, pos, ids[pos, layer].tolist()))
        raws.append(request(f"r{i}", rows, *(RawPredictions("next_gate", d, ids) for d, ids in given_.items())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "made", Reader("made", "", "", lambda *_: False, lambda *_: iter(raws)))
        tk.ingest(folder / "source", folder / "S", source_format="made", name="t", num_experts=8)
    assert tk.open(folder / "S").sql("FROM predictions ORDER BY ALL").rows() == sorted(expected)


# --- what is checked -----------------------------------------------------------------------------


def test_dense_layers_are_left_out_of_the_predictions_too(ingest: Ingest, tmp_path: Path) -> None:
    ids, guess = routing(4, 3), predicted()
    ids[:, 0] = guess[:, 0] = 0
    guess[:, 1] = NONE
    ingest([request("a", 4, RawPredictions("next_gate", 1, guess), ids=ids)])
    assert tk.open(tmp_path / "S").sql("SELECT DISTINCT layer FROM predictions").rows() == [(2,)]


def test_axes_follow_those_of_the_routing(ingest: Ingest, tmp_path: Path) -> None:
    guess = predicted()
    turned = RawPredictions("next_gate", 1, guess.transpose(1, 0, 2))
    ingest([request("a", 4, turned, ids=routing(4).transpose(1, 0, 2), axes="ltk")], "turned")
    ingest([request("a", 4, RawPredictions("next_gate", 1, guess))], "plain")
    assert rows_of(tmp_path / "turned") == rows_of(tmp_path / "plain")


@pytest.mark.parametrize(("dtype", "filler"), [("u1", 255), ("u2", 65535), ("i1", -1), ("i8", -1), (">u2", 65535)])
def test_no_prediction_is_the_largest_value_of_the_type_or_minus_one(
    ingest: Ingest, tmp_path: Path, dtype: str, filler: int
) -> None:
    guess = np.full((4, 3, 2), filler, dtype)
    guess[2, 1] = [6, 3]
    ingest([request("a", 4, RawPredictions("next_gate", 1, guess))])
    assert rows_of(tmp_path / "S") == [("t", 0, "next_gate", 1, 1, 2, [6, 3])]


def test_expert_255_of_256_can_be_predicted(ingest: Ingest, tmp_path: Path) -> None:
    guess = np.full((4, 3, 2), 255, np.uint8)
    guess[0, 2] = [255, 9]
    ingest([request("a", 4, RawPredictions("next_gate", 1, guess))], num_experts=256)
    assert rows_of(tmp_path / "S") == [("t", 0, "next_gate", 1, 2, 0, [255, 9])]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([RawPredictions("", 1, predicted())], "name of 0 characters"),
        ([RawPredictions("x" * 65, 1, predicted())], "name of 65 characters"),
        ([RawPredictions("x", 0, predicted())], "a distance of 0 MoE layers; expected 1 to 255"),
        ([RawPredictions("x", 256, predicted())], "a distance of 256"),
        ([next_gate(), next_gate()], "predictions twice"),
        ([next_gate(), next_gate(distance=2, top_k=3)], r"different numbers of experts: \[2, 3\]"),
        ([next_gate(3)], r"uint8 of shape \(3, 3, 2\); expected integers for 4 tokens, 3 layers"),
        ([next_gate(layers=2)], r"shape \(4, 2, 2\)"),
        ([RawPredictions("x", 1, predicted()[0])], r"shape \(3, 2\)"),
        ([RawPredictions("x", 1, predicted()[..., :0])], r"shape \(4, 3, 0\)"),
        ([RawPredictions("x", 1, np.zeros((4, 3, 9), np.uint8))], r"shape \(4, 3, 9\)"),
        ([RawPredictions("x", 1, predicted().astype(np.float32))], "float32"),
        ([RawPredictions("x", 1, np.full((4, 3, 2), [3, 8], np.uint8))], "of 8 experts"),
        ([RawPredictions("x", 1, np.full((4, 3, 2), [255, 3], np.uint8))], "of 8 experts"),
        ([RawPredictions("x", 1, np.full((4, 3, 2), 5, np.uint8))], "twice in one row"),
        ([RawPredictions("x", 1, np.full((4, 3, 2), -2))], "negative expert id"),
    ],
)
def test_predictions_that_fit_nothing_are_refused(
    ingest: Ingest, tmp_path: Path, wrong: list[RawPredictions], said: str
) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        ingest([request("a", 4, *wrong)])
    assert "predict" in str(caught.value)
    assert "request 'a'" in str(caught.value)
    assert not (tmp_path / "S").exists()


def test_a_fault_is_named_by_token_and_layer(ingest: Ingest) -> None:
    guess = predicted()
    guess[2, 1] = [1, 9]
    with pytest.raises(SourceError, match="from 1 MoE layers before, token row 2, layer 1"):
        ingest([request("a", 4, RawPredictions("next_gate", 1, guess))])


def test_one_predicted_expert_must_be_told_from_none(ingest: Ingest, tmp_path: Path) -> None:
    guess = np.full((4, 3, 1), 255, np.uint8)
    guess[0, 1] = 3
    with pytest.raises(SourceError, match="255 may be expert 255, or no prediction"):
        ingest([request("a", 4, RawPredictions("x", 1, guess))], num_experts=256)
    wide = guess.astype(np.uint16)
    wide[guess == 255] = 65535
    ingest([request("a", 4, RawPredictions("x", 1, wide))], num_experts=256)
    assert rows_of(tmp_path / "S") == [("t", 0, "x", 1, 1, 0, [3])]


def test_as_many_experts_in_every_request(ingest: Ingest, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names 3 experts; expected 2, as the predictions before it"):
        ingest([request("a", 4, next_gate()), request("b", 4, next_gate(top_k=3))])
    assert not (tmp_path / "S").exists()


# --- mends ---------------------------------------------------------------------------------------


def test_mends_take_the_predictions_along(ingest: Ingest, tmp_path: Path) -> None:
    raw = request("a", 6, next_gate(6))
    guess = raw.predictions[0].ids.tolist()
    ingest([raw], "layers", layers=[0, 2])
    assert rows_of(tmp_path / "layers") == [("t", 0, "next_gate", 1, 2, pos, guess[pos][2]) for pos in range(6)]
    ingest([raw], "turns", deinterleave=2)
    assert rows_of(tmp_path / "turns") == [
        ("t", turn, "next_gate", 1, layer, pos, guess[2 * pos + turn][layer])
        for turn in (0, 1)
        for layer in (1, 2)
        for pos in range(3)
    ]


def test_warm_up_rows_go_with_their_predictions(ingest: Ingest, tmp_path: Path) -> None:
    ids = routing(40)
    ids[:30] = ids[0]
    raw = request("a", 40, next_gate(40), ids=ids)
    ingest([raw], drop_warmup=True)
    guess = raw.predictions[0].ids.tolist()
    kept = tk.open(tmp_path / "S").sql("SELECT DISTINCT pos FROM routing ORDER BY pos")["pos"].to_list()
    assert 0 < len(kept) < 40
    assert rows_of(tmp_path / "S") == [
        ("t", 0, "next_gate", 1, layer, pos, guess[pos][layer]) for layer in (1, 2) for pos in kept
    ]


# --- recordings of a trained model ---------------------------------------------------------------


def test_recall_of_the_recorded_next_gates(shared: Path, tmp_path: Path) -> None:
    folder = shared / "moe" / "traces" / "olmoe" / "npz"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}")
    tk.ingest(folder, tmp_path / "S", name="olmoe")
    recall = tk.open(tmp_path / "S").sql(
        """
        SELECT distance, layer, avg(len(list_intersect(p.predicted, r.experts)) / len(r.experts)) AS recall
        FROM predictions p JOIN routing r USING (trace, request, layer, pos)
        WHERE predictor = 'next_gate'
        GROUP BY GROUPING SETS ((distance), (distance, layer))
        """
    )
    found = {(distance, layer): round(value, 3) for distance, layer, value in recall.rows()}
    assert (found[1, None], found[2, None]) == (0.768, 0.672)
    by_layer = [found[1, layer] for layer in range(1, 8)]
    assert by_layer == [0.618, 0.741, 0.789, 0.800, 0.831, 0.785, 0.809]
    assert [layer for distance, layer in found if distance == 2 and layer is not None and layer < 2] == []
