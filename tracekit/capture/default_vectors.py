"""Default vectors: what each expert returns on average, which stands for what it is about to return.

With them the input of the next layer's router is known, nearly, before an expert of this layer has run
("Speculating Experts", arXiv 2603.19289). They are kept in an ``.npz``, so that one calibration serves many captures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.errors import SourceError
from tracekit.sources.files import reading
from tracekit.sources.npy import Member, open_npz

_KINDS = {"vectors": ("f", 3), "tokens": ("ui", 2), "layers": ("ui", 1)}
"""The arrays of a file: their types and their axes."""
_MOST_LAYERS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class DefaultVectors:
    """The mean output of every expert, before its weight, over the calibration tokens that were routed to it."""

    layers: tuple[int, ...]
    """Numbers of the MoE layers, ascending."""
    vectors: NDArray[np.float32]
    """``[layers, experts, hidden]``; 0 for an expert that no token was routed to."""
    tokens: NDArray[np.int64]
    """``[layers, experts]`` calibration tokens that were routed to it."""

    @property
    def described(self) -> Mapping[str, int]:
        """What a reader of the trace should know about them: tokens of a layer, experts, and those without a token."""
        rows = int(self.tokens.sum(1).max(initial=0))
        return {"activations": rows, "experts": self.tokens.size, "without_tokens": int((self.tokens == 0).sum())}

    def save(self, path: str | Path) -> None:
        """Write them to an ``.npz`` file, in one step.

        Raises
        ------
        SourceError
            The file is there already, or cannot be written.
        """
        path = Path(path)
        check_free(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(file, vectors=self.vectors, tokens=self.tokens, layers=np.array(self.layers, np.int64))
            partial.replace(path)
        except OSError as error:
            raise SourceError(f"cannot be written ({error.strerror or error})", where=str(path)) from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> DefaultVectors:
        """Read what `save` wrote.

        Raises
        ------
        SourceError
            It is no such file, or its arrays do not fit each other.
        """
        path = Path(path)
        arrays = _arrays(path)
        vectors, tokens, layers = (arrays[name] for name in _KINDS)
        numbers = tuple(int(layer) for layer in layers)
        if vectors.shape[:2] != tokens.shape or len(vectors) != len(numbers) or 0 in vectors.shape:
            raise SourceError(
                f"has vectors {vectors.shape}, tokens {tokens.shape} and {len(numbers)} layers",
                where=str(path),
                expected="[layers, experts, hidden], [layers, experts] and [layers]",
            )
        if list(numbers) != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < _MOST_LAYERS:
            raise SourceError(
                f"has the layers {list(numbers[:16])}", where=str(path), expected="layer numbers, ascending"
            )
        vectors, tokens = vectors.astype(np.float32), tokens.astype(np.int64)
        if not np.isfinite(vectors).all():
            raise SourceError(
                "has vectors that are not finite", where=str(path), expected="means of what experts return"
            )
        return cls(numbers, vectors, tokens)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file by name, after a look at their headers."""
    archive, members = open_npz(path)
    with archive:
        if missing := [name for name in _KINDS if name not in members]:
            raise SourceError(
                f"has no array {missing[0]!r}",
                where=str(path),
                expected="default vectors as --save-default-vectors writes them",
            )
        out: dict[str, NDArray[Any]] = {}
        for name, (kinds, axes) in _KINDS.items():
            member = Member(path, archive, members[name])
            try:
                if member.dtype.kind not in kinds or len(member.shape) != axes:
                    raise SourceError(
                        f"is {member.dtype} of shape {member.shape}",
                        where=member.where,
                        expected=f"{'floats' if kinds == 'f' else 'whole numbers'} of {axes} axes",
                    )
                with reading(member.where):
                    out[name] = member.load()
            finally:
                member.close()
        return out


def check_free(path: str | Path) -> None:
    """Refuse to write over a file.

    Raises
    ------
    SourceError
        There is one.
    """
    if Path(path).exists():
        raise SourceError(
            "is there already",
            where=str(path),
            expected="a new file for the default vectors",
            remedy="Use them with --default-vectors, or give another name",
        )
