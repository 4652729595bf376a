"""The states of a generation inside a worker, and the only ways from one to another.

    WAITING   holds no blocks; admitted in its place in line when there is room
    PARKED    as WAITING, but its stream's window is full: not admitted before it is resumed
    PREFILL   holds blocks; tokens it was given (or had before it was preempted) are being computed
    DECODE    holds blocks; all its tokens but the newest are computed, one more follows per step
    PAUSED    as DECODE, but its stream's window is full: no steps, first to be preempted
    FINISHED  holds no blocks of its own (a named sequence's are retained); the end was reported

    submit -> WAITING -admit-> PREFILL -prefilled-> DECODE <-resume/pause-> PAUSED
                 ^                |                   |                       |
                 '------preempt---+-------------------'        PARKED <-preempt'

Only the scheduler moves a generation. Invariant: it holds blocks in PREFILL, DECODE and PAUSED and in no
other state. Pausing a prefill changes nothing: it has no token in flight, and is asked again after its first.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    WAITING = enum.auto()
    PARKED = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    PAUSED = enum.auto()
    FINISHED = enum.auto()


class Change(enum.Enum):
    """What can happen to a generation."""

    ADMIT = enum.auto()
    PREFILLED = enum.auto()
    PAUSE = enum.auto()
    RESUME = enum.auto()
    PREEMPT = enum.auto()
    END = enum.auto()


TRANSITIONS: dict[tuple[State, Change], State] = {
    (State.WAITING, Change.ADMIT): State.PREFILL,
    (State.WAITING, Change.PAUSE): State.PARKED,
    (State.WAITING, Change.RESUME): State.WAITING,
    (State.WAITING, Change.END): State.FINISHED,
    (State.PARKED, Change.PAUSE): State.PARKED,
    (State.PARKED, Change.RESUME): State.WAITING,
    (State.PARKED, Change.END): State.FINISHED,
    (State.PREFILL, Change.PREFILLED): State.DECODE,
    (State.PREFILL, Change.PAUSE): State.PREFILL,
    (State.PREFILL, Change.RESUME): State.PREFILL,
    (State.PREFILL, Change.PREEMPT): State.WAITING,
    (State.PREFILL, Change.END): State.FINISHED,
    (State.DECODE, Change.PAUSE): State.PAUSED,
    (State.DECODE, Change.RESUME): State.DECODE,
    (State.DECODE, Change.PREEMPT): State.WAITING,
    (State.DECODE, Change.END): State.FINISHED,
    (State.PAUSED, Change.PAUSE): State.PAUSED,
    (State.PAUSED, Change.RESUME): State.DECODE,
    (State.PAUSED, Change.PREEMPT): State.PARKED,
    (State.PAUSED, Change.END): State.FINISHED,
}


class InvalidTransition(Exception):
    """A change that the state does not allow: a bug of the scheduler, never of a client."""

    def __init__(self, state: State, change: Change) -> None:
        super().__init__(f"a generation that is {state.name} cannot {change.name}")
        self.state = state
        self.change = change


def after(state: State, change: Change) -> State:
    """The state that `change` leads to. Raises InvalidTransition."""
    try:
        return TRANSITIONS[state, change]
    except KeyError:
        raise InvalidTransition(state, change) from None
