"""Names, types and constants that every other module agrees on: the canonical trace and the store's columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1
"""Version of the store layout; a store with a larger one is refused."""

Phase = Literal["decode", "prefill", "all"]
IdSpace = Literal["logical", "physical", "unknown"]
By = Literal["layer", "label", "request"]

PHASES: tuple[Phase, ...] = ("decode", "prefill", "all")
GROUPINGS: tuple[By, ...] = ("layer", "label", "request")
BASELINES = ("uniform", "popularity", "label", "request")
CAUSES = ("popularity", "label", "request", "token_order")


def id_dtype(num_experts: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest unsigned dtype that holds the ids ``0 .. num_experts - 1``."""
    return np.uint8 if num_experts <= 1 << 8 else np.uint16


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """What holds for every request of a trace: its shape and its provenance.

    The provenance decides which questions may be asked: a metric that it does not
    support refuses instead of guessing.
    """

    num_experts: int
    """N, routed experts per layer."""
    top_k: int
    """k, routed experts per token in this trace; 0 where it is not known, which only counts may leave open."""
    layers: tuple[int, ...]
    """Layer numbers of the MoE layers, ascending, one per entry of the layer axis."""
    source_format: str
    """Name of the reader, as ``--source-format`` takes it."""
    model: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    id_space: IdSpace = "unknown"
    router_order: bool | None = None
    """True: rank 0 is the router's first choice; False: order lost; None: not known."""
    native_top_k: int | None = None
    """The model's own k where the config says so; differs from ``top_k`` in a reduced run."""
    drafts_included: bool = False
    """True where verification steps with the rows of rejected drafts are kept beside the routing."""
    histogram: bool = False
    """True where the source holds counts per expert only: no tokens, no order; it feeds ``load`` alone."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, JSON-serialisable (expert bytes per layer, notes)."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a trace was read from, known by its content: it may be renamed or moved."""

    name: str
    """Below the folder that was given, or as whoever made the trace calls it."""
    size: int | None = None
    """Bytes; None, as the digest, where there was no file or an older tracekit read it."""
    digest: str | None = None
    """SHA-256 in hex; of a source of several files, that of their digests one after the other."""


@dataclass(slots=True)
class VerifySteps:
    """The verification steps of speculative decoding of one request, rejected drafts included.

    The drafts of a step are a chain, or a tree: then several rows have the same depth, one of which can be kept.
    """

    start_pos: NDArray[np.int64]
    """``[steps]`` position of row 0 of each step, the last committed token; its drafts follow it."""
    n_rows: NDArray[np.int64]
    """``[steps]`` tokens verified at once: 1 + drafts."""
    n_accepted: NDArray[np.int64]
    """``[steps]`` drafts accepted: of a chain rows ``0 .. n_accepted`` were kept, the others rejected; of a tree one
    row of each depth ``0 .. n_accepted``."""
    ids: NDArray[Any]
    """Routed experts ``[sum of n_rows, layers, k]``, step by step."""
    weights: NDArray[np.floating[Any]] | None = None
    """Router weights, aligned with ``ids``."""
    depth: NDArray[np.int64] | None = None
    """``[sum of n_rows]`` tokens from row 0 of the step to each row; None: chains, where it is the number of the
    row."""
    kept: NDArray[np.int8] | None = None
    """``[sum of n_rows]`` 1: kept, 0: rejected, -1: not known; None: what ``depth`` and ``n_accepted`` tell."""

    @property
    def depths(self) -> NDArray[np.int64]:
        """``[sum of n_rows]`` tokens from row 0 of the step to each row."""
        if self.depth is not None:
            return self.depth
        return np.arange(self.n_rows.sum()) - np.repeat(np.cumsum(self.n_rows) - self.n_rows, self.n_rows)

    @property
    def kept_rows(self) -> NDArray[np.int8]:
        """``[sum of n_rows]`` 1: kept, 0: rejected, -1: one of several rows at its depth was, not known which."""
        if self.kept is not None:
            return self.kept
        depth, step = self.depths, np.repeat(np.arange(len(self.n_rows)), self.n_rows)
        reached = depth <= np.repeat(self.n_accepted, self.n_rows)
        if self.depth is None:
            return reached.astype(np.int8)
        _, place, count = np.unique(np.stack([step, depth]), axis=1, return_inverse=True, return_counts=True)
        return np.where(reached, np.where(count[place.reshape(-1)] == 1, 1, -1), 0).astype(np.int8)

    def take(self, steps: NDArray[np.bool_]) -> VerifySteps:
        """Return some of the steps, ``[steps]``."""
        rows = np.repeat(steps, self.n_rows)
        return VerifySteps(
            start_pos=self.start_pos[steps],
            n_rows=self.n_rows[steps],
            n_accepted=self.n_accepted[steps],
            ids=self.ids[rows],
            weights=None if self.weights is None else self.weights[rows],
            depth=None if self.depth is None else self.depth[rows],
            kept=None if self.kept is None else self.kept[rows],
        )


@dataclass(slots=True)
class Predictions:
    """What one predictor said, ahead of time, about the experts that the tokens of a request would be routed to."""

    predictor: str
    """Its name, such as ``next_gate``."""
    distance: int
    """MoE layers between where the prediction was made and the layer that it is about, 1 or more."""
    ids: NDArray[np.unsignedinteger[Any]]
    """Predicted experts ``[tokens, layers, m]``, the likeliest first where the predictor ranks them; the layer axis is
    that of the layer predicted, not of the one predicted from. Rows that are not ``known`` mean nothing."""
    known: NDArray[np.bool_]
    """``[tokens, layers]`` where there is a prediction: the first layers have none before them to predict from."""


@dataclass(slots=True)
class Histogram:
    """Counts per expert of a source that keeps no tokens, in canonical form."""

    request_id: str
    counts: NDArray[np.int64]
    """``[layers, num_experts]`` tokens that chose each expert; the layer axis follows ``TraceMeta.layers``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    """File and record it came from, for messages."""

    @property
    def label(self) -> str | None:
        """The label as one string: the values of the label fields joined with `` / ``."""
        return " / ".join(self.labels.values()) or None


@dataclass(slots=True)
class Request:
    """One request in canonical form.

    ``ids`` may be a memory map; whoever consumes a request copies what it keeps.
    """

    request_id: str
    ids: NDArray[np.unsignedinteger[Any]]
    """Routed experts ``[tokens, layers, k]``; the layer axis follows ``TraceMeta.layers``."""
    first_pos: int = 0
    """Position in the sequence of row 0."""
    prompt_len: int | None = None
    """Prompt tokens P; None where the source does not say."""
    decode_start: int | None = None
    """First decode position; None where the phase is unknown. Rows at ``pos >= decode_start`` are decode."""
    positions: NDArray[np.int64] | None = None
    """Strictly increasing positions ``[tokens]`` where the request has holes; None: consecutive from ``first_pos``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label fields in order, for example ``{"dataset": "gpqa"}``."""
    token_ids: NDArray[np.int64] | None = None
    """Token id of each row ``[tokens]``."""
    weights: NDArray[np.floating[Any]] | None = None
    """Router weights ``[tokens, layers, k]``, aligned with ``ids``."""
    steps: VerifySteps | None = None
    """Verification steps with their rejected drafts, where the source has them; ``ids`` hold the kept rows."""
    predictions: tuple[Predictions, ...] = ()
    """What predictors said about the routing of these rows, one entry per predictor and distance."""
    where: str = ""
    """File and line or row it came from, for messages."""

    @property
    def label(self) -> str | None:
        """The label as one string: the values of the label fields joined with `` / ``."""
        return " / ".join(self.labels.values()) or None
