"""Write a Llama-family model folder as a GGUF file, for engines that read nothing else.

Only what llama.cpp's `llama` architecture needs, for models with SmolLM's tokenizer. Weights are stored in one dtype,
norms in float32; queries and keys are in llama.cpp's order, where the two halves of a head are interleaved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from safetensors.torch import load_file

_TYPES = {
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, target: Path, dtype: str) -> None:
    """Write `folder` as `target`, whole or not at all. dtype: float32, float16 or bfloat16.

    Raises ValueError for a model that is not of the Llama family or ties no embeddings.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or not config["tie_word_embeddings"]:
        raise ValueError(f"{folder.name} is not a Llama-family model with tied embeddings")
    unfinished = target.with_suffix(f".{os.getpid()}.part")
    writer = GGUFWriter(unfinished, "llama")
    _describe(writer, config, folder.name, _TYPES[dtype][2])
    _add_tokenizer(writer, folder, config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _add_tensor(writer, name, tensor, config, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)


def _describe(writer: GGUFWriter, config: dict[str, Any], name: str, file_type: LlamaFileType) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[PAD{number}]" for number in range(config["vocab_size"])]
    types = [TokenType.UNUSED] * len(tokens)
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_unk_token_id(config["unk_token_id"])
    writer.add_add_bos_token(False)


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, config: dict[str, Any], dtype: str) -> None:
    kind, stored, _ = _TYPES[dtype]
    if name in _TOP:
        target = _TOP[name]
    else:
        _, _, layer, rest = name.split(".", 3)
        target = f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"
    if target.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config["num_attention_heads" if "attn_q" in target else "num_key_value_heads"]
        rows, columns = tensor.shape
        tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
    if tensor.dim() == 1:
        kind, stored = torch.float32, GGMLQuantizationType.F32
    data = tensor.to(kind).contiguous()
    if kind is torch.bfloat16:
        raw: np.ndarray[Any, Any] = data.view(torch.uint8).numpy()  # GGUFWriter takes the shape in bytes
        writer.add_tensor(target, raw, raw_dtype=stored)
    else:
        writer.add_tensor(target, data.numpy(), raw_dtype=stored)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
