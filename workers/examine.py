"""`python -m workers.examine`: what torch, OpenVINO and a model's files are worth here, as one line of JSON.

For `kvcache doctor`, which must not load torch itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from bus.errors import KVCacheError
from kvcache.checkup import Examination, ExaminedModel
from kvcache.models import ModelKind, ModelSource
from workers.loader import load_model, measure_model


def examine(source: ModelSource | None, *, load: bool) -> Examination:
    """Devices, and the model if there is one; `load`: also load its weights and tokenizer."""
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    openvino, devices, openvino_error = _openvino()
    model: ExaminedModel | None = None
    model_error = ""
    if source is not None:
        try:
            model = _examine_model(source, load=load)
        except KVCacheError as error:
            model_error = str(error)
    return Examination(
        torch=str(torch.__version__),
        gpus=gpus,
        openvino=openvino,
        openvino_devices=devices,
        openvino_error=openvino_error,
        model=model,
        model_error=model_error,
    )


def _examine_model(source: ModelSource, *, load: bool) -> ExaminedModel:
    """Raises ModelUnavailable."""
    measured = measure_model(source)
    if load:
        load_model(source)
    return ExaminedModel(
        dtype=str(measured.dtype).removeprefix("torch."),
        weights_bytes=measured.weights_bytes,
        max_model_len=measured.shape.max_model_len,
        is_loaded=load,
    )


def _openvino() -> tuple[str, tuple[str, ...], str]:
    """Its version, its devices, and why it cannot be used; all empty if it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return "", (), ""
    try:
        ov: Any = importlib.import_module("workers.openvino_api").ov
        return ov.__version__, tuple(ov.Core().available_devices), ""
    except Exception as error:  # noqa: BLE001  # an optional package may be broken in any way, which is what is asked
        return "", (), f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.examine")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("name", nargs="?")
    parser.add_argument("path", nargs="?", type=Path)
    given = parser.parse_args(argv)
    source: ModelSource | None = None
    if given.name is not None:
        source = ModelSource(name=given.name, kind=ModelKind.FOLDER, path=given.path, is_present=True)
    sys.stdout.write(msgspec.json.encode(examine(source, load=given.load)).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
