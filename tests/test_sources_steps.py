"""Tables with a row per forward pass: verification steps, and every pass of an engine."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.config import ModelConfig
from tracekit.sources.readers import step_tables

LAYERS, K, N = 3, 2, 16


def routing(rows, seed=0, experts=N):
    return np.argsort(np.random.default_rng(seed).random((rows, LAYERS, experts)), axis=2)[..., :K]


def read(path, **options):
    source = open_source([path], IngestOptions(**{"num_experts": N, "top_k": K} | options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def save(path, rows, **schema):
    pl.DataFrame(rows, schema_overrides=schema).write_parquet(path, row_group_size=3)
    return path


def passes(name, ids, spans, prompt):
    """The passes of a request over (start, rows, rejected), as an engine logs them."""
    row = 0
    for start, n, rejected in spans:
        ends = start + n >= prompt
        yield {
            "request_id": name,
            "start_pos": start,
            "n_tokens": n,
            "n_sampled": n - rejected if start >= prompt else int(ends),
            "n_rejected": rejected,
            "experts": ids[row : row + n].reshape(-1).tolist(),
        }
        row += n


# A prompt of 5 tokens in chunks of 3 and 2, then steps of three drafts of which 1, 3 and 0 are accepted.
SPANS = [(0, 3, 0), (3, 2, 0), (5, 4, 2), (7, 4, 0), (11, 4, 3)]
KEPT = [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]


def test_every_pass_of_an_engine(tmp_path):
    a, b = routing(17, 1), routing(17, 2)
    rows = [row for pair in zip(passes("a", a, SPANS, 5), passes("b", b, SPANS, 5), strict=True) for row in pair]
    source, requests = read(save(tmp_path / "x.parquet", rows))
    assert (source.meta.source_format, source.meta.drafts_included) == ("step-table", True)
    assert [r.request_id for r in requests] == ["a", "b"]
    for found, ids in zip(requests, (a, b), strict=True):
        assert (found.first_pos, found.prompt_len, found.decode_start, found.positions) == (0, 5, 5, None)
        assert (found.ids == ids[KEPT]).all()
        assert found.steps.start_pos.tolist() == [5, 7, 11]
        assert found.steps.n_accepted.tolist() == [1, 3, 0]
        assert (found.steps.ids == ids[5:]).all()


@pytest.mark.parametrize(("experts", "dtype"), [(16, "u1"), (300, "<u2")])
def test_experts_as_bytes(tmp_path, experts, dtype):
    ids = routing(17, 3, experts)
    rows = list(passes("a", ids, SPANS, 5))
    lists = save(tmp_path / "l.parquet", rows)
    for row in rows:
        row["experts"] = np.array(row["experts"], dtype).tobytes()
    path = save(tmp_path / "b.parquet", rows)
    _, (found,) = read(path, num_experts=experts)
    _, (same,) = read(lists, num_experts=experts)
    assert (found.ids == same.ids).all()
    assert (found.steps.ids == same.steps.ids).all()
    refuse(path, "how many experts a layer has is not known.*--num-experts", num_experts=None)
    rows[2]["experts"] += b"\x00"
    refuse(save(path, rows), "row 2: experts has", num_experts=experts)


def test_steps_alone_begin_where_the_first_one_does(tmp_path):
    ids = routing(12, 4)
    rows = [
        {
            "request_id": "a",
            "domain": "prose",
            "prompt_len": 5,
            "start_pos": start,
            "n_drafted": 3,
            "n_accepted": accepted,
            "experts": ids[4 * i : 4 * i + 4].reshape(-1),
            "router_weights": np.tile([0.75, 0.25], 12),
        }
        for i, (start, accepted) in enumerate([(5, 1), (7, 3), (11, 0)])
    ]
    shape = {"experts": pl.Array(pl.UInt8, 24), "domain": pl.Categorical}
    path = save(tmp_path / "x.parquet", rows, **shape)
    source, (found,) = read(path, label_fields=("domain",))
    assert (found.first_pos, found.prompt_len, found.label) == (5, 5, "prose")
    assert (found.ids == ids[[0, 1, 4, 5, 6, 7, 8]]).all()
    assert found.steps.n_accepted.tolist() == [1, 3, 0]
    assert found.weights.shape == found.ids.shape
    assert found.steps.weights.shape == found.steps.ids.shape
    assert source.meta.router_order is True
    config = ModelConfig("mixtral", LAYERS, N, K, tuple(range(LAYERS)))
    _, (same,) = read(path, config=config, num_experts=None, top_k=None)
    assert (same.ids == found.ids).all()


def test_a_tree_says_which_rows_were_kept(tmp_path):
    ids = routing(9, 5)
    rows = [
        {"start_pos": 0, "n_accepted": 2, "depth": [0, 1, 1, 2, 2], "kept": [True, False, True, True, False]},
        {"start_pos": 3, "n_accepted": 0, "depth": [0, 1, 2, 3], "kept": [True, False, False, False]},
    ]
    for row, part in zip(rows, (ids[:5], ids[5:]), strict=True):
        row |= {"request_id": "a", "n_drafted": len(part) - 1, "experts": part.reshape(-1).tolist()}
    _, (found,) = read(save(tmp_path / "x.parquet", rows))
    assert (found.ids == ids[[0, 2, 3, 5]]).all()
    assert found.steps.depth.tolist() == [0, 1, 1, 2, 2, 0, 1, 2, 3]
    assert found.steps.kept.tolist() == [1, 0, 1, 1, 0, 1, 0, 0, 0]
    rows[0]["kept"] = [True, True, True, True, False]
    refuse(save(tmp_path / "x.parquet", rows), r"step 0 has 2 accepted drafts, but kept \[1, 1, 1, 1, 0\]")
    rows[0] |= {"kept": [True, False, True, True, False], "depth": [0, 1, 1, 3, 2]}
    refuse(save(tmp_path / "x.parquet", rows), r"step 0 has rows of depth \[0, 1, 1, 3, 2\]")


def test_what_was_preempted_is_run_again(tmp_path):
    """After two steps the request starts over: its prompt and output are prefilled, then it goes on."""
    ids = routing(27, 6)
    spans = [(0, 5, 0), (5, 4, 2), (7, 4, 3), (0, 8, 0), (8, 4, 1), (11, 2, 0)]
    rows = list(passes("a", ids, spans, 5))
    _, (found,) = read(save(tmp_path / "x.parquet", rows))
    assert found.steps.start_pos.tolist() == [5, 7, 8, 11]
    again = 5 + 4 + 4
    assert (found.ids[:8] == ids[again : again + 8]).all()  # the rows that stayed
    assert len(found.ids) == 13


def test_an_engine_without_drafts_has_no_steps(tmp_path):
    ids = routing(9, 7)
    spans = [(0, 5, 0), *((5 + i, 1, 0) for i in range(4))]
    source, (found,) = read(save(tmp_path / "x.parquet", list(passes("a", ids, spans, 5))))
    assert (found.steps, source.meta.drafts_included) == (None, False)
    assert (found.ids == ids).all()
    assert found.decode_start == 5


def test_rows_that_are_missing_leave_a_hole(tmp_path):
    ids = routing(8, 8)
    rows = list(passes("a", ids, [(0, 5, 0), (7, 3, 1)], 5))
    _, (found,) = read(save(tmp_path / "x.parquet", rows))
    assert found.positions.tolist() == [0, 1, 2, 3, 4, 7, 8]


def test_tables_beside_the_routing_are_left_out_of_a_folder(tmp_path):
    np.savez(tmp_path / "a.npz", routed_experts=routing(6))
    save(tmp_path / "engine.parquet", list(passes("a", routing(17), SPANS, 5)))
    source, (found,) = read(tmp_path)
    assert (source.meta.source_format, len(found.ids)) == ("arrays", 6)
    assert any("left out: 'engine.parquet'" in note for note in source.notes)
    (tmp_path / "a.npz").unlink()
    assert read(tmp_path)[0].meta.source_format == "step-table"


def change(row, **values):
    def apply(rows):
        rows[row] |= values

    return apply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change(2, n_rejected=4), "row 2: has as many rejected drafts as rows"),
        (change(2, n_tokens=0), "row 2: experts has 24 values for 0 rows"),
        (change(2, n_tokens=3), "row 2: experts has 24 values for 3 rows"),
        (change(1, start_pos=-1), "row 1: start_pos is -1"),
        (change(1, start_pos=1 << 40), "row 1: start_pos is 1099511627776"),
        (change(1, start_pos=None), "row 1: start_pos is empty"),
        (change(1, experts=None), "row 1: experts is empty"),
        (change(1, request_id=None), "request_id is None"),
        (change(2, experts=[N] * 24), "expert id 16 of 16"),
        (change(2, experts=[1] * 24), "twice in one row"),
        (lambda rows: [row.pop("n_sampled") for row in rows], "expected request_id, .* n_sampled or prompt_len"),
        (lambda rows: [row.pop("request_id") for row in rows], "has the columns start_pos"),
        (lambda rows: [row.update(experts="x") for row in rows], "experts is String"),
        (lambda rows: [row.update(depth=[0]) for row in rows], "depth has 1 values for 2 rows"),
        (lambda rows: [row.update(depth=list(range(-9, row["n_tokens"] - 9))) for row in rows], "at positions -9 to 5"),
        (lambda rows: [row.update(kept=["x"] * row["n_tokens"]) for row in rows], "kept is 'x'"),
        (lambda rows: [row.update(kept=[257] * row["n_tokens"]) for row in rows], "has no row that was kept"),
        (lambda rows: rows.clear(), "has the columns|has no pass|a Parquet file without"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path, spoil, said):
    rows = list(passes("a", routing(17), SPANS, 5))
    spoil(rows)
    refuse(save(tmp_path / "x.parquet", rows), said)


def test_what_is_not_known_is_asked_for(tmp_path):
    path = save(tmp_path / "x.parquet", list(passes("a", routing(17), SPANS, 5)))
    assert "Give --top-k K" in refuse(path, "has 6 experts for each row", top_k=None)
    refuse(path, "expected 4 for each row and layer", top_k=4)
    refuse(path, "does not say how many experts", num_experts=None)


def test_lists_that_unpack_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(step_tables, "_FREE_VALUES", 0)
    experts = pl.Series([[7] * (1 << 20)] * 2, dtype=pl.List(pl.UInt8))
    rows = {"request_id": ["a"] * 2, "start_pos": [0, 1], "n_drafted": [0, 0], "n_accepted": [0, 0]}
    path = tmp_path / "x.parquet"
    pl.DataFrame(rows | {"experts": experts}).write_parquet(path)
    refuse(path, "to 2097152 values or more: constant filler")


@given(seed=st.integers(0, 1 << 16), hits=st.integers(1, 4))
def test_damage_raises_nothing_else(tmp_path_factory, seed, hits):
    folder = tmp_path_factory.mktemp("f")
    path = save(folder / "x.parquet", list(passes("a", routing(17), SPANS, 5)))
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(hits):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    with contextlib.suppress(TracekitError):
        list(open_source([path], IngestOptions(num_experts=N, top_k=K)).requests())


@given(
    values=st.fixed_dictionaries(
        {
            name: st.lists(st.integers(-1, 9), min_size=3, max_size=3)
            for name in ("start_pos", "n_tokens", "n_sampled", "n_rejected")
        }
    ),
    widths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_any_numbers_are_read_or_refused(tmp_path_factory, values, widths):
    path = tmp_path_factory.mktemp("n") / "x.parquet"
    experts = [routing(width).reshape(-1).tolist() for width in widths]
    frame = {"request_id": ["a", "b", "a"], **values, "experts": experts}
    pl.DataFrame(frame, schema_overrides={"experts": pl.List(pl.Int64)}).write_parquet(path)
    with contextlib.suppress(TracekitError):
        for request in open_source([path], IngestOptions(num_experts=N, top_k=K)).requests():
            assert len(request.ids)
