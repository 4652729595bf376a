"""The engine's core: which sequence computes what in the next forward pass, and who waits, yields or ends.

The engine, for ever: feed what clients asked (`submit`, `cancel`, `pause`, `resume`), `plan` a step, run its batch,
`commit` what was sampled. Each returns events in the order in which clients must see them, and what was submitted
without an exception ends in exactly one Finished or Failed. There is no clock, model or socket here.

- There is one line, by arrival, class and what is left to compute (`Generation.place`); waiting makes up for class and
  for length, so the wait of each is bounded whoever else comes. Admission goes along it and is all-or-nothing: blocks
  for all tokens and one more, or it waits. For want of a seat or of blocks, one of a lower class and further back
  yields.
- A step is shared out anew each time (Yu et al. 2022, Orca, section 4.1): a token for every decode, and chunks of
  prefills in what is left of `max_tokens_per_step` (Agrawal et al. 2024, Sarathi-Serve). `workers.turns` has the
  rules, by which nobody starves.
- No block is computed twice at the same time: who needs one that another is computing waits for it and shares it.
- A sequence grows block by block. When there is no room the last in line gives up its blocks and waits again, to be
  recomputed (Kwon et al. 2023, PagedAttention, section 4.5); paused ones first. So the first always proceeds.
- What can never run, as the pool is too small or all else in it is pinned, fails with NoSpace instead of waiting.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from itertools import chain
from operator import attrgetter

from bus.errors import Cancelled, Conflict, DeadlineExceeded, KVCacheError, NoSpace
from bus.messages import FinishReason
from bus.stats import EngineStats, PoolStats
from workers.generation import Generation, check_task
from workers.lifecycle import Change, State
from workers.prefix_cache import PrefixCache
from workers.sequences import Sequence, SequenceTable
from workers.tasks import BlockCopy, Event, Failed, Finished, GenerationTask, Sampled, SchedulerConfig, Started, Step
from workers.turns import Pace, Shares, in_line


class Scheduler:
    """Schedules one model's generations over one pool of blocks."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache) -> None:
        self.sequences = SequenceTable(cache)
        self._config = config
        self._cache = cache
        self._capacity = cache.pool.num_blocks * cache.block_size
        self._live: dict[bytes, Generation] = {}
        self._waiting: list[Generation] = []  # by place
        self._admitted: dict[Generation, None] = {}  # longest waiting first
        self._in_step: tuple[Step, tuple[Generation, ...]] | None = None
        self._num_submitted = 0
        self._num_preempted = 0
        self._totals: Counter[str] = Counter()  # by the names of EngineStats
        self._pace = Pace()
        self._planned_at = 0.0

    # --- what clients ask ---

    def submit(self, task: GenerationTask, now: float) -> list[Event]:
        """Queue a task; a resumed stream that had got its last token already finishes at once.

        Raises, with nothing changed: BadArgument or TooLarge for a task that is wrong for this model, NoSpace for
        one that the whole pool could not hold, Conflict for a key or a sequence name that is in use.
        """
        check_task(task, self._config, self._cache.block_size)
        if task.key in self._live:
            raise Conflict(f"generation {task.key.hex()} has not ended yet")
        num_tokens = len(task.prompt) + len(task.resume)
        if num_tokens > self._capacity:
            raise NoSpace(f"{num_tokens} tokens do not fit the pool of {self._capacity}", detail=self._capacity)
        sequence = Sequence(
            task.seed,
            [*task.prompt, *task.resume],
            task.sequence,
            task.landmarks,
            num_to_score=task.num_to_score,
            num_top=task.prompt_logprobs or 0,
        )
        self.sequences.begin(sequence)
        generation = Generation(task, sequence, self._num_submitted, self._max_len(task), now, self._pace.token_s)
        self._num_submitted += 1
        self._live[task.key] = generation
        self._queue(generation)
        reason = generation.finish_reason()
        return [] if reason is None else [self._finish(generation, reason, now)]

    def cancel(self, key: bytes, now: float) -> list[Event]:
        """End it for its client, who gets Cancelled. Nothing happens if it has ended or never was."""
        return self.fail(key, Cancelled("cancelled by the client"), now)

    def fail(self, key: bytes, error: KVCacheError, now: float) -> list[Event]:
        """End it with an error. KV computed so far stays under its sequence's name, as after a cancel."""
        generation = self._live.get(key)
        return [] if generation is None else [self._fail(generation, error, now)]

    def finish(self, key: bytes, reason: FinishReason, now: float, num_outputs: int) -> list[Event]:
        """End it well for a reason that is not in the token ids, such as a stop string, with `num_outputs` tokens.

        Those that it may have beyond these are forgotten."""
        generation = self._live.get(key)
        if generation is None:
            return []
        self.sequences.shorten(generation.sequence, len(generation.task.prompt) + num_outputs)
        return [self._finish(generation, reason, now)]

    def pause(self, key: bytes) -> None:
        """Take no further steps for it: its stream has all the unacknowledged tokens it may have."""
        if key in self._live:
            self._live[key].move(Change.PAUSE)

    def resume(self, key: bytes) -> None:
        """Its stream's window has room again."""
        if key in self._live:
            self._live[key].move(Change.RESUME)

    # --- steps ---

    def plan(self, now: float) -> Step:
        """Choose the next forward pass; its batch is empty only when all that live are paused.

        The blocks in the batch stay as they are until `commit`, whatever is cancelled in between.
        """
        assert self._in_step is None, "the step before was not committed"
        events = self._expire(now)
        chosen: dict[Generation, int] = {}
        while not chosen:
            # Again after each round in which none found room: it may have left the room that a waiting one needs.
            events += self._admit(now)
            if self._num_active() == 0:
                break
            chosen = self._with_room(self._share_out(), now, events)
        for generation in chosen:
            self._note_turn(generation)
        batch = tuple(generation.sequence.next_slice(num_tokens) for generation, num_tokens in chosen.items())
        step = Step(tuple(generation.task.key for generation in chosen), batch, tuple(events), self._copies())
        if chosen:
            self._in_step = (step, tuple(chosen))
            self._planned_at = now
        return step

    def commit(self, step: Step, sampled: AbstractSequence[int | None], now: float) -> list[Event]:
        """Record that the step's copies were made and its batch was run.

        sampled: one per slice, the new token where logits were wanted, else None. Those of generations that have
        ended since the plan are ignored. Raises ValueError if there are not as many as slices.
        """
        assert self._in_step is not None, "no step was planned"
        planned, generations = self._in_step
        assert step is planned, "another step was planned"
        if len(sampled) != len(step.batch):
            raise ValueError(f"{len(sampled)} tokens were sampled for {len(step.batch)} slices")
        self._in_step = None
        self._totals["steps"] += 1
        self._pace.ran(_num_prefilled(generations, step), now - self._planned_at)
        for copy in step.copies:
            if copy.key in self._live:
                self.sequences.copied(self._live[copy.key].sequence)
        events: list[Event] = []
        for generation, piece, token_id in zip(generations, step.batch, sampled, strict=True):
            if generation.state is not State.FINISHED:
                self.sequences.advance(generation.sequence, piece.start + len(piece.token_ids))
                generation.find_place(generation.sequence.num_left)
                if piece.wants_logits:
                    assert token_id is not None, "a slice that wants logits needs a sampled token"
                    events += self._add_token(generation, token_id, now)
        return events

    def next_deadline(self) -> float:
        """When to `plan` again even if nobody asks anything: the first deadline, or `math.inf`."""
        return min((generation.task.deadline for generation in self._live.values()), default=math.inf)

    # --- figures ---

    def engine_stats(self) -> EngineStats:
        """Generation so far. The figures of streams (gaps, pulls) are not the scheduler's, and 0."""
        running = len(self._admitted)
        backlog = sum(it.sequence.num_left for it in self._live.values() if it.first_token_at is None)
        waiting = len(self._live) - running
        return EngineStats(running=running, waiting=waiting, backlog_tokens=backlog, **self._totals)

    def pool_stats(self) -> PoolStats:
        blocks, hits = self._cache.pool.counts(), self.sequences.hits
        return PoolStats(
            num_blocks=blocks.total,
            free_blocks=blocks.free,
            held_blocks=blocks.held,
            cached_blocks=blocks.cached,
            block_size=self._cache.block_size,
            evictions=blocks.evictions,
            lookup_tokens=hits.lookup_tokens,
            hit_tokens=hits.hit_tokens,
            preemptions=self._num_preempted,
            eviction_policy=self._cache.policy,
            copied_tokens=self.sequences.copied_tokens,
            block_hits=blocks.hits,
            blocks_by_hits=blocks.by_hits,
            salts=hits.top(),
            sequence_evictions=self.sequences.evictions,
        )

    # --- who is in: deadlines, admission, preemption ---

    def _expire(self, now: float) -> list[Event]:
        late = [generation for generation in self._live.values() if generation.task.deadline <= now]
        return [self._fail(generation, DeadlineExceeded("the deadline has passed"), now) for generation in late]

    def _admit(self, now: float) -> list[Event]:
        """Let in, in their places, whom there is room for; the first who must wait keeps all behind waiting."""
        events: list[Event] = []
        for generation in tuple(self._waiting):
            if generation.state is State.PARKED:
                continue
            if not self._try_admit(generation, now):
                if self._admitted:
                    break
                events.append(self._fail(generation, NoSpace("all blocks of the pool are pinned"), now))
            elif generation.admitted_at is None:
                events.append(self._start(generation, now))
        return events

    def _try_admit(self, generation: Generation, now: float) -> bool:
        """Give it a seat and blocks, which others may have to give up for it. False if it must wait."""
        num_blocks = self._blocks_to_start(generation)
        while not self._has_seat() or self.sequences.admit(generation.sequence, num_blocks, now) is None:
            victim = self._who_yields_to(generation, num_blocks, now)
            if victim is None:
                return False
            self._preempt(victim)
        self._waiting.remove(generation)
        generation.find_place(generation.sequence.num_left)
        generation.move(Change.ADMIT)
        self._note_turn(generation)
        return True

    def _who_yields_to(self, generation: Generation, num_blocks: int, now: float) -> Generation | None:
        """Who gives up seat or blocks for one that waits; None if nobody has to, or all who do would not be enough."""
        if self._num_active() == 0:
            return self._victim(self._admitted)  # only paused ones are in
        lower = [other for other in self._admitted if _yields(other, generation)]
        leaving = chain.from_iterable(self.sequences.to_give_up(other.sequence, now) for other in lower)
        if not lower or not self.sequences.has_room(generation.sequence, num_blocks, now, leaving):
            return None
        if self._has_seat():
            return self._victim(lower)
        return self._victim(other for other in lower if other.state is not State.PAUSED)

    def _has_seat(self) -> bool:
        return self._num_active() < self._config.max_num_seqs

    def _start(self, generation: Generation, now: float) -> Started:
        prompt_tokens = len(generation.task.prompt)
        generation.admitted_at = now
        generation.cached_tokens = min(generation.sequence.num_computed, prompt_tokens)
        self._totals["prompt_tokens"] += prompt_tokens
        self._totals["cached_tokens"] += generation.cached_tokens
        return Started(generation.task.key, prompt_tokens, generation.cached_tokens)

    def _with_room(self, shares: dict[Generation, int], now: float, events: list[Event]) -> dict[Generation, int]:
        """Those of the chosen who have blocks for their tokens. The first in line grows first: who yields has not."""
        for generation in sorted(shares, key=_place):
            if generation in self._admitted:
                self._grow(generation, shares[generation], now, events)
        return {generation: num for generation, num in shares.items() if generation in self._admitted}

    def _grow(self, generation: Generation, num_tokens: int, now: float, events: list[Event]) -> None:
        """Give it blocks for its next tokens, taken from the last in line if need be, which may be itself."""
        sequence = generation.sequence
        while not self.sequences.grow(sequence, sequence.num_computed + num_tokens, now):
            victim = self._victim(self._admitted)
            assert victim is not None, "one that is not admitted grows"
            if victim is generation and len(self._admitted) == 1:
                events.append(self._fail(generation, NoSpace("all other blocks of the pool are pinned"), now))
                return
            self._preempt(victim)
            if victim is generation:
                return

    def _victim(self, among: Iterable[Generation]) -> Generation | None:
        """The first to give up its blocks: paused ones before others, the last in line before those before it."""
        return max(among, key=lambda generation: (generation.state is State.PAUSED, generation.place), default=None)

    def _copies(self) -> tuple[BlockCopy, ...]:
        """The copies that those need who were let in just now."""
        needed = [(generation.task.key, generation.sequence.copy) for generation in self._admitted]
        return tuple(BlockCopy(key, *copy) for key, copy in needed if copy is not None)

    def _preempt(self, generation: Generation) -> None:
        generation.move(Change.PREEMPT)
        self.sequences.give_up(generation.sequence)
        del self._admitted[generation]
        self._queue(generation)
        self._num_preempted += 1

    def _queue(self, generation: Generation) -> None:
        generation.find_place(self.sequences.num_missing(generation.sequence))
        insort(self._waiting, generation, key=_place)

    # --- who takes part in a step, and with how much ---

    def _share_out(self) -> dict[Generation, int]:
        """The tokens that each of the chosen gets of the next step. Not empty when anybody can run."""
        config, step = self._config, self._step_number
        shares = Shares(step, config.max_tokens_per_step, config.max_num_seqs)
        for generation in in_line(self._active(), step):
            if shares.is_full:
                break
            self._catch_up(generation)
            shares.offer(generation)
        return shares.num_tokens

    def _catch_up(self, generation: Generation) -> None:
        """Let a prefill share what others have computed of its tokens since it last got on."""
        if generation.state is not State.PREFILL:
            return
        num_saved = self.sequences.catch_up(generation.sequence)
        if num_saved == 0:
            return
        self._note_turn(generation)
        generation.find_place(generation.sequence.num_left)
        if generation.first_token_at is None:
            before = generation.cached_tokens
            generation.cached_tokens = min(before + num_saved, len(generation.task.prompt))
            self._totals["cached_tokens"] += generation.cached_tokens - before

    def _note_turn(self, generation: Generation) -> None:
        """It has got on, or in: all others that are admitted have waited longer."""
        self._admitted.pop(generation, None)
        self._admitted[generation] = None
        generation.last_turn = self._step_number

    def _active(self) -> Iterator[Generation]:
        return (generation for generation in self._admitted if generation.state is not State.PAUSED)

    def _num_active(self) -> int:
        return sum(1 for _ in self._active())

    @property
    def _step_number(self) -> int:
        return self._totals["steps"]

    def _max_len(self, task: GenerationTask) -> int:
        """All tokens it may come to. The last one needs no slot, so a full pool holds all but that."""
        return min(len(task.prompt) + task.max_tokens, self._config.max_model_len, self._capacity + 1)

    def _blocks_to_start(self, generation: Generation) -> int:
        """Blocks for its tokens and one more to grow into, unless it will not grow that far."""
        size = self._cache.block_size
        in_use = -(-len(generation.sequence.token_ids) // size)
        at_most = -(-(generation.max_len - 1) // size)
        return min(in_use + 1, at_most)

    # --- tokens and ends ---

    def _add_token(self, generation: Generation, token_id: int, now: float) -> list[Event]:
        if generation.state is State.PREFILL:
            generation.move(Change.PREFILLED)
        if generation.first_token_at is None:
            generation.first_token_at = now
        token = Sampled(generation.task.key, generation.num_outputs, token_id)
        generation.sequence.append(token_id)
        self._totals["completion_tokens"] += 1
        reason = generation.finish_reason()
        return [token] if reason is None else [token, self._finish(generation, reason, now)]

    def _finish(self, generation: Generation, reason: FinishReason, now: float) -> Finished:
        usage = generation.usage(now)
        self._end(generation)
        self._totals["finished"] += 1
        return Finished(generation.task.key, reason, usage)

    def _fail(self, generation: Generation, error: KVCacheError, now: float) -> Failed:
        usage = generation.usage(now)
        self._end(generation)
        self._totals["cancelled" if isinstance(error, Cancelled) else "failed"] += 1
        return Failed(generation.task.key, error, usage)

    def _end(self, generation: Generation) -> None:
        """Forget it; its KV goes to its name or back to the pool."""
        if generation.state in (State.WAITING, State.PARKED):
            self._waiting.remove(generation)
        else:
            del self._admitted[generation]
        generation.move(Change.END)
        del self._live[generation.task.key]
        self.sequences.end(generation.sequence)


_place = attrgetter("place")


def _num_prefilled(generations: Iterable[Generation], step: Step) -> int:
    """Tokens of the step that are not of decodes."""
    pairs = zip(generations, step.batch, strict=True)
    return sum(len(piece.token_ids) for generation, piece in pairs if generation.state is State.PREFILL)


def _yields(other: Generation, generation: Generation) -> bool:
    """Whether `other`, who is in, gives way to one that is not: of a lower class, and it has not waited that off."""
    return other.task.priority > generation.task.priority and other.place > generation.place
