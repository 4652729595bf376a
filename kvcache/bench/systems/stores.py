"""Stores of keys and values: ours, the plain microservices', and those that have an environment of their own."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from typing import Any

import numpy as np

from kvcache.bench.peers.contract import TOKEN_BYTES, Bytes
from kvcache.client import Client

HEADS, HEAD_DIM = 3, 64
SEQUENCE, LAYER = "bench", 0
CALL_S = 60.0


class OurStore:
    """The KV plane behind a broker."""

    def __init__(self, client: Client) -> None:
        self._kv = client.kv

    def put(self, k: Bytes, v: Bytes) -> None:
        self._kv.put(SEQUENCE, LAYER, _tokens(k), _tokens(v))

    def get(self) -> tuple[Bytes, Bytes]:
        pair = self._kv.get(SEQUENCE, LAYER)
        return pair.k.data.cast("B"), pair.v.data.cast("B")

    def append(self, k: Bytes, v: Bytes) -> None:
        self._kv.append(SEQUENCE, LAYER, _tokens(k), _tokens(v))


class PlainStore:
    """Tensors as base64 in JSON over HTTP, through a gateway; the connection is kept."""

    def __init__(self, place: str) -> None:
        self._connection = http.client.HTTPConnection(place, timeout=CALL_S)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def put(self, k: Bytes, v: Bytes) -> None:
        self._ask("PUT", {"k": _encoded(k), "v": _encoded(v)})

    def get(self) -> tuple[Bytes, Bytes]:
        told = self._ask("GET", None)
        return base64.b64decode(told["k"]["data"]), base64.b64decode(told["v"]["data"])

    def append(self, k: Bytes, v: Bytes) -> None:
        self._ask("POST", {"k": _encoded(k), "v": _encoded(v)})

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, body: dict[str, Any] | None) -> dict[str, Any]:
        sent = b"" if body is None else json.dumps(body).encode()
        self._connection.request(method, f"/kv/{SEQUENCE}/{LAYER}", sent, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        told = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"the plain store answered {answer.status}: {told[:200]!r}")
        return dict(json.loads(told))


def _tokens(data: Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.frombuffer(data, np.float32).reshape(-1, HEADS, HEAD_DIM)


def _encoded(data: Bytes) -> dict[str, Any]:
    shape = [len(data) // TOKEN_BYTES, HEADS, HEAD_DIM]
    return {"dtype": "float32", "shape": shape, "data": base64.b64encode(data).decode()}
