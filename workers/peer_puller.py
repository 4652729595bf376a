"""Blocks that this worker copies from others, for generations that were told to: asked for, checked, handed on.

    ASKED      the holder was asked for the run of digests that this worker made itself from the tokens
    RECEIVING  chunks come, in order and as many as credit was given for; whole blocks go to the engine

A pull may only ever save time. Whatever goes wrong ends it, and the generation computes what has not come: a
refusal, another layout, bytes that do not match their checksum, silence, no room, or its budget used up. Blocks
that were complete by then stay, so a pull that is cut short is not in vain.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bus import wire
from bus.errors import (
    BadTensor,
    ConnectionLost,
    Corrupt,
    DeadlineExceeded,
    KVCacheError,
    MalformedMessage,
    Overloaded,
    error_from_wire,
)
from bus.limits import CHUNK_BYTES
from bus.messages import BlocksFound, Cancel, Chunk, Credit, Failed, Message, PullBlocks
from bus.stats import PeerStats
from bus.wire import Buffer, Frames
from workers.calls import Action, HangUp, Tell, ToPeer
from workers.copy_api import CopyBroke, EndPull, Fill, Filled, Wanted
from workers.keys import RunId

MAX_PULLS = 4
WINDOW = 16  # chunks that may be under way or not yet in the pool, for each pull
GRANT_CHUNKS = 4
PATIENCE_S = 1.0
PATIENCE_S_PER_TOKEN = 1e-3  # the least that a pull must be worth: computing takes about as long on two slow cores
SILENCE_S = 1.0  # nothing came: longer than a step takes that the holder's engine may be in
IDLE_LINK_S = 30.0
MAX_LINKS = 64  # sources that a rate is kept of
SMOOTHING = 0.3  # of the newest rate, in an exponentially weighted mean


@dataclass(slots=True, eq=False)
class Pull:
    """One pull. num_blocks: where the holder's run ends; 0 until it has said so. granted, came: chunks.

    parts: bytes that came and are not with the engine yet, less than a block. filling: bytes that the engine has not
    written yet. filled: where our own run ends, by the engine's word.
    """

    wanted: Wanted
    req_id: bytes
    window: int
    began_at: float
    until: float
    moved_at: float
    num_blocks: int = 0
    filled: int = 0
    granted: int = 0
    came: int = 0
    came_bytes: int = 0
    parts: deque[memoryview] = field(default_factory=deque)
    waiting_bytes: int = 0
    filling: int = 0

    @property
    def url(self) -> str:
        return self.wanted.order.url

    @property
    def total_bytes(self) -> int:
        return (self.num_blocks - self.wanted.start) * self.wanted.block_bytes

    def take(self, nbytes: int) -> bytearray:
        """The next bytes that came, in one piece."""
        data = bytearray()
        while len(data) < nbytes:
            part = self.parts.popleft()
            room = nbytes - len(data)
            data += part[:room]
            if part.nbytes > room:
                self.parts.appendleft(part[room:])
        self.waiting_bytes -= nbytes
        return data


class Puller:
    """All pulls of one worker. is_used(url): whether something else is on its way over that connection."""

    def __init__(self, worker_id: str, is_used: Callable[[str], bool] = lambda url: False) -> None:
        self._worker_id = worker_id
        self._is_used = is_used
        self._pulls: dict[bytes, Pull] = {}
        self._by_run: dict[RunId, Pull] = {}
        self._links: dict[str, float] = {}  # by address: when it was last of use
        self._numbers = itertools.count(1)
        self._num_done = 0
        self._tokens = 0
        self._whole_tokens = 0
        self._bytes = 0
        self._seconds = 0.0
        self._failures: Counter[str] = Counter()
        self._rate = 0.0
        self._rates: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    def stats(self) -> PeerStats:
        """What was pulled; a holder's figures are not ours."""
        return PeerStats(
            pulls=self._num_done,
            failures=dict(self._failures),
            whole_tokens=self._whole_tokens,
            pulled_tokens=self._tokens,
            pulled_bytes=self._bytes,
            pulled_s=round(self._seconds, 6),
            bytes_per_s=round(self._rate),
            links={worker: round(rate) for worker, rate in self._rates.items()},
        )

    def use(self, url: str, now: float) -> None:
        """The connection to this address is of use, also to others than us."""
        self._links[url] = now

    # --- what the engine says ---

    def begin(self, wanted: Wanted, now: float) -> list[Action]:
        """Ask the holder. What cannot be begun ends at once."""
        order = wanted.order
        num_tokens = (len(wanted.digests) - wanted.start) * wanted.seed.block_size
        patience_s = PATIENCE_S + PATIENCE_S_PER_TOKEN * num_tokens
        until = now + min(order.budget_ms / 1000, (wanted.deadline - now) / 2, patience_s)
        if until <= now:
            return self._refuse(wanted, DeadlineExceeded("there is no time left for a pull"))
        if len(self._pulls) >= MAX_PULLS:
            return self._refuse(wanted, Overloaded(f"{MAX_PULLS} pulls are under way"))
        window = max(WINDOW, 2 * -(-wanted.block_bytes // CHUNK_BYTES))
        pull = Pull(wanted, next(self._numbers).to_bytes(16, "big"), window, now, until, now)
        pull.filled = wanted.start
        pull.granted = window
        self._pulls[pull.req_id] = self._by_run[wanted.run] = pull
        self._links[pull.url] = now
        seed = wanted.seed
        request = PullBlocks(
            req_id=pull.req_id,
            ticket=order.ticket,
            worker_id=self._worker_id,
            fingerprint=seed.model,
            dtype=seed.dtype,
            layout_version=seed.layout_version,
            block_size=seed.block_size,
            cache_salt=seed.cache_salt,
            start=wanted.start,
            digest=wanted.digests[-1],
            credit=window,
            payload=wire.describe([wanted.tokens]),
        )
        return [_say(pull, request, wanted.tokens)]

    def on_engine(self, event: Filled | CopyBroke, now: float) -> list[Action]:
        pull = self._by_run.get(event.run if isinstance(event, Filled) else RunId(event.copy))
        if pull is None:  # it ended meanwhile
            return []
        if isinstance(event, CopyBroke):
            return self._fail(pull, event.error)
        pull.moved_at = now
        pull.filling -= (event.num_blocks - pull.filled) * pull.wanted.block_bytes
        pull.filled = event.num_blocks
        return self._finish(pull, now) if pull.filled >= pull.num_blocks else self._give_credit(pull)

    # --- what holders say ---

    def on_message(self, url: str, frames: Frames, now: float) -> list[Action]:
        """A message of the worker at this address, whatever its bytes."""
        pull = self._pulls.get(wire.request_id_of(frames[0])) if frames else None
        if pull is None or pull.url != url:  # of a pull that has ended
            return []
        pull.moved_at = now
        try:
            message, payload = wire.decode_intact(frames)
            match message:
                case BlocksFound():
                    return self._found(pull, message)
                case Chunk():
                    return self._take(pull, message, payload[0])
                case Failed():
                    error = error_from_wire(message.code, message.message)
                    return self._fail(pull, error, tells=False)
                case _:
                    raise MalformedMessage(f"{type(message).__name__} is not for a worker that copies")
        except KVCacheError as error:
            return self._fail(pull, error)

    def lose(self, url: str) -> list[Action]:
        """Nothing more can be sent to this address."""
        error = ConnectionLost(f"no connection to the worker at {url}")
        return [action for pull in self._of(url) for action in self._fail(pull, error, tells=False)]

    # --- what time brings ---

    def tick(self, now: float) -> list[Action]:
        """Pulls that take too long, and connections that nobody needs."""
        actions: list[Action] = []
        for pull in list(self._pulls.values()):
            if now >= pull.until:
                actions += self._fail(pull, DeadlineExceeded("the pull has used up its budget"))
            elif now - pull.moved_at > SILENCE_S and not pull.filling:
                actions += self._fail(pull, ConnectionLost("the worker that was copied from fell silent"))
                actions += self._hang_up(pull.url)
        for url, used_at in list(self._links.items()):
            if now - used_at > IDLE_LINK_S:
                actions += self._hang_up(url)
        return actions

    # --- inside ---

    def _found(self, pull: Pull, found: BlocksFound) -> list[Action]:
        """Raises what speaks against taking these blocks."""
        wanted = pull.wanted
        if pull.num_blocks or not wanted.start < found.num_blocks <= len(wanted.digests):
            raise MalformedMessage(f"a run up to block {found.num_blocks} was not asked for")
        if found.digest != wanted.digests[found.num_blocks - 1]:
            raise Corrupt("the holder's run has another digest")
        if found.block_bytes != wanted.block_bytes:
            raise BadTensor(f"the holder's blocks are {found.block_bytes} bytes, ours {wanted.block_bytes}")
        pull.num_blocks = found.num_blocks
        return []

    def _take(self, pull: Pull, chunk: Chunk, data: Buffer) -> list[Action]:
        """Raises what is wrong with the chunk."""
        view = memoryview(data)
        pull.came += 1
        if pull.came > pull.granted:
            raise MalformedMessage(f"{pull.came} chunks came on credit for {pull.granted}")
        if chunk.offset != pull.came_bytes or not 0 < view.nbytes <= pull.total_bytes - pull.came_bytes:
            raise MalformedMessage(f"{view.nbytes} bytes at {chunk.offset} do not follow the {pull.came_bytes} before")
        pull.came_bytes += view.nbytes
        pull.waiting_bytes += view.nbytes
        pull.parts.append(view)
        return self._fill(pull)

    def _fill(self, pull: Pull) -> list[Action]:
        """Hand whole blocks to the engine."""
        num_bytes = pull.waiting_bytes - pull.waiting_bytes % pull.wanted.block_bytes
        if not num_bytes:
            return []
        pull.filling += num_bytes
        return [Tell(Fill(pull.wanted.run, pull.take(num_bytes)))]

    def _give_credit(self, pull: Pull) -> list[Action]:
        """Let more come, as far as what has come is in the pool."""
        held = -(-(pull.filling + pull.waiting_bytes) // CHUNK_BYTES)
        chunks = pull.window - (pull.granted - pull.came) - held
        if pull.came_bytes == pull.total_bytes or chunks < GRANT_CHUNKS:
            return []
        pull.granted += chunks
        return [_say(pull, Credit(req_id=pull.req_id, chunks=chunks))]

    def _finish(self, pull: Pull, now: float) -> list[Action]:
        seconds = max(now - pull.began_at, 1e-6)
        self._num_done += 1
        self._seconds += seconds
        self._whole_tokens += (pull.filled - pull.wanted.start) * pull.wanted.seed.block_size
        source, rate = pull.wanted.order.worker_id, pull.came_bytes / seconds
        self._rate = _smoothed(self._rate, rate)
        self._rates[source] = _smoothed(self._rates.pop(source, 0.0), rate)
        if len(self._rates) > MAX_LINKS:
            del self._rates[next(iter(self._rates))]
        self._links[pull.url] = now
        return self._end(pull)

    def _fail(self, pull: Pull, error: KVCacheError, *, tells: bool = True) -> list[Action]:
        self._failures[error.code.name] += 1
        cancel = [_say(pull, Cancel(req_id=pull.req_id))] if tells else []
        return [*cancel, *self._end(pull)]

    def _end(self, pull: Pull) -> list[Action]:
        del self._pulls[pull.req_id], self._by_run[pull.wanted.run]
        num_new = pull.filled - pull.wanted.start
        self._tokens += num_new * pull.wanted.seed.block_size
        self._bytes += num_new * pull.wanted.block_bytes
        return [Tell(EndPull(pull.wanted.run))]

    def _refuse(self, wanted: Wanted, error: KVCacheError) -> list[Action]:
        self._failures[error.code.name] += 1
        return [Tell(EndPull(wanted.run))]

    def _of(self, url: str) -> list[Pull]:
        return [pull for pull in self._pulls.values() if pull.url == url]

    def _hang_up(self, url: str) -> list[Action]:
        """Unless somebody still copies over it."""
        if self._of(url) or self._is_used(url) or self._links.pop(url, None) is None:
            return []
        return [HangUp(url)]


def _smoothed(before: float, rate: float) -> float:
    return rate if not before else before + SMOOTHING * (rate - before)


def _say(pull: Pull, message: Message, *payload: Buffer) -> ToPeer:
    return ToPeer(pull.url, [wire.encode(message), *payload])
