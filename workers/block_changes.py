"""What becomes of the findable blocks of one pool, in order, for whoever follows it from outside. Core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvcache.hashing import BlockHash, HashSeed


@dataclass(frozen=True, slots=True)
class BlockAdded:
    """A full block can be found from now on. parent: of the block before it; None for the first of a prefix.

    tokens: its own, encoded (`hashing.encode_token_ids`).
    """

    digest: BlockHash
    parent: BlockHash | None
    tokens: bytes
    seed: HashSeed


@dataclass(frozen=True, slots=True)
class BlockDropped:
    digest: BlockHash


@dataclass(frozen=True, slots=True)
class AllDropped:
    """No block can be found any more."""


BlockChange: TypeAlias = BlockAdded | BlockDropped | AllDropped
