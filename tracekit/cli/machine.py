"""Options that say what runs on what, and how many drafts are accepted: of the verbs that put a trace into time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from tracekit.cli.completion import machines, models
from tracekit.cli.options import OneOf
from tracekit.economics.hardware import PRESETS
from tracekit.sources.quantisation import SCHEMES

_COST = (
    click.option(
        "--model",
        metavar="NAME|FILE",
        shell_complete=models,
        help="A model of `tracekit models`, or a config.json. [default: as traced]",
    ),
    click.option("--quantisation", metavar="|".join(SCHEMES), type=OneOf(SCHEMES), help="Weights in this scheme."),
    click.option("--bits", type=click.FloatRange(min=1, max=32), help="Weights of so many bits, scales included."),
    click.option("--hardware", metavar="NAME", shell_complete=machines, help=f"A known machine: {', '.join(PRESETS)}."),
    click.option(
        "--bandwidth", metavar="BYTES/S", type=float, help="Of one device's memory, instead of the known one."
    ),
    click.option("--flops", metavar="FLOP/S", type=float, help="Of one device, dense, instead of the known ones."),
    click.option("--overhead", metavar="SECONDS", type=float, help="Fixed cost of a step."),
    click.option("--precision", type=click.Choice(["bf16", "fp8"]), help="In which a known machine multiplies."),
    click.option(
        "--context", metavar="TOKENS", type=click.IntRange(min=0), help="Context per request. [default: 1024]"
    ),
    click.option("--kv-bits", type=click.FloatRange(min=1, max=64), help="Bits per number of the cache. [default: 16]"),
)
_PARALLEL = (
    click.option("--tensor-parallel", metavar="N", type=click.IntRange(min=1), help="Devices that share each weight."),
    click.option("--expert-parallel", metavar="N", type=click.IntRange(min=1), help="Groups that share the experts."),
)
_ACCEPTANCE = (
    click.option(
        "--acceptance-rate",
        metavar="A",
        type=float,
        help="Chance that a draft is accepted once those before it were. [default: as the trace's own steps accepted]",
    ),
    click.option(
        "--acceptance-length", metavar="AL", type=float, help="Instead: tokens that a step emits, the bonus included."
    ),
    click.option(
        "--at-drafts", metavar="K", type=click.IntRange(min=1), help="Drafted tokens that --acceptance-length is of."
    ),
    click.option("--draft-cost", metavar="C", type=float, help="Cost of one draft, in steps of one token per request."),
)


def cost_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what runs on what; the function gets those that were given as ``cost``, by the names of `CostOptions`."""
    return _collected(function, _COST + _PARALLEL, "cost")


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what runs on one device; the function gets those that were given as ``cost``."""
    return _collected(function, _COST, "cost")


def acceptance_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what is known of the drafts; the function gets what was given as ``drafting``."""
    return _collected(function, _ACCEPTANCE, "drafting")


def _collected(function: Callable[..., Any], options: tuple[Callable[..., Any], ...], name: str) -> Callable[..., Any]:
    """Add options, and hand those that were given to the function as a dictionary."""
    keys: list[str] = []

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {key: kwargs.pop(key) for key in keys}
        return function(*args, **kwargs, **{name: {key: value for key, value in given.items() if value is not None}})

    decorated: Callable[..., Any] = wrapper
    for option in reversed(options):
        decorated = option(decorated)
        keys.append(decorated.__click_params__[-1].name)  # type: ignore[attr-defined]
    return decorated
