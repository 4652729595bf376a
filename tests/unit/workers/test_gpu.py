"""What a CPU cannot show: the torch runner's kernels on a GPU, held to the plain path on the CPU. Not run yet."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from workers.attention_choice import AttentionName, choose_attention
from workers.batch import Batch, BlockId
from workers.loader import LoadedModel, load_model
from workers.runner import TorchRunner

from .conftest import VOCAB_SIZE, make_pool, make_slice, source_of
from .families import save_random

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # a kernel compiles for a minute

BLOCK_SIZE = 16
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """The same model on the CPU and on the GPU: with heads of 16, the smallest that a GPU's kernel takes."""
    source = source_of(save_random(request.param, tmp_path_factory.mktemp("gpu") / request.param))
    return load_model(source, dtype="float32"), load_model(source, dtype="float32", device=CUDA)


def steps() -> list[Batch]:
    """Prompts in chunks of many lengths, then decodes together."""
    tables = [[BlockId(block) for block in range(first, first + 8)] for first in (0, 8, 16)]
    prompts = [[(7 * position + seed) % VOCAB_SIZE for position in range(100)] for seed in (1, 2, 3)]
    bounds = [(0, 40, 61), (0, 17, 90), (0, 70, 73)]
    shares = [pairwise([*of, *range(of[-1] + 1, of[-1] + 5)]) for of in bounds]
    return [
        [
            make_slice(prompt[start:stop], start, table)
            for prompt, table, (start, stop) in zip(prompts, tables, step, strict=True)
        ]
        for step in zip(*shares, strict=True)
    ]


@pytest.mark.parametrize("attention", ["gather", "flex"])
def test_logits_on_a_gpu_are_those_of_the_cpu(
    loaded: tuple[LoadedModel, LoadedModel], attention: AttentionName
) -> None:
    on_cpu, on_gpu = loaded
    kv = make_pool(on_gpu, 64, BLOCK_SIZE)
    chosen = choose_attention(attention, on_gpu, kv)
    runner, plain = TorchRunner(on_gpu, kv, chosen.plan_step), TorchRunner(on_cpu, make_pool(on_cpu, 64, BLOCK_SIZE))
    for batch in steps():
        torch.testing.assert_close(runner.run(batch).cpu(), plain.run(batch), atol=1e-3, rtol=1e-3)


def test_blocks_come_back_from_a_gpu_as_they_went_in(loaded: tuple[LoadedModel, LoadedModel]) -> None:
    source, target = (make_pool(model, 8, BLOCK_SIZE) for model in loaded)
    blocks = [BlockId(6), BlockId(1)]
    data = bytearray(torch.randint(256, (2 * source.plan.block_bytes,), dtype=torch.uint8).numpy().tobytes())
    target.import_blocks(blocks, data)
    source.import_blocks(blocks, data)
    data[:] = bytes(len(data))  # it may be used again at once
    came_back = target.export_blocks(blocks)
    assert came_back.is_pinned()
    assert torch.equal(came_back, source.export_blocks(blocks))


def test_replayed_decodes_on_a_gpu_give_the_logits_of_the_cpu(loaded: tuple[LoadedModel, LoadedModel]) -> None:
    on_cpu, on_gpu = loaded
    kv = make_pool(on_gpu, 64, BLOCK_SIZE)
    chosen = choose_attention("flex", on_gpu, kv, cuda_graphs=True)
    assert chosen.plan_decodes is not None
    assert chosen.reason == ""
    runner = TorchRunner(on_gpu, kv, chosen.plan_step, chosen.plan_decodes)
    plain = TorchRunner(on_cpu, make_pool(on_cpu, 64, BLOCK_SIZE))
    for batch in steps():
        torch.testing.assert_close(runner.run(batch).cpu(), plain.run(batch), atol=1e-3, rtol=1e-3)


def test_auto_on_a_gpu_is_flex(loaded: tuple[LoadedModel, LoadedModel]) -> None:
    _, on_gpu = loaded
    chosen = choose_attention("auto", on_gpu, make_pool(on_gpu, 64, BLOCK_SIZE))
    assert (chosen.name, chosen.reason) == ("flex", "")
