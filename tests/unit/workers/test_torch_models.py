"""The models a worker may serve: which names it knows, what an empty one means, what they take and give back."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bus.errors import ModelNotFound, ModelUnavailable
from workers.runners import RunnerName
from workers.torch_model import LoadOptions, TorchModels

OPTIONS = LoadOptions(dtype="float32", device="cpu", max_model_len=None, block_size=4, threads=None, runner="torch")
POOL_BYTES = 1 << 18
TRACES_BYTES = 1 << 14
"""What torch may keep of a model that was traced for OpenVINO: some constants, no weights."""


def ignore(stage: str, progress: float) -> None:
    pass


@pytest.fixture
def home(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A cache that holds both tiny models."""
    for name in ("gpt2", "llama"):
        shutil.copytree(model_dirs[name], tmp_path / "models" / name)
    return tmp_path


def test_named_models_exclude_all_others_and_the_first_is_the_default(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    models = TorchModels(tmp_path, [str(model_dirs["llama"]), str(model_dirs["gpt2"])], OPTIONS)
    assert (models.choose(""), models.choose("gpt2"), models.names()) == ("llama", "gpt2", ["llama", "gpt2"])
    with pytest.raises(ModelNotFound, match="serves llama, gpt2"):
        models.check("smollm2")


def test_a_request_that_names_no_model_is_told_the_choices_where_there_are_several(home: Path) -> None:
    models = TorchModels(home, [], OPTIONS)
    with pytest.raises(ModelNotFound, match=r"several: gpt2, llama.*--model"):
        models.choose("")
    assert models.choose("llama") == "llama"


def test_the_built_in_model_is_the_default_wherever_it_stands_in_the_alphabet(home: Path) -> None:
    shutil.copytree(home / "models" / "llama", home / "models" / "smollm2")
    shutil.copytree(home / "models" / "llama", home / "models" / "zebra")
    assert TorchModels(home, [], OPTIONS).choose("") == "smollm2"


def test_the_only_model_there_is_is_the_default(home: Path) -> None:
    shutil.rmtree(home / "models" / "gpt2")
    assert TorchModels(home, [], OPTIONS).choose("") == "llama"


def test_a_worker_without_any_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="kvcache models pull smollm2"):
        TorchModels(tmp_path, [], OPTIONS).choose("")


def test_what_a_model_takes_is_known_before_it_is_loaded(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    named = [str(model_dirs["llama"])]
    models = TorchModels(tmp_path, named, OPTIONS)
    need = models.measure("llama", ignore)
    before = _num_live_bytes()
    model = models.load("llama", POOL_BYTES, ignore)
    pool_bytes = model.facts.num_blocks * model.facts.block_bytes
    assert need.block_bytes == model.facts.block_bytes
    assert POOL_BYTES - need.block_bytes < pool_bytes <= POOL_BYTES
    assert need.weights_bytes <= _num_live_bytes() - before - pool_bytes < need.weights_bytes + 4096
    half = TorchModels(tmp_path, named, replace(OPTIONS, dtype="bfloat16")).measure("llama", ignore)
    assert (2 * half.weights_bytes, 2 * half.block_bytes) == (need.weights_bytes, need.block_bytes)


def test_a_load_that_fails_leaves_no_tensor_behind(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    options = replace(OPTIONS, runner="openvino", block_size=16)  # which OpenVINO does not do
    models = TorchModels(tmp_path, [str(model_dirs["llama"])], options)
    before = _num_live_bytes()
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="cannot run on OpenVINO"):
            models.load("llama", POOL_BYTES, ignore)
    assert _num_live_bytes() < before + 4096


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("runner", ["torch", "openvino"])
def test_a_closed_model_leaves_no_tensor_behind_without_the_garbage_collector(
    model_dirs: dict[str, Path], tmp_path: Path, name: str, runner: RunnerName
) -> None:
    if runner == "openvino":
        pytest.importorskip("openvino")
    options = replace(OPTIONS, runner=runner, block_size=32 if runner == "openvino" else 4)
    models = TorchModels(tmp_path, [str(model_dirs[name])], options)
    models.load(name, POOL_BYTES, ignore).close()  # what is made once per process is made now
    gc.collect()
    before = _num_live_bytes()
    model = models.load(name, POOL_BYTES, ignore)
    gone = weakref.ref(model)
    assert _num_live_bytes() > before + POOL_BYTES // 2
    gc.disable()
    try:
        model.close()
        del model
        assert gone() is None
        assert _num_live_bytes() < before + TRACES_BYTES
    finally:
        gc.enable()


def _num_live_bytes() -> int:
    """Of all tensors that anything still refers to."""
    gc.unfreeze()
    storages = {
        it.untyped_storage().data_ptr(): it.untyped_storage().nbytes()
        for it in gc.get_objects()
        if issubclass(type(it), torch.Tensor) and it.device.type != "meta" and it.layout is torch.strided
    }
    return sum(storages.values())


def test_a_load_tells_what_it_does(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    models = TorchModels(tmp_path, [str(model_dirs["llama"])], OPTIONS)
    models.load("llama", POOL_BYTES, lambda stage, progress: told.append((stage, progress)))
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages == [
        "inspecting files",
        "checking weights",
        "reading weights",
        "making room for KV",
        "preparing to run it",
    ]
    parts = [progress for stage, progress in told if stage == "checking weights"]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_a_folder_that_vanished_is_a_model_that_is_unavailable(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(model_dirs["llama"], folder)
    models = TorchModels(tmp_path / "home", [str(folder)], OPTIONS)
    shutil.rmtree(folder)
    with pytest.raises(ModelUnavailable, match=r"mine.*no config\.json any more"):
        models.measure("mine", ignore)


def test_another_revision_under_the_same_name_shares_no_kv_with_the_first(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(model_dirs["llama"], folder)
    models = TorchModels(tmp_path / "home", [str(folder)], OPTIONS)
    first = models.load("mine", POOL_BYTES, ignore).facts.fingerprint
    assert models.load("mine", POOL_BYTES, ignore).facts.fingerprint == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert models.load("mine", POOL_BYTES, ignore).facts.fingerprint != first


def test_a_device_that_is_not_here_is_a_model_that_is_unavailable(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="abacus"):
        TorchModels(tmp_path, [str(model_dirs["llama"])], replace(OPTIONS, device="abacus")).measure("llama", ignore)
