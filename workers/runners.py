"""Choose how a model is run: through torch, which runs everything, or OpenVINO, which is faster on a CPU.

Whichever it is, the pool is the same and so is what it holds. OpenVINO is an extra (setup.cfg): where it is
not installed, or does not carry a model, `auto` means torch, and the figures say why.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bus.errors import ModelUnavailable
from workers.attention_choice import choose_attention
from workers.runner import TorchRunner

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from workers.attention_choice import AttentionName
    from workers.batch import Batch
    from workers.loader import LoadedModel
    from workers.paged_kv import PagedKV

log = logging.getLogger(__name__)

RunnerName = Literal["auto", "torch", "openvino"]
WeightsName = Literal["auto", "int8"]


class Runner(Protocol):
    """One model over one pool. Call it from one thread at a time."""

    @property
    def needs_weights(self) -> bool:
        """Whether it computes with the loaded model's weights, or else has its own."""

    def run(self, batch: Batch) -> torch.Tensor:
        """One forward pass: logits `[num_wanted, vocab_size]` float32, which hold until the next one.

        See `TorchRunner.run`."""

    def close(self) -> None:
        """Give the memory of weights and pool back. It runs nothing any more."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A runner, its name, and why it is not the faster one where that was thinkable.

    attention: how torch's computes it, see `workers.attention_choice`; OpenVINO's has its own. attention_reason: as for
    the runner.
    """

    runner: Runner
    name: str
    reason: str = ""
    attention: str = ""
    attention_reason: str = ""


def choose_runner(
    choice: RunnerName,
    loaded: LoadedModel,
    kv: PagedKV,
    *,
    threads: int | None,
    weights: WeightsName = "auto",
    attention: AttentionName = "auto",
    cuda_graphs: bool = False,
    graphs: Path | None = None,
) -> Chosen:
    """The runner that `choice` means for this model; `auto` is OpenVINO on a CPU where it can be.

    threads: of one step; None leaves it to the runner. weights: `auto` are the model's own, `int8` are OpenVINO's
    only. attention, cuda_graphs: of the torch runner, which `auto` means if an attention is asked for. graphs: the
    folder where OpenVINO's runner keeps what it has exported.
    Making one may take seconds. Raises ModelUnavailable if `openvino`, or int8 weights, were asked for and are not
    to be had.
    """
    is_compressed = weights != "auto"
    is_torchs = loaded.device.type != "cpu" or attention != "auto"
    is_out_of_question = choice == "torch" or (choice == "auto" and is_torchs)
    if is_out_of_question and not is_compressed:
        return _torch_runner(loaded, kv, attention, cuda_graphs)
    try:
        if is_out_of_question:
            raise _NotToBeHad("it was not asked for, and torch runs a model's own weights only")
        return Chosen(_openvino_runner(loaded, kv, threads, weights, graphs), "openvino")
    except _NotToBeHad as error:
        if choice == "openvino":
            raise ModelUnavailable(f"model {loaded.name!r} cannot run on OpenVINO: {error}") from error
        if is_compressed:
            raise ModelUnavailable(
                f"model {loaded.name!r} cannot have {weights} weights, which take OpenVINO: {error}"
            ) from error
        log.warning("model %s runs on torch, not OpenVINO: %s", loaded.name, error)
        return _torch_runner(loaded, kv, attention, cuda_graphs, str(error))


def _torch_runner(
    loaded: LoadedModel, kv: PagedKV, attention: AttentionName, cuda_graphs: bool, reason: str = ""
) -> Chosen:
    chosen = choose_attention(attention, loaded, kv, cuda_graphs=cuda_graphs)
    runner = TorchRunner(loaded, kv, chosen.plan_step, chosen.plan_decodes)
    return Chosen(runner, "torch", reason, attention=chosen.name, attention_reason=chosen.reason)


class _NotToBeHad(Exception):
    """`str` says why."""


def _openvino_runner(
    loaded: LoadedModel, kv: PagedKV, threads: int | None, weights: WeightsName, graphs: Path | None
) -> Runner:
    if importlib.util.find_spec("openvino") is None:
        raise _NotToBeHad("it is not installed; pip install -e '.[openvino]'")
    try:
        # Not at the top: it is optional, and takes a second to import.
        module: Any = importlib.import_module("workers.openvino_runner")
    except (ImportError, AttributeError) as error:
        raise _NotToBeHad(f"the OpenVINO that is installed is not the one we know: {error}") from error
    try:
        runner: Runner = module.OpenVinoRunner(loaded, kv, threads=threads, weights=weights, graphs=graphs)
    except module.NotCarried as error:
        raise _NotToBeHad(str(error)) from error
    return runner
