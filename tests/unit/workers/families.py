"""Tiny random models of every family that is served, in the shapes that families come in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from .conftest import EOS_ID, VOCAB_SIZE, save_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUM_LAYERS = 3
NUM_HEADS = 4
WINDOW = 9
"""In tokens: neither a multiple nor a divisor of the block size, and shorter than the prompts."""
_IDS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": EOS_ID, "eos_token_id": None, "pad_token_id": EOS_ID}
_SIZES: dict[str, Any] = _IDS | {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "max_position_embeddings": 128,
}
_GQA: dict[str, Any] = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GQA, head_dim=16),
    "mistral": lambda: MistralConfig(**_GQA, sliding_window=WINDOW),
    "mistral without windows": lambda: MistralConfig(**_GQA, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_GQA),
    "qwen2 with windows": lambda: Qwen2Config(
        **_GQA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_GQA, head_dim=16),
    "qwen3 with windows": lambda: Qwen3Config(
        **_GQA, head_dim=8, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "gemma2": lambda: Gemma2Config(
        **_GQA,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=8.0,
    ),
    "gpt2": lambda: GPT2Config(
        **_IDS,
        n_embd=32,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        n_positions=128,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=48),
    "gpt_neox in sequence": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=48, use_parallel_residual=False),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=48),
    "opt projected": lambda: OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": lambda: PhiConfig(**_SIZES, intermediate_size=48),
    "phi with norms": lambda: PhiConfig(**_GQA, qk_layernorm=True),
    "falcon with ALiBi": lambda: FalconConfig(**_SIZES, alibi=True, multi_query=False, bias=True, parallel_attn=False),
    "falcon": lambda: FalconConfig(**_SIZES),
    "falcon new": lambda: FalconConfig(**_SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": lambda: BloomConfig(**_IDS, hidden_size=32, n_layer=NUM_LAYERS, n_head=NUM_HEADS),
    "bloom with 6 heads": lambda: BloomConfig(**_IDS, hidden_size=48, n_layer=NUM_LAYERS, n_head=6),
}


def save_random(name: str, path: Path) -> Path:
    """Save the model of that name, every weight random: biases and norms too, which start as zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model: Any = AutoModelForCausalLM.from_config(MODELS[name]())  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return save_model(model, path)
