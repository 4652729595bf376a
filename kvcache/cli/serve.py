"""`kvcache serve MODEL`: all of it on this machine, a broker, workers and a gateway with OpenAI's API."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import Annotated

import typer

from bus.endpoints import DEFAULT_URL
from bus.errors import BadArgument
from kvcache.cli.options import BrokerPolicy, Home, KvMemory, LogFormat, Logs, NumWorkers, Url, WorkerFlags
from kvcache.cli.up import cluster_services, need_free, run_services
from kvcache.models import DEFAULT_HOME
from kvcache.supervisor import Service

GATEWAY_RANK = 2  # starts when there is a broker, and ends before the workers do


def serve(
    model: Annotated[str, typer.Argument(help="A name, folder or hub id to serve.", metavar="MODEL")],
    host: Annotated[str, typer.Option("--host", help="Where the API listens.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Its port.", metavar="PORT")] = 8000,
    workers: NumWorkers = 1,
    kv_memory: KvMemory = "1GiB",
    policy: BrokerPolicy = None,
    api_key_file: Annotated[
        str | None,
        typer.Option("--api-key-file", help="Keys that callers need.", show_default=False, metavar="FILE"),
    ] = None,
    home: Home = str(DEFAULT_HOME),
    url: Url = None,
    log_format: Logs = LogFormat.TEXT,
    worker_flags: WorkerFlags = None,
) -> None:
    """Serve a model with OpenAI's API.

    A broker, workers and a gateway, with live status.
    """
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise BadArgument("the gateway is not installed; run in the checkout: pip install -e '.[gateway]'")
    url = url or DEFAULT_URL
    need_free([f"tcp://{host}:{port}"], "--port")
    flags = ["--kv-cache-memory-bytes", kv_memory, *(worker_flags or [])]
    services = cluster_services(url, [model], workers, policy, home, flags, log_format)
    services.append(_gateway(url, host, port, api_key_file, log_format))
    ready = f"ready: http://{host}:{port}/v1; Ctrl-C stops all of it"
    asyncio.run(run_services(services, url, workers, ready, log_format))


def _gateway(url: str, host: str, port: int, api_key_file: str | None, log_format: LogFormat) -> Service:
    flags = ["--broker", url, "--host", host, "--port", str(port), "--log-format", log_format]
    flags += ["--api-key-file", api_key_file] if api_key_file else []
    return Service(name="gateway", command=[sys.executable, "-m", "kvcache.gateway", *flags], rank=GATEWAY_RANK)
