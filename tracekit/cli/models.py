"""The verb that lists models and sizes."""

from __future__ import annotations

from pathlib import Path

import click

from tracekit.cli import completion
from tracekit.cli.group import verb
from tracekit.cli.options import OneOf
from tracekit.cli.output import Output, output_options
from tracekit.sources.quantisation import SCHEMES


@verb(
    "models",
    examples=[
        "tracekit models",
        "tracekit models DeepSeek-V3 --quantisation nvfp4",
        "tracekit models --config config.json --bits 4.85 --format json",
    ],
)
@click.argument("name", required=False, shell_complete=completion.models)
@click.option("--config", type=click.Path(path_type=Path), help="The model's config.json, for one that is not listed.")
@click.option(
    "--quantisation",
    metavar="|".join(SCHEMES),
    type=OneOf(SCHEMES),
    help="Sizes of weights in this scheme. [default: as the config says]",
)
@click.option(
    "--bits",
    type=click.FloatRange(min=1, max=32),
    help="Sizes at this many bits per parameter, the scales included: 4.85 for Q4_K_M.",
)
@output_options
def models(name: str | None, config: Path | None, quantisation: str | None, bits: float | None, out: Output) -> None:
    """List models and the sizes of their experts.

    Without NAME: N, k, the MoE layers, and how large an expert and the whole model are. With NAME, or the --config of
    any Mixture-of-Experts model: parameters and bytes of one expert, of the shared experts, and of everything else;
    what is an estimate is marked. The names also serve as the --config of other commands.
    """
    import tracekit as tk
    from tracekit.sources.catalogue import parts

    if name is not None and config is not None:
        raise click.UsageError("NAME and --config each give a model: give one of them.")
    if quantisation is not None and bits is not None:
        raise click.UsageError("--quantisation and --bits each say how large a parameter is: give one of them.")
    chosen = name if name is not None else config
    if chosen is None:
        out.table(tk.models(quantisation=quantisation, bits=bits), "models")
        return
    model = tk.model(chosen, quantisation=quantisation, bits=bits)
    for note in model.notes:
        out.note(note)
    out.table(parts(model), "model")
