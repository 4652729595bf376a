"""What the plain microservices share: tensors as base64 in JSON, and calls from one service to the next.

Connections between services are kept open, so that what is measured is the way of working and not TCP's handshakes.
"""

from __future__ import annotations

import base64
import http.client
import json
import select
import socket
import threading
from typing import Any

import numpy as np

CALL_S = 600


def encode(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A tensor as JSON: its dtype's name, its shape, and its bytes as base64."""
    data = base64.b64encode(np.ascontiguousarray(array).data).decode()
    return {"dtype": str(array.dtype), "shape": array.shape, "data": data}


def decode(tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Raises ValueError, KeyError or TypeError for what `encode` cannot have made."""
    return np.frombuffer(base64.b64decode(tensor["data"]), tensor["dtype"]).reshape(tensor["shape"])


class Connections:
    """To other services, kept open between calls; for all threads of a service."""

    def __init__(self) -> None:
        self._idle: dict[str, list[http.client.HTTPConnection]] = {}
        self._turn = threading.Lock()

    def call(self, place: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One request to another service, at `HOST:PORT`: (status, body). Raises OSError, HTTPException."""
        connection = self._kept(place) or connect(place)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = answer.status, answer.read()
        except BaseException:
            connection.close()
            raise
        with self._turn:
            self._idle.setdefault(place, []).append(connection)
        return told

    def _kept(self, place: str) -> http.client.HTTPConnection | None:
        """One that the other end has not closed meanwhile, as servers do after some seconds: that can be read."""
        with self._turn:
            while idle := self._idle.get(place):
                connection = idle.pop()
                if not select.select([connection.sock], [], [], 0)[0]:
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        with self._turn:
            for connection in (each for idle in self._idle.values() for each in idle):
                connection.close()
            self._idle.clear()


def connect(place: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(place, timeout=CALL_S)
    connection.connect()
    # Head and body go out as two packets, the second of which would wait 40 ms for an acknowledgement of the first.
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def dumps(value: Any) -> bytes:  # noqa: ANN401 (any JSON)
    return json.dumps(value).encode()
