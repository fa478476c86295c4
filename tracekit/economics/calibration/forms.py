"""What rows of benchmark results say, by the names of their columns: plain tables, vLLM's and SGLang's own results.

The names are those of ``vllm bench latency`` and ``vllm bench serve`` (vllm/benchmarks/latency.py and serve.py, 2026)
and of SGLang's ``bench_serving``, ``bench_one_batch`` and ``bench_one_batch_server`` (sglang/benchmark, 2026).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracekit.economics.calibration.names import (
    NAME_OF,
    NAMES,
    REQUEST,
    STEP,
    THROUGHPUT,
    TOKEN,
    UNITS,
    fault_of,
    quantity_of,
)
from tracekit.economics.calibration.rows import Row, normal
from tracekit.errors import SourceError


@dataclass(slots=True)
class Entry:
    """What a row says: one quantity of one cell, as it is written, not yet checked."""

    where: str
    quantity: str
    column: str
    """Where the value comes from, for messages."""
    value: Any
    scale: float = 1.0
    """What makes seconds of it."""
    fields: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """By the names of `NAMES` and ``ttft_s``: the column and the value."""
    spread: float | None = None
    """Relative standard deviation of the runs that the value is an average of."""
    runs: int = 1
    notes: list[str] = field(default_factory=list)


def entries(table: Sequence[Row], metric: str | None = None) -> list[Entry]:
    """Return what each row of a file says.

    Parameters
    ----------
    table
        The rows.
    metric
        The column that holds the time, where several do.

    Raises
    ------
    SourceError
        No column, or more than one, says how long a step takes; or the unit is not told.
    """
    wanted = None if metric is None else normal(metric)
    found = []
    for row in table:
        own = _own(row)
        if own is not None and wanted is not None:
            own.quantity, own.column, own.scale = _chosen(row, wanted)
            own.value, own.spread, own.runs = row.fields[wanted], None, 1
        found.append(own if own is not None else _plain(row, wanted))
    for entry, row in zip(found, table, strict=True):
        for name, value in row.given.items():
            _add(entry, name, value, "given beside the file")
    return found


def _own(row: Row) -> Entry | None:
    """Recognise a result that an engine's benchmark wrote."""
    has = row.fields.keys()
    if {"benchmark", "metric"} <= has:
        return _pytorch(row)
    if "avg_latency" in has:
        return _latency(row)
    if "median_decode_latency" in has:
        return _entry(row, STEP, "median_decode_latency")
    if {"last_gen_throughput", "output_throughput"} <= has:
        return _one_batch_server(row)
    if "duration" in has and {"median_tpot_ms", "mean_tpot_ms"} & has:
        return _serving(row)
    return None


def _entry(row: Row, quantity: str, column: str, scale: float = 1.0, skip: Sequence[str] = ()) -> Entry:
    entry = Entry(row.where, quantity, column, row.fields.get(column), scale)
    for name, value in row.fields.items():
        if name in NAME_OF and name != column and name not in skip and value not in (None, ""):
            _add(entry, name, value, name)
    return entry


def _add(entry: Entry, name: str, value: Any, column: str) -> None:
    """Add a field; one that is there already has to say the same."""
    field_ = NAME_OF.get(name)
    if field_ is None:
        raise SourceError(
            f"{name!r} is {column}, and no name that is known",
            where=entry.where,
            expected=", ".join(NAMES),
        )
    other = entry.fields.setdefault(field_, (name, value))
    if str(other[1]) != str(value) and _float(other[1]) != _float(value):
        raise SourceError(
            f"{other[0]} is {other[1]} and {name} is {value}, but both are the {field_.replace('_', ' ')}",
            where=entry.where,
            expected="one of them, or the same value",
        )


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _latency(row: Row) -> Entry:
    """Recognise ``vllm bench latency --output-json``: seconds of whole batches, and nothing about the batch."""
    entry = _entry(row, REQUEST, "avg_latency")
    latencies = row.fields.get("latencies")
    if isinstance(latencies, list) and len(latencies) > 1:
        numbers = [x for x in map(_float, latencies) if x is not None and math.isfinite(x) and x > 0]
        if len(numbers) == len(latencies):
            entry.spread, entry.runs = statistics.stdev(numbers) / statistics.fmean(numbers), len(numbers)
    entry.notes.append("latencies of whole requests include their prefill: times per token are a little high")
    return entry


def _pytorch(row: Row) -> Entry:
    """Recognise the records that vLLM writes beside its latency results: the same with the arguments of the run."""
    benchmark, metric = row.fields["benchmark"], row.fields["metric"]
    extra = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
    arguments = extra.get("args") if isinstance(extra, dict) else None
    if not isinstance(metric, dict) or not isinstance(arguments, dict) or metric.get("name") != "latency":
        raise SourceError(
            "is a record of one metric of a benchmark of serving",
            where=row.where,
            expected="the file that --save-result wrote",
        )
    values = metric.get("benchmark_values")
    numbers = [_float(x) for x in values] if isinstance(values, list) else []
    known = [x for x in numbers if x is not None]
    if not known or len(known) < len(numbers):
        raise SourceError("has no list of latencies", where=row.where, expected="numbers in benchmark_values")
    fields = {name: arguments[name] for name in ("batch_size", "input_len", "output_len") if name in arguments}
    config = arguments.get("speculative_config")
    if isinstance(config, dict) and "num_speculative_tokens" in config:
        fields["num_speculative_tokens"] = config["num_speculative_tokens"]
    average = {"avg_latency": statistics.fmean(known), "latencies": known}
    return _latency(Row(row.where, fields | average, row.given))


def _serving(row: Row) -> Entry:
    """Recognise a result of ``vllm bench serve`` or of SGLang's ``bench_serving``."""
    fields = row.fields
    column = next((c for c in ("median_tpot_ms", "mean_tpot_ms") if fields.get(c) is not None), "median_tpot_ms")
    done = _float(fields.get("completed"))
    if done == 0:
        raise SourceError("completed no request", where=row.where, expected="a benchmark that succeeded")
    # Lengths are those that were asked for, of a random data set; what was sent is in the totals.
    skip = ("concurrency", "random_input_len", "random_output_len")
    entry = _entry(row, TOKEN, column, UNITS["ms"], skip)
    if "batch_size" not in entry.fields and "batch_size" not in {NAME_OF.get(name) for name in row.given}:
        raise SourceError(
            "was run without max_concurrency, so its batch size is not known",
            where=row.where,
            expected="a benchmark at a fixed concurrency",
            remedy="Run it with --max-concurrency, or name the batch size: FILE:batch_size=8",
        )
    if done:
        for total, name in (("total_input_tokens", "input_len"), ("total_output_tokens", "output_len")):
            if (tokens := _float(fields.get(total))) is not None:
                entry.fields.setdefault(name, (total, tokens / done))
    failed = _float(fields.get("failed"))
    if failed:
        entry.notes.append(f"{failed:.0f} requests of the benchmark failed")
    _speculation(row, entry)
    if (mean := _concurrency(fields, done)) is not None and mean < 0.8 * (_float(fields.get("max_concurrency")) or 0):
        entry.notes.append(
            f"{mean:.1f} requests were under way on average where max_concurrency is {fields['max_concurrency']}: "
            "the batch was not always full"
        )
    return entry


def _concurrency(fields: Mapping[str, Any], done: float | None) -> float | None:
    """Return the requests under way on average: SGLang's own figure, or by Little's law from the mean times."""
    if (own := _float(fields.get("concurrency"))) is not None:
        return own
    names = ("mean_ttft_ms", "mean_tpot_ms", "total_output_tokens", "duration")
    ttft, tpot, tokens, duration = (_float(fields.get(name)) for name in names)
    if not done or ttft is None or tpot is None or tokens is None or not duration:
        return None
    return (done * ttft + tpot * max(tokens - done, 0)) / 1000 / duration


def _speculation(row: Row, entry: Entry) -> None:
    """Find the draft length in what vLLM counted or in SGLang's server information."""
    if "drafts" in entry.fields:
        return
    fields = row.fields
    steps, drafted = (_float(fields.get(f"spec_decode_{name}")) for name in ("num_drafts", "draft_tokens"))
    positions = fields.get("spec_decode_per_position_acceptance_rates")
    if isinstance(positions, list) and positions:
        entry.fields["drafts"] = ("spec_decode_per_position_acceptance_rates", len(positions))
    elif steps and drafted:
        entry.fields["drafts"] = ("spec_decode_draft_tokens", round(drafted / steps))
    if steps and drafted and "drafts" in entry.fields:
        mean, drafts = drafted / steps, entry.fields["drafts"][1]
        if abs(mean - drafts) > 0.05 * drafts:
            entry.notes.append(f"steps have {mean:.2f} drafts on average where the longest has {drafts}")
    server = fields.get("server_info")
    if isinstance(server, dict) and isinstance(server.get("decode"), list) and server["decode"]:
        server = server["decode"][0]
    if isinstance(server, dict) and server.get("speculative_num_draft_tokens"):
        name = "speculative_num_draft_tokens"
        entry.fields.setdefault("window", (name, server[name]))
        if (branches := _float(server.get("speculative_eagle_topk"))) is not None and branches > 1:
            entry.notes.append("drafts were trees: their tokens share fewer experts than those of a chain")


def _one_batch_server(row: Row) -> Entry:
    """Recognise a result of SGLang's ``bench_one_batch_server``."""
    fields = row.fields
    if fields.get("steady_state_output_throughput") is not None:
        entry = _entry(row, THROUGHPUT, "steady_state_output_throughput")
    elif fields.get("latency") is not None and fields.get("last_ttft") is not None:
        entry = _entry(row, REQUEST, "latency")
        entry.fields["ttft_s"] = ("last_ttft", fields["last_ttft"])
    else:
        entry = _entry(row, THROUGHPUT, "output_throughput")
    # What it writes where the server does not speculate.
    if (length := entry.fields.get("acceptance_length")) is not None and _float(length[1]) == -1:
        del entry.fields["acceptance_length"]
    return entry


def _plain(row: Row, wanted: str | None) -> Entry:
    """Recognise a row of a table that somebody made."""
    if wanted is not None:
        quantity, column, scale = _chosen(row, wanted)
        return _entry(row, quantity, column, scale)
    known = _times(row)
    if len(known) > 1:
        names = " and ".join(known)
        raise SourceError(
            f"{names} each say how long a step takes",
            where=row.where,
            expected="one such column",
            remedy="Name the one that counts with --metric",
        )
    if not known:
        raise _no_time(row)
    [(column, (quantity, scale))] = known.items()
    entry = _entry(row, quantity, column, scale)
    if quantity == THROUGHPUT:
        entry.notes.append(f"{column} counts the time of prefill and of idle slots: times per token are a little high")
    return entry


def _chosen(row: Row, wanted: str) -> tuple[str, str, float]:
    """Return quantity, name and scale of the column that the user named."""
    known = _times(row)
    if wanted not in known:
        what = "does not say how long a step takes" if wanted in row.fields else "is not there"
        raise SourceError(
            f"the column {wanted} {what}", where=row.where, expected=", ".join(known) or "a column with a time"
        )
    return known[wanted][0], wanted, known[wanted][1]


def _times(row: Row) -> dict[str, tuple[str, float]]:
    return {name: time for name in row.fields if (time := quantity_of(name)) is not None}


def _no_time(row: Row) -> SourceError:
    """Say what is missing, and which columns come close."""
    faults = [fault for name in row.fields if (fault := fault_of(name)) is not None]
    found = "; ".join(faults[:4]) or "the columns are " + (", ".join(list(row.fields)[:12]) or "none")
    return SourceError(
        f"no column says how long a step takes: {found}",
        where=row.where,
        expected="step_ms (with its drafting), verify_ms (without), tpot_ms (an output token of a request), latency_s "
        "with output_len, output_throughput (tokens per second of all requests), verification_ratio or speedup",
    )
