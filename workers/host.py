"""The models of one worker and who waits for them: the engine without its thread.

    ABSENT --someone asks--> LOADING --loaded--> READY
                                '----failed----> FAILED --asked again after a pause--> LOADING

A model loads when it is first asked for; those who asked meanwhile wait, within their deadlines, and if
it cannot be loaded they all hear why, and nobody else is harmed. Then a prompt is encoded and handed to
the model's slot. Loading and encoding are jobs for other threads: a job is a function that returns a
`Result`, which comes back through `handle`. Events collect until `take_events`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import monotonic
from typing import Protocol, TypeAlias, assert_never

import msgspec

from bus.errors import InternalError, KVCacheError, ModelUnavailable, NotFound
from bus.messages import ModelState
from bus.stats import EngineStats, ModelStats
from workers.engine_api import (
    Answer,
    Answered,
    Broke,
    Command,
    DropKV,
    Ended,
    EngineFigures,
    Event,
    Hold,
    ListKV,
    Load,
    MeasureKV,
    PinKV,
    Proceed,
    ReadKV,
    RunId,
    Start,
    Stop,
    Ticket,
    UnpinKV,
)
from workers.keys import SequenceKey
from workers.slot import Model, Slot

log = logging.getLogger(__name__)

RETRY_LOAD_S = 5.0
MAX_RETRY_LOAD_S = 80.0


class Models(Protocol):
    """The models this process may serve."""

    @property
    def default(self) -> str:
        """The name that an empty one stands for."""

    def names(self) -> list[str]:
        """All names, loaded or not."""

    def check(self, name: str) -> None:
        """Raise ModelNotFound unless `name` is one of them."""

    def load(self, name: str) -> Model:
        """Load one; takes seconds. Raises ModelNotFound, ModelUnavailable or NoSpace. Called from the load thread."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load job's result."""

    name: str
    result: Model | KVCacheError
    load_s: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encode job's result."""

    start: Start
    result: tuple[int, ...] | KVCacheError


Result: TypeAlias = Loaded | Encoded
Job: TypeAlias = Callable[[], Result]


@dataclass(slots=True)
class _Place:
    """A model and its state. `slot` is there exactly when it is READY."""

    state: ModelState = ModelState.ABSENT
    slot: Slot | None = None
    error: KVCacheError | None = None
    load_s: float = 0.0
    num_failures: int = 0
    retry_at: float = 0.0
    waiting: list[Start] = field(default_factory=list)


class Host:
    """All models of a worker. `load` and `encode` run a job elsewhere and see to it that its result comes back."""

    def __init__(
        self,
        models: Models,
        *,
        load: Callable[[Job], None],
        encode: Callable[[Job], None],
        max_tokens_per_step: int,
        shares_prefixes: bool,
    ) -> None:
        self._models = models
        self._run_load = load
        self._run_encode = encode
        self._max_tokens_per_step = max_tokens_per_step
        self._shares_prefixes = shares_prefixes
        self._places: dict[str, _Place] = {name: _Place() for name in models.names()}
        self._slot_of: dict[RunId, Slot | None] = {}  # None: not in a slot yet
        self._held: set[RunId] = set()  # of those not in a slot yet
        self._events: list[Event] = []
        self._progress = 0
        self._failed_early = 0

    # --- in and out ---

    def handle(self, item: Command | Result, now: float) -> None:
        """A command takes effect; what it cannot do is its own answer, never an exception."""
        match item:
            case Start():
                self._start(item, now)
            case Stop():
                self._stop(item.run, now)
            case Hold() | Proceed():
                self._hold(item)
            case Load():
                self._load(item.model, now)
            case Loaded():
                self._loaded(item, now)
            case Encoded():
                self._encoded(item, now)
            case ReadKV() | MeasureKV() | DropKV() | PinKV() | UnpinKV() | ListKV():
                self._answer(item, now)
            case _:
                assert_never(item)

    def step(self, clock: Callable[[], float]) -> bool:
        """One forward pass of each model that has work; False if none had any."""
        is_busy = False
        for slot in self._slots():
            ran, events = slot.step(clock)
            self._progress += ran
            is_busy |= ran
            self._say(events)
        return is_busy

    def take_events(self) -> list[Event]:
        """The events since the last call. A name that is kept is told before the end of the run that kept it."""
        changes = [event for slot in self._slots() for event in slot.name_changes()]
        events, self._events = [*changes, *self._events], []
        return events

    @property
    def next_deadline(self) -> float:
        return min((slot.next_deadline for slot in self._slots()), default=math.inf)

    def figures(self) -> EngineFigures:
        models = tuple(self._model_stats(name, place) for name, place in self._places.items())
        facts = [(slot.model.facts, slot.pool_stats()) for slot in self._slots()]
        return EngineFigures(
            progress=self._progress,
            kv_used_bytes=sum((pool.num_blocks - pool.free_blocks) * fact.block_bytes for fact, pool in facts),
            kv_total_bytes=sum(pool.num_blocks * fact.block_bytes for fact, pool in facts),
            engine=self._engine_stats(),
            models=models,
        )

    # --- models ---

    def _load(self, name: str, now: float) -> _Place:
        """See to it that the model is there or on its way. Raises ModelNotFound, or what its last failure was."""
        known = self._places.get(name)
        if known is None:
            self._models.check(name)
        place = self._places.setdefault(name, _Place())
        if place.state is ModelState.FAILED and now < place.retry_at:
            assert place.error is not None
            raise place.error
        if place.state in (ModelState.ABSENT, ModelState.FAILED):
            place.state = ModelState.LOADING
            self._run_load(partial(_load_job, self._models, name))
        return place

    def _loaded(self, done: Loaded, now: float) -> None:
        place = self._places[done.name]
        waiting, place.waiting = place.waiting, []
        place.load_s = done.load_s
        if isinstance(done.result, KVCacheError):
            place.state, place.error = ModelState.FAILED, done.result
            place.num_failures += 1
            place.retry_at = now + min(MAX_RETRY_LOAD_S, RETRY_LOAD_S * 2 ** (place.num_failures - 1))
            log.error("model %s cannot be served: %s", done.name, done.result.message)
            for start in waiting:
                self._break(start.run, done.result)
            return
        place.state, place.error, place.num_failures = ModelState.READY, None, 0
        place.slot = Slot(
            done.result, max_tokens_per_step=self._max_tokens_per_step, shares_prefixes=self._shares_prefixes
        )
        log.info("model %s is ready after %.2f s", done.name, done.load_s)
        for start in waiting:
            self._encode(start, done.result)

    # --- generations ---

    def _start(self, start: Start, now: float) -> None:
        self._slot_of[start.run] = None
        try:
            place = self._load(start.model or self._models.default, now)
        except KVCacheError as error:
            self._break(start.run, error)
            return
        if place.slot is None:
            place.waiting.append(start)
        else:
            self._encode(start, place.slot.model)

    def _encode(self, start: Start, model: Model) -> None:
        if start.run in self._slot_of:
            self._run_encode(partial(_encode_job, model, start))

    def _encoded(self, done: Encoded, now: float) -> None:
        run = done.start.run
        if run not in self._slot_of:  # stopped meanwhile
            return
        if isinstance(done.result, KVCacheError):
            self._break(run, done.result)
            return
        slot = self._places[done.start.model or self._models.default].slot
        assert slot is not None, "a prompt was encoded by a model that is not there"
        try:
            self._take_name(done.start, slot)
        except KVCacheError as error:
            self._break(run, error)
            return
        self._slot_of[run] = slot
        self._say(slot.submit(done.start, done.result, now))
        if run in self._held:
            self._held.discard(run)
            slot.hold(run)

    def _take_name(self, start: Start, slot: Slot) -> None:
        """A name means one sequence: what another model kept under it goes. Raises Conflict if it is being written."""
        if start.seq_id:
            key = SequenceKey(start.tenant, start.seq_id)
            for other in self._slots():
                if other is not slot and other.has(key):
                    other.drop(key)

    def _stop(self, run: RunId, now: float) -> None:
        self._held.discard(run)
        slot = self._slot_of.pop(run, None)
        if slot is not None:
            self._say(slot.stop(run, now))

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
        self._say([Broke(run, error)])

    def _say(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Ended() | Broke():
                    self._slot_of.pop(event.run, None)
                case _:
                    pass
        self._events += events

    # --- computed sequences ---

    def _answer(self, command: ReadKV | MeasureKV | DropKV | PinKV | UnpinKV | ListKV, now: float) -> None:
        try:
            answer: Answer = self._look_up(command, now)
        except KVCacheError as error:
            answer = error
        self._events.append(Answered(Ticket(command.ticket), answer))

    def _look_up(self, command: ReadKV | MeasureKV | DropKV | PinKV | UnpinKV | ListKV, now: float) -> Answer:
        """Raises NotFound, BadArgument or Conflict."""
        if isinstance(command, ListKV):
            found = chain.from_iterable(
                slot.describe(command.tenant, command.prefix, command.after, command.limit, now)
                for slot in self._slots()
            )
            return tuple(sorted(found, key=lambda info: info.seq_id)[: command.limit])
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
        for slot in self._slots():
            if slot.has(key):
                return slot
        raise NotFound(f"no sequence {key.seq_id!r} on its owner; it may have been evicted")

    # --- figures ---

    def _slots(self) -> list[Slot]:
        return [place.slot for place in self._places.values() if place.slot is not None]

    def _engine_stats(self) -> EngineStats:
        parts = [slot.engine_stats() for slot in self._slots()]
        sums = {name: sum(getattr(part, name) for part in parts) for name in EngineStats.__struct_fields__}
        sums["waiting"] += sum(1 for slot in self._slot_of.values() if slot is None)
        sums["failed"] += self._failed_early
        return EngineStats(**sums)

    def _model_stats(self, name: str, place: _Place) -> ModelStats:
        reason = place.error.message if place.error is not None else ""
        stats = ModelStats(name=name, state=place.state.value, reason=reason, load_s=place.load_s)
        if place.slot is None:
            return stats
        facts = place.slot.model.facts
        return msgspec.structs.replace(
            stats,
            dtype=facts.dtype,
            device=facts.device,
            fingerprint=facts.fingerprint,
            num_layers=facts.num_layers,
            max_model_len=facts.max_model_len,
            pool=place.slot.pool_stats(),
        )


def _load_job(models: Models, name: str) -> Loaded:
    begun = monotonic()
    try:
        result: Model | KVCacheError = models.load(name)
    except KVCacheError as error:
        result = error
    except Exception as error:  # whatever loading raises concerns this model alone
        log.exception("loading model %s failed", name)
        result = ModelUnavailable(f"model {name!r} cannot be loaded: {type(error).__name__}: {error}")
    return Loaded(name, result, monotonic() - begun)


def _encode_job(model: Model, start: Start) -> Encoded:
    try:
        return Encoded(start, model.encode(start.kind, start.prompt))
    except KVCacheError as error:
        return Encoded(start, error)
    except Exception:  # a prompt harms only itself
        log.exception("encoding a prompt failed")
        return Encoded(start, InternalError("the prompt could not be encoded; the worker's log has the traceback"))
