"""The book of calls: every request between its dispatch and its one end.

Invariant (`check`): a call in flight is in its client's `calls`, its worker's `calls` and a deadline
bucket, and one that has ended is in none of them. Only this file moves a call in or out of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from kvcache.broker.deadlines import Deadlines
from kvcache.broker.members import Call, Client, Stream, Worker


class Calls:
    """Calls by the broker's own number, which is never used twice."""

    def __init__(self) -> None:
        self._open: dict[int, Call] = {}
        self._deadlines: Deadlines[Call] = Deadlines()
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, call: Call) -> bool:
        return call.id in self._open

    def __iter__(self) -> Iterator[Call]:
        """Those in flight; ending them meanwhile is allowed."""
        return iter(list(self._open.values()))

    def begin(self, client: Client, worker: Worker, req_id: bytes, deadline: float, stream: Stream | None) -> Call:
        """A request goes to `worker`. The client must have none of this id in flight."""
        call = Call(next(self._numbers), client, worker, req_id, deadline, stream)
        self._open[call.id] = worker.calls[call.id] = client.calls[req_id] = call
        self._deadlines.add(call, deadline)
        return call

    def end(self, call: Call) -> None:
        """A call in flight has ended, however it did."""
        del self._open[call.id], call.worker.calls[call.id], call.client.calls[call.req_id]
        self._deadlines.discard(call, call.deadline)

    def overdue(self, now: float) -> list[Call]:
        """Calls in flight whose time is up. They are still to be ended."""
        return list(self._deadlines.due(now))

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._deadlines) == len(self._open), (len(self._deadlines), len(self._open))
        for number, call in self._open.items():
            assert call.id == number
            assert call.worker.calls.get(number) is call
            assert call.client.calls.get(call.req_id) is call
        for call in self._open.values():
            assert all(other in self for other in call.worker.calls.values())
            assert all(other in self for other in call.client.calls.values())
