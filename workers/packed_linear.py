"""Linear layers whose weights are laid out once as oneDNN wants them, for bfloat16 on a CPU.

torch's own bfloat16 matrix product hands oneDNN plain weights, which it lays out anew in every call. Done
once at load it gives the same bits in 0.65x the time (576 x 1536, 1 and 16 rows, AMX, two cores); in float32
it gains nothing there, so only bfloat16 is packed. The two operators are torch's own (its inductor uses them)
but not public: where they are missing, `pack` leaves the model as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with an opaque weight: for inference only, not to be saved or moved.

    weight: [num_out, num_in] bfloat16 on the CPU; bias: [num_out] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = bias.detach() if bias is not None else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., num_in] to [..., num_out]."""
        packed = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return cast("torch.Tensor", packed)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing helps and this torch can do it."""
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return (
        dtype is torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )


def pack(model: PreTrainedModel) -> None:
    """Replace every linear layer of the model, in place; GPT-2's `Conv1D` is one with its weight transposed.

    The plain weights are freed, but for an output projection that shares its weight with the embedding.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
            elif type(child) is Conv1D:
                setattr(parent, name, PackedLinear(child.weight.t(), child.bias))
