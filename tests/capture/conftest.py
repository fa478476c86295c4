"""Tests that run models: they need torch and have an environment of their own, ``make test-capture``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("torch") and find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="session")
def models(shared: Path) -> Path:
    """Folder of the small trained models."""
    path = shared / "moe" / "models"
    if not path.is_dir():
        pytest.skip(f"no small models at {path}")
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other cost small models more than they give."""
    import torch

    torch.set_num_threads(1)
