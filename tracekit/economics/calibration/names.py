"""The names of columns in benchmark results, and what they say: which quantity, in which unit."""

from __future__ import annotations

import re

STEP, VERIFICATION, TOKEN, REQUEST = "step", "verification", "token", "request"
THROUGHPUT, REQUEST_THROUGHPUT = "throughput", "throughput of a request"
RATIO, SPEEDUP = "verification ratio", "speedup"

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of each unit of time."""

_SPELLINGS = {
    "s": "s sec secs second seconds",
    "ms": "ms msec millisecond milliseconds",
    "us": "us µs μs usec microsecond microseconds",
    "ns": "ns nanosecond nanoseconds",
}
_UNITS = {name: UNITS[unit] for unit, names in _SPELLINGS.items() for name in names.split()}

_TIMES = {
    TOKEN: "tpot time_per_output_token time_per_token latency_per_output_token latency_per_token token output_token "
    "per_token per_output_token",
    STEP: "step step_time step_latency per_step decode_step decode_step_time decode_step_latency decode_latency "
    "decode_time iteration iteration_time iteration_latency",
    VERIFICATION: "verify verify_time verify_step verify_latency verification verification_time verification_step "
    "verification_latency target_step target_time",
    REQUEST: "latency e2e e2el e2e_latency request_latency generation_latency generation_time",
}
"""What a column with a unit at its end is the time of."""

_OTHERS = {
    RATIO: "verification_ratio verify_ratio",
    SPEEDUP: "speedup speed_up",
    THROUGHPUT: "output_throughput output_token_throughput decode_throughput steady_state_output_throughput "
    "output_tokens_per_second",
    REQUEST_THROUGHPUT: "tokens_per_second_per_request tokens_per_second_per_user tok_s_request tok_s_user",
}
"""Columns that need no unit: ratios, and throughputs in tokens per second."""

NAMES = {
    "batch_size": "batch_size batchsize batch bs b max_concurrency concurrency",
    "drafts": "drafts draft_length draft_len draft_size k gamma num_speculative_tokens speculative_tokens "
    "num_spec_tokens spec_tokens speculative_config_num_speculative_tokens",
    "window": "window verified_tokens tokens_per_step speculative_num_draft_tokens",
    "acceptance_length": "acceptance_length accept_length acc_length mean_acceptance_length accept_len "
    "spec_decode_acceptance_length",
    "input_len": "input_len input_length prompt_len prompt_length isl random_input_len",
    "output_len": "output_len output_length osl random_output_len",
    "context": "context context_len context_length kv_len",
    "repeat": "repeat repetition rep run run_number iteration trial seed",
}
"""The other columns, each under the name that it goes by here: ``window`` counts the token before the drafts, as
SGLang's speculative_num_draft_tokens does."""


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {alias: name for name, aliases in names.items() for alias in aliases.split()}


NAME_OF, _TIME_OF, _OTHER_OF = _inverse(NAMES), _inverse(_TIMES), _inverse(_OTHERS)

_CENTRES = frozenset({"mean", "median", "avg", "average", "p50"})
_ASIDE = re.compile(r"p\d+|std|sd|stdev|stddev|min|max|var|n|count|ttft|prefill|queue|drafts?|total|probe|input")
"""Words of columns that hold no centre of a distribution, or that of something else than a decoding step."""

_VAGUE = frozenset(["throughput", "tps", "itl", "tok", "tokens", "latency", "time"])


def _words(name: str) -> list[str]:
    return [word for word in name.split("_") if word not in _CENTRES]


def quantity_of(name: str) -> tuple[str, float] | None:
    """Return what a column's name says of the time of a step: the quantity and what makes seconds of it.

    None for a column that says nothing of it, or not in which unit.
    """
    words = _words(name)
    if any(_ASIDE.fullmatch(word) for word in words):
        return None
    if (other := _OTHER_OF.get("_".join(words))) is not None:
        return other, 1.0
    if len(words) > 1 and words[0] in _UNITS:  # ms_per_token
        words = [*words[1:], words[0]]
    quantity = _TIME_OF.get("_".join(words[:-1]))
    return None if quantity is None or words[-1] not in _UNITS else (quantity, _UNITS[words[-1]])


def fault_of(name: str) -> str | None:
    """Return why a column that may be about the time of a step says too little; None for any other column."""
    words = _words(name)
    if name in NAME_OF or quantity_of(name) is not None or any(_ASIDE.fullmatch(word) for word in words):
        return None
    if "_".join(words) in _TIME_OF:
        return f"{name} has no unit (write {name}_s, {name}_ms or {name}_us)"
    if "_".join(words[:-1]) in _TIME_OF:
        return f"{name} is in {words[-1]!r}, which is none of the units {', '.join(UNITS)}"
    if _VAGUE & set(words):
        return f"{name} may be of a step, a token, a request or all requests together"
    return None
