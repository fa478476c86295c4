"""Run notebooks from top to bottom and write them with their outputs, as they are committed.

    python notebooks/run.py             # all of them
    python notebooks/run.py tour sql

What changes from run to run (times, names of temporary folders) is left out, and pictures are packed tightly.
"""

from __future__ import annotations

import base64
import re
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"{path.stem}-{number:02d}", {}
        for output in cell.get("outputs", []):
            tidy(output)
    folder = re.escape(tempfile.gettempdir()) + r"/tmp\w+"
    path.write_text(re.sub(folder, "/tmp", nbformat.writes(notebook)) + "\n", encoding="utf-8")


def tidy(output: Any) -> None:
    if "metadata" in output:
        output.metadata = {}
    data = output.get("data", {})
    if "image/png" in data:
        data["image/png"] = base64.b64encode(packed(base64.b64decode(data["image/png"]))).decode()


def packed(png: bytes) -> bytes:
    """Return the same picture, compressed as far as zlib goes: a quarter of what the renderer writes."""
    chunks, at = [], 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += size + 12
    pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    header = next(data for kind, data in chunks if kind == b"IHDR")
    kept = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    return png[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in kept
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(p.stem for p in HERE.glob("*.ipynb")):
        run(HERE / f"{name}.ipynb")
        print(f"{name}.ipynb: {(HERE / f'{name}.ipynb').stat().st_size / 1000:,.0f} kB")
