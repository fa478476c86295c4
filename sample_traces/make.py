"""Make every sample trace again, byte for byte.

    python sample_traces/make.py                        # hand and synthetic: need nothing
    python sample_traces/make.py --captures DIR         # the captured ones too

DIR is the folder that holds ``models/olmoe/config.json``, ``traces/vllm_olmoe`` and ``traces/olmoe``: captures of
small MoE models that are not part of this repository (README.md says how they were made).
``--out DIR`` writes somewhere else than over the committed files.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.synthetic import synth

HERE = Path(__file__).resolve().parent

# Two requests, two layers, k = 2, N = 6; ids in router order. hand/README.md works the numbers out.
HAND = {
    "a": [  # label "code"
        # layer 0, layer 1
        [[0, 1], [0, 1]],
        [[1, 0], [3, 2]],
        [[0, 2], [0, 1]],
        [[3, 2], [3, 2]],
    ],
    "b": [  # label "prose"
        [[1, 3], [0, 2]],
        [[1, 3], [2, 1]],
    ],
}
HAND_LABELS = {"a": "code", "b": "prose"}
HAND_EXPERTS = 6

SYNTHETIC: dict[str, dict[str, Any]] = {
    "uniform": {"seed": 11},
    "skewed": {"seed": 22, "skew": 0.8},
    "sticky": {"seed": 13, "stay": 0.4},
    # Labels need many requests each, or the label rung overfits and is not resolved.
    "topical": {"seed": 14, "labels": 2, "requests": 64, "tokens": (60, 240)},
}
SYNTHETIC_SHAPE: dict[str, Any] = {
    "num_experts": 32,
    "top_k": 4,
    "layers": 4,
    "requests": 24,
    "tokens": (60, 120),
    "prompt": 10,
}

DOMAINS = ("c_header", "dictionary", "json", "manpage", "prose", "python", "techdoc")


def save_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an uncompressed archive whose bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def write_json_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json_array(path: Path, rows: list[Any]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def hand(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ids = np.array([token for request in HAND.values() for token in request], dtype=np.uint8)
    lens = np.array([len(request) for request in HAND.values()], dtype=np.int64)
    arrays = {"expert_ids": ids, "request_lens": lens, "prompt_len": np.array(0), "num_experts": np.array(HAND_EXPERTS)}
    save_npz(out / "trace.npz", arrays)
    rows = [{"request_id": r, "prompt_len": 0, "label": HAND_LABELS[r]} for r in HAND]
    write_json_array(out / "requests.json", rows)


def synthetic(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for kind, shape in SYNTHETIC.items():
        trace = synth(kind, **{**SYNTHETIC_SHAPE, **shape})
        trace.save(out / f"{kind}.npz")
        for name, values in trace.truth.items():
            rounded = {str(at): round(value, 6) for at, value in values.items()}
            lines.append(json.dumps({"trace": kind, "quantity": name, "value": rounded}))
    (out / "truth.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def vllm(captures: Path, out: Path) -> None:
    """Write the sampled requests of a real vLLM run in the form of its HTTP responses, without any text or token id."""
    out.mkdir(parents=True, exist_ok=True)
    folder = captures / "traces" / "vllm_olmoe"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    rows = []
    for entry in index["requests"]:
        if not entry["id"].startswith("vllm-sampled-"):
            continue
        ids = np.load(folder / "npz" / f"{entry['id']}.npz", allow_pickle=False)["routed_experts"]
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(ids), allow_pickle=False)
        prompt, output = entry["prompt_len"], entry["output_len"]
        response = {
            "id": entry["id"],
            "object": "text_completion",
            "model": "tiny-olmoe",
            "choices": [{"index": 0, "routed_experts": base64.b64encode(buffer.getvalue()).decode("ascii")}],
            "system_fingerprint": f"vllm-{index['vllm']}",
            "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
        }
        rows.append({"domain": entry["domain"], "response": response})
    write_json_lines(out / "responses.jsonl", rows)
    copy_config(captures, out)


def sglang(captures: Path, out: Path) -> None:
    """Write sampled and speculatively sampled captures in the form of SGLang's /generate, counts and routing only."""
    out.mkdir(parents=True, exist_ok=True)
    folder = captures / "traces" / "olmoe"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows, sidecar = [], []
    for kind in ("sampled", "spec_sampled"):
        for domain in DOMAINS:
            chosen = [e for e in manifest if e["kind"] == kind and e["domain"] == domain][:2]
            for entry in chosen:
                ids = np.load(folder / "npz" / f"{entry['id']}.npz", allow_pickle=False)["routed_experts"]
                rows.append(
                    {
                        "meta_info": {
                            "id": entry["id"],
                            "prompt_tokens": entry["prompt_len"],
                            "completion_tokens": entry["output_len"],
                            "routed_experts": base64.b64encode(ids.astype("<i4").tobytes()).decode("ascii"),
                        }
                    }
                )
                sidecar.append({"request_id": entry["id"], "domain": domain, "decoding": kind})
    write_json_lines(out / "responses.jsonl", rows)
    write_json_array(out / "requests.json", sidecar)
    copy_config(captures, out)


def own_sources(manifest: list[Any], kind: str, each: int) -> list[Any]:
    """Return the first requests of some domains whose text is from CPython, boto3 or PostgreSQL's manual."""
    chosen = []
    for domain, ours in (("python", r".*\.py@"), ("json", r"[\w-]+/\d{4}-\d\d-\d\d/"), ("techdoc", r"[\w-]+\.html@")):
        entries = [e for e in manifest if (e["kind"], e["domain"]) == (kind, domain) and re.match(ours, e["source"])]
        chosen += entries[:each]
    return chosen


def steps(captures: Path, out: Path) -> None:
    """Write verification steps of speculative decoding, rejected drafts included, a row a step."""
    import polars as pl

    out.mkdir(parents=True, exist_ok=True)
    folder = captures / "traces" / "olmoe"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    names = [entry["id"] for entry in own_sources(manifest, "spec_sampled", 7)]
    every = pl.read_parquet(folder / "verify_steps.parquet").with_columns(
        pl.col("request_id", "domain").cast(pl.String)
    )
    kept = pl.concat([every.filter(request_id=name) for name in names])
    kept = kept.select("request_id", "domain", "prompt_len", "start_pos", "n_drafted", "n_accepted", "experts")
    experts = pl.Series([bytes(row) for row in kept["experts"].to_numpy()], dtype=pl.Binary)
    kept.with_columns(experts.alias("experts")).write_parquet(out / "steps.parquet", compression_level=19)
    copy_config(captures, out)


def predicted(captures: Path, out: Path) -> None:
    """Write sampled requests with the experts that the next routers predicted one and two MoE layers ahead."""
    arrays = {"expert_ids": "routed_experts", "predicted1": "predicted1", "predicted2": "predicted2"}
    sampled(captures, out, arrays)


def weighted(captures: Path, out: Path) -> None:
    """Write the same requests with the weights that the routers gave the experts."""
    sampled(captures, out, {"expert_ids": "routed_experts", "router_weights": "router_weights"})


def sampled(captures: Path, out: Path, arrays: Mapping[str, str]) -> None:
    """Write arrays of sampled requests under the names that they shall have, one request after the other."""
    out.mkdir(parents=True, exist_ok=True)
    folder = captures / "traces" / "olmoe"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entries = own_sources(manifest, "sampled", 5)
    files = [np.load(folder / "npz" / f"{entry['id']}.npz", allow_pickle=False) for entry in entries]
    joined = {name: np.concatenate([file[stored] for file in files]) for name, stored in arrays.items()}
    lens = np.array([len(file["routed_experts"]) for file in files], dtype=np.int64)
    save_npz(out / "trace.npz", {**joined, "request_lens": lens})
    rows = [{"request_id": e["id"], "prompt_len": e["prompt_len"], "domain": e["domain"]} for e in entries]
    write_json_array(out / "requests.json", rows)
    copy_config(captures, out)


def copy_config(captures: Path, out: Path) -> None:
    (out / "config.json").write_bytes((captures / "models" / "olmoe" / "config.json").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: over the committed files)")
    parser.add_argument("--captures", type=Path, help="folder with the captures of the small MoE models")
    options = parser.parse_args()
    hand(options.out / "hand")
    synthetic(options.out / "synthetic")
    if options.captures is None:
        print("the olmoe- folders were left as they are: --captures names the folder they come from")
        return
    vllm(options.captures, options.out / "olmoe-vllm")
    sglang(options.captures, options.out / "olmoe-sglang")
    steps(options.captures, options.out / "olmoe-steps")
    predicted(options.captures, options.out / "olmoe-predicted")
    weighted(options.captures, options.out / "olmoe-weights")


if __name__ == "__main__":
    main()
