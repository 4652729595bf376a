"""The models of one worker, and the state each is in.

    ABSENT --someone asks--> LOADING --loaded--> READY
                                '----failed----> FAILED --asked again after a pause--> LOADING

A model loads when it is first asked for; those who asked meanwhile wait, within their deadlines. If it
cannot be loaded they all hear why, nobody else is harmed, and after a pause, which doubles, it is tried
again. Loading is a job for another thread; its result comes back through `loaded`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Protocol

import msgspec

from bus.errors import KVCacheError, ModelUnavailable
from bus.messages import ModelState
from bus.stats import ModelStats
from workers.engine_api import Start
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


class Shelf:
    """All models of a worker. `load` runs a job elsewhere and sees to it that its result comes back."""

    def __init__(
        self, models: Models, *, load: Callable[[Callable[[], Loaded]], None], make_slot: Callable[[Model], Slot]
    ) -> None:
        self._models = models
        self._run_load = load
        self._make_slot = make_slot
        self._places: dict[str, _Place] = {name: _Place() for name in models.names()}

    def find(self, name: str, now: float) -> Slot | None:
        """The model's slot; None if it is on its way, which it is from now on if it was not.

        Raises ModelNotFound or ModelUnavailable, or the error of its last load until it is time to try again.
        """
        if name not in self._places:
            self._models.check(name)
        place = self._places.setdefault(name, _Place())
        if place.error is not None and now < place.retry_at:
            raise place.error
        if place.state in (ModelState.ABSENT, ModelState.FAILED):
            place.state, place.error = ModelState.LOADING, None
            self._run_load(partial(_load_job, self._models, name))
        return place.slot

    def wait(self, name: str, start: Start) -> None:
        """Keep a request until its model, which is on its way, is there or has failed."""
        self._places[name].waiting.append(start)

    def loaded(self, done: Loaded, now: float) -> list[Start]:
        """A load has ended, well or badly; returns who waited for it, to `find` out which."""
        place = self._places[done.name]
        waiting, place.waiting = place.waiting, []
        place.load_s = done.load_s
        if isinstance(done.result, KVCacheError):
            place.state, place.error = ModelState.FAILED, done.result
            place.num_failures += 1
            place.retry_at = now + min(MAX_RETRY_LOAD_S, RETRY_LOAD_S * 2 ** (place.num_failures - 1))
            log.error("model %s cannot be served: %s", done.name, done.result.message)
        else:
            place.state, place.num_failures = ModelState.READY, 0
            place.slot = self._make_slot(done.result)
            log.info("model %s is ready after %.2f s", done.name, done.load_s)
        return waiting

    def slots(self) -> list[Slot]:
        """Those of the models that are READY."""
        return [place.slot for place in self._places.values() if place.slot is not None]

    def stats(self) -> tuple[ModelStats, ...]:
        return tuple(_model_stats(name, place) for name, place in self._places.items())


def _model_stats(name: str, place: _Place) -> ModelStats:
    reason = place.error.message if place.error is not None else ""
    stats = ModelStats(name=name, state=place.state.value, reason=reason, load_s=place.load_s)
    if place.slot is None:
        return stats
    facts = place.slot.model.facts
    return msgspec.structs.replace(
        stats,
        dtype=facts.dtype,
        device=facts.device,
        runner=facts.runner,
        runner_reason=facts.runner_reason,
        kv_dtype=facts.kv_dtype,
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
