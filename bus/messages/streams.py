"""What is on a stream itself, by PUB/SUB; the topic says which stream."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bus.messages.fields import U32, U63, Message, Piece


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Natural logarithms of one token's probability and, as (token id, logarithm), of the likeliest tokens' there."""

    logprob: float
    top: Annotated[tuple[tuple[U32, float], ...], msgspec.Meta(max_length=32)] = ()


class SubAck(Message, frozen=True):
    """The broker lets this subscription see its stream; sent on the topic."""

    opcode = 48


class StreamTokens(Message, frozen=True):
    """Tokens `seq ..` of one stream, each with the text it released (which may be empty).

    logprobs: one per token if they were asked for, else none."""

    opcode = 49
    epoch: U32
    seq: U63
    tokens: Annotated[tuple[U32, ...], msgspec.Meta(max_length=64)]
    texts: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=64)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=64)] = ()


class StreamBeat(Message, frozen=True):
    """How far the stream has got; shows the loss of the last message."""

    opcode = 50
    epoch: U32
    next_seq: U63
