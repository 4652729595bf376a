"""The engine's part in copies: what it lends, to whom, what waits for blocks, and how long a step is held up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bus.errors import BadTensor, Cancelled, Conflict, InternalError, KVCacheError, NotFound
from bus.messages import PromptKind, PullOrder, Sampling
from bus.streams import token_bytes
from kvcache.hashing import HashSeed, block_digests
from tests.unit.workers.conftest import NEED, roomy
from workers.batch import Batch, BlockId, Draw, Drawn, Outcome
from workers.copy_api import BlocksRead, CopyBroke, EndPull, Fill, Filled, Lend, Lent, ReadBlocks, Return, Wanted
from workers.engine_api import Admitted, Ended, ReadResult, RunId, Start, Stop
from workers.exchange import COPY_S
from workers.host import Host, Job
from workers.loading import Report
from workers.loans import LoanId
from workers.model import Model, ModelFacts
from workers.model_budget import ModelNeed
from workers.tasks import CacheConfig
from workers.text import TextStream

SIZE = 4
BLOCK_BYTES = 8
PROMPT = tuple(range(1, 23))  # five full blocks and two tokens
ORDER = PullOrder(worker_id="holder", url="tcp://127.0.0.1:7", ticket=bytes(16), num_tokens=1000, budget_ms=1000)
LOAN = LoanId(b"loan")
FACTS = ModelFacts(
    name="fake",
    fingerprint="f",
    dtype="float32",
    kv_dtype="float32",
    device="cpu",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    vocab_size=100,
    max_model_len=512,
    eos_ids=frozenset(),
    num_blocks=12,
    block_size=SIZE,
    block_bytes=BLOCK_BYTES,
    kv_tolerance=0.0,
)


SEED = HashSeed(model="f", dtype="float32", block_size=SIZE, tenant="t")


class MemoryModel:
    """Computes nothing; its blocks hold the bytes they were given, or the token ids that were computed."""

    def __init__(self, **changes: Any) -> None:
        self.facts = replace(FACTS, **changes)
        self.memory: dict[BlockId, bytes] = {}

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        return tuple(prompt[::4])

    def spell(self, tokens: bytes, each: bool) -> tuple[str, ...]:
        return tuple(map(str, tokens[::4])) if each else (" ".join(map(str, tokens[::4])),)

    def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        return TextStream(self, stops, min_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "." * len(token_ids)

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        for piece in batch:
            for position, token in enumerate(piece.token_ids, piece.start):
                block = piece.block_table[position // SIZE]
                self.memory[block] = (self.memory.get(block, b"") + bytes([token]))[-BLOCK_BYTES:].rjust(BLOCK_BYTES)
        return [Drawn(7) if piece.wants_logits else None for piece in batch]

    def difference(self, one: BlockId, other: BlockId) -> float:
        return 0.0

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        self.memory |= {target: self.memory[source] for source, target in zip(sources, targets, strict=True)}

    def read(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> ReadResult:
        raise NotImplementedError

    def read_blocks(self, blocks: Sequence[BlockId]) -> memoryview:
        return memoryview(b"".join(self.memory[block] for block in blocks))

    def write_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        if len(data) != len(blocks) * BLOCK_BYTES:
            raise BadTensor("another length")
        for at, block in enumerate(blocks):
            self.memory[block] = bytes(data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES])

    def close(self) -> None:
        self.memory.clear()


class OneModel:
    """Loads it at once."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def names(self) -> list[str]:
        return ["fake"]

    def choose(self, name: str) -> str:
        return name or "fake"

    def check(self, name: str) -> None:
        assert name == "fake"

    def measure(self, name: str, report: Report) -> ModelNeed:
        return NEED

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        return self._model


class Bench:
    """A host with one model; a clock that each look at may move."""

    def __init__(self, *, shares_prefixes: bool = True, **facts: Any) -> None:
        self.model = MemoryModel(**facts)
        self.now = self.per_look_s = 0.0
        self._jobs: list[Job] = []
        self.host = Host(
            OneModel(self.model),
            roomy(),
            load=self._jobs.append,
            report=lambda news: self.host.handle(news, self.now),
            encode=self._jobs.append,
            max_tokens_per_step=64,
            max_num_seqs=8,
            shares_prefixes=shares_prefixes,
            cache=CacheConfig(),
        )

    def clock(self) -> float:
        self.now += self.per_look_s
        return self.now

    def tell(self, *commands: Any) -> list[Any]:
        """Commands, the jobs that follow, and steps until there is nothing to do; all events."""
        for command in commands:
            self.host.handle(command, self.now)
        while self._jobs:
            self.host.handle(self._jobs.pop(0)(), self.now)
        events: list[Any] = []
        while self.host.step(self.clock):
            events += self.host.take_events()
        return events + list(self.host.take_events())

    def step_once(self) -> list[Any]:
        """One step after the jobs that wait; its events."""
        while self._jobs:
            self.host.handle(self._jobs.pop(0)(), self.now)
        self.host.step(self.clock)
        return list(self.host.take_events())

    def compute(self, name: bytes = b"first", prompt: Sequence[int] = PROMPT, tenant: str = "t") -> None:
        """Have the pool hold this prompt's blocks."""
        assert isinstance(self.tell(start(name, prompt, tenant=tenant))[-1], Ended)


def start(
    name: bytes = b"run", prompt: Sequence[int] = PROMPT, pull: PullOrder | None = None, tenant: str = "t"
) -> Start:
    return Start(
        run=RunId(name),
        tenant=tenant,
        model="",
        kind=PromptKind.TOKENS,
        prompt=token_bytes(prompt),
        resume=(),
        sampling=Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
        seq_id="",
        cache_salt="",
        deadline=1000.0,
        pull=pull,
    )


def lend(num_blocks: int = 5, **changes: Any) -> Lend:
    ids = PROMPT[: num_blocks * SIZE]
    fields: dict[str, Any] = {
        "loan": LOAN,
        "tenant": "t",
        "fingerprint": "f",
        "dtype": "float32",
        "layout_version": SEED.layout_version,
        "block_size": SIZE,
        "cache_salt": "",
        "tokens": token_bytes(ids),
        "start": 0,
        "digest": block_digests(SEED, ids)[-1],
    }
    return Lend(**(fields | changes))


def pulled(num_blocks: int, first: int = 0) -> bytearray:
    """Bytes that a holder sent: each block's are its number."""
    return bytearray(b"".join(bytes([first + at]) * BLOCK_BYTES for at in range(num_blocks)))


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- the side that gives ---


def test_blocks_that_are_kept_rounded_are_lent_to_those_who_round_alike_and_nobody_else() -> None:
    bench, seed = Bench(kv_dtype="int8"), replace(SEED, dtype="float32/int8")
    bench.compute()
    (broke,) = bench.tell(lend())
    assert isinstance(broke.error, Conflict)
    digests = block_digests(seed, PROMPT[:20])
    assert bench.tell(lend(dtype=seed.dtype, digest=digests[-1])) == [Lent(LOAN, 5, digests[-1], BLOCK_BYTES)]


def test_lent_blocks_are_read_in_slices_until_they_are_returned(bench: Bench) -> None:
    bench.compute()
    (lent,) = bench.tell(lend())
    assert lent == Lent(LOAN, 5, block_digests(SEED, PROMPT)[4], BLOCK_BYTES)
    (read,) = bench.tell(ReadBlocks(LOAN, 1, 3))
    assert bytes(read.data) == b"".join(bytes(PROMPT[at : at + SIZE]).rjust(BLOCK_BYTES) for at in (4, 8))
    assert bench.tell(Return(LOAN)) == []
    (broke,) = bench.tell(ReadBlocks(LOAN, 3, 5))
    assert isinstance(broke.error, NotFound)


def test_only_what_goes_beyond_the_pullers_own_is_lent(bench: Bench) -> None:
    bench.compute(prompt=PROMPT[:14])
    assert bench.tell(lend(start=2))[0].num_blocks == 3
    bench.tell(Return(LOAN))
    (broke,) = bench.tell(lend(start=3))
    assert isinstance(broke.error, NotFound)
    assert bench.tell(Return(LOAN)) == []


def test_ticket_of_one_tenant_finds_no_blocks_of_another(bench: Bench) -> None:
    """Whatever digest is shown: the tenant of the ticket is part of every digest that is looked for."""
    bench.compute(tenant="victim")
    (broke,) = bench.tell(lend())
    assert isinstance(broke.error, NotFound)
    theirs = replace(SEED, tenant="victim")
    (broke,) = bench.tell(lend(digest=block_digests(theirs, PROMPT[:20])[-1]))
    assert isinstance(broke.error, Conflict)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"fingerprint": "another"}, NotFound),
        ({"dtype": "bfloat16"}, Conflict),
        ({"block_size": 8}, Conflict),
        ({"layout_version": 2}, Conflict),
        ({"digest": bytes(32)}, Conflict),
        ({"cache_salt": "another"}, Conflict),
    ],
)
def test_blocks_of_another_kind_are_not_lent(bench: Bench, changes: dict[str, Any], error: type[KVCacheError]) -> None:
    bench.compute()
    (broke,) = bench.tell(lend(**changes))
    assert isinstance(broke.error, error)


def test_worker_that_shares_no_prefixes_lends_none_and_pulls_none() -> None:
    bench = Bench(shares_prefixes=False)
    bench.compute()
    (broke,) = bench.tell(lend())
    assert isinstance(broke.error, NotFound)
    assert isinstance(bench.tell(start(pull=ORDER))[-1], Ended)


def test_a_prompt_that_is_scored_waits_for_no_blocks_since_all_of_it_is_computed(bench: Bench) -> None:
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    events = bench.tell(replace(start(pull=ORDER), sampling=sampling))
    assert not any(isinstance(event, Wanted) for event in events)
    assert isinstance(events[-1], Ended)


def test_sequence_that_needs_the_room_ends_the_loan(bench: Bench) -> None:
    bench.compute()
    bench.tell(lend())
    bench.compute(b"big", range(50, 96))  # twelve blocks: the whole pool
    (broke,) = bench.tell(ReadBlocks(LOAN, 0, 1))
    assert isinstance(broke.error, NotFound)


# --- the side that takes ---


def test_generation_waits_for_its_blocks_and_computes_the_rest(bench: Bench) -> None:
    (wanted,) = bench.tell(start(pull=ORDER))
    assert isinstance(wanted, Wanted)
    assert (wanted.start, wanted.digests, wanted.order) == (0, block_digests(SEED, PROMPT[:20]), ORDER)
    assert wanted.tokens == token_bytes(PROMPT[:20])
    assert bench.tell(Fill(RunId(b"run"), pulled(2))) == [Filled(RunId(b"run"), 2)]
    assert bench.tell(Fill(RunId(b"run"), pulled(1, 2))) == [Filled(RunId(b"run"), 3)]
    events = bench.tell(EndPull(RunId(b"run")))
    assert isinstance(events[-1], Ended)
    (admitted,) = [event for event in events if isinstance(event, Admitted)]
    assert admitted.cached_tokens == 3 * SIZE
    (lent,) = bench.tell(lend())
    assert lent.num_blocks == 5
    (read,) = bench.tell(ReadBlocks(LOAN, 0, 3))
    assert bytes(read.data) == bytes(pulled(3))


def test_only_what_is_not_there_is_wanted_and_at_least_one_token_is_computed(bench: Bench) -> None:
    bench.compute(prompt=PROMPT[:9])
    (wanted,) = bench.tell(start(pull=ORDER))
    assert wanted.start == 2
    bench.tell(EndPull(RunId(b"run")))
    assert isinstance(bench.tell(start(b"again", pull=ORDER))[-1], Ended), "it has all that can be had"
    (wanted,) = bench.tell(start(b"exact", range(60, 68), pull=ORDER))
    assert len(wanted.digests) == 1, "of two full blocks one is computed"


def test_no_more_is_wanted_than_was_ordered(bench: Bench) -> None:
    (wanted,) = bench.tell(start(pull=PullOrder("holder", "tcp://127.0.0.1:7", bytes(16), 11, 1000)))
    assert len(wanted.digests) == 2
    (broke,) = bench.tell(Fill(RunId(b"run"), pulled(3)))
    assert isinstance(broke.error, BadTensor)


def test_end_takes_its_turn_behind_the_blocks_that_came(bench: Bench) -> None:
    bench.tell(start(pull=ORDER))
    events = bench.tell(Fill(RunId(b"run"), pulled(5)), EndPull(RunId(b"run")))
    (admitted,) = [event for event in events if isinstance(event, Admitted)]
    assert admitted.cached_tokens == 5 * SIZE


def test_generation_that_is_stopped_holds_nothing_and_takes_nothing_more(bench: Bench) -> None:
    bench.tell(start(pull=ORDER))
    bench.tell(Fill(RunId(b"run"), pulled(2)))
    assert bench.tell(Stop(RunId(b"run"))) == []
    (broke,) = bench.tell(Fill(RunId(b"run"), pulled(1, 2)))
    assert isinstance(broke.error, Cancelled)
    assert bench.tell(EndPull(RunId(b"run"))) == []
    pool = bench.host.figures().models[0].pool
    assert (pool.held_blocks, pool.cached_blocks) == (0, 2)


def test_pool_that_is_full_of_running_sequences_takes_no_blocks(bench: Bench) -> None:
    """A copy is refused rather than anybody preempted; the generation waits like any other and computes."""
    hog = replace(start(b"hog", range(30, 70)), sampling=Sampling(max_tokens=6, temperature=0.0, ignore_eos=True))
    bench.host.handle(hog, 0.0)
    bench.host.handle(start(pull=ORDER), 0.0)
    events = bench.step_once()
    assert any(isinstance(event, Wanted) for event in events)
    bench.host.handle(Fill(RunId(b"run"), pulled(5)), 0.0)
    (broke,) = [event for event in bench.step_once() if isinstance(event, CopyBroke)]
    assert broke.copy == b"run"
    ended = [event for event in bench.tell(EndPull(RunId(b"run"))) if isinstance(event, Ended)]
    assert [event.run for event in ended] == [b"hog", b"run"]


def test_wrong_bytes_from_the_model_end_the_copy_and_nothing_else(bench: Bench) -> None:
    bench.compute()
    bench.tell(lend())
    bench.model.memory.clear()  # whatever a model raises
    (broke,) = bench.tell(ReadBlocks(LOAN, 0, 1))
    assert isinstance(broke.error, InternalError)
    bench.compute(b"next", range(30, 40))


# --- time ---


def test_step_is_held_up_for_a_few_slices_and_no_longer(bench: Bench) -> None:
    bench.compute()
    bench.tell(lend())
    for _ in range(10):
        bench.host.handle(ReadBlocks(LOAN, 0, 1), 0.0)
    bench.per_look_s = COPY_S / 3
    assert bench.host.step(bench.clock), "it has more to do"
    assert sum(isinstance(event, BlocksRead) for event in bench.host.take_events()) == 3
    bench.per_look_s = 0.0
    assert sum(isinstance(event, BlocksRead) for event in bench.tell()) == 7


def test_slow_copies_still_get_on_by_one_with_each_step(bench: Bench) -> None:
    bench.compute()
    bench.tell(lend())
    for _ in range(2):
        bench.host.handle(ReadBlocks(LOAN, 0, 1), 0.0)
    bench.per_look_s = 10 * COPY_S
    for _ in range(2):
        bench.host.step(bench.clock)
        assert sum(isinstance(event, BlocksRead) for event in bench.host.take_events()) == 1
