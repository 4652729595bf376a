"""OpenVINO GenAI's continuous batching, with its prefix cache, on the float16 GGUF of the model."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai
from contract import serve
from genai_settings import properties, scheduling

CACHE_GB = 2


class GenAI:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        settings = properties(threads, dtype)
        weights = f"{model}/float16.gguf"
        self._pipeline = genai.LLMPipeline(weights, "CPU", scheduler_config=scheduling(CACHE_GB), **settings)
        return {
            "engine": f"OpenVINO GenAI {genai.__version__.partition('-')[0]} continuous batching",
            "dtype": f"{settings['INFERENCE_PRECISION_HINT']}, weights from float16",
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, ignore_eos=True)
        width = max(map(len, prompts))
        ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts], dtype=np.int64)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask))
        return sum(len(tokens) for tokens in self._pipeline.generate(inputs, config).tokens)


serve(GenAI())
