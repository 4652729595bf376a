"""The scheduler: a fake runner whose "KV" proves that every token saw exactly its own prefix, and the rules."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.errors import BadArgument, Conflict, DeadlineExceeded, InternalError, KVCacheError, NoSpace, TooLarge
from bus.messages import FinishReason
from kvcache.hashing import HashSeed
from kvcache.places import CLASS_S
from workers.audit import Auditor
from workers.batch import Slice
from workers.eviction import EVICTION_POLICIES, EvictionPolicy
from workers.keys import SequenceKey
from workers.prefix_cache import PrefixCache
from workers.scheduler import Scheduler
from workers.tasks import (
    Event,
    Failed,
    Finished,
    GenerationTask,
    Sampled,
    SchedulerConfig,
    Started,
    Step,
    Usage,
)
from workers.turns import MAX_SCORED, PATIENCE, Pace

VOCAB = 50
EOS = 7
SEED = HashSeed(model="m", dtype="float32", block_size=4)
PROMPT = (1, 2, 3, 4, 5, 6)


def kv_of(before: int, token: int) -> int:
    """The fake KV of one position depends on its token and all before it, as the real one does."""
    return hash((before, token)) & 0xFFFFFFFF


def next_token(kv: int) -> int:
    return kv % VOCAB


def oracle(prompt: tuple[int, ...], max_tokens: int, stops: frozenset[int] = frozenset()) -> list[int]:
    """What a model that knows no pool would generate."""
    kv, output = 0, list[int]()
    for token in prompt:
        kv = kv_of(kv, token)
    while len(output) < max_tokens and not (output and output[-1] in stops):
        output.append(next_token(kv))
        kv = kv_of(kv, output[-1])
    return output


def scores_of(prompt: tuple[int, ...]) -> list[tuple[int, int]]:
    """What such a model would tell of the prompt's tokens."""
    return list(zip(accumulate(prompt, kv_of, initial=0), prompt, strict=False))[1:]


@dataclass
class FakeRunner:
    """Reads and writes the pool as a model does, and checks that what it reads is what it should be."""

    cache: PrefixCache
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    num_tokens: int = 0
    told: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)
    """Of the prompts that are scored, by key: each token but the first, behind the KV that it was judged by."""

    def run(self, step: Step) -> list[int | None]:
        """Copies first. Then all slices at once: none sees what another writes."""
        size, batch = self.cache.block_size, step.batch
        copied = {(copy.target, at): self.memory.get((copy.source, at)) for copy in step.copies for at in range(size)}
        assert len({copy.target for copy in step.copies}) == len(step.copies)
        self.memory |= {slot: kv for slot, kv in copied.items() if kv is not None}
        starts = [self._context(piece) for piece in batch]
        for key, piece, kv in zip(step.keys, batch, starts, strict=False):  # an audit's step has no keys
            self._score(key, piece, kv)
        return [self._run_slice(piece, kv) for piece, kv in zip(batch, starts, strict=True)]

    def _context(self, piece: Slice) -> int:
        size, last = self.cache.block_size, piece.start - 1
        return self.memory[piece.block_table[last // size], last % size] if piece.start else 0

    def _score(self, key: bytes, piece: Slice, kv: int) -> None:
        told = self.told.setdefault(key, [])
        for at, (token, target) in enumerate(zip(piece.token_ids, piece.targets, strict=False), piece.start):
            kv = kv_of(kv, token)
            assert at <= len(told), "a token of the prompt was left out"
            told[at : at + 1] = [(kv, target)]

    def _run_slice(self, piece: Slice, kv: int) -> int | None:
        size = self.cache.block_size
        for position, token in enumerate(piece.token_ids, piece.start):
            block = piece.block_table[position // size]
            assert self.cache.pool.ref_count(block) <= 1, "a shared block is written into"
            kv = kv_of(kv, token)
            self.memory[block, position % size] = kv
        self.num_tokens += len(piece.token_ids)
        return next_token(kv) if piece.wants_logits else None

    def read(self, block_table: list[int], num_tokens: int) -> list[int]:
        size = self.cache.block_size
        return [self.memory[block_table[position // size], position % size] for position in range(num_tokens)]


@dataclass
class Engine:
    """Scheduler, pool and fake runner together, on a clock that the test moves."""

    num_blocks: int = 16
    max_tokens_per_step: int = 4
    max_model_len: int = 1000
    max_num_seqs: int = 64
    now: float = 0.0
    token_s: float = 0.0
    policy: EvictionPolicy = "lru"
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = PrefixCache(self.num_blocks, 4, self.policy)
        config = SchedulerConfig(
            max_model_len=self.max_model_len,
            vocab_size=VOCAB,
            max_tokens_per_step=self.max_tokens_per_step,
            max_num_seqs=self.max_num_seqs,
        )
        self.scheduler = Scheduler(config, self.cache)
        self.runner = FakeRunner(self.cache)

    def submit(self, key: bytes, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 5, **more: object) -> None:
        task = GenerationTask(key=key, prompt=prompt, seed=SEED, max_tokens=max_tokens, **more)  # type: ignore[arg-type]  # keywords of the test
        self.events += self.scheduler.submit(task, self.now)

    def step(self) -> Step:
        step = self.scheduler.plan(self.now)
        self.events += step.events
        if step.batch:
            self.now += self.token_s * sum(len(piece.token_ids) for piece in step.batch)
            self.events += self.scheduler.commit(step, self.runner.run(step), self.now)
        self.scheduler.sequences.check()
        return step

    def run(self, limit: int = 2000) -> None:
        """Until nothing more can run."""
        for _ in range(limit):
            if not self.step().batch:
                return
        raise AssertionError("it never comes to rest")

    def tokens(self, key: bytes) -> list[int]:
        found = [event for event in self.events if isinstance(event, Sampled) and event.key == key]
        start = found[0].index if found else 0
        assert [event.index for event in found] == list(range(start, start + len(found)))
        return [event.token_id for event in found]

    def end(self, key: bytes) -> Finished | Failed:
        (end,) = [event for event in self.events if isinstance(event, Finished | Failed) and event.key == key]
        return end

    def error(self, key: bytes) -> KVCacheError:
        end = self.end(key)
        assert isinstance(end, Failed)
        return end.error

    def started(self, key: bytes) -> Started:
        (start,) = [event for event in self.events if isinstance(event, Started) and event.key == key]
        return start


# --- one generation ---


def test_events_of_one_generation_are_start_tokens_end() -> None:
    engine = Engine()
    engine.submit(b"a")
    engine.run()
    expected = oracle(PROMPT, 5)
    usage = Usage(prompt_tokens=6, cached_tokens=0, completion_tokens=5, queued_s=0.0, prefill_s=0.0, decode_s=0.0)
    assert engine.events == [
        Started(b"a", 6, 0),
        *(Sampled(b"a", index, token) for index, token in enumerate(expected)),
        Finished(b"a", FinishReason.LENGTH, usage),
    ]


def test_prefill_goes_in_chunks_and_only_the_last_one_wants_logits() -> None:
    engine = Engine()
    engine.submit(b"a", max_tokens=2)
    pieces = [engine.step().batch[0] for _ in range(3)]
    assert [(piece.start, len(piece.token_ids), piece.wants_logits) for piece in pieces] == [
        (0, 4, False),
        (4, 2, True),
        (6, 1, True),
    ]
    assert engine.step().batch == ()


def test_usage_tells_where_the_time_went() -> None:
    engine = Engine()
    engine.submit(b"a", max_tokens=2)
    for now in (1.0, 3.0, 7.0):
        engine.now = now
        engine.step()
    usage = engine.end(b"a").usage
    assert (usage.queued_s, usage.prefill_s, usage.decode_s) == (1.0, 2.0, 4.0)


def first_output_with_eos() -> tuple[tuple[int, ...], int]:
    """A prompt whose output holds EOS, not as its first token; and where."""
    for prompt in ((start, start + 1) for start in range(VOCAB - 1)):
        output = oracle(prompt, 40)
        if EOS in output[1:] and output[0] != EOS:
            return prompt, output.index(EOS)
    raise AssertionError("no such prompt")


def test_end_of_sequence_token_ends_the_output_and_is_reported() -> None:
    prompt, position = first_output_with_eos()
    engine = Engine()
    engine.submit(b"a", prompt, 40, eos_ids=frozenset({EOS}))
    engine.run()
    end = engine.end(b"a")
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.STOP
    assert engine.tokens(b"a") == oracle(prompt, position + 1)


def test_end_of_sequence_is_ignored_when_asked_and_below_min_tokens() -> None:
    prompt, position = first_output_with_eos()
    engine = Engine()
    engine.submit(b"ignored", prompt, 40, eos_ids=frozenset({EOS}), ignore_eos=True)
    engine.submit(b"below", prompt, position + 2, eos_ids=frozenset({EOS}), min_tokens=position + 2)
    engine.submit(b"stopped", prompt, 40, stop_ids=frozenset({EOS}), ignore_eos=True)
    engine.run()
    assert engine.tokens(b"ignored") == oracle(prompt, 40)
    assert engine.tokens(b"below") == oracle(prompt, position + 2)
    assert engine.tokens(b"stopped") == oracle(prompt, position + 1)


def test_model_length_and_pool_size_end_the_output() -> None:
    short, small = Engine(max_model_len=9), Engine(num_blocks=2)
    for engine in (short, small):
        engine.submit(b"a", max_tokens=100)
        engine.run()
        end = engine.end(b"a")
        assert isinstance(end, Finished)
        assert end.reason is FinishReason.LENGTH
    assert short.tokens(b"a") == oracle(PROMPT, 3)
    assert small.tokens(b"a") == oracle(PROMPT, 3), "8 slots hold all but the newest of 9 tokens"


def test_stop_string_found_outside_ends_it_well() -> None:
    engine = Engine()
    engine.submit(b"a", max_tokens=100)
    for _ in range(4):
        engine.step()
    engine.events += engine.scheduler.finish(b"a", FinishReason.STOP, engine.now, 1)
    assert engine.tokens(b"a") == oracle(PROMPT, 3)
    assert isinstance(engine.end(b"a"), Finished)
    assert engine.scheduler.finish(b"a", FinishReason.STOP, engine.now, 1) == []
    assert engine.step().batch == ()


def test_resumed_stream_goes_on_at_the_next_index_with_the_same_tokens() -> None:
    whole = oracle(PROMPT, 9)
    engine = Engine()
    engine.submit(b"a", max_tokens=9, resume=tuple(whole[:4]))
    engine.run()
    assert engine.tokens(b"a") == whole[4:]
    assert [event.index for event in engine.events if isinstance(event, Sampled)] == [4, 5, 6, 7, 8]
    assert engine.end(b"a").usage.completion_tokens == 9
    assert engine.end(b"a").usage.prompt_tokens == 6


def test_resumed_stream_that_had_its_last_token_finishes_at_once() -> None:
    engine = Engine()
    engine.submit(b"full", max_tokens=2, resume=(8, 9))
    engine.submit(b"stop", max_tokens=9, resume=(8, EOS), eos_ids=frozenset({EOS}))
    assert [type(event) for event in engine.events] == [Finished, Finished]
    assert engine.step().batch == ()


def test_cached_tokens_never_count_resumed_output() -> None:
    engine = Engine()
    whole = oracle(PROMPT, 9)
    engine.submit(b"a", max_tokens=9)
    engine.run()
    engine.submit(b"b", max_tokens=12, resume=tuple(whole[:8]))
    engine.run()
    assert engine.started(b"b") == Started(b"b", 6, 6)


# --- reuse ---


def test_second_prompt_takes_the_full_blocks_of_the_first_from_the_pool() -> None:
    engine = Engine()
    prompt = tuple(range(1, 14))
    engine.submit(b"a", prompt, 3)
    engine.run()
    before = engine.runner.num_tokens
    engine.submit(b"b", (*prompt, 20, 21), 1)
    engine.run()
    assert engine.started(b"b").cached_tokens == 12
    assert engine.runner.num_tokens - before == 3
    assert engine.tokens(b"b") == oracle((*prompt, 20, 21), 1)


def test_blocks_are_shared_as_soon_as_they_are_computed() -> None:
    engine = Engine()
    prompt = tuple(range(1, 14))
    engine.submit(b"a", prompt, 3)
    engine.step()
    engine.step()
    engine.submit(b"b", prompt, 3)
    engine.run()
    assert engine.started(b"b").cached_tokens == 8
    assert engine.tokens(b"b") == engine.tokens(b"a") == oracle(prompt, 3)


def test_a_prompt_that_is_scored_is_computed_anew_and_others_share_its_blocks() -> None:
    engine, prompt, name = Engine(), tuple(range(1, 14)), SequenceKey("", "chat")
    engine.submit(b"a", prompt, 1, sequence=name)
    engine.run()
    engine.submit(b"b", prompt, 3, prompt_logprobs=1, sequence=name)
    engine.run()
    assert engine.started(b"b").cached_tokens == 0
    assert engine.runner.told == {b"a": [], b"b": scores_of(prompt)}
    assert engine.tokens(b"b") == oracle(prompt, 3)
    engine.cache.flush()
    engine.submit(b"c", prompt[::-1], 1, prompt_logprobs=0)
    engine.run()
    engine.submit(b"d", prompt[::-1], 1)
    engine.run()
    assert engine.started(b"d").cached_tokens == 12


def test_equal_prompts_that_are_scored_do_not_wait_for_each_other() -> None:
    engine = Engine(max_tokens_per_step=20)
    for key in (b"a", b"b"):
        engine.submit(key, PROMPT, 3, prompt_logprobs=0)
    assert [len(piece.token_ids) for piece in engine.step().batch] == [6, 6]
    engine.run()
    assert engine.runner.told == dict.fromkeys((b"a", b"b"), scores_of(PROMPT))


def test_a_prompt_that_was_preempted_is_scored_from_where_it_was() -> None:
    engine, prompt = Engine(max_num_seqs=1), tuple(range(1, 14))
    engine.submit(b"b", prompt, 2, prompt_logprobs=0)
    engine.step()
    engine.step()
    engine.submit(b"a", (20,), 2, priority=-1)
    engine.run()
    assert engine.runner.num_tokens == len(prompt) + 1 + 2
    assert engine.runner.told[b"b"] == scores_of(prompt)
    assert engine.tokens(b"b") == oracle(prompt, 2)


def test_a_step_scores_so_many_tokens_and_no_more() -> None:
    """Of each the logits of the whole vocabulary are held for a moment."""
    engine = Engine(num_blocks=300, max_tokens_per_step=1000)
    for first in range(3):
        engine.submit(bytes([first]), (first,) * 200, 1, prompt_logprobs=None if first == 1 else 0)
    assert [len(piece.token_ids) for piece in engine.step().batch] == [200, 200, MAX_SCORED - 200]
    engine.run()
    assert all(engine.tokens(bytes([first])) == oracle((first,) * 200, 1) for first in range(3))


def test_second_turn_of_a_named_sequence_computes_only_what_is_new() -> None:
    engine = Engine()
    name = SequenceKey("", "chat")
    engine.submit(b"a", PROMPT, 5, sequence=name)
    engine.run()
    kept = engine.scheduler.sequences.find(name)
    history = (*PROMPT, *oracle(PROMPT, 5))
    assert kept.num_computed == 10, "the last token was never fed"
    kvs = engine.runner.read([*kept.block_table], 10)
    assert next_token(kvs[-1]) == history[10]
    engine.submit(b"b", (*history, 30), 2, sequence=name)
    engine.run()
    assert engine.started(b"b").cached_tokens == 10
    assert engine.tokens(b"b") == oracle((*history, 30), 2)


def test_cancelled_turn_keeps_the_sequence_with_what_was_computed() -> None:
    engine = Engine()
    name = SequenceKey("", "chat")
    engine.submit(b"a", PROMPT, 50, sequence=name)
    for _ in range(4):
        engine.step()
    engine.events += engine.scheduler.cancel(b"a", engine.now)
    assert engine.scheduler.sequences.find(name).num_computed == 8
    engine.submit(b"b", (*PROMPT, *oracle(PROMPT, 3)), 2, sequence=name)
    engine.run()
    assert engine.started(b"b").cached_tokens == 8
    assert engine.tokens(b"b") == oracle(PROMPT, 5)[3:]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_turn_that_is_preempted_and_cancelled_leaves_the_sequence_as_it_found_it(is_pinned: bool) -> None:
    engine = Engine(num_blocks=6)
    name, table = SequenceKey("", "chat"), engine.scheduler.sequences
    history = (*PROMPT, *oracle(PROMPT, 5), 30)

    def kept() -> list[int]:
        return engine.runner.read([*table.find(name).block_table], table.find(name).num_computed)

    engine.submit(b"first", PROMPT, 5, sequence=name)
    engine.run()
    if is_pinned:
        table.pin(name, math.inf)
    before = kept()
    assert len(before) == 10
    engine.submit(b"turn", history, 9, sequence=name, priority=1)
    engine.step()
    engine.submit(b"urgent", tuple(range(20, 28)), 4)
    engine.step()
    assert engine.scheduler.pool_stats().preemptions == 1
    assert kept() == before, "it can be read while its turn waits"
    engine.events += engine.scheduler.cancel(b"turn", engine.now)
    engine.run()
    assert kept() == before
    assert table.is_pinned(name, engine.now) == is_pinned
    assert engine.tokens(b"urgent") == oracle(tuple(range(20, 28)), 4)
    engine.submit(b"again", history, 9, sequence=name)
    engine.run()
    assert engine.started(b"again").cached_tokens >= 10
    assert engine.tokens(b"again") == oracle(history, 9)


def test_nobody_yields_when_the_blocks_that_are_missing_are_pinned() -> None:
    engine = Engine(num_blocks=6)
    name = SequenceKey("", "chat")
    engine.submit(b"first", PROMPT, 5, sequence=name)
    engine.run()
    engine.scheduler.sequences.pin(name, math.inf)
    history = (*PROMPT, *oracle(PROMPT, 5), 30)
    engine.submit(b"turn", history, 4, sequence=name, priority=1)
    engine.step()
    engine.submit(b"big", tuple(range(20, 32)), 4)
    engine.step()
    assert engine.scheduler.pool_stats().preemptions == 0
    engine.scheduler.sequences.unpin(name)
    engine.run()
    assert engine.tokens(b"turn") == oracle(history, 4)
    assert engine.tokens(b"big") == oracle(tuple(range(20, 32)), 4)


# --- single flight ---


@pytest.mark.parametrize("max_tokens", [3, 4, 5, 9, 100])
def test_identical_cold_prompts_are_computed_once(max_tokens: int) -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=max_tokens)
    prompt = tuple(range(1, 31))
    for number in range(5):
        engine.submit(bytes([number]), (*prompt, 40 + number), 2)
    engine.run()
    for number in range(5):
        assert engine.tokens(bytes([number])) == oracle((*prompt, 40 + number), 2)
    # 7 full blocks are shared; 3 tokens of each prompt and one output token are its own.
    assert engine.runner.num_tokens == 28 + 5 * (3 + 1)
    assert [engine.end(bytes([number])).usage.cached_tokens for number in range(5)] == [0, 28, 28, 28, 28]
    stats, pool = engine.scheduler.engine_stats(), engine.scheduler.pool_stats()
    assert (stats.cached_tokens, pool.hit_tokens, pool.lookup_tokens) == (4 * 28, 4 * 28, 5 * 31)


def test_one_who_joins_late_shares_what_is_done_and_waits_for_the_rest() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=8)
    prompt = tuple(range(1, 30))
    engine.submit(b"first", prompt, 1)
    engine.step()
    engine.submit(b"late", prompt, 1)
    engine.run()
    assert engine.started(b"late").cached_tokens == 8
    assert engine.end(b"late").usage.cached_tokens == 28
    assert engine.runner.num_tokens == 29 + 1


def test_room_left_by_one_who_waits_goes_to_the_next_in_line() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=12)
    engine.submit(b"first", tuple(range(1, 9)), 1)
    engine.submit(b"twin", tuple(range(1, 9)), 1)
    engine.submit(b"other", tuple(range(20, 24)), 1)
    assert shape(engine.step()) == [(b"first", 8), (b"other", 4)]
    assert shape(engine.step()) == [(b"twin", 4)]


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_one_who_waits_computes_itself_when_the_other_is_gone(end: str) -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=8)
    prompt = tuple(range(1, 30))
    engine.submit(b"first", prompt, 1)
    engine.submit(b"twin", prompt, 1)
    engine.step()
    if end == "cancel":
        engine.events += engine.scheduler.cancel(b"first", engine.now)
    else:
        engine.events += engine.scheduler.fail(b"first", InternalError("non-finite logits"), engine.now)
    assert shape(engine.step()) == [(b"twin", 8)]
    engine.run()
    assert engine.tokens(b"twin") == oracle(prompt, 1)
    assert engine.runner.num_tokens == 29


def test_one_who_waits_computes_itself_when_what_was_computed_is_forgotten() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=8)
    prompt = tuple(range(1, 30))
    engine.submit(b"first", prompt, 1)
    engine.submit(b"twin", prompt, 1)
    engine.step()
    engine.cache.flush()
    engine.run()
    assert engine.tokens(b"first") == engine.tokens(b"twin") == oracle(prompt, 1)


def test_prompts_of_different_salts_do_not_wait_for_each_other() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=20)
    for salt in ("x", "y"):
        seed = HashSeed(model="m", dtype="float32", block_size=4, cache_salt=salt)
        task = GenerationTask(key=salt.encode(), prompt=PROMPT, seed=seed, max_tokens=1)
        engine.events += engine.scheduler.submit(task, engine.now)
    assert shape(engine.step()) == [(b"x", 6), (b"y", 6)]


def test_decodes_in_lockstep_are_not_held_up_by_each_other() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=20)
    engine.submit(b"a", PROMPT, 20)
    engine.step()
    engine.submit(b"b", PROMPT, 20)
    engine.run()
    assert engine.scheduler.engine_stats().steps == 1 + 20
    assert engine.tokens(b"a") == engine.tokens(b"b") == oracle(PROMPT, 20)
    assert engine.cache.pool.counts().held == 0


# --- who runs when ---


def shape(step: Step) -> list[tuple[bytes, int]]:
    """Who is in a step, and with how many tokens."""
    return [(key, len(piece.token_ids)) for key, piece in zip(step.keys, step.batch, strict=True)]


def test_step_takes_every_decode_and_fills_what_is_left_with_prefills_in_order_of_arrival() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=8)
    for key in (b"a", b"b"):
        engine.submit(key, (1, 2, key[0] % VOCAB), 50)
    engine.step()
    engine.submit(b"c", tuple(range(10, 22)), 50)
    engine.submit(b"d", tuple(range(20, 32)), 50)
    assert [shape(engine.step()) for _ in range(5)] == [
        [(b"a", 1), (b"b", 1), (b"c", 6)],
        [(b"a", 1), (b"b", 1), (b"c", 6)],
        [(b"a", 1), (b"b", 1), (b"c", 1), (b"d", 5)],
        [(b"a", 1), (b"b", 1), (b"c", 1), (b"d", 5)],
        [(b"a", 1), (b"b", 1), (b"c", 1), (b"d", 2)],
    ]


def test_prefill_that_waits_for_a_long_one_gets_half_a_step_in_the_end() -> None:
    engine = Engine(num_blocks=128, max_tokens_per_step=8)
    for key in (b"a", b"b"):
        engine.submit(key, (1, 2, key[0] % VOCAB), 100)
    engine.step()
    engine.submit(b"long", tuple(i % VOCAB for i in range(150)), 1)
    engine.submit(b"late", tuple(range(20, 29)), 1)
    before = [shape(engine.step()) for _ in range(PATIENCE + 1)]
    assert before == [[(b"a", 1), (b"b", 1), (b"long", 6)]] * (PATIENCE + 1)
    assert shape(engine.step()) == [(b"late", 4), (b"a", 1), (b"b", 1), (b"long", 2)]
    assert shape(engine.step()) == [(b"a", 1), (b"b", 1), (b"long", 6)]


def test_step_takes_no_more_sequences_than_allowed_and_decodes_go_round() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=100, max_num_seqs=2)
    for key in (b"a", b"b"):
        engine.submit(key, (1, key[0] % VOCAB), 50)
    engine.step()
    for key in (b"a", b"b"):
        engine.scheduler.pause(key)
    engine.submit(b"c", (1, 2, 3), 50)
    engine.step()
    for key in (b"a", b"b"):
        engine.scheduler.resume(key)
    keys = [engine.step().keys for _ in range(6)]
    assert keys == [(b"a", b"b"), (b"c", b"a"), (b"b", b"c")] * 2


@pytest.mark.parametrize(("max_tokens", "max_seqs"), [(1, 1), (1, 64), (3, 3), (4, 64), (64, 2)])
def test_nobody_who_runs_waits_longer_than_patience_and_one_step_for_each_other(max_tokens: int, max_seqs: int) -> None:
    """Decodes that fill every step by themselves, a long prefill, and short prompts that never stop arriving."""
    draw, num_running = random.Random(5), 5
    engine = Engine(num_blocks=400, max_tokens_per_step=max_tokens, max_num_seqs=max_seqs)
    numbers = iter(range(10_000))
    waits: dict[bytes, int] = {}
    paused: list[bytes] = []
    longest = 0
    for round_ in range(600):
        if round_ % 7 == 0 and len(waits) < num_running:
            number = next(numbers)
            prompt = (number % VOCAB, number // VOCAB, *(draw.randrange(VOCAB) for _ in range(draw.choice([1, 90]))))
            key = number.to_bytes(2)
            engine.submit(key, prompt, draw.choice([2, 60]))
        if paused:
            engine.scheduler.resume(paused.pop())
        elif waits and draw.random() < 0.2:  # so that more are active than are let in
            paused.append(draw.choice(list(waits)))
            engine.scheduler.pause(paused[0])
        step = engine.step()
        for event in engine.events:
            match event:
                case Started():
                    waits.setdefault(event.key, 0)
                case Finished() | Failed():
                    waits.pop(event.key, None)
                case _:
                    pass
        engine.events.clear()
        for key in waits:
            waits[key] = 0 if key in step.keys or key in paused else waits[key] + 1
        longest = max([longest, *waits.values()])
    assert longest <= PATIENCE + num_running


def test_admission_is_in_order_and_a_big_one_is_not_overtaken() -> None:
    engine = Engine(num_blocks=8)
    engine.submit(b"a", tuple(range(12)), 10)
    engine.submit(b"big", tuple(range(20, 44)), 1)
    engine.submit(b"small", (1,), 1)
    engine.step()
    assert engine.scheduler.engine_stats().running == 1
    assert engine.scheduler.engine_stats().waiting == 2
    assert engine.scheduler.engine_stats().backlog_tokens == 8 + 24 + 1  # 4 of the first prompt's 12 are done
    engine.run()
    assert engine.scheduler.engine_stats().backlog_tokens == 0
    ends = [event.key for event in engine.events if isinstance(event, Finished)]
    assert ends.index(b"a") < ends.index(b"big")
    assert [event.key for event in engine.events if isinstance(event, Started)] == [b"a", b"big", b"small"]


def test_admission_asks_for_one_block_more_than_the_prompt_fills() -> None:
    engine = Engine(num_blocks=4)
    engine.submit(b"a", (1, 2, 3, 4), 5)
    engine.submit(b"b", tuple(range(10, 18)), 9)
    engine.step()
    assert (engine.cache.pool.num_free, engine.scheduler.engine_stats().running) == (2, 1)
    engine.submit(b"c", (5,), 1)
    engine.run()
    assert engine.scheduler.pool_stats().preemptions == 0
    assert engine.tokens(b"b") == oracle(tuple(range(10, 18)), 9)


def test_max_num_seqs_bounds_who_takes_steps() -> None:
    engine = Engine(max_num_seqs=2)
    for key in (b"a", b"b", b"c"):
        engine.submit(key)
    engine.step()
    assert engine.scheduler.engine_stats().running == 2
    engine.run()
    assert all(engine.tokens(key) == oracle(PROMPT, 5) for key in (b"a", b"b", b"c"))


def test_youngest_yields_when_the_pool_runs_short_and_loses_no_token() -> None:
    engine = Engine(num_blocks=6)
    prompts = {b"a": (1, 2, 3), b"b": (4, 5, 6), b"c": (7, 8, 9)}
    for key, prompt in prompts.items():
        engine.submit(key, prompt, 18)
    engine.run()
    assert engine.scheduler.pool_stats().preemptions > 0
    for key, prompt in prompts.items():
        assert engine.tokens(key) == oracle(prompt, 18)
    assert next(event.key for event in engine.events if isinstance(event, Finished)) == b"a"
    assert engine.cache.pool.counts().held == 0


def test_youngest_that_needs_room_itself_yields_to_the_older() -> None:
    engine = Engine(num_blocks=5)
    engine.submit(b"old", PROMPT, 8)
    engine.submit(b"young", (1, 2, 3), 12)
    engine.run()
    assert engine.scheduler.pool_stats().preemptions == 1
    assert next(event.key for event in engine.events if isinstance(event, Finished)) == b"old"
    assert engine.tokens(b"young") == oracle((1, 2, 3), 12)


# --- classes ---


def begun(engine: Engine) -> list[bytes]:
    """Who was let in, in this order."""
    return [event.key for event in engine.events if isinstance(event, Started)]


def test_lower_class_waits_behind_those_that_come_later() -> None:
    engine = Engine(max_num_seqs=1)
    engine.submit(b"first", max_tokens=2)
    engine.step()
    for key, priority in ((b"batch", 1), (b"plain", 0), (b"urgent", -1), (b"late", 0)):
        engine.submit(key, max_tokens=2, priority=priority)
    engine.run()
    assert begun(engine) == [b"first", b"urgent", b"plain", b"late", b"batch"]
    assert all(engine.tokens(key) == oracle(PROMPT, 2) for key in begun(engine))


def test_prefills_of_a_higher_class_are_computed_first() -> None:
    engine = Engine(num_blocks=64, max_tokens_per_step=8)
    engine.submit(b"batch", tuple(range(10, 34)), 1, priority=1)
    engine.step()
    engine.submit(b"plain", tuple(range(20, 34)), 1)
    assert shape(engine.step()) == [(b"plain", 8)]


@pytest.mark.parametrize("priority", [1, 3])
def test_nobody_of_a_lower_class_starves(priority: int) -> None:
    """Requests of a higher class that fill the worker never stop coming; waiting makes up for the class in the end."""
    engine = Engine(num_blocks=12, max_num_seqs=2)
    numbers = iter(range(10_000))
    for _ in range(4):
        engine.submit(next(numbers).to_bytes(2), max_tokens=8)
    engine.submit(b"batch", max_tokens=8, priority=priority)
    while not any(isinstance(event, Finished) and event.key == b"batch" for event in engine.events):
        engine.now += 0.25
        if engine.scheduler.engine_stats().waiting < 4:
            engine.submit(next(numbers).to_bytes(2), max_tokens=8)
        engine.step()
        assert engine.now < CLASS_S * priority + 10, "a higher class kept it out for ever"
    assert engine.tokens(b"batch") == oracle(PROMPT, 8)
    assert engine.now > CLASS_S * priority, "it was let in before its time"


# --- short prefills before long ones ---


def timed(**config: object) -> Engine:
    """An engine that takes 0.1 s a token, and knows it."""
    engine = Engine(**{"num_blocks": 400, "max_tokens_per_step": 8, "token_s": 0.1, **config})  # type: ignore[arg-type]  # fields of Engine
    engine.submit(b"first", (40,) * 8, 1)
    engine.run()
    return engine


def fresh(number: int, num_tokens: int) -> tuple[int, ...]:
    """A prompt that shares no block with another of these."""
    return tuple((number + position * (1 + number % 7)) % VOCAB for position in range(num_tokens))


def ended(engine: Engine) -> list[bytes]:
    return [event.key for event in engine.events if isinstance(event, Finished)]


def test_short_prefills_overtake_long_ones_once_it_is_known_what_they_take() -> None:
    for engine, order in ((timed(), [b"short", b"long"]), (timed(token_s=0.0), [b"long", b"short"])):
        engine.submit(b"long", fresh(1, 24), 1)
        engine.submit(b"short", fresh(2, 9), 1)
        engine.run()
        assert ended(engine)[1:] == order


def test_what_is_cached_does_not_count_for_length() -> None:
    engine = timed(max_num_seqs=1)
    engine.submit(b"before", fresh(1, 40), 1)
    engine.run()
    engine.submit(b"seated", fresh(3, 9), 1)
    engine.step()
    engine.submit(b"short", fresh(2, 12), 1)
    engine.submit(b"cached", fresh(1, 40), 1)
    engine.run()
    assert ended(engine)[2:] == [b"seated", b"cached", b"short"]


def test_one_that_has_nearly_done_is_not_overtaken_by_one_shorter_than_it_was() -> None:
    engine = timed()
    engine.submit(b"long", fresh(1, 24), 1)
    engine.step()
    engine.step()
    engine.submit(b"other", fresh(2, 16), 1)
    assert shape(engine.step()) == [(b"long", 8)]


def test_no_prefill_waits_for_whoever_of_its_class_comes_much_later_however_short_they_are() -> None:
    """The worker is kept busy with short prompts for ever; the long one needs 20 s of it and has its turn after 10."""
    engine = timed(max_num_seqs=2)
    engine.submit(b"long", fresh(1, 200), 1)
    arrived, numbers = engine.now, iter(range(2, 10_000))
    while engine.scheduler.engine_stats().finished < 2 or b"long" not in ended(engine):
        waiting = engine.scheduler.engine_stats().waiting
        for _ in range(4 - waiting):
            number = next(numbers)
            engine.submit(number.to_bytes(2), fresh(number, 8), 1)
        engine.step()
        assert engine.now < arrived + 3 * CLASS_S + 20.0, "it is overtaken for ever"
    assert engine.now > arrived + 20.0


def test_a_class_is_worth_as_much_as_any_length() -> None:
    engine = timed()
    engine.submit(b"plain", fresh(1, 8), 1)
    engine.submit(b"urgent", fresh(2, 200), 1, priority=-1)
    engine.step()
    assert engine.scheduler.plan(engine.now).keys[0] == b"urgent"


def test_pace_is_that_of_prefills_and_follows_them() -> None:
    pace = Pace()
    assert pace.token_s == 0.0
    pace.ran(0, 5.0)
    assert pace.token_s == 0.0
    pace.ran(256, 0.5)
    pace.ran(4, 0.03)
    assert pace.token_s == pytest.approx(0.53 / 260, rel=0.02)
    for _ in range(300):
        pace.ran(256, 1.0)
    assert pace.token_s == pytest.approx(1.0 / 256, rel=0.02)


def test_one_of_a_lower_class_gives_up_its_seat_and_goes_on_later() -> None:
    engine = Engine(max_num_seqs=2)
    engine.submit(b"batch", max_tokens=20, priority=1)
    engine.submit(b"plain", (9, 8, 7), 20)
    for _ in range(4):
        engine.step()
    engine.submit(b"urgent", (3, 4, 5), 4, priority=-1)
    assert set(engine.step().keys) == {b"plain", b"urgent"}
    engine.run()
    assert engine.scheduler.pool_stats().preemptions == 1
    assert engine.tokens(b"batch") == oracle(PROMPT, 20)
    assert engine.tokens(b"urgent") == oracle((3, 4, 5), 4)
    assert engine.tokens(b"plain") == oracle((9, 8, 7), 20)


def test_those_of_a_lower_class_give_up_blocks_the_last_in_line_first_and_no_more_than_needed() -> None:
    engine = Engine(num_blocks=9, max_tokens_per_step=12)
    for number in range(3):
        engine.submit(bytes([number]), (number, 8, 9, 10, 11), 8, priority=2 - number)
    engine.step()
    assert engine.cache.pool.num_free == 0
    engine.submit(b"plain", tuple(range(20, 30)), 4)
    engine.step()
    assert begun(engine)[-1] == b"plain"
    assert engine.scheduler.pool_stats().preemptions == 2
    engine.run()
    assert [engine.tokens(bytes([number])) for number in range(3)] == [
        oracle((number, 8, 9, 10, 11), 8) for number in range(3)
    ]


def test_nobody_yields_when_that_would_not_be_enough() -> None:
    engine = Engine(num_blocks=8, max_num_seqs=2)
    engine.submit(b"plain", tuple(range(10, 22)), 4)
    engine.submit(b"batch", (1, 2), 4, priority=1)
    engine.step()
    engine.submit(b"big", tuple(range(20, 45)), 4)
    engine.step()
    assert engine.scheduler.pool_stats().preemptions == 0
    engine.run()
    assert engine.tokens(b"big") == oracle(tuple(range(20, 45)), 4)


def test_room_is_taken_from_the_lowest_class_even_if_it_came_first() -> None:
    engine = Engine(num_blocks=6, max_tokens_per_step=8)
    engine.submit(b"batch", (1, 2, 3), 12, priority=1)
    engine.submit(b"plain", (4, 5, 6), 12)
    engine.run()
    ends = [event.key for event in engine.events if isinstance(event, Finished)]
    assert (engine.scheduler.pool_stats().preemptions, ends) == (1, [b"plain", b"batch"])
    assert engine.tokens(b"batch") == oracle((1, 2, 3), 12)


def test_one_whose_deadline_passes_in_the_queue_computes_nothing() -> None:
    engine = Engine(max_num_seqs=1)
    engine.submit(b"running", max_tokens=30)
    engine.submit(b"waiting", (9, 8, 7), deadline=4.0)
    for _ in range(3):
        engine.step()
    engine.now = 4.0
    before = engine.runner.num_tokens
    engine.events += engine.scheduler.cancel(b"running", engine.now)
    assert engine.step().batch == ()
    assert isinstance(engine.error(b"waiting"), DeadlineExceeded)
    assert b"waiting" not in begun(engine)
    assert engine.runner.num_tokens == before


# --- pause and resume ---


def test_paused_generation_takes_no_steps_until_it_is_resumed() -> None:
    engine = Engine()
    engine.submit(b"a", max_tokens=5)
    for _ in range(3):
        engine.step()
    engine.scheduler.pause(b"a")
    engine.run()
    assert engine.tokens(b"a") == oracle(PROMPT, 2)
    engine.scheduler.resume(b"a")
    engine.run()
    assert engine.tokens(b"a") == oracle(PROMPT, 5)
    engine.scheduler.pause(b"a")  # it has ended: nothing to pause, and no error
    engine.scheduler.resume(b"a")


def test_pause_before_admission_holds_it_back() -> None:
    engine = Engine()
    engine.submit(b"a")
    engine.scheduler.pause(b"a")
    assert engine.step().batch == ()
    engine.scheduler.resume(b"a")
    engine.run()
    assert engine.tokens(b"a") == oracle(PROMPT, 5)


def test_paused_generation_yields_its_blocks_to_one_that_waits() -> None:
    engine = Engine(num_blocks=4)
    engine.submit(b"slow", max_tokens=9)
    for _ in range(3):
        engine.step()
    engine.scheduler.pause(b"slow")
    engine.submit(b"next", tuple(range(20, 32)), 4)
    engine.run()
    assert engine.tokens(b"next") == oracle(tuple(range(20, 32)), 4)
    assert engine.scheduler.pool_stats().preemptions == 1
    engine.run()
    assert engine.tokens(b"slow") == oracle(PROMPT, 2), "parked until it is resumed"
    engine.scheduler.resume(b"slow")
    engine.run()
    assert engine.tokens(b"slow") == oracle(PROMPT, 9)


def test_paused_generation_yields_before_a_younger_one_that_runs() -> None:
    engine = Engine(num_blocks=6)
    engine.submit(b"slow", (1, 2, 3), 20)
    engine.submit(b"young", (4, 5, 6), 20)
    for _ in range(4):
        engine.step()
    engine.scheduler.pause(b"slow")
    engine.run()
    assert engine.tokens(b"young") == oracle((4, 5, 6), 20)
    assert engine.scheduler.pool_stats().preemptions == 1, "the young one never had to yield itself"
    engine.scheduler.resume(b"slow")
    engine.run()
    assert engine.tokens(b"slow") == oracle((1, 2, 3), 20)


# --- ends that are not good ---


def test_cancel_frees_the_blocks_in_any_state_and_works_once() -> None:
    engine = Engine(num_blocks=4, max_num_seqs=1)
    engine.submit(b"running", max_tokens=9)
    engine.submit(b"waiting", max_tokens=9)
    engine.step()
    for key in (b"running", b"waiting"):
        engine.events += engine.scheduler.cancel(key, engine.now)
        assert engine.scheduler.cancel(key, engine.now) == []
        assert "cancelled by the client" in str(engine.error(key))
    assert engine.cache.pool.counts().held == 0
    assert engine.scheduler.cancel(b"never", engine.now) == []
    assert engine.scheduler.engine_stats().cancelled == 2


def test_cancel_between_plan_and_commit_ignores_what_was_sampled() -> None:
    engine = Engine()
    engine.submit(b"a")
    engine.step()
    step = engine.scheduler.plan(engine.now)
    sampled = engine.runner.run(step)
    engine.events += engine.scheduler.cancel(b"a", engine.now)
    assert engine.scheduler.commit(step, sampled, engine.now) == []
    assert engine.tokens(b"a") == []
    assert engine.cache.pool.counts().held == 0
    engine.scheduler.sequences.check()


def test_deadline_ends_what_runs_and_what_waits() -> None:
    engine = Engine(max_num_seqs=1)
    engine.submit(b"running", deadline=5.0, max_tokens=30)
    engine.submit(b"waiting", deadline=4.0)
    engine.submit(b"patient", max_tokens=2)
    assert engine.scheduler.next_deadline() == 4.0
    engine.step()
    engine.now = 4.0
    engine.step()
    assert engine.scheduler.next_deadline() == 5.0
    engine.now = 6.0
    engine.run()
    assert engine.scheduler.next_deadline() == math.inf
    assert [str(engine.error(key)) for key in (b"running", b"waiting")] == ["the deadline has passed"] * 2
    assert isinstance(engine.end(b"patient"), Finished)
    assert engine.scheduler.engine_stats().failed == 2


def test_failure_of_one_leaves_the_others_alone() -> None:
    engine = Engine()
    engine.submit(b"bad", max_tokens=9)
    engine.submit(b"good", (9, 8, 7), 9)
    for _ in range(4):
        engine.step()
    engine.events += engine.scheduler.fail(b"bad", InternalError("non-finite logits"), engine.now)
    engine.run()
    assert str(engine.error(b"bad")) == "non-finite logits"
    assert engine.tokens(b"good") == oracle((9, 8, 7), 9)


def test_what_waits_only_for_pinned_blocks_is_refused() -> None:
    engine = Engine(num_blocks=4)
    name = SequenceKey("", "pinned")
    engine.submit(b"a", tuple(range(9)), 4, sequence=name)
    engine.run()
    engine.scheduler.sequences.pin(name, math.inf)
    engine.submit(b"b", (40, 41, 42, 43, 44), 1)
    engine.run()
    assert isinstance(engine.error(b"b"), NoSpace)
    engine.scheduler.sequences.unpin(name)
    engine.submit(b"c", (40, 41, 42, 43, 44), 1)
    engine.run()
    assert isinstance(engine.end(b"c"), Finished)


def test_end_for_want_of_room_lets_a_waiting_one_in_at_once() -> None:
    """An empty batch would put the engine to sleep with work waiting."""
    engine = Engine(num_blocks=7)
    name = SequenceKey("", "pinned")
    engine.submit(b"a", (0,) * 4, 6, sequence=name)
    engine.step()
    engine.scheduler.sequences.pin(name, math.inf)
    engine.submit(b"b", (1,) * 5, 13)
    engine.submit(b"c", (2,), 5)
    engine.run()
    assert isinstance(engine.error(b"b"), NoSpace)
    assert engine.tokens(b"c") == oracle((2,), 5)


def test_output_that_grows_against_pinned_blocks_is_refused_when_alone() -> None:
    engine = Engine(num_blocks=4)
    name = SequenceKey("", "pinned")
    engine.submit(b"a", (1, 2, 3, 4, 5), 1, sequence=name)
    engine.run()
    engine.scheduler.sequences.pin(name, math.inf)
    engine.submit(b"b", (40, 41, 42), 20)
    engine.run()
    assert isinstance(engine.error(b"b"), NoSpace)
    assert engine.tokens(b"b") == oracle((40, 41, 42), 6)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt": ()}, BadArgument, "the prompt is empty"),
        ({"prompt": (1, VOCAB)}, BadArgument, "token id 50; this model's are 0 to 49"),
        ({"prompt": (-1,)}, BadArgument, "token id -1"),
        ({"resume": (VOCAB,)}, BadArgument, "resume has token id 50"),
        ({"prompt": (1,) * 100}, TooLarge, "takes 100 tokens, at least one of them generated"),
        ({"priority": 101}, BadArgument, "priority must be from -100 to 100, not 101"),
        ({"priority": -101}, BadArgument, "priority must be from -100 to 100, not -101"),
        ({"max_tokens": 0}, BadArgument, "max_tokens must be at least 1, not 0"),
        ({"min_tokens": -1}, BadArgument, "min_tokens must be from 0 to max_tokens"),
        ({"min_tokens": 6}, BadArgument, "min_tokens must be from 0 to max_tokens"),
        ({"resume": (1,) * 6}, BadArgument, "more than max_tokens"),
        ({"prompt": (1,) * 65}, NoSpace, "65 tokens do not fit the pool of 64"),
        ({"key": b"taken"}, Conflict, "has not ended yet"),
        ({"sequence": SequenceKey("", "taken")}, Conflict, "is being generated"),
    ],
)
def test_wrong_task_is_refused_and_changes_nothing(
    wrong: dict[str, object], error: type[KVCacheError], message: str
) -> None:
    engine = Engine(max_model_len=100)
    engine.submit(b"taken", sequence=SequenceKey("", "taken"))
    with pytest.raises(error, match=message):
        engine.submit(**{"key": b"a", "prompt": PROMPT, "max_tokens": 5} | wrong)  # type: ignore[arg-type]  # one field of each type
    engine.run()
    assert {event.key for event in engine.events} == {b"taken"}


def test_seed_of_another_block_size_is_refused() -> None:
    seed = HashSeed(model="m", dtype="float32", block_size=8)
    with pytest.raises(BadArgument, match="blocks of 8 tokens, the pool's have 4"):
        Engine().scheduler.submit(GenerationTask(key=b"a", prompt=(1,), seed=seed, max_tokens=1), 0.0)


def test_steps_are_committed_one_by_one_and_whole() -> None:
    engine = Engine()
    engine.submit(b"a")
    step = engine.scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="not committed"):
        engine.scheduler.plan(0.0)
    with pytest.raises(ValueError, match="2 tokens were sampled for 1 slices"):
        engine.scheduler.commit(step, [None, None], 0.0)
    with pytest.raises(AssertionError, match="another step"):
        engine.scheduler.commit(Step((), (), ()), [], 0.0)
    engine.scheduler.commit(step, engine.runner.run(step), 0.0)
    with pytest.raises(AssertionError, match="no step was planned"):
        engine.scheduler.commit(step, [None], 0.0)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, not 0"):
        SchedulerConfig(max_model_len=1, vocab_size=1, max_num_seqs=0)


def test_figures_add_up() -> None:
    engine = Engine()
    engine.submit(b"a", tuple(range(9)), 3)
    engine.run()
    engine.submit(b"b", tuple(range(9)), 3)
    engine.run()
    stats, pool = engine.scheduler.engine_stats(), engine.scheduler.pool_stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (18, 8, 6)
    assert (stats.running, stats.waiting, stats.finished, stats.steps) == (0, 0, 2, 5 + 3)
    assert (pool.lookup_tokens, pool.hit_tokens, pool.num_blocks, pool.block_size) == (18, 8, 16, 4)
    assert pool.free_blocks + pool.cached_blocks == 16


# --- anything at any time ---


def test_ten_thousand_random_cancels_leave_no_block_held() -> None:
    draw = random.Random(1)
    engine = Engine(num_blocks=12, max_num_seqs=4)
    live: deque[bytes] = deque()
    for number in range(10_000):
        key = number.to_bytes(4)
        prompt = tuple(draw.randrange(3) for _ in range(draw.randint(1, 20)))
        task = GenerationTask(
            key=key, prompt=prompt, seed=SEED, max_tokens=draw.randint(1, 9), priority=draw.randint(-1, 1)
        )
        engine.scheduler.submit(task, 0.0)
        live.append(key)
        if draw.random() < 0.7:
            step = engine.scheduler.plan(0.0)
            sampled = engine.runner.run(step)
            if draw.random() < 0.3:
                engine.scheduler.cancel(draw.choice(live), 0.0)
            if step.batch:
                engine.scheduler.commit(step, sampled, 0.0)
        while len(live) > 6:
            engine.scheduler.cancel(live.popleft(), 0.0)
    for key in live:
        engine.scheduler.cancel(key, 0.0)
    engine.scheduler.sequences.check()
    assert engine.cache.pool.counts().held == 0
    stats = engine.scheduler.engine_stats()
    assert stats.finished + stats.cancelled == 10_000
    assert stats.cancelled > 5_000


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals of all classes, cancels, pauses, pins, flushes and audits in a tiny pool, under each eviction policy;
    every output must be the start of the oracle's, and every block that is looked at what it should be."""

    NAMES = tuple(SequenceKey("", name) for name in "xy")

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.auditor = Auditor(self.engine.cache, 1.0, 0.0)
        self.tasks: dict[bytes, GenerationTask] = {}
        self.paused: set[bytes] = set()
        self.pinned_until: dict[SequenceKey, float] = {}
        self.told: set[SequenceKey] = set()

    @initialize(
        num_blocks=st.integers(5, 12),
        max_tokens=st.integers(1, 12),
        max_seqs=st.integers(1, 6),
        policy=st.sampled_from(EVICTION_POLICIES),
        token_s=st.sampled_from([0.0, 0.02]),
    )
    def begin(self, num_blocks: int, max_tokens: int, max_seqs: int, policy: EvictionPolicy, token_s: float) -> None:
        self.engine = Engine(
            num_blocks, max_tokens_per_step=max_tokens, max_num_seqs=max_seqs, policy=policy, token_s=token_s
        )
        self.auditor = Auditor(self.engine.cache, 1.0, 0.0)

    def live(self) -> list[bytes]:
        ended = {event.key for event in self.engine.events if isinstance(event, Finished | Failed)}
        return [key for key in self.tasks if key not in ended]

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        max_tokens=st.integers(1, 14),
        name=st.sampled_from([None, *NAMES]),
        deadline=st.sampled_from([math.inf, 3.0]),
        num_resumed=st.integers(0, 3),
        priority=st.integers(-1, 1),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def arrive(
        self,
        prompt: list[int],
        max_tokens: int,
        name: SequenceKey | None,
        deadline: float,
        num_resumed: int,
        priority: int,
        prompt_logprobs: int | None,
    ) -> None:
        key = len(self.tasks).to_bytes(2)
        if prompt_logprobs is not None:
            num_resumed = 0
        task = GenerationTask(
            key=key,
            prompt=tuple(prompt),
            seed=SEED,
            max_tokens=max_tokens,
            sequence=name,
            deadline=self.engine.now + deadline,
            eos_ids=frozenset({EOS}),
            resume=tuple(oracle(tuple(prompt), min(num_resumed, max_tokens), frozenset({EOS}))),
            priority=priority,
            prompt_logprobs=prompt_logprobs,
        )
        busy = name is not None and name in {self.tasks[other].sequence for other in self.live()}
        try:
            self.engine.events += self.engine.scheduler.submit(task, self.engine.now)
        except Conflict:
            assert busy
        else:
            assert not busy
            self.tasks[key] = task

    @rule(num=st.integers(1, 6))
    def steps(self, num: int) -> None:
        for _ in range(num):
            self.engine.now += 0.1
            step = self.engine.step()
            batch = step.batch
            assert sum(len(piece.token_ids) for piece in batch) <= self.engine.max_tokens_per_step
            assert len(batch) == len(set(step.keys)) <= self.engine.max_num_seqs
            assert batch or set(self.live()) <= self.paused, "somebody could run and nobody does"

    @precondition(lambda self: self.live())
    @rule(data=st.data(), in_flight=st.booleans())
    def cancel(self, data: st.DataObject, in_flight: bool) -> None:
        key = data.draw(st.sampled_from(self.live()))
        engine = self.engine
        step = engine.scheduler.plan(engine.now)
        engine.events += step.events
        sampled = engine.runner.run(step)
        if in_flight:
            engine.events += engine.scheduler.cancel(key, engine.now)
        if step.batch:
            engine.events += engine.scheduler.commit(step, sampled, engine.now)
        engine.events += engine.scheduler.cancel(key, engine.now)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.live()))
        if key in self.paused:
            self.engine.scheduler.resume(key)
        else:
            self.engine.scheduler.pause(key)
        self.paused ^= {key}

    @rule(data=st.data(), for_s=st.sampled_from([0.0, 1.0, math.inf]))
    def pin(self, data: st.DataObject, for_s: float) -> None:
        keys = self.engine.scheduler.sequences.names()
        if keys:
            key = data.draw(st.sampled_from(keys))
            self.pinned_until[key] = self.engine.now + for_s
            self.engine.scheduler.sequences.pin(key, self.pinned_until[key])

    @rule()
    def flush(self) -> None:
        self.engine.cache.flush()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def audit(self, data: st.DataObject) -> None:
        engine, prompt = self.engine, data.draw(st.sampled_from([*self.tasks.values()])).prompt
        self.auditor.note(SEED, prompt, len(prompt))
        while (audit := self.auditor.begin()) is not None:
            engine.runner.run(Step((), (audit.piece,), ()))
            seen, wanted = (engine.runner.read([block], 4) for block in (audit.block, audit.scratch))
            assert self.auditor.end(audit, float(seen != wanted)), "a block that can be found is wrong"

    @invariant()
    def outputs_are_right_and_blocks_accounted_for(self) -> None:
        self.engine.scheduler.sequences.check()
        for key, task in self.tasks.items():
            whole = oracle(task.prompt, task.max_tokens, frozenset({EOS}))
            output = [*task.resume, *self.engine.tokens(key)]
            assert output == whole[: len(output)]
            scores = scores_of(task.prompt) if task.prompt_logprobs is not None else []
            told = self.engine.runner.told.get(key, [])
            assert told == (scores if output[len(task.resume) :] else scores[: len(told)])
            for end in self.engine.events:
                if isinstance(end, Finished) and end.key == key:
                    assert output == whole or len(task.prompt) + len(output) == self.engine.num_blocks * 4 + 1
                    assert end.usage.completion_tokens == len(output)

    @invariant()
    def retained_kv_is_that_of_its_tokens(self) -> None:
        table = self.engine.scheduler.sequences
        pinned = {key for key, until in self.pinned_until.items() if until > self.engine.now}
        assert pinned <= set(table.names()), "a pinned sequence is gone"
        stirred = table.take_stirred()
        self.told = (self.told - stirred) | set(filter(table.has, stirred))
        assert self.told == set(table.names()), "a name came or went unnoticed"
        for key in table.names():
            found = table.find(key)
            kv = 0
            for token, stored in zip(
                found.token_ids, self.engine.runner.read([*found.block_table], found.num_computed), strict=False
            ):
                kv = kv_of(kv, token)
                assert stored == kv

    def teardown(self) -> None:
        for key in self.live():
            self.engine.scheduler.resume(key)
        self.engine.run()
        assert self.live() == []
        self.engine.scheduler.sequences.check()
        for name in self.engine.scheduler.sequences.names():
            self.engine.scheduler.sequences.delete(name)
        assert self.engine.cache.pool.counts().held == 0


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerAgainstOracle = SchedulerMachine.TestCase
