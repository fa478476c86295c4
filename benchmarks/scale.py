"""Measure how time and memory grow with the trace, and print the section of README.md.

    python benchmarks/scale.py                    # 10 M, 40 M, 160 M and 640 M ids
    python benchmarks/scale.py --sizes 1e6,2e6,4e6   # a quick look
    python benchmarks/scale.py --largest 5e9      # 2.5 G and 5 G ids as well: 12 GB of disk, half an hour
    python benchmarks/scale.py --peers DIR        # with peers' scripts, from DIR/BigMoeOnEdge and DIR/moe-lrc

A generated block of requests is written again and again with the experts renumbered, so that no two requests are the
same and generation does not decide. First the library is timed on slices of the trace, in turn with reading alone, with
what people write instead, and with the scripts of peers, after all answers have been compared. Then every size is
measured in a process of its own, after one round over the smallest store that compiles the kernels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import rivals
import run

import tracekit as tk

LAYERS, TOP_K, EXPERTS = 58, 8, 256
SLICE = 40
"""Requests that DuckDB and Polars get; Python sets get ``FEW``."""
FEW = 2
LIBRARY = "the library, one pass"
OURS = "the library instead of "

Tasks = dict[str, tuple[int, Callable[[], object]]]
"""What is timed, and the ids that it takes."""


def ids_of(options: argparse.Namespace) -> int:
    """Return the ids of a request."""
    return LAYERS * TOP_K * int(options.tokens)


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


TASKS: dict[str, Callable[[str], None]] = {
    "read the rank columns": lambda store: run.read_columns(run.parts_of(Path(store)), TOP_K),
    "one pass": lambda store: one_pass(store, intervals=False),
    "one pass with intervals": lambda store: one_pass(store, intervals=True),
    "expert caches, LRU, every size": peers.lru_caches,
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


def sliced(options: argparse.Namespace, name: str, block: list[np.ndarray], requests: int, tokens: int) -> Path:
    """Ingest so many requests, cut to so many tokens, into a store of that name; return it."""
    folder: Path = options.build / f"scale-slice-{name}"
    write([ids[:tokens] for ids in block], requests, folder)
    store = folder.with_name(f"{folder.name}-store")
    run.ingest(folder, store, EXPERTS)
    shutil.rmtree(folder)
    return store


def rival_tasks(options: argparse.Namespace, block: list[np.ndarray]) -> Tasks:
    """Return the library's pass, reading alone and what people write instead, whose answers have been compared."""
    import duckdb

    few = sliced(options, "few", block, FEW, options.tokens)
    many = sliced(options, "many", block, SLICE, options.tokens)
    parts, con, variant = run.parts_of(many), duckdb.connect(), next(iter(rivals.SQL_VARIANTS))
    arguments = EXPERTS, TOP_K, run.MAX_WINDOW, run.MAX_LAG
    long, short = SLICE * ids_of(options), FEW * ids_of(options)
    answers: dict[str, tuple[Path, int, Callable[[], rivals.Answer]]] = {
        "DuckDB SQL, bit masks": (
            many,
            long,
            lambda: rivals.duckdb_sql(con, parts, list(range(LAYERS)), *arguments, variant),
        ),
        "Polars, bit masks": (many, long, lambda: rivals.polars_masks(parts, *arguments)),
        "plain Python sets": (
            few,
            short,
            lambda: rivals.python_sets(block[:FEW], EXPERTS, run.MAX_WINDOW, run.MAX_LAG),
        ),
    }
    expected = {store: run.answer_of(store, EXPERTS) for store in (few, many)}
    for name, (store, _, function) in answers.items():
        run.check(name, function(), expected[store])
    return {
        LIBRARY: (long, lambda: one_pass(str(many), intervals=False)),
        "reading alone": (long, lambda: run.read_columns(parts, TOP_K)),
        **{name: (ids, function) for name, (_, ids, function) in answers.items()},
    }


def peer_tasks(options: argparse.Namespace, block: list[np.ndarray]) -> Tasks:
    """Return the scripts of each peer and, as ``OURS``, the library's pass; their answers have been compared."""
    tasks: Tasks = {}
    for number, peer in enumerate(peers.PEERS if options.peers else []):
        commands = peer.commands(options.peers)
        if commands is None:
            run.progress(f"left out, as {options.peers} has no {peer.repository}: {peer.title}")
            continue
        requests, tokens = peer.slice[0], min(peer.slice[1], options.tokens)
        store = sliced(options, f"peer-{number}", block, requests, tokens)
        folder = options.build / f"scale-peer-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        peer.write([ids[:tokens] for ids in block[:requests]], EXPERTS, folder)
        find, measure = partial(peer.find, commands, folder), partial(peer.measure, str(store))
        try:
            found, expected = find(), peer.expected(str(store))
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            run.progress(f"left out, as it fails with {said[-1]!r}: {peer.title}")
            continue
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=0, atol=peer.tolerance):
            raise SystemExit(f"{peer.title}: {found}, and the library finds {expected}")
        ids = requests * tokens * LAYERS * TOP_K
        tasks |= {peer.title: (ids, find), OURS + peer.title: (ids, measure)}
    return tasks


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
    request = ids_of(options)
    wanted = sorted({max(FEW, round(size / request)) for size in options.sizes})
    if len(wanted) < 3:
        raise SystemExit(f"--sizes: a slope and its error take three sizes or more, and a request has {request:,} ids")
    need = 2.4 * wanted[-1] * request + (1 << 30)
    if shutil.disk_usage(build).free < need:
        raise SystemExit(f"{build} has less than {need / 1e9:.0f} GB free")
    tokens = options.tokens
    made = tk.synth("topical", num_experts=EXPERTS, top_k=TOP_K, layers=LAYERS, requests=SLICE, tokens=tokens, seed=1)
    block = [request.ids for request in made.requests()]

    run.progress("rivals")
    times = run.timed(options.repeats, rival_tasks(options, block) | peer_tasks(options, block))
    warm = None
    measured: dict[str, list[dict[str, Any]]] = {}
    for requests in wanted:
        run.progress(shown(requests * request))
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
    print(render(options, [requests * request for requests in wanted], measured, times))


def render(
    options: argparse.Namespace,
    ids: list[int],
    measured: dict[str, list[dict[str, Any]]],
    times: dict[str, run.Timing],
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
    scripts = [name for name in times if OURS + name in times]
    lines += ["", "| on a slice | M IDs | M IDs/s | time per id, the library's pass = 1 |", "|---|---:|---:|---:|"]
    for name, timing in times.items():
        if name not in scripts and not name.startswith(OURS):
            lines.append(f"| {name} | {size_and_rate(timing)} | {timing.slower_than(times[LIBRARY]):,.2f} |")
    if scripts:
        lines += ["", "| script of a peer | M IDs | M IDs/s | the library's M IDs/s | times as fast |"]
        lines.append("|---|---:|---:|---:|---:|")
    for name in scripts:
        ours = times[OURS + name]
        ratio = f"{ours.rate:,.3g} | {times[name].slower_than(ours):,.0f}"
        lines.append(f"| {name} | {size_and_rate(times[name])} | {ratio} |")
    return "\n".join(lines)


def size_and_rate(timing: run.Timing) -> str:
    return f"{timing.ids / 1e6:,.2f} | {timing.rate:,.3g}"


def checkouts() -> str:
    """Return where the scripts of the peers are to be had."""
    found = sorted({(peer.repository, peer.commit) for peer in peers.PEERS})
    return "; ".join(f"github.com/{repository} (at {commit[:10]})" for repository, commit in found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "10e6,40e6,160e6,640e6"
    parser.add_argument("--sizes", default=sizes, help=f"ids of the traces (default {sizes})")
    parser.add_argument("--largest", type=float, help="measure this many ids, and half as many, as well")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of a request, 20 or more (default 500)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, metavar="DIR", help=f"a folder of checkouts: {checkouts()}")
    parser.add_argument("--build", type=Path, default=run.HERE.parent / "build" / "bench")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = [float(size) for size in options.sizes.split(",")]
    if options.largest:
        options.sizes += [options.largest / 2, options.largest]
    if options.tokens < 20:
        parser.error("--tokens: overlaps at 16 tokens and segments of 16 take requests of 20 or more")
    return options


if __name__ == "__main__":
    main()
