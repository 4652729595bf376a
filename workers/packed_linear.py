"""Linear layers whose weights are laid out once as oneDNN wants them, for bfloat16 on a CPU.

torch's own bfloat16 matrix product hands oneDNN plain weights, which it lays out anew in every call. Done
once at load it gives the same bits in 0.65x the time (576 x 1536, 1 and 16 rows, AMX, two cores); in float32
it gains nothing there, so only bfloat16 is packed. The operators are torch's own (its inductor uses them)
but not public: where they are missing, `pack` leaves the model as it is.

Two kinds of neighbours become one. Projections that are given the same states, of queries, keys and values, are one
product over their weights together (0.8x the time, 1 to 32 rows, one core). Gated units (Shazeer 2020) bend and
multiply within their products, before these are rounded (0.97x at 32 rows, 0.85x at 256). That changes the model's own
code, so it is tried: a unit that does not compute on random numbers what it did before keeps its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

JOINED = ("q_proj", "k_proj", "v_proj")
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Names that families give what a gated unit is made of."""
ACTIVATIONS = {type(ACT2FN["silu"]): ("swish", ""), type(ACT2FN["gelu_pytorch_tanh"]): ("gelu", "tanh")}
"""oneDNN's names for them: of the function, and of the way that it is computed."""
TRIAL_ROWS = 4
TRIAL_TOLERANCE = 0.05
"""As a part of the largest number: two products in bfloat16, rounded at other places."""


class PackedLinear(nn.Module):
    """`activation(x @ weight.T + bias)` with an opaque weight: for inference only, not to be saved or moved.

    weight: [num_out, num_in] bfloat16 on the CPU; bias: [num_out] or None. activation: as in `ACTIVATIONS`.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: tuple[str, str] = ("none", "")
    ) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = bias.detach() if bias is not None else None
        self._function, self._way = activation

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., num_in] to [..., num_out]."""
        packed = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, self._function, [], self._way)
        return cast("torch.Tensor", packed)

    def times(self, states: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Without the activation, and multiplied by factors, [..., num_out]."""
        return self._with(states, factors, "mul")

    def plus(self, states: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """Without the activation, and added to terms, [..., num_out]."""
        return self._with(states, terms, "add")

    def _with(self, states: torch.Tensor, others: torch.Tensor, what: str) -> torch.Tensor:
        packed = torch.ops.mkldnn._linear_pointwise.binary(states, others, self._weight, self._bias, what)
        return cast("torch.Tensor", packed)


class JoinedLinears:
    """Linear layers that are given the same states, computed when the first of them is asked.

    What the others will be asked for is kept until then, or until the states are others.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._all = pack_together(layers)
        self._widths = [layer.out_features for layer in layers]
        self._states: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def compute(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """What the layer of that index makes of the states; a view of what all of them do."""
        if states is not self._states or index not in self._outputs:
            self._outputs = dict(enumerate(self._all(states).split(self._widths, dim=-1)))
            self._states = states
        output = self._outputs.pop(index)
        if not self._outputs:
            self._states = None
        return output


class JoinedLinear(nn.Module):
    """One of them."""

    def __init__(self, joined: JoinedLinears, index: int) -> None:
        super().__init__()
        self._joined = joined
        self._index = index

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., num_in] to [..., num_out]."""
        return self._joined.compute(self._index, states)


class PackedGatedUnit(nn.Module):
    """`down(activation(gate(x)) * up(x))`, of the layers of a gated unit."""

    def __init__(self, unit: nn.Module, activation: tuple[str, str]) -> None:
        super().__init__()
        gate, up, down = (unit.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        assert isinstance(gate, nn.Linear)
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        self._gate = PackedLinear(gate.weight, gate.bias, activation)
        self._up = PackedLinear(up.weight, up.bias)
        self._down = PackedLinear(down.weight, down.bias)
        self.num_in = gate.in_features

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., num_in] to [..., num_in]."""
        return self._down.forward(self._up.times(states, self._gate.forward(states)))

    def plus(self, states: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """The same, added to terms, [..., num_in]."""
        return self._down.plus(self._up.times(states, self._gate.forward(states)), terms)


def pack_together(layers: Sequence[nn.Linear]) -> PackedLinear:
    """One layer that gives what they do one after the other. All of them have a bias, or none has."""
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    biases: list[torch.Tensor | None] = [layer.bias for layer in layers]
    has_bias = [bias for bias in biases if bias is not None]
    return PackedLinear(torch.cat(weights), torch.cat(has_bias) if has_bias else None)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing helps, and this torch and this processor can do it: without AVX-512 they cannot."""
    operators = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return (
        dtype is torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack(model: PreTrainedModel) -> None:
    """Replace every linear layer of the model, in place; GPT-2's `Conv1D` is one with its weight transposed.

    The plain weights are freed, but for an output projection that shares its weight with the embedding.
    """
    _pack_children(model)


def _pack_children(parent: nn.Module) -> None:
    _join(parent)
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child.weight, child.bias))
        elif type(child) is Conv1D:
            setattr(parent, name, PackedLinear(child.weight.t(), child.bias))
        elif (unit := as_gated_unit(child)) is not None:
            setattr(parent, name, unit)
        else:
            _pack_children(child)


def _join(parent: nn.Module) -> None:
    if layers := joinable(parent):
        joined = JoinedLinears(layers)
        for index, name in enumerate(JOINED):
            setattr(parent, name, JoinedLinear(joined, index))


def joinable(parent: nn.Module) -> list[nn.Linear]:
    """The projections of `JOINED` that it has, if they can be one layer; else none."""
    children = dict(parent.named_children())
    found = [children.get(name) for name in JOINED]
    layers = [layer for layer in found if isinstance(layer, nn.Linear) and type(layer) is nn.Linear]
    alike = {(layer.in_features, layer.bias is None) for layer in layers}
    return layers if len(layers) == len(JOINED) and len(alike) == 1 else []


def as_gated_unit(unit: nn.Module) -> PackedGatedUnit | None:
    """The same in packed layers, or None if it is no gated unit, or one that does more."""
    children = dict(unit.named_children())
    activation = ACTIVATIONS.get(type(children.get("act_fn", unit)))
    layers = [child for name, child in children.items() if name != "act_fn"]
    if children.keys() != GATED or activation is None or any(type(layer) is not nn.Linear for layer in layers):
        return None
    packed = PackedGatedUnit(unit, activation)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TRIAL_ROWS, packed.num_in, generator=generator).bfloat16()
    expected, computed = unit(states).float(), packed(states).float()
    is_same = bool((computed - expected).abs().max() <= TRIAL_TOLERANCE * expected.abs().max())
    return packed if is_same else None
