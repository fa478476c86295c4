"""What is no trace at all, or no weights, is refused at once and in the user's own terms."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tracekit import sources
from tracekit.errors import SourceError
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.files import walk

IDS = np.argsort(np.random.default_rng(0).random((12, 2, 8)), axis=2)[..., :2].astype(np.uint8)
ADVICE = ("allow_pickle", "max_header_size", "set_int_max_str_digits", "sys.")


def refused(path: Path, **options: object) -> str:
    with pytest.raises(SourceError) as caught:
        list(open_source([path], IngestOptions(num_experts=8, axes="tlk", **options)).requests())  # type: ignore[arg-type]
    text = str(caught.value)
    assert not any(word in text for word in ADVICE)
    return text


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a device or a pipe; expected a file or a folder" in refused(tmp_path / "pipe.jsonl")
    assert "is a device or a pipe" in refused(Path("/dev/null"))
    assert "holds no file that a reader takes" in refused(tmp_path)
    np.savez(tmp_path / "trace.npz", expert_ids=IDS)
    assert len(list(open_source([tmp_path], IngestOptions(num_experts=8, axes="tlk")).requests())) == 1


def test_a_disk_is_not_searched_for_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LOOKED_AT", 3)
    looked_at = []
    monkeypatch.setattr(sources, "file_size", lambda path: looked_at.append(path) or 0)
    for i in range(10):
        (tmp_path / f"note-{i}.txt").write_text("nothing")
    assert "holds no file that a reader takes among its first 3" in refused(tmp_path)
    assert len(looked_at) == 3


def test_files_are_walked_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/1.npy", "a.npy", "a/2.npy", "a/10.npy", "a/b/c.npy", ".hidden/x.npy", "a/.x.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = list(walk(tmp_path))
    assert found == sorted(found)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "a/10.npy",
        "a/2.npy",
        "a/b/c.npy",
        "a.npy",
        "b/1.npy",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.25])
def test_weights_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    weights = np.full(IDS.shape, 0.5, np.float32)
    weights[7, 1, 0] = value
    np.savez(tmp_path / "trace.npz", expert_ids=IDS, router_weights=weights)
    text = refused(tmp_path / "trace.npz")
    assert f"token row 7, layer 1: router weight {value:g}; expected finite weights from 0 on" in text
    np.savez(tmp_path / "all.npz", expert_ids=IDS, router_weights=np.full(IDS.shape, value, np.float32))
    assert "token row 0, layer 0: router weight" in refused(tmp_path / "all.npz")


def test_a_long_header_is_refused_without_advice_to_unpickle(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (0,)," + b" " * 20_000 + b"}\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "has no readable npy header (Header info length" in refused(tmp_path / "x.npy")


@pytest.mark.parametrize("form", ["[{0}, {0}]", "{0}"])
def test_an_endless_number_is_refused_without_advice_to_programmers(form: str, tmp_path: Path) -> None:
    record = '{"choices": [], "id": ' + "1" * 5000 + "}"
    (tmp_path / "r.jsonl").write_text(form.format(record))
    assert "is not JSON (Exceeds the limit" in refused(tmp_path / "r.jsonl", source_format="vllm")
    (tmp_path / "config.json").write_text(record)
    with pytest.raises(SourceError, match="is not JSON") as caught:
        sources.load_config(tmp_path / "config.json")
    assert not any(word in str(caught.value) for word in ADVICE)
