"""One step of a model in which a fault stays where it happened.

A pass that raises is cut in halves and computed again, until the slices that make it raise are alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bus.errors import InternalError, KVCacheError
from workers import tasks
from workers.batch import Batch, Draw, Outcome
from workers.model import Model

log = logging.getLogger(__name__)


def compute_step(model: Model, step: tasks.Step, draws: Sequence[Draw | None]) -> Sequence[Outcome] | KVCacheError:
    """Per slice its result, or one error for all if the step's copies could not be made."""
    try:
        if step.copies:
            model.copy_blocks([copy.source for copy in step.copies], [copy.target for copy in step.copies])
    except Exception:  # as in `_compute_part`; who lacks a copy is not always in the batch
        log.exception("model %s failed to copy blocks", model.facts.name)
        return InternalError("the model failed to copy blocks; the worker's log has the traceback")
    return _compute_part(model, step.batch, draws)


def _compute_part(model: Model, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
    """Per slice its result; what raises is computed again in halves, at most twice as many passes as slices.

    Again does no harm: a pass writes the same positions, draws depend on seed and position, and no slice of a
    step reads what another one of it writes.
    """
    try:
        return model.compute(batch, draws)
    except Exception:  # whatever a model raises ends generations, never the engine
        if len(batch) == 1:
            log.exception("model %s failed to compute a generation", model.facts.name)
            return [InternalError("the model failed on this generation; the worker's log has the traceback")]
        log.warning("a step of %d in model %s failed; looking for whose fault", len(batch), model.facts.name)
    middle = len(batch) // 2
    first = _compute_part(model, batch[:middle], draws[:middle])
    return first + _compute_part(model, batch[middle:], draws[middle:])
