"""The broker's decisions: frames in, frames out, no sockets and no clock.

Each `on_...` method takes what one socket received and `now` (monotonic seconds) and returns the
`Send`s to perform, in order. A message is read here and acted on by its owner: `sessions` (who may
speak), `requests` (what is in flight). What a broker holds, it can lose: all of it is told again by
peers that say hello again.

Invariants: a peer speaks only after hello and only within its own session, where alone the ids that it
chose mean something; what a client's message cannot mean is answered, and what a stranger says is not.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus import messages as m
from bus import wire
from bus.errors import Draining, InternalError, MalformedMessage, Overloaded, ProtocolError, UnsupportedVersion
from bus.stats import BrokerStats, ClusterStats, Holdings, WorkerStats, pack, unpack
from bus.topics import stream_of
from bus.traces import Span
from bus.wire import Buffer
from kvcache.broker.journal import Journal, News
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import GARBAGE_PER_S, Client, Worker, Workers
from kvcache.broker.moves import Moves
from kvcache.broker.placement import RETRY_AFTER_MS
from kvcache.broker.requests import Requests
from kvcache.broker.sends import Port, Send, to_client, to_worker
from kvcache.broker.sequences import Sequences
from kvcache.broker.sessions import Sessions, refuse_version
from kvcache.broker.warming import Demand
from kvcache.config import BrokerConfig

FLOOD = f"{GARBAGE_PER_S} unreadable messages within a second"


@dataclass(slots=True)
class Gauges:
    """What only the process and its sockets know; the shell keeps it current, the core reports it."""

    pid: int = 0
    version: str = ""
    rss_bytes: int = 0
    loop_lag_s: float = 0.0
    refused_subscriptions: int = 0
    dropped_sends: int = 0
    queued_messages: int = 0
    tokens_relayed: int = 0


class BrokerCore:
    """One broker's state. `new_id` makes 16 secret random bytes.

    incarnation: when it started, in nanoseconds since 1970; tells restarts apart.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        incarnation: int,
        now: float,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
        is_tracing: bool = False,
    ) -> None:
        self.gauges = Gauges()
        self._config = config
        self._incarnation = incarnation
        self._started_at = now
        self._malformed = self._unwelcome = self._relayed = 0
        self._workers = Workers(3 * config.heartbeat_ms / 1000, config.max_inflight)
        self._sequences = Sequences(self._workers, wall_ms=incarnation // 1_000_000, now=now)
        self._knowledge = Knowledge(self._workers)
        self._journal = Journal(new_id, is_detailed=config.log_level.lower() == "debug", is_tracing=is_tracing)
        demand = Demand(self._workers, self._knowledge, new_id)
        self._moves = Moves(self._workers, self._sequences, self._journal, new_id, demand.needs)
        self._requests = Requests(
            config.policy,
            self._workers,
            self._knowledge,
            self._sequences,
            self._journal,
            self._moves,
            demand,
            serves_from=now + config.settle_ms / 1000,
            new_id=new_id,
        )
        self._sessions = Sessions(
            config,
            self._workers,
            self._requests,
            self._knowledge,
            self._journal,
            incarnation=incarnation,
            now=now,
            new_id=new_id,
        )

    # --- what the sockets received ---------------------------------------------------------------

    def on_client(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the clients' control lane."""
        client = self._sessions.clients.get(link)
        try:
            message = wire.decode(frames, verify_payload=False).message
        except ProtocolError as error:
            return self._garbage(link, frames, error, now)
        if client is None:
            if isinstance(message, m.Hello):
                return self._sessions.welcome_client(link, message, now, user_id)
            self._unwelcome += 1
            return []
        client.heard_at = now
        match message:
            case m.Cancel():
                return self._requests.cancel(client, message.req_id, frames)
            case m.Ack() | m.Credit() | m.Resume():
                return self._requests.follow_up(client, message.req_id, frames, Port.WORKER)
            case m.Beat():
                return [to_client(client, m.BrokerBeat(beat=message.beat, lease_ms=self._config.lease_ms))]
            case m.Hello():
                return self._sessions.welcome_client(link, message, now, user_id)
            case m.Goodbye():
                return self._sessions.close_client(client)
            case (
                m.Generate()
                | m.Tokenize()
                | m.Detokenize()
                | m.Put()
                | m.Append()
                | m.Get()
                | m.Length()
                | m.Delete()
                | m.Pin()
                | m.Unpin()
                | m.ListSequences()
                | m.FlushPrefixCache()
            ):
                return self._requests.submit(client, message, frames, now)
            case m.OpenStream():
                return self._requests.open_stream(client, message, now)
            case m.Route():
                return self._requests.route(client, message, now)
            case m.Query():
                payload = pack(self.cluster_stats(now, message.kind))
                reply = m.QueryReply(req_id=message.req_id, payload=wire.describe([payload]))
                return [to_client(client, reply, payload)]
            case _:
                stray = MalformedMessage(f"{type(message).__name__} does not belong on a client's control lane")
                return self._garbage(link, frames, stray, now)

    def on_worker(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the workers' control lane; a `Reply` carries the client's answer behind it."""
        worker = self._workers.by_link.get(link)
        try:
            message = wire.decode_envelope(frames)
            if worker is None:
                if isinstance(message, m.WorkerHello):
                    return self._welcome(link, message, now, user_id)
                self._unwelcome += 1
                return []
            worker.heard_at = now
            match message:
                case m.Reply():
                    return self._requests.reply(worker, message, frames, Port.CLIENT, now)
                case m.Prefilled():
                    self._requests.prefilled(worker, message, now)
                    return []
                case m.WorkerBeat():
                    was = worker.state
                    sends = self._sessions.renew(worker, message, now)
                    moves = self._moves.changed(worker, now) if worker.state is not was else []
                    return [*sends, *moves, *self._ask(worker, now)]
                case m.NodesChanged() | m.NodesHeld():
                    self._knowledge.reported(worker, message, bytes(wire.decode(frames).payload[0]), now)
                    return self._ask(worker, now)
                case m.WorkerStatus():
                    self._knowledge.figures(worker, unpack(wire.decode(frames).payload[0], WorkerStats), now)
                    return []
                case m.WorkerSequences():
                    holdings = unpack(wire.decode(frames).payload[0], Holdings)
                    was_known = worker.is_known
                    self._sequences.told(worker, holdings, now, is_complete=message.is_complete)
                    moves = self._moves.told(worker, holdings, now, is_first=not was_known)
                    return [*self._sequences.take_late(), *moves]
                case m.SequenceCopied():
                    return self._moves.copied(worker, message, now)
                case m.WorkerHello():
                    return self._welcome(link, message, now, user_id)
                case m.Goodbye():
                    return self._sessions.release_worker(worker, message.reason)
                case _:
                    raise MalformedMessage(f"{type(message).__name__} does not belong on a worker's control lane")
        except ProtocolError as error:
            return self._garbage_from_worker(link, error, now)

    def on_client_bulk(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the clients' bulk lane: `AttachBulk` first, then writes, each with the chunks that follow it."""
        owner = self._sessions.of_bulk_link(link)
        try:
            message = wire.decode_envelope(frames)
            if isinstance(message, m.Put | m.Append):
                wire.check_count(message, frames[1:])
        except ProtocolError as error:
            if isinstance(owner, Client):
                return self._garbage(owner.link, frames, error, now)
            self._malformed += 1
            return []
        if isinstance(owner, Client) and isinstance(message, m.Chunk):
            owner.heard_at = now
            return self._requests.follow_up(owner, message.req_id, frames, Port.WORKER_BULK)
        if isinstance(owner, Client) and isinstance(message, m.Put | m.Append):
            owner.heard_at = now
            return self._requests.submit(owner, message, frames, now, Port.WORKER_BULK)
        if not isinstance(message, m.AttachBulk) or not self._sessions.attach(link, message, Client, user_id):
            self._unwelcome += 1
        return []

    def on_worker_bulk(self, link: bytes, frames: Sequence[Buffer], now: float, user_id: str) -> list[Send]:
        """A message on the workers' bulk lane: `AttachBulk` first, then `Reply` envelopes around chunks."""
        try:
            message = wire.decode_envelope(frames)
        except ProtocolError:
            self._malformed += 1
            return []
        owner = self._sessions.of_bulk_link(link)
        if isinstance(owner, Worker) and isinstance(message, m.Reply):
            owner.heard_at = now
            return self._requests.reply(owner, message, frames, Port.CLIENT_BULK, now)
        if isinstance(owner, Worker) and isinstance(message, m.Relay):
            owner.heard_at = now
            return self._relay(owner, message, frames[1:])
        if not isinstance(message, m.AttachBulk) or not self._sessions.attach(link, message, Worker, user_id):
            self._unwelcome += 1
        return []

    def allows(self, topic: bytes) -> bool:
        """Whether a subscription to `topic` may see it: exactly the topic of a stream that is open."""
        stream_id = stream_of(topic)
        return stream_id is not None and stream_id in self._requests.streams

    # --- what became of it -----------------------------------------------------------------------

    def on_unsent(self, send: Send, *, is_gone: bool) -> list[Send]:
        """A send failed: its peer is gone, or takes nothing and its queue is full.

        Whoever is gone is forgotten, and a client that takes no replies cannot be served. If there is no room
        for a worker or for bulk data, the one request that it was about fails, at once and typed.
        """
        peer = self._peer_at(send.port, send.link)
        if peer is None:
            return []
        if isinstance(peer, Worker) and is_gone:
            return self._sessions.lose_worker(peer, "disconnected")
        if isinstance(peer, Client) and (is_gone or send.port is Port.CLIENT):
            return self._sessions.close_client(peer)
        if send.call is None or not (send.call.is_own or send.call.client.link in self._sessions.clients):
            return []
        error = Overloaded(f"there is no room to send to this {send.port.value} peer", retry_after_ms=RETRY_AFTER_MS)
        if send.port is Port.CLIENT_BULK and send.call not in self._requests.calls:
            return [self._requests.refuse(send.call.client, send.call.req_id, error)]  # it was the last chunk
        return self._requests.fail(send.call, error)

    def on_fault(self, port: Port, link: bytes, frames: Sequence[Buffer]) -> list[Send]:
        """Handling a message of a client, on that port, ended in an exception, our bug: its request fails."""
        client = self._peer_at(port, link)
        if not isinstance(client, Client) or not frames:
            return []
        error = InternalError("the broker failed on this message; its log says why")
        return self._requests.fail_by_id(client, wire.request_id_of(frames[0]), error)

    # --- time and shutdown -----------------------------------------------------------------------

    def tick(self, now: float) -> list[Send]:
        """Time has passed: end overdue calls and sessions that fell silent, ask again for what did not come."""
        self._knowledge.tick(now)
        sends = [*self._requests.end_overdue(now), *self._sessions.end_silent(now)]
        asks = [send for worker in self._workers.by_id.values() for send in self._ask(worker, now)]
        warming = [] if self._requests.is_draining else self._requests.warm(now)
        return [*sends, *asks, *self._moves.tick(now), *self._sequences.take_late(), *warming]

    def take_news(self) -> list[News]:
        """What there is to log since the last time."""
        return self._journal.take()

    def take_spans(self) -> list[Span]:
        """What has ended since the last time, of what is traced."""
        return self._journal.take_spans()

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._requests.is_draining = True

    @property
    def inflight(self) -> int:
        return len(self._requests.calls)

    def farewell(self) -> list[Send]:
        """The last words: what is still in flight fails as retryable, and everybody hears that the broker leaves."""
        error = Draining("the broker is shutting down")
        sends = [send for call in self._requests.calls for send in self._requests.fail(call, error)]
        return [*sends, *self._sessions.say_goodbye()]

    def check(self) -> None:
        """Assert that the books agree with each other."""
        self._requests.calls.check()
        self._requests.streams.check()
        self._requests.demand.check()
        self._sessions.check()
        self._knowledge.check()
        self._sequences.check()
        self._moves.check()

    def _welcome(self, link: bytes, hello: m.WorkerHello, now: float, user_id: str) -> list[Send]:
        """Take a worker in; what it is to copy, or others from it, follows when it has told what it has."""
        before = self._workers.by_link.get(link)
        sends = self._sessions.welcome_worker(link, hello, now, user_id)
        worker = self._workers.by_link.get(link)
        if worker is None:
            return sends
        if worker is before:
            self._sequences.regained(worker)
            return sends
        return [*sends, *self._moves.changed(worker, now)]

    def _relay(self, sender: Worker, message: m.Relay, frames: Sequence[Buffer]) -> list[Send]:
        """Hand on what one worker says to another. If that one is gone its silence says so."""
        to = self._workers.by_id.get(message.worker_id)
        if to is None or to is sender or to.user_id != sender.user_id or not to.bulk_link:
            return []
        self._relayed += 1
        envelope = wire.encode(m.Relay(worker_id=sender.id, is_answer=message.is_answer))
        return [Send(Port.WORKER_BULK, to.bulk_link, [envelope, *frames])]

    def _ask(self, worker: Worker, now: float) -> list[Send]:
        """Ask a worker for what is missing of its reports."""
        after = self._knowledge.ask(worker, now)
        return [] if after is None else [to_worker(worker, m.AskNodes(after=after))]

    # --- garbage ---------------------------------------------------------------------------------

    def _garbage(self, link: bytes, frames: Sequence[Buffer], error: ProtocolError, now: float) -> list[Send]:
        """Whoever may be answered is, and that ends what is in flight under that id."""
        self._malformed += 1
        client = self._sessions.clients.get(link)
        if client is None:  # nobody before hello gets an answer, but for one who cannot say it so that we understand
            return [refuse_version(Port.CLIENT, link, error.detail)] if isinstance(error, UnsupportedVersion) else []
        if client.garbage.add(now) >= GARBAGE_PER_S:
            self._journal.news.append(News(f"a client sent {FLOOD} and is disconnected", is_bad=True))
            return [to_client(client, m.Goodbye(reason=FLOOD)), *self._sessions.close_client(client)]
        req_id = wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST
        return self._requests.fail_by_id(client, req_id, error)

    def _garbage_from_worker(self, link: bytes, error: ProtocolError, now: float) -> list[Send]:
        self._malformed += 1
        worker = self._workers.by_link.get(link)
        if worker is None:
            return [refuse_version(Port.WORKER, link, error.detail)] if isinstance(error, UnsupportedVersion) else []
        count = worker.garbage.add(now)
        if count == 1:
            self._journal.news.append(News(f"worker {worker.id} sent what cannot be read: {error}", is_bad=True))
        if count < GARBAGE_PER_S:
            return []
        return [to_worker(worker, m.Goodbye(reason=FLOOD)), *self._sessions.lose_worker(worker, f"sent {FLOOD}")]

    def _peer_at(self, port: Port, link: bytes) -> Client | Worker | None:
        match port:
            case Port.CLIENT:
                return self._sessions.clients.get(link)
            case Port.WORKER:
                return self._workers.by_link.get(link)
            case Port.CLIENT_BULK | Port.WORKER_BULK:
                return self._sessions.of_bulk_link(link)

    # --- figures ---------------------------------------------------------------------------------

    def cluster_stats(self, now: float, kind: m.QueryKind) -> ClusterStats:
        """The answer to a query."""
        workers = sorted(self._workers.by_id.values(), key=lambda worker: worker.id)
        full = kind is m.QueryKind.STATS
        return ClusterStats(
            healthy=not self._requests.is_draining and self._workers.can_serve(now),
            broker=self._broker_stats(now),
            workers=()
            if kind is m.QueryKind.HEALTH
            else tuple(self._knowledge.view(self._workers.view(worker, now, full=full), now) for worker in workers),
        )

    def _broker_stats(self, now: float) -> BrokerStats:
        return BrokerStats(
            incarnation=self._incarnation,
            state="draining" if self._requests.is_draining else "serving",
            policy=self._config.policy,
            uptime_s=round(now - self._started_at, 3),
            clients=len(self._sessions.clients),
            streams=len(self._requests.streams),
            inflight=self.inflight,
            requests=self._requests.arrived,
            failed=dict(self._requests.failed),
            routed=dict(self._requests.placement.routed),
            reasons=dict(self._requests.placement.reasons),
            pulls_ordered=self._requests.dispatch.pulls_ordered,
            malformed=self._malformed,
            unwelcome=self._unwelcome,
            peer_messages_relayed=self._relayed,
            workers_lost=self._sessions.workers_lost,
            indexed_nodes=self._knowledge.index.num_nodes,
            prompt_tokens=self._knowledge.hits.prompt_tokens,
            foreseen_tokens=self._knowledge.hits.foreseen_tokens,
            cached_tokens=self._knowledge.hits.cached_tokens,
            sequences=len(self._sequences),
            copied_sequences=self._moves.num_done,
            failed_copies=dict(self._moves.failed),
            waiting_copies=len(self._moves),
            warmed_prompts=self._requests.num_warmed,
            prompts_to_warm=len(self._requests.demand),
            moved_sequences=self._moves.num_moved,
            sequences_to_move=self._moves.num_to_move,
            pid=self.gauges.pid,
            version=self.gauges.version,
            rss_bytes=self.gauges.rss_bytes,
            loop_lag_ms=round(self.gauges.loop_lag_s * 1000, 3),
            refused_subscriptions=self.gauges.refused_subscriptions,
            dropped_sends=self.gauges.dropped_sends,
            queued_messages=self.gauges.queued_messages,
            tokens_relayed=self.gauges.tokens_relayed,
        )
