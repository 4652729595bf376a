"""A broker and workers as they are, with the wires between them, the clock and the faults in a test's hand.

Real cores on both sides; a message waits in its receiver's inbox until the receiver runs. A client that asks one
thing at a time keeps a history of what it asked, when, and what it was told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.stats import BrokerStats, EngineStats
from bus.tensors import DType, TensorMeta
from bus.wire import Buffer
from kvcache.broker.core import BrokerCore
from kvcache.broker.sends import Port, Send
from kvcache.config import BrokerConfig
from workers.calls import Action, Channel, ToCaller, ToPeer
from workers.calls import Send as WorkerSend
from workers.core import WorkerCore
from workers.engine_api import EngineFigures, NodesMoved
from workers.keys import SequenceKey
from workers.memory import HostMemory
from workers.nodes import NodeChange
from workers.relays import through_broker
from workers.store import KVStore

META = TensorMeta(DType.UINT8, (1, 1, 8))
PAGE = 64
WALL_S = 1_700_000_000
USER = "default"
TICK_S = 0.05
DONE = -1
RETRYABLE = {ErrorCode.WORKER_LOST, ErrorCode.NO_WORKERS, ErrorCode.OVERLOADED}


@dataclass(eq=False)
class Asked:
    """One request of the client, and its end: `answer` is the value that was read, or a code; None: none yet.

    values: all that was read, what was appended included. first: when it was asked for the first time, if this is
    another attempt.
    """

    kind: str
    seq_id: str
    value: int
    asked_at: int
    answer: int | ErrorCode | None = None
    values: tuple[int, ...] = ()
    first: int = 0

    @property
    def req_id(self) -> bytes:
        return self.first.to_bytes(16, "big")

    ended_at: int | None = None


class Peer:
    """One worker process. `frozen`: it does not run, and what is sent to it waits. Its name is its address."""

    def __init__(self, name: str, now: float, incarnation: int, num_pages: int) -> None:
        hello = m.WorkerHello(worker_id=name, incarnation=incarnation, major=wire.MAJOR, minor=0, peer_url=name)
        self.store = KVStore(HostMemory(num_pages * PAGE), PAGE)
        self.core = WorkerCore(hello, self.store, num_links=1, preloading=(), bulk_room=lambda link: 64, now=now)
        self.inbox: list[list[Buffer]] = []
        self.letters: list[tuple[str, bool, list[Buffer]]] = []  # of other workers: from whom, whether it is a request
        self.bulk: list[list[Buffer]] = []
        self.frozen = False

    @property
    def is_draining(self) -> bool:
        return self.core.state is m.WorkerState.DRAINING


class World:
    """`num_pages`: of the store of each worker that is started; a sequence takes two. busy: where requests wait.

    has_walls: whether no worker can reach another.
    """

    def __init__(self, names: Sequence[str], num_pages: int = 64) -> None:
        self.now = 100.0
        self.history: list[Asked] = []
        self.num_pages = num_pages
        self.busy: set[str] = set()
        self.has_walls = False
        self._broker_is_frozen = False
        self._to_broker: list[tuple[bytes, list[Buffer]]] = []  # while it is frozen
        self._steps = itertools.count(1)
        self._waiting: dict[bytes, Asked] = {}
        self._incarnations = itertools.count(1)
        self.broker = self._new_broker()
        self.workers = {name: self._new_worker(name) for name in names}
        self.run(2.0)

    def watch(self, seq_id: str, seconds: float) -> list[int | ErrorCode | None]:
        """Read all the while, between any two things that time brings about; returns what was read."""
        read = []
        for _ in range(round(seconds / TICK_S)):
            asked = self.ask("get", seq_id)
            self.settle()
            read.append(asked.answer)
            self.run(TICK_S)
        return read

    def owner(self, seq_id: str) -> str:
        """Who serves it now."""
        return self._route(seq_id).worker_id

    def why(self, seq_id: str) -> str:
        """Why it is served there."""
        return self._route(seq_id).reason

    def read(self, seq_id: str) -> tuple[int, ...]:
        """All that is stored of it."""
        asked = self.ask("get", seq_id)
        self.settle()
        return asked.values

    def stats(self) -> BrokerStats:
        return self.broker.cluster_stats(self.now, m.QueryKind.STATS).broker

    def hold(self, name: str, nodes: Iterable[bytes]) -> None:
        """A worker has computed prompts with these nodes."""
        changes = tuple(NodeChange(USER, node, True) for node in nodes)
        self._from_worker(name, self.workers[name].core.on_engine(NodesMoved(changes), self.now))

    def indexed(self) -> dict[str, tuple[str, int]]:
        """Of each worker, how well its prompts are known and how many nodes of them."""
        views = self.broker.cluster_stats(self.now, m.QueryKind.STATS).workers
        return {view.worker_id: (view.index, view.indexed_nodes) for view in views}

    def _route(self, seq_id: str) -> m.Routed:
        route = m.Route(req_id=b"r" * 16, seq_id=seq_id)
        (send,) = self.broker.on_client(b"client", [wire.encode(route)], self.now, USER)
        routed = wire.decode([bytes(frame) for frame in send.frames]).message
        assert isinstance(routed, m.Routed), routed
        return routed

    def copies(self, seq_id: str) -> set[str]:
        """The workers that have it stored."""
        key = SequenceKey(USER, seq_id)
        return {name for name, peer in self.workers.items() if peer.store.has(key)}

    def is_pinned(self, seq_id: str) -> bool:
        """Whether every worker that has it stored keeps it from eviction."""
        key = SequenceKey(USER, seq_id)
        return all(self.workers[name].store.pinned_s(key, self.now) is not None for name in self.copies(seq_id))

    def stored(self, seq_id: str) -> set[bytes]:
        """What is in the copies that there are: of copies that are alike, one value."""
        found = set()
        for name in self.copies(seq_id):
            store = self.workers[name].store
            read = store.open_read(SequenceKey(USER, seq_id), 0)
            found.add(b"".join(bytes(piece) for _, piece in store.chunks(read, PAGE)))
            store.close_read(read)
        return found

    def copies_on(self, name: str) -> int:
        """How many sequences a worker has stored."""
        return self.workers[name].store.stats(self.now).sequences

    def join(self, name: str) -> None:
        """A worker is started, and joins before any time has passed."""
        self.workers[name] = self._new_worker(name)
        self._tick(name)
        self.settle()

    # --- faults ---

    def kill(self, name: str) -> None:
        """The process ends with all that it had, and another is started in its place."""
        self.workers[name] = self._new_worker(name)
        self._perform(self.broker.on_unsent(Send(Port.WORKER, name.encode(), [b""]), is_gone=True))

    def drain(self, name: str) -> None:
        """The worker is told to leave, and does when it has nothing more to do."""
        self._from_worker(name, self.workers[name].core.drain(self.now))

    def cut(self, name: str) -> None:
        """What other workers have sent to this one is lost."""
        self.workers[name].letters.clear()

    def freeze(self, name: str) -> None:
        self.workers[name].frozen = True

    def thaw(self, name: str) -> None:
        self.workers[name].frozen = False

    def freeze_broker(self) -> None:
        self._broker_is_frozen = True

    def thaw_broker(self) -> None:
        """It goes on, and reads what has come meanwhile."""
        self._broker_is_frozen = False
        letters, self._to_broker = self._to_broker, []
        for link, frames in letters:
            self._perform(self.broker.on_worker(link, frames, self.now, USER))

    def restart_broker(self) -> None:
        self._waiting.clear()
        self._broker_is_frozen = False
        self._to_broker.clear()
        self.broker = self._new_broker()
        for peer in self.workers.values():
            peer.inbox.clear()

    # --- the client ---

    def ask(self, kind: str, seq_id: str, value: int = 0, *, rf: int = 1, again: Asked | None = None) -> Asked:
        """Send a request; its answer comes as the world runs. again: what this is another attempt of."""
        asked = Asked(kind, seq_id, value, next(self._steps))
        asked.first = asked.asked_at if again is None else again.first
        req_id = asked.req_id
        self.history.append(asked)
        self._waiting[req_id] = asked
        head: dict[str, Any] = {"req_id": req_id, "attempt": 0, "deadline_ms": 60_000, "seq_id": seq_id}
        message: m.Message
        data: list[bytes] = []
        match kind:
            case "put":
                data = [value.to_bytes(8, "big")] * 2
                message = m.Put(**head, layer=0, k=META, v=META, payload=wire.describe(data), rf=rf)
            case "append":
                data = [value.to_bytes(8, "big")] * 2
                message = m.Append(**head, layer=0, k=META, v=META, at=None, payload=wire.describe(data), rf=rf)
            case "get":
                message = m.Get(**head, layer=0)
            case "pin":
                message = m.Pin(**head, ttl_ms=0)
            case "unpin":
                message = m.Unpin(**head)
            case _:
                message = m.Delete(**head)
        self._perform(self.broker.on_client(b"client", [wire.encode(message), *data], self.now, USER))
        return asked

    def tell(
        self, kind: str, seq_id: str, value: int = 0, *, rf: int = 1, seconds: float = 3.0
    ) -> int | ErrorCode | None:
        """Ask again and again, as a client does, for as long as that may help."""
        until = self.now + seconds
        while True:
            asked = self.ask(kind, seq_id, value, rf=rf)
            self.settle()
            if asked.answer not in {None, *RETRYABLE} or self.now >= until:
                return asked.answer
            self.run(TICK_S)

    def append(
        self, seq_id: str, value: int, *, rf: int = 1, seconds: float = 5.0, first: Asked | None = None
    ) -> int | ErrorCode | None:
        """Add to its end, whatever that is; tried again under one id, for as long as that may help. first: as `again`
        of `ask`."""
        asked, until = self.ask("append", seq_id, value, rf=rf, again=first), self.now + seconds
        first = first or asked
        while True:
            self.settle()
            if asked.answer not in {None, *RETRYABLE} or self.now >= until:
                return asked.answer
            self.run(TICK_S)
            if asked.answer is not None or asked.req_id not in self._waiting:
                asked = self.ask("append", seq_id, value, rf=rf, again=first)

    # --- time ---

    def settle(self) -> None:
        """Deliver what is on its way, without letting time pass."""
        while any((peer.inbox or peer.letters or peer.bulk) and not peer.frozen for peer in self.workers.values()):
            for name in list(self.workers):
                self.deliver(name, 100)

    def deliver(self, name: str, count: int) -> None:
        """Let a worker read so many of its messages."""
        peer = self.workers.get(name)
        if peer is None or peer.frozen:
            return
        letters, peer.letters = peer.letters[:count], peer.letters[count:]
        for other, is_request, frames in letters:
            if is_request:
                self._from_worker(name, peer.core.on_peer_request(other.encode(), frames, self.now))
            else:
                self._from_worker(name, peer.core.on_peer_answer(other, frames, self.now))
        pieces, peer.bulk = peer.bulk[:count], peer.bulk[count:]
        for frames in pieces:
            self._from_worker(name, peer.core.on_bulk(0, frames, self.now))
        taken, peer.inbox = peer.inbox[:count], peer.inbox[count:]
        for frames in taken:
            self._from_worker(name, peer.core.on_control(0, frames, self.now))

    def run(self, seconds: float, *, settles: bool = True) -> None:
        """Let time pass, and everybody who is not frozen do what time brings about. settles: and read what has come."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            if not self._broker_is_frozen:
                self._perform(self.broker.tick(self.now))
                self._perform(self.broker.on_client(b"client", [wire.encode(m.Beat(beat=1))], self.now, USER))
            for name, peer in list(self.workers.items()):
                if peer.core.is_drained and not peer.frozen:
                    self._from_worker(name, peer.core.farewell())
                    del self.workers[name]
                elif not peer.frozen:
                    self._tick(name)
            if settles:
                self.settle()

    def check(self) -> None:
        self.broker.check()
        for peer in self.workers.values():
            peer.store.check()

    # --- details ---

    def _tick(self, name: str) -> None:
        figures = EngineFigures(engine=EngineStats(waiting=int(name in self.busy)))
        self._from_worker(name, self.workers[name].core.tick(figures, self.now, rss_bytes=0, lag_s=0.0))

    def _new_broker(self) -> BrokerCore:
        wall_ns = int((WALL_S + self.now) * 1e9)
        broker = BrokerCore(BrokerConfig(), incarnation=wall_ns, now=self.now)
        hello = m.Hello(instance=bytes(16), major=wire.MAJOR, minor=0, software="")
        broker.on_client(b"client", [wire.encode(hello)], self.now, USER)
        return broker

    def _new_worker(self, name: str) -> Peer:
        return Peer(name, self.now, next(self._incarnations), self.num_pages)

    def _from_worker(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, WorkerSend) and action.channel is Channel.CONTROL:
                if self._broker_is_frozen:
                    self._to_broker.append((name.encode(), list(action.frames)))
                    continue
                self._perform(self.broker.on_worker(name.encode(), list(action.frames), self.now, USER))
            elif isinstance(action, WorkerSend):
                self._perform(self.broker.on_worker_bulk(b"bulk " + name.encode(), list(action.frames), self.now, USER))
            elif isinstance(action, ToPeer | ToCaller) and (relay := through_broker(action)) is not None:
                self._from_worker(name, [relay])
            elif isinstance(action, ToPeer):
                self._post(name, action.url, list(action.frames), is_request=True)
            elif isinstance(action, ToCaller):
                self._post(name, action.peer.decode(), list(action.frames), is_request=False)

    def _post(self, name: str, to: str, frames: list[Buffer], *, is_request: bool) -> None:
        if to in self.workers and not self.has_walls:
            self.workers[to].letters.append((name, is_request, frames))

    def _perform(self, sends: list[Send]) -> None:
        for send in sends:
            if send.port is Port.WORKER and send.link.decode() in self.workers:
                self.workers[send.link.decode()].inbox.append([bytes(frame) for frame in send.frames])
            elif send.port is Port.WORKER_BULK and (peer := self.workers.get(send.link.decode()[len("bulk ") :])):
                peer.bulk.append([bytes(frame) for frame in send.frames])
            elif send.port is Port.CLIENT:
                self._answered(wire.decode([bytes(frame) for frame in send.frames]))

    def _answered(self, decoded: wire.Decoded) -> None:
        message = decoded.message
        asked = self._waiting.pop(getattr(message, "req_id", b""), None)
        if asked is None:
            return
        asked.ended_at = next(self._steps)
        if isinstance(message, m.KvValue):
            k = bytes(decoded.payload[0])
            asked.values = tuple(int.from_bytes(k[at : at + 8], "big") for at in range(0, len(k), 8))
            asked.answer = asked.values[0]
        elif isinstance(message, m.Failed):
            asked.answer = ErrorCode(message.code)
        else:
            asked.answer = DONE


def stale(history: Sequence[Asked], read: Asked) -> Asked | None:
    """What makes the answer of a read stale: a change that was acknowledged before the read was asked, and asked after
    the value that was read had been acknowledged. None if the answer is right."""
    assert read.kind == "get"
    source = next(one for one in history if one.kind == "put" and one.value == read.answer)
    if source.ended_at is None or source.answer != DONE:
        return None
    for other in history:
        if (
            other.kind in {"put", "append", "delete"}
            and other.seq_id == read.seq_id
            and other.answer == DONE
            and other.ended_at is not None
            and other.asked_at > source.ended_at
            and other.ended_at < read.asked_at
        ):
            return other
    return None
