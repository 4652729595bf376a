"""`kvcache bench bus`: what the protocol costs, against ZeroMQ without it.

Requests: a client process, a middle and an echoing worker, each a process, over TCP loopback. The middle
is nothing, `zmq.proxy` (C), or our broker, with the same bytes in the same number of frames; behind the
broker the worker reads each envelope and answers with a final `Reply`, as a real one does. Tokens: one
publisher, one subscriber, the middle `zmq.proxy` (XPUB/XSUB) or our broker.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from bus import messages as m
from bus import wire
from bus.endpoints import endpoints
from bus.topics import topic_of
from kvcache.bench import raw
from kvcache.bench.report import Report, Row, report, row
from kvcache.local import broker_process, free_url

Middle = Callable[[], AbstractContextManager[tuple[str, bool]]]
"""Opens a middle and what stands behind it: the clients' endpoint, and whether it speaks our protocol."""

WINDOW = 200
BURST = 400
TOPICS = (1, 100, 1000)


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Five runs, interleaved; `quick` makes each shorter, never fewer."""
    runs, trips, piped, tokens = 5, 500 if quick else 2000, 10_000 if quick else 40_000, 20_000 if quick else 100_000
    requests: dict[str, list[tuple[float, float]]] = {"direct": [], "proxy": [], "broker": []}
    relays: dict[tuple[str, int], list[float]] = {}
    for index in range(runs):
        progress(f"run {index + 1} of {runs}: requests")
        middles: dict[str, Middle] = {"direct": _direct, "proxy": _proxy, "broker": _broker}
        for name, middle in middles.items():
            requests[name].append(_measure(middle, trips, piped))
        for topics in TOPICS:
            progress(f"run {index + 1} of {runs}: tokens on {topics} topics")
            relays.setdefault(("proxy", topics), []).append(_relay_proxy(topics, tokens))
            relays.setdefault(("broker", topics), []).append(_relay_broker(topics, tokens))
    return report("bus", _rows(requests, relays))


def _rows(requests: dict[str, list[tuple[float, float]]], relays: dict[tuple[str, int], list[float]]) -> list[Row]:
    latency = {name: [p50 * 1e6 for p50, _ in figures] for name, figures in requests.items()}
    rate = {name: [per_s for _, per_s in figures] for name, figures in requests.items()}
    rows = [
        row("round trip p50, raw echo", latency["direct"], "us"),
        row("round trip p50, zmq.proxy", latency["proxy"], "us"),
        row(
            "round trip p50, broker",
            latency["broker"],
            "us",
            against=latency["proxy"],
            reference="zmq.proxy",
            goal=1.2,
            sense="<=",
        ),
        row("pipelined, raw echo", rate["direct"], "req/s"),
        row("pipelined, zmq.proxy", rate["proxy"], "req/s"),
        row("pipelined, broker", rate["broker"], "req/s", against=rate["proxy"], reference="zmq.proxy", goal=0.35),
        row("pipelined, broker", rate["broker"], "req/s", against=rate["direct"], reference="raw echo"),
    ]
    for topics in TOPICS:
        reference, ours = relays["proxy", topics], relays["broker", topics]
        name = f"token relay, {topics} topic{'s' if topics > 1 else ''}"
        rows.append(row(f"{name}, zmq.proxy", reference, "msg/s"))
        rows.append(
            row(f"{name}, broker", ours, "msg/s", against=reference, reference="zmq.proxy", goal=100_000, on="value")
        )
    return rows


def _measure(middle: Middle, trips: int, piped: int) -> tuple[float, float]:
    """(median seconds of a round trip, round trips per second pipelined)."""
    with middle() as (endpoint, is_ours):
        socket = raw.dealer(endpoint)
        if is_ours:
            raw.join(socket)
        messages = _requests()
        raw.round_trips(socket, messages, 50)
        p50 = statistics.median(raw.round_trips(socket, messages, trips))
        per_s = raw.pipelined(socket, messages, piped, WINDOW)
        socket.close()
        return p50, per_s


def _requests() -> list[list[bytes]]:
    """Ready-made requests with ids of their own, more than are ever in flight at once."""
    return [
        [
            wire.encode(
                m.Length(req_id=secrets.token_bytes(16), attempt=0, deadline_ms=60_000, seq_id=f"seq-{index}", layer=0)
            )
        ]
        for index in range(8 * WINDOW)
    ]


@contextmanager
def _direct() -> Iterator[tuple[str, bool]]:
    url = endpoints(free_url()).control
    with raw.process(raw.echo, url, False):
        yield url, False


@contextmanager
def _proxy() -> Iterator[tuple[str, bool]]:
    at = endpoints(free_url())
    with (
        raw.process(raw.request_forwarder, at.control, at.worker_control),
        raw.process(raw.echo, at.worker_control, True),
    ):
        yield at.control, False


@contextmanager
def _broker() -> Iterator[tuple[str, bool]]:
    with broker_process() as url, raw.process(raw.protocol_worker, endpoints(url).worker_control):
        yield endpoints(url).control, True


def _relay_proxy(num_topics: int, count: int) -> float:
    at = endpoints(free_url())
    topics = [topic_of(secrets.token_bytes(16)) for _ in range(num_topics)]
    with raw.process(raw.token_forwarder, at.streams, at.tokens), raw.process(raw.publisher, at.tokens) as pipe:
        socket = raw.subscriber(at.streams, topics)
        pipe.send(_tokens(topics))
        raw.settle(socket, pipe, num_topics)
        per_s = raw.delivered(socket, pipe, count, BURST)
        socket.close()
        return per_s


def _relay_broker(num_topics: int, count: int) -> float:
    with broker_process() as url:
        at = endpoints(url)
        with raw.process(raw.publisher, at.tokens) as pipe:
            control = raw.dealer(at.control)
            raw.join(control)
            topics = [topic_of(raw.open_stream(control)) for _ in range(num_topics)]
            socket = raw.subscriber(at.streams, topics)
            for _ in topics:
                raw.receive(socket)  # one SubAck for each
            pipe.send(_tokens(topics))
            raw.settle(socket, pipe, num_topics)
            per_s = raw.delivered(socket, pipe, count, BURST)
            socket.close()
            control.close()
            return per_s


def _tokens(topics: list[bytes]) -> list[list[bytes]]:
    message = wire.encode(m.StreamTokens(epoch=0, seq=17, tokens=(4242,), texts=(" token",)))
    return [[topic, message] for topic in topics]
