"""Look at a model folder and decide whether to load it, before transformers does anything with it. No torch.

What is refused, each with its reason: weights other than safetensors (pickles run code), code that comes
with a model (`auto_map`), files that are missing, cut off or lie about themselves, configs that describe
a model larger than the weights beside them, and architectures whose attention this worker does not
compute. Which ones it does is `FAMILIES`, and nowhere else. Nothing of the folder is imported or executed.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from bus.errors import ModelUnavailable
from workers.safetensors_header import TensorEntry, read_header

MAX_JSON_BYTES = 64 << 20
"""Of a config or a shard index; real ones have kilobytes."""
MAX_DIMENSION = 1 << 24
DIGEST_CHUNK_BYTES = 16 << 20


class Special(enum.Enum):
    """What a config may ask of attention beyond a plain causal softmax. The value is what people call it."""

    WINDOWS = "sliding-window attention"
    SOFT_CAPS = "soft-capped logits"
    ALIBI = "ALiBi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a model family is served. All in the table equal `generate` token for token in float32.

    architecture: transformers' class. specials: what its configs may ask for; asked of another family it is
    refused, since that family's code would not do it. own_attention: its code attends by itself, in this
    implementation of transformers', and is given the pool as its cache (`workers.pool_cache`); None where it
    calls our attention (`workers.attention`).
    """

    architecture: str
    specials: frozenset[Special] = frozenset()
    own_attention: Literal["eager", "sdpa"] | None = None


_WINDOWS = frozenset({Special.WINDOWS})
_ALIBI = frozenset({Special.ALIBI})
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM", specials=_WINDOWS),
    "qwen2": Family(architecture="Qwen2ForCausalLM", specials=_WINDOWS),
    "qwen3": Family(architecture="Qwen3ForCausalLM", specials=_WINDOWS),
    "gemma2": Family(architecture="Gemma2ForCausalLM", specials=_WINDOWS | {Special.SOFT_CAPS}),
    "gpt2": Family(architecture="GPT2LMHeadModel"),
    "gpt_neox": Family(architecture="GPTNeoXForCausalLM"),
    "opt": Family(architecture="OPTForCausalLM"),
    "phi": Family(architecture="PhiForCausalLM"),
    # Not eager: that adds Falcon's ALiBi twice, as a bias and in the mask (transformers 5.23).
    "falcon": Family(architecture="FalconForCausalLM", specials=_ALIBI, own_attention="sdpa"),
    "bloom": Family(architecture="BloomForCausalLM", specials=_ALIBI, own_attention="eager"),
}
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
SOUND_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Those that turn a position by an angle of its own. `dynamic` and `longrope` turn it by the length of the
sequence too, so a cached key would be wrong once the sequence has grown."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DIMENSIONS = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
    "head_dim", "vocab_size", "intermediate_size", "n_inner", "max_position_embeddings", "n_positions",
    "ffn_dim", "word_embed_proj_dim", "query_pre_attn_scalar", "sliding_window", "num_kv_heads", "ffn_hidden_size",
    "n_embed", "seq_length",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder that passed. `tensors` are those of all shards together."""

    path: Path
    family: Family
    weight_files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]

    @property
    def num_elements(self) -> int:
        return sum(entry.num_elements for entry in self.tensors.values())


def inspect(path: Path) -> Checkpoint:
    """Check everything about a folder that can be checked without loading it.

    Raises ModelUnavailable with the first reason found against it.
    """
    config = _read_json(path / "config.json")
    family = check_config(config)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (path / name).exists():
            _refuse_code(_read_json(path / name), name)
    if (path / "adapter_config.json").exists():
        raise ModelUnavailable("the folder holds an adapter (adapter_config.json); merge it into its base model first")
    weight_files, tensors = _read_weights(path)
    num_layers = config.get("num_hidden_layers") or config.get("n_layer") or 1
    if num_layers > len(tensors):
        raise ModelUnavailable(f"config.json names {num_layers} layers, the weights have {len(tensors)} tensors in all")
    return Checkpoint(path=path, family=family, weight_files=weight_files, tensors=tensors)


def fingerprint(checkpoint: Checkpoint, report: Callable[[float], None] = lambda part: None) -> str:
    """sha256, as hex, over every byte of config.json and of each weight file, in order of file name.

    All that decides the values of keys and values, and so what may share a cache: two fine-tunes have the same
    headers, and two revisions of a model may have the same name. Not covered: the tokenizer (a block's digest is
    over token ids) and the dtype it is run in. Files are read in parallel, at about 1.5 GB/s a core, and are in the
    page cache for the load that follows. `report` hears, from any of those threads, which part (0 to 1) is done.
    """
    files = (checkpoint.path / "config.json", *sorted(checkpoint.weight_files))
    total = sum(file.stat().st_size for file in files)
    done, lock = 0, Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            report(done / total)

    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(lambda file: _file_digest(file, count), files))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _file_digest(path: Path, count: Callable[[int], None]) -> bytes:
    digest, chunk = hashlib.sha256(), bytearray(DIGEST_CHUNK_BYTES)
    with path.open("rb") as file:
        while size := file.readinto(chunk):
            digest.update(memoryview(chunk)[:size])
            count(size)
    return digest.digest()


def check_config(config: dict[str, Any]) -> Family:
    """The family of a model with this config.json. Raises ModelUnavailable for one that is not served."""
    _refuse_code(config, "config.json")
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelUnavailable(f"model_type {model_type!r:.80} is not served; served are: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if architectures is not None and architectures != [family.architecture]:
        raise ModelUnavailable(f"architectures {architectures!r:.80} is not {family.architecture}, a causal model")
    _refuse_attention(config, family)
    if config.get("quantization_config") is not None:
        raise ModelUnavailable("quantised weights are not served; use the checkpoint they were made from")
    for name in DIMENSIONS:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= MAX_DIMENSION):
            raise ModelUnavailable(f"config.json has {name} = {value!r:.80}; it must be an int in 1..{MAX_DIMENSION}")
    return family


def _refuse_code(config: dict[str, Any], name: str) -> None:
    if config.get("auto_map"):
        raise ModelUnavailable(f"{name} asks for code of its own (auto_map), and a model's code is never run")


def _refuse_attention(config: dict[str, Any], family: Family) -> None:
    """Attention that the family's code, or ours beneath it, would get wrong, by the name people know it by."""
    layer_types = config.get("layer_types") or []
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(layer_types, list) or not isinstance(rope, dict):
        raise ModelUnavailable("config.json: layer_types must be a list and rope_parameters an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    reasons = {special.value: special not in family.specials for special in _specials_of(config, layer_types)}
    reasons |= {
        f"layer_types other than {', '.join(sorted(LAYER_TYPES))}": any(
            not isinstance(kind, str) or kind not in LAYER_TYPES for kind in layer_types
        ),
        "attention to later tokens": bool(config.get("use_bidirectional_attention")),
        "cross-attention": bool(config.get("add_cross_attention") or config.get("is_encoder_decoder")),
        "products cut in slices (slow_but_exact)": bool(config.get("slow_but_exact")),
        f"rope type {rope_type!r:.40}": rope_type not in SOUND_ROPE_TYPES,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ModelUnavailable(f"the model uses {reason}, which this worker does not compute")


def _specials_of(config: dict[str, Any], layer_types: list[Any]) -> set[Special]:
    asked = {
        Special.WINDOWS: (config.get("sliding_window") is not None and config.get("use_sliding_window", True))
        or "sliding_attention" in layer_types,
        Special.SOFT_CAPS: config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"),
        Special.ALIBI: config.get("alibi") or config.get("position_embedding_type") == "alibi",
    }
    return {special for special, is_asked in asked.items() if is_asked}


def _read_weights(path: Path) -> tuple[tuple[Path, ...], dict[str, TensorEntry]]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return (single,), read_header(single)
    if not index.is_file():
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        found = f"; {pickled[0]} may run code when it is read, and is never loaded" if pickled else ""
        raise ModelUnavailable(f"there is no model.safetensors{found}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnavailable(f"{index.name} has no weight_map")
    shards = {name: _read_shard(path, name) for name in sorted({str(shard) for shard in weight_map.values()})}
    for tensor, shard in weight_map.items():
        if tensor not in shards[str(shard)]:
            raise ModelUnavailable(f"{index.name} promises tensor {tensor!r} in {shard}, which lacks it")
    tensors = {name: entry for entries in shards.values() for name, entry in entries.items()}
    return tuple(path / name for name in shards), tensors


def _read_shard(path: Path, name: str) -> dict[str, TensorEntry]:
    """Shard names come from a file, so they must be among the folder's own file names."""
    if name not in {file.name for file in path.glob("*.safetensors")}:
        raise ModelUnavailable(f"shard {name!r:.120} is missing from the folder")
    return read_header(path / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelUnavailable(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelUnavailable(f"there is no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{path.name} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{path.name} holds a {type(value).__name__}, not an object")
    return value
