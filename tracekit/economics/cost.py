"""The time of one forward step: a roofline for each part of the model.

A part takes max(bytes / bandwidth, FLOPs / peak): its weights are read once per step however many tokens there are, its
FLOPs are two per weight and token (Williams, Waterman and Patterson, "Roofline", 2009; MoESD, 2025, for the parts of a
Mixture-of-Experts step). Norms, activations and the look-up of input embeddings are negligible and left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.economics.hardware import Hardware
from tracekit.errors import UnsupportedError, UsageError
from tracekit.sources.sizes import Model, Part

Floats = NDArray[np.float64]

CONTEXT = 1024
"""Tokens of context per request by default."""


@dataclass(frozen=True, slots=True)
class PartCost:
    """What one part of a step costs on one device; the arrays have one shape."""

    name: str
    """``attention`` (its weights), ``cache`` (keys and values), ``router``, ``shared``, ``experts``, ``dense``,
    ``head``, ``communication`` or ``overhead``."""
    bytes: Floats
    """Bytes that a device reads; those that it sends for ``communication``."""
    flops: Floats
    seconds: Floats


class CostModel:
    """What a forward step of a model costs on a machine.

    Parameters
    ----------
    model
        Sizes of its parts, at its quantisation.
    hardware
        One device of the machine.
    tensor_parallel
        Devices among which every weight is divided. The cache is divided by its heads, a latent one not at all.
    expert_parallel
        Groups of ``tensor_parallel`` devices among which the routed experts are divided. Each group keeps the other
        weights and serves its part of the requests; the loads are taken as even, so the time is a lower bound.
    context
        Tokens of context per request.
    kv_bits
        Bits per number of the cache.

    Raises
    ------
    UnsupportedError
        If the model's config does not tell the size of a part.
    UsageError
        If an argument is out of range.
    """

    def __init__(
        self,
        model: Model,
        hardware: Hardware,
        *,
        tensor_parallel: int = 1,
        expert_parallel: int = 1,
        context: int = CONTEXT,
        kv_bits: float = 16,
    ) -> None:
        for what, value, low, high in (
            ("tensor_parallel", tensor_parallel, 1, 4096),
            ("expert_parallel", expert_parallel, 1, 4096),
            ("context", context, 0, 1 << 30),
            ("kv_bits", kv_bits, 1, 64),
        ):
            if not low <= value <= high:
                raise UsageError(f"{what} of {value}", expected=f"{low} to {high}")
        self.model, self.hardware = model, hardware
        self.tensor_parallel, self.expert_parallel = tensor_parallel, expert_parallel
        self.context, self.kv_bits = context, kv_bits
        found = {part.name: part for part in model.parts}
        missing = [name for name in ("expert", "attention", "dense", "embeddings") if name not in found]
        if missing:
            raise UnsupportedError(
                f"the config of {model.name} does not tell the size of its {', '.join(missing)}",
                remedy="Give a config.json with all of its fields, or a bundled model",
            )
        embeddings = found["embeddings"]
        # The head is the last of them, the only one where it is tied to the input's.
        found["head"] = replace(embeddings, name="embeddings", matrices=embeddings.matrices[-1:])
        self._parts = found

    def on(self, hardware: Hardware) -> CostModel:
        """Return the same on another machine."""
        return CostModel(
            self.model,
            hardware,
            tensor_parallel=self.tensor_parallel,
            expert_parallel=self.expert_parallel,
            context=self.context,
            kv_bits=self.kv_bits,
        )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.config.num_hidden_layers

    def parts(self, batch_size: ArrayLike, tokens: ArrayLike, unique: ArrayLike) -> tuple[PartCost, ...]:
        """Return what each part of a step costs, on the device that is busiest.

        Parameters
        ----------
        batch_size
            Requests in the step, B.
        tokens
            Tokens of each request in the step, T.
        unique
            Routed experts that the step loads, per MoE layer: U(T, B), measured or expected. All three broadcast.

        Returns
        -------
        tuple of PartCost
            Their sum is the step. ``overhead`` holds what is fixed, and the sampling.
        """
        B, T, U = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (batch_size, tokens, unique)))
        here = np.maximum(B / self.expert_parallel, 1.0)  # requests of one group: at least one of them is not idle
        rows = here * T
        k = self.model.config.top_k
        costs = [
            self._weights("attention", rows),
            self._cache(here, T),
            self._weights("router", rows),
            self._weights("shared", rows),
            self._experts(B * T * k, U),
            self._weights("dense", rows),
            self._weights("head", rows),
            self._communication(rows),
        ]
        fixed = self.hardware.overhead + self.hardware.launch * self.launches + self.hardware.sampling * B * T
        none = np.zeros(rows.shape)
        return (*(c for c in costs if c is not None), PartCost("overhead", none, none, fixed))

    def seconds(self, batch_size: ArrayLike, tokens: ArrayLike, unique: ArrayLike) -> Floats:
        """Return the seconds of a step; arguments as of `parts`."""
        return total(self.parts(batch_size, tokens, unique))

    @property
    def launches(self) -> int:
        """Kernels of a step, as `Hardware.launch` counts them."""
        layers = {"attention": self.layers, "router": self.model.moe_layers, "head": 1}
        layers |= {name: self._parts[name].copies for name in ("shared", "dense") if name in self._parts}
        return sum(layers.values()) + self.model.moe_layers + sum(cache.layers for cache in self.model.caches)

    def _weights(self, name: str, rows: Floats) -> PartCost | None:
        """Cost of weights that every token uses."""
        part = self._parts.get(name)
        if part is None or not part.copies or not part.parameters:
            return None
        size = part.copies * part.bytes(self.model.quantisation) / self.tensor_parallel
        flops = 2 * part.copies * _multiplied(part) / self.tensor_parallel
        return self._cost(name, np.full(rows.shape, size), flops * rows)

    def _experts(self, chosen: Floats, unique: Floats) -> PartCost:
        """Cost of the routed experts: bytes by how many are loaded, FLOPs by how many were chosen."""
        part, devices = self._parts["expert"], self.tensor_parallel * self.expert_parallel
        layers = self.model.moe_layers
        size = layers * part.bytes(self.model.quantisation) / devices
        return self._cost("experts", size * unique, 2 * layers * _multiplied(part) / devices * chosen)

    def _cache(self, requests: Floats, tokens: Floats) -> PartCost | None:
        """Cost of attending to the context: read once per step for all T tokens of a request."""
        size = flops = 0.0
        for cache in self.model.caches:
            seen = self.context if cache.window is None else min(self.context, cache.window)
            devices = min(self.tensor_parallel, cache.heads)
            size += cache.layers * seen * cache.elements * self.kv_bits / 8 / devices
            flops += 2 * cache.layers * seen * cache.multiplies / self.tensor_parallel
        if not size:
            return None
        return self._cost("cache", size * requests, flops * requests * tokens)

    def _communication(self, rows: Floats) -> PartCost | None:
        """Cost of the two all-reduces of a layer under tensor parallelism, 16 bits a number, as a ring sends them."""
        devices, link, hidden = self.tensor_parallel, self.hardware.link, self.model.hidden_size
        if devices == 1 or link == np.inf or hidden is None:
            return None
        sent = 2 * self.layers * 2 * (devices - 1) / devices * hidden * 2 * rows
        return PartCost("communication", sent, np.zeros(rows.shape), sent / link)

    def reading(self, part: PartCost) -> Floats:
        """Return the seconds that a part's bytes take."""
        return part.bytes / (self.hardware.bandwidth * self.hardware.bandwidth_share)

    def computing(self, part: PartCost) -> Floats:
        """Return the seconds that a part's FLOPs take."""
        return part.flops / (self.hardware.flops * self.hardware.flops_share)

    def bound(self, part: PartCost) -> NDArray[np.str_]:
        """Return what a part's time goes to: ``bandwidth``, ``compute``, or ``overhead`` (communication, too)."""
        if part.name in ("communication", "overhead"):
            return np.full(part.seconds.shape, "overhead")
        return np.where(self.computing(part) > self.reading(part), "compute", "bandwidth")

    def _cost(self, name: str, size: Floats, flops: Floats) -> PartCost:
        part = PartCost(name, size, flops, np.zeros(size.shape))
        reading, computing = self.reading(part), self.computing(part)
        longer, shorter = np.maximum(reading, computing), np.minimum(reading, computing)
        return replace(part, seconds=longer + (1 - self.hardware.overlap) * shorter)


def total(parts: tuple[PartCost, ...]) -> Floats:
    """Return the seconds of a step from its parts."""
    return np.asarray(sum(part.seconds for part in parts), np.float64)


def _multiplied(part: Part) -> int:
    """Weights of one copy that each token is multiplied with."""
    return sum(rows * columns for rows, columns in part.matrices)


def uniform_unique(num_experts: int, top_k: int, tokens: Any) -> Floats:
    """Return N (1 - (1 - k/N)^t): the unique experts of t tokens if every k-subset were equally likely.

    The formula that is used in want of a trace; t is T·B at batch size B.
    """
    return np.asarray(num_experts * (1 - (1 - top_k / num_experts) ** np.asarray(tokens, np.float64)), np.float64)
