"""The engine without its thread: who waits, whose prompt is encoded, which model a command is for.

A request waits for its model (`workers.shelf`), then its prompt is encoded, then it is a slot's. Loading and
encoding are jobs for other threads: a job is a function that returns a `Result`, which comes back through
`handle`. Whatever is wrong with a request ends that request. Events collect until `take_events`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeAlias, assert_never

import msgspec

from bus.errors import InternalError, KVCacheError, NotFound
from bus.stats import EngineStats, Spelling
from workers.copy_api import EndPull, Fill, Lend, ReadBlocks, Return
from workers.engine_api import (
    Answer,
    Answered,
    Broke,
    Command,
    DropKV,
    EncodePrompt,
    Encoding,
    Ended,
    EngineEvent,
    EngineFigures,
    Fail,
    Finish,
    FlushKV,
    Hold,
    ListKV,
    Load,
    MeasureKV,
    PinKV,
    Proceed,
    Question,
    ReadKV,
    RunId,
    SpellTokens,
    Start,
    Stop,
    TextQuestion,
    Ticket,
    UnpinKV,
)
from workers.exchange import Exchange
from workers.keys import SequenceKey
from workers.loading import Closed, Loaded, Loading, Measured, Models
from workers.model import Model
from workers.model_budget import ModelBudget
from workers.shelf import Shelf
from workers.slot import Slot
from workers.tasks import CacheConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encode job's result."""

    start: Start
    result: tuple[int, ...] | KVCacheError


@dataclass(frozen=True, slots=True)
class Spelled:
    """The result of a job about tokens and text."""

    question: TextQuestion
    result: Answer


Result: TypeAlias = Measured | Loading | Loaded | Closed | Encoded | Spelled
Job: TypeAlias = Callable[[], Result]


class Host:
    """All models of a worker. `load` and `encode` run a job elsewhere and see to it that its result comes back, and
    `report` that what it is given while a job runs does."""

    def __init__(
        self,
        models: Models,
        budget: ModelBudget,
        *,
        load: Callable[[Job], None],
        report: Callable[[Loading], None],
        encode: Callable[[Job], None],
        max_tokens_per_step: int,
        max_num_seqs: int,
        shares_prefixes: bool,
        cache: CacheConfig,
    ) -> None:
        self._models = models
        self._run_encode = encode
        self._shelf = Shelf(
            models,
            budget,
            load=load,
            report=report,
            make_slot=lambda model: Slot(
                model,
                max_tokens_per_step=max_tokens_per_step,
                max_num_seqs=max_num_seqs,
                shares_prefixes=shares_prefixes,
                cache=cache,
            ),
        )
        self._exchange = Exchange(self._shelf.slots)
        self._slot_of: dict[RunId, Slot | None] = {}  # None: not in a slot yet
        self._waits_for: dict[RunId, str] = {}  # the model that is not there yet
        self._held: set[RunId] = set()  # of those not in a slot yet
        self._num_encoding = 0
        self._events: list[EngineEvent] = []
        self._progress = 0
        self._failed_early = 0

    # --- in and out ---

    def handle(self, item: Command | Result, now: float) -> None:
        """A command takes effect; what it cannot do is its own answer, never an exception."""
        match item:
            case Start():
                self._slot_of[item.run] = None
                self._start(item, now)
            case Stop():
                self._stop(item.run, now)
            case Hold() | Proceed():
                self._hold(item)
            case Finish() | Fail():
                self._conclude(item, now)
            case Load():
                self._preload(item.model, now)
            case Measured():
                self._ask_again(self._shelf.measured(item, now), now)
                self._make_room(now)
            case Loading():
                self._shelf.reported(item)
            case Loaded():
                self._ask_again(self._shelf.loaded(item, now), now)
            case Closed():
                self._shelf.closed(item)
            case Encoded():
                self._encoded(item, now)
            case EncodePrompt() | SpellTokens():
                self._spell(item, now)
            case Spelled():
                self._spelled(item)
            case ReadKV() | MeasureKV() | DropKV() | PinKV() | UnpinKV() | ListKV() | FlushKV():
                self._answer(item, now)
            case Lend() | ReadBlocks() | Return() | Fill() | EndPull():
                self._exchange.handle(item)
            case _:
                assert_never(item)

    def step(self, clock: Callable[[], float]) -> bool:
        """Make room for models, copy what is due, compute a step of each model; False if there is nothing to do."""
        self._make_room(clock())
        self._events += self._exchange.work(clock)
        for waiting in self._exchange.take_released():
            self._submit(waiting.slot, waiting.start, waiting.prompt, clock())
        is_busy = self._exchange.is_busy
        for slot in self._shelf.slots():
            ran, events = slot.step(clock)
            self._progress += ran
            is_busy |= ran
            self._say(events)
        return is_busy

    def take_events(self) -> list[EngineEvent]:
        """The events since the last call. A name that is kept is told before the end of the run that kept it."""
        changes = self._shelf.take_farewells()
        changes += [event for slot in self._shelf.slots() for event in slot.name_changes()]
        events, self._events = [*changes, *self._events], []
        return [*events, *(event for slot in self._shelf.slots() for event in slot.moves())]

    @property
    def num_encoding(self) -> int:
        """Generations whose prompts are being encoded."""
        return self._num_encoding

    @property
    def next_deadline(self) -> float:
        return min([self._shelf.next_deadline, *(slot.next_deadline for slot in self._shelf.slots())])

    def figures(self) -> EngineFigures:
        facts = [(slot.model.facts, slot.pool_stats()) for slot in self._shelf.slots()]
        return EngineFigures(
            progress=self._progress,
            kv_used_bytes=sum((pool.num_blocks - pool.free_blocks) * fact.block_bytes for fact, pool in facts),
            kv_total_bytes=sum(pool.num_blocks * fact.block_bytes for fact, pool in facts),
            engine=self._engine_stats(),
            models=self._shelf.stats(),
        )

    # --- models ---

    def _preload(self, name: str, now: float) -> None:
        try:
            self._shelf.find(name, now)
        except KVCacheError as error:
            log.error("model %s is not loaded: %s", name, error.message)

    def _make_room(self, now: float) -> None:
        """Models that wait for room get it as far as others can leave."""
        self._ask_again(self._shelf.make_room(now), now)

    def _ask_again(self, waiting: list[Start | TextQuestion], now: float) -> None:
        """Those that waited for a model that is settled now."""
        for one in waiting:
            if isinstance(one, Start):
                self._start(one, now)
            else:
                self._spell(one, now)

    # --- tokens and text ---

    def _spell(self, question: TextQuestion, now: float) -> None:
        """Ask the model's tokenizer, or wait for the model first."""
        try:
            question = replace(question, model=self._models.choose(question.model))
            slot = self._shelf.find(question.model, now)
        except KVCacheError as error:
            self._events.append(Answered(question.ticket, error))
            return
        if slot is None:
            self._shelf.wait(question)
        else:
            self._run_encode(partial(_spell_job, self._shelf.borrow(question.model).model, question))

    def _spelled(self, done: Spelled) -> None:
        self._shelf.give_back(done.question.model)
        self._events.append(Answered(done.question.ticket, done.result))

    # --- generations ---

    def _start(self, start: Start, now: float) -> None:
        """Encode its prompt, or wait for its model first."""
        try:
            start = replace(start, model=self._models.choose(start.model))
            slot = self._shelf.find(start.model, now)
        except KVCacheError as error:
            self._break(start.run, error)
            return
        if slot is None:
            self._shelf.wait(start)
            self._waits_for[start.run] = start.model
        else:
            self._waits_for.pop(start.run, None)
            self._num_encoding += 1
            self._run_encode(partial(_encode_job, self._shelf.borrow(start.model).model, start))

    def _encoded(self, done: Encoded, now: float) -> None:
        self._num_encoding -= 1
        slot = self._shelf.borrowed(done.start.model)
        run = done.start.run
        if run not in self._slot_of:  # stopped meanwhile
            self._shelf.give_back(done.start.model)
            return
        try:
            if isinstance(done.result, KVCacheError):
                raise done.result
            self._take_name(done.start, slot)
        except KVCacheError as error:
            self._shelf.give_back(done.start.model)
            self._break(run, error)
            return
        wanted = self._exchange.want(slot, done.start, done.result)
        if wanted is None:
            self._submit(slot, done.start, done.result, now)
        else:
            self._events.append(wanted)

    def _submit(self, slot: Slot, start: Start, prompt: tuple[int, ...], now: float) -> None:
        run = start.run
        self._shelf.give_back(start.model)
        self._slot_of[run] = slot
        self._say(slot.submit(start, prompt, now))
        if run in self._held:
            self._held.discard(run)
            slot.hold(run)

    def _take_name(self, start: Start, slot: Slot) -> None:
        """A name means one sequence: what another model kept under it goes. Raises Conflict if it is being written."""
        if start.seq_id:
            key = SequenceKey(start.tenant, start.seq_id)
            for other in self._shelf.slots():
                if other is not slot and other.has(key):
                    other.drop(key)

    def _stop(self, run: RunId, now: float) -> None:
        self._held.discard(run)
        self._shelf.leave(self._waits_for.pop(run, ""), run)
        if (waiting := self._exchange.leave(run)) is not None:
            self._shelf.give_back(waiting.start.model)
        slot = self._slot_of.pop(run, None)
        if slot is not None:
            self._say(slot.stop(run, now))

    def _conclude(self, command: Finish | Fail, now: float) -> None:
        """Nothing happens if it has ended meanwhile."""
        slot = self._slot_of.get(command.run)
        match command, slot:
            case Finish(), Slot():
                self._say(slot.finish(command.run, command.num_tokens, now))
            case Fail(), Slot():
                self._say(slot.fail(command.run, command.error, now))

    def _hold(self, command: Hold | Proceed) -> None:
        if command.run not in self._slot_of:
            return
        slot = self._slot_of[command.run]
        match command, slot:
            case Hold(), None:
                self._held.add(command.run)
            case Proceed(), None:
                self._held.discard(command.run)
            case Hold(), Slot():
                slot.hold(command.run)
            case Proceed(), Slot():
                slot.proceed(command.run)

    def _break(self, run: RunId, error: KVCacheError) -> None:
        """End a generation that no slot has."""
        self._failed_early += 1
        self._held.discard(run)
        self._waits_for.pop(run, None)
        self._say([Broke(run, error)])

    def _say(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case Ended() | Broke():
                    self._slot_of.pop(event.run, None)
                case _:
                    pass
        self._events += events

    # --- computed sequences ---

    def _answer(self, command: Question, now: float) -> None:
        try:
            answer: Answer = self._look_up(command, now)
        except KVCacheError as error:
            answer = error
        self._events.append(Answered(Ticket(command.ticket), answer))

    def _look_up(self, command: Question, now: float) -> Answer:
        """Raises NotFound, BadArgument or Conflict."""
        if isinstance(command, ListKV):
            found = chain.from_iterable(
                slot.describe(command.tenant, command.prefix, command.after, command.limit, now)
                for slot in self._shelf.slots()
            )
            return tuple(sorted(found, key=lambda info: info.seq_id)[: command.limit])
        if isinstance(command, FlushKV):
            return sum(slot.flush(command.tenant, command.cache_salt) for slot in self._shelf.slots())
        slot = self._slot_with(command.sequence)
        match command:
            case ReadKV():
                return slot.read(command.sequence, command.layer, command.start, command.stop)
            case MeasureKV():
                return slot.length(command.sequence, command.layer)
            case DropKV():
                return slot.drop(command.sequence)
            case PinKV():
                slot.pin(command.sequence, command.expires_at)
            case UnpinKV():
                slot.unpin(command.sequence)
            case _:
                assert_never(command)
        return 1

    def _slot_with(self, key: SequenceKey) -> Slot:
        for slot in self._shelf.slots():
            if slot.has(key):
                return slot
        raise NotFound(f"no sequence {key.seq_id!r} on its owner; it may have been evicted")

    # --- figures ---

    def _engine_stats(self) -> EngineStats:
        stats = self._shelf.engine_stats()
        return msgspec.structs.replace(
            stats,
            waiting=stats.waiting + sum(1 for slot in self._slot_of.values() if slot is None),
            failed=stats.failed + self._failed_early,
        )


def _spell_job(model: Model, question: TextQuestion) -> Spelled:
    try:
        if isinstance(question, SpellTokens):
            return Spelled(question, Spelling(texts=model.spell(question.tokens, question.each)))
        tokens = model.encode(question.kind, question.prompt, question.special)
        facts = model.facts
        return Spelled(question, Encoding(model=facts.name, tokens=tokens, max_model_len=facts.max_model_len))
    except KVCacheError as error:
        return Spelled(question, error)
    except Exception:  # as below
        log.exception("a tokenizer failed")
        return Spelled(question, InternalError("the tokenizer failed; the worker's log has the traceback"))


def _encode_job(model: Model, start: Start) -> Encoded:
    try:
        return Encoded(start, model.encode(start.kind, start.prompt))
    except KVCacheError as error:
        return Encoded(start, error)
    except Exception:  # a prompt harms only itself
        log.exception("encoding a prompt failed")
        return Encoded(start, InternalError("the prompt could not be encoded; the worker's log has the traceback"))
