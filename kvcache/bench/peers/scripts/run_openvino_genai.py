"""OpenVINO GenAI's continuous batching, with its prefix cache, on the float16 GGUF of the model."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai
from contract import serve

CACHE_GB = 2
_PRECISION = {"bfloat16": "bf16", "float32": "f32"}


class GenAI:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = CACHE_GB
        scheduling.enable_prefix_caching = True
        precision = _PRECISION[dtype]
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        self._make = lambda: genai.LLMPipeline(f"{model}/float16.gguf", "CPU", scheduler_config=scheduling, **settings)
        self._pipeline = self._make()
        return {
            "engine": f"OpenVINO GenAI {genai.__version__.partition('-')[0]} continuous batching",
            "dtype": f"{precision}, weights from float16",
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, ignore_eos=True)
        width = max(map(len, prompts))
        ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts], dtype=np.int64)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask))
        return sum(len(tokens) for tokens in self._pipeline.generate(inputs, config).tokens)


serve(GenAI())
