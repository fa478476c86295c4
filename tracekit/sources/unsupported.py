"""Says what a file is when no reader takes it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tracekit.errors import SourceError
from tracekit.sources.responses import Json
from tracekit.sources.safetensors import is_safetensors
from tracekit.sources.streams import sniff_record
from tracekit.sources.torchfile import LEGACY_MAGIC, not_an_archive

_MAGICS = (
    (b"GGUF", "a GGUF file, but no importance matrix (general.type imatrix)"),
    (b"PAR1", "a Parquet file without columns for token, layer and experts"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\x80", "a Python pickle, which is never loaded"),
    (b"data: ", "a stream of server-sent events: streams carry no routing"),
)
_DATAPROTO = b"verl.protocol"
_TEXT = "a trace that tracekit reads: see tracekit formats"


def unrecognised(path: Path, head: bytes) -> SourceError:
    """Return the error for a file that no reader takes, naming what it is where that can be seen."""
    if head.startswith(b"\x80") and _DATAPROTO in head:
        return _verl(path)
    if head.startswith(LEGACY_MAGIC):
        return not_an_archive(path, head)
    kind = next((what for magic, what in _MAGICS if head.startswith(magic)), None) or _archive(path, head)
    if kind is None and is_safetensors(head):
        kind = "a safetensors file without an array per layer and without one named routed_experts"
    if kind is None:
        record = sniff_record(path, head)
        kind = "JSON that is no response with routing" if record is None else _json_kind(record)
        if head.lstrip()[:1] not in (b"{", b"["):
            kind = "of no known format"
        elif path.name.startswith("r3_trace_"):
            kind = "a debug trace of NeMo-RL's router replay, which holds hashes and previews and not the routing"
    return SourceError(
        f"is {kind}", where=str(path), expected=_TEXT, remedy="If it is one of these, name it with --source-format"
    )


def _verl(path: Path) -> SourceError:
    """Return the error for ``DataProto.save_to_disk``, which pickles whole objects."""
    return SourceError(
        "is a pickle of verl's DataProto, which only running its code could load",
        where=str(path),
        expected="the arrays alone",
        remedy="Where verl is installed: batch = DataProto.load_from_disk(path).batch; "
        "keys = ('routed_experts', 'attention_mask', 'prompts', 'input_ids'); "
        "numpy.savez('batch.npz', **{key: batch[key].cpu().numpy() for key in keys})",
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
        return "a torch .pt file without routing"
    return "a zip archive that holds no .npy arrays"


def _json_kind(record: Json) -> str:
    if "layer" in record and ({"expert_ids", "experts", "expert"} & set(record)):
        return "a list of routing events without a token index"
    return f"JSON without choices or meta_info (fields: {', '.join(map(str, list(record)[:8]))})"
