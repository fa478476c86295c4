"""The verb that says which formats of traces there are readers for."""

from __future__ import annotations

from tracekit.cli.group import verb
from tracekit.cli.output import Output, output_options


@verb("formats", examples=["tracekit formats", "tracekit formats --format json"])
@output_options
def formats(out: Output) -> None:
    """List the formats of traces that can be ingested.

    Each with its name, as --source-format takes it, and a line that shows what such a source looks like. The format of
    a source is detected; the first in this order that takes it is used.
    """
    import tracekit as tk

    out.table(tk.formats(), "formats")
