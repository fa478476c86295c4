"""Says what a file is when no reader takes it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tracekit.errors import SourceError
from tracekit.sources.responses import Json, sniff_record

_MAGICS = (
    (b"GGUF", "a GGUF file (imatrix counts have no order of tokens)"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\x80", "a Python pickle, which is never loaded"),
    (b"data: ", "a stream of server-sent events: streams carry no routing"),
    (b"layer_id,expert_id,count", "SGLang's count of experts per layer (no order of tokens)"),
)
_TEXT = "a trace that tracekit reads: numpy arrays, vLLM or SGLang responses, route_trace v1 or layer,expert CSV"


def unrecognised(path: Path, head: bytes) -> SourceError:
    """Return the error for a file that no reader takes, naming what it is where that can be seen."""
    kind = next((what for magic, what in _MAGICS if head.startswith(magic)), None) or _archive(path, head)
    if kind is None and head[8:10] == b'{"':
        kind = "a safetensors file, which is not supported yet"
    if kind is None:
        record = sniff_record(path, head)
        kind = "JSON that is no response with routing" if record is None else _json_kind(record)
        if head.lstrip()[:1] not in (b"{", b"["):
            kind = "of no known format"
    return SourceError(
        f"is {kind}", where=str(path), expected=_TEXT, remedy="If it is one of these, name it with --source-format"
    )


def _archive(path: Path, head: bytes) -> str | None:
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive"
    if any(name.endswith("data.pkl") for name in names):
        return "a torch .pt file, which is not supported yet and never unpickled: save numpy arrays"
    return "a zip archive that holds no .npy arrays"


def _json_kind(record: Json) -> str:
    if "top_indices" in record:
        return "a Megatron-LM routing trace, which is not supported yet"
    if "layer" in record and ({"expert_ids", "experts", "expert"} & set(record)):
        return "a list of routing events, which is not supported yet"
    return f"JSON without choices or meta_info (fields: {', '.join(map(str, list(record)[:8]))})"
