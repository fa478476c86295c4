"""Measure tracekit on a DeepSeek-V3-shaped trace and print the table of README.md.

    python benchmarks/run.py                      # 464 M IDs: 58 layers, k = 8, N = 256, 2,000 requests of 500 tokens
    python benchmarks/run.py --requests 40        # a quick look
    python benchmarks/run.py --grow               # peak memory at 4 times the size as well (2 GB more disk)

The generated trace and the stores are kept under ``build/bench`` and used again. The library's answers are compared
with the Python sets' and DuckDB's before any rate is printed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rivals

from tracekit.synthetic import SynthTrace, synth

if TYPE_CHECKING:
    from tracekit.metrics.measurement import Measurement

MAX_WINDOW, MAX_LAG = 8, 16
HERE = Path(__file__).resolve().parent


@dataclass
class Timing:
    ids: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Million ids a second."""
        return self.ids / self.median / 1e6

    @property
    def best(self) -> float:
        """Million ids a second in the best round, in which others on the machine disturbed the least."""
        return self.ids / min(self.seconds) / 1e6

    def slower_than(self, other: Timing) -> float:
        """Times the time per id of another that was timed in the same rounds: the median over the rounds."""
        scale = other.ids / self.ids
        return statistics.median(
            mine / theirs * scale for mine, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def timed(
    rounds: int, tasks: dict[str, tuple[int, Callable[[], object]]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time functions of so many ids in turn, round by round, after a round that does not count.

    A shared machine is faster at one time and slower at another; within a round it is the same for all.
    """
    timings = {name: Timing(ids, []) for name, (ids, _) in tasks.items()}
    for turn in range(rounds + 1):
        for name, (_, function) in tasks.items():
            gc.collect()
            start = clock()
            function()
            if turn:
                timings[name].seconds.append(clock() - start)
    return timings


# --- the trace ---------------------------------------------------------------------------------


def generate(options: argparse.Namespace, build: Path) -> tuple[SynthTrace, Path, float | None]:
    """Write one ``.npy`` a request, unless that has been done; return the trace, the folder and the seconds it took."""
    trace = synth(
        "topical",
        num_experts=options.num_experts,
        top_k=options.top_k,
        layers=options.layers,
        requests=options.requests,
        tokens=options.tokens,
        seed=1,
    )
    shape = f"{options.requests}x{options.tokens}x{options.layers}x{options.top_k}of{options.num_experts}"
    folder = build / f"npy-{shape}"
    if folder.is_dir():
        return trace, folder, None
    unfinished = build / f"npy-{shape}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    start = time.perf_counter()
    trace.save_npy(unfinished)
    seconds = time.perf_counter() - start
    unfinished.rename(folder)
    return trace, folder, seconds


def replicated(folder: Path, times: int) -> Path:
    """Return a folder of links to the same files ``times`` over, so that a larger store costs no more arrays."""
    links = folder.with_name(f"{folder.name}-x{times}")
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir()
    for copy in range(times):
        for path in sorted(folder.glob("*.npy")):
            os.link(path, links / f"{copy}-{path.name}")
    return links


# --- measured in a fresh process, for its peak memory ------------------------------------------


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # the high-water mark of getrusage survives exec on Linux and would be the parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def child(task: str, **arguments: Any) -> dict[str, Any]:
    """Run one of the tasks below in a fresh process; return what it reports."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"task": task, **arguments})]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def run_child(task: str, store: str, **arguments: Any) -> None:
    start = time.perf_counter()
    if task == "ingest":
        ingest(Path(arguments["folder"]), Path(store), arguments["num_experts"])
    else:
        library(store, intervals=arguments["intervals"])
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes()}))


def ingest(folder: Path, store: Path, num_experts: int) -> None:
    import tracekit as tk

    shutil.rmtree(store, ignore_errors=True)
    tk.ingest([folder], store, name="bench", num_experts=num_experts, axes="tlk", phase="decode", router_order=True)


# --- what is measured --------------------------------------------------------------------------


def parts_of(store: Path) -> list[Path]:
    import tracekit as tk
    from tracekit.store.manifest import SEGMENTS, part_name

    segments = tk.open(str(store)).trace().segments
    return [store.absolute() / SEGMENTS / s.id / part_name(i) for s in segments for i in range(len(s.parts))]


def read_columns(parts: list[Path], top_k: int) -> None:
    """Read the rank columns and nothing else, batch by batch."""
    import polars as pl

    columns = [f"e{r}" for r in range(top_k)]
    for batch in pl.scan_parquet(parts).select(columns).collect_batches():
        for column in columns:
            batch[column].to_numpy()


def library(store: str | Path, *, intervals: bool, rank0: bool = True) -> Measurement:
    """One shared pass and its frames: windows, overlaps with pair statistics, counts.

    Without ``rank0`` the trace is taken for one that does not keep router order, as most engines' traces do not.
    """
    import tracekit as tk
    from tracekit.execution import current
    from tracekit.metrics.measurement import Measurement
    from tracekit.metrics.state import Spec

    opened = tk.open(store)
    trace = opened.trace()
    meta = replace(trace.meta, router_order=trace.meta.router_order if rank0 else None)
    spec = Spec("decode", max_window=MAX_WINDOW, max_lag=MAX_LAG, intervals=intervals)
    measured = Measurement.read(meta, opened.requests(trace), spec, opened.columns(trace), current().threads)
    measured.windows()
    measured.autocorr()
    measured.load()
    return measured


def answer_of(store: Path, num_experts: int) -> rivals.Answer:
    import tracekit as tk

    measured = library(store, intervals=False)
    counts = tk.open(str(store)).sql(
        "SELECT layer, expert, count(*) AS n FROM activations GROUP BY ALL ORDER BY layer, expert"
    )
    table = np.zeros((counts["layer"].n_unique(), num_experts), dtype=np.int64)
    table[counts["layer"].rank("dense").to_numpy() - 1, counts["expert"].to_numpy()] = counts["n"].to_numpy()
    return rivals.Answer(measured.windows()["observed"].to_list(), measured.autocorr()["overlap"].to_list(), table)


def check(name: str, found: rivals.Answer, expected: rivals.Answer) -> None:
    """Stop if two ways of computing the same disagree."""
    for what in ("unique", "overlap", "counts"):
        if not np.allclose(getattr(found, what), getattr(expected, what), rtol=1e-9):
            raise SystemExit(f"{name} disagrees with the library on {what}")


def sliced(folder: Path, build: Path, requests: int, num_experts: int) -> tuple[Path, int]:
    """Ingest the first few requests into a store of their own; return it and its ids."""
    links = build / f"slice-{requests}"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for path in sorted(folder.glob("*.npy"))[:requests]:
        os.link(path, links / path.name)
    store = build / f"slice-{requests}-store"
    ingest(links, store, num_experts)
    return store, sum(np.load(p, mmap_mode="r").size for p in links.glob("*.npy"))


# --- the report --------------------------------------------------------------------------------


def machine() -> list[str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("moe-tracekit", "polars", "duckdb", "numpy", "numba")
    versions = ", ".join(f"{p} {_version(p)}" for p in packages)
    return [f"{cpu}, {cores} cores, {platform.system()}, Python {platform.python_version()}", versions]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(checkout)"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    options = parse()
    if options.child:
        run_child(**json.loads(options.child))
        return
    build: Path = options.build
    build.mkdir(parents=True, exist_ok=True)
    n, k = options.num_experts, options.top_k

    progress("generating")
    trace, folder, seconds = generate(options, build)
    ids = int(trace.lengths.sum()) * options.layers * k
    need = ids * (6 if options.grow else 2) + (1 << 30)
    if shutil.disk_usage(build).free < need:
        raise SystemExit(f"{build} has less than {need / 1e9:.1f} GB free")
    table = Table()
    if seconds is not None:
        table.add("generate the trace (`tk.synth`, one thread)", Timing(ids, [seconds]))

    progress("ingesting")
    store = build / f"{folder.name}-store"
    runs = [child("ingest", store=str(store), folder=str(folder), num_experts=n) for _ in range(options.repeats)]
    ingested = Timing(ids, [r["seconds"] for r in runs])
    table.add("ingest from `.npy`, fresh process", ingested, peak=max(r["peak"] for r in runs))

    progress("rivals, once each")
    slice_store, slice_ids = sliced(folder, build, options.python_requests, n)
    arrays = [np.load(p) for p in sorted(folder.glob("*.npy"))[: options.python_requests]]
    check("Python sets", rivals.python_sets(arrays, n, MAX_WINDOW, MAX_LAG), answer_of(slice_store, n))
    statements, sql_ids = rival_sql(options, folder, build)
    once = {variant: timed(1, {variant: (sql_ids, run)})[variant] for variant, run in statements.items()}
    best = max(once, key=lambda variant: once[variant].rate)

    progress("everything in turn")
    parts = parts_of(store)
    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (ids, lambda: read_columns(parts, k)),
        "all": (ids, lambda: library(store, intervals=False)),
        "no rank-0": (ids, lambda: library(store, intervals=False, rank0=False)),
        "intervals": (ids, lambda: library(store, intervals=True)),
        "sets": (slice_ids, lambda: rivals.python_sets(arrays, n, MAX_WINDOW, MAX_LAG)),
        "sql": (sql_ids, statements[best]),
    }
    times = timed(options.repeats, tasks)
    titles = {
        "read": "read the rank columns with `collect_batches()`",
        "all": "**one pass: windows 1..8, overlaps 1..16 with Jaccard, any-shared and rank-0, counts**",
        "no rank-0": "**the same where router order is not kept: no rank-0**",
        "intervals": "the first with intervals",
        "sets": f"plain Python sets, {options.python_requests} requests",
        "sql": f"DuckDB SQL: {best}, {min(options.sql_requests, options.requests)} requests",
    }
    for name, title in titles.items():
        table.add(title, times[name])
    for variant, timing in once.items():
        if variant != best:
            table.add(f"DuckDB SQL: {variant}, once", timing)

    progress("memory")
    peaks = {1: child("measure", store=str(store), intervals=True)["peak"]}
    table.add_peak("one pass with intervals, fresh process", ids, peaks[1])
    if options.grow:
        big = build / f"{folder.name}-x4-store"
        links = replicated(folder, 4)
        run = child("ingest", store=str(big), folder=str(links), num_experts=n)
        table.add("ingest of 4 times as much", Timing(4 * ids, [run["seconds"]]), peak=run["peak"])
        peaks[4] = child("measure", store=str(big), intervals=True)["peak"]
        table.add_peak("one pass with intervals over 4 times as much, fresh process", 4 * ids, peaks[4])
        shutil.rmtree(links)
        shutil.rmtree(big)

    bounds: list[tuple[str, float | str, str]] = [
        ("one pass with Jaccard, any-shared and rank-0, M IDs/s", median_and_best(times["all"]), "≥ 300"),
        (
            "one pass without rank-0, M IDs/s",
            median_and_best(times["no rank-0"]),
            "≥ 500 (without Jaccard and any-shared either)",
        ),
        ("its time over the time of reading", times["no rank-0"].slower_than(times["read"]), "≤ 4"),
        ("intervals add", f"{100 * (times['intervals'].slower_than(times['all']) - 1):.0f} %", "≤ 20 %"),
        ("times as fast as Python sets", times["sets"].slower_than(times["no rank-0"]), "≥ 500"),
        ("times as fast as the best SQL", times["sql"].slower_than(times["no rank-0"]), "≥ 50"),
        ("ingest, M IDs/s", median_and_best(ingested), "≥ 80"),
        ("peak memory of a pass, GB", f"{peaks[1] / 1e9:.2f}", "≤ 1.5"),
    ]
    if 4 in peaks:
        bounds.append(("peak memory at 4 times the size, GB", f"{peaks[4] / 1e9:.2f}", "flat"))
    report = table.render(bounds, options.repeats)
    print(report)
    if options.output:
        options.output.write_text(report + "\n", encoding="utf-8")


def rival_sql(
    options: argparse.Namespace, folder: Path, build: Path
) -> tuple[dict[str, Callable[[], rivals.Answer]], int]:
    """Return every SQL variant, ready to run on a slice, and the ids of the slice; each has answered right once."""
    import duckdb

    n, k = options.num_experts, options.top_k
    store, ids = sliced(folder, build, min(options.sql_requests, options.requests), n)
    expected, parts, layers = answer_of(store, n), parts_of(store), list(range(options.layers))

    def statement(variant: str) -> Callable[[], rivals.Answer]:
        con = duckdb.connect()
        return lambda: rivals.duckdb_sql(con, parts, layers, n, k, MAX_WINDOW, MAX_LAG, variant)

    statements = {variant: statement(variant) for variant in rivals.SQL_VARIANTS}
    for variant, run in statements.items():
        check(variant, run(), expected)
    return statements, ids


def median_and_best(timing: Timing) -> str:
    return f"{timing.rate:.0f}, best round {timing.best:.0f}"


class Table:
    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, what: str, timing: Timing, *, peak: int | None = None) -> None:
        rates = [f"{rate:,.0f}" if rate >= 20 else f"{rate:.2f}" for rate in (timing.rate, timing.best)]
        self._add(what, timing.ids, f"{timing.median:,.2f}", *rates, peak=peak)

    def add_peak(self, what: str, ids: int, peak: int) -> None:
        self._add(what, ids, "", "", "", peak=peak)

    def _add(self, what: str, ids: int, *cells: str, peak: int | None) -> None:
        self.rows.append((what, f"{ids / 1e6:,.1f}", *cells, "" if peak is None else f"{peak / 1e9:.2f}"))

    def render(self, bounds: list[tuple[str, float | str, str]], repeats: int) -> str:
        lines = [
            f"Command: `python {' '.join(['benchmarks/run.py', *sys.argv[1:]])}`; medians of {repeats} rounds.",
            "",
        ]
        lines += [f"{line}." for line in machine()]
        lines += ["", "| what | M IDs | seconds | M IDs/s | best round | peak GB |", "|---|---:|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        lines += ["", "| bound | measured | wanted |", "|---|---:|---|"]
        lines += [f"| {a} | {b if isinstance(b, str) else f'{b:,.1f}'} | {c} |" for a, b, c in bounds]
        return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=500, help="tokens a request (default 500)")
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--python-requests", type=int, default=4, help="requests that the Python sets get (default 4)")
    parser.add_argument("--sql-requests", type=int, default=100, help="requests that DuckDB gets (default 100)")
    parser.add_argument("--grow", action="store_true", help="measure peak memory at 4 times the size as well")
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "bench")
    parser.add_argument("--output", type=Path, help="write the table here as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
