"""A tiny random Llama as a Hugging Face folder, and what transformers itself computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.unit.workers.conftest import EOS_ID, VOCAB_SIZE, save_model

NUM_LAYERS = 2
NUM_KV_HEADS = 2
HEAD_DIM = 16
MAX_LEN = 16_384


def save_tiny_llama(path: Path, seed: int = 11) -> Path:
    """Two layers, four query heads over two KV heads; weights wide enough for varied greedy output."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.3,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return save_model(LlamaForCausalLM(config), path)


class Reference:
    """A model folder run by transformers alone, in float32: what is right."""

    def __init__(self, path: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._model = model.eval()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest `num_tokens` tokens after `prompt`."""
        ids = torch.tensor([list(prompt)])
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of what may follow each token but the last, `[len(tokens) - 1, vocab_size]`."""
        logits: torch.Tensor = self._model(torch.tensor([list(tokens)])).logits
        return logits[0, :-1].double().log_softmax(1)

    def kv(self, tokens: Sequence[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer after one pass over `tokens`: `[len(tokens), num_kv_heads, head_dim]` each."""
        return self.all_kv(tokens)[layer]

    @torch.inference_mode()
    def all_kv(self, tokens: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `kv`, of every layer."""
        cache = self._model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
        return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
