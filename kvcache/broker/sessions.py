"""Who may speak: sessions of clients and workers, from hello to silence.

Invariants
- a session has one link for control and at most one for bulk data, and a link has one session;
- of one worker id there is one live worker, that of the highest incarnation among those of one user;
- a session's end ends its calls, in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from bus import messages as m
from bus import wire
from bus.errors import Forbidden, UnsupportedVersion
from bus.limits import CHUNK_BYTES, MAX_INLINE_BYTES, MAX_PROMPT_BYTES, WINDOW_TOKENS
from kvcache.broker.journal import Journal, News
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Client, Worker, Workers
from kvcache.broker.requests import Requests
from kvcache.broker.sends import Port, Send, to_client, to_worker
from kvcache.config import BrokerConfig

MAX_TENSOR_BYTES = 4 << 30
DEAF_S = 0.5

Peer = TypeVar("Peer", Client, Worker)


class Sessions:
    """`incarnation` tells the broker's restarts apart; `new_id` makes 16 secret random bytes."""

    def __init__(
        self,
        config: BrokerConfig,
        workers: Workers,
        requests: Requests,
        knowledge: Knowledge,
        journal: Journal,
        *,
        incarnation: int,
        now: float,
        new_id: Callable[[], bytes],
    ) -> None:
        self.clients: dict[bytes, Client] = {}
        self.workers = workers
        self.workers_lost = 0
        self._journal = journal
        self._requests = requests
        self._knowledge = knowledge
        self._config = config
        self._incarnation = incarnation
        self._new_id = new_id
        self._by_secret: dict[bytes, Client | Worker] = {}
        self._by_bulk_link: dict[bytes, Client | Worker] = {}
        self._looked_at = now

    # --- joining ---------------------------------------------------------------------------------

    def welcome_client(self, link: bytes, hello: m.Hello, now: float, user_id: str) -> list[Send]:
        """Take a client in. Said again on the same link it changes nothing."""
        if hello.major != wire.MAJOR:
            return [refuse_version(Port.CLIENT, link, hello.major)]
        client, sends = self.clients.get(link), list[Send]()
        if client is None or client.instance != hello.instance:
            others = [c for c in self.clients.values() if (c.instance, c.user_id) == (hello.instance, user_id)]
            if any(other.hello > hello.number for other in others):
                return []  # said before what we have heard since, over a connection that has ended
            for other in others:
                sends += self.close_client(other)  # its connection came back as another link: it starts afresh
            if client is not None:
                sends += self.close_client(client)
            client = Client(link, self._new_id(), hello.instance, user_id, now, hello.number)
            self.clients[link] = client
            self._by_secret[client.session] = client
        return [*sends, to_client(client, self._welcome(client.session))]

    def welcome_worker(self, link: bytes, hello: m.WorkerHello, now: float, user_id: str) -> list[Send]:
        """Take a worker in, in the place of an earlier one of its id if it is the same user's."""
        if hello.major != wire.MAJOR:
            return [refuse_version(Port.WORKER, link, hello.major)]
        known, sends = self.workers.by_id.get(hello.worker_id), list[Send]()
        if known is not None and (known.user_id != user_id or known.hello.incarnation > hello.incarnation):
            error = Forbidden(f"worker id {hello.worker_id!r} is taken by a live worker; start this one under another")
            return [Send(Port.WORKER, link, [wire.encode(wire.failed(wire.NO_REQUEST, error))])]
        is_same = known is not None and known.hello.incarnation == hello.incarnation
        if known is None or known.link != link or not is_same:
            if known is not None and is_same and known.hello.number > hello.number:
                return []  # said before what we have heard since, over a connection that has ended
            if known is not None:
                sends += self.lose_worker(known, "replaced by a newer link")
            if (other := self.workers.by_link.get(link)) is not None:
                sends += self.lose_worker(other, "its link now speaks for another worker")
            lease_until = now + self._config.lease_ms / 1000
            known = Worker(
                link, self._new_id(), user_id, hello, now, lease_until, hello.state, now, hello.sequences == 0
            )
            known.first_call = self._requests.calls.next_number
            self._by_secret[known.session] = known
            self.workers.add(known)
            self._knowledge.joined(known, now)
            self._journal.news.append(News(f"worker {known.id} joined, {self.workers.num_ready} on the ring"))
        return [*sends, to_worker(known, self._welcome(known.session, known.first_call))]

    def attach(self, link: bytes, message: m.AttachBulk, kind: type[Client | Worker], user_id: str) -> bool:
        """Give a bulk connection to the session whose secret it knows; False if there is none."""
        owner = self._by_secret.get(message.session)
        if not isinstance(owner, kind) or owner.user_id != user_id:
            return False
        if (before := self._by_bulk_link.pop(link, None)) is not None:
            before.bulk_link = b""
        self._detach(owner)
        owner.bulk_link = link
        self._by_bulk_link[link] = owner
        return True

    def of_bulk_link(self, link: bytes) -> Client | Worker | None:
        """Whose bulk connection this is; None before `attach`."""
        return self._by_bulk_link.get(link)

    # --- staying ---------------------------------------------------------------------------------

    def renew(self, worker: Worker, beat: m.WorkerBeat, now: float) -> list[Send]:
        """A worker's beat: its lease runs on, and its state is what it says."""
        worker.beat = beat
        worker.lease_until = now + self._config.lease_ms / 1000
        if worker.state is not beat.state:
            worker.state = beat.state
            self.workers.changed()
        self._knowledge.told(worker, beat, now)
        return [to_worker(worker, m.BrokerBeat(beat=beat.beat, lease_ms=self._config.lease_ms))]

    def end_silent(self, now: float) -> list[Send]:
        """Part with whoever said nothing for too long. Time in which this process did not run does not count."""
        gap, self._looked_at = now - self._looked_at, now
        if gap > DEAF_S:
            peers: list[Client | Worker] = [*self.clients.values(), *self.workers.by_id.values()]
            for peer in peers:
                peer.heard_at = min(now, peer.heard_at + gap)
        sends: list[Send] = []
        for worker in _silent(self.workers.by_id.values(), self._config.worker_lost_ms, now):
            sends += self.lose_worker(worker, f"silent for {now - worker.heard_at:.2f} s")
        for client in _silent(self.clients.values(), self._config.client_lost_ms, now):
            sends += self.close_client(client)
        return sends

    # --- leaving ---------------------------------------------------------------------------------

    def close_client(self, client: Client) -> list[Send]:
        """Forget a client; whatever it had running stops."""
        self.clients.pop(client.link, None)
        self._by_secret.pop(client.session, None)
        self._detach(client)
        return self._requests.drop_client(client)

    def lose_worker(self, worker: Worker, why: str) -> list[Send]:
        """Forget a worker that went without a word; what it had in flight fails over."""
        self.workers_lost += 1
        self._journal.news.append(
            News(f"worker {worker.id} is lost ({why}), {len(worker.calls)} calls fail over", is_bad=True)
        )
        return self._part(worker, why)

    def release_worker(self, worker: Worker, reason: str) -> list[Send]:
        """Forget a worker that said goodbye; what it had in flight fails over."""
        self._journal.news.append(News(f"worker {worker.id} left ({reason}), {len(worker.calls)} calls fail over"))
        return self._part(worker, reason)

    def say_goodbye(self) -> list[Send]:
        """Tell everybody that the broker leaves."""
        goodbye = m.Goodbye(reason="the broker is shutting down")
        sends = [to_client(client, goodbye) for client in self.clients.values()]
        return [*sends, *(to_worker(worker, goodbye) for worker in self.workers.by_id.values())]

    def check(self) -> None:
        """Assert that each session is known by its link, its secret and its bulk link, and nobody else is."""
        workers = self.workers.by_id.values()
        peers: list[Client | Worker] = [*self.clients.values(), *workers]
        assert {id(peer) for peer in self._by_secret.values()} == set(map(id, peers))
        assert all(self._by_secret[peer.session] is peer for peer in peers)
        assert all(self.clients[client.link] is client for client in self.clients.values())
        assert {id(worker) for worker in self.workers.by_link.values()} == set(map(id, workers))
        assert all(self.workers.by_link[worker.link] is worker for worker in workers)
        attached = {peer.bulk_link: id(peer) for peer in peers if peer.bulk_link}
        assert {link: id(peer) for link, peer in self._by_bulk_link.items()} == attached
        assert set(self.workers.ring.workers) == {w.id for w in workers if w.state is m.WorkerState.READY}

    # --- details ---------------------------------------------------------------------------------

    def _part(self, worker: Worker, why: str) -> list[Send]:
        self.workers.remove(worker)
        self._by_secret.pop(worker.session, None)
        self._detach(worker)
        sends = self._requests.drop_worker(worker, why)
        self._knowledge.parted(worker)
        return sends

    def _detach(self, owner: Client | Worker) -> None:
        self._by_bulk_link.pop(owner.bulk_link, None)
        owner.bulk_link = b""

    def _welcome(self, session: bytes, first_call: int = 0) -> m.Welcome:
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
            first_call=first_call,
        )


def refuse_version(port: Port, link: bytes, theirs: int) -> Send:
    """What a peer of another major version hears, so that it need not guess why nobody answers."""
    error = UnsupportedVersion(
        f"protocol version {theirs} is not supported; this broker speaks {wire.MAJOR}.{wire.MINOR}"
    )
    return Send(port, link, [wire.encode(wire.failed(wire.NO_REQUEST, error))])


def _silent(peers: Iterable[Peer], limit_ms: int, now: float) -> list[Peer]:
    return [peer for peer in peers if now - peer.heard_at > limit_ms / 1000]
