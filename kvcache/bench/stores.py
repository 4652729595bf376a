"""What a tensor store could be without us: three small servers, each a process, that keep the last thing put.

raw: zero-copy ZeroMQ frames, no checks at all, the fastest Python can move bytes over TCP. safetensors:
the same with a standard file format on both ends. http: base64 in JSON over HTTP/1.1 keep-alive, the way
of a plain microservice. The references of `bench tensors`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection

import numpy as np
import safetensors.numpy as st

from bus.endpoints import endpoints
from kvcache.bench import raw
from kvcache.bench.peers.contract import Bytes
from kvcache.bench.systems.stores import PlainStore
from kvcache.local import free_url

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class RawStore:
    """Payload frames as they are."""

    def __init__(self, endpoint: str) -> None:
        self._socket = raw.dealer(endpoint)

    def put(self, k: Bytes, v: Bytes) -> None:
        raw.exchange(self._socket, [b"put", k, v])

    def get(self) -> tuple[Bytes, Bytes]:
        k, v = raw.exchange(self._socket, [b"get"])
        return k, v


class SafetensorsStore:
    """One frame in the safetensors format."""

    def __init__(self, endpoint: str) -> None:
        self._socket = raw.dealer(endpoint)

    def put(self, k: Bytes, v: Bytes) -> None:
        tensors = {name: np.frombuffer(data, np.float32) for name, data in (("k", k), ("v", v))}
        raw.exchange(self._socket, [b"put", st.save(tensors)])

    def get(self) -> tuple[Bytes, Bytes]:
        tensors = st.load(bytes(raw.exchange(self._socket, [b"get"])[0]))
        return tensors["k"].data.cast("B"), tensors["v"].data.cast("B")


@contextmanager
def raw_store() -> Iterator[RawStore]:
    endpoint = endpoints(free_url()).control
    with raw.process(raw.keep_frames, endpoint, False):
        yield RawStore(endpoint)


@contextmanager
def forwarded_store() -> Iterator[RawStore]:
    """Raw frames over two hops, as ours go: `zmq.proxy`, in C, stands where our broker does."""
    at = endpoints(free_url())
    with (
        raw.process(raw.request_forwarder, at.control, at.worker_control),
        raw.process(raw.keep_frames, at.worker_control, True),
    ):
        yield RawStore(at.control)


@contextmanager
def safetensors_store() -> Iterator[SafetensorsStore]:
    endpoint = endpoints(free_url()).control
    with raw.process(keep_safetensors, endpoint):
        yield SafetensorsStore(endpoint)


@contextmanager
def http_store() -> Iterator[PlainStore]:
    place = endpoints(free_url()).control.removeprefix("tcp://")
    host, _, port = place.rpartition(":")
    with raw.process(keep_json, host, int(port)), closing(PlainStore(place)) as store:
        yield store


def keep_safetensors(pipe: Connection, endpoint: str) -> None:
    """Keeps tensors, as a cache would; not the bytes that happened to arrive."""

    def put(parts: list[memoryview]) -> dict[str, Array]:
        return st.load(bytes(parts[0]))

    def get(kept: dict[str, Array]) -> list[bytes]:
        return [st.save(kept)]

    raw.keep(pipe, endpoint, put, get)


def keep_json(pipe: Connection, host: str, port: int) -> None:
    """Keeps tensors too; encodes and decodes at each request."""
    kept: dict[str, Array] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's delayed acknowledgement

        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for name, tensor in body.items():
                kept[name] = np.frombuffer(base64.b64decode(tensor["data"]), np.float32).reshape(tensor["shape"])
            self._answer(b"{}")

        def do_GET(self) -> None:
            body = {n: {"shape": a.shape, "data": base64.b64encode(a.tobytes()).decode()} for n, a in kept.items()}
            self._answer(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line each."""

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer((host, port), Handler)
    pipe.send("ready")
    server.serve_forever()
