"""Turn one GGUF file into a Hugging Face folder of json and safetensors: `python -m workers.convert SRC DST`.

It runs in a process of its own (`kvcache.pull` starts it), so that its memory and its torch are gone
when it ends. transformers reads the file's metadata (config, tokenizer, chat template) and dequantises
the tensors; we put them into a model built from the config and save that, because transformers refuses
to save a model it loaded from GGUF as such. Weights are written as bfloat16: GGUF's 4 and 8 bit values
lose nothing that matters against their own quantisation, and the folder is half the size.

Progress goes to stdout, one stage name a line; exit code 1 and one line on stderr say what went wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bus.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

GGUF_MAGIC = b"GGUF"


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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    progress("dequantising")
    checkpoint = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
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
