"""Arrays: .npy, .npz of one request or many, folders; axes, layers, phases, the sidecar, and what is refused."""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import SourceError, UsageError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources import npy as npy_module
from tracekit.sources.config import parse_config


def routing(tokens, layers, k, n, seed=0):
    """Random distinct ids [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, layers, n)), axis=2)[..., :k]


def read(path, **options):
    source = open_source([path], IngestOptions(**options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes > 0
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said) as caught:
        read(path, **options)
    return str(caught.value)


def save(path, array, **others):
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, routed_experts=array, **others)
    return path


shapes = st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 300), st.integers(0, 99))
dtypes = st.sampled_from(["u1", "u2", "<i4", ">i4", "i8", "u8", "i2", ">u2"])


@given(shape=shapes, dtype=dtypes, axes=st.sampled_from(["tlk", "ltk", "tkl", "klt"]), fortran=st.booleans())
def test_npy_round_trip(tmp_path_factory, shape, dtype, axes, fortran):
    tokens, layers, k, more, seed = shape
    n = min(k + more, 256 if dtype == "u1" else 4096)
    ids = routing(tokens, layers, k, n, seed)
    stored = np.transpose(ids, ["tlk".index(axis) for axis in axes]).astype(dtype)
    path = tmp_path_factory.mktemp("a") / "x.npy"
    np.save(path, np.asfortranarray(stored) if fortran else stored)
    hidden = [e for e in range(layers) if not ids[:, e].any()] if k == 1 else []
    if k == 1 and len(hidden) == layers and tokens * layers >= 64:
        return
    source, (request,) = read(path, num_experts=n, axes=axes)
    assert (request.ids == ids).all()
    assert request.ids.dtype == (np.uint8 if n <= 256 else np.uint16)
    assert (source.meta.top_k, source.meta.num_experts, source.meta.layers) == (k, n, tuple(range(layers)))
    assert (request.request_id, request.first_pos, request.decode_start) == ("x", 0, None)
    assert source.meta.source_format == "arrays"


@given(
    lens=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    compressed=st.booleans(),
    weights=st.booleans(),
    tokens=st.sampled_from([None, "rows", "sequence"]),
)
def test_npz_of_many_requests(tmp_path_factory, lens, compressed, weights, tokens):
    total, count = sum(lens), len(lens)
    ids = routing(total, 5, 3, 20).astype(np.uint8)
    w = np.sort(np.random.default_rng(1).random(ids.shape).astype(np.float32))[..., ::-1]
    members = {"expert_ids": ids, "request_lens": np.array(lens), "domain": np.array([f"d{i}" for i in range(count)])}
    if weights:
        members["router_weights"] = w
    if tokens:
        members["token_ids"] = np.arange(total + (count if tokens == "sequence" else 0))
    path = tmp_path_factory.mktemp("a") / "many.npz"
    (np.savez_compressed if compressed else np.savez)(path, **members)
    source, requests = read(path, num_experts=20, label_fields=("domain",), phase="decode")
    kept = [i for i, n in enumerate(lens) if n]
    assert [r.request_id for r in requests] == [f"many/{i}" for i in kept]
    assert [r.labels for r in requests] == [{"domain": f"d{i}"} for i in kept]
    assert (np.concatenate([r.ids for r in requests]) == ids).all()
    assert all(r.decode_start == r.first_pos == 0 for r in requests)
    if weights:
        assert (np.concatenate([r.weights for r in requests]) == w).all()
        assert source.meta.router_order is True
    if tokens:
        starts = np.cumsum([0, *lens])[:-1] + (np.arange(count) if tokens == "sequence" else 0)
        for i, request in zip(kept, requests, strict=True):
            assert request.token_ids.tolist() == list(range(starts[i], starts[i] + lens[i]))


def test_a_memory_map_of_the_right_type_is_not_copied(tmp_path):
    path = save(tmp_path / "x.npy", routing(30, 4, 2, 8).astype(np.uint8))
    _, (request,) = read(path, num_experts=8)
    base = request.ids
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)


def test_big_members_go_through_a_temporary_file(tmp_path, monkeypatch):
    import tracekit.sources.files as files

    monkeypatch.setattr(files, "IN_MEMORY", 1000)
    ids = routing(400, 4, 2, 300)
    np.savez_compressed(tmp_path / "x.npz", routed_experts=ids)
    _, (request,) = read(tmp_path / "x.npz", num_experts=300)
    assert (request.ids == ids).all()


# What the array's neighbours say


@pytest.mark.parametrize("known", ["prompt_len", "prompt_token_ids"])
@pytest.mark.parametrize("whole", [True, False])
def test_request_output_and_whole_sequence(tmp_path, known, whole):
    tokens = np.arange(100, 130)
    beside = {known: 12 if known == "prompt_len" else tokens[:12], "token_ids": tokens if whole else tokens[12:]}
    path = save(tmp_path / "r.npz", routing(29, 4, 2, 8), **beside)
    _, (request,) = read(path, num_experts=8)
    assert (request.prompt_len, request.decode_start, request.first_pos) == (12, 12, 0)
    if whole or known == "prompt_token_ids":
        assert request.token_ids.tolist() == list(range(100, 129))
    else:
        assert request.token_ids is None


def test_decode_rows_of_a_known_prompt(tmp_path):
    path = save(tmp_path / "r.npz", routing(17, 4, 2, 8), prompt_len=12, output_len=18)
    refuse(path, r"17 rows of routing; expected 12 prompt \+ 18 output - 1 - start 0 = 29 rows", num_experts=8)
    _, (request,) = read(path, num_experts=8, phase="decode")
    assert (request.first_pos, request.decode_start, request.prompt_len) == (12, 12, 12)
    refuse(path, "17 rows", num_experts=8, phase="prefill")


def test_phases(tmp_path):
    path = save(tmp_path / "r.npy", routing(20, 4, 2, 8))
    expected = {None: (0, None), "decode": (0, 0), "prefill": (0, 20)}
    for phase, (first, start) in expected.items():
        _, (request,) = read(path, num_experts=8, phase=phase)
        assert (request.first_pos, request.decode_start) == (first, start)
    one = [{"prompt_tokens": 7, "first_pos": 2}]
    _, (request,) = read(path, num_experts=8, requests=one)
    assert (request.first_pos, request.prompt_len, request.decode_start) == (2, 7, 7)
    refuse(path, "rows from position 7 on are decode", num_experts=8, requests=one, phase="prefill")


def test_token_ids_that_fit_nothing(tmp_path):
    ids = routing(29, 4, 2, 8)
    refuse(save(tmp_path / "a.npz", ids, prompt_len=12, token_ids=np.arange(50)), "29 rows", num_experts=8)
    beside = {"prompt_len": 12, "output_len": 18, "token_ids": np.arange(25)}
    refuse(save(tmp_path / "b.npz", ids, **beside), "fit neither", num_experts=8)
    beside = {"prompt_len": 12, "prompt_token_ids": np.arange(11)}
    refuse(save(tmp_path / "c.npz", ids, **beside), "prompt_len says 12, prompt_token_ids says 11", num_experts=8)


def test_prompt_and_output_parts_are_joined(tmp_path):
    ids = routing(30, 4, 2, 8)
    np.savez(tmp_path / "r.npz", prompt_routed_experts=ids[:10], routed_experts=ids[10:])
    _, (request,) = read(tmp_path / "r.npz", num_experts=8)
    assert (request.ids == ids).all()
    assert request.prompt_len == 10


def test_key_names(tmp_path):
    ids = routing(30, 4, 2, 8)
    for key in ("routed_experts", "expert_ids", "topk_ids", "indices", "rollout_routed_experts", "arr_0"):
        np.savez(tmp_path / "r.npz", **{key: ids})
        assert (read(tmp_path / "r.npz", num_experts=8)[1][0].ids == ids).all()
    np.savez(tmp_path / "r.npz", a=ids, b=ids)
    refuse(tmp_path / "r.npz", r"holds no routing array \(a \(30, 4, 2\), b", num_experts=8)
    np.savez(tmp_path / "r.npz", indices=ids, topk_ids=ids)
    refuse(tmp_path / "r.npz", "holds 2 routing arrays", num_experts=8)


def test_request_lens_must_add_up(tmp_path):
    path = save(tmp_path / "r.npz", routing(30, 4, 2, 8), request_lens=[10, 19])
    refuse(path, "adds up to 29 rows", num_experts=8)
    path = save(tmp_path / "r.npz", routing(30, 4, 2, 8), request_lens=[40, -10])
    refuse(path, "request_lens holds -10", num_experts=8)
    path = save(tmp_path / "r.npz", routing(30, 4, 2, 8), request_lens=[15.0, 15.0])
    refuse(path, "request_lens is float64", num_experts=8)


def test_request_lens_along_another_axis(tmp_path):
    ids = routing(30, 4, 2, 8)
    path = save(tmp_path / "r.npz", ids.transpose(1, 0, 2), request_lens=[12, 18], layer_ids=[3, 4, 5, 6])
    source, requests = read(path, num_experts=8)
    assert (np.concatenate([r.ids for r in requests]) == ids).all()
    assert source.meta.layers == (3, 4, 5, 6)


# Folders, names, labels


def test_folder(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["b 'q\"", "a/<i>é🙂", "a/n\nl", "..x"]
    for i, name in enumerate(names):
        path = tmp_path / "in" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        save(path, routing(4 + i, 6, 2, 8, i), num_experts=8, domain=np.array(f"line\n{i}"))
    _, requests = read(tmp_path / "in", label_fields=("domain",), labels={"run": "1"})
    by_id = {r.request_id: r for r in requests}
    assert set(by_id) == set(names[:3])  # a file that begins with a dot is hidden
    assert by_id["a/n\nl"].labels == {"domain": "line\n2", "run": "1"}
    assert by_id["a/n\nl"].label == "line\n2 / 1"
    assert [r.request_id for r in requests] == sorted(by_id)
    # 4 tokens by 6 layers says nothing by itself; the axis that varies does.
    refuse(tmp_path / "in" / "b 'q\".npz", "does not say which axis")


def test_several_files(tmp_path):
    for name in ("x/a", "y/a"):
        (tmp_path / name).parent.mkdir()
        save(tmp_path / f"{name}.npy", routing(20, 3, 2, 8, len(name)))
    source = open_source([tmp_path / "x/a.npy", tmp_path / "y/a.npy"], IngestOptions(num_experts=8))
    assert [r.request_id for r in source.requests()] == ["x/a", "y/a"]
    with pytest.raises(SourceError, match="same id"):
        list(open_source([tmp_path / "x/a.npy", tmp_path / "x/a.npy"], IngestOptions(num_experts=8)).requests())


def test_label_fields(tmp_path):
    path = save(tmp_path / "r.npz", routing(20, 4, 2, 8), domain="x", kind="y")
    assert read(path, num_experts=8, label_fields=("kind", "domain"))[1][0].labels == {"kind": "y", "domain": "x"}
    refuse(path, "no label field 'dataset'; expected one of domain, kind", num_experts=8, label_fields=("dataset",))
    sidecar = [{"domain": "mine", "n": 3, "ok": True, "list": [1]}]
    options = {"num_experts": 8, "requests": sidecar}
    labels = read(path, label_fields=("domain", "kind", "n", "ok"), **options)[1][0].labels
    assert labels == {"domain": "mine", "kind": "y", "n": "3", "ok": "true"}
    refuse(path, "no label field 'list'", label_fields=("list",), **options)


def test_sidecar(tmp_path):
    path = save(tmp_path / "r.npz", routing(30, 4, 2, 8), request_lens=[10, 20])
    named = [{"request_id": "a", "prompt_len": 3}, {"request_id": "b/../'\n"}]
    _, requests = read(path, num_experts=8, requests=named)
    assert [(r.request_id, r.prompt_len) for r in requests] == [("a", 3), ("b/../'\n", None)]
    for bad, said in (
        (named[:1], "the sidecar has 1 entries but the source has more requests"),
        ([*named, {"request_id": "c"}], "has 3 entries but the source has 2 requests"),
        ([named[0], {}], "entry 1 has no request_id"),
        ([named[0], named[0]], "same request_id twice"),
        ([{"prompt_len": -1}, {}], "prompt_len is -1"),
        ([{"prompt_len": "3"}, {}], "prompt_len is '3'"),
    ):
        refuse(path, said, num_experts=8, requests=bad)


def test_sidecar_by_id(tmp_path):
    for i, name in enumerate("abc"):
        save(tmp_path / f"{name}.npz", routing(20 + i, 4, 2, 8, i), num_experts=8)
    entries = [{"request_id": name, "topic": name.upper()} for name in "cab"]
    _, requests = read(tmp_path, requests=entries, label_fields=("topic",))
    assert [(r.request_id, r.label) for r in requests] == [("a", "A"), ("b", "B"), ("c", "C")]
    refuse(tmp_path, "no entry of the sidecar has request_id 'c'", requests=entries[1:])
    refuse(tmp_path, "4 entries", requests=[*entries, {"request_id": "d"}])


def test_sidecar_against_the_file(tmp_path):
    path = save(tmp_path / "r.npz", routing(20, 4, 2, 8), prompt_len=5)
    refuse(path, "the sidecar says prompt_len 6, the file 5", num_experts=8, requests=[{"prompt_len": 6}])


# Experts, k, order of ranks


def test_number_of_experts(tmp_path):
    ids = routing(20, 4, 2, 8)
    path = save(tmp_path / "r.npz", ids)
    assert f"the largest id of this request is {ids.max()}" in refuse(path, "how many experts a layer has")
    path = save(tmp_path / "r.npz", ids, num_experts=8)
    assert read(path)[0].meta.num_experts == 8
    refuse(path, "--num-experts says 9, the source says 8", num_experts=9)
    refuse(save(tmp_path / "r.npy", ids), "2 experts per token of 1", num_experts=1, axes="tlk")
    refuse(tmp_path / "r.npy", "no axis of 3 experts per token", num_experts=8, top_k=3)
    refuse(tmp_path / "r.npy", "70000 experts per layer", num_experts=70_000)


def test_later_requests_must_be_alike(tmp_path):
    first = save(tmp_path / "a.npz", routing(20, 4, 2, 8), num_experts=8)
    for change, said in (
        ({"array": routing(20, 4, 3, 8)}, "k is 3, in the first request 2"),
        ({"array": routing(20, 5, 2, 8)}, "number of layers is 5"),
        ({"num_experts": 9}, "num_experts is 9"),
        ({"layer_ids": [0, 1, 2, 3]}, "layer ids is"),
        ({"model": "other"}, "model is other"),
        ({"router_weights": np.ones((20, 4, 2))}, "router weights are in some requests only"),
        ({"array": np.zeros((20, 4, 2), int)}, "capture never ran"),
    ):
        fields = {"array": routing(20, 4, 2, 8, 1), "num_experts": 8, **change}
        save(tmp_path / "b.npz", **fields)
        with pytest.raises(SourceError, match=said) as caught:
            list(open_source([first, tmp_path / "b.npz"], IngestOptions()).requests())
        assert "b.npz" in str(caught.value)


def test_router_order(tmp_path):
    ids = np.sort(routing(20, 4, 3, 9))
    path = save(tmp_path / "r.npy", ids)
    source, _ = read(path, num_experts=9)
    assert source.meta.router_order is False
    assert read(path, num_experts=9, router_order=True)[0].meta.router_order is True
    assert read(save(tmp_path / "r.npy", routing(20, 4, 3, 9)), num_experts=9)[0].meta.router_order is None
    # Two tokens may be sorted by chance.
    assert read(save(tmp_path / "s.npy", ids[:2, :1]), num_experts=9, axes="tlk")[0].meta.router_order is None
    assert read(path, num_experts=9, id_space="physical")[0].meta.id_space == "physical"


def test_weights(tmp_path):
    ids = routing(20, 4, 2, 8)
    refuse(
        save(tmp_path / "w.npz", ids, router_weights=np.ones((20, 4, 3))), r"router_weights \(20, 4, 3\)", num_experts=8
    )
    refuse(save(tmp_path / "w.npz", ids, router_weights=ids), "router weights are int64", num_experts=8)
    mixed = np.random.default_rng(0).random(ids.shape)
    assert read(save(tmp_path / "w.npz", ids, router_weights=mixed), num_experts=8)[0].meta.router_order is None


# Axes


GLM = {"num_hidden_layers": 6, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1}


@pytest.mark.parametrize("axes", ["tlk", "ltk", "tkl", "lkt", "ktl", "klt"])
@pytest.mark.parametrize("layers", [5, 6])
def test_axes_by_config(tmp_path, axes, layers):
    ids = routing(30, layers, 4, 16)
    if layers == 6:
        ids[:, 0] = 0
    path = save(tmp_path / "r.npy", np.transpose(ids, ["tlk".index(axis) for axis in axes]))
    source, (request,) = read(path, config=parse_config(GLM))
    assert source.meta.layers == (1, 2, 3, 4, 5)
    assert (request.ids == ids[:, -5:]).all()
    assert any("axes were taken" in note for note in source.notes) == (axes != "tlk")


def test_axes_by_config_of_another_model(tmp_path):
    path = save(tmp_path / "r.npy", routing(30, 7, 4, 16))
    refuse(path, "contradicts the config: no axis has its number of layers", config=parse_config(GLM))
    refuse(path, "contradicts the config: --axes tlk makes 7 layers", config=parse_config(GLM), axes="tlk")


@pytest.mark.parametrize("shape", [(24, 30, 2), (12, 12, 2), (4, 4, 4), (2, 30, 24)])
def test_axes_that_cannot_be_told(tmp_path, shape):
    ids = routing(30, 24, 2, 2000) if 24 in shape else routing(*shape, 2000)
    path = save(tmp_path / "r.npy", ids.transpose([(30, 24, 2).index(n) for n in shape]) if 24 in shape else ids)
    refuse(path, "does not say which axis.*--axes", num_experts=2000)


def test_axes_by_token_counts_and_layer_ids(tmp_path):
    ids = routing(20, 24, 2, 64)
    _, (request,) = read(save(tmp_path / "a.npz", ids, prompt_len=5, output_len=16), num_experts=64)
    assert (request.ids == ids).all()
    _, (request,) = read(save(tmp_path / "b.npz", ids.transpose(1, 0, 2), layer_ids=np.arange(24)), num_experts=64)
    assert (request.ids == ids).all()
    _, (request,) = read(save(tmp_path / "c.npz", ids.transpose(1, 0, 2), token_ids=np.arange(21)), num_experts=64)
    assert (request.ids == ids).all()


def test_axes_option(tmp_path):
    path = save(tmp_path / "r.npy", routing(30, 4, 2, 8))
    refuse(path, "--axes 'tl'", num_experts=8, axes="tl")
    refuse(path, "twice in one row", num_experts=8, axes="tkl")


# Layers


def test_dense_layers(tmp_path):
    ids = routing(30, 5, 2, 8)
    ids[:, [0, 3]] = 0
    path = save(tmp_path / "r.npy", ids)
    source, (request,) = read(path, num_experts=8)
    assert source.meta.layers == (1, 2, 4)
    assert (request.ids == ids[:, [1, 2, 4]]).all()
    assert "layers 0, 3 are dense (all zero) and were left out" in source.notes
    path = save(tmp_path / "r.npz", ids, layer_ids=[4, 3, 2, 1, 0])
    source, (request,) = read(path, num_experts=8)
    assert source.meta.layers == (0, 2, 3)
    assert (request.ids == ids[:, [4, 2, 1]]).all()


def test_layer_ids_of_the_moe_layers_only(tmp_path):
    ids = routing(30, 4, 2, 8)
    ids[:, 0] = 0
    path = save(tmp_path / "r.npz", ids, moe_layer_ids=[1, 2, 3])
    assert read(path, num_experts=8)[0].meta.layers == (1, 2, 3)
    refuse(save(tmp_path / "r.npz", ids, moe_layer_ids=[1, 2, 9]), "3 layer ids for a layer axis of 4", num_experts=8)
    refuse(save(tmp_path / "r.npz", ids, moe_layer_ids=[1, 1, 2, 3]), "repeat", num_experts=8)


def test_layers_against_the_config(tmp_path):
    config = parse_config(GLM)
    ids = routing(30, 6, 4, 16)
    refuse(save(tmp_path / "r.npy", ids), r"layers \[0\] have routing but are dense by the config", config=config)
    shifted = ids.copy()
    shifted[:, 5] = 0
    source, (request,) = read(save(tmp_path / "r.npy", shifted), config=config)
    assert source.meta.layers == (1, 2, 3, 4, 5)
    assert (request.ids == ids[:, :5]).all()
    assert any("vLLM 0.21 packed" in note for note in source.notes)
    holes = ids.copy()
    holes[:, [0, 3]] = 0
    refuse(save(tmp_path / "r.npy", holes), r"MoE layers \[3\] are all zero", config=config)
    refuse(save(tmp_path / "r.npy", np.zeros_like(ids)), "capture never ran", config=config)
    refuse(save(tmp_path / "r.npz", ids, layer_ids=np.arange(6)), r"say.*dense|dense: \[0\]", config=config)


def test_a_layer_that_is_zero_in_one_request(tmp_path):
    first, second = routing(20, 4, 2, 8), routing(21, 4, 2, 8, 1)
    second[:, 2] = 0
    save(tmp_path / "a.npy", first)
    save(tmp_path / "b.npy", second)
    message = refuse(tmp_path, "layer 2 is zero in this request but routed in others", num_experts=8)
    assert "b.npy, request 'b'" in message
    first[:, 2], second[:, 2] = 0, first[0, 1]
    save(tmp_path / "a.npy", first)
    save(tmp_path / "b.npy", second)
    refuse(tmp_path, "layer 2 is routed in this request but zero in the first one", num_experts=8)


def test_top_1(tmp_path):
    path = save(tmp_path / "r.npy", np.zeros((40, 4, 1), int))
    refuse(path, "capture never ran", num_experts=8)
    ids = np.zeros((40, 4, 1), int)
    ids[-1, 0] = 3
    source, (request,) = read(save(tmp_path / "r.npy", ids), num_experts=8)
    assert source.meta.layers == (0, 1, 2, 3)
    assert (request.ids == ids).all()


def test_reduced_and_widened_top_k(tmp_path):
    config = parse_config({**GLM, "first_k_dense_replace": 0})
    source, _ = read(save(tmp_path / "r.npy", routing(30, 6, 3, 16)), config=config)
    assert (source.meta.top_k, source.meta.native_top_k) == (3, 4)
    refuse(save(tmp_path / "r.npy", routing(30, 6, 5, 16)), "more than the model's 4", config=config)


def test_config_beside_the_trace(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}')
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "r.npy", tmp_path / "in" / "r.npy"):
        save(path, routing(30, 4, 2, 8))
    assert read(tmp_path / "r.npy")[0].meta.num_experts == 8
    assert read(tmp_path / "in")[0].meta.num_experts == 8
    (tmp_path / "config.json").write_text("{}")
    source, _ = read(tmp_path / "r.npy", num_experts=8)
    assert any("was not used" in note for note in source.notes)


# Faulty ids


@pytest.mark.parametrize(
    ("value", "said"), [(-1, "negative expert id -1"), (16, "expert id 16 of 16 experts"), (None, "twice in one row")]
)
def test_faulty_ids_are_named(tmp_path, value, said):
    ids = routing(6000, 5, 3, 16)
    ids[5001, 3, 2] = ids[5001, 3, 0] if value is None else value
    message = refuse(save(tmp_path / "r.npy", ids), said, num_experts=16)
    assert "r.npy, request 'r', token row 5001, layer 3" in message


@given(seed=st.integers(0, 10_000), k=st.integers(2, 9))
def test_every_duplicate_is_found(tmp_path_factory, seed, k):
    rng = np.random.default_rng(seed)
    ids = routing(50, 3, k, k + 3, seed)
    token, layer = rng.integers(50), rng.integers(3)
    i, j = rng.choice(k, 2, replace=False)
    ids[token, layer, i] = ids[token, layer, j]
    path = save(tmp_path_factory.mktemp("a") / "r.npy", ids.astype(np.uint8))
    message = refuse(path, "twice in one row", num_experts=k + 3, axes="tlk")
    assert f"token row {token}, layer {layer}" in message


def test_rows_of_zeros_are_tokens_not_captured(tmp_path):
    ids = routing(30, 4, 2, 8)
    ids[12:15] = 0
    assert "not captured" in refuse(save(tmp_path / "r.npy", ids), "token row 12, layer 0", num_experts=8)


def test_padding(tmp_path):
    ids = routing(30, 4, 4, 32)
    ids[-3:] = np.arange(4)
    refuse(save(tmp_path / "r.npy", ids), "padding", num_experts=32)


def test_argsort_artefact(tmp_path):
    rng = np.random.default_rng(0)
    whole = np.argsort(rng.random((10, 6, 16)), axis=2)
    cut = whole.transpose(0, 2, 1).reshape(10, 4, 4, 6).reshape(40, 4, 6).transpose(0, 2, 1)
    refuse(save(tmp_path / "r.npy", cut), "whole rankings cut into pieces", num_experts=16)


# Files that lie


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((30, 4, 2)), "float64.*not expert ids"),
        (np.zeros((30, 4, 64), np.float32), "router logits or expert counts"),
        (np.zeros((30, 4, 2), bool), "the array is bool"),
        (np.zeros((30, 4, 2), complex), "the array is complex"),
        (np.zeros((2, 30, 4, 2), int), "no request with any routing"),
        (np.zeros((2, 30, 4, 2, 2), int), "three axes"),
        (np.zeros((30, 4), int), "three axes"),
        (np.array(3), "three axes"),
        (np.zeros((0, 4, 2), int), "no request with any routing"),
        (np.zeros((30, 0, 2), int), "no request with any routing"),
        (np.zeros(3, [("a", "i4")]), "the array is"),
        (np.array(["a"]), "the array is"),
    ],
)
def test_arrays_that_are_no_ids(tmp_path, array, said):
    refuse(save(tmp_path / "r.npy", array), said, num_experts=8)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    trap = np.array([Trap()], dtype=object)
    np.save(tmp_path / "r.npy", trap, allow_pickle=True)
    refuse(tmp_path / "r.npy", "Python objects", num_experts=8)
    np.savez(tmp_path / "r.npz", routed_experts=trap, allow_pickle=True)
    refuse(tmp_path / "r.npz", "Python objects", num_experts=8)
    np.savez(tmp_path / "r.npz", routed_experts=routing(30, 4, 2, 8), token_ids=trap, allow_pickle=True)
    refuse(tmp_path / "r.npz", "Python objects", num_experts=8)
    (tmp_path / "r.npy").write_bytes(pickle.dumps(Trap()))
    refuse(tmp_path / "r.npy", "a Python pickle, which is never loaded", num_experts=8)
    with zipfile.ZipFile(tmp_path / "r.pt", "w") as archive:
        archive.writestr("r/data.pkl", pickle.dumps(Trap()))
    refuse(tmp_path / "r.pt", "imports and calls nothing that a file names", num_experts=8)


def header(shape, descr="|u1", fortran=False):
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return npy_module.MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "shape", [(2**60,), (2**40, 2**40, 2**40), (31, 4, 2), (29, 4, 2), (-1, 4, 2), (30.0, 4, 2), "x", (True, 1, 240)]
)
def test_headers_that_lie(tmp_path, shape):
    data = header(shape) + bytes(240 if shape != (True, 1, 240) else 239)
    (tmp_path / "r.npy").write_bytes(data)
    refuse(tmp_path / "r.npy", "claims|header", num_experts=8)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "r.npz", "w", method) as archive:
            archive.writestr("routed_experts.npy", data)
        refuse(tmp_path / "r.npz", "claims|header", num_experts=8)


@pytest.mark.parametrize(
    "text", [b"{", b"(" * 5000, b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", b"\xff"]
)
def test_headers_that_are_none(tmp_path, text):
    data = npy_module.MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text
    (tmp_path / "r.npy").write_bytes(data)
    refuse(tmp_path / "r.npy", "header|objects", num_experts=8)
    (tmp_path / "r.npy").write_bytes(npy_module.MAGIC + b"\x09\x00" + data[8:])
    refuse(tmp_path / "r.npy", "header|version", num_experts=8)


def test_a_zip_whose_directory_lies_about_the_size(tmp_path):
    member = io.BytesIO()
    np.save(member, routing(30, 4, 2, 8).astype(np.uint8))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "r.npz", "w", method) as archive:
            archive.writestr("routed_experts.npy", header((2**29, 4, 2)) + member.getvalue()[128:])
            archive.filelist[0].file_size = 2**32 - 2
        refuse(tmp_path / "r.npz", "impossible", num_experts=8)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(npy_module, "IN_MEMORY", 1 << 20)
    np.savez_compressed(tmp_path / "r.npz", routed_experts=np.zeros((1 << 17, 8, 2), np.uint8))
    refuse(tmp_path / "r.npz", "constant filler", num_experts=8)


@pytest.mark.parametrize("name", ["r.npy", "r.npz", "c.npz"])
def test_cut_off_files(tmp_path, name):
    whole = tmp_path / name
    beside = {"prompt_len": 5, "domain": "x", "num_experts": 8}
    if name == "c.npz":
        np.savez_compressed(whole, routed_experts=routing(300, 4, 2, 8), **beside)
    else:
        save(whole, routing(300, 4, 2, 8), **beside)
    data = whole.read_bytes()
    for length in {0, 1, 5, 6, 8, 50, 127, 128, 129, *range(0, len(data), max(1, len(data) // 23)), len(data) - 1}:
        whole.write_bytes(data[:length])
        with pytest.raises(SourceError):
            read(whole, num_experts=8)


def test_damaged_bytes_inside_a_compressed_member(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", routed_experts=routing(300, 4, 2, 8))
    data = bytearray((tmp_path / "c.npz").read_bytes())
    for at in range(60, len(data), len(data) // 17):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        (tmp_path / "c.npz").write_bytes(changed)
        try:
            read(tmp_path / "c.npz", num_experts=8)
        except SourceError:
            continue


def test_paths_and_options_at_fault(tmp_path):
    refuse(tmp_path / "missing.npy", "does not exist")
    (tmp_path / "empty.npy").touch()
    refuse(tmp_path / "empty.npy", "is empty")
    (tmp_path / "sub").mkdir()
    refuse(tmp_path / "sub", "no file that a reader takes")
    (tmp_path / "noise.bin").write_bytes(bytes(range(200, 256)))
    refuse(tmp_path / "noise.bin", "of no known format")
    with pytest.raises(UsageError, match="no source format 'numpy'"):
        read(save(tmp_path / "r.npy", routing(9, 3, 2, 8)), source_format="numpy")
    with pytest.raises(UsageError, match="no source"):
        open_source([])
    refuse(tmp_path / "noise.bin", "noise.bin", source_format="arrays")
    refuse(tmp_path / "noise.bin", "noise.bin", source_format="vllm")
    refuse(tmp_path / "noise.bin", "noise.bin", source_format="bigmoe")
    refuse(tmp_path / "noise.bin", "noise.bin", source_format="llamacpp", top_k=2)


@given(
    data=st.binary(min_size=1, max_size=300), prefix=st.sampled_from([b"", b"PK\x03\x04", npy_module.MAGIC, b"{", b"["])
)
def test_noise_only_makes_source_errors(tmp_path_factory, data, prefix):
    path = tmp_path_factory.mktemp("n") / "x.npz"
    path.write_bytes(prefix + data)
    with pytest.raises(SourceError):
        read(path, num_experts=8)


# --- predictions ---------------------------------------------------------------------------------


def predicted(ids, distance, seed=5):
    """What a predictor may have said of these rows: other ids, 255 where there is no layer to predict from."""
    out = np.roll(ids, 1, axis=2) if seed is None else routing(*ids.shape, 32, seed)
    out = out.astype(np.uint8)
    out[:, :distance] = 255
    return out


def assert_predicted(request, expected):
    """Compare with arrays by predictor and distance, 255 where there is nothing."""
    assert {(p.predictor, p.distance) for p in request.predictions} == set(expected)
    for p in request.predictions:
        want = expected[p.predictor, p.distance]
        np.testing.assert_array_equal(p.known, (want != 255).all(2))
        np.testing.assert_array_equal(p.ids[p.known], want[p.known])


def test_predictions_beside_the_routing(tmp_path):
    ids = routing(9, 4, 2, 32)
    one, two, hidden = predicted(ids, 1), predicted(ids, 2, 6), predicted(ids, 1, 7)
    path = tmp_path / "x.npz"
    np.savez(path, routed_experts=ids, predicted1=one, predicted2=two, predicted_quasi_hidden_1=hidden)
    _, (request,) = read(path, num_experts=32)
    expected = {("next_gate", 1): one, ("next_gate", 2): two, ("quasi_hidden", 1): hidden}
    assert_predicted(request, expected)
    _, (request,) = read(save(tmp_path / "plain.npz", ids), num_experts=32)
    assert request.predictions == ()


def test_predictions_are_no_routing_array(tmp_path):
    ids = routing(9, 4, 2, 32)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, whatever=ids, predicted1=predicted(ids, 1))
    _, (request,) = read(path, num_experts=32)
    np.testing.assert_array_equal(request.ids, ids)
    assert_predicted(request, {("next_gate", 1): predicted(ids, 1)})


@pytest.mark.parametrize("axes", ["tlk", "ltk", "tkl"])
def test_predictions_of_many_requests_in_any_order_of_axes(tmp_path, axes):
    order = ["tlk".index(axis) for axis in axes]
    lens, ids = [3, 11, 5], routing(19, 4, 2, 32)
    guess = predicted(ids, 1)
    path = tmp_path / "x.npz"
    np.savez(path, routed_experts=ids.transpose(order), predicted1=guess.transpose(order), request_lens=np.array(lens))
    _, requests = read(path, num_experts=32, axes=axes)
    for request, part in zip(requests, np.split(guess, np.cumsum(lens)[:-1]), strict=True):
        assert_predicted(request, {("next_gate", 1): part})


def test_predictions_of_a_padded_batch(tmp_path):
    ids = np.stack([routing(6, 4, 2, 32, seed) for seed in range(2)])
    guess = np.stack([predicted(row, 1, seed) for seed, row in enumerate(ids)])
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    path = tmp_path / "x.npz"
    np.savez(path, routed_experts=ids, attention_mask=mask, predicted1=guess)
    _, requests = read(path, num_experts=32)
    rows = [len(request.ids) for request in requests]
    for i, request in enumerate(requests):
        assert_predicted(request, {("next_gate", 1): guess[i, 6 - sum(mask[i]) :][: rows[i]]})
    np.savez(path, routed_experts=ids, attention_mask=mask, predicted1=guess[:1])
    refuse(path, r"predictions of 'next_gate' from 1 MoE layers before have shape \(1, 6, 4, 2\)", num_experts=32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda p: p[1:], r"shape \(8, 4, 2\).*for 9 tokens"),
        (lambda p: p[:, :2], r"shape \(9, 2, 2\)"),
        (lambda p: p.astype(np.float16), "float16"),
        (lambda p: p[..., 0], r"shape \(9, 4\)"),
        (lambda p: np.where(p == 255, p, 40), "of 32 experts"),
    ],
)
def test_predictions_that_do_not_fit(tmp_path, wrong, said):
    ids = routing(9, 4, 2, 32)
    refuse(save(tmp_path / "x.npz", ids, predicted1=wrong(predicted(ids, 1))), said, num_experts=32)


def test_predictions_that_request_lens_do_not_cut(tmp_path):
    ids = routing(9, 4, 2, 32)
    path = save(tmp_path / "x.npz", ids, predicted1=predicted(ids, 1)[1:], request_lens=np.array([4, 5]))
    refuse(path, r"have shape \(8, 4, 2\), the ids \(9, 4, 2\)", num_experts=32)


@given(data=st.data())
def test_damaged_predictions_only_make_source_errors(tmp_path_factory, data):
    ids = routing(5, 3, 2, 32)
    made = io.BytesIO()
    np.savez(made, routed_experts=ids.astype(np.uint8), predicted1=predicted(ids, 1), num_experts=32)
    noisy = bytearray(made.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        noisy[data.draw(st.integers(0, len(noisy) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("n") / "x.npz"
    path.write_bytes(noisy)
    try:
        for request in open_source([path], IngestOptions()).requests():
            for p in request.predictions:
                assert p.ids.shape == request.ids.shape
                assert p.ids.max() < 32
    except (SourceError, UsageError):
        pass


@pytest.mark.parametrize(
    "shape", ["(1" + "0" * 4000 + ", 1" + "0" * 4000 + ")", "(" + "1, " * 100 + ")"], ids=["digits", "axes"]
)
def test_shapes_that_no_message_could_print(tmp_path, shape):
    data = header(()).replace(b"()", shape.encode())
    text = data[10:].rstrip() + b"\n"
    (tmp_path / "r.npy").write_bytes(data[:8] + len(text).to_bytes(2, "little") + text + b"x")
    refuse(tmp_path / "r.npy", "impossible shape|no readable npy header", num_experts=8)


def test_requests_without_rows_are_paid_for_by_bytes(tmp_path):
    lens = np.zeros(1 << 18, np.uint8)
    lens[0] = 10
    np.savez_compressed(tmp_path / "r.npz", routed_experts=routing(10, 4, 2, 8), request_lens=lens)
    refuse(tmp_path / "r.npz", "request_lens has 262144 entries, more than the file has bytes", num_experts=8)


def test_texts_that_unpack_to_more_than_labels(tmp_path):
    texts = {f"t{i}": np.array("a" * (1 << 22)) for i in range(5)}
    np.savez_compressed(tmp_path / "r.npz", routed_experts=routing(10, 4, 2, 8), **texts)
    refuse(tmp_path / "r.npz", "texts up to 't4' take more than", num_experts=8)


def test_a_folder_of_arrays_whose_names_do_not_say_so(tmp_path):
    for rows in (20, 30):
        with (tmp_path / f"r{rows}.dat").open("wb") as file:
            np.save(file, routing(rows, 4, 2, 8).astype(np.uint8))
    _, requests = read(tmp_path, num_experts=8)
    assert [len(request.ids) for request in requests] == [20, 30]


def test_layer_numbers_that_no_store_holds(tmp_path):
    np.savez(tmp_path / "r.npz", routed_experts=routing(30, 3, 2, 8), layer_ids=[1, 2, 1 << 16])
    refuse(tmp_path / "r.npz", "layer id 65536; expected 0 to 65535", num_experts=8)
