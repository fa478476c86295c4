"""Tiny random models of many families: what is captured is what their routers must have chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, Family, largest

from tracekit.capture.recorder import record
from tracekit.schema import Request

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
LENGTHS = (9, 4, 6)
SAME_WHEN_PADDED = list(FAMILIES)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, VOCABULARY, n).tolist() for n in lengths]


def forced(model: torch.nn.Module, text: list[int]) -> Request:
    with torch.no_grad(), record(model) as trace:
        model(input_ids=torch.tensor([text]), use_cache=False)
    (request,) = trace.requests
    return request


def sets(request: Request) -> np.ndarray:
    return np.sort(request.ids, axis=2)


def test_ids_are_those_that_the_router_logits_imply(family: Family) -> None:
    model, (text, *_) = family.build(), texts((40,))
    with torch.no_grad(), record(model) as trace:
        logits = model(input_ids=torch.tensor([text]), output_router_logits=True, use_cache=False).router_logits
    (request,), meta = trace.requests, trace.meta
    assert (meta.num_experts, meta.top_k, meta.layers) == (family.num_experts, family.top_k, family.layers)
    assert request.ids.shape == (40, len(family.layers), family.top_k)
    assert request.ids.dtype == np.uint8
    assert meta.extra["capture"]["ids_from"] == [family.ids_from]
    blocks = [m for m in model.modules() if hasattr(m, "experts") and (hasattr(m, "gate") or hasattr(m, "router"))]
    assert len(blocks) == len(logits) == len(family.layers)
    differ = 0
    for layer, (block, values) in enumerate(zip(blocks, logits, strict=True)):
        values = values.reshape(40, -1).numpy()
        np.testing.assert_array_equal(sets(request)[:, layer], family.chosen(values, block, family.top_k))
        differ += int((sets(request)[:, layer] != largest(values, block, family.top_k)).any(1).sum())
    assert (differ > 0) == family.biased


def test_weights_fall_from_rank_to_rank(family: Family) -> None:
    request = forced(family.build(), texts()[0])
    if not family.weights:
        assert request.weights is None
        return
    assert request.weights is not None
    assert request.weights.shape == request.ids.shape
    if family.model_type == "phimoe":  # sparsemixer: a weight is the share among the experts that were left
        assert (request.weights > 0.5).all()
        return
    assert (np.diff(request.weights, axis=2) <= 0).all()
    assert len(np.unique(request.weights.round(5))) > 5


def test_generation_with_a_cache_routes_as_teacher_forcing_does(family: Family) -> None:
    model, text = family.build(), texts()[0]
    with torch.no_grad(), record(model) as trace:
        (output,) = model.generate(
            torch.tensor([text]), attention_mask=torch.ones((1, len(text)), dtype=torch.long), max_new_tokens=8,
            do_sample=False,
        ).tolist()  # fmt: skip
    (request,) = trace.requests
    assert len(output) == len(text) + 8
    assert (request.first_pos, request.prompt_len, request.decode_start) == (0, len(text), len(text))
    assert request.token_ids is not None
    assert request.token_ids.tolist() == output[:-1]
    np.testing.assert_array_equal(sets(request), sets(forced(model, output[:-1])))


@pytest.mark.parametrize("name", SAME_WHEN_PADDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_routes_as_its_texts_alone(name: str, side: str) -> None:
    model, width = FAMILIES[name].build(), max(LENGTHS)
    rows, mask = [], []
    for text in texts():
        pad = [0] * (width - len(text))
        rows.append(pad + text if side == "left" else text + pad)
        mask.append([0] * len(pad) + [1] * len(text) if side == "left" else [1] * len(text) + [0] * len(pad))
    mask = torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), record(model) as trace:
        model(input_ids=torch.tensor(rows), attention_mask=mask, position_ids=positions, use_cache=False)
    assert [len(request.ids) for request in trace.requests] == list(LENGTHS)
    for request, text in zip(trace.requests, texts(), strict=True):
        assert request.first_pos == 0
        assert request.positions is None
        assert request.decode_start == len(text)
        assert request.token_ids is not None
        assert request.token_ids.tolist() == text
        np.testing.assert_array_equal(sets(request), sets(forced(model, text)))


@pytest.mark.parametrize("name", SAME_WHEN_PADDED)
def test_a_generated_batch_routes_as_its_texts_alone(name: str) -> None:
    model, width = FAMILIES[name].build(), max(LENGTHS)
    rows = torch.tensor([[0] * (width - len(text)) + text for text in texts()])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts()])
    with torch.no_grad(), record(model) as trace:
        outputs = model.generate(rows, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, width:].tolist()
    for request, text, output in zip(trace.requests, texts(), outputs, strict=True):
        assert (request.prompt_len, request.decode_start) == (len(text), len(text))
        assert request.token_ids is not None
        assert request.token_ids.tolist() == [*text, *output[:-1]]
        np.testing.assert_array_equal(sets(request), sets(forced(model, [*text, *output[:-1]])))
