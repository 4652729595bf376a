"""Plain zmq sockets, as libzmq makes them: these tests are about it, not about ours."""

from __future__ import annotations

import select
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

WAIT_S = 5.0


class Sockets:
    """Makes sockets that are closed with the test."""

    def __init__(self, folder: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._made: list[zmq.Socket[bytes]] = []
        self.address = f"ipc://{Path(folder) / 's'}"

    def bound(self, kind: int, **options: int | bytes) -> zmq.Socket[bytes]:
        socket = self._make(kind, options)
        socket.bind(self.address)
        return socket

    def connected(self, kind: int, **options: int | bytes) -> zmq.Socket[bytes]:
        socket = self._make(kind, options)
        socket.connect(self.address)
        return socket

    def close(self) -> None:
        for socket in self._made:
            socket.close(0)
        self._context.term()

    def _make(self, kind: int, options: dict[str, int | bytes]) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        self._made.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        return socket


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    with tempfile.TemporaryDirectory() as folder:
        made = Sockets(folder)
        yield made
        made.close()


def receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    """The next message, which must come."""
    assert socket.poll(int(WAIT_S * 1000)), "nothing came"
    return socket.recv_multipart()


def drain(socket: zmq.Socket[bytes], quiet_ms: int = 50) -> list[list[bytes]]:
    """All messages until none has come for a while."""
    messages = []
    while socket.poll(quiet_ms):
        messages.append(socket.recv_multipart())
    return messages


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something holds that libzmq does in its own thread and tells nobody."""
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.002)


def events(socket: zmq.Socket[bytes]) -> int:
    """What libzmq says is possible now; to ask makes it take in what has arrived."""
    return int(socket.getsockopt(zmq.EVENTS))


def rings(socket: zmq.Socket[bytes]) -> bool:
    """Whether the socket's descriptor is readable, which is all that an event loop sees."""
    return bool(select.select([socket.fileno()], [], [], 0)[0])


def error_of(send: Callable[[], object]) -> int | None:
    """The errno that a send ends in; None if it is taken."""
    try:
        send()
    except zmq.ZMQError as error:
        return error.errno
    return None
