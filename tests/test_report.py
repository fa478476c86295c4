"""The report: what its sections say of sample traces, and the page in a browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tracekit as tk
from tracekit.cli import main
from tracekit.errors import StoreError, UsageError
from tracekit.reports.report import gather
from tracekit.reports.report_html import page
from tracekit.reports.report_md import markdown
from tracekit.reports.report_parts import Report, Section
from tracekit.reports.report_sections import SECTIONS

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">|`[a](b)"
pytestmark = pytest.mark.filterwarnings("ignore::tracekit.errors.TracekitWarning")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> tk.Store:
    """A real trace, one with verification steps whose name and labels are markup, and one of counts."""
    folder = tmp_path_factory.mktemp("report")
    source = checkout / "sample_traces" / "olmoe-vllm"
    reading: dict[str, Any] = {"config": source / "config.json", "label_fields": ["domain"]}
    tk.ingest(source / "responses.jsonl", folder / "traces", name="chat", **reading)
    ids = np.argsort(np.random.default_rng(0).random((90, 2, 8)), axis=2)[:, :, :3].astype(np.uint8)
    rows = []
    steps = [(0, 0), (1, 1), (3, 2), (6, 0), (7, 1), (9, 2), (12, 2)]
    for i, (start, accepted) in itertools.product(range(6), steps):
        step: dict[str, Any] = {
            "request_id": str(i),
            "topic": ["prose", HOSTILE][i % 2],
            "start_pos": start,
            "n_drafted": 2,
        }
        experts = np.resize(ids[15 * i + start :], (3, 2, 3)).reshape(-1).tolist()
        weights = np.resize([0.5, 0.3, 0.2], len(experts)).tolist()
        rows.append(step | {"n_accepted": accepted, "experts": experts, "router_weights": weights})
    pl.DataFrame(rows).write_parquet(folder / "steps.parquet")
    shape: dict[str, Any] = {"num_experts": 8, "top_k": 3, "label_fields": ["topic"]}
    tk.ingest(folder / "steps.parquet", folder / "traces", name=HOSTILE, phase="decode", **shape)
    (folder / "counts.csv").write_text("layer,expert,count\n0,0,10\n0,1,30\n1,0,25\n1,1,15\n")
    tk.ingest(folder / "counts.csv", folder / "traces", name="counts", num_experts=4, top_k=1)
    return tk.open(folder / "traces")


@pytest.fixture(scope="module")
def report(store: tk.Store) -> Report:
    return gather(store)


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return page(report)


def sections(report: Report, trace: str) -> dict[str, Section]:
    (found,) = (part for part in report.parts if part.trace == trace)
    return {section.key: section for section in found.sections}


# --- what it says ------------------------------------------------------------------------------


def test_the_headline_has_the_numbers_of_the_summary(store: tk.Store, report: Report):
    (row,) = tk.windows(store, trace="chat", max_window=4).filter(window=4).rows(named=True)
    (chat, *_) = report.parts
    text = " ".join(chat.headline)
    assert f"Verifying 4 consecutive tokens at once, tiny-olmoe reads {row['observed']:.2f} (95 % interval" in text
    assert (
        f"it would read {row['expected_uniform']:.2f}: the routing reads {100 * row['reduction_uniform']:.1f} %" in text
    )
    assert f"in random order it reads {100 * row['reduction_request']:.1f} %" in text
    low, high = (f"{100 * row[f'reduction_uniform_{end}']:.1f}" for end in ("lo", "hi"))
    assert f"(95 % interval {low} to {high})" in text
    assert [key.value for key in chat.keys][:2] == [f"{row['observed']:.2f}", f"{row['per_top_k']:.2f} ×"]


def test_every_section_is_there_with_an_answer(report: Report):
    found = sections(report, "chat")
    assert list(found) == list(SECTIONS)
    refused = {key: str(section.reason) for key, section in found.items() if section.reason}
    assert list(refused) == ["budget", "offloading"]
    assert "the trace has no router weights" in refused["budget"]
    assert "--hardware" in refused["offloading"]
    for section in (section for key, section in found.items() if key not in refused):
        assert section.prose
        for figure in section.figures:
            assert figure.tables, section.key
            assert figure.commands, section.key


def test_what_counts_cannot_answer_says_why(report: Report):
    found = sections(report, "counts")
    assert {key for key, section in found.items() if section.reason is None} == {"load", "provenance"}
    assert "the trace holds counts per expert only, without tokens or their order" in str(found["windows"].reason)
    assert "how evenly its experts are used can be said" in report.parts[-1].headline[0]


def test_verification_steps_are_reported_where_there_are_some(report: Report):
    steps = sections(report, HOSTILE)["speculation"]
    assert "The trace has 42 verification steps. One drafts 2.00 tokens on average" in " ".join(steps.prose)
    accepted_only = sections(report, "chat")["speculation"]
    assert "The trace holds accepted tokens only." in " ".join(accepted_only.prose)
    assert "--hardware" in accepted_only.prose[-1]


def test_a_machine_makes_the_gain_a_number(store: tk.Store, checkout: Path):
    config = checkout / "sample_traces" / "olmoe-vllm" / "config.json"
    gain = {"model": config, "bandwidth": 1e12, "flops": 1e14, "acceptance_rate": 0.7}
    found = sections(gather(store, "chat", gain=gain), "chat")["speculation"]
    best = tk.speedup(store, trace="chat", **gain)["speedup"].max()
    assert f"{best:.2f}" in found.prose[-1]
    assert any("--acceptance-rate 0.7" in command for figure in found.figures for command in figure.commands)


def test_what_offloading_costs_is_said_of_a_machine_and_a_link(store: tk.Store, checkout: Path):
    config = checkout / "sample_traces" / "olmoe-vllm" / "config.json"
    found = sections(gather(store, "chat", gain={"model": config, "hardware": "l4"}, link="pcie5-x16"), "chat")
    section = found["offloading"]
    assert section.reason is None
    (figure,) = section.figures
    assert "--link pcie5-x16 --capacity 16" in figure.commands[0]
    judged = tk.prefetch(store, trace="chat", m=4).filter(pl.col("recall") == pl.col("recall").max())
    assert f"the predictor “{judged['predictor'][0]}”" in section.prose[1]
    asked: dict[str, Any] = {"capacity": 16, "predictor": judged["predictor"][0]}
    times = tk.tpot(store, trace="chat", link=50e9, model=config, hardware="l4", **asked)
    per_second = {
        mode: f"{round(1000 / ms):,} tokens per second" for mode, ms in times.select("mode", "tpot_ms").rows()
    }
    assert per_second["on_demand"] in section.prose[0]
    assert per_second["cache"] in section.prose[0]
    assert per_second["cache+prefetch"] in section.prose[1]
    # One device: what several of them would do is not known.
    shared = gather(store, "chat", gain={"model": config, "hardware": "l4", "tensor_parallel": 2})
    assert "one device" in str(sections(shared, "chat")["offloading"].reason)
    with pytest.raises(UsageError, match="no link 'usb'"):
        tk.report(store, link="usb")


def test_what_is_said_of_locality_and_caches_is_what_was_measured(store: tk.Store, report: Report):
    found = sections(report, "chat")
    curve = tk.reuse(store, trace="chat").filter(pl.col("hit_rate") >= 0.5)
    assert f"It takes {curve['capacity'][0]} experts per layer for 50 %" in found["reuse"].prose[1]
    windows = tk.windows(store, trace="chat")["observed"].to_list()
    assert f"adds {windows[-1] - windows[-2]:.2f} of its 4" in found["reuse"].prose[2]
    srp, sch = tk.locality(store, trace="chat", cache_ratio=2).select("srp", "sch").row(0)
    assert f"{100 * srp:.1f} %" in found["locality"].prose[1]
    assert f"{100 * sch:.1f} %" in found["locality"].prose[1]
    gains = tk.layer_budgets(store, trace="chat").filter(pl.col("layer").is_null())
    best = gains.row(gains["gain"].arg_max(), named=True)
    some = f"with {best['capacity']:g} experts" if best["gain_lo"] > 0 else "no budget gains by it"
    assert some in found["layer-budgets"].prose[1]
    kept = tk.budget(store, trace=HOSTILE, window=4).filter(budget=6)
    assert f"A budget of 6 keeps {100 * kept['weight_kept'][0]:.1f} %" in sections(report, HOSTILE)["budget"].prose[1]


def test_several_traces_are_compared(report: Report):
    (comparison,) = report.common
    headings = [block.title for figure in comparison.figures for block in figure.tables]
    assert any(heading.startswith("a: chat, decode; b: ") for heading in headings)
    assert any("trace “counts” is left out" in note for note in comparison.notes)


def test_the_commands_of_the_report_run(
    report: Report, store: tk.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shlex

    monkeypatch.chdir(store.path.parent)
    everywhere = [*report.common, *sections(report, HOSTILE).values()]
    commands = dict.fromkeys(c for section in everywhere for f in section.figures for c in f.commands if c)
    assert len(commands) > 15
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "tracekit"
        if words[0] == "chart":
            words[words.index("-o") + 1] = str(tmp_path / "chart.json")
            words.append("--force")
        assert main([*words, "-q"]) == 0, command


def test_a_window_is_what_the_report_is_about(store: tk.Store):
    found = gather(store, "chat", window=2)
    assert found.parts[0].headline[0].startswith("Verifying 2 consecutive tokens")
    assert "windows of 2 tokens" in str(sections(found, "chat")["batches"].figures[0].tables[0].title)


def test_a_store_without_traces_or_of_another_name_is_refused(store: tk.Store, tmp_path: Path):
    with pytest.raises(StoreError, match="no trace named 'chta'"):
        tk.report(store, trace="chta")
    with pytest.raises(UsageError, match=r"says no report format; expected a suffix of \.html"):
        tk.report(store, tmp_path / "report.pdf")
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(UsageError, match="will not overwrite without --force"):
        tk.report(store, tmp_path / "report.md")


# --- Markdown ----------------------------------------------------------------------------------


def test_markdown_holds_headline_tables_and_no_markup_of_others(report: Report):
    text = markdown(report)
    assert text.startswith("# What the routing of 3 traces allows\n")
    assert "| lag |" in text
    outside = re.sub(r"(?ms)^```sh$.*?^```$", "", text)  # what stands in a block of code is not markup
    assert "<img" not in outside
    assert "[a](b)" not in outside
    # A table has as many cells in each row.
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}
        assert len(widths) == 1, table


def test_the_verb_writes_markdown_to_stdout_and_pages_to_files(
    store: tk.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", str(store.path), "--trace", "chat", "--title", "Mine", "-q"]) == 0
    assert capsys.readouterr().out.startswith("# Mine\n")
    target = tmp_path / "report.html"
    assert main(["report", str(store.path), "--trace", "chat", "-o", str(target), "-q"]) == 0
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["report", str(store.path), "-o", str(target), "-q"]) == 2


# --- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page is made of."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open and tag not in ("p", "li", "dt", "dd"):
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        elif self.tags[-1] == ("script", {"type": "application/json", "id": "charts"}):
            self.data += data


def test_hostile_names_are_text_in_the_page_and_its_data(html: str):
    parsed = Page(html)
    assert f"Trace “{HOSTILE}”" in parsed.text
    assert [attributes for tag, attributes in parsed.tags if tag == "img"] == []
    charts = json.loads(parsed.data)["charts"]
    assert HOSTILE in json.dumps(charts, ensure_ascii=False).replace('\\"', '"')
    assert [tag for tag, _ in parsed.tags].count("script") == 3


def test_the_page_allows_and_asks_for_nothing_from_outside(html: str):
    parsed = Page(html)
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert not [(t, a) for t, a in parsed.tags if "src" in a or t in ("link", "iframe")]
    addresses = [a["href"] or "" for t, a in parsed.tags if t == "a"]
    assert {a.split(":")[0] for a in addresses if not a.startswith("#")} == {"https"}


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(html: str):
    parsed = Page(html)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for t, a in parsed.tags if t == "a" and (a["href"] or "").startswith("#")} <= set(ids)


def test_the_library_is_in_the_page_once_and_the_page_is_small(html: str):
    assert html.count("window.vegaEmbed=") == 1
    assert len(html.encode()) < 3_000_000


def chromium(path: Path, folder: Path, *options: str) -> tuple[str, str]:
    """Return the page as Chromium has built it, and what it said on its console."""
    if CHROMIUM is None:
        pytest.skip("no Chromium in PATH")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=30000", *options, "--dump-dom", path.as_uri()]
    # What the browser itself would ask for goes nowhere either.
    command += ["--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_chart_without_a_word(html: str, tmp_path: Path, scheme: str):
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    built, console = chromium(
        path, tmp_path / "profile", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    )
    # A policy that refuses something says so on the console, so that nothing said is nothing asked for.
    assert console == ""
    parsed = Page(built)
    places = [a for _, a in parsed.tags if re.fullmatch(r"chart-\d+", a.get("id") or "")]
    assert len(places) > 12
    assert all(a.get("data-drawn") == "yes" for a in places)
    assert [tag for tag, _ in parsed.tags].count("svg") >= len(places)
    assert "owned" not in re.findall(r"<title>(.*?)</title>", built)[0]
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert "Layer: " in parsed.text
    drawn = {a.get("stroke") for tag, a in parsed.tags if tag == "path"}
    assert ("#5cb3f0" in drawn, "#0072B2" in drawn) == ((True, False) if scheme == "dark" else (False, True))


def test_nothing_is_wider_than_a_phone(html: str, tmp_path: Path):
    # Headless windows have a least width, frames have none; the test's own script stands outside the page's policy.
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "phone.html").write_text(
        '<iframe src="report.html" style="width:390px;height:800px;border:0"></iframe><p id=said></p><script>'
        "setTimeout(() => { const page = frames[0].document.documentElement;"
        "said.textContent = `${page.scrollWidth} of ${page.clientWidth}`; }, 9000)</script>",
        encoding="utf-8",
    )
    built, _ = chromium(tmp_path / "phone.html", tmp_path / "profile", "--allow-file-access-from-files")
    said = re.search(r"(\d+) of (\d+)", built)
    assert said is not None
    assert int(said[1]) <= int(said[2]) <= 390
