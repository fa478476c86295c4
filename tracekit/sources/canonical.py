"""From what a file says to the canonical trace: one shape, one meaning, one provenance, or a refusal."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.schema import Histogram, IdSpace, Request, TraceMeta, VerifySteps
from tracekit.sources import checks
from tracekit.sources.axes import Facts, Order, name_axes, resolve_axes
from tracekit.sources.base import IngestOptions, RawCounts, RawRequest
from tracekit.sources.histograms import Counts, check_counts, checked_counts, is_rounded
from tracekit.sources.layers import LayerPlan, check_layers, plan_layers
from tracekit.sources.predicted import checked_predictions
from tracekit.sources.sidecar import PROMPT_LEN_KEYS, Entry, Sidecar, entry_count, labels_of
from tracekit.sources.verification import checked_steps

_MOST_EXPERTS = 1 << 16


class Canonical:
    """Turns the raw requests (or counts) of a trace, one after the other, into canonical ones.

    The first request fixes what holds for the trace; a later one that differs is an error.
    """

    def __init__(self, options: IngestOptions, source_format: str) -> None:
        self.meta: TraceMeta | None = None
        self.notes: list[str] = []
        self._options = options
        self._format = source_format
        self._sidecar = None if options.requests is None else Sidecar(options.requests)
        self._order: Order | None = None
        self._plan: LayerPlan | None = None
        self._layer_ids: tuple[int, ...] | None = None
        self._model: str | None = None
        self._weights = False
        self._step_weights: bool | None = None
        self._seen: dict[str, str] = {}

    def settled(self) -> Canonical:
        """Return one for other requests of the trace, to which the first request holds as to those that come here."""
        other = copy(self)
        other.notes, other._seen, other._step_weights = [], {}, None
        return other

    def request(self, raw: RawRequest, default_id: str) -> Request | None:
        """Return the canonical request; None for one without any row.

        Raises
        ------
        SourceError
            Saying what is wrong, in which file and request, and what to do.
        """
        request_id, entry, where = self._named(raw, default_id)
        if self.meta is not None and self.meta.histogram:
            raise _mixed(where)
        _check_array(raw, where)
        _merge(raw, entry, request_id)
        if 0 in raw.ids.shape:
            self._note("requests without any row were left out", f" (request {request_id!r} is the first)")
            return None
        order = self._axes(raw, where)
        ids = np.transpose(raw.ids, order)
        meta, plan = self._consistent(raw, ids, where)
        first_pos, decode_start = self._phase(raw, len(ids), where)
        ids = checks.checked_ids(plan.take(ids), meta.num_experts, meta.layers, where)
        checks.refuse_filler(ids, meta.num_experts, where)
        steps = self._steps(raw, meta, plan, where)
        return Request(
            request_id=request_id,
            ids=ids,
            first_pos=first_pos,
            prompt_len=raw.prompt_len,
            decode_start=decode_start,
            positions=raw.positions,
            labels=labels_of(self._options.label_fields, entry, raw.fields, self._options.labels, where),
            token_ids=_row_tokens(raw, first_pos, len(ids), where),
            weights=None
            if raw.weights is None
            else checks.checked_weights(plan.take(np.transpose(raw.weights, order)), meta.layers, where),
            steps=steps,
            predictions=checked_predictions(raw.predictions, len(ids), order, plan, meta, where),
            where=raw.where,
        )

    def counts(self, raw: RawCounts, default_id: str) -> Histogram | None:
        """Return canonical counts; None for a record without any.

        Raises
        ------
        SourceError
            Saying what is wrong, in which file and record, and what to do.
        """
        request_id, entry, where = self._named(raw, default_id)
        counts = checked_counts(raw, where)
        if not counts.any():
            self._note("records without any count were left out", f" (record {request_id!r} is the first)")
            return None
        meta, plan = self._consistent_counts(raw, counts, where)
        exact = not is_rounded(raw.counts)
        if not exact:
            self._note(f"counts above {2 ** (np.finfo(raw.counts.dtype).nmant + 1):,} are rounded in the file")
        check_counts(counts, plan, meta, where, exact=exact)
        return Histogram(
            request_id=request_id,
            counts=np.ascontiguousarray(counts[list(plan.keep)]),
            labels=labels_of(self._options.label_fields, entry, raw.fields, self._options.labels, where),
            where=raw.where,
        )

    def finish(self) -> None:
        """Check, after the last request, what only the whole source shows."""
        if self._sidecar is not None:
            self._sidecar.finish()

    def _named(self, raw: RawRequest | RawCounts, default_id: str) -> tuple[str, Entry, str]:
        """Return the id of a request or record, its entry in the sidecar, and how messages call it."""
        named = raw.request_id is not None or raw.part is None
        request_id = raw.request_id or default_id
        entry: Entry = {}
        if self._sidecar is not None:
            request_id, entry = self._sidecar.match(request_id, named, raw.where)
        request_id = request_id.encode("utf-8", "replace").decode("utf-8")
        where = f"{raw.where}, request {request_id!r}"
        if request_id in self._seen:
            raise same_id(request_id, raw.where, self._seen[request_id])
        self._seen[request_id] = raw.where
        for note in raw.notes:
            self._note(note)
        return request_id, entry, where

    def _note(self, text: str, first: str = "") -> None:
        """Note something once, with where it was seen first."""
        if not any(note.startswith(text) for note in self.notes):
            self.notes.append(text + first)

    def _axes(self, raw: RawRequest, where: str) -> Order:
        options = self._options
        if options.axes is not None and raw.axes is not None and options.axes != raw.axes:
            raise SourceError(
                f"--axes {options.axes}, but this format has the order {raw.axes}", where=where, remedy="Leave it out"
            )
        facts = Facts(
            axes=options.axes or raw.axes,
            config=options.config,
            layer_ids=raw.layer_ids,
            rows=None if raw.expected_rows is None else raw.expected_rows - (raw.first_pos or 0),
            token_axis=raw.token_axis if raw.token_axis is not None else options.token_axis,
            top_k=options.top_k,
            num_experts=options.num_experts or raw.num_experts,
            settled=self._order,
        )
        order = resolve_axes(raw.ids, facts, where)
        if order != (0, 1, 2):
            self._note(f"axes were taken as {name_axes(order)} (t tokens, l layers, k top-k)")
        self._order = order
        return order

    def _consistent(self, raw: RawRequest, ids: NDArray[Any], where: str) -> tuple[TraceMeta, LayerPlan]:
        """Compare with the first request, or be it."""
        if self.meta is None or self._plan is None:
            vllm = raw.engine_version if raw.engine == "vllm" else None
            self._plan = plan_layers(ids, raw.layer_ids, self._options.config, where, vllm)
            self.meta = self._first(raw, ids, self._plan, where)
            self._layer_ids, self._model, self._weights = raw.layer_ids, raw.model, raw.weights is not None
            for note in self._plan.notes:
                self._note(note)
            return self.meta, self._plan
        meta, plan = self.meta, self._plan
        _same(raw.model, self._model, "model", where, "Ingest each model as its own trace.")
        _same(raw.num_experts, meta.num_experts if raw.num_experts is not None else None, "num_experts", where)
        _same(ids.shape[2], meta.top_k, "k", where, "Ingest traces of different k one by one, under their own names.")
        _same(ids.shape[1], plan.size, "number of layers", where)
        _same(raw.layer_ids, self._layer_ids, "layer ids", where)
        if (raw.weights is not None) != self._weights:
            raise SourceError("router weights are in some requests only", where=where, expected="in all, or in none")
        if raw.engine_version != meta.engine_version:
            self._note(f"responses of several engine versions: {meta.engine_version} and {raw.engine_version}")
        check_layers(plan, ids, where)
        return meta, plan

    def _steps(self, raw: RawRequest, meta: TraceMeta, plan: LayerPlan, where: str) -> VerifySteps | None:
        steps = None if raw.steps is None else checked_steps(raw.steps, plan, meta, where)
        if steps is None:
            return None
        weighted = steps.weights is not None
        if self._step_weights not in (None, weighted):
            raise SourceError(
                "router weights are in some requests' verification steps only",
                where=where,
                expected="in all, or in none",
            )
        self._step_weights = weighted
        self.meta = replace(meta, drafts_included=True)
        return steps

    def _consistent_counts(self, raw: RawCounts, counts: Counts, where: str) -> tuple[TraceMeta, LayerPlan]:
        """Compare with the first record, or be it."""
        if self.meta is None or self._plan is None:
            # A record is like one token that chose every expert as often as it was counted.
            self._plan = plan_layers(counts[None], raw.layer_ids, self._options.config, where)
            self.meta = self._first_counts(raw, counts, self._plan, where)
            self._layer_ids, self._model = raw.layer_ids, raw.model
            for note in self._plan.notes:
                self._note(note)
            return self.meta, self._plan
        meta, plan = self.meta, self._plan
        if not meta.histogram:
            raise _mixed(where)
        _same(raw.model, self._model, "model", where, "Ingest each model as its own trace.")
        _same(counts.shape[1], meta.num_experts, "num_experts", where)
        _same(raw.top_k, meta.top_k if raw.top_k is not None else None, "k", where)
        _same(counts.shape[0], plan.size, "number of layers", where)
        _same(raw.layer_ids, self._layer_ids, "layer ids", where)
        return meta, plan

    def _first_counts(self, raw: RawCounts, counts: Counts, plan: LayerPlan, where: str) -> TraceMeta:
        options, config = self._options, self._options.config
        if options.phase is not None:
            raise SourceError(
                f"--phase {options.phase}, but counts have no tokens that could be in a phase",
                where=where,
                remedy=f"Leave it out; --label phase={options.phase} keeps it as a label",
            )
        claims = {"--num-experts": options.num_experts, "the config": None if config is None else config.num_experts}
        num_experts = _agree({**claims, "the counts": counts.shape[1]}, "experts per layer", where)
        assert num_experts is not None
        if num_experts > _MOST_EXPERTS:
            raise SourceError(f"{num_experts} experts per layer", where=where, expected=f"1 to {_MOST_EXPERTS}")
        native = None if config is None else config.top_k
        top_k = _agree({"--top-k": options.top_k, "the source": raw.top_k}, "experts per token", where) or native
        if top_k is None:
            self._note("k is not known, so there are no numbers of tokens: give --top-k or --config to have them")
        elif not 1 <= top_k <= num_experts:
            raise SourceError(f"{top_k} experts per token of {num_experts}", where=where, expected="at least 1 of them")
        return TraceMeta(
            num_experts=num_experts,
            top_k=top_k or 0,
            layers=plan.numbers,
            source_format=self._format,
            model=raw.model or (None if config is None else config.name or config.model_type),
            engine=raw.engine,
            engine_version=raw.engine_version,
            id_space=options.id_space or raw.id_space or "unknown",
            native_top_k=native,
            histogram=True,
            extra=dict(raw.extra),
        )

    def _first(self, raw: RawRequest, ids: NDArray[Any], plan: LayerPlan, where: str) -> TraceMeta:
        options, config = self._options, self._options.config
        top_k = ids.shape[2]
        num_experts = self._num_experts(raw, ids, top_k, where)
        _agree({"the array": top_k, "--top-k": options.top_k, "the source": raw.top_k}, "experts per token", where)
        native = raw.native_top_k if config is None else config.top_k
        if native is not None and top_k > native:
            raise SourceError(
                f"{top_k} experts per token, more than the model's {native}",
                where=where,
                remedy="Fused shared experts add columns, and a wrong axis order or --config does this too",
            )
        model = raw.model or (None if config is None else config.name or config.model_type)
        routed = plan.take(ids)
        checks.refuse_argsort_view(routed, num_experts, where)
        return TraceMeta(
            num_experts=num_experts,
            top_k=top_k,
            layers=plan.numbers,
            source_format=self._format,
            model=model,
            engine=raw.engine,
            engine_version=raw.engine_version,
            id_space=self._id_space(raw),
            router_order=self._router_order(raw, routed, num_experts),
            native_top_k=native,
            extra=dict(raw.extra),
        )

    def _num_experts(self, raw: RawRequest, ids: NDArray[Any], top_k: int, where: str) -> int:
        config = self._options.config
        known = _agree(
            {
                "--num-experts": self._options.num_experts,
                "the config": None if config is None else config.num_experts,
                "the source": raw.num_experts,
            },
            "experts per layer",
            where,
        )
        if known is None:
            raise SourceError(
                f"does not say how many experts a layer has (the largest id of this request is {int(ids.max())})",
                where=where,
                remedy="Give --num-experts N, or --config config.json of the model",
            )
        if not 1 <= known <= _MOST_EXPERTS:
            raise SourceError(f"{known} experts per layer", where=where, expected=f"1 to {_MOST_EXPERTS}")
        if top_k > known:
            raise SourceError(
                f"{top_k} experts per token of {known}",
                where=where,
                expected=f"at most {known}",
                remedy="Is the axis order right? See --axes",
            )
        return known

    def _id_space(self, raw: RawRequest) -> IdSpace:
        return self._options.id_space or raw.id_space or "unknown"

    def _router_order(self, raw: RawRequest, ids: NDArray[Any], num_experts: int) -> bool | None:
        if self._options.router_order is not None:
            return self._options.router_order
        if ids.shape[2] == 1:
            return True
        if checks.is_sorted(ids, num_experts):
            return False
        if raw.router_order is None and raw.weights is not None:
            assert self._order is not None
            if checks.falls_with_rank(np.transpose(raw.weights, self._order)):
                return True
        return raw.router_order

    def _phase(self, raw: RawRequest, rows: int, where: str) -> tuple[int, int | None]:
        """Return the first position and the first decode position, after checking the number of rows."""
        phase, P, expected = self._options.phase, raw.prompt_len, raw.expected_rows
        first = raw.first_pos
        if phase == "decode" and first is None and P is not None and (expected is None or rows == expected - P):
            first = P  # the rows of the output only
        first = first or 0
        if expected is not None and raw.positions is None and rows != expected - first:
            raise _wrong_rows(raw, rows, first, where)
        last = first + rows - 1 if raw.positions is None else int(raw.positions[-1])
        if P is not None and not 0 <= P <= last + 2:  # the last prompt token may lack its row
            raise SourceError(
                f"a prompt of {P} tokens, but routing up to position {last} only",
                where=where,
                expected=f"0 to {last + 2} prompt tokens",
                remedy="Correct the prompt length, or give first_pos where earlier rows are missing",
            )
        if phase == "prefill":
            if P is not None and last >= P:
                raise SourceError(
                    f"--phase prefill, but rows from position {P} on are decode by the prompt length",
                    where=where,
                    remedy="Leave --phase out: the phase is known",
                )
            return first, last + 1
        if phase == "decode" and P is None:
            return first, first
        return first, P


def same_id(request_id: str, where: str, before: str) -> SourceError:
    """Return the error for a request that has the id of one before it."""
    return SourceError(
        "two requests have the same id",
        where=f"{where}, request {request_id!r}",
        expected=f"another id than in {before}",
    )


def _mixed(where: str) -> SourceError:
    return SourceError(
        "counts and routing in one source",
        where=where,
        expected="one kind of record in a trace",
        remedy="Ingest them as separate traces",
    )


def _check_array(raw: RawRequest, where: str) -> None:
    ids = raw.ids
    if ids.ndim == 4:
        raise SourceError(
            f"a batch of shape {ids.shape} [requests, tokens, layers, k], as verl saves it, is not supported yet",
            where=where,
            expected="[tokens, layers, k]",
            remedy="Save each request without its padding",
        )
    if ids.dtype.kind == "f":
        what = "router logits or expert counts" if ids.shape[-1:] > (16,) else "router weights"
        raise SourceError(
            f"the array is {ids.dtype} {ids.shape}: {what}, not expert ids",
            where=where,
            expected="integers [tokens, layers, k]",
            remedy="Save the ids of the chosen experts (top-k of logits is not what every router executes)",
        )
    if ids.dtype.kind not in "ui":
        raise SourceError(f"the array is {ids.dtype}", where=where, expected="integers [tokens, layers, k]")
    if ids.ndim != 3:
        raise SourceError(
            f"the array has shape {ids.shape}",
            where=where,
            expected="three axes [tokens, layers, k]",
            remedy="A single layer's [tokens, k] becomes that by ids[:, None, :]",
        )
    if raw.weights is not None:
        if raw.weights.shape != ids.shape:
            raise SourceError(f"router weights {raw.weights.shape} beside ids {ids.shape}", where=where)
        if raw.weights.dtype.kind != "f":
            raise SourceError(f"router weights are {raw.weights.dtype}", where=where, expected="floats")


def _merge(raw: RawRequest, entry: Entry, request_id: str) -> None:
    """Add what the sidecar says about a request to what its file says."""
    for name, keys in (("prompt_len", PROMPT_LEN_KEYS), ("first_pos", ("first_pos",))):
        given, own = entry_count(entry, keys, request_id), getattr(raw, name)
        if given is None:
            continue
        if own is not None and own != given:
            raise SourceError(
                f"the sidecar says {name} {given}, the file {own}",
                where=f"{raw.where}, request {request_id!r}",
                remedy="Are the entries in the order of the requests? A request_id in each makes sure",
            )
        setattr(raw, name, given)


def _agree(claims: dict[str, int | None], what: str, where: str) -> int | None:
    known = {who: value for who, value in claims.items() if value is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{who} says {value}" for who, value in known.items())
        raise SourceError(f"contradiction about {what}: {said}", where=where, remedy="Correct or leave out the option")
    return next(iter(known.values()), None)


def _same(found: object, first: object, what: str, where: str, remedy: str | None = None) -> None:
    if found != first:
        raise SourceError(
            f"{what} is {found}, in the first request {first}",
            where=where,
            expected=f"the same {what} in the whole trace",
            remedy=remedy,
        )


def _wrong_rows(raw: RawRequest, rows: int, first: int, where: str) -> SourceError:
    counts = ""
    if raw.prompt_len is not None and raw.output_len is not None:
        counts = f"{raw.prompt_len} prompt + {raw.output_len} output - 1 - start {first} = "
    assert raw.expected_rows is not None
    return SourceError(
        f"{rows} rows of routing",
        where=where,
        expected=f"{counts}{raw.expected_rows - first} rows",
        remedy="Rows that begin later need first_pos in --requests or the log of the requests, decode rows alone "
        "--phase decode; SGLang loses the last prompt row of requests that generate nothing",
    )


def _row_tokens(raw: RawRequest, first_pos: int, rows: int, where: str) -> NDArray[np.int64] | None:
    """Token id of each row."""
    if raw.token_ids is None:
        return None
    tokens = raw.token_ids.reshape(-1).astype(np.int64)
    if raw.positions is not None:
        wanted = raw.positions
    else:
        start = 0 if raw.tokens_by_row else first_pos
        wanted = np.arange(start, start + rows)
    if int(wanted[-1]) >= len(tokens):
        raise SourceError(
            f"{len(tokens)} token ids for rows up to position {int(wanted[-1])}",
            where=where,
            expected="the token ids of the whole sequence",
        )
    return tokens[wanted]
