"""What the scheduler is asked, what it answers, and its limits: plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from bus.errors import KVCacheError
from bus.messages import FinishReason
from kvcache.hashing import HashSeed
from workers.batch import BlockId, Slice
from workers.eviction import EvictionPolicy
from workers.keys import SequenceKey
from workers.nodes import Landmark

MAX_NUM_SEQS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one model's scheduler. Raises ValueError unless all are at least 1.

    max_model_len: tokens of prompt and output together. max_tokens_per_step: the most one forward pass computes.
    max_num_seqs: the most sequences in one forward pass; no more than that are let in to take turns.
    """

    max_model_len: int
    vocab_size: int
    max_tokens_per_step: int = 256
    max_num_seqs: int = MAX_NUM_SEQS

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How the prefix cache is run.

    audit_share: of the blocks that are found, 0 to 1, this part is computed again and compared (`workers.audit`).
    tells_blocks: whether the engine reports every block that can be found from now on, or no longer.
    """

    eviction_policy: EvictionPolicy = "lru"
    audit_share: float = 0.0
    tells_blocks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """One prompt to go on from.

    key: names the generation until it ends; unique among those that have not.
    prompt, resume: token ids. `resume` are output tokens that an earlier attempt already delivered: they count
    as output, and the next token's index is `len(resume)`.
    eos_ids end the output unless `ignore_eos`; stop_ids always do; neither before `min_tokens` output tokens.
    sequence: the client's name for the KV, which then outlives the generation; None for none.
    deadline: monotonic seconds; whoever has not ended by then fails, and one that never began computes nothing.
    priority: its class, -MAX_PRIORITY to MAX_PRIORITY, lower is sooner; see `kvcache.places`.
    landmarks: where the nodes of the prompt's chain end, for routing.
    prompt_logprobs: None for none; else the logprobs of the prompt's tokens are told, and of so many likeliest ones.
        Then it is computed anew, whatever the pool has of it, since only computing gives logits.
    """

    key: bytes
    prompt: tuple[int, ...]
    seed: HashSeed
    max_tokens: int
    min_tokens: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    sequence: SequenceKey | None = None
    resume: tuple[int, ...] = ()
    deadline: float = math.inf
    priority: int = 0
    landmarks: tuple[Landmark, ...] = ()
    prompt_logprobs: int | None = None

    @property
    def num_to_score(self) -> int:
        """How many of its leading tokens are followed by one whose logprob is to be told: a prompt's but the last."""
        return 0 if self.prompt_logprobs is None else len(self.prompt) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a generation took. Tokens are counted, times are seconds.

    cached_tokens: prompt tokens it had from the pool, not computed for it. completion_tokens: with `resume`.
    queued_s: until first admitted. prefill_s: from then to the first new token. decode_s: from there to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """Admitted for the first time."""

    key: bytes
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """Output token number `index` (from 0, `resume` included). An end-of-sequence token is reported too."""

    key: bytes
    index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The good end."""

    key: bytes
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The bad end."""

    key: bytes
    error: KVCacheError
    usage: Usage


Event: TypeAlias = Started | Sampled | Finished | Failed


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """All keys and values of one block are to be another's, which is held by generation `key`."""

    key: bytes
    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass to run, and what happened while it was planned.

    keys, batch: the generations in it and their slices, in the same order; both empty when nothing can run.
    copies: to be made before the pass, as one: no target is written before all sources were read.
    """

    keys: tuple[bytes, ...]
    batch: tuple[Slice, ...]
    events: tuple[Event, ...]
    copies: tuple[BlockCopy, ...] = ()
