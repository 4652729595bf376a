"""One token stream at the worker's end: its tokens are numbered, and kept until they are acknowledged.

`bus.streams` says what both ends agree on. Here the amount is bounded by pausing: beyond the window no more tokens
should be computed for this client. No sockets, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import TypeAlias

from bus.errors import ReplayExpired, TokenizerError
from bus.limits import WINDOW_TOKENS
from bus.messages import Ack, Replay, Resume, StreamBeat, StreamTokens, TokenLogprobs
from bus.streams import BEAT_S, DIGEST_BYTES, Deliver, token_bytes
from bus.wire import MAX_HEADER_BYTES

MAX_PUBLISHED_TOKENS = 64
MAX_REPLAYED_TOKENS = 256
MAX_PIECE_BYTES = 4096

PULL_RESUMES = 3
PULL_WITHIN_S = 1.0

_MESSAGE_BUDGET = MAX_HEADER_BYTES - 256  # leaves room for the other fields of the message
_ITEM_OVERHEAD = 8  # a token id and the length of its text, as msgpack
_LOGPROB_OVERHEAD = 15  # a token id and a number in an array, as msgpack

_Item: TypeAlias = tuple[int, str, TokenLogprobs | None]


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
        self._digest = blake2b(token_bytes(resume_tokens), digest_size=DIGEST_BYTES)
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
            need = num_bytes(item[1], item[2])
            if items and (len(items) == limit or size + need > _MESSAGE_BUDGET):
                yield _part(seq, items)
                seq, size, items = seq + len(items), 0, []
            items.append(item)
            size += need
        if items:
            yield _part(seq, items)


def num_bytes(text: str, logprobs: TokenLogprobs | None) -> int:
    """What a token with this text takes in a message, at most."""
    extra = 0 if logprobs is None else _LOGPROB_OVERHEAD + _LOGPROB_OVERHEAD * len(logprobs.top)
    return _ITEM_OVERHEAD + len(text.encode()) + extra


def _part(seq: int, items: Sequence[_Item]) -> Deliver:
    tokens, texts, logprobs = zip(*items, strict=True)
    return Deliver(seq, tokens, texts, tuple(entry for entry in logprobs if entry is not None))
