"""Tables in long form (CSV, JSON lines, Parquet), and FLAME-MoE's folders of Parquet files."""

from __future__ import annotations

import contextlib
import json
import random
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, csvio, open_source, tables
from tracekit.sources.readers import flame


def routing(tokens, layers=3, top_k=2, experts=16, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[..., :top_k]


def read(path, **options):
    source = open_source([path], IngestOptions(**{"num_experts": 16} | options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


# Rows of one request: token, layer, and either the list of experts or one expert with its rank


def listed(ids, *, first=0, request=None, layers=None, names=("token_index", "layer", "expert_ids"), **fixed):
    for t, row in enumerate(ids):
        for entry, experts in enumerate(row):
            named = {names[0]: first + t, names[1]: layers[entry] if layers else entry, names[2]: experts.tolist()}
            yield ({} if request is None else {"request_id": request}) | named | fixed


def single(ids, **fixed):
    for row in listed(ids, **fixed):
        for rank, expert in enumerate(row.pop("expert_ids")):
            yield row | {"rank": rank, "expert": expert}


def save(path, rows):
    rows = list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path, row_group_size=7)
    else:
        cells = [[f'"{v}"' if isinstance(v, list) else str(v) for v in row.values()] for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *map(",".join, cells)]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", [listed, single])
def test_every_file_and_form_gives_the_same(tmp_path, suffix, form):
    a, b = routing(9, seed=1), routing(5, seed=2)
    rows = [*form(a, request="r1"), *form(b, request="r0", first=4)]
    source, requests = read(save(tmp_path / f"t{suffix}", rows))
    assert source.meta.source_format == "long"
    assert [r.request_id for r in requests] == ["r1", "r0"]
    assert all((r.ids == ids).all() for r, ids in zip(requests, (a, b), strict=True))
    assert [r.first_pos for r in requests] == [0, 4]
    assert requests[0].decode_start is None
    assert source.meta.router_order is (True if form is single else None)
    assert source.meta.layers == (0, 1, 2)


def test_flat_columns_and_weights(tmp_path):
    ids = routing(6)
    weights = np.sort(np.random.default_rng(0).random(ids.shape).astype(np.float32), axis=2)[..., ::-1]
    frame = {"layer_idx": np.tile([4, 5, 7], 6), "pos": np.repeat(np.arange(6), 3)}
    frame |= {f"e{r}": ids[..., r].ravel() for r in range(2)} | {f"w{r}": weights[..., r].ravel() for r in range(2)}
    pl.DataFrame(frame).write_parquet(tmp_path / "t.parquet")
    pl.DataFrame(frame).write_csv(tmp_path / "t.csv")
    for name in ("t.parquet", "t.csv"):
        source, [request] = read(tmp_path / name)
        assert (request.ids == ids).all()
        assert np.allclose(request.weights, weights)
        assert source.meta.layers == (4, 5, 7)
        assert source.meta.router_order  # the weights fall


def test_rows_of_a_request_may_have_any_order(tmp_path):
    ids = routing(9, top_k=3)
    rows = [*single(ids, request=1)]
    random.Random(0).shuffle(rows)
    _, [request] = read(save(tmp_path / "t.jsonl", rows))
    assert (request.ids == ids).all()
    by_layer = sorted(listed(ids), key=lambda row: (row["layer"], row["token_index"]))
    _, [request] = read(save(tmp_path / "u.csv", by_layer))
    assert (request.ids == ids).all()


@given(st.data())
def test_borders_without_a_column_for_the_request(tmp_path_factory, data):
    """Token by token, layer by layer, or the prompt layer by layer and then token by token."""
    layers = data.draw(st.integers(1, 3))
    made, rows = [], []
    for i in range(data.draw(st.integers(1, 4))):
        tokens = data.draw(st.integers(2, 6))
        ids = routing(tokens, layers, seed=i)
        prompt = data.draw(st.integers(0, tokens))
        made.append(ids)
        these = list(listed(ids))
        rows += sorted(these[: prompt * layers], key=lambda row: (row["layer"], row["token_index"]))
        rows += these[prompt * layers :]
    path = save(tmp_path_factory.mktemp("t") / "t.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csvio, "_BLOCK", data.draw(st.sampled_from([20, 61, 1 << 20])))
        _, requests = read(path)
    assert [r.request_id for r in requests] == [f"t/{i}" for i in range(len(made))]
    assert all((r.ids == ids).all() for r, ids in zip(requests, made, strict=True))


def test_holes_keep_their_positions(tmp_path):
    ids = routing(6)
    keep = [0, 1, 4, 5]
    rows = [row for row in listed(ids) if row["token_index"] in keep]
    _, [request] = read(save(tmp_path / "t.jsonl", rows))
    assert request.positions.tolist() == keep
    assert (request.ids == ids[keep]).all()
    tk.ingest(tmp_path / "t.jsonl", tmp_path / "S", num_experts=16)
    assert tk.open(tmp_path / "S").sql("SELECT DISTINCT pos FROM routing ORDER BY 1")["pos"].to_list() == keep


@pytest.mark.parametrize("restart", [False, True])
def test_phases(tmp_path, restart):
    ids = routing(7)

    def rows_of(ids, **fixed):
        return list(listed(ids, names=("pos", "layer", "experts"), **fixed))

    rows = [*rows_of(ids[:4], phase="prefill"), *rows_of(ids[4:], phase="decode", first=0 if restart else 4)]
    rows += [*rows_of(ids[:2], phase="prefill"), *rows_of(ids[2:3], phase="decode", first=0 if restart else 2)]
    source, requests = read(save(tmp_path / "t.jsonl", rows))
    assert [(r.prompt_len, r.decode_start, len(r.ids)) for r in requests] == [(4, 4, 7), (2, 2, 3)]
    assert (requests[0].ids == ids).all()
    assert any("counted on from the end of the prompt" in note for note in source.notes) is restart


def test_a_trace_of_one_phase(tmp_path):
    _, [prompt] = read(save(tmp_path / "p.csv", listed(routing(4), phase="prompt")))
    assert (prompt.first_pos, prompt.decode_start) == (0, 4)
    _, [decode] = read(save(tmp_path / "d.csv", listed(routing(4), phase=1, first=30)))
    assert (decode.first_pos, decode.decode_start, decode.prompt_len) == (30, 30, 30)


def test_label_fields_are_columns(tmp_path):
    rows = [
        *listed(routing(3), request=7, domain="maths", lang="de"),
        *listed(routing(3), request=8, domain=None, lang=1),
    ]
    for name in ("t.jsonl", "t.csv"):
        _, requests = read(save(tmp_path / name, rows), label_fields=("lang",))
        assert [r.label for r in requests] == ["de", "1"]
    rows[1]["lang"] = "fr"
    refuse(save(tmp_path / "u.jsonl", rows[:9]), "row 1: lang is 'fr' after 'de'", label_fields=("lang",))
    refuse(tmp_path / "u.jsonl", "has no label field 'topic'", label_fields=("topic",))


def test_names_of_columns_in_any_case_and_the_first_alias_wins(tmp_path):
    ids = routing(4)
    rows = list(listed(ids, names=("Position", "Layer_ID", "TopK_IDs"), token="the word"))
    _, [request] = read(save(tmp_path / "t.jsonl", rows))
    assert (request.ids == ids).all()


@pytest.mark.parametrize("text", ["[{}, {}]", "{} {}", "({};{})", "{}|{}"])
def test_lists_in_csv(tmp_path, text):
    ids = routing(4)
    rows = [f'{t},{e},"{text.format(*ids[t, e])}"' for t in range(4) for e in range(3)]
    (tmp_path / "t.csv").write_text("\r\n".join(["token,layer,experts", *rows]))
    assert (read(tmp_path / "t.csv")[1][0].ids == ids).all()


def test_large_and_many_requests_through_the_store(tmp_path):
    made = [routing(40 + i, seed=i) for i in range(30)]
    rows = [row for i, ids in enumerate(made) for row in listed(ids, request=f"r{i}", weight=None)]
    for row in rows:
        del row["weight"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_ROWS", 500)
        tk.ingest(save(tmp_path / "t.jsonl", rows), tmp_path / "S", num_experts=16)
    store = tk.open(tmp_path / "S")
    assert store.trace().requests == 30
    frame = store.sql("SELECT experts FROM routing WHERE request = 29 ORDER BY pos, layer")
    assert (np.array(frame["experts"].to_list()).reshape(69, 3, 2) == made[29]).all()


ROW = {"token_index": 0, "layer": 0, "expert_ids": [1, 2]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW, ROW], "token 0, layer 0: has 2 rows; expected 1 of each token and layer.* Sort the rows by request"),
        ([ROW, ROW | {"layer": 1}, ROW | {"token_index": 1}], "token 1, layer 1: has no rows"),
        ([ROW, ROW | {"layer": 1, "token_index": 1}], "token 0, layer 1: has no rows"),
        ([ROW, ROW | {"layer": 1, "expert_ids": [1]}], r"row 1: expert_ids is \[1\]; expected a list of 2"),
        ([ROW | {"expert_ids": []}], "expert_ids is .*expected a whole number"),
        ([ROW | {"expert_ids": [1, "2"]}], "expert_ids is"),
        ([ROW | {"expert_ids": [1, 2.5]}], "expert_ids is"),
        ([ROW | {"expert_ids": [1, True]}], "expert_ids is"),
        ([ROW | {"expert_ids": [1, 10**40]}], "expert_ids is"),
        ([ROW | {"expert_ids": [1, -1]}], "expert id -1"),
        ([ROW | {"expert_ids": [1, 16]}], "expert id 16 of 16"),
        ([ROW | {"expert_ids": [1, 1]}], "expert 1 twice in one row"),
        ([ROW | {"layer": -1}], "layer is -1"),
        ([ROW | {"layer": None}], "layer is None"),
        ([ROW | {"layer": 5000}], "layer is 5000"),
        ([ROW | {"token_index": "x"}], "token_index is x"),
        ([ROW | {"token_index": [1]}], "token_index is a list"),
        ([ROW, {"token_index": 0, "layer": 1}], "has no field 'expert_ids'"),
        ([ROW, 3], "is int, not an object"),
        ([ROW | {"phase": "warm-up"}], "phase is 'warm-up'"),
        ([ROW | {"phase": "decode"}, ROW | {"token_index": 1, "phase": "prefill"}], None),
        ([ROW | {"scores": [0.5]}], "scores has shape"),
        ([ROW | {"scores": 0.5}], "scores has shape"),
        ([ROW | {"request_id": None}], "request_id is None"),
        ([ROW | {"request_id": i % 2, "token_index": i} for i in range(3)], "'0': its rows do not stand together"),
    ],
)
def test_rows_that_are_at_fault(tmp_path, rows, said):
    path = save(tmp_path / "t.jsonl", rows)
    if said is None:  # decode and then prefill is another request
        assert len(read(path)[1]) == 2
        return
    refuse(path, said)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0, 0, 1), (0, 0, 1)], r"has the ranks \[1, 1\]"),
        ([(0, 0, 0), (0, 0, 1), (0, 1, 0)], "has 1 rows; expected 2|has 2 rows; expected 1"),
        ([(0, 0, 0), (0, 0, 2)], r"has the ranks \[0, 2\]"),
    ],
)
def test_single_experts_that_are_at_fault(tmp_path, rows, said):
    lines = [f"{t},{layer},{rank},{rank + 3}" for t, layer, rank in rows]
    (tmp_path / "t.csv").write_text("\n".join(["token,layer,slot,expert", *lines]) + "\n")
    refuse(tmp_path / "t.csv", said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0,x,3 4", "t.csv:5: layer is 'x'; expected a whole number"),
        ("0,,3 4", "t.csv:5: layer is empty"),
        ("0,1,3 a", "t.csv:5: experts is '3 a'"),
        ("0,1,", "t.csv:5: experts is"),
        ("0,1", "t.csv:5: experts is empty"),
        ("0,1,3 4,9", "t.csv:5: row .* has 4 values"),
        ("0,1,3 4 5", "t.csv:5: experts has 3 entries"),
        ("0,1,3 99999999999999999999", "t.csv:5: experts is"),
    ],
)
@pytest.mark.parametrize("block", [10, 1 << 20])
def test_csv_lines_that_are_at_fault_are_named(tmp_path, line, said, block, monkeypatch):
    monkeypatch.setattr(csvio, "_BLOCK", block)
    good = [f"0,{layer},3 4" for layer in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["token,layer,experts", *good, line]) + "\n")
    if "3 entries" in said and block == 10:
        said = "rows of different k"
    refuse(tmp_path / "t.csv", said)


def test_what_is_no_such_table(tmp_path):
    (tmp_path / "t.csv").write_text("layer,experts\n0,3\n")
    with pytest.raises(SourceError, match="of no known format"):
        open_source([tmp_path / "t.csv"])
    refuse(tmp_path / "t.csv", "has the columns layer, experts; expected token: token_index", source_format="long")
    (tmp_path / "u.csv").write_text("token,layer,experts\n")
    refuse(tmp_path / "u.csv", "has no rows")
    pl.DataFrame({"token": [0.5], "layer": [0], "experts": [[1]]}).write_parquet(tmp_path / "t.parquet")
    refuse(tmp_path / "t.parquet", "row 0: token is Float64")
    pl.DataFrame({"token": [0, None], "layer": [0, 1], "experts": [[1], [2]]}).write_parquet(tmp_path / "u.parquet")
    refuse(tmp_path / "u.parquet", "row 1: token is empty")
    pl.DataFrame({"token": [0, 1], "layer": [0, 0], "experts": [[1], None]}).write_parquet(tmp_path / "v.parquet")
    refuse(tmp_path / "v.parquet", "row 1: experts has")
    pl.DataFrame(
        {"token": [0], "layer": [0], "experts": [[1 << 63]]}, schema_overrides={"experts": pl.List(pl.UInt64)}
    ).write_parquet(tmp_path / "w.parquet")
    refuse(tmp_path / "w.parquet", "2.63")


# FLAME-MoE


EOS = 0


def flame_moe(root, ids, tokens, *, iteration="iter_0100", layers=(2, 3, 4), files=2, scores=True, group=50):
    """The layout of the data set: samples in several files, one file a layer, experts in the order of their scores."""
    (root / "samples").mkdir(parents=True, exist_ok=True)
    folder = root / "actives" / iteration
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(tokens, files)):
        pl.DataFrame({"token_id": part.astype(np.int32)}).write_parquet(root / "samples" / f"part-{number:02d}.parquet")
    values = np.sort(np.random.default_rng(1).random(ids.shape), axis=2)[..., ::-1].astype(np.float16)
    for entry, layer in enumerate(layers):
        columns = {"indices": pl.Series(ids[:, entry].astype(np.int16).tolist(), dtype=pl.List(pl.Int16))}
        if scores:
            wide = pl.Series(values[:, entry].astype(float).tolist(), dtype=pl.List(pl.Float64))
            columns["scores"] = wide.cast(pl.List(pl.Float16))
        pl.DataFrame(columns).write_parquet(folder / f"layer_{layer:02d}.parquet", row_group_size=group)
    return values


@pytest.fixture
def ids():
    return routing(211, layers=3, top_k=6, experts=64)


@pytest.fixture
def tokens():
    made = np.random.default_rng(3).integers(1, 1000, 211)
    made[[9, 10, 99, 150]] = EOS
    return made


def config(folder, **fields):
    path = folder / "flame.json"
    known = {"num_hidden_layers": 4, "num_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    path.write_text(json.dumps(known | fields))
    return path


def test_other_files_beside_the_layers_are_named(tmp_path, ids, tokens):
    flame_moe(tmp_path / "F", ids, tokens)
    (tmp_path / "F" / "README.md").write_text("x")
    trace = tk.ingest(tmp_path / "F", tmp_path / "S", config=config(tmp_path, eos_token_id=EOS), name="t")
    assert [note for note in trace.notes if "left out" in note] == ["not part of the trace, left out: 'README.md'"]


@pytest.mark.parametrize("block", [6 * 3, 6 * 3 * 13, 1 << 25])
def test_texts_end_with_the_end_of_text_token(tmp_path, ids, tokens, block, monkeypatch):
    monkeypatch.setattr(flame, "_BLOCK_IDS", block)
    scores = flame_moe(tmp_path / "F", ids, tokens)
    tk.ingest(tmp_path / "F", tmp_path / "S", config=config(tmp_path, eos_token_id=EOS), name="t")
    store = tk.open(tmp_path / "S")
    trace = store.trace()
    assert (trace.meta.layers, trace.meta.top_k, trace.meta.num_experts) == ((1, 2, 3), 6, 64)
    assert trace.meta.router_order
    assert trace.meta.source_format == "flame"
    assert trace.meta.extra == {"iteration": 100}
    assert any("requests end with the token 0" in note for note in trace.notes)
    assert any("number layers from 1" in note for note in trace.notes)
    requests = store.sql("SELECT request_id, n_tokens, first_pos FROM requests ORDER BY request")
    assert requests["n_tokens"].to_list() == [10, 1, 89, 51, 60]
    assert requests["request_id"].to_list() == [f"F/{i}" for i in range(5)]
    rows = store.sql("SELECT experts, layer FROM routing ORDER BY request, pos, layer")
    assert (np.array(rows["experts"].to_list()).reshape(ids.shape) == ids).all()
    stored = store.sql("SELECT weight FROM activations ORDER BY request, pos, layer, rank")["weight"].to_numpy()
    assert (stored.reshape(ids.shape) == scores).all()
    assert (store.sql("SELECT token_id FROM tokens ORDER BY request, pos")["token_id"].to_numpy() == tokens).all()


@pytest.mark.parametrize("block", [6 * 3, 6 * 3 * 13, 1 << 25])
def test_lengths_of_the_requests(tmp_path, ids, tokens, block, monkeypatch):
    monkeypatch.setattr(flame, "_BLOCK_IDS", block)
    flame_moe(tmp_path / "F", ids, tokens, scores=False)
    sidecar = [{"n_tokens": n, "set": s} for n, s in ((100, "a"), (1, "b"), (110, "a"))]
    source, requests = read(
        tmp_path / "F" / "actives" / "iter_0100", requests=sidecar, label_fields=("set",), num_experts=64
    )
    assert [len(r.ids) for r in requests] == [100, 1, 110]
    assert [r.label for r in requests] == ["a", "b", "a"]
    assert (np.concatenate([r.ids for r in requests]) == ids).all()
    assert (np.concatenate([r.token_ids for r in requests]) == tokens).all()
    assert source.meta.layers == (2, 3, 4)
    assert source.meta.router_order  # the format sorts by score
    assert not source.notes


def test_without_borders_it_is_refused(tmp_path, ids, tokens):
    flame_moe(tmp_path / "F", ids, tokens)
    message = refuse(tmp_path / "F", "does not say where one text ends and another begins", num_experts=64)
    assert "windows would reach from one text into the next" in message
    assert "--requests" in message
    with pytest.raises(SourceError, match="does not say where one text ends"):
        tk.ingest(tmp_path / "F", tmp_path / "S", config=config(tmp_path))


def test_several_iterations_are_several_models(tmp_path, ids, tokens):
    flame_moe(tmp_path / "F", ids, tokens)
    flame_moe(tmp_path / "F", ids, tokens, iteration="iter_0200")
    refuse(tmp_path / "F", r"2 training iterations \(iter_0100, iter_0200\)")
    tk.ingest(
        tmp_path / "F" / "actives" / "iter_0200", tmp_path / "S", config=config(tmp_path, eos_token_id=[EOS, 5000])
    )
    trace = tk.open(tmp_path / "S").trace()
    assert (trace.name, trace.requests, trace.meta.extra) == ("iter_0200", 5, {"iteration": 200})


def replace_layer(folder, **columns):
    pl.DataFrame(columns).write_parquet(folder / "layer_03.parquet")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda d: replace_layer(d, indices=[[1, 2, 3, 4, 5, 6]] * 210, scores=[[1.0] * 6] * 210),
            "layers of .210, 211. rows",
        ),
        (lambda d: replace_layer(d, indices=[[1, 2]] * 211, scores=[[1.0] * 2] * 211), "2, 6. experts each"),
        (lambda d: replace_layer(d, indices=[[1, 2, 3, 4, 5, 6]] * 211), "2 with scores"),
        (lambda d: replace_layer(d, ids=[1] * 211), "has the columns ids"),
        (lambda d: replace_layer(d, indices=[1] * 211, scores=[1.0] * 211), "indices of type Int64"),
        (
            lambda d: replace_layer(d, indices=[[1, 2, 3, 4, 5, 6]] * 210 + [[1, 2]], scores=[[1.0] * 6] * 211),
            r"row 210: has indices \[1, 2\]; expected 6 numbers",
        ),
        (
            lambda d: replace_layer(d, indices=[[1, 2, 3, 4, 5, 6]] * 210 + [None], scores=[[1.0] * 6] * 211),
            "row 210: has indices missing",
        ),
        (
            lambda d: replace_layer(
                d, indices=[[1, 2, 3, 4, 5, 6]] * 210 + [[1, 2, 3, 4, 5, None]], scores=[[1.0] * 6] * 211
            ),
            "row 210: has indices",
        ),
        (
            lambda d: replace_layer(
                d, indices=[[1, 2, 3, 4, 5, 6]] * 210 + [[1, 2, 3, 4, 5, -6]], scores=[[1.0] * 6] * 211
            ),
            "row 210: has the experts",
        ),
        (
            lambda d: replace_layer(
                d, indices=[[1, 2, 3, 4, 5, 6]] * 210 + [[1, 2, 3, 4, 5, 64]], scores=[[1.0] * 6] * 211
            ),
            "expert id 64 of 64",
        ),
        (
            lambda d: replace_layer(d, indices=[[1, 2, 3, 4, 5, 6]] * 211, scores=[[1] * 6] * 211),
            "has scores of type List.Int64.",
        ),
        (lambda d: (d / "layer_03.parquet").write_bytes(b"PAR1 nothing"), "cannot be read"),
        (lambda d: next((d.parents[1] / "samples").iterdir()).unlink(), "106 tokens for 211 rows"),
    ],
)
def test_flame_folders_that_are_at_fault(tmp_path, ids, tokens, break_it, said):
    flame_moe(tmp_path / "F", ids, tokens)
    break_it(tmp_path / "F" / "actives" / "iter_0100")
    refuse(tmp_path / "F", said, num_experts=64, requests=[{"n_tokens": 211}])


@pytest.mark.parametrize(
    ("sidecar", "said"),
    [
        ([{"n_tokens": 210}], "has 211 rows for requests of 210 tokens"),
        ([{"n_tokens": 0}, {"n_tokens": 211}], "entry 0: does not say how many tokens"),
        ([{"label": "x"}], "entry 0: does not say how many tokens"),
        ([{"n_tokens": -1}], "n_tokens is -1"),
    ],
)
def test_lengths_that_are_at_fault(tmp_path, ids, tokens, sidecar, said):
    flame_moe(tmp_path / "F", ids, tokens)
    refuse(tmp_path / "F", said, num_experts=64, requests=sidecar)


@pytest.mark.slow
def test_a_large_folder_streams(tmp_path):
    """Three million rows of 8 layers are read without holding a quarter of them."""
    import subprocess

    rows, layers = 3_000_000, 8
    folder = tmp_path / "F" / "actives" / "iter_0001"
    folder.mkdir(parents=True)
    values = np.tile(np.array([9, 3, 5, 1, 60, 7], np.int16), (rows, 1))
    series = pl.Series(values, dtype=pl.Array(pl.Int16, 6)).cast(pl.List(pl.Int16))
    for layer in range(layers):
        pl.DataFrame({"indices": series}).write_parquet(folder / f"layer_{layer:02d}.parquet", row_group_size=100_000)
    script = """
import resource, sys
import polars
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.readers import flame
flame._BLOCK_IDS = 1 << 22
sidecar = [{"n_tokens": 1000}] * 3000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source([sys.argv[1]], IngestOptions(num_experts=64, requests=sidecar))
print(sum(len(r.ids) for r in source.requests()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True).stdout
    read_rows, grown = map(int, out.split())
    assert read_rows == rows
    assert grown * 1024 < rows * layers * 6 * 2 / 2, f"{grown / 1024:.0f} MiB"


# Damage


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@given(data=st.data())
def test_damage_is_an_error_and_nothing_else(tmp_path_factory, suffix, data):
    path = save(tmp_path_factory.mktemp("d") / f"t{suffix}", listed(routing(6), request="r", phase="decode"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(bytes(content))
    with contextlib.suppress(TracekitError):
        read(path, source_format="long")


@given(data=st.data())
def test_damaged_layers_are_an_error_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("d") / "F"
    flame_moe(folder, routing(30, layers=3, top_k=6, experts=64), np.arange(30), files=1)
    path = folder / "actives" / "iter_0100" / "layer_03.parquet"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(TracekitError):
        read(folder, num_experts=64, requests=[{"n_tokens": 30}])


def test_names_of_parquet_files_are_no_patterns(tmp_path):
    folder = tmp_path / "a[1]*?"
    folder.mkdir()
    ids = routing(20)
    pl.DataFrame(list(listed(ids))).write_parquet(folder / "phase=decode.parquet")
    _, (request,) = read(folder / "phase=decode.parquet", num_experts=16)
    assert (request.ids == ids).all()


def test_parquet_that_unpacks_to_filler_is_refused(tmp_path):
    rows = 3 << 20
    columns = {name: pl.repeat(0, rows, eager=True, dtype=pl.Int8) for name in ("token", "layer", "expert")}
    pl.DataFrame(columns).write_parquet(tmp_path / "x.parquet")
    refuse(tmp_path / "x.parquet", "to 3145728 rows: constant filler", num_experts=16)
