"""Which entries of the layer axis are MoE layers, and what their numbers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.checks import CHUNK_IDS
from tracekit.sources.config import ModelConfig
from tracekit.sources.files import allocate

_MOST_LAYERS = 1 << 16


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How the layer axis of every request of a trace becomes MoE layers."""

    size: int
    """Entries of the layer axis as the source has it."""
    keep: tuple[int, ...]
    """Entries that are MoE layers, in order of layer number."""
    numbers: tuple[int, ...]
    """Their layer numbers, ascending."""
    notes: tuple[str, ...] = field(default=())

    @property
    def left_out(self) -> tuple[int, ...]:
        """Entries that are not MoE layers."""
        return tuple(sorted(set(range(self.size)) - set(self.keep)))

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return ``[tokens, layers, k]`` with the MoE layers only; a view wherever one can express it."""
        if self.keep == tuple(range(self.size)):
            return array
        stride = self.keep[1] - self.keep[0] if len(self.keep) > 1 else 1
        if stride > 0 and self.keep == tuple(range(self.keep[0], self.keep[-1] + 1, stride)):
            return array[:, self.keep[0] : self.keep[-1] + 1 : stride]
        out = allocate((array.shape[0], len(self.keep), array.shape[2]), array.dtype)
        for entry, source in enumerate(self.keep):
            out[:, entry] = array[:, source]
        return out


def zero_layers(ids: NDArray[Any]) -> list[int]:
    """Entries of the layer axis that are zero in every row (k > 1: no router chooses expert 0 k times)."""
    candidates = np.flatnonzero(~ids[0].any(axis=1))
    step = max(1, CHUNK_IDS // ids.shape[2])
    starts = range(0, ids.shape[0], step)
    return [int(e) for e in candidates if not any(ids[start : start + step, e].any() for start in starts)]


def plan_layers(
    ids: NDArray[Any],
    layer_ids: tuple[int, ...] | None,
    config: ModelConfig | None,
    where: str,
    vllm: str | None = None,
) -> LayerPlan:
    """Decide from the first request which layers are MoE layers.

    vLLM 0.21 alone numbered the MoE layers from 0 without knowing of ``first_k_dense_replace``: the axis has every
    layer, but the MoE layers stand at its front and the last entries are zero. That is mended where the config says
    the same, or, without a config, where the engine is known to be 0.21.

    Parameters
    ----------
    ids
        ``[tokens, layers, k]`` of the first request, at least one token.
    layer_ids
        Layer numbers where the source gives them.
    config
        The model's config where there is one.
    where
        For messages.
    vllm
        Version of vLLM where that is the engine and the version is known.

    Raises
    ------
    SourceError
        If nothing was captured, or zeros and config contradict each other.
    """
    _, size, top_k = ids.shape
    refuse_all_zero(ids, where, vllm)
    zero = zero_layers(ids) if top_k > 1 else []
    if layer_ids is not None:
        return _by_layer_ids(size, zero, layer_ids, config, where)
    if config is not None and config.moe_layers is not None:
        return _by_config(ids, zero, config, config.moe_layers, where, vllm)
    if zero and _is_packing(vllm):
        return _unpacked_by_version(size, zero, where)
    keep = tuple(entry for entry in range(size) if entry not in zero)
    notes = [_left_out(zero)] if zero else []
    if config is not None and size < config.num_hidden_layers:
        notes.append(f"layers are numbered 0..{size - 1} in the array's order: the config does not say which are MoE")
    return LayerPlan(size, keep, keep, tuple(notes))


def refuse_all_zero(ids: NDArray[Any], where: str, vllm: str | None = None) -> None:
    """Refuse an array in which nothing was captured, with the cause that this version of vLLM is known for."""
    tokens, size, top_k = ids.shape
    # With k = 1 a few zeros may be real routing, 64 of them are not.
    if top_k == 1 and tokens * size < 64:
        return
    if top_k == 1:
        everything = np.moveaxis(ids, 1, 2)
        empty = not ids[0].any() and zero_layers(everything) == [0]
    else:
        empty = not ids[0].any() and len(zero_layers(ids)) == size
    if empty:
        raise SourceError(
            "every id is 0: the engine returned the array but capture never ran",
            where=where,
            remedy=_why_zero(release(vllm)),
        )


def _why_zero(version: tuple[int, int] | None) -> str:
    if version is None:
        return "vLLM 0.15 and monolithic kernels up to 0.26 do this: capture again with a newer version"
    if version < (0, 16):
        return "vLLM 0.15 binds its capture before the capture exists: use 0.16 or newer"
    if version < (0, 27):
        return "Monolithic (FlashInfer TRTLLM) kernels are captured since vLLM 0.27 only: use it, or another MoE kernel"
    return "MoE kernels without a capture hook (other hardware's plug-ins) do this: capture with another MoE kernel"


def release(version: str | None) -> tuple[int, int] | None:
    """Major and minor number of a version such as ``0.21.0``; None where there is none."""
    parts = [] if version is None else version.split(".")
    if len(parts) < 2 or not all(part.isdecimal() and len(part) < 9 for part in parts[:2]):
        return None
    return int(parts[0]), int(parts[1])


def _is_packing(vllm: str | None) -> bool:
    return release(vllm) == (0, 21)


def _packed(numbers: tuple[int, ...], size: int) -> LayerPlan:
    """MoE layer j stands at entry j; the entries after the last one are empty."""
    note = (
        f"vLLM 0.21 packed the {len(numbers)} MoE layers to the front of the layer axis: "
        f"they were put back to their numbers, {numbers[0]} to {numbers[-1]}"
    )
    return LayerPlan(size, tuple(range(len(numbers))), numbers, (note,))


def _unpacked_by_version(size: int, zero: list[int], where: str) -> LayerPlan:
    """Move the MoE layers of vLLM 0.21 behind the dense ones, where only leading layers can be the dense ones."""
    if zero != list(range(size - len(zero), size)) or len(zero) * 2 >= size:
        raise SourceError(
            f"layers {zero[:16]} of vLLM 0.21 are all zero: their places do not say which layers are dense",
            where=where,
            expected="MoE layers packed to the front",
            remedy="Give --config config.json of the model",
        )
    plan = _packed(tuple(range(len(zero), size)), size)
    note = f"without a config the first {len(zero)} layers were taken for the dense ones: give --config to make sure"
    return LayerPlan(plan.size, plan.keep, plan.numbers, (*plan.notes, note))


def _left_out(entries: list[int] | tuple[int, ...]) -> str:
    names = ", ".join(map(str, entries))
    if len(entries) == 1:
        return f"layer {names} is dense (all zero) and was left out"
    return f"layers {names} are dense (all zero) and were left out"


def _by_layer_ids(
    size: int, zero: list[int], layer_ids: tuple[int, ...], config: ModelConfig | None, where: str
) -> LayerPlan:
    if len(set(layer_ids)) != len(layer_ids) or min(layer_ids, default=0) < 0:
        raise SourceError(f"layer ids {list(layer_ids)[:16]} repeat or are negative", where=where)
    if max(layer_ids, default=0) >= _MOST_LAYERS:
        raise SourceError(f"layer id {max(layer_ids)}", where=where, expected=f"0 to {_MOST_LAYERS - 1}")
    if len(layer_ids) == size:
        entry_of = {number: entry for entry, number in enumerate(layer_ids)}
    elif layer_ids and max(layer_ids) < size:
        entry_of = {number: number for number in layer_ids}  # the axis has every layer, dense ones included
    else:
        raise SourceError(
            f"{len(layer_ids)} layer ids for a layer axis of {size}",
            where=where,
            remedy="Give one layer id per entry of the layer axis",
        )
    if config is not None and config.moe_layers is not None:
        strange = sorted(set(layer_ids) - set(config.moe_layers))
        if strange:
            raise SourceError(
                f"layer ids name layers that the config says are dense: {strange[:16]}",
                where=where,
                remedy="Give the --config of the model that was traced",
            )
    dropped = sorted(number for number, entry in entry_of.items() if entry in zero)
    numbers = tuple(sorted(number for number in layer_ids if number not in dropped))
    return LayerPlan(
        size, tuple(entry_of[number] for number in numbers), numbers, (_left_out(dropped),) if dropped else ()
    )


def _by_config(
    ids: NDArray[Any],
    zero: list[int],
    config: ModelConfig,
    moe_layers: tuple[int, ...],
    where: str,
    vllm: str | None,
) -> LayerPlan:
    size, top_k = ids.shape[1:]
    if size == config.num_hidden_layers:
        keep = moe_layers
    elif size == len(moe_layers):
        keep = tuple(range(size))
    else:
        raise SourceError(
            f"{size} layers contradict the config",
            where=where,
            expected=f"{config.num_hidden_layers} layers, or the {len(moe_layers)} with experts",
            remedy="Give the --config of the model that was traced",
        )
    dense = tuple(entry for entry in range(size) if entry not in keep)
    routed = [entry for entry in dense if entry not in zero] if top_k > 1 else []
    missing = [entry for entry in keep if entry in zero]
    # Every entry that the packing fills has routing, every entry that it leaves has none: no other fault does that.
    if routed and zero == list(range(len(moe_layers), size)) and (release(vllm) is None or _is_packing(vllm)):
        return _packed(moe_layers, size)
    if routed:
        raise SourceError(
            f"layers {routed[:16]} have routing but are dense by the config",
            where=where,
            remedy="Give the --config of the model that was traced",
        )
    if missing:
        raise SourceError(
            f"MoE layers {[moe_layers[keep.index(entry)] for entry in missing][:16]} are all zero: not captured",
            where=where,
            remedy="Pipeline parallelism and drafts that overwrite a layer do this; capture again without",
        )
    return LayerPlan(size, keep, moe_layers, (_left_out(dense),) if dense else ())


def check_layers(plan: LayerPlan, ids: NDArray[Any], where: str) -> None:
    """Check that a later request has routing in the same layers as the first one.

    Raises
    ------
    SourceError
        Naming the layer that is zero here and routed elsewhere, or the other way round.
    """
    refuse_all_zero(ids, where)
    if ids.shape[2] == 1:
        return
    zero = zero_layers(ids)
    for entry, number in zip(plan.keep, plan.numbers, strict=True):
        if entry in zero:
            raise SourceError(
                f"layer {number} is zero in this request but routed in others",
                where=where,
                expected="routing in every MoE layer of every request",
                remedy="Leave this request out or capture it again",
            )
    routed = [entry for entry in plan.left_out if entry not in zero]
    if routed:
        raise SourceError(
            f"layer {routed[0]} is routed in this request but zero in the first one",
            where=where,
            expected="the same layers in every request",
            remedy="Was the first request captured completely? Give --config to name the MoE layers",
        )
