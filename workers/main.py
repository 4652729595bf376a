"""`python -m workers`: flags, logging, signals, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence

from bus import wire
from bus.errors import BadArgument, KVCacheError
from bus.messages import WorkerHello
from kvcache import logs
from kvcache.allocator import keep_freed_memory
from kvcache.tracing import Tracer, tracer_for
from workers.config import WorkerConfig, parse_config, plan_memory
from workers.kv_event_sockets import KvEventsConfig
from workers.model_budget import ModelBudget
from workers.tasks import CacheConfig

log = logging.getLogger("workers")

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until SIGTERM or SIGINT. Returns 0 after a drain, 1 if it could not run, 2 for bad flags."""
    worker_id = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, os.environ, worker_id)
        logs.configure(config.log_level, config.log_format)
    except BadArgument as error:
        sys.stderr.write(f"worker: {error}\n")
        return EXIT_USAGE
    keep_freed_memory()
    try:
        with tracer_for("kvcache-worker", config.worker_id, os.environ) as tracer:
            asyncio.run(_run(config, tracer))
    except BadArgument as error:
        sys.stderr.write(f"worker: {error}\n")
        return EXIT_USAGE
    except KVCacheError as error:
        log.error("%s", error)
        return EXIT_FAILED
    return 0


async def _run(config: WorkerConfig, tracer: Tracer | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Here and not above: torch takes seconds to import, and `--help` or a wrong flag should not wait for it.
    from workers.torch_model import LoadOptions, TorchModels
    from workers.worker import Worker

    memory = plan_memory(config)
    options = LoadOptions(
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        threads=config.threads,
        runner=config.runner,
        weights=config.weights,
        attention=config.attention,
        cuda_graphs=config.cuda_graphs,
    )
    models = TorchModels(config.home, config.models, options)
    budget = ModelBudget(
        pools_bytes=memory.pools_bytes,
        model_bytes=config.model_memory_bytes,
        num_named=len(models.names()) if config.models else 0,
    )
    hello = WorkerHello(
        worker_id=config.worker_id,
        incarnation=time.time_ns(),
        major=wire.MAJOR,
        minor=wire.MINOR,
        weight=config.weight,
        pid=os.getpid(),
    )
    worker = Worker(
        hello,
        config.brokers,
        models,
        budget,
        kv_plane_bytes=memory.kv_plane_bytes,
        max_tokens_per_step=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        shares_prefixes=config.enable_prefix_caching,
        cache=CacheConfig(eviction_policy=config.eviction_policy, audit_share=config.audit),
        kv_events=_kv_events(config, models.names()),
        preload=models.names() if config.models and config.preload else (),
        failpoint=config.failpoint,
        tracer=tracer,
    )
    await worker.run(
        stop, on_ready=lambda: log.info("worker %s ready, brokers %s", config.worker_id, ", ".join(config.brokers))
    )
    log.info("worker %s stopped", config.worker_id)


def _kv_events(config: WorkerConfig, models: Sequence[str]) -> KvEventsConfig | None:
    """Under a topic that says whose they are, as routers for vLLM have it."""
    if not config.kv_events:
        return None
    topic = f"kv@{config.worker_id}@{models[0]}".encode()
    return KvEventsConfig(url=config.kv_events, replay_url=config.kv_events_replay, topic=topic)
