"""The same sums without tracekit: plain Python sets, DuckDB SQL, and Polars.

Each takes decode-only requests whose positions have no holes, and returns means over layers: unique experts for
windows of 1..T tokens, overlap (as a share of k) for lags 1..D, and the uses of each expert at each layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from operator import add, or_
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Answer:
    unique: list[float]
    overlap: list[float]
    counts: np.ndarray
    """``[layers, N]``"""


def python_sets(requests: list[np.ndarray], num_experts: int, max_window: int, max_lag: int) -> Answer:
    """Python sets over arrays ``[tokens, layers, k]``, as people write it."""
    top_k, layers = requests[0].shape[2], requests[0].shape[1]
    union, windows = [0] * max_window, [0] * max_window
    shared, pairs = [0] * max_lag, [0] * max_lag
    counts: list[Counter[int]] = [Counter() for _ in range(layers)]
    for ids in requests:
        tokens = len(ids)
        for layer in range(layers):
            sets = [set(row) for row in ids[:, layer].tolist()]
            for start in range(tokens):
                counts[layer].update(sets[start])
                seen = set()
                for i in range(min(max_window, tokens - start)):
                    seen |= sets[start + i]
                    union[i] += len(seen)
                    windows[i] += 1
                for lag in range(1, min(max_lag, tokens - start - 1) + 1):
                    shared[lag - 1] += len(sets[start] & sets[start + lag])
                    pairs[lag - 1] += 1
    return Answer(
        [u / w for u, w in zip(union, windows, strict=True)],
        [s / p / top_k for s, p in zip(shared, pairs, strict=True)],
        np.array([[c[e] for e in range(num_experts)] for c in counts]),
    )


def _files(parts: list[Path]) -> str:
    return "read_parquet([" + ", ".join(f"'{p.as_posix()}'" for p in parts) + "])"


def _words(kind: str, num_experts: int, top_k: int) -> list[str]:
    """SQL expressions of the words of a bit mask of a row's experts."""
    if kind == "BIT":
        bits = (f"set_bit(bitstring('0', {num_experts}), e{r}::INTEGER, 1)" for r in range(top_k))
        return ["(" + " | ".join(bits) + ")"]
    width = {"UBIGINT": 64, "HUGEINT": 128}[kind]
    words = []
    for word in range(-(-num_experts // width)):
        ranks = []
        for r in range(top_k):
            place = f"e{r} & {width - 1}"
            case = f"WHEN e{r} >> {width.bit_length() - 1} <> {word} THEN 0::{kind}"
            if kind == "HUGEINT":  # signed: its top bit cannot be reached by a shift
                case += f" WHEN {place} = 127 THEN (-170141183460469231731687303715884105728)::HUGEINT"
            ranks.append(f"CASE {case} ELSE 1::{kind} << ({place})::{kind} END")
        words.append("(" + " | ".join(ranks) + ")")
    return words


def masks_sql(
    parts: list[Path], num_experts: int, top_k: int, max_window: int, max_lag: int, *, kind: str, streaming: bool
) -> str:
    """Windows and overlaps by bit masks and ``lead``.

    ``streaming`` leaves out PARTITION BY and ORDER BY, which spares the sort: the store's rows are in order, and a
    window or pair counts only where the row it ends in belongs to the same request and layer.
    """
    words = range(len(_words(kind, num_experts, top_k)))
    over = "()" if streaming else "(PARTITION BY request, layer ORDER BY pos)"
    reach = max(max_window - 1, max_lag)
    masks = ", ".join(f"{sql} AS m{i}_0" for i, sql in enumerate(_words(kind, num_experts, top_k)))
    run = "((request::BIGINT << 16) + layer << 32) + pos AS r0, " if streaming else ""
    leads = [f"lead(m{i}_0, {d}) OVER w AS m{i}_{d}" for d in range(1, reach + 1) for i in words]
    if streaming:
        leads += [f"lead(r0, {d}) OVER w AS r{d}" for d in range(1, reach + 1)]
    steps = [
        f"masks AS (SELECT request, layer, pos, {run}{masks} FROM {_files(parts)})",
        f"leads AS (SELECT *, {', '.join(leads)} FROM masks WINDOW w AS {over})",
    ]
    last = "leads"
    for t in range(2, max_window + 1):
        before = "m{i}_0" if t == 2 else f"u{{i}}_{t - 1}"
        unions = ", ".join(f"{before.format(i=i)} | m{i}_{t - 1} AS u{i}_{t}" for i in words)
        steps.append(f"union{t} AS (SELECT *, {unions} FROM {last})")
        last = f"union{t}"

    def mean(terms: list[str], d: int) -> str:
        total = " + ".join(f"bit_count({t})" for t in terms)
        if streaming and d:
            return f"sum({total}) FILTER (r{d} = r0 + {d}) / count(*) FILTER (r{d} = r0 + {d})"
        return f"sum({total}) / count(m0_{d})"

    columns = [mean([f"m{i}_0" for i in words], 0)]
    columns += [mean([f"u{i}_{t}" for i in words], t - 1) for t in range(2, max_window + 1)]
    columns += [mean([f"m{i}_0 & m{i}_{d}" for i in words], d) + f" / {top_k}" for d in range(1, max_lag + 1)]
    return f"WITH {', '.join(steps)} SELECT {', '.join(columns)} FROM {last}"


def counts_sql(parts: list[Path], top_k: int) -> str:
    ranks = " UNION ALL ".join(f"SELECT layer, e{r} AS expert FROM {_files(parts)}" for r in range(top_k))
    return f"SELECT layer, expert, count(*) FROM ({ranks}) GROUP BY layer, expert"


SQL_VARIANTS: dict[str, tuple[str, bool]] = {
    "HUGEINT masks, lead over partitions": ("HUGEINT", False),
    "UBIGINT masks, lead over partitions": ("UBIGINT", False),
    "HUGEINT masks, streaming lead": ("HUGEINT", True),
    "BIT masks, lead over partitions": ("BIT", False),
}


def duckdb_sql(
    con: duckdb.DuckDBPyConnection,
    parts: list[Path],
    layers: list[int],
    num_experts: int,
    top_k: int,
    max_window: int,
    max_lag: int,
    variant: str,
) -> Answer:
    """DuckDB over a store's part files."""
    kind, streaming = SQL_VARIANTS[variant]
    sql = masks_sql(parts, num_experts, top_k, max_window, max_lag, kind=kind, streaming=streaming)
    row = con.execute(sql).fetchall()[0]
    counts = np.zeros((len(layers), num_experts), dtype=np.int64)
    for layer, expert, n in con.execute(counts_sql(parts, top_k)).fetchall():
        counts[layers.index(layer), expert] = n
    return Answer([float(v) for v in row[:max_window]], [float(v) for v in row[max_window:]], counts)


def polars_masks(parts: list[Path], num_experts: int, top_k: int, max_window: int, max_lag: int) -> Answer:
    """Polars over a store's part files: bit masks of 64 experts a word, looked up in tables, and shifted columns.

    As in the streaming SQL, the rows are in order already: a window or pair counts where the row it ends in belongs to
    the same request and layer.
    """
    import polars as pl

    words = range(-(-num_experts // 64))
    bits = np.zeros((len(words), num_experts), np.uint64)
    experts = np.arange(num_experts)
    bits[experts // 64, experts] = np.uint64(1) << (experts % 64).astype(np.uint64)
    tables = [pl.lit(pl.Series(row)) for row in bits]
    ranks = [f"e{r}" for r in range(top_k)]
    run = pl.col("request").cast(pl.UInt64) * 65536 + pl.col("layer")
    masks = [reduce(or_, [tables[i].gather(pl.col(e)) for e in ranks]).alias(f"m{i}") for i in words]
    frame = pl.scan_parquet(parts).select(run.alias("run"), "layer", *ranks, *masks)

    def ones(columns: list[pl.Expr]) -> pl.Expr:
        return reduce(add, [column.bitwise_count_ones().cast(pl.Int64) for column in columns])

    def later(column: str, d: int) -> pl.Expr:
        return pl.col(column).shift(-d)

    means = []
    union = [pl.col(f"m{i}") for i in words]
    for t in range(1, max_window + 1):
        union = union if t == 1 else [union[i] | later(f"m{i}", t - 1) for i in words]
        means.append(ones(union).filter(later("run", t - 1) == pl.col("run")).mean().alias(f"window {t}"))
    for d in range(1, max_lag + 1):
        shared = ones([pl.col(f"m{i}") & later(f"m{i}", d) for i in words])
        means.append((shared.filter(later("run", d) == pl.col("run")).mean() / top_k).alias(f"lag {d}"))
    uses = frame.select("layer", *ranks).unpivot(ranks, index="layer").group_by("layer", "value").len()
    row, counted = pl.collect_all([frame.select(means), uses])
    table = counted.pivot("layer", index="value", values="len").sort("value")
    counts = np.zeros((table.width - 1, num_experts), np.int64)
    layers = sorted(table.columns[1:], key=int)
    counts[:, table["value"].to_numpy()] = table.select(layers).fill_null(0).to_numpy().T
    values = row.row(0)
    return Answer(list(values[:max_window]), list(values[max_window:]), counts)
