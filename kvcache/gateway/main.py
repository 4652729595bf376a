"""`python -m kvcache.gateway`: flags, keys, logging, the server, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from bus.errors import BadArgument
from kvcache import descriptors, logs
from kvcache.client import AsyncClient
from kvcache.gateway.access import Keys, hash_key, read_keys
from kvcache.gateway.app import make_app
from kvcache.gateway.config import GatewayConfig, add_flags, config_from
from kvcache.gateway.connections import guarded_protocol
from kvcache.gateway.measuring import Answers
from kvcache.tracing import Tracer, tracer_for

log = logging.getLogger("kvcache.gateway")

EXIT_FAILED = 1
EXIT_USAGE = 2
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""For which a connection may be idle: longer than callers (5 s in httpx) and proxies (60 s in nginx) keep theirs, or we
would close one just as the next request is sent."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after a clean end, 1 if it could not serve, 2 for bad flags."""
    parser = argparse.ArgumentParser(
        prog="kvcache gateway", description="Serve the OpenAI API from a cluster of workers."
    )
    add_flags(parser)
    parser.add_argument("--new-api-key", action="store_true", help="print a new key and its hash, and do nothing else")
    given = vars(parser.parse_args(argv))
    try:
        if given["new_api_key"]:
            sys.stdout.write(_new_key())
            return 0
        config = config_from(given)
        logs.configure(config.log_level, config.log_format)
        keys = _keys(config)
    except BadArgument as error:
        sys.stderr.write(f"gateway: {error}\n")
        return EXIT_USAGE
    descriptors.allow_many()
    try:
        with tracer_for("kvcache-gateway", f"{config.host}:{config.port}", os.environ) as tracer:
            return asyncio.run(_serve(config, keys, tracer))
    except BadArgument as error:
        sys.stderr.write(f"gateway: {error}\n")
        return EXIT_USAGE


class Server(uvicorn.Server):
    """Without uvicorn's signal handling, which ends the process by the signal again once it has stopped.

    stopping: set as soon as the server begins to stop. answers: told of each tick.
    """

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event, answers: Answers) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._answers = answers

    async def on_tick(self, counter: int) -> bool:
        self._answers.tick(time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _serve(config: GatewayConfig, keys: Keys, tracer: Tracer | None) -> int:
    if config.host not in LOOPBACK and not keys:
        log.warning("everybody who reaches %s may use this gateway: no API key is set", config.host)
    async with AsyncClient(config.broker, timeout=config.request_timeout_s) as client:
        stopping, answers = asyncio.Event(), Answers()
        server = Server(
            uvicorn.Config(
                make_app(config, client, keys, stopping, answers, tracer),
                host=config.host,
                port=config.port,
                http=guarded_protocol(config.body_timeout_s, lambda status: answers.count(None, status)),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                server_header=False,
                timeout_graceful_shutdown=round(config.drain_s),
            ),
            stopping,
            answers,
        )
        log.info("gateway for %s at http://%s:%d, %d API keys", config.broker, config.host, config.port, len(keys))
        try:
            await server.serve()
        except SystemExit:  # uvicorn's word for a port that is taken, and it has said so
            return EXIT_FAILED
    return 0


def _keys(config: GatewayConfig) -> Keys:
    """Raises BadArgument."""
    if not config.api_key_file:
        return read_keys(config.api_key, ())
    try:
        lines = Path(config.api_key_file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument(f"the API key file cannot be read: {error}") from None
    keys = read_keys(config.api_key, lines)
    if not keys:
        raise BadArgument(f"the API key file {config.api_key_file!r} holds no keys, which would let everybody in")
    return keys


def _new_key() -> str:
    key = f"kvc-{secrets.token_urlsafe(32)}"
    return f"key (give it to the caller, it is kept nowhere): {key}\nline for --api-key-file: {hash_key(key)}\n"
