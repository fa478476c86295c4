"""Laws of routing as JSON, for simulators.

One object::

    {
      "format": "tracekit routing law",
      "version": 1,
      "num_experts": 32,                  N, routed experts per layer
      "top_k": 4,                         k, routed experts per token
      "layers": [                         one object per MoE layer, in order; see tracekit.economics.law
        {"cold": 1.1, "hot": 0.1, "request": 0.2, "anchor": 0.3, "keep": 0.95, "stay": 0.1}
      ],
      "source": {"trace": "chat"},        what it was fitted to: text, numbers, null
      "figures": [                        how well it fits, mean over layers
        {"quantity": "overlap", "at": 1, "batch_size": null, "observed": 0.44, "law": 0.44, "target": true}
      ]
    }

``source`` and ``figures`` may be left out; a field that is not listed is an error. A file is not trusted: every value
is held against its range before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tracekit.economics.law import PARAMETERS, Figure, LayerLaw, RoutingLaw
from tracekit.errors import SourceError, UsageError
from tracekit.sources.files import fault, file_size, reading

FORMAT = "tracekit routing law"
VERSION = 1

_LARGEST = 1 << 24
_QUANTITIES = ("overlap", "unique", "popularity_overlap", "request_overlap", "entropy_norm")
_FIELDS = ("format", "version", "num_experts", "top_k", "layers", "source", "figures")


def dump(law: RoutingLaw) -> str:
    """Return a law as a JSON document, a layer and a figure a line."""
    rows = {
        name: ",\n    ".join(json.dumps(asdict(row)) for row in getattr(law, name)) for name in ("layers", "figures")
    }
    head = {"format": FORMAT, "version": VERSION, "num_experts": law.num_experts, "top_k": law.top_k}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines.append(f'  "layers": [\n    {rows["layers"]}\n  ]')
    lines.append(f'  "source": {json.dumps(dict(law.source))}')
    lines.append(f'  "figures": [\n    {rows["figures"]}\n  ]' if law.figures else '  "figures": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(path: str | Path) -> RoutingLaw:
    """Read a law from a file.

    Raises
    ------
    SourceError
        If the file cannot be read or is not a law.
    """
    where = str(path)
    if file_size(Path(path)) > _LARGEST:
        raise SourceError(f"has more than {_LARGEST} bytes", where=where, expected="a law of routing")
    with reading(where):
        return parse(Path(path).read_bytes(), where=where)


def parse(text: str | bytes, *, where: str = "law") -> RoutingLaw:
    """Return the law that a JSON document describes.

    Raises
    ------
    SourceError
        If it is not such a law, of a later version, or a value is out of range.
    """
    document = _document(text, where)
    if document.get("format") != FORMAT:
        raise SourceError(
            "is not a law of routing", where=where, expected=f'"format": "{FORMAT}"', remedy="Make one: tracekit law"
        )
    version = document.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise SourceError(f"is a law of version {version!r}", where=where, expected=f"version {VERSION}")
    _known(document, _FIELDS, where)
    try:
        return RoutingLaw(
            num_experts=_whole(document, "num_experts", where),
            top_k=_whole(document, "top_k", where),
            layers=tuple(_layer(item, at) for item, at in _rows(document, "layers", where)),
            source=_source(document.get("source", {}), where),
            figures=tuple(_figure(item, at) for item, at in _rows(document, "figures", where, optional=True)),
        )
    except UsageError as error:
        raise SourceError(f"has {error.found}", where=where, expected=error.expected) from None


def _document(text: str | bytes, where: str) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number in JSON")

    try:
        document = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not JSON ({fault(error)})", where=where, expected="a law of routing") from None
    if not isinstance(document, dict):
        raise SourceError("is not a JSON object", where=where, expected="a law of routing")
    return document


def _known(item: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    unknown = [name for name in item if name not in names]
    if unknown:
        raise SourceError(f"has a field {unknown[0][:40]!r}", where=where, expected="only " + ", ".join(names))


def _rows(
    document: Mapping[str, Any], name: str, where: str, *, optional: bool = False
) -> list[tuple[dict[str, Any], str]]:
    items = document.get(name, [] if optional else None)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SourceError(f"{name} is missing or no list of objects", where=where, expected="one object a row")
    return [(item, f"{where}, {name} {i}") for i, item in enumerate(items)]


def _whole(item: Mapping[str, Any], name: str, where: str, *, optional: bool = False) -> Any:
    value = item.get(name)
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise SourceError(f"{name} is {_shown(value)}", where=where, expected="a positive whole number")
    return value


def _number(item: Mapping[str, Any], name: str, where: str) -> float:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_float(value)):
        raise SourceError(f"{name} is {_shown(value)}", where=where, expected="a number")
    return _float(value)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _layer(item: dict[str, Any], where: str) -> LayerLaw:
    _known(item, PARAMETERS, where)
    try:
        return LayerLaw(**{name: _number(item, name, where) for name in PARAMETERS})
    except UsageError as error:
        raise SourceError(f"has {error.found}", where=where, expected=error.expected) from None


def _figure(item: dict[str, Any], where: str) -> Figure:
    names = tuple(Figure.__dataclass_fields__)
    _known(item, names, where)
    quantity, target = item.get("quantity"), item.get("target")
    if quantity not in _QUANTITIES:
        raise SourceError(f"quantity is {_shown(quantity)}", where=where, expected="one of " + ", ".join(_QUANTITIES))
    if not isinstance(target, bool):
        raise SourceError(f"target is {_shown(target)}", where=where, expected="true or false")
    at, batch_size = (_whole(item, name, where, optional=True) for name in ("at", "batch_size"))
    return Figure(
        quantity, at, batch_size, _number(item, "observed", where), _number(item, "law", where), target=target
    )


def _source(value: Any, where: str) -> dict[str, Any]:
    plain = str | int | float | None
    if not isinstance(value, dict) or not all(isinstance(item, plain) for item in value.values()):
        raise SourceError("source is no object of text, numbers and null", where=where)
    return value


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 63 else "a very large number"
    return text if len(text) <= 40 else text[:39] + "…"
