"""How OpenVINO GenAI's pipelines are set up here: with their prefix cache, and in the precision that is asked for."""

from __future__ import annotations

import openvino_genai as genai

_PRECISION = {"bfloat16": "bf16", "float32": "f32"}


def scheduling(cache_gb: int) -> genai.SchedulerConfig:
    """Continuous batching over a KV cache of this size that keeps prefixes."""
    config = genai.SchedulerConfig()
    config.cache_size = cache_gb
    config.enable_prefix_caching = True
    return config


def properties(threads: int, dtype: str) -> dict[str, int | str]:
    """Of the device: `dtype`, a torch name, for computing and for the KV cache. Raises KeyError for one it has not."""
    precision = _PRECISION[dtype]
    return {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
    }
