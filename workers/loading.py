"""Jobs of the load thread: measuring a model, loading it, closing it; and what they tell the engine's thread.

A job takes no decision and touches nothing of the engine's. Whatever goes wrong in one is its result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Protocol, TypeAlias, TypeVar

from bus.errors import KVCacheError, ModelUnavailable
from workers.model import Model
from workers.model_budget import ModelNeed

log = logging.getLogger(__name__)

T = TypeVar("T")
Report: TypeAlias = Callable[[str, float], None]
"""What is being done, and which part of that is done (0 to 1; 0 where it cannot be said)."""


class Models(Protocol):
    """The models this process may serve. `measure` and `load` are called from the load thread."""

    def names(self) -> list[str]:
        """All names, loaded or not."""

    def choose(self, name: str) -> str:
        """The name itself, or the default for an empty one. Raises ModelNotFound, with the names, if there is none."""

    def check(self, name: str) -> None:
        """Raise ModelNotFound unless `name` is one of them."""

    def measure(self, name: str, report: Report) -> ModelNeed:
        """What it takes to load it, from its files. Raises ModelNotFound or ModelUnavailable."""

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        """Load one; takes seconds. Raises ModelNotFound, ModelUnavailable or NoSpace."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A measure job's result."""

    name: str
    result: ModelNeed | KVCacheError


@dataclass(frozen=True, slots=True)
class Loading:
    """News from a job that is not over; see `Report`."""

    name: str
    stage: str
    progress: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load job's result."""

    name: str
    result: Model | KVCacheError
    load_s: float


@dataclass(frozen=True, slots=True)
class Closed:
    """A close job's result: the memory is given back, unless there is an error."""

    name: str
    result: KVCacheError | None


LoadResult: TypeAlias = Measured | Loaded | Closed
LoadJob: TypeAlias = Callable[[], LoadResult]


def measure_job(models: Models, name: str, report: Report) -> Measured:
    return Measured(name, _attempt(name, lambda: models.measure(name, report)))


def _attempt(name: str, job: Callable[[], T]) -> T | KVCacheError:
    try:
        return job()
    except KVCacheError as error:
        return error
    except Exception as error:  # whatever loading raises concerns this model alone
        log.exception("a job for model %s failed", name)
        return ModelUnavailable(f"model {name!r} cannot be served: {type(error).__name__}: {error}")


def load_job(models: Models, name: str, pool_bytes: int, report: Report) -> Loaded:
    begun = monotonic()
    result = _attempt(name, lambda: models.load(name, pool_bytes, report))
    return Loaded(name, result, monotonic() - begun)


def close_job(name: str, model: Model) -> Closed:
    return Closed(name, _attempt(name, model.close))
