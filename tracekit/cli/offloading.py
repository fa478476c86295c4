"""The verbs about experts that do not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.completion import models
from tracekit.cli.group import verb
from tracekit.cli.kernels import announce_compilation
from tracekit.cli.options import OneOf, running_options, selectors, store_argument, whole_numbers
from tracekit.cli.output import Output, output_options
from tracekit.metrics.cache_spec import POLICIES, SCOPES, STARTS, UNITS


def _policies(value: str) -> tuple[str, ...]:
    return tuple(OneOf(POLICIES).convert(name, None, None) for name in value.split(","))


def _capacities(value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 8,16,32") from None


_SCOPE = click.option(
    "--scope", type=click.Choice(SCOPES), default="layer", show_default=True, help="A cache for each layer, or for all."
)
_BATCH = click.option(
    "--batch-size",
    metavar="B",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests that run together; what they need at once is loaded once.",
)
_MODEL = click.option(
    "--model",
    metavar="NAME|FILE",
    shell_complete=models,
    help="Whose experts: a model of `tracekit models`, or a config.json.",
)
_START = click.option(
    "--start",
    type=click.Choice(STARTS),
    help="What the cache holds when a request begins: nothing, what its prompt left, or what the request before left. "
    "[default: prompt where the trace has prompts, else cold]",
)


@verb(
    "cache",
    examples=[
        "tracekit cache traces --capacity 8,16,32 --model gpt-oss-20b --link 25e9",
        "tracekit cache traces --scope all --unit bytes --capacity 2e9,8e9 --policy lru,belady --by layer -o cache.csv",
    ],
)
@store_argument
@click.option(
    "--policy",
    metavar="P,P,…",
    type=_policies,
    default=",".join(POLICIES),
    show_default=True,
    help="Who is evicted.",
)
@click.option(
    "--capacity", metavar="C,C,…", type=_capacities, help="Sizes of the cache. [default: k and some shares of N]"
)
@click.option(
    "--unit",
    type=click.Choice(UNITS),
    default="experts",
    show_default=True,
    help="Of the sizes: experts per layer, bytes of all layers together, or a share of all experts.",
)
@_SCOPE
@_BATCH
@_START
@_MODEL
@click.option("--expert-bytes", metavar="BYTES", type=float, help="Instead: bytes of an expert.")
@click.option("--link", metavar="BYTES/S", type=float, help="How fast experts are loaded: adds the time per token.")
@selectors()
@running_options()
@output_options
def cache(store: str | Path, out: Output, **options: Any) -> None:
    """Say what a cache of experts would hit, under any policy.

    The rules: all experts that a step needs in a layer are one event. They are looked up together, then updated
    together, and none of them is evicted by its own event; an event larger than the cache stays until the next one. A
    prompt is one event per layer, its experts in the order of their last use. A first touch is a miss.

    \b
    lru     the least recently used goes
    lfu     the least often used goes, of equals the least recent; uses before an eviction count
    lfru    the one with the fewest uses since it was loaded, for each access since its last
    belady  the one that is needed again last: the optimum for experts of one size
    static  a hot list, loaded beforehand: what the requests of all other jackknife groups use most
    random  any

    A miss is cold (a first touch), of the working set (Belady misses it too: the cache is too small), or of the policy
    (what is left: a better policy could have hit).
    """  # noqa: D301 - click's own mark
    import tracekit as tk

    announce_compilation(out)
    frame = tk.cache(tk.open(store), **options)
    out.table(frame, "cache")


@verb("reuse", examples=["tracekit reuse traces", "tracekit reuse traces --by layer -o curves.csv"])
@store_argument
@_SCOPE
@_BATCH
@_START
@selectors()
@running_options()
@output_options
def reuse(store: str | Path, out: Output, **options: Any) -> None:
    """Draw up the reuse-distance curve: LRU caches of every size.

    The share of accesses that hit with a cache of so many experts and not with a smaller one, and of those that hit
    with it, from one pass. The rules are those of tracekit cache.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.reuse(tk.open(store), **options)
    out.table(frame, "reuse")


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


@verb(
    "prefetch",
    examples=[
        "tracekit prefetch traces --predictor previous_token,transition --m 8,12,16 --model qwen3-30b-a3b",
        "tracekit prefetch traces --distance 1,2 --by layer -o recall.csv",
    ],
)
@store_argument
@click.option("--predictor", metavar="P,P,…", type=_names, help="Who predicts. [default: all that the trace supports]")
@click.option(
    "--m", metavar="M,M,…", type=whole_numbers, help="Experts that are fetched per layer. [default: k, 1.5k, 2k]"
)
@click.option(
    "--distance",
    metavar="D,D,…",
    type=whole_numbers,
    default="1",
    show_default=True,
    help="MoE layers that predictors look ahead, of those that look from layer to layer.",
)
@_MODEL
@click.option("--expert-bytes", metavar="BYTES", type=float, help="Instead: bytes of an expert.")
@selectors()
@running_options()
@output_options
def prefetch(store: str | Path, out: Output, **options: Any) -> None:
    """Say how well predictors foretell a layer's experts.

    A predictor names m experts of a layer before they are needed. Recall is the share of the k routed experts among
    them.

    \b
    previous_token       the experts of the tokens before, the latest first
    hot_list             the most popular ones
    transition           what follows the experts of the layer so far before
    token_id             what the same token uses elsewhere; needs token ids
    token_id+transition  both: the product of their odds against popularity
    others               predictions that the trace holds, such as next_gate

    The tables of the middle four are learned from all other requests: no request is judged by what was learned from
    it. The means over layers leave out those for which a predictor names nothing, the first ones of those that look
    ahead: compare by layer.
    """  # noqa: D301 - click's own mark
    import tracekit as tk

    announce_compilation(out)
    frame = tk.prefetch(tk.open(store), **options)
    out.table(frame, "prefetch")


@verb(
    "layer-budgets",
    examples=[
        "tracekit layer-budgets traces --capacity 8,16",
        "tracekit layer-budgets traces --unit bytes --capacity 8e9 --model gpt-oss-20b -o budgets.csv",
    ],
)
@store_argument
@click.option(
    "--capacity", metavar="C,C,…", type=_capacities, help="Budgets of all layers together. [default: some shares of N]"
)
@click.option(
    "--unit",
    type=click.Choice(UNITS),
    default="experts",
    show_default=True,
    help="Of the budgets: experts per layer on average, bytes of all layers together, or a share of all experts.",
)
@_BATCH
@_START
@_MODEL
@click.option("--expert-bytes", metavar="BYTES", type=float, help="Instead: bytes of an expert.")
@selectors(by=())
@running_options()
@output_options
def layer_budgets(store: str | Path, out: Output, **options: Any) -> None:
    """Say how many experts each layer's cache should hold.

    Of one budget for all layers, the next expert goes to the layer whose LRU cache gains the most hits by it; no layer
    gets fewer than k. What the split hits is judged on requests that it was not learned from, beside the same budget in
    equal parts.
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.layer_budgets(tk.open(store), **options)
    out.table(frame, "layer_budgets")


@verb(
    "locality",
    examples=["tracekit locality traces", "tracekit locality traces --segment 4,16,64 --by layer -o locality.csv"],
)
@store_argument
@click.option(
    "--segment",
    metavar="M,M,…",
    type=whole_numbers,
    help="Tokens in a segment. [default: 16, or the most that a request has]",
)
@click.option(
    "--cache-ratio", metavar="R,R,…", type=_capacities, help="Sizes of the cache, over k. [default: 1,1.5,2,3,4]"
)
@selectors()
@running_options()
@output_options
def locality(store: str | Path, out: Output, **options: Any) -> None:
    """Say how well one set of experts serves a segment.

    SRP: the best F1 score of a router that keeps an expert for all tokens of a segment or for none. SCH: the hit rate
    of a cache that evicts what the next segment needs least. Beside it the best fixed set of experts for each segment.
    Both see the future: they say what locality there is, not what a policy gets. (Liang et al., arXiv 2505.16056)
    """
    import tracekit as tk

    announce_compilation(out)
    frame = tk.locality(tk.open(store), **options)
    out.table(frame, "locality")
