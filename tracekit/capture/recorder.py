"""Record what a transformers model routes while it runs in this process.

Forwards become requests by these rules. A ``generate`` call is one batch of requests: rows of a position that is run
again replace the earlier ones, and what is fed after a sequence's end is dropped. A forward by itself is a batch of
requests too; one that continues the KV cache of such a forward continues its requests. Positions count the tokens
whose attention mask is 1, so padding on either side leaves no trace.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracekit.capture.ahead import Ask, ahead
from tracekit.capture.default_vectors import DefaultVectors
from tracekit.capture.dependencies import require
from tracekit.capture.hooks import Rows, Taps, tapped
from tracekit.errors import SourceError, UnsupportedError
from tracekit.schema import Predictions, Request, TraceMeta

if TYPE_CHECKING:
    from tracekit.store import TraceInfo

AnyArray = NDArray[Any]


@dataclass(slots=True)
class Piece:
    """Rows of consecutive positions of one sequence."""

    start: int
    ids: AnyArray
    weights: AnyArray | None
    token_ids: AnyArray | None
    predicted: AnyArray | None = None
    """``[rows, asks, layers, k]`` what was predicted, see `tracekit.capture.hooks.Rows`."""

    def cut(self, rows: int) -> Piece:
        """Return the first rows."""
        beside = (self.weights, self.token_ids, self.predicted)
        return Piece(self.start, self.ids[:rows], *(None if array is None else array[:rows] for array in beside))


@dataclass(slots=True)
class _Sequence:
    pieces: list[Piece] = field(default_factory=list)
    prompt_len: int | None = None
    decode_start: int | None = None

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.pieces[-1].start + len(self.pieces[-1].ids) if self.pieces else 0

    def truncate(self, position: int) -> None:
        """Drop rows at or after a position."""
        while self.pieces and self.pieces[-1].start >= position:
            self.pieces.pop()
        if self.pieces and self.end > position:
            self.pieces[-1] = self.pieces[-1].cut(position - self.pieces[-1].start)


@dataclass(slots=True, eq=False)
class _Batch:
    """The sequences of one ``generate`` call, or of one forward and those that continue it."""

    sequences: list[_Sequence] = field(default_factory=list)
    prompt_width: int | None = None
    """Columns of the prompt in ``generate``, padding included."""
    mask: AnyArray | None = None
    """The prompt's attention mask in ``generate``."""
    generating: bool = False
    cache: Callable[[], Any] = field(default=lambda: None)


@dataclass(slots=True)
class _Forward:
    """One forward that has begun."""

    batch: _Batch
    shape: tuple[int, int]
    keep: AnyArray
    """``[batch, length]`` whether each token is real."""
    starts: AnyArray
    """``[batch]`` position of the first real token."""
    prompt_lens: AnyArray | None
    token_ids: AnyArray | None


class Recording:
    """What `record` records; complete when its block ends.

    Each entry of `requests` can be given an id or labels of its own before `save`.
    """

    def __init__(self, model: Any, taps: Taps, *, token_ids: bool = True) -> None:
        self._model = model
        self._taps = taps
        self._keep_tokens = token_ids
        self._signature = inspect.signature(model.forward)
        self._batches: list[_Batch] = []
        self._open: _Forward | None = None
        self._generating: _Batch | None = None
        self._stray = False
        self._top_k: int | None = None
        self._made: list[Request] | None = None
        self._drained = 0

    @property
    def requests(self) -> list[Request]:
        """The requests, in the order in which they began; ids are ``0``, ``1``, … unless they are changed."""
        if self._made is not None:
            return self._made
        return self._make()

    @property
    def meta(self) -> TraceMeta:
        """Shape and provenance of the trace.

        Raises
        ------
        SourceError
            No forward was recorded, so that k is not known.
        """
        if self._top_k is None:
            raise SourceError("nothing was recorded", expected="a forward or generate call of the model in the block")
        return trace_meta(self._model, self._taps, self._top_k)

    def save(
        self,
        store: str | Path,
        *,
        name: str,
        labels: Mapping[str, str] | None = None,
        append: bool = False,
        force: bool = False,
    ) -> TraceInfo:
        """Write the requests to a store as one trace.

        Parameters
        ----------
        store
            Directory of the store, created if it is not there.
        name
            Name of the trace.
        labels
            Labels that every request gets beside its own.
        append, force
            Add to an existing trace of that name, or replace it.

        Raises
        ------
        SourceError
            Nothing was recorded, or two requests have the same id.
        StoreError
            The name exists, the directory is not a store, or it cannot be written.
        """
        from tracekit.store import write_trace

        requests = [replace(request, labels={**request.labels, **(labels or {})}) for request in self.requests]
        return write_trace(store, name, self.meta, requests, append=append, force=force)

    def drain(self) -> list[Request]:
        """Return the requests so far and forget them: for those who record without end."""
        done = self._make()
        self._batches.clear()
        self._drained += len(done)
        return done

    def _make(self) -> list[Request]:
        sequences = [sequence for batch in self._batches for sequence in batch.sequences if sequence.pieces]
        return [
            request_of(str(number), s.pieces, s.prompt_len, s.decode_start, self._taps.asks)
            for number, s in enumerate(sequences, start=self._drained)
        ]

    def _finish(self) -> None:
        if self._stray or (self._open is None and self._taps.touched):
            raise UnsupportedError(
                f"a part of the {type(self._model).__name__} ran by itself",
                expected="calls of the model that is recorded",
                remedy="Record the part that is called, for example tk.record(model.model)",
            )
        self._made = self._make()

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stray |= self._open is None and self._taps.touched
        self._taps.clear()
        self._open = None  # one that failed leaves none behind
        given = _bound(self._signature, args, kwargs)
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        tokens = embeddings if ids is None else ids
        if tokens is None:
            raise UnsupportedError("a forward without input_ids", expected="input_ids or inputs_embeds")
        size, length = int(tokens.shape[0]), int(tokens.shape[1])
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        batch = self._generating or (self._continued(cache) if past else None) or _Batch()
        mask = self._mask(given.get("attention_mask"), batch, size, past, length)
        past = mask.shape[1] - length
        keep = mask[:, past:] != 0
        prompt = None if batch.prompt_width is None else mask[:, : batch.prompt_width].sum(1)
        token_ids = ids.cpu().numpy() if self._keep_tokens and ids is not None else None
        self._open = _Forward(batch, (size, length), keep, mask[:, :past].sum(1), prompt, token_ids)

    def _continued(self, cache: Any) -> _Batch | None:
        return next((b for b in reversed(self._batches) if not b.generating and b.cache() is cache), None)

    def _mask(self, mask: Any, batch: _Batch, size: int, past: int, length: int) -> AnyArray:
        """Return the attention mask ``[batch, past + length]`` as 0 and 1."""
        if mask is not None and hasattr(mask, "dim") and mask.dim() == 2:
            if batch.generating or mask.shape[1] == past + length:
                return _ones(mask)
            raise UnsupportedError(
                f"an attention mask over {mask.shape[1]} tokens",
                expected=f"one over the {past} in the cache and the {length} new ones",
            )
        if mask is not None and not batch.generating:
            raise UnsupportedError(
                "an attention mask that is no matrix, which does not tell padding from causality",
                expected="a mask [batch, tokens] of 0 and 1",
            )
        full = np.ones((size, past + length), np.int64)
        if batch.mask is not None:
            given = np.repeat(batch.mask, size // len(batch.mask), axis=0)
            width = min(given.shape[1], full.shape[1])
            full[:, :width] = given[:, :width]
        return full

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        forward, self._open = self._open, None
        if forward is None:
            return
        size, length = forward.shape
        rows = self._taps.take(size * length)
        self._top_k = rows.ids.shape[2]
        batch = forward.batch
        if batch not in self._batches:
            self._batches.append(batch)
        if not batch.sequences:
            batch.sequences = [_Sequence() for _ in range(size)]
        if len(batch.sequences) != size:
            raise UnsupportedError(
                f"a batch of {size} where there were {len(batch.sequences)} sequences",
                expected="the same sequences throughout a call",
            )
        for number, sequence in enumerate(batch.sequences):
            self._extend(sequence, forward, rows, number)
        cache = getattr(output, "past_key_values", None)
        if not batch.generating and cache is not None:
            batch.cache = weakref.ref(cache)

    def _extend(self, sequence: _Sequence, forward: _Forward, rows: Rows, number: int) -> None:
        """Give a sequence its rows of a forward."""
        length = forward.shape[1]
        at = number * length + np.flatnonzero(forward.keep[number])
        start = int(forward.starts[number])
        if forward.prompt_lens is not None:
            sequence.prompt_len = sequence.decode_start = int(forward.prompt_lens[number])
        elif sequence.prompt_len is None and sequence.decode_start is None and length == 1 and start:
            sequence.decode_start = start  # the cache was filled before the recording began
        elif sequence.decode_start in (None, sequence.end) and (length > 1 or not sequence.pieces):
            sequence.prompt_len = sequence.decode_start = start + len(at)
        if not len(at):
            return
        sequence.truncate(start)
        tokens = None if forward.token_ids is None else forward.token_ids[number][forward.keep[number]].astype(np.int64)
        weights = None if rows.weights is None else rows.weights[at]
        predicted = None if rows.predicted is None else rows.predicted[at]
        sequence.pieces.append(Piece(start, rows.ids[at], weights, tokens, predicted))

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``generate`` and make its sequences one batch of requests."""
        given = _bound(inspect.signature(generate), args, kwargs)
        config, own = given.get("generation_config"), getattr(self._model, "generation_config", None)

        def setting(name: str) -> Any:
            for value in (given.get(name), getattr(config, name, None), getattr(own, name, None)):
                if value is not None:
                    return value
            return None

        if (setting("num_beams") or 1) > 1:
            raise UnsupportedError(
                "beam search: its beams change places, so that no row of the batch is one sequence",
                expected="greedy decoding or sampling",
            )
        prompt = next((given[k] for k in ("input_ids", "inputs", "inputs_embeds") if given.get(k) is not None), None)
        mask = given.get("attention_mask")
        batch = _Batch(
            generating=True,
            prompt_width=None if prompt is None else int(prompt.shape[1]),
            mask=None if mask is None else _ones(mask),
        )
        self._generating = batch
        try:
            result = generate(*args, **kwargs)
        except BaseException:
            self._batches = [b for b in self._batches if b is not batch]
            raise
        finally:
            self._generating = None
        sequences = getattr(result, "sequences", result)
        if hasattr(sequences, "dim") and sequences.dim() == 2 and batch.sequences:
            width = 0 if given.get("inputs_embeds") is not None else batch.prompt_width or 1
            # Stopped by something else than its end token, a sequence shows only by what fills it up.
            stopped = setting("stop_strings") is not None or given.get("stopping_criteria") is not None
            pad = setting("pad_token_id") if stopped and len(batch.sequences) > 1 else None
            _end(batch.sequences, sequences.cpu().numpy()[:, width:], setting("eos_token_id"), pad)
        return result


def _end(sequences: list[_Sequence], outputs: AnyArray, eos: Any, pad: Any) -> None:
    """Drop the rows of what a batch was fed after a sequence had ended.

    Parameters
    ----------
    sequences
        The recorded sequences.
    outputs
        ``[batch, tokens]`` what was generated, filled up after the end of a sequence.
    eos, pad
        Token ids that end a sequence, and the one that fills up where something else can end one.
    """
    ends = np.isin(outputs, np.atleast_1d(np.asarray([] if eos is None else eos, np.int64)))
    for sequence, output, ended in zip(sequences, outputs, ends, strict=True):
        count = int(ended.argmax()) + 1 if ended.any() else len(output)
        if not ended.any() and pad is not None:
            while count and output[count - 1] == pad:
                count -= 1
        if sequence.prompt_len is not None:
            sequence.truncate(sequence.prompt_len + max(0, count - 1))


def request_of(
    request_id: str,
    pieces: Sequence[Piece],
    prompt_len: int | None,
    decode_start: int | None,
    asks: Sequence[Ask] = (),
) -> Request:
    """Make a request of the pieces of its sequence, in order."""
    ids = np.concatenate([piece.ids for piece in pieces])
    weights = [piece.weights for piece in pieces if piece.weights is not None]
    tokens = [piece.token_ids for piece in pieces if piece.token_ids is not None]
    return Request(
        request_id=request_id,
        ids=ids,
        first_pos=pieces[0].start,
        prompt_len=prompt_len,
        decode_start=decode_start,
        token_ids=np.concatenate(tokens) if len(tokens) == len(pieces) else None,
        weights=np.concatenate(weights) if len(weights) == len(pieces) else None,
        predictions=_predictions([piece.predicted for piece in pieces if piece.predicted is not None], asks),
    )


def _predictions(pieces: Sequence[AnyArray], asks: Sequence[Ask]) -> tuple[Predictions, ...]:
    """Return what was predicted of all pieces, by predictor and distance."""
    if not pieces:
        return ()
    predicted = np.concatenate(pieces)
    rows, _, layers, _ = predicted.shape
    return tuple(
        Predictions(
            predictor=predictor,
            distance=distance,
            ids=predicted[:, entry],
            known=np.broadcast_to(np.arange(layers) >= distance, (rows, layers)),
        )
        for entry, (predictor, distance) in enumerate(asks)
    )


def trace_meta(
    model: Any,
    taps: Taps,
    top_k: int,
    *,
    drafts_included: bool = False,
    capture: Mapping[str, Any] | None = None,
) -> TraceMeta:
    """Say what holds for a trace of a model.

    Parameters
    ----------
    model, taps
        The model, and the hooks that recorded it.
    top_k
        k as it ran.
    drafts_included
        Whether verification steps are kept.
    capture
        How it was captured, JSON-serialisable.
    """
    name = getattr(model, "name_or_path", None) or taps.config.name
    return TraceMeta(
        num_experts=taps.config.num_experts,
        top_k=top_k,
        layers=taps.layers,
        source_format="transformers",
        # A folder's name says which model it is; where it lies is nobody's business.
        model=None if not name else Path(name).name if Path(name).is_dir() else name,
        engine="transformers",
        engine_version=require("transformers").__version__,
        id_space="logical",
        router_order=taps.ordered,
        native_top_k=taps.config.top_k,
        drafts_included=drafts_included,
        extra={"capture": {"ids_from": list(taps.sources), **(capture or {})}},
    )


@contextmanager
def record(
    model: Any,
    *,
    token_ids: bool = True,
    predict: str | Sequence[str] | None = None,
    predict_distance: int = 1,
    default_vectors: DefaultVectors | str | Path | None = None,
) -> Iterator[Recording]:
    """Record the routing of every call of a transformers model in the block.

    ::

        with tk.record(model) as trace:
            model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
        trace.save("traces", name="notebook")

    Parameters
    ----------
    model
        A transformers model with routed experts; it computes what it would compute without.
    token_ids
        Whether to keep the token ids.
    predict, predict_distance
        Predictors for prefetching, to keep beside the routing what the routers of the next 1 to ``predict_distance``
        MoE layers choose: for the input of the gate that runs (``"next-gate"``), or for the hidden state after this
        layer with its experts' outputs replaced by their default vectors (``"quasi-hidden"``, arXiv 2603.19289).
    default_vectors
        For ``"quasi-hidden"``: of `tracekit.capture.calibration.calibrate`, or the file that they were saved to.

    Raises
    ------
    UnsupportedError
        The model has no MoE layers that can be hooked, or no routers that can predict; or, from the call itself, it
        does what no trace can tell: beam search, a mask that hides what is padding.
    UsageError
        ``predict`` is no predictor, the model has too few MoE layers for the distance, or the default vectors are
        missing or another model's.
    """
    if isinstance(default_vectors, str | Path):
        default_vectors = DefaultVectors.read(default_vectors)
    with tapped(model, ahead=ahead(predict, predict_distance, default_vectors)) as taps:
        recording = Recording(model, taps, token_ids=token_ids)
        with ExitStack() as undo:
            undo.callback(model.register_forward_pre_hook(recording._before, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(recording._after).remove)
            if hasattr(model, "generate"):
                before, generate = model.__dict__.get("generate"), model.generate
                model.generate = functools.wraps(generate)(functools.partial(recording._generate, generate))
                undo.callback(_restore, model, before)
            yield recording
        recording._finish()


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, those in its ``**kwargs`` included."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _ones(mask: Any) -> AnyArray:
    """Return a mask tensor as 0 and 1."""
    return np.asarray(mask.cpu().numpy() != 0, np.int64)


def _restore(model: Any, generate: Any) -> None:
    if generate is None:
        del model.generate
    else:
        model.generate = generate
