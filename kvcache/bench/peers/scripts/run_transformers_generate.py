"""transformers' own `generate`, on a left-padded batch. It keeps nothing between calls."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from contract import serve


class Generate:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        return {"engine": f"transformers {transformers.__version__} generate", "dtype": dtype}

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return int(output.shape[0] * (output.shape[1] - longest))


serve(Generate())
