"""One stream's pieces as JSON. Core.

Nearly all chunks of a stream differ in their text alone, so what stands before and after the text is encoded once for
each output; a chunk is then three strings joined. What has more in it is encoded whole, by the same `Shape`.
"""

from __future__ import annotations

import msgspec
from msgspec import UnsetType

from kvcache.gateway.replies import Piece, Texts, Usage
from kvcache.gateway.shapes import Head, Shape

_encode = msgspec.json.Encoder().encode

MARK = "\ue000text\ue000"
"""Stands for the text in a chunk that is cut in two; of a private area, and looked for."""


class Chunks:
    """has_plain: whether chunks that have text alone look alike but for it: no logprobs, no usage in each."""

    def __init__(self, shape: Shape, *, has_plain: bool) -> None:
        self._shape = shape
        self._has_plain = has_plain
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def encode(self, head: Head, piece: Piece, usage: Usage | UnsetType | None, texts: Texts | None) -> bytes | None:
        """The chunk as JSON, or None if it shows nothing. `head` is the same for all chunks of an output."""
        if self._has_plain and piece.text and not piece.is_start and piece.finish_reason is None:
            around = self._around.get(piece.number) or self._cut(head, piece.number, usage)
            if around is not None:
                before, after = around
                return before + _encode(piece.text) + after
        chunk = self._shape.chunk(head, piece, usage, texts)
        return None if chunk is None else _encode(chunk)

    def _cut(self, head: Head, number: int, usage: Usage | UnsetType | None) -> tuple[bytes, bytes] | None:
        """What stands around an output's text; None if that cannot be told, because a name holds the mark itself."""
        parts = _encode(self._shape.chunk(head, Piece(number, text=MARK), usage, None)).split(_encode(MARK))
        if len(parts) != 2:
            return None
        before, after = parts
        self._around[number] = before, after
        return before, after
