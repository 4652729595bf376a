"""Run a batch through OpenVINO on a CPU, with keys and values in our pool: two to four times torch's speed there.

The graph comes from `workers.openvino_export`; its caches are the pool's own memory, handed over once, so that
blocks, prefix sharing and readback are the same as with the torch runner. float32 is computed in float32 and
bfloat16 in bfloat16, and the pool holds the same dtype, never a quantised one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from workers import openvino_export, openvino_graph
from workers.batch import check_batch
from workers.openvino_api import opset13, ov
from workers.openvino_cache import GraphCache, GraphKey
from workers.openvino_inputs import StepInputs
from workers.runner import check_pool, release_model

if TYPE_CHECKING:
    from pathlib import Path

    from workers.batch import Batch
    from workers.loader import LoadedModel
    from workers.paged_kv import PagedKV
    from workers.runners import WeightsName

PRECISIONS = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}


class NotCarried(Exception):
    """OpenVINO, or this part of it, cannot run the model exactly; `str` says why. The torch runner can."""


class OpenVinoRunner:
    """One model over one pool, as `TorchRunner`, for a float32 or bfloat16 model on the CPU with blocks of 32.

    threads: of one step; None leaves it to OpenVINO, which takes every core. weights: in which they are multiplied,
    see `workers.openvino_graph.compress`. graphs: the folder that exported graphs are kept in, None for nowhere.
    Raises NotCarried.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: PagedKV,
        *,
        threads: int | None,
        weights: WeightsName = "auto",
        graphs: Path | None = None,
    ) -> None:
        check_pool(loaded, kv)
        _check_carried(loaded, kv)
        self.kv = kv
        self._max_len = loaded.shape.max_model_len
        graph, is_on_disk = _graph(loaded, weights, graphs)
        # Constants of a graph that is not on disk may be the model's memory, and OpenVINO does not hold on to it.
        self._weights = None if is_on_disk else loaded.model
        compiled = _compile(graph, loaded, threads)
        _check_caches(compiled, kv)
        self._request = compiled.create_infer_request()
        for index, cache in enumerate(_caches(kv)):
            self._request.set_tensor(f"cache.{index}", _share(cache))
        self._inputs = StepInputs(self._request, openvino_graph.BLOCK_SIZE)

    @property
    def needs_weights(self) -> bool:
        """Whether the loaded model's weights must stay in memory."""
        return self._weights is not None

    def run(self, batch: Batch) -> torch.Tensor:
        """One forward pass over every slice of the batch, as `workers.runners.Runner` has it.

        The logits are the request's own memory, overwritten by the next step.
        """
        check_batch(batch, max_model_len=self._max_len, block_size=self.kv.plan.block_size)
        num_wanted = self._inputs.write(batch)
        # No call of torch here, which would copy these rows with a thread pool of its own. Its threads wait for more
        # work by spinning, while OpenVINO's are about to compute on the same cores: 2 ms of a step of 18.
        logits = self._request.infer(share_outputs=True)[0]
        return torch.from_numpy(logits[:num_wanted])

    def close(self) -> None:
        """Give the memory of weights and pool back. It runs nothing any more."""
        del self._inputs, self._request, self.kv  # first, because they may use the weights' memory
        if self._weights is not None:
            release_model(self._weights)
        self._weights = None


def _check_carried(loaded: LoadedModel, kv: PagedKV) -> None:
    family, block_size = loaded.model.config.model_type, kv.plan.block_size
    if family not in openvino_export.FAMILIES:
        raise NotCarried(f"no model of family {family!r} runs on OpenVINO yet")
    if loaded.device.type != "cpu":
        raise NotCarried(f"OpenVINO runs on the CPU here, and the model is on {loaded.device}")
    if loaded.dtype not in PRECISIONS:
        raise NotCarried(f"OpenVINO runs float32 and bfloat16 here, not {loaded.dtype}")
    if kv.dtype is not loaded.dtype:
        raise NotCarried(f"OpenVINO keeps keys and values as the model computes them here, not as {kv.dtype}")
    if block_size != openvino_graph.BLOCK_SIZE:
        raise NotCarried(f"OpenVINO takes blocks of {openvino_graph.BLOCK_SIZE} tokens, not of {block_size}")


def _graph(loaded: LoadedModel, weights: WeightsName, folder: Path | None) -> tuple[ov.Model, bool]:
    """The exported graph, and whether it is on disk. Raises NotCarried, whatever exporting raises."""

    def make() -> ov.Model:
        loaded.files.take(loaded.model)
        graph = openvino_export.export(loaded)
        if weights == "int8":
            openvino_graph.compress(graph)
        return graph

    key = GraphKey(
        fingerprint=loaded.fingerprint,
        dtype=str(loaded.dtype),
        weights=weights,
        max_model_len=loaded.shape.max_model_len,
        versions=(ov.__version__, torch.__version__, transformers.__version__),
    )
    try:
        return (make(), False) if folder is None else GraphCache(folder).fetch(key, make)
    except Exception as error:
        raise NotCarried(f"OpenVINO {ov.__version__} cannot export it: {error}"[:500]) from error


def _compile(graph: ov.Model, loaded: LoadedModel, threads: int | None) -> ov.CompiledModel:
    """Raises NotCarried with the reason, whatever it is: compiling is foreign code."""
    precision = PRECISIONS[loaded.dtype]
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "PERFORMANCE_HINT": "LATENCY",
        # Several workers share a machine, and each would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
        # Or else, where weights are int8, what they are multiplied with would be rounded to int8 as well.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        openvino_graph.attend(graph, loaded.shape, precision)
        openvino_graph.keep_compressed(graph)
        core = ov.Core()
        if _num_threads(core, options) == 1:
            openvino_graph.part_gates(graph)
        return core.compile_model(graph, "CPU", options)
    except Exception as error:
        raise NotCarried(f"OpenVINO {ov.__version__} cannot compile it: {error}"[:500]) from error


def _num_threads(core: ov.Core, options: dict[str, Any]) -> int:
    """How many OpenVINO will really take, which only a compiled model knows."""
    nothing = opset13.parameter(ov.PartialShape([1]), ov.Type.f32)
    probe = core.compile_model(ov.Model([opset13.relu(nothing)], [nothing]), "CPU", options)
    return int(probe.get_property("INFERENCE_NUM_THREADS"))


def _check_caches(compiled: ov.CompiledModel, kv: PagedKV) -> None:
    """The compiled model decides the layout of its caches; one that is not the pool's must not be served."""
    for index, cache in enumerate(_caches(kv)):
        wanted = compiled.input(f"cache.{index}")
        fits = wanted.get_partial_shape().compatible(ov.PartialShape(list(cache.shape)))
        if not fits or wanted.get_element_type() != PRECISIONS[kv.dtype]:
            raise NotCarried(
                f"OpenVINO {ov.__version__} wants its cache as {wanted.get_partial_shape()} of "
                f"{wanted.get_element_type()}, not {tuple(cache.shape)} of {kv.dtype}"
            )


def _caches(kv: PagedKV) -> list[torch.Tensor]:
    """The pool's tensors in the order of the graph: keys and values of the first layer, of the second, ..."""
    return [cache for pair in zip(kv.keys, kv.values, strict=True) for cache in pair]


def _share(cache: torch.Tensor) -> ov.Tensor:
    """The same memory as an OpenVINO tensor. The caller keeps the pool alive."""
    bits = cache.view(torch.uint16) if cache.dtype is torch.bfloat16 else cache
    return ov.Tensor(bits.numpy(), ov.Shape(list(cache.shape)), PRECISIONS[cache.dtype])
