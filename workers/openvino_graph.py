"""What happens to a model's graph between its export and its compilation. Graphs are changed in place.

An exported graph has a stand-in for the attention of each layer, an operator of OpenVINO's standard set whose name
says what belongs there: a graph with the real one, `PagedAttentionExtension`, can be written to a file but not read
back. `attend` puts it in, with its inputs:

    past_lens                  [num_slices] int32, tokens of each slice that are in the pool already
    subsequence_begins         [num_slices + 1] int32, where each slice begins in the row of tokens
    block_indices              [num_blocks_used] int32, the block tables end to end
    block_indices_begins       [num_slices + 1] int32
    max_context_len            [] int32
    cache.0, cache.1, ...      [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], keys and values of each layer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.openvino_api import PagedAttentionExtension, opset13, ov

if TYPE_CHECKING:
    from workers.loader import ModelShape

BLOCK_SIZE = 32
"""Tokens per block, fixed by OpenVINO's CPU kernels."""
STEP_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len")

_NAME = "kvcache.attention"
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention. window: how many keys a query sees, 0 for all."""

    layer: int
    scaling: float
    window: int

    def name(self) -> str:
        return f"{_NAME}/{self.layer}/{self.scaling!r}/{self.window}"

    @classmethod
    def from_name(cls, name: str) -> Attention | None:
        """None if it is not the name of a stand-in."""
        kind, *facts = name.split("/")
        if kind != _NAME:
            return None
        return cls(layer=int(facts[0]), scaling=float(facts[1]), window=int(facts[2]))


def stand_in(query: Any, key: Any, value: Any) -> Any:  # noqa: ANN401 (OpenVINO's own types, which are untyped)
    """A node that has the inputs of an attention; to be given its name."""
    return opset13.concat([query, key, value], axis=1)


def attend(graph: ov.Model, shape: ModelShape, precision: Any) -> None:  # noqa: ANN401
    """Put paged attention in the place of every stand-in, over caches of `precision`.

    Raises ValueError if there is not one stand-in for each layer.
    """
    found = {}
    for node in graph.get_ops():
        if (attention := Attention.from_name(node.get_friendly_name())) is not None:
            found[attention.layer] = (node, attention)
    if sorted(found) != list(range(shape.num_layers)):
        raise ValueError(f"the graph attends in layers {sorted(found)}, the model in {shape.num_layers} of them")
    step = [_parameter(name, [] if name == "max_context_len" else [-1], ov.Type.i32) for name in STEP_INPUTS]
    size = [-1, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim]
    caches = [_parameter(f"cache.{index}", size, precision) for index in range(2 * shape.num_layers)]
    for layer, (node, attention) in found.items():
        states = [node.input_value(index) for index in range(3)]
        given = [parameter.output(0) for parameter in (*caches[2 * layer : 2 * layer + 2], *step)]
        operator = _paged_attention([*states, *given], attention)
        facts = operator.get_rt_info()  # the CPU kernel takes the heads from here, not from the shapes
        for kind in ("k", "v"):
            facts[f"num_{kind}_heads"] = shape.num_kv_heads
            facts[f"{kind}_head_size"] = shape.head_dim
        node.output(0).replace(operator.output(0))
    graph.add_parameters([*step, *caches])
    graph.validate_nodes_and_infer_types()


def widen(graph: ov.Model) -> None:
    """Write a bfloat16 graph as one of float32 over weights of float16.

    The precision of a step is the compiler's business (INFERENCE_PRECISION_HINT), and the patterns by which it
    finds rotary embeddings and gated linear units are written for this: a graph of bfloat16 was a quarter slower at
    one stream, for lack of them, and no closer to float32. Every bfloat16 from 2**-14 to 2**15 is a float16, so
    nothing is lost; a smaller one is rounded by 2**-25 at most, and constants with a larger one stay bfloat16.

    So do the weights of the vocabulary projection. With weights of float16 its kernel writes bfloat16, which then is
    copied to float32 in one thread; with those of bfloat16 it writes float32, not rounded and not copied.
    """
    projections = [node.get_friendly_name() for node in _projected_by(graph)]
    for node in graph.get_ops():
        if node.get_output_size() != 1 or node.get_output_element_type(0) != ov.Type.bf16:
            continue
        if node.get_type_name() == "Constant":
            readers = node.output(0).get_target_inputs()
            is_projection = node.get_friendly_name() in projections
            wide = opset13.convert(node if is_projection else _as_float16(node), "f32")
            for reader in readers:
                reader.replace_source_output(wide.output(0))
        elif node.get_type_name() == "Convert":
            node.output(0).replace(opset13.convert(node.input_value(0), "f32").output(0))
    graph.validate_nodes_and_infer_types()
    _drop_idle_converts(graph)


def compress(graph: ov.Model) -> None:
    """Write the weights of every matrix product in int8, each output's with a scale of its own.

    Symmetric rounding to nearest: off by half a scale at most, which is 1/254 of the output's largest weight.
    """
    for node in graph.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input_value(1).get_node()
        constant = source.input_value(0).get_node() if source.get_type_name() == "Convert" else source
        if constant.get_type_name() != "Constant" or len(constant.get_output_shape(0)) != 2:
            continue
        values = constant.get_data(dtype=np.float32)
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        scales = np.maximum(np.abs(values).max(axis=axis, keepdims=True) / 127, np.finfo(np.float32).tiny)
        bytes_ = opset13.constant(np.rint(values / scales).astype(np.int8))
        wide = opset13.multiply(opset13.convert(bytes_, "f32"), opset13.constant(scales.astype(np.float32)))
        node.input(1).replace_source_output(wide.output(0))
    graph.validate_nodes_and_infer_types()


def keep_compressed(graph: ov.Model) -> None:
    """Have the compiler take weights of 16 bits as they are, and not make float32 of them first."""
    for node in graph.get_ops():
        if node.get_type_name() != "Convert":
            continue
        source = node.input_value(0).get_node()
        if source.get_type_name() == "Constant" and source.get_output_element_type(0) in (ov.Type.f16, ov.Type.bf16):
            node.get_rt_info()["decompression_0"] = True


def part_gates(graph: ov.Model) -> None:
    """Hide gated linear units from the compiler: what it makes of them divides by half the number of threads.

    With one thread that is a division by zero, which ends the process (2026.4). A gate that states its factor, 1,
    computes the same and is not what it looks for. Raises ValueError for a gate that has no factor to state.
    """
    for node in graph.get_ops():
        if node.get_type_name() == "Swish":
            one = opset13.constant(np.array(1, dtype=np.float32))
            node.output(0).replace(opset13.swish(node.input_value(0), one).output(0))
        elif node.get_type_name() == "Gelu" and any(
            reader.get_node().get_type_name() == "Multiply" for reader in node.output(0).get_target_inputs()
        ):
            raise ValueError("units gated by GELU need two threads or more")
    graph.validate_nodes_and_infer_types()


def _projected_by(graph: ov.Model) -> list[Any]:
    """The constants that the last matrix product before each output multiplies with."""
    found = []
    for result in graph.get_results():
        node = result.input_value(0).get_node()
        while node.get_type_name() == "Convert":
            node = node.input_value(0).get_node()
        if node.get_type_name() == "MatMul":
            found.append(node.input_value(1).get_node())
    return found


def _drop_idle_converts(graph: ov.Model) -> None:
    """Take out conversions to what their input is already.

    Between the last matrix product and the output one has the compiler compute logits in bfloat16 and copy them to
    float32 afterwards, where it would otherwise let the product write float32: rounded for nothing, and slower.
    """
    for node in graph.get_ops():
        if node.get_type_name() == "Convert" and node.get_input_element_type(0) == node.get_output_element_type(0):
            node.output(0).replace(node.input_value(0))


def _parameter(name: str, shape: list[int], kind: Any) -> Any:  # noqa: ANN401
    parameter = opset13.parameter(ov.PartialShape(shape), kind)
    parameter.set_friendly_name(name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _paged_attention(inputs: list[Any], attention: Attention) -> Any:  # noqa: ANN401
    """The operator with none of what we do not use. inputs: query, key, value, both caches, `STEP_INPUTS`."""
    *states_and_step, max_context_len = inputs
    no_ints, no_floats, no_bytes = (_constant([], kind) for kind in (np.int32, np.float32, np.uint8))
    zero = _constant(0, np.int32)
    return PagedAttentionExtension(
        [
            *states_and_step,
            _constant(attention.scaling, np.float32),
            _constant(attention.window, np.int32),
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
    )


def _constant(value: float | list[int], kind: type[np.generic]) -> Any:  # noqa: ANN401
    return opset13.constant(np.array(value, dtype=kind)).output(0)


def _as_float16(constant: Any) -> Any:  # noqa: ANN401
    values = constant.get_data(dtype=np.float32)
    if values.size and np.abs(values).max() > _FLOAT16_MAX:
        return constant
    return opset13.constant(values.astype(np.float16))
