"""Generating: a stream is opened, tokens are asked for, and one end comes back; tokenizing and its reverse."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from bus.messages.fields import (
    I63,
    U32,
    U63,
    Chain,
    Digest,
    Id16,
    Label,
    Message,
    Millis,
    Name,
    Parts,
    Piece,
    SeqId,
    Text,
    TraceParent,
)
from bus.messages.streams import TokenLogprobs


class PromptKind(enum.StrEnum):
    TEXT = "text"
    TOKENS = "tokens"
    MESSAGES = "messages"


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How tokens are drawn and when to stop. Ranges are checked by `kvcache.sampling_checks.check_sampling`.

    logit_bias: (token id, what is added to its logit). logprobs: None for none, 0 for those of the tokens drawn, or
    how many of the likeliest to tell besides. prompt_logprobs: the same of the prompt's tokens (`PromptLogprobs`).
    """

    max_tokens: I63 = 128
    min_tokens: I63 = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: I63 = 0
    seed: I63 = 0
    stop: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)] = ()
    stop_token_ids: Annotated[tuple[I63, ...], msgspec.Meta(max_length=64)] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[tuple[tuple[I63, float], ...], msgspec.Meta(max_length=512)] = ()
    logprobs: I63 | None = None
    prompt_logprobs: I63 | None = None


class OpenStream(Message, frozen=True):
    """Ask for a topic that nobody can guess. Subscribe, wait for `SubAck`, then `Generate`."""

    opcode = 32
    req_id: Id16


class StreamOpened(Message, frozen=True):
    """The stream is open, for one `Generate`, which must come within a minute."""

    opcode = 33
    req_id: Id16
    stream_id: Id16


class Generate(Message, frozen=True):
    """Generate from a prompt. Payloads: the prompt (utf-8 text, `<u4` token ids, or JSON: a list
    of messages, or an object of messages and tools), and, when the stream goes on after a fault, the `<u4` tokens that
    the client already has; `epoch` is then higher. Of two that wait the one of lower `priority` is sooner.

    pull_from: a worker to copy the prompt's leading KV from, if it lives, whatever the policy thinks; empty: none.
    label: what logs call this request, printable ASCII; empty: its id in hex. trace: W3C's traceparent of who asks.
    """

    opcode = 34
    payloads = (1, 2)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    stream_id: Id16
    epoch: U32
    kind: PromptKind
    sampling: Sampling
    model: Name = ""
    seq_id: SeqId = ""
    cache_salt: Name = ""
    policy: Name = ""
    chain: Chain = ()
    explain: bool = False
    pull_from: Name = ""
    payload: Parts = ()
    priority: I63 = 0
    label: Label = ""
    trace: TraceParent = ""


class Cancel(Message, frozen=True):
    """Stop this request; it ends in `Failed(CANCELLED)` unless it has ended already."""

    opcode = 35
    req_id: Id16


class Resume(Message, frozen=True):
    """Tokens are missing from `from_seq` on: replay them on the reliable lane."""

    opcode = 36
    req_id: Id16
    epoch: U32
    from_seq: U63


class Ack(Message, frozen=True):
    """All tokens below `upto` have arrived; the worker may run ahead of it by the window."""

    opcode = 37
    req_id: Id16
    epoch: U32
    upto: U63


class Started(Message, frozen=True):
    """The worker admitted the sequence: where it runs, why there, and how much of the prompt was cached."""

    opcode = 38
    req_id: Id16
    epoch: U32
    worker_id: Name
    reason: Text
    model: Name
    prompt_tokens: U63
    cached_tokens: U63


class Replay(Message, frozen=True):
    """Tokens from `seq` on, on the reliable lane. `pull`: publishing has stopped, ask again with `Resume`.

    logprobs: one per token if they were asked for, else none."""

    opcode = 39
    req_id: Id16
    epoch: U32
    seq: U63
    tokens: Annotated[tuple[U32, ...], msgspec.Meta(max_length=256)]
    texts: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=256)]
    pull: bool = False
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=256)] = ()


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"


class StreamEnd(Message, frozen=True):
    """The one good end of a `Generate`: how many tokens there are, and blake2b-256 over all of them as `<u4`."""

    opcode = 40
    req_id: Id16
    epoch: U32
    num_tokens: U63
    digest: Digest
    finish_reason: FinishReason
    prompt_tokens: U63
    cached_tokens: U63
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Tokenize(Message, frozen=True):
    """Which tokens a prompt is. Payload: as a `Generate`'s; `special`: with the special tokens a text begins with."""

    opcode = 41
    payloads = (1, 1)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    kind: PromptKind
    model: Name = ""
    special: bool = True
    payload: Parts = ()


class Tokenized(Message, frozen=True):
    """The answer to a `Tokenize`; the payload is the token ids, `<u4`."""

    opcode = 42
    payloads = (1, 1)
    req_id: Id16
    model: Name
    max_model_len: U63
    payload: Parts


class Detokenize(Message, frozen=True):
    """What tokens look like. Payload: `<u4` token ids. `each`: one text for each of them, else one for all."""

    opcode = 43
    payloads = (1, 1)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    model: Name = ""
    each: bool = False
    payload: Parts = ()


class Detokenized(Message, frozen=True):
    """The answer to a `Detokenize`; the payload is a `bus.stats.Spelling`."""

    opcode = 44
    payloads = (1, 1)
    req_id: Id16
    payload: Parts


class PromptLogprobs(Message, frozen=True):
    """How probable the tokens `start ..` of a prompt of `num_tokens` were; the payload is a `bus.stats.PromptPart`.

    On the reliable lane, in order, all before the first token; a part may begin with tokens that were told before."""

    opcode = 45
    payloads = (1, 1)
    req_id: Id16
    epoch: U32
    num_tokens: U63
    start: U63
    payload: Parts
