"""Part files: every reader finds in them what was written, and the library maps their ids or has them decoded."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.errors import StoreError
from tracekit.schema import id_dtype
from tracekit.store import part as parts
from tracekit.store.part import PartRows, map_ids, write_part

KEYS = {"request": pl.UInt32, "layer": pl.UInt16, "pos": pl.UInt32, "decode": pl.Boolean}


def part_rows(lengths: list[int], num_experts: int, top_k: int, seed: int, *, weights: bool, top: int) -> PartRows:
    """Return rows with runs of these lengths, whose positions end below ``top``."""
    rng = np.random.default_rng(seed)
    n = np.array(lengths, np.int64)
    rows, dtype = int(n.sum()), id_dtype(num_experts)
    runs = {
        "request": np.sort(rng.integers(0, 3, len(n))) + 70_000,
        "layer": rng.integers(0, 300, len(n)),
        "pos": rng.integers(0, top - n + 1),
        "n": n,
    }
    known = np.repeat(rng.random(len(n)) < 0.7, n)
    ids = [rng.integers(0, num_experts, rows).astype(dtype) for _ in range(top_k)]
    shares = [rng.random(rows).astype(np.float32) for _ in range(top_k if weights else 0)]
    return PartRows(runs, rng.random(rows) < 0.5, known, ids, shares)


def frame_of(rows: PartRows) -> pl.DataFrame:
    """Return the rows as they should be read, put together row by row."""
    runs = list(zip(*(rows.runs[name].tolist() for name in ("request", "layer", "pos", "n")), strict=True))
    keys = [(request, layer, pos + i) for request, layer, pos, n in runs for i in range(n)]
    decode = [value if known else None for value, known in zip(rows.decode.tolist(), rows.known.tolist(), strict=True)]
    columns = dict(zip(KEYS, [*(list(column) for column in zip(*keys, strict=True)), decode], strict=True))
    frame = pl.DataFrame(columns, schema=KEYS)
    ranks = {f"e{r}": ids for r, ids in enumerate(rows.ids)} | {f"w{r}": w for r, w in enumerate(rows.weights)}
    return frame.with_columns(pl.Series(name, column) for name, column in ranks.items())


def by_duckdb(path: Path, schema: pl.Schema) -> pl.DataFrame:
    rows = duckdb.execute("FROM read_parquet(?)", [str(path)]).fetchall()
    return pl.DataFrame(rows, schema=schema, orient="row")


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    num_experts=st.sampled_from([2, 8, 32, 256, 257, 512]),
    top_k=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
    weights=st.booleans(),
    top=st.sampled_from([400, 40_000, 1 << 31, 1 << 32]),
)
def test_every_reader_finds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    num_experts: int,
    top_k: int,
    seed: int,
    weights: bool,
    top: int,
) -> None:
    path = tmp_path_factory.mktemp("part") / "part.parquet"
    rows = part_rows(lengths, num_experts, top_k, seed, weights=weights, top=top)
    write_part(path, rows, num_experts)
    expected = frame_of(rows)
    assert pl.read_parquet(path).equals(expected)
    assert pl.read_parquet(path).schema == expected.schema
    assert by_duckdb(path, expected.schema).equals(expected)
    mapped = map_ids(path, expected.height, num_experts, top_k)
    assert mapped is not None
    for rank, ids in enumerate(mapped):
        np.testing.assert_array_equal(ids, rows.ids[rank])


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 127, 128, 129, 130, 160, 161, 257, 5000])
@pytest.mark.parametrize("length", [1, 2, 32, 33, 128, 129, 5000])
def test_positions_are_right_wherever_runs_and_blocks_end(tmp_path: Path, n: int, length: int) -> None:
    lengths = [min(length, n - at) for at in range(0, n, length)]
    rows = part_rows(lengths, 8, 1, 0, weights=False, top=6000)
    write_part(tmp_path / "part.parquet", rows, 8)
    expected = frame_of(rows)
    assert pl.read_parquet(tmp_path / "part.parquet").equals(expected)
    assert by_duckdb(tmp_path / "part.parquet", expected.schema).equals(expected)


def test_a_part_without_rows_is_a_file_without_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    nothing = np.zeros(0, np.int64)
    runs = dict.fromkeys(("request", "layer", "pos", "n"), nothing)
    write_part(path, PartRows(runs, nothing.astype(bool), nothing.astype(bool), [nothing.astype(np.uint8)]), 8)
    assert pl.read_parquet(path).schema == {**KEYS, "e0": pl.UInt8}
    assert duckdb.execute("SELECT count(*) FROM read_parquet(?)", [str(path)]).fetchall() == [(0,)]
    assert map_ids(path, 0, 8, 1) is None


def test_the_metadata_says_where_everything_lies(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    rows = part_rows([500] * 20, 32, 3, 1, weights=True, top=4000)
    write_part(path, rows, 32)
    meta = duckdb.execute(
        """
        SELECT path_in_schema, num_values, compression, coalesce(dictionary_page_offset, data_page_offset) AS start,
            total_compressed_size AS stored, total_uncompressed_size AS plain
        FROM parquet_metadata(?) ORDER BY start
        """,
        [str(path)],
    ).fetchall()
    assert [name for name, *_ in meta] == ["e0", "e1", "e2", "request", "layer", "pos", "decode", "w0", "w1", "w2"]
    end = 4
    for name, values, codec, at, stored, plain in meta:
        assert values == 10_000
        assert codec == ("GZIP" if name in ("pos", "decode") else "UNCOMPRESSED")
        assert plain > stored if name == "pos" else plain == stored or name == "decode"
        assert 0 <= at - end < parts._ALIGNED if name[0] == "e" else at == end
        end = at + stored
    assert sum(plain for *_, plain in meta) < 10_000 * (3 + 3 * 4) + 20_000


def test_ids_are_mapped_read_only_and_at_whole_lines_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    rows = part_rows([100, 33], 512, 4, 2, weights=False, top=1000)
    write_part(path, rows, 512)
    mapped = map_ids(path, 133, 512, 4)
    assert mapped is not None
    for ids in mapped:
        assert not ids.flags.writeable
        assert ids.ctypes.data % 64 == 0
    path.unlink()  # as a replaced trace is
    np.testing.assert_array_equal(mapped[3], rows.ids[3])


def test_only_what_is_there_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    rows = part_rows([100, 33], 32, 4, 2, weights=False, top=1000)
    write_part(path, rows, 32)
    whole = path.read_bytes()
    assert map_ids(path, 132, 32, 4) is None
    assert map_ids(path, 133, 33, 4) is None
    assert map_ids(path, 133, 32, 5) is None
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert map_ids(path, 133, 32, 4) is None
    frame_of(rows).write_parquet(path)
    assert map_ids(path, 133, 32, 4) is None
    path.unlink()
    with pytest.raises(FileNotFoundError):
        map_ids(path, 133, 32, 4)


@pytest.fixture
def store(tmp_path: Path) -> tk.Store:
    for name, seed in (("first", 1), ("second", 2)):
        trace = tk.synth("sticky", num_experts=32, top_k=4, layers=3, requests=4, tokens=40, seed=seed)
        for path in trace.save_npy(tmp_path / name):
            path.rename(path.with_stem(f"{name}-{path.stem}"))
    options = {"name": "t", "num_experts": 32, "axes": "tlk", "phase": "decode", "router_order": True}
    tk.ingest([tmp_path / "first"], tmp_path / "store", **options)
    tk.ingest([tmp_path / "second"], tmp_path / "store", append=True, **options)
    return tk.open(tmp_path / "store")


def part_files(store: tk.Store) -> list[Path]:
    return [Path(store.path) / "segments" / s.id / "part-00000.parquet" for s in store.trace().segments]


def ids_of(store: tk.Store) -> np.ndarray:
    return np.concatenate([np.stack(part.columns) for part in store.columns(store.trace())], axis=1)


def test_parts_of_other_programs_are_decoded(store: tk.Store) -> None:
    expected = ids_of(store)
    for path in part_files(store)[:1]:  # one segment of an older tracekit, and one of this
        pl.read_parquet(path).write_parquet(path)
    np.testing.assert_array_equal(ids_of(store), expected)
    for path in part_files(store)[1:]:
        pl.read_parquet(path).write_parquet(path)
    np.testing.assert_array_equal(ids_of(store), expected)


def test_compaction_lays_out_the_parts_of_other_programs(store: tk.Store) -> None:
    expected, rows = ids_of(store), pl.concat([pl.read_parquet(path) for path in part_files(store)])
    for path in part_files(store):
        pl.read_parquet(path).write_parquet(path)
    tk.compact(store)
    (path,) = part_files(store)
    assert pl.read_parquet(path).equals(rows)
    mapped = map_ids(path, rows.height, 32, 4)
    assert mapped is not None
    np.testing.assert_array_equal(np.stack(mapped), expected)


def test_compaction_refuses_runs_that_do_not_make_up_the_rows(store: tk.Store) -> None:
    runs = part_files(store)[1].with_name("runs.parquet")
    pl.read_parquet(runs).with_columns(pl.col("n") - 1).write_parquet(runs)
    with pytest.raises(StoreError, match=r"runs\.parquet"):
        tk.compact(store)
    assert len(store.trace().segments) == 2


def test_one_flipped_bit_of_the_ids_is_noticed(store: tk.Store) -> None:
    path = part_files(store)[1]
    data = bytearray(path.read_bytes())
    mapped = map_ids(path, store.trace().segments[1].parts[0], 32, 4)
    assert mapped is not None
    data[data.index(mapped[2].tobytes()) + 77] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="its ids are not those that were written"):
        ids_of(store)
