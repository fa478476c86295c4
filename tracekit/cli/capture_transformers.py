"""The verb that captures from a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tracekit.cli.bars import progress_bar
from tracekit.cli.group import verb
from tracekit.cli.options import existing_options, label_options, store_option
from tracekit.cli.output import quiet_option
from tracekit.cli.stored import say_stored


@verb(
    "transformers",
    examples=[
        "tracekit capture transformers allenai/OLMoE-1B-7B-0924 --prompts prompts.txt --store traces",
        "tracekit capture transformers models/olmoe --prompts texts.jsonl --label-fields domain \\",
        "                 --teacher-forcing --store traces --name held-out",
        "tracekit capture transformers models/olmoe --prompts prompts.txt --draft models/draft --store traces",
        "tracekit capture transformers models/olmoe --prompts prompts.txt --predict next-gate \\",
        "                 --predict quasi-hidden --save-default-vectors olmoe.npz --store traces",
    ],
)
@click.argument("model")
@click.option(
    "--prompts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="File of prompts; may be repeated. Text: one a line. .json, .jsonl: strings, or objects with prompt, "
    "messages or token_ids.",
)
@store_option
@click.option("--name", help="Name of the trace. [default: the last part of MODEL]")
@click.option("--teacher-forcing", is_flag=True, help="Route the texts in one forward each and generate nothing.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to generate."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Temperature of sampling; 0 is greedy.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every draw.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Prompts run together, padded on the left.",
)
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), help="Cut longer prompts at the end.")
@click.option("--draft", metavar="MODEL", help="Draft model: decode speculatively and keep rejected drafts too.")
@click.option(
    "--draft-tokens",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Tokens drafted in each step, K.",
)
@click.option(
    "--predict",
    multiple=True,
    type=click.Choice(["next-gate", "quasi-hidden"]),
    help="Keep what the routers of the next MoE layers choose; may be repeated. next-gate: for the input of the gate "
    "that runs; quasi-hidden: for the hidden state after this layer, its experts replaced by their default vectors.",
)
@click.option(
    "--predict-distance",
    type=click.IntRange(min=1, max=255),
    help="How many MoE layers ahead --predict looks, at most. [default: 1]",
)
@click.option(
    "--default-vectors",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Default vectors of quasi-hidden, as --save-default-vectors wrote them. [default: calibrated on the prompts]",
)
@click.option(
    "--save-default-vectors",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep the calibrated default vectors in a new .npz file.",
)
@click.option(
    "--calibration-share",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the prompts that default vectors are calibrated on. [default: 1]",
)
@click.option("--device", help="cpu, cuda, cuda:1, …, or auto to spread the model. [default: a GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the weights; auto: as they were saved.",
)
@click.option("--no-tokens", is_flag=True, help="Keep no token ids.")
@label_options("prompts")
@existing_options
@quiet_option
def transformers(
    model: str,
    prompts: tuple[Path, ...],
    store: str | Path,
    no_tokens: bool,
    quiet: bool,
    predict: tuple[str, ...],
    predict_distance: int | None,
    default_vectors: Path | None,
    save_default_vectors: Path | None,
    calibration_share: float | None,
    **options: Any,
) -> int:
    """Run a transformers model over prompts and keep its routing.

    MODEL is a folder or a name on the Hugging Face hub; any Mixture-of-Experts model of transformers will do, on CPU
    or GPU. What is kept is what ran: the experts each token was sent to, and the router's weights. Needs torch and
    transformers: pip install 'moe-tracekit[capture]'. The store changes in one step at the end, or not at all.

    The trace is checked as it is made, as by tracekit ingest: a serious finding makes the exit code 3.
    """
    from tracekit.capture.transformers import capture_transformers

    if options["draft"] is not None and options["teacher_forcing"]:
        raise click.UsageError("--draft generates and --teacher-forcing does not: give one of them.")
    if options["draft"] is not None and options["batch_size"] > 1:
        raise click.UsageError("--draft decodes one request at a time: leave out --batch-size.")
    if predict_distance is not None and not predict:
        raise click.UsageError("--predict-distance says how far --predict looks: give --predict too.")
    calibrated = save_default_vectors is not None or calibration_share is not None
    if "quasi-hidden" not in predict and (calibrated or default_vectors is not None):
        raise click.UsageError("default vectors are for quasi-hidden: give --predict quasi-hidden too.")
    if calibrated and default_vectors is not None:
        raise click.UsageError("--default-vectors leaves nothing to calibrate: give it alone.")
    with progress_bar("capture", shown=not quiet) as progress:
        trace = capture_transformers(
            model,
            list(prompts),
            store,
            token_ids=not no_tokens,
            predict=predict,
            predict_distance=predict_distance or 1,
            default_vectors=default_vectors,
            save_default_vectors=save_default_vectors,
            calibration_share=calibration_share or 1.0,
            progress=progress,
            **options,
        )
    return say_stored(store, trace, quiet=quiet)
