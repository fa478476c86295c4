"""What Jupyter shows: HTML of stores and results with every name escaped, charts, and the cell magic."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit import markup

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert(2)\"> & 'so' on"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one trace, whose names are hostile."""
    folder = tmp_path_factory.mktemp("jupyter")
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((360, 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    np.savez(folder / "a.npz", expert_ids=ids, request_lens=np.full(6, 60), prompt_len=np.array(10))
    (folder / "r.json").write_text(json.dumps([{"label": HOSTILE if i % 2 else "plain"} for i in range(6)]))
    tk.ingest(
        folder / "a.npz",
        folder / "store",
        name=HOSTILE,
        num_experts=8,
        axes="tlk",
        requests=folder / "r.json",
        label_fields=["label"],
    )
    return folder / "store"


@pytest.fixture(scope="module")
def store(path: Path) -> tk.Store:
    return tk.open(path)


class Elements(HTMLParser):
    """Which elements a page has, with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


PLAIN = {"div", "p", "small", "table", "thead", "tbody", "tr", "th", "td"}


def shown(thing: Any) -> Elements:
    page = Elements(thing._repr_html_())
    assert page.elements <= PLAIN, page.elements - PLAIN
    assert page.attributes <= {"style"}
    return page


def test_a_table_escapes_titles_columns_cells_and_notes() -> None:
    page = Elements(markup.table([HOSTILE], [(HOSTILE,)], title=HOSTILE, notes=[HOSTILE]))
    assert page.elements == PLAIN
    assert page.text == [HOSTILE] * 4


def test_a_table_s_numbers() -> None:
    values = (1234567, 0.123456, True, None, float("nan"), "007")
    cells = re.findall(r'<td style="text-align: (\w+)">([^<]*)</td>', markup.table("abcdef", [values]))
    right = [("right", "1,234,567"), ("right", "0.1235"), ("left", "yes"), ("left", "–"), ("right", "–")]
    assert cells == [*right, ("left", "007")]


def test_a_store_lists_its_traces(store: tk.Store, tmp_path: Path) -> None:
    text = shown(store).text
    assert {HOSTILE, "360", "300"} <= set(text)  # tokens, decode tokens
    assert f"tracekit store {store.path}" in text


def test_a_store_that_is_gone_shows_as_text(path: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    store = tk.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert store._repr_html_() is None


def test_a_trace_says_what_it_holds(store: tk.Store) -> None:
    text = shown(store.trace()).text
    assert f"trace {HOSTILE}" in text
    for name, value in (("experts per layer, N", "8"), ("MoE layers", "2: 0 to 1"), ("prefill tokens", "60")):
        assert text[text.index(name) + 1] == value


def test_a_trace_names_what_lies_beside_the_routing_and_what_the_check_found(path: Path, tmp_path: Path) -> None:
    ids = np.zeros((400, 2, 2), np.uint8) + np.array([0, 1], np.uint8)  # one routing, again and again
    np.savez(tmp_path / "a.npz", routed_experts=ids, router_weights=np.full(ids.shape, 0.5, np.float32), prompt_len=10)
    info = tk.ingest(tmp_path / "a.npz", tmp_path / "store", num_experts=8, axes="tlk")
    text = shown(info).text
    assert text[text.index("beside the routing") + 1] == "router weights"
    assert info.findings
    assert all(any(f.finding in line for line in text) for f in info.findings)


@pytest.mark.filterwarnings("ignore::tracekit.TracekitWarning")
def test_a_law_says_what_it_is_of_and_how_well_it_fits(store: tk.Store) -> None:
    law = tk.fit_law(store)
    text = shown(law).text
    assert f"law of routing: N = 8, k = 2, MoE layers: 2, fitted to trace {HOSTILE}" in text
    assert [name for name in text if name in ("cold", "hot", "request", "anchor", "keep", "stay")]
    worst = max(abs(f.law / f.observed - 1) for f in law.figures if f.quantity == "unique" and not f.target)
    assert any(line.startswith(f"unique, predicted: within {worst:.1%} of the trace") for line in text)
    assert shown(tk.RoutingLaw(8, 2, law.layers)).text[0] == "law of routing: N = 8, k = 2, MoE layers: 2"


@pytest.mark.filterwarnings("ignore::tracekit.TracekitWarning")
def test_a_calibration_shows_estimates_and_what_the_points_do_not_tell(store: tk.Store) -> None:
    times = {(b, k): 1.0 + 0.1 * b + 0.2 * k for b in (1, 2, 4) for k in (0, 1, 3)}
    rows = [{"batch_size": b, "drafts": k, "step_ms": t} for (b, k), t in times.items()]
    found = tk.calibrate(store, pl.DataFrame(rows))
    text = shown(found).text
    assert "fitted to 9 measured points" in text
    assert "routed_share" in text
    assert set(found.notes) <= set(text)


def bundle(chart: Any) -> Any:
    with alt.renderers.enable("default"):
        return chart._repr_mimebundle_()


@pytest.mark.filterwarnings("ignore::tracekit.TracekitWarning")
def test_a_chart_shows_and_no_name_leaves_its_script(store: tk.Store) -> None:
    chart = tk.charts.windows(tk.windows(store, by="label", max_window=3, intervals=False))
    for drawn in (chart, chart.properties(name="copy")):
        html = bundle(drawn)["text/html"]
        assert len(re.findall("</script>", html)) == len(re.findall("<script", html)) == 1
        spec = json.loads(re.search(r"\}\)\((\{.*?\}), \{\"mode\"", html, re.DOTALL)[1])  # type: ignore[index]
        assert spec == drawn.to_dict()
        assert HOSTILE[:40] in json.dumps(spec).replace('\\"', '"')


@pytest.mark.filterwarnings("ignore::tracekit.TracekitWarning")
def test_a_chart_keeps_the_renderer_that_was_chosen(store: tk.Store) -> None:
    chart = tk.charts.windows(tk.windows(store, max_window=3, intervals=False))
    assert repr(chart) == "alt.LayerChart(...)"
    with alt.renderers.enable("mimetype"):
        data, *_ = chart._repr_mimebundle_()
    [spec] = [value for kind, value in data.items() if kind.startswith("application/vnd.vegalite")]
    assert spec == chart.to_dict()
    with alt.renderers.enable("png", scale_factor=1):
        picture = chart._repr_mimebundle_()
    assert picture[0]["image/png"].startswith(b"\x89PNG")
    before = (alt.renderers.active, dict(alt.renderers.options))
    bundle(chart)
    assert (alt.renderers.active, dict(alt.renderers.options)) == before


@pytest.fixture(scope="module")
def shell() -> Any:
    """An IPython without history, files or colours of its own."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    settings = Config()
    settings.HistoryManager.enabled = False
    settings.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=settings)
    shell.run_line_magic("load_ext", "tracekit")
    yield shell
    InteractiveShell.clear_instance()


@pytest.fixture
def run(shell: Any, store: tk.Store, path: Path) -> Any:
    shell.user_ns.update(
        store=store, where=path, text=str(path), trace=HOSTILE, limit=np.int64(3), frame=pl.DataFrame()
    )

    def cell(line: str, sql: str) -> Any:
        return shell.run_cell(f"%%tracekit_sql {line}\n{sql}")

    return cell


ALL = "SELECT count(*) AS n FROM routing WHERE trace = getvariable('trace') AND layer < getvariable('limit')"


@pytest.mark.parametrize("where", ["store", "where", "text", "PATH", "'PATH'", '"PATH"'])
def test_a_cell_of_sql_is_a_frame(run: Any, path: Path, where: str) -> None:
    result = run(f"{where.replace('PATH', str(path))} trace limit=1", ALL)
    assert result.success
    assert result.result.equals(pl.DataFrame({"n": [360]}))


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("limit", 3),
        ("x=4", 4),
        ("x=-.5", -0.5),
        ("x=prose", "prose"),
        ("x='a b = c'", "a b = c"),
        ('x="it\'s"', "it's"),
        ("x='4'", "4"),
        ("x=True", True),
        ("x=None", None),
        ("x=", ""),
    ],
)
def test_variables(run: Any, given: str, value: Any) -> None:
    name = given.partition("=")[0]
    result = run(f"store {given}", f"SELECT getvariable('{name}') AS value")
    assert result.result["value"].to_list() == [value]


def test_a_result_gets_a_name(run: Any, shell: Any) -> None:
    result = run("store --out found", "SELECT 1 AS one;")
    assert shell.user_ns["found"] is result.result


@pytest.mark.parametrize(
    ("line", "sql", "kind", "said"),
    [
        ("", "SELECT 1", "UsageError", "no store is named; expected %%tracekit_sql STORE"),
        ("nowhere", "SELECT 1", "StoreError", "nowhere"),
        ("frame", "SELECT 1", "UsageError", "the variable frame is a DataFrame; expected a store"),
        ("store missing", "SELECT 1", "UsageError", "no variable is named 'missing'"),
        ("store 'a", "SELECT 1", "UsageError", "expected %%tracekit_sql STORE"),
        ("store 4=x", "SELECT 1", "UsageError", "expected %%tracekit_sql STORE"),
        ("store x=[1]", "SELECT 1", "UsageError", "x is a list; expected"),
        ("store x=1e999", "SELECT 1", "UsageError", "x is inf; expected"),
        ("store frame", "SELECT 1", "UsageError", "frame is a DataFrame; expected"),
        ("store --out", "SELECT 1", "UsageError", "--out; expected --out NAME"),
        ("store --out a-b", "SELECT 1", "UsageError", "--out a-b; expected --out NAME"),
        ("store", "SELECT nothing", "QueryError", 'column "nothing" was not found'),
        ("store", "SELECT 1; SELECT 2", "QueryError", "2 SQL statements; expected exactly one SELECT"),
        ("store", "COPY (SELECT 1) TO 'x.csv'", "QueryError", "a COPY statement; expected a SELECT"),
    ],
)
def test_what_is_at_fault_is_said_without_a_traceback(
    run: Any, capsys: pytest.CaptureFixture[str], line: str, sql: str, kind: str, said: str
) -> None:
    result = run(line, sql)
    assert type(result.error_in_exec).__name__ == kind  # so that Run All stops here
    printed = "".join(capsys.readouterr())
    assert printed.startswith(f"{kind}: ")
    assert said.lower() in printed.lower()
    assert "Traceback" not in printed
    assert os.sep + "tracekit" + os.sep not in printed


def test_a_message_cannot_drive_the_terminal(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("'\x1b[31mred'", "SELECT 1")
    printed = capsys.readouterr().out
    assert "\\x1b[31mred" in printed
    assert "\x1b[31mred" not in printed


def test_sql_cannot_leave_the_store(run: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    assert not run("store", f"SELECT * FROM '{tmp_path}/secret.csv'").success


def test_the_magic_explains_itself(shell: Any) -> None:
    magic = shell.find_cell_magic("tracekit_sql")
    assert "%%tracekit_sql store" in magic.__doc__
