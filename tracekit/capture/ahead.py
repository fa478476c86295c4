"""What is predicted ahead of its layer, and the residual stream that one of the predictors needs.

``next-gate`` asks the router of a later layer about the input of this layer's router. ``quasi-hidden`` asks it about

    q = norm_{l+1}(r + sum over the routed experts of w_e * d_e)

("Speculating Experts", arXiv 2603.19289): r is the residual stream after attention, to which the block adds what its
experts return, w_e is the router's weight and d_e the expert's default vector. As in the paper the sum is over the
routed experts; what shared experts would add is left out. The experts are those that ran: where an engine runs the
predicted ones instead, later states drift, and what is recorded here is an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracekit.capture.default_vectors import DefaultVectors
from tracekit.capture.dependencies import require
from tracekit.errors import UnsupportedError, UsageError

PREDICTORS = {"next-gate": "next_gate", "quasi-hidden": "quasi_hidden"}
"""The predictors as options name them, and as traces do."""
_FARTHEST = 255

Ask = tuple[str, int]
"""A predictor as traces name it, and MoE layers ahead."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What to predict; `ahead` makes it of options."""

    predictors: tuple[str, ...] = ()
    """As traces name them."""
    distance: int = 1
    """MoE layers ahead, at most."""
    vectors: DefaultVectors | None = None
    """What ``quasi_hidden`` needs."""

    @property
    def asks(self) -> tuple[Ask, ...]:
        """Every predictor at every distance."""
        return tuple((name, distance) for name in self.predictors for distance in range(1, self.distance + 1))

    def check(self, layers: Sequence[int], num_experts: int, model_name: str) -> None:
        """Refuse what does not fit a model.

        Raises
        ------
        UsageError
            It has too few MoE layers, or the default vectors are those of another model.
        """
        if self.predictors and self.distance >= len(layers):
            raise UsageError(
                f"predictions {self.distance} MoE layers ahead in a model of {len(layers)}",
                expected=f"at most {len(layers) - 1}",
            )
        if "quasi_hidden" not in self.predictors:
            return
        if self.vectors is None:
            raise UsageError(
                "quasi-hidden predictions without default vectors",
                expected="default_vectors: what calibrate() returns, or the file that they were saved to",
            )
        if self.vectors.layers != tuple(layers) or self.vectors.vectors.shape[1] != num_experts:
            raise UsageError(
                f"default vectors of {self.vectors.vectors.shape[1]} experts in the layers "
                f"{list(self.vectors.layers[:16])}",
                expected=f"those of {model_name}: {num_experts} experts in the layers {list(layers[:16])}",
            )


def ahead(predict: str | Sequence[str] | None, distance: int = 1, vectors: DefaultVectors | None = None) -> Ahead:
    """Return what options ask for.

    Raises
    ------
    UsageError
        There is no such predictor, or the distance is none.
    """
    names = () if predict is None else (predict,) if isinstance(predict, str) else tuple(dict.fromkeys(predict))
    for name in names:
        if name not in PREDICTORS:
            raise UsageError(f"predict {name!r}", expected=", ".join(PREDICTORS))
    if not 1 <= distance <= _FARTHEST:
        raise UsageError(f"predict_distance is {distance}", expected=f"1 to {_FARTHEST}")
    return Ahead(tuple(PREDICTORS[n] for n in names), distance, vectors if "quasi-hidden" in names else None)


@dataclass(slots=True)
class Stream:
    """The residual stream around one MoE block, in the forward that runs."""

    where: str
    """Model and layer, for messages."""
    vectors: Any
    """``[experts, hidden]`` default vectors."""
    norm: Any = None
    """The module whose output the block is given."""
    normed: Any = None
    """What it returned."""
    before: Any = None
    """What it was given: the stream to which the block's output is added."""
    added: Any = None
    """What the block returned."""
    quasi: Any = None
    """The stream after the block, with default vectors for what its experts return."""
    _seen: list[tuple[Any, Any, Any]] = field(default_factory=list)
    """Modules of the layer that ran, what they were given, and what they returned."""

    def clear(self) -> None:
        """Forget the forward."""
        self.normed = self.before = self.added = self.quasi = None
        self._seen.clear()

    def watch(self, modules: Mapping[str, Any], block_name: str, routed: Callable[[], tuple[Any, Any]]) -> ExitStack:
        """Keep hooks on the modules around a block.

        Parameters
        ----------
        modules
            All of the model, by name.
        block_name
            The block's.
        routed
            Returns ids and weights ``[rows, k]`` once the block has run.
        """
        layer_name = _layer_name(block_name)
        hooks = ExitStack()
        for name, module in modules.items():
            inside = name.startswith(f"{layer_name}.") and not f"{name}.".startswith(f"{block_name}.")
            if inside and next(module.children(), None) is None:
                hooks.callback(module.register_forward_hook(self._see).remove)
        block = modules[block_name]
        hooks.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        hooks.callback(block.register_forward_hook(self._leave).remove)

        def after(module: Any, args: Any, output: Any) -> None:
            self._form(_first(output), *routed())

        hooks.callback(modules[layer_name].register_forward_hook(after).remove)
        return hooks

    def ask_about(self, entered: Any, earlier: Stream) -> Any:
        """Return what this layer's router would be given, had the stream of an earlier layer come here as it was.

        Parameters
        ----------
        entered
            What the router is given.
        earlier
            The layer that predicts.
        """
        if self.norm is None or self.normed.numel() != entered.numel():
            raise self.not_formed("no module's output is what its experts are given")
        if not require("torch").equal(self.normed.reshape(entered.shape), entered):
            raise self.not_formed("its router is given something else than its norm returns")
        if earlier.quasi is None or earlier.quasi.shape != self.before.shape:
            raise self.not_formed("the layers before it have another residual stream")
        # Not called as a module: hooks are not meant to see it.
        return self.norm.forward(earlier.quasi.to(self.before.device)).reshape(entered.shape)

    def not_formed(self, why: str) -> UnsupportedError:
        """Return the error that says why there is no quasi-hidden state."""
        return UnsupportedError(
            f"no quasi-hidden state can be formed: {why}",
            where=self.where,
            expected="layers that add what their experts return to the input of the norm before them",
            remedy="Leave out quasi-hidden; next-gate asks less of a model",
        )

    def _see(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        given = _first(args)
        if given is not None and hasattr(output, "shape") and output.shape == given.shape:
            self._seen.append((module, given, output))

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _first([*args, *kwargs.values()])
        for norm, before, normed in reversed(self._seen):
            if given is not None and normed.data_ptr() == given.data_ptr() and normed.numel() == given.numel():
                self.norm, self.before, self.normed = norm, before.detach(), normed.detach()
                break
        self._seen.clear()

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.added = _first(output)

    def _form(self, after: Any, ids: Any, weights: Any) -> None:
        torch = require("torch")
        if self.before is None:
            raise self.not_formed("no module's output is what its experts are given")
        if ids is None or weights is None:
            raise self.not_formed("its experts are not given the weights of the router")
        sizes = {tensor.numel() if tensor is not None else 0 for tensor in (self.before, self.added, after)}
        shape = self.before.shape
        if len(sizes) > 1 or not torch.equal(self.before + self.added.reshape(shape), after.reshape(shape)):
            raise self.not_formed("it does more than to add what its experts return to the input of its norm")
        if self.vectors.shape[1] != shape[-1]:
            raise UsageError(
                f"default vectors of {self.vectors.shape[1]} elements",
                expected=f"{shape[-1]}, the hidden size of the model",
            )
        if not torch.is_tensor(self.vectors) or self.vectors.device != weights.device:
            self.vectors = torch.as_tensor(np.asarray(self.vectors), device=weights.device)
        # As one product: a vector for each of the k experts of each token would be k times the stream.
        shares = weights.new_zeros((len(ids), len(self.vectors))).scatter_(1, ids.long(), weights)
        self.quasi = self.before + (shares @ self.vectors).reshape(shape).to(self.before)
        self.added = None


def streams(vectors: DefaultVectors | None, layers: Sequence[int], model_name: str) -> list[Stream | None]:
    """Return a stream for each MoE layer, None for each where none is wanted."""
    if vectors is None:
        return [None] * len(layers)
    return [Stream(f"{model_name}, layer {layer}", table) for layer, table in zip(layers, vectors.vectors, strict=True)]


def _layer_name(block_name: str) -> str:
    """Return the name up to its first number: that of the layer which the block is in."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", block_name)
    return block_name if found is None else found[0]


def _first(values: Any) -> Any:
    """Return the first tensor of floats among values, None if there is none."""
    for value in values if isinstance(values, tuple | list) else (values,):
        if hasattr(value, "is_floating_point") and value.is_floating_point() and value.dim() > 1:
            return value.detach()
    return None
