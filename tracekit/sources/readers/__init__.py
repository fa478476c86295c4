"""One module a format: what its files say, request by request."""

from __future__ import annotations

from tracekit.sources.base import Reader
from tracekit.sources.readers import (
    arrays,
    bigmoe,
    counts_csv,
    dynamo,
    flame,
    imatrix,
    llamacpp,
    long,
    megatron,
    mlx,
    moe_infinity,
    nemo,
    sglang,
    sglang_recorder,
    slime,
    step_tables,
    tensorrt,
    transformers_hooks,
    vllm,
    vllm_log,
)

READERS: dict[str, Reader] = {
    module.READER.name: module.READER
    for module in (
        moe_infinity,
        sglang_recorder,
        slime,
        transformers_hooks,
        arrays,
        bigmoe,
        llamacpp,
        nemo,
        dynamo,
        sglang,
        vllm,
        megatron,
        mlx,
        vllm_log,
        tensorrt,
        imatrix,
        flame,
        counts_csv,
        step_tables,
        long,
    )
}
"""The readers by name, in the order in which they are tried."""
