"""Scheduler and real tiny models together: whatever happens around it, a sequence comes out as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests.unit.workers.conftest import VOCAB_SIZE, Family, make_slice, scattered_table
from tests.unit.workers.rig import Rig
from workers.batch import BlockId
from workers.keys import SequenceKey
from workers.runner import TorchRunner
from workers.tasks import Finished, GenerationTask

MAX_TOKENS = 14
TIE = 1e-4
"""Difference of two fp32 logits of magnitude about 5 that rounding can turn."""
NAMES = (None, None, SequenceKey("", "x"), SequenceKey("", "y"))


def make_prompts(draw: random.Random) -> list[tuple[int, ...]]:
    """Some that begin alike, for shares of every length, and some that do not."""
    stem = [draw.randrange(VOCAB_SIZE) for _ in range(40)]
    forks = [(*stem[:length], draw.randrange(VOCAB_SIZE)) for length in (3, 8, 17, 24, 39)]
    return [tuple(stem), *forks, *(tuple(draw.choices(range(VOCAB_SIZE), k=length)) for length in (1, 9, 22))]


def rig_of(family: Family, num_blocks: int, max_tokens_per_step: int, max_num_seqs: int) -> Rig:
    kv = family.make_kv(num_blocks)
    return Rig(TorchRunner(family.loaded, kv), kv, num_blocks, max_tokens_per_step, max_num_seqs)


class Alone:
    """Each prompt by itself in a pool of its own, its prefill in one piece."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def would_say(self, prompt: tuple[int, ...], output: list[int]) -> bool:
        """Whether `output` begins as that of the prompt alone; a tie within rounding may go either way, and ends it."""
        if prompt not in self._logits:
            self._logits[prompt] = self._generate(prompt)
        for logits, token in zip(self._logits[prompt], output, strict=False):
            if token != int(logits.argmax()):
                return float(logits.max() - logits[token]) < TIE
        return True

    def _generate(self, prompt: tuple[int, ...]) -> torch.Tensor:
        runner, tokens = self._family.make_runner(), list(prompt)
        table: list[BlockId] = scattered_table(len(prompt) + MAX_TOKENS, seed=1)
        rows: list[torch.Tensor] = []
        start = 0
        for _ in range(MAX_TOKENS):
            rows.append(runner.run([make_slice(tokens[start:], start, table)])[0])
            start = len(tokens)
            tokens.append(int(rows[-1].argmax()))
        return torch.stack(rows)


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_every_sequence_what_it_gets_alone(family: Family, seed: int) -> None:
    """Arrivals, cancels, pauses, flushes and a pool so small that sequences are evicted and preempted."""
    draw = random.Random(seed)
    rig = rig_of(
        family,
        num_blocks=(14, 20, 40)[seed % 3],
        max_tokens_per_step=draw.choice([5, 16, 64]),
        max_num_seqs=draw.choice([3, 8, 64]),
    )
    prompts, live, paused = make_prompts(draw), dict[bytes, GenerationTask](), set[bytes]()
    tasks: dict[bytes, GenerationTask] = {}
    for number in range(60):
        free = [name for name in NAMES if name is None or name not in {task.sequence for task in live.values()}]
        key = number.to_bytes(2)
        prompt, num_tokens = draw.choice(prompts), draw.randint(1, MAX_TOKENS)
        tasks[key] = live[key] = rig.submit(key, prompt, num_tokens, sequence=draw.choice(free))
        if draw.random() < 0.25:
            rig.events += rig.scheduler.cancel(draw.choice(list(live)), 0.0)
        if draw.random() < 0.3:
            paused.add(draw.choice(list(live)))
            rig.scheduler.pause(max(paused))
        if draw.random() < 0.4 and paused:
            rig.scheduler.resume(paused.pop())
        if draw.random() < 0.05:
            rig.cache.flush()
        for _ in range(draw.choice([0, 1, 2, 5])):
            rig.step()
        live = {key: task for key, task in live.items() if key not in rig.ended}
    for key in live:
        rig.scheduler.resume(key)
    rig.run()
    assert rig.ended.keys() == tasks.keys()
    assert rig.most_in_step > 2
    assert rig.num_copies > 0
    alone = Alone(family)
    for key, task in tasks.items():
        assert alone.would_say(task.prompt, rig.output(key))
        if isinstance(rig.ended[key], Finished):
            assert len(rig.output(key)) == task.max_tokens
    for name in rig.scheduler.sequences.names():
        rig.scheduler.sequences.delete(name)
    assert rig.cache.pool.counts().held == 0


def test_the_schedules_do_preempt_evict_and_share(family: Family) -> None:
    """Or else the test above would prove little."""
    rig = rig_of(family, num_blocks=14, max_tokens_per_step=16, max_num_seqs=8)
    for number, prompt in enumerate(make_prompts(random.Random(0))):
        rig.submit(bytes([number]), prompt, MAX_TOKENS)
    rig.run()
    pool = rig.scheduler.pool_stats()
    assert min(pool.preemptions, pool.evictions, pool.hit_tokens) > 0
