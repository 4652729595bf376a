"""The broker against every order of events: whoever joins, asks, answers, falls silent or shouts, each request that
was accepted ends exactly once, the books agree after every step, and when everybody is gone nothing is left."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus import messages as m
from bus import wire
from kvcache.broker.sends import Port, Send
from tests.unit.kvcache.broker_driver import (
    PROMPT,
    USER,
    Driver,
    Heard,
    beat,
    done,
    frames_of,
    generate,
    hello,
    length,
    nodes_held,
    read,
    rid,
    worker_hello,
)

LINKS = st.integers(0, 2)
CHAIN = (b"node-one", b"node-two")
NUMBERS = st.integers(1, 6)  # an id of zeros means no request


def client_link(index: int) -> bytes:
    return b"client-%d" % index


def worker_link(index: int) -> bytes:
    return b"worker-%d" % index


class BrokerMachine(RuleBasedStateMachine):
    """What the model knows: which requests each client has asked that it was not yet told the end of."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(max_inflight=3)
        self.open: dict[bytes, set[bytes]] = {}  # link of a client -> its requests that have not ended
        self.assigned: dict[int, tuple[bytes, bytes, bytes]] = {}  # call -> worker's link, client's link, request
        self.streams: dict[bytes, list[bytes]] = {}
        self.incarnations = Counter[int]()

    def hear(self, heard: list[Heard]) -> None:
        """Take in what the broker sends, as the peers would. A delete is assigned to several workers."""
        for port, link, message, inner in heard:
            if isinstance(message, m.Assign):
                assert port is Port.WORKER
                asked = wire.decode(list(inner)).message
                client = next(c for c in self.open if message.client == instance_of(c))
                assert asked.req_id in self.open[client], "a request that nobody waits for was dispatched"
                self.assigned[message.call] = (link, client, asked.req_id)
            elif isinstance(message, m.KvDone | m.Failed) and message.req_id != wire.NO_REQUEST:
                self.end(link, message.req_id)
            elif isinstance(message, m.Release):
                self.assigned.pop(message.call, None)

    def end(self, link: bytes, req_id: bytes) -> None:
        assert req_id in self.open.get(link, set()), "an end for which nobody waits"
        self.open[link].remove(req_id)
        for call, (_, client, asked) in list(self.assigned.items()):
            if (client, asked) == (link, req_id):
                del self.assigned[call]

    @initialize()
    def all_join(self) -> None:
        for index in range(3):
            self.client_joins(index)
            self.worker_joins(index, index, newer=False)
            self.client_opens_a_stream(index)

    # --- clients ---------------------------------------------------------------------------------

    def client_joins(self, index: int) -> None:
        self.open.setdefault(client_link(index), set())
        self.streams.setdefault(client_link(index), [])
        self.hear(self.driver.client(client_link(index), hello(instance_of(client_link(index)))))

    @rule(index=LINKS, how=st.sampled_from(["joins", "joins", "leaves", "shouts", "is deaf"]))
    def client_comes_or_goes(self, index: int, how: str) -> None:
        link = client_link(index)
        match how:
            case "joins":
                self.client_joins(index)
            case "leaves":
                self.hear(self.driver.client(link, m.Goodbye(reason="")))
                self.forget_client(link)
            case "shouts":
                for _ in range(100):
                    self.hear(self.driver.client_frames(link, [b"garbage"]))
                self.forget_client(link)
            case "is deaf":
                for send in self.driver.core.on_client(link, frames_of(m.Beat(beat=1)), self.driver.now, USER):
                    self.hear(read(self.driver.core.on_unsent(send, is_gone=False)))
                self.forget_client(link)

    def forget_client(self, link: bytes) -> None:
        self.open.pop(link, None)
        self.streams.pop(link, None)

    @rule(index=LINKS, number=NUMBERS, seq=st.integers(0, 4), deadline_ms=st.sampled_from([0, 400, 60_000, 60_000]))
    def client_asks(self, index: int, number: int, seq: int, deadline_ms: int) -> None:
        self.ask(client_link(index), length(number, f"seq-{seq}", deadline_ms))

    @rule(index=LINKS, number=NUMBERS, seq=st.integers(0, 4), deadline_ms=st.sampled_from([0, 400, 60_000]))
    def client_deletes(self, index: int, number: int, seq: int, deadline_ms: int) -> None:
        message = m.Delete(req_id=rid(number), attempt=0, deadline_ms=deadline_ms, seq_id=f"seq-{seq}")
        self.ask(client_link(index), message)

    @rule(index=LINKS, number=NUMBERS, explain=st.booleans(), policy=st.sampled_from(["", "prefix"]))
    def client_generates(self, index: int, number: int, explain: bool, policy: str) -> None:
        """On a stream of its own, unless it has none left."""
        link = client_link(index)
        stream_id = self.streams[link].pop() if self.streams.get(link) else b"?" * 16
        self.ask(link, generate(stream_id, number, explain=explain, chain=CHAIN, policy=policy), PROMPT)

    def ask(self, link: bytes, message: m.Length | m.Delete | m.Generate, *payload: bytes) -> None:
        waits = self.open.get(link)
        if waits is not None and message.req_id in waits:  # refused, which says nothing of the one in flight
            (refusal,) = self.driver.client(link, message, *payload)
            assert isinstance(refusal.message, m.Failed)
            return
        if waits is not None:
            waits.add(message.req_id)
        heard = self.driver.client(link, message, *payload)
        assert waits is not None or heard == []
        self.hear(heard)

    @rule(index=LINKS)
    def client_opens_a_stream(self, index: int) -> None:
        for heard in self.driver.client(client_link(index), m.OpenStream(req_id=b"o" * 16)):
            assert isinstance(heard.message, m.StreamOpened)
            self.streams[client_link(index)].append(heard.message.stream_id)

    @rule(index=LINKS, number=NUMBERS, kind=st.sampled_from(["cancel", "ack", "resume", "credit"]))
    def client_follows_up(self, index: int, number: int, kind: str) -> None:
        follow_ups = {
            "cancel": m.Cancel(req_id=rid(number)),
            "ack": m.Ack(req_id=rid(number), epoch=0, upto=1),
            "resume": m.Resume(req_id=rid(number), epoch=0, from_seq=0),
            "credit": m.Credit(req_id=rid(number), chunks=1),
        }
        self.hear(self.driver.client(client_link(index), follow_ups[kind]))

    @rule(index=LINKS)
    def client_attaches_a_bulk_connection(self, index: int) -> None:
        """To whatever session it is: secrets count up here."""
        self.driver.client_bulk(b"bulk-%d" % index, m.AttachBulk(session=(index + 1).to_bytes(16, "big")))

    @rule(index=LINKS, number=NUMBERS)
    def client_sends_a_chunk(self, index: int, number: int) -> None:
        chunk = m.Chunk(req_id=rid(number), offset=0, payload=wire.describe([b"x"]))
        self.hear(self.driver.client_bulk(b"bulk-%d" % index, chunk, b"x"))

    # --- workers ---------------------------------------------------------------------------------

    def worker_joins(self, index: int, name: int, *, newer: bool) -> None:
        self.incarnations[name] += newer
        self.hear(self.driver.worker(worker_link(index), worker_hello(f"w{name}", self.incarnations[name])))

    @rule(index=LINKS, name=LINKS, how=st.sampled_from(["joins", "restarts", "leaves", "is gone"]))
    def worker_comes_or_goes(self, index: int, name: int, how: str) -> None:
        match how:
            case "joins" | "restarts":
                self.worker_joins(index, name, newer=how == "restarts")
            case "leaves":
                self.hear(self.driver.worker(worker_link(index), m.Goodbye(reason="")))
            case "is gone":
                send = Send(Port.WORKER, worker_link(index), [b""])
                self.hear(read(self.driver.core.on_unsent(send, is_gone=True)))

    @rule(index=LINKS, state=st.sampled_from(["ready", "ready", "draining"]))
    def worker_beats(self, index: int, state: str) -> None:
        self.hear(self.driver.worker(worker_link(index), beat(state=m.WorkerState(state))))

    @rule(data=st.data(), is_final=st.booleans())
    def worker_answers(self, data: st.DataObject, is_final: bool) -> None:
        if not self.assigned:
            return
        call = data.draw(st.sampled_from(sorted(self.assigned)))
        link, client, req_id = self.assigned[call]
        number = int.from_bytes(req_id, "little")
        is_open = req_id in self.open.get(client, set())
        answer: m.Message = done(number) if is_final else m.Credit(req_id=req_id, chunks=1)  # what it is, is not read
        heard = self.driver.reply(link, call, answer, final=is_final)
        assert len(heard) <= 1
        assert is_open or heard == []
        self.hear(heard)

    @rule(index=LINKS, call=st.integers(1, 30), num_tokens=st.integers(0, 9), num_cached=st.integers(0, 9))
    def worker_reports_a_first_token(self, index: int, call: int, num_tokens: int, num_cached: int) -> None:
        """Of a call of its own or not, once or again, with figures that make sense or not."""
        report = m.Prefilled(call=call, num_tokens=num_tokens, num_cached=num_cached, compute_ms=1.0)
        assert self.driver.worker(worker_link(index), report) == []

    @rule(index=LINKS, first=st.integers(1, 5), is_stored=st.booleans(), is_all=st.booleans())
    def worker_reports_nodes(self, index: int, first: int, is_stored: bool, is_all: bool) -> None:
        """In order or not; the nodes are those that clients ask for."""
        if is_all:
            heard = self.driver.worker(worker_link(index), nodes_held(*CHAIN, after=first), b"".join(CHAIN))
        else:
            runs = (m.NodeRun(USER, is_stored, len(CHAIN)),)
            payload = b"".join(CHAIN)
            changed = m.NodesChanged(first=first, runs=runs, payload=wire.describe([payload]))
            heard = self.driver.worker(worker_link(index), changed, payload)
        assert {type(it.message) for it in heard} <= {m.AskNodes}

    @rule(index=LINKS, call=st.integers(1, 30), is_final=st.booleans())
    def worker_answers_what_it_was_not_asked(self, index: int, call: int, is_final: bool) -> None:
        link, _, _ = self.assigned.get(call, (b"", b"", b""))
        if link == worker_link(index):
            return
        heard = self.driver.reply(worker_link(index), call, m.Credit(req_id=rid(0), chunks=1), final=is_final)
        assert heard == []

    # --- time ------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.5, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.hear(self.driver.tick(seconds))
        for link in list(self.open):  # who was silent for too long is forgotten without a word
            if self.driver.client(link, m.Beat(beat=1)) == []:
                self.forget_client(link)

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def the_books_agree(self) -> None:
        self.driver.core.check()

    @invariant()
    def every_request_in_flight_is_one_that_somebody_waits_for(self) -> None:
        """A delete is in flight once for each worker that has not answered."""
        requests = sum(map(len, self.open.values()))
        assert requests <= self.driver.core.inflight <= 3 * requests

    @invariant()
    def load_is_what_is_in_flight(self) -> None:
        views = self.driver.core.cluster_stats(self.driver.now, m.QueryKind.WORKERS).workers
        assert sum(view.inflight for view in views) == self.driver.core.inflight
        assert all(view.inflight <= 3 for view in views)

    def teardown(self) -> None:
        """Everybody falls silent: nothing may be left of them."""
        self.hear(self.driver.tick(5.0, step=0.5))
        self.driver.tick(125.0, step=0.5)
        self.driver.core.check()
        stats = self.driver.stats()
        assert (stats.clients, stats.streams, stats.inflight) == (0, 0, 0)


def instance_of(link: bytes) -> bytes:
    return link.ljust(16, b".")


BrokerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50)
TestBrokerMachine = BrokerMachine.TestCase
