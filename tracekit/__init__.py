"""Measure what a Mixture-of-Experts model's routing, on a given workload, allows.

It keeps per-token, per-layer expert ids in one open Parquet store and measures how many experts a verification window
loads, how far below independence that is, why, and how long the correlation lasts.

Everything here is loaded when it is first used, so that ``import tracekit`` is quick.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Store": "store",
    "TraceInfo": "store",
    "TracekitError": "errors",
    "TracekitWarning": "errors",
    "attribution": "analysis.routing",
    "autocorr": "analysis.routing",
    "capture_openai": "capture.openai",
    "capture_transformers": "capture.transformers",
    "chart": "reports.charts",
    "check": "checking",
    "ingest": "store",
    "formats": "sources",
    "load": "analysis.routing",
    "measure": "analysis.routing",
    "model": "sources.catalogue",
    "models": "sources.catalogue",
    "queries": "reports.queries",
    "query": "reports.queries",
    "record": "capture.recorder",
    "summary": "reports.queries",
    "synth": "synthetic",
    "windows": "analysis.routing",
}

if TYPE_CHECKING:
    from tracekit.analysis.routing import attribution as attribution
    from tracekit.analysis.routing import autocorr as autocorr
    from tracekit.analysis.routing import load as load
    from tracekit.analysis.routing import measure as measure
    from tracekit.analysis.routing import windows as windows
    from tracekit.capture.openai import capture_openai as capture_openai
    from tracekit.capture.recorder import record as record
    from tracekit.capture.transformers import capture_transformers as capture_transformers
    from tracekit.checking import check as check
    from tracekit.errors import TracekitError as TracekitError
    from tracekit.errors import TracekitWarning as TracekitWarning
    from tracekit.reports import charts as charts
    from tracekit.reports.charts import chart as chart
    from tracekit.reports.queries import queries as queries
    from tracekit.reports.queries import query as query
    from tracekit.reports.queries import summary as summary
    from tracekit.sources import formats as formats
    from tracekit.sources.catalogue import model as model
    from tracekit.sources.catalogue import models as models
    from tracekit.store import Store as Store
    from tracekit.store import TraceInfo as TraceInfo
    from tracekit.store import ingest as ingest
    from tracekit.synthetic import synth as synth


def open(path: str | Path) -> Store:  # noqa: A001 - the natural name for it: tk.open("…")
    """Open a store.

    Raises
    ------
    StoreError
        The directory is not a store, or its schema is newer than this version reads.
    """
    from tracekit.store import Store

    return Store(path)


def __getattr__(name: str) -> Any:
    if name == "charts":
        return importlib.import_module("tracekit.reports.charts")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tracekit.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'tracekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "charts"])
