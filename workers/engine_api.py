"""What the loop and the engine say to each other: commands in, events out, figures to read.

The engine runs in its own thread, so everything that crosses is a frozen value and nothing is shared.
Commands take effect in the order they were sent; the events of one generation come in their natural
order, and an event that changes who holds a sequence comes before the one that ends its generation.
The core knows no more of the engine than this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from bus.errors import KVCacheError
from bus.messages import FinishReason, PromptKind, PullOrder, Sampling, TokenLogprobs
from bus.stats import EngineStats, ModelStats, SequenceInfo, Spelling
from bus.tensors import TensorMeta
from workers.block_changes import BlockChange
from workers.copy_api import CopyCommand, CopyEvent
from workers.keys import RunId as RunId  # one of the words of this interface
from workers.keys import SequenceKey
from workers.nodes import NodeChange
from workers.text import TextStream

Ticket = NewType("Ticket", int)


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Generate. `prompt`: utf-8 text, `<u4` token ids or JSON messages; `resume`: output tokens there are already.

    model: a registered name; empty for the default. deadline: monotonic seconds, for the queue's sake only.
    priority: its class, lower is sooner. chain: the nodes that name the prompt to brokers.
    pull: where to copy leading blocks from before it is admitted; see `workers.copy_api`.
    """

    run: RunId
    tenant: str
    model: str
    kind: PromptKind
    prompt: bytes
    resume: tuple[int, ...]
    sampling: Sampling
    seq_id: str
    cache_salt: str
    deadline: float
    priority: int = 0
    chain: tuple[bytes, ...] = ()
    pull: PullOrder | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Give a generation up: its blocks are free within one step. One that is over is ignored."""

    run: RunId


@dataclass(frozen=True, slots=True)
class Hold:
    """Compute no more tokens for this generation until `Proceed`."""

    run: RunId


@dataclass(frozen=True, slots=True)
class Proceed:
    run: RunId


@dataclass(frozen=True, slots=True)
class Finish:
    """The output is complete with its first `num_tokens` tokens: a stop string ends there. What came after them is
    forgotten, so it does not show how far the engine had got."""

    run: RunId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The output cannot be turned into text."""

    run: RunId
    error: KVCacheError


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model before anyone asks for it."""

    model: str


@dataclass(frozen=True, slots=True)
class ReadKV:
    """Read computed KV of one layer, tokens `start .. stop` (None: to the end). Answered with a `ReadResult`."""

    ticket: Ticket
    sequence: SequenceKey
    layer: int
    start: int
    stop: int | None


@dataclass(frozen=True, slots=True)
class MeasureKV:
    """How many tokens of a computed sequence have KV. Answered with an int."""

    ticket: Ticket
    sequence: SequenceKey
    layer: int


@dataclass(frozen=True, slots=True)
class DropKV:
    """Forget a computed sequence. Answered with the number of layers that went."""

    ticket: Ticket
    sequence: SequenceKey


@dataclass(frozen=True, slots=True)
class PinKV:
    """Keep a computed sequence from eviction until `expires_at` (monotonic seconds) or `UnpinKV`. Answered with 1."""

    ticket: Ticket
    sequence: SequenceKey
    expires_at: float


@dataclass(frozen=True, slots=True)
class UnpinKV:
    """Let a computed sequence be evicted again. Answered with 1."""

    ticket: Ticket
    sequence: SequenceKey


@dataclass(frozen=True, slots=True)
class ListKV:
    """A tenant's computed sequences by id, after `after`, at most `limit`. Answered with `SequenceInfo`s."""

    ticket: Ticket
    tenant: str
    prefix: str
    after: str
    limit: int


@dataclass(frozen=True, slots=True)
class FlushKV:
    """Forget a tenant's prefixes, in all models; with a salt only those of it. Answered with the number of blocks."""

    ticket: Ticket
    tenant: str
    cache_salt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodePrompt:
    """Which tokens a prompt is, in the forms of `Start`. special: with those a text begins with. Answered with an
    `Encoding`."""

    ticket: Ticket
    model: str
    kind: PromptKind
    prompt: bytes
    special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellTokens:
    """What token ids look like, each by itself or all together. Answered with a `Spelling`."""

    ticket: Ticket
    model: str
    tokens: bytes
    each: bool


TextQuestion: TypeAlias = EncodePrompt | SpellTokens
"""Questions for a model's tokenizer, answered beside the steps."""
Question: TypeAlias = ReadKV | MeasureKV | DropKV | PinKV | UnpinKV | ListKV | FlushKV
TextCommand: TypeAlias = Finish | Fail
Command: TypeAlias = Start | Stop | Hold | Proceed | TextCommand | Load | Question | TextQuestion | CopyCommand


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The sequence has its first blocks: what it will run with."""

    run: RunId
    model: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Opened:
    """Tokens of this generation will follow, to be turned into text by `text`; `resume` are those it has already."""

    run: RunId
    text: TextStream
    resume: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that has no text yet. is_last: the generation ends with it."""

    run: RunId
    token: int
    logprobs: TokenLogprobs | None
    is_last: bool


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The first token is about to come. Of its `num_tokens` tokens, `num_cached` were not computed for it.

    compute_ms: its part of the steps it took part in, by tokens.
    """

    run: RunId
    num_tokens: int
    num_cached: int
    compute_ms: float


@dataclass(frozen=True, slots=True)
class PromptScored:
    """What is to be told of the tokens `start ..` of a prompt of `num_tokens`. Parts come in order; one that was
    computed again may repeat what others had.

    logprobs: one per token; None for the very first, which follows nothing.
    """

    run: RunId
    num_tokens: int
    start: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class NodesMoved:
    """Chain nodes whose blocks can be reused from now on, or no longer, in order."""

    changes: tuple[NodeChange, ...]


@dataclass(frozen=True, slots=True)
class BlocksMoved:
    """Blocks that can be found from now on, or no longer, in order; said only if `CacheConfig.tells_blocks`."""

    changes: tuple[BlockChange, ...]


@dataclass(frozen=True, slots=True)
class Produced:
    """New tokens, each with the text it released, and with logprobs if they were asked for."""

    run: RunId
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The generation is complete. Times in milliseconds: before admission, to the first token, after it."""

    run: RunId
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Broke:
    """The generation cannot be completed."""

    run: RunId
    error: KVCacheError


@dataclass(frozen=True, slots=True)
class Retained:
    """The engine keeps this named sequence's KV after its generation."""

    sequence: SequenceKey


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The engine no longer has a sequence of this name."""

    sequence: SequenceKey


@dataclass(frozen=True, slots=True)
class ReadResult:
    """K and V of one layer, `[num_tokens, num_kv_heads, head_dim]`, C order, and the sequence's whole length."""

    k: TensorMeta
    v: TensorMeta
    k_data: memoryview
    v_data: memoryview
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """A prompt's tokens, and how many the model takes."""

    model: str
    tokens: tuple[int, ...]
    max_model_len: int


Answer: TypeAlias = Encoding | Spelling | ReadResult | int | tuple[SequenceInfo, ...] | KVCacheError


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of the command with this ticket."""

    ticket: Ticket
    answer: Answer


RunEvent: TypeAlias = Admitted | Prefilled | PromptScored | Produced | Ended | Broke
KVEvent: TypeAlias = Retained | Forgotten | Answered
PoolEvent: TypeAlias = NodesMoved | BlocksMoved
Event: TypeAlias = RunEvent | KVEvent | PoolEvent | CopyEvent
EngineEvent: TypeAlias = (
    Opened | NewToken | Admitted | Prefilled | PromptScored | Ended | Broke | KVEvent | PoolEvent | CopyEvent
)
"""What the engine's thread says; `workers.texts` makes `Event`s of it."""
OnEvents: TypeAlias = Callable[[Sequence[Event]], None]


# --- the engine ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """A snapshot. `progress` counts steps: it stands still while there is work only if the engine is stuck."""

    progress: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0
    engine: EngineStats = field(default_factory=EngineStats)
    models: tuple[ModelStats, ...] = ()
