"""The half of a model that is about KV, for stand-ins that only say tokens."""

from __future__ import annotations

from collections.abc import Sequence

from workers.batch import BlockId
from workers.engine_api import ReadResult


class NoKV:
    """Copies do nothing, audits find no difference, and nobody may ask for what blocks contain."""

    def difference(self, one: BlockId, other: BlockId) -> float:
        return 0.0

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """There is no KV."""

    def read(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> ReadResult:
        raise NotImplementedError

    def read_blocks(self, blocks: Sequence[BlockId]) -> memoryview:
        raise NotImplementedError

    def write_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        raise NotImplementedError
