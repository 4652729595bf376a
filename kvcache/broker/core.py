"""The broker's decisions: frames in, frames out, no sockets and no clock.

Each `on_...` method takes what one socket received and `now` (monotonic seconds) and returns the
`Send`s to perform, in order. What it holds, it can lose: sessions, calls in flight and the load they
make are all rebuilt by peers that say hello again.

Invariants
- every request that was accepted is answered exactly once: by its worker's final reply, or by a
  `Failed` from here when its worker is lost, its time is up, or it cannot be dispatched;
- a call is in its client's `calls`, its worker's `calls` and a deadline bucket, or in none of them;
- a peer speaks only after `Hello`, and only within its own session: ids that it chose are looked up
  in that session alone.
"""

from __future__ import annotations

import enum
import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bus import messages as m
from bus import wire
from bus.errors import (
    BadArgument,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    Forbidden,
    KVCacheError,
    MalformedMessage,
    NoWorkers,
    Overloaded,
    ProtocolError,
    UnsupportedVersion,
    WorkerLost,
)
from bus.stats import BrokerStats, ClusterStats, WorkerStats, pack, unpack
from bus.topics import stream_of
from bus.wire import Buffer
from kvcache.broker.deadlines import Deadlines
from kvcache.broker.members import Call, Client, Worker, Workers
from kvcache.broker.placement import RETRY_AFTER_MS, Placement
from kvcache.config import BrokerConfig
from kvcache.routing.policies import Choice

log = logging.getLogger(__name__)

MAX_CALLS_PER_CLIENT = 4096
MAX_STREAMS_PER_CLIENT = 4096
MAX_INLINE_BYTES = 256 * 1024
MAX_PROMPT_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
CHUNK_BYTES = 1 << 20
WINDOW_TOKENS = 1024
LINGER_S = 60.0


class Port(enum.Enum):
    """The sockets a core may send on."""

    CLIENT = "client"
    CLIENT_BULK = "client bulk"
    WORKER = "worker"
    WORKER_BULK = "worker bulk"


class Send(NamedTuple):
    """One message for one peer. `call` is the request that suffers if it cannot be sent, if any."""

    port: Port
    link: bytes
    frames: Sequence[Buffer]
    call: Call | None = None


@dataclass(slots=True)
class Gauges:
    """What only the process and its sockets know; the shell keeps it current, the core reports it."""

    pid: int = 0
    rss_bytes: int = 0
    loop_lag_s: float = 0.0
    refused_subscriptions: int = 0
    dropped_sends: int = 0
    queued_messages: int = 0
    tokens_relayed: int = 0


class BrokerCore:
    """One broker's state. `incarnation` tells its restarts apart; `new_id` makes 16 secret random bytes."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        incarnation: int,
        now: float,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.workers = Workers(3 * config.heartbeat_ms / 1000, config.max_inflight)
        self.gauges = Gauges()
        self.is_draining = False
        self.failed: Counter[str] = Counter()
        self.malformed = self.unwelcome = self.requests = self.workers_lost = 0
        self._config = config
        self._incarnation = incarnation
        self._new_id = new_id
        self._started_at = now
        self._placement = Placement(config.policy, self.workers)
        self._clients: dict[bytes, Client] = {}
        self._sessions: dict[bytes, Client | Worker] = {}
        self._bulk: dict[bytes, Client | Worker] = {}
        self._streams: dict[bytes, Client] = {}
        self._calls: dict[int, Call] = {}
        self._deadlines: Deadlines[Call] = Deadlines()
        self._lingering: Deadlines[Call] = Deadlines()
        self._call_ids = itertools.count(1)

    # --- what the sockets received ---------------------------------------------------------------

    def on_client(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the clients' control lane."""
        client = self._clients.get(link)
        try:
            message = wire.decode(frames, verify_payload=False).message
        except ProtocolError as error:
            return self._garbage_from_client(client, frames, error, now)
        if client is None:
            if isinstance(message, m.Hello):
                return self._welcome_client(link, message, now, user_id)
            self.unwelcome += 1
            return []
        client.heard_at = now
        match message:
            case m.Ack() | m.Credit() | m.Cancel() | m.Resume():
                return self._follow_up(client, message.req_id, frames, Port.WORKER)
            case m.Beat():
                return [self._to_client(client, m.BrokerBeat(beat=message.beat, lease_ms=self._config.lease_ms))]
            case m.Hello():
                return self._welcome_client(link, message, now, user_id)
            case m.Goodbye():
                return self._close_client(client)
            case (
                m.Generate()
                | m.Put()
                | m.Append()
                | m.Get()
                | m.Length()
                | m.Delete()
                | m.Pin()
                | m.Unpin()
                | m.ListSequences()
            ):
                return self._request(client, message, frames, now)
            case m.OpenStream():
                return self._open_stream(client, message)
            case m.Route():
                return self._route(client, message, now)
            case m.Query():
                payload = pack(self.cluster_stats(now, full=message.kind is m.QueryKind.STATS))
                reply = m.QueryReply(req_id=message.req_id, payload=wire.describe([payload]))
                return [self._to_client(client, reply, payload)]
            case _:
                stray = MalformedMessage(f"{type(message).__name__} does not belong on a client's control lane")
                return self._garbage_from_client(client, frames, stray, now)

    def on_worker(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the workers' control lane; a `Reply` carries the client's answer behind it."""
        worker = self.workers.by_link.get(link)
        try:
            message = wire.decode_header(frames[0])
            if worker is None:
                if isinstance(message, m.WorkerHello):
                    return self._welcome_worker(link, message, now, user_id)
                self.unwelcome += 1
                return []
            worker.heard_at = now
            match message:
                case m.Reply():
                    return self._reply(worker, message, frames, Port.CLIENT, now)
                case m.WorkerBeat():
                    return self._worker_beat(worker, message, now)
                case m.WorkerStatus():
                    worker.stats = unpack(wire.decode(frames).payload[0], WorkerStats)
                    return []
                case m.WorkerHello():
                    return self._welcome_worker(link, message, now, user_id)
                case m.Goodbye():
                    return self._lose_worker(worker, f"left: {message.reason}")
                case _:
                    raise MalformedMessage(f"{type(message).__name__} does not belong on a worker's control lane")
        except ProtocolError as error:
            self.malformed += 1
            log.warning("worker %s sent what cannot be read: %s", worker.id if worker else "(unknown)", error)
            return []

    def on_client_bulk(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the clients' bulk lane: `AttachBulk` first, then chunks of the client's own calls."""
        try:
            message = wire.decode_header(frames[0])
        except (ProtocolError, IndexError):
            self.malformed += 1
            return []
        owner = self._bulk.get(link)
        if isinstance(message, m.AttachBulk):
            self._attach(link, message, Client, user_id)
        elif isinstance(owner, Client) and isinstance(message, m.Chunk):
            owner.heard_at = now
            return self._follow_up(owner, message.req_id, frames, Port.WORKER_BULK)
        else:
            self.unwelcome += 1
        return []

    def on_worker_bulk(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the workers' bulk lane: `AttachBulk` first, then `Reply` envelopes around chunks."""
        try:
            message = wire.decode_header(frames[0])
        except (ProtocolError, IndexError):
            self.malformed += 1
            return []
        owner = self._bulk.get(link)
        if isinstance(message, m.AttachBulk):
            self._attach(link, message, Worker, user_id)
        elif isinstance(owner, Worker) and isinstance(message, m.Reply):
            owner.heard_at = now
            return self._reply(owner, message, frames, Port.CLIENT_BULK, now)
        else:
            self.unwelcome += 1
        return []

    def allows(self, topic: bytes) -> bool:
        """Whether a subscription to `topic` may see it: exactly the topic of a stream that is open."""
        stream_id = stream_of(topic)
        return stream_id is not None and stream_id in self._streams

    def on_unsent(self, send: Send, *, is_gone: bool) -> list[Send]:
        """A send failed: its peer is gone, or takes nothing and its queue is full.

        A client that takes no replies cannot be served, and its work stops. A worker whose link is gone is
        lost; one that is only full makes this one request fail, at once and typed.
        """
        if send.port in {Port.CLIENT, Port.CLIENT_BULK}:
            client = self._clients.get(send.link) if send.port is Port.CLIENT else self._bulk.get(send.link)
            return self._close_client(client) if isinstance(client, Client) else []
        worker = self.workers.by_link.get(send.link) if send.port is Port.WORKER else self._bulk.get(send.link)
        if is_gone:
            return self._lose_worker(worker, "disconnected") if isinstance(worker, Worker) else []
        if send.call is None or send.call.id not in self._calls:
            return []
        error = Overloaded(f"worker {send.call.worker.id} takes no more messages now", retry_after_ms=RETRY_AFTER_MS)
        return self._fail_call(send.call, error)

    def tick(self, now: float) -> list[Send]:
        """Time has passed: end overdue calls and sessions that fell silent."""
        sends: list[Send] = []
        for call in self._deadlines.due(now):
            sends += self._fail_call(call, DeadlineExceeded("the deadline passed before the worker was done"))
        for call in self._lingering.due(now):
            call.client.ended.pop(call.req_id, None)
            call.worker.ended.pop(call.id, None)
        silent_s = self._config.worker_lost_ms / 1000
        for worker in [w for w in self.workers.by_id.values() if now - w.heard_at > silent_s]:
            sends += self._lose_worker(worker, f"silent for {now - worker.heard_at:.2f} s")
        silent_s = self._config.client_lost_ms / 1000
        for client in [c for c in self._clients.values() if now - c.heard_at > silent_s]:
            sends += self._close_client(client)
        return sends

    def drain(self) -> None:
        """Take nothing new from now on."""
        self.is_draining = True

    @property
    def inflight(self) -> int:
        return len(self._calls)

    def farewell(self) -> list[Send]:
        """The last words: what is still in flight fails as retryable, and everybody hears that the broker leaves."""
        sends: list[Send] = []
        for call in list(self._calls.values()):
            sends += self._fail_call(call, Draining("the broker is shutting down"))
        goodbye = m.Goodbye(reason="the broker is shutting down")
        sends += [self._to_client(client, goodbye) for client in self._clients.values()]
        sends += [Send(Port.WORKER, link, [wire.encode(goodbye)]) for link in self.workers.by_link]
        return sends

    # --- sessions --------------------------------------------------------------------------------

    def _welcome_client(self, link: bytes, hello: m.Hello, now: float, user_id: str) -> list[Send]:
        if (refusal := _version_refusal(hello.major)) is not None:
            return [Send(Port.CLIENT, link, [wire.encode(refusal)])]
        client = self._clients.get(link)
        sends: list[Send] = []
        if client is None or client.instance != hello.instance:
            for other in [c for c in self._clients.values() if (c.instance, c.user_id) == (hello.instance, user_id)]:
                sends += self._close_client(other)  # its connection came back as another link: it starts afresh
            if client is not None:
                sends += self._close_client(client)
            client = Client(link, self._new_id(), hello.instance, user_id, now)
            self._clients[link] = client
            self._sessions[client.session] = client
        return [*sends, self._to_client(client, self._welcome(client.session))]

    def _welcome_worker(self, link: bytes, hello: m.WorkerHello, now: float, user_id: str) -> list[Send]:
        if (refusal := _version_refusal(hello.major)) is not None:
            return [Send(Port.WORKER, link, [wire.encode(refusal)])]
        known, sends = self.workers.by_id.get(hello.worker_id), list[Send]()
        if known is not None and (known.user_id != user_id or known.hello.incarnation > hello.incarnation):
            error = Forbidden(f"worker id {hello.worker_id!r} is taken by a live worker; start this one under another")
            return [Send(Port.WORKER, link, [wire.encode(wire.failed(wire.NO_REQUEST, error))])]
        if known is None or known.link != link or known.hello.incarnation != hello.incarnation:
            if known is not None:
                sends += self._lose_worker(known, "replaced by a newer link")
            if (other := self.workers.by_link.get(link)) is not None:
                sends += self._lose_worker(other, "its link now speaks for another worker")
            lease_until = now + self._config.lease_ms / 1000
            known = Worker(link, self._new_id(), user_id, hello, now, lease_until, hello.state)
            self._sessions[known.session] = known
            self.workers.add(known)
            log.info("worker %s joined, %d on the ring", known.id, len(self.workers.ring))
        return [*sends, Send(Port.WORKER, link, [wire.encode(self._welcome(known.session))])]

    def _welcome(self, session: bytes) -> m.Welcome:
        return m.Welcome(
            session=session,
            incarnation=self._incarnation,
            major=wire.MAJOR,
            minor=wire.MINOR,
            heartbeat_ms=self._config.heartbeat_ms,
            lease_ms=self._config.lease_ms,
            max_inline_bytes=MAX_INLINE_BYTES,
            max_prompt_bytes=MAX_PROMPT_BYTES,
            max_tensor_bytes=MAX_TENSOR_BYTES,
            chunk_bytes=CHUNK_BYTES,
            window_tokens=WINDOW_TOKENS,
        )

    def _attach(self, link: bytes, message: m.AttachBulk, kind: type[Client] | type[Worker], user_id: str) -> None:
        owner = self._sessions.get(message.session)
        if not isinstance(owner, kind) or owner.user_id != user_id:
            self.unwelcome += 1
            return
        self._bulk.pop(owner.bulk_link, None)
        owner.bulk_link = link
        self._bulk[link] = owner

    def _worker_beat(self, worker: Worker, beat: m.WorkerBeat, now: float) -> list[Send]:
        worker.beat = beat
        worker.lease_until = now + self._config.lease_ms / 1000
        if worker.state is not beat.state:
            worker.state = beat.state
            self.workers.rebuild()
        answer = m.BrokerBeat(beat=beat.beat, lease_ms=self._config.lease_ms)
        return [Send(Port.WORKER, worker.link, [wire.encode(answer)])]

    def _close_client(self, client: Client) -> list[Send]:
        """Forget a client; whatever it had running stops."""
        sends = [self._release(call) for call in client.calls.values()]
        for call in list(client.calls.values()):
            self._forget_call(call)
        for stream_id in client.streams:
            self._streams.pop(stream_id, None)
        self._clients.pop(client.link, None)
        self._sessions.pop(client.session, None)
        self._bulk.pop(client.bulk_link, None)
        return sends

    def _lose_worker(self, worker: Worker, why: str) -> list[Send]:
        """Forget a worker; whoever waited for it hears that another may serve them."""
        log.warning("worker %s is lost (%s), %d calls fail over", worker.id, why, len(worker.calls))
        self.workers_lost += 1
        self.workers.remove(worker)
        self._sessions.pop(worker.session, None)
        self._bulk.pop(worker.bulk_link, None)
        error = WorkerLost(f"worker {worker.id} was lost: {why}")
        return [send for call in list(worker.calls.values()) for send in self._fail_call(call, error, release=False)]

    def _garbage_from_client(
        self, client: Client | None, frames: Sequence[Buffer], error: ProtocolError, now: float
    ) -> list[Send]:
        self.malformed += 1
        if client is None:  # nobody before Hello gets an answer
            return []
        if client.counts_as_flood(now):
            log.warning("a client sent 100 unreadable messages within a second and is disconnected")
            return [
                self._to_client(client, m.Goodbye(reason="too many unreadable messages")),
                *self._close_client(client),
            ]
        req_id = wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST
        return [self._to_client(client, wire.failed(req_id, error))]

    # --- requests --------------------------------------------------------------------------------

    def _request(self, client: Client, message: m.Dispatched, frames: Sequence[Buffer], now: float) -> list[Send]:
        """Dispatch a request to its worker, or answer at once why not."""
        self.requests += 1
        try:
            self._check_room(client, message, now)
            choice, worker = self._placement.place(client.user_id, message, now)
        except KVCacheError as error:
            return [self._refuse(client, message.req_id, error)]
        call = Call(next(self._call_ids), client, worker, message.req_id, now + message.deadline_ms / 1000)
        if isinstance(message, m.Generate):
            call.stream_id = message.stream_id
        self._calls[call.id] = worker.calls[call.id] = client.calls[call.req_id] = call
        worker.dispatched += 1
        self._deadlines.add(call, call.deadline)
        envelope = m.Assign(
            call=call.id,
            tenant=client.user_id,
            client=client.instance,
            deadline_ms=message.deadline_ms,
            reason=choice.reason,
        )
        sends = [Send(Port.WORKER, worker.link, [wire.encode(envelope), *frames], call)]
        if isinstance(message, m.Generate) and message.explain:
            sends.insert(0, self._explanation(client, message, choice, now))
        return sends

    def _check_room(self, client: Client, message: m.Dispatched, now: float) -> None:
        if self.is_draining:
            raise Draining("the broker is shutting down and takes no new requests", retry_after_ms=RETRY_AFTER_MS)
        settled_in = self._started_at + self._config.settle_ms / 1000 - now
        if settled_in > 0:
            raise NoWorkers(
                "the broker has just started and waits for its workers", retry_after_ms=1 + int(settled_in * 1000)
            )
        if message.deadline_ms == 0:
            raise DeadlineExceeded("the deadline had passed when the request reached the broker")
        if message.req_id in client.calls:
            raise Conflict("a request with this id is in flight")
        if len(client.calls) >= MAX_CALLS_PER_CLIENT:
            raise Overloaded(
                f"this client has {MAX_CALLS_PER_CLIENT} requests in flight", retry_after_ms=RETRY_AFTER_MS
            )
        if isinstance(message, m.Generate) and self._streams.get(message.stream_id) is not client:
            raise BadArgument("the stream is not open, or not this client's; send OpenStream first")

    def _follow_up(self, client: Client, req_id: bytes, frames: Sequence[Buffer], port: Port) -> list[Send]:
        """More of a request in flight; of one that has ended meanwhile, nothing is left to tell anybody."""
        call = client.calls.get(req_id) or client.ended.get(req_id)
        if call is None:
            return []
        link = call.worker.link if port is Port.WORKER else call.worker.bulk_link
        return [Send(port, link, [wire.encode(m.Forward(call=call.id)), *frames], call)]

    def _reply(self, worker: Worker, reply: m.Reply, frames: Sequence[Buffer], port: Port, now: float) -> list[Send]:
        call = worker.calls.get(reply.call) or worker.ended.get(reply.call)
        if call is None:  # it ended here first: a deadline, a client that left
            return []
        if port is Port.CLIENT_BULK and not call.client.bulk_link:
            error = ConnectionLost("the client's bulk connection is not attached yet", retry_after_ms=RETRY_AFTER_MS)
            return self._fail_call(call, error, release=not reply.final)
        if reply.final and call.id in self._calls:
            self._forget_call(call)
            if call.stream_id:
                self._linger(call, now)
        link = call.client.link if port is Port.CLIENT else call.client.bulk_link
        return [Send(port, link, frames[1:])]

    def _open_stream(self, client: Client, message: m.OpenStream) -> list[Send]:
        if self.is_draining:
            return [self._refuse(client, message.req_id, Draining("the broker is shutting down"))]
        if len(client.streams) >= MAX_STREAMS_PER_CLIENT:
            return [self._refuse(client, message.req_id, Overloaded("too many open streams", retry_after_ms=1000))]
        stream_id = self._new_id()
        client.streams.add(stream_id)
        self._streams[stream_id] = client
        return [self._to_client(client, m.StreamOpened(req_id=message.req_id, stream_id=stream_id))]

    def _route(self, client: Client, message: m.Route, now: float) -> list[Send]:
        try:
            choice, _ = self._placement.place(client.user_id, message, now)
        except KVCacheError as error:
            return [self._refuse(client, message.req_id, error)]
        return [self._explanation(client, message, choice, now)]

    def _explanation(self, client: Client, message: m.Generate | m.Route, choice: Choice, now: float) -> Send:
        payload = pack(self._placement.explain(client.user_id, message, choice, now))
        routed = m.Routed(
            req_id=message.req_id, worker_id=choice.worker_id, reason=choice.reason, payload=wire.describe([payload])
        )
        return self._to_client(client, routed, payload)

    # --- ends ------------------------------------------------------------------------------------

    def _fail_call(self, call: Call, error: KVCacheError, *, release: bool = True) -> list[Send]:
        self._forget_call(call)
        sends = [self._refuse(call.client, call.req_id, error)]
        return [*sends, self._release(call)] if release else sends

    def _refuse(self, client: Client, req_id: bytes, error: KVCacheError) -> Send:
        self.failed[error.code.name] += 1
        return self._to_client(client, wire.failed(req_id, error))

    def _release(self, call: Call) -> Send:
        return Send(Port.WORKER, call.worker.link, [wire.encode(m.Release(call=call.id))])

    def _forget_call(self, call: Call) -> None:
        self._calls.pop(call.id, None)
        call.worker.calls.pop(call.id, None)
        call.client.calls.pop(call.req_id, None)
        self._deadlines.discard(call, call.deadline)
        if call.stream_id:
            self._streams.pop(call.stream_id, None)
            call.client.streams.discard(call.stream_id)

    def _linger(self, call: Call, now: float) -> None:
        """A stream's last tokens may still be on their way, or lost: what is left to ask for must find its worker."""
        call.client.ended[call.req_id] = call.worker.ended[call.id] = call
        self._lingering.add(call, now + LINGER_S)

    def _to_client(self, client: Client, message: m.Message, *payload: Buffer) -> Send:
        return Send(Port.CLIENT, client.link, [wire.encode(message), *payload])

    # --- figures ---------------------------------------------------------------------------------

    def cluster_stats(self, now: float, *, full: bool) -> ClusterStats:
        views = tuple(self.workers.view(w, now, full=full) for w in sorted(self.workers.by_id.values(), key=_by_id))
        return ClusterStats(
            healthy=not self.is_draining and any(view.status == "ready" for view in views),
            broker=self.broker_stats(now),
            workers=views,
        )

    def broker_stats(self, now: float) -> BrokerStats:
        """The broker's own figures, the shell's gauges among them."""
        return BrokerStats(
            incarnation=self._incarnation,
            state="draining" if self.is_draining else "serving",
            policy=self._config.policy,
            uptime_s=round(now - self._started_at, 3),
            clients=len(self._clients),
            streams=len(self._streams),
            inflight=len(self._calls),
            requests=self.requests,
            failed=dict(self.failed),
            routed=dict(self._placement.routed),
            malformed=self.malformed,
            unwelcome=self.unwelcome,
            workers_lost=self.workers_lost,
            pid=self.gauges.pid,
            rss_bytes=self.gauges.rss_bytes,
            loop_lag_ms=round(self.gauges.loop_lag_s * 1000, 3),
            refused_subscriptions=self.gauges.refused_subscriptions,
            dropped_sends=self.gauges.dropped_sends,
            queued_messages=self.gauges.queued_messages,
            tokens_relayed=self.gauges.tokens_relayed,
        )


def _by_id(worker: Worker) -> str:
    return worker.id


def _version_refusal(major: int) -> m.Failed | None:
    """What a peer of another major version hears; None if it speaks ours."""
    if major == wire.MAJOR:
        return None
    error = UnsupportedVersion(
        f"protocol version {major} is not supported; this broker speaks {wire.MAJOR}.{wire.MINOR}"
    )
    return wire.failed(wire.NO_REQUEST, error)
