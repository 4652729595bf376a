"""Places in line within a worker: who is computed before whom, in the scheduler and in the simulator alike.

A place is a time: that of arrival, later by what waiting must make up for. Short prefills before long ones make the
mean wait shortest (shortest remaining processing time first: Schrage 1968), and waiting makes up for length and for
class, so that nobody is overtaken for ever: not by those of its class who come `CLASS_S` later, however short they are.
"""

from __future__ import annotations

CLASS_S = 10.0
"""Seconds. Long enough that a class is worth something, short enough that the next one waits no minute for it."""
WAIT_PER_LEFT = 4.0
"""A second more to compute is made up for by so many of waiting. In simulation 2 to 8 do alike."""


def place_of(arrived_at: float, priority: int, seconds_left: float) -> float:
    """The place of one that came at `arrived_at`, in class `priority`, and needs so much computing for its first token.

    It moves forward as its own prefill gets on, and for nothing that others do.
    """
    return arrived_at + CLASS_S * priority + min(CLASS_S, WAIT_PER_LEFT * seconds_left)
