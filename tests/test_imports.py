"""What is imported to answer quickly: by the package, by help, by completion and by a look into a store.

The clock of a busy machine says little about a start; what is imported decides it, and is the same everywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tracekit.cli import VERBS

CLI = {"cli", "errors", "reports", "execution"}
LIBRARY = {*CLI, "analysis", "checks", "economics", "markup", "metrics", "schema", "sources", "store"}
ENGINES = {"polars", "_polars_runtime_32", "duckdb", "_duckdb", "typing_extensions"}
# Verbs whose options name what the library knows: charts, policies, machines, models, views.
KNOWING = {
    *("cache", "calibrate", "chart", "layer-budgets", "locality", "models", "prefetch", "query", "report", "reuse"),
    *("speedup", "sql", "tpot", "views"),
}

Budget = tuple[set[str], set[str], int]
SMALL: Budget = {"click"}, CLI, 120
LARGE: Budget = {"click", "numpy"}, LIBRARY, 400
BUDGETS: dict[str, Budget] = {
    "import tracekit": (set(), set(), 40),
    "--version": SMALL,
    "w<TAB>": SMALL,
    "windows S --tr<TAB>": SMALL,
    "query S uni<TAB>": LARGE,
    "windows S --trace <TAB>": LARGE,
    "--help": ({"click", "numpy"}, LIBRARY, 500),
    **{f"{verb} --help": LARGE if verb in KNOWING else SMALL for verb in VERBS},
    "info S": ({"click", "numpy", *ENGINES}, LIBRARY, 800),
}
"""What may be loaded: packages beside the standard library, parts of tracekit, and so many modules in all."""

_REPORT = """
import atexit, json, sys
before = set(sys.modules)
def report():
    print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
atexit.register(report)
"""


@pytest.fixture(scope="module")
def store(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tracekit as tk

    sample = checkout / "sample_traces" / "hand"
    folder = tmp_path_factory.mktemp("imports")
    tk.ingest(sample / "trace.npz", folder / "S", requests=sample / "requests.json", num_experts=6, axes="tlk")
    return folder


@pytest.mark.parametrize("call", BUDGETS)
def test_no_more_is_imported_than_the_budget_allows(call: str, store: Path, checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    code = "from tracekit.cli import main\nsys.exit(main())"
    typed, tab, _ = call.partition("<TAB>")
    words = typed.split(" ")
    if call == "import tracekit":
        code, words = call, []
    if tab:
        environment |= {"_TRACEKIT_COMPLETE": "bash_complete", "COMP_WORDS": f"tracekit {typed}"}
        environment["COMP_CWORD"] = str(len(words))
    done = subprocess.run(
        [sys.executable, "-c", _REPORT + code, *words],
        check=True,
        capture_output=True,
        cwd=store,
        env=environment,
        text=True,
    )
    assert done.stdout or call == "import tracekit"
    loaded = json.loads(done.stderr)
    packages = {name.split(".")[0] for name in loaded if not name.startswith("_sysconfigdata")}
    parts = {name.split(".")[1] for name in loaded if name.startswith("tracekit.")}
    others, ours, most = BUDGETS[call]
    assert packages - set(sys.stdlib_module_names) - {"tracekit"} <= others
    assert parts <= ours
    assert len(loaded) <= most
