"""Tiny random models of many families, and which experts their routers must choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
_BODY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def largest(logits: np.ndarray, module: Any, k: int) -> np.ndarray:
    """Return the k largest logits' experts, sorted by number."""
    return np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)


def sigmoid_with_bias(logits: np.ndarray, module: Any, k: int) -> np.ndarray:
    """DeepSeek-V3: groups by the sum of their two best, then the best of sigmoid + bias in the groups kept."""
    router = getattr(module, "gate", None) or module.router
    bias = next(b for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")).double().numpy()
    choice = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
    groups = int(getattr(router, "num_group", getattr(module, "n_group", 1)) or 1)
    if groups > 1:
        kept = int(getattr(router, "topk_group", getattr(module, "topk_group", groups)))
        grouped = choice.reshape(len(choice), groups, -1)
        best = np.sort(grouped, axis=2)[:, :, -2:].sum(2)
        dropped = np.argsort(-best, axis=1)[:, kept:]
        for row, gone in enumerate(dropped):
            grouped[row, gone] = -np.inf
        choice = grouped.reshape(len(choice), -1)
    return largest(choice, module, k)


def softmax_with_bias(logits: np.ndarray, module: Any, k: int) -> np.ndarray:
    """ERNIE 4.5: the best of softmax + bias."""
    bias = next(b for n, b in [*module.named_parameters(), *module.named_buffers()] if n.endswith("correction_bias"))
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return largest(exp / exp.sum(1, keepdims=True) + bias.detach().double().numpy().reshape(1, -1), module, k)


@dataclass(frozen=True)
class Family:
    """One architecture and the numbers of a tiny model of it."""

    model_type: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    chosen: Callable[[np.ndarray, Any, int], np.ndarray] = largest
    biased: bool = False
    """Whether the largest logits are not what runs."""
    ids_from: str = "experts"
    weights: bool = True

    def build(self) -> Any:
        """Return the model, the same each time, with routers that tell tokens apart."""
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.model_type, **{**_BODY, **self.options}))
        with torch.no_grad():
            biases = [(name, value) for name, value in model.named_buffers() if name.endswith("correction_bias")]
            for name, value in [*model.named_parameters(), *biases]:
                if name.endswith("correction_bias"):
                    value.copy_(torch.randn(value.shape) * 0.3)
                elif value.dim() >= 2:
                    value.copy_(torch.randn(value.shape) * (0.5 if value.dim() == 2 else 0.2))
        return model.float().eval()


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mixtral", 8, 2, (0, 1, 2), {"num_local_experts": 8, "num_experts_per_tok": 2}),
        Family(
            "qwen2_moe",
            8,
            3,
            (1,),
            {
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
                "decoder_sparse_step": 2,
            },
        ),
        Family(
            "qwen3_moe",
            8,
            3,
            (0, 2),
            {
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 8,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [1],
            },
        ),
        Family("olmoe", 12, 4, (0, 1, 2), {"num_experts": 12, "num_experts_per_tok": 4}),
        Family(
            "deepseek_v3",
            12,
            3,
            (1, 2),
            {
                "n_routed_experts": 12,
                "num_experts_per_tok": 3,
                "n_group": 3,
                "topk_group": 2,
                "moe_intermediate_size": 8,
                "first_k_dense_replace": 1,
                "n_shared_experts": 1,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
            sigmoid_with_bias,
            biased=True,
        ),
        Family(
            "glm4_moe",
            12,
            3,
            (1, 2),
            {
                "n_routed_experts": 12,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 8,
                "first_k_dense_replace": 1,
                "n_shared_experts": 1,
            },
            sigmoid_with_bias,
            biased=True,
        ),
        Family(
            "minimax_m2",
            12,
            3,
            (0, 1, 2),
            {"num_local_experts": 12, "num_experts_per_tok": 3},
            sigmoid_with_bias,
            biased=True,
        ),
        Family(
            "ernie4_5_moe",
            12,
            3,
            (1, 2),
            {
                "moe_num_experts": 12,
                "moe_k": 3,
                "moe_intermediate_size": 8,
                "moe_num_shared_experts": 1,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 2,
                "moe_layer_interval": 1,
            },
            softmax_with_bias,
            biased=True,
        ),
        Family(
            "gpt_oss",
            8,
            3,
            (0, 1, 2),
            {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 4},
        ),
        Family("granitemoe", 8, 3, (0, 1, 2), {"num_local_experts": 8, "num_experts_per_tok": 3}),
        Family("phimoe", 8, 2, (0, 1, 2), {"num_local_experts": 8, "num_experts_per_tok": 2}),
        Family(
            "jamba",
            8,
            2,
            (1,),
            {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "attn_layer_period": 2,
                "attn_layer_offset": 0,
                "mamba_d_state": 4,
                "mamba_dt_rank": 4,
            },
        ),
        Family(
            "llama4_text",
            8,
            1,
            (1,),
            {
                "num_local_experts": 8,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 24,
            },
            ids_from="logits",
            weights=False,
        ),
        Family("minimax", 8, 2, (0, 1, 2), {"num_local_experts": 8, "num_experts_per_tok": 2}),
        Family(
            "dbrx",
            8,
            3,
            (0, 1, 2),
            {
                "d_model": 16,
                "n_heads": 2,
                "n_layers": 3,
                "max_seq_len": 128,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 16},
            },
        ),
        Family(
            "cohere2_moe",
            8,
            3,
            (1, 2),
            {"num_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "sliding_window": 4},
        ),
        Family(
            "hunyuan_v1_moe",
            8,
            3,
            (0, 1, 2),
            {"num_experts": 8, "moe_topk": 3},
        ),
    )
}
