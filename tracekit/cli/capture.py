"""The verb that captures traces: one command per place where a model runs."""

from __future__ import annotations

import click

from tracekit.cli.group import LazyGroup

VERBS = {
    "transformers": "tracekit.cli.capture_transformers:transformers",
    "openai": "tracekit.cli.capture_openai:openai",
}
"""The ways to capture, and where each is defined."""


@click.group(
    "capture",
    cls=LazyGroup,
    verbs=VERBS,
    epilog="\b\nExamples:\n"
    "  tracekit capture transformers allenai/OLMoE-1B-7B-0924 --prompts prompts.txt --store traces\n"
    "  tracekit capture openai http://localhost:8000 --prompts prompts.txt \\\n"
    "                   --config Qwen3-30B-A3B --store traces",
)
def capture() -> None:
    """Capture a trace from a model that runs.

    Without a trace yet, this makes one: it runs a transformers model, or asks a server for completions, and keeps the
    routing.
    """
