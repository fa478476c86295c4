"""Calibrate default vectors: run a model over texts and average what each of its experts returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from tracekit.capture.default_vectors import DefaultVectors
from tracekit.capture.dependencies import require
from tracekit.capture.hooks import Taps, places, tapped
from tracekit.capture.speculative import last_logits
from tracekit.errors import UnsupportedError, UsageError

_TOLERANCE = {"torch.float32": 1e-3, "torch.float64": 1e-6}
"""How far the weighted sum of the outputs may be from what the module returned, as a share of it; of shorter types
the rounding of k outputs, each to 8 or 11 bits, leaves more."""


def calibrate(model: Any, texts: Iterable[Sequence[int]]) -> DefaultVectors:
    """Return the mean output of each expert over the tokens of some texts that are routed to it.

    An expert's output is that before the router's weight. Every expert is run once more for it, alone: this costs about
    as much again as the forward itself.

    Parameters
    ----------
    model
        A transformers model whose experts take index and weights as arguments.
    texts
        Token ids, one text after the other; each is one forward.

    Raises
    ------
    UnsupportedError
        The model's experts do not say what each of them returns.
    UsageError
        There is no token.
    """
    torch = require("torch")
    with torch.no_grad(), tapped(model) as taps, ExitStack() as hooks:
        sums: list[Any] = [None] * len(taps.blocks)
        tokens = np.zeros((len(taps.blocks), taps.config.num_experts), np.int64)
        modules = dict(model.named_modules())
        for entry, block in enumerate(taps.blocks):
            module = modules.get(f"{block.name}.experts" if block.name else "experts")
            if module is not None:
                hook = _hook(taps, entry, sums, tokens)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            model(input_ids=ids, use_cache=False, **last_logits(model, 1))
            taps.clear()
    if not tokens.any():
        raise UsageError("no token to calibrate default vectors on", expected="texts of tokens")
    if any(total is None for total in sums):
        raise _hidden(taps, next(i for i, total in enumerate(sums) if total is None))
    means = np.stack(sums) / np.maximum(tokens, 1)[:, :, None]
    return DefaultVectors(taps.layers, means.astype(np.float32), tokens)


def _hook(taps: Taps, entry: int, sums: list[Any], tokens: np.ndarray[Any, Any]) -> Any:
    """Return a hook on the experts of a layer that adds up what each of them returns."""
    torch = require("torch")
    experts = taps.config.num_experts

    def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        names, given = [*range(len(args)), *kwargs], [*args, *kwargs.values()]
        at, weighting = places(given, experts)
        if at is None or weighting is None or not torch.is_tensor(output):
            raise _hidden(taps, entry)
        index, weights = given[at], given[weighting]
        whole = torch.zeros_like(output, dtype=torch.float32)
        total = torch.zeros((experts, output.shape[-1]), device=output.device)
        for rank in range(index.shape[1]):
            # One expert for each token, with weight 1: not called as a module, so that no hook sees it.
            chosen = index[:, rank : rank + 1]
            if weights.shape == index.shape:
                share, ones = weights[:, rank], torch.ones_like(weights[:, :1])
            else:
                share = weights.gather(1, chosen.long())[:, 0]
                ones = torch.zeros_like(weights).scatter_(1, chosen.long(), 1)
            other = dict(zip(names, given, strict=True)) | {names[at]: chosen, names[weighting]: ones}
            alone = module.forward(*(other[i] for i in range(len(args))), **{name: other[name] for name in kwargs})
            alone = alone.reshape(len(index), -1).float()
            total.index_add_(0, chosen[:, 0].long(), alone)
            whole += (alone * share.float()[:, None]).view_as(whole)
        if (whole - output.float()).norm() > _TOLERANCE.get(str(output.dtype), 3e-2) * output.float().norm():
            raise _hidden(taps, entry)
        added = total.cpu().numpy().astype(np.float64)
        sums[entry] = added if sums[entry] is None else sums[entry] + added
        tokens[entry] += np.bincount(index.reshape(-1).cpu().numpy(), minlength=experts)

    return hook


def _hidden(taps: Taps, entry: int) -> UnsupportedError:
    return UnsupportedError(
        "its experts do not show what each of them returns",
        where=f"{taps.model_name}, layer {taps.layers[entry]}",
        expected="experts that take index and weights of the router and return the weighted sum",
        remedy="Leave out quasi-hidden; next-gate asks less of a model",
    )
