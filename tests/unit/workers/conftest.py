"""Tiny random models of each family as Hugging Face folders, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvcache.models import ModelKind, ModelSource
from workers.batch import BlockId, Slice
from workers.loader import LoadedModel, load_model
from workers.model_budget import ModelBudget, ModelNeed
from workers.page_plan import plan_pages
from workers.paged_kv import PagedKV
from workers.runner import TorchRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.runners import Runner

VOCAB_SIZE = 300
EOS_ID = 299
BLOCK_SIZE = 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


NEED = ModelNeed(weights_bytes=1000, block_bytes=10)
"""What a model of a test takes, by its own word."""


def roomy() -> ModelBudget:
    """Room for eight models that need `NEED`."""
    return ModelBudget(pools_bytes=800, num_named=8)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 single bytes, some merges of English and of the bytes of a euro sign, `<eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("â", "Ĥ")]
    tokens = alphabet + ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([f"<unused{index}>" for index in range(len(tokens), EOS_ID)])
    core.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama() -> LlamaForCausalLM:
    """Three layers, 4 query heads over 2 KV heads, and weights wide enough for varied greedy output."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return GPT2LMHeadModel(config)


def save_model(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write_into(path: Path) -> None:
    """Change the last half of a file where it lies, as `cp` or `rsync --inplace` do, and not its length."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(bytes(byte ^ 1 for byte in data[len(data) // 2 :]))


def source_of(path: Path) -> ModelSource:
    return ModelSource(name=path.name, kind=ModelKind.FOLDER, path=path, is_present=True)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`llama` and `gpt2` folders; read only, copy one before changing it."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    root = tmp_path_factory.mktemp("models")
    return {"llama": save_model(make_llama(), root / "llama"), "gpt2": save_model(make_gpt2(), root / "gpt2")}


def make_pool(loaded: LoadedModel, num_blocks: int = 64, block_size: int = BLOCK_SIZE) -> PagedKV:
    shape = loaded.shape
    block_bytes = 2 * shape.num_layers * shape.num_kv_heads * block_size * shape.head_dim * loaded.dtype.itemsize
    plan = plan_pages(
        memory_bytes=num_blocks * block_bytes,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=block_size,
        itemsize=loaded.dtype.itemsize,
    )
    return PagedKV(plan, loaded.dtype, loaded.device)


@dataclass(frozen=True)
class Family:
    """One family's model twice: ours, and as transformers loads it, for what is right."""

    name: str
    path: Path
    loaded: LoadedModel
    plain: Any

    def plain_greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        output = self.plain.generate(
            ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )
        return [int(token) for token in output[0, len(prompt) :]]

    def make_kv(self, num_blocks: int = 64) -> PagedKV:
        return make_pool(self.loaded, num_blocks)

    def make_runner(self) -> TorchRunner:
        return TorchRunner(self.loaded, self.make_kv())


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Family:
    path = model_dirs[request.param]
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Family(request.param, path, load_model(source_of(path), dtype="float32"), plain.eval())


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{seed}/{length}").choices(range(VOCAB_SIZE - 1), k=length)


def prefill(
    runner: Runner, tokens: Sequence[int], table: Sequence[BlockId], chunk: int, start: int = 0
) -> torch.Tensor:
    """Compute `tokens` from `start` on in chunks; the logits of the last one, `[vocab_size]`."""
    logits = torch.empty(0)
    for begin in range(start, len(tokens), chunk):
        is_last = begin + chunk >= len(tokens)
        logits = runner.run([make_slice(tokens[begin : begin + chunk], begin, table, wants_logits=is_last)])
        assert logits.shape == (is_last, VOCAB_SIZE)
    return logits[0]


def continue_greedily(
    runner: Runner, prompt: Sequence[int], table: Sequence[BlockId], first: torch.Tensor, num_tokens: int
) -> list[int]:
    tokens = [int(first.argmax())]
    while len(tokens) < num_tokens:
        position = len(prompt) + len(tokens) - 1
        tokens.append(int(runner.run([make_slice(tokens[-1:], position, table)])[0].argmax()))
    return tokens


def scattered_table(num_tokens: int, seed: int, num_blocks: int = 64) -> list[BlockId]:
    """Blocks for `num_tokens`, at random places of the pool and in no order."""
    chosen = random.Random(seed).sample(range(num_blocks), -(-num_tokens // BLOCK_SIZE))
    return [BlockId(block) for block in chosen]


def make_slice(
    tokens: Sequence[int],
    start: int,
    table: Sequence[BlockId],
    *,
    wants_logits: bool = True,
    targets: Sequence[int] = (),
) -> Slice:
    return Slice(token_ids=tokens, start=start, block_table=table, wants_logits=wants_logits, targets=targets)


def scored_slice(prompt: Sequence[int], begin: int, end: int, table: Sequence[BlockId]) -> Slice:
    """Tokens `begin .. end` of a prompt all of whose tokens are scored."""
    targets = prompt[begin + 1 : end + 1]
    return make_slice(prompt[begin:end], begin, table, wants_logits=end == len(prompt), targets=targets)
