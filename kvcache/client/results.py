"""What a client hands back: the events of a generation and the answers of the KV plane. Plain, frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import msgspec

from bus.stats import Explanation


@dataclass(frozen=True, slots=True)
class Start:
    """The generation was admitted: where, why there, and how much of the prompt needed no computing.

    explanation: every candidate and its load, if `explain=True` was asked for. index: which of the `n` outputs.
    """

    worker_id: str
    reason: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    explanation: Explanation | None = None
    index: int = 0


class Alternative(NamedTuple):
    """A token that could have come, and the natural logarithm of its probability."""

    token_id: int
    logprob: float


class Token(msgspec.Struct, frozen=True):  # not a dataclass as the others: of these there are many
    """One token and the text it released: empty while the text may still become a stop string or a character.

    index: which of the `n` outputs it belongs to. logprob, top_logprobs: if `logprobs` were asked for: the natural
    logarithm of its probability, and the likeliest tokens at its place, the likeliest first.
    Of a prompt's token `seq` is its place there and `text` is empty; the first one has no logprob.
    """

    seq: int
    token_id: int
    text: str
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """All of the prompt's tokens with their logprobs, before the first of the output's, if `prompt_logprobs` were asked
    for. index: which of the `n` outputs."""

    tokens: tuple[Token, ...]
    index: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens. `cached_tokens` of the prompt's were read from the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """ttft_s, total_s: from the call to the first token and to the end, as this client saw them.

    tokens_per_s: after the first token. queue_ms, prefill_ms, decode_ms: by the worker that ended the stream.
    resumes: how often the stream went on elsewhere after a fault.
    """

    ttft_s: float
    total_s: float
    tokens_per_s: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    resumes: int


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a generation; all its tokens arrived. `finish_reason`: `stop` or `length`.

    index: which of the `n` outputs. tokens: all of them, if `logprobs` were asked for, else none. prompt: the
    prompt's, if `prompt_logprobs` were asked for, else none.
    """

    text: str
    finish_reason: str
    usage: Usage
    timings: Timings
    worker_id: str
    reason: str
    request_id: str
    index: int = 0
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()


Event: TypeAlias = Start | PromptTokens | Token | Done


@dataclass(frozen=True, slots=True)
class Encoding:
    """A prompt's tokens, by this model, which takes at most `max_model_len` of them."""

    token_ids: tuple[int, ...]
    model: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class KvAck:
    """A write took effect. length: tokens now in the layer. durability: where it is; `mem1` is one memory, `mem2` two.

    duplicate: the same write had been applied before, and was not applied again.
    """

    length: int
    durability: str
    duplicate: bool
