"""How far the requests of a trace go on without a gap: what its windows and lags have to fit into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracekit.errors import UnsupportedError, UsageError
from tracekit.schema import By, Phase
from tracekit.store.location import scan
from tracekit.store.manifest import SEGMENTS, TraceInfo
from tracekit.store.reader import Store, unreadable

if TYPE_CHECKING:
    import polars as pl

_LISTED = 4
"""Batch sizes that a note lists one by one."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Consecutive tokens of a trace's requests in one phase, and what to tell about lengths that they do not have."""

    store: Store
    trace: TraceInfo
    phase: Phase
    requests: pl.DataFrame
    """Those with tokens of the phase: the columns of the ``requests`` view, and ``longest``, their longest run."""
    lengths: pl.Series
    """Tokens of every run in one layer."""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, store: Store, trace: TraceInfo, requests: pl.DataFrame, phase: Phase) -> Runs:
        """Read how far the trace's requests go on.

        Raises
        ------
        StoreError
            A file of the store cannot be read.
        """
        import polars as pl

        n = pl.col("n").cast(pl.Int64)
        prompt = (pl.col("decode_start").cast(pl.Int64) - pl.col("pos").cast(pl.Int64)).clip(0, n)
        pieces = {"prefill": [prompt], "decode": [n - prompt], "all": [prompt, (n - prompt).fill_null(n)]}
        frames = []
        for segment in trace.segments:
            path = store.path / SEGMENTS / segment.id / "runs.parquet"
            # Every layer of a request has the same positions.
            runs = scan(path).filter(layer=trace.meta.layers[0]).select("request", "pos", "n")
            try:
                frames.append(runs.collect())
            except (OSError, pl.exceptions.PolarsError) as error:
                raise unreadable(path, error) from None
        joined = pl.concat(frames).join(requests, on="request")
        lengths = pl.concat([joined.select("request", length=piece) for piece in pieces[phase]])
        lengths = lengths.filter(pl.col("length") > 0)
        longest = lengths.group_by("request").agg(pl.col("length").max().alias("longest"))
        return cls(store, trace, phase, requests.join(longest, on="request"), lengths["length"])

    def windows(self, length: int) -> int:
        """Return how many windows of so many tokens there are per layer, one from every token on."""
        return int((self.lengths - (length - 1)).clip(0).sum())

    def fit(self, asked: int | None, default: int, name: str, *, least: int = 1, reach: int = 0) -> int:
        """Return the length to measure: the one asked for, or the default as far as the trace has it.

        Parameters
        ----------
        name
            What it is a length of: ``windows`` or ``lags``.
        least
            The shortest that there is.
        reach
            Tokens that it takes more: a lag of d takes d + 1.

        Raises
        ------
        UsageError
            It is shorter than the least.
        UnsupportedError
            No request has as many consecutive tokens.
        """
        length = default if asked is None else asked
        if length < least:
            raise UsageError(f"{name} of {length} tokens", expected=f"at least {least}")
        longest = self.requests["longest"]
        most = int(longest.max() or 0)  # type: ignore[arg-type] # a number
        tokens = f"consecutive {self.phase} tokens".replace("all ", "")
        if length + reach > most:
            if asked is not None or most < least + reach:
                such = "pairs" if name == "lags" else name
                there = f"the trace has {self.windows(most):,} such {such} per layer, and 0 of {length}"
                raise UnsupportedError(
                    f"no request has {max(length, least) + reach} {tokens}: the longest run has {most}",
                    remedy=f"Use {name} of at most {most - reach} tokens: {there}" if most >= least + reach else None,
                )
            length = most - reach
            instead = f"{name} of at most {length} tokens instead of {default}"
            self.notes.append(f"{instead}: no request has {most + 1} {tokens}")
        elif short := int((longest < length + reach).sum()):
            some = f"{short} of {len(longest)} requests"
            self.notes.append(f"fewer than {length + reach} {tokens} in {some}: longer {name} leave them out")
        return length

    def batch(self, sizes: Sequence[int], window: int, by: By | None) -> None:
        """Note the batch sizes for which too few requests have the window."""
        import polars as pl

        having = self.requests.filter(pl.col("longest") >= window)
        there, under = having.height, f", with {self.windows(window):,} windows per layer"
        if by in ("label", "request"):
            key = "label" if by == "label" else "request_id"
            there, under = having.group_by(key).len()["len"].min() or 0, f" under some {by}s"  # type: ignore[assignment]
        null = [size for size in sorted(sizes) if size > max(there, 1)]
        if null:
            listed = ", ".join(map(str, null)) if len(null) <= _LISTED else f"{null[0]} … {null[-1]}"
            which = f"batch size {listed} is null for windows of {window} token{'s' * (window > 1)}"
            self.notes.append(f"{which}: fewer requests have one ({there}{under})")
