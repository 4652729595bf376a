"""When to start a child process again after it ended, and when to give up. No processes, no clock.

A child that ran for `stable_s` has shown that it can run: its next end is a first failure again. Below
that, failures in a row wait longer and longer, and `max_failures` of them are a crash loop: the same
thing would happen for ever, so somebody has to look. Full jitter is not wanted here: a supervisor
starts a handful of children on one machine, and a person is watching.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """first_delay_s doubles with each failure in a row, up to max_delay_s."""

    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    stable_s: float = 30.0
    max_failures: int = 5


class RestartCounter:
    """The failures in a row of one child."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._started_at = 0.0

    @property
    def failures(self) -> int:
        return self._failures

    def started(self, now: float) -> None:
        self._started_at = now

    def ended(self, now: float) -> float | None:
        """Seconds to wait before the next start; None if this is a crash loop."""
        if now - self._started_at >= self._policy.stable_s:
            self._failures = 0
        self._failures += 1
        if self._failures >= self._policy.max_failures:
            return None
        return min(self._policy.first_delay_s * 2.0 ** (self._failures - 1), self._policy.max_delay_s)
