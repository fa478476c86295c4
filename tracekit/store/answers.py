"""Answers that follow from what was measured by a model of time, a law or another trace: their columns."""

from __future__ import annotations

_ENDS = ("", "_lo", "_hi")
_PHASE, _WHOLE, _NUMBER, _TEXT = {"phase": "String"}, "Int64", "Float64", "String"
_OF = dict.fromkeys(("model", "hardware"), _TEXT)

MODELLED: dict[str, dict[str, str]] = {
    "speedup": {
        **_PHASE,
        "unions": _TEXT,
        **dict.fromkeys(("batch_size", "drafts", "window"), _WHOLE),
        **dict.fromkeys(("unique", "unique_single", "expert_ratio", "seconds_single", "seconds_verify"), _NUMBER),
        **{f"verification_ratio{s}": _NUMBER for s in _ENDS},
        "target_efficiency": _NUMBER,
        **{f"verification_ratio_{s}": _NUMBER for s in ("uniform", "dense")},
        **dict.fromkeys(("routed_share", "verification_ratio_amdahl", "arithmetic_intensity"), _NUMBER),
        "regime": _TEXT,
        "acceptance_length": _NUMBER,
        "acceptance_source": _TEXT,
        "draft_cost": _NUMBER,
        **{f"speedup{s}": _NUMBER for s in (*_ENDS, "_uniform", "_dense")},
        **dict.fromkeys(("break_even_length", "break_even_rate"), _NUMBER),
        **dict.fromkeys(("best", "best_uniform"), "Boolean"),
        "regret": _NUMBER,
        **_OF,
    },
    "step_time": {
        **_PHASE,
        **dict.fromkeys(("batch_size", "tokens"), _WHOLE),
        "part": _TEXT,
        **dict.fromkeys(("bytes", "flops", "seconds", "share"), _NUMBER),
        "bound": _TEXT,
        **_OF,
    },
    "amdahl": {
        **_PHASE,
        **dict.fromkeys(("drafts", "window"), _WHOLE),
        **dict.fromkeys(("unique", "expert_ratio"), _NUMBER),
        **dict.fromkeys(("seconds", "routed_share", "verification_ratio", "overhead_share"), _NUMBER),
        **{f"{name}_fixed": _NUMBER for name in ("routed_share", "verification_ratio")},
        **{f"implied_{name}": _NUMBER for name in ("share", "overhead", "overhead_share")},
        "measured_ratio": _NUMBER,
        **_OF,
    },
    "design": {
        **_PHASE,
        **dict.fromkeys(("design", "hold"), _TEXT),
        **dict.fromkeys(("num_experts", "top_k"), _WHOLE),
        **dict.fromkeys(("shared_experts", "expert_size"), _NUMBER),
        "extrapolated": "Boolean",
        **dict.fromkeys(("total_parameters", "active_parameters", "batch_size", "window"), _WHOLE),
        **dict.fromkeys(("unique", "unique_single", "union_ratio", "union_ratio_uniform"), _NUMBER),
        **dict.fromkeys(("arithmetic_intensity", "routed_share", "verification_ratio"), _NUMBER),
        "regime": _TEXT,
        **dict.fromkeys(("acceptance_length", "draft_cost", "speedup"), _NUMBER),
        "best_batch_size": _WHOLE,
    },
    "law": {
        **_PHASE,
        "quantity": _TEXT,
        **dict.fromkeys(("at", "batch_size"), _WHOLE),
        **dict.fromkeys(("observed", "law"), _NUMBER),
        "target": "Boolean",
        "error": _NUMBER,
    },
    "calibration": {
        **_PHASE,
        "parameter": _TEXT,
        **dict.fromkeys(("estimate", "lo", "hi"), _NUMBER),
        "unit": _TEXT,
    },
    "calibration_points": {
        **_PHASE,
        **dict.fromkeys(("batch_size", "drafts"), _WHOLE),
        "context": _NUMBER,
        "quantity": _TEXT,
        **dict.fromkeys(("acceptance_length", "measured", "predicted", "residual"), _NUMBER),
        "flagged": "Boolean",
        "repeats": _WHOLE,
        "spread": _NUMBER,
    },
    "compare": {
        **dict.fromkeys(("trace_b", "phase_a", "phase_b", "section", "metric", "at"), _TEXT),
        **{f"{side}{s}": _NUMBER for side in ("a", "b") for s in _ENDS},
        **dict.fromkeys(("difference", "lo", "hi"), _NUMBER),
        **dict.fromkeys(("paired", "differs"), "Boolean"),
    },
}
"""The columns of each kind, by name the functions', with the names of their Polars types.

A file holds one answer, whole: in the views ``setting`` says everything that was asked, in JSON, and ``asked`` counts
the answers of a trace in the order in which they were asked for.
"""
