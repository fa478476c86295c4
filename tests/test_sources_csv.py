"""BigMoeOnEdge route traces and llama.cpp's layer,expert CSV."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError
from tracekit.sources import IngestOptions, csvio, open_source

COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def routing(tokens, layers, k, n, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, n)), axis=2)[..., :k]


def read(path, **options):
    source = open_source([path], IngestOptions(**options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


# BigMoeOnEdge


def bigmoe_rows(ids, prompt, turn=0, first=0, layer_ids=None, weight="0.5"):
    """CSV rows, the prompt layer by layer and the output token by token, as the engine writes them."""
    tokens, layers, k = ids.shape
    numbers = layer_ids or range(layers)
    order = [(t, e) for e in range(layers) for t in range(prompt)]
    order += [(t, e) for t in range(prompt, tokens) for e in range(layers)]
    return [
        f"{turn},{int(t >= prompt)},{first + t},{numbers[e]},{slot},{ids[t, e, slot]},{weight},0,0"
        for t, e in order
        for slot in range(k)
    ]


def bigmoe(path, rows, n=16, used=3, columns=COLUMNS):
    head = ["# route_trace v1", f"# model=/data/my dir/m.gguf arch=gemma4 n_layer=4 n_expert={n} n_expert_used={used}"]
    head += [f"# layer={i} expert_bytes={100 + i} dense_bytes=7" for i in range(4)]
    path.write_text("\n".join([*head, columns, *rows]) + "\n")
    return path


@given(
    turns=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(sum), min_size=1, max_size=3),
    block=st.sampled_from([50, 400, 1 << 24]),
    nan=st.booleans(),
)
def test_route_trace_round_trip(tmp_path_factory, turns, block, nan):
    path = tmp_path_factory.mktemp("b") / "m.route.csv"
    ids = [routing(p + d, 4, 3, 16, i) for i, (p, d) in enumerate(turns)]
    rows = [
        row
        for i, (p, _) in enumerate(turns)
        for row in bigmoe_rows(ids[i], p, i, layer_ids=[1, 2, 3, 5], weight="nan" if nan else f"0.{i + 1}")
    ]
    bigmoe(path, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csvio, "_BLOCK", block)
        source, requests = read(path)
    meta = source.meta
    assert (meta.num_experts, meta.top_k, meta.layers, meta.native_top_k) == (16, 3, (1, 2, 3, 5), None)
    assert (meta.model, meta.engine, meta.id_space, meta.router_order) == ("m.gguf", "BigMoeOnEdge", "logical", True)
    assert meta.extra["expert_bytes"] == {"0": 100, "1": 101, "2": 102, "3": 103}
    assert [r.request_id for r in requests] == [f"m.route/{i}" for i in range(len(turns))]
    for i, ((prompt, _), request) in enumerate(zip(turns, requests, strict=True)):
        assert (request.ids == ids[i]).all()
        assert (request.prompt_len, request.decode_start, request.first_pos) == (prompt, prompt, 0)
        assert request.positions is None
        if nan:
            assert request.weights is None
        else:
            assert np.allclose(request.weights, float(f"0.{i + 1}"))


def test_later_columns_and_their_order_do_not_matter(tmp_path):
    ids = routing(5, 4, 3, 16)
    rows = [",".join([*row.split(",")[::-1], "1"]) for row in bigmoe_rows(ids, 2)]
    path = bigmoe(tmp_path / "r.csv", rows, columns=",".join([*COLUMNS.split(",")[::-1], "dropped"]))
    assert (read(path)[1][0].ids == ids).all()


def test_a_turn_that_continues_a_conversation(tmp_path):
    path = bigmoe(tmp_path / "r.csv", bigmoe_rows(routing(9, 4, 3, 16), 4, first=20))
    _, (request,) = read(path)
    assert (request.first_pos, request.prompt_len, request.decode_start) == (20, 24, 24)


def test_prompt_tokens_without_the_last_layer(tmp_path):
    ids = routing(9, 4, 3, 16)
    rows = [row for row in bigmoe_rows(ids, 5) if not (row.split(",")[3] == "3" and int(row.split(",")[2]) < 4)]
    source, (request,) = read(bigmoe(tmp_path / "r.csv", rows))
    assert (request.first_pos, request.prompt_len) == (4, 5)
    assert (request.ids == ids[4:]).all()
    assert any("last layer" in note for note in source.notes)


def test_holes_between_steps_are_kept(tmp_path):
    ids = routing(9, 4, 3, 16)
    rows = [row for row in bigmoe_rows(ids, 5) if int(row.split(",")[2]) != 6]
    _, (request,) = read(bigmoe(tmp_path / "r.csv", rows))
    assert request.positions.tolist() == [0, 1, 2, 3, 4, 5, 7, 8]


def test_reduced_run(tmp_path):
    source, _ = read(bigmoe(tmp_path / "r.csv", bigmoe_rows(routing(5, 4, 3, 16), 2), used=4))
    assert source.meta.native_top_k == 4


def replaced(rows, index, column, value):
    cells = rows[index].split(",")
    cells[COLUMNS.split(",").index(column)] = value
    return [*rows[:index], ",".join(cells), *rows[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: [], "no rows"),
        (lambda r: r[:-1], "2 of 3 experts"),
        (lambda r: r[:-3], "0 of 3 experts"),
        (lambda r: [*r[:40], *r[41:]], "2 of 3 experts"),
        (lambda r: [*r, r[-1]], "twice"),
        (lambda r: replaced(r, 40, "expert", "-1"), "expert is -1"),
        (lambda r: replaced(r, 40, "expert", "16"), "expert id 16 of 16"),
        (lambda r: replaced(r, 1, "expert", r[0].split(",")[5]), "twice in one row"),
        (lambda r: replaced(r, 40, "expert", "x"), "r.csv:48: row .* does not parse"),
        (lambda r: replaced(r, 40, "expert", ""), "r.csv:48: row .* does not parse"),
        (lambda r: replaced(r, 40, "expert", "1.5"), "does not parse"),
        (lambda r: replaced(r, 40, "expert", str(2**70)), "pars|expert is"),
        (lambda r: replaced(r, 40, "step", "-3"), "step is -3"),
        (lambda r: replaced(r, 40, "layer", "99999"), "layer is 99999"),
        (
            lambda r: [row.replace("0,1,", "0,0,", 1) if row.startswith("0,1,4") else row for row in r],
            "prefill steps after",
        ),
        (lambda r: [*r[:-1], r[-1][:12]], "does not parse"),
        (lambda r: [*r, *bigmoe_rows(routing(4, 3, 3, 16), 2, turn=1)], "other layers"),
    ],
)
def test_faulty_route_traces(tmp_path, change, said):
    rows = bigmoe_rows(routing(6, 4, 3, 16), 2)
    refuse(bigmoe(tmp_path / "r.csv", change(rows)), said)


def test_faulty_headers(tmp_path):
    rows = bigmoe_rows(routing(6, 4, 3, 16), 2)
    refuse(bigmoe(tmp_path / "r.csv", rows, columns=COLUMNS.replace("slot", "s")), "no column 'slot'")
    refuse(bigmoe(tmp_path / "r.csv", rows, n="many"), "n_expert='many'")
    (tmp_path / "r.csv").write_text("# route_trace v1\n")
    refuse(tmp_path / "r.csv", "no column 'turn'")
    refuse(bigmoe(tmp_path / "r.csv", rows), "--num-experts says 17, the source says 16", num_experts=17)


# llama.cpp


def llama_rows(batches, layer_ids=None, last_layer_of=lambda b: b):
    """Rows of batches [tokens, layers, k]; the last layer has the last ``last_layer_of(tokens)`` tokens."""
    rows = []
    for ids in batches:
        tokens, layers, _ = ids.shape
        for e in range(layers):
            chosen = ids[tokens - last_layer_of(tokens) :, e] if e == layers - 1 else ids[:, e]
            rows += [f"{(layer_ids or range(layers))[e]},{expert}" for expert in chosen.reshape(-1)]
    return rows


def llama(path, rows, newline="\n"):
    path.write_bytes(newline.join(["layer,expert", *rows, ""]).encode())
    return path


@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(2, 5), min_size=1, max_size=2), st.integers(1, 5)), min_size=1, max_size=3
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_llamacpp_round_trip(tmp_path_factory, requests, newline):
    batches, wholes = [], []
    for i, (prompts, decode) in enumerate(requests):
        whole = routing(sum(prompts) + decode, 4, 3, 16, i)
        cuts = np.cumsum([*prompts, *[1] * (decode - 1)])
        batches += np.split(whole, cuts)
        wholes.append(whole)
    path = llama(tmp_path_factory.mktemp("l") / "t.csv", llama_rows(batches, [1, 2, 3, 4]), newline)
    source, found = read(path, top_k=3, num_experts=16)
    assert source.meta.layers == (1, 2, 3, 4)
    assert (source.meta.engine, source.meta.id_space, source.meta.router_order) == ("llama.cpp", "logical", None)
    assert any("no token index" in note for note in source.notes)
    for i, ((prompts, _), request) in enumerate(zip(requests, found, strict=True)):
        assert (request.ids == wholes[i]).all()
        assert (request.prompt_len, request.decode_start, request.first_pos) == (sum(prompts),) * 2 + (0,)
        assert request.request_id == f"t/{i}"


def test_llamacpp_prompt_without_the_last_layer(tmp_path):
    whole = routing(9, 4, 3, 16)
    # Two prompt batches of 4 and 3 tokens of which only the very last asks for output, then two tokens.
    rows = llama_rows([whole[:4]], last_layer_of=lambda b: 0)
    rows += llama_rows([whole[4:7], whole[7:8], whole[8:]], last_layer_of=lambda b: 1)
    source, (request,) = read(llama(tmp_path / "t.csv", rows), top_k=3, num_experts=16)
    assert (request.ids == whole[6:]).all()
    assert (request.first_pos, request.prompt_len, request.positions) == (6, 7, None)
    assert any("last layer" in note for note in source.notes)


def test_llamacpp_of_single_tokens_has_no_known_phase(tmp_path):
    whole = routing(9, 4, 3, 16)
    path = llama(tmp_path / "t.csv", llama_rows(np.split(whole, 9)))
    assert read(path, top_k=3, num_experts=16)[1][0].decode_start is None
    assert read(path, top_k=3, num_experts=16, phase="decode")[1][0].decode_start == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: [], "no rows"),
        (lambda r: r[:-1], "2 rows in one go, no multiple of k 3"),
        (lambda r: r[:-3], "has 0 of 1 tokens"),
        (lambda r: ["0,x", *r], "t.csv:2: row '0,x' does not parse"),
        (lambda r: [*r[:7], "0", *r[7:]], "t.csv:9: row '0' does not parse"),
        (lambda r: [*r[:7], "0,1,2", *r[7:]], "t.csv:9|multiple"),
        (lambda r: ["0,-1", *r[1:]], "expert is -1"),
        (lambda r: ["0,70000", *r[1:]], "expert is 70000"),
        (lambda r: ["0,16", *r[1:]], "expert id 16 of 16"),
        (lambda r: [r[1], *r[1:]], "twice in one row"),
    ],
)
def test_faulty_llamacpp_traces(tmp_path, change, said):
    whole = routing(6, 4, 3, 16)
    rows = llama_rows([whole[:3], *np.split(whole[3:], 3)])
    refuse(llama(tmp_path / "t.csv", change(rows)), said, top_k=3, num_experts=16)


def test_llamacpp_needs_k(tmp_path):
    path = llama(tmp_path / "t.csv", llama_rows(np.split(routing(6, 4, 3, 16), 6)))
    refuse(path, "--top-k", num_experts=16)
    refuse(path, "--num-experts", top_k=3)


def test_llamacpp_argsort_artefact(tmp_path):
    # Each of 6 tokens gives its whole ranking of 16 experts, k = 4: four fake tokens each.
    whole = np.argsort(np.random.default_rng(0).random((6, 4, 16)), axis=2)
    rows = [f"{e},{expert}" for e in range(4) for expert in whole[:, e].reshape(-1)]
    refuse(llama(tmp_path / "t.csv", rows), "whole rankings.*nb\\[1\\]", top_k=4, num_experts=16)


@given(data=st.text(st.sampled_from('0123456789,-\n.x\r "#'), max_size=120))
def test_any_text_only_makes_source_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    for head, options in (("layer,expert\n", {"top_k": 2}), (f"# route_trace v1\n{COLUMNS}\n", {})):
        path.write_text(head + data)
        try:
            read(path, num_experts=16, **options)
        except SourceError:
            continue


# Rows that claim more than they are


def test_a_few_rows_do_not_make_a_huge_array(tmp_path):
    rows = [f"0,1,{i},{i},{1000 if i == 5 else 0},1,0.5,0,0" for i in range(300)]
    refuse(bigmoe(tmp_path / "t.csv", rows), "300 rows for 300 steps, 300 layers and 1001 slots")


def test_layers_that_never_rise_do_not_make_huge_tables(tmp_path):
    path = llama(tmp_path / "t.csv", [f"{layer},1" for layer in range(2000, 0, -1)])
    refuse(path, "2000 runs of rows for 2000 batches of 2000 layers", top_k=1, num_experts=16)


def test_a_line_without_an_end_is_not_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(csvio, "_BLOCK", 100)
    monkeypatch.setattr(csvio, "_LONGEST_LINE", 1000)
    (tmp_path / "t.csv").write_text("layer,expert\n" + "1" * 5000)
    refuse(tmp_path / "t.csv", "a line of more than 1000 bytes", top_k=1, num_experts=16)
