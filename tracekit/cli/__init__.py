"""The ``tracekit`` command: each verb parses, calls one function of the public API, and renders.

The heavy libraries are imported by the verbs that need them, when they run: ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from tracekit import __version__
from tracekit.cli.errors import guarded
from tracekit.cli.group import LazyGroup

VERBS = {
    "ingest": "tracekit.cli.ingest:ingest",
    "check": "tracekit.cli.check:check",
    "capture": "tracekit.cli.capture:capture",
    "formats": "tracekit.cli.formats:formats",
    "info": "tracekit.cli.info:info",
    "compact": "tracekit.cli.compact:compact",
    "summary": "tracekit.cli.analyses:summary",
    "windows": "tracekit.cli.analyses:windows",
    "expert-ratio": "tracekit.cli.speculation:expert_ratio",
    "attribution": "tracekit.cli.analyses:attribution",
    "autocorr": "tracekit.cli.analyses:autocorr",
    "load": "tracekit.cli.analyses:load",
    "compare": "tracekit.cli.compare:compare",
    "steps": "tracekit.cli.speculation:steps",
    "acceptance": "tracekit.cli.speculation:acceptance",
    "speedup": "tracekit.cli.speedup:speedup",
    "calibrate": "tracekit.cli.calibrate:calibrate",
    "budget": "tracekit.cli.speculation:budget",
    "law": "tracekit.cli.design:law",
    "design": "tracekit.cli.design:design",
    "cache": "tracekit.cli.offloading:cache",
    "reuse": "tracekit.cli.offloading:reuse",
    "layer-budgets": "tracekit.cli.offloading:layer_budgets",
    "locality": "tracekit.cli.offloading:locality",
    "prefetch": "tracekit.cli.offloading:prefetch",
    "tpot": "tracekit.cli.tpot:tpot",
    "report": "tracekit.cli.report:report",
    "chart": "tracekit.cli.chart:chart",
    "query": "tracekit.cli.sql:query",
    "sql": "tracekit.cli.sql:sql",
    "views": "tracekit.cli.sql:views",
    "demo": "tracekit.cli.demo:demo",
    "models": "tracekit.cli.models:models",
    "synth": "tracekit.cli.synth:synth",
    "completion": "tracekit.cli.completion:completion",
}
"""The verbs, in the order of their use, and where each is defined."""

SECTIONS = {
    "ingest": "Traces",
    "summary": "Routing",
    "steps": "Speculative decoding",
    "cache": "Offloaded experts",
    "report": "Results",
    "demo": "Beside",
}
"""The titles under which the help lists the verbs, each by the first of them."""


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nStart with:\n"
    "  tracekit demo\n"
    "  tracekit ingest trace.npz --num-experts 64 --phase decode --store traces\n"
    "  tracekit summary traces",
)
@click.version_option(__version__, prog_name="tracekit", message="%(prog)s %(version)s")
def command() -> None:
    """Say what a Mixture-of-Experts model's routing allows, from the expert ids an engine returned.

    Ingest traces into a store, then ask it how many experts a verification window loads, how far below
    independence that is, why, and how long the correlation lasts.

    A STORE is a folder, or a URL of object storage that is only read: s3://, gs://, az://, hf://, https:// and others.

    Exit codes: 0 done, 1 the input or the data is at fault, 2 usage, 3 a check found problems, 4 an optional
    dependency is missing.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    args
        Arguments after the program's name; by default those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    return guarded(lambda: command.main(args=arguments, prog_name="tracekit", standalone_mode=False))
