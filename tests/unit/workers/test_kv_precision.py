"""A pool that rounds what it keeps: how much it may, and that everyone reads the same."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

import pytest
import torch

from workers.batch import BlockId
from workers.kv_precision import KV_DTYPES, LARGEST_CODE, dequantise, is_scaled, kv_dtype, name_of, quantise
from workers.loader import LoadedModel, load_model
from workers.page_plan import block_rows, of_both, plan_pages, token_rows
from workers.paged_kv import PagedKV
from workers.runner import TorchRunner
from workers.runners import choose_runner
from workers.torch_model import LoadOptions, TorchModel, TorchModels

from .conftest import BLOCK_SIZE, VOCAB_SIZE, make_slice, scattered_table, source_of
from .families import save_random

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
SCALED = sorted(name for name, dtype in KV_DTYPES.items() if is_scaled(dtype))
COMPUTED = [torch.float32, torch.bfloat16, torch.float16]


def make_kv(name: str, computed: torch.dtype, num_layers: int = 1, heads: int = 3, head_dim: int = 16) -> PagedKV:
    dtype = kv_dtype(name, computed)
    plan = plan_pages(
        memory_bytes=1 << 18,
        num_layers=num_layers,
        num_kv_heads=heads,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        itemsize=dtype.itemsize,
        scale_bytes=computed.itemsize if is_scaled(dtype) else 0,
    )
    return PagedKV(plan, dtype, CPU, computed)


def kv_for(loaded: LoadedModel, name: str) -> PagedKV:
    shape = loaded.shape
    return make_kv(name, loaded.dtype, shape.num_layers, shape.num_kv_heads, shape.head_dim)


def test_auto_is_the_models_dtype_and_every_name_is_its_own() -> None:
    assert kv_dtype("auto", torch.bfloat16) is torch.bfloat16
    assert [name_of(kv_dtype(name, torch.float32)) for name in KV_DTYPES] == list(KV_DTYPES)


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 300.0])
@pytest.mark.parametrize("computed", COMPUTED)
def test_int8_errs_by_half_a_code_of_its_own_token_and_head(computed: torch.dtype, magnitude: float) -> None:
    torch.manual_seed(0)
    states = (torch.randn(50, 3, 64) * magnitude).to(computed)
    back = dequantise(*quantise(states, torch.int8))
    assert back.dtype is computed
    largest = states.float().abs().amax(dim=-1, keepdim=True)
    allowed = largest / 254 * 1.01 + states.float().abs() * torch.finfo(computed).eps
    assert bool(((back.float() - states.float()).abs() <= allowed).all())


@pytest.mark.parametrize("computed", COMPUTED)
def test_fp8_errs_by_a_sixteenth_of_the_element(computed: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.randn(50, 3, 64).to(computed)
    back = dequantise(*quantise(states, torch.float8_e4m3fn)).float()
    largest = states.float().abs().amax(dim=-1, keepdim=True)
    allowed = (states.float().abs() / 16 * 1.1).maximum(largest / 450_000)
    assert bool(((back - states.float()).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_zeros_stay_zeros_and_what_is_no_number_does_not_become_one(dtype: torch.dtype) -> None:
    states = torch.zeros(3, 8)
    states[1, 2], states[2, 2] = torch.nan, torch.inf
    back = dequantise(*quantise(states, dtype))
    assert not back[0].any()
    assert not back[1:].isfinite().any()


@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("name", KV_DTYPES)
def test_what_the_step_itself_reads_is_bit_for_bit_what_all_others_read(name: str, computed: torch.dtype) -> None:
    torch.manual_seed(1)
    kv, table = make_kv(name, computed), scattered_table(11, seed=2)
    given = torch.randn(2, 3, 11, 16).to(computed)
    now = kv.store(0, given[0], given[1], of_both(token_rows(kv.plan, table, 0, 11, CPU), kv.plan.num_token_rows))
    later = kv.read(0, table, 0, 11)
    borrowed = kv.borrow(0, of_both(block_rows(kv.plan, table, 11, CPU), kv.plan.num_block_rows))
    for first, second, third in zip(now, later, borrowed, strict=True):
        assert first.dtype is second.dtype is third.dtype is computed
        assert torch.equal(first, second.transpose(0, 1))
        assert torch.equal(first, third.view(3, -1, 16)[:, :11])


@pytest.mark.parametrize(("name", "share"), [("int8", 0.25 + 1 / 16), ("fp8", 0.25 + 1 / 16), ("bfloat16", 0.5)])
def test_a_block_takes_its_codes_and_a_scale_per_token_and_head_and_no_more(name: str, share: float) -> None:
    kv, full = make_kv(name, torch.float32), make_kv("auto", torch.float32)
    assert kv.plan.block_bytes == share * full.plan.block_bytes
    assert kv.keys[0].untyped_storage().nbytes() == kv.plan.total_bytes


def test_blocks_of_a_scaled_pool_do_not_overlap() -> None:
    kv = make_kv("int8", torch.bfloat16, num_layers=2)
    given: dict[tuple[int, int], torch.Tensor] = {}
    for layer in range(2):
        for block in range(kv.plan.num_blocks):
            states = torch.full(
                (BLOCK_SIZE, 3, 16), float(1 + layer * kv.plan.num_blocks + block), dtype=torch.bfloat16
            )
            given[layer, block] = states
            kv.write(layer, [block], 0, states, -states)  # type: ignore[list-item]
    for (layer, block), states in given.items():
        keys, values = kv.read(layer, [block], 0, BLOCK_SIZE)  # type: ignore[list-item]
        torch.testing.assert_close(keys, states, rtol=0.01, atol=0)
        assert torch.equal(keys, -values)


def blocks(*numbers: int) -> tuple[BlockId, ...]:
    return tuple(map(BlockId, numbers))


@pytest.mark.parametrize("name", KV_DTYPES)
def test_a_copied_block_reads_as_its_source_did_in_every_layer_and_others_stay(name: str) -> None:
    kv, pool = make_kv(name, torch.bfloat16, num_layers=2), blocks(0, 1, 2, 3)
    for layer, block in itertools.product(range(2), pool):
        states = torch.randn(BLOCK_SIZE, 3, 16).bfloat16() * 10**block
        kv.write(layer, [block], 0, states, -states)
    before = [kv.read(layer, pool, 0, 4 * BLOCK_SIZE) for layer in range(2)]
    kv.copy_blocks(blocks(0, 1), blocks(2, 0))
    for layer, states in enumerate(before):
        for now, was in zip(kv.read(layer, pool, 0, 4 * BLOCK_SIZE), states, strict=True):
            of_block = was.view(4, BLOCK_SIZE, 3, 16)
            assert torch.equal(now.view_as(of_block), of_block[[1, 1, 0, 3]])
    assert kv.difference(*blocks(0, 1)) == 0.0


@pytest.mark.parametrize("name", KV_DTYPES)
def test_a_block_that_travels_takes_its_scales_along_and_touches_no_others(name: str) -> None:
    source, target = (make_kv(name, torch.bfloat16, num_layers=2) for _ in range(2))
    for layer, block in itertools.product(range(2), blocks(0, 1, 2)):
        states = torch.randn(BLOCK_SIZE, 3, 16).bfloat16() * 10**block
        source.write(layer, [block], 0, states, -states)
    target.import_blocks(blocks(4, 0), bytearray(source.export_blocks(blocks(1, 2)).numpy().tobytes()))
    for layer in range(2):
        theirs, mine = target.read(layer, blocks(4, 0), 0, 8), source.read(layer, blocks(1, 2), 0, 8)
        assert all(map(torch.equal, theirs, mine))
        rest = [BlockId(block) for block in range(target.plan.num_blocks) if block not in (0, 4)]
        assert not any(states.any() for states in target.read(layer, rest, 0, len(rest) * BLOCK_SIZE))


@pytest.mark.parametrize("name", SCALED)
def test_difference_is_that_of_the_numbers_and_not_of_their_codes(name: str) -> None:
    kv, (one, other) = make_kv(name, torch.float32, num_layers=2), blocks(0, 1)
    states = torch.rand(BLOCK_SIZE, 3, 16) - 0.5
    for layer, block in itertools.product(range(2), (one, other)):
        kv.write(layer, [block], 0, states, states)
    assert kv.difference(one, other) == 0.0
    kv.write(1, [other], 0, states, 2 * states)  # other scales, the same codes
    assert kv.difference(one, other) == pytest.approx(1.0, rel=0.01)
    states[2, 1, 3] = torch.nan
    kv.write(0, [other], 0, states, states)
    assert math.isnan(kv.difference(one, other))


def ignore(stage: str, progress: float) -> None:
    pass


@pytest.mark.parametrize("name", KV_DTYPES)
def test_an_audit_accepts_what_rounding_does_and_nothing_else(
    model_dirs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    options = LoadOptions(
        dtype="bfloat16", device="cpu", max_model_len=None, block_size=4, threads=None, runner="torch", kv_dtype=name
    )
    model = TorchModels(tmp_path, [str(model_dirs["llama"])], options).load("llama", 1 << 20, ignore)
    prompt = random.Random(7).choices(range(VOCAB_SIZE - 1), k=32)
    model.compute([make_slice(prompt, 0, blocks(*range(8)), wants_logits=False)], [None])
    for last in range(8):
        table = blocks(*range(last), 8)
        for token in range(last * 4, last * 4 + 4):
            model.compute([make_slice(prompt[token : token + 1], token, table, wants_logits=False)], [None])
        assert model.difference(BlockId(last), BlockId(8)) <= model.facts.kv_tolerance
        assert model.difference(BlockId((last + 1) % 8), BlockId(8)) > model.facts.kv_tolerance


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "falcon with ALiBi", "bloom"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(source_of(save_random(request.param, tmp_path_factory.mktemp("kv") / "m")), dtype="float32")


@pytest.mark.parametrize("name", SCALED)
def test_it_does_not_matter_whether_a_prefix_was_cached_or_computed_in_the_same_step(
    loaded: LoadedModel, name: str
) -> None:
    """Reading unrounded what a step itself computed would show as 100 times this tolerance."""
    runner = TorchRunner(loaded, kv_for(loaded, name))
    prompt = random.Random(3).choices(range(VOCAB_SIZE - 1), k=29)
    donor, own, whole = (scattered_table(96, seed=4)[i * 8 : i * 8 + 8] for i in range(3))
    runner.run([make_slice(prompt[:12], 0, donor, wants_logits=False)])
    cached = runner.run([make_slice(prompt[12:], 12, [*donor[:3], *own[3:]])])
    computed = runner.run([make_slice(prompt, 0, whole)])
    torch.testing.assert_close(cached, computed, atol=2e-4, rtol=2e-4)
    for layer in range(loaded.shape.num_layers):
        for shared, fresh in zip(runner.kv.read(layer, donor, 0, 12), runner.kv.read(layer, whole, 0, 12), strict=True):
            torch.testing.assert_close(shared, fresh, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "least"), [("int8", 0.999), ("fp8", 0.99)])
def test_logits_point_the_way_of_the_unrounded_ones(loaded: LoadedModel, name: str, least: float) -> None:
    prompt = random.Random(5).choices(range(VOCAB_SIZE - 1), k=40)
    rounded, exact = (TorchRunner(loaded, kv_for(loaded, each)) for each in (name, "auto"))
    table = scattered_table(40, seed=6)
    found, expected = (runner.run([make_slice(prompt, 0, table)])[0] for runner in (rounded, exact))
    assert not torch.equal(found, expected)
    assert float(torch.cosine_similarity(found, expected, dim=0)) >= least


def test_openvino_leaves_a_rounded_pool_to_torch_and_says_so(model_dirs: dict[str, Path]) -> None:
    pytest.importorskip("openvino")
    loaded = load_model(source_of(model_dirs["llama"]), dtype="float32")
    chosen = choose_runner("auto", loaded, kv_for(loaded, "int8"), threads=1)
    assert chosen.name == "torch"
    assert "int8" in chosen.reason


def test_a_worker_has_more_blocks_of_fewer_bytes_and_hands_out_the_models_dtype(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    def load(name: str) -> TorchModel:
        options = LoadOptions(
            dtype="float32", device="cpu", max_model_len=None, block_size=4, threads=None, runner="torch", kv_dtype=name
        )
        return TorchModels(tmp_path, [str(model_dirs["llama"])], options).load("llama", 1 << 20, ignore)

    small, full = load("int8"), load("auto")
    assert (small.facts.kv_dtype, full.facts.kv_dtype, small.facts.dtype) == ("int8", "float32", "float32")
    assert small.facts.num_blocks > 2 * full.facts.num_blocks
    assert small.facts.num_blocks * small.facts.block_bytes <= 1 << 20
    result = small.read(0, [0], 0, 3)  # type: ignore[list-item]
    assert result.k.dtype.name.lower() == "float32"
    assert len(result.k_data) == 4 * 3 * small.facts.num_kv_heads * small.facts.head_dim
