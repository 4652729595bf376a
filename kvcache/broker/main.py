"""`python -m kvcache.broker`: flags, logging, signals, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from bus.errors import BadArgument, KVCacheError
from kvcache import descriptors, logs
from kvcache.allocator import keep_freed_memory
from kvcache.broker.shell import Broker
from kvcache.config import BrokerConfig, parse_broker_config
from kvcache.tracing import Tracer, tracer_for

log = logging.getLogger("kvcache.broker")

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a broker until SIGTERM or SIGINT. Returns 0 after a clean drain, 1 if it could not run, 2 for bad flags."""
    try:
        config = parse_broker_config(sys.argv[1:] if argv is None else argv)
        logs.configure(config.log_level, config.log_format)
    except BadArgument as error:
        sys.stderr.write(f"broker: {error}\n")
        return EXIT_USAGE
    keep_freed_memory()
    descriptors.allow_many()
    try:
        with tracer_for("kvcache-broker", config.bind, os.environ) as tracer:
            asyncio.run(_run(config, tracer))
    except KVCacheError as error:
        log.error("%s", error)
        return EXIT_FAILED
    return 0


async def _run(config: BrokerConfig, tracer: Tracer | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Broker(config, tracer).run(
        stop, on_ready=lambda: log.info("broker ready at %s, policy %s", config.bind, config.policy)
    )
    log.info("broker stopped")
