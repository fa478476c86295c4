"""The options that say how a source is to be read, for every verb that reads one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tracekit.cli.options import label_options


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for reading and mending a source; the function gets them as ``reading``."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            help="The model's config.json (experts, top-k, which layers are MoE), or a name of `tracekit models`.",
        ),
        click.option("--num-experts", type=click.IntRange(min=1), help="Routed experts per layer, N."),
        click.option("--top-k", type=click.IntRange(min=1), help="Routed experts per token, k."),
        click.option(
            "--phase", type=click.Choice(["decode", "prefill"]), help="Phase of all rows, where the source has one."
        ),
        click.option(
            "--requests",
            type=click.Path(path_type=Path),
            help="JSON array about the requests, in their order or with a request_id each: labels, prompt lengths.",
        ),
        label_options("requests"),
        click.option("--source-format", metavar="NAME", help="Reader to use. [default: detected]"),
        click.option("--axes", metavar="TLK", help="Order of an array's axes: t token, l layer, k rank."),
        click.option(
            "--router-order", type=click.Choice(["yes", "no"]), help="Whether ids stand in the router's order."
        ),
        click.option("--id-space", type=click.Choice(["logical", "physical"]), help="What the ids number."),
        click.option(
            "--drop-warmup",
            is_flag=True,
            help="Mend: leave out runs of 16 or more identical rows that start a request, and where these come back.",
        ),
        click.option(
            "--deinterleave",
            metavar="N",
            type=click.IntRange(min=2),
            help="Mend: N sequences take turns in each request, row by row; make each a request.",
        ),
        click.option("--layers", metavar="3-60,…", help="Mend: keep only these layers, by number."),
    ]

    @wraps(function)
    def wrapper(
        *args: Any,
        router_order: str | None,
        layers: str | None,
        **kwargs: Any,
    ) -> Any:
        from tracekit.sources.mend import parse_layers

        reading = {name: kwargs.pop(name) for name in _AS_THEY_ARE}
        reading |= {
            "router_order": None if router_order is None else router_order == "yes",
            "layers": None if layers is None else parse_layers(layers),
        }
        return function(*args, reading=reading, **kwargs)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


_AS_THEY_ARE = (
    "config",
    "num_experts",
    "top_k",
    "phase",
    "requests",
    "label_fields",
    "labels",
    "source_format",
    "axes",
    "id_space",
    "drop_warmup",
    "deinterleave",
)
