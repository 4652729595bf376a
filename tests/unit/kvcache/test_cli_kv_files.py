"""KV tensors in and out of safetensors files, bit for bit, and files that are refused."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from bus.errors import BadArgument
from kvcache.cli.kv_files import read_layers, write_layers
from kvcache.client.arrays import KVPair, kv_pair, kv_tensors

if TYPE_CHECKING:
    from kvcache.client.arrays import Array

NUMPY_DTYPES = ["float32", "float16", "float64", "int8", "int64", "uint16", "bool"]
TORCH_DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def through_the_bus(k: Array, v: Array) -> KVPair:
    one, two = kv_tensors(k, v, limit_bytes=1 << 20)
    return kv_pair(one.meta, two.meta, one.data, two.data)


def bits(array: Array) -> bytes:
    if isinstance(array, torch.Tensor):
        return array.view(torch.uint8).numpy().tobytes()
    return array.tobytes()


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_dtypes_come_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    k, v = (random.integers(0, 2, (5, 2, 4)).astype(dtype) for _ in range(2))
    path = tmp_path / "kv.safetensors"
    write_layers(path, {3: through_the_bus(k, v)})
    (back,) = read_layers(path).values()
    assert [bits(it) for it in back] == [bits(k), bits(v)]
    assert [str(it.dtype) for it in back] == [dtype, dtype]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_dtypes_that_numpy_lacks_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(2 * 40 * dtype.itemsize, dtype=torch.uint8).reshape(2, 5, 2, 4 * dtype.itemsize)
    k, v = (it.view(dtype) for it in raw)
    path = tmp_path / "kv.safetensors"
    write_layers(path, {0: through_the_bus(k, v)})
    back_k, back_v = read_layers(path)[0]
    assert back_k.dtype == back_v.dtype == dtype
    assert [bits(back_k), bits(back_v)] == [bits(k), bits(v)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_for_which_there_is_no_room_is_named(dtype: str, tmp_path: Path) -> None:
    pair = through_the_bus(*[torch.zeros(1, 1, 1, dtype=getattr(torch, dtype))] * 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # as on a full disk, all but the words
    try:
        with pytest.raises(BadArgument, match=r"cannot write .*kv\.safetensors: "):
            write_layers(tmp_path / "kv.safetensors", {0: pair})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_layers_come_in_numeric_order_and_one_can_be_picked(tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    one = np.zeros((1, 1, 1), np.float32)
    write_layers(path, {layer: through_the_bus(one + layer, one) for layer in (10, 2, 0)})
    assert list(read_layers(path)) == [0, 2, 10]
    assert read_layers(path, only=10)[10][0].item() == 10.0
    with pytest.raises(BadArgument, match="no layer 3, but 0, 2, 10"):
        read_layers(path, only=3)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["layer.0.k", "layer.0.v", "weight"], "'weight'; expected only"),
        (["layer.0.k"], r"layer\.0\.k alone"),
        (["layer.0.k", "layer.1.v"], "alone"),
        (["layer.-1.k", "layer.-1.v"], "expected only"),
        (["layer.01.k", "layer.01.v"], "expected only"),
        (["layer.٣.k", "layer.٣.v"], "expected only"),
        ([], "empty"),
    ],
)
def test_file_with_other_tensors_is_refused(names: list[str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    save_numpy({name: np.zeros((1, 1, 1), np.float32) for name in names}, path)
    with pytest.raises(BadArgument, match=complaint):
        read_layers(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}"])
def test_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadArgument, match="cannot be read as safetensors"):
        read_layers(path)


def test_missing_file_and_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="there is no file"):
        read_layers(tmp_path / "none.safetensors")
    one = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(BadArgument, match="cannot write"):
        write_layers(tmp_path / "none" / "kv.safetensors", {0: through_the_bus(one, one)})


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    one = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(BadArgument, match="it is there, and no file"):
        write_layers(pipe, {0: through_the_bus(one, one)})
    assert pipe.is_fifo()


def test_truncated_bfloat16_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    save_torch({f"layer.0.{kind}": torch.zeros(4, 1, 8, dtype=torch.bfloat16) for kind in "kv"}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadArgument, match="cannot be read as safetensors"):
        read_layers(path)
