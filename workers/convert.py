"""Turn one GGUF file into a Hugging Face folder of json and safetensors: `python -m workers.convert SRC DST`.

It runs in a process of its own (`kvcache.pull` starts it), so that its memory and its torch are gone
when it ends. transformers reads the file's metadata (config, tokenizer, chat template) and dequantises
the tensors; we put them into a model built from the config and save that, because transformers refuses
to save a model it loaded from GGUF as such. Weights in float32 or float16 stay what they are. All others are written
as bfloat16: what 4 and 8 bit values lose by it is far below their own quantisation, and the folder is half the size.

A file that no worker would serve is refused before anything is allocated: another family, a config that calls for
more parameters than the file has, one of a model's several files.

Progress goes to stdout, one stage name a line; exit code 1 and one line on stderr say what went wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bus.errors import ModelUnavailable
from workers import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

GGUF_MAGIC = b"GGUF"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2")
"""Those of which it was tried that what is read says what was written."""
MAX_MISSING = 2
"""A file that describes more parameters than this times what it holds is not even begun with."""
KEPT_DTYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
"""The larger first: a file that has matrices of both is written in it."""


def convert(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Write `target` (config, generation config, tokenizer, chat template, one or more safetensors files).

    source: a GGUF file; no other file of its folder is read.
    target: a folder, made if it is missing; files in it with the same names are replaced.
    Raises ModelUnavailable if the file is no GGUF file, or lacks tensors that its own config calls for.
    """
    _check_magic(source)
    progress("reading metadata")
    place, file = str(source.parent), source.name
    config = AutoConfig.from_pretrained(place, gguf_file=file)
    found = _look_at_tensors(source)
    _complete(config)
    _check_config(config, found)
    model = AutoModelForCausalLM.from_config(config, dtype=found.dtype)  # type: ignore[no-untyped-call]
    progress("dequantising")
    checkpoint = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(source), return_tensors=True, model_to_load=model, torch_dtype=found.dtype
    )
    missing, _ = model.load_state_dict(checkpoint["tensors"], strict=False)
    model.tie_weights()
    absent = sorted(set(missing) - _tied_names(model))
    if absent:
        raise ModelUnavailable(f"{source.name} lacks {len(absent)} tensors of its own config, first {absent[0]!r}")
    progress("writing")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(target)


def _check_magic(source: Path) -> None:
    try:
        with source.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelUnavailable(f"cannot read {source}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelUnavailable(f"{source} is not a GGUF file: it starts with {magic!r}, not {GGUF_MAGIC!r}")


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a GGUF file holds: how many values, in how many tensors, and the dtype in which none of them loses much."""

    num_elements: int
    num_tensors: int
    dtype: torch.dtype


def _look_at_tensors(source: Path) -> _Tensors:
    reader = GGUFReader(source)
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise ModelUnavailable(
            f"{source.name} is one of {split.contents()} files of a model; join them with gguf-split"
        )
    _refuse_scaled_positions(reader)
    matrices = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    return _Tensors(
        num_elements=sum(int(tensor.n_elements) for tensor in reader.tensors),
        num_tensors=len(reader.tensors),
        dtype=next((dtype for kind, dtype in KEPT_DTYPES.items() if kind in matrices), torch.bfloat16),
    )


def _refuse_scaled_positions(reader: GGUFReader) -> None:
    """transformers 5.23 reads neither, and would turn positions by other angles than the model was trained with."""
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
    kinds = [field for field in reader.fields.values() if field.name.endswith(".rope.scaling.type")]
    scaled += [f"{field.name} = {field.contents()}" for field in kinds if field.contents() != "none"]
    if scaled:
        raise ModelUnavailable(
            f"the file scales its rotary positions ({scaled[0]}), which is not read from GGUF files; use the model's "
            "safetensors"
        )


def _complete(config: PretrainedConfig) -> None:
    """What a GGUF file leaves to whoever knows the model: Gemma 2 scales its queries by the width of a head, and its
    largest size, of 46 layers, by that of the hidden state per head (Gemma Team 2024, and llama.cpp)."""
    if config.model_type == "gemma2":
        is_largest = config.num_hidden_layers == 46
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if is_largest else config.head_dim


def _check_config(config: PretrainedConfig, found: _Tensors) -> None:
    """Refuse what no worker would serve, while it is only a description."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)  # how the file is packed; it is unpacked here
    checkpoint.check_config(fields)
    if config.model_type not in FAMILIES:
        raise ModelUnavailable(
            f"model_type {config.model_type!r} is served from safetensors, not from GGUF files; those are of "
            f"{', '.join(FAMILIES)}"
        )
    num_layers = fields.get("num_hidden_layers") or fields.get("n_layer") or 1
    if num_layers > found.num_tensors:
        raise ModelUnavailable(f"the file names {num_layers} layers and has {found.num_tensors} tensors in all")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > MAX_MISSING * found.num_elements:  # if a few are missing, their names are told later
        raise ModelUnavailable(f"the file describes {wanted} parameters and holds {found.num_elements}")


def _tied_names(model: torch.nn.Module) -> set[str]:
    """Parameters that share storage with another one under a different name, so that one copy on file is enough."""
    distinct = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - distinct


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        sys.stderr.write("usage: python -m workers.convert FILE.gguf TARGET_FOLDER\n")
        return 2

    def progress(stage: str) -> None:
        sys.stdout.write(f"{stage}\n")
        sys.stdout.flush()

    try:
        convert(Path(argv[0]), Path(argv[1]), progress)
    # The file is foreign input to foreign parsers, which raise anything; this is the process's outermost edge.
    except Exception as error:  # noqa: BLE001
        reason = str(error) if isinstance(error, ModelUnavailable) else f"{type(error).__name__}: {error}"
        sys.stderr.write(f"{reason}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
