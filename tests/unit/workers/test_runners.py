"""Which runner a model gets, and what is said when it is not the faster one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from bus.errors import ModelUnavailable
from workers.runner import TorchRunner
from workers.runners import choose_runner
from workers.torch_model import LoadOptions, TorchModels

from .conftest import Family, make_pool

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed; pip install 'kvcache[openvino]'"
)


def test_torch_is_taken_without_a_word_when_it_is_asked_for(family: Family) -> None:
    chosen = choose_runner("torch", family.loaded, make_pool(family.loaded, 8, 32), threads=1)
    assert isinstance(chosen.runner, TorchRunner)
    assert (chosen.name, chosen.reason) == ("torch", "")


def test_auto_is_torch_where_openvino_is_not_installed_and_says_so(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    chosen = choose_runner("auto", family.loaded, make_pool(family.loaded, 8, 32), threads=1)
    assert isinstance(chosen.runner, TorchRunner)
    assert chosen.name == "torch"
    assert "not installed" in chosen.reason


def test_openvino_that_is_asked_for_and_not_installed_is_an_error_that_says_how(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelUnavailable, match=r"kvcache\[openvino\]"):
        choose_runner("openvino", family.loaded, make_pool(family.loaded, 8, 32), threads=1)


@needs_openvino
def test_auto_is_openvino_on_a_cpu(family: Family) -> None:
    chosen = choose_runner("auto", family.loaded, make_pool(family.loaded, 8, 32), threads=1)
    assert (chosen.name, chosen.reason) == ("openvino", "")


@needs_openvino
def test_auto_is_torch_for_what_openvino_does_not_carry_and_says_what(family: Family) -> None:
    chosen = choose_runner("auto", family.loaded, make_pool(family.loaded, 8, 16), threads=1)
    assert chosen.name == "torch"
    assert "blocks of 32 tokens, not of 16" in chosen.reason


@needs_openvino
def test_family_that_openvino_does_not_carry_is_named(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.openvino_export.FAMILIES", frozenset({"other"}))
    with pytest.raises(ModelUnavailable, match=family.name):
        choose_runner("openvino", family.loaded, make_pool(family.loaded, 8, 32), threads=1)


@needs_openvino
def test_openvino_that_cannot_compile_the_model_leaves_it_to_torch(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_loaded: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("workers.openvino_export.export", refuse)
    chosen = choose_runner("auto", family.loaded, make_pool(family.loaded, 8, 32), threads=1)
    assert chosen.name == "torch"
    assert "no such operator" in chosen.reason


def test_figures_name_the_runner_and_why(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    options = LoadOptions(dtype="float32", device="cpu", max_model_len=None, block_size=4, threads=None, runner="auto")
    facts = TorchModels(tmp_path, [str(model_dirs["llama"])], 1 << 20, options).load("llama").facts
    assert facts.runner == "torch"
    assert facts.runner_reason


def test_model_that_cannot_have_its_runner_gives_its_memory_back(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    options = LoadOptions(
        dtype="float32", device="cpu", max_model_len=None, block_size=16, threads=None, runner="openvino"
    )
    models = TorchModels(tmp_path, [str(model_dirs["llama"])], 1 << 20, options)
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="cannot run on OpenVINO"):
            models.load("llama")
