"""What speculative decoding gains: S = AL / (V + D), by batch size and draft length.

AL is the acceptance length (tokens that a step emits, the bonus token included), V what a verification step costs in
steps without speculation, and D what all K drafts cost in the same unit (MoESD, 2025; Cohere, 2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tracekit.economics import amdahl
from tracekit.economics.acceptance import Acceptance, break_even_rate
from tracekit.economics.acceptance import acceptance_length as acceptance_length
from tracekit.economics.acceptance import acceptance_rate as acceptance_rate
from tracekit.economics.cost import CostModel, Floats, PartCost, total, uniform_unique
from tracekit.errors import UsageError


def speedup(length: ArrayLike, ratio: ArrayLike, draft_cost: ArrayLike) -> Floats:
    """Return S = AL / (V + D); 1 is as fast as without speculation."""
    AL, V, D = (np.asarray(x, np.float64) for x in (length, ratio, draft_cost))
    return np.asarray(AL / (V + D), np.float64)


@dataclass(frozen=True, slots=True)
class Unions:
    """Unique experts of verification windows, one entry a batch size and window length; arrays ``[X]``."""

    batch_size: NDArray[np.int64]
    """B, requests verified together."""
    window: NDArray[np.int64]
    """T, tokens of each: K drafts and the token before them."""
    unique: Floats
    """U(T, B)."""
    unique_single: Floats
    """U(1, B)."""
    ratio_lo: Floats | None = None
    """Ends of the interval of U(T, B) / U(1, B), paired over requests; None or NaN without one."""
    ratio_hi: Floats | None = None

    @property
    def drafts(self) -> NDArray[np.int64]:
        """K = T - 1."""
        return self.window - 1

    def only(self, rows: NDArray[np.bool_]) -> Unions:
        """Return some of the entries."""
        lo, hi = (None if end is None else end[rows] for end in (self.ratio_lo, self.ratio_hi))
        return Unions(self.batch_size[rows], self.window[rows], self.unique[rows], self.unique_single[rows], lo, hi)


def verification(cost: CostModel, unions: Unions) -> dict[str, Any]:
    """Return what verification costs, for every entry of some unions.

    The machine's figures are taken as exact: the interval of V is that of the expert ratio, put through the cost model.

    Returns
    -------
    dict of str to ``[X]``
        ``seconds_single`` (a step of one token per request), ``seconds_verify``, ``verification_ratio`` with ``_lo``
        and ``_hi``, ``target_efficiency`` (1 / V), ``verification_ratio_uniform`` (with the uniform formula in place of
        the unions), ``verification_ratio_dense`` (of a dense model with the same active weights), ``routed_share`` f,
        ``verification_ratio_amdahl`` (f x + 1 - f), ``arithmetic_intensity`` (tokens (k + S) / (U + S), in tokens per
        expert loaded), ``regime`` of the verification (``bandwidth``, ``compute`` or ``overhead``: what most of its
        time goes to).
    """
    B, T, config = unions.batch_size, unions.window, cost.model.config
    single = cost.parts(B, 1, unions.unique_single)
    verify = cost.parts(B, T, unions.unique)
    before, after = total(single), total(verify)

    def ratio(expert_ratio: Floats | None) -> Floats:
        if expert_ratio is None:
            return np.full(before.shape, np.nan)
        return cost.seconds(B, T, unions.unique_single * expert_ratio) / before

    uniform = [uniform_unique(config.num_experts, config.top_k, tokens) for tokens in (B, B * T)]
    dense = [cost.seconds(B, tokens, config.top_k) for tokens in (1, T)]
    routed = next(part for part in single if part.name == "experts").seconds / before
    shared = (cost.model.shared_parameters or 0) / (cost.model.expert_parameters or 1)
    return {
        "seconds_single": before,
        "seconds_verify": after,
        "verification_ratio": after / before,
        "verification_ratio_lo": ratio(unions.ratio_lo),
        "verification_ratio_hi": ratio(unions.ratio_hi),
        "target_efficiency": before / after,
        "verification_ratio_uniform": cost.seconds(B, T, uniform[1]) / cost.seconds(B, 1, uniform[0]),
        "verification_ratio_dense": dense[1] / dense[0],
        "routed_share": routed,
        "verification_ratio_amdahl": amdahl.verification_ratio(routed, unions.unique / unions.unique_single),
        "arithmetic_intensity": B * T * (config.top_k + shared) / (unions.unique + shared),
        "regime": regime(cost, verify),
    }


def regime(cost: CostModel, parts: tuple[PartCost, ...]) -> list[str]:
    """Return what most of a step's time goes to: ``bandwidth``, ``compute`` or, with communication, ``overhead``."""
    shape = parts[0].seconds.shape
    time = {name: np.zeros(shape) for name in ("bandwidth", "compute", "overhead")}
    for part in parts:
        bound = cost.bound(part)
        for name in time:
            time[name] += np.where(bound == name, part.seconds, 0.0)
    names = list(time)
    return [names[i] for i in np.argmax(np.stack(list(time.values())), axis=0).reshape(-1)]


def gains(
    cost: CostModel,
    unions: Unions,
    *,
    acceptance: Acceptance | None = None,
    draft_cost: ArrayLike = 0.0,
    draft: CostModel | None = None,
) -> dict[str, Any]:
    """Return the economics of speculation for every entry of some unions: `verification`, and what is gained.

    Parameters
    ----------
    acceptance
        How many drafts are accepted; None: not known, and NaN what depends on it.
    draft_cost
        Cost of one draft, in steps of the target with one token per request; D is K times it.
    draft
        The draft model on its machine, in place of ``draft_cost``: one step of it a draft.

    Returns
    -------
    dict of str to ``[X]``
        The columns of `verification`; ``acceptance_length`` and ``acceptance_source`` (``given``, ``measured``, or
        ``extrapolated`` beyond the drafts that were measured), ``draft_cost`` D, ``speedup`` with ``_lo`` and ``_hi``,
        ``speedup_uniform``, ``speedup_dense``, ``break_even_length`` V + D and ``break_even_rate`` (NaN where no rate
        is enough); ``best`` and ``best_uniform`` (the K that is fastest at this B, and that the uniform formula would
        choose; nowhere true where none beats 1) and ``regret`` (how much faster the best is than that choice).
    """
    columns = verification(cost, unions)
    B, K = unions.batch_size, unions.drafts
    if draft is None:
        D = K * np.broadcast_to(np.asarray(draft_cost, np.float64), K.shape)
    else:
        config = draft.model.config
        loaded = uniform_unique(config.num_experts, config.top_k, B)
        D = K * draft.seconds(B, 1, loaded) / columns["seconds_single"]
    if not np.all((D >= 0) & np.isfinite(D)):
        raise UsageError(f"a draft cost of {D[~((D >= 0) & np.isfinite(D))][0]:g}", expected="0 or more target steps")
    AL = np.full(K.shape, np.nan) if acceptance is None else acceptance.length(K)
    V = columns["verification_ratio"]
    columns |= {
        "acceptance_length": AL,
        "acceptance_source": [None] * len(K) if acceptance is None else acceptance.source(K),
        "draft_cost": D,
        "speedup": speedup(AL, V, D),
        "speedup_lo": speedup(AL, columns["verification_ratio_hi"], D),
        "speedup_hi": speedup(AL, columns["verification_ratio_lo"], D),
        "speedup_uniform": speedup(AL, columns["verification_ratio_uniform"], D),
        "speedup_dense": speedup(AL, columns["verification_ratio_dense"], D),
        "break_even_length": V + D,
        "break_even_rate": break_even_rate(V + D, K),
    }
    return columns | choices(B, columns["speedup"], columns["speedup_uniform"])


def choices(batch_size: NDArray[np.int64], measured: Floats, uniform: Floats) -> dict[str, Any]:
    """Return which draft length is best at each batch size, and which the uniform formula would choose at what cost.

    Not to speculate is a choice, too, of speedup 1. Where a speedup is not known nothing is best and ``regret`` is NaN.
    """
    best, best_uniform = np.zeros(len(measured), bool), np.zeros(len(measured), bool)
    regret = np.full(len(measured), np.nan)
    for size in np.unique(batch_size):
        rows = np.flatnonzero((batch_size == size) & ~np.isnan(measured))
        if not len(rows):
            continue
        chosen, reached = [], []
        for values, flags in ((measured, best), (uniform, best_uniform)):
            row = rows[np.argmax(values[rows])]
            speculates = bool(values[row] > 1)
            flags[row] = speculates
            chosen.append(row)
            reached.append(float(measured[row]) if speculates else 1.0)
        regret[batch_size == size] = reached[0] / reached[1] - 1
    return {"best": best, "best_uniform": best_uniform, "regret": regret}
