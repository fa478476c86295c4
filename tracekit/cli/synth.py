"""The verb that writes synthetic traces with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.group import verb
from tracekit.cli.options import OneOf
from tracekit.cli.output import Output, output_options
from tracekit.reports.files import check_writable

KINDS = {
    "uniform": "every set of experts equally likely, tokens independent",
    "skewed": "Zipf-distributed experts, tokens independent",
    "sticky": "a token keeps the experts of the one before it with some probability",
    "topical": "skew that differs by label and request, and sticky tokens: all causes",
    "repeat": "each request repeats one set of experts",
    "cycle": "each request walks through disjoint sets in turn",
    "law": "what the law in --law says, such as one that tracekit law fitted to a trace",
}
SHAPE = ("skew", "stay", "labels", "label_tilt", "request_tilt")


def lengths(value: str) -> int | tuple[int, int]:
    """Parse a length ``N`` or a range of lengths ``LOW-HIGH``."""
    low, dash, high = value.partition("-")
    try:
        return (int(low), int(high)) if dash else int(low)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number such as 256 nor a range such as 100-400") from None


@verb(
    "synth",
    examples=[
        "tracekit synth sticky sticky.npz --num-experts 64 --top-k 8 --seed 7",
        "tracekit synth law like-chat.npz --law law.json --requests 64 --tokens 200-500",
        "tracekit ingest sticky.npz --requests sticky.requests.json --store traces",
    ],
    kinds=KINDS,
)
@click.argument("kind", metavar="KIND", type=OneOf(KINDS))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--num-experts", type=int, help="Routed experts per layer, N. [default: 64, or the law's]")
@click.option("--top-k", type=int, help="Routed experts per token, k. [default: 8, or the law's]")
@click.option("--layers", type=int, help="MoE layers. [default: 4, or the law's]")
@click.option("--requests", type=int, default=16, show_default=True, help="Number of requests.")
@click.option(
    "--tokens",
    metavar="N|LOW-HIGH",
    type=lengths,
    default="256",
    show_default=True,
    help="Tokens of a request, its prompt included.",
)
@click.option("--prompt", type=int, default=0, show_default=True, help="Prompt tokens of each request.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every draw.")
@click.option("--law", type=click.Path(path_type=Path), help="Law of routing to draw from, a JSON file (law).")
@click.option("--skew", type=float, help="Zipf exponent of the popularity (skewed, topical).")
@click.option("--stay", type=float, help="Probability that a token keeps the experts before it (sticky, topical).")
@click.option("--labels", type=int, help="Number of labels (topical).")
@click.option("--label-tilt", type=float, help="Spread of the popularity between labels (topical).")
@click.option("--request-tilt", type=float, help="Spread of the popularity between requests (topical).")
@output_options
def synth(kind: str, file: Path, out: Output, **options: Any) -> None:
    """Write a synthetic trace with known answers.

    The trace goes to FILE, an .npz; the requests (prompt lengths, labels) go to NAME.requests.json beside it. The
    result is what any tool should measure: the true expectation of the unique experts by window and of the overlap by
    lag, over decode tokens. The same seed gives the same bytes. --force also overwrites FILE.
    """
    import polars as pl

    from tracekit.synthetic import synth as describe

    shape = {name: options.pop(name) for name in SHAPE}
    trace = describe(kind, **options, **{name: value for name, value in shape.items() if value is not None})
    for path in (file, file.with_suffix(".requests.json")):
        check_writable(path, force=out.force)
    sidecar = trace.save(file)
    out.note(f"wrote {file} and {sidecar}")
    rows = [(quantity, at, value) for quantity, values in trace.truth.items() for at, value in values.items()]
    out.table(pl.DataFrame(rows, schema={"quantity": pl.String, "at": pl.Int64, "expected": pl.Float64}, orient="row"))
