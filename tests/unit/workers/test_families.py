"""Every family, whatever is cut, batched or cached, against `generate` of transformers' own model in float32.

Judged at each step: our logits are theirs within `TOLERANCE`, and the likeliest token is theirs, unless theirs
has another one within `TOLERANCE` of it, where rounding decides. Then `Walk` goes on with their token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from workers.batch import BlockId
from workers.checkpoint import FAMILIES
from workers.loader import load_model
from workers.runner import TorchRunner

from .conftest import BLOCK_SIZE, VOCAB_SIZE, Family, make_slice, scattered_table, scored_slice, source_of
from .families import MODELS, NUM_LAYERS, WINDOW, save_random
from .rig import Rig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from workers.batch import Slice

TOLERANCE = 1e-4
"""float32 logits of magnitude about 5, summed in another order over a few layers."""
BFLOAT16_TOLERANCE = 0.12
"""Eight steps of bfloat16 at magnitude 4. Logits in float32 are as far from theirs and ours alike."""
BFLOAT16_EXCESS = 1.25
"""How far our logits may be from those in float32, on the average, as a multiple of how far theirs are: where operators
are fused, ours are rounded at other places, and not more often."""
NUM_NEW = 8
LENGTHS = (29, 5, 17)
"""Of prompts, in tokens: two outgrow the window, one does so only while it is continued."""


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(random.Random(length).choices(range(VOCAB_SIZE - 1), k=length))


@dataclass
class Walk:
    """What `generate` makes of a prompt: its tokens, and the logits each was chosen by, `[NUM_NEW, vocab_size]`."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logits: torch.Tensor
    table: list[BlockId] = field(default_factory=list)

    def judge(self, step: int, ours: torch.Tensor) -> None:
        theirs = self.logits[step]
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        choice = int(ours.argmax())
        if choice != self.tokens[step]:
            assert theirs.max() - theirs[choice] <= TOLERANCE, f"token {step} is {choice}, not {self.tokens[step]}"

    def judge_output(self, output: list[int]) -> None:
        """All tokens, drawn by somebody else; what follows another one of two tied tokens cannot be compared."""
        assert len(output) == NUM_NEW
        for step, token in enumerate(output):
            if token != self.tokens[step]:
                theirs = self.logits[step]
                assert theirs.max() - theirs[token] <= TOLERANCE, f"token {step} is {token}, not {self.tokens[step]}"
                return

    def slice_at(self, step: int) -> Slice:
        """The decode that computes the logits of token `step`, which is after the first."""
        return make_slice(self.tokens[step - 1 : step], len(self.prompt) + step - 1, self.table)


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    torch.set_num_threads(1)
    path: Path = save_random(request.param, tmp_path_factory.mktemp("family") / "model")
    return Family(request.param, path, load_model(source_of(path), dtype="float32"), load_plain(path, torch.float32))


def load_plain(path: Path, dtype: torch.dtype) -> Any:
    """The model as transformers alone runs it. Gemma 2 eagerly, since older releases forget its cap otherwise."""
    implementation = "eager" if AutoConfig.from_pretrained(path).model_type == "gemma2" else None
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=implementation)
    return plain.eval()


@pytest.fixture(scope="module")
def walks(family: Family) -> list[Walk]:
    return [walk_of(family, prompt_of(length)) for length in LENGTHS]


def walk_of(family: Family, prompt: tuple[int, ...]) -> Walk:
    ids = torch.tensor([prompt])
    output = family.plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Walk(prompt, output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits))


def lay_out(walks: Sequence[Walk], seed: int) -> None:
    """Give each its own blocks, scattered over the pool."""
    blocks = iter(scattered_table(256, seed))
    for walk in walks:
        walk.table = [next(blocks) for _ in range(-(-(len(walk.prompt) + NUM_NEW) // BLOCK_SIZE))]


def prefill(runner: Any, walk: Walk, chunk: int, start: int = 0) -> None:
    """Compute the prompt from `start` on in chunks and judge the logits of its last token."""
    for begin in range(start, len(walk.prompt), chunk):
        is_last = begin + chunk >= len(walk.prompt)
        logits = runner.run([make_slice(walk.prompt[begin : begin + chunk], begin, walk.table, wants_logits=is_last)])
        assert logits.shape == (is_last, VOCAB_SIZE)
        if is_last:
            walk.judge(0, logits[0])


def decode(runner: Any, walks: Sequence[Walk]) -> None:
    """Continue all of them together, to the end."""
    for step in range(1, NUM_NEW):
        logits = runner.run([walk.slice_at(step) for walk in walks])
        for walk, row in zip(walks, logits, strict=True):
            walk.judge(step, row)


def test_every_family_that_is_served_has_models_here() -> None:
    assert {make_config().model_type for make_config in MODELS.values()} == set(FAMILIES)


def test_random_models_listen_to_what_they_see_and_are_not_decided_by_ties(family: Family, walks: list[Walk]) -> None:
    """Else the other tests would show nothing."""
    prompt = torch.tensor([walks[0].prompt])
    other = prompt.clone()
    other[0, -WINDOW] += 1
    with torch.inference_mode():
        change = family.plain(prompt).logits[0, -1] - family.plain(other).logits[0, -1]
    assert float(change.abs().max()) > 100 * TOLERANCE
    best = torch.cat([walk.logits for walk in walks]).topk(2).values
    assert float((best[:, 0] - best[:, 1] > TOLERANCE).float().mean()) > 0.9


def test_either_of_two_tied_tokens_is_right_and_one_beyond_rounding_is_not() -> None:
    theirs = torch.tensor([[0.0, 1.0, 1.0 - TOLERANCE / 2, 1.0 - 2 * TOLERANCE]])
    walk = Walk((0,), [1], theirs)
    walk.judge(0, theirs[0] + torch.tensor([0, -TOLERANCE / 2, TOLERANCE / 2, 0]))
    with pytest.raises(AssertionError, match="token 0 is 3, not 1"):
        walk.judge(0, theirs[0] + torch.tensor([0, -1.5 * TOLERANCE, -1.5 * TOLERANCE, 1.5 * TOLERANCE]))
    with pytest.raises(AssertionError, match="not close"):
        walk.judge(0, theirs[0] + torch.tensor([0, 0, 0, 5 * TOLERANCE]))


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_alone_it_says_what_generate_says_whatever_the_chunks(family: Family, walks: list[Walk], chunk: int) -> None:
    runner = family.make_runner()
    lay_out(walks, seed=chunk)
    prefill(runner, walks[0], chunk)
    decode(runner, walks[:1])


@pytest.mark.parametrize("num_cached", [1, 4, 11, 28])
def test_any_part_of_the_prompt_may_be_in_the_pool(family: Family, walks: list[Walk], num_cached: int) -> None:
    """Another sequence with the same beginning computed its first blocks; they are shared."""
    runner, walk = family.make_runner(), walks[0]
    donor = scattered_table(num_cached, seed=num_cached)
    runner.run([make_slice(walk.prompt[:num_cached], 0, donor, wants_logits=False)])
    others = [block for block in scattered_table(256, seed=99) if block not in donor]
    walk.table = donor + others[: -(-(len(walk.prompt) + NUM_NEW) // BLOCK_SIZE) - len(donor)]
    prefill(runner, walk, 64, start=num_cached)
    decode(runner, [walk])


def test_in_a_batch_of_mixed_lengths_each_says_what_it_says_alone(family: Family, walks: list[Walk]) -> None:
    """A prefill from nothing, one that goes on, and a decode in one pass; then all of them decode together."""
    runner = family.make_runner()
    lay_out(walks, seed=3)
    long, short, other = walks
    prefill(runner, short, 64)
    runner.run([make_slice(long.prompt[:13], 0, long.table, wants_logits=False)])
    mixed = [
        make_slice(other.prompt, 0, other.table),
        make_slice(long.prompt[13:20], 13, long.table, wants_logits=False),
        short.slice_at(1),
    ]
    logits = runner.run(mixed)
    assert logits.shape == (2, VOCAB_SIZE)
    other.judge(0, logits[0])
    short.judge(1, logits[1])
    prefill(runner, long, 64, start=20)
    decode(runner, walks)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_all_logits_of_a_prompt_are_those_of_transformers_if_they_are_wanted(
    family: Family, walks: list[Walk], chunk: int
) -> None:
    """Beside a decode and a prompt of whose logits only the last are wanted, and in pieces of any length."""
    runner = family.make_runner()
    lay_out(walks, seed=9)
    long, short, other = walks
    prefill(runner, short, 64)
    rows = []
    for begin in range(0, len(long.prompt), chunk):
        piece = scored_slice(long.prompt, begin, min(begin + chunk, len(long.prompt)), long.table)
        logits = runner.run([short.slice_at(1), piece, make_slice(other.prompt, 0, other.table)])
        short.judge(1, logits[0])
        other.judge(0, logits[-1])
        rows.append(logits[1:-1])
    with torch.inference_mode():
        theirs = family.plain(torch.tensor([long.prompt])).logits[0]
    torch.testing.assert_close(torch.cat(rows), theirs, atol=TOLERANCE, rtol=TOLERANCE)
    decode(runner, walks)


def test_pool_holds_what_transformers_caches(family: Family, walks: list[Walk]) -> None:
    """Of all tokens, also those that a window has left behind, in one shape for every layer."""
    runner, walk = family.make_runner(), walks[0]
    length = len(walk.prompt)
    lay_out(walks, seed=5)
    prefill(runner, walk, 6)
    cache = DynamicCache()
    with torch.inference_mode():
        family.plain(torch.tensor([walk.prompt]), past_key_values=cache)
    assert length > WINDOW
    assert len(cache.layers) == NUM_LAYERS
    for layer, theirs in enumerate(cache.layers):
        expected: Any = theirs
        keys, values = runner.kv.read(layer, walk.table, 0, length)
        torch.testing.assert_close(keys, expected.keys[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(values, expected.values[0].transpose(0, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_what_lies_in_the_pool_beyond_a_sequence_is_never_seen(family: Family, walks: list[Walk]) -> None:
    """Blocks that others left behind are full of anything; a NaN would spread to every output."""
    runner = family.make_runner()
    for tensor in (*runner.kv.keys, *runner.kv.values):
        tensor.fill_(torch.nan)
    lay_out(walks, seed=6)
    for walk in walks:
        prefill(runner, walk, 10)
    decode(runner, walks)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_after_preemption_and_eviction_it_says_what_generate_says(
    family: Family, walks: list[Walk], num_steps: int
) -> None:
    """One that is half computed, or decodes, gives its blocks up; the other one evicts most of what it leaves."""
    long, _, other = walks
    kv = family.make_kv(10)
    rig = Rig(TorchRunner(family.loaded, kv), kv, num_blocks=10, max_tokens_per_step=16)
    rig.submit(b"long", long.prompt, NUM_NEW, priority=1)
    for _ in range(num_steps):
        rig.step()
    rig.submit(b"other", other.prompt, NUM_NEW)
    rig.run()
    pool = rig.scheduler.pool_stats()
    assert (pool.preemptions, pool.evictions > 0) == (1, True)
    long.judge_output(rig.output(b"long"))
    other.judge_output(rig.output(b"other"))


def test_decodes_share_a_pass_also_with_a_prefill_between_them(family: Family, walks: list[Walk]) -> None:
    """One pass for everything, or where the family attends in its own code, one for each length of slices."""
    runner = family.make_runner()
    lay_out(walks, seed=7)
    for walk in (walks[0], walks[2]):
        prefill(runner, walk, 64)
    passes: list[None] = []
    hook = family.loaded.model.register_forward_hook(lambda *_: passes.append(None))
    logits = runner.run([walks[0].slice_at(1), make_slice(walks[1].prompt, 0, walks[1].table), walks[2].slice_at(1)])
    hook.remove()
    assert len(passes) == (2 if family.loaded.has_own_attention else 1)
    for walk, step, row in zip(walks, (1, 0, 1), logits, strict=True):
        walk.judge(step, row)


def test_in_bfloat16_logits_are_those_of_transformers_in_bfloat16(family: Family, walks: list[Walk]) -> None:
    plain = load_plain(family.path, torch.bfloat16)
    ours = Family(family.name, family.path, load_model(source_of(family.path), dtype="bfloat16"), plain)
    runner = ours.make_runner()
    lay_out(walks, seed=8)
    long, short, other = walks
    runner.run([make_slice(long.prompt[:13], 0, long.table, wants_logits=False)])
    logits = runner.run(
        [
            make_slice(long.prompt[13:], 13, long.table),
            make_slice(short.prompt, 0, short.table),
            make_slice(other.prompt, 0, other.table),
        ]
    )
    with torch.inference_mode():
        theirs = torch.stack([plain(torch.tensor([walk.prompt])).logits[0, -1].float() for walk in walks])
    torch.testing.assert_close(logits, theirs, atol=BFLOAT16_TOLERANCE, rtol=0)
    exact = torch.stack([walk.logits[0] for walk in walks])
    assert (logits - exact).abs().mean() <= BFLOAT16_EXCESS * (theirs - exact).abs().mean()
