from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from workers.loader import load_model
from workers.packed_linear import PackedLinear, can_pack
from workers.runner import TorchRunner

from .conftest import make_pool, source_of

if TYPE_CHECKING:
    from pathlib import Path

needs_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="this torch has no oneDNN packing"
)


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 5, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_layer_computes_what_the_plain_one_does(num_rows: int, with_bias: bool) -> None:
    torch.manual_seed(num_rows)
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    bias = torch.randn(48, dtype=torch.bfloat16) if with_bias else None
    states = torch.randn(2, num_rows, 32, dtype=torch.bfloat16)
    plain = torch.nn.functional.linear(states.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(PackedLinear(weight, bias)(states).float(), plain, atol=0.15, rtol=0.02)


@needs_packing
@pytest.mark.parametrize("family_name", ["llama", "gpt2"])
def test_torch_runner_leaves_a_bfloat16_model_on_a_cpu_no_plain_linear_layer(
    model_dirs: dict[str, Path], family_name: str
) -> None:
    loaded = load_model(source_of(model_dirs[family_name]), dtype="bfloat16")
    TorchRunner(loaded, make_pool(loaded))
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert "PackedLinear" in kinds
    assert not kinds & {"Linear", "Conv1D"}


def test_float32_and_gpu_models_are_left_as_they_are() -> None:
    assert not can_pack(torch.float32, torch.device("cpu"))
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
