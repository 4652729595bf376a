"""What a stream delivers, as its reader sees it: tokens with their text and, if they were asked for, logprobs, also of
the prompt's tokens, which come before them and in parts. Core.
"""

from __future__ import annotations

from bus.errors import MalformedMessage
from bus.messages import PromptLogprobs, TokenLogprobs
from bus.stats import PromptPart, unpack
from bus.streams import Deliver
from bus.wire import Buffer
from kvcache.client.results import Alternative, Token


def as_tokens(delivered: Deliver, asked: int | None, index: int) -> list[Token]:
    """The tokens of a delivery to output number `index`, for which `asked` logprobs were asked for (None: none).

    Raises MalformedMessage for logprobs that nobody asked for, too few or too many, or that are none.
    """
    if asked is None:
        if delivered.logprobs:
            raise MalformedMessage("the worker sent logprobs that were not asked for")
        return [
            Token(seq, token, text, index)
            for seq, (token, text) in enumerate(zip(delivered.tokens, delivered.texts, strict=True), delivered.seq)
        ]
    if len(delivered.logprobs) != len(delivered.tokens):
        raise MalformedMessage(f"{len(delivered.tokens)} tokens came with {len(delivered.logprobs)} logprobs")
    return [
        Token(seq, token, text, index, entry.logprob, _alternatives(entry, asked))
        for seq, (token, text, entry) in enumerate(
            zip(delivered.tokens, delivered.texts, delivered.logprobs, strict=True), delivered.seq
        )
    ]


class PromptReceiver:
    """A prompt's tokens, whichever attempts their parts come from. asked: logprobs for each, None for none at all."""

    def __init__(self, asked: int | None, index: int) -> None:
        self.tokens: list[Token] = []
        self.is_complete = asked is None
        self._asked = asked or 0
        self._index = index

    def take(self, message: PromptLogprobs, payload: Buffer) -> bool:
        """Add what is new in a part; whether that was the last. Raises MalformedMessage for one that does not follow,
        or that is none."""
        part = unpack(payload, PromptPart)
        have, stop = len(self.tokens), message.start + len(part.token_ids)
        if len(part.logprobs) != len(part.token_ids) or message.start > have or stop > message.num_tokens:
            raise MalformedMessage(
                f"{len(part.token_ids)} tokens and {len(part.logprobs)} logprobs came of a prompt of "
                f"{message.num_tokens} tokens, from {message.start} on, after {have} of them"
            )
        skip = have - message.start
        for seq, (token, entry) in enumerate(zip(part.token_ids[skip:], part.logprobs[skip:], strict=True), have):
            self.tokens.append(self._scored(seq, token, entry))
        self.is_complete = len(self.tokens) == message.num_tokens
        return self.is_complete

    def _scored(self, seq: int, token: int, entry: TokenLogprobs | None) -> Token:
        if (entry is None) != (seq == 0):
            raise MalformedMessage(f"token {seq} of a prompt came {'without' if seq else 'with'} a logprob")
        if entry is None:
            return Token(seq, token, "", self._index)
        return Token(seq, token, "", self._index, entry.logprob, _alternatives(entry, self._asked))


def _alternatives(entry: TokenLogprobs, asked: int) -> tuple[Alternative, ...]:
    if len(entry.top) > asked:
        raise MalformedMessage(f"{len(entry.top)} alternatives came with a token, {asked} were asked for")
    numbers = (entry.logprob, *(logprob for _, logprob in entry.top))
    if not all(logprob <= _ROUNDING for logprob in numbers):
        raise MalformedMessage("a logprob is not the logarithm of a probability")
    return tuple(Alternative(token, logprob) for token, logprob in entry.top)


_ROUNDING = 1e-3
"""How far the logarithm of 1 may lie above 0; no NaN passes either."""
