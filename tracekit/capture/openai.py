"""Capture from a running server: vLLM or SGLang answers prompts, and its routing becomes a trace."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Literal, cast

from tracekit.capture.journal import Journal
from tracekit.capture.prompts import Prompt, read_prompts
from tracekit.capture.server import Api, RefusedError, Server, routing_of
from tracekit.errors import SourceError, StoreError, TracekitError, UsageError
from tracekit.schema import Request
from tracekit.sources import IngestOptions, open_source
from tracekit.sources.bundled import find
from tracekit.store import Store, ingest
from tracekit.store.location import on_disk
from tracekit.store.writer import check_name, check_words, reading_options

if TYPE_CHECKING:
    from tracekit.store import TraceInfo

APIS = ("auto", "chat", "completions", "generate")

Progress = Callable[[int, int, int], None]
"""Called with requests done, requests in all, and rows of routing so far."""

_TICK = 0.2
"""Seconds between two looks at whether the user wants to stop."""


@dataclass(frozen=True, slots=True)
class _Sampling:
    max_tokens: int
    temperature: float | None
    seed: int | None
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class _Task:
    """One request that is to be made."""

    prompt: Prompt
    api: Api
    body: Mapping[str, Any]
    key: str


def capture_openai(
    url: str,
    prompts: str | Path | Sequence[str | Path],
    store: str | Path,
    *,
    name: str | None = None,
    model: str | None = None,
    api: Literal["auto", "chat", "completions", "generate"] = "auto",
    config: str | Path | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    label_fields: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    max_tokens: int = 128,
    temperature: float | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    concurrency: int = 8,
    retries: int = 5,
    backoff: float = 0.5,
    timeout: float = 600.0,
    api_key: str | None = None,
    journal: str | Path | None = None,
    keep_journal: bool = True,
    skip_failed: bool = False,
    append: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TraceInfo:
    """Ask a running vLLM or SGLang server for completions with routed experts and commit them to a store.

    Each response goes to a journal, a file of JSON lines beside the store, as it arrives. After an interruption the
    same call makes only the requests that are missing. At the end the journal is ingested as any file of responses.

    Parameters
    ----------
    url
        Where the server listens, with or without ``/v1``; the path of an endpoint chooses the ``api``.
    prompts
        Files of prompts, see `tracekit.capture.prompts.read_prompts`.
    store
        Directory of the store.
    name
        Name of the trace; default: the model's.
    model
        Name of the model as the server knows it; default: the only one it serves.
    api
        ``chat``, ``completions`` or ``generate`` (SGLang's own); default: ``chat`` for messages, else ``completions``
        from vLLM and ``generate`` from SGLang.
    config
        The model's ``config.json`` or the name of a bundled model; default: the bundled one of the model's name.
    num_experts, top_k
        N and k where no config says so.
    label_fields, labels
        Fields of the prompts that make up the label of a request, and labels of all of them.
    max_tokens, temperature, ignore_eos
        Sampling; the temperature is the server's own by default.
    seed
        Seed of the first request; each later one has the next.
    concurrency
        Requests at the same time.
    retries, backoff
        How often a request is repeated after a connection error or status 408, 429 or 5xx, and the seconds before the
        first time, which double each time.
    timeout
        Seconds for one response.
    api_key
        Sent as a bearer token; it is never stored, logged or shown.
    journal, keep_journal
        The journal's file, default ``STORE.NAME.responses.jsonl``, and whether it stays after the ingest.
    skip_failed
        Ingest what there is even if some requests failed.
    append, force
        Add to the trace of that name, or replace it.
    progress
        Called after each response with requests done, requests in all, and rows so far.

    Returns
    -------
    TraceInfo
        The trace as the store now holds it.

    Raises
    ------
    SourceError
        A prompt is malformed, the server returns no routing or something that is not what it should be, or requests
        failed; what arrived is in the journal.
    StoreError
        The name exists, or the directory is not a store.
    UsageError
        An argument is out of range, or N is not known.
    """
    check_words(name, append=append, force=force)
    _check(max_tokens=max_tokens, concurrency=concurrency, retries=retries, timeout=timeout, temperature=temperature)
    found = read_prompts(prompts, label_fields=label_fields, labels=labels)
    server = Server(url, timeout=timeout, retries=retries, backoff=backoff, api_key=api_key)
    if server.api is not None:
        if api not in ("auto", server.api):
            raise UsageError(f"api {api!r} with the URL of {server.api!r}", expected="one of the two")
        api = server.api
    if api not in APIS:
        raise UsageError(f"no api {api!r}", expected=", ".join(APIS))
    engine, served = server.identify(model)
    trace_name = name if name is not None else served.rstrip("/").rpartition("/")[2] or served
    root = on_disk(store)
    _check_store(root, trace_name, found, append=append, force=force)
    notes: list[str] = []
    if config is None and num_experts is None:
        known = find(served)
        if known is None:
            raise UsageError(
                f"how many experts a layer of {served!r} has is not known",
                remedy="Give --config, the model's config.json or a name of `tracekit models`, or --num-experts",
            )
        config = known.name
        notes.append(f"experts and layers were taken from the bundled model {config!r}, by the name of the model")
    options = reading_options(config=config, num_experts=num_experts, top_k=top_k)
    if options.config is None and top_k is None and (engine == "sglang" or api == "generate"):
        raise UsageError(
            "SGLang's responses do not say the shape of their routing",
            remedy="Give --config, the model's config.json or a name of `tracekit models`, or --top-k",
        )
    sampling = _Sampling(max_tokens, temperature, seed, ignore_eos)
    tasks = [_task(prompt, i, api, engine, served, sampling) for i, prompt in enumerate(found)]
    path = Path(journal) if journal is not None else _journal_path(root, trace_name)
    with Journal(path) as book:
        failed = _run(server, tasks, book, options, concurrency, progress)
        there = [task for task in tasks if task.key in book]
        if not there or (failed and not skip_failed):
            raise _failure(failed, len(tasks), path)
        with _responses(book, there) as file:
            trace = ingest(
                file,
                root,
                name=trace_name,
                config=config,
                num_experts=num_experts,
                top_k=top_k,
                label_fields=label_fields,
                labels=labels,
                append=append,
                force=force,
            )
    if failed:
        notes.append(f"{len(failed)} of {len(tasks)} requests failed and were left out: {failed[0]}")
    if keep_journal:
        notes.append(f"the server's responses are kept in {path}")
    else:
        path.unlink(missing_ok=True)
    return replace(trace, notes=(*trace.notes, *notes))


def _check(**values: float | None) -> None:
    least = {"max_tokens": 1, "concurrency": 1, "retries": 0, "timeout": 0.001, "temperature": 0}
    for name, value in values.items():
        if value is not None and not least[name] <= value < 1 << 31:
            raise UsageError(f"{name.replace('_', ' ')} {value:g}", expected=f"at least {least[name]:g}")


def _check_store(root: Path, name: str, prompts: Sequence[Prompt], *, append: bool, force: bool) -> None:
    """Refuse, before the server works for nothing, what the ingest would refuse."""
    check_name(root, name, append=append, force=force)
    if append:
        opened = Store(root)
        known = set(opened.requests(opened.trace(name))["request_id"])
        again = next((prompt for prompt in prompts if prompt.request_id in known), None)
        if again is not None:
            raise StoreError(
                f"request {again.request_id!r} is in trace {name!r} already",
                where=again.where,
                remedy="Give the prompts other ids, or replace the trace with --force",
            )


def _journal_path(root: Path, name: str) -> Path:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return root.absolute().parent / f"{root.absolute().name}.{plain[:100]}.responses.jsonl"


def _task(prompt: Prompt, index: int, choice: str, engine: str | None, model: str, sampling: _Sampling) -> _Task:
    api: Api = "chat" if prompt.messages is not None else "generate" if engine == "sglang" else "completions"
    if choice != "auto":
        api = cast("Api", choice)
    body: dict[str, Any]
    seed = None if sampling.seed is None else sampling.seed + index
    if api == "generate":
        if prompt.messages is not None:
            raise UsageError(f"{prompt.where} has messages, which /generate does not take", expected="--api chat")
        parameters = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "sampling_seed": seed,
            "ignore_eos": sampling.ignore_eos or None,
        }
        body = {"text": prompt.text} if prompt.token_ids is None else {"input_ids": list(prompt.token_ids)}
        body["sampling_params"] = {key: value for key, value in parameters.items() if value is not None}
        body["return_routed_experts"] = True
    else:
        body = {"model": model, **_input(prompt, api), "max_tokens": sampling.max_tokens}
        more = {"temperature": sampling.temperature, "seed": seed, "ignore_eos": sampling.ignore_eos or None}
        body.update({key: value for key, value in more.items() if value is not None})
        # vLLM's routing needs no field of the request, SGLang's does; token ids are vLLM's alone.
        if engine != "sglang":
            body["return_token_ids"] = True
        if engine != "vllm":
            body["return_routed_experts"] = True
    return _Task(prompt, api, body, Journal.key(prompt.request_id, api, model, body))


def _input(prompt: Prompt, api: Api) -> dict[str, Any]:
    if api == "completions":
        if prompt.messages is not None:
            raise UsageError(f"{prompt.where} has messages, which completions do not take", expected="--api chat")
        return {"prompt": prompt.text if prompt.token_ids is None else list(prompt.token_ids)}
    if prompt.token_ids is not None:
        raise UsageError(f"{prompt.where} has token ids, which chat does not take", expected="--api completions")
    return {"messages": list(prompt.messages or ()) or [{"role": "user", "content": prompt.text}]}


def _run(
    server: Server,
    tasks: Sequence[_Task],
    book: Journal,
    options: IngestOptions,
    concurrency: int,
    progress: Progress | None,
) -> list[TracekitError]:
    """Make the requests that are missing from the journal and return the errors of those that failed."""
    waiting: Queue[_Task] = Queue()
    results: Queue[tuple[_Task, Any, bool]] = Queue()
    missing = [task for task in tasks if task.key not in book]
    for task in missing:
        waiting.put(task)
    stop, arrived = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except Empty:
                return
            try:
                result = _answer(server, task, options, stop)
                arrived.set()
                results.put((task, result, False))
            except BaseException as error:  # every error reaches the caller, who waits for one result a task
                hopeless = _hopeless(error, arrived.is_set())
                if hopeless:
                    stop.set()  # here, before the next request: the caller may come to it much later
                results.put((task, error, hopeless))

    done, rows = len(tasks) - len(missing), 0
    failed: list[TracekitError] = []
    if progress:
        progress(done, len(tasks), rows)
    # Daemons: an interrupt does not wait for a server that takes its time.
    workers = [
        threading.Thread(target=work, name="tracekit-capture", daemon=True)
        for _ in range(min(concurrency, len(missing)))
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in missing:
            task, result, hopeless = _next(results)
            if hopeless:
                raise result
            if isinstance(result, TracekitError):
                failed.append(result)
            else:
                response, tokens = result
                record = {"labels": dict(task.prompt.labels), "request": dict(task.body), "response": response}
                book.add(task.key, record)
                rows += tokens
            done += 1
            if progress:
                progress(done, len(tasks), rows)
    finally:
        stop.set()
    return failed


class _UselessError(SourceError):
    """A response came that holds no routing, or none that can be read."""


def _hopeless(error: BaseException, arrived: bool) -> bool:
    """Whether an error will meet every request: a server that has returned good routing once can do it."""
    return (
        not isinstance(error, TracekitError)
        or isinstance(error, RefusedError)
        or (isinstance(error, _UselessError) and not arrived)
    )


def _next(results: Queue[tuple[_Task, Any, bool]]) -> tuple[_Task, Any, bool]:
    """Wait for a result in short steps, so that an interrupt gets through on every platform."""
    while True:
        with contextlib.suppress(Empty):
            return results.get(timeout=_TICK)


def _answer(server: Server, task: _Task, options: IngestOptions, stop: threading.Event) -> tuple[Any, int]:
    """Return a response that the reader takes, and its rows of routing; ask twice for one that it does not."""
    for last in (False, True):
        response = server.ask(task.api, task.body, stop)
        if not routing_of(response):
            raise _UselessError(
                "the server answered without routed experts",
                where=server.endpoint(task.api),
                expected="routing in every response",
                remedy="Start vLLM (0.22 or newer) or SGLang (0.5.7 or newer) with --enable-return-routed-experts",
            )
        try:
            return response, _rows(task, response, options)
        except SourceError as error:
            if last or stop.is_set():
                raise _UselessError(
                    error.found,
                    where=f"{server.endpoint(task.api)}, request {task.prompt.request_id!r}",
                    expected=error.expected,
                    remedy=error.remedy,
                ) from error
    raise AssertionError


def _rows(task: _Task, response: Any, options: IngestOptions) -> int:
    """Read one response as it will be read in the end, and return its rows."""
    with tempfile.TemporaryDirectory(prefix="tracekit-") as folder:
        file = Path(folder, "response.jsonl")
        file.write_text(_line(task, response) + "\n", encoding="utf-8")
        return sum(len(found.ids) for found in open_source([file], options).requests() if isinstance(found, Request))


def _line(task: _Task, response: Any) -> str:
    """Return the record that is ingested: the response under the prompt's id, its labels and what was asked."""
    response = dict(response)
    if isinstance(response.get("meta_info"), dict):
        response["meta_info"] = {**response["meta_info"], "id": task.prompt.request_id}
    if "choices" in response:
        response["id"] = task.prompt.request_id
    record = {"labels": dict(task.prompt.labels), "request": dict(task.body), "response": response}
    return json.dumps(record, ensure_ascii=True)


@contextlib.contextmanager
def _responses(book: Journal, tasks: Sequence[_Task]) -> Iterator[Path]:
    """Yield a file of the journal's responses in the order of the prompts, under the prompts' ids."""
    with tempfile.TemporaryDirectory(prefix=".tracekit-", dir=book.path.parent) as folder:
        file = Path(folder, book.path.name)
        with file.open("w", encoding="utf-8") as stream:
            for task in tasks:
                stream.write(_line(task, book.response(task.key)) + "\n")
        yield file


def _failure(failed: Sequence[TracekitError], total: int, journal: Path) -> TracekitError:
    first = failed[0]
    return SourceError(
        f"{len(failed)} of {total} requests failed, the first with: {first}",
        remedy=f"The {total - len(failed)} other responses are in {journal}: the same command asks for the missing "
        "ones only, and --skip-failed ingests without them",
    )
