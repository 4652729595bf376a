"""Fused layers beside transformers' own. What whole models then compute in bfloat16 is tried in `test_families`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from workers.fused_layer import FusedLayer, fuse
from workers.loader import load_model
from workers.packed_linear import JoinedLinear, PackedGatedUnit, can_pack, pack

from .conftest import source_of
from .families import NUM_LAYERS, WINDOW, save_random

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="this torch has no oneDNN packing"
)
FUSED = {"llama", "mistral", "mistral without windows", "qwen2", "qwen2 with windows"}


def load(name: str, tmp_path: Path) -> Any:
    return load_model(source_of(save_random(name, tmp_path / "model")), dtype="bfloat16").model


def fused_of(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


@pytest.mark.parametrize("name", [*sorted(FUSED), "qwen3", "gemma2", "phi", "gpt2"])
def test_layers_of_the_common_build_are_fused_and_no_others(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    fuse(model)
    assert len(fused_of(model)) == (NUM_LAYERS if name in FUSED else 0)


def test_fused_layer_asks_attention_for_the_window_that_its_own_code_asked_for(tmp_path: Path) -> None:
    model = load("qwen2 with windows", tmp_path)
    fuse(model)
    assert [layer.rule.window for layer in fused_of(model)] == [None, WINDOW, WINDOW]
    assert {layer.rule.scaling for layer in fused_of(model)} == {8**-0.5}


def double(_module: nn.Module, _given: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def queries_scaled(layer: Any) -> None:
    layer.self_attn.q_proj.register_forward_hook(double)


def output_scaled(layer: Any) -> None:
    layer.register_forward_hook(double)


def norm_of_another_kind(layer: Any) -> None:
    layer.post_attention_layernorm = nn.LayerNorm(32, dtype=torch.bfloat16)


def unit_of_another_kind(layer: Any) -> None:
    layer.mlp.act_fn = nn.Tanh()


def one_part_more(layer: Any) -> None:
    layer.self_attn.q_norm = nn.Identity()


@pytest.mark.parametrize(
    "change", [queries_scaled, output_scaled, norm_of_another_kind, unit_of_another_kind, one_part_more]
)
def test_layer_that_computes_something_else_keeps_its_own_code(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    change(model.model.layers[1])
    fuse(model)
    assert [isinstance(layer, FusedLayer) for layer in model.model.layers] == [True, False, True]


def test_gated_units_and_projections_of_layers_that_are_not_fused_are_packed_as_such(tmp_path: Path) -> None:
    model = load("gemma2", tmp_path)
    pack(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(PackedGatedUnit) == NUM_LAYERS
    assert kinds.count(JoinedLinear) == 3 * NUM_LAYERS


def test_gated_unit_that_computes_something_else_keeps_its_own_code(tmp_path: Path) -> None:
    model = load("gemma2", tmp_path)
    model.model.layers[0].mlp.register_forward_hook(double)
    pack(model)
    assert [type(layer.mlp) is PackedGatedUnit for layer in model.model.layers] == [False, True, True]
