"""The verb for completion in the shell, and the names that are completed beside verbs, options and files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from tracekit.cli.group import verb
from tracekit.errors import TracekitError


def matching(names: Iterable[str], incomplete: str) -> list[str]:
    """Return the names that begin so, without those that the shell would take apart or carry out."""
    return [name for name in names if name.startswith(incomplete) and shlex.quote(name) == name]


def traces(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a trace of the stores on the command line."""
    from tracekit.store.manifest import read_manifest

    # While an option still lacks its value, click has not told arguments apart yet.
    places = [value for value in (*ctx.params.values(), *map(Path, ctx.args)) if isinstance(value, Path)]
    names: dict[str, None] = {}
    for place in places:
        with suppress(TracekitError, OSError):
            names |= dict.fromkeys(trace.name for trace in read_manifest(place))
    return matching(names, incomplete)


def queries(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a query."""
    from tracekit.reports.files import shipped

    return matching(sorted(path.stem for path in shipped("queries").glob("*.sql")), incomplete)


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a known model."""
    from tracekit.sources.bundled import bundled

    return matching((model.name for model in bundled()), incomplete)


def machines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a known machine."""
    from tracekit.economics.hardware import PRESETS

    return matching(PRESETS, incomplete)


@verb(
    "completion",
    examples=[
        "tracekit completion bash > ~/.local/share/bash-completion/completions/tracekit",
        "tracekit completion zsh > ~/.zfunc/_tracekit",
        "tracekit completion fish > ~/.config/fish/completions/tracekit.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands in a shell.

    It completes verbs, options and their values, files, and the names of traces, queries, charts, models and machines.
    For bash (4.4 or later) and fish the files of the examples are found by themselves in the next shell; for zsh the
    folder has to be in fpath before compinit: fpath+=~/.zfunc in .zshrc.
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows the three
    root = click.get_current_context().find_root().command
    click.echo(made(root, {}, "tracekit", "_TRACEKIT_COMPLETE").source())
