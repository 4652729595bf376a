"""`kvcache metrics`: a process that shows a cluster's metrics, for clusters without a gateway.

The HTTP server is prometheus_client's, with a thread for each scrape; what they show is asked for on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from bus.errors import ConnectionLost
from kvcache.client import AsyncClient
from kvcache.metrics.cluster import cluster_families
from kvcache.metrics.exposition import Page, readable_accept
from kvcache.metrics.latest import ANSWER_S, LatestStats

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)


async def export(broker: str | None, host: str, port: int, *, is_vllm_compatible: bool) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConnectionLost if the port cannot be had, or BadArgument."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncClient(broker) as client:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Cluster(LatestStats(client.stats), loop, is_vllm_compatible))
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConnectionLost(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        server.set_app(_tolerant(make_wsgi_app(registry)))
        log.info("metrics of %s at http://%s:%d/metrics", client.url, host, server.server_port)
        try:
            await stop.wait()
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()


def _tolerant(app: WSGIApplication) -> WSGIApplication:
    """The application, for callers whose `Accept` it would fail on."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        environ["HTTP_ACCEPT"] = readable_accept(environ.get("HTTP_ACCEPT", ""))
        return app(environ, start)

    return answer


class _Cluster(Collector):
    """Called in the server's threads."""

    def __init__(self, latest: LatestStats, loop: asyncio.AbstractEventLoop, is_vllm_compatible: bool) -> None:
        self._latest = latest
        self._loop = loop
        self._is_vllm_compatible = is_vllm_compatible

    def collect(self) -> Iterator[Metric]:
        asked = asyncio.run_coroutine_threadsafe(self._latest.get(), self._loop)
        stats = asked.result(2 * ANSWER_S).stats
        return Page(cluster_families(stats), is_vllm_compatible=self._is_vllm_compatible).collect()
