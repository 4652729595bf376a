"""What a tensor is on the bus: a dtype from a closed list, a shape, and its bytes in one payload frame.

C order, little endian, no strides and no offsets, so there is nothing to lie about but the length,
and that is checked against `prod(shape) * itemsize` before anything is allocated. Buffers go in and
out as `memoryview`s; turning one into a numpy or torch tensor is the business of higher layers.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from bus.errors import BadTensor

MAX_DIMS = 8
MAX_TENSOR_BYTES = 1 << 40

Dim = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Shape = Annotated[tuple[Dim, ...], msgspec.Meta(max_length=MAX_DIMS)]


class DType(enum.IntEnum):
    """The dtypes the bus carries, by their number on the wire (never renumbered)."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    FLOAT64 = 4
    INT8 = 5
    INT16 = 6
    INT32 = 7
    INT64 = 8
    UINT8 = 9
    UINT16 = 10
    UINT32 = 11
    UINT64 = 12
    BOOL = 13
    FLOAT8_E4M3FN = 14
    FLOAT8_E5M2 = 15


ITEMSIZE: dict[DType, int] = {
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT64: 8,
    DType.INT8: 1,
    DType.INT16: 2,
    DType.INT32: 4,
    DType.INT64: 8,
    DType.UINT8: 1,
    DType.UINT16: 2,
    DType.UINT32: 4,
    DType.UINT64: 8,
    DType.BOOL: 1,
    DType.FLOAT8_E4M3FN: 1,
    DType.FLOAT8_E5M2: 1,
}
BY_NAME: dict[str, DType] = {dtype.name.lower(): dtype for dtype in DType}


class TensorMeta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Dtype and shape of one tensor; its bytes travel in a payload frame."""

    dtype: DType
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Length of the tensor's data in bytes, by its own word (Python integers: it cannot overflow)."""
        count = ITEMSIZE[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


def dtype_by_name(name: str) -> DType:
    """The wire dtype of a numpy or torch dtype name, such as `bfloat16`. Raises BadTensor."""
    dtype = BY_NAME.get(name.removeprefix("torch."))
    if dtype is None:
        raise BadTensor(f"dtype {name!r} cannot be sent; use one of {', '.join(BY_NAME)}")
    return dtype


def check_tensor(meta: TensorMeta, nbytes: int, limit: int = MAX_TENSOR_BYTES) -> None:
    """Raise BadTensor unless `meta` describes exactly `nbytes` bytes and no more than `limit`."""
    declared = meta.nbytes
    if declared > limit:
        raise BadTensor(f"tensor {list(meta.shape)} of {meta.dtype.name.lower()} is {declared} bytes, limit {limit}")
    if declared != nbytes:
        raise BadTensor(
            f"tensor {list(meta.shape)} of {meta.dtype.name.lower()} needs {declared} bytes, {nbytes} were sent"
        )


def check_kv_pair(k: TensorMeta, v: TensorMeta) -> None:
    """Raise BadTensor unless K and V are `[seq_len, num_kv_heads, head_dim]` of one dtype, length and head count.

    `head_dim` may differ between K and V (as in multi-head latent attention); `seq_len` may be 0, the others not.
    """
    for name, meta in (("k", k), ("v", v)):
        if len(meta.shape) != 3:
            raise BadTensor(f"{name} must be [seq_len, num_kv_heads, head_dim], not {list(meta.shape)}")
        if 0 in meta.shape[1:]:
            raise BadTensor(f"{name} has a zero in {list(meta.shape)}; only seq_len may be 0")
    if k.dtype is not v.dtype:
        raise BadTensor(f"k is {k.dtype.name.lower()} and v is {v.dtype.name.lower()}; they must be the same")
    if k.shape[:2] != v.shape[:2]:
        raise BadTensor(f"k {list(k.shape)} and v {list(v.shape)} differ in seq_len or num_kv_heads")
