"""The states of a model in a worker, and the only ways from one to another.

    ABSENT     not in memory, nobody wants it
    MEASURING  somebody does: its files are being looked at (and made, if it is a GGUF file), to know what it takes
    WAITING    there is no room for it yet; in turn, and others may have to leave for it
    LOADING    its memory is granted and being filled
    READY      it serves
    LEAVING    it serves what it has begun and then leaves, for one that waits; whoever asks for it now waits
    FAILED     it could not be loaded; after a pause, when it is asked for again, it is tried again

    ABSENT, FAILED -ask-> MEASURING -measured-> WAITING -grant-> LOADING -loaded-> READY <-leave/stay-> LEAVING
       ^                                           |                                 |                     |
       '-----------------give up-------------------'<-------------unload-------------+---------------------'

Only the shelf moves a model. Invariant: it has a grant of memory in LOADING, READY and LEAVING and in no other state.
"""

from __future__ import annotations

import enum

from bus.messages import ModelState


class Phase(enum.Enum):
    ABSENT = enum.auto()
    MEASURING = enum.auto()
    WAITING = enum.auto()
    LOADING = enum.auto()
    READY = enum.auto()
    LEAVING = enum.auto()
    FAILED = enum.auto()


class Turn(enum.Enum):
    """What can happen to a model."""

    ASK = enum.auto()
    MEASURED = enum.auto()
    GIVE_UP = enum.auto()
    GRANT = enum.auto()
    LOADED = enum.auto()
    LEAVE = enum.auto()
    STAY = enum.auto()
    UNLOAD = enum.auto()
    FAIL = enum.auto()


TRANSITIONS: dict[tuple[Phase, Turn], Phase] = {
    (Phase.ABSENT, Turn.ASK): Phase.MEASURING,
    (Phase.FAILED, Turn.ASK): Phase.MEASURING,
    (Phase.MEASURING, Turn.MEASURED): Phase.WAITING,
    (Phase.MEASURING, Turn.FAIL): Phase.FAILED,
    (Phase.WAITING, Turn.GIVE_UP): Phase.ABSENT,
    (Phase.WAITING, Turn.GRANT): Phase.LOADING,
    (Phase.WAITING, Turn.FAIL): Phase.FAILED,
    (Phase.LOADING, Turn.LOADED): Phase.READY,
    (Phase.LOADING, Turn.FAIL): Phase.FAILED,
    (Phase.READY, Turn.LEAVE): Phase.LEAVING,
    (Phase.READY, Turn.UNLOAD): Phase.ABSENT,
    (Phase.LEAVING, Turn.STAY): Phase.READY,
    (Phase.LEAVING, Turn.UNLOAD): Phase.ABSENT,
}

AS_TOLD = {
    Phase.ABSENT: ModelState.ABSENT,
    Phase.MEASURING: ModelState.LOADING,
    Phase.WAITING: ModelState.LOADING,
    Phase.LOADING: ModelState.LOADING,
    Phase.READY: ModelState.READY,
    Phase.LEAVING: ModelState.READY,
    Phase.FAILED: ModelState.FAILED,
}
"""What the rest of the system hears of each phase."""


class InvalidTurn(Exception):
    """A change that the phase does not allow: a bug of the shelf, never of a client or a file."""

    def __init__(self, phase: Phase, turn: Turn) -> None:
        super().__init__(f"a model that is {phase.name} cannot {turn.name}")
        self.phase = phase
        self.turn = turn


def after(phase: Phase, turn: Turn) -> Phase:
    """The phase that `turn` leads to. Raises InvalidTurn."""
    try:
        return TRANSITIONS[phase, turn]
    except KeyError:
        raise InvalidTurn(phase, turn) from None
