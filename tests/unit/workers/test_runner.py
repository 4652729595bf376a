from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from bus.errors import ModelUnavailable
from kvcache.models import ModelKind, ModelSource
from workers.loader import load_model
from workers.page_plan import plan_pages
from workers.paged_kv import PagedKV
from workers.runner import TorchRunner

from .conftest import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    Family,
    continue_greedily,
    make_pool,
    make_slice,
    prefill,
    prompt_of,
    scattered_table,
    source_of,
    write_into,
)

if TYPE_CHECKING:
    from pathlib import Path


TOLERANCE = 2e-5
"""fp32 logits of magnitude about 5, summed in another order."""


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
def test_greedy_output_is_that_of_generate_whatever_the_chunks(family: Family, chunk: int) -> None:
    prompt, runner = prompt_of(29), family.make_runner()
    table = scattered_table(29 + 16, seed=chunk)
    first = prefill(runner, prompt, table, chunk)
    assert continue_greedily(runner, prompt, table, first, 16) == family.plain_greedy(prompt, 16)


@pytest.mark.parametrize("num_cached", [1, 4, 11, 12, 28])
def test_greedy_output_is_that_of_generate_with_any_prefix_in_the_pool(family: Family, num_cached: int) -> None:
    """Another sequence computed the first blocks; this one shares the full ones and computes the rest."""
    prompt, runner = prompt_of(29), family.make_runner()
    donor = scattered_table(29 + 16, seed=num_cached)
    prefill(runner, prompt[:num_cached], donor, 5)
    others = [block for block in scattered_table(256, seed=99) if block not in donor]
    shared = donor[: -(-num_cached // BLOCK_SIZE)]
    table = shared + others[: len(donor) - len(shared)]
    first = prefill(runner, prompt, table, 64, start=num_cached)
    assert continue_greedily(runner, prompt, table, first, 16) == family.plain_greedy(prompt, 16)


def test_logits_are_those_of_transformers(family: Family) -> None:
    prompt, runner = prompt_of(40), family.make_runner()
    ours = prefill(runner, prompt, scattered_table(40, seed=1), 9)
    with torch.inference_mode():
        theirs = family.plain(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_slices_of_one_batch_do_not_see_each_other(family: Family) -> None:
    """A prefill from nothing, a decode and a later chunk in one pass: each as if it ran alone."""
    runner, alone = family.make_runner(), family.make_runner()
    table = scattered_table(120, seed=3)
    tables = [table[:10], table[10:20], table[20:30]]
    prompts = [prompt_of(13, 1), prompt_of(22, 2), prompt_of(31, 3)]
    starts = [0, 21, 17]
    for each in (runner, alone):
        for prompt, start, blocks in zip(prompts, starts, tables, strict=True):
            if start:
                prefill(each, prompt[:start], blocks, 64)
    slices = [make_slice(p[s:], s, t) for p, s, t in zip(prompts, starts, tables, strict=True)]
    together = runner.run(slices)
    apart = torch.cat([alone.run([piece]) for piece in slices])
    torch.testing.assert_close(together, apart, atol=TOLERANCE, rtol=TOLERANCE)


def test_only_slices_that_ask_get_logits_in_the_order_of_the_batch(family: Family) -> None:
    runner = family.make_runner()
    table = scattered_table(60, seed=4)
    first, second, third = prompt_of(5, 1), prompt_of(6, 2), prompt_of(7, 3)
    mixed = runner.run(
        [
            make_slice(first, 0, table[:2]),
            make_slice(second, 0, table[2:4], wants_logits=False),
            make_slice(third, 0, table[4:6]),
        ]
    )
    assert mixed.shape == (2, VOCAB_SIZE)
    assert mixed.dtype is torch.float32
    torch.testing.assert_close(mixed[1], runner.run([make_slice(third, 0, table[6:8])])[0], atol=2e-5, rtol=2e-5)


def test_what_the_pool_holds_is_what_transformers_caches(family: Family) -> None:
    prompt, runner = prompt_of(27), family.make_runner()
    table = scattered_table(27, seed=5)
    prefill(runner, prompt, table, 6)
    cache = DynamicCache(config=family.plain.config)
    with torch.inference_mode():
        family.plain(torch.tensor([prompt]), past_key_values=cache)
    for layer in range(family.loaded.shape.num_layers):
        keys, values = runner.kv.read(layer, table, 0, 27)
        theirs: Any = cache.layers[layer]
        torch.testing.assert_close(keys, theirs.keys[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(values, theirs.values[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_imported_keys_and_values_continue_as_if_computed_here(family: Family) -> None:
    prompt, here, there = prompt_of(26), family.make_runner(), family.make_runner()
    from_table, to_table = scattered_table(60, seed=6), scattered_table(60, seed=7)
    prefill(there, prompt[:25], from_table, 64)
    for layer in range(family.loaded.shape.num_layers):
        here.kv.write(layer, to_table, 0, *there.kv.read(layer, from_table, 0, 25))
    first = prefill(here, prompt, to_table, 64, start=25)
    assert continue_greedily(here, prompt, to_table, first, 8) == family.plain_greedy(prompt, 8)


def test_what_is_written_into_a_models_file_while_it_runs_changes_nothing(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "llama")
    loaded = load_model(source_of(folder), dtype="float32")
    runner, prompt = TorchRunner(loaded, make_pool(loaded)), prompt_of(12)
    before = prefill(runner, prompt, scattered_table(12, seed=1), 12)
    write_into(folder / "model.safetensors")
    assert torch.equal(prefill(runner, prompt, scattered_table(12, seed=1), 12), before)


def test_weights_whose_file_was_written_into_before_they_were_copied_are_not_computed_with(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "llama")
    loaded = load_model(source_of(folder), dtype="float32")
    write_into(folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match="was changed"):
        TorchRunner(loaded, make_pool(loaded))


@pytest.mark.parametrize("bad", ["empty batch", "no tokens", "negative start", "past the blocks", "past the model"])
def test_impossible_batch_is_refused_before_anything_is_written(family: Family, bad: str) -> None:
    runner = family.make_runner()
    table = scattered_table(200, seed=8)
    good = make_slice([1, 2], 0, table[:1])
    batches = {
        "empty batch": [],
        "no tokens": [good, make_slice([], 3, table)],
        "negative start": [good, make_slice([1], -1, table)],
        "past the blocks": [good, make_slice([1, 2, 3], 6, table[1:3])],
        "past the model": [good, make_slice([1], 128, table)],
    }
    with pytest.raises(ValueError, match=r"batch is empty|computes nothing|past the"):
        runner.run(batches[bad])
    assert not any(bool(keys.any()) for keys in runner.kv.keys)


def test_pool_cut_for_another_model_is_refused(family: Family) -> None:
    plan = plan_pages(memory_bytes=1 << 16, num_layers=9, num_kv_heads=1, head_dim=8, block_size=4, itemsize=4)
    kv = PagedKV(plan, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="the pool is cut for"):
        TorchRunner(family.loaded, kv)


@pytest.mark.gpu
def test_greedy_output_on_a_gpu_is_that_of_the_cpu(family: Family) -> None:
    source = ModelSource(name="gpu", kind=ModelKind.FOLDER, path=family.path, is_present=True)
    loaded = load_model(source, dtype="float32", device=torch.device("cuda"))
    runner = TorchRunner(loaded, PagedKV(family.make_kv().plan, torch.float32, loaded.device))
    prompt, table = prompt_of(29), scattered_table(29 + 8, seed=9)
    first = prefill(runner, prompt, table, 7)
    assert continue_greedily(runner, prompt, table, first, 8) == family.plain_greedy(prompt, 8)
