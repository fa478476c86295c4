"""Charts in a notebook: whatever a trace or a label is called stays inside the script that draws it."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracekit.reports.drawing import Chart

_HTML = ("default", "html", "browser", "colab", "kaggle", "zeppelin", "olli")
"""Altair's renderers that put a chart into a script element."""


class ScriptSafe(json.JSONEncoder):
    """JSON that cannot end the script element it stands in, whatever a trace or a label is called."""

    def encode(self, o: Any) -> str:
        r"""Return JSON with ``<``, ``>`` and ``&`` as ``\u003c``, ``\u003e`` and ``\u0026``."""
        return super().encode(o).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_safe(chart: Chart) -> Chart:
    """Make a chart, and the copies that are made of it, show as script-safe HTML in a notebook; return it."""
    kind: Any = type(chart)
    object.__setattr__(chart, "__class__", _safe(kind))  # Altair's own would take it for a part of the chart
    return chart


@cache
def _safe(kind: type[Any]) -> type[Any]:
    def bundle(self: Any, *args: Any, **options: Any) -> Any:
        from altair import renderers

        if renderers.active not in _HTML:
            return kind._repr_mimebundle_(self, *args, **options)
        # Altair writes the JSON into its page as it is.
        with renderers.enable(renderers.active, **(renderers.options | {"json_kwds": {"cls": ScriptSafe}})):
            return kind._repr_mimebundle_(self, *args, **options)

    return type(kind.__name__, (kind,), {"_repr_mimebundle_": bundle, "__doc__": kind.__doc__})
