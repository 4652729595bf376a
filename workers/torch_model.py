"""A model in torch, as the engine knows models: loaded weights, its pool, its tokenizer, and how it draws.

The one place that joins `loader`, `paged_kv`, `runners`, `sampling` and `text`. What it hands on are numbers and
buffers, never tensors.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from bus.errors import BadArgument, ModelNotFound, ModelUnavailable
from bus.limits import MAX_PROMPT_BYTES
from bus.messages import PromptKind
from bus.tensors import TensorMeta, dtype_by_name
from kvcache.allocator import give_back_freed_memory
from kvcache.hashing import TOKEN_BYTES
from kvcache.models import BUILT_IN, MAX_NAME_CHARS, ModelRegistry, ModelSource
from kvcache.pull import pull
from workers import sampling
from workers.attention_choice import AttentionName
from workers.batch import Batch, BlockId, Draw, Outcome
from workers.engine_api import ReadResult
from workers.kv_precision import AUTO, is_scaled, kv_dtype, name_of
from workers.loader import DTypeName, LoadedModel, ModelShape, load_model, measure_model
from workers.loading import Report
from workers.model import ModelFacts
from workers.model_budget import ModelNeed
from workers.page_plan import PagePlan, plan_pages
from workers.paged_kv import PagedKV
from workers.runner import release_model
from workers.runners import Chosen, RunnerName, WeightsName, choose_runner
from workers.staging import to_host
from workers.text import TextStream, Tokenizer


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat prompt on the wire, which is a JSON list of these, or a `ChatPrompt`."""

    role: str
    content: str
    name: str = ""
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str = ""


class ChatPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chat prompt with more than messages: `tools` are shown to the model as its template has it."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] = []


KV_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.125,
    torch.float16: 0.02,
    torch.int8: 0.25,
    torch.float8_e4m3fn: 0.4,
}
"""By what KV is computed in or kept in, whichever rounds more: four times and more what SmolLM2 (30 layers) differs by
when it computes the same tokens in pieces of other lengths (2e-6, 0.03 and 0.005, and in bfloat16 kept in 8 bits 0.05
and 0.09, since a number at the edge of a code may fall to either side); unrelated blocks differ by 1 and more."""
MAX_POOL_BYTES = 1 << 50
"""More than any flag allows: for asking how large a block is."""

_chat = msgspec.json.Decoder(list[ChatMessage] | ChatPrompt)


class TorchModel:
    """One loaded model over its own pool. `encode` and `spell` belong to one thread, what `open_text` returns to
    another, and all that touches the pool to a third."""

    def __init__(self, loaded: LoadedModel, kv: PagedKV, chosen: Chosen) -> None:
        shape = loaded.shape
        self.facts = ModelFacts(
            name=loaded.name,
            fingerprint=loaded.fingerprint,
            dtype=str(loaded.dtype).removeprefix("torch."),
            kv_dtype=name_of(kv.dtype),
            device=str(loaded.device),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            max_model_len=shape.max_model_len,
            eos_ids=loaded.eos_ids,
            num_blocks=kv.plan.num_blocks,
            block_size=kv.plan.block_size,
            block_bytes=kv.plan.block_bytes,
            kv_tolerance=max(KV_TOLERANCE[loaded.dtype], KV_TOLERANCE[kv.dtype]),
            runner=chosen.name,
            runner_reason=chosen.reason,
            attention=chosen.attention,
            attention_reason=chosen.attention_reason,
        )
        self._kv = kv
        self._runner = chosen.runner
        # Two threads, two tokenizers: some calls of the fast ones change settings, and fail while another runs.
        self._tokenizer, self._decoder = (
            Tokenizer(inner, vocab_size=shape.vocab_size, max_prompt_bytes=MAX_PROMPT_BYTES)
            for inner in (loaded.tokenizer, deepcopy(loaded.tokenizer))
        )
        self._dtype = dtype_by_name(self.facts.dtype)

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt as it came: utf-8, `<u4`, or JSON messages. Raises as `Tokenizer` does."""
        if kind is PromptKind.TOKENS:
            return tuple(self._token_ids(prompt))
        try:
            text = prompt.decode()
        except UnicodeDecodeError as error:
            raise BadArgument(f"the prompt is not utf-8: {error.reason} at byte {error.start}") from None
        if kind is PromptKind.TEXT:
            return tuple(self._tokenizer.encode(text, special=special))
        try:
            chat = _chat.decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadArgument(f"messages must be a list of objects with role and content: {error}") from None
        messages, tools = (chat.messages, chat.tools) if isinstance(chat, ChatPrompt) else (chat, [])
        return tuple(self._tokenizer.encode_chat([msgspec.to_builtins(message) for message in messages], tools))

    def spell(self, tokens: bytes, each: bool) -> tuple[str, ...]:
        token_ids = self._token_ids(tokens)
        return tuple(map(self._tokenizer.spell, ([token_id] for token_id in token_ids) if each else [token_ids]))

    def _token_ids(self, data: bytes) -> list[int]:
        if len(data) % TOKEN_BYTES:
            raise BadArgument(f"token ids are {len(data)} bytes, not a whole number of u32")
        return self._tokenizer.check_ids(np.frombuffer(data, "<u4").tolist())

    def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        return TextStream(self._decoder, stops, min_tokens)

    @torch.inference_mode()
    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        """One step; what came of each slice."""
        return sampling.results(self._runner.run(batch), batch, draws)

    def difference(self, one: BlockId, other: BlockId) -> float:
        """How far the KV of two blocks differs, as a part of the largest number of its layer; see `PagedKV`."""
        return self._kv.difference(one, other)

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """Make each target block hold what its source holds; all are read before any is written."""
        self._kv.copy_blocks(sources, targets)

    def read(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> ReadResult:
        """Copy tokens `start .. stop` of one layer out of the pool, in the model's dtype; `length` is `stop`."""
        keys, values = self._kv.read(layer, block_table, start, stop)
        meta = TensorMeta(dtype=self._dtype, shape=tuple(keys.shape))
        return ReadResult(meta, meta, _buffer(keys), _buffer(values), stop)

    def read_blocks(self, blocks: Sequence[BlockId]) -> memoryview:
        return _buffer(self._kv.export_blocks(blocks))

    def write_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        self._kv.import_blocks(blocks, data)

    def close(self) -> None:
        """Give the memory of weights and pool back to the system. Nothing may be called any more, not even this."""
        self._runner.close()
        del self._runner, self._kv
        give_back_freed_memory()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How models of this worker are loaded. threads: of one step; None leaves it to the runner.

    kv_dtype: of the pool, `auto` or a name in `workers.kv_precision.KV_DTYPES`.
    """

    dtype: DTypeName
    device: str
    max_model_len: int | None
    block_size: int
    threads: int | None
    runner: RunnerName = "auto"
    kv_dtype: str = AUTO
    weights: WeightsName = "auto"
    attention: AttentionName = "auto"
    cuda_graphs: bool = False


class TorchModels:
    """The models a worker may serve. Raises BadArgument for a name at start that cannot be a model."""

    def __init__(self, home: Path, named: Sequence[str], options: LoadOptions) -> None:
        self._registry = ModelRegistry(home, named)
        self._options = options
        self._graphs = self._registry.home / "graphs"
        self._named = list(self._registry.named)

    def names(self) -> list[str]:
        return self._named or [source.name for source in self._registry.list_models() if source.is_present]

    def choose(self, name: str) -> str:
        """The name itself. An empty one is the first that was named at start; with none named, the built-in model if it
        is here, or the only one that is. Raises ModelNotFound, with the choices, where that leaves it open."""
        if name:
            return name
        names = self.names()
        built_in = [known for known in BUILT_IN if known in names]
        if self._named or built_in or len(names) == 1:
            return (self._named or built_in or names)[0]
        if not names:
            raise ModelNotFound(f"this worker has no model; run: kvcache models pull {next(iter(BUILT_IN))}")
        raise ModelNotFound(
            f"the request names no model, and this worker has several: {', '.join(names)}; name one of them, or start "
            "the worker with --model NAME"
        )

    def check(self, name: str) -> None:
        """Raise ModelNotFound or ModelUnavailable unless it can be tried to load. Named models exclude all others."""
        if self._named and name not in self._named:
            shown = name if len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]}..."
            raise ModelNotFound(f"no model named {shown!r}; this worker serves {', '.join(self._named)}")
        if not self._named:
            self._registry.resolve(name)

    def measure(self, name: str, report: Report) -> ModelNeed:
        """What it takes, from its files. A GGUF file is made a folder of first, which takes minutes if it is large."""
        options = self._options
        measured = measure_model(
            self._present(name, report),
            dtype=options.dtype,
            device=_device(options.device),
            max_model_len=options.max_model_len,
        )
        plan = self._plan(measured.shape, measured.dtype, MAX_POOL_BYTES)
        return ModelNeed(weights_bytes=measured.weights_bytes, block_bytes=plan.block_bytes)

    def load(self, name: str, pool_bytes: int, report: Report) -> TorchModel:
        """Load weights, tokenizer and a pool of `pool_bytes`. Raises ModelNotFound, ModelUnavailable or NoSpace."""
        options = self._options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        loaded = load_model(
            self._present(name, report),
            dtype=options.dtype,
            device=_device(options.device),
            max_model_len=options.max_model_len,
            report=report,
        )
        try:
            model = self._assemble(loaded, pool_bytes, report)
        except BaseException:
            release_model(loaded.model)
            raise
        # The million objects of torch and transformers are here to stay. Left to the garbage collector they cost
        # pauses of half a second, which is a lease, and seconds when the process ends.
        gc.freeze()
        return model

    def _present(self, name: str, report: Report) -> ModelSource:
        source = self._registry.find(name)
        if source.gguf is None:
            return self._registry.resolve(name)
        return pull(self._registry, name, lambda it: report(it.stage, it.done / it.total if it.total else 0.0))

    def _assemble(self, loaded: LoadedModel, pool_bytes: int, report: Report) -> TorchModel:
        options = self._options
        report("making room for KV", 0.0)
        plan = self._plan(loaded.shape, loaded.dtype, pool_bytes)
        kv = PagedKV(plan, kv_dtype(options.kv_dtype, loaded.dtype), loaded.device, loaded.dtype)
        report("preparing to run it", 0.0)
        chosen = choose_runner(
            options.runner,
            loaded,
            kv,
            threads=options.threads,
            weights=options.weights,
            attention=options.attention,
            cuda_graphs=options.cuda_graphs,
            graphs=self._graphs,
        )
        if options.weights != "auto":
            # Rounded weights compute other keys and values: another model, to whoever would share them.
            changed = f"{loaded.fingerprint}/{options.weights}"
            loaded = replace(loaded, fingerprint=hashlib.sha256(changed.encode()).hexdigest())
        model = TorchModel(loaded, kv, chosen)
        if not chosen.runner.needs_weights:
            release_model(loaded.model)  # frees them, whoever still holds the model
            give_back_freed_memory()
        return model

    def _plan(self, shape: ModelShape, dtype: torch.dtype, memory_bytes: int) -> PagePlan:
        """For a model that computes in `dtype`."""
        kept_in = kv_dtype(self._options.kv_dtype, dtype)
        return plan_pages(
            memory_bytes=memory_bytes,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=self._options.block_size,
            itemsize=kept_in.itemsize,
            scale_bytes=dtype.itemsize if is_scaled(kept_in) else 0,
        )


def _buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the host and in C order."""
    flat = to_host(tensor).reshape(-1).view(torch.uint8)
    return flat.numpy().data.toreadonly()


def _device(name: str) -> torch.device:
    """Raises ModelUnavailable for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelUnavailable(f"device {name!r} is not known to torch: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailable(f"device {name!r} was asked for, and torch finds no GPU here")
    return device
