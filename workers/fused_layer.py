"""Decoder layers of the commonest build in few operators, for bfloat16 on a CPU, where calling them is what takes long.

A layer that normalises by root mean squares, projects, turns queries and keys by their positions, attends, and goes
through a gated unit is some 75 operators in transformers' code, most of them on a few thousand numbers each, and at 8
sequences calling them takes as long as half of its matrix products. Here it is some 30:

    hidden -- norm -- [q k v] -- turn [q k] -- attend -- project + hidden -- norm -- gated unit + itself -->

transformers' code stays the measure. What such a layer asks of attention (its window, its scale) is what its own code
asks when it is run once on random numbers, and a layer that does not hand over the same queries, keys and values, and
give the same in the end, keeps its own code. Norms: Zhang and Sennrich 2019; turning: Su et al. 2021 (RoPE); gated
units: Shazeer 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workers.attention import Rule
from workers.packed_linear import TRIAL_ROWS, TRIAL_TOLERANCE, PackedLinear, as_gated_unit, joinable, pack_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workers.attention import Step
    from workers.packed_linear import PackedGatedUnit

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}


class Turn:
    """Cosines and sines of a pass, made fit for `turn` once for all layers."""

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None
        self._factors = (torch.empty(0), torch.empty(0))

    def factors(self, cosines: torch.Tensor, sines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as `[num_tokens, 1, head_dim]`, the first half of the sines negated; given as [1, num_tokens, ...]."""
        if cosines is not self._given:
            first, second = sines[0].unsqueeze(1).chunk(2, dim=-1)
            self._factors = (cosines[0].unsqueeze(1), torch.cat([-first, second], dim=-1))
            self._given = cosines
        return self._factors


class FusedLayer(nn.Module):
    """One decoder layer, made of transformers' own, whose weights it packs. rule: what its attention asks for."""

    def __init__(self, layer: Any, unit: PackedGatedUnit, turn: Turn, rule: Rule) -> None:  # noqa: ANN401 (any family's)
        super().__init__()
        attention = layer.self_attn
        projections = joinable(attention)
        self._layer_idx: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._num_heads = projections[0].out_features // self._head_dim
        self._num_kv_heads = projections[1].out_features // self._head_dim
        self._joined = pack_together(projections)
        self._output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self._unit = unit
        self._before, self._between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._turn = turn
        self.rule = rule

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged_step: Step,
        **_unused: object,
    ) -> torch.Tensor:
        """[1, num_tokens, hidden_size] to the same. position_embeddings: cosines, sines, [1, num_tokens, head_dim]."""
        num_turned = self._num_heads + self._num_kv_heads
        heads = self._joined.forward(self._before.apply(hidden_states)).view(
            -1, num_turned + self._num_kv_heads, self._head_dim
        )
        turned = _turned(heads[:, :num_turned], *self._turn.factors(*position_embeddings))
        keys, values = turned[:, self._num_heads :].transpose(0, 1), heads[:, num_turned:].transpose(0, 1)
        keys, values = paged_step.kv.store(self._layer_idx, keys, values, paged_step.new_rows)
        query = turned[:, : self._num_heads].transpose(0, 1).unsqueeze(0)
        attended = paged_step.attend(self._layer_idx, query, keys, values, self.rule)
        hidden_states = self._output.plus(attended.reshape(1, hidden_states.shape[1], -1), hidden_states)
        return self._unit.plus(self._between.apply(hidden_states), hidden_states)


class _Norm:
    """Root mean square normalisation, squares summed in float32."""

    def __init__(self, norm: Any) -> None:  # noqa: ANN401
        self._weight: torch.Tensor = norm.weight.detach()
        self._epsilon = torch.tensor(norm.variance_epsilon, dtype=torch.float32)
        self._share = 1 / norm.weight.shape[0]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        root = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, root, root, value=self._share).rsqrt_()
        return (states * scale).to(states.dtype) * self._weight


def _turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_heads, head_dim], each head's two halves as parts of complex numbers, turned."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cosines, torch.cat([second, first], dim=-1), sines)


@torch.inference_mode()
def fuse(model: PreTrainedModel) -> None:
    """Replace the decoder layers of a model in bfloat16 on the CPU that are of this build, in place."""
    turn = Turn()
    for stack in list(model.modules()):
        if isinstance(stack, nn.ModuleList):
            for index, layer in enumerate(stack):
                if (fused := _as_fused(layer, turn)) is not None:
                    stack[index] = fused


def _as_fused(layer: nn.Module, turn: Turn) -> FusedLayer | None:
    if not _is_of_this_build(layer):
        return None
    unit = as_gated_unit(layer.get_submodule("mlp"))
    if unit is None:
        return None
    own, ours = _Probe(), _Probe()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TRIAL_ROWS, unit.num_in, generator=generator).bfloat16()
    angles = torch.rand(1, TRIAL_ROWS, _head_dim(layer) // 2, generator=generator).repeat(1, 1, 2)
    embeddings = (angles.cos().bfloat16(), angles.sin().bfloat16())
    expected = layer(states, attention_mask=None, position_embeddings=embeddings, paged_step=own)
    if own.rule is None or not isinstance(expected, torch.Tensor):
        return None
    fused = FusedLayer(layer, unit, turn, own.rule)
    computed = fused(states, position_embeddings=embeddings, paged_step=ours)
    pairs = zip([*own.seen, expected], [*ours.seen, computed], strict=True)
    return fused if all(_is_alike(one, other) for one, other in pairs) else None


def _is_of_this_build(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    if parts.keys() != PARTS or dict(parts["self_attn"].named_children()).keys() != ATTENTION_PARTS:
        return False
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    return bool(joinable(parts["self_attn"])) and all(hasattr(norm, "variance_epsilon") for norm in norms)


def _head_dim(layer: nn.Module) -> int:
    head_dim = layer.get_submodule("self_attn").head_dim
    assert isinstance(head_dim, int)
    return head_dim


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one.float() - other.float()).abs().max() <= TRIAL_TOLERANCE * one.float().abs().max())


class _Probe:
    """A step, and its pool, that keeps what a layer hands over, and attends by handing its queries back."""

    new_rows = torch.empty(0)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.rule: Rule | None = None

    @property
    def kv(self) -> Any:  # noqa: ANN401
        return self

    def store(
        self, _layer: int, keys: torch.Tensor, values: torch.Tensor, _rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += [keys, values]
        return keys, values

    def attend(
        self, _layer: int, query: torch.Tensor, _keys: torch.Tensor, _values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        self.seen.append(query)
        self.rule = rule
        return query[0].transpose(0, 1)
