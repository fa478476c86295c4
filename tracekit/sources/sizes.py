"""What a model's ``config.json`` says about sizes: parameters and bytes of its experts and of everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracekit.errors import SourceError
from tracekit.sources.bundled import find
from tracekit.sources.config import ModelConfig, count, flatten, load_document, parse_config
from tracekit.sources.quantisation import Quantisation, chosen, configured

_HIDDEN = ("hidden_size", "d_model", "n_embd")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "kv_n_heads", "n_head_kv")
_EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size")
_DENSE_WIDTH = ("intermediate_size_mlp", "prefix_dense_intermediate_size", "intermediate_size", "ffn_hidden_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)

# Families whose count of all parameters was compared with the models' own.
_CHECKED = frozenset(
    {
        "dbrx",
        "deepseek_v3",
        "ernie4_5_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granitemoe",
        "jamba",
        "kimi_k2",
        "llama4_text",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
    }
)
_QUERY_BIAS = frozenset({"qwen2_moe"})
_OUTPUT_BIAS = frozenset({"gpt_oss", "phimoe"})
_TIED = frozenset({"cohere2_moe", "ernie4_5_moe"})
_TWO_MATRICES = frozenset({"nemotron_h"})
_CORRECTION_BIAS = frozenset({"deepseek_v3", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "kimi_k2", "minimax_m2"})
_HEAD_NORM = frozenset({"qwen3_moe", "qwen3_next"})
_WIDE_NORM = frozenset({"minimax_m2", "olmoe"})

Matrix = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of parameters: how large one copy is, and how many copies the model has."""

    name: str
    """``expert``, ``shared``, ``router``, ``attention``, ``dense``, ``norms`` or ``embeddings``."""
    copies: int
    matrices: tuple[Matrix, ...] = ()
    vectors: int = 0
    """Parameters outside of matrices (biases, norms, gates), which no scheme quantises."""
    estimated: str | None = None
    """Why the size is an estimate; None where the config says all of it."""

    @property
    def parameters(self) -> int:
        """Parameters of one copy."""
        return sum(rows * columns for rows, columns in self.matrices) + self.vectors

    def bytes(self, quantisation: Quantisation) -> int:
        """Bytes of one copy."""
        base = quantisation.base_bits
        if self.name not in quantisation.parts:
            return self.parameters * base // 8
        weights = self.parameters - self.vectors
        size = math.ceil(weights * quantisation.bits / 8) + self.vectors * base // 8
        if quantisation.block is not None:
            high, wide = quantisation.block
            size += 4 * sum(-(-rows // high) * -(-columns // wide) for rows, columns in self.matrices)
        return size


@dataclass(frozen=True, slots=True)
class Cache:
    """What the attention of some layers keeps of each token of the context, and computes with it."""

    layers: int
    elements: int
    """Numbers that one layer keeps of a token: keys and values, or their latent form."""
    multiplies: int
    """Multiply-adds of one layer for one new token and one token of the context: scores and their sum over values."""
    heads: int
    """Heads of keys and values: among how many devices the cache can be divided; 1 for a latent one."""
    window: int | None = None
    """Tokens that a layer looks back at most; None: all."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape and sizes, as far as its config tells them.

    Sizes leave out vision and audio parts and the layers for multi-token prediction. They are None where the config
    does not say enough.
    """

    name: str
    config: ModelConfig
    """What routing depends on: N, k, the MoE layers."""
    hidden_size: int | None
    expert_width: int | None
    shared_experts: int
    """Shared experts per MoE layer."""
    quantisation: Quantisation
    parts: tuple[Part, ...] = ()
    caches: tuple[Cache, ...] = ()
    """The layers that keep something of every token; those of linear attention and state space models do not."""
    source: str | None = None
    """Where the figures of a bundled model were read."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out."""

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers; all layers where the config has no rule."""
        layers = self.config.moe_layers
        return self.config.num_hidden_layers if layers is None else len(layers)

    @property
    def expert_parameters(self) -> int | None:
        """Parameters of one routed expert."""
        return self._parameters("expert")

    @property
    def shared_parameters(self) -> int | None:
        """Parameters of the shared experts of one MoE layer, with their gate; 0 without any."""
        return self._parameters("shared")

    @property
    def rest_parameters(self) -> int | None:
        """Parameters of everything else: attention, routers, dense layers, norms, embeddings and head."""
        return self._sum(lambda part: part.parameters, rest=True)

    @property
    def total_parameters(self) -> int | None:
        """All parameters."""
        return self._sum(lambda part: part.parameters)

    @property
    def active_parameters(self) -> int | None:
        """Parameters that one token uses: all but the experts that are not chosen."""
        return self._active(self.total_parameters, self.expert_parameters)

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of one routed expert."""
        return self._bytes("expert")

    @property
    def shared_bytes(self) -> int | None:
        """Bytes of the shared experts of one MoE layer; 0 without any."""
        return self._bytes("shared")

    @property
    def rest_bytes(self) -> int | None:
        """Bytes of everything else, over the whole model."""
        return self._sum(lambda part: part.bytes(self.quantisation), rest=True)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the whole model."""
        return self._sum(lambda part: part.bytes(self.quantisation))

    @property
    def active_bytes(self) -> int | None:
        """Bytes of the weights that one token uses."""
        return self._active(self.total_bytes, self.expert_bytes)

    def _part(self, name: str) -> Part | None:
        return next((part for part in self.parts if part.name == name), None)

    def _parameters(self, name: str) -> int | None:
        part = self._part(name)
        return None if part is None else part.parameters

    def _bytes(self, name: str) -> int | None:
        part = self._part(name)
        return None if part is None else part.bytes(self.quantisation)

    def _sum(self, size: Callable[[Part], int], *, rest: bool = False) -> int | None:
        """Sum over all copies; None where a part is missing."""
        if {part.name for part in self.parts} != set(PARTS):
            return None
        return sum(part.copies * size(part) for part in self.parts if not rest or part.name not in ("expert", "shared"))

    def _active(self, total: int | None, expert: int | None) -> int | None:
        if total is None or expert is None:
            return None
        return total - self.moe_layers * (self.config.num_experts - self.config.top_k) * expert


PARTS = ("expert", "shared", "router", "attention", "dense", "norms", "embeddings")
"""The parts of a model, in the order of `Model.parts`."""


def load_model(
    name: str | Path, *, quantisation: str | None = None, bits: float | None = None, dense: bool = False
) -> Model:
    """Return shape and sizes of a bundled model, by its name, or of a ``config.json``; see `describe`."""
    document, where = load_document(name)
    model = describe(document, where=where, quantisation=quantisation, bits=bits, dense=dense)
    entry = find(where)
    if entry is not None and not Path(name).exists():
        return replace(model, source=entry.source)
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    return model if model.config.name else replace(model, name=folder.resolve().name)


def describe(
    document: Mapping[str, Any],
    *,
    where: str = "config",
    quantisation: str | None = None,
    bits: float | None = None,
    dense: bool = False,
) -> Model:
    """Return shape and sizes of the model that a parsed ``config.json`` describes.

    Parameters
    ----------
    document
        The fields of the file.
    where
        What to call it in messages.
    quantisation
        ``bf16``, ``fp8`` (8 bits and a 32-bit scale per 128 x 128), ``mxfp4`` (4.25 bits, experts only) or ``nvfp4``
        (4.5 bits, experts, shared experts and dense layers); default: what the config says.
    bits
        Bits per parameter of every matrix, scales included, instead.
    dense
        Whether to take a dense model too, as one with a single expert in each layer, which every token chooses.

    Raises
    ------
    SourceError
        If it is not the config of a Mixture-of-Experts model, or a size in it is not one.
    UsageError
        If the quantisation is not known, or both ways to give it are used.
    """
    config = parse_config(document, where=where, dense=dense)
    text = flatten(document)
    scheme = chosen(quantisation, bits) or configured({**document, **text})
    shape = _Shape(text, config, where)
    return Model(
        name=config.name or config.model_type or "config",
        config=config,
        hidden_size=shape.hidden,
        expert_width=shape.width,
        shared_experts=shape.shared_experts,
        quantisation=scheme,
        parts=tuple(shape.parts()),
        caches=tuple(shape.caches()),
        notes=tuple(note for note in (scheme.note, *shape.notes(document)) if note is not None),
    )


class _Shape:
    """The parts of a model, made of the fields of its config."""

    def __init__(self, text: Mapping[str, Any], config: ModelConfig, where: str) -> None:
        self._text = text
        self._where = where
        self._config = config
        self._family = config.model_type or ""
        self._layers = config.num_hidden_layers
        self._moe = self._layers if config.moe_layers is None else len(config.moe_layers)
        self.hidden = self._size(*_HIDDEN)
        self.width = self._size(*_EXPERT_WIDTH)
        self.shared_experts, self._shared_width = self._shared()

    def _size(self, *keys: str) -> int | None:
        for key in keys:
            value = self._text.get(key)
            if isinstance(value, list) and value:
                value = value[0]  # the language part comes first where a model has several
            found = count({key: value}, (key,), self._where)
            if found:
                if found > 1 << 24:
                    raise SourceError(f"{key} is {found}", where=self._where, expected=f"at most {1 << 24}")
                return found
        return None

    def _shared(self) -> tuple[int, int]:
        """Shared experts per layer, and the width of all of them together."""
        number, width = self._size(*_SHARED) or 0, self._size(*_SHARED_WIDTH)
        if width is not None:
            return number or 1, width if self._family != "nemotron_h" else width * (number or 1)
        if self._family.startswith("llama4"):
            return 1, self.width or 0
        return number, number * (self.width or 0)

    def notes(self, document: Mapping[str, Any]) -> list[str]:
        """Return what the user should know about the sizes."""
        found = []
        if self._config.moe_layers is None:
            found.append("the config has no rule for dense layers: every layer is counted as MoE")
        if any(key in document for key in ("vision_config", "audio_config")):
            found.append("vision and audio parts are not counted")
        if self._size("num_nextn_predict_layers"):
            found.append("layers for multi-token prediction are not counted")
        missing = [
            what
            for what, value in (
                ("hidden_size", self.hidden),
                ("the experts' width", self.width),
                ("num_attention_heads", self._size(*_HEADS)),
                ("vocab_size", self._size("vocab_size")),
            )
            if value is None
        ]
        if missing:
            found.append(f"the config lacks {', '.join(missing)}: sizes that depend on it are unknown")
        return found

    def parts(self) -> list[Part]:
        """Every part whose size the config tells, in the order of `PARTS`."""
        hidden = self.hidden
        if hidden is None:
            return []
        found = []
        if self.width is not None:
            bias = 2 * self.width + hidden if self._family == "gpt_oss" else 0
            copies = self._moe * self._config.num_experts
            found.append(Part("expert", copies, self._mlp(self.width), bias))
        if self.width is not None or self._shared_width:
            matrices = self._mlp(self._shared_width) if self._shared_width else ()
            gate = hidden if "shared_expert_intermediate_size" in self._text else 0
            found.append(Part("shared", self._moe if self._shared_width else 0, matrices, gate))
        experts = self._config.num_experts
        bias = experts if self._family in _CORRECTION_BIAS | {"gpt_oss"} else 0
        found.append(Part("router", self._moe if experts > 1 else 0, ((experts, hidden),), bias))
        attention = self._attention(hidden)
        if attention is not None:
            found.append(attention)
        dense = self._dense()
        if dense is not None:
            found.append(dense)
        # Each layer has one before its attention and one before its MLP; Phi's have a bias, too.
        norms = (2 * self._layers + 1) * hidden * (2 if self._family == "phimoe" else 1)
        found.append(Part("norms", 1, (), norms, self._why()))
        vocabulary = self._size("vocab_size")
        if vocabulary is not None:
            found.append(self._embeddings(vocabulary, hidden))
        return found

    def caches(self) -> list[Cache]:
        """Return what the attention keeps per token, by how far its layers look back; empty where that is not known."""
        heads, hidden = self._size(*_HEADS), self.hidden
        if heads is None or hidden is None:
            return []
        if rank := self._size("kv_lora_rank"):
            # Computed in the latent space, as engines decode: every head attends to the one latent vector.
            elements = rank + (self._size("qk_rope_head_dim") or 0)
            multiplies, kv_heads = heads * (elements + rank), 1
        else:
            kv_heads, size = self._size(*_KV_HEADS) or heads, self._size("head_dim") or hidden // heads
            elements, multiplies = 2 * kv_heads * size, 2 * heads * size
        kinds = self._text.get("layer_types")
        kinds = kinds if isinstance(kinds, list) else []
        sliding, chunked = kinds.count("sliding_attention"), kinds.count("chunked_attention")
        layers = (
            (self._full_attention_layers() - sliding - chunked, None),
            (sliding, self._size("sliding_window")),
            (chunked, self._size("attention_chunk_size")),
        )
        return [Cache(n, elements, multiplies, kv_heads, window) for n, window in layers if n > 0]

    def _mlp(self, width: int) -> tuple[Matrix, ...]:
        assert self.hidden is not None
        up, down = (width, self.hidden), (self.hidden, width)
        return (up, down) if self._family in _TWO_MATRICES else (up, up, down)

    def _why(self) -> str | None:
        if self._family in _CHECKED:
            return None
        return f"not checked for {self._family or 'a model without model_type'}"

    def _dense(self) -> Part | None:
        copies = self._layers - self._moe
        pattern = self._text.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            copies = pattern.count("-")
        if copies <= 0:
            return Part("dense", 0)
        width = self._size(*_DENSE_WIDTH)
        return None if width is None else Part("dense", copies, self._mlp(width), 0, self._why())

    def _embeddings(self, vocabulary: int, hidden: int) -> Part:
        tied, why = self._text.get("tie_word_embeddings"), self._why()
        if not isinstance(tied, bool):
            tied = self._family in _TIED
            why = why or "the config does not say whether the head has weights of its own"
        bias = vocabulary if self._text.get("lm_head_bias") is True else 0
        return Part("embeddings", 1, ((vocabulary, hidden),) * (1 if tied else 2), bias, why)

    def _attention(self, hidden: int) -> Part | None:
        """Attention (or what stands in its place) of all layers: they are not alike in every model."""
        heads = self._size(*_HEADS)
        if heads is None:
            return None
        full = self._full_attention_layers()
        matrices, vectors = self._latent(hidden, heads) if self._size("kv_lora_rank") else self._grouped(hidden, heads)
        others, why = self._layers - full, self._why()
        every = [*matrices] * full
        vectors *= full
        if others and self._family == "qwen3_next":
            more, extra = self._linear(hidden)
        elif others and self._family == "jamba":
            more, extra = self._mamba(hidden)
        elif others:
            more, extra = matrices, 0
            why = f"{others} layers without full attention are counted as if they had it"
        else:
            more, extra = [], 0
        return Part("attention", 1, (*every, *[*more] * others), vectors + extra * others, why)

    def _full_attention_layers(self) -> int:
        types = self._text.get("layer_types", self._text.get("layers_block_type"))
        if isinstance(types, list) and len(types) == self._layers:
            # Sliding and chunked attention have the same weights as full attention.
            return sum(1 for kind in types if isinstance(kind, str) and "attention" in kind and "linear" not in kind)
        pattern = self._text.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            return pattern.count("*")
        period = self._size("attn_layer_period")
        if period is not None:
            offset = self._size("attn_layer_offset") or 0
            return sum(1 for layer in range(self._layers) if layer % period == offset % period)
        interval = self._size("full_attention_interval")
        return self._layers if interval is None else self._layers // interval

    def _grouped(self, hidden: int, heads: int) -> tuple[list[Matrix], int]:
        """Attention with grouped queries, of one layer."""
        kv_heads = self._size(*_KV_HEADS) or heads
        size = self._size("head_dim") or hidden // heads
        q, kv = heads * size, kv_heads * size
        vectors = 0
        if (
            self._text.get("attention_bias") is True
            or self._text.get("qkv_bias") is True
            or self._family in _QUERY_BIAS
        ):
            vectors += q + 2 * kv + (hidden if self._family in _OUTPUT_BIAS else 0)
        if self._family in _HEAD_NORM or (self._family == "glm4_moe" and self._text.get("use_qk_norm") is True):
            vectors += 2 * size
        if self._family in _WIDE_NORM:
            vectors += q + kv
        if self._family == "gpt_oss":
            vectors += heads  # attention sinks
        queries = 2 * q if self._family == "qwen3_next" else q  # with a gate beside each query
        return [(queries, hidden), (kv, hidden), (kv, hidden), (hidden, q)], vectors

    def _latent(self, hidden: int, heads: int) -> tuple[list[Matrix], int]:
        """Multi-head latent attention, of one layer."""
        rank, query_rank = self._size("kv_lora_rank") or 0, self._size("q_lora_rank")
        nope, rope = self._size("qk_nope_head_dim") or 0, self._size("qk_rope_head_dim") or 0
        value = self._size("v_head_dim") or 0
        q = heads * (nope + rope)
        queries = [(q, hidden)] if query_rank is None else [(query_rank, hidden), (q, query_rank)]
        keys = [(rank + rope, hidden), (heads * (nope + value), rank)]
        return [*queries, *keys, (hidden, heads * value)], rank + (query_rank or 0)

    def _linear(self, hidden: int) -> tuple[list[Matrix], int]:
        """Gated delta net of Qwen3-Next, of one layer."""
        key_heads, value_heads = self._size("linear_num_key_heads") or 0, self._size("linear_num_value_heads") or 0
        keys = key_heads * (self._size("linear_key_head_dim") or 0)
        size = self._size("linear_value_head_dim") or 0
        values, kernel = value_heads * size, self._size("linear_conv_kernel_dim") or 0
        matrices = [(2 * keys + 2 * values, hidden), (2 * value_heads, hidden), (hidden, values)]
        return matrices, (2 * keys + values) * kernel + 2 * value_heads + size

    def _mamba(self, hidden: int) -> tuple[list[Matrix], int]:
        """Mamba mixer of Jamba, of one layer."""
        inner = hidden * (self._size("mamba_expand") or 2)
        state, kernel = self._size("mamba_d_state") or 16, self._size("mamba_d_conv") or 4
        rank = self._size("mamba_dt_rank") or -(-hidden // 16)
        matrices = [(2 * inner, hidden), (rank + 2 * state, inner), (inner, rank), (inner, state), (hidden, inner)]
        return matrices, inner * kernel + inner + inner + inner + rank + 2 * state
