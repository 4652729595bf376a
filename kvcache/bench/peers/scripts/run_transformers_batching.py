"""transformers' continuous batching, `generate_batch`, with its paged cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from contract import serve
from transformers import ContinuousBatchingConfig, GenerationConfig

PAGE_TOKENS = 32
NUM_PAGES = 2048


class Batching:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        # Its own choice of a size would take most of the machine's memory.
        pages = ContinuousBatchingConfig(page_size=PAGE_TOKENS, num_blocks=NUM_PAGES)
        self._batching = {"continuous_batching_config": pages, "persistent_manager": True, "progress_bar": False}
        return {"engine": f"transformers {transformers.__version__} continuous batching", "dtype": dtype}

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = self._model.generate_batch(inputs=prompts, generation_config=config, **self._batching)
        return sum(len(output.generated_tokens) for output in outputs.values())


serve(Batching())
