"""Models and their sizes: what is bundled, and what a ``config.json`` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tracekit.sources.bundled import bundled
from tracekit.sources.sizes import PARTS, Model, load_model

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Model", "model", "models", "parts"]


def model(name: str | Path, *, quantisation: str | None = None, bits: float | None = None) -> Model:
    """Return the shape and the sizes of one model.

    Parameters
    ----------
    name
        Name of a bundled model, or the path of a ``config.json`` or of the folder that holds one.
    quantisation
        ``bf16``, ``fp8`` (8 bits and a 32-bit scale per 128 x 128), ``mxfp4`` (4.25 bits, experts only) or ``nvfp4``
        (4.5 bits, experts, shared experts and dense layers). Default: what the config says.
    bits
        Bits per parameter of every matrix, scales included, instead.

    Raises
    ------
    SourceError
        There is neither such a file nor such a model, or it is not the config of a Mixture-of-Experts model.
    UsageError
        The quantisation is not known, or both ways to give it are used.
    """
    return load_model(name, quantisation=quantisation, bits=bits)


def models(*, quantisation: str | None = None, bits: float | None = None) -> pl.DataFrame:
    """Return the models that are bundled, one a row.

    Parameters
    ----------
    quantisation, bits
        As in :func:`model`.

    Returns
    -------
    polars.DataFrame
        ``num_experts`` N, ``top_k`` k, ``layers``, ``moe_layers`` and ``shared_experts`` (per MoE layer) are counts;
        ``*_parameters`` and ``*_bytes`` are of one expert, of the shared experts of one MoE layer, of everything else,
        of the whole model, and of what one token uses (``active_``).
    """
    import polars as pl

    found = [load_model(entry.name, quantisation=quantisation, bits=bits) for entry in bundled()]
    return pl.concat([row(each) for each in found])


def row(model: Model) -> pl.DataFrame:
    """Return one model as a row of `models`."""
    import polars as pl

    sizes = [f"{part}_{unit}" for unit in ("parameters", "bytes") for part in _SIZES]
    counts = {
        "num_experts": model.config.num_experts,
        "top_k": model.config.top_k,
        "layers": model.config.num_hidden_layers,
        "moe_layers": model.moe_layers,
        "shared_experts": model.shared_experts,
        "hidden_size": model.hidden_size,
        "expert_width": model.expert_width,
        **{name: getattr(model, name) for name in sizes},
    }
    texts = {"model": model.name, "model_type": model.config.model_type, "quantisation": model.quantisation.name}
    schema = {**dict.fromkeys(texts, pl.String), **dict.fromkeys(counts, pl.Int64), "source": pl.String}
    return pl.DataFrame({**{k: [v] for k, v in {**texts, **counts, "source": model.source}.items()}}, schema=schema)


_SIZES = ("expert", "shared", "rest", "total", "active")


def parts(model: Model) -> pl.DataFrame:
    """Return what a model is made of, one kind of weights a row, the whole in the last two.

    Returns
    -------
    polars.DataFrame
        The model's shape as in :func:`models`; ``copies`` of each ``part``; ``parameters`` and ``bytes`` of one copy;
        ``total_parameters`` and ``total_bytes`` of all copies; ``estimate`` says why a size is one, null where the
        config tells all of it. Sizes are null where the config does not say enough. ``total`` is the whole model,
        ``active`` what one token uses.
    """
    import polars as pl

    known = {part.name: part for part in model.parts}
    rows: list[tuple[object, ...]] = []
    for name in PARTS:
        part = known.get(name)
        if part is None:
            rows.append((name, None, None, None, None, None, "the config does not say"))
            continue
        if part.copies == 0:
            continue
        one, size = part.parameters, part.bytes(model.quantisation)
        rows.append((name, part.copies, one, size, part.copies * one, part.copies * size, part.estimated))
    for name in ("total", "active"):
        whole, size = getattr(model, f"{name}_parameters"), getattr(model, f"{name}_bytes")
        rows.append((name, 1, whole, size, whole, size, None))
    numbers = ("copies", "parameters", "bytes", "total_parameters", "total_bytes")
    schema = {"part": pl.String, **dict.fromkeys(numbers, pl.Int64), "estimate": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    shape = row(model).select(
        "model", "model_type", "quantisation", "num_experts", "top_k", "layers", "moe_layers", "shared_experts"
    )
    return shape.join(frame, how="cross", maintain_order="left_right")
