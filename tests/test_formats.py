"""The verb ``formats``, how formats are detected, and folders that are one source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import SourceError
from tracekit.sources import READERS, IngestOptions, RawRequest, Reader, detect, open_source


def test_every_reader_is_listed_with_a_line_that_shows_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    frame = tk.formats()
    assert frame.columns == ["format", "title", "example"]
    assert frame["format"].to_list() == list(READERS)
    assert frame["format"].is_unique().all()
    for title, example in zip(frame["title"], frame["example"], strict=True):
        assert title
        assert example
        assert "\n" not in title + example
    assert main(["formats"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    for name in READERS:
        assert f"\n{name}\n" in f"\n{table}"
    assert main(["formats", "--format", "json"]) == 0
    assert [row["format"] for row in json.loads(capsys.readouterr().out)] == list(READERS)


def test_the_table_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "formats.csv"
    assert main(["formats", "-o", str(path)]) == 0
    assert path.read_text().startswith("format,title,example\n")
    assert main(["formats", "-o", str(path)]) == 2
    assert "--force" in capsys.readouterr().err


def test_names_of_formats_are_what_the_option_takes() -> None:
    assert all(re.fullmatch("[a-z][a-z0-9_-]*", name) for name in READERS)


def test_an_unknown_file_points_to_the_list(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x00\x01 nothing")
    with pytest.raises(SourceError, match="tracekit formats"):
        detect(tmp_path / "x.bin")


# Folders that are one source


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A format that is a folder: a marker, and ids in a file that no reader would take by itself."""

    def read(path, options):  # type: ignore[no-untyped-def]
        ids = np.frombuffer((path / "ids.bin").read_bytes(), np.uint8).reshape(-1, 2, 2)
        for part in range(2):
            size = sum(file.stat().st_size for file in path.iterdir())
            yield RawRequest(str(path), ids, part=str(part), axes="tlk", consumed=size * (part + 1) // 2)

    def files(path: Path) -> list[Path]:
        return [path / "ids.bin", path / "marker"] if (path / "marker").is_file() else []

    reader = Reader("whole", "", "", lambda *_: False, read, files)
    monkeypatch.setitem(READERS, "whole", reader)
    return reader


def make(folder: Path) -> Path:
    folder.mkdir()
    (folder / "marker").write_text("m")
    (folder / "ids.bin").write_bytes(bytes([1, 2, 3, 0] * 5))
    return folder


def test_a_folder_as_a_whole_is_one_source(tmp_path: Path, whole: Reader) -> None:
    source = open_source([make(tmp_path / "run.v1")], IngestOptions(num_experts=4))
    assert source.total_bytes == 21
    assert [request.request_id for request in source.requests()] == ["run.v1/0", "run.v1/1"]
    assert source.done_bytes == 21
    assert source.meta.source_format == "whole"
    trace = tk.ingest(tmp_path / "run.v1", tmp_path / "S", num_experts=4)
    assert (trace.name, trace.requests, trace.tokens) == ("run.v1", 2, 10)


def test_several_folders_and_a_config_beside_them(tmp_path: Path, whole: Reader) -> None:
    folders = [make(tmp_path / name) for name in "ab"]
    config = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "model_type": "olmoe"}
    (folders[0] / "config.json").write_text(json.dumps(config))
    source = open_source(folders)
    assert not source.notes  # the config is no part of the trace, and used
    assert [request.request_id for request in source.requests()] == ["a/0", "a/1", "b/0", "b/1"]
    assert source.meta.model == "olmoe"


def test_a_format_that_was_asked_for_decides(tmp_path: Path, whole: Reader) -> None:
    folder = make(tmp_path / "a")
    np.save(folder / "ids.npy", np.array([1, 2, 3, 0] * 5, np.uint8).reshape(-1, 2, 2))
    source = open_source([folder], IngestOptions(num_experts=4, source_format="arrays", axes="tlk"))
    assert source.formats == {"arrays"}
    (folder / "marker").unlink()
    source = open_source([folder], IngestOptions(num_experts=4, axes="tlk"))
    assert source.formats == {"arrays"}
    with pytest.raises(SourceError, match="holds no file that a reader takes"):
        open_source([folder], IngestOptions(num_experts=4, source_format="whole"))


def test_a_folder_and_files_of_another_format_do_not_mix(tmp_path: Path, whole: Reader) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 2, 2), np.uint8))
    with pytest.raises(SourceError, match="several formats: arrays, whole"):
        open_source([make(tmp_path / "a"), tmp_path / "x.npy"], IngestOptions(num_experts=4))
