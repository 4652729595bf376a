"""What the engine knows of a loaded model: facts about it and its pool, and what it can do. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bus.messages import PromptKind
from workers.batch import Batch, BlockId, Draw, Outcome
from workers.engine_api import ReadResult
from workers.text import TextStream


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a loaded model and its pool. Lengths in tokens; `block_bytes` covers all layers.

    kv_tolerance: how far the KV of a token may differ when it is computed in other company, as `Model.difference` says.
    dtype: what it computes in. kv_dtype: how its pool keeps keys and values.
    runner: what computes it, `torch` or `openvino`. runner_reason: why not the faster one, or empty.
    attention: how torch computes it, `gather` or `flex`; empty for OpenVINO. attention_reason: likewise.
    """

    name: str
    fingerprint: str
    dtype: str
    kv_dtype: str
    device: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int]
    num_blocks: int
    block_size: int
    block_bytes: int
    kv_tolerance: float
    runner: str = "torch"
    runner_reason: str = ""
    attention: str = ""
    attention_reason: str = ""


class Model(Protocol):
    """A loaded model over its pool. All but `encode` and `spell` is called from the engine's thread."""

    @property
    def facts(self) -> ModelFacts: ...

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt; special: with those that the model's texts begin with.

        Raises TokenizerError, BadArgument or TooLarge. Called from the text thread."""

    def spell(self, tokens: bytes, each: bool) -> tuple[str, ...]:
        """How `<u4` token ids are spelled: one text for each, or one for all. Raises as `encode`, from its thread."""

    def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        """The text of a new output, which ends before any of `stops` that is complete after `min_tokens` tokens.

        Called from the engine's thread; the text is used in another, which decodes all texts."""

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        """One step; what came of each slice."""

    def difference(self, one: BlockId, other: BlockId) -> float:
        """How far the KV of two blocks differs, as a part of the largest number there; NaN if a number is none."""

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """Make each target block hold what its source holds; all are read before any is written."""

    def read(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> ReadResult:
        """Copy one layer's K and V out of the pool; `length` is `stop`. Raises BadArgument for a wrong layer."""

    def read_blocks(self, blocks: Sequence[BlockId]) -> memoryview:
        """Copy whole blocks out, one after the other: `[num_layers, 2, num_kv_heads, block_size, head_dim]` each."""

    def write_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        """Overwrite whole blocks with what `read_blocks` gave elsewhere. Raises BadTensor for a wrong length."""

    def close(self) -> None:
        """Give back the memory of weights and pool. Called from the load thread, when nobody uses the model."""
