"""Measure how time and memory grow with the trace, and print the section of README.md.

    python benchmarks/scale.py                    # 10 M, 40 M, 160 M and 640 M ids
    python benchmarks/scale.py --sizes 1e6,2e6,4e6   # a quick look
    python benchmarks/scale.py --largest 5e9      # 2.5 G and 5 G ids as well: 12 GB of disk, an hour
    python benchmarks/scale.py --peers DIR        # with BigMoeOnEdge's scripts/route-analyze.py from a checkout there

A generated block of requests is written again and again with the experts renumbered, so that no two requests are the
same and generation does not decide. Every size is measured in a process of its own, after one round over the smallest
store that compiles the kernels. The answers of the rivals are compared with the library's before a rate is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import run

import tracekit as tk

LAYERS, TOP_K, EXPERTS, TOKENS = 58, 8, 256, 500
IDS = LAYERS * TOP_K * TOKENS
"""Ids of a request."""
ROOM = 64
"""Experts per layer of the caches."""
SLICE = 40
"""Requests that DuckDB and Polars get; Python sets and scripts get ``FEW``."""
FEW = 2


# --- the traces --------------------------------------------------------------------------------


def write(block: list[np.ndarray], requests: int, folder: Path) -> None:
    """Write so many requests: those of the block, then the same with the experts renumbered, and so on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(requests):
        again, which = divmod(number, len(block))
        # Odd factors renumber experts without making two the same: 128 of them times 256 offsets are enough.
        ids = (block[which] * np.uint8(2 * (again // EXPERTS) + 1) + np.uint8(again % EXPERTS)).astype(np.uint8)
        np.save(folder / f"{number:06d}.npy", ids)


# --- measured in fresh processes ---------------------------------------------------------------


def one_pass(store: str, intervals: bool) -> None:
    run.library(store, intervals=intervals)


def caches(store: str) -> None:
    """Replay LRU caches of one size, as ``tracekit cache --policy lru`` does."""
    from tracekit.analysis.passes import PASSES
    from tracekit.metrics.cache_spec import CacheSpec

    opened = tk.open(store)
    info = opened.trace()
    spec = CacheSpec("decode", intervals=False, policies=("lru",), capacities=(ROOM,))
    PASSES["caches"](opened, info, opened.requests(info), spec)


TASKS: dict[str, Callable[[str], None]] = {
    "read the rank columns": lambda store: run.read_columns(run.parts_of(Path(store)), TOP_K),
    "one pass": lambda store: one_pass(store, intervals=False),
    "one pass with intervals": lambda store: one_pass(store, intervals=True),
    "expert caches, LRU, every size": caches,
}


def child(task: str, **arguments: Any) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"task": task, **arguments})]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def run_child(task: str, store: str, **arguments: Any) -> None:
    """Time one task; report the seconds of each round and the peak memory."""
    if task == "ingest":
        rounds = [seconds(lambda: run.ingest(Path(arguments["folder"]), Path(store), EXPERTS))]
    else:
        TASKS[task](arguments["warm"])
        rounds = [seconds(lambda: TASKS[task](store)) for _ in range(arguments["repeats"])]
    print(json.dumps({"seconds": sorted(rounds)[len(rounds) // 2], "peak": run.peak_bytes()}))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- the rivals --------------------------------------------------------------------------------


def route_traces(requests: list[np.ndarray], folder: Path) -> list[Path]:
    """Write each request as BigMoeOnEdge's ``--route-trace`` would."""
    folder.mkdir(exist_ok=True)
    traces = []
    for number, ids in enumerate(requests):
        traces.append(folder / f"{number}.csv")
        with traces[-1].open("w") as file:
            file.write(f"# model=bench arch=bench n_layer={LAYERS} n_expert={EXPERTS} n_expert_used={TOP_K}\n")
            file.write("turn,phase,step,layer,slot,expert,weight,residency,bytes\n")
            for (step, layer, slot), expert in np.ndenumerate(ids):
                file.write(f"0,1,{step},{layer},{slot},{expert},nan,0,0\n")
    return traces


def route_analyze(script: Path, traces: list[Path]) -> list[float]:
    """Run ``route-analyze.py`` on each trace; return the overlaps in percent at lags 1, 2, 4 and 8."""
    found = []
    for trace in traces:
        command = [sys.executable, str(script), str(trace), "--view", "overlap"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append([float(x) for line in re.findall("ALL.*", done.stdout) for x in re.findall(r"([\d.]+)%", line)])
    means: list[float] = np.mean(found, axis=0).tolist()
    return means


def rates(options: argparse.Namespace, block: list[np.ndarray], build: Path) -> dict[str, tuple[int, float]]:
    """Return ids and seconds of the library and of its rivals on slices of the trace, compared first."""
    import duckdb

    stores = {}
    for requests in (FEW, SLICE):
        folder = build / f"scale-slice-{requests}"
        write(block, requests, folder)
        stores[requests] = build / f"scale-slice-{requests}-store"
        run.ingest(folder, stores[requests], EXPERTS)
    parts = run.parts_of(stores[SLICE])
    few, expected = block[:FEW], {n: run.answer_of(store, EXPERTS) for n, store in stores.items()}
    con, variant = duckdb.connect(), next(iter(rivals.SQL_VARIANTS))
    arguments = EXPERTS, TOP_K, run.MAX_WINDOW, run.MAX_LAG
    tasks: dict[str, tuple[int, Callable[[], Any]]] = {
        "the library, one pass": (SLICE, lambda: one_pass(str(stores[SLICE]), intervals=False)),
        "reading alone": (SLICE, lambda: run.read_columns(parts, TOP_K)),
        "DuckDB SQL, bit masks": (
            SLICE,
            lambda: rivals.duckdb_sql(con, parts, list(range(LAYERS)), *arguments, variant),
        ),
        "Polars, bit masks": (SLICE, lambda: rivals.polars_masks(parts, *arguments)),
        "plain Python sets": (FEW, lambda: rivals.python_sets(few, EXPERTS, run.MAX_WINDOW, run.MAX_LAG)),
    }
    for name, (requests, function) in list(tasks.items())[2:]:
        run.check(name, function(), expected[requests])
    if options.peers:
        script, traces = options.peers / "scripts" / "route-analyze.py", route_traces(few, build / "scale-route-traces")
        percent = route_analyze(script, traces)
        if not np.allclose(percent, [100 * expected[FEW].overlap[lag - 1] for lag in (1, 2, 4, 8)], atol=0.051):
            raise SystemExit("BigMoeOnEdge's route-analyze.py disagrees with the library on the overlaps")
        name = "BigMoeOnEdge's `route-analyze.py --view overlap`: 4 lags"
        tasks[name] = FEW, lambda: route_analyze(script, traces)
    times = run.timed(options.repeats, {name: (IDS * n, function) for name, (n, function) in tasks.items()})
    return {name: (timing.ids, timing.median) for name, timing in times.items()}


# --- the report --------------------------------------------------------------------------------


def slope(ids: list[int], times: list[float]) -> tuple[float, float]:
    """Return the slope of log time on log ids by least squares, and its standard error; 1 is linear."""
    x, y = np.log(ids), np.log(times)
    x = x - x.mean()
    fitted = float(x @ y / (x @ x))
    rest = y - y.mean() - fitted * x
    return fitted, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def shown(size: int) -> str:
    return f"{size / 1e6:,.0f} M"


def main() -> None:
    options = parse()
    if options.child:
        run_child(**json.loads(options.child))
        return
    build: Path = options.build
    build.mkdir(parents=True, exist_ok=True)
    wanted = sorted({max(FEW, round(size / IDS)) for size in options.sizes})
    if shutil.disk_usage(build).free < 2.4 * wanted[-1] * IDS + (1 << 30):
        raise SystemExit(f"{build} has less than {(2.4 * wanted[-1] * IDS + (1 << 30)) / 1e9:.0f} GB free")
    made = tk.synth("topical", num_experts=EXPERTS, top_k=TOP_K, layers=LAYERS, requests=SLICE, tokens=TOKENS, seed=1)
    block = [request.ids for request in made.requests()]

    warm = None
    measured: dict[str, list[dict[str, Any]]] = {}
    for requests in wanted:
        run.progress(shown(requests * IDS))
        folder, store = build / "scale-arrays", build / f"scale-{requests}-store"
        write(block, requests, folder)
        measured.setdefault("ingest, fresh process", []).append(child("ingest", store=str(store), folder=str(folder)))
        shutil.rmtree(folder)
        warm = warm or store
        for task in TASKS:
            report = child(task, store=str(store), warm=str(warm), repeats=options.repeats)
            measured.setdefault(task, []).append(report)
        if store != warm:
            shutil.rmtree(store)
    run.progress("rivals")
    compared = rates(options, block, build)
    print(render(options, [requests * IDS for requests in wanted], measured, compared))


def render(
    options: argparse.Namespace,
    ids: list[int],
    measured: dict[str, list[dict[str, Any]]],
    compared: dict[str, tuple[int, float]],
) -> str:
    lines = [
        f"Command: `python {' '.join(['benchmarks/scale.py', *sys.argv[1:]])}`; medians of {options.repeats} rounds.",
        "",
        *(f"{line}." for line in run.machine()),
        "",
        "| seconds (peak GB) | " + " | ".join(map(shown, ids)) + " | slope ± s.e. |",
        "|---|" + "---:|" * (len(ids) + 1),
    ]
    for task, reports in measured.items():
        fitted, error = slope(ids, [report["seconds"] for report in reports])
        cells = [f"{report['seconds']:,.2f} ({report['peak'] / 1e9:.2f})" for report in reports]
        lines.append(f"| {task} | {' | '.join(cells)} | {fitted:.3f} ± {error:.3f} |")
    own_ids, own = next(iter(compared.values()))
    lines += ["", "| on a slice | M IDs | M IDs/s | time of the library's pass |", "|---|---:|---:|---:|"]
    for name, (n, took) in compared.items():
        lines.append(f"| {name} | {n / 1e6:.1f} | {n / took / 1e6:,.3g} | × {took / n / (own / own_ids):,.2f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "10e6,40e6,160e6,640e6"
    parser.add_argument("--sizes", default=sizes, help=f"ids of the traces (default {sizes})")
    parser.add_argument("--largest", type=float, help="measure this many ids, and half as many, as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a checkout of github.com/Helldez/BigMoeOnEdge")
    parser.add_argument("--build", type=Path, default=run.HERE.parent / "build" / "bench")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = [float(size) for size in options.sizes.split(",")]
    if len(options.sizes) < 3:
        parser.error("--sizes: a slope and its error take three sizes or more")
    if options.largest:
        options.sizes += [options.largest / 2, options.largest]
    return options


if __name__ == "__main__":
    main()
