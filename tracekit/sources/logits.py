"""Router logits, and the families of models in which their top-k is what ran."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import id_dtype
from tracekit.sources.base import AnyArray
from tracekit.sources.config import ModelConfig

_CHUNK = 1 << 18

LOGITS_CHOOSE = frozenset(
    {
        "cohere2_moe",
        "dbrx",
        "gpt_oss",
        "granitemoe",
        "hunyuan_v1_moe",
        "jamba",
        "llama4",
        "llama4_text",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Families whose router keeps the order of the logits: softmax or sigmoid, before or after top-k."""
_BIASED = "adds a correction bias to the scores and limits the choice to groups of experts"
_OTHERS = {
    "deepseek_v3": _BIASED,
    "kimi_k2": _BIASED,
    "glm4_moe": _BIASED,
    "glm4_moe_lite": _BIASED,
    "minimax_m2": "adds a correction bias to the scores",
    "ernie4_5_moe": "adds a bias to the probabilities",
}
_CAPTURE = "Hook the experts module instead: its integer argument [tokens, k] is what ran"


def require_plain(config: ModelConfig | None, where: str) -> ModelConfig:
    """Return the config of a family in which top-k of the router logits is what ran.

    Raises
    ------
    SourceError
        With the reason, for any other family and where there is no config.
    """
    if config is None:
        raise SourceError(
            "holds router logits, which say what ran only for some families of models",
            where=where,
            remedy="Give the model's --config config.json",
        )
    family = config.model_type
    if family in LOGITS_CHOOSE or (family == "deepseek_v2" and config.topk_method == "greedy"):
        return config
    if family == "deepseek_v2":
        reason = f"with topk_method {config.topk_method!r} limits the choice to groups of experts"
    else:
        reason = _OTHERS.get(family or "", "is not among those that were checked")
    raise SourceError(
        f"holds router logits, and {family or 'the model'} {reason}: their top-k need not be what ran",
        where=where,
        expected="the ids of the chosen experts",
        remedy=_CAPTURE,
    )


def top_k(logits: AnyArray, config: ModelConfig, out: NDArray[np.unsignedinteger[Any]], where: str) -> int:
    """Write the ids of the k largest logits of each row, the largest first.

    Parameters
    ----------
    logits
        Floats ``[rows, N]``.
    config
        Of the model.
    out
        ``[rows, k]``.
    where
        For messages.

    Returns
    -------
    int
        Rows in which the k-th and the next one are equal, where the lower id was taken.

    Raises
    ------
    SourceError
        If there are not N columns, or a logit is NaN.
    """
    rows, width = logits.shape
    if width != config.num_experts:
        raise SourceError(
            f"router logits of {width} columns",
            where=where,
            expected=f"{config.num_experts}, the experts of the config",
            remedy="Give the --config of the model that was traced",
        )
    k, ties = config.top_k, 0
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        chunk = np.asarray(logits[start : start + step], np.float64)
        if np.isnan(chunk).any():
            raise SourceError("has router logits that are NaN", where=where)
        order = np.argsort(-chunk, axis=1, kind="stable")
        out[start : start + step] = order[:, :k]
        if k < width:
            edge = np.take_along_axis(chunk, order[:, k - 1 : k + 1], axis=1)
            ties += int((edge[:, 0] == edge[:, 1]).sum())
    return ties


def ids_dtype(config: ModelConfig) -> type[np.unsignedinteger[Any]]:
    """Return the type of the ids that `top_k` writes."""
    return id_dtype(config.num_experts)
