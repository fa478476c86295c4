"""Results that the kernels computed, kept beside the trace they belong to.

One Parquet file a result: ``results/KIND-VERSION-CONTENT-PARAMETERS.parquet``, where CONTENT is the digest of the trace
and PARAMETERS one of everything else the numbers depend on. A result is therefore never stale, only unused. Those of a
store at a URL are kept as long as the process runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.schema import BASELINES
from tracekit.store.answers import MODELLED
from tracekit.store.location import Location, beside
from tracekit.store.manifest import RESULTS, TEMPORARY, VERSION, TraceInfo, whole

if TYPE_CHECKING:
    import polars as pl

_GROUP = {"layer": "UInt16", "label": "String", "request_id": "String"}
_INTERVAL = ("", "_lo", "_hi")
_CACHE = {"scope": "String", "start": "String", "batch_size": "Int64"}


def columns(kind: str) -> dict[str, str]:
    """Return the columns of a result view after ``trace``, with the names of their Polars types."""
    if kind in MODELLED:
        return {**MODELLED[kind], "setting": "String", "asked": "Int64"}
    common = {"phase": "String", "by": "String", **_GROUP, "intervals": "Boolean", "seed": "Int64"}
    number = "Float64"
    measured: dict[str, dict[str, str]] = {
        "windows": {
            "overlapping": "Boolean",
            "distinct": "Boolean",
            "batch_size": "Int64",
            "window": "Int64",
            "n_windows": "Int64",
            **{f"observed{s}": number for s in _INTERVAL},
            "per_top_k": number,
            **{f"expected_{b}": number for b in BASELINES},
            **{f"reduction_{b}{s}": number for b in BASELINES for s in (*_INTERVAL, "_bias")},
        },
        "expert_ratio": {
            "batch_size": "Int64",
            "window": "Int64",
            "n_windows": "Int64",
            **{f"unique{s}": number for s in (*_INTERVAL, "_single")},
            **{f"ratio{s}": number for s in _INTERVAL},
            **{f"ratio_{b}": number for b in ("uniform", "popularity", "request")},
        },
        "autocorr": {
            "lag": "Int64",
            "n_pairs": "Int64",
            **{f"overlap{s}": number for s in _INTERVAL},
            **{f"expected_{b}": number for b in ("uniform", "popularity", "request")},
            **dict.fromkeys(("rho", "rho_request", "jaccard", "any_shared", "rank0_repeat"), number),
        },
        "attribution": {
            "window": "Int64",
            "cause": "String",
            **dict.fromkeys(("unique_before", "unique_after", "drop", "share", "share_lo", "share_hi"), number),
            "resolved": "Boolean",
        },
        "load": {
            "tokens": "Int64",
            **dict.fromkeys(("max_over_mean", "cv", "gini", "entropy", "entropy_norm", "effective_experts"), number),
            "dead_experts": "Int64",
            **dict.fromkeys(("top_share", "sum_p2_over_k"), number),
        },
        "budget": {
            "steps": "Boolean",
            "window": "Int64",
            "budget": "Int64",
            "share": number,
            **dict.fromkeys(("n_windows", "n_left_out"), "Int64"),
            **{f"unique{s}": number for s in _INTERVAL},
            **dict.fromkeys(("loaded", "per_top_k"), number),
            **{f"{name}{s}": number for name in ("weight_kept", "tokens_intact") for s in _INTERVAL},
            **{f"experts_for_share{s}": number for s in _INTERVAL},
        },
        "steps": {
            "window": "Int64",
            "n_steps": "Int64",
            **dict.fromkeys(("drafted", "accepted"), number),
            **{f"{c}{s}": number for c in ("acceptance_length", "unique", "unique_kept") for s in _INTERVAL},
            **{f"rejected_share{s}": number for s in _INTERVAL},
            **dict.fromkeys(("expected_uniform", "expected_popularity", "accepted_only"), number),
            **{f"bias{s}": number for s in _INTERVAL},
        },
        "acceptance": {
            "accepted": "Int64",
            "n_steps": "Int64",
            **{
                f"{c}{s}": number for c in ("share", "at_least", "rate", "unique", "rejected_unique") for s in _INTERVAL
            },
        },
        "cache": {
            **_CACHE,
            "unit": "String",
            "policy": "String",
            "capacity": number,
            **dict.fromkeys(("capacity_bytes", "accesses", "tokens"), "Int64"),
            **{f"hit_rate{s}": number for s in _INTERVAL},
            **dict.fromkeys(("cold", "working_set", "policy_excess", "misses_per_token", "bytes_per_token"), number),
        },
        "locality": {
            **dict.fromkeys(("segment", "n_segments"), "Int64"),
            **{f"{c}{s}": number for c in ("srp", "size_ratio") for s in _INTERVAL},
            "capacity": "Int64",
            "cache_ratio": number,
            **{f"{c}{s}": number for c in ("sch", "fixed_hit_rate") for s in _INTERVAL},
        },
        "layer_budgets": {
            "start": "String",
            "batch_size": "Int64",
            "unit": "String",
            **dict.fromkeys(("capacity", "total", "experts"), number),
            "accesses": "Int64",
            **{f"{c}{s}": number for c in ("hit_rate", "uniform", "gain") for s in _INTERVAL},
            "hit_rate_learned": number,
            "hit_rate_bound": number,
        },
        "reuse": {
            **_CACHE,
            **dict.fromkeys(("capacity", "accesses"), "Int64"),
            "share": number,
            **{f"hit_rate{s}": number for s in _INTERVAL},
        },
        "prefetch": {
            "predictor": "String",
            **dict.fromkeys(("distance", "m", "n"), "Int64"),
            **{f"{c}{s}": number for c in ("recall", "precision", "exact", "weight_covered") for s in _INTERVAL},
            **dict.fromkeys(("rank_match", "bytes_fetched", "bytes_wasted"), number),
        },
    }
    return common | measured[kind]


KEYS: dict[str, tuple[str, ...]] = {
    "windows": ("overlapping", "distinct", "batch_size", "window"),
    "expert_ratio": ("batch_size", "window"),
    "autocorr": ("lag",),
    "attribution": ("window",),
    "load": (),
    "budget": ("steps", "window", "budget", "share"),
    "steps": ("window",),
    "acceptance": ("accepted",),
    "cache": ("scope", "start", "batch_size", "unit", "policy", "capacity"),
    "reuse": ("scope", "start", "batch_size", "capacity"),
    "locality": ("segment", "capacity"),
    "layer_budgets": ("start", "batch_size", "unit", "capacity"),
    "prefetch": ("predictor", "distance", "m"),
}
"""Columns that, with trace, phase, by and the group, name what was measured once: rows that belong together."""

KINDS = (*KEYS, *MODELLED)
"""The views."""


def path(root: Location, kind: str, trace: TraceInfo, parameters: Mapping[str, Any]) -> Path:
    """Return where the result for these parameters is or would be."""
    text = json.dumps(dict(parameters), sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return beside(root) / RESULTS / f"{kind}-{VERSION}-{trace.content}-{key}.parquet"


def load(root: Location, kind: str, trace: TraceInfo, parameters: Mapping[str, Any]) -> pl.DataFrame | None:
    """Return the saved result, or None where there is none that can be read."""
    import polars as pl

    try:
        return pl.read_parquet(path(root, kind, trace, parameters), glob=False)
    except (OSError, pl.exceptions.PolarsError):
        return None


def save(root: Location, kind: str, trace: TraceInfo, parameters: Mapping[str, Any], frame: pl.DataFrame) -> None:
    """Save a result atomically; a store that cannot be written to is left as it is."""
    import polars as pl

    target = path(root, kind, trace, parameters)
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    with contextlib.suppress(OSError, pl.exceptions.PolarsError):
        target.parent.mkdir(exist_ok=True)
        try:
            frame.write_parquet(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def saved(root: Location, kind: str, trace: TraceInfo) -> list[Path]:
    """Return the files with results of this kind for the trace as it is now, oldest first."""
    ages = []
    for file in (beside(root) / RESULTS).glob(f"{kind}-{VERSION}-{trace.content}-*.parquet"):
        with contextlib.suppress(OSError):
            if whole(file):
                ages.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(ages)]
