"""The law of routing: closed forms, what a fit gives back, its file, and traces drawn from it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.cli import main
from tracekit.economics import law_file
from tracekit.economics.law import LONGEST, RANGES, LayerLaw, RoutingLaw, absence, beta_nodes, pair_mean, profile
from tracekit.economics.law_fit import entropy_norm, unbiased_popularity
from tracekit.errors import SourceError, TracekitError, TracekitWarning, UsageError
from tracekit.synthetic import synth

LAYER = LayerLaw(cold=0.8, hot=0.2, request=0.15, anchor=0.4, keep=0.9, stay=0.15)
LAW = RoutingLaw(32, 4, (LAYER,))

layers = st.builds(
    LayerLaw,
    **{name: st.floats(0, min(high, 3.0) if high > 1 else 0.999) for name, high in RANGES.items()},
)


# --- closed forms ------------------------------------------------------------------------------


def test_without_parameters_it_is_the_uniform_formula() -> None:
    law = RoutingLaw(32, 4, (LayerLaw(), LayerLaw()))
    windows, sizes = np.arange(1, 41), np.array([[1], [2], [64]])
    assert law.unique(windows, sizes) == pytest.approx(32 * (1 - (1 - 4 / 32) ** (windows * sizes)), rel=1e-12)
    assert law.overlap([1, 7, 32]) == pytest.approx([4 / 32] * 3)


def test_a_token_that_always_stays_loads_k() -> None:
    law = RoutingLaw(32, 4, (LayerLaw(1.0, 0.5, 0.2, 0.3, 0.9, stay=1.0),))
    assert law.unique([1, 4, 100]) == pytest.approx([4, 4, 4])
    assert law.overlap([1, 50]) == pytest.approx([1, 1])


def test_a_passage_that_is_all_anchor_and_never_ends_is_one_set() -> None:
    law = RoutingLaw(16, 2, (LayerLaw(anchor=1.0, keep=1.0),))
    assert law.unique([1, 8]) == pytest.approx([2, 2])
    # B requests, each with one set of its own.
    assert law.unique(8, 3) == pytest.approx(16 * (1 - (1 - 2 / 16) ** 3))


def test_independent_tokens_of_alike_requests_follow_popularity() -> None:
    law = RoutingLaw(32, 4, (LayerLaw(cold=1.2, hot=0.3),))
    p = law.popularity()[0]
    assert law.unique(4, 8) == pytest.approx((1 - (1 - p) ** 32).sum(), rel=1e-12)
    assert law.overlap(1) == pytest.approx((p**2).sum() / 4)


def test_requests_alone_give_the_beta_binomial() -> None:
    spread, T = 0.2, 8
    law = RoutingLaw(32, 4, (LayerLaw(cold=1.0, request=spread),))
    p, a = law.popularity()[0], (1 - spread) / spread
    absent = np.prod([(a * (1 - p) + i) / (a + i) for i in range(T)], axis=0)
    assert law.unique(T) == pytest.approx((1 - absent).sum(), rel=1e-12)


@given(layer=layers, k=st.integers(1, 6), spare=st.integers(0, 40))
def test_two_tokens_load_what_their_overlap_leaves(layer: LayerLaw, k: int, spare: int) -> None:
    law = RoutingLaw(k + spare, k, (layer,))
    assert law.unique(2) == pytest.approx(k * (2 - float(law.overlap(1))), rel=1e-6)
    unions = law.unique(np.arange(1, 12))
    assert (np.diff(unions) > -1e-6).all()
    assert unions[0] == pytest.approx(k)
    assert unions[-1] <= min(k + spare, 11 * k) + 1e-6
    assert law.popularity().sum() == pytest.approx(k)
    assert law.popularity().max() <= 1


@given(
    r=st.floats(0, 1),
    anchor=st.floats(0, 1),
    keep=st.floats(0, 1),
    stay=st.floats(0, 1),
    window=st.integers(1, 5),
)
def test_absence_is_the_sum_over_all_that_can_happen(
    r: float, anchor: float, keep: float, stay: float, window: int
) -> None:
    """Enumerate which tokens are fresh, which of them turn to a new passage, and which passages hold the expert."""
    total = 0.0
    for fresh in itertools.product((True, False), repeat=window - 1):
        draws = 1 + sum(fresh)
        chance = math.prod(1 - stay if f else stay for f in fresh)
        for turns in itertools.product((True, False), repeat=draws - 1):
            chosen = math.prod(1 - keep if t else keep for t in turns)
            lengths = np.bincount(np.cumsum([0, *turns]))
            absent = math.prod(
                r * ((1 - anchor) * (1 - r)) ** n + (1 - r) * (1 - (1 - anchor) * r) ** n for n in lengths
            )
            total += chance * chosen * absent
    assert absence(np.float64(r), window, anchor, keep, stay)[-1] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("concentration", [0.01, 1.0, 5.0, 1e5])
def test_quadrature_is_exact(concentration: float) -> None:
    mean = np.array([1e-9, 0.1, 0.5, 0.99])
    at, weight = beta_nodes(mean, concentration, 6)
    for power in range(12):
        moment = np.prod([(concentration * mean + i) / (concentration + i) for i in range(power)], axis=0)
        assert (at**power * weight).sum(axis=-1) == pytest.approx(moment * np.ones(4), rel=1e-9, abs=1e-12)


@given(ratio=st.floats(0, 1), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_mean_over_pairs_is_the_sum_over_lags(ratio: float, lengths: list[int]) -> None:
    pairs = [(n - 1, sum(2 * (n - d) * ratio**d for d in range(1, n)) / (n * (n - 1))) for n in lengths if n > 1]
    weight = sum(n for n, _ in pairs)
    expected = sum(n * value for n, value in pairs) / weight if weight else 1.0
    assert pair_mean(ratio, lengths) == pytest.approx(expected, abs=1e-6)


def test_the_busy_end_is_zipf() -> None:
    p = profile(64, 4, 0.0, 0.7)[::-1]
    rank = np.arange(64) + 0.5
    assert p / p[0] == pytest.approx((rank / rank[0]) ** -0.7)


def test_pooled_popularity_is_freed_of_its_own_requests() -> None:
    # Two requests that each repeat one set, disjoint: pooled p is 1/2 for both, and tokens of the two share nothing.
    assert unbiased_popularity(0.5, 1.0, np.array([10, 10])) == pytest.approx(0.0)
    # The request baseline leaves a token's overlap with itself out, pooled counts do not.
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        ids = rng.integers(0, 8, size=(2, 5))  # k = 1, uniform: the truth is 1/8
        counts = np.stack([np.bincount(row, minlength=8) for row in ids])
        request = (counts * (counts - 1)).sum() / (2 * 5 * 4)
        found.append(unbiased_popularity(float(((counts.sum(axis=0) / 10) ** 2).sum()), request, np.array([5, 5])))
    assert np.mean(found) == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request": 1.0}, "below 1"),
        ({"stay": 1.1}, "0 to 1"),
        ({"anchor": -0.1}, "anchor of -0.1"),
        ({"keep": math.nan}, "keep of nan"),
        ({"cold": 21}, "0 to 20"),
        ({"hot": "1"}, "hot of '1'"),
        ({"stay": True}, "stay of True"),
    ],
)
def test_parameters_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerLaw(**change)


def test_arguments_out_of_range() -> None:
    with pytest.raises(UsageError, match="top_k=5"):
        RoutingLaw(4, 5, (LAYER,))
    with pytest.raises(UsageError, match="0 layers"):
        RoutingLaw(4, 2, ())
    for window in (0, 1.5, LONGEST + 1):
        with pytest.raises(UsageError, match="window"):
            LAW.unique(window)
    with pytest.raises(UsageError, match="batch size"):
        LAW.unique(1, 0)
    with pytest.raises(UsageError, match="lag of -1"):
        LAW.overlap(-1)
    assert LAW.unique(np.array([], np.int64)).shape == (0,)


# --- fits --------------------------------------------------------------------------------------


def test_figures_of_a_law_give_the_law_back() -> None:
    lags, windows = range(1, 33), range(2, 9)
    distant = float(LAW.overlap(10**6))
    found = RoutingLaw.from_summary(
        32,
        4,
        {d: float(LAW.overlap(d)) for d in lags},
        float(LAW.popularity_overlaps()[0]),
        {t: float(LAW.unique(t)) for t in windows},
        entropy_norm=entropy_norm(LAW.popularity()[0]),
        request_overlap=distant,
    )
    for name in RANGES:
        assert found.parameter(name) == pytest.approx(LAW.parameter(name), abs=0.02), name
    assert found.unique(4, [1, 16, 64]) == pytest.approx(LAW.unique(4, [1, 16, 64]), rel=2e-3)
    assert max(abs(f.law / f.observed - 1) for f in found.figures) < 0.005


def test_the_figures_that_cohere_published_have_a_law() -> None:
    """N = 128, k = 8: overlaps and the union are given back to 2.5 and 1 %; no law was published for larger batches."""
    law = RoutingLaw.from_summary(128, 8, (0.381, 0.329, 0.301, 0.299), 0.118, {4: 20.36}, layers=2)
    assert law.overlap([1, 2, 3, 4]) == pytest.approx([0.381, 0.329, 0.301, 0.299], rel=0.025)
    assert law.unique(4) == pytest.approx(20.36, rel=0.01)
    assert law.popularity_overlaps() == pytest.approx([0.118] * 2, rel=1e-3)
    sizes = np.array([1, 2, 4, 8, 16, 32, 64])
    ratio = law.unique(4, sizes) / law.unique(1, sizes)
    assert (np.diff(ratio) < 0).all(), "a larger batch has more of the verification's experts already"
    assert ratio[0] == pytest.approx(20.36 / 8, rel=0.01)


def test_one_overlap_alone_has_a_law() -> None:
    law = RoutingLaw.from_summary(64, 4, [0.257])  # mlx-lm PR 1485: two tokens load 1.74 k
    assert law.unique(2) / 4 == pytest.approx(1.743, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 4, [0.4], 0.1), "at least k / N = 0.125"),
        ((32, 4, [1.4], 0.2), "overlap at lag 1 of 1.4"),
        ((32, 4, {0: 0.4}, 0.2), "lag of 0"),
        ((32, 4, [], 0.2), "no overlap and no union"),
        ((32, 4, [0.4], 0.2, {4: 17.0}), "17 unique experts in 4 tokens"),
        ((32, 4, [0.4], 0.2, {0: 4.0}), "in 0 tokens"),
        ((32, 4, [0.4], math.nan), "popularity_overlap of nan"),
        ((4, 8, [0.4]), "N = 4 and k = 8"),
    ],
)
def test_impossible_figures(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RoutingLaw.from_summary(*arguments)


# --- traces: fitted to them, and drawn from it -------------------------------------------------

LAYERS = (LayerLaw(0.9, 0.1, 0.2, 0.45, 0.9, 0.12), LayerLaw(0.4, 0.3, 0.1, 0.3, 0.93, 0.2))
DRAWN = RoutingLaw(24, 3, LAYERS, {"trace": "truth"})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law")
    trace = synth(law=DRAWN, requests=120, tokens=(250, 400), seed=11)
    sidecar = trace.save(folder / "drawn.npz")
    tk.ingest(folder / "drawn.npz", folder / "store", requests=sidecar, num_experts=24, phase="decode")
    return folder / "store"


def test_a_drawn_trace_gives_the_laws_figures_within_their_intervals(drawn: Path) -> None:
    windows = tk.windows(drawn, max_window=8, batch_size=(1, 8))
    missed = [
        (row["window"], row["batch_size"])
        for row in windows.filter(windows["window"] > 1).rows(named=True)
        if not row["observed_lo"] <= DRAWN.unique(row["window"], row["batch_size"]) <= row["observed_hi"]
    ]
    assert not missed
    lags = tk.autocorr(drawn, max_lag=32)
    outside = [
        row["lag"]
        for row in lags.rows(named=True)
        if not row["overlap_lo"] <= DRAWN.overlap(row["lag"]) <= row["overlap_hi"]
    ]
    assert len(outside) <= 1  # one in twenty may


def test_a_drawn_trace_gives_the_parameters_back(drawn: Path) -> None:
    law = tk.fit_law(drawn)
    for name, tolerance in {
        "cold": 0.15,
        "hot": 0.1,
        "request": 0.03,
        "anchor": 0.04,
        "keep": 0.03,
        "stay": 0.02,
    }.items():
        assert law.parameter(name) == pytest.approx(DRAWN.parameter(name), abs=tolerance), name
    assert law.source["requests"] == 120
    assert law.source["phase"] == "decode"
    predicted = [f for f in law.figures if not f.target]
    assert {f.batch_size for f in predicted} == {1, 2, 4, 8, 16, 32, 64}
    assert max(abs(f.law / f.observed - 1) for f in law.figures) < 0.03


def test_a_drawn_trace_is_as_its_truth_says() -> None:
    trace = synth(law=DRAWN, requests=300, tokens=(60, 200), prompt=10, seed=5)
    truth = trace.truth
    hot = [(r.ids[10:, ..., None] == np.arange(24)).any(axis=2) for r in trace.requests()]
    for window in (1, 2, 4, 8):
        starts = [len(h) - window + 1 for h in hot]
        unions = sum(
            int(np.logical_or.reduce([h[i : i + n] for i in range(window)]).sum())
            for h, n in zip(hot, starts, strict=True)
        )
        assert unions / sum(starts) / 2 == pytest.approx(truth["unique"][window], rel=0.012)
    for lag in (1, 4, 16):
        both = sum(int((h[lag:] & h[:-lag]).sum()) for h in hot)
        assert both / sum(len(h) - lag for h in hot) / 6 == pytest.approx(truth["overlap"][lag], abs=0.008)
    # Given the seed's requests the truth scatters about the law's expectation.
    assert truth["unique"][4] == pytest.approx(float(DRAWN.unique(4)), rel=0.02)
    assert truth["unique"][4] < truth["request"][4] < truth["popularity"][4]


@given(layer=layers, k=st.integers(1, 5), spare=st.integers(0, 300), seed=st.integers(0, 2**63))
def test_every_law_can_be_drawn_from(layer: LayerLaw, k: int, spare: int, seed: int) -> None:
    trace = synth(law=RoutingLaw(k + spare, k, (layer, LayerLaw())), requests=2, tokens=(3, 9), seed=seed)
    for request in trace.requests():
        assert request.ids.max() < k + spare
        assert (np.diff(np.sort(request.ids, axis=-1)) > 0).all()
    assert trace.truth["unique"][1] == pytest.approx(k)


def test_a_law_is_drawn_in_another_shape() -> None:
    trace = synth(law=DRAWN, num_experts=64, top_k=6, layers=5, requests=1, tokens=4)
    assert (trace.meta.num_experts, trace.meta.top_k, len(trace.meta.layers)) == (64, 6, 5)
    assert trace.meta.extra["law"] == {"trace": "truth"}
    reshaped = DRAWN.reshaped(layers=5)
    assert reshaped.layers == (LAYERS[0],) * 3 + (LAYERS[1],) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a kind or a law"),
        ({"kind": "law"}, "a law with the kind 'law'"),
        ({"kind": "sticky", "law": LAW}, "the kind 'sticky' and a law"),
        ({"law": LAW, "stay": 0.3}, "law takes none"),
        ({"law": LAW, "top_k": 40}, "top_k=40"),
        ({"law": LAW, "layers": 0}, "layers=0"),
    ],
)
def test_synth_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synth(**arguments)


def test_one_request_cannot_tell_requests_from_popularity(tmp_path: Path) -> None:
    synth(law=DRAWN, requests=1, tokens=300).save(tmp_path / "one.npz")
    tk.ingest(tmp_path / "one.npz", tmp_path / "store", num_experts=24, phase="decode")
    with pytest.warns(TracekitWarning, match="there is one request"):
        law = tk.fit_law(tmp_path / "store")
    assert (law.parameter("request") == 0).all()
    assert law.unique(4) == pytest.approx(
        next(f.observed for f in law.figures if (f.at, f.batch_size) == (4, 1)), rel=0.05
    )


@pytest.fixture(scope="module")
def gptoss(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutingLaw:
    """The law of 64 decode requests of gpt-oss-20b."""
    folder = shared / "traces" / "gptoss20b_subset64"
    store = tmp_path_factory.mktemp("gptoss") / "store"
    tk.ingest(folder / "trace.npz", store, num_experts=32, phase="decode", requests=folder / "requests.json")
    return tk.fit_law(store)


@pytest.mark.slow
def test_a_real_trace_has_a_law(gptoss: RoutingLaw) -> None:
    """Overlaps come back to .008 and unions, those that are predicted too, to 1.5 %."""
    observed = {(f.quantity, f.at, f.batch_size): f for f in gptoss.figures}
    published = {1: 0.4402, 2: 0.3838, 3: 0.3772, 4: 0.3709, 8: 0.3580, 16: 0.3443, 32: 0.3377}
    for lag, value in published.items():
        figure = observed["overlap", lag, None]
        assert figure.observed == pytest.approx(value, abs=5e-5)
        assert figure.law == pytest.approx(value, abs=0.008)
    assert observed["unique", 4, 1].observed == pytest.approx(9.3028, abs=5e-5)
    unions = [f for f in gptoss.figures if f.quantity == "unique"]
    assert len(unions) == 8 * 7
    assert max(abs(f.law / f.observed - 1) for f in unions) < 0.015
    assert len(gptoss.layers) == 24


@pytest.mark.slow
def test_what_holding_the_law_costs_where_k_is_halved(gptoss: RoutingLaw, shared: Path, tmp_path: Path) -> None:
    """The first 2 of a token's 4 experts against the law of all 4: unions to 10 %, their ratio to 6 %."""
    with np.load(shared / "traces" / "gptoss20b_subset64" / "trace.npz") as archive:
        ids, lengths = archive["expert_ids"][:, :, :2], archive["request_lens"]
    np.savez(tmp_path / "half.npz", expert_ids=ids, request_lens=lengths)
    tk.ingest(tmp_path / "half.npz", tmp_path / "store", num_experts=32, phase="decode")
    frame = tk.windows(tmp_path / "store", max_window=4, batch_size=(1, 4, 16), intervals=False)
    observed = {(row["window"], row["batch_size"]): row["observed"] for row in frame.rows(named=True)}
    law = gptoss.reshaped(top_k=2)
    for size in (1, 4, 16):
        assert law.unique(4, size) == pytest.approx(observed[4, size], rel=0.1)
        ratio = observed[4, size] / observed[1, size]
        assert law.unique(4, size) / law.unique(1, size) == pytest.approx(ratio, rel=0.06)


# --- the file ----------------------------------------------------------------------------------


@given(st.lists(layers, min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 60))
def test_a_law_survives_its_file(found: list[LayerLaw], k: int, spare: int) -> None:
    law = RoutingLaw(k + spare, k, tuple(found), {"trace": "a\nb", "tokens": 3, "model": None})
    assert RoutingLaw.from_json(law.to_json()) == law


def test_the_file_is_what_its_module_documents() -> None:
    law = RoutingLaw.from_summary(32, 4, [0.4, 0.35], 0.18, {4: 9.3}, source={"trace": "chat"})
    document = json.loads(law.to_json())
    assert list(document) == ["format", "version", "num_experts", "top_k", "layers", "source", "figures"]
    assert list(document["layers"][0]) == list(RANGES)
    assert law_file.__doc__ is not None
    for name in (*document, *document["layers"][0], *document["figures"][0]):
        assert f'"{name}"' in law_file.__doc__
    assert RoutingLaw.from_json(law.to_json()).figures == law.figures


VALID = json.loads(RoutingLaw.from_summary(32, 4, [0.4], 0.18, {4: 9.3}).to_json())


def edited(**changes: Any) -> str:
    document = json.loads(json.dumps(VALID))
    for path, value in changes.items():
        *parents, name = path.split("__")
        at = document
        for parent in parents:
            at = at[int(parent) if parent.isdigit() else parent]
        at[name] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "is not a law of routing"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (edited(version=2), "is a law of version 2; expected version 1"),
        (edited(version=True), "version True"),
        (edited(extra=1), "has a field 'extra'"),
        (edited(num_experts=0), "num_experts is 0"),
        (edited(num_experts=10**30), "a very large number"),
        (edited(top_k=33), "top_k=33"),
        (edited(layers=[]), "0 layers"),
        (edited(layers={}), "layers is missing or no list of objects"),
        (edited(layers__0__stay=1.5), r"layers 0: has stay of 1\.5"),
        (edited(layers__0__stay=None), "stay is None"),
        (edited(layers__0__stay=10**400), "stay is a very large number"),
        (edited(layers__0__sway=0.5), "has a field 'sway'"),
        (edited(source=[1]), "source is no object"),
        (edited(source={"a": [1]}), "source is no object"),
        (edited(figures__0__quantity="speed"), "quantity is 'speed'"),
        (edited(figures__0__target=1), "target is 1"),
        (edited(figures__1__at=-1), "at is -1"),
        (edited().replace('"stay": ', '"stay": NaN, "stay": '), "NaN is no number"),
    ],
)
def test_what_is_not_a_law_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        RoutingLaw.from_json(text)


@given(st.data())
def test_damage_raises_nothing_else(data: st.DataObject) -> None:
    text = bytearray(edited().encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        law = RoutingLaw.from_json(bytes(text))
    except TracekitError:
        return
    assert isinstance(law, RoutingLaw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from([*VALID, *(f"layers__0__{name}" for name in RANGES), "figures__0__at"]), value=JSON)
def test_wrong_values_raise_nothing_else(field: str, value: Any) -> None:
    try:
        law = RoutingLaw.from_json(edited(**{field: value}))
    except TracekitError:
        return
    assert isinstance(law, RoutingLaw)


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(LAW.to_json())
    assert synth(law=path, requests=1, tokens=3).meta.num_experts == 32
    with pytest.raises(SourceError, match="cannot be read"):
        law_file.load(tmp_path / "none.json")
    with path.open("wb") as file:
        file.truncate(1 << 25)
    with pytest.raises(SourceError, match="more than"):
        law_file.load(path)


# --- the command line --------------------------------------------------------------------------


def test_the_verbs_go_from_a_trace_to_a_trace(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = tmp_path / "law.json"
    assert main(["law", str(drawn), "-o", str(law), "--max-lag", "8", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "overlap by lag" in shown
    assert "predicted" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert RoutingLaw.from_json(law.read_text()).num_experts == 24
    assert main(["law", str(drawn), "-o", str(law)]) == 2
    assert "will not overwrite" in capsys.readouterr().err
    assert main(["law", str(drawn), "--max-lag", "8", "--format", "json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["quantity"] for row in rows} >= {"overlap", "unique", "popularity_overlap"}
    trace = tmp_path / "again.npz"
    call = ["synth", "law", str(trace), "--law", str(law), "--requests", "2", "--tokens", "9", "--format", "csv", "-q"]
    assert main(call) == 0
    assert "unique,4," in capsys.readouterr().out
    assert np.load(trace)["expert_ids"].shape == (18, 2, 3)
    assert main(["synth", "law", str(tmp_path / "x.npz")]) == 2
    assert "tracekit law" in capsys.readouterr().err
