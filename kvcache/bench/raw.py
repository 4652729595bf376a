"""What ZeroMQ does without us: echo peers, forwarders and publishers, each a process of its own.

The references of `bench bus` and `bench tensors`. This is the one file beside `bus.sockets` that
imports zmq, because a reference must not go through the code it is compared with.
"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

import zmq

from bus import messages as m
from bus import wire

_spawn = multiprocessing.get_context("spawn")
Frames = Sequence[bytes]
T = TypeVar("T")

ANSWER_MS = 5000


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[Connection]:
    """Run `target(pipe, *args)` in a fresh interpreter; yields our end of the pipe after it said that it is ready."""
    ours, theirs = _spawn.Pipe()
    child = _spawn.Process(target=target, args=(theirs, *args), daemon=True)
    child.start()
    try:
        if not ours.poll(30) or ours.recv() != "ready":
            raise RuntimeError(f"{target.__name__} did not start")
        yield ours
    finally:
        child.terminate()
        child.join()


def echo(pipe: Connection, endpoint: str, connect: bool) -> None:
    """Send everything back: bound as a ROUTER (direct), or connected as a DEALER (behind a forwarder)."""
    socket = zmq.Context().socket(zmq.DEALER if connect else zmq.ROUTER)
    _limits(socket)
    (socket.connect if connect else socket.bind)(endpoint)
    pipe.send("ready")
    while True:
        socket.send_multipart(socket.recv_multipart())


def forwarder(pipe: Connection, front: str, back: str, kinds: tuple[int, int]) -> None:
    """`zmq.proxy`, in C, between two bound sockets."""
    context = zmq.Context()
    sockets = [context.socket(kind) for kind in kinds]
    for socket, endpoint in zip(sockets, (front, back), strict=True):
        _limits(socket)
        socket.bind(endpoint)
    pipe.send("ready")
    zmq.proxy(*sockets)


def keep(
    pipe: Connection,
    endpoint: str,
    put: Callable[[list[memoryview]], T],
    get: Callable[[T], Sequence[bytes | memoryview]],
    connect: bool = False,
) -> None:
    """A server that keeps one thing: what `put` makes of the frames that came, given out as `get` makes it."""
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER if connect else zmq.ROUTER)
    _limits(socket)
    (socket.connect if connect else socket.bind)(endpoint)
    pipe.send("ready")
    kept: T | None = None
    while True:
        peer, verb, *frames = socket.recv_multipart(copy=False)
        if verb.bytes == b"put":
            kept = put([frame.buffer for frame in frames])
            socket.send_multipart([peer.bytes, b"ok"])
        elif kept is not None:
            socket.send_multipart([peer.bytes, *get(kept)], copy=False)


def keep_frames(pipe: Connection, endpoint: str, connect: bool) -> None:
    """Keeps what libzmq received, without looking at it. `connect`: behind a forwarder."""
    keep(pipe, endpoint, lambda frames: frames, lambda kept: kept, connect)


def exchange(socket: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> list[memoryview]:
    """One request and its answer, neither copied in Python."""
    socket.send_multipart(frames, copy=False)
    return [frame.buffer for frame in socket.recv_multipart(copy=False)]


def request_forwarder(pipe: Connection, front: str, back: str) -> None:
    forwarder(pipe, front, back, (zmq.ROUTER, zmq.DEALER))


def token_forwarder(pipe: Connection, front: str, back: str) -> None:
    forwarder(pipe, front, back, (zmq.XPUB, zmq.XSUB))


def publisher(pipe: Connection, endpoint: str) -> None:
    """On each `(frames, count)` from the pipe, publish `count` messages, going through `frames` in turn."""
    socket = zmq.Context().socket(zmq.PUB)
    _limits(socket)
    socket.connect(endpoint)
    pipe.send("ready")
    batch: list[Frames] = []
    while True:
        order = pipe.recv()
        if isinstance(order, list):
            batch = order
            continue
        for index in range(order):
            socket.send_multipart(batch[index % len(batch)])


def protocol_worker(pipe: Connection, endpoint: str) -> None:
    """A worker that does nothing but what the protocol asks of one: joins, beats, and ends each call with a reply."""
    socket = dealer(endpoint)
    socket.send(wire.encode(m.WorkerHello(worker_id="bench", incarnation=1, major=wire.MAJOR, minor=wire.MINOR)))
    receive(socket)
    beat = wire.encode(
        m.WorkerBeat(
            beat=1, state=m.WorkerState.READY, running=0, waiting=0, progress=0, kv_used_bytes=0, kv_total_bytes=0
        )
    )
    answer = wire.encode(m.KvDone(req_id=bytes(16), length=1))
    pipe.send("ready")
    socket.setsockopt(zmq.RCVTIMEO, 200)
    calls = 0
    while True:
        try:
            envelope = wire.decode_header(socket.recv_multipart()[0])
        except zmq.Again:
            socket.send(beat)
            continue
        if isinstance(envelope, m.Assign):
            calls += 1
            socket.send_multipart([wire.encode(m.Reply(call=envelope.call, final=True)), answer])
        if calls % 1000 == 0:
            socket.send(beat)


def join(socket: zmq.Socket[bytes]) -> None:
    """Say hello to a broker as a client and wait for its welcome."""
    socket.send(
        wire.encode(m.Hello(instance=secrets.token_bytes(16), major=wire.MAJOR, minor=wire.MINOR, software="bench"))
    )
    receive(socket)


def open_stream(socket: zmq.Socket[bytes]) -> bytes:
    socket.send(wire.encode(m.OpenStream(req_id=secrets.token_bytes(16))))
    return bytes(wire.decode(receive(socket)).message.stream_id)


def dealer(endpoint: str) -> zmq.Socket[bytes]:
    """A plain client socket, for a process that does nothing else."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    _limits(socket)
    socket.connect(endpoint)
    return socket


def subscriber(endpoint: str, topics: Sequence[bytes]) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    _limits(socket)
    socket.connect(endpoint)
    for topic in topics:
        socket.setsockopt(zmq.SUBSCRIBE, topic)
    return socket


def round_trips(socket: zmq.Socket[bytes], messages: Sequence[Frames], count: int) -> list[float]:
    """Seconds of `count` round trips, one after the other."""
    times = []
    for index in range(count):
        start = time.perf_counter()
        socket.send_multipart(messages[index % len(messages)])
        socket.recv_multipart()
        times.append(time.perf_counter() - start)
    return times


def pipelined(socket: zmq.Socket[bytes], messages: Sequence[Frames], count: int, window: int) -> float:
    """Round trips per second with `window` of them in flight."""
    sent = received = 0
    start = time.perf_counter()
    while received < count:
        while sent < count and sent - received < window:
            socket.send_multipart(messages[sent % len(messages)])
            sent += 1
        socket.poll()
        received += sum(1 for _ in _waiting(socket))
    return count / (time.perf_counter() - start)


def delivered(socket: zmq.Socket[bytes], pipe: Connection, count: int, burst: int) -> float:
    """Published messages per second that reach `socket`, at most two bursts of them under way (fewer than a HWM)."""
    ordered = received = 0
    start = time.perf_counter()
    while received < count:
        while ordered < count and ordered - received <= burst:
            pipe.send(burst)
            ordered += burst
        if not socket.poll(ANSWER_MS):
            raise RuntimeError(f"published messages were lost: {received} of {ordered} arrived")
        received += sum(1 for _ in _waiting(socket))
    return received / (time.perf_counter() - start)


def settle(socket: zmq.Socket[bytes], pipe: Connection, num_topics: int) -> None:
    """Publish until every topic's subscription has reached the publisher, then let the pipes run empty."""
    seen = set[bytes]()
    for _ in range(100):
        pipe.send(num_topics)
        while socket.poll(50):
            seen.add(socket.recv_multipart()[0])
        if len(seen) == num_topics:
            return
    raise RuntimeError(f"only {len(seen)} of {num_topics} topics reach their subscriber")


def receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    """One message. Raises RuntimeError when none comes."""
    if not socket.poll(ANSWER_MS):
        raise RuntimeError("no answer within the time allowed")
    return socket.recv_multipart()


def _waiting(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    try:
        while True:
            yield socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return


def _limits(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 4000)
    socket.setsockopt(zmq.RCVHWM, 4000)
