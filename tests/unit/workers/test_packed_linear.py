from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from workers.loader import load_model
from workers.packed_linear import JoinedLinear, JoinedLinears, PackedLinear, can_pack
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


@needs_packing
def test_joined_layers_give_what_each_would_in_any_order_and_whatever_comes_between() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, width, dtype=torch.bfloat16) for width in (48, 16, 16)]
    joined = JoinedLinears(layers)
    ours = [JoinedLinear(joined, index) for index in range(3)]
    first, second = torch.randn(2, 1, 5, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        for index, states in ((2, first), (0, first), (1, second), (1, second), (1, first), (0, first), (2, first)):
            torch.testing.assert_close(ours[index](states), layers[index](states), atol=0.02, rtol=0.02)


@needs_packing
def test_joined_layers_keep_nothing_once_all_of_them_were_asked() -> None:
    layers = [torch.nn.Linear(32, 16, dtype=torch.bfloat16) for _ in range(3)]
    joined = JoinedLinears(layers)
    states = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    seen = weakref.ref(states)
    with torch.inference_mode():
        for index in range(3):
            joined.compute(index, states)
    del states
    assert seen() is None


def test_float32_and_gpu_models_are_left_as_they_are() -> None:
    assert not can_pack(torch.float32, torch.device("cpu"))
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
