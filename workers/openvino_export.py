"""Turn a loaded model into an OpenVINO graph whose attention works on block tables.

transformers' own model code is traced once with our attention at its attention interface, as in
`workers.attention`; here that attention is one opaque operator, and OpenVINO's PyTorch frontend puts its
`PagedAttentionExtension` in the operator's place. Nothing of the model is rewritten and no pattern is searched
for, so a family is carried if its attention needs nothing that the operator is not given: `FAMILIES`.

The graph takes the tokens of all slices as one flat row, as the torch runner does:

    input_ids, position_ids    [num_tokens] int64
    wanted                     [num_wanted] int64, rows whose logits are wanted
    past_lens                  [num_slices] int32, tokens of each slice that are in the pool already
    subsequence_begins         [num_slices + 1] int32, where each slice begins in the row
    block_indices              [num_blocks_used] int32, the block tables end to end
    block_indices_begins       [num_slices + 1] int32
    max_context_len            [] int32
    cache.0, cache.1, ...      [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], keys and values of each layer

and returns logits [num_wanted, vocab_size] float32. It is made anew at each load, which takes a second or two:
OpenVINO can write a graph with this operator to a file, but not read it back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.utils import logging as transformers_logging

from workers.openvino_api import (
    ConversionExtension,
    FrontEndManager,
    PagedAttentionExtension,
    TorchScriptPythonDecoder,
    opset13,
    ov,
)

if TYPE_CHECKING:
    from workers.loader import LoadedModel

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi"})
"""Those tested to compute what the torch runner does. The operator has no cap for scores (Gemma 2), and Falcon and
Bloom do not call the attention interface."""
BLOCK_SIZE = 32
"""Tokens per block, fixed by OpenVINO's CPU kernels."""
STEP_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len")

_ATTENTION_NAME = "kvcache_openvino"
_OPERATOR = "kvcache::paged_attention"
_SCALING_INPUT = 3 + 2 + len(STEP_INPUTS)


def export(loaded: LoadedModel) -> ov.Model:
    """Trace and convert; takes about a second per hundred million parameters, and no copy of the weights.

    The graph's constants are the memory of `loaded.model`'s weights, which must therefore outlive it.
    `loaded.model` computes nothing meaningful while this runs, and is as before afterwards.
    Raises whatever tracing or converting raises: both are foreign code.
    """
    with _prepared(loaded), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every shape that becomes a constant
        decoder = TorchScriptPythonDecoder(
            _Step(loaded), example_input=_example(loaded), trace_kwargs={"check_trace": False}
        )
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(ConversionExtension(_OPERATOR, _Converter(loaded)))
    graph = ov.Model(frontend.convert(frontend.load(decoder)))
    _name_caches(graph, loaded)
    return graph


@contextmanager
def _prepared(loaded: LoadedModel) -> Iterator[None]:
    """The model with its attention and its rotary angles exchanged for those to be traced."""
    model, body = loaded.model, loaded.model.base_model
    attention, rotary = model.config._attn_implementation, getattr(body, "rotary_emb", None)
    verbosity = transformers_logging.get_verbosity()
    # Tracing asks a model for all it has, and transformers warns of what a bare body has not: a loss.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    AttentionInterface.register(_ATTENTION_NAME, _traced_attention)
    model.set_attn_implementation(_ATTENTION_NAME)
    if rotary is not None:
        body.rotary_emb = _RotaryTable(rotary, loaded)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.set_attn_implementation(attention)
        if rotary is not None:
            body.rotary_emb = rotary


class _RotaryTable(torch.nn.Module):
    """The model's own cosines and sines of every position, looked up instead of computed.

    In bfloat16 OpenVINO would multiply positions in bfloat16 too, which cannot tell 257 from 256: the mean error of
    a key at position 1,500 of SmolLM2 was 30 times torch's. Angles depend on nothing but the position, because
    `workers.checkpoint` refuses those that do.
    """

    def __init__(self, rotary: torch.nn.Module, loaded: LoadedModel) -> None:
        super().__init__()
        dtype_of_angles = torch.empty(0, dtype=loaded.dtype)
        with torch.no_grad():
            cosines, sines = rotary(dtype_of_angles, torch.arange(loaded.shape.max_model_len).unsqueeze(0))
        self._cosines, self._sines = cosines[0], sines[0]

    def forward(self, _states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: [1, num_tokens]. Returns two of [1, num_tokens, rotary_dim] in the model's dtype."""
        return self._cosines[position_ids], self._sines[position_ids]


class _Step(torch.nn.Module):
    """What is traced: one forward pass over a flat row, and the vocabulary projection of the rows wanted."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self._model = loaded.model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        wanted: torch.Tensor,
        past_lens: torch.Tensor,
        subsequence_begins: torch.Tensor,
        block_indices: torch.Tensor,
        block_indices_begins: torch.Tensor,
        max_context_len: torch.Tensor,
        caches: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        step = (past_lens, subsequence_begins, block_indices, block_indices_begins, max_context_len)
        output = self._model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
            paged_step=(caches, step),
        )
        return cast("torch.Tensor", output.logits[0]).float()


@torch.library.custom_op(_OPERATOR, mutates_args=())
def _paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    past_lens: torch.Tensor,
    subsequence_begins: torch.Tensor,
    block_indices: torch.Tensor,
    block_indices_begins: torch.Tensor,
    max_context_len: torch.Tensor,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """Stands in the trace for OpenVINO's operator: the shapes are right, the numbers are nothing.

    query: [num_tokens, num_heads * head_dim]; key, value: [num_tokens, num_kv_heads * head_dim];
    keys, values: one layer's pool; window: how many keys a query sees, 0 for all. Returns the shape of `query`.
    """
    return torch.zeros_like(query)


def _traced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged_step: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
    sliding_window: int | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """The same place in the model as `workers.attention.paged_attention`, with the same shapes."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    caches, step = paged_step
    _, num_heads, num_tokens, head_dim = query.shape
    rows = [states[0].transpose(0, 1).reshape(num_tokens, -1) for states in (query, key, value)]
    # By its registered name, because a trace records registered operators and not Python functions.
    attend = torch.ops.kvcache.paged_attention
    output = attend(*rows, caches[2 * layer], caches[2 * layer + 1], *step, float(scaling), sliding_window or 0)
    return output.reshape(1, num_tokens, num_heads, head_dim), None


class _Converter:
    """Makes OpenVINO's operator out of ours; the frontend calls it once per layer."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._shape = loaded.shape

    def __call__(self, context: Any) -> list[Any]:  # noqa: ANN401 (the frontend's own type)
        *states_and_caches, max_context_len = (context.get_input(index) for index in range(_SCALING_INPUT))
        scaling = _constant(context.get_values_from_const_input(_SCALING_INPUT), np.float32)
        no_ints, no_floats, no_bytes = (_empty(kind) for kind in (np.int32, np.float32, np.uint8))
        zero = _constant(0, np.int32)
        inputs = [
            *states_and_caches,
            scaling,
            _constant(context.get_values_from_const_input(_SCALING_INPUT + 1), np.int32),  # sliding_window
            no_floats,  # alibi_slopes
            max_context_len,
            no_ints,  # score_aggregation_window
            *(no_ints, no_ints, no_floats),  # cache rotation: blocks, deltas, table
            *(no_floats, zero, zero),  # sparse attention: threshold, block size, stride
            no_floats,  # sinks
            *(zero, no_ints, no_ints, no_ints),  # eviction by diversity: start size, sizes, sets, their begins
            no_ints,  # token_type_ids
            *(no_bytes, no_ints),  # query-to-query bias, its begins
        ]
        node = PagedAttentionExtension(inputs)
        facts = node.get_rt_info()  # the CPU kernel takes the heads from here, not from the shapes
        for kind in ("k", "v"):
            facts[f"num_{kind}_heads"] = self._shape.num_kv_heads
            facts[f"{kind}_head_size"] = self._shape.head_dim
        return [node.output(0)]


def _constant(value: float, kind: type[np.generic]) -> Any:  # noqa: ANN401 (an OpenVINO output)
    return opset13.constant(np.array(value, dtype=kind)).output(0)


def _empty(kind: type[np.generic]) -> Any:  # noqa: ANN401 (as above)
    return opset13.constant(np.empty(0, dtype=kind)).output(0)


def _example(loaded: LoadedModel) -> dict[str, Any]:
    """Inputs to trace with: lengths that are no dimension of the model, so that none is taken for a constant."""
    shape, num_tokens = loaded.shape, 5
    caches = torch.zeros(2 * shape.num_layers, 1, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, dtype=loaded.dtype)
    begins = torch.tensor([0, num_tokens], dtype=torch.int32)
    step = (torch.zeros(1), begins, torch.zeros(1), torch.tensor([0, 1]), torch.tensor(num_tokens))
    return {
        "input_ids": torch.arange(num_tokens),
        "position_ids": torch.arange(num_tokens),
        "wanted": torch.tensor([1, 4]),
        **{name: tensor.int() for name, tensor in zip(STEP_INPUTS, step, strict=True)},
        "caches": tuple(caches),
    }


def _name_caches(graph: ov.Model, loaded: LoadedModel) -> None:
    """Give the pool's tensors, which a trace leaves nameless, their names and their shape."""
    shape = loaded.shape
    caches = graph.inputs[-2 * shape.num_layers :]
    for index, cache in enumerate(caches):
        cache.get_tensor().set_names({f"cache.{index}"})
        cache.get_node().set_partial_shape(ov.PartialShape([-1, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim]))
    graph.validate_nodes_and_infer_types()
