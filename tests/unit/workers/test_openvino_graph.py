"""What is kept of an exported graph and done to it before it is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from workers.batch import BlockId
from workers.loader import load_model
from workers.runner import TorchRunner

from .conftest import Family, make_pool, make_slice, source_of, write_into

if TYPE_CHECKING:
    from workers.loader import LoadedModel
    from workers.openvino_cache import GraphKey
    from workers.openvino_runner import OpenVinoRunner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed; pip install -e '.[openvino]'"
)

PROMPT = list(range(3, 43))
TABLE = [BlockId(2), BlockId(0)]


def make_runner(loaded: LoadedModel, **options: Any) -> OpenVinoRunner:
    from workers.openvino_runner import OpenVinoRunner

    return OpenVinoRunner(loaded, make_pool(loaded, 8, 32), **{"threads": 1, **options})


def logits_of(runner: OpenVinoRunner) -> torch.Tensor:
    return runner.run([make_slice(PROMPT, 0, TABLE)])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model of every export there is."""
    from workers import openvino_export

    seen: list[str] = []
    export = openvino_export.export

    def note(loaded: LoadedModel) -> object:
        seen.append(loaded.name)
        return export(loaded)

    monkeypatch.setattr(openvino_export, "export", note)
    return seen


# --- the cache, which does not look into what it keeps: one family is as good as another ---

one_family = pytest.mark.parametrize("family", ["llama"], indirect=True)


def test_second_load_exports_nothing_and_computes_the_same(family: Family, tmp_path: Path, exports: list[str]) -> None:
    first, second = (make_runner(family.loaded, graphs=tmp_path / "graphs") for _ in range(2))
    assert len(exports) == 1
    assert not first.needs_weights
    assert torch.equal(logits_of(first), logits_of(second))
    assert torch.equal(logits_of(first), logits_of(make_runner(family.loaded)))


@pytest.mark.parametrize("option", ["weights", "dtype", "max_model_len", "model"])
def test_other_graph_is_another_entry(
    model_dirs: dict[str, Path], tmp_path: Path, exports: list[str], option: str
) -> None:
    source = source_of(model_dirs["llama"])
    make_runner(load_model(source, dtype="float32"), graphs=tmp_path)
    other = {
        "weights": lambda: make_runner(load_model(source, dtype="float32"), graphs=tmp_path, weights="int8"),
        "dtype": lambda: make_runner(load_model(source, dtype="bfloat16"), graphs=tmp_path),
        "max_model_len": lambda: make_runner(load_model(source, dtype="float32", max_model_len=64), graphs=tmp_path),
        "model": lambda: make_runner(load_model(source_of(model_dirs["gpt2"]), dtype="float32"), graphs=tmp_path),
    }
    other[option]()
    assert len(exports) == 2


@one_family
@pytest.mark.parametrize("file", ["graph.xml", "graph.bin", "sums.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_entry_that_is_not_as_it_was_written_is_a_miss_and_is_replaced(
    family: Family, tmp_path: Path, exports: list[str], file: str, harm: str
) -> None:
    right = logits_of(make_runner(family.loaded, graphs=tmp_path))
    (path,) = tmp_path.glob(f"*/{file}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    harms: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(data[: len(data) // 2]),
        "flipped": lambda: path.write_bytes(data),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
    }
    harms[harm]()
    for _ in range(2):
        assert torch.equal(logits_of(make_runner(family.loaded, graphs=tmp_path)), right)
    assert len(exports) == 2
    assert [entry.name[0] for entry in tmp_path.iterdir()].count(".") == 0


def test_weights_whose_file_was_written_into_before_they_were_exported_are_not_kept(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    from workers.openvino_runner import NotCarried

    folder = shutil.copytree(model_dirs["llama"], tmp_path / "llama")
    loaded = load_model(source_of(folder), dtype="float32")
    write_into(folder / "model.safetensors")
    with pytest.raises(NotCarried, match="was changed"):
        make_runner(loaded, graphs=tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


@one_family
def test_folder_that_cannot_be_written_only_costs_time(family: Family, tmp_path: Path, exports: list[str]) -> None:
    (tmp_path / "graphs").write_text("a file")
    for _ in range(2):
        runner = make_runner(family.loaded, graphs=tmp_path / "graphs")
        assert runner.needs_weights
        assert torch.equal(logits_of(runner), logits_of(make_runner(family.loaded)))
    assert len(exports) == 4


@one_family
def test_entry_of_a_worker_that_was_faster_is_replaced_by_one_as_good(family: Family, tmp_path: Path) -> None:
    """Both have missed; the second finds the first one's entry in the place of its own."""
    from workers import openvino_export
    from workers.openvino_cache import GraphCache

    def make_late() -> Any:
        GraphCache(tmp_path).fetch(key_of(), lambda: openvino_export.export(family.loaded))
        return openvino_export.export(family.loaded)

    _, is_on_disk = GraphCache(tmp_path).fetch(key_of(), make_late)
    assert is_on_disk
    assert [entry.name for entry in tmp_path.iterdir()] == [key_of().folder_name()]


@one_family
def test_entries_used_last_are_kept_and_those_of_other_models_left_alone(family: Family, tmp_path: Path) -> None:
    from workers import openvino_export
    from workers.openvino_cache import KEPT, GraphCache

    cache = GraphCache(tmp_path)
    keys = [key_of(max_model_len=length) for length in range(10, 10 + KEPT)]
    for age, key in enumerate([key_of(fingerprint="f" * 64), *reversed(keys)]):
        cache.fetch(key, lambda: openvino_export.export(family.loaded))
        os.utime(tmp_path / key.folder_name(), (age, age))
    cache.fetch(key_of(max_model_len=99), lambda: openvino_export.export(family.loaded))
    left = {entry.name for entry in tmp_path.iterdir()}
    expected = [key_of(fingerprint="f" * 64), *keys[:-1], key_of(max_model_len=99)]
    assert left == {key.folder_name() for key in expected}


def key_of(**facts: Any) -> GraphKey:
    from workers.openvino_cache import GraphKey

    usual = {"fingerprint": "a" * 64, "dtype": "float32", "weights": "auto", "max_model_len": 8, "versions": ("1",)}
    return GraphKey(**{**usual, **facts})


# --- what is done to a graph ---


def test_bfloat16_weights_become_float16_and_big_ones_stay(tmp_path: Path) -> None:
    from workers import openvino_graph
    from workers.openvino_api import opset13, ov

    states = opset13.parameter(ov.PartialShape([-1, 2]), ov.Type.f32)
    small, big = (
        ov.op.Constant(ov.Type.bf16, ov.Shape([2, 2]), [value, -0.5, 0.25, 3.0]) for value in (2.0**-14, 1e30)
    )
    inner = opset13.matmul(opset13.convert(states, "bf16"), small, False, True)
    graph = ov.Model([opset13.relu(opset13.matmul(inner, big, False, True))], [states])
    openvino_graph.widen(graph)
    constants = {node.get_element_type() for node in graph.get_ops() if node.get_type_name() == "Constant"}
    assert constants == {ov.Type.f16, ov.Type.bf16}
    kept = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    values = {float(node.get_data(dtype=np.float32).flat[0]) for node in kept}
    assert values == {2.0**-14, float(torch.tensor(1e30, dtype=torch.bfloat16))}


def test_bfloat16_logits_come_from_the_projection_as_float32_and_from_disk_as_well(
    model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rounded to bfloat16 nor copied; with every constant one of those that we write ourselves."""
    from workers import openvino_cache, openvino_export

    monkeypatch.setattr(openvino_cache, "_BIG", 0)
    loaded = load_model(source_of(model_dirs["llama"]), dtype="bfloat16")
    [result] = openvino_export.export(loaded).get_results()
    assert result.input_value(0).get_node().get_type_name() == "MatMul"
    logits = logits_of(make_runner(loaded))
    assert not torch.equal(logits, logits.bfloat16().float())
    for _ in range(2):
        assert torch.equal(logits_of(make_runner(loaded, graphs=tmp_path / "graphs")), logits)


@pytest.mark.parametrize("gate", ["swish", "gelu"])
def test_gated_units_are_hidden_from_a_compiler_with_one_thread(gate: str) -> None:
    from workers import openvino_graph
    from workers.openvino_api import opset13, ov

    states = opset13.parameter(ov.PartialShape([-1, 2]), ov.Type.f32)
    opened = opset13.swish(states) if gate == "swish" else opset13.gelu(states, "erf")
    graph = ov.Model([opset13.multiply(opened, states)], [states])
    if gate == "gelu":
        with pytest.raises(ValueError, match="two threads"):
            openvino_graph.part_gates(graph)
        return
    openvino_graph.part_gates(graph)
    (swish,) = (node for node in graph.get_ops() if node.get_type_name() == "Swish")
    assert swish.get_input_size() == 2


def test_graph_without_an_attention_for_every_layer_is_not_compiled(family: Family) -> None:
    from workers import openvino_export, openvino_graph
    from workers.openvino_api import ov

    graph = openvino_export.export(family.loaded)
    for node in graph.get_ops():
        if node.get_friendly_name().startswith("kvcache.attention/1/"):
            node.set_friendly_name("other")
    with pytest.raises(ValueError, match=r"attends in layers \[[02, ]*\], the model"):
        openvino_graph.attend(graph, family.loaded.shape, ov.Type.f32)


def rounded(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Each output's weights, whose inputs are along `dim`, as the nearest of 255 multiples of one scale."""
    scale = weight.abs().amax(dim=dim, keepdim=True) / 127
    return torch.round(weight / scale) * scale


def test_int8_weights_are_those_of_the_model_rounded(model_dirs: dict[str, Path], family: Family) -> None:
    """Against torch over a model whose linear layers were rounded by hand, the embedding not."""
    mine = logits_of(make_runner(family.loaded, weights="int8"))
    plain = logits_of(make_runner(family.loaded))
    by_hand = load_model(source_of(model_dirs[family.name]), dtype="float32")
    for module in by_hand.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(rounded(module.weight.detach(), 1))
        elif isinstance(module, Conv1D):
            module.weight = torch.nn.Parameter(rounded(module.weight.detach(), 0))
    right = TorchRunner(by_hand, make_pool(by_hand, 8, 32)).run([make_slice(PROMPT, 0, TABLE)])
    assert float((mine - right).abs().max()) < 1e-3 < float((mine - plain).abs().max())
