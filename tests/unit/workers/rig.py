"""A scheduler over a real runner, step by step: what is left of a worker without its threads, drawing greedily."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcache.hashing import HashSeed
from tests.unit.workers.conftest import VOCAB_SIZE
from workers.keys import SequenceKey
from workers.paged_kv import PagedKV
from workers.prefix_cache import PrefixCache
from workers.runners import Runner
from workers.scheduler import Scheduler
from workers.tasks import Event, Failed, Finished, GenerationTask, Sampled, SchedulerConfig


@dataclass
class Rig:
    """kv: the runner's; of its blocks the first `num_blocks` are used."""

    runner: Runner
    kv: PagedKV
    num_blocks: int
    max_tokens_per_step: int
    max_num_seqs: int = 64
    events: list[Event] = field(default_factory=list)
    most_in_step: int = 0
    num_copies: int = 0

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            max_model_len=128,
            vocab_size=VOCAB_SIZE,
            max_tokens_per_step=self.max_tokens_per_step,
            max_num_seqs=self.max_num_seqs,
        )
        self.cache = PrefixCache(self.num_blocks, self.kv.plan.block_size)
        self.scheduler = Scheduler(config, self.cache)

    def submit(
        self,
        key: bytes,
        prompt: tuple[int, ...],
        max_tokens: int,
        *,
        sequence: SequenceKey | None = None,
        priority: int = 0,
    ) -> GenerationTask:
        seed = HashSeed(model="m", dtype="float32", block_size=self.cache.block_size)
        task = GenerationTask(
            key=key, prompt=prompt, seed=seed, max_tokens=max_tokens, sequence=sequence, priority=priority
        )
        self.events += self.scheduler.submit(task, 0.0)
        return task

    def step(self) -> bool:
        """One step, its invariants checked; False if there was nothing to compute."""
        step = self.scheduler.plan(0.0)
        self.events += step.events
        if step.copies:
            self.kv.copy_blocks([copy.source for copy in step.copies], [copy.target for copy in step.copies])
            self.num_copies += len(step.copies)
        if step.batch:
            rows = iter(self.runner.run(step.batch).argmax(dim=1).tolist())
            sampled = [next(rows) if piece.wants_logits else None for piece in step.batch]
            self.events += self.scheduler.commit(step, sampled, 0.0)
        self.scheduler.sequences.check()
        self.most_in_step = max(self.most_in_step, len(step.batch))
        return bool(step.batch)

    def run(self) -> None:
        """Until nothing more can run."""
        while self.step():
            pass

    def output(self, key: bytes) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Sampled) and event.key == key]

    @property
    def ended(self) -> dict[bytes, Finished | Failed]:
        return {event.key: event for event in self.events if isinstance(event, Finished | Failed)}
