"""How many bits a checkpoint spends on a parameter, and on which ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracekit.errors import UsageError

SCHEMES = ("bf16", "fp8", "mxfp4", "nvfp4")
"""The schemes that can be asked for by name; any other is given by its bits per parameter."""

_EXPERTS = frozenset({"expert"})
_MLPS = frozenset({"expert", "shared", "dense"})
_BLOCKS = _MLPS | {"attention"}
_EVERYTHING = _BLOCKS | {"router", "embeddings"}
_UNTOUCHED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Bits per parameter of the matrices that are quantised; everything else stands at ``base_bits``."""

    name: str
    bits: float
    """Bits per parameter, scales of groups along a row included."""
    parts: frozenset[str] = frozenset()
    """Parts of the model whose matrices are quantised."""
    block: tuple[int, int] | None = None
    """Rows and columns that share one 32-bit scale, which ``bits`` leaves out."""
    base_bits: int = 16
    """Bits per parameter of what is not quantised."""
    note: str | None = None
    """What was assumed about it."""


def chosen(scheme: str | None, bits: float | None, base_bits: int = 16) -> Quantisation | None:
    """Return the quantisation that the user asks for, None if he asks for none.

    Raises
    ------
    UsageError
        If both are given, the scheme is not known, or the bits are not a number from 1 to 32.
    """
    if scheme is not None and bits is not None:
        raise UsageError(f"quantisation {scheme} and {bits:g} bits", expected="one of the two")
    if bits is not None:
        if not 1 <= bits <= 32:
            raise UsageError(f"{bits:g} bits per parameter", expected="1 to 32")
        # The figure that is quoted for a file, such as 4.85 for Q4_K_M, is a mean over all that is in it.
        return Quantisation(f"{bits:g}-bit", bits, _EVERYTHING, base_bits=base_bits)
    match scheme:
        case None:
            return None
        case "bf16":
            return Quantisation("bf16", 16)
        case "fp8":
            return Quantisation("fp8", 8, _BLOCKS, block=(128, 128))
        case "mxfp4":  # as gpt-oss is released: the experts alone
            return Quantisation("mxfp4", 4 + 8 / 32, _EXPERTS)
        case "nvfp4":
            return Quantisation("nvfp4", 4 + 8 / 16, _MLPS)
    raise UsageError(
        f"no quantisation {scheme!r}",
        expected=", ".join(SCHEMES),
        remedy="Any other is given by its bits per parameter",
    )


def configured(config: Mapping[str, Any]) -> Quantisation:
    """Return what a config's ``quantization_config`` (``quantization`` of MLX) says, else its dtype."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    base = 32 if dtype in ("float32", "fp32") else 16
    plain = Quantisation({"float32": "fp32", "float16": "fp16"}.get(str(dtype), "bf16"), base, base_bits=base)
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        said = config.get("quantization")
        if not isinstance(said, dict):
            return plain
        return _mlx(said, plain)
    method = str(said.get("quant_method", said.get("quant_algo", ""))).casefold()
    found = _method(method, said)
    if found is None:
        return Quantisation(
            plain.name,
            plain.bits,
            base_bits=base,
            note=f"the quantisation {method!r} of the config is not known: sizes are for {plain.name}",
        )
    name, bits, parts, block = found
    kept = {part for part in parts if _left_alone(part, said)}
    note = f"the config leaves parts of it unquantised: {', '.join(sorted(kept))}" if kept else None
    return Quantisation(name, bits, parts - kept, block, base, note)


_Found = tuple[str, float, frozenset[str], tuple[int, int] | None]


def _method(method: str, said: Mapping[str, Any]) -> _Found | None:
    algorithm = str(said.get("quant_algo", said.get("format", ""))).casefold()
    for name, bits, parts in (("mxfp4", 4.25, _EXPERTS), ("nvfp4", 4.5, _MLPS)):
        if name in method or name in algorithm:
            # gpt-oss leaves all but its experts alone; other tools quantise every block and name what they leave.
            return name, bits, parts if method == name else _BLOCKS, None
    if method == "fp8" or "fp8" in algorithm:
        return "fp8", 8, _BLOCKS, _pair(said.get("weight_block_size"))
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin"):
        width = _number(said.get("bits", said.get("w_bit")))
        return None if width is None else (f"{method} {width}-bit", _grouped(width, said, zero=True), _BLOCKS, None)
    if method == "bitsandbytes":
        if said.get("load_in_4bit") or said.get("_load_in_4bit"):
            return "bitsandbytes 4-bit", 4.127 if said.get("bnb_4bit_use_double_quant") else 4.5, _BLOCKS, None
        return "bitsandbytes 8-bit", 8, _BLOCKS, None
    return _compressed(said)


def _compressed(said: Mapping[str, Any]) -> _Found | None:
    """Read the first group of ``compressed-tensors``."""
    groups = said.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return None
    width = _number(weights.get("num_bits"))
    if width is None:
        return None
    if weights.get("type") == "float" and width == 8:
        return "fp8", 8, _BLOCKS, _pair(weights.get("block_structure"))
    return f"{width}-bit", _grouped(width, weights, zero=weights.get("symmetric") is False), _BLOCKS, None


def _mlx(said: Mapping[str, Any], plain: Quantisation) -> Quantisation:
    width, group = _number(said.get("bits")), _number(said.get("group_size"))
    if width is None:
        return plain
    if said.get("mode") in ("mxfp4", "nvfp4"):
        bits = {"mxfp4": 4.25, "nvfp4": 4.5}[said["mode"]]
    else:
        bits = width + 32 / (group or 64)  # a 16-bit scale and a 16-bit offset per group
    return Quantisation(f"MLX {width}-bit", bits, _BLOCKS | {"embeddings"}, base_bits=plain.base_bits)


def _grouped(width: int, said: Mapping[str, Any], *, zero: bool) -> float:
    """Bits per parameter with a 16-bit scale, and perhaps a zero point, per group."""
    group = _number(said.get("group_size", said.get("q_group_size")))
    return float(width) if group is None else width + (16 + (width if zero else 0)) / group


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20 else None


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2:
        rows, columns = _number(value[0]), _number(value[1])
        if rows is not None and columns is not None:
            return rows, columns
    return None


def _left_alone(part: str, said: Mapping[str, Any]) -> bool:
    words = {"attention": ("attn", "attention"), "shared": ("shared_experts", "shared_expert.", "shared_mlp")}.get(part)
    patterns = [p for key in _UNTOUCHED if isinstance(said.get(key), list) for p in said[key] if isinstance(p, str)]
    return words is not None and any(word in pattern for word in words for pattern in patterns)
