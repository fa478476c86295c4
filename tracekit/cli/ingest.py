"""The verb that reads engine output into a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tracekit.cli.errors import say
from tracekit.cli.group import verb
from tracekit.cli.options import key_value, mapping
from tracekit.cli.output import quiet_option


@verb(
    "ingest",
    examples=[
        "tracekit ingest responses.jsonl --config config.json --store traces --name chat",
        "tracekit ingest trace.npz --requests requests.json --label-fields dataset --num-experts 32 \\",
        "                 --phase decode --store traces",
    ],
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--store", required=True, type=click.Path(path_type=Path), help="Folder of the store; created if need be."
)
@click.option("--name", help="Name of the trace. [default: that of the first source]")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The model's config.json: experts, top-k and which layers are MoE.",
)
@click.option("--num-experts", type=click.IntRange(min=1), help="Routed experts per layer, N.")
@click.option("--top-k", type=click.IntRange(min=1), help="Routed experts per token, k.")
@click.option("--phase", type=click.Choice(["decode", "prefill"]), help="Phase of all rows, where the source has one.")
@click.option(
    "--requests",
    type=click.Path(path_type=Path),
    help="JSON array about the requests, in their order or with a request_id each: labels, prompt lengths.",
)
@click.option("--label-fields", metavar="A,B", help="Fields of the requests that make up their label.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    type=key_value,
    help="A label of every request; may be repeated.",
)
@click.option("--source-format", metavar="NAME", help="Reader to use. [default: detected]")
@click.option("--axes", metavar="TLK", help="Order of an array's axes: t token, l layer, k rank.")
@click.option("--router-order", type=click.Choice(["yes", "no"]), help="Whether ids stand in the router's order.")
@click.option("--id-space", type=click.Choice(["logical", "physical"]), help="What the ids number.")
@click.option("--append", is_flag=True, help="Add the requests to the trace of this name.")
@click.option("--force", is_flag=True, help="Replace the trace of this name.")
@quiet_option
def ingest(
    sources: tuple[Path, ...],
    store: Path,
    label_fields: str | None,
    labels: tuple[tuple[str, str], ...],
    router_order: str | None,
    append: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Read traces of an inference engine into a store.

    The format is detected: arrays (.npy, .npz, or a folder of them), responses of vLLM and SGLang (.json, .jsonl),
    BigMoeOnEdge route traces and llama.cpp dumps (.csv). All sources together become one trace. The store changes in
    one step at the end, or not at all.
    """
    import tracekit as tk

    if append and force:
        raise click.UsageError("--append adds to the trace and --force replaces it: give one of them.")
    with _progress(shown=not quiet and sys.stderr.isatty()) as progress:
        trace = tk.ingest(
            list(sources),
            store,
            label_fields=tuple(label_fields.split(",")) if label_fields else (),
            labels=mapping(labels, "--label"),
            router_order=None if router_order is None else router_order == "yes",
            append=append,
            force=force,
            progress=progress,
            **options,
        )
    if quiet:
        return
    for note in trace.notes:
        say(note, heading="Note")
    meta = trace.meta
    click.echo(
        f"{click.format_filename(store)}: trace {trace.name!r} has {trace.requests:,} requests, "
        f"{trace.tokens:,} tokens, {len(meta.layers)} MoE layers, {meta.top_k} of {meta.num_experts} experts per token",
        err=True,
    )


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """Yield what the library reports to: a bar with rate and time left, or nothing."""
    if not shown:
        yield None
        return
    bar: Any = click.progressbar(length=1, label="ingest", file=sys.stderr, item_show_func=_tokens)
    with bar:

        def report(done: int, total: int, tokens: int) -> None:
            bar.length = max(total, done, 1)
            bar.update(done - bar.pos, tokens)

        yield report


def _tokens(tokens: int | None) -> str:
    return "" if tokens is None else f"{tokens:,} tokens"
