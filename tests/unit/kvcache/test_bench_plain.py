"""The plain microservices that the peer benchmark compares with: they must do their work right to be a fair rival."""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import uvicorn

from kvcache.bench.peers.contract import TOKEN_BYTES, measure_store
from kvcache.bench.systems.asking import by_http
from kvcache.bench.systems.contestants import SCRIPTS
from kvcache.bench.systems.stores import PlainStore
from kvcache.bench.tiny_model import save_tiny_model
from kvcache.local import free_url, wait_for_port

PROMPT = [5, 17, 300, 8, 44]


class Service:
    """One of the services, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        self.place = free_url().removeprefix("tcp://")
        host, _, port = self.place.rpartition(":")
        config = uvicorn.Config(app, host=host, port=int(port), log_config=None, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_for_port(f"tcp://{self.place}")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="module")
def gateway(model: Path) -> Iterator[str]:
    """Where all three services, on one tiny model, are asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        made = {name: importlib.import_module(f"plain_{name}") for name in ("worker", "coordinator", "gateway")}
    threads = torch.get_num_threads()
    services = [Service(made["worker"].make_app(made["worker"].Generator(str(model), threads, "float32")))]
    services.append(Service(made["coordinator"].make_app([services[0].place])))
    connections = importlib.import_module("plain_wire").Connections()
    services.append(Service(made["gateway"].make_app(services[1].place, connections)))
    yield services[-1].place
    connections.close()
    for service in reversed(services):
        service.stop()


async def complete(gateway: str, body: bytes) -> str:
    """All that comes."""
    host, _, port = gateway.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(30):
        came = (await reader.read()).decode()
    writer.close()
    return came


async def test_it_generates_what_transformers_generates(gateway: str, model: Path) -> None:
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    ids = reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    words = [f"t{number}" for number in ids[0, len(PROMPT) :].tolist()]
    body = b'{"prompt": [5, 17, 300, 8, 44], "max_tokens": 12, "ignore_eos": true}'
    came = await complete(gateway, body)
    assert [line.split('"text": "')[1].split('"')[0] for line in came.splitlines() if '"text"' in line] == words


async def test_the_benchmarks_client_reads_it_also_many_at_once(gateway: str) -> None:
    answers = await asyncio.gather(*(by_http(gateway, "m")([*PROMPT, number], 6) for number in range(8)))
    assert [(answer.failure, answer.num_tokens) for answer in answers] == [("", 6)] * 8


async def test_what_is_no_request_is_refused(gateway: str) -> None:
    assert "HTTP/1.1 400" in await complete(gateway, b'{"max_tokens": 3}')


def test_a_connection_that_was_closed_meanwhile_is_not_used_again(gateway: str) -> None:
    """As after five idle seconds, or when all of a system has been stopped for a while."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        connections = importlib.import_module("plain_wire").Connections()

        answered, closed = threading.Event(), threading.Event()

        def serve() -> None:
            for _ in range(2):
                accepted, _ = server.accept()
                with accepted:
                    accepted.recv(1 << 16)
                    accepted.sendall(reply)
                    answered.wait(20)
                closed.set()

        thread = threading.Thread(target=serve)
        thread.start()
        assert connections.call(place, "GET", "/") == (200, b"ok")
        answered.set()
        assert closed.wait(20)
        assert connections.call(place, "GET", "/") == (200, b"ok")
        thread.join()
        connections.close()


def test_tensors_come_back_as_they_were_put_and_appended(gateway: str) -> None:
    store = PlainStore(gateway)
    assert set(measure_store(store, 8 * TOKEN_BYTES, 3)) == {"put", "get", "append"}
    store.close()
