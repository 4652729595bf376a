"""Check that a safetensors file is what it says, before any library maps it. No torch, nothing allocated on its word.

The format (huggingface/safetensors, "Format"): 8 bytes little-endian header length, that many bytes of
JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors' bytes without holes.
Everything in the header is untrusted: lengths are compared with the file's size first, counts and
offsets with each other, and only then is a tensor said to exist.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus.errors import ModelUnavailable

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own cap."""
LENGTH_BYTES = 8
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as its header describes it; `begin` and `end` are byte offsets into the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, all checked. Raises ModelUnavailable saying which rule the file breaks."""
    try:
        text, data_bytes = _header_text(path)
        fields = json.loads(text, object_pairs_hook=_no_twins)
        if not isinstance(fields, dict):
            raise ValueError(f"its header is a {type(fields).__name__}, not an object")
        fields.pop("__metadata__", None)
        entries = {name: _entry(name, field) for name, field in fields.items()}
        _check_layout(entries, data_bytes)
    except (OSError, ValueError, RecursionError) as error:
        reason = "its header is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ModelUnavailable(f"{path.name} is not a valid safetensors file: {reason}") from error
    return entries


def _header_text(path: Path) -> tuple[bytes, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise ValueError(f"it has {size} bytes, too few for a header length")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(
                f"its header claims {length} bytes; the file has {size} and the limit is {MAX_HEADER_BYTES}"
            )
        return file.read(length), size - LENGTH_BYTES - length


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return fields


def _entry(name: str, field: object) -> TensorEntry:
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r:.80} and offsets {offsets!r:.80}")
    entry = TensorEntry(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])
    if entry.num_elements * BITS[dtype] != (entry.end - entry.begin) * 8:
        raise ValueError(f"tensor {name!r} is {dtype} {shape!r:.80} but spans {entry.end - entry.begin} bytes")
    return entry


def _are_sizes(value: object) -> bool:
    """A list of non-negative 64-bit ints; JSON's true and 1.0 are none."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(entries: dict[str, TensorEntry], data_bytes: int) -> None:
    """Tensors follow one another from 0 to the end of the file: no hole, no overlap, nothing cut off."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"tensor {name!r} begins at {entry.begin}, where {position} is due (a hole or an overlap)")
        position = entry.end
    if position != data_bytes:
        raise ValueError(f"its tensors span {position} bytes and it holds {data_bytes} (cut off or padded)")
