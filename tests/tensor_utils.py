"""Tensors for the KV plane: random ones of a model's shape, and comparisons by bit and by number."""

from __future__ import annotations

import numpy as np
import torch

from kvcache import KVPair

SHAPES = {"gpt2": (12, 64), "smollm2": (3, 64)}
"""KV heads and head_dim of a layer, so `[seq_len, *SHAPES[model]]`."""

MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.08, "float16": 0.01}
"""How far KV computed in a dtype may lie from that computed in float32, as `relative_error` has it. Rounding adds up
from layer to layer: bfloat16 keeps 8 bits, and 30 layers lose about 4 of them."""


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern of the dtype is as likely as another: NaNs with payloads, infinities and denormals too."""
    kind = getattr(torch, dtype)
    draw = torch.Generator().manual_seed(seed)
    if kind is torch.bool:
        return torch.randint(0, 2, shape, generator=draw).to(torch.bool)
    size = kind.itemsize * int(np.prod(shape))
    return torch.randint(0, 256, (size,), generator=draw, dtype=torch.uint8).view(kind).reshape(shape)


def random_pair(model: str, num_tokens: int, dtype: str = "float32", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """K and V as a layer of `model` has them, `[num_tokens, num_kv_heads, head_dim]`, of any bits."""
    shape = (num_tokens, *SHAPES[model])
    return random_bits(dtype, shape, 2 * seed), random_bits(dtype, shape, 2 * seed + 1)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The tokens of one behind those of the other; by bytes, as torch does not concatenate all dtypes."""
    raw = torch.frombuffer(bytearray(bits(first) + bits(second)), dtype=torch.uint8)
    return raw.view(first.dtype).reshape(len(first) + len(second), *first.shape[1:])


def assert_same(pair: KVPair, k: torch.Tensor, v: torch.Tensor) -> None:
    """That what was read is what was written: dtype, shape and every bit."""
    found_k, found_v = pair.torch()
    assert (found_k.dtype, found_k.shape, found_v.shape) == (k.dtype, k.shape, v.shape)
    assert bits(found_k) == bits(k)
    assert bits(found_v) == bits(v)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a part of the norm of what was expected."""
    assert found.shape == expected.shape
    difference = torch.linalg.vector_norm(found.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))
