"""A command group that imports a verb when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from tracekit.errors import did_you_mean


class LazyGroup(click.Group):
    """A group whose verbs are given as ``module:attribute``; a section begins with the verb that has its title."""

    def __init__(
        self, *args: Any, verbs: Mapping[str, str], sections: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs
        self._sections = sections or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order given."""
        return list(self._verbs)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs, section by section."""
        rows: dict[str, list[tuple[str, str]]] = {}
        title, widest = "Commands", max(map(len, self._verbs))
        for name in self._verbs:
            title = self._sections.get(name, title)
            verb = self.get_command(ctx, name)
            assert verb is not None
            rows.setdefault(title, []).append((name.ljust(widest), verb.get_short_help_str(formatter.width)))
        for title, verbs in rows.items():
            with formatter.section(title):
                formatter.write_dl(verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, importing its module, or None if there is no such verb."""
        if cmd_name not in self._verbs:
            return None
        module, _, attribute = self._verbs[cmd_name].partition(":")
        verb: click.Command = getattr(import_module(module), attribute)
        return verb

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a verb; without its help, for which every verb would be imported."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name) for name in self._verbs if name.startswith(incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; an unknown one is answered with the closest."""
        name = args[0]
        if name not in self._verbs and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(" ".join(filter(None, (f"No such command {name!r}.", did_you_mean(name, self._verbs)))))
        return super().resolve_command(ctx, args)


def verb(
    name: str, *, examples: Sequence[str], kinds: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a verb whose help ends with the kinds it knows and with examples."""
    parts = [["Examples:", *(f"  {example}" for example in examples)]]
    if kinds:
        widest = max(map(len, kinds))
        parts.insert(0, ["Kinds:", *(f"  {kind:{widest}}  {text}" for kind, text in kinds.items())])
    return click.command(name, epilog="\n\n".join("\b\n" + "\n".join(part) for part in parts))
