"""KV in safetensors files: tensors `layer.N.k` and `layer.N.v`, each [seq_len, num_kv_heads, head_dim].

numpy has no bfloat16 and no float8; only files and sequences of those load torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError, safe_open

from bus.errors import BadArgument

if TYPE_CHECKING:
    from kvcache.client.arrays import Array, KVPair

T = TypeVar("T")

_NAME = re.compile(r"layer\.(0|[1-9]\d{0,5})\.([kv])", re.ASCII)
_NOT_IN_NUMPY = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
_NUMPY_CODES = {"F32", "F16", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}


def read_layers(path: Path, only: int | None = None) -> dict[int, tuple[Array, Array]]:
    """K and V of each layer in the file, or of one, in the order of the layers. Raises BadArgument."""
    try:
        with safe_open(path, framework="np") as file:
            layers = _layers_in(path, list(file.keys()))
            codes = {file.get_slice(f"layer.{layer}.{kind}").get_dtype() for layer in layers for kind in "kv"}
        if only is not None and only not in layers:
            raise BadArgument(f"{path} has no layer {only}, but {', '.join(map(str, layers))}")
        with safe_open(path, framework="np" if codes <= _NUMPY_CODES else "pt") as file:
            wanted = layers if only is None else [only]
            return {it: (file.get_tensor(f"layer.{it}.k"), file.get_tensor(f"layer.{it}.v")) for it in wanted}
    except FileNotFoundError:
        raise BadArgument(f"there is no file {path}") from None
    except (OSError, SafetensorError) as error:
        raise BadArgument(f"{path} cannot be read as safetensors: {error}") from error


def write_layers(path: Path, pairs: Mapping[int, KVPair]) -> None:
    """Write K and V of each layer, bit for bit. Raises BadArgument if there can be no such file."""
    if path.exists() and not path.is_file():  # safetensors puts a file in the place of whatever is there, devices too
        raise BadArgument(f"cannot write {path}: it is there, and no file")
    # Imported here: torch takes a second that most sequences need not wait for, numpy what `kvcache --help` need not.
    try:
        if any(pair.dtype in _NOT_IN_NUMPY for pair in pairs.values()):
            from safetensors.torch import save_file as save_torch

            save_torch(_by_name({layer: pair.torch() for layer, pair in pairs.items()}), path)
        else:
            from safetensors.numpy import save_file as save_numpy

            save_numpy(_by_name({layer: (pair.k, pair.v) for layer, pair in pairs.items()}), path)
    except (OSError, SafetensorError) as error:
        raise BadArgument(f"cannot write {path}: {error}") from error


def _by_name(layers: Mapping[int, tuple[T, T]]) -> dict[str, T]:
    return {f"layer.{layer}.{kind}": it for layer, pair in layers.items() for kind, it in zip("kv", pair, strict=True)}


def _layers_in(path: Path, names: list[str]) -> list[int]:
    """The layers of a file that holds these tensors, in order. Raises BadArgument for any but K and V in pairs."""
    kinds: dict[int, set[str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise BadArgument(f"{path} holds a tensor {name!r}; expected only layer.N.k and layer.N.v")
        kinds.setdefault(int(match[1]), set()).add(match[2])
    for layer, found in kinds.items():
        if len(found) < 2:
            raise BadArgument(f"{path} holds layer.{layer}.{found.pop()} alone; each layer needs both k and v")
    if not kinds:
        raise BadArgument(f"{path} is empty; expected layer.N.k and layer.N.v")
    return sorted(kinds)
