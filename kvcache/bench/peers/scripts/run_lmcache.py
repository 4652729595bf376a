"""LMCache's server, through the client of its own server benchmark: whole chunks of tokens, keyed by their ids.

On a CPU the bytes go through memory that both sides share, and only orders through the socket. A get is its lookup and
its retrieval, a put is one of tokens that it has not; a token cannot be appended. A token has 1 KiB here, so that the
sizes that are asked for are whole chunks of 256; smaller ones are not measured.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"

from contract import median_s, serve_store
from lmcache.cli.commands.bench.server_bench.client import RequestContext, ServerBenchClient
from lmcache.cli.commands.bench.server_bench.config import BenchConfig

CHUNK_TOKENS = 256
TOKEN_BYTES = 1024
MAX_TOKENS = 16 << 10
BLOCK_TOKENS = 64
SHAPE = f"(2,{MAX_TOKENS // BLOCK_TOKENS + 1},{BLOCK_TOKENS},2,64):float32:1"
READY_S = 120


class Server:
    """The server, and a client for each size, which knows how many tokens its requests have."""

    def __init__(self) -> None:
        self._port, self._http_port = _free_port(), _free_port()
        self._clients: dict[int, ServerBenchClient] = {}
        self._numbers = itertools.count()
        log = tempfile.TemporaryFile()  # noqa: SIM115 (the server's, as long as it runs)
        command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--http-port", str(self._http_port), "--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "1"]
        command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven"]
        self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + READY_S
        while not (_listens(self._port) and _listens(self._http_port)):
            if self._process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-500:]!r}")
            time.sleep(0.1)

    def client(self, num_tokens: int) -> ServerBenchClient:
        if num_tokens not in self._clients:
            for other in self._clients.values():
                other.close()
            config = BenchConfig(
                rpc_url=f"tcp://127.0.0.1:{self._port}",
                http_url=f"http://127.0.0.1:{self._http_port}",
                mode="cpu",
                transfer_mode="engine_driven",
                tp_size=1,
                use_mla=False,
                num_tokens=num_tokens,
                kvcache_shape_spec=SHAPE,
                num_blocks=MAX_TOKENS // BLOCK_TOKENS + 1,
                block_size=BLOCK_TOKENS,
            )
            client = ServerBenchClient(config, lambda line: None)
            client.start()
            self._clients = {num_tokens: client}
        return self._clients[num_tokens]

    def request(self, client: ServerBenchClient) -> RequestContext:
        number = next(self._numbers)
        return client.create_request(number, f"request-{number}", "bench")


def open_store() -> tuple[Server, str]:
    return Server(), f"LMCache server {version('lmcache')}, chunks of {CHUNK_TOKENS} tokens"


def measure(server: Server, num_bytes: int, repeats: int) -> dict[str, float]:
    """Raises RuntimeError for what is not stored, or not found as it was."""
    num_tokens = num_bytes // TOKEN_BYTES
    if num_tokens < CHUNK_TOKENS:
        return {}
    client = server.client(num_tokens)
    requests = [server.request(client) for _ in range(repeats)]
    puts = iter(requests)
    seconds = {"put": median_s(lambda: _put(client, next(puts)), repeats)}
    request = requests[-1]
    sums = client.compute_checksums(request, start_token=0, token_count=request.num_full_tokens)
    client.zero_destination(request, start_token=0, token_count=request.num_full_tokens)
    seconds["get"] = median_s(lambda: _get(client, request), repeats)
    if client.compute_checksums(request, start_token=0, token_count=request.num_full_tokens) != sums:
        raise RuntimeError("LMCache gave back other bytes")
    for each in requests:
        client.end_session(each)
    return seconds


def _put(client: ServerBenchClient, request: RequestContext) -> None:
    # It stores nothing for a session that has not looked up.
    client.lookup(request)
    _check(client.store(request, 0, request.num_full_tokens), "stored")


def _get(client: ServerBenchClient, request: RequestContext) -> None:
    if not client.lookup(request).is_full_hit:
        raise RuntimeError("LMCache does not find what it stored")
    _check(client.retrieve(request, 0, request.num_full_tokens), "retrieved")


def _check(result: Any, what: str) -> None:  # noqa: ANN401 (TransferResult)
    if result is None or not result.succeeded:
        raise RuntimeError(f"LMCache has not {what} it: {result}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


serve_store(open_store, measure)
