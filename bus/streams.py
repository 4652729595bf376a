"""One token stream, seen from both ends: `StreamLog` at the worker, `StreamReceiver` at the client.

Tokens travel on PUB/SUB, which drops when it must (in bursts), so each carries (epoch, seq) and the ends agree
on the rest over the reliable lane: the client asks again for what is missing (`Resume`), the worker replays it,
and the terminal `StreamEnd` has a digest of all tokens, which the client checks. Invariants:

- the receiver delivers exactly the tokens 0, 1, 2 .. of the current epoch, each once, whatever arrives in
  whatever order; a message of another epoch changes nothing;
- `Finished` comes only when all tokens were delivered and their digest is the sender's; otherwise `Broken`;
- both ends hold a bounded amount: the log what is not acknowledged (the sequence pauses beyond the window),
  the receiver `MAX_HELD` messages out of order.

Neither end knows sockets or clocks: events and `now` (monotonic seconds) go in, actions come out.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TypeAlias, assert_never

import msgspec

from bus.errors import KVCacheError, MalformedMessage, ReplayExpired, StreamGap, TokenizerError
from bus.limits import WINDOW_TOKENS
from bus.messages import Ack, Replay, Resume, StreamBeat, StreamEnd, StreamTokens, TokenLogprobs
from bus.wire import MAX_HEADER_BYTES

MAX_HELD = 256
MAX_PUBLISHED_TOKENS = 64
MAX_REPLAYED_TOKENS = 256
MAX_PIECE_BYTES = 4096

ACK_TOKENS = 64
ACK_S = 1.0
BEAT_S = 0.5
SILENCE_S = 3 * BEAT_S
RESUME_RETRY_S = 0.5
TAIL_GRACE_S = 0.05
PULL_PAUSE_S = 0.05
PULL_RESUMES = 3
PULL_WITHIN_S = 1.0

_DIGEST_BYTES = 32
_MESSAGE_BUDGET = MAX_HEADER_BYTES - 256  # leaves room for the other fields of the message
_ITEM_OVERHEAD = 8  # a token id and the length of its text, as msgpack
_LOGPROB_OVERHEAD = 15  # a token id and a number in an array, as msgpack

_Item: TypeAlias = tuple[int, str, TokenLogprobs | None]


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
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


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


class StreamLog:
    """The worker's end: numbers tokens, keeps those that are not acknowledged, and answers `Resume`.

    epoch: of the attempt that it belongs to; messages of another one are ignored.
    resume_tokens: what the client already had when this attempt began; they count, and are never sent again.
    window: how many unacknowledged tokens there may be before the sequence should pause.
    """

    def __init__(
        self,
        req_id: bytes,
        epoch: int,
        now: float,
        *,
        resume_tokens: Sequence[int] = (),
        window: int = WINDOW_TOKENS,
    ) -> None:
        self.epoch = epoch
        self.is_pulled = False
        self._req_id = req_id
        self._window = window
        self._digest = blake2b(token_bytes(resume_tokens), digest_size=_DIGEST_BYTES)
        self._base = len(resume_tokens)  # number of the first token that is kept
        self._kept: deque[_Item] = deque()
        self._resumed_at: deque[float] = deque(maxlen=PULL_RESUMES)
        self._spoke_at = now

    @property
    def next_seq(self) -> int:
        """How many tokens the stream has, those of earlier attempts included."""
        return self._base + len(self._kept)

    @property
    def digest(self) -> bytes:
        """blake2b-256 over all tokens of the stream so far, as `<u4`."""
        return self._digest.digest()

    @property
    def is_paused(self) -> bool:
        """Whether the client is so far behind that no more tokens should be computed for it now."""
        return len(self._kept) > self._window

    def append(
        self, tokens: Sequence[int], texts: Sequence[str], now: float, logprobs: Sequence[TokenLogprobs] = ()
    ) -> list[StreamTokens]:
        """Add tokens with the text each released; returns what to publish (nothing once the client pulls).

        logprobs: one per token, if the client asked for them, and then always.
        Raises TokenizerError, adding nothing, for a text that is too long to be sent.
        """
        longest = max((len(text.encode()) for text in texts), default=0)
        if longest > MAX_PIECE_BYTES:
            raise TokenizerError(f"one token released {longest} bytes of text, limit {MAX_PIECE_BYTES}")
        start = self.next_seq
        self._digest.update(token_bytes(tokens))
        self._kept.extend(zip(tokens, texts, logprobs or (None,) * len(tokens), strict=True))
        if self.is_pulled:
            return []
        self._spoke_at = now
        if len(tokens) == 1:  # as in nearly every step, and it fits whatever it is
            return [
                StreamTokens(
                    epoch=self.epoch, seq=start, tokens=tuple(tokens), texts=tuple(texts), logprobs=tuple(logprobs)
                )
            ]
        return [
            StreamTokens(epoch=self.epoch, seq=part.seq, tokens=part.tokens, texts=part.texts, logprobs=part.logprobs)
            for part in self._cut(start, MAX_PUBLISHED_TOKENS)
        ]

    def beat(self, now: float) -> StreamBeat | None:
        """The beat to publish, if one is due: it shows the client what it may have missed. None otherwise."""
        if self.is_pulled or now - self._spoke_at < BEAT_S:
            return None
        self._spoke_at = now
        return StreamBeat(epoch=self.epoch, next_seq=self.next_seq)

    def ack(self, message: Ack) -> None:
        """Forget what has arrived. More than there is counts as all there is."""
        if message.epoch != self.epoch:
            return
        for _ in range(min(message.upto, self.next_seq) - self._base):
            self._kept.popleft()
            self._base += 1

    def resume(self, message: Resume, now: float) -> list[Replay]:
        """The answer to a client that misses tokens: all from there on, or, once it pulls, the next few.

        The third question within a second makes the stream pulled: its publishing does not get through.
        An answer without tokens says that there are none yet. Another epoch's question has no answer.
        Raises ReplayExpired for tokens that the client had acknowledged.
        """
        if message.epoch != self.epoch:
            return []
        if message.from_seq < self._base:
            raise ReplayExpired(
                f"tokens from {message.from_seq} on were asked for; {self._base} and later are kept", detail=self._base
            )
        self._resumed_at.append(now)
        if len(self._resumed_at) == PULL_RESUMES and now - self._resumed_at[0] <= PULL_WITHIN_S:
            self.is_pulled = True
        seq = min(message.from_seq, self.next_seq)
        replays = [self._replay(part) for part in self._cut(seq, MAX_REPLAYED_TOKENS)]
        return replays[: 1 if self.is_pulled else None] or [self._replay(Deliver(seq, (), ()))]

    def tail(self) -> list[Replay]:
        """All that is not acknowledged, to be sent on the reliable lane just before the end: whoever gets the
        end then has every token, and nobody need ask a worker again about a stream that is over."""
        return [self._replay(part) for part in self._cut(self._base, MAX_REPLAYED_TOKENS)]

    def _replay(self, part: Deliver) -> Replay:
        return Replay(
            req_id=self._req_id,
            epoch=self.epoch,
            seq=part.seq,
            tokens=part.tokens,
            texts=part.texts,
            pull=self.is_pulled,
            logprobs=part.logprobs,
        )

    def _cut(self, seq: int, limit: int) -> Iterator[Deliver]:
        """What is kept from `seq` on, in parts that fit into one message each."""
        items: list[_Item] = []
        size = 0
        for item in islice(self._kept, seq - self._base, None):
            need = _num_bytes(item)
            if items and (len(items) == limit or size + need > _MESSAGE_BUDGET):
                yield _part(seq, items)
                seq, size, items = seq + len(items), 0, []
            items.append(item)
            size += need
        if items:
            yield _part(seq, items)


def _num_bytes(item: _Item) -> int:
    """What a token takes in a message, at most."""
    _, text, logprobs = item
    extra = 0 if logprobs is None else _LOGPROB_OVERHEAD + _LOGPROB_OVERHEAD * len(logprobs.top)
    return _ITEM_OVERHEAD + len(text.encode()) + extra


def _part(seq: int, items: Sequence[_Item]) -> Deliver:
    tokens, texts, logprobs = zip(*items, strict=True)
    return Deliver(seq, tokens, texts, tuple(entry for entry in logprobs if entry is not None))
