"""The models of one worker: which are loaded, which are on their way, and which goes when there is no room.

`workers.model_states` says what states a model can be in. It loads when it is first asked for; those who asked
meanwhile wait, within their deadlines. Those that need room get it in the order in which they were measured: the
least recently used model leaves, an idle one at once; a busy one serves what it has begun, after it has stayed at
least as long as it took to load, while whoever asks for it waits for its next turn. So nobody waits for ever, and
of two that are wanted all the time neither spends more time loading than serving. A model that keeps a pinned
sequence does not leave. What leaves takes its cached KV and its named sequences with it.

Whatever is wrong with a model is told to those who wait for it, and harms no other; after a pause, which doubles,
it is tried again. Measuring, loading and closing are jobs for one other thread, which does them in order, so that
memory is given back before it is taken anew; results come back through `measured`, `reported` and `loaded`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import msgspec

from bus.errors import KVCacheError, ModelUnavailable, NoSpace
from bus.stats import EngineStats, ModelStats
from workers.engine_api import EngineEvent, RunId, Start, TextQuestion, Ticket
from workers.loading import Closed, Loaded, Loading, LoadJob, Measured, Models, close_job, load_job, measure_job
from workers.model import Model
from workers.model_budget import ModelBudget, ModelNeed
from workers.model_states import AS_TOLD, Phase, Turn, after
from workers.slot import Slot

log = logging.getLogger(__name__)

RETRY_LOAD_S = 5.0
MAX_RETRY_LOAD_S = 80.0
RETRY_ROOM_S = 1.0
WAITS_FOR_ROOM = "waiting for room"
NO_ROOM = "there was no room for it, and nobody waits for it; it loads when it is asked for"


Waiting: TypeAlias = Start | TextQuestion


@dataclass(slots=True)
class _Place:
    """A model and its phase. `slot` is there exactly when it is READY or LEAVING, `need` from WAITING on.

    waiting: who asked for it and waits. num_borrowed: requests that are on their way to its slot.
    """

    phase: Phase = Phase.ABSENT
    slot: Slot | None = None
    need: ModelNeed | None = None
    stage: str = ""
    progress: float = 0.0
    note: str = ""
    error: KVCacheError | None = None
    load_s: float = 0.0
    num_failures: int = 0
    retry_at: float = 0.0
    ready_at: float = 0.0
    used_at: float = 0.0
    num_loads: int = 0
    num_unloads: int = 0
    num_borrowed: int = 0
    waiting: dict[RunId | Ticket, Waiting] = field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        return self.num_borrowed > 0 or (self.slot is not None and self.slot.is_busy)

    @property
    def may_leave_at(self) -> float:
        """When a busy one may be told to leave: once it has stayed as long as it took to load."""
        return self.ready_at + self.load_s


class Shelf:
    """All models of a worker. `load` runs a job elsewhere and sees to it that its result, if any, comes back, and
    `report` that what it is given while a job runs does."""

    def __init__(
        self,
        models: Models,
        budget: ModelBudget,
        *,
        load: Callable[[LoadJob], None],
        report: Callable[[Loading], None],
        make_slot: Callable[[Model], Slot],
    ) -> None:
        self._models = models
        self._budget = budget
        self._run_load = load
        self._report = report
        self._make_slot = make_slot
        self._places: dict[str, _Place] = {name: _Place() for name in models.names()}
        self._queue: list[str] = []  # those WAITING, in turn
        self._farewells: list[EngineEvent] = []
        self._departed = EngineStats()
        self._next_deadline = math.inf

    # --- asking for a model ---

    def find(self, name: str, now: float) -> Slot | None:
        """The model's slot; None if it is on its way, which it is from now on if it was not.

        Raises ModelNotFound or ModelUnavailable, or the error of its last load until it is time to try again.
        """
        if name not in self._places:
            self._models.check(name)
        place = self._places.setdefault(name, _Place())
        place.used_at = now
        if place.phase is Phase.FAILED and place.error is not None and now < place.retry_at:
            raise place.error.with_traceback(None)  # else each raise would make it longer
        if place.phase in (Phase.ABSENT, Phase.FAILED):
            self._ask(name, place)
        return place.slot if place.phase is Phase.READY else None

    def wait(self, waiting: Waiting) -> None:
        """Keep a request until its model, which `find` has said is on its way, is there or has failed."""
        key = waiting.run if isinstance(waiting, Start) else waiting.ticket
        self._places[waiting.model].waiting[key] = waiting

    def leave(self, model: str, run: RunId) -> None:
        """A request does not wait any more, if it did."""
        if model in self._places:
            self._places[model].waiting.pop(run, None)

    def borrow(self, name: str) -> Slot:
        """The slot of a model that is READY, which does not leave before it was given back."""
        self._places[name].num_borrowed += 1
        return self.borrowed(name)

    def borrowed(self, name: str) -> Slot:
        slot = self._places[name].slot
        assert slot is not None, "a model has left while it was borrowed"
        return slot

    def give_back(self, name: str) -> None:
        self._places[name].num_borrowed -= 1

    # --- results of jobs ---

    def reported(self, news: Loading) -> None:
        place = self._places[news.name]
        place.stage, place.progress = news.stage, news.progress

    def measured(self, done: Measured, now: float) -> list[Waiting]:
        """What a model takes is known, or that it cannot be had; returns who is to ask for it again."""
        place = self._places[done.name]
        if isinstance(done.result, KVCacheError):
            return self._fail(done.name, done.result, self._next_try(place, now))
        place.phase = after(place.phase, Turn.MEASURED)
        place.need, place.stage, place.progress = done.result, WAITS_FOR_ROOM, 0.0
        self._queue.append(done.name)
        return []

    def loaded(self, done: Loaded, now: float) -> list[Waiting]:
        """A load has ended, well or badly; returns who waited for it, to `find` out which."""
        place = self._places[done.name]
        place.load_s = done.load_s
        if isinstance(done.result, KVCacheError):
            return self._fail(done.name, done.result, self._next_try(place, now))
        place.phase = after(place.phase, Turn.LOADED)
        place.slot = self._make_slot(done.result)
        place.stage, place.progress, place.num_failures = "", 0.0, 0
        place.ready_at = now
        place.num_loads += 1
        log.info("model %s is ready after %.2f s", done.name, done.load_s)
        return self._take_waiting(place)

    def closed(self, done: Closed) -> None:
        """A model has given its memory back."""
        if done.result is None:
            log.info("model %s has left; it loads again when it is asked for", done.name)
        else:
            log.error("model %s has left, and not all of its memory is back: %s", done.name, done.result.message)

    # --- room ---

    def make_room(self, now: float) -> list[Waiting]:
        """Load those that wait for room as far as there is any, and have others leave for the first that has none.

        Call it whenever a model may have become idle, and at `next_deadline`. Returns who is to ask again.
        """
        again: list[Waiting] = []
        while self._queue and (starts := self._serve_first(self._queue[0], now)) is not None:
            self._queue.pop(0)
            again += starts
        leavers = self._leavers(self._queue[0], now) if self._queue else []
        if leavers is None:
            again += self._fail(self._queue.pop(0), _all_pinned(), now + RETRY_ROOM_S)
            return again + self.make_room(now)
        self._next_deadline = math.inf
        for name, place in self._places.items():
            if place.phase is Phase.LEAVING and name not in leavers:
                place.phase = after(place.phase, Turn.STAY)
                again += self._take_waiting(place)
        has_left = [self._send_off(name, now) for name in leavers]
        return again + self.make_room(now) if any(has_left) else again

    @property
    def next_deadline(self) -> float:
        """When `make_room` is due though nothing else has happened; `math.inf` if never."""
        return self._next_deadline

    def take_farewells(self) -> list[EngineEvent]:
        """What left with their models, since the last call: named sequences, and nodes that brokers know."""
        farewells, self._farewells = self._farewells, []
        return farewells

    # --- figures ---

    def slots(self) -> list[Slot]:
        """Those of the models that are in memory."""
        return [place.slot for place in self._places.values() if place.slot is not None]

    def stats(self) -> tuple[ModelStats, ...]:
        return tuple(self._stats_of(name, place) for name, place in self._places.items())

    def engine_stats(self) -> EngineStats:
        """Of all models together, those that have left included."""
        return _add_up([self._departed, *(slot.engine_stats() for slot in self.slots())])

    # --- inside ---

    def _ask(self, name: str, place: _Place) -> None:
        place.phase = after(place.phase, Turn.ASK)
        place.error, place.note = None, ""
        report = partial(self._tell, name)
        self._run_load(partial(measure_job, self._models, name, report))

    def _tell(self, name: str, stage: str, progress: float) -> None:
        """Runs in the load thread."""
        self._report(Loading(name, stage, progress))

    def _serve_first(self, name: str, now: float) -> list[Waiting] | None:
        """Who is to ask again now that the first in turn is settled; None if it goes on waiting for room."""
        place = self._places[name]
        assert place.need is not None
        try:
            grant = self._budget.grant(name, place.need)
        except KVCacheError as error:
            failure = ModelUnavailable(f"model {name!r} cannot be served: {error.message}")
            return self._fail(name, failure, self._next_try(place, now))
        if grant is not None:
            place.phase = after(place.phase, Turn.GRANT)
            report = partial(self._tell, name)
            self._run_load(partial(load_job, self._models, name, grant.pool_bytes, report))
            return []
        if place.waiting:
            return None
        place.phase = after(place.phase, Turn.GIVE_UP)
        place.need, place.stage = None, ""
        place.note = NO_ROOM
        return []

    def _leavers(self, first: str, now: float) -> list[str] | None:
        """Who has to leave for the first in turn, least recently used first; None if pinned sequences forbid it."""
        need = self._places[first].need
        assert need is not None
        here = {name: place for name, place in self._places.items() if place.slot is not None}
        free = [name for name, place in here.items() if place.slot is not None and not place.slot.has_pins(now)]
        in_order = sorted(free, key=lambda name: (here[name].is_busy, here[name].used_at))
        for count in range(1, len(in_order) + 1):
            if self._budget.would_fit(need, without=in_order[:count]):
                return in_order[:count]
        is_more_coming = any(place.phase is Phase.LOADING for place in self._places.values())
        return [] if is_more_coming else None

    def _send_off(self, name: str, now: float) -> bool:
        """Have a model leave, now if it is idle, else when it has stayed long enough; True if it is gone."""
        place = self._places[name]
        if not place.is_busy:
            self._unload(name)
            return True
        if place.phase is Phase.READY and now >= place.may_leave_at:
            place.phase = after(place.phase, Turn.LEAVE)
            log.info("model %s leaves for another when it has served what it has begun", name)
        elif place.phase is Phase.READY:
            self._next_deadline = min(self._next_deadline, place.may_leave_at)
        return False

    def _unload(self, name: str) -> None:
        place = self._places[name]
        assert place.slot is not None
        place.phase = after(place.phase, Turn.UNLOAD)
        self._farewells += place.slot.leave()
        self._departed = _add_up([self._departed, place.slot.engine_stats()])
        self._run_load(partial(close_job, name, place.slot.model))
        self._budget.release(name)
        place.slot = place.need = None
        place.num_unloads += 1
        if place.waiting:
            self._ask(name, place)

    def _next_try(self, place: _Place, now: float) -> float:
        place.num_failures += 1
        return now + min(MAX_RETRY_LOAD_S, RETRY_LOAD_S * 2.0 ** (place.num_failures - 1))

    def _fail(self, name: str, error: KVCacheError, retry_at: float) -> list[Waiting]:
        place = self._places[name]
        place.phase = after(place.phase, Turn.FAIL)
        self._budget.release(name)
        place.need, place.stage, place.progress = None, "", 0.0
        # Its frames hold what was half loaded, and the error outlives them.
        place.error = error.with_traceback(None)
        place.error.__cause__ = place.error.__context__ = None
        place.retry_at = retry_at
        log.error("model %s cannot be served: %s", name, error.message)
        return self._take_waiting(place)

    def _take_waiting(self, place: _Place) -> list[Waiting]:
        waiting, place.waiting = list(place.waiting.values()), {}
        return waiting

    def _stats_of(self, name: str, place: _Place) -> ModelStats:
        grant = self._budget.granted(name)
        stats = ModelStats(
            name=name,
            state=AS_TOLD[place.phase].value,
            reason=place.error.message if place.error is not None else place.note,
            stage=place.stage if place.phase is not Phase.LEAVING else "leaving for another model",
            progress=place.progress,
            load_s=place.load_s,
            loads=place.num_loads,
            unloads=place.num_unloads,
            weights_bytes=0 if grant is None else grant.weights_bytes,
        )
        if place.slot is None:
            return stats
        facts, engine = place.slot.model.facts, place.slot.engine_stats()
        return msgspec.structs.replace(
            stats,
            dtype=facts.dtype,
            kv_dtype=facts.kv_dtype,
            device=facts.device,
            runner=facts.runner,
            runner_reason=facts.runner_reason,
            attention=facts.attention,
            attention_reason=facts.attention_reason,
            fingerprint=facts.fingerprint,
            num_layers=facts.num_layers,
            max_model_len=facts.max_model_len,
            running=engine.running,
            waiting=engine.waiting,
            pool=place.slot.pool_stats(),
        )


def _add_up(parts: Sequence[EngineStats]) -> EngineStats:
    return EngineStats(**{name: sum(getattr(it, name) for it in parts) for name in EngineStats.__struct_fields__})


def _all_pinned() -> NoSpace:
    return NoSpace("there is no room for this model: those that are loaded keep pinned sequences; unpin or delete some")
