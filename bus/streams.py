"""How tokens of one stream travel, and the client's end of it; the worker's end is `bus.stream_log`.

Tokens travel on PUB/SUB, which drops when it must (in bursts), so each carries (epoch, seq) and the ends agree
on the rest over the reliable lane: the client asks again for what is missing (`Resume`), the worker replays it,
and the terminal `StreamEnd` has a digest of all tokens, which the client checks. Invariants:

- the receiver delivers exactly the tokens 0, 1, 2 .. of the current epoch, each once, whatever arrives in
  whatever order; a message of another epoch changes nothing;
- `Finished` comes only when all tokens were delivered and their digest is the sender's; otherwise `Broken`;
- the receiver holds at most `MAX_HELD` messages that are out of order.

Neither end knows sockets or clocks: events and `now` (monotonic seconds) go in, actions come out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias, assert_never

import msgspec

from bus.errors import KVCacheError, MalformedMessage, StreamGap
from bus.messages import Ack, Replay, Resume, StreamBeat, StreamEnd, StreamTokens, TokenLogprobs

MAX_HELD = 256

ACK_TOKENS = 64
ACK_S = 1.0
BEAT_S = 0.5
SILENCE_S = 3 * BEAT_S
RESUME_RETRY_S = 0.5
TAIL_GRACE_S = 0.05
PULL_PAUSE_S = 0.05

DIGEST_BYTES = 32


class Deliver(msgspec.Struct, frozen=True):  # a struct because there is one for every token, and it costs a sixth
    """The next tokens of the stream, each with the text it released. `seq` numbers the first one.

    logprobs: one per token, or none at all.
    """

    seq: int
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """All tokens were delivered and their digest is right. Nothing follows."""

    end: StreamEnd


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream cannot be what the worker generated. Nothing follows."""

    error: KVCacheError


Action: TypeAlias = Deliver | Finished | Broken | Resume | Ack
"""What a receiver wants done: the messages are to be sent on the control lane, in this order."""

Arrival: TypeAlias = StreamTokens | StreamBeat | Replay | StreamEnd


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32: what digests cover and what a resumed request carries."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def stream_digest(data: bytes | bytearray) -> bytes:
    """blake2b-256 over a stream's tokens, given as `token_bytes`."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


class StreamReceiver:
    """The client's end. It survives moves: `restart` goes on under a higher epoch with the tokens it has.

    A `Resume` is sent at once for a hole, after a short grace for a tail that may still be on its way, after
    `SILENCE_S` without a word on the stream (its lane may be dead), and again if nothing came of it.
    """

    def __init__(self, req_id: bytes, now: float) -> None:
        self.epoch = 0
        self.is_over = False
        self._req_id = req_id
        self._received = bytearray()
        self._next = 0
        self._consumed = 0
        self._acked = 0
        self._acked_at = now
        self._known = 0
        self._begin(now)

    @property
    def next_seq(self) -> int:
        """How many tokens were delivered; the number of the one that is waited for."""
        return self._next

    @property
    def num_unread(self) -> int:
        """How many delivered tokens the reader has not used yet."""
        return self._next - self._consumed

    @property
    def received(self) -> bytes:
        """All tokens delivered so far as `<u4`, for a request that goes on elsewhere."""
        return bytes(self._received)

    def restart(self, epoch: int, now: float) -> None:
        """Go on with another worker's attempt; what the earlier ones still say is ignored from here on."""
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} does not follow {self.epoch}")
        self.epoch = epoch
        self._acked_at = now
        self._begin(now)

    def handle(self, message: Arrival, now: float) -> list[Action]:
        """What follows from a message of this stream, whichever lane it came on."""
        if self.is_over or message.epoch != self.epoch:
            return []
        match message:
            case StreamTokens():
                self._heard_at = now
                actions = self._take(message)
            case StreamBeat():
                self._heard_at = now
                self._known = max(self._known, message.next_seq)
                actions = []
            case Replay():
                actions = self._take(message)
                self._plan_after_replay(message, now)
            case StreamEnd():
                actions = self._take_end(message, now)
            case _:
                assert_never(message)
        return self._conclude(actions, now)

    def consume(self, upto: int, now: float) -> list[Action]:
        """The reader has used all tokens below `upto`: only these are acknowledged, so that a slow reader
        pauses its worker and not the memory of its own process."""
        self._consumed = max(self._consumed, min(upto, self._next))
        if self.is_over or self._consumed - self._acked < ACK_TOKENS:
            return []
        return [self._ack(self._consumed, now)]

    def tick(self, now: float) -> list[Action]:
        """What time alone brings about; call it every 50 ms or so."""
        if self.is_over:
            return []
        actions: list[Action] = []
        if self._consumed > self._acked and now - self._acked_at >= ACK_S:
            actions.append(self._ack(self._consumed, now))
        return self._conclude(actions, now)

    def _begin(self, now: float) -> None:
        self._held: dict[int, StreamTokens | Replay] = {}
        self._end: StreamEnd | None = None
        self._known = self._next  # tokens below this exist, as far as we were told
        self._pull = False
        self._heard_at = now
        self._ask_at = now  # no Resume before
        self._asked_upto = 0  # an answer is awaited that goes up to here

    def _take(self, message: StreamTokens | Replay) -> list[Action]:
        num = len(message.tokens)
        if len(message.texts) != num or len(message.logprobs) not in (0, num):
            found = f"{num} tokens came with {len(message.texts)} texts and {len(message.logprobs)} logprobs"
            return [Broken(MalformedMessage(found))]
        self._known = max(self._known, message.seq + num)
        if message.seq > self._next:
            self._hold(message)
            return []
        delivered = self._deliver(message)
        if delivered:
            for held_seq in sorted(self._held):
                if held_seq > self._next:
                    break
                delivered += self._deliver(self._held.pop(held_seq))
        return delivered

    def _hold(self, message: StreamTokens | Replay) -> None:
        before = self._held.get(message.seq)
        if before is None and len(self._held) >= MAX_HELD:
            return  # dropped, and replayed later
        if before is None or len(message.tokens) > len(before.tokens):
            self._held[message.seq] = message

    def _deliver(self, message: StreamTokens | Replay) -> list[Action]:
        skip = self._next - message.seq
        if skip >= len(message.tokens):
            return []
        action = Deliver(self._next, message.tokens[skip:], message.texts[skip:], message.logprobs[skip:])
        self._received += token_bytes(action.tokens)
        self._next += len(action.tokens)
        return [action]

    def _take_end(self, end: StreamEnd, now: float) -> list[Action]:
        if self._end is None:
            self._end = end
            self._known = max(self._known, end.num_tokens)
            if end.num_tokens > self._next:  # the two lanes race: the tail is probably right behind
                self._ask_at = max(self._ask_at, now + TAIL_GRACE_S)
        return []

    def _plan_after_replay(self, replay: Replay, now: float) -> None:
        self._pull = self._pull or replay.pull
        if self._pull:
            self._ask_at = now if replay.tokens else now + PULL_PAUSE_S
        elif not replay.tokens:
            self._ask_at = now + RESUME_RETRY_S
            self._heard_at = now
        elif self._next < self._asked_upto:
            self._ask_at = now + RESUME_RETRY_S  # the rest of the answer is on its way
        else:
            self._ask_at = now

    def _conclude(self, actions: list[Action], now: float) -> list[Action]:
        """Close the stream if this was its end; ask for what is missing if it is time to."""
        for action in actions:
            if isinstance(action, Broken):
                self.is_over = True
                return [action]
        if self._end is not None and self._next >= self._end.num_tokens:
            self.is_over = True
            return [*actions, *self._finish(self._end, now)]
        if self._asked_upto and self._next >= self._asked_upto:
            self._asked_upto = 0  # what was asked for is here: a new hole may be asked for at once
            self._ask_at = self._ask_at if self._pull else min(self._ask_at, now)
        if self._wants_resume(now):
            self._ask_at = now + RESUME_RETRY_S
            self._asked_upto = self._known if self._known > self._next else 0
            actions.append(Resume(req_id=self._req_id, epoch=self.epoch, from_seq=self._next))
        return actions

    def _finish(self, end: StreamEnd, now: float) -> list[Action]:
        if self._next > end.num_tokens:
            error = f"the stream ended at token {end.num_tokens}, after {self._next} had arrived"
            return [Broken(StreamGap(error, detail=end.num_tokens))]
        if stream_digest(self._received) != end.digest:
            error = f"the digest of the {self._next} tokens received is not that of the tokens generated"
            return [Broken(StreamGap(error, detail=end.num_tokens))]
        return [self._ack(self._next, now), Finished(end)]

    def _wants_resume(self, now: float) -> bool:
        if now < self._ask_at:
            return False
        return self._pull or self._known > self._next or now - self._heard_at >= SILENCE_S

    def _ack(self, upto: int, now: float) -> Ack:
        self._acked = upto
        self._acked_at = now
        return Ack(req_id=self._req_id, epoch=self.epoch, upto=upto)
