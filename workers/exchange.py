"""The engine's side of blocks that travel: lends runs of them, copies them out and in, and knows who waits for some.

Runs in the engine's thread, between steps. Copying is work that running sequences would have to wait for, so it is
done in errands, and before each step only until `COPY_S` is used up; what is left waits for the next one. No
torch here, and no sockets: bytes go to the loop and come from it.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from bus.errors import Cancelled, Conflict, InternalError, KVCacheError, NotFound
from kvcache.hashing import TOKEN_BYTES, BlockHash, HashSeed, block_digests, encode_token_ids
from workers.copy_api import (
    BlocksRead,
    CopyBroke,
    CopyCommand,
    CopyEvent,
    EndPull,
    Fill,
    Filled,
    Lend,
    Lent,
    ReadBlocks,
    Return,
    Wanted,
)
from workers.engine_api import Start
from workers.keys import RunId
from workers.loans import LoanId
from workers.slot import Slot

log = logging.getLogger(__name__)

COPY_S = 0.008
"""What a step may be delayed by; one errand more than that may have begun, and takes 1 to 2 ms (measured, 4 MiB)."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A generation that waits for blocks from another worker, and what it is called in its slot's loans."""

    slot: Slot
    start: Start
    prompt: tuple[int, ...]
    seed: HashSeed
    digests: tuple[BlockHash, ...]
    tokens: bytes


Errand: TypeAlias = Lend | ReadBlocks | Fill | EndPull


class Exchange:
    """Copies of all models of a worker. `slots`: those that are loaded."""

    def __init__(self, slots: Callable[[], list[Slot]]) -> None:
        self._slots = slots
        self._lent: dict[LoanId, Slot] = {}
        self._waiting: dict[RunId, Waiting] = {}
        self._errands: deque[Errand] = deque()
        self._released: list[Waiting] = []

    @property
    def is_busy(self) -> bool:
        """Whether errands are left."""
        return bool(self._errands)

    def want(self, slot: Slot, start: Start, prompt: tuple[int, ...]) -> Wanted | None:
        """Have a generation that was ordered to pull wait for its blocks; None if there is nothing to wait for.

        At least its last token is left to compute, as with any prefix; of one whose tokens are to be scored, all.
        """
        if start.pull is None or not slot.shares_prefixes or start.sampling.prompt_logprobs is not None:
            return None
        token_ids = (*prompt, *start.resume)
        size = slot.model.facts.block_size
        num_blocks = min(len(token_ids) - 1, start.pull.num_tokens) // size
        try:
            seed = slot.seed(start.tenant, start.cache_salt)
        except KVCacheError:  # its own fault, which it will hear of when it is submitted
            return None
        digests = block_digests(seed, token_ids[: num_blocks * size])
        tokens = encode_token_ids(token_ids[: num_blocks * size])
        held = slot.loans.open(LoanId(start.run), digests, tokens)
        if held == num_blocks:
            slot.loans.end(LoanId(start.run))
            return None
        self._waiting[start.run] = Waiting(slot, start, prompt, seed, digests, tokens)
        return Wanted(
            run=start.run,
            order=start.pull,
            seed=seed,
            tokens=tokens,
            digests=digests,
            start=held,
            block_bytes=slot.model.facts.block_bytes,
            deadline=start.deadline,
        )

    def leave(self, run: RunId) -> Waiting | None:
        """The generation waits no more; None if it did not. Blocks that came stay findable."""
        waiting = self._waiting.pop(run, None)
        if waiting is not None:
            waiting.slot.loans.end(LoanId(run))
        return waiting

    def handle(self, command: CopyCommand) -> None:
        """Take an errand on, or a loan back."""
        if not isinstance(command, Return):
            self._errands.append(command)
        elif (slot := self._lent.pop(command.loan, None)) is not None:
            slot.loans.end(command.loan)

    def work(self, clock: Callable[[], float]) -> list[CopyEvent]:
        """Do errands in the order in which they came, for as long as a step may be delayed."""
        events: list[CopyEvent] = []
        now = clock()
        until = now + COPY_S
        while self._errands and now < until:
            errand = self._errands.popleft()
            if not isinstance(errand, EndPull):
                events.append(self._run(errand, now))
            elif (waiting := self.leave(errand.run)) is not None:
                self._released.append(waiting)
            now = clock()
        return events

    def take_released(self) -> list[Waiting]:
        """Generations whose wait has ended since the last call: what came is a prefix like any other."""
        released, self._released = self._released, []
        return released

    # --- errands ---

    def _run(self, errand: Lend | ReadBlocks | Fill, now: float) -> CopyEvent:
        name = errand.run if isinstance(errand, Fill) else errand.loan
        try:
            match errand:
                case Lend():
                    return self._lend(errand)
                case ReadBlocks():
                    return self._read(errand)
                case Fill():
                    return self._fill(errand, now)
                case _:
                    assert_never(errand)
        except KVCacheError as error:
            return CopyBroke(name, error)
        except Exception:  # a copy harms only itself
            log.exception("copying blocks failed")
            return CopyBroke(name, InternalError("blocks could not be copied; the worker's log has the traceback"))

    def _lend(self, lend: Lend) -> Lent:
        slot = next((slot for slot in self._slots() if slot.model.facts.fingerprint == lend.fingerprint), None)
        if slot is None or not slot.shares_prefixes:
            raise NotFound("this worker shares no blocks of that model")
        facts, seed = slot.model.facts, slot.seed(lend.tenant, lend.cache_salt)
        theirs = (lend.dtype, lend.block_size, lend.layout_version)
        ours = (seed.dtype, facts.block_size, seed.layout_version)
        if theirs != ours:
            raise Conflict(f"blocks of (dtype, block size, layout) {ours} are here, {theirs} were asked for")
        digests = block_digests(seed, struct.unpack(f"<{len(lend.tokens) // TOKEN_BYTES}I", lend.tokens))
        if not digests or digests[-1] != lend.digest:
            raise Conflict("these tokens have other digests here: the two workers do not name blocks alike")
        num_blocks = slot.loans.open(lend.loan, digests, lend.tokens)
        if num_blocks <= lend.start:
            slot.loans.end(lend.loan)
            raise NotFound(f"only {num_blocks} leading blocks are here, {lend.start} are there already")
        self._lent[lend.loan] = slot
        return Lent(lend.loan, num_blocks, digests[num_blocks - 1], facts.block_bytes)

    def _read(self, read: ReadBlocks) -> BlocksRead:
        slot = self._lent.get(read.loan)
        if slot is None:
            raise NotFound("there is no such loan")
        blocks = slot.loans.blocks(read.loan)[read.first : read.stop]
        return BlocksRead(read.loan, slot.model.read_blocks(blocks))

    def _fill(self, fill: Fill, now: float) -> Filled:
        waiting = self._waiting.get(fill.run)
        if waiting is None:
            raise Cancelled("the generation that wanted these blocks is over")
        slot, facts = waiting.slot, waiting.slot.model.facts
        first = len(slot.loans.blocks(LoanId(fill.run)))
        stop = min(first + len(fill.data) // facts.block_bytes, len(waiting.digests))
        step = facts.block_size * TOKEN_BYTES
        tokens = [waiting.tokens[at * step : (at + 1) * step] for at in range(first, stop)]
        digests = waiting.digests[first:stop]
        return Filled(fill.run, slot.fill(LoanId(fill.run), digests, tokens, waiting.seed, fill.data, now))
