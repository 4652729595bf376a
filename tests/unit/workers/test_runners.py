"""Which runner a model gets, and what is said when it is not the faster one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from bus.errors import ModelUnavailable
from bus.messages import Sampling
from workers.batch import BlockId, Draw, Drawn
from workers.loader import LoadedModel, load_model
from workers.runner import TorchRunner
from workers.runners import Chosen, RunnerName, WeightsName, choose_runner
from workers.torch_model import LoadOptions, TorchModels

from .conftest import Family, make_pool, make_slice

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed; pip install -e '.[openvino]'"
)


def choose(family: Family, choice: RunnerName, *, block_size: int = 32, weights: WeightsName = "auto") -> Chosen:
    kv = make_pool(family.loaded, 8, block_size)
    return choose_runner(choice, family.loaded, kv, threads=1, weights=weights)


def test_torch_is_taken_without_a_word_when_it_is_asked_for(family: Family) -> None:
    chosen = choose(family, "torch")
    assert isinstance(chosen.runner, TorchRunner)
    assert (chosen.name, chosen.reason) == ("torch", "")


def test_auto_is_torch_where_openvino_is_not_installed_and_says_so(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    chosen = choose(family, "auto")
    assert isinstance(chosen.runner, TorchRunner)
    assert chosen.name == "torch"
    assert "not installed" in chosen.reason


def test_openvino_that_is_asked_for_and_not_installed_is_an_error_that_says_how(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelUnavailable, match=r"pip install -e .*openvino"):
        choose(family, "openvino")


@needs_openvino
def test_auto_is_openvino_on_a_cpu(family: Family) -> None:
    chosen = choose(family, "auto")
    assert (chosen.name, chosen.reason) == ("openvino", "")


@needs_openvino
def test_auto_is_torch_for_what_openvino_does_not_carry_and_says_what(family: Family) -> None:
    chosen = choose(family, "auto", block_size=16)
    assert chosen.name == "torch"
    assert "blocks of 32 tokens, not of 16" in chosen.reason


@needs_openvino
def test_family_that_openvino_does_not_carry_is_named(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.openvino_export.FAMILIES", frozenset({"other"}))
    with pytest.raises(ModelUnavailable, match=family.name):
        choose(family, "openvino")


@needs_openvino
def test_openvino_that_cannot_compile_the_model_leaves_it_to_torch(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_loaded: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("workers.openvino_export.export", refuse)
    chosen = choose(family, "auto")
    assert chosen.name == "torch"
    assert "no such operator" in chosen.reason


def test_attention_that_is_asked_for_means_torch_whose_it_is(family: Family) -> None:
    kv = make_pool(family.loaded, 8, 32)
    chosen = choose_runner("auto", family.loaded, kv, threads=1, attention="gather")
    assert (chosen.name, chosen.reason, chosen.attention) == ("torch", "", "gather")


@pytest.mark.parametrize("choice", ["torch", "auto"])
def test_int8_weights_that_cannot_be_had_are_refused_and_not_replaced(
    family: Family, monkeypatch: pytest.MonkeyPatch, choice: RunnerName
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelUnavailable, match="cannot have int8 weights, which take OpenVINO"):
        choose(family, choice, weights="int8")


@needs_openvino
@pytest.mark.parametrize("runner", ["torch", "openvino"])
def test_weights_of_torch_go_when_openvino_has_its_own(
    model_dirs: dict[str, Path], tmp_path: Path, runner: RunnerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[LoadedModel] = []

    def load(*args: Any, **kwargs: Any) -> LoadedModel:
        loads.append(load_model(*args, **kwargs))
        return loads[-1]

    monkeypatch.setattr("workers.torch_model.load_model", load)
    options = LoadOptions(dtype="float32", device="cpu", max_model_len=None, block_size=32, threads=1, runner=runner)
    model = TorchModels(tmp_path, [str(model_dirs["llama"])], options).load("llama", 1 << 20, lambda *_: None)
    assert bool(vars(loads[0].model)) == (runner == "torch"), "an emptied shell, or all of it"
    batch = [make_slice([1, 2, 3], 0, [BlockId(0)])]
    draw = Draw(sampling=Sampling(temperature=0.0), position=3)
    assert isinstance(model.compute(batch, [draw])[0], Drawn)


@needs_openvino
def test_model_with_int8_weights_shares_with_no_other(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    def fingerprint(weights: WeightsName) -> str:
        options = LoadOptions(
            dtype="float32", device="cpu", max_model_len=None, block_size=32, threads=1, weights=weights
        )
        models = TorchModels(tmp_path, [str(model_dirs["llama"])], options)
        return models.load("llama", 1 << 20, lambda *_: None).facts.fingerprint

    assert fingerprint("int8") == fingerprint("int8") != fingerprint("auto")


def test_figures_name_the_runner_and_why(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    options = LoadOptions(dtype="float32", device="cpu", max_model_len=None, block_size=4, threads=None, runner="auto")
    facts = TorchModels(tmp_path, [str(model_dirs["llama"])], options).load("llama", 1 << 20, lambda *_: None).facts
    assert (facts.runner, facts.attention, facts.attention_reason) == ("torch", "gather", "")
    assert facts.runner_reason
