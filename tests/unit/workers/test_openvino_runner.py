"""OpenVINO over our pool against the torch runner and transformers: same logits, same tokens, same KV."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from workers.batch import BlockId, Slice
from workers.loader import load_model
from workers.runner import TorchRunner

from .conftest import (
    VOCAB_SIZE,
    Family,
    continue_greedily,
    make_pool,
    make_slice,
    prefill,
    prompt_of,
    save_model,
    scored_slice,
    source_of,
)
from .families import MODELS, save_random
from .rig import Rig

if TYPE_CHECKING:
    from workers.openvino_runner import OpenVinoRunner
    from workers.runners import Runner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed; pip install -e '.[openvino]'"
)

BLOCK_SIZE = 32
TOLERANCE = 5e-5
"""fp32 logits of magnitude about 5, summed in another order by other kernels."""


@pytest.fixture(scope="module")
def make_runner(family: Family) -> Callable[[], OpenVinoRunner]:
    from workers.openvino_runner import OpenVinoRunner

    return lambda: OpenVinoRunner(family.loaded, make_pool(family.loaded, 32, BLOCK_SIZE), threads=1)


@pytest.fixture(scope="module")
def runner(make_runner: Callable[[], OpenVinoRunner]) -> OpenVinoRunner:
    """Shared by the tests of a family, which each write the blocks they read."""
    return make_runner()


def torch_runner(family: Family) -> TorchRunner:
    return TorchRunner(family.loaded, make_pool(family.loaded, 32, BLOCK_SIZE))


def tables_of(*lengths: int, seed: int = 0) -> list[list[BlockId]]:
    """A block table for each length, out of one pool, in no order."""
    free = random.Random(seed).sample(range(32), 32)
    return [[BlockId(free.pop()) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


@pytest.mark.parametrize("chunk", [1, 7, 32, 100])
def test_greedy_output_is_that_of_generate_whatever_the_chunks(
    family: Family, runner: OpenVinoRunner, chunk: int
) -> None:
    prompt = prompt_of(75)
    [table] = tables_of(75 + 24, seed=chunk)
    first = prefill(runner, prompt, table, chunk)
    assert continue_greedily(runner, prompt, table, first, 24) == family.plain_greedy(prompt, 24)


@pytest.mark.parametrize("num_cached", [1, 31, 32, 50, 74])
def test_greedy_output_is_that_of_generate_with_any_prefix_in_the_pool(
    family: Family, runner: OpenVinoRunner, num_cached: int
) -> None:
    """Another sequence computed the first blocks; this one shares them and computes the rest."""
    prompt = prompt_of(75)
    donor, others = tables_of(75 + 8, 75 + 8, seed=num_cached)
    prefill(runner, prompt[:num_cached], donor, 40)
    shared = -(-num_cached // BLOCK_SIZE)
    table = donor[:shared] + others[shared:]
    first = prefill(runner, prompt, table, 64, start=num_cached)
    assert continue_greedily(runner, prompt, table, first, 8) == family.plain_greedy(prompt, 8)


@pytest.mark.parametrize("chunk", [7, 40])
def test_all_logits_of_a_prompt_are_those_of_transformers_if_they_are_wanted(
    family: Family, runner: OpenVinoRunner, chunk: int
) -> None:
    prompt = prompt_of(75)
    [table] = tables_of(75, seed=chunk)
    pieces = [scored_slice(prompt, begin, min(begin + chunk, 75), table) for begin in range(0, 75, chunk)]
    ours = torch.cat([runner.run([piece]).clone() for piece in pieces])
    with torch.inference_mode():
        theirs = family.plain(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_mixed_batch_has_the_logits_of_the_torch_runner_in_order(family: Family, runner: OpenVinoRunner) -> None:
    """Decodes, a prefill from nothing, a later chunk, and one that wants no logits, in one pass."""
    reference = torch_runner(family)
    lengths, starts = [33, 64, 97, 5, 90], [32, 63, 0, 0, 40]
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    tables = tables_of(*lengths)
    for each in (runner, reference):
        for prompt, start, table in zip(prompts, starts, tables, strict=True):
            if start:
                prefill(each, prompt[:start], table, 128)
    batch = [
        make_slice(prompt[start:], start, table, wants_logits=index != 3)
        for index, (prompt, start, table) in enumerate(zip(prompts, starts, tables, strict=True))
    ]
    ours, theirs = runner.run(batch), reference.run(batch)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.argmax(dim=1).tolist() == theirs.argmax(dim=1).tolist()


def test_logits_are_not_copied_and_steps_of_one_shape_reuse_what_they_have(runner: OpenVinoRunner) -> None:
    """Nor do later steps read what an earlier one was given: the first again computes the first."""
    tables = tables_of(20, 20)
    prompts = [prompt_of(20, seed) for seed in (1, 2)]
    batches = [[make_slice(prompt, 0, table)] for prompt, table in zip(prompts, tables, strict=True)]
    first = runner.run(batches[0])
    place, before = first.data_ptr(), first.clone()
    second = runner.run(batches[1])
    assert second.data_ptr() == place
    assert not torch.equal(second, before)
    assert torch.equal(runner.run(batches[0]), before)


def test_step_that_wants_no_logits_gives_none_and_still_writes_the_pool(family: Family, runner: OpenVinoRunner) -> None:
    [table] = tables_of(40, seed=3)
    for cache in (*runner.kv.keys, *runner.kv.values):
        cache.zero_()
    logits = runner.run([make_slice(prompt_of(40), 0, table, wants_logits=False)])
    assert logits.shape == (0, VOCAB_SIZE)
    assert all(bool(runner.kv.read(layer, table, 0, 40)[0].any()) for layer in range(family.loaded.shape.num_layers))


def test_what_the_pool_holds_is_what_transformers_caches(family: Family, runner: OpenVinoRunner) -> None:
    prompt = prompt_of(70)
    [table] = tables_of(70, seed=5)
    prefill(runner, prompt, table, 33)
    cache = DynamicCache(config=family.plain.config)
    with torch.inference_mode():
        family.plain(torch.tensor([prompt]), past_key_values=cache)
    for layer in range(family.loaded.shape.num_layers):
        theirs: Any = cache.layers[layer]
        keys, values = runner.kv.read(layer, table, 0, 70)
        torch.testing.assert_close(keys, theirs.keys[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(values, theirs.values[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_blocks_of_other_sequences_are_left_alone(runner: OpenVinoRunner) -> None:
    [mine, other] = tables_of(70, 70, seed=6)
    prefill(runner, prompt_of(70, 1), other, 70)
    before = [cache[other].clone() for cache in (*runner.kv.keys, *runner.kv.values)]
    prefill(runner, prompt_of(70, 2), mine, 70)
    after = [cache[other] for cache in (*runner.kv.keys, *runner.kv.values)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_greedy_output_is_that_of_generate_after_preemption_and_eviction(
    family: Family, runner: OpenVinoRunner
) -> None:
    rig = Rig(runner, runner.kv, num_blocks=4, max_tokens_per_step=64)
    long, other = (tuple(prompt_of(75, seed)) for seed in (1, 2))
    rig.submit(b"long", long, 20, priority=1)
    for _ in range(6):
        rig.step()
    rig.submit(b"other", other, 8)
    rig.run()
    pool = rig.scheduler.pool_stats()
    assert (pool.preemptions, pool.evictions > 0) == (1, True)
    assert rig.output(b"long") == family.plain_greedy(long, 20)
    assert rig.output(b"other") == family.plain_greedy(other, 8)


def test_either_runner_goes_on_from_what_the_other_computed(family: Family, runner: OpenVinoRunner) -> None:
    prompt, reference = prompt_of(60), torch_runner(family)
    [table] = tables_of(60 + 8, seed=7)
    for here, there in ((runner, reference), (reference, runner)):
        prefill(there, prompt[:50], table, 64)
        for layer in range(family.loaded.shape.num_layers):
            here.kv.write(layer, table, 0, *there.kv.read(layer, table, 0, 50))
        first = prefill(here, prompt, table, 64, start=50)
        assert continue_greedily(here, prompt, table, first, 8) == family.plain_greedy(prompt, 8)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_computes_what_the_torch_runner_does_or_is_refused(name: str, tmp_path: Path) -> None:
    """In chunks and steps, below the window, across it and beyond it, and what is then in the pool."""
    from workers import openvino_export
    from workers.openvino_runner import NotCarried, OpenVinoRunner

    loaded = load_model(source_of(save_random(name, tmp_path / "model")), dtype="float32")
    kv = make_pool(loaded, 32, BLOCK_SIZE)
    if loaded.model.config.model_type not in openvino_export.FAMILIES:
        with pytest.raises(NotCarried, match=loaded.model.config.model_type):
            OpenVinoRunner(loaded, kv, threads=1)
        return
    ours, reference = OpenVinoRunner(loaded, kv, threads=1), TorchRunner(loaded, make_pool(loaded, 32, BLOCK_SIZE))
    prompt, (table, other) = prompt_of(100), tables_of(100, 100)
    for start, stop in ((0, 5), (5, 6), (6, 40), (40, 41), (41, 100)):
        batch = [
            make_slice(prompt[start:stop], start, table),
            make_slice(prompt[:stop], 0, other),
        ]
        mine, theirs = ours.run(batch), reference.run(batch)
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert mine.argmax(dim=1).tolist() == theirs.argmax(dim=1).tolist()
    for layer in range(loaded.shape.num_layers):
        for mine, theirs in zip(kv.read(layer, table, 0, 100), reference.kv.read(layer, table, 0, 100), strict=True):
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox", "phi"])
def long_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that turns positions by angles, with room for a thousand."""
    config = MODELS[request.param]()
    config.max_position_embeddings = 1024
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return save_model(model, tmp_path_factory.mktemp("long") / "model")


def test_bfloat16_is_as_close_to_float32_as_torch_in_bfloat16_is(long_model: Path) -> None:
    """Keys at positions that bfloat16 itself cannot tell apart: their angles must not be computed in it."""
    from workers.openvino_runner import OpenVinoRunner

    prompt = prompt_of(700)
    [table] = tables_of(700, seed=8)

    def computed(
        make: Callable[..., Runner], dtype: Literal["float32", "bfloat16"], **options: int
    ) -> list[torch.Tensor]:
        loaded = load_model(source_of(long_model), dtype=dtype)
        kv = make_pool(loaded, 32, BLOCK_SIZE)
        logits = prefill(make(loaded, kv, **options), prompt, table, 300)
        keys, values = kv.read(0, table, 600, 700)
        assert keys.dtype is loaded.dtype
        return [logits, keys.float(), values.float()]

    exact = computed(TorchRunner, "float32")
    torchs = computed(TorchRunner, "bfloat16")
    ours = computed(OpenVinoRunner, "bfloat16", threads=1)
    for what, right, theirs, mine in zip(("logits", "keys", "values"), exact, torchs, ours, strict=True):
        assert (mine - right).abs().mean() < 1.5 * (theirs - right).abs().mean(), what


@pytest.mark.parametrize("bad", ["empty batch", "no tokens", "negative start", "past the blocks", "past the model"])
def test_impossible_batch_is_refused(runner: OpenVinoRunner, bad: str) -> None:
    [table] = tables_of(160)
    batches: dict[str, list[Slice]] = {
        "empty batch": [],
        "no tokens": [make_slice([], 3, table)],
        "negative start": [make_slice([1], -1, table)],
        "past the blocks": [make_slice([1, 2, 3], 30, table[:1])],
        "past the model": [make_slice([1], 128, table)],
    }
    with pytest.raises(ValueError, match=r"batch is empty|computes nothing|past the"):
        runner.run(batches[bad])


def test_model_is_as_it_was_after_the_export(family: Family, make_runner: Callable[[], OpenVinoRunner]) -> None:
    make_runner()
    prompt, reference = prompt_of(20), torch_runner(family)
    [table] = tables_of(28)
    first = prefill(reference, prompt, table, 20)
    assert continue_greedily(reference, prompt, table, first, 8) == family.plain_greedy(prompt, 8)


def test_nothing_is_reported_to_the_makers_of_openvino(tmp_path: Path) -> None:
    """Even where their reporting module is installed, which this puts a loud one in place of."""
    (tmp_path / "openvino_telemetry.py").write_text("raise SystemExit('reported')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import workers.openvino_runner"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
