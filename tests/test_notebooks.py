"""The notebooks run from top to bottom, and what is committed shows their results."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = ("tour", "sql")


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
    assert notebook.stat().st_size < 400_000


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
