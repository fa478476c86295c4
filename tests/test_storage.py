"""Stores at URLs: measured from object storage as from a disk, and never written to."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from storage import Storage, serving

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import StoreError, UnsupportedError, UsageError
from tracekit.schema import TraceMeta
from tracekit.store import location, write_trace

pytestmark = pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")


@pytest.fixture(scope="module")
def server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """A server of a bucket with a store, ``traces``, that the environment gives access to."""
    folder = tmp_path_factory.mktemp("storage")
    for name, file in (("steps", "steps.parquet"), ("predicted", "trace.npz")):
        sample = checkout / "sample_traces" / f"olmoe-{name}"
        requests = sample / "requests.json" if name == "predicted" else None
        given: Any = {"config": sample / "config.json", "label_fields": ["domain"], "requests": requests}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tracekit.store.segment.PART_ROWS", 4000)
            tk.ingest(sample / file, folder / "bucket" / "traces", name=name, router_order=True, **given)
    with serving(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            patch.setenv(variable, "test")
        yield server


@pytest.fixture
def copy(server: Storage) -> Iterator[Path]:
    """The folder of a store of its own in the bucket; its name is new, so nothing is known of it."""
    bucket = server.folder / "bucket"
    with tempfile.TemporaryDirectory(dir=bucket) as folder:
        shutil.copytree(bucket / "traces", folder, dirs_exist_ok=True)
        yield Path(folder)


def url(folder: Path) -> str:
    return f"s3://bucket/{Path(folder).name}"


MEASURES: dict[str, Callable[[Any], pl.DataFrame]] = {
    "windows": lambda store: tk.windows(store, max_window=3, batch_size=[1, 2]),
    "autocorr": lambda store: tk.autocorr(store, by="layer"),
    "attribution": tk.attribution,
    "load": tk.load,
    "summary": tk.summary,
    "steps": lambda store: tk.steps(store, trace="steps"),
    "prefetch": lambda store: tk.prefetch(store, trace="predicted"),
    "cache": lambda store: tk.cache(store, trace="predicted", policy="lru"),
    "compare": lambda store: tk.compare(store, trace_a="steps", trace_b="predicted"),
    "check": tk.check,
    "query": lambda store: tk.query(store, "reduction_by_label"),
    "sql": lambda store: tk.open(store).sql("FROM requests ORDER BY ALL"),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_store_at_a_url_gives_what_it_gives_on_a_disk(
    server: Storage, scheme: str, measure: Callable[[Any], pl.DataFrame]
) -> None:
    there = measure("s3://bucket/traces/" if scheme == "s3" else f"{server.url}/bucket/traces")
    assert there.height or measure is tk.check
    assert_frame_equal(there, measure(server.folder / "bucket" / "traces"))
    assert {method for method, _ in server.asked} <= {"GET", "HEAD"}


@pytest.mark.parametrize("words", ["windows --trace predicted --format csv", "info", "check", "query chart_windows"])
def test_commands_take_a_url(server: Storage, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *options = words.split()
    code = main([verb, "s3://bucket/traces", *options])
    there = capsys.readouterr().out
    assert main([verb, str(server.folder / "bucket" / "traces"), *options]) == code == 0
    assert there == capsys.readouterr().out != ""


def test_weights_are_read_from_a_url(server: Storage, checkout: Path) -> None:
    sample = checkout / "sample_traces" / "olmoe-weights"
    folder = server.folder / "bucket" / "weights"
    tk.ingest(sample / "trace.npz", folder, requests=sample / "requests.json", config=sample / "config.json")
    assert_frame_equal(tk.budget(url(folder)), tk.budget(folder))


def test_counts_are_read_from_a_url(server: Storage, tmp_path: Path) -> None:
    rows = [f"{layer},{expert},{expert}" for layer in (0, 1) for expert in range(8)]
    (tmp_path / "counts.csv").write_text("\n".join(["layer_id,expert_id,count", *rows]))
    folder = server.folder / "bucket" / "counts"
    assert tk.ingest(tmp_path / "counts.csv", folder, top_k=2).meta.histogram
    assert_frame_equal(tk.load(url(folder)), tk.load(folder))


def test_what_was_measured_is_kept_for_this_process_and_not_at_the_url(server: Storage, copy: Path) -> None:
    held = sorted(copy.rglob("*"))
    first = tk.windows(url(copy), trace="predicted", max_window=2)
    assert [path for _, path in server.asked if "part-" in path]
    server.asked.clear()
    assert_frame_equal(tk.windows(url(copy), trace="predicted", max_window=2), first)
    assert server.asked
    assert not [path for _, path in server.asked if "part-" in path]
    assert sorted(copy.rglob("*")) == held


def test_a_store_that_is_replaced_is_read_anew(copy: Path, tmp_path: Path) -> None:
    store = tk.open(url(copy))
    assert [trace.name for trace in store.traces()] == ["steps", "predicted"]
    ids = np.arange(12).reshape(6, 1, 2) % 5
    np.savez(tmp_path / "more.npz", expert_ids=ids, request_lens=np.array([6]), num_experts=5)
    tk.ingest(tmp_path / "more.npz", copy, name="more", axes="tlk", phase="decode")
    assert [trace.name for trace in store.traces()] == ["steps", "predicted", "more"]
    assert tk.load(store, trace="more")["tokens"].to_list() == [6]


def test_views_of_rows_say_what_to_do_at_a_url(server: Storage) -> None:
    store = tk.open("s3://bucket/traces")
    for statement in ("SELECT count(*) FROM activations", 'SELECT * FROM (FROM "verification")'):
        with pytest.raises(UnsupportedError, match=r"(activations|verification) of a store at a URL.*Copy the store"):
            store.sql(statement)
    with pytest.raises(UnsupportedError, match=r"s3://bucket/traces.*Copy the store"):
        store.views()
    # A name in the statement itself is none of the views.
    assert store.sql("WITH tokens AS (SELECT 1 AS n) FROM tokens")["n"].to_list() == [1]
    with pytest.raises(UnsupportedError, match="Copy the store"):
        tk.query(store, "popularity_by_layer")


def part(folder: Path, trace: str, index: int) -> Path:
    info = tk.open(folder).trace(trace)
    return folder / "segments" / info.segments[0].id / f"part-{index:05d}.parquet"


@pytest.mark.parametrize("index", [0, 2])
def test_a_part_that_is_missing_is_named(copy: Path, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    missing = part(copy, "predicted", index)
    missing.unlink()
    name = f"{url(copy)}/{missing.relative_to(copy)}"
    with pytest.raises(StoreError, match="is not there") as caught:
        tk.windows(url(copy), trace="predicted")
    assert caught.value.where == name
    assert "copy it there again" in str(caught.value)
    assert main(["info", url(copy)]) == 1
    assert name in capsys.readouterr().err


def test_a_part_that_is_not_what_was_written_is_named(copy: Path) -> None:
    changed = part(copy, "predicted", 1)
    frame = pl.read_parquet(changed, memory_map=False)
    frame.with_columns(e0=pl.col("e0").reverse()).write_parquet(changed)
    with pytest.raises(StoreError, match="its ids are not those that were written") as caught:
        tk.load(url(copy), trace="predicted")
    assert caught.value.where == f"{url(copy)}/{changed.relative_to(copy)}"


def test_a_part_that_is_cut_short_is_named(copy: Path) -> None:
    short = part(copy, "predicted", 1)
    short.write_bytes(short.read_bytes()[:-100])
    with pytest.raises(StoreError) as caught:
        tk.load(url(copy), trace="predicted")
    assert caught.value.where == f"{url(copy)}/{short.relative_to(copy)}"


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("s3://bucket/nothing", r"is not a tracekit store \(it has no manifest.json\)\. .*AWS_ACCESS_KEY_ID"),
        ("s3://nobody/traces", r"there is no such bucket|has no manifest.json"),
        ("s3://locked/traces", r"cannot be read \(access is denied\).*AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_what_cannot_be_reached_is_a_clear_error(server: Storage, where: str, found: str) -> None:
    with pytest.raises(StoreError, match=found) as caught:
        tk.open(where)
    assert caught.value.where == where
    assert "<Error>" not in str(caught.value)


def test_hugging_face_is_asked_without_the_options_of_buckets(server: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):  # which refuses, so nothing leaves this machine
        monkeypatch.setenv(name, server.url)
    with pytest.raises(
        StoreError, match=r"datasets/owner/name/traces: cannot be read \(.*error sending request.*HF_TOKEN"
    ):
        tk.open("hf://datasets/owner/name/traces")


def test_a_server_that_says_nothing_is_not_waited_for(server: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_PATIENCE", {**location._PATIENCE, "read_timeout": "100ms", "max_retries": 0})
    with pytest.raises(StoreError, match=r"s3://mute/traces: cannot be read.*timed out"):
        tk.open("s3://mute/traces")


def test_a_manifest_of_something_else_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(StoreError, match="cannot be read"):
        tk.open(url(copy))
    (copy / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(StoreError, match="not the manifest of a tracekit store"):
        tk.open(url(copy))


def test_nothing_writes_to_a_url(
    server: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("t.npz", expert_ids=np.zeros((2, 1, 1), int), num_experts=4)
    readonly = r"s3://bucket/traces: a store at a URL can be read only\. .*copy its folder there"
    for write in (
        lambda to: tk.ingest("t.npz", to, append=True),
        lambda to: tk.compact(to),
        lambda to: tk.compact(tk.open(to)),
        lambda to: write_trace(to, "t", TraceMeta(4, 1, (0,), "t"), []),
    ):
        with pytest.raises(StoreError, match=readonly):
            write("s3://bucket/traces")
    server.asked.clear()
    assert main(["ingest", "t.npz", "--store", "s3://bucket/traces"]) == 1
    assert "read only" in capsys.readouterr().err
    assert not server.asked
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("where", ["ftp://host/traces", "gcs://bucket/traces", "file:///traces", "s3://", "s3:///"])
def test_urls_that_nothing_reads_are_refused(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"begins with s3://, .*hf://"):
        tk.open(where)
    assert main(["windows", where]) == 2
    assert where in capsys.readouterr().err


def test_only_what_has_a_scheme_is_a_url() -> None:
    for path in ("traces", "C:/traces", r"C:\traces", "s3:/bucket", "./s3://bucket", Path("s3://bucket")):
        assert location.location(path) == Path(path)
    there = location.location("hf://datasets/owner/name/store/")
    assert isinstance(there, location.Url)
    assert (there / "manifest.json", there.name) == ("hf://datasets/owner/name/store/manifest.json", "store")
