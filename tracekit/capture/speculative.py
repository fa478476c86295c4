"""Speculative decoding with a draft model, every verified row kept.

A step drafts K tokens with the small model and verifies them with the large one in a single forward over K + 1 rows:
the last committed token and the drafts. The rule by which drafts are accepted leaves the large model's distribution as
it is (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.capture.dependencies import require
from tracekit.capture.hooks import Taps
from tracekit.capture.recorder import Piece
from tracekit.errors import UnsupportedError
from tracekit.schema import VerifySteps

Probabilities = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits."""

    temperature: float = 0.0
    """0: the largest logit."""
    top_p: float = 1.0
    """Smallest probability mass of the most likely tokens that are kept."""

    def distribution(self, logits: NDArray[np.floating[Any]], size: int | None = None) -> Probabilities:
        """Return the probabilities of the tokens.

        Parameters
        ----------
        logits
            ``[..., vocabulary]``.
        size
            Vocabulary of the result: what a draft model has more is cut off, what it has less gets probability 0.
        """
        logits = np.asarray(logits, np.float64)[..., :size]
        out: NDArray[np.float64]
        if not self.temperature:
            out = np.zeros_like(logits)
            np.put_along_axis(out, logits.argmax(-1, keepdims=True), 1.0, -1)
        else:
            out = np.exp((logits - logits.max(-1, keepdims=True)) / self.temperature)
            out /= out.sum(-1, keepdims=True)
            if self.top_p < 1:
                order = np.argsort(-out, axis=-1, kind="stable")
                mass = np.take_along_axis(out, order, -1)
                drop = mass.cumsum(-1) - mass >= self.top_p  # the token that reaches top_p stays
                np.put_along_axis(out, order, np.where(drop, 0.0, mass), -1)
                out /= out.sum(-1, keepdims=True)
        missing = 0 if size is None else size - out.shape[-1]
        return np.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, missing)]) if missing else out


def draw(probabilities: Probabilities, rng: np.random.Generator) -> int:
    """Draw a token from probabilities ``[vocabulary]``."""
    # The last token of a positive probability bounds what rounding could let through.
    at = np.searchsorted(probabilities.cumsum(), rng.random() * probabilities.sum(), side="right")
    return int(min(at, np.flatnonzero(probabilities)[-1]))


def verify(
    target: Probabilities, draft: Probabilities, drafts: Sequence[int], rng: np.random.Generator
) -> tuple[int, int]:
    """Decide how many drafts are accepted, and draw the token after them.

    Draft i is accepted with probability ``min(1, p_i(x) / q_i(x))``; after the first rejection the token comes from
    the rest ``max(0, p - q)``, after the last acceptance from p.

    Parameters
    ----------
    target
        p, ``[drafts + 1, vocabulary]``.
    draft
        q, ``[drafts, vocabulary]``, from which the drafts were drawn.
    drafts
        The drafted tokens.
    rng
        Source of the draws.

    Returns
    -------
    tuple
        Drafts accepted, and the next token.
    """
    for i, token in enumerate(drafts):
        if rng.random() * draft[i, token] < target[i, token]:
            continue
        rest = np.maximum(target[i] - draft[i], 0)
        return i, draw(rest if rest.any() else target[i], rng)
    return len(drafts), draw(target[len(drafts)], rng)


@dataclass(slots=True)
class Speculated:
    """What speculative decoding of one prompt produced."""

    tokens: list[int]
    """Prompt and output."""
    pieces: list[Piece]
    """The rows that were kept: prompt and output without its last token."""
    steps: VerifySteps


@dataclass(slots=True)
class _Runner:
    """A model and what its cache holds."""

    model: Any
    cache: Any = field(default_factory=lambda: require("transformers").DynamicCache())
    # A cache without a config keeps all tokens, so that it can be cut even where attention slides.
    held: int = 0

    def run(self, tokens: Sequence[int], wanted: int = 1) -> NDArray[np.float32]:
        """Feed tokens and return the logits of the last ones, ``[wanted, vocabulary]``."""
        torch = require("torch")
        ids = torch.tensor([list(tokens)], device=self.model.device)
        mask = torch.ones((1, self.held + len(tokens)), dtype=torch.long, device=ids.device)
        options = last_logits(self.model, wanted)
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, **options)
        self.held += len(tokens)
        logits: NDArray[np.float32] = output.logits[0, -wanted:].float().cpu().numpy()
        return logits

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        if self.held > tokens:
            self.cache.crop(tokens - self.held)  # negative: how many to remove
            self.held = tokens


def last_logits(model: Any, wanted: int) -> dict[str, int]:
    """Return the argument that spares a model the logits of all but the last tokens, where it takes one."""
    return {"logits_to_keep": wanted} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def check_pair(target: Any, draft: Any) -> None:
    """Refuse models that cannot be speculated with.

    Raises
    ------
    UnsupportedError
        A model keeps a state that cannot be rolled back.
    """
    for model in (target, draft):
        if getattr(model, "_is_stateful", False):
            raise UnsupportedError(
                f"{type(model).__name__} keeps a recurrent state, which cannot forget rejected drafts",
                expected="models with a KV cache only",
            )


def speculate(
    target: Any,
    draft: Any,
    taps: Taps,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    draft_tokens: int,
    sampling: Sampling,
    rng: np.random.Generator,
    eos: Collection[int] = (),
) -> Speculated:
    """Decode one prompt speculatively.

    Parameters
    ----------
    target, draft
        The large model and the one that drafts; the same tokens mean the same to both.
    taps
        The hooks on the large model.
    prompt
        Token ids, at least one.
    max_new_tokens
        Most tokens to generate.
    draft_tokens
        K, tokens drafted in each step; fewer in the last ones, so that none is generated in vain.
    sampling
        How both models choose tokens.
    rng
        Source of every draw.
    eos
        Tokens that end the output. Where one is among the accepted drafts, the rows from it on count as rejected:
        none of them is needed, and the step emitted as many tokens as it then says.
    """
    large, small = _Runner(target), _Runner(draft)
    tokens, end = list(prompt), len(prompt) + max_new_tokens
    logits = large.run(tokens)
    size = logits.shape[1]
    rows = taps.take(len(tokens))
    pieces = [Piece(0, rows.ids, rows.weights, np.array(tokens, np.int64), rows.predicted)]
    tokens.append(draw(sampling.distribution(logits[-1]), rng))
    starts, counts, kept, windows = [], [], [], []
    while len(tokens) < end and tokens[-1] not in eos:
        drafts: list[int] = []
        guesses = np.zeros((0, size))
        for _ in range(min(draft_tokens, end - len(tokens) - 1)):
            guess = sampling.distribution(small.run([*tokens, *drafts][small.held :])[-1], size)
            drafts.append(draw(guess, rng))
            guesses = np.concatenate([guesses, guess[None]])
        start, window = len(tokens) - 1, [tokens[-1], *drafts]
        logits = large.run(window, len(window))
        rows = taps.take(len(window))
        accepted, following = verify(sampling.distribution(logits), guesses, drafts, rng)
        new = [*drafts[:accepted], following]
        new = new[: next((i + 1 for i, token in enumerate(new) if token in eos), len(new))]
        whole = Piece(start, rows.ids, rows.weights, np.array(window, np.int64), rows.predicted)
        pieces.append(whole.cut(len(new)))
        tokens += new
        starts.append(start)
        counts.append(len(window))
        kept.append(len(new) - 1)
        windows.append(rows)
        for runner in (large, small):
            runner.keep(len(tokens) - 1)
    ids = [rows.ids for rows in windows]
    weights = [rows.weights for rows in windows if rows.weights is not None]
    steps = VerifySteps(
        start_pos=np.array(starts, np.int64),
        n_rows=np.array(counts, np.int64),
        n_accepted=np.array(kept, np.int64),
        ids=np.concatenate(ids) if ids else pieces[0].ids[:0],
        weights=np.concatenate(weights) if ids and len(weights) == len(ids) else None,
    )
    return Speculated(tokens, pieces, steps)
