"""The notebooks run from top to bottom, and what is committed shows their results."""

from __future__ import annotations

import os
import re
import runpy
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = ("tour", "correlation", "speculation", "offloading", "own-trace", "sql")


@pytest.fixture(params=NOTEBOOKS)
def notebook(request: pytest.FixtureRequest, checkout: Path) -> Path:
    return checkout / "notebooks" / f"{request.param}.ipynb"


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def test_there_is_no_other_notebook(checkout: Path) -> None:
    assert {p.stem for p in (checkout / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


def test_committed_outputs(notebook: Path) -> None:
    code = [cell for cell in read(notebook).cells if cell.cell_type == "code"]
    assert all(cell.execution_count == i for i, cell in enumerate(code, start=1)), "not run from top to bottom"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook.stat().st_size < 300_000, "write it with notebooks/run.py"
    assert not re.search(r"/(home|root|work|Users)/", notebook.read_text(encoding="utf-8"))


def test_links_lead_somewhere(notebook: Path) -> None:
    text = "\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (notebook.parent / target).exists(), target


def test_the_readme_names_it(notebook: Path, checkout: Path) -> None:
    assert f"(notebooks/{notebook.name})" in (checkout / "README.md").read_text(encoding="utf-8")


def test_a_picture_is_packed_without_loss(checkout: Path) -> None:
    packed = runpy.run_path(str(checkout / "notebooks" / "run.py"))["packed"]
    row = b"\x00" + b"\x10\x20\x30" * 8
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 4, 8, 2, 0, 0, 0)), (b"tEXt", b"a\x00b")]
    stream = zlib.compress(row * 4, 0)
    chunks += [(b"IDAT", stream[:20]), (b"IDAT", stream[20:]), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )
    small = packed(png)
    assert len(small) < len(png)
    assert small[:33] == png[:33]  # signature and header
    size, kind = struct.unpack_from(">I4s", small, 33)
    assert kind == b"IDAT"
    assert zlib.decompress(small[41 : 41 + size]) == row * 4
    assert struct.unpack_from(">I", small, 41 + size)[0] == zlib.crc32(small[37 : 41 + size])
    assert small[45 + size :] == png[-12:]


@pytest.mark.slow
def test_runs(notebook: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own
        from nbclient import NotebookClient

        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")]))
        client = NotebookClient(
            read(notebook), timeout=120, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}
        )
        client.execute()
