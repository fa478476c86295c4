"""Dumps of the ranks of one engine: what several ranks hold of the same passes is one routing.

Ranks of tensor parallelism run the same tokens and choose the same logical experts, be it through other replicas; ranks
of pipeline parallelism hold other layers of the same tokens. Both count once. Ranks of data parallelism run other
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.bundle import Item
from tracekit.sources.tensors import Held

EMPTY = -1
"""What stands where a rank captured nothing: dense layers, columns above the model's k, rows that were lost."""


@dataclass(frozen=True, slots=True)
class RankDump:
    """The passes that one rank kept."""

    path: Path
    items: Sequence[Item]
    """A table ``[layers, rows, columns]`` of physical ids for each pass."""
    logical: NDArray[Any]
    """``[layers, physical experts]`` the logical expert that each is a replica of."""


def merged(ranks: Sequence[RankDump]) -> tuple[list[Item], list[Path]]:
    """Return the tables of passes over the same tokens, with the layers of all ranks.

    Returns
    -------
    tuple
        A table for each pass, in the physical ids of the first rank; and the files that only repeat the others.

    Raises
    ------
    SourceError
        Ranks contradict each other.
    """
    first, *others = ranks
    for rank in others:
        if not np.array_equal(rank.logical, first.logical):
            raise _differ(first.path, rank.path, "place experts differently")
    adds = dict.fromkeys((rank.path for rank in others), False)
    tables: list[Item] = []
    for number, item in enumerate(first.items):
        table, whole = item.load(), None
        for rank in others:
            other = rank.items[number].load()
            if other.shape != table.shape:
                raise _differ(first.path, rank.path, f"have other shapes in record {number}")
            gaps = (table == EMPTY) & (other != EMPTY)
            if gaps.any():
                adds[rank.path] = True
                table = whole = np.where(gaps, other, table)
            if not _agree(table, other, first.logical):
                raise _differ(first.path, rank.path, f"route the tokens of record {number} differently")
        tables.append(item if whole is None else Held(whole, item.where))
    return tables, [path for path, more in adds.items() if not more]


def _agree(table: NDArray[Any], other: NDArray[Any], logical: NDArray[Any]) -> bool:
    """Whether two tables hold the same logical experts where both hold any."""
    experts = logical.shape[1]
    for layer in range(len(table)):
        one, two = table[layer], other[layer]
        if np.array_equal(one, two):
            continue
        both = (one >= 0) & (one < experts) & (two >= 0) & (two < experts)  # what is out of range is told elsewhere
        if (logical[layer][one[both]] != logical[layer][two[both]]).any():
            return False
    return True


def _differ(one: Path, two: Path, how: str) -> SourceError:
    return SourceError(
        f"{one.name} and {two.name} have the same tokens at the same positions but {how}",
        where=str(one.parent),
        expected="ranks of one engine, which agree",
        remedy="Ingest the file of one rank, or, if the ranks served separate requests, each rank's as its own trace",
    )
