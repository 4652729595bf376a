"""Turn a loaded model into an OpenVINO graph, with a gap where its attention goes.

transformers' own model code is traced once with our attention at its attention interface, as in
`workers.attention`; here that attention is one opaque operator, which becomes a stand-in of the graph
(`workers.openvino_graph`). Nothing of the model is rewritten and no pattern is searched for, so a family is
carried if its attention needs nothing that OpenVINO's paged attention is not given: `FAMILIES`.

The graph takes the tokens of all slices as one flat row, as the torch runner does:

    input_ids, position_ids    [num_tokens] int64
    wanted                     [num_wanted] int64, rows whose logits are wanted

and returns logits [num_wanted, vocab_size] float32. Its attention adds the inputs that say where keys and values
are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AttentionInterface
from transformers.utils import logging as transformers_logging

from workers import openvino_graph
from workers.openvino_api import (
    ConversionExtension,
    FrontEndManager,
    TorchScriptPythonDecoder,
    ov,
)

if TYPE_CHECKING:
    from workers.loader import LoadedModel

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi"})
"""Those tested to compute what the torch runner does. The operator has no cap for scores (Gemma 2), and Falcon and
Bloom do not call the attention interface."""

_ATTENTION_NAME = "kvcache_openvino"
_OPERATOR = "kvcache::paged_attention"


def export(loaded: LoadedModel) -> ov.Model:
    """Trace and convert; takes about a second per hundred million parameters.

    Constants may be the memory of `loaded.model`'s weights, which must then outlive the graph: in float32 they are.
    `loaded.model` computes nothing meaningful while this runs, and is as before afterwards.
    Raises whatever tracing or converting raises: both are foreign code.
    """
    example = {"input_ids": torch.arange(5), "position_ids": torch.arange(5), "wanted": torch.tensor([1, 4])}
    with _prepared(loaded) as step, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every shape that becomes a constant
        decoder = TorchScriptPythonDecoder(step, example_input=example, trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    converter = _Converter()
    frontend.add_extension(ConversionExtension(_OPERATOR, converter))
    graph = ov.Model(frontend.convert(frontend.load(decoder)))
    converter.name_all()
    openvino_graph.widen(graph)
    return graph


@contextmanager
def _prepared(loaded: LoadedModel) -> Iterator[_Step]:
    """What to trace: the model with its attention, its rotary angles and the rows it projects exchanged."""
    model, body = loaded.model, loaded.model.base_model
    attention, rotary = model.config._attn_implementation, getattr(body, "rotary_emb", None)
    verbosity = transformers_logging.get_verbosity()
    # Tracing asks a model for all it has, and transformers warns of what a bare body has not: a loss.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    AttentionInterface.register(_ATTENTION_NAME, _traced_attention)
    model.set_attn_implementation(_ATTENTION_NAME)
    if rotary is not None:
        body.rotary_emb = _RotaryTable(rotary, loaded)
    step = _Step(loaded)
    projection: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = projection.register_forward_pre_hook(step.keep_wanted)
    try:
        yield step
    finally:
        hook.remove()
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
    """What is traced: one forward pass, and the vocabulary projection of the rows wanted.

    Every token is a sequence of one in a batch of all, so that the order of its heads' numbers is the same before
    and after the transpositions of the model's attention, which then cost nothing.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self._model = loaded.model
        self._wanted = torch.empty(0)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        self._wanted = wanted
        output = self._model(input_ids=input_ids.unsqueeze(1), position_ids=position_ids.unsqueeze(1), use_cache=False)
        return cast("torch.Tensor", output.logits).float()

    def keep_wanted(self, _projection: torch.nn.Module, states: tuple[torch.Tensor]) -> torch.Tensor:
        """The rows to project, of [num_tokens, 1, hidden_size]: a forward hook, because models take one set of
        rows for all sequences of a batch.

        As a matrix, so that the projection is the graph's last operator and writes its output. What comes after it
        copies all logits, in one thread: 3 ms of a step with 32 rows of 49,152.
        """
        return states[0][self._wanted].squeeze(1)


@torch.library.custom_op(_OPERATOR, mutates_args=())
def _paged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float, window: int
) -> torch.Tensor:
    """Stands in the trace for attention: the shapes are right, the numbers are nothing.

    query: [num_tokens, num_heads * head_dim]; key, value: [num_tokens, num_kv_heads * head_dim];
    window: how many keys a query sees, 0 for all. Returns the shape of `query`.
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
    sliding_window: int | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """The same place in the model as `workers.attention.paged_attention`: [num_tokens, num_heads, 1, head_dim] in."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    # Numbers and not `query.shape`, whose reading would be a part of the trace and of every step.
    num_heads, head_dim = (int(size) for size in (query.shape[1], query.shape[3]))
    rows = [states.reshape(-1, int(states.shape[1]) * head_dim) for states in (query, key, value)]
    # By its registered name, because a trace records registered operators and not Python functions.
    attend = torch.ops.kvcache.paged_attention
    output = attend(*rows, layer, float(scaling), sliding_window or 0)
    return output.reshape(-1, 1, num_heads, head_dim), None


class _Converter:
    """Makes a stand-in out of our operator; the frontend calls it once per layer, and renames what it gets."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, openvino_graph.Attention]] = []

    def __call__(self, context: Any) -> list[Any]:  # noqa: ANN401 (the frontend's own type)
        layer, scaling, window = (context.get_values_from_const_input(index) for index in (3, 4, 5))
        stand_in = openvino_graph.stand_in(*(context.get_input(index) for index in range(3)))
        attention = openvino_graph.Attention(layer=int(layer), scaling=float(scaling), window=int(window))
        self._made.append((stand_in, attention))
        return [stand_in.output(0)]

    def name_all(self) -> None:
        """Give the stand-ins the names that they are found by."""
        for node, attention in self._made:
            node.set_friendly_name(attention.name())
