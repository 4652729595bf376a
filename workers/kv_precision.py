"""How keys and values are kept in the pool: as the model computes them, cast, or as codes with a scale.

Codes are one byte per element. Each token has a scale of its own for each head, `max |x| / 127` (int8) or
`max |x| / 448` (fp8, e4m3: 4 bits of exponent, 3 of mantissa, Micikevicius et al. 2022), kept beside its block in the
model's dtype. So a token is quantised once, when it is written, and no later token changes it; whoever computes reads
the same numbers as whoever finds them cached (Sheng et al. 2023, FlexGen, section 5, quantises in groups likewise).

Error of an element: int8 at most 1/254 of the largest in its head and token, fp8 at most 1/16 of the element itself,
or 1/458,752 of the largest if that is more; in bfloat16 what is read is rounded once more, by 1/256 of itself at most.

Of what SmolLM2 in float32 says of 512 tokens of English, against a pool of float32: logits differ by 0.075 on the mean
with int8 and 0.19 with fp8 (a pool of bfloat16: 0.014; the model in bfloat16: 0.082), the KL divergence is 0.0010 and
0.0053 (0.00003; 0.0011), 97 and 95 % of the likeliest tokens are the same, and the negative log likelihood is 4.23.
"""

from __future__ import annotations

from typing import Final

import torch

AUTO: Final = "auto"
KV_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LARGEST_CODE: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of the dtypes that need a scale."""


def kv_dtype(name: str, of_model: torch.dtype) -> torch.dtype:
    """The dtype of the pool for `auto`, which is the model's, or one of KV_DTYPES. Raises KeyError for another."""
    return of_model if name == AUTO else KV_DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """The name in KV_DTYPES."""
    return next(name for name, known in KV_DTYPES.items() if known is dtype)


def is_scaled(dtype: torch.dtype) -> bool:
    return dtype in LARGEST_CODE


def quantise(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a scaled dtype, and the scales.

    states: [..., head_dim]. Returns [..., head_dim] in `dtype` and [..., 1] in the dtype of `states`.
    A token with a NaN or an infinity in it has a scale that is one too, so reading it gives no number.
    """
    largest = LARGEST_CODE[dtype]
    # The smallest normal number keeps a token of zeros, or of what is nearly zero, from dividing by zero.
    least = torch.finfo(states.dtype).tiny
    scales = (states.abs().amax(dim=-1, keepdim=True).float() / largest).clamp_min_(least).to(states.dtype)
    codes = (states.float() / scales.float()).clamp_(-largest, largest)
    if dtype is torch.int8:
        codes = codes.round_().nan_to_num_(0.0)
    return codes.to(dtype), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`codes * scales`, computed in the dtype of the scales."""
    return codes.to(scales.dtype).mul_(scales)
