"""What a stream delivers, as its reader sees it: tokens with their text and, if they were asked for, logprobs."""

from __future__ import annotations

from bus.errors import MalformedMessage
from bus.messages import TokenLogprobs
from bus.streams import Deliver
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


def _alternatives(entry: TokenLogprobs, asked: int) -> tuple[Alternative, ...]:
    if len(entry.top) > asked:
        raise MalformedMessage(f"{len(entry.top)} alternatives came with a token, {asked} were asked for")
    numbers = (entry.logprob, *(logprob for _, logprob in entry.top))
    if not all(logprob <= _ROUNDING for logprob in numbers):
        raise MalformedMessage("a logprob is not the logarithm of a probability")
    return tuple(Alternative(token, logprob) for token, logprob in entry.top)


_ROUNDING = 1e-3
"""How far the logarithm of 1 may lie above 0; no NaN passes either."""
