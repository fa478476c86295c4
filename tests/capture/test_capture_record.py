"""`tracekit.record`: calls of a model become requests with the right rows, positions and phases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tracekit as tk
from tracekit.capture.recorder import record
from tracekit.errors import SourceError, StoreError, UnsupportedError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
TEXT = list(range(10, 22))


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["olmoe"].build()


@pytest.fixture(scope="module")
def whole(model: Any) -> np.ndarray:
    """Sets of the experts of TEXT, in one forward."""
    with torch.no_grad(), record(model) as trace:
        model(input_ids=torch.tensor([TEXT]))
    return np.sort(trace.requests[0].ids, 2)


def run(model: Any, tokens: list[int], cache: Any = None) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True).past_key_values


def test_a_forward_is_a_request_of_prefill_rows(model: Any) -> None:
    with torch.no_grad(), record(model) as trace:
        model(torch.tensor([TEXT]))
        model(input_ids=torch.tensor([TEXT[:3], TEXT[3:6]]))
    assert [(r.request_id, len(r.ids), r.prompt_len, r.decode_start) for r in trace.requests] == [
        ("0", 12, 12, 12),
        ("1", 3, 3, 3),
        ("2", 3, 3, 3),
    ]


def test_a_cache_continues_the_request_and_single_tokens_are_decode(model: Any, whole: np.ndarray) -> None:
    with record(model) as trace:
        cache = run(model, TEXT[:5])
        cache = run(model, TEXT[5:8], cache)  # the prompt in two chunks
        for token in TEXT[8:]:
            cache = run(model, [token], cache)
    (request,) = trace.requests
    assert (request.first_pos, request.prompt_len, request.decode_start) == (0, 8, 8)
    assert request.token_ids is not None
    assert request.token_ids.tolist() == TEXT
    np.testing.assert_array_equal(np.sort(request.ids, 2), whole)


def test_a_turn_after_decoding_does_not_move_the_prompt(model: Any) -> None:
    with record(model) as trace:
        cache = run(model, TEXT[:5])
        cache = run(model, [TEXT[5]], cache)
        run(model, TEXT[6:9], cache)
    (request,) = trace.requests
    assert (len(request.ids), request.prompt_len, request.decode_start) == (9, 5, 5)


def test_rows_that_were_rolled_back_are_replaced(model: Any, whole: np.ndarray) -> None:
    with record(model) as trace:
        cache = run(model, TEXT[:6])
        cache = run(model, [TEXT[6]], cache)
        cache = run(model, [60, 61, 62], cache)
        cache.crop(-3)
        run(model, TEXT[7:], cache)
    np.testing.assert_array_equal(np.sort(trace.requests[0].ids, 2), whole)


def test_a_cache_from_before_the_recording_gives_the_first_position(model: Any, whole: np.ndarray) -> None:
    cache = run(model, TEXT[:7])
    with record(model) as trace:
        for token in TEXT[7:]:
            cache = run(model, [token], cache)
    (request,) = trace.requests
    assert (request.first_pos, request.prompt_len, request.decode_start) == (7, None, 7)
    np.testing.assert_array_equal(np.sort(request.ids, 2), whole[7:])


def test_two_conversations_may_take_turns(model: Any, whole: np.ndarray) -> None:
    with record(model) as trace:
        one, two = run(model, TEXT[:4]), run(model, TEXT[:6])
        one, two = run(model, [TEXT[4]], one), run(model, [TEXT[6]], two)
    first, second = trace.requests
    np.testing.assert_array_equal(np.sort(first.ids, 2), whole[:5])
    np.testing.assert_array_equal(np.sort(second.ids, 2), whole[:7])


def test_rows_after_the_end_of_a_sequence_are_dropped(model: Any) -> None:
    prompts, mask = torch.tensor([TEXT[:6], TEXT[6:]]), torch.ones((2, 6), dtype=torch.long)
    free = model.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 6:].tolist()
    end = next(t for t in free[0][:5] if t not in free[1])
    with record(model) as trace:
        outputs = model.generate(
            prompts, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0
        )[:, 6:].tolist()
    at = outputs[0].index(end)
    assert outputs[0][at + 1 :] == [0] * (7 - at)
    assert [len(r.ids) for r in trace.requests] == [6 + at, 6 + 7]
    for request, text, output, length in zip(trace.requests, prompts.tolist(), outputs, (at + 1, 8), strict=True):
        assert request.token_ids is not None
        assert request.token_ids.tolist() == [*text, *output[: length - 1]]


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"assistant_model": "self"}],
    ids=lambda options: next(iter(options)),
)
def test_how_generate_runs_does_not_change_what_is_recorded(model: Any, options: dict[str, Any]) -> None:
    if "assistant_model" in options:
        options = {"assistant_model": FAMILIES["mixtral"].build()}  # a bad draft: most of its tokens are rolled back
    given = {
        "attention_mask": torch.tensor([[0, 0, *[1] * 10]] if "assistant_model" not in options else [[1] * 12]),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with record(model) as plain:
        expected = model.generate(torch.tensor([TEXT]), **given)
    with record(model) as trace:
        assert model.generate(torch.tensor([TEXT]), **given, **options).tolist() == expected.tolist()
    (one,), (other,) = plain.requests, trace.requests
    assert (other.prompt_len, other.decode_start) == (one.prompt_len, one.decode_start)
    assert one.token_ids is not None
    assert other.token_ids is not None
    assert other.token_ids.tolist() == one.token_ids.tolist()
    np.testing.assert_array_equal(np.sort(other.ids, 2), np.sort(one.ids, 2))


def test_several_outputs_of_a_prompt_are_a_request_each(model: Any) -> None:
    torch.manual_seed(3)
    with record(model) as trace:
        outputs = model.generate(
            torch.tensor([TEXT]), attention_mask=torch.ones((1, 12), dtype=torch.long), max_new_tokens=4,
            do_sample=True, num_return_sequences=3,
        )  # fmt: skip
    assert [r.token_ids.tolist() for r in trace.requests if r.token_ids is not None] == outputs[:, :-1].tolist()


def test_the_model_is_left_as_it_was(model: Any) -> None:
    with torch.no_grad():
        before = model(torch.tensor([TEXT])).logits
        with record(model):
            inside = model(torch.tensor([TEXT])).logits
    assert torch.equal(before, inside)
    assert "generate" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_call_leaves_no_request_and_no_hook(model: Any) -> None:
    with record(model) as trace:
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCABULARY + 5]]))
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[VOCABULARY + 5]]), max_new_tokens=2)
    assert trace.requests == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_recording_becomes_a_trace_of_a_store(model: Any, tmp_path: Path) -> None:
    with record(model, token_ids=False) as trace:
        model.generate(
            torch.tensor([TEXT, TEXT[::-1]]), attention_mask=torch.ones((2, 12), dtype=torch.long), max_new_tokens=6,
            do_sample=False,
        )  # fmt: skip
    trace.requests[0].labels = {"which": "forth"}
    info = trace.save(tmp_path / "store", name="notebook", labels={"from": "test"})
    assert (info.requests, info.tokens, info.meta.engine, info.meta.router_order) == (2, 34, "transformers", True)
    assert info.meta.native_top_k == 4
    store = tk.open(tmp_path / "store")
    rows = store.sql("SELECT request_id, label, prompt_len, n_decode FROM requests ORDER BY request_id").rows()
    assert rows == [("0", "forth / test", 12, 5), ("1", "test", 12, 5)]
    found = store.sql("SELECT expert, weight FROM activations WHERE request = 1 AND layer = 2 ORDER BY pos, rank")
    assert found["expert"].to_list() == trace.requests[1].ids[:, 2].ravel().tolist()
    assert trace.requests[1].weights is not None
    np.testing.assert_allclose(found["weight"].to_numpy(), trace.requests[1].weights[:, 2].ravel(), rtol=1e-6)
    with pytest.raises(StoreError, match="there already"):
        trace.save(tmp_path / "store", name="notebook")


def test_nothing_recorded_is_said(model: Any, tmp_path: Path) -> None:
    with record(model) as trace:
        pass
    assert trace.requests == []
    with pytest.raises(SourceError, match="nothing was recorded"):
        trace.save(tmp_path / "store", name="empty")
    assert not (tmp_path / "store").exists()


def test_what_no_trace_can_tell_is_refused(model: Any) -> None:
    ids = torch.tensor([TEXT])
    with record(model), pytest.raises(UnsupportedError, match="beam search"):
        model.generate(ids, num_beams=2, max_new_tokens=2)
    with record(model), pytest.raises(UnsupportedError, match="padding"):
        model(ids, attention_mask=torch.zeros((1, 1, 12, 12)))
    cache = run(model, TEXT)
    with record(model), pytest.raises(UnsupportedError, match="attention mask over 1 tokens"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones((1, 1), dtype=torch.long))
    with pytest.raises(UnsupportedError, match="ran by itself"), record(model):
        model.model(ids)


def test_a_model_without_experts_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with (
        pytest.raises(UnsupportedError, match="no layer has routed experts"),
        record(AutoModelForCausalLM.from_config(config)),
    ):
        pass
    with pytest.raises(UsageError, match="expected a transformers model"), record(object()):
        pass


def test_ids_that_the_config_does_not_know_are_refused() -> None:
    model = FAMILIES["mixtral"].build()
    model.config.num_local_experts = 4  # the routers have 8
    with record(model), pytest.raises(UnsupportedError, match="the config of MixtralForCausalLM has 4"):
        model(torch.tensor([TEXT]))


class _Block(nn.Module):
    """An MoE block as older releases have it: its experts are never called with an index."""

    def __init__(self, routed: Any, granite: bool = False) -> None:
        super().__init__()
        self.answer = routed
        router = nn.Identity()
        router.forward = lambda hidden: self.answer  # type: ignore[method-assign]
        if granite:
            self.router, self.input_linear = router, nn.Identity()
        else:
            self.gate, self.experts = router, nn.ModuleList([nn.Identity()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        (self.router if hasattr(self, "router") else self.gate)(hidden)
        return hidden


class _Old(nn.Module):
    def __init__(self, model_type: str, block: nn.Module) -> None:
        super().__init__()
        config = {"model_type": model_type, "num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 2}
        self.config = SimpleNamespace(to_dict=lambda: config)
        self.layers = nn.ModuleList([block])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](input_ids)


LOGITS = torch.tensor([[0.0, 3, 1, 2, -1, -2, -3, -4], [9, 3, 1, 2, -1, -2, 8, -4], [0, 1, 2, 3, 4, 5, 6, 7]])
INDEX, WEIGHT = torch.tensor([[4, 1], [0, 7], [2, 3]]), torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]])


@pytest.mark.parametrize(
    ("model_type", "block", "ids", "weights"),
    [
        # transformers 4.57: gate is a plain linear layer.
        ("mixtral", _Block(LOGITS), [[1, 3], [0, 6], [7, 6]], None),
        # transformers 4.57, DeepSeek-V3 and GLM-4: the gate returns its index first; the weights put it in order.
        ("deepseek_v3", _Block((INDEX, WEIGHT)), [[1, 4], [0, 7], [2, 3]], [[0.8, 0.2], [0.9, 0.1], [0.6, 0.4]]),
        # Granite before transformers 5.9: sorted indices, batch indices, gates, sizes, logits.
        (
            "granitemoe",
            _Block((torch.arange(6), torch.arange(6), torch.rand(6), [1] * 8, LOGITS), granite=True),
            [[1, 3], [0, 6], [7, 6]],
            None,
        ),
    ],
    ids=["4.57 mixtral", "4.57 deepseek", "older granite"],
)
def test_older_layouts_are_read_from_their_routers(
    model_type: str, block: nn.Module, ids: list[Any], weights: list[Any] | None
) -> None:
    model = _Old(model_type, block)
    with record(model) as trace:
        model(torch.tensor([[1, 2, 3]]))
    (request,) = trace.requests
    assert request.ids[:, 0].tolist() == ids
    if weights is None:
        assert request.weights is None
    else:
        assert request.weights is not None
        np.testing.assert_allclose(request.weights[:, 0], weights)


def test_logits_of_a_family_that_chooses_otherwise_are_refused() -> None:
    model = _Old("deepseek_v3", _Block(LOGITS))
    with record(model), pytest.raises(UnsupportedError, match=r"layers\.0 says which experts ran"):
        model(torch.tensor([[1, 2, 3]]))


def test_two_sets_of_experts_in_a_layer_are_refused() -> None:
    model = _Old("mixtral", nn.ModuleDict({"text": _Block(LOGITS), "vision": _Block(LOGITS)}))
    with pytest.raises(UnsupportedError, match="layer 0 has routed experts twice"), record(model):
        pass
