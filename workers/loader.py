"""Load a model folder into memory, or say in one typed error why not. The only place that builds a model.

Order matters: the folder is inspected first (`workers.checkpoint`), then the model is built without memory
to compare it with the weights, and only then is anything allocated. Whatever goes wrong ends as a
`ModelUnavailable` that names the model and leaves the process as it was, ready to serve others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bus.errors import ModelUnavailable
from workers import attention, checkpoint
from workers.weight_files import WeightFiles

if TYPE_CHECKING:
    from kvcache.models import ModelSource

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
BLOOM_TRAINED_LEN = 2048
"""Le Scao et al. 2022, table 3: of every size of Bloom."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAVED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The facts of a config that memory and limits follow from. `max_model_len` is in tokens."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, in evaluation mode, with our attention in it.

    eos_ids: the token ids that end a generation. fingerprint: see `workers.checkpoint.fingerprint`.
    has_own_attention: the model attends in its own code instead, see `workers.checkpoint.Family`.
    files: where the weights came from; whoever computes with them takes them out of these first.
    """

    name: str
    model: PreTrainedModel
    has_own_attention: bool
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    fingerprint: str
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    files: WeightFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What a model will take, from its config and the headers of its files. `weights_bytes` in the dtype it runs in."""

    shape: ModelShape
    dtype: torch.dtype
    weights_bytes: int


def measure_model(
    source: ModelSource,
    *,
    dtype: DTypeName = "auto",
    device: torch.device | None = None,
    max_model_len: int | None = None,
) -> MeasuredModel:
    """Look at a model as `load_model` does before it allocates anything. Raises ModelUnavailable, whatever is wrong."""
    with _refusals_named(source.name):
        found = checkpoint.inspect(source.path)
        config = _read_config(source.path)
        _check_size(config, found)
        chosen = choose_dtype(dtype, device or torch.device("cpu"), config.dtype)
        return MeasuredModel(
            shape=_shape_of(config, max_model_len),
            dtype=chosen,
            weights_bytes=found.num_elements * chosen.itemsize,
        )


def load_model(
    source: ModelSource,
    *,
    dtype: DTypeName = "auto",
    device: torch.device | None = None,
    max_model_len: int | None = None,
    report: Callable[[str, float], None] = lambda stage, progress: None,
) -> LoadedModel:
    """Load weights and tokenizer; takes seconds and the memory of the weights.

    dtype: `auto` is the checkpoint's own on a GPU; on a CPU bfloat16 where it multiplies that natively, else
    float32. max_model_len: a lower limit than the model's own, in tokens. report: hears what is being done, and which
    part of it (0 to 1) is done, 0 where that cannot be said.
    Raises ModelUnavailable, whatever is wrong.
    """
    with _refusals_named(source.name):
        return _load(source, dtype, device or torch.device("cpu"), max_model_len, report)


@contextmanager
def _refusals_named(name: str) -> Iterator[None]:
    try:
        yield
    except ModelUnavailable as error:
        raise ModelUnavailable(f"model {name!r} cannot be served: {error.message}") from error
    # A folder is foreign input to foreign code, which raises anything; KeyboardInterrupt and the like pass.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelUnavailable(f"model {name!r} cannot be served: {reason[:500]}") from error


def _read_config(path: Path) -> Any:  # noqa: ANN401 (any family's config)
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _load(
    source: ModelSource,
    dtype_name: str,
    device: torch.device,
    max_model_len: int | None,
    report: Callable[[str, float], None],
) -> LoadedModel:
    report("inspecting files", 0.0)
    found = checkpoint.inspect(source.path)
    files = WeightFiles((found.path / "config.json", *found.weight_files))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    attention.register()
    config = _read_config(source.path)
    _check_size(config, found)
    dtype = choose_dtype(dtype_name, device, config.dtype)
    tokenizer = cast(
        "PreTrainedTokenizerBase",
        AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False),
    )
    fingerprint = checkpoint.fingerprint(found, lambda part: report("checking weights", part))
    report("reading weights", 0.0)
    model = _load_weights(found, config, dtype)
    model.to(device).eval()  # type: ignore[arg-type]
    files.check()
    saved = {SAVED_DTYPES.get(entry.dtype) for entry in found.tensors.values()}
    files.are_mapped = device.type == "cpu" and dtype in saved
    shape = _shape_of(config, max_model_len)
    return LoadedModel(
        name=source.name,
        model=model,
        has_own_attention=found.family.own_attention is not None,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer, shape.vocab_size),
        fingerprint=fingerprint,
        shape=shape,
        dtype=dtype,
        device=device,
        files=files,
    )


def choose_dtype(name: str, device: torch.device, of_checkpoint: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in; see `load_model`. Raises ModelUnavailable for a name it does not know."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ModelUnavailable(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    return of_checkpoint if of_checkpoint is not None and of_checkpoint in DTYPES.values() else torch.bfloat16


def _cpu_multiplies_bfloat16() -> bool:
    """False where this torch cannot say (the question is new in 2.10)."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    features: dict[str, bool] = ask()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def _check_size(config: Any, found: checkpoint.Checkpoint) -> None:  # noqa: ANN401 (any family's config)
    """A config may not call for more parameters than the weights hold, or loading would allocate on its word."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > found.num_elements:
        raise ModelUnavailable(f"config.json describes {wanted} parameters, the weights hold {found.num_elements}")


def _load_weights(found: checkpoint.Checkpoint, config: Any, dtype: torch.dtype) -> PreTrainedModel:  # noqa: ANN401
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation=found.family.own_attention or attention.ATTENTION_NAME,
        output_loading_info=True,
    )
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            first = sorted(map(str, report[problem]))[0]
            raise ModelUnavailable(f"the weights do not fit config.json: {problem} {first} and others")
    return cast("PreTrainedModel", model)


def _shape_of(config: Any, max_model_len: int | None) -> ModelShape:  # noqa: ANN401
    own_len = _own_len(config)
    if max_model_len is not None and not 0 < max_model_len <= own_len:
        raise ModelUnavailable(
            f"max_model_len {max_model_len} is not in 1..{own_len}, the positions it was trained for"
        )
    num_heads = int(config.num_attention_heads)
    return ModelShape(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        vocab_size=int(config.vocab_size),
        max_model_len=max_model_len or own_len,
    )


def _own_len(config: Any) -> int:  # noqa: ANN401
    """In tokens. Bloom has no field for it, since ALiBi needs none; its files say how long it was trained."""
    for name in ("max_position_embeddings", "seq_length"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return BLOOM_TRAINED_LEN


def _num_kv_heads(config: Any, num_heads: int) -> int:  # noqa: ANN401
    """Of what goes to the cache: Falcon has one KV head, or else repeats them for every head before that."""
    if config.model_type == "falcon":
        return 1 if config.multi_query and not config.new_decoder_architecture else num_heads
    return int(getattr(config, "num_key_value_heads", None) or num_heads)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> frozenset[int]:
    """As `generate` takes them: the generation config's, and where it has none, the config's or the tokenizer's."""
    generation: Any = model.generation_config
    for candidate in (generation.eos_token_id, getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        if candidate is not None:
            ids = [candidate] if isinstance(candidate, int) else list(candidate)
            return frozenset(token for token in ids if 0 <= token < vocab_size)
    return frozenset()
