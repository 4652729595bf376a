"""The book of calls: every request between its dispatch and its one end.

A request is one call to one worker, or a `Gather` of calls to several, of which each part ends by itself.

Invariant (`check`): a call in flight is in its worker's `calls` and a deadline bucket, its request is in its
client's `calls`, and what has ended is in none of them. Only this file moves a call in or out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcache.broker.deadlines import Deadlines
from kvcache.broker.directory import Name
from kvcache.broker.members import Call, Client, Gather, Stream, Worker


class Calls:
    """Calls by the broker's own number, which is never used twice."""

    def __init__(self) -> None:
        self._open: dict[int, Call] = {}
        self._deadlines: Deadlines[Call] = Deadlines()
        self.next_number = 1

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, call: Call) -> bool:
        return call.id in self._open

    def __iter__(self) -> Iterator[Call]:
        """Those in flight; ending them meanwhile is allowed."""
        return iter(list(self._open.values()))

    def begin(
        self,
        client: Client,
        worker: Worker,
        req_id: bytes,
        deadline: float,
        stream: Stream | None,
        name: Name | None = None,
        *,
        version: int = 0,
        on_bulk: bool = False,
    ) -> Call:
        """A request goes to `worker`. The client must have none of this id in flight.

        version: that of a change, see `Call`. on_bulk: on the worker's bulk lane, if it has one.
        """
        call = Call(self.next_number, client, worker, req_id, deadline, stream, name, version)
        call.on_bulk = on_bulk and bool(worker.bulk_link)
        client.calls[req_id] = call
        self._add(call)
        return call

    def begin_all(
        self,
        gather: Gather,
        workers: Sequence[Worker],
        deadline: float,
        name: Name,
        version: int,
        *,
        on_bulk: bool = False,
    ) -> list[Call]:
        """A change of this sequence, to this version, goes to each of `workers`, in a call of its own.

        on_bulk: as of `begin`.
        """
        client, req_id = gather.client, gather.req_id
        client.calls[req_id] = gather
        for worker in workers:
            call = Call(self.next_number, client, worker, req_id, deadline, None, name, version, gather)
            call.on_bulk = on_bulk and bool(worker.bulk_link)
            gather.parts[call.id] = call
            self._add(call)
        return list(gather.parts.values())

    def of(self, client: Client, req_id: bytes) -> list[Call]:
        """The calls in flight of what the client calls `req_id`; none, if it has ended."""
        request = client.calls.get(req_id)
        if request is None:
            return []
        return [request] if isinstance(request, Call) else list(request.parts.values())

    def end(self, call: Call) -> bool:
        """A call in flight has ended, however it did. Whether that ends its request: other parts may be in flight."""
        del self._open[call.id], call.worker.calls[call.id]
        self._deadlines.discard(call, call.deadline)
        if call.gather is not None:
            del call.gather.parts[call.id]
            if call.gather.parts:
                return False
        del call.client.calls[call.req_id]
        return True

    def overdue(self, now: float) -> list[Call]:
        """Calls in flight whose time is up. They are still to be ended."""
        return list(self._deadlines.due(now))

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._deadlines) == len(self._open), (len(self._deadlines), len(self._open))
        for number, call in self._open.items():
            assert call.id == number
            assert call.worker.calls.get(number) is call
            assert call in self.of(call.client, call.req_id)
        for call in self._open.values():
            assert all(other in self for other in call.worker.calls.values())
            assert all(other in self for req_id in call.client.calls for other in self.of(call.client, req_id))

    def _add(self, call: Call) -> None:
        self.next_number += 1
        self._open[call.id] = call.worker.calls[call.id] = call
        self._deadlines.add(call, call.deadline)
