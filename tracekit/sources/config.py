"""A model's ``config.json``: how many experts, how many of them a token takes, which layers have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracekit.errors import SourceError, did_you_mean
from tracekit.sources.bundled import find, spellings
from tracekit.sources.files import fault

_MOST_LAYERS = 1 << 16
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "top_k",
    "moe_k",
)
# Architectures without any dense layer, whose configs therefore have no rule for one.
_ALL_SPARSE = frozenset(
    {
        "dbrx",
        "gpt_oss",
        "granitemoe",
        "granitemoeshared",
        "jetmoe",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
    }
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The part of a model's configuration that routing depends on."""

    model_type: str | None
    num_hidden_layers: int
    num_experts: int
    """N, routed experts per MoE layer."""
    top_k: int
    """k, routed experts per token."""
    moe_layers: tuple[int, ...] | None
    """Numbers of the MoE layers, ascending; None where the config has no rule that tracekit knows."""
    name: str | None = None
    topk_method: str | None = None
    """How DeepSeek-V2 chooses among groups of experts, where the config says it."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text, where the config says it."""


def load_config(path: Path | str) -> ModelConfig:
    """Read a Hugging Face ``config.json``, or take a bundled model by its name.

    Parameters
    ----------
    path
        The file, a folder that holds it, or the name of a bundled model where no such file exists.

    Raises
    ------
    SourceError
        If the file cannot be read, is not such a config, or describes a dense model; if there is neither such a file
        nor such a model.
    """
    document, where = load_document(path)
    return parse_config(document, where=where)


def load_document(path: Path | str) -> tuple[Mapping[str, Any], str]:
    """Return the fields of a ``config.json`` or of a bundled model, and what to call it in messages.

    Takes and raises what `load_config` does.
    """
    path = Path(path)
    if not path.exists():
        model = find(str(path))
        if model is not None:
            return {"_name_or_path": model.name, **model.config}, model.name
        if path.suffix != ".json":
            raise SourceError(
                "is neither a file nor the name of a bundled model",
                where=str(path),
                expected="a model's config.json or one of `tracekit models`",
                remedy=did_you_mean(path.name, spellings()),
            )
    if path.is_dir():
        path /= "config.json"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not JSON ({fault(error)})", where=str(path), expected="a model's config.json") from error
    if not isinstance(document, dict):
        raise SourceError("is not a JSON object", where=str(path), expected="a model's config.json")
    return document, str(path)


def flatten(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model at the top: those of ``text_config``, ``ffn_config`` and ``attn_config``.

    A nested field wins over one of the same name above it, except for ``model_type``, which ``ffn_config`` repeats.
    """
    text = dict(document)
    for key in ("text_config", "ffn_config", "attn_config"):
        nested = text.get(key)
        if isinstance(nested, dict):
            keep = {} if key == "text_config" else {"model_type": text.get("model_type")}
            text = {**text, **nested, **keep}
    return text


def parse_config(document: Mapping[str, Any], *, where: str = "config", dense: bool = False) -> ModelConfig:
    """Make a `ModelConfig` of a parsed ``config.json``; see `load_config`.

    With ``dense`` a dense model is taken too, as one that has a single expert in each layer, which every token chooses.
    """
    text = flatten(document)
    layers = count(text, _LAYERS, where)
    if layers is None:
        raise SourceError(
            "has no num_hidden_layers", where=where, expected="a model's config.json", remedy="Give the right --config"
        )
    if not 1 <= layers <= _MOST_LAYERS:
        raise SourceError(f"has {layers} layers", where=where, expected=f"1 to {_MOST_LAYERS}")
    experts, per_layer = _experts(text, layers, where)
    if dense and (experts is None or experts < 2):
        text |= {_EXPERTS[0]: 1, _TOP_K[0]: 1}
        experts, per_layer = 1, tuple(range(layers))
    elif experts is None or experts < 2:
        raise SourceError(
            f"describes a dense model ({text.get('model_type', 'no model_type')}: no routed experts)",
            where=where,
            expected="the config of a Mixture-of-Experts model",
            remedy="Give the --config of the model that was traced, or --num-experts",
        )
    top_k = count(text, _TOP_K, where)
    if top_k is None:
        raise SourceError("does not say how many experts a token takes", where=where, expected="num_experts_per_tok")
    if not 1 <= top_k <= experts:
        raise SourceError(f"says {top_k} of {experts} experts per token", where=where)
    moe_layers = per_layer if per_layer is not None else _moe_layers(text, layers, where)
    if moe_layers is not None:
        moe_layers = tuple(sorted({layer for layer in moe_layers if 0 <= layer < layers}))
        if not moe_layers:
            raise SourceError("leaves no layer with experts", where=where)
    model_type, name = text.get("model_type"), document.get("_name_or_path")
    method = text.get("topk_method")
    return ModelConfig(
        model_type=model_type if isinstance(model_type, str) else None,
        num_hidden_layers=layers,
        num_experts=experts,
        top_k=top_k,
        moe_layers=moe_layers,
        name=name if isinstance(name, str) and name else None,
        topk_method=method if isinstance(method, str) else None,
        eos_token_ids=_token_ids(text.get("eos_token_id")),
    )


def _token_ids(value: object) -> tuple[int, ...]:
    values: list[Any] = value if isinstance(value, list) else [value]
    return tuple(token for token in values if _is_int(token))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one(values: list[Any], key: str, where: str) -> int | None:
    """Return the one number that a per-layer list repeats; layers without experts say 0 or null."""
    distinct = sorted({value for value in values if _is_int(value) and value > 0})
    if len(distinct) > 1:
        raise SourceError(
            f"{key} differs between layers ({', '.join(map(str, distinct[:8]))})",
            where=where,
            expected="the same number in every MoE layer",
        )
    return distinct[0] if distinct else None


def count(config: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int | None:
    """Return the whole number that a config gives under one of several names, or repeats layer by layer."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):
            value = _one(value, key, where)
        if value is None:
            continue
        if not _is_int(value) or not 0 <= value < 1 << 31:
            raise SourceError(f"{key} is {value!r:.60}", where=where, expected="a whole number")
        return int(value)
    return None


def _experts(config: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, tuple[int, ...] | None]:
    """Return N and, where it is listed layer by layer, the layers that have experts."""
    for key in _EXPERTS:
        value = config.get(key)
        if isinstance(value, list):
            listed = tuple(i for i, n in enumerate(value) if _is_int(n) and n > 1) if len(value) == layers else None
            return _one(value, key, where), listed
    blocks = config.get("block_configs")
    if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks):
        values = [block.get("n_routed_experts") for block in blocks]
        experts = _one(values, "n_routed_experts", where)
        if experts is not None:
            listed = tuple(i for i, n in enumerate(values) if n == experts) if len(values) == layers else None
            return experts, listed
    return count(config, _EXPERTS, where), None


def _moe_layers(config: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...] | None:
    """Apply the rule that the config's own architecture uses; None where there is none."""
    listed = _listed_layers(config)
    if listed is not None:
        return listed

    def number(key: str, default: int) -> int:
        value = config.get(key, default)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            return default
        if not _is_int(value):
            raise SourceError(f"{key} is {value!r}", where=where, expected="a whole number")
        return int(value)

    def step(key: str) -> int:
        return max(1, number(key, 1))

    every = range(layers)
    if config.get("first_k_dense_replace") is not None:
        first, frequency = number("first_k_dense_replace", 0), step("moe_layer_freq")
        return tuple(i for i in every if i >= first and i % frequency == 0)
    if "decoder_sparse_step" in config or isinstance(config.get("mlp_only_layers"), list):
        sparse, dense = step("decoder_sparse_step"), config.get("mlp_only_layers") or []
        return tuple(i for i in every if (i + 1) % sparse == 0 and i not in dense)
    if config.get("interleave_moe_layer_step"):
        interleave = step("interleave_moe_layer_step")
        return tuple(i for i in every if i % interleave == interleave - 1)
    if config.get("expert_layer_period"):
        period, offset = step("expert_layer_period"), number("expert_layer_offset", 0)
        return tuple(i for i in every if i % period == offset % period)
    if "moe_layer_start_index" in config or "moe_layer_interval" in config:
        start, end = number("moe_layer_start_index", 0), number("moe_layer_end_index", -1)
        interval, last = step("moe_layer_interval"), layers - 1 if end < 0 else end
        return tuple(i for i in every if start <= i <= last and (i + 1) % interval == 0)
    return tuple(every) if config.get("model_type") in _ALL_SPARSE else None


def _listed_layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """MoE layers that the config lists one by one."""
    types = config.get("mlp_layer_types")
    if isinstance(types, list) and types:
        return tuple(i for i, kind in enumerate(types) if kind in ("sparse", "moe"))
    listed = config.get("moe_layers")
    if isinstance(listed, list) and listed and all(map(_is_int, listed)):
        return tuple(listed)
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list) and frequency:
        return tuple(i for i, on in enumerate(frequency) if on)
    blocks = config.get("layers_block_type")
    if isinstance(blocks, list) and "moe" in blocks:
        return tuple(i for i, kind in enumerate(blocks) if kind == "moe")
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and "E" in pattern:
        return tuple(i for i, kind in enumerate(pattern) if kind == "E")
    return None
