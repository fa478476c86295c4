"""Other designs of a Mixture-of-Experts layer: N, k and shared experts changed, under a law of routing.

What is asked (Cohere, "Why MoE models get more from speculative decoding", 2026): how sparsity k / N and shared experts
move the batch size at which speculation pays most. Nobody has trained these models. The law's parameters are held,
which no trace confirms, and all but the MoE layers stays as it is.

The size w of an expert, shared or routed, follows from what is held, in widths of the reference's routed experts:
``active`` holds the weights that a token uses, (k + S) w, and ``total`` those that the layer has, (N + S) w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from tracekit.economics.amdahl import share
from tracekit.economics.cost import CostModel, Floats, uniform_unique
from tracekit.economics.law import RoutingLaw
from tracekit.economics.speedup import Unions, speedup, verification
from tracekit.errors import UnsupportedError, UsageError, did_you_mean
from tracekit.sources.sizes import Matrix, Model, Part

Hold = Literal["active", "total"]

HOLDS: tuple[Hold, ...] = ("active", "total")
AXES = {"N": "num_experts", "k": "top_k", "S": "shared_experts"}
"""What can be varied: the symbols and the fields of a design."""

_MOST = 256
"""Designs that one call compares, at most."""


@dataclass(frozen=True, slots=True)
class Design:
    """The MoE layer of a model."""

    num_experts: int
    """N."""
    top_k: int
    """k."""
    shared_experts: float = 0.0
    """S, in sizes of a routed expert."""
    expert_size: float = 1.0
    """Width of a routed expert, in those of the reference's."""
    extrapolated: bool = False
    """Whether it differs from the reference."""

    def __str__(self) -> str:
        shared = f", S = {self.shared_experts:.4g}" if self.shared_experts else ""
        return f"N = {self.num_experts}, k = {self.top_k}{shared}"


def designs(reference: Design, vary: Mapping[str, Sequence[int]], hold: Hold) -> list[Design]:
    """Return the reference and every combination of what is varied, each once.

    Parameters
    ----------
    vary
        Values of ``N``, ``k`` and ``S``, by symbol or field.
    hold
        ``active`` or ``total``: which parameters the size of an expert is to hold.

    Raises
    ------
    UsageError
        If an axis is not known, a design is not possible, or there are too many.
    """
    if hold not in HOLDS:
        raise UsageError(f"hold {hold!r}", expected="one of " + ", ".join(HOLDS))
    axes = {AXES.get(name, name): values for name, values in vary.items()}
    unknown = [name for name in axes if name not in AXES.values()]
    if unknown:
        expected = "one of " + ", ".join(AXES)
        raise UsageError(f"{unknown[0]!r} to vary", expected=expected, remedy=did_you_mean(unknown[0], AXES))
    if not all(len(values) for values in axes.values()):
        raise UsageError("nothing to vary", expected="values such as k=2,4,8")
    if np.prod([float(len(values)) for values in axes.values()]) > _MOST:
        raise UsageError(f"more than {_MOST} designs", expected="fewer values to vary")
    found = [reference]
    for values in product(*axes.values()):
        changes: dict[str, Any] = dict(zip(axes, values, strict=True))
        chosen = replace(reference, **changes)
        if chosen != reference:
            _check(chosen)
            found.append(replace(chosen, expert_size=_size(reference, chosen, hold), extrapolated=True))
    return list(dict.fromkeys(found))


def _check(design: Design) -> None:
    fine = 1 <= design.top_k <= min(design.num_experts, 255) and design.num_experts <= 1 << 16
    if not fine or not 0 <= design.shared_experts <= 1 << 16:
        raise UsageError(f"the design {design}", expected="1 to N experts per token, and no fewer than 0 shared")


def _size(reference: Design, chosen: Design, hold: Hold) -> float:
    field = "top_k" if hold == "active" else "num_experts"
    before, after = (getattr(d, field) + d.shared_experts for d in (reference, chosen))
    return float(before / after)


def of_model(model: Model, law: RoutingLaw) -> Design:
    """Return the design of a model, with the k of the law: a run may use fewer experts than the model's own.

    Raises
    ------
    UsageError
        If the model has another number of experts than the law.
    UnsupportedError
        If its config does not tell the size of an expert.
    """
    if model.config.num_experts != law.num_experts:
        raise UsageError(
            f"{model.name} has {model.config.num_experts} experts and the law {law.num_experts}",
            expected="the model whose routing the law is of",
        )
    weights = {part.name: sum(rows * columns for rows, columns in part.matrices) for part in model.parts}
    if not weights.get("expert") or "shared" not in weights:
        raise UnsupportedError(f"the config of {model.name} does not tell the size of an expert")
    return Design(law.num_experts, law.top_k, weights["shared"] / weights["expert"])


def reshape(model: Model, design: Design) -> Model:
    """Return the model with the MoE layers of a design and everything else as it is.

    Widths are rounded to whole numbers. Biases of an expert shrink with it.
    """
    config = replace(model.config, num_experts=design.num_experts, top_k=design.top_k)
    if not design.extrapolated:
        return replace(model, config=config)
    found = {part.name: part for part in model.parts}
    expert = found["expert"]
    routed = replace(_scaled(expert, design.expert_size), copies=model.moe_layers * design.num_experts)
    shared = replace(_scaled(expert, design.expert_size * design.shared_experts), name="shared")
    found |= {"expert": routed, "shared": replace(shared, copies=model.moe_layers if design.shared_experts else 0)}
    if "router" in found:
        router = found["router"]
        before = model.config.num_experts
        matrices = tuple((design.num_experts, columns) for _, columns in router.matrices)
        vectors = router.vectors * design.num_experts // before
        found["router"] = replace(router, matrices=matrices, vectors=vectors)
    parts = tuple(found[name] for name in (part.name for part in model.parts))
    return replace(model, config=config, parts=parts, shared_experts=round(design.shared_experts))


def _scaled(part: Part, factor: float) -> Part:
    """Return an MLP of another width: the rows of all its matrices but the last, and the columns of that."""

    def width(value: int) -> int:
        return max(1, round(value * factor))

    def one(matrix: Matrix, last: bool) -> Matrix:
        rows, columns = matrix
        return (rows, width(columns)) if last else (width(rows), columns)

    final = len(part.matrices) - 1
    matrices = tuple(one(matrix, i == final) for i, matrix in enumerate(part.matrices))
    return replace(part, matrices=matrices, vectors=round(part.vectors * factor))


def compare(
    law: RoutingLaw,
    chosen: Sequence[Design],
    batch_sizes: Sequence[int],
    window: int,
    *,
    cost: CostModel | None = None,
    routed_share: float | None = None,
    length: float | None = None,
    draft_cost: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each design and batch size.

    Parameters
    ----------
    law
        The law of the reference; other designs hold its parameters.
    chosen
        The designs, the reference first.
    window
        T = K + 1.
    cost
        The reference model on its machine; the designs' times come from it, reshaped.
    routed_share
        Without a cost model: the routed experts' share of the reference's step for one token. The time of a step is
        then linear in the experts that it loads and its arithmetic free (Amdahl).
    length
        Acceptance length AL.
    draft_cost
        D, the cost of all drafts of a step in steps of the target.

    Yields
    ------
    dict
        The columns of :func:`tracekit.design` after ``phase``; None where there is no time or no acceptance length.
    """
    B = np.asarray(batch_sizes, np.int64)
    reference = chosen[0]
    for design in chosen:
        own = law.reshaped(num_experts=design.num_experts, top_k=design.top_k)
        unique, single, S = own.unique(window, B), own.unique(1, B), design.shared_experts
        uniform = [uniform_unique(design.num_experts, design.top_k, B * T) for T in (window, 1)]
        columns: dict[str, Any] = {
            "unique": unique,
            "unique_single": single,
            "union_ratio": unique / single,
            "union_ratio_uniform": uniform[0] / uniform[1],
            "arithmetic_intensity": B * window * (design.top_k + S) / (unique + S),
        }
        sizes: dict[str, int | None] = dict.fromkeys(("total_parameters", "active_parameters"))
        if cost is not None:
            model = reshape(cost.model, design)
            sizes = {name: getattr(model, name) for name in sizes}
            unions = Unions(B, np.full_like(B, window), unique, single)
            timed = verification(_on(cost, model), unions)
            columns |= {name: timed[name] for name in ("routed_share", "verification_ratio", "regime")}
        elif routed_share is not None:
            f = float(share(routed_share))
            columns |= _linear(design, reference, f, unique, single)
        if "verification_ratio" in columns and length is not None:
            columns["speedup"] = speedup(length, columns["verification_ratio"], draft_cost)
        best = int(B[np.argmin(columns["verification_ratio"])]) if "verification_ratio" in columns else None
        fixed: dict[str, Any] = {
            "design": str(design),
            "num_experts": design.num_experts,
            "top_k": design.top_k,
            "shared_experts": design.shared_experts,
            "expert_size": design.expert_size,
            "extrapolated": design.extrapolated,
            **sizes,
            "window": window,
            "acceptance_length": length,
            "draft_cost": draft_cost,
            "best_batch_size": best,
        }
        for i, size in enumerate(batch_sizes):
            yield fixed | {"batch_size": int(size)} | {name: _plain(values[i]) for name, values in columns.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


def _on(cost: CostModel, model: Model) -> CostModel:
    return CostModel(
        model,
        cost.hardware,
        tensor_parallel=cost.tensor_parallel,
        expert_parallel=cost.expert_parallel,
        context=cost.context,
        kv_bits=cost.kv_bits,
    )


def _linear(design: Design, reference: Design, f: float, unique: Floats, single: Floats) -> dict[str, Floats]:
    """Return times in steps of the reference for one token, in which an expert of its size takes f / k."""
    one = f / reference.top_k
    rest = 1 - f - one * reference.shared_experts + one * design.expert_size * design.shared_experts
    routed, verified = (one * design.expert_size * loaded for loaded in (single, unique))
    return {"routed_share": routed / (rest + routed), "verification_ratio": (rest + verified) / (rest + routed)}
