"""The command line: what every verb promises, where output goes, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import polars as pl
import pytest

import tracekit
from tracekit.cli import VERBS, command, main
from tracekit.reports.text import display_width
from tracekit.synthetic import synth

CHECKOUT = Path(__file__).resolve().parent.parent
FORMATS = ("table", "csv", "json", "ndjson", "markdown", "parquet")

# Verbs that yield a table, as they are called on the store of the fixture.
TABLES = {
    "info": ["info", "STORE"],
    "summary": ["summary", "STORE"],
    "windows": ["windows", "STORE", "--batch-size", "1,2"],
    "windows by layer": ["windows", "STORE", "--by", "layer", "--max-window", "4"],
    "windows by label": ["windows", "STORE", "--by", "label", "--max-window", "4"],
    "windows by request": ["windows", "STORE", "--by", "request", "--max-window", "4", "--non-overlapping"],
    "autocorr": ["autocorr", "STORE", "--max-lag", "4"],
    "autocorr by layer": ["autocorr", "STORE", "--max-lag", "2", "--by", "layer", "--no-intervals"],
    "attribution": ["attribution", "STORE"],
    "attribution by layer": ["attribution", "STORE", "--by", "layer", "--window", "3", "--seed", "7"],
    "load": ["load", "STORE"],
    "load by label": ["load", "STORE", "--by", "label"],
    "compare": ["compare", "STORE", "--trace-a", "topical", "--trace-b", "topical"],
    "query": ["query", "STORE", "unique_experts_by_window", "--param", "max_window=3"],
    "formats": ["formats"],
    "query list": ["query", "--list"],
    "query describe": ["query", "--describe", "summary"],
    "sql": ["sql", "STORE", "SELECT * FROM routing LIMIT 100"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one synthetic trace that has all causes: 12 requests under 4 labels, 3 layers, N = 16, k = 4."""
    folder = tmp_path_factory.mktemp("cli")
    source = folder / "topical.npz"
    sidecar = synth("topical", num_experts=16, top_k=4, layers=3, requests=12, tokens=(20, 40), prompt=5, seed=3).save(
        source
    )
    args = ["ingest", source, "--requests", sidecar, "--label-fields", "label", "--store", folder / "store", "--quiet"]
    assert main([str(arg) for arg in args]) == 0
    return folder / "store"


def run(args: list[str], store: Path) -> int:
    return main([str(store) if arg == "STORE" else arg for arg in args])


def shell(args: list[str], **kwargs: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    call = [sys.executable, "-m", "tracekit", *args]
    return subprocess.run(call, check=False, env=environment, **{"capture_output": True, **kwargs})  # type: ignore[call-overload, no-any-return]


# Help


def verbs() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield name, found


@pytest.mark.parametrize(("name", "verb"), list(verbs()), ids=list(VERBS))
def test_every_verb_is_documented_and_has_an_example(
    name: str, verb: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert verb.help
    assert "…" not in verb.get_short_help_str(60).replace("...", "…"), "the first sentence is too long for the list"
    assert "Examples:" in text
    assert f"tracekit {name} " in text
    for parameter in verb.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_examples_name_only_what_exists() -> None:
    for name, verb in verbs():
        for example in re.findall(r"  (tracekit .*)", verb.epilog or ""):
            words = example.split()
            assert words[1] in VERBS
            command = dict(verbs())[words[1]]
            if isinstance(command, click.Group):
                found = command.get_command(click.Context(command), words[2])
                assert found is not None, example
                command = found
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known, name


INTERFACE = """
ingest --store --name --config --num-experts --phase --requests --label-fields --label --source-format
ingest --axes --top-k --router-order --id-space --append --force --resume --quiet
compact --trace --format --output
windows --max-window --batch-size --non-overlapping --trace --phase --by --seed --no-intervals
autocorr --max-lag --trace --phase --by --seed --no-intervals
attribution --window --trace --phase --by --seed --no-intervals
load --trace --phase --by
expert-ratio --max-window --batch-size --trace --phase --by --seed --no-intervals
budget --window --budget --share --steps --trace --phase --by --seed --no-intervals
compare --trace-a --trace-b --phase --window --batch-size --paired --seed --no-intervals
summary --trace --phase --seed --no-intervals
query --param --list --describe
chart --output -o --force --trace --phase
windows --format --output -o --force --quiet
"""


@pytest.mark.parametrize("line", INTERFACE.strip().splitlines())
def test_the_options_of_the_interface_are_there(line: str) -> None:
    name, *options = line.split()
    assert set(options) <= {option for parameter in dict(verbs())[name].params for option in parameter.opts}


def test_the_module_runs_and_knows_its_version() -> None:
    done = shell(["--version"])
    assert done.stdout.decode() == f"tracekit {tracekit.__version__}\n"


# Formats


@pytest.mark.parametrize("args", list(TABLES.values()), ids=list(TABLES))
def test_tables_fit_eighty_columns(args: list[str], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*args, "--quiet"], store) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""
    assert max(map(display_width, out.splitlines())) <= 80
    assert "\x1b" not in out


def settled(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows without the last bits of their numbers: a query may add them up in another order each time."""
    return [{key: round(v, 9) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


@pytest.mark.parametrize("args", list(TABLES.values()), ids=list(TABLES))
def test_every_format_says_the_same(args: list[str], store: Path, tmp_path: Path) -> None:
    frames = {}
    for fmt in FORMATS:
        path = tmp_path / f"out.{fmt}"
        assert run([*args, "--quiet", "--format", fmt, "--output", str(path)], store) == 0
        assert path.stat().st_size > 0
    rows = settled(json.loads((tmp_path / "out.json").read_text()))
    frames["csv"] = pl.read_csv(tmp_path / "out.csv", infer_schema_length=None)
    frames["parquet"] = pl.read_parquet(tmp_path / "out.parquet")
    assert settled([json.loads(line) for line in (tmp_path / "out.ndjson").read_text().splitlines()]) == rows
    for frame in frames.values():
        assert frame.height == len(rows)
        assert frame.columns == list(rows[0])
    for name in (name for name, dtype in frames["parquet"].schema.items() if dtype.is_numeric()):
        for frame in frames.values():
            assert settled(frame.select(name).to_dicts()) == [{name: row[name]} for row in rows]
    assert len((tmp_path / "out.markdown").read_text().splitlines()) == len(rows) + 2


def test_the_suffix_names_the_format(store: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "json", "ndjson", "jsonl", "md", "parquet", "txt"):
        assert run(["load", "STORE", "-o", str(tmp_path / f"load.{suffix}"), "-q"], store) == 0
    assert (tmp_path / "load.jsonl").read_bytes() == (tmp_path / "load.ndjson").read_bytes()
    assert (tmp_path / "load.md").read_text().startswith("| trace |")


def test_an_unknown_suffix_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["load", "STORE", "-o", str(tmp_path / "load.xlsx")], store) == 2
    assert "--format" in capsys.readouterr().err
    assert run(["load", "STORE", "-o", str(tmp_path / "load.xlsx"), "--format", "csv"], store) == 0


def test_exports_on_stdout_are_bytes(store: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["load", "STORE", "--format", "parquet", "-q"], store) == 0
    assert pl.read_parquet(io.BytesIO(capsysbinary.readouterr().out)).height == 3


def test_a_table_of_sql_fetches_no_more_than_it_shows(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tracekit.reports import tables

    fetched: list[int] = []
    render = tables.render
    monkeypatch.setattr(tables, "render", lambda frame, *a, **k: fetched.append(frame.height) or render(frame, *a, **k))
    statement = "SELECT pos FROM routing ORDER BY pos DESC"
    assert run(["sql", "STORE", statement], store) == 0
    assert "(the first 50 rows; --format csv has all)" in capsys.readouterr().out
    assert run(["sql", "STORE", f"{statement} LIMIT 50"], store) == 0
    assert "first" not in capsys.readouterr().out
    assert run(["sql", "STORE", statement, "--format", "csv"], store) == 0
    exported = capsys.readouterr().out.splitlines()[1:]
    assert exported == sorted(exported, key=int, reverse=True)
    assert fetched == [51, 50, len(exported)]
    assert len(exported) > 51


# Files


def test_a_file_is_not_overwritten_without_force(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.csv"
    path.write_text("precious")
    for args in (["load", "STORE"], ["chart", "STORE", "windows"]):
        target = path if args[0] == "load" else path.rename(tmp_path / "chart.json")
        assert run([*args, "-o", str(target)], store) == 2
        assert f"will not overwrite without --force: {target}" in capsys.readouterr().err
        assert target.read_text() == "precious"
        assert run([*args, "-o", str(target), "--force"], store) == 0
        assert target.read_text() != "precious"
        if args[0] == "load":
            target.write_text("precious")
    assert {entry.name for entry in tmp_path.iterdir()} == {"chart.json"}, "no temporary file stays behind"


def test_a_folder_or_a_missing_one_is_no_file(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["load", "STORE", "-o", str(tmp_path), "--format", "csv"], store) == 1
    assert "is a folder" in capsys.readouterr().err
    assert run(["load", "STORE", "-o", str(tmp_path / "no" / "load.csv")], store) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["load", "STORE", "-o", "/dev/full", "--format", "csv"], store) == 1
    assert "/dev/full: cannot be written (No space left on device)" in capsys.readouterr().err
    with Path("/dev/full").open("wb") as full:
        done = shell(["load", str(store), "-q"], stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: No space left on device")


# How it ends


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["windos", "STORE"], 2, "Did you mean 'windows'?"),
        (["windows"], 2, "Missing argument 'STORE'"),
        (["windows", "STORE", "--max-windows", "4"], 2, "Did you mean"),
        (["windows", "STORE", "--batch-size", "1,x"], 2, "1,x"),
        (["windows", "STORE", "--batch-size", "0"], 2, "at least 1"),
        (["windows", "nowhere"], 1, "nowhere"),
        (["windows", "STORE", "--trace", "topicl"], 1, "Did you mean 'topical'?"),
        (["chart", "STORE", "window", "-o", "x.html"], 2, "Did you mean 'windows'?"),
        (["chart", "STORE", "windows", "-o", "x.xls"], 2, ".html"),
        (["chart", "STORE", "windows"], 2, "--output"),
        (["query", "STORE", "sumary"], 2, "Did you mean 'summary'?"),
        (["query", "--describe", "sumary"], 2, "Did you mean 'summary'?"),
        (["query", "STORE", "summary", "--param", "windw=4"], 2, "Did you mean 'window'?"),
        (["query", "STORE", "summary", "--param", "window"], 2, "key=value"),
        (["query", "STORE", "summary", "--param", "window=4", "--param", "window=5"], 2, "twice"),
        (["query", "STORE"], 2, "--list"),
        (["speedup", "STORE", "--hardware", "h10"], 2, "Did you mean 'h100'?"),
        (["models", "Qwen3-30B-A3"], 1, "Did you mean 'Qwen3-30B-A3B'?"),
        (["cache", "STORE", "--policy", "lru,belad"], 2, "Did you mean 'belady'?"),
        (["tpot", "STORE", "--link", "pcie4-x61"], 2, "Did you mean 'pcie4-x16'?"),
        (["prefetch", "STORE", "--predictor", "previous_tokn"], 2, "Did you mean 'previous_token'?"),
        (["ingest", "missing.npy", "--store", "new", "--source-format", "aray"], 2, "Did you mean 'arrays'?"),
        (["sql", "STORE", "SELECT nothing FROM nowhere"], 1, "nowhere"),
        (["sql", "STORE", "SELECT * FROM windos"], 1, 'Did you mean "windows"?'),
        (["sql", "STORE", "SELECT exprt FROM activations"], 1, '"expert"'),
        (["sql", "STORE", "SELECT 1; SELECT 2"], 1, "2 SQL statements"),
        (["sql", "STORE", "DROP VIEW routing"], 1, "read-only"),
        (["ingest", "missing.npy", "--store", "new"], 1, "missing.npy"),
        (["ingest", "missing.npy", "--store", "new", "--append", "--force"], 2, "--append"),
        (["synth", "stiky", "x.npz"], 2, "Did you mean 'sticky'?"),
        (["synth", "sticky", "x.npz", "--skew", "1"], 2, "skew"),
        (["synth", "sticky", "x.npz", "--tokens", "many"], 2, "many"),
        (["synth", "sticky", "x.csv"], 2, ".npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes_and_messages(
    args: list[str],
    code: int,
    said: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(args, store) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_label_field_is_answered_with_the_closest(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sidecar = store.parent / "topical.npz", store.parent / "topical.requests.json"
    args = ["ingest", source, "--requests", sidecar, "--label-fields", "lable", "--store", tmp_path / "S"]
    assert main([str(arg) for arg in args]) == 1
    assert "has no label field 'lable'" in (err := capsys.readouterr().err)
    assert "Did you mean 'label'?" in err


def test_an_interrupt_ends_with_130(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tracekit.analysis.routing.load", interrupt)
    assert run(["load", "STORE"], store) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_missing_library_ends_with_4_and_names_the_command(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    assert run(["chart", "STORE", "windows", "-o", str(tmp_path / "x.json"), "-q"], store) == 4
    assert "pip install altair" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error(store: Path) -> None:
    command = [sys.executable, "-m", "tracekit", "sql", str(store), "SELECT * FROM activations", "--format", "csv"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_quiet_keeps_stderr_empty(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "one.npz"
    main(["synth", "uniform", str(small), "--requests", "1", "--tokens", "20", "-q"])
    main(["ingest", str(small), "--phase", "decode", "--store", str(tmp_path / "s"), "-q"])
    assert capsys.readouterr().err == ""
    assert main(["windows", str(tmp_path / "s"), "--max-window", "2"]) == 0
    assert "Warning: no interval" in capsys.readouterr().err
    assert main(["summary", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(set(said))
    assert main(["windows", str(tmp_path / "s"), "--max-window", "3", "-q"]) == 0
    assert capsys.readouterr().err == ""


# Ingest


def test_ingest_says_what_it_did_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.npz", tmp_path / "store"
    assert main(["synth", "uniform", str(source), "--requests", "6", "--tokens", "30", "-q"]) == 0
    capsys.readouterr()
    args = ["ingest", str(source), "--requests", str(tmp_path / "a.requests.json"), "--store", str(target)]
    assert main([*args, "--label", "engine=x", "--router-order", "no", "--id-space", "logical"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "trace 'a' has 6 requests, 180 tokens, 4 MoE layers, 8 of 64 experts per token" in err
    assert main(args) == 1
    assert "--append" in capsys.readouterr().err
    assert main([*args, "--force", "--quiet"]) == 0
    assert main(["info", str(target), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["trace"], row["requests"], row["num_experts"], row["top_k"]) == ("a", 6, 64, 8)


def test_the_progress_bar_is_for_terminals(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    source = tmp_path / "a.npz"
    main(["synth", "uniform", str(source), "--requests", "4", "--tokens", "20", "-q"])
    args = ["ingest", str(source), "--phase", "decode", "--store"]
    assert b"%" not in shell([*args, str(tmp_path / "piped")]).stderr
    ours, theirs = pty.openpty()
    done = shell([*args, str(tmp_path / "seen")], stdout=theirs, stderr=theirs, capture_output=False)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "100%" in seen
    assert "80 tokens" in seen


# Hostile names


HOSTILE = "a\nError: gotcha \x1b[31m\u202e<b>|x' OR 1=1 --🦙/../../"


def test_a_hostile_name_drives_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.npz", str(tmp_path / "store")
    main(["synth", "uniform", str(source), "--requests", "2", "--tokens", "20", "-q"])
    assert main(["ingest", str(source), "--phase", "decode", "--store", target, "--name", HOSTILE]) == 0
    for args in (["info"], ["windows"], ["windows", f"--trace={HOSTILE}x"], ["summary"], ["load", "--format=markdown"]):
        main([args[0], target, *args[1:]])
        out, err = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err)
        assert "\nError: gotcha" not in out + err
    assert main(["info", target, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["trace"] == HOSTILE
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "a.requests.json", "store"}


# The other verbs


def test_info_says_what_is_not_known_and_what_is_not_there(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "STORE"], store) == 0
    known = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert known["engine"] == known["model"] == "unknown"
    for name in ("runs.parquet", "requests.parquet", "part-00000.parquet"):
        copy = shutil.copytree(store, tmp_path / name)
        [file] = (copy / "segments").rglob(name)
        file.write_bytes(file.read_bytes()[:-4])
        assert main(["info", str(copy)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"trace 'topical': files missing or cut short: 1, the first is {file}" in err
        file.unlink()
        assert main(["info", str(copy), "--format", "json"]) == 1
        assert "--force" in capsys.readouterr().err


def test_a_window_that_no_request_has_ends_with_1(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["windows", "STORE", "--max-window", "36"], store) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^Error: no request has 36 consecutive decode tokens: the longest run has \d+\. Use windows", err)


def test_views_define_every_view(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["views", "STORE"], store) == 0
    text = capsys.readouterr().out
    for view in [
        "traces",
        "requests",
        "routing",
        "activations",
        "tokens",
        "windows",
        "autocorr",
        "attribution",
        "load",
    ]:
        assert f'CREATE OR REPLACE VIEW "{view}"' in text


def test_synth_prints_the_truth_that_the_trace_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["synth", "repeat", str(tmp_path / "r.npz"), "--num-experts", "8", "--top-k", "2", "--format", "json", "-q"]
    assert main(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["quantity"], row["expected"]) for row in rows} == {("unique", 2.0), ("overlap", 1.0)}
    assert main(args) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["html", "svg", "json"])
def test_chart_writes_the_format_of_the_suffix(suffix: str, store: Path, tmp_path: Path) -> None:
    path = tmp_path / f"windows.{suffix}"
    assert run(["chart", "STORE", "windows", "-o", str(path), "-q"], store) == 0
    text = path.read_text()
    assert {"html": "<html", "svg": "<svg", "json": '"$schema"'}[suffix] in text.lower()
