"""What a user installs: the wheel and the source distribution carry what they must and nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import tracekit
from tracekit.cli.demo import SAMPLE


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], check=True, cwd=checkout, capture_output=True
    )
    return folder


def files(folder: Path) -> set[str]:
    """Return what belongs to the project in one of its folders, by name below it."""
    made = {"__pycache__", "generated", ".ipynb_checkpoints", ".hypothesis"}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not made & set(path.parts)}


def contents(wheel: Path) -> dict[str, int]:
    """Return the files of a wheel with their checksums."""
    return {item.filename: item.CRC for item in zipfile.ZipFile(wheel).infolist()}


def test_the_wheel_has_the_package_its_data_and_nothing_else(built: Path, checkout: Path) -> None:
    (wheel,) = built.glob("moe_tracekit-*.whl")
    about = {name for name in contents(wheel) if name.startswith("moe_tracekit-")}
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    sample = f"sample_traces/{SAMPLE}"
    assert contents(wheel).keys() - about == {
        *(f"tracekit/{name}" for name in files(checkout / "tracekit")),
        *(f"tracekit/_queries/{name}" for name in files(checkout / "queries")),
        *(f"tracekit/_{sample}/{name}" for name in files(checkout / sample)),
    }
    assert wheel.stat().st_size < 1_500_000


def test_the_source_distribution_has_all_that_is_tested_and_nothing_that_was_made(built: Path, checkout: Path) -> None:
    (sdist,) = built.glob("moe_tracekit-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {item.name.partition("/")[2] for item in archive.getmembers() if item.isfile()}
    folders = ("tracekit", "queries", "tests", "sample_traces", "notebooks", "benchmarks", "docs")
    single = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
    made_by_the_backend = {"PKG-INFO", ".gitignore"}
    expected = {f"{folder}/{name}" for folder in folders for name in files(checkout / folder)}
    assert names - made_by_the_backend == expected | single


def test_the_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    call = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(call, check=True, cwd=folder, capture_output=True)
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)


@pytest.fixture(scope="module", params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def installed(built: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a distribution into an environment without the checkout; `make bare` does it with what it declares.

    The dependencies are those of this environment: they are on the path, but its own tracekit is not.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = sysconfig.get_paths()
    (packages / "dependencies.pth").write_text(f"{here['purelib']}\n{here['platlib']}\n")
    (distribution,) = built.glob(request.param)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, *offline, str(distribution)], check=True, capture_output=True)
    return folder


def run(environment: Path, *command: str, cwd: Path) -> str:
    """Return what a command of an environment says, without a word of this one's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    call = [str(environment / "bin" / command[0]), *command[1:]]
    return subprocess.run(call, check=True, cwd=cwd, env=kept, capture_output=True, text=True).stdout


def test_what_is_installed_stands_alone(installed: Path, checkout: Path, tmp_path: Path) -> None:
    where = run(installed, "python", "-c", "import tracekit; print(tracekit.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed))
    assert run(installed, "tracekit", "--version", cwd=tmp_path) == f"tracekit {tracekit.__version__}\n"
    listed = run(installed, "tracekit", "query", "--list", "--format", "csv", cwd=tmp_path)
    assert {line.partition(",")[0] for line in listed.splitlines()[1:]} >= {
        path.stem for path in (checkout / "queries").glob("*.sql")
    }
    assert "gpt-oss-20b" in run(installed, "tracekit", "models", cwd=tmp_path)


@pytest.mark.slow  # the kernels are compiled once more; `make bare` runs the demo from the wheel
@pytest.mark.parametrize("installed", ["*.tar.gz"], indirect=True, ids=["sdist"])
def test_the_demo_runs_from_what_is_installed(installed: Path, tmp_path: Path) -> None:
    said = run(installed, "tracekit", "demo", cwd=tmp_path)
    assert "observed / k" in said
    assert {path.name for path in (tmp_path / "tracekit-demo").glob("*.html")} >= {"report.html", "windows.html"}


def test_the_command_is_installed_under_its_name(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert project["name"] == "moe-tracekit"
    assert project["scripts"] == {"tracekit": "tracekit.cli:main"}


def test_every_import_of_the_package_is_declared(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    optional = [item for extra, items in project["optional-dependencies"].items() if extra != "dev" for item in items]
    declared = {
        re.split("[>;[]", item)[0].replace("-python", "").replace("-", "_")
        for item in (*project["dependencies"], *optional)
    }
    imported: set[str] = set()
    for path in (checkout / "tracekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"tracekit"} <= declared
