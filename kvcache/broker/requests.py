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
    BadArgument,
    Cancelled,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    InternalError,
    KVCacheError,
    NoWorkers,
    Overloaded,
    ProtocolError,
    TooLarge,
    WorkerLost,
)
from bus.limits import CHUNK_BYTES, MAX_COPIES, MAX_INLINE_BYTES
from bus.stats import pack
from bus.wire import Buffer
from kvcache.broker.answers import DeleteAnswers, WriteAnswers
from kvcache.broker.calls import Calls
from kvcache.broker.directory import Name
from kvcache.broker.dispatch import Dispatch
from kvcache.broker.journal import DONE, Journal
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Call, Client, Gather, Stream, Worker, Workers
from kvcache.broker.moves import Moves
from kvcache.broker.placement import NAMED, RETRY_AFTER_MS, SPELLED, Place, Placement
from kvcache.broker.sends import Port, Send, to_client, to_worker
from kvcache.broker.sequences import Sequences
from kvcache.broker.streams import Streams
from kvcache.broker.warming import Demand

MAX_CALLS_PER_CLIENT = 4096


class Requests:
    """`serves_from`: when those workers have had time to join that knew an earlier broker, monotonic seconds."""

    def __init__(
        self,
        policy: str,
        workers: Workers,
        knowledge: Knowledge,
        sequences: Sequences,
        journal: Journal,
        moves: Moves,
        demand: Demand,
        *,
        serves_from: float,
        new_id: Callable[[], bytes],
    ) -> None:
        self.calls = Calls()
        self.streams = Streams(new_id)
        self.placement = Placement(policy, workers, knowledge, sequences, moves)
        self.dispatch = Dispatch(workers, knowledge, sequences, journal, new_id)
        self.is_draining = False
        self.arrived = 0
        self.failed: Counter[str] = Counter()
        self._journal = journal
        self._knowledge = knowledge
        self._sequences = sequences
        self._moves = moves
        self._serves_from = serves_from
        self.demand = demand
        self.num_warmed = 0

    # --- from clients ----------------------------------------------------------------------------

    def submit(
        self,
        client: Client,
        message: m.Dispatched,
        frames: Sequence[Buffer],
        now: float,
        lane: Port = Port.WORKER,
    ) -> list[Send]:
        """Dispatch a request to its worker, or answer at once why not. lane: which one it goes on, as it came."""
        self.arrived += 1
        explanation: list[Send] = []
        try:
            stream = self._admit(client, message, now)
            if isinstance(message, m.Delete):
                return self._delete(client, message, frames, now)
            if isinstance(message, m.Put | m.Append | m.Pin | m.Unpin):
                return self._write(client, message, frames, now, lane)
            place = self.placement.place(client.user_id, message, now)
            if isinstance(message, m.Generate) and message.explain:
                explanation.append(self._explanation(client, message, place, now))
        except KVCacheError as error:
            return [self._refuse_request(client, message, error)]
        name = None if isinstance(message, NAMED + SPELLED) else _name(client, message.seq_id)
        call = self.calls.begin(client, place.worker, message.req_id, now + message.deadline_ms / 1000, stream, name)
        if stream is not None:
            self.streams.use(stream, call)
        if isinstance(message, m.Generate) and message.trace:
            self._journal.began(call, message, place.choice.reason, now)
        if isinstance(message, m.Generate) and place.prompt is not None:
            self._knowledge.dispatched(call, message, place.prompt, place.choice, now)
            self._note_demand(client, message, frames, now)
        version = self._sequences.next_version(now) if name and isinstance(message, m.Generate) else 0
        return [*explanation, *self.dispatch.assign(call, message, place.choice, frames, version)]

    def warm(self, now: float) -> list[Send]:
        """Requests of the broker's own, that have workers fetch what they will be asked for (`warming`)."""
        sends: list[Send] = []
        for it in self.demand.tick(now):
            own = Client(b"", b"", bytes(16), it.tenant, now)
            call = self.calls.begin(own, it.worker, it.message.req_id, now + it.message.deadline_ms / 1000, None)
            self._knowledge.dispatched(call, it.message, it.prompt, it.choice, now)
            sends += self.dispatch.assign(call, it.message, it.choice, it.frames, 0)
        return sends

    def follow_up(self, client: Client, req_id: bytes, frames: Sequence[Buffer], port: Port) -> list[Send]:
        """More of a request in flight; of one that has ended meanwhile, nothing is left to tell anybody."""
        sends: list[Send] = []
        for call in self.calls.of(client, req_id):
            link = call.worker.link if port is Port.WORKER else call.worker.bulk_link
            if not link:
                return self.fail(call, _no_bulk_lane(call.worker))
            sends.append(Send(port, link, [wire.encode(m.Forward(call=call.id)), *frames], call))
        return sends

    def cancel(self, client: Client, req_id: bytes, frames: Sequence[Buffer]) -> list[Send]:
        """Stop a request. One on the bulk lane would be overtaken by its `Cancel`, so it ends here: workers know of a
        `Release` that comes first."""
        if any(call.on_bulk for call in self.calls.of(client, req_id)):
            return self.fail_by_id(client, req_id, Cancelled("cancelled by the client"))
        return self.follow_up(client, req_id, frames, Port.WORKER)

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

    def reply(self, worker: Worker, reply: m.Reply, frames: Sequence[Buffer], port: Port, now: float) -> list[Send]:
        """A worker's answer within a call of its own; of one that ended here first, nobody wants to know."""
        call = worker.calls.get(reply.call)
        if call is None:
            return []
        if call.name is not None and reply.version:
            self._sequences.wrote(worker, call.name, reply.version, now)
            return [*self._answer(call, reply, frames, port), *self._sequences.take_late()]
        return self._answer(call, reply, frames, port)

    def _answer(self, call: Call, reply: m.Reply, frames: Sequence[Buffer], port: Port) -> list[Send]:
        if call.gather is not None:
            return self._gathered(call, reply, frames[1:])
        if call.is_own:
            if reply.final:
                self.num_warmed += not wire.is_failure(frames[1:])
                self._end(call, "failed" if wire.is_failure(frames[1:]) else DONE)
            return []
        link = call.client.link if port is Port.CLIENT else call.client.bulk_link
        if not link:
            return self.fail(call, ConnectionLost("this client has no connection for bulk data"))
        if reply.final:
            self._end(call, "failed" if wire.is_failure(frames[1:]) else DONE)
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
            self._end(call, error.code.name)
        return [*self._tell(client, req_id, error), *map(_release, calls)]

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
            self._end(call, "its client is gone")
        for stream in list(client.streams.values()):
            self.streams.close(stream)
        return [_release(call) for call in calls]

    def drop_worker(self, worker: Worker, why: str) -> list[Send]:
        """The worker is gone: whoever waited for it alone hears that another may serve them."""
        error = WorkerLost(f"worker {worker.id} was lost: {why}")
        self._moves.losing(worker)
        self._sequences.forget(worker)
        sends: list[Send] = []
        for call in list(worker.calls.values()):
            if call.gather is not None:
                call.gather.answers.lose(worker.id)
                sends += self._end_part(call, error.code.name)
            else:
                self._end(call, error.code.name)
                sends += self._tell(call.client, call.req_id, error)
        return sends

    def refuse(self, client: Client, req_id: bytes, error: KVCacheError) -> Send:
        self.failed[error.code.name] += 1
        return to_client(client, wire.failed(req_id, error))

    def _tell(self, client: Client, req_id: bytes, error: KVCacheError) -> list[Send]:
        """The bad end of a request, for who asked; the broker itself need not hear of its own."""
        return [self.refuse(client, req_id, error)] if client.link else []

    # --- requests of several workers -------------------------------------------------------------

    def _delete(self, client: Client, message: m.Delete, frames: Sequence[Buffer], now: float) -> list[Send]:
        """Copies of a sequence may lie elsewhere than with its owner, left there while that one was away."""
        choice, workers = self.placement.place_all(client.user_id, message)
        name, version = Name(client.user_id, message.seq_id), self._sequences.next_version(now)
        deletes = (name, version) if message.layer is None else None
        gather = Gather(client, message.req_id, DeleteAnswers(message.req_id), deletes)
        deadline, is_copied = now + message.deadline_ms / 1000, self._sequences.is_copied(name)
        calls = self.calls.begin_all(gather, workers, deadline, name, version, on_bulk=is_copied)
        self._sequences.begin_write(name)
        return [
            send for call in calls for send in self.dispatch.assign(call, message, choice, frames, version, MAX_COPIES)
        ]

    def _write(
        self,
        client: Client,
        message: m.Put | m.Append | m.Pin | m.Unpin,
        frames: Sequence[Buffer],
        now: float,
        lane: Port,
    ) -> list[Send]:
        """To every worker that has the sequence or is to have it; all get it in the same order.

        So what changes the bytes of a sequence with copies goes on one lane, the bulk one, whatever its size.
        """
        has_bytes = isinstance(message, m.Put | m.Append)
        rf = message.rf if isinstance(message, m.Put | m.Append) else 1
        choice, workers = self.placement.place_write(client.user_id, message.seq_id, rf, now)
        if isinstance(message, m.Put | m.Append):
            _check_lane(message, frames, workers, lane)
        on_bulk = lane is Port.WORKER_BULK or (has_bytes and len(workers) > 1)
        name, version = Name(client.user_id, message.seq_id), self._sequences.next_version(now)
        deadline = now + message.deadline_ms / 1000
        if len(workers) == 1:
            worker = workers[0]
            calls = [
                self.calls.begin(client, worker, message.req_id, deadline, None, name, version=version, on_bulk=on_bulk)
            ]
        else:
            gather = Gather(client, message.req_id, WriteAnswers(message.req_id))
            calls = self.calls.begin_all(gather, workers, deadline, name, version, on_bulk=on_bulk)
        self._sequences.begin_write(name, tuple(worker.id for worker in workers), rf)
        return [
            send for call in calls for send in self.dispatch.assign(call, message, choice, frames, version, len(calls))
        ]

    def _gathered(self, call: Call, reply: m.Reply, frames: Sequence[Buffer]) -> list[Send]:
        """One worker's answer to a request of several, which are answered together."""
        assert call.gather is not None
        try:
            message = wire.decode(frames).message
        except ProtocolError as error:
            call.gather.answers.add_error(InternalError(f"worker {call.worker.id} gave no readable answer: {error}"))
            return self._end_part(call, "failed")
        if isinstance(message, m.Credit) and not reply.final:
            return self._pass_on_credit(call, call.gather, message)
        call.gather.answers.add(message)
        return self._end_part(call, DONE if isinstance(message, m.KvDone) else "failed")

    def _pass_on_credit(self, call: Call, gather: Gather, credit: m.Credit) -> list[Send]:
        """The client may send what every worker can take, since each of them gets it all."""
        gather.granted[call.id] = gather.granted.get(call.id, 0) + credit.chunks
        chunks = min(gather.granted.get(part, 0) for part in gather.parts) - gather.passed_on
        if chunks <= 0:
            return []
        gather.passed_on += chunks
        return [to_client(call.client, m.Credit(req_id=call.req_id, chunks=chunks))]

    def _end_part(self, call: Call, how: str) -> list[Send]:
        """One worker is done with its part, or gone; when nothing more is to be waited for, the client is answered."""
        gather = call.gather
        assert gather is not None
        self._end(call, how)
        rest = list(gather.parts.values()) if gather.answers.is_settled else []
        for part in rest:
            self._end(part, "not needed any more")
        if gather.parts:
            return []
        if gather.deletes is not None and not gather.answers.is_refused:
            self._sequences.deleted(*gather.deletes)
        return [to_client(call.client, gather.answers.total()), *map(_release, rest)]

    # --- details ---------------------------------------------------------------------------------

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
        self._journal.refused(message, error)
        return self.refuse(client, message.req_id, error)

    def _explanation(self, client: Client, message: m.Generate | m.Route, place: Place, now: float) -> Send:
        payload, choice = pack(self.placement.explain(client.user_id, message, place, now)), place.choice
        routed = m.Routed(
            req_id=message.req_id, worker_id=choice.worker_id, reason=choice.reason, payload=wire.describe([payload])
        )
        return to_client(client, routed, payload)

    def _note_demand(self, client: Client, message: m.Generate, frames: Sequence[Buffer], now: float) -> None:
        key = self.placement.key(client.user_id, message, now)
        if key.key and not message.seq_id and not message.epoch:
            self.demand.asked(client.user_id, key, message, frames[1], now)

    def _end(self, call: Call, how: str) -> None:
        is_over = self.calls.end(call)
        if call.is_own:
            self.demand.ended(call.worker.id)
        self._journal.ended(call, how)
        self._knowledge.ended(call)
        if call.stream is not None:
            self.streams.close(call.stream)
        if not call.version or call.name is None:
            return
        if how != DONE:
            self._sequences.missed(call.worker.id, call.name, call.version)
        if is_over:
            self._sequences.end_write(call.name)
            if self._sequences.rf(call.name) > 1:
                self._moves.wants(call.name)


def _check_lane(message: m.Put | m.Append, frames: Sequence[Buffer], workers: Sequence[Worker], lane: Port) -> None:
    """What must hold of a write on the lane that it came on.

    Raises TooLarge for more bytes in one message than a lane may carry; BadArgument for bytes that are to follow it
    on the control lane, where none do; WorkerLost if there is no way for them to follow.
    """
    num_bytes, limit = sum(map(len, frames[1:])), CHUNK_BYTES if lane is Port.WORKER_BULK else MAX_INLINE_BYTES
    if num_bytes > limit:
        raise TooLarge(f"k and v are {num_bytes} bytes in one message, limit {limit} on this lane", detail=limit)
    if len(frames) > 1 or not message.k.nbytes + message.v.nbytes:
        return
    if lane is not Port.WORKER_BULK:
        raise BadArgument("a write whose bytes follow in chunks goes on the bulk lane, as they do")
    for worker in workers:
        if not worker.bulk_link:
            raise _no_bulk_lane(worker)


def _no_bulk_lane(worker: Worker) -> WorkerLost:
    return WorkerLost(f"worker {worker.id} has no connection for bulk data")


def _name(client: Client, seq_id: str) -> Name | None:
    return Name(client.user_id, seq_id) if seq_id else None


def _release(call: Call) -> Send:
    return to_worker(call.worker, m.Release(call=call.id))
