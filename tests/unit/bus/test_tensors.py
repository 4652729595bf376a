"""Tensors on the bus: nothing to lie about but the length, and that is checked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadTensor
from bus.tensors import BY_NAME, ITEMSIZE, MAX_DIMS, DType, TensorMeta, check_kv_pair, check_tensor, dtype_by_name

SHAPES = st.lists(st.integers(0, 2**31 - 1), max_size=MAX_DIMS).map(tuple)
F32 = DType.FLOAT32


@given(st.sampled_from(DType), SHAPES)
def test_the_declared_length_never_overflows(dtype: DType, shape: tuple[int, ...]) -> None:
    assert TensorMeta(dtype, shape).nbytes == math.prod(shape) * ITEMSIZE[dtype]


def test_every_dtype_has_a_size_and_keeps_its_number() -> None:
    assert set(ITEMSIZE) == set(DType)
    assert {dtype.name: int(dtype) for dtype in DType} == {
        **{"FLOAT32": 1, "FLOAT16": 2, "BFLOAT16": 3, "FLOAT64": 4, "INT8": 5, "INT16": 6, "INT32": 7, "INT64": 8},
        **{"UINT8": 9, "UINT16": 10, "UINT32": 11, "UINT64": 12, "BOOL": 13, "FLOAT8_E4M3FN": 14, "FLOAT8_E5M2": 15},
    }


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in {"bfloat16"} and "float8" not in name])
def test_sizes_are_numpys_where_numpy_has_the_dtype(name: str) -> None:
    assert ITEMSIZE[dtype_by_name(name)] == np.dtype(name).itemsize


def test_a_dtype_is_found_by_either_librarys_name() -> None:
    assert dtype_by_name("torch.bfloat16") is dtype_by_name("bfloat16") is DType.BFLOAT16


@pytest.mark.parametrize("name", ["object", "complex64", "float128", "", "FLOAT32", ">f4", "torch."])
def test_other_dtypes_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(BadTensor, match="use one of float32, float16"):
        dtype_by_name(name)


@given(st.sampled_from(DType), st.lists(st.integers(0, 40), max_size=3).map(tuple), st.integers(-3, 3))
def test_a_length_is_right_only_to_the_byte(dtype: DType, shape: tuple[int, ...], off_by: int) -> None:
    meta = TensorMeta(dtype, shape)
    if off_by == 0:
        check_tensor(meta, meta.nbytes)
    else:
        with pytest.raises(BadTensor, match="were sent"):
            check_tensor(meta, meta.nbytes + off_by)


def test_a_dtype_that_lies_about_its_bytes_is_refused() -> None:
    with pytest.raises(BadTensor, match=r"float16 needs 16 bytes, 32 were sent"):
        check_tensor(TensorMeta(DType.FLOAT16, (8,)), 32)


def test_a_shape_whose_product_is_beyond_any_memory_is_refused_by_its_limit() -> None:
    with pytest.raises(BadTensor, match="limit 1024"):
        check_tensor(TensorMeta(F32, (2**31 - 1,) * 8), 0, limit=1024)


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        ((4, 2, 8), (4, 2, 8), None),
        ((4, 2, 8), (4, 2, 16), None),
        ((0, 2, 8), (0, 2, 8), None),
        ((), (), "must be"),
        ((4, 2), (4, 2, 8), "k must be"),
        ((4, 2, 8), (1, 4, 2, 8), "v must be"),
        ((4, 0, 8), (4, 0, 8), "zero"),
        ((4, 2, 0), (4, 2, 8), "zero"),
        ((4, 2, 8), (5, 2, 8), "differ"),
        ((4, 2, 8), (4, 1, 8), "differ"),
    ],
)
def test_k_and_v_agree_in_all_but_the_head_dim(k: tuple[int, ...], v: tuple[int, ...], words: str | None) -> None:
    metas = TensorMeta(F32, k), TensorMeta(F32, v)
    if words is None:
        check_kv_pair(*metas)
    else:
        with pytest.raises(BadTensor, match=words):
            check_kv_pair(*metas)


def test_k_and_v_are_of_one_dtype() -> None:
    with pytest.raises(BadTensor, match="must be the same"):
        check_kv_pair(TensorMeta(F32, (1, 1, 1)), TensorMeta(DType.INT32, (1, 1, 1)))
