"""Analysis scripts of other projects, run as they are from checkouts of them on the trace in their own formats.

A script that needs packages (PyTorch, pandas) runs in the environment ``.venv`` of its checkout, where there is one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import run

import tracekit as tk
from tracekit.analysis.passes import PASSES
from tracekit.metrics.cache_spec import CacheSpec
from tracekit.metrics.locality import LocalitySpec
from tracekit.metrics.state import Spec


@dataclass(frozen=True)
class Peer:
    """Scripts of one project, run one after the other, and the library's answer to the same question."""

    title: str
    repository: str
    """``owner/name`` on GitHub; ``name`` is the folder of its checkout."""
    commit: str
    """Where it was found to run as it is run here."""
    scripts: tuple[str, ...]
    slice: tuple[int, int]
    """As many requests, and tokens of each, as it can stand."""
    write: Callable[[list[np.ndarray], int, Path], None]
    """Write requests ``[tokens, layers, k]`` of so many experts into a folder, in the format of the scripts."""
    find: Callable[[list[list[str]], Path], list[float]]
    """Run the scripts, of which it gets the commands, on that folder; return what they found."""
    measure: Callable[[str], object]
    """The library's pass over a store of the same requests."""
    expected: Callable[[str], list[float]]
    """What the library finds in it."""
    tolerance: float
    """How far the two may lie apart: what the scripts round away."""

    def commands(self, checkouts: Path) -> list[list[str]] | None:
        """Return the commands of the scripts, or None where a folder neither holds nor is a checkout."""
        for checkout in (checkouts / self.repository.split("/")[1], checkouts):
            scripts = [checkout.absolute() / script for script in self.scripts]
            if all(script.is_file() for script in scripts):
                own = checkout.absolute() / ".venv" / "bin" / "python"
                return [[str(own) if own.is_file() else sys.executable, str(script)] for script in scripts]
        return None


def printed(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return what it prints."""
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def read(store: str, name: str, spec: Spec) -> None:
    """Run one of the library's passes without saving what it finds."""
    opened = tk.open(store)
    info = opened.trace()
    PASSES[name](opened, info, opened.requests(info), spec)


# --- BigMoeOnEdge: a route trace of each request -----------------------------------------------

LAGS = (1, 2, 4, 8)
"""Lags of ``--view overlap``."""
ROOM = 64
"""Experts per layer of the caches."""


def write_routes(requests: list[np.ndarray], experts: int, folder: Path) -> None:
    """Write what ``--route-trace`` would, with experts of 1 MiB."""
    for number, ids in enumerate(requests):
        _, layers, top_k = ids.shape
        with (folder / f"{number}.csv").open("w") as file:
            file.write("# route_trace v1\n")
            file.write(f"# model=bench arch=bench n_layer={layers} n_expert={experts} n_expert_used={top_k}\n")
            file.writelines(f"# layer={layer} expert_bytes={1 << 20} dense_bytes=0\n" for layer in range(layers))
            file.write("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n")
            file.writelines(
                f"0,1,{step},{layer},{slot},{expert},nan,0,0\n" for (step, layer, slot), expert in np.ndenumerate(ids)
            )


def overlaps(commands: list[list[str]], folder: Path) -> list[float]:
    """Return the overlaps at ``LAGS`` that ``route-analyze.py`` finds: means over the requests."""
    found = []
    for trace in sorted(folder.glob("*.csv")):
        [line] = re.findall("^ *ALL.*", printed([*commands[0], str(trace), "--view", "overlap"], folder), re.MULTILINE)
        found.append([float(percent) / 100 for percent in re.findall(r"([\d.]+)%", line)])
    means: list[float] = np.mean(found, axis=0).tolist()
    return means


def our_overlaps(store: str) -> list[float]:
    values = run.library(store, intervals=False).autocorr()["overlap"].to_list()
    return [values[lag - 1] for lag in LAGS]


def hit_rates(commands: list[list[str]], folder: Path) -> list[float]:
    """Return the hit rate that ``route-replay.py`` finds, of an LRU cache per layer: the mean over the requests."""
    found = []
    for trace in sorted(folder.glob("*.csv")):
        curve, mib = trace.with_suffix(".curve"), ROOM * trace.read_text().count(" expert_bytes=")
        printed([*commands[0], str(trace), "--policies", "layer", "--budgets", str(mib), "--csv", str(curve)], folder)
        found.append(float(curve.read_text().splitlines()[1].split(",")[3]) / 100)
    return [float(np.mean(found))]


def lru_caches(store: str) -> None:
    """Replay LRU caches of every size, as ``tracekit cache --policy lru`` does."""
    read(store, "caches", CacheSpec("decode", intervals=False, policies=("lru",), capacities=(ROOM,)))


def our_hit_rates(store: str) -> list[float]:
    frame = tk.cache(store, policy="lru", capacity=ROOM, start="cold", intervals=False)
    return [float(x) for x in frame["hit_rate"]]


# --- moe-lrc: ranks of all experts, and a model described in its own configuration files -------

SEGMENTS = (4, 16)
"""Lengths of segments: powers of two."""


def write_ranks(requests: list[np.ndarray], experts: int, folder: Path) -> None:
    """Write what steps 0 and 1 would: for each layer the ranks of the experts, the best with the highest."""
    ids = np.stack(requests).astype(np.int64)
    n, tokens, layers, top_k = ids.shape
    model = {"key": "bench", "type": "causal", "num_layers": layers, "num_experts": experts, "top_k": top_k}
    settings = {"seg_lengths": SEGMENTS, "num_bootstrap": 40, "ci_confidence": 0.95}
    for name in ("src", "model", "data", "output/rank"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model" / "config.jsonl").write_text(json.dumps(model))
    (folder / "data" / "config.jsonl").write_text(json.dumps({"key": "bench"}))
    about = {"dtype": "U8", "shape": [n, tokens, experts], "data_offsets": [0, n * tokens * experts]}
    header = json.dumps({"bench": about}).encode()
    best = experts - 1 - np.arange(top_k)  # the others are below them, and more is not asked of the others
    for layer in range(layers):
        ranks = np.zeros((n, tokens, experts), np.uint8)
        np.put_along_axis(ranks, ids[:, :, layer], best[None, None], axis=2)
        with (folder / "output" / "rank" / f"bench_{layer:02d}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + ranks.tobytes())


def best_performance(commands: list[list[str]], folder: Path) -> list[float]:
    """Return SRP of ``SEGMENTS`` as steps 30 and 31 find it."""
    import polars as pl

    for command in commands:
        printed([*command, "bench"], folder / "src")
    values: list[float] = (
        pl.read_parquet(folder / "output" / "srp_pq" / "bench_mg.parquet").sort("seg_len")["best_f1"].to_list()
    )
    return values


def segments(store: str) -> None:
    """Measure local routing consistency, as ``tracekit locality --segment 4,16`` does with one size of the cache."""
    spec = LocalitySpec("decode", intervals=False, lengths=SEGMENTS, capacities=(ROOM,), max_window=max(SEGMENTS))
    read(store, "locality", spec)


def our_performance(store: str) -> list[float]:
    frame = tk.locality(store, segment=SEGMENTS, cache_ratio=1, intervals=False)
    return [float(x) for x in frame.sort("segment")["srp"]]


EDGE = partial(
    Peer, repository="Helldez/BigMoeOnEdge", commit="2d4f2b11db128cbe32da738ce114c0479542f458", write=write_routes
)

PEERS = [
    EDGE(
        title="BigMoeOnEdge, `route-analyze.py --view overlap`: overlaps at 4 lags",
        scripts=("scripts/route-analyze.py",),
        slice=(2, 500),
        find=overlaps,
        measure=lambda store: run.library(store, intervals=False),
        expected=our_overlaps,
        tolerance=0.00051,
    ),
    EDGE(
        title="BigMoeOnEdge, `route-replay.py --policies layer`: LRU, one size",
        scripts=("scripts/route-replay.py",),
        slice=(1, 100),
        find=hit_rates,
        measure=lru_caches,
        expected=our_hit_rates,
        tolerance=0.0000051,
    ),
    Peer(
        title="moe-lrc, `30_srp_calc.py` and `31_srp_refine.py`: SRP(4) and SRP(16)",
        repository="ljcleo/moe-lrc",
        commit="7b3ca46688b4dffcf1f859d7bb966c698217928d",
        scripts=("src/30_srp_calc.py", "src/31_srp_refine.py"),
        slice=(40, 500),
        write=write_ranks,
        find=best_performance,
        measure=segments,
        expected=our_performance,
        tolerance=0.000001,
    ),
]
