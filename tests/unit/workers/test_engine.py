"""The engine over a tiny real model: what its thread answers, and what one fault may harm."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import torch

from bus.errors import (
    BadArgument,
    Conflict,
    InternalError,
    ModelNotFound,
    ModelUnavailable,
    NotFound,
    TokenizerError,
)
from bus.messages import FinishReason, ModelState, PromptKind, Sampling, TokenLogprobs
from bus.stats import Spelling
from bus.streams import token_bytes
from kvcache.hashing import routing_chain
from tests.harness.waiting import until
from tests.unit.workers.conftest import EOS_ID, NEED, Family, roomy
from workers.batch import Batch, BlockId, Draw, Outcome
from workers.block_changes import AllDropped, BlockAdded
from workers.engine import EngineThread, JobThread
from workers.engine_api import (
    Admitted,
    Answered,
    BlocksMoved,
    Broke,
    DropKV,
    EncodePrompt,
    Encoding,
    Ended,
    Event,
    FlushKV,
    Forgotten,
    Hold,
    ListKV,
    Load,
    MeasureKV,
    NodesMoved,
    PinKV,
    Prefilled,
    Proceed,
    Produced,
    PromptScored,
    ReadKV,
    ReadResult,
    Retained,
    RunId,
    SpellTokens,
    Start,
    Stop,
    TextCommand,
    Ticket,
    UnpinKV,
)
from workers.host import Host, Job
from workers.keys import SequenceKey
from workers.loading import Models, Report
from workers.model import Model
from workers.model_budget import ModelBudget, ModelNeed
from workers.nodes import NodeChange
from workers.runners import choose_runner
from workers.shelf import RETRY_LOAD_S
from workers.tasks import CacheConfig
from workers.text import TextStream
from workers.texts import Texts
from workers.torch_model import TorchModel

PROMPT = (5, 9, 2, 7, 11, 3, 8, 1, 4, 6)
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)


class FakeModels:
    """Names with a way to load each; counts the loads."""

    def __init__(self, **ways: Callable[[], Model]) -> None:
        self._ways = ways
        self.num_loads = 0

    def choose(self, name: str) -> str:
        return name or next(iter(self._ways))

    def names(self) -> list[str]:
        return list(self._ways)

    def check(self, name: str) -> None:
        if name not in self._ways:
            raise ModelNotFound(f"no model named {name!r}")

    def measure(self, name: str, report: Report) -> ModelNeed:
        return NEED

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        self.num_loads += 1
        return self._ways[name]()


class Bench:
    """A host and the texts of its tokens. Jobs wait until they are run; time stands still unless a test moves it.

    late_steps: how many steps further the engine is when it hears where an output ends.
    """

    def __init__(
        self,
        models: Models,
        *,
        shares_prefixes: bool = True,
        max_tokens_per_step: int = 4,
        max_num_seqs: int = 8,
        late_steps: int = 0,
        audit_share: float = 0.0,
        tells_blocks: bool = False,
        budget: ModelBudget | None = None,
    ) -> None:
        self.jobs: list[Job] = []
        self.texts = Texts()
        self._late_steps = late_steps
        self._on_their_way: list[tuple[int, TextCommand]] = []
        self.now = 0.0
        self.host = Host(
            models,
            budget or roomy(),
            load=self.jobs.append,
            report=lambda news: self.host.handle(news, self.now),
            encode=self.jobs.append,
            max_tokens_per_step=max_tokens_per_step,
            max_num_seqs=max_num_seqs,
            shares_prefixes=shares_prefixes,
            cache=CacheConfig(audit_share=audit_share, tells_blocks=tells_blocks),
        )

    def tell(self, *commands: Any) -> list[Event]:
        for command in commands:
            self.host.handle(command, self.now)
        return self.hear()

    def hear(self) -> list[Event]:
        """What has come since the last time, with its text."""
        heard, commands = self.texts.translate(self.host.take_events())
        self._on_their_way += [(self._late_steps, command) for command in commands]
        due = [command for left, command in self._on_their_way if left == 0]
        self._on_their_way = [(left - 1, command) for left, command in self._on_their_way if left]
        return heard + self.tell(*due) if due else heard

    def work(self) -> None:
        """Run the jobs that wait, and those that follow from them."""
        while self.jobs:
            self.host.handle(self.jobs.pop(0)(), self.now)

    def step(self) -> bool:
        return self.host.step(lambda: self.now)

    def run(self) -> list[Event]:
        """Jobs and steps until there is nothing left to do."""
        self.work()
        events: list[Event] = []
        while self.step() or self.jobs:
            events += self.hear()
            self.work()
        return events + self.hear()


def start(
    run: int,
    prompt: Sequence[int] = PROMPT,
    *,
    model: str = "",
    sampling: Sampling = GREEDY,
    resume: tuple[int, ...] = (),
    seq_id: str = "",
    kind: PromptKind = PromptKind.TOKENS,
    data: bytes | None = None,
    tenant: str = "t",
    chain: tuple[bytes, ...] = (),
) -> Start:
    return Start(
        run=run_id(run),
        tenant=tenant,
        model=model,
        kind=kind,
        prompt=token_bytes(prompt) if data is None else data,
        resume=resume,
        sampling=sampling,
        seq_id=seq_id,
        cache_salt="",
        deadline=math.inf,
        chain=chain,
    )


def run_id(number: int) -> RunId:
    return RunId(number.to_bytes(8, "big"))


def tokens_of(events: Sequence[Event], run: int) -> list[int]:
    return [token for e in events if isinstance(e, Produced) and e.run == run_id(run) for token in e.tokens]


def text_of(events: Sequence[Event], run: int) -> str:
    return "".join(text for e in events if isinstance(e, Produced) and e.run == run_id(run) for text in e.texts)


def only(events: Sequence[Event], kind: type[Any]) -> Any:
    found = [event for event in events if isinstance(event, kind)]
    assert len(found) == 1, found
    return found[0]


Make: TypeAlias = Callable[..., TorchModel]
"""(of which class, TorchModel if it is not said) -> the model."""


@pytest.fixture
def make(family: Family) -> Make:
    def make(kind: type[TorchModel] = TorchModel) -> TorchModel:
        kv = family.make_kv()
        return kind(family.loaded, kv, choose_runner("torch", family.loaded, kv, threads=None))

    return make


@pytest.fixture
def bench(make: Make) -> Bench:
    return Bench(FakeModels(tiny=make))


def test_a_generation_is_admitted_produces_the_models_own_tokens_and_ends(bench: Bench, family: Family) -> None:
    bench.tell(start(1))
    events = bench.run()
    assert tokens_of(events, 1) == family.plain_greedy(PROMPT, 6)
    assert isinstance(events[0], Admitted)
    assert (events[0].prompt_tokens, events[0].cached_tokens) == (10, 0)
    end = only(events, Ended)
    assert (end.finish_reason, end.prompt_tokens) == (FinishReason.LENGTH, 10)
    assert events[-1] == end


def test_the_times_at_the_end_say_where_they_went(make: Make) -> None:
    bench = Bench(FakeModels(tiny=lambda: make(Slow)))

    class Slow(TorchModel):
        def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
            bench.now += 0.5
            return super().compute(batch, draws)

    bench.tell(start(1))
    bench.work()
    bench.now = 0.25
    end = only(bench.run(), Ended)
    assert (end.queue_ms, end.prefill_ms, end.decode_ms) == (250.0, 1500.0, 2500.0)


def test_the_engine_tells_which_nodes_of_a_chain_can_be_reused_from_when_their_blocks_are_full(bench: Bench) -> None:
    prompt = [(7 * number) % 50 for number in range(70)]
    chain = routing_chain(prompt)
    assert len(chain) == 3
    bench.tell(start(1, prompt, chain=chain))
    moved = [event.changes for event in bench.run() if isinstance(event, NodesMoved)]
    # the third node ends in a block that the first output tokens fill; nodes come as their blocks are computed
    assert [change for changes in moved for change in changes] == [NodeChange("t", node, True) for node in chain]
    assert len(moved) == 3
    other = routing_chain(prompt, cache_salt="another name for the same blocks")
    bench.tell(start(2, prompt, chain=other, tenant="t"))
    moved = [event.changes for event in bench.run() if isinstance(event, NodesMoved)]
    assert moved[0] == tuple(NodeChange("t", node, True) for node in other[:2])  # with what it shares, at once
    assert moved[1:] == [(NodeChange("t", other[2], True),)]


def test_nodes_go_when_their_blocks_are_evicted(make: Make) -> None:
    bench = Bench(FakeModels(tiny=make), max_tokens_per_step=64)
    held: set[bytes] = set()
    chains = []
    for number in range(40):  # many times what the pool can hold
        prompt = [(number + 3 * at) % 50 for at in range(64)]
        chains.append(routing_chain(prompt))
        bench.tell(start(number, prompt, chain=chains[-1]))
        for event in bench.run():
            for change in event.changes if isinstance(event, NodesMoved) else ():
                assert (change.node in held) != change.is_stored
                held ^= {change.node}
    pool = bench.host.figures().models[0].pool
    assert pool.evictions > 0
    assert held >= set(chains[-1])
    assert not held & set(chains[0])


def test_blocks_are_told_as_they_are_computed_and_forgotten_if_anybody_follows_them(
    make: Make,
) -> None:
    bench = Bench(FakeModels(tiny=make), tells_blocks=True)
    prompt = list(range(9))
    bench.tell(start(1, prompt))
    told = [change for event in bench.run() if isinstance(event, BlocksMoved) for change in event.changes]
    added = [change for change in told if isinstance(change, BlockAdded)]
    assert added == told
    assert b"".join(change.tokens for change in added[:2]) == token_bytes(prompt[:8])
    assert [change.parent for change in added] == [None, *(change.digest for change in added[:-1])]
    bench.tell(start(2, prompt))
    again = [change for event in bench.run() if isinstance(event, BlocksMoved) for change in event.changes]
    assert again == [], "a block that is found again is no news"
    events = bench.tell(FlushKV(Ticket(1), "t", None))
    assert only(events, BlocksMoved).changes == (AllDropped(),)


def test_blocks_that_nobody_follows_are_not_told(bench: Bench) -> None:
    bench.tell(start(1, list(range(9))))
    assert not [event for event in bench.run() if isinstance(event, BlocksMoved)]


def test_without_prefix_caching_no_node_is_told(make: Make) -> None:
    bench = Bench(FakeModels(tiny=make), shares_prefixes=False)
    prompt = [1] * 40
    bench.tell(start(1, prompt, chain=routing_chain(prompt)))
    assert not [event for event in bench.run() if isinstance(event, NodesMoved)]


def test_what_a_prefill_took_is_told_just_before_the_first_token(make: Make) -> None:
    """Of a step that others share, a prefill is charged its part by tokens; waiting for others is not its time."""

    bench = Bench(FakeModels(tiny=lambda: make(Slow)), max_tokens_per_step=8)

    class Slow(TorchModel):
        def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
            bench.now += 0.5
            return super().compute(batch, draws)

    prompt = list(range(1, 41))
    bench.tell(start(1, prompt))
    events = bench.run()
    told = only(events, Prefilled)
    assert (told.run, told.num_tokens, told.num_cached, told.compute_ms) == (run_id(1), 40, 0, 2500.0)
    assert isinstance(events[events.index(told) + 1], Produced)

    bench.tell(start(2, prompt))
    again = only(bench.run(), Prefilled)
    assert (again.num_tokens, again.num_cached) == (40, 39)
    assert again.compute_ms == 500.0

    bench.tell(start(3, [2] * 16), start(4, [3] * 16))
    both = [event for event in bench.run() if isinstance(event, Prefilled)]
    assert [(event.num_tokens, event.num_cached) for event in both] == [(16, 0), (16, 0)]
    assert 2000.0 <= sum(event.compute_ms for event in both) <= 2250.0  # 32 tokens, 8 in a step that is full


def test_a_model_loads_once_however_many_wait_for_it(make: Make) -> None:
    models = FakeModels(tiny=make)
    bench = Bench(models)
    bench.tell(Load("tiny"), start(1), start(2, model="tiny"))
    assert bench.host.figures().models[0].state == ModelState.LOADING
    events = bench.run()
    assert models.num_loads == 1
    assert len(tokens_of(events, 1)) == len(tokens_of(events, 2)) == 6
    assert bench.host.figures().models[0].state == ModelState.READY


def test_an_unknown_model_breaks_only_its_own_request_and_leaves_no_trace(bench: Bench) -> None:
    events = bench.tell(start(1, model="../../etc"), start(2))
    assert isinstance(only(events, Broke).error, ModelNotFound)
    assert [model.name for model in bench.host.figures().models] == ["tiny"]
    assert len(tokens_of(bench.run(), 2)) == 6


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_only_after_a_pause(
    make: Make,
) -> None:
    outcomes: Iterator[Callable[[], Model]] = iter([_refuse, make])
    models = FakeModels(good=make, bad=lambda: next(outcomes)())
    bench = Bench(models)
    bench.tell(start(1, model="bad"), start(2, model="bad"), start(3, model="good"))
    events = bench.run()
    assert [type(event.error) for event in events if isinstance(event, Broke)] == [ModelUnavailable, ModelUnavailable]
    assert len(tokens_of(events, 3)) == 6
    assert isinstance(only(bench.tell(start(4, model="bad")), Broke).error, ModelUnavailable)
    assert models.num_loads == 2
    bench.now = RETRY_LOAD_S
    bench.tell(start(5, model="bad"))
    assert len(tokens_of(bench.run(), 5)) == 6


def _refuse() -> Model:
    raise ModelUnavailable("the weights are truncated")


def test_a_load_that_raises_anything_is_a_model_that_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    def explode() -> Model:
        raise ZeroDivisionError("in foreign code")

    bench = Bench(FakeModels(bad=explode))
    bench.tell(start(1))
    assert isinstance(only(bench.run(), Broke).error, ModelUnavailable)
    assert "ZeroDivisionError" in caplog.text


def test_the_same_prefix_is_found_in_the_pool_the_second_time(bench: Bench) -> None:
    bench.tell(start(1))
    first = bench.run()
    bench.tell(start(2))
    second = bench.run()
    assert only(second, Admitted).cached_tokens == 9
    assert tokens_of(second, 2) == tokens_of(first, 1)


@pytest.mark.parametrize("is_corrupt", [False, True])
def test_an_audit_finds_what_is_wrong_in_the_pool_and_changes_nothing_that_is_generated(
    family: Family, caplog: pytest.LogCaptureFixture, is_corrupt: bool
) -> None:
    said: list[list[int]] = []
    for share in (0.0, 1.0):
        kv = family.make_kv()
        model = TorchModel(family.loaded, kv, choose_runner("torch", family.loaded, kv, threads=None))
        bench = Bench(FakeModels(tiny=lambda model=model: model), audit_share=share)  # type: ignore[misc]  # mypy and defaults
        bench.tell(start(1))
        bench.run()
        if is_corrupt:
            kv.values[0][1, 0] += 3.0  # the second block that was taken
        bench.tell(start(2))
        said.append(tokens_of(bench.run(), 2))
        bench.tell(start(3))
        again = bench.run()
        pool = bench.host.figures().models[0].pool
        assert pool.held_blocks == 0
        if share == 0:
            assert (pool.audits_passed, pool.audits_failed) == (0, 0)
            continue
        assert pool.audits_failed == is_corrupt
        assert pool.audits_passed == (1 if is_corrupt else 4)
        assert ("ALARM" in caplog.text) == is_corrupt
        assert only(again, Admitted).cached_tokens == (0 if is_corrupt else 9)
        assert tokens_of(again, 3) == family.plain_greedy(PROMPT, 6)
    assert said[0] == said[1]
    assert (said[0] == family.plain_greedy(PROMPT, 6)) == (not is_corrupt)


def test_an_audit_that_raises_harms_nobody(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Blind(TorchModel):
        def difference(self, one: BlockId, other: BlockId) -> float:
            raise RuntimeError("no sight")

    bench = Bench(FakeModels(tiny=partial(make, Blind)), audit_share=1.0)
    bench.tell(start(1))
    first = bench.run()
    bench.tell(start(2))
    assert tokens_of(bench.run(), 2) == tokens_of(first, 1)
    assert "no sight" in caplog.text
    pool = bench.host.figures().models[0].pool
    assert (pool.audits_skipped, pool.audits_failed, pool.held_blocks) == (2, 0, 0)


def test_a_flush_forgets_the_prefixes_of_its_tenant_and_salt_alone(bench: Bench) -> None:
    for number, (tenant, salt) in enumerate((("a", ""), ("a", "mine"), ("b", ""))):
        bench.tell(replace(start(number, tenant=tenant), cache_salt=salt))
    bench.run()

    def cached(number: int, tenant: str, salt: str) -> int:
        bench.tell(replace(start(number, tenant=tenant), cache_salt=salt))
        found: int = only(bench.run(), Admitted).cached_tokens
        return found

    assert only(bench.tell(FlushKV(Ticket(1), "a", "mine")), Answered).answer == 3
    assert (cached(4, "a", ""), cached(5, "a", "mine"), cached(6, "b", "")) == (9, 0, 9)
    assert only(bench.tell(FlushKV(Ticket(2), "a", None)), Answered).answer == 6
    assert (cached(7, "a", ""), cached(8, "a", "mine"), cached(9, "b", "")) == (0, 0, 9)
    assert only(bench.tell(FlushKV(Ticket(3), "nobody", None)), Answered).answer == 0


def test_without_shared_prefixes_nothing_is_found(make: Make) -> None:
    bench = Bench(FakeModels(tiny=make), shares_prefixes=False)
    bench.tell(start(1, seq_id="s"))
    bench.run()
    bench.tell(start(2, seq_id="s"))
    assert only(bench.run(), Admitted).cached_tokens == 0


def test_neither_tenants_nor_salts_share_prefixes(bench: Bench) -> None:
    bench.tell(start(1, tenant="a"))
    bench.run()
    bench.tell(start(2, tenant="b"))
    assert only(bench.run(), Admitted).cached_tokens == 0
    bench.tell(replace(start(3, tenant="a"), cache_salt="mine"))
    assert only(bench.run(), Admitted).cached_tokens == 0
    bench.tell(replace(start(4, tenant="a"), cache_salt="mine"))
    assert only(bench.run(), Admitted).cached_tokens == 9


def test_a_salt_that_is_wrong_breaks_its_own_request(bench: Bench) -> None:
    bench.tell(replace(start(1), cache_salt="a\nb"), start(2))
    events = bench.run()
    assert isinstance(only(events, Broke).error, BadArgument)
    assert len(tokens_of(events, 2)) == 6


@pytest.mark.parametrize("num_had", [1, 3, 5, 6])
def test_a_resumed_generation_goes_on_with_the_same_tokens_and_text(bench: Bench, num_had: int) -> None:
    bench.tell(start(1))
    whole = bench.run()
    tokens = tokens_of(whole, 1)
    bench.tell(start(2, resume=tuple(tokens[:num_had])))
    rest = bench.run()
    assert tokens_of(rest, 2) == tokens[num_had:]
    texts = [text for e in whole if isinstance(e, Produced) for text in e.texts]
    assert text_of(rest, 2) == "".join(texts[num_had:])
    assert only(rest, Ended).finish_reason is FinishReason.LENGTH
    assert rest.index(only(rest, Admitted)) < rest.index(only(rest, Ended)), "even if nothing was left to compute"


def test_seeded_sampling_resumes_with_the_tokens_it_would_have_drawn(bench: Bench) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.5, seed=42, ignore_eos=True)
    bench.tell(start(1, sampling=sampling))
    tokens = tokens_of(bench.run(), 1)
    bench.tell(start(2, sampling=sampling, resume=tuple(tokens[:3])))
    assert tokens_of(bench.run(), 2) == tokens[3:]


def test_a_stop_string_ends_the_output_before_it(bench: Bench) -> None:
    long = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    bench.tell(start(1, sampling=long))
    text = text_of(bench.run(), 1)
    stop = next(c for c in text if c != "\ufffd")
    bench.tell(start(2, sampling=Sampling(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,))))
    events = bench.run()
    assert text_of(events, 2) == text[: text.index(stop)]
    assert only(events, Ended).finish_reason is FinishReason.STOP
    had = tuple(tokens_of(events, 2))
    bench.tell(start(3, sampling=Sampling(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,)), resume=had))
    again = bench.run()
    assert tokens_of(again, 3) == []
    assert only(again, Admitted).prompt_tokens == len(PROMPT)
    assert only(again, Ended).finish_reason is FinishReason.STOP


def test_text_that_might_have_become_a_stop_string_comes_with_the_last_token(bench: Bench) -> None:
    bench.tell(start(1))
    text = text_of(bench.run(), 1)
    held = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, stop=(text[-2:] + "never",))
    bench.tell(start(2, sampling=held))
    events = bench.run()
    assert text_of(events, 2) == text
    assert only(events, Ended).finish_reason is FinishReason.LENGTH


def test_the_end_of_text_may_not_come_before_min_tokens(bench: Bench, family: Family) -> None:
    first = family.plain_greedy(PROMPT, 1)[0]
    stops_at_once = Sampling(max_tokens=6, temperature=0.0, stop_token_ids=(first,))
    bench.tell(start(1, sampling=stops_at_once))
    assert tokens_of(bench.run(), 1) == [first]
    bench.tell(start(2, sampling=Sampling(max_tokens=6, min_tokens=3, temperature=0.0, stop_token_ids=(first,))))
    tokens = tokens_of(bench.run(), 2)
    assert len(tokens) >= 3
    assert first not in tokens[:2]
    assert EOS_ID not in tokens[:2]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (PromptKind.TOKENS, b"\x01\x00\x00"),
        (PromptKind.TOKENS, b""),
        (PromptKind.TOKENS, token_bytes([100_000])),
        (PromptKind.TEXT, b"\xff\xfe"),
        (PromptKind.TEXT, b""),
        (PromptKind.MESSAGES, b"[{}]"),
        (PromptKind.MESSAGES, b"{"),
        (PromptKind.MESSAGES, b'[{"role": "wizard", "content": "x"}]'),
    ],
)
def test_a_prompt_that_is_wrong_is_refused_and_harms_nobody(bench: Bench, kind: PromptKind, data: bytes) -> None:
    bench.tell(start(1, kind=kind, data=data), start(2))
    events = bench.run()
    assert isinstance(only(events, Broke).error, BadArgument)
    assert len(tokens_of(events, 2)) == 6


def test_text_and_messages_are_encoded_by_the_models_tokenizer(bench: Bench) -> None:
    bench.tell(start(1, kind=PromptKind.TEXT, data=b"hello hello"))
    assert only(bench.run(), Admitted).prompt_tokens > 0
    bench.tell(start(2, kind=PromptKind.MESSAGES, data=b'[{"role": "user", "content": "hello"}]'))
    assert only(bench.run(), Admitted).prompt_tokens > 5


def test_stop_takes_effect_before_the_next_step(bench: Bench) -> None:
    bench.tell(start(1), start(2))
    bench.work()
    bench.step()
    bench.hear()
    bench.tell(Stop(run_id(1)))
    events = bench.run()
    assert tokens_of(events, 1) == []
    assert len(tokens_of(events, 2)) == 6
    assert bench.host.figures().engine.cancelled == 1
    assert bench.host.figures().models[0].pool.held_blocks == 0


def test_stop_reaches_a_request_whose_model_is_still_loading(bench: Bench) -> None:
    bench.tell(start(1), Stop(run_id(1)))
    bench.host.handle(bench.jobs.pop()(), bench.now)  # measured
    bench.host.handle(bench.jobs.pop()(), bench.now)  # loaded
    assert bench.jobs == []  # its prompt is not even encoded
    assert bench.run() == []
    assert bench.host.figures().engine.waiting == 0


def test_stop_reaches_a_request_whose_prompt_is_being_encoded(bench: Bench) -> None:
    bench.tell(Load("tiny"))
    bench.work()
    bench.tell(start(1), Stop(run_id(1)))
    assert bench.run() == []
    assert bench.host.figures().engine.cancelled == 0


def test_a_held_generation_computes_nothing_until_it_may_proceed(bench: Bench) -> None:
    bench.tell(start(1), Hold(run_id(1)))
    assert tokens_of(bench.run(), 1) == []
    bench.tell(Proceed(run_id(1)))
    bench.work()
    bench.step()
    bench.step()
    bench.step()  # three chunks of prefill, and with the last one a token
    bench.tell(Hold(run_id(1)))
    assert not bench.step()
    bench.tell(Proceed(run_id(1)))
    assert len(tokens_of(bench.run(), 1)) == 5


class Faulty(TorchModel):
    """Raises on a prompt that begins with 13, and has no numbers for one that begins with 14."""

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        if any(piece.token_ids[0] == 13 and piece.start == 0 for piece in batch):
            raise RuntimeError("out of luck")
        drawn = super().compute(batch, draws)
        return [
            InternalError("non-finite logits") if piece.token_ids[0] == 14 and piece.start == 0 else token
            for piece, token in zip(batch, drawn, strict=True)
        ]


@pytest.fixture
def faulty(make: Make) -> Bench:
    return Bench(FakeModels(tiny=partial(make, Faulty)), max_tokens_per_step=64)


@pytest.mark.parametrize("culprits", [{2}, {1}, {5}, {1, 4}, {1, 2, 3, 4, 5}])
def test_a_step_that_raises_ends_only_those_that_made_it(
    faulty: Bench, make: Make, culprits: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The others say what they would have said without them, and the engine lives on."""

    def prompt(number: int) -> tuple[int, ...]:
        return (13 if number in culprits else 15, 2, number)

    faulty.tell(*(start(number, prompt=prompt(number)) for number in range(1, 6)))
    events = faulty.run()
    assert {event.run: type(event.error) for event in events if isinstance(event, Broke)} == {
        run_id(number): InternalError for number in culprits
    }
    assert (
        caplog.text.count("failed to compute a generation") == caplog.text.count("RuntimeError: out") == len(culprits)
    )
    for number in {1, 2, 3, 4, 5} - culprits:
        alone = Bench(FakeModels(tiny=make))
        alone.tell(start(number, prompt=prompt(number)))
        assert tokens_of(events, number) == tokens_of(alone.run(), number)
    faulty.tell(start(6))
    assert len(tokens_of(faulty.run(), 6)) == 6
    assert faulty.host.figures().models[0].pool.held_blocks == 0


def test_a_copy_that_fails_ends_those_that_counted_on_it_in_the_step_or_not(make: Make) -> None:
    class Scratched(TorchModel):
        def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
            raise OSError("the memory is gone")

    bench = Bench(FakeModels(tiny=partial(make, Scratched)), max_num_seqs=2, max_tokens_per_step=1)
    bench.tell(start(1, seq_id="kept"))
    bench.run()
    bench.tell(start(2, prompt=[*PROMPT[:6], 77], seq_id="in"), start(3, prompt=[*PROMPT[:7], 78], seq_id="out"))
    events = bench.run()
    assert {event.run for event in events if isinstance(event, Broke)} == {run_id(2), run_id(3)}
    lengths = bench.tell(*(MeasureKV(Ticket(n), SequenceKey("t", name), 0) for n, name in enumerate(("in", "out"))))
    assert [event.answer for event in lengths if isinstance(event, Answered)] == [4, 4]


def test_numbers_that_are_none_end_one_generation_of_a_step_and_not_the_others(faulty: Bench) -> None:
    faulty.tell(start(1), start(2, prompt=(14, 2, 3)), start(3, prompt=(6, 5, 4)))
    events = faulty.run()
    assert only(events, Broke).run == run_id(2)
    assert len(tokens_of(events, 1)) == len(tokens_of(events, 3)) == 6
    assert faulty.host.figures().models[0].pool.held_blocks == 0


def test_generations_of_one_step_produce_what_each_does_alone(make: Make) -> None:
    ways = [
        GREEDY,
        Sampling(max_tokens=9, temperature=1.5, seed=3, ignore_eos=True),
        Sampling(max_tokens=7, temperature=1.5, seed=4, top_k=20, ignore_eos=True),
        Sampling(max_tokens=8, temperature=0.7, seed=3, top_p=0.9, min_tokens=4),
        Sampling(max_tokens=8, temperature=0.7, seed=5, top_p=0.9, min_tokens=4),
    ]
    starts = [start(n, prompt=PROMPT[n % 4 :], sampling=ways[n % len(ways)]) for n in range(12)]
    together = Bench(FakeModels(tiny=make), max_tokens_per_step=64, max_num_seqs=16)
    together.tell(*starts)
    events = together.run()
    assert together.host.figures().progress < 20, "they are computed together"
    for n, each in enumerate(starts):
        alone = Bench(FakeModels(tiny=make))
        alone.tell(each)
        expected = alone.run()
        assert tokens_of(events, n) == tokens_of(expected, n) != []
        assert text_of(events, n) == text_of(expected, n)


def undecodable(bad: Sequence[int]) -> type[TorchModel]:
    """A model that makes text of anything but these tokens."""

    class Decoder:
        def decode(self, token_ids: Sequence[int]) -> str:
            if list(token_ids) == bad:
                raise TokenizerError("not text")
            return ""

    class Mute(TorchModel):
        def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
            return TextStream(Decoder(), stops, min_tokens)

    return Mute


@pytest.mark.parametrize("position", [2, 5])
def test_a_token_that_cannot_be_decoded_fails_its_own_generation_even_if_it_is_the_last(
    make: Make, family: Family, position: int
) -> None:
    bad = family.plain_greedy(PROMPT, 6)[: position + 1]
    bench = Bench(FakeModels(tiny=partial(make, undecodable(bad))))
    bench.tell(start(1))
    events = bench.run()
    assert tokens_of(events, 1) == bad[:-1]
    assert isinstance(only(events, Broke).error, TokenizerError)
    assert [event for event in events if isinstance(event, Ended)] == []
    assert bench.host.figures().models[0].pool.held_blocks == 0


def test_a_resumed_output_that_cannot_be_decoded_fails_at_once(make: Make) -> None:
    bench = Bench(FakeModels(tiny=partial(make, undecodable([1, 2]))))
    bench.tell(start(1, resume=(1, 2)))
    assert isinstance(only(bench.run(), Broke).error, TokenizerError)


def test_a_named_sequence_can_be_read_measured_listed_pinned_and_dropped(bench: Bench, family: Family) -> None:
    key = SequenceKey("t", "chat")
    bench.tell(start(1, seq_id="chat"))
    events = bench.run()
    assert Retained(key) in events
    assert events.index(Retained(key)) < events.index(only(events, Ended))
    tokens = [*PROMPT, *tokens_of(events, 1)]
    shape = family.loaded.shape

    assert bench.tell(MeasureKV(Ticket(1), key, 0)) == [Answered(Ticket(1), 15)]
    read = only(bench.tell(ReadKV(Ticket(2), key, 1, 2, 9)), Answered).answer
    assert isinstance(read, ReadResult)
    assert (read.k.shape, read.length) == ((7, shape.num_kv_heads, shape.head_dim), 15)
    past = family.plain(input_ids=_row(tokens[:15]), use_cache=True).past_key_values
    keys = np.frombuffer(read.k_data, np.float32).reshape(read.k.shape)
    np.testing.assert_allclose(keys, past.layers[1].keys[0].transpose(0, 1)[2:9].detach().numpy(), atol=1e-4)

    (info,) = only(bench.tell(ListKV(Ticket(3), "t", "ch", "", 10)), Answered).answer
    assert (info.seq_id, info.kind, info.num_tokens, info.pinned) == ("chat", "computed", 15, False)
    assert bench.tell(PinKV(Ticket(4), key, 60.0)) == [Answered(Ticket(4), 1)]
    (info,) = only(bench.tell(ListKV(Ticket(5), "t", "", "", 10)), Answered).answer
    assert info.pinned
    assert bench.tell(UnpinKV(Ticket(6), key)) == [Answered(Ticket(6), 1)]
    assert only(bench.tell(ListKV(Ticket(7), "other", "", "", 10)), Answered).answer == ()

    dropped = bench.tell(DropKV(Ticket(8), key))
    assert dropped == [Forgotten(key), Answered(Ticket(8), shape.num_layers)]
    assert isinstance(only(bench.tell(MeasureKV(Ticket(9), key, 0)), Answered).answer, NotFound)


def _row(tokens: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(tokens)])


def test_reading_what_is_not_there_is_an_answer_not_a_crash(bench: Bench) -> None:
    key = SequenceKey("t", "chat")
    bench.tell(start(1, seq_id="chat"))
    bench.run()
    answers = bench.tell(
        ReadKV(Ticket(1), key, 99, 0, None), ReadKV(Ticket(2), key, 0, 5, 500), MeasureKV(Ticket(3), key, 99)
    )
    kinds = [type(event.answer) for event in answers if isinstance(event, Answered)]
    assert kinds == [NotFound, BadArgument, NotFound]


def test_a_sequence_that_is_being_generated_is_not_dropped(bench: Bench) -> None:
    bench.tell(start(1, seq_id="chat"))
    bench.work()
    bench.step()
    bench.hear()
    assert isinstance(only(bench.tell(DropKV(Ticket(1), SequenceKey("t", "chat"))), Answered).answer, Conflict)


def test_going_on_with_a_name_reuses_all_of_it(bench: Bench) -> None:
    bench.tell(start(1, seq_id="chat"))
    first = tokens_of(bench.run(), 1)
    bench.tell(start(2, prompt=[*PROMPT, *first, 17], seq_id="chat"))
    assert only(bench.run(), Admitted).cached_tokens == 15


def test_a_name_means_one_sequence_whichever_model_wrote_it(make: Make) -> None:
    bench = Bench(FakeModels(one=make, two=make))
    key = SequenceKey("t", "s")
    bench.tell(start(1, model="one", seq_id="s"))
    bench.run()
    bench.tell(start(2, model="two", seq_id="s"))
    events = bench.run()
    assert only(events, Forgotten) == Forgotten(key)
    assert only(events, Retained) == Retained(key)
    (info,) = only(bench.tell(ListKV(Ticket(1), "t", "", "", 10)), Answered).answer
    assert info.seq_id == "s"


def test_a_name_that_another_model_is_writing_is_a_conflict(make: Make) -> None:
    bench = Bench(FakeModels(one=make, two=make))
    bench.tell(start(1, model="one", seq_id="s"))
    bench.work()
    bench.step()
    bench.hear()
    bench.tell(start(2, model="two", seq_id="s"))
    events = bench.run()
    assert isinstance(only(events, Broke).error, Conflict)
    assert len(tokens_of(events, 1)) == 6


def test_preloading_what_is_unknown_is_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert bench.tell(Load("nothing")) == []
    assert "no model named 'nothing'" in caplog.text


def test_an_encoder_that_raises_anything_breaks_its_own_request(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Fragile(TorchModel):
        def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
            if prompt == b"boom":
                raise ZeroDivisionError("in foreign code")
            return super().encode(kind, prompt, special)

    bench = Bench(FakeModels(tiny=partial(make, Fragile)))
    bench.tell(start(1, kind=PromptKind.TEXT, data=b"boom"), start(2))
    events = bench.run()
    assert isinstance(only(events, Broke).error, InternalError)
    assert "ZeroDivisionError" in caplog.text
    assert len(tokens_of(events, 2)) == 6


async def test_the_thread_answers_on_the_loop_and_ends_when_it_is_closed(make: Make) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    events: list[Event] = []

    def on_events(batch: Sequence[Event]) -> None:
        assert asyncio.get_running_loop() is loop
        events.extend(batch)
        if any(isinstance(event, Ended) for event in batch):
            ended.set()

    with EngineThread(FakeModels(tiny=make), roomy(), on_events, max_tokens_per_step=4) as engine:
        assert "kvcache-engine" in {thread.name for thread in threading.enumerate()}
        engine.send(start(1))
        async with asyncio.timeout(30):
            await ended.wait()
        await until(lambda: engine.figures().progress >= 6, "the figures of an engine that has nothing to do")
    assert len(tokens_of(events, 1)) == 6
    assert "kvcache-engine" not in {thread.name for thread in threading.enumerate()}


class Gated(TorchModel):
    """Steps and encodings wait for their gates; `widths` are the slices of each step."""

    may_step: threading.Event
    may_encode: threading.Event
    in_step: threading.Event
    widths: list[int]

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        assert self.may_encode.wait(30.0)
        return super().encode(kind, prompt, special)

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        self.widths.append(len(batch))
        self.in_step.set()
        assert self.may_step.wait(30.0)
        return super().compute(batch, draws)


@pytest.fixture
def gated(make: Make) -> Gated:
    """With closed steps and open encodings."""
    model = make(Gated)
    assert isinstance(model, Gated)
    model.may_step, model.may_encode, model.in_step = threading.Event(), threading.Event(), threading.Event()
    model.widths = []
    model.may_encode.set()
    return model


async def test_prompts_that_come_during_a_step_are_in_the_next_one(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are encoded after the step, and beside the next one if that did not wait for them."""
    monkeypatch.setattr("workers.engine.ENCODE_S", 30.0)
    events: list[Event] = []
    with EngineThread(FakeModels(tiny=lambda: gated), roomy(), events.extend, max_tokens_per_step=64) as engine:
        engine.send(start(1))
        await until(gated.in_step.is_set, "the first step")
        for run in (2, 3, 4):
            engine.send(start(run))
        gated.may_step.set()
        await until(lambda: sum(isinstance(event, Ended) for event in events) == 4, "all ends")
    assert gated.widths[:2] == [1, 4]


async def test_a_prompt_that_takes_long_to_encode_does_not_hold_up_those_who_run(gated: Gated) -> None:
    events: list[Event] = []
    with EngineThread(FakeModels(tiny=lambda: gated), roomy(), events.extend, max_tokens_per_step=64) as engine:
        engine.send(start(1))
        await until(gated.in_step.is_set, "the first step")
        gated.may_encode.clear()
        engine.send(start(2))
        gated.may_step.set()
        await until(lambda: any(isinstance(event, Ended) for event in events), "the end of the first")
        gated.may_encode.set()
        await until(lambda: sum(isinstance(event, Ended) for event in events) == 2, "the end of the second")
    assert set(gated.widths) == {1}


def _explode() -> None:
    raise ZeroDivisionError("in a job")


def test_a_job_that_raises_leaves_its_thread_to_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    thread = JobThread("kvcache-test")
    thread.submit(_explode)
    thread.submit(done.set)
    assert done.wait(5.0)
    thread.close()
    assert thread.join(5.0)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("late_steps", [0, 1, 4])
def test_what_is_kept_of_a_stopped_output_does_not_depend_on_when_the_engine_hears_of_it(
    make: Make, late_steps: int
) -> None:
    long = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain = Bench(FakeModels(tiny=make))
    plain.tell(start(1, sampling=long))
    whole = plain.run()
    text = text_of(whole, 1)
    stop = next(c for c in text[2:] if c != "\ufffd")
    bench = Bench(FakeModels(tiny=make), late_steps=late_steps)
    bench.tell(start(2, sampling=msgspec.structs.replace(long, stop=(stop,)), seq_id="s"))
    events = bench.run()
    had = tokens_of(events, 2)
    assert text_of(events, 2) == text[: text.index(stop)]
    assert had == tokens_of(whole, 1)[: len(had)]
    assert only(events, Ended).finish_reason is FinishReason.STOP
    measured = bench.tell(MeasureKV(Ticket(1), SequenceKey("t", "s"), 0))
    assert only(measured, Answered).answer == len(PROMPT) + len(had) - 1
    bench.tell(start(3, prompt=(*PROMPT, *had), seq_id="s"))
    again = bench.run()
    assert only(again, Admitted).cached_tokens == len(PROMPT) + len(had) - 1
    assert tokens_of(again, 3) == tokens_of(whole, 1)[len(had) : len(had) + 6]


@pytest.mark.parametrize("num_had", [1, 4, 11])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=12, temperature=1.3, seed=5, repetition_penalty=1.5, ignore_eos=True),
        Sampling(max_tokens=12, temperature=0.0, frequency_penalty=-2.0, presence_penalty=-2.0, ignore_eos=True),
        Sampling(max_tokens=12, temperature=1.0, seed=6, min_p=0.01, logit_bias=((7, 3.0), (8, 3.0)), ignore_eos=True),
    ],
    ids=["repetition", "frequency", "bias"],
)
def test_a_resumed_stream_is_penalised_as_it_would_have_been(bench: Bench, sampling: Sampling, num_had: int) -> None:
    bench.tell(
        start(1, sampling=sampling), start(9, sampling=Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
    )
    events = bench.run()
    tokens = tokens_of(events, 1)
    assert tokens != tokens_of(events, 9), "the parameters change something"
    bench.tell(start(2, sampling=sampling, resume=tuple(tokens[:num_had])))
    assert tokens_of(bench.run(), 2) == tokens[num_had:]


@pytest.mark.parametrize(
    "wrong",
    [
        Sampling(stop_token_ids=(300,)),
        Sampling(stop_token_ids=(2**32 - 1,), min_tokens=3),
        Sampling(logit_bias=((2**31, 1.0),)),
    ],
    ids=["stop", "stop-and-min", "bias"],
)
def test_a_token_id_that_the_model_lacks_is_refused_by_name_and_harms_nobody(bench: Bench, wrong: Sampling) -> None:
    bench.tell(start(1), start(2, sampling=wrong))
    events = bench.run()
    error = only(events, Broke).error
    assert isinstance(error, BadArgument)
    assert "this model's are 0 to 299" in str(error)
    assert len(tokens_of(events, 1)) == 6


def test_logprobs_come_with_every_token_if_they_were_asked_for(bench: Bench) -> None:
    bench.tell(start(1, sampling=msgspec.structs.replace(GREEDY, logprobs=2)), start(2))
    events = bench.run()
    produced = [event for event in events if isinstance(event, Produced)]
    assert all((len(event.logprobs) == 1) == (event.run == run_id(1)) for event in produced)
    tops = [event.logprobs[0].top for event in produced if event.run == run_id(1)]
    assert [top[0][0] for top in tops] == tokens_of(events, 1), "greedy takes the likeliest"
    assert all(len(top) == 2 for top in tops)


def prompt_of(events: Sequence[Event], run: int) -> tuple[list[int], list[TokenLogprobs | None]]:
    """All that was told of its prompt, which must come before its first token."""
    own = [event for event in events if isinstance(event, PromptScored | Produced) and event.run == run_id(run)]
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    for part in takewhile(lambda event: isinstance(event, PromptScored), own):
        assert isinstance(part, PromptScored)
        assert part.start == len(tokens)
        tokens += part.tokens
        logprobs += part.logprobs
        assert len(tokens) <= part.num_tokens == len(PROMPT)
    return tokens, logprobs


@pytest.mark.parametrize("max_tokens_per_step", [4, 64])
def test_a_prompts_logprobs_are_those_of_transformers_whatever_the_cache_has(
    make: Callable[[], TorchModel], family: Family, max_tokens_per_step: int
) -> None:
    bench = Bench(FakeModels(tiny=make), max_tokens_per_step=max_tokens_per_step)
    bench.tell(start(1))
    bench.run()
    bench.tell(start(2, sampling=msgspec.structs.replace(GREEDY, prompt_logprobs=3)), start(3, PROMPT[::-1]), start(4))
    events = bench.run()
    tokens, logprobs = prompt_of(events, 2)
    with torch.inference_mode():
        exact = family.plain(torch.tensor([PROMPT])).logits[0, :-1].double().log_softmax(1)
    assert (tokens, logprobs[0]) == (list(PROMPT), None)
    told = [entry for entry in logprobs if entry is not None]
    assert [entry.logprob for entry in told] == pytest.approx(exact[range(9), PROMPT[1:]].tolist(), abs=1e-4)
    assert [[token for token, _ in entry.top] for entry in told] == exact.topk(3).indices.tolist()
    assert tokens_of(events, 2) == tokens_of(events, 4) == family.plain_greedy(PROMPT, 6)
    assert tokens_of(events, 3) == family.plain_greedy(PROMPT[::-1], 6)
    cached = {event.run: event.cached_tokens for event in events if isinstance(event, Admitted)}
    assert (cached[run_id(2)], cached[run_id(4)]) == (0, 9)


def test_a_prompt_of_one_token_has_no_logprob_and_says_so(bench: Bench) -> None:
    bench.tell(start(1, [5], sampling=msgspec.structs.replace(GREEDY, prompt_logprobs=0)))
    assert only(bench.run(), PromptScored) == PromptScored(run_id(1), 1, 0, (5,), (None,))


# --- tokens and text ------------------------------------------------------------------------------


def test_questions_about_text_wait_for_the_model_and_are_answered(make: Make) -> None:
    bench = Bench(FakeModels(tiny=make))
    ask = EncodePrompt(ticket=Ticket(1), model="tiny", kind=PromptKind.TEXT, prompt=b"hello", special=True)
    heard = bench.tell(ask, SpellTokens(ticket=Ticket(2), model="", tokens=b"\x41\0\0\0\x42\0\0\0", each=True))
    heard += bench.run()
    answers = {event.ticket: event.answer for event in heard if isinstance(event, Answered)}
    encoding, spelling = answers[Ticket(1)], answers[Ticket(2)]
    assert isinstance(encoding, Encoding)
    assert isinstance(spelling, Spelling)
    assert (encoding.max_model_len, len(spelling.texts)) == (128, 2)


def test_a_question_to_no_model_or_about_no_token_is_answered_with_what_is_wrong(bench: Bench) -> None:
    heard = bench.tell(
        EncodePrompt(ticket=Ticket(1), model="nothing", kind=PromptKind.TEXT, prompt=b"hello", special=True),
        SpellTokens(ticket=Ticket(2), model="", tokens=b"\xff\xff\0\0", each=False),
        SpellTokens(ticket=Ticket(3), model="", tokens=b"\1\0\0", each=False),
    )
    heard += bench.run()
    answers = {event.ticket: event.answer for event in heard if isinstance(event, Answered)}
    assert [type(answers[Ticket(number)]) for number in (1, 2, 3)] == [ModelNotFound, BadArgument, BadArgument]
