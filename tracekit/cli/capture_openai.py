"""The verb that captures a trace from a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tracekit.cli.bars import progress_bar
from tracekit.cli.group import verb
from tracekit.cli.options import existing_options, label_options, store_option
from tracekit.cli.output import quiet_option
from tracekit.cli.stored import say_stored


@verb(
    "openai",
    examples=[
        "tracekit capture openai http://localhost:8000 --prompts prompts.txt --store traces",
        "tracekit capture openai http://localhost:30000 --prompts chat.jsonl \\",
        "                 --label-fields domain --config config.json --max-tokens 512 --seed 0 --store traces",
    ],
)
@click.argument("url")
@click.option(
    "--prompts",
    "prompts",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Prompts: .txt, one a line, or .jsonl with prompt, messages or token_ids, and id and labels; may be repeated.",
)
@store_option
@click.option("--name", help="Name of the trace. [default: that of the model]")
@click.option("--model", metavar="NAME", help="The model, as the server calls it. [default: the only one it serves]")
@click.option(
    "--api",
    type=click.Choice(["auto", "chat", "completions", "generate"]),
    default="auto",
    show_default=True,
    help="Endpoint; auto: chat for messages, else completions of vLLM and generate of SGLang.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The model's config.json, or a name of `tracekit models`. [default: the bundled model of that name]",
)
@click.option("--num-experts", type=click.IntRange(min=1), help="Routed experts per layer, N.")
@click.option("--top-k", type=click.IntRange(min=1), help="Routed experts per token, k.")
@label_options("prompts")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature. [default: the server's]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the first request; each later one has the next.")
@click.option("--ignore-eos", is_flag=True, help="Always generate --max-tokens tokens.")
@click.option(
    "--concurrency", type=click.IntRange(1, 1024), default=8, show_default=True, help="Requests at the same time."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Repeats of a request after a connection error or status 408, 429 or 5xx.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.001), default=600, show_default=True, help="Seconds for one response."
)
@click.option(
    "--api-key-env", metavar="NAME", help="Environment variable that holds the server's key; it is never stored."
)
@click.option(
    "--journal", type=click.Path(path_type=Path), help="File of the responses. [default: beside the store, by name]"
)
@click.option("--delete-journal", is_flag=True, help="Delete that file when the trace is in the store.")
@click.option("--skip-failed", is_flag=True, help="Ingest what there is even if some requests failed.")
@existing_options
@quiet_option
def openai(
    url: str,
    prompts: tuple[Path, ...],
    store: str | Path,
    api_key_env: str | None,
    delete_journal: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Capture from a running vLLM or SGLang server.

    URL is the server's address; it must have been started with --enable-return-routed-experts. Responses are written
    to a journal beside the store as they arrive: after an interruption the same command makes the missing requests
    only. The store changes in one step at the end, or not at all.

    The trace is checked as it is stored, as by tracekit ingest: a serious finding makes the exit code 3.
    """
    import tracekit as tk

    with progress_bar("capture", shown=not quiet) as progress:
        trace = tk.capture_openai(
            url,
            list(prompts),
            store,
            api_key=None if api_key_env is None else _key(api_key_env),
            keep_journal=not delete_journal,
            progress=progress,
            **options,
        )
    return say_stored(store, trace, quiet=quiet)


def _key(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise click.UsageError(f"--api-key-env: the environment variable {name!r} is not set or is empty.")
    if not value.isascii() or not value.isprintable():
        raise click.UsageError(f"--api-key-env: {name} holds characters that no key has.")
    return value
