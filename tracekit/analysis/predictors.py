"""Which predictors a trace supports, and why it does not support the others."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from tracekit.errors import UnsupportedError, UsageError, did_you_mean
from tracekit.metrics.prefetch import BUILT_IN, BY_LAYER, BY_TOKEN, PREVIOUS, TABLES
from tracekit.store.predicted import recorded_predictors
from tracekit.store.runs import Runs

BuiltIn = tuple[tuple[str, int | None], ...]
Recorded = tuple[tuple[str, int, int], ...]


def chosen_predictors(
    runs: Runs, names: str | Iterable[str] | None, distances: int | Iterable[int], least: int
) -> tuple[BuiltIn, Recorded]:
    """Return the predictors to judge: built-in ones with their distance, recorded ones with what they name as well.

    Parameters
    ----------
    names
        None: every one that the trace supports; what it does not support is noted.
    distances
        MoE layers that predictors look ahead.
    least
        Experts that have to be named.

    Raises
    ------
    UsageError
        There is no predictor of a name, or a distance is out of range.
    UnsupportedError
        The trace does not support one that was named, or none at all, with the reason.
    """
    held = recorded_predictors(runs.store, runs.trace)
    known = [*BUILT_IN, *dict.fromkeys(name for name, _ in held if name not in BUILT_IN)]
    asked = known if names is None else list(dict.fromkeys([names] if isinstance(names, str) else names))
    ahead = sorted({operator.index(d) for d in (distances if isinstance(distances, Iterable) else [distances])})
    if not asked or not ahead or ahead[0] < 1:
        wrong = "no predictor" if not asked else f"a distance of {ahead[0]} MoE layers" if ahead else "no distance"
        raise UsageError(wrong, expected="at least 1" if asked else "one of " + ", ".join(known))
    for name in asked:
        if name not in known:
            expected = "one of " + ", ".join(known)
            raise UsageError(f"no predictor named {name!r}", expected=expected, remedy=did_you_mean(name, known))
    built_in: list[tuple[str, int | None]] = []
    recorded: list[tuple[str, int, int]] = []
    for name in asked:
        reason = _missing(runs, name)
        there = [d for d in ahead if _reaches(runs, name, d, held)]
        named = max((held[name, d] for d in there if (name, d) in held), default=least)
        if reason is None and not there:
            layers = len(runs.trace.meta.layers)
            reason = f"no layer lies {ahead[0]} MoE layers after another: there are {layers}"
            if name not in BUILT_IN:
                has = ", ".join(str(d) for n, d in held if n == name)
                reason = f"predictions by {name!r} look ahead {has} MoE layers, not {', '.join(map(str, ahead))}"
        elif reason is None and name not in BUILT_IN and named < least:
            reason = f"predictions by {name!r} name {named} experts, fewer than {least}"
        if reason is not None and names is not None:
            raise UnsupportedError(reason, remedy=_remedy(name))
        if reason is not None:
            runs.notes.append(f"without the predictor {name}: {reason}")
        elif name not in BUILT_IN:
            recorded += [(name, d, held[name, d]) for d in there]
        else:
            built_in += [(name, d) for d in there] if name in BY_LAYER else [(name, None)]
    if not built_in and not recorded:
        raise UnsupportedError(f"the trace supports no predictor: {_missing(runs, PREVIOUS)}")
    return tuple(built_in), tuple(recorded)


def _missing(runs: Runs, name: str) -> str | None:
    """Return why a trace cannot support a predictor at any distance, None where it can."""
    segments = runs.trace.segments
    if name == PREVIOUS and (runs.requests["longest"].max() or 0) < 2:  # type: ignore[operator] # a number
        return "no request has 2 consecutive tokens of the phase"
    if name in BY_TOKEN and (bare := sum(not s.has_token_ids for s in segments)):
        several = len(segments) > bare
        return (
            f"{bare} of the trace's {len(segments)} ingests have no token ids"
            if several
            else "the trace has no token ids"
        )
    if name in TABLES and runs.requests.height < 2:
        return "there is one request, and what is learned from it is not judged by it"
    return None


def _reaches(runs: Runs, name: str, distance: int, held: dict[tuple[str, int], int]) -> bool:
    if name in BY_LAYER:
        return distance < len(runs.trace.meta.layers)
    return name in BUILT_IN or (name, distance) in held


def _remedy(name: str) -> str | None:
    if name in BY_TOKEN:
        return "Ingest a source that keeps token ids, or leave the predictor out"
    return None
