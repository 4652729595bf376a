"""What the loop and the engine say to each other about blocks that travel between workers.

The engine owns the blocks, the loop talks to the other worker. Each copy has a name: on the side that gives, a
`LoanId` of the loop's making; on the side that takes, the generation it is for. Every `Lend` that was answered with
`Lent` is followed by a `Return`, every `Wanted` by an `EndPull`, whatever happened in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from bus.errors import KVCacheError
from bus.messages import PullOrder
from kvcache.hashing import BlockHash, HashSeed
from workers.keys import RunId
from workers.loans import LoanId

# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lend:
    """Hold the leading run of these tokens' blocks, if it goes beyond block `start`. Answered: `Lent`, `CopyBroke`.

    fingerprint, dtype, layout_version, block_size: of the model that asks. digest: of the last block, as it says.
    tokens: `<u4`, whole blocks. tenant: by the broker's word.
    """

    loan: LoanId
    tenant: str
    fingerprint: str
    dtype: str
    layout_version: int
    block_size: int
    cache_salt: str
    tokens: bytes
    start: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Copy blocks `first .. stop` of a loan out. Answered with `BlocksRead` or `CopyBroke`."""

    loan: LoanId
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Return:
    """The loan is not needed any more. Not answered; nothing if there is none."""

    loan: LoanId


@dataclass(frozen=True, slots=True)
class Fill:
    """The next blocks that a generation wanted, whole ones. Answered with `Filled` or `CopyBroke`."""

    run: RunId
    data: bytearray


@dataclass(frozen=True, slots=True)
class EndPull:
    """No more blocks come for this generation: it may be admitted, and computes what it lacks."""

    run: RunId


CopyCommand: TypeAlias = Lend | ReadBlocks | Return | Fill | EndPull


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lent:
    """The run is held: `num_blocks` from the first on, the last of them called `digest`."""

    loan: LoanId
    num_blocks: int
    digest: BlockHash
    block_bytes: int


@dataclass(frozen=True, slots=True)
class BlocksRead:
    """The bytes of blocks, one after the other."""

    loan: LoanId
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A generation that was ordered to pull lacks blocks `start .. len(digests)`, and waits until `EndPull`.

    tokens: `<u4`, of all blocks from the first on. deadline: of the generation, monotonic seconds.
    """

    run: RunId
    order: PullOrder
    seed: HashSeed
    tokens: bytes
    digests: tuple[BlockHash, ...]
    start: int
    block_bytes: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Filled:
    """The generation's leading run, of blocks that can be found, is this long now."""

    run: RunId
    num_blocks: int


@dataclass(frozen=True, slots=True)
class CopyBroke:
    """A command about this copy failed; it is not worth going on with."""

    copy: LoanId | RunId
    error: KVCacheError


CopyEvent: TypeAlias = Lent | BlocksRead | Wanted | Filled | CopyBroke
