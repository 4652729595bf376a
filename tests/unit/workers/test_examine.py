"""What `kvcache doctor` is told by a process with torch."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest
import torch

from kvcache.checkup import Examination
from tests.harness.models import MAX_LEN, save_tiny_llama
from workers import examine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("examined") / "tiny")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Examination:
    assert examine.main(argv) == 0
    return msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=Examination)


def test_devices_are_told_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys)
    assert found.torch == str(torch.__version__)
    assert (found.model, found.model_error) == (None, "")
    assert len(found.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize("flags", [(), ("--load",)])
def test_a_good_model_is_measured(tiny: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    model = told(capsys, *flags, "tiny", str(tiny)).model
    assert model is not None
    assert (model.max_model_len, model.is_loaded) == (MAX_LEN, bool(flags))
    assert model.weights_bytes > 0


def test_a_model_that_is_cut_off_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = save_tiny_llama(tmp_path / "broken")
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    found = told(capsys, "broken", str(broken))
    assert found.model is None
    assert "broken" in found.model_error


def test_an_openvino_that_is_broken_is_an_answer_and_not_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fails)
    assert examine.examine(None, load=False).openvino_error == "ImportError: workers.openvino_api: undefined symbol"
