"""Which attention a model gets: what is known to be impossible is named, and a kernel is tried before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bus.errors import ModelUnavailable
from workers.attention_choice import AttentionName, choose_attention
from workers.batch import Batch
from workers.flex_attention import FlexStep, plan_flex
from workers.gather_attention import plan_gather
from workers.loader import LoadedModel, load_model
from workers.paged_kv import PagedKV
from workers.runner import TorchRunner

from .conftest import VOCAB_SIZE, make_pool, make_slice, scattered_table, source_of
from .families import save_random

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


class Models:
    """Tiny models by the names of `families`, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, LoadedModel] = {}

    def load(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            path = save_random(name, self._folder / name.replace(" ", "_"))
            self._loaded[name] = load_model(source_of(path), dtype="float32")
        return self._loaded[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("choice", ["auto", "gather"])
def test_cpu_gathers_without_a_word(models: Models, choice: AttentionName) -> None:
    loaded = models.load("llama")
    chosen = choose_attention(choice, loaded, make_pool(loaded))
    assert (chosen.plan_step, chosen.name, chosen.reason) == (plan_gather, "gather", "")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_flex_computes_the_logits_that_gathering_does(models: Models, name: str) -> None:
    """With windows, caps and a scale for each layer; prompts, chunks that go on, and decodes in one pass."""
    loaded = models.load(name)
    kv = make_pool(loaded)
    flex = choose_attention("flex", loaded, kv)
    assert (flex.name, flex.reason) == ("flex", "")
    runners = TorchRunner(loaded, kv, flex.plan_step), TorchRunner(loaded, make_pool(loaded))
    blocks = scattered_table(4 * 30, seed=1)
    tables = [blocks[:10], blocks[10:20], blocks[20:30]]
    prompts = [torch.arange(length).mul(7).remainder(VOCAB_SIZE).tolist() for length in (23, 31, 17)]
    for starts, stops in (((0, 0, 0), (11, 30, 17)), ((11, 30, 0), (23, 31, 17))):
        batch = [
            make_slice(prompt[start:stop], start, table)
            for prompt, table, start, stop in zip(prompts, tables, starts, stops, strict=True)
        ]
        ours, plain = (runner.run(batch) for runner in runners)
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("choice", ["gather", "flex"])
def test_cuda_graphs_that_are_not_to_be_had_are_told_of(models: Models, choice: AttentionName) -> None:
    loaded = models.load("llama")
    chosen = choose_attention(choice, loaded, make_pool(loaded), cuda_graphs=True)
    assert chosen.plan_decodes is None
    assert chosen.reason == "no CUDA graphs, which take flex on a GPU"


def test_trying_leaves_no_trace_in_the_pool(models: Models) -> None:
    loaded = models.load("gemma2")
    kv = make_pool(loaded, 8)
    choose_attention("flex", loaded, kv)
    assert not any(bool(states.any()) for states in (*kv.keys, *kv.values))


def test_the_smallest_pool_is_enough_to_try_one(models: Models) -> None:
    loaded = models.load("llama")
    assert choose_attention("flex", loaded, make_pool(loaded, 1, 1)).name == "flex"


def test_family_that_attends_in_its_own_code_gathers_and_cannot_have_another(models: Models) -> None:
    """ALiBi among them: a bias that only the family knows."""
    loaded = models.load("bloom")
    with pytest.raises(ModelUnavailable, match="attends in code of its own"):
        choose_attention("flex", loaded, make_pool(loaded))


def test_pool_that_keeps_another_dtype_cannot_be_read_by_the_kernel(models: Models) -> None:
    loaded = models.load("llama")
    kv = make_pool(loaded)
    with pytest.raises(ModelUnavailable, match="the pool keeps"):
        choose_attention("flex", loaded, PagedKV(kv.plan, torch.bfloat16, kv.device, torch.float32))


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_kernel_that_fails_or_is_wrong_where_it_is_tried_is_not_used(
    models: Models, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def plan(batch: Batch, kv: PagedKV, *, group: int) -> FlexStep:
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return plan_flex([make_slice([0] * len(it.token_ids), 0, it.block_table) for it in batch], kv, group=group)

    loaded = models.load("llama")
    monkeypatch.setattr("workers.flex_attention.plan_flex", plan)
    with pytest.raises(ModelUnavailable, match="no such instruction" if fault == "raises" else "was wrong by"):
        choose_attention("flex", loaded, make_pool(loaded))


def test_auto_gathers_on_a_device_where_the_kernel_fails_and_says_why(models: Models) -> None:
    loaded = models.load("llama")
    kv = make_pool(loaded)
    elsewhere = PagedKV(kv.plan, kv.dtype, torch.device("meta"))  # which computes nothing
    chosen = choose_attention("auto", loaded, elsewhere)
    assert (chosen.plan_step, chosen.name) == (plan_gather, "gather")
    assert "it failed when it was tried" in chosen.reason
