"""`kvcache up`: a broker and some workers on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Annotated

import typer

import kvcache
from bus.endpoints import DEFAULT_URL, endpoints
from bus.errors import KVCacheError, Unavailable
from kvcache.cli import probes
from kvcache.cli.board import Board, open_board
from kvcache.cli.model_files import fetch
from kvcache.cli.options import BrokerPolicy, Home, KvMemory, LogFormat, Logs, NumWorkers, Url, WorkerFlags
from kvcache.cli.output import note
from kvcache.models import DEFAULT_HOME, ModelRegistry
from kvcache.supervisor import Service, ServiceFailed, Supervisor
from kvcache.threads import threads_per_worker

POLL_S = 1.0
DEFAULT_MODEL = "smollm2"


def up(
    workers: NumWorkers = 2,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="What to serve: a name, a folder, a .gguf file or a hub id; may be repeated.",
            show_default=DEFAULT_MODEL,
            metavar="NAME",
        ),
    ] = None,
    kv_memory: KvMemory = "1GiB",
    policy: BrokerPolicy = None,
    home: Home = str(DEFAULT_HOME),
    url: Url = None,
    log_format: Logs = LogFormat.TEXT,
    worker_flags: WorkerFlags = None,
) -> None:
    """Run a broker and workers here, with live status."""
    url = url or DEFAULT_URL
    flags = ["--kv-cache-memory-bytes", kv_memory, *(worker_flags or [])]
    services = cluster_services(url, models or [DEFAULT_MODEL], workers, policy, home, flags, log_format)
    ready = f"{workers} workers serve at {url}; Ctrl-C stops them"
    asyncio.run(run_services(services, url, workers, ready, log_format))


def cluster_services(
    url: str,
    models: Sequence[str],
    num_workers: int,
    policy: str | None,
    home: str,
    worker_flags: Sequence[str],
    log_format: LogFormat,
) -> list[Service]:
    """A broker and workers, whose models are fetched first if they are not here. Raises Unavailable or BadArgument."""
    need_free(astuple(endpoints(url))[1:], "--url")
    registry = ModelRegistry(Path(home), named=models)
    for name in registry.named:
        fetch(registry, name)
    logs = ["--log-format", log_format]
    flags = ["--broker", url, "--threads", str(threads_per_worker(num_workers)), *logs, *worker_flags]
    flags += [part for model in models for part in ("--model", model)]
    workers = (_worker(f"worker-{number}", flags, home) for number in range(1, num_workers + 1))
    return [_broker(url, policy, logs), *workers]


def need_free(addresses: Iterable[str], option: str) -> None:
    """Raises Unavailable if somebody listens at one of them.

    Asked before anything starts: workers would join the broker that is there, under the names of those that it has.
    """
    for address in addresses:
        if probes.is_taken(address):
            raise Unavailable(f"{address} is in use, perhaps by another cluster; stop that, or choose another {option}")


def _broker(url: str, policy: str | None, logs: Sequence[str]) -> Service:
    flags = ["--bind", url, *(["--policy", policy] if policy else []), *logs]
    return Service(name="broker", command=[sys.executable, "-m", "kvcache.broker", *flags])


def _worker(name: str, flags: list[str], home: str) -> Service:
    command = [sys.executable, "-m", "workers", "--worker-id", name, *flags]
    return Service(name=name, command=command, rank=1, env={"KVCACHE_HOME": home})


async def run_services(
    services: Sequence[Service], url: str, num_workers: int, ready: str, log_format: LogFormat
) -> None:
    """Run them until Ctrl-C or SIGTERM; `ready` is said when so many workers serve. Raises ServiceFailed."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    failure: ServiceFailed | None = None
    with open_board(log_format) as board:
        supervisor = Supervisor(services, on_line=board.line, on_change=board.changed)
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_watch(url, num_workers, ready, supervisor, board))
            try:
                await supervisor.run(stop)
            except ServiceFailed as error:
                failure = error
            watcher.cancel()
    if failure is not None:
        raise failure
    if log_format is LogFormat.TEXT:
        note("stopped")


async def _watch(url: str, num_workers: int, ready: str, supervisor: Supervisor, board: Board) -> None:
    """Show the cluster's figures for ever; tell the supervisor once every worker serves."""
    is_ready = False
    async with kvcache.AsyncClient(url, timeout=2 * POLL_S) as client:
        while True:
            try:
                figures = await client.stats()
            except KVCacheError:
                figures = None  # not up yet, or being restarted: the supervisor says why
            board.figures(figures)
            if figures and not is_ready and sum(view.status == "ready" for view in figures.workers) >= num_workers:
                is_ready = True
                supervisor.confirm()
                board.line("kvcache", ready)
            await asyncio.sleep(POLL_S)
