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
    "acceptance": "analysis.speculation",
    "amdahl": "analysis.gains",
    "Store": "store",
    "TraceInfo": "store",
    "TracekitError": "errors",
    "TracekitWarning": "errors",
    "attribution": "analysis.routing",
    "autocorr": "analysis.routing",
    "budget": "analysis.speculation",
    "cache": "analysis.offloading",
    "Calibration": "economics.calibration.result",
    "calibrate": "analysis.calibration",
    "capture_openai": "capture.openai",
    "capture_transformers": "capture.transformers",
    "chart": "reports.charts",
    "check": "checking",
    "compact": "store",
    "design": "analysis.design",
    "compare": "analysis.comparison",
    "expert_ratio": "analysis.speculation",
    "fit_law": "analysis.design",
    "ingest": "store",
    "formats": "sources",
    "layer_budgets": "analysis.offloading",
    "load": "analysis.routing",
    "locality": "analysis.offloading",
    "load_ipython_extension": "jupyter",
    "measure": "analysis.routing",
    "model": "sources.catalogue",
    "models": "sources.catalogue",
    "prefetch": "analysis.offloading",
    "queries": "reports.queries",
    "query": "reports.queries",
    "record": "capture.recorder",
    "report": "reports.report",
    "reuse": "analysis.offloading",
    "RoutingLaw": "economics.law",
    "running": "execution",
    "speedup": "analysis.gains",
    "step_time": "analysis.gains",
    "steps": "analysis.speculation",
    "summary": "reports.queries",
    "synth": "synthetic",
    "token_schedule": "analysis.tpot",
    "tpot": "analysis.tpot",
    "windows": "analysis.routing",
}

if TYPE_CHECKING:
    from tracekit.analysis.calibration import calibrate as calibrate
    from tracekit.analysis.comparison import compare as compare
    from tracekit.analysis.design import design as design
    from tracekit.analysis.design import fit_law as fit_law
    from tracekit.analysis.gains import amdahl as amdahl
    from tracekit.analysis.gains import speedup as speedup
    from tracekit.analysis.gains import step_time as step_time
    from tracekit.analysis.offloading import cache as cache
    from tracekit.analysis.offloading import layer_budgets as layer_budgets
    from tracekit.analysis.offloading import locality as locality
    from tracekit.analysis.offloading import prefetch as prefetch
    from tracekit.analysis.offloading import reuse as reuse
    from tracekit.analysis.routing import attribution as attribution
    from tracekit.analysis.routing import autocorr as autocorr
    from tracekit.analysis.routing import load as load
    from tracekit.analysis.routing import measure as measure
    from tracekit.analysis.routing import windows as windows
    from tracekit.analysis.speculation import acceptance as acceptance
    from tracekit.analysis.speculation import budget as budget
    from tracekit.analysis.speculation import expert_ratio as expert_ratio
    from tracekit.analysis.speculation import steps as steps
    from tracekit.analysis.tpot import token_schedule as token_schedule
    from tracekit.analysis.tpot import tpot as tpot
    from tracekit.capture.openai import capture_openai as capture_openai
    from tracekit.capture.recorder import record as record
    from tracekit.capture.transformers import capture_transformers as capture_transformers
    from tracekit.checking import check as check
    from tracekit.economics.calibration.result import Calibration as Calibration
    from tracekit.economics.law import RoutingLaw as RoutingLaw
    from tracekit.errors import TracekitError as TracekitError
    from tracekit.errors import TracekitWarning as TracekitWarning
    from tracekit.execution import running as running
    from tracekit.jupyter import load_ipython_extension as load_ipython_extension
    from tracekit.reports import charts as charts
    from tracekit.reports.charts import chart as chart
    from tracekit.reports.queries import queries as queries
    from tracekit.reports.queries import query as query
    from tracekit.reports.queries import summary as summary
    from tracekit.reports.report import report as report
    from tracekit.sources import formats as formats
    from tracekit.sources.catalogue import model as model
    from tracekit.sources.catalogue import models as models
    from tracekit.store import Store as Store
    from tracekit.store import TraceInfo as TraceInfo
    from tracekit.store import compact as compact
    from tracekit.store import ingest as ingest
    from tracekit.synthetic import synth as synth


def open(path: str | Path) -> Store:  # noqa: A001 - the natural name for it: tk.open("…")
    """Open a store: its directory, or its URL on object storage (``s3://…``, ``hf://…``), where it is read only.

    Raises
    ------
    StoreError
        The directory is not a store, its schema is newer than this version reads, or the URL cannot be read.
    UsageError
        Nothing reads URLs that begin so.
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
