"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).resolve().parent.parent

# Compilation of a kernel inside an example would trip a deadline; few examples keep the suite short
# and deterministic ones keep it reproducible. HYPOTHESIS_PROFILE=thorough looks harder.
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Root of the checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real traces, which are not part of the project; tests that need it are skipped without it."""
    given = os.environ.get("TRACEKIT_SHARED")
    path = Path(given) if given else CHECKOUT.parent / "shared"
    if not (path / "traces").is_dir():
        pytest.skip(f"no real traces at {path}: set TRACEKIT_SHARED to the folder that holds traces/ and moe/")
    return path
