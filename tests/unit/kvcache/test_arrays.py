"""Tensors in and out, bit for bit (rows 9 to 15 of the fault catalogue, on the client's side)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from bus.errors import BadTensor
from bus.tensors import MAX_TENSOR_BYTES, DType, TensorMeta
from kvcache.client.arrays import KVPair, Tensor, kv_pair, kv_tensors

NUMPY = [dtype for dtype in DType if dtype.name not in {"BFLOAT16", "FLOAT8_E4M3FN", "FLOAT8_E5M2"}]


def there_and_back(k: Any, v: Any) -> KVPair:
    sent = kv_tensors(k, v, MAX_TENSOR_BYTES)
    return kv_pair(sent[0].meta, sent[1].meta, bytes(sent[0].data), bytes(sent[1].data))


@given(
    st.sampled_from(NUMPY).flatmap(
        lambda dtype: hnp.arrays(
            np.dtype(dtype.name.lower()),
            hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=4),
            elements={"allow_subnormal": True} if "FLOAT" in dtype.name else None,
        )
    )
)
def test_every_numpy_dtype_comes_back_bit_for_bit(k: NDArray[Any]) -> None:
    pair = there_and_back(k, k[..., ::-1])
    assert pair.k.tobytes() == k.tobytes()
    assert pair.v.tobytes() == np.ascontiguousarray(k[..., ::-1]).tobytes()
    assert (pair.k.dtype, pair.k.shape, pair.dtype) == (k.dtype, k.shape, k.dtype.name)
    assert pair.is_numpy


def test_nan_and_negative_zero_keep_their_bits() -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 1], np.uint32).view(np.float32).reshape(4, 1, 1)
    assert there_and_back(bits, bits).k.tobytes() == bits.tobytes()


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[::2],
        lambda array: array[:, ::-1],
        lambda array: array.transpose(2, 1, 0),
        lambda array: np.asfortranarray(array),
        lambda array: np.broadcast_to(array[:1], array.shape),
        lambda array: array.astype(">f4"),
    ],
    ids=["strided", "reversed", "transposed", "fortran", "broadcast", "big endian"],
)
def test_what_is_not_plain_is_copied(view: Any) -> None:
    array = view(np.arange(24, dtype=np.float32).reshape(4, 3, 2))
    pair = there_and_back(array, array)
    assert np.array_equal(pair.k, array)
    assert pair.k.dtype == np.dtype("<f4")


def test_what_is_plain_is_not_copied() -> None:
    array = np.zeros((4, 3, 2), np.float32)
    sent: Tensor = kv_tensors(array, array, MAX_TENSOR_BYTES)[0]
    assert sent.data.readonly
    array[0, 0, 0] = 1
    assert sent.data[3] == 0x3F


def test_a_layer_of_no_tokens_is_allowed() -> None:
    empty = np.zeros((0, 2, 4), np.float16)
    assert there_and_back(empty, empty).k.shape == (0, 2, 4)


def test_results_are_read_only() -> None:
    pair = there_and_back(np.zeros((1, 1, 1)), np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match="read-only"):
        pair.k[0] = 1
    writable = kv_pair(
        TensorMeta(DType.UINT8, (1, 1, 1)), TensorMeta(DType.UINT8, (1, 1, 1)), *[memoryview(bytearray(1))] * 2
    )
    assert not writable.k.flags.writeable


OK = np.zeros((2, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        (OK[0], OK[0], "must be"),
        (np.float32(1), OK, "numpy array or a torch tensor"),
        (np.zeros((), np.float32), OK, "must be"),
        ([[[1.0]]], OK, "not list"),
        (None, OK, "k must be"),
        (OK, OK.astype(np.float64), "same"),
        (OK, OK[:1], "differ"),
        (OK[:, :1], OK, "differ"),
        (OK[:, :, :0], OK[:, :, :0], "zero"),
        (OK.astype(object), OK, "'object' cannot be sent"),
        (OK.astype(np.complex64), OK, "'complex64' cannot be sent"),
        (OK.astype("S4"), OK, "cannot be sent"),
        (np.zeros((2, 2, 2), "M8[s]"), OK, "cannot be sent"),
        (OK.astype([("a", "f4")]), OK, "cannot be sent"),
        (np.ma.masked_equal(OK, 0), OK, "fill it first"),
    ],
)
def test_a_bad_tensor_is_refused_before_anything_is_sent(k: Any, v: Any, words: str) -> None:
    with pytest.raises(BadTensor, match=words):
        kv_tensors(k, v, MAX_TENSOR_BYTES)


def test_more_than_the_limit_is_refused() -> None:
    with pytest.raises(BadTensor, match="limit 16"):
        kv_tensors(OK, OK, 16)


def test_a_value_whose_length_does_not_agree_is_refused() -> None:
    meta = TensorMeta(DType.FLOAT32, (2, 1, 1))
    with pytest.raises(BadTensor, match="needs 8 bytes, 7 were sent"):
        kv_pair(meta, meta, bytes(8), bytes(7))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "int64", "bool"])
def test_torch_tensors_go_in_and_come_out_bit_for_bit(name: str) -> None:
    import torch

    k = torch.randint(0, 2, (3, 2, 4)).to(getattr(torch, name))
    pair = there_and_back(k.transpose(0, 2), k.transpose(0, 2))
    assert pair.dtype == name
    back, _ = pair.torch()
    assert back.dtype is k.dtype
    assert torch.equal(back.view(torch.uint8), k.transpose(0, 2).contiguous().view(torch.uint8))
    assert pair.is_numpy is (name in {"float32", "int64", "bool"})
    back.zero_()  # its own memory, to be written


def test_torch_tensors_that_need_gradients_or_hold_no_tokens_go_in() -> None:
    import torch

    k = torch.zeros(0, 2, 3, requires_grad=True)
    assert there_and_back(k, k).torch()[0].shape == (0, 2, 3)


def test_a_torch_tensor_that_only_says_it_is_negated_goes_in_negated() -> None:
    import torch

    k = torch.arange(24, dtype=torch.float32).reshape(4, 3, 2)
    negated = torch.complex(k, k).conj().imag
    assert negated.is_neg()
    assert torch.equal(there_and_back(negated, negated).torch()[0], -k)


def test_torch_tensors_without_plain_data_are_refused() -> None:
    import torch

    k = torch.ones(4, 3, 2)
    ragged = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)], layout=torch.jagged)
    for wrong in (k.to_sparse(), k.to("meta"), ragged, k.to(torch.complex64)):
        with pytest.raises(BadTensor):
            kv_tensors(wrong, wrong, MAX_TENSOR_BYTES)


def test_numpy_users_never_load_torch() -> None:
    code = (
        "import sys, numpy as np, kvcache, kvcache.client\n"
        "from kvcache.client.arrays import kv_tensors, kv_pair\n"
        "a = np.ones((1, 1, 1)); k, v = kv_tensors(a, a, 99); kv_pair(k.meta, v.meta, k.data, v.data)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=15)
