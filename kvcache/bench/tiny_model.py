"""A tiny random Llama as a Hugging Face folder, written without torch: for benchmarks of what stands around a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 512
HIDDEN = 32
HEADS = 2
LAYERS = 1


def save_tiny_model(path: Path) -> Path:
    """One layer, and a tokenizer whose tokens are the words `t0` to `t511`. Returns `path`, which it makes."""
    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t2"},
    }
    _write(path / "config.json", config)
    _write(path / "tokenizer.json", tokenizer)
    _write(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"})
    save_file(_weights(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    draw = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (2 * HIDDEN, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, 2 * HIDDEN)}
        shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else draw.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")
