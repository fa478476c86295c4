"""Options and parameter types that several verbs share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from tracekit.cli import completion
from tracekit.cli.bars import pass_bar
from tracekit.errors import did_you_mean
from tracekit.execution import ENGINES, on_this_machine, running


class StorePath(click.Path):
    """A type for the directory of a store, or for its URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a path, or a URL."""
        path = str(super().convert(value, param, ctx))
        if "://" not in path:
            return Path(path)
        from tracekit.store.location import location

        return location(path)


store_argument = click.argument("store", type=StorePath())


class OneOf(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A type for one of some names; an unknown one is answered with the closest."""

    name = "name"

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value if it is one of the names."""
        if value not in self.names:
            found = f"{value!r} is not one of {', '.join(self.names)}."
            self.fail(" ".join(filter(None, (found, did_you_mean(value, self.names)))), param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete one of the names."""
        return [CompletionItem(name) for name in completion.matching(self.names, incomplete)]


def whole_numbers(value: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, each at least 1."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,2,4") from None
    if min(numbers) < 1:
        raise click.BadParameter(f"{min(numbers)} is not at least 1")
    return numbers


def key_value(value: str) -> tuple[str, str]:
    """Parse ``key=value``."""
    key, equals, text = value.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{value!r} is not of the form key=value")
    return key, text


def mapping(pairs: Sequence[tuple[str, str]], option: str) -> dict[str, str]:
    """Return repeated ``key=value`` options as a dictionary; a key given twice is a usage error."""
    result: dict[str, str] = {}
    for key, value in pairs:
        if key in result:
            raise click.UsageError(f"{option} {key} is given twice.")
        result[key] = value
    return result


store_option = click.option("--store", required=True, type=StorePath(), help="Folder of the store; created if need be.")


def label_options(entries: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that label requests; the function gets ``label_fields`` as a tuple and ``labels`` as a mapping.

    Parameters
    ----------
    entries
        What the fields belong to, for the help.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--label-fields", metavar="A,B", help=f"Fields of the {entries} that make up their label.")
        @click.option(
            "--label",
            "labels",
            multiple=True,
            metavar="KEY=VALUE",
            type=key_value,
            help="A label of every request; may be repeated.",
        )
        @wraps(function)
        def wrapper(*args: Any, label_fields: str | None, labels: tuple[tuple[str, str], ...], **kwargs: Any) -> Any:
            fields = tuple(label_fields.split(",")) if label_fields else ()
            return function(*args, label_fields=fields, labels=mapping(labels, "--label"), **kwargs)

        return wrapper

    return decorate


def existing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what to do with a trace that is there already: ``--append`` or ``--force``, and not both."""

    @click.option("--append", is_flag=True, help="Add the requests to the trace of this name.")
    @click.option("--force", is_flag=True, help="Replace the trace of this name.")
    @wraps(function)
    def wrapper(*args: Any, append: bool, force: bool, **kwargs: Any) -> Any:
        if append and force:
            raise click.UsageError("--append adds to the trace and --force replaces it: give one of them.")
        return function(*args, append=append, force=force, **kwargs)

    return wrapper


def selectors(
    *, by: Sequence[str] = ("layer", "label", "request"), intervals: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the selectors that a verb takes; the function gets them under the library's names.

    Parameters
    ----------
    by
        Groups that the verb can tell apart; empty for a verb without ``--by``.
    intervals
        Whether the verb computes intervals, and so takes ``--seed`` and ``--no-intervals``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if intervals:
                kwargs["intervals"] = not kwargs.pop("no_intervals")
            return function(*args, **kwargs)

        options = [
            click.option(
                "--trace",
                metavar="NAME",
                shell_complete=completion.traces,
                help="Only the trace of this name. [default: all]",
            ),
            click.option(
                "--phase",
                type=click.Choice(["decode", "prefill", "all"]),
                help="Which tokens. [default: decode where the store knows it, else what there is]",
            ),
        ]
        if by:
            options.append(click.option("--by", type=click.Choice(by), help="A result for each of these."))
        if intervals:
            options += [
                click.option(
                    "--seed",
                    type=click.IntRange(min=0),
                    default=0,
                    show_default=True,
                    help="Seed of the grouping of requests for the intervals.",
                ),
                click.option("--no-intervals", is_flag=True, help="Leave the intervals out."),
            ]
        decorated: Callable[..., Any] = wrapper
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def one_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--trace`` and ``--phase`` to a verb that takes one trace only."""
    trace = click.option(
        "--trace",
        metavar="NAME",
        shell_complete=completion.traces,
        help="The trace; may be left out where the store holds one.",
    )
    phase = click.option(
        "--phase",
        type=click.Choice(["decode", "prefill", "all"]),
        help="Which tokens. [default: decode where the store knows it, else what there is]",
    )
    return trace(phase(function))


def running_options(
    memory: str | None = "the sums of a pass", *, cluster: bool = False, threads: str = "Threads"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add how a verb's work is run: ``--threads``, ``--memory``, ``--engine`` and ``--address``.

    Parameters
    ----------
    memory
        What the memory is for, for the help; None for a verb without ``--memory``.
    cluster
        Whether the verb can run on a cluster. Where it cannot, ``--engine`` is not in its help, but says which can.
    threads
        What there are at most as many of as ``--threads`` says, for the help.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, threads: int | None, engine: Any, address: str | None, **kwargs: Any) -> Any:
            size = kwargs.pop("memory") if memory else None
            if engine == "ray" and not cluster:
                raise on_this_machine()
            if threads is not None and "polars" not in sys.modules:
                os.environ["POLARS_MAX_THREADS"] = str(threads)  # Polars reads it once, when it is imported
            quiet = kwargs.get("quiet", True)
            how = {"threads": threads, "memory": size, "engine": engine, "address": address}
            with pass_bar(shown=not quiet) as progress, running(progress=progress, **how):
                return function(*args, **kwargs)

        options = [
            click.option("--threads", type=click.IntRange(min=1), help=f"{threads} at most. [default: the processors]"),
            click.option(
                "--engine",
                type=click.Choice(ENGINES),
                hidden=not cluster,
                help="Where the routing is read: in this process, or on a Ray cluster. [default: local]",
            ),
            click.option(
                "--address",
                metavar="HOST:PORT",
                hidden=not cluster,
                help="The Ray cluster. [default: that of this machine, else one that is started]",
            ),
        ]
        if memory:
            text = f"Memory for {memory}, such as 8GB or 512MiB."
            options.insert(1, click.option("--memory", metavar="SIZE", help=text))
        decorated: Callable[..., Any] = wrapper
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
