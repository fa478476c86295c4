"""The verb that shows what the others do, on a trace that comes with the package."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import click

from tracekit.cli.group import verb
from tracekit.errors import UsageError

SAMPLE = "olmoe-vllm"
CHARTS = ("windows", "autocorr", "attribution")


@verb("demo", examples=["tracekit demo", "tracekit demo /tmp/tracekit-demo"])
@click.argument("folder", default="tracekit-demo", type=click.Path(path_type=Path))
def demo(folder: Path) -> int:
    """Show on a sample trace what tracekit does.

    The sample, 28 requests to a small model that vLLM served, is copied into FOLDER [default: tracekit-demo], which
    must be new or empty, and ingested into a store there; then come the summary, three charts and the report. Each
    command is shown before it runs.
    """
    from tracekit.reports.files import shipped

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"will not overwrite: {folder}", remedy="Name another folder: tracekit demo FOLDER")
    sample, store = folder / SAMPLE, folder / "store"
    shutil.copytree(shipped("sample_traces") / SAMPLE, sample)
    config = ("--config", sample / "config.json", "--label-fields", "domain")
    commands = [
        ("ingest", sample / "responses.jsonl", *config, "--store", store, "--name", "olmoe"),
        ("summary", store),
        *(("chart", store, kind, "-o", folder / f"{kind}.html") for kind in CHARTS),
        ("report", store, "-o", folder / "report.html"),
    ]
    command = click.get_current_context().find_root().command
    for words in commands:
        arguments = [str(word) for word in words]
        click.echo(f"\n$ {shlex.join(['tracekit', *arguments])}")
        if code := command.main(arguments, prog_name="tracekit", standalone_mode=False):
            return int(code)
    click.echo(
        f"\nThe page to read first, in a browser: {click.format_filename(folder / 'report.html')}\n"
        "All these commands can be run again; those that write then take --force.\n"
        "A trace of your own goes the same way; tracekit formats lists what is read."
    )
    return 0
