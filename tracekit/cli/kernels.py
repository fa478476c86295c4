"""Say it where the kernels' first compilation makes a command slow."""

from __future__ import annotations

from tracekit.cli.output import Output


def announce_compilation(out: Output) -> None:
    """Tell the user before work that compiles the kernels, which happens once on a machine."""
    from tracekit.metrics import kernels

    if not kernels.compiled():
        out.note("compiling the kernels; this happens once, they are cached afterwards")
