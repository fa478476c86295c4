"""What a verb says about the trace it stored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracekit.cli.errors import CHECK_FAILED, say

if TYPE_CHECKING:
    from tracekit.store import TraceInfo


def say_stored(store: str | Path, trace: TraceInfo, *, quiet: bool) -> int:
    """Say what was stored and what was found wrong with it; return the exit code."""
    from tracekit.checks import is_serious
    from tracekit.checks.finding import counted

    code = CHECK_FAILED if is_serious(trace.findings) else 0
    if quiet:
        return code
    for note in trace.notes:
        say(note, heading="Note")
    for finding in trace.findings:
        if finding.severity != "note":
            text = f"{finding.finding}: {finding.where}: {finding.evidence}. {finding.remedy}"
            say(text, heading=finding.severity.capitalize())
    meta = trace.meta
    held = f"{counted(trace.requests, 'request')}, {counted(trace.tokens, 'token')}"
    if meta.histogram:
        held = f"{counted(trace.requests, 'record')} of counts"
    click.echo(
        f"{click.format_filename(store)}: trace {trace.name!r} has {held}, {counted(len(meta.layers), 'MoE layer')}, "
        f"{meta.top_k or 'unknown'} of {meta.num_experts} experts per token",
        err=True,
    )
    return code
