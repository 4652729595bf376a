"""numpy arrays and torch tensors to what the bus carries, and back, bit for bit.

torch is imported only when it is asked for; a tensor that is handed in brings its own. numpy has no bfloat16 and
no fp8 of its own: such arrays come out as their raw bits (`uint16`, `uint8`), and go in as torch tensors or with
the dtypes of `ml_dtypes`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bus.errors import BadTensor
from bus.tensors import DType, TensorMeta, check_kv_pair, check_tensor, dtype_by_name

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = NDArray[Any] | torch.Tensor

_RAW: dict[DType, np.dtype[Any]] = {
    DType.BFLOAT16: np.dtype("<u2"),
    DType.FLOAT8_E4M3FN: np.dtype("u1"),
    DType.FLOAT8_E5M2: np.dtype("u1"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as it travels. data: its bytes in C order, little endian."""

    meta: TensorMeta
    data: memoryview


@dataclass(frozen=True, slots=True)
class KVPair:
    """K and V of one layer, `[length, num_kv_heads, head_dim]`, read-only. `dtype` is theirs on the bus: for
    bfloat16 and fp8 the arrays hold the raw bits, and `torch()` gives the numbers."""

    k: NDArray[Any]
    v: NDArray[Any]
    dtype: str

    @property
    def length(self) -> int:
        """Tokens in this pair."""
        return int(self.k.shape[0])

    @property
    def is_numpy(self) -> bool:
        """Whether numpy knows the dtype; if not, the arrays hold raw bits."""
        return DType[self.dtype.upper()] not in _RAW

    def torch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as new torch tensors in main memory, of their true dtype. Imports torch."""
        return _to_torch(self.k, self.dtype), _to_torch(self.v, self.dtype)


def kv_tensors(k: Array, v: Array, limit_bytes: int) -> tuple[Tensor, Tensor]:
    """K and V ready to be sent; a copy is made of what is not contiguous, little endian and in main memory.

    k, v: numpy or torch, `[seq_len, num_kv_heads, head_dim]`, one dtype. Raises BadTensor.
    """
    pair = (_tensor("k", k), _tensor("v", v))
    check_kv_pair(pair[0].meta, pair[1].meta)
    for tensor in pair:
        check_tensor(tensor.meta, tensor.data.nbytes, limit_bytes)
    return pair


def kv_pair(k: TensorMeta, v: TensorMeta, k_data: memoryview | bytes, v_data: memoryview | bytes) -> KVPair:
    """The arrays behind what was received; views of it, not copies. Raises BadTensor if lengths do not agree."""
    check_kv_pair(k, v)
    return KVPair(_array(k, k_data), _array(v, v_data), k.dtype.name.lower())


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise BadTensor(f"{name} is a masked array, and a mask cannot be sent; fill it first")
    if isinstance(value, np.ndarray):
        return _from_numpy(value)
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        return _from_torch(name, value)
    raise BadTensor(f"{name} must be a numpy array or a torch tensor, not {type(value).__name__}")


def _from_numpy(array: NDArray[Any]) -> Tensor:
    meta = TensorMeta(dtype_by_name(array.dtype.name), array.shape)
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return Tensor(meta, _bytes_of(plain))


def _from_torch(name: str, tensor: Any) -> Tensor:  # noqa: ANN401  # torch.Tensor, whose package may not be there
    module = importlib.import_module("torch")
    if tensor.layout is not module.strided or tensor.is_nested or tensor.is_meta:
        raise BadTensor(f"{name} must be a dense torch tensor that has data, not sparse, nested or on the meta device")
    meta = TensorMeta(dtype_by_name(str(tensor.dtype)), tuple(tensor.shape))
    plain = tensor.detach().cpu().resolve_neg().contiguous()
    return Tensor(meta, _bytes_of(plain.reshape(-1).view(module.uint8).numpy()))


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data.toreadonly()


def _array(meta: TensorMeta, data: memoryview | bytes) -> NDArray[Any]:
    check_tensor(meta, memoryview(data).nbytes)
    dtype = _RAW.get(meta.dtype) or np.dtype(meta.dtype.name.lower()).newbyteorder("<")
    array = np.frombuffer(data, dtype=dtype).reshape(meta.shape)
    array.flags.writeable = False
    return array


def _to_torch(array: NDArray[Any], dtype: str) -> torch.Tensor:
    module = importlib.import_module("torch")
    tensor: torch.Tensor = module.empty(array.shape, dtype=getattr(module, dtype))
    if array.size:
        tensor.view(-1).view(module.uint8).copy_(module.from_numpy(array.reshape(-1).view(np.uint8).copy()))
    return tensor
