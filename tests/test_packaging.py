"""What a user installs: the wheel and the source distribution carry what they must and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], check=True, cwd=checkout, capture_output=True
    )
    return folder


def test_the_wheel_has_the_queries_the_types_and_the_licence(built: Path, checkout: Path) -> None:
    (wheel,) = built.glob("moe_tracekit-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    queries = {path.name for path in (checkout / "queries").glob("*.sql")}
    assert {f"tracekit/_queries/{name}" for name in queries} <= names
    assert "tracekit/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tracekit", "moe_tracekit"}


def test_the_source_distribution_builds_the_same(built: Path) -> None:
    (sdist,) = built.glob("moe_tracekit-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"queries/summary.sql", "tests/conftest.py", "Makefile", "LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_command_is_installed_under_its_name(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert project["name"] == "moe-tracekit"
    assert project["scripts"] == {"tracekit": "tracekit.cli:main"}


def test_every_import_of_the_package_is_declared(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    declared = {item.split(">")[0].replace("-python", "").replace("-", "_") for item in project["dependencies"]}
    imported: set[str] = set()
    for path in (checkout / "tracekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"tracekit"} <= declared
