"""Capture from a transformers model that runs in this process, straight into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tracekit.capture.ahead import Ahead, ahead
from tracekit.capture.calibration import calibrate
from tracekit.capture.default_vectors import DefaultVectors, check_free
from tracekit.capture.dependencies import require
from tracekit.capture.hooks import Taps, tapped
from tracekit.capture.prompts import Prompt, read_prompts
from tracekit.capture.recorder import Recording, record, request_of, trace_meta
from tracekit.capture.speculative import Sampling, check_pair, last_logits, speculate
from tracekit.errors import MissingDependencyError, SourceError, UnsupportedError, UsageError
from tracekit.schema import Request, TraceMeta

if TYPE_CHECKING:
    from tracekit.store import TraceInfo

Progress = Callable[[int, int, int], None]
"""Called with prompts done, prompts in all, and tokens captured so far."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Run:
    """How the model is run."""

    teacher_forcing: bool = False
    """One forward over each text, nothing generated: every row is prefill."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 1
    draft_tokens: int = 0
    """K of speculative decoding; 0: none."""
    predict: tuple[str, ...] = ()
    """What predicts experts ahead of their layers."""
    predict_distance: int = 1
    """How many MoE layers ahead, at most."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("draft_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}", expected=f"at least {least}")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature} and top_p {self.top_p}", expected="0 or more, and above 0 up to 1"
            )
        if self.draft_tokens and (self.teacher_forcing or self.batch_size > 1):
            raise UsageError(
                "a draft model with "
                + ("teacher forcing" if self.teacher_forcing else f"batch_size {self.batch_size}"),
                expected="generation of one request at a time",
            )
        ahead(self.predict, self.predict_distance)

    @property
    def mode(self) -> str:
        """What the run is, in a word."""
        return "teacher_forcing" if self.teacher_forcing else "speculative" if self.draft_tokens else "generate"

    def described(self) -> dict[str, Any]:
        """Return what a reader of the trace should know about the run, JSON-serialisable."""
        known: dict[str, Any] = {"mode": self.mode, "batch_size": self.batch_size}
        if not self.teacher_forcing:
            known |= {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
        known |= {"draft_tokens": self.draft_tokens} if self.draft_tokens else {}
        if self.predict:
            known |= {"predict": list(self.predict), "predict_distance": self.predict_distance}
        return known


def capture_transformers(
    model: str | Path,
    prompts: str | Path | Sequence[str | Path],
    store: str | Path,
    *,
    name: str | None = None,
    teacher_forcing: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 1,
    max_prompt_tokens: int | None = None,
    draft: str | Path | None = None,
    draft_tokens: int = 3,
    predict: str | Sequence[str] | None = None,
    predict_distance: int = 1,
    default_vectors: str | Path | None = None,
    save_default_vectors: str | Path | None = None,
    calibration_share: float = 1.0,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    token_ids: bool = True,
    label_fields: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    append: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TraceInfo:
    """Run a transformers MoE model over prompts and commit what it routed to a store.

    The model runs as transformers runs it; hooks keep the experts that each token was sent to, and the router's
    weights. The store is changed by a single rename at the end: whatever happens before, it stays as it was.

    Parameters
    ----------
    model
        Folder of the model, or its name on the Hugging Face hub. No code of its own is run, and only safetensors
        are loaded.
    prompts
        Files of prompts, see `tracekit.capture.prompts.read_prompts`.
    store
        Directory of the store, created if it is not there.
    name
        Name of the trace; default: the last part of the model's name.
    teacher_forcing
        Route the texts themselves, in one forward each, and generate nothing.
    max_new_tokens, temperature, top_p, seed
        How tokens are generated; temperature 0 is greedy. Draws depend on the seed and the place of the prompt.
    batch_size
        Prompts run together, padded on the left; routing can differ in the last bits of the arithmetic.
    max_prompt_tokens
        Longer prompts are cut at the end.
    draft, draft_tokens
        Draft model of speculative decoding, and K: verification steps are kept with their rejected drafts.
    predict, predict_distance
        Predictors for prefetching, to keep beside the routing what the routers of the next 1 to ``predict_distance``
        MoE layers choose: for the input of the gate that runs (``"next-gate"``), or for the hidden state after this
        layer with its experts' outputs replaced by their default vectors (``"quasi-hidden"``, arXiv 2603.19289). Of
        rejected drafts this is not kept.
    default_vectors, save_default_vectors, calibration_share
        For ``"quasi-hidden"``: the file of the default vectors, or else the share of the prompts, spread evenly, that
        they are calibrated on before the capture begins, and the new ``.npz`` file that keeps them for the next one.
    device
        ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto`` to spread the model (needs accelerate); default: a GPU if there
        is one.
    dtype
        Type of the weights; ``auto``: as the model was saved.
    token_ids
        Whether to keep token ids.
    label_fields, labels
        Fields of the prompts that make up their label, and labels of every request.
    append, force
        Add to an existing trace of that name, or replace it.
    progress
        Called after each batch.

    Returns
    -------
    TraceInfo
        The trace as the store now holds it.

    Raises
    ------
    MissingDependencyError
        torch or transformers is not installed.
    SourceError
        The model cannot be loaded, or the prompts cannot be read or do not fit it.
    UnsupportedError
        Nothing in the model says which experts run.
    StoreError
        The name exists, the directory is not a store, or it cannot be written.
    """
    from tracekit.store.writer import check_name, write_trace

    torch = require("torch")
    require("transformers")
    if draft is not None and draft_tokens < 1:
        raise UsageError(f"draft_tokens is {draft_tokens}", expected="at least 1")
    predict = (predict,) if isinstance(predict, str) else tuple(predict or ())
    _check_vectors(predict, default_vectors, save_default_vectors, calibration_share)
    run = Run(
        teacher_forcing=teacher_forcing,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        draft_tokens=0 if draft is None else draft_tokens,
        predict=predict,
        predict_distance=predict_distance,
    )
    vectors = None if default_vectors is None else DefaultVectors.read(default_vectors)
    asked = read_prompts(prompts, label_fields=label_fields, labels=labels)
    name = _short(model) if name is None else name
    check_name(store, name, append=append, force=force)
    loaded = _load(model, device, dtype)
    notes: list[str] = []
    inputs = _tokenised(asked, str(model), loaded, run, max_prompt_tokens, notes)
    with torch.inference_mode(), _explained(str(model)):
        if "quasi-hidden" in run.predict and vectors is None:
            vectors = calibrate(loaded, _share(inputs, calibration_share))
            if save_default_vectors is not None:
                vectors.save(save_default_vectors)
        predicted = ahead(run.predict, run.predict_distance, vectors)
        if draft is None:
            opened = _plain(loaded, inputs, run, predicted, token_ids=token_ids)
        else:
            helper = _load(draft, device, dtype)
            check_pair(loaded, helper)
            _check_tokens(str(model), str(draft), loaded, helper)
            opened = _with_draft(loaded, helper, _short(draft), inputs, run, predicted, token_ids=token_ids)
        with opened as (meta, requests):
            return write_trace(
                store,
                name,
                meta,
                _finished(requests, asked, progress),
                sources=[Path(p).name for p in ([prompts] if isinstance(prompts, str | Path) else prompts)],
                notes=notes,
                append=append,
                force=force,
            )


@contextmanager
def _plain(
    model: Any, inputs: list[list[int]], run: Run, predicted: Ahead, *, token_ids: bool
) -> Iterator[tuple[TraceMeta, Iterator[Request]]]:
    """Yield what holds for the trace, and the requests as they are made, with the model hooked."""
    torch = require("torch")
    with record(
        model,
        token_ids=token_ids,
        predict=run.predict,
        predict_distance=run.predict_distance,
        default_vectors=predicted.vectors,
    ) as recording:
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))  # shows what the hooks see, and k
        recording.drain()
        meta = recording.meta
        extra = {"capture": {**meta.extra["capture"], **_described(model, run, predicted)}}
        yield replace(meta, extra=extra), _recorded(model, recording, inputs, run)


@contextmanager
def _with_draft(
    model: Any, draft: Any, draft_name: str, inputs: list[list[int]], run: Run, predicted: Ahead, *, token_ids: bool
) -> Iterator[tuple[TraceMeta, Iterator[Request]]]:
    """Do the same with speculative decoding."""
    torch = require("torch")
    with tapped(model, ahead=predicted) as taps:
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
        top_k = taps.take(1).ids.shape[2]
        described = {**_described(model, run, predicted), "draft": draft_name}
        requests = (
            _speculated(model, draft, taps, ids, run, number, token_ids=token_ids) for number, ids in enumerate(inputs)
        )
        yield trace_meta(model, taps, top_k, drafts_included=True, capture=described), requests


def _described(model: Any, run: Run, predicted: Ahead) -> dict[str, Any]:
    known = {**run.described(), "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return known if predicted.vectors is None else {**known, "default_vectors": dict(predicted.vectors.described)}


def _check_vectors(predict: Sequence[str], given: str | Path | None, saved: str | Path | None, share: float) -> None:
    """Check what is said about default vectors before a model is loaded for it."""
    if (given is not None or saved is not None) and "quasi-hidden" not in predict:
        raise UsageError("default vectors, which nothing needs", expected="predict quasi-hidden")
    if given is not None and saved is not None:
        raise UsageError("default vectors both to be read and to be saved", expected="one of the two")
    if not 0 < share <= 1:
        raise UsageError(f"calibration_share is {share}", expected="above 0, up to 1")
    if saved is not None:
        check_free(saved)


def _share(inputs: list[list[int]], share: float) -> list[list[int]]:
    """Return a share of the prompts, at least one, spread evenly over all of them."""
    count = max(1, round(share * len(inputs)))
    return [inputs[i * len(inputs) // count] for i in range(count)]


def _recorded(model: Any, recording: Recording, inputs: list[list[int]], run: Run) -> Iterator[Request]:
    """Run the model over the prompts, a batch at a time."""
    torch = require("torch")
    pad = model.generation_config.pad_token_id
    for first in range(0, len(inputs), run.batch_size):
        chunk = inputs[first : first + run.batch_size]
        width = max(map(len, chunk))
        padded = [[pad] * (width - len(ids)) + ids for ids in chunk]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in chunk]
        given = {
            "input_ids": torch.tensor(padded, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
        }
        if run.teacher_forcing:
            model(**given, use_cache=False, **last_logits(model, 1))
        else:
            sampling = {"temperature": run.temperature, "top_p": run.top_p, "top_k": 0} if run.temperature else {}
            with _seeded(model, run.seed, first):
                model.generate(**given, max_new_tokens=run.max_new_tokens, do_sample=bool(run.temperature), **sampling)
        yield from recording.drain()


@contextmanager
def _seeded(model: Any, seed: int, number: int) -> Iterator[None]:
    """Make draws depend on the seed and the place of the prompt, and leave the caller's random state as it was."""
    torch = require("torch")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed * 1_000_003 + number) % (1 << 63))
        yield


def _speculated(
    model: Any, draft: Any, taps: Taps, ids: list[int], run: Run, number: int, *, token_ids: bool
) -> Request:
    """Decode one prompt speculatively, and make a request of it."""
    eos = model.generation_config.eos_token_id
    done = speculate(
        model,
        draft,
        taps,
        ids,
        max_new_tokens=run.max_new_tokens,
        draft_tokens=run.draft_tokens,
        sampling=Sampling(run.temperature, run.top_p),
        rng=np.random.default_rng([run.seed, number]),
        eos=frozenset([] if eos is None else np.atleast_1d(eos).tolist()),
    )
    request = request_of(str(number), done.pieces, len(ids), len(ids), taps.asks)
    return replace(request, token_ids=request.token_ids if token_ids else None, steps=done.steps)


def _finished(requests: Iterator[Request], prompts: Sequence[Prompt], progress: Progress | None) -> Iterator[Request]:
    """Give the requests, which are in the order of the prompts, the prompts' ids and labels."""
    tokens = 0
    for done, (prompt, request) in enumerate(zip(prompts, requests, strict=True), start=1):
        tokens += len(request.ids)
        yield replace(request, request_id=prompt.request_id, labels=prompt.labels, where=prompt.where)
        if progress:
            progress(done, len(prompts), tokens)


def _short(model: str | Path) -> str:
    """Return the last part of a model's name."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model).rpartition("/")[2]


def _load(model: str | Path, device: str | None, dtype: str) -> Any:
    """Load a model for inference.

    Raises
    ------
    SourceError
        It is not there, or is no causal language model that transformers knows.
    """
    torch, transformers = require("torch"), require("transformers")
    bars = transformers.utils.logging
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}", expected=", ".join(DTYPES))
    if str(model).startswith(("/", ".")) and not Path(model).exists():
        raise SourceError("does not exist", where=str(model), expected="the folder of a model")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(model),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **({"device_map": "auto"} if device == "auto" else {}),
        )
        loaded = (loaded if device == "auto" else loaded.to(device)).eval()
    except ImportError as error:
        raise MissingDependencyError(
            "a library that this model needs is not installed", where=str(model), expected=_first_line(error)
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(
            f"cannot be loaded ({_first_line(error)})",
            where=str(model),
            expected="a folder or a hub name of a causal language model, in safetensors, of a class that transformers "
            "has",
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    for config in {id(c): c for c in (loaded.config, _text_config(loaded.config))}.values():
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # the loss made of them fails on one new token of a padded batch
    # Only what ends a sequence is the model's: its taste in sampling would hide behind the options.
    own = loaded.generation_config
    eos = getattr(own, "eos_token_id", None)
    pad = getattr(own, "pad_token_id", None)
    if pad is None:
        pad = 0 if eos is None else int(np.atleast_1d(eos)[0])
    loaded.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return loaded


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tokeniser(model: str) -> Any:
    try:
        return require("transformers").AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"has no tokenizer that can be loaded ({_first_line(error)})",
            where=model,
            remedy="Give prompts as token_ids in a .jsonl file",
        ) from error


def _tokenised(
    prompts: Sequence[Prompt], model: str, loaded: Any, run: Run, most: int | None, notes: list[str]
) -> list[list[int]]:
    """Return the prompts with their token ids, all of which the model has and has room for."""
    tokeniser = None if all(prompt.token_ids is not None for prompt in prompts) else _tokeniser(model)
    vocabulary = int(loaded.get_input_embeddings().num_embeddings)
    room = getattr(_text_config(loaded.config), "max_position_embeddings", None)
    new = 0 if run.teacher_forcing else run.max_new_tokens - 1
    done: list[list[int]] = []
    cut = 0
    for prompt in prompts:
        ids = _tokens(prompt, tokeniser)
        if most is not None and len(ids) > most:
            ids, cut = ids[:most], cut + 1
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            found = f"tokens {min(ids)} to {max(ids)}" if ids else "no token"
            raise SourceError(found, where=prompt.where, expected=f"tokens 0 to {vocabulary - 1}")
        if isinstance(room, int) and len(ids) + new > room:
            raise SourceError(
                f"{len(ids)} tokens" + (f" and {new + 1} new ones" if new else ""),
                where=prompt.where,
                expected=f"at most {room}, which the model has positions for",
                remedy="Cut prompts with --max-prompt-tokens",
            )
        done.append(ids)
    if cut:
        notes.append(f"{cut} prompts were cut to {most} tokens")
    return done


def _tokens(prompt: Prompt, tokeniser: Any) -> list[int]:
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if prompt.messages is None:
        return list(tokeniser(prompt.text)["input_ids"])
    try:
        text = tokeniser.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise SourceError(
            f"the model's chat template refuses the messages ({_first_line(error)})",
            where=prompt.where,
            remedy="Give a prompt as text instead",
        ) from error
    return list(tokeniser(text, add_special_tokens=False)["input_ids"])


def _check_tokens(model: str, draft: str, loaded: Any, helper: Any) -> None:
    """Refuse a draft model whose tokens mean something else, as far as its tokenizer tells."""
    transformers = require("transformers")
    try:
        ours, theirs = (transformers.AutoTokenizer.from_pretrained(m).get_vocab() for m in (model, draft))
        same = ours == theirs
    except (OSError, ValueError, KeyError, ImportError):  # no tokenizer at all: the embeddings have to do
        same = loaded.get_input_embeddings().num_embeddings == helper.get_input_embeddings().num_embeddings
    if not same:
        raise UnsupportedError(
            "has another vocabulary than the model", where=draft, expected="a draft model with the same tokenizer"
        )


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Say what to do where the device's memory is too small."""
    torch = require("torch")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SourceError(
            "does not fit the device's memory",
            where=model,
            remedy="Use a smaller --batch-size, shorter prompts, --dtype bfloat16, or --device auto or cpu",
        ) from error
