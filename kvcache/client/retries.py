"""Whether and when to try again: full jitter, few tries, and a budget that keeps a crowd from making things worse.

Jitter as in Brooker, "Exponential Backoff And Jitter" (AWS, 2015): the delay is uniform between nothing and a
bound that doubles, and comes on top of what a peer asks for, since it asks all that it refuses for the same. The
budget (Google SRE Book, chapter 21) allows one retry for ten requests, and a few more for a client that makes few
requests.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0
BUDGET_SHARE = 0.1
BUDGET_FLOOR = 10.0
BUDGET_CAP = 100.0
FLOOR_PER_S = 1.0


def retry_delay(failures: int, retry_after_ms: int, jitter: Callable[[], float]) -> float:
    """Seconds to wait after this many earlier failures, beginning with what the peer asked for.

    jitter: draws a number from 0 to 1.
    """
    bound = min(MAX_DELAY_S, FIRST_DELAY_S * (1 << min(failures, 16)))
    return retry_after_ms / 1000 + bound * jitter()


class RetryBudget:
    """Earned by requests, spent by retries; refills slowly to the floor, so that a quiet client has some too."""

    def __init__(self, now: float) -> None:
        self._credit = BUDGET_FLOOR
        self._at = now

    def earn(self) -> None:
        """A request is made."""
        self._credit = min(BUDGET_CAP, self._credit + BUDGET_SHARE)

    def spend(self, now: float) -> bool:
        """Take one retry out; False, taking none, if there is none left."""
        if self._credit < BUDGET_FLOOR:
            self._credit = min(BUDGET_FLOOR, self._credit + FLOOR_PER_S * (now - self._at))
        self._at = now
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True
