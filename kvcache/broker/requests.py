"""Requests from their arrival to their one end: dispatched, followed up, answered, failed.

Invariant: every request that a client sent is answered exactly once, by its worker's final reply or by a
`Failed` from here (its worker is lost, its time is up, it cannot be dispatched), unless the client left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from bus import messages as m
from bus import wire
from bus.errors import (
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    InternalError,
    KVCacheError,
    NoWorkers,
    Overloaded,
    ProtocolError,
    WorkerLost,
)
from bus.stats import pack
from bus.wire import Buffer
from kvcache.broker.calls import Calls
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Call, Client, Stream, Worker, Workers
from kvcache.broker.placement import RETRY_AFTER_MS, Place, Placement
from kvcache.broker.pulls import can_pull, order_pull
from kvcache.broker.sends import Port, Send, to_client, to_worker
from kvcache.broker.streams import Streams
from kvcache.routing.views import Choice

MAX_CALLS_PER_CLIENT = 4096


class Requests:
    """`serves_from`: when those workers have had time to join that knew an earlier broker, monotonic seconds."""

    def __init__(
        self, policy: str, workers: Workers, knowledge: Knowledge, *, serves_from: float, new_id: Callable[[], bytes]
    ) -> None:
        self.calls = Calls()
        self.streams = Streams(new_id)
        self.placement = Placement(policy, workers, knowledge)
        self.is_draining = False
        self.arrived = 0
        self.failed: Counter[str] = Counter()
        self.pulls_ordered = 0
        self._new_id = new_id
        self._workers = workers
        self._knowledge = knowledge
        self._serves_from = serves_from

    # --- from clients ----------------------------------------------------------------------------

    def submit(self, client: Client, message: m.Dispatched, frames: Sequence[Buffer], now: float) -> list[Send]:
        """Dispatch a request to its worker, or answer at once why not."""
        self.arrived += 1
        explanation: list[Send] = []
        try:
            stream = self._admit(client, message, now)
            if isinstance(message, m.Delete):
                return self._dispatch_to_all(client, message, frames, now)
            place = self.placement.place(client.user_id, message, now)
            if isinstance(message, m.Generate) and message.explain:
                explanation.append(self._explanation(client, message, place, now))
        except KVCacheError as error:
            return [self._refuse_request(client, message, error)]
        call = self.calls.begin(client, place.worker, message.req_id, now + message.deadline_ms / 1000, stream)
        if stream is not None:
            self.streams.use(stream, call)
        if isinstance(message, m.Generate) and place.prompt is not None:
            self._knowledge.dispatched(call, message, place.prompt, place.choice, now)
        return [*explanation, *self._assign(call, message, place.choice, frames)]

    def follow_up(self, client: Client, req_id: bytes, frames: Sequence[Buffer], port: Port) -> list[Send]:
        """More of a request in flight; of one that has ended meanwhile, nothing is left to tell anybody."""
        sends: list[Send] = []
        for call in self.calls.of(client, req_id):
            link = call.worker.link if port is Port.WORKER else call.worker.bulk_link
            if not link:
                return self.fail(call, WorkerLost(f"worker {call.worker.id} has no connection for bulk data"))
            sends.append(Send(port, link, [wire.encode(m.Forward(call=call.id)), *frames], call))
        return sends

    def open_stream(self, client: Client, message: m.OpenStream, now: float) -> list[Send]:
        try:
            self._check_serving(now)
            stream = self.streams.open(client, now)
        except KVCacheError as error:
            return [self.refuse(client, message.req_id, error)]
        return [to_client(client, m.StreamOpened(req_id=message.req_id, stream_id=stream.id))]

    def route(self, client: Client, message: m.Route, now: float) -> list[Send]:
        """Say where a request would go now, and why."""
        try:
            place = self.placement.place(client.user_id, message, now)
        except KVCacheError as error:
            return [self.refuse(client, message.req_id, error)]
        return [self._explanation(client, message, place, now)]

    # --- from workers ----------------------------------------------------------------------------

    def reply(self, worker: Worker, reply: m.Reply, frames: Sequence[Buffer], port: Port) -> list[Send]:
        """A worker's answer within a call of its own; of one that ended here first, nobody wants to know."""
        call = worker.calls.get(reply.call)
        if call is None:
            return []
        if call.gather is not None:
            return self._gathered(call, reply, frames[1:])
        link = call.client.link if port is Port.CLIENT else call.client.bulk_link
        if not link:
            return self.fail(call, ConnectionLost("this client has no connection for bulk data"))
        if reply.final:
            self._end(call)
        return [Send(port, link, frames[1:], call)]

    def prefilled(self, worker: Worker, report: m.Prefilled, now: float) -> None:
        """A call of this worker has its first token."""
        call = worker.calls.get(report.call)
        if call is not None:
            self._knowledge.prefilled(call, report, now)

    # --- ends ------------------------------------------------------------------------------------

    def fail(self, call: Call, error: KVCacheError) -> list[Send]:
        """End a call from here: its client hears why, its worker that nobody waits. Nothing, if it has ended."""
        return self.fail_by_id(call.client, call.req_id, error) if call in self.calls else []

    def fail_by_id(self, client: Client, req_id: bytes, error: KVCacheError) -> list[Send]:
        """End what the client calls `req_id`, whether or not it was dispatched."""
        calls = self.calls.of(client, req_id)
        for call in calls:
            self._end(call)
        return [self.refuse(client, req_id, error), *map(_release, calls)]

    def end_overdue(self, now: float) -> list[Send]:
        """Fail the calls whose time is up; let go of streams that have idled for long enough."""
        error = DeadlineExceeded("the deadline passed before the worker was done")
        sends = [send for call in self.calls.overdue(now) for send in self.fail(call, error)]
        self.streams.expire(now)
        return sends

    def drop_client(self, client: Client) -> list[Send]:
        """The client is gone: its workers stop, and nobody is told."""
        calls = [call for req_id in client.calls for call in self.calls.of(client, req_id)]
        for call in calls:
            self._end(call)
        for stream in list(client.streams.values()):
            self.streams.close(stream)
        return [_release(call) for call in calls]

    def drop_worker(self, worker: Worker, why: str) -> list[Send]:
        """The worker is gone: whoever waited for it alone hears that another may serve them."""
        error = WorkerLost(f"worker {worker.id} was lost: {why}")
        sends: list[Send] = []
        for call in list(worker.calls.values()):
            if call.gather is not None:
                sends += self._end_part(call)
            else:
                self._end(call)
                sends.append(self.refuse(call.client, call.req_id, error))
        return sends

    def refuse(self, client: Client, req_id: bytes, error: KVCacheError) -> Send:
        self.failed[error.code.name] += 1
        return to_client(client, wire.failed(req_id, error))

    # --- requests of several workers -------------------------------------------------------------

    def _dispatch_to_all(self, client: Client, message: m.Delete, frames: Sequence[Buffer], now: float) -> list[Send]:
        """Copies of a sequence may lie elsewhere than with its owner, left there while that one was away."""
        choice, workers = self.placement.place_all(client.user_id, message)
        calls = self.calls.begin_all(client, workers, message.req_id, now + message.deadline_ms / 1000)
        return [send for call in calls for send in self._assign(call, message, choice, frames)]

    def _gathered(self, call: Call, reply: m.Reply, frames: Sequence[Buffer]) -> list[Send]:
        """One worker's answer to a request of several, which are answered together."""
        assert call.gather is not None
        if not reply.final:
            return []
        try:
            call.gather.answers.add(wire.decode(frames).message)
        except ProtocolError as error:
            call.gather.answers.add_error(InternalError(f"worker {call.worker.id} gave no readable answer: {error}"))
        return self._end_part(call)

    def _end_part(self, call: Call) -> list[Send]:
        """One worker is done with its part, or gone; after the last one the client hears what came of it."""
        assert call.gather is not None
        self._knowledge.ended(call)
        return [to_client(call.client, call.gather.answers.total())] if self.calls.end(call) else []

    # --- details ---------------------------------------------------------------------------------

    def _assign(self, call: Call, message: m.Dispatched, choice: Choice, frames: Sequence[Buffer]) -> list[Send]:
        """The request for its worker, and before it what another one hears that it is to copy from."""
        self._workers.count_dispatch(call.worker)
        self._knowledge.touch(call.worker)
        order, grants = self._order_pull(call, message, choice)
        envelope = m.Assign(
            call=call.id,
            tenant=call.client.user_id,
            client=call.client.instance,
            deadline_ms=message.deadline_ms,
            reason=choice.reason,
            pull=order,
        )
        return [*grants, Send(Port.WORKER, call.worker.link, [wire.encode(envelope), *frames], call)]

    def _admit(self, client: Client, message: m.Dispatched, now: float) -> Stream | None:
        """The stream that the request brings along, if it generates. Raises what speaks against taking it."""
        self._check_serving(now)
        if message.deadline_ms == 0:
            raise DeadlineExceeded("the deadline had passed when the request reached the broker")
        if message.req_id in client.calls:
            raise Conflict("a request with this id is in flight")
        if len(client.calls) >= MAX_CALLS_PER_CLIENT:
            raise Overloaded(
                f"this client has {MAX_CALLS_PER_CLIENT} requests in flight", retry_after_ms=RETRY_AFTER_MS
            )
        return self.streams.unused(client, message.stream_id) if isinstance(message, m.Generate) else None

    def _check_serving(self, now: float) -> None:
        if self.is_draining:
            raise Draining("the broker is shutting down and takes no new requests", retry_after_ms=RETRY_AFTER_MS)
        if now < self._serves_from:
            wait_ms = 1 + int((self._serves_from - now) * 1000)
            raise NoWorkers("the broker has just started and waits for its workers", retry_after_ms=wait_ms)

    def _refuse_request(self, client: Client, message: m.Dispatched, error: KVCacheError) -> Send:
        """Say no, and close the stream that was opened for it: another attempt opens another."""
        if isinstance(message, m.Generate):
            stream = client.streams.get(message.stream_id)
            if stream is not None and stream.call is None:
                self.streams.close(stream)
        return self.refuse(client, message.req_id, error)

    def _order_pull(self, call: Call, message: m.Dispatched, choice: Choice) -> tuple[m.PullOrder | None, list[Send]]:
        """What the worker is to copy first, if the choice says so and it can, and the holder's ticket for it."""
        if choice.pull is None or not isinstance(message, m.Generate):
            return None, []
        source = self._workers.by_id.get(choice.pull.source)
        if source is None or not can_pull(source, call.worker):
            return None, []
        self.pulls_ordered += 1
        order, grant = order_pull(choice.pull, source, call.worker, message, call.client.user_id, self._new_id())
        return order, [grant]

    def _explanation(self, client: Client, message: m.Generate | m.Route, place: Place, now: float) -> Send:
        payload, choice = pack(self.placement.explain(client.user_id, message, place, now)), place.choice
        routed = m.Routed(
            req_id=message.req_id, worker_id=choice.worker_id, reason=choice.reason, payload=wire.describe([payload])
        )
        return to_client(client, routed, payload)

    def _end(self, call: Call) -> None:
        self.calls.end(call)
        self._knowledge.ended(call)
        if call.stream is not None:
            self.streams.close(call.stream)


def _release(call: Call) -> Send:
    return to_worker(call.worker, m.Release(call=call.id))
