"""What speculative decoding costs and gains: the public functions for batches, verification steps and speed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tracekit.analysis.ensure import StoreLike, ensure, shown
from tracekit.analysis.wants import BATCH_SIZES
from tracekit.schema import By, Phase

if TYPE_CHECKING:
    import polars as pl


def expert_ratio(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    max_window: int | None = None,
    batch_size: int | Iterable[int] = BATCH_SIZES,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how many more experts a verification step loads than a step of one token a request, U(T, B) / U(1, B).

    This, and not U(T) / k, is the extra weight traffic of verification in a batch: a batch of single tokens already
    loads more than k experts.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`tracekit.windows`.
    max_window
        Longest window T in tokens; with K drafted tokens T = K + 1. Default: 8, or what the trace has.
    batch_size
        Batch sizes B, windows drawn independently; null with fewer than B requests. Default: 1, 2, 4 … 64.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, batch size and window length. ``unique`` is U(T, B) and ``unique_single``
        U(1, B), experts per layer; ``ratio`` is the one over the other, with the interval of the ratio (its parts vary
        together); ``ratio_uniform``, ``ratio_popularity`` and ``ratio_request`` are the same ratio of the baseline.
        Null where undefined.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no such phase, label or window.
    UsageError
        An argument is out of range.
    """
    arguments = {"max_window": max_window, "batch_size": batch_size, "by": by}
    [frame] = ensure(store, [("expert_ratio", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def budget(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    window: int | Iterable[int] | None = None,
    budget: int | Iterable[int] | None = None,
    share: float = 0.9,
    steps: bool = False,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return what a verification window keeps of its router weight if at most m experts per layer are loaded.

    The budget of MoE-Spec (McDanel et al., arXiv 2602.16052): the m experts that the tokens of the window weigh most
    together are loaded, the others' part is dropped. Weights are shares of the token's own sum, so that each token
    counts the same whether or not the engine renormalises or scales them. The windows are those of consecutive
    committed tokens, without rejected drafts, or with ``steps`` the verification steps as they ran.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`windows`.
    window
        Window lengths T in tokens. Default: 4, or what the trace has.
    budget
        Experts m per layer. Default: k, 2 k, 3 k, … up to what the window can use.
    share
        Share of the window's weight for ``experts_for_share``.
    steps
        Whether the windows are verification steps, the rows of rejected drafts included; the trace must have some, with
        weights. ``window`` is then the rows of a step; default: every length up to 16 that there is.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group, window length and budget. ``unique`` experts without a budget and
        ``experts_for_share``, the fewest that carry ``share`` of the weight, do not depend on the budget; ``loaded`` is
        what it leaves of ``unique``, ``per_top_k`` that over k; ``weight_kept`` is the share of the window's weight
        that the loaded experts carry, and ``tokens_intact`` that of tokens all of whose experts are loaded.
        ``n_left_out`` counts windows with a token without usable weights (NaN, negative or all 0).

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no router weights, phase, label or window.
    UsageError
        An argument is out of range.
    """
    arguments = {"window": window, "budget": budget, "share": share, "steps": steps, "by": by}
    [frame] = ensure(store, [("budget", arguments)], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def steps(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return what real verification steps load, the rows of rejected drafts included.

    A trace of accepted tokens alone cannot show it: rejected drafts were routed too. ``bias`` says how much more (or
    less) a step loads than a window of as many committed tokens, which :func:`tracekit.windows` measures.

    Parameters
    ----------
    store, trace, by, intervals, seed
        As in :func:`tracekit.windows`.
    phase
        As in :func:`tracekit.windows`; a step is of the phase of its first row.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and ``window``, the rows W that a step verifies at once (the last committed
        token and W - 1 drafts, in a chain or a tree), and one with a null window over all steps. ``drafted`` and
        ``accepted`` are drafts per step; ``acceptance_length`` counts the tokens emitted, accepted drafts and the
        bonus or corrected token. In experts per layer: ``unique`` of all rows, ``unique_kept`` of those that were kept
        (null where the source does not say which row of a tree was), and what W tokens of the same requests are
        expected to need, ``expected_uniform`` and ``expected_popularity``, or do need where they are consecutive and
        committed, ``accepted_only`` (sliding windows of up to 64 tokens). ``rejected_share`` is 1 - unique_kept /
        unique, what only rejected rows load; ``bias`` is unique / accepted_only - 1 (fractions).

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no verification steps, phase or label.
    """
    [frame] = ensure(store, [("steps", {"by": by})], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)


def acceptance(
    store: StoreLike,
    *,
    trace: str | None = None,
    phase: Phase | None = None,
    by: By | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Return how many drafts verification steps accept.

    The acceptance length, tokens emitted per step, is 1 + the sum of ``at_least`` over ``accepted`` >= 1.

    Parameters
    ----------
    store, trace, phase, by, intervals, seed
        As in :func:`steps`.

    Returns
    -------
    polars.DataFrame
        One row per trace, phase, group and number of ``accepted`` drafts n, 0 to the deepest that was drafted.
        ``share`` of steps that accept exactly n, ``at_least`` of those that accept n or more; ``rate`` is the chance
        that the draft at depth n is accepted where the one before it was and there was one that deep (null for 0);
        ``unique`` counts the experts per layer that steps with n accepted drafts load, ``rejected_unique`` those of
        them that only rejected rows load.

    Raises
    ------
    StoreError
        There is no such trace.
    UnsupportedError
        The trace cannot answer, with the reason: it has no verification steps, phase or label.
    """
    [frame] = ensure(store, [("acceptance", {"by": by})], trace=trace, phase=phase, intervals=intervals, seed=seed)
    return shown(frame, by)
