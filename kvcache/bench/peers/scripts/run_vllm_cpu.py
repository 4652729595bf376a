"""vLLM's CPU build, in process, with its prefix cache."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import vllm
from contract import serve


class VLLM:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._llm = vllm.LLM(
            model=model,
            dtype=dtype,
            enforce_eager=True,
            enable_prefix_caching=True,
            max_model_len=8192,
            max_num_seqs=64,
            disable_log_stats=True,
        )
        return {"engine": f"vLLM CPU {vllm.__version__} (eager)", "dtype": dtype}

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


serve(VLLM())
