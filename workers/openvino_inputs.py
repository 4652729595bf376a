"""A step's inputs as OpenVINO takes them, in memory that is kept from step to step.

What a decode gives is the same few numbers in the same lengths every time, so tensors are made anew only when a
length changes, and are otherwise written in place, from plain lists: a step's Python runs with cold caches, after a
pass over all weights, and costs ten times what it would in a loop. Shapes and dtypes are listed in
`workers.openvino_export` and `workers.openvino_graph`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workers.batch import wanted_rows
from workers.openvino_api import ov

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workers.batch import Batch

_WIDE = frozenset({"input_ids", "position_ids", "wanted"})
"""Those of int64; the others are int32."""
_LENGTH = "max_context_len"


class StepInputs:
    """The input tensors of one infer request, but for its caches."""

    def __init__(self, request: ov.InferRequest, block_size: int) -> None:
        self._request = request
        self._block_size = block_size
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._longest = self._bind(_LENGTH, ())

    def write(self, batch: Batch) -> int:
        """Set them to a step that `check_batch` has passed; returns how many rows of logits are wanted."""
        lengths = [len(piece.token_ids) for piece in batch]
        stops = [piece.start + length for piece, length in zip(batch, lengths, strict=True)]
        used = [-(-stop // self._block_size) for stop in stops]
        ends = list(_running(lengths))
        self._put("input_ids", [token for piece in batch for token in piece.token_ids])
        self._put(
            "position_ids", [at for piece, stop in zip(batch, stops, strict=True) for at in range(piece.start, stop)]
        )
        wanted = wanted_rows(batch)
        # Rows to project are never none: OpenVINO's kernels are for matrices that have some.
        self._put("wanted", wanted or [0])
        self._put("past_lens", [piece.start for piece in batch])
        self._put("subsequence_begins", ends)
        self._put("block_indices", _leading(batch, used))
        self._put("block_indices_begins", list(_running(used)))
        self._longest[...] = max(stops)
        return len(wanted)

    def _put(self, name: str, values: Sequence[int]) -> None:
        array = self._arrays.get(name)
        if array is None or len(array) != len(values):
            array = self._arrays[name] = self._bind(name, (len(values),))
        array[:] = values

    def _bind(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Memory that the request reads this input from."""
        array = np.zeros(shape, np.int64 if name in _WIDE else np.int32)
        self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        return array


def _running(lengths: Sequence[int]) -> Iterator[int]:
    """Where each of the parts begins, and where the last one ends."""
    end = 0
    yield end
    for length in lengths:
        end += length
        yield end


def _leading(batch: Batch, used: Sequence[int]) -> list[int]:
    """Of every slice the blocks that it has or writes tokens in, end to end."""
    blocks: list[int] = []
    for piece, num_blocks in zip(batch, used, strict=True):
        blocks += piece.block_table[:num_blocks]
    return blocks
