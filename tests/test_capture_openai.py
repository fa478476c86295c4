"""Capture from a server: both protocols, everything that goes wrong with one, and going on after an interruption."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracekit as tk
from tracekit.capture.journal import Journal
from tracekit.capture.server import routing_of
from tracekit.cli import main
from tracekit.cli.capture_openai import openai as capture_openai_command
from tracekit.errors import SourceError, StoreError, TracekitError, UsageError

N, K, LAYERS, PROMPT, OUTPUT = 16, 2, 3, 5, 4
CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": LAYERS,
    "num_local_experts": N,
    "num_experts_per_tok": K,
}


def ids_of(text: str, rows: int = PROMPT + OUTPUT - 1) -> np.ndarray:
    """The routing that the fake model has for a prompt: it depends on the prompt alone."""
    rng = np.random.default_rng(list(text.encode()))
    return rng.permuted(np.tile(np.arange(N), (rows, LAYERS, 1)), axis=2)[..., :K]


class FakeServer(ThreadingHTTPServer):
    """Speaks vLLM's and SGLang's protocols, and misbehaves as its ``faults`` say.

    ``faults`` maps the text of a prompt to the faults of the requests for it, one after the other.
    """

    daemon_threads = True

    def __init__(self, engine: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine = engine
        self.faults: dict[str, list[str]] = {}
        self.always: str | None = None
        self.seen: list[tuple[str, dict[str, object]]] = []
        self.keys: list[str | None] = []
        self.models = ["org/tiny"]
        self.replay: dict[str, object] = {}
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.together = threading.Barrier(3)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/models" or not self.server.models:
            self.answer({"detail": "Not Found"}, 404)
            return
        owner = self.server.engine if self.server.engine != "plain" else "someone"
        self.answer({"object": "list", "data": [{"id": name, "owned_by": owner} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        text = body.get("prompt") or body.get("text") or body.get("input_ids") or body["messages"][-1]["content"]
        text = text if isinstance(text, str) else json.dumps(text)
        with server.lock:
            server.seen.append((self.path, body))
            server.keys.append(self.headers.get("Authorization"))
            fault = server.faults[text].pop(0) if server.faults.get(text) else server.always
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            self.respond(text, body, fault or "")
        finally:
            with server.lock:
                server.busy -= 1

    def respond(self, text: str, body: dict[str, object], fault: str) -> None:
        if fault.isdecimal():
            self.answer({"error": {"message": f"trouble with {self.headers.get('Authorization')}"}}, int(fault))
            return
        if fault == "redirect":
            self.answer({}, 307, {"Location": "http://127.0.0.1:1/elsewhere"})
            return
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(3)
        if fault == "wait for two more":
            self.server.together.wait(timeout=30)
        rows = PROMPT + OUTPUT - 1 - (fault == "short")
        replay = self.server.replay
        response = replay[text] if text in replay else self.response(ids_of(text, rows), fault)
        data = json.dumps(response).encode()
        if fault == "garbage":
            data = b"<html>sorry"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "truncated":
            self.close_connection = True
            data = data[: len(data) // 2]
        if fault == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        self.wfile.write(data)

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, header in (headers or {}).items():
            self.send_header(name, header)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def response(self, ids: np.ndarray, fault: str) -> dict[str, object]:
        usage = {"prompt_tokens": PROMPT, "completion_tokens": OUTPUT, "total_tokens": PROMPT + OUTPUT}
        raw = base64.b64encode(ids.astype("<i4").tobytes()).decode()
        if self.path == "/generate":
            meta = {"id": "server-side", "prompt_tokens": PROMPT, "completion_tokens": OUTPUT}
            if fault != "no routing":
                meta["routed_experts"] = raw
            return {"text": "…", "meta_info": meta}
        choice: dict[str, object] = {"index": 0, "text": "…", "finish_reason": "length"}
        response: dict[str, object] = {"id": "server-side", "model": "org/tiny", "choices": [choice], "usage": usage}
        if fault == "no routing":
            return response
        if self.server.engine == "sglang":
            response["sglext"] = {"routed_experts": raw}
        else:
            file = io.BytesIO()
            np.save(file, ids.astype(np.uint8))
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
            response["system_fingerprint"] = "vllm-0.33.0-0badcafe"
            choice["token_ids"], choice["prompt_token_ids"] = list(range(OUTPUT)), list(range(PROMPT))
        return response


@contextmanager
def serving(engine: str) -> Iterator[FakeServer]:
    server = FakeServer(engine)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def vllm() -> Iterator[FakeServer]:
    with serving("vllm") as server:
        yield server


@pytest.fixture
def sglang() -> Iterator[FakeServer]:
    with serving("sglang") as server:
        yield server


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


TEXTS = ["first", "second", "third", "fourth", "fifth", "sixth"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "asked.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def capture(server: FakeServer, prompts: Path, tmp_path: Path, **options: object) -> tk.TraceInfo:
    given = {"config": tmp_path / "config.json", "backoff": 0.01, "max_tokens": OUTPUT} | options
    return tk.capture_openai(server.url, prompts, tmp_path / "store", **given)


def routed(tmp_path: Path, trace: str = "tiny") -> dict[str, np.ndarray]:
    """The routing that the store holds, by request: ``[tokens, layers, k]``."""
    frame = tk.open(tmp_path / "store").sql(
        "SELECT request_id, layer, pos, experts FROM routing JOIN requests USING (trace, request) "
        f"WHERE trace = '{trace}' ORDER BY request, pos, layer"
    )
    found = {}
    for (name,), part in frame.group_by(["request_id"], maintain_order=True):
        found[str(name)] = np.array(part["experts"].to_list()).reshape(-1, LAYERS, K)
    return found


def journal_of(tmp_path: Path) -> Path:
    return tmp_path / "store.tiny.responses.jsonl"


# Both protocols


@pytest.mark.parametrize(
    ("engine", "api", "path"),
    [
        ("vllm", "auto", "/v1/completions"),
        ("vllm", "chat", "/v1/chat/completions"),
        ("sglang", "auto", "/generate"),
        ("sglang", "chat", "/v1/chat/completions"),
        ("sglang", "completions", "/v1/completions"),
        ("plain", "auto", "/v1/completions"),
    ],
)
def test_every_protocol_gives_the_same_trace(
    engine: str, api: str, path: str, prompts: Path, config: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int, int]] = []
    with serving(engine) as server:
        trace = capture(
            server, prompts, tmp_path, api=api, seed=7, temperature=0.5, progress=lambda *args: seen.append(args)
        )
    assert (trace.name, trace.requests, trace.meta.num_experts, trace.meta.top_k) == ("tiny", len(TEXTS), N, K)
    assert trace.meta.engine == ("sglang" if engine == "sglang" else "vllm")
    rows = PROMPT + OUTPUT - 1
    assert seen[0] == (0, len(TEXTS), 0)
    assert seen[-1] == (len(TEXTS), len(TEXTS), rows * len(TEXTS))
    assert {where for where, _ in server.seen} == {path}
    found = routed(tmp_path)
    assert list(found) == [f"asked-{i}" for i in range(len(TEXTS))], "in the order of the prompts, under their ids"
    for text, ids in zip(TEXTS, found.values(), strict=True):
        assert (ids == ids_of(text)).all()
    for _, body in server.seen:
        sampling = body["sampling_params"] if path == "/generate" else body
        name, most = ("sampling_seed", "max_new_tokens") if path == "/generate" else ("seed", "max_tokens")
        asked = str(body.get("prompt") or body.get("text") or body["messages"][0]["content"])  # type: ignore[index]
        assert sampling["temperature"] == 0.5  # type: ignore[index]
        assert sampling[most] == OUTPUT  # type: ignore[index]
        assert sampling[name] == 7 + TEXTS.index(asked)  # type: ignore[index]
        assert body.get("return_routed_experts", False) is (engine != "vllm")
        assert body.get("stream") is None


def test_prompts_of_all_kinds_and_their_labels(vllm: FakeServer, config: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt": "one", "domain": "code"},
        {"id": "b", "messages": [{"role": "user", "content": "two"}], "domain": "prose"},
        {"id": 3, "token_ids": [5, 6, 7], "domain": "code"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = capture(vllm, path, tmp_path, label_fields=["domain"], labels={"run": "x"}, name="mixed")
    assert trace.requests == 3
    frame = tk.open(tmp_path / "store").sql("SELECT request_id, label FROM requests ORDER BY request")
    assert frame.rows() == [("a", "code / x"), ("b", "prose / x"), ("3", "code / x")]
    asked = [(path, body.get("prompt", body.get("messages"))) for path, body in vllm.seen]
    assert len(asked) == 3
    assert ("/v1/completions", "one") in asked
    assert ("/v1/chat/completions", lines[1]["messages"]) in asked
    assert ("/v1/completions", [5, 6, 7]) in asked
    tokens = tk.open(tmp_path / "store").sql("SELECT count(*) AS n FROM tokens")["n"][0]
    assert tokens == 3 * (PROMPT + OUTPUT - 1)


def test_requests_run_at_the_same_time(vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path) -> None:
    vllm.always = "wait for two more"
    capture(vllm, prompts, tmp_path, concurrency=3)
    assert vllm.most == 3


# Faults that pass


@pytest.mark.parametrize("fault", ["429", "500", "503", "hang up", "truncated", "garbage", "short", "slow"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_fault_that_passes_leaves_no_trace(
    fault: str, engine: str, prompts: Path, config: Path, tmp_path: Path
) -> None:
    with serving(engine) as server:
        server.faults = {"second": [fault], "fifth": [fault] if fault in ("short", "slow") else [fault] * 2}
        trace = capture(server, prompts, tmp_path, timeout=1.5 if fault == "slow" else 30)
        assert len(server.seen) == len(TEXTS) + (2 if fault in ("short", "slow") else 3)
    assert trace.requests == len(TEXTS)
    assert (routed(tmp_path)["asked-4"] == ids_of("fifth")).all()


def test_a_server_that_never_gets_to_the_end_of_its_answer(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    vllm.faults = {"first": ["trickle"]}
    start = time.monotonic()
    capture(vllm, prompts, tmp_path, timeout=0.4)
    assert time.monotonic() - start < 10


# Faults that stay


def test_without_routing_the_flag_is_named_and_the_rest_is_not_asked(
    prompts: Path, config: Path, tmp_path: Path
) -> None:
    for engine in ("vllm", "sglang"):
        with serving(engine) as server:
            server.always = "no routing"
            with pytest.raises(SourceError, match="--enable-return-routed-experts"):
                capture(server, prompts, tmp_path, concurrency=1)
            assert len(server.seen) <= 2
    assert {path.name for path in tmp_path.iterdir()} == {"asked.txt", "config.json"}, "nothing is left behind"


@pytest.mark.parametrize(("fault", "said"), [("401", "--api-key-env"), ("404", "--api"), ("redirect", "not followed")])
def test_what_no_request_survives_ends_it(
    fault: str, said: str, vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    vllm.always = fault
    with pytest.raises(SourceError, match=said):
        capture(vllm, prompts, tmp_path, concurrency=1)
    assert len(vllm.seen) <= 2
    assert not (tmp_path / "store").exists()


def test_a_wrong_config_is_found_with_the_first_response(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    config.write_text(json.dumps({**CONFIG, "num_hidden_layers": LAYERS + 1}))
    with pytest.raises(SourceError, match="the config"):
        capture(vllm, prompts, tmp_path, concurrency=1)
    assert len(vllm.seen) <= 3


def test_failed_requests_are_asked_again_or_skipped(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    vllm.faults = {"third": ["400"], "sixth": ["500", "500"]}
    with pytest.raises(SourceError, match=r"2 of 6 requests failed.*--skip-failed"):
        capture(vllm, prompts, tmp_path, retries=1, concurrency=1)
    assert not (tmp_path / "store").exists()
    assert len(journal_of(tmp_path).read_text().splitlines()) == 4
    vllm.seen.clear()
    vllm.faults = {"sixth": ["400"]}
    trace = capture(vllm, prompts, tmp_path, skip_failed=True)
    assert trace.requests == 5
    assert any("1 of 6 requests failed" in note for note in trace.notes)
    assert [body["prompt"] for _, body in vllm.seen] in (["third", "sixth"], ["sixth", "third"])
    vllm.seen.clear()
    assert capture(vllm, prompts, tmp_path, force=True).requests == 6
    assert [body["prompt"] for _, body in vllm.seen] == ["sixth"]
    assert list(routed(tmp_path)) == [f"asked-{i}" for i in range(6)]


def test_nobody_there(tmp_path: Path, prompts: Path, config: Path) -> None:
    with serving("vllm") as server:
        url = server.url
    with pytest.raises(SourceError, match=r"cannot be reached.*Is the server running"):
        tk.capture_openai(url, prompts, tmp_path / "store", config=config, retries=1, backoff=0.01)


# Interruptions


class StopError(Exception):
    """What interrupts a capture in these tests."""


def test_an_interrupted_capture_goes_on_where_it_was(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int, rows: int) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        capture(vllm, prompts, tmp_path, concurrency=1, progress=stop)
    journal = journal_of(tmp_path)
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("ab") as file:
        file.write(b'{"response": {"choi')  # cut off in the middle of a line
    for thread in threading.enumerate():
        if thread.name == "tracekit-capture":
            thread.join()  # the request that was under way ends
    vllm.seen.clear()
    capture(vllm, prompts, tmp_path)
    assert sorted(str(body["prompt"]) for _, body in vllm.seen) == sorted(TEXTS[3:])
    found = routed(tmp_path)
    assert list(found) == [f"asked-{i}" for i in range(6)]
    assert all((ids == ids_of(text)).all() for text, ids in zip(TEXTS, found.values(), strict=True))


def test_other_sampling_is_another_request(vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path) -> None:
    capture(vllm, prompts, tmp_path)
    vllm.seen.clear()
    capture(vllm, prompts, tmp_path, force=True)
    assert vllm.seen == []
    trace = capture(vllm, prompts, tmp_path, force=True, temperature=0.9, keep_journal=False)
    assert len(vllm.seen) == 6
    assert trace.requests == 6
    assert not journal_of(tmp_path).exists()


def test_two_captures_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("key", {"response": {"choices": []}})
        with pytest.raises(SourceError, match="another capture is writing"), Journal(tmp_path / "j.jsonl"):
            pass
    with Journal(tmp_path / "j.jsonl") as journal:
        assert "key" in journal
        assert journal.response("key") == {"choices": []}


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"null", b"{", b'{"response": 1}', b"\xff\xfe", b"[" * 50_000, b"\x00" * 99]
)
def test_a_damaged_line_of_a_journal_is_not_looked_at(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"response": {"id": 1}})
    path.write_bytes(line + b"\n" + path.read_bytes())
    with Journal(path) as journal:
        journal.add("b", {"response": {"id": 2}})
        assert journal.response("a") == {"id": 1}
        assert journal.response("b") == {"id": 2}
    assert path.read_bytes().startswith(line + b"\n")


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 60))
def test_a_journal_of_any_bytes(noise: bytes, at: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "j.jsonl")
        with Journal(path) as journal:
            for key in "abc":
                journal.add(key, {"response": {"choices": [key]}, "labels": {}})
        data = path.read_bytes()
        path.write_bytes(data[:at] + noise + data[at + cut :])
        with Journal(path) as journal:
            journal.add("d", {"response": {"choices": ["d"]}})
            for key in "abcd":
                assert key not in journal or isinstance(journal.response(key), dict)
            assert journal.response("d") == {"choices": ["d"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "meta_info", "sglext", "nvext", "routed_experts", "id"]), inner, max_size=4
        )
    ),
)


@given(st.dictionaries(st.sampled_from(["choices", "meta_info", "sglext", "routed_experts", "id"]), JSON))
def test_routing_is_looked_for_in_anything(response: dict[str, object]) -> None:
    assert routing_of(response) in (True, False)


# What is refused before the server works


def test_what_the_ingest_would_refuse_is_refused_first(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    capture(vllm, prompts, tmp_path, keep_journal=False)
    vllm.seen.clear()
    with pytest.raises(StoreError, match="there already"):
        capture(vllm, prompts, tmp_path)
    with pytest.raises(StoreError, match="'asked-0' is in trace"):
        capture(vllm, prompts, tmp_path, append=True)
    with pytest.raises(StoreError, match="no trace named 'other' to append to"):
        capture(vllm, prompts, tmp_path, append=True, name="other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(StoreError, match="not a tracekit store"):
        tk.capture_openai(vllm.url, prompts, tmp_path / "full", config=config)
    assert vllm.seen == []
    more = tmp_path / "more.txt"
    more.write_text("seventh\n")
    assert capture(vllm, more, tmp_path, append=True).requests == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": None}, "--num-experts"),
        ({"api": "gnerate"}, "generate"),
        ({"concurrency": 0}, "at least 1"),
        ({"max_tokens": 0}, "at least 1"),
        ({"retries": -1}, "at least 0"),
        ({"temperature": -1.0}, "at least 0"),
        ({"append": True, "force": True}, "--append"),
        ({"name": " "}, "can be seen"),
    ],
)
def test_usage(
    options: dict[str, object], said: str, vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        capture(vllm, prompts, tmp_path, **options)
    assert vllm.seen == []


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "http://user:secret@host", "http://host/?key=secret", "http://h:x"]
)
def test_urls_that_are_refused(url: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        tk.capture_openai(url, prompts, tmp_path / "store", num_experts=8)
    assert "secret" not in str(caught.value)


def test_the_url_may_name_the_endpoint(sglang: FakeServer, prompts: Path, config: Path, tmp_path: Path) -> None:
    for path in ("/v1", "/v1/", "/v1/chat/completions", "/generate"):
        store = tmp_path / path.replace("/", "_")
        tk.capture_openai(sglang.url + path, prompts, store, config=config, keep_journal=False)
    assert [path for path, _ in sglang.seen[::6]] == ["/generate", "/generate", "/v1/chat/completions", "/generate"]
    with pytest.raises(UsageError, match="one of the two"):
        tk.capture_openai(sglang.url + "/generate", prompts, tmp_path / "s", config=config, api="chat")


def test_the_shape_comes_from_the_name_of_the_model(
    vllm: FakeServer, sglang: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    vllm.models = ["allenai/OLMoE-1B-7B-0924"]
    with pytest.raises(SourceError, match="the config"):  # which this server's routing does not have
        capture(vllm, prompts, tmp_path, config=None)
    vllm.models = ["a", "b"]
    with pytest.raises(SourceError, match="--model"):
        capture(vllm, prompts, tmp_path)
    with pytest.raises(SourceError, match="'c'"):
        capture(vllm, prompts, tmp_path, model="c", num_experts=N)
    vllm.models = []
    assert capture(vllm, prompts, tmp_path, model="b", config=None, num_experts=N).name == "b"
    with pytest.raises(UsageError, match="do not say the shape"):
        capture(sglang, prompts, tmp_path, config=None, num_experts=N)
    assert capture(sglang, prompts, tmp_path, config=None, num_experts=N, top_k=K).meta.layers == (0, 1, 2)


# Keys


def test_the_key_is_sent_and_stays_secret(
    vllm: FakeServer,
    prompts: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-very-secret")
    args = ["capture", "openai", vllm.url, "--prompts", str(prompts), "--store", str(tmp_path / "store")]
    args += ["--config", str(config), "--api-key-env", "THE_KEY", "--max-tokens", "4"]
    vllm.always = "401"  # whose message repeats the key
    assert main(args) == 1
    vllm.always = None
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert set(vllm.keys) == {"Bearer sk-very-secret"}
    assert "trace 'tiny' has 6 requests, 48 tokens, 3 MoE layers, 2 of 16 experts per token" in err
    assert "very-secret" not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes()
    monkeypatch.delenv("THE_KEY")
    assert main([*args, "--force"]) == 2
    assert "'THE_KEY' is not set" in capsys.readouterr().err


# The command


def test_the_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", "openai", "--help"]) == 0
    text = capsys.readouterr().out
    assert "tracekit capture openai http" in text
    assert "--enable-return-" in text
    assert main(["capture", "--help"]) == 0
    assert "Capture from a running vLLM or SGLang server." in capsys.readouterr().out
    found = capture_openai_command.params
    assert all(parameter.help for parameter in found if isinstance(parameter, click.Option))


def test_the_command_line(sglang: FakeServer, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "domain": "code"}\n{"prompt": "y", "domain": "prose"}\n')
    args = ["capture", "openai", sglang.url, "--prompts", str(path), "--store", str(tmp_path / "store")]
    args += ["--config", str(config), "--label-fields", "domain", "--label", "run=1", "--ignore-eos", "--seed", "3"]
    assert main([*args, "--quiet", "--delete-journal", "--concurrency", "1", "--max-tokens", "4"]) == 0
    assert capsys.readouterr() == ("", "")
    assert [body["sampling_params"] for _, body in sglang.seen] == [
        {"max_new_tokens": 4, "sampling_seed": 3 + i, "ignore_eos": True} for i in range(2)
    ]
    assert main(["info", str(tmp_path / "store"), "--format", "json"]) == 0
    assert main([*args, "--append", "--force"]) == 2
    assert main(["capture", "opnai"]) == 2
    assert "Did you mean 'openai'?" in capsys.readouterr().err


def test_failures_on_the_command_line_have_one_line(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.always = "400"
    args = ["capture", "openai", vllm.url, "--prompts", str(prompts), "--store", str(tmp_path / "store")]
    assert main([*args, "--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert "6 of 6 requests failed" in err
    assert "status 400" in err
    assert "Traceback" not in err


def test_the_progress_bar_is_for_terminals(vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    args = [sys.executable, "-m", "tracekit", "capture", "openai", vllm.url, "--prompts", str(prompts)]
    args += ["--config", str(config), "--store"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tk.__file__).parents[1])}
    piped = subprocess.run([*args, str(tmp_path / "piped")], check=True, env=environment, capture_output=True)
    assert b"%" not in piped.stderr
    ours, theirs = pty.openpty()
    seen = subprocess.run([*args, str(tmp_path / "seen")], check=True, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert seen.returncode == 0
    assert "100%" in text
    assert "48 tokens" in text


# Real responses


def test_real_vllm_responses(shared: Path, tmp_path: Path) -> None:
    """Responses that vLLM 0.32 gave to token ids, replayed: prompts, routing and token ids arrive as they were."""
    text = (shared / "moe/traces/vllm_http/responses.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    records = [r for r in records if r["request"]["model"] == "tiny-glm" and len(r["response"]["choices"]) == 1]
    chosen = {
        json.dumps(r["request"]["prompt"]): r for r in records if "routed_experts_prompt_start" not in r["request"]
    }
    assert len(chosen) >= 7
    lines = [{"id": r["source"], "token_ids": r["request"]["prompt"], "domain": r["domain"]} for r in chosen.values()]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving("vllm") as server:
        server.models = ["tiny-glm"]
        server.replay = {prompt: r["response"] for prompt, r in chosen.items()}
        trace = tk.capture_openai(
            server.url,
            path,
            tmp_path / "store",
            config=shared / "moe/models/glm4moe",
            label_fields=["domain"],
            max_tokens=48,
        )
    assert (trace.requests, trace.meta.engine_version, trace.meta.layers) == (len(chosen), "0.32.0", (1, 2, 3, 4, 5))
    store = tk.open(tmp_path / "store")
    frame = store.sql("SELECT request_id, label FROM requests ORDER BY request")
    assert frame.rows() == [(line["id"], line["domain"]) for line in lines]
    first = next(iter(chosen.values()))["response"]["choices"][0]
    ids = np.load(io.BytesIO(base64.b64decode(first["routed_experts"])))[:, 1:]
    held = store.sql("SELECT experts FROM routing WHERE request = 0 ORDER BY pos, layer")["experts"].to_list()
    assert (np.array(held).reshape(ids.shape) == ids).all()
    tokens = store.sql("SELECT token_id FROM tokens WHERE request = 0 ORDER BY pos")["token_id"].to_list()
    assert tokens == (first["prompt_token_ids"] + first["token_ids"])[:-1]


def test_whatever_the_server_says_is_an_error_of_ours(
    vllm: FakeServer, prompts: Path, config: Path, tmp_path: Path
) -> None:
    file = io.BytesIO()
    np.save(file, ids_of("first").astype(np.uint8))
    npy = base64.b64encode(file.getvalue()).decode()
    hostile: list[object] = [
        1,
        [],
        "x",
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"routed_experts": 5}]},
        {"choices": [{"routed_experts": npy[:40]}]},
        {"choices": [{"routed_experts": npy}], "usage": {"prompt_tokens": -1, "completion_tokens": "x"}},
        {"choices": [{"routed_experts": npy}], "usage": {"prompt_tokens": 10**30, "completion_tokens": 1}},
        {"meta_info": {"routed_experts": "AAAA"}},
        {"error": {"message": "no"}},
    ]
    for value in hostile:
        vllm.replay = dict.fromkeys(TEXTS, value)
        with pytest.raises(TracekitError):
            capture(vllm, prompts, tmp_path, concurrency=1, retries=0)
        assert not (tmp_path / "store").exists()
        journal_of(tmp_path).unlink(missing_ok=True)
