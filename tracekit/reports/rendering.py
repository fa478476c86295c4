"""Charts as files: self-contained HTML, images and Vega-Lite JSON."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tracekit.errors import UsageError
from tracekit.reports.display import ScriptSafe
from tracekit.reports.files import check_writable, write

if TYPE_CHECKING:
    from tracekit.reports.drawing import Chart

SUFFIXES = (".html", ".png", ".svg", ".pdf", ".json")
"""What ``render`` writes, by suffix of the file."""

# The menu offers to save the image; the online editor would send the data to somebody else's site.
_EMBED = {"actions": {"export": True, "source": False, "compiled": False, "editor": False}}


def render(chart: Chart, path: str | Path, *, force: bool = False) -> Path:
    """Write a chart to a file in one step, in the format that its suffix names.

    Parameters
    ----------
    path
        The file; ``.html`` needs no network when opened, ``.png`` has two pixels per unit of length.
    force
        Replace the file if it exists.

    Returns
    -------
    pathlib.Path
        The file that was written.

    Raises
    ------
    UsageError
        The suffix names no format, or the file exists and ``force`` is not set.
    TracekitError
        The file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"the name {path.name!r} says no chart format", expected="a suffix of " + ", ".join(SUFFIXES))
    check_writable(path, force=force)
    write(path, content(chart, path.suffix.lower().removeprefix(".")), force=force)
    return path


def content(chart: Chart, fmt: str) -> bytes:
    """Return a chart as ``html``, ``png``, ``svg``, ``pdf`` or ``json``, text in UTF-8."""
    if fmt == "json":
        return (chart.to_json() + "\n").encode()
    if fmt == "html":
        html: str = chart.to_html(inline=True, embed_options=dict(_EMBED), json_kwds={"cls": ScriptSafe})
        return html.encode()
    if fmt == "svg":
        text = io.StringIO()
        chart.save(text, format="svg")
        return text.getvalue().encode()
    image = io.BytesIO()
    chart.save(image, format="pdf" if fmt == "pdf" else "png", scale_factor=1 if fmt == "pdf" else 2)
    return image.getvalue()
