"""Hooks on a transformers model that keep which experts its MoE layers run.

What really ran is an argument of the ``experts`` module: since transformers 5 every block calls
``experts(hidden, top_k_index, top_k_weights)``. Where a block's experts take no such argument, the output of its router
is read instead: its own index where it returns one, else the top-k of its logits, but that only for the families in
which the two are known to agree (biased and group-limited routers choose other experts than the largest logits).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.capture.ahead import Ahead, Ask, Stream, streams
from tracekit.capture.dependencies import require
from tracekit.errors import UnsupportedError, UsageError
from tracekit.schema import id_dtype
from tracekit.sources.config import ModelConfig, parse_config
from tracekit.sources.logits import LOGITS_CHOOSE

_LOGITS_CHOOSE = LOGITS_CHOOSE | {"granitemoehybrid", "granitemoeshared", "minimax"}
"""Model types whose routers run the k largest of their logits, so that the logits say what ran."""

_CHOOSES_IN_TURN = frozenset({"phimoe"})
"""Model types whose weights do not rank the experts: each is the share among those that were left to choose from."""

_ROUTERS = ("gate", "router")
_EXPERTS = ("experts", "input_linear")
"""Children that make a module an MoE block; ``input_linear``, beside a router, is that of older Granite."""


@dataclass(slots=True)
class _Block:
    """One MoE layer: its modules and what they said in the forward that runs."""

    layer: int
    name: str
    ids: Any = None
    weights: Any = None
    calls: int = 0
    routed: Any = None
    """What the router returned."""
    entered: Any = None
    """What the router was given, where experts are predicted."""
    asked: Any = None
    """``[rows, k]`` experts that the router chose by itself, to be held against what ran."""
    predicted: dict[Ask, tuple[Any, Any]] = field(default_factory=dict)
    """By predictor and distance: ids and, where the router gives them, weights ``[rows, k]``."""
    stream: Stream | None = None
    """The residual stream around it, where quasi-hidden states are formed."""

    def ran(self) -> tuple[Any, Any]:
        """Return the ids and weights ``[rows, k]`` that its experts were given, None for what they were not."""
        return self.ids, self.weights


@dataclass(slots=True)
class Rows:
    """What one forward routed."""

    ids: NDArray[np.unsignedinteger[Any]]
    """``[rows, layers, k]``; where weights are seen, the largest first (Phi: in the order of choice)."""
    weights: NDArray[np.float32] | None
    """``[rows, layers, k]``, aligned with ``ids``."""
    predicted: NDArray[np.unsignedinteger[Any]] | None = None
    """``[rows, asks, layers, k]`` what was predicted, in the order of `Taps.asks`, where that is asked for; of the
    first layers, which have too few before them, nothing that counts."""


@dataclass(slots=True)
class Taps:
    """The hooks of one model; `tapped` makes it.

    Parameters
    ----------
    config
        N, k and the kind of the model.
    blocks
        Its MoE layers, by layer number.
    model_name
        For messages.
    ahead
        What is predicted.
    """

    config: ModelConfig
    blocks: list[_Block]
    model_name: str
    ahead: Ahead = field(default_factory=Ahead)
    ordered: bool | None = None
    """Whether rank 0 is the router's first choice; None before the first forward, or where nothing says so."""
    _sources: set[str] = field(default_factory=set)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers, ascending."""
        return tuple(block.layer for block in self.blocks)

    @property
    def asks(self) -> tuple[Ask, ...]:
        """What `Rows.predicted` holds: predictors, and MoE layers ahead."""
        return self.ahead.asks

    @property
    def sources(self) -> tuple[str, ...]:
        """What the ids were read from: ``experts``, ``router`` or ``logits``."""
        return tuple(sorted(self._sources))

    @property
    def touched(self) -> bool:
        """Whether a block ran since the last `take` or `clear`."""
        return any(block.calls or block.routed is not None for block in self.blocks)

    def clear(self) -> None:
        """Forget what was not taken."""
        for block in self.blocks:
            block.ids = block.weights = block.routed = block.entered = block.asked = None
            block.predicted.clear()
            block.calls = 0
            if block.stream is not None:
                block.stream.clear()

    def take(self, rows: int) -> Rows:
        """Return what the last forward routed, and forget it.

        Parameters
        ----------
        rows
            Tokens of the forward, padding included: batch size times length.

        Raises
        ------
        UnsupportedError
            A layer shows nothing that says which experts ran, or not once for each token.
        """
        ids: list[NDArray[Any]] = []
        weights: list[NDArray[Any]] = []
        try:
            for block in self.blocks:
                found = self._of(block, rows)
                ids.append(found[0].cpu().numpy())
                if found[1] is not None:
                    weights.append(found[1].cpu().numpy())
            predicted = self._predicted(rows) if self.asks else None
        finally:
            self.clear()
        if len({array.shape for array in ids}) > 1:
            counts = sorted({array.shape[1] for array in ids})
            raise UnsupportedError(f"layers of {self.model_name} run different numbers of experts: {counts}")
        taken = self._checked(np.stack(ids, 1), np.stack(weights, 1) if len(weights) == len(ids) else None)
        if predicted is not None:
            self._check_asked(taken.ids, predicted[1])
            taken.predicted = predicted[0]
        return taken

    def _predicted(self, rows: int) -> tuple[NDArray[np.unsignedinteger[Any]], list[NDArray[Any]]]:
        """Return ``[rows, asks, layers, k]`` predictions, and by layer what the routers chose by themselves."""
        asked = [block.asked for block in self.blocks]
        if any(ids is None or ids.shape[0] != rows for ids in asked):
            raise self.not_asked("its router does not say by itself which experts it would choose")
        out = np.zeros((rows, len(self.asks), len(self.blocks), asked[0].shape[1]), id_dtype(self.config.num_experts))
        for entry, block in enumerate(self.blocks):
            for ask, (ids, weights) in block.predicted.items():
                ids = ids.cpu().numpy()
                if weights is not None and self.config.model_type not in _CHOOSES_IN_TURN:
                    order = np.argsort(-weights.cpu().numpy(), axis=1, kind="stable")
                    ids = np.take_along_axis(ids, order, 1)
                out[:, self.asks.index(ask), entry] = ids
        return out, [ids.cpu().numpy() for ids in asked]

    def _check_asked(self, ran: NDArray[Any], asked: list[NDArray[Any]]) -> None:
        """Refuse to predict with routers that are not all there is to the choice."""
        for entry, ids in enumerate(asked):
            if not np.array_equal(np.sort(ids, 1), np.sort(ran[:, entry], 1)):
                raise self.not_asked("its router by itself chooses other experts than those that ran")

    def not_asked(self, why: str) -> UnsupportedError:
        """Return the error that says why nothing can be predicted."""
        return UnsupportedError(
            f"the next router of {self.model_name} cannot be asked: {why}",
            expected="a router that returns the experts it chooses",
            remedy="Leave out the predictions",
        )

    def _of(self, block: _Block, rows: int) -> tuple[Any, Any]:
        """Return ids and, where they are seen, weights of one block, both ``[rows, k]`` tensors."""
        if block.calls > 1:
            raise UnsupportedError(
                f"{block.name} of {self.model_name} ran {block.calls} times in one forward",
                expected="every MoE layer to run once a forward",
            )
        ids, weights, source = block.ids, block.weights, "experts"
        if ids is None and block.routed is not None:
            ids, weights, source = _from_router(block.routed, self.config)
        if ids is None:
            raise UnsupportedError(
                f"nothing in {block.name} says which experts ran",
                where=f"{self.model_name}, layer {block.layer}",
                expected="experts that take their index as an argument, a router that returns it, or logits of a "
                "family whose router takes the largest ones",
                remedy="A newer transformers may help: pip install --upgrade transformers",
            )
        if ids.shape[0] != rows:
            raise UnsupportedError(
                f"{block.name} routed {ids.shape[0]} tokens in a forward over {rows}",
                where=f"{self.model_name}, layer {block.layer}",
                expected="every token to be routed",
            )
        self._sources.add(source)
        return ids, weights

    def _checked(self, ids: NDArray[Any], weights: NDArray[Any] | None) -> Rows:
        """Return ids in router order and of their smallest type, if they are experts of the model."""
        experts, top_k = self.config.num_experts, ids.shape[2]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < experts:
            raise UnsupportedError(
                f"expert {int(ids.max())} ran but the config of {self.model_name} has {experts}",
                expected=f"ids 0 to {experts - 1}",
            )
        if top_k > 1 and bool((np.diff(np.sort(ids, axis=2), axis=2) == 0).any()):
            raise UnsupportedError(f"{self.model_name} routed a token to the same expert twice")
        if weights is not None and self.config.model_type not in _CHOOSES_IN_TURN:
            # Some routers ask for an unsorted top-k; a stable sort leaves those alone that do not.
            order = np.argsort(-weights, axis=2, kind="stable")
            ids, weights = np.take_along_axis(ids, order, 2), np.take_along_axis(weights, order, 2)
        self.ordered = True if weights is not None or self._sources == {"logits"} else None
        return Rows(ids.astype(id_dtype(experts)), weights)


@contextmanager
def tapped(model: Any, *, ahead: Ahead | None = None) -> Iterator[Taps]:
    """Keep hooks on the MoE layers of a model.

    Parameters
    ----------
    model
        A transformers model with routed experts.
    ahead
        What to predict of later layers, if anything.

    Raises
    ------
    UnsupportedError
        The model has no MoE layers that can be hooked, or they cannot be told apart.
    UsageError
        It is no such model, or what to predict does not fit it.
    """
    require("torch")
    ahead = Ahead() if ahead is None else ahead
    if not hasattr(model, "named_modules") or not hasattr(model, "config"):
        raise UsageError(f"a {type(model).__name__}", expected="a transformers model")
    name = type(model).__name__
    modules = dict(model.named_modules())
    blocks = _blocks(modules, name)
    document = dict(model.config.to_dict())
    if "moe_k" in document:
        document.pop("top_k", None)  # before transformers 5 that of sampling, which every config carries
    config = parse_config(document, where=f"the config of {name}")
    unseen = sorted(set(config.moe_layers or ()) - {block.layer for block in blocks})
    if unseen:
        raise UnsupportedError(
            f"no experts found in layers {', '.join(map(str, unseen[:16]))}, which its config says are MoE layers",
            where=name,
            expected="a module named experts in each",
        )
    taps = Taps(config, blocks, name, ahead)
    ahead.check(taps.layers, config.num_experts, name)
    with ExitStack() as hooks:
        for block, stream in zip(blocks, streams(ahead.vectors, taps.layers, name), strict=True):
            block.stream = stream
            if stream is not None:
                hooks.enter_context(stream.watch(modules, block.name, block.ran))
            for child in (*_EXPERTS, *_ROUTERS):
                module = modules.get(f"{block.name}.{child}" if block.name else child)
                if module is not None and child == "experts":
                    handle = module.register_forward_pre_hook(_experts_hook(block, config), with_kwargs=True)
                    hooks.callback(handle.remove)
                elif module is not None and child in _ROUTERS:
                    hook = _asking_hook(taps, block) if taps.asks else _router_hook(block)
                    hooks.callback(module.register_forward_hook(hook, with_kwargs=bool(taps.asks)).remove)
        yield taps


def _blocks(modules: Mapping[str, Any], model_name: str) -> list[_Block]:
    """Return the MoE layers, ascending: each has experts, and its number is the first integer of its name."""
    blocks: dict[int, _Block] = {}
    for name in modules:
        parent, _, child = name.rpartition(".")
        routed = child == "experts" or (child == "input_linear" and f"{parent}.router" in modules)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", parent)
        if not routed or number is None:
            continue
        block = _Block(int(number[1]), parent)
        if block.layer in blocks:
            raise UnsupportedError(
                f"layer {block.layer} has routed experts twice: {blocks[block.layer].name} and {parent}",
                where=model_name,
                expected="one set of experts a layer",
                remedy="Record the part of the model that is meant, such as model.language_model",
            )
        blocks[block.layer] = block
    if not blocks:
        raise UnsupportedError(
            "no layer has routed experts",
            where=model_name,
            expected="a Mixture-of-Experts model",
            remedy="A dense model routes nothing; give the MoE model itself",
        )
    return [blocks[layer] for layer in sorted(blocks)]


def _experts_hook(block: _Block, config: ModelConfig) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        block.calls += 1
        given = [*args, *kwargs.values()]
        at, weighting = places(given, config.num_experts)
        if at is not None:
            block.ids = _copied(given[at])
            block.weights = None if weighting is None else _weights(given[weighting], block.ids)
            block.routed = None  # logits of a long prompt are large and no longer needed

    return hook  # returns None: a value would replace the module's input


def _router_hook(block: _Block) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        block.routed = _tensors(output)

    return hook


def _asking_hook(taps: Taps, block: _Block) -> Any:
    """Return a hook that also asks the router, when it runs, about what was known in the layers before it."""
    keep = _router_hook(block)
    entry = next(i for i, other in enumerate(taps.blocks) if other is block)
    torch = require("torch")

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        keep(module, args, output)
        block.asked = _from_router(block.routed, taps.config)[0]
        # The rest are the router's own, such as a bias: it is asked as it is, but about another input.
        names, given = [*range(len(args)), *kwargs], [*args, *kwargs.values()]
        wide = [i for i, v in enumerate(given) if torch.is_tensor(v) and v.is_floating_point() and v.dim() > 1]
        if len(wide) != 1:
            raise taps.not_asked("its router looks at more than one input")
        entered = given[wide[0]].detach()
        block.entered = entered.clone()
        for predictor, distance in taps.asks:
            if distance > entry:
                continue
            about = _about(taps, predictor, taps.blocks[entry - distance], block).to(entered.device)
            other = dict(zip(names, given, strict=True)) | {names[wide[0]]: about}
            # Not called as a module: neither these hooks nor those of others are meant to see it.
            said = module.forward(*(other[i] for i in range(len(args))), **{name: other[name] for name in kwargs})
            ids, weights, _ = _from_router(_tensors(said), taps.config)
            if ids is not None:
                block.predicted[predictor, distance] = ids, weights

    return hook


def _about(taps: Taps, predictor: str, earlier: _Block, block: _Block) -> Any:
    """Return what a predictor takes for the input of a block's router, from what an earlier block shows."""
    if predictor == "quasi_hidden" and earlier.stream is not None and block.stream is not None:
        return block.stream.ask_about(block.entered, earlier.stream)
    if earlier.entered is None or earlier.entered.shape != block.entered.shape:
        raise taps.not_asked("the gates of its layers get different inputs")
    return earlier.entered


def _tensors(output: Any) -> list[Any]:
    """Return the tensors that a router returned."""
    values = output if isinstance(output, tuple | list) else (output,)
    return [value.detach() for value in values if hasattr(value, "detach")]


def places(values: list[Any], num_experts: int) -> tuple[int | None, int | None]:
    """Return where among arguments the index ``[rows, k]`` of experts is, the first integer matrix, and the weights.

    Weights stand after the index and have its shape, or are given for all experts; None: there are none.
    """
    at = _index_at(values)
    if at is None:
        return None, None
    shapes = (tuple(values[at].shape), (values[at].shape[0], num_experts))
    after = (i for i in range(at + 1, len(values)) if _is_matrix(values[i]) and values[i].is_floating_point())
    return at, next((i for i in after if tuple(values[i].shape) in shapes), None)


def _is_matrix(value: Any) -> bool:
    return bool(require("torch").is_tensor(value)) and value.dim() == 2


def _index_at(values: list[Any]) -> int | None:
    """Return which is the first integer matrix, None if there is none."""
    torch = require("torch")
    matrices = (i for i, value in enumerate(values) if _is_matrix(value))
    return next((i for i in matrices if not values[i].is_floating_point() and values[i].dtype != torch.bool), None)


def _copied(ids: Any) -> Any:
    return ids.detach().to(require("torch").int32, copy=True)


def _weights(value: Any, ids: Any) -> Any:
    """Return the router weights ``[rows, k]``, gathered where they are given for all experts."""
    torch = require("torch")
    if value.shape == ids.shape:
        return value.detach().to(torch.float32, copy=True)
    return value.detach().gather(1, ids.long()).to(torch.float32)


def _from_router(values: list[Any], config: ModelConfig) -> tuple[Any, Any, str]:
    """Return ids and weights that a router's output gives, and what they were read from; ids None: it does not."""
    at = _index_at(values)
    if at is not None:
        ids = _copied(values[at])
        weights = next((v for v in values if v.shape == ids.shape and v.is_floating_point()), None)
        return ids, None if weights is None else _weights(weights, ids), "router"
    if config.model_type not in _LOGITS_CHOOSE:
        return None, None, "logits"
    # The last one, where there are several: Llama 4 returns (scores, logits), Granite (…, logits).
    logits = [v for v in values if v.dim() >= 2 and v.shape[-1] == config.num_experts and v.is_floating_point()]
    if not logits:
        return None, None, "logits"
    return logits[-1].reshape(-1, config.num_experts).topk(config.top_k, dim=-1).indices, None, "logits"
