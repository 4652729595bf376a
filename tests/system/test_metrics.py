"""`/metrics` of a real gateway after a request, and of the exporter for clusters without one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvcache.metrics.exporter import export
from tests.harness.cluster import Cluster
from tests.harness.gateway import free_port, gateway
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

KEY = {"authorization": "Bearer a-key-of-mine"}


@pytest.fixture(scope="module")
def samples(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """Of each name, the sum over its labels, after one request has been answered."""
    flags = ("--api-key", "a-key-of-mine", "--metrics-compat", "vllm")
    log = tmp_path_factory.mktemp("metrics") / "log"
    with gateway(shared_cluster.url, log, *flags) as url, httpx.Client(base_url=url, headers=KEY, timeout=30.0) as web:
        body = {"prompt": "hello " * 40, "max_tokens": 5, "ignore_eos": True}
        assert web.post("/v1/completions", json=body).status_code == 200
        found: dict[str, float] = {}
        for family in parse_text(web.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        yield found


def test_a_request_shows_in_the_metrics_of_its_gateway(samples: dict[str, float]) -> None:
    expected = {
        "kvcache_up": 1,
        "kvcache_healthy": 1,
        "kvcache_workers": 2,
        "kvcache_request_success_total": 1,
        "kvcache_request_failures_total": 0,
        "kvcache_generation_tokens_total": 5,
        "kvcache_time_to_first_token_seconds_count": 1,
        "kvcache_inter_token_latency_seconds_count": 4,
        "kvcache_request_decode_time_seconds_count": 1,
        "kvcache_http_requests_total": 1,
        "vllm:generation_tokens_total": 5,
        "vllm:request_success_total": 1,
    }
    assert {name: samples.get(name) for name in expected} == expected
    assert samples["kvcache_broker_requests_total"] >= 1
    assert samples["kvcache_e2e_request_latency_seconds_sum"] >= samples["kvcache_time_to_first_token_seconds_sum"] > 0
    assert samples["process_resident_memory_bytes"] > 0


async def test_the_exporter_shows_a_cluster_without_a_gateway(cluster: Cluster) -> None:
    port = free_port()
    async with httpx.AsyncClient(timeout=10.0) as web:
        exporter = asyncio.create_task(export(cluster.url, "127.0.0.1", port, is_vllm_compatible=True))

        async def page() -> str:
            try:
                return (await web.get(f"http://127.0.0.1:{port}/metrics")).text
            except httpx.ConnectError:
                return ""

        async def is_shown() -> bool:
            text = await page()
            return 'kvcache_workers{status="ready"} 2.0' in text and "vllm:kv_cache_usage_perc{" in text

        try:
            await until(is_shown, "the exporter shows the cluster", 20.0)
        finally:
            exporter.cancel()
            await asyncio.gather(exporter, return_exceptions=True)
        assert await page() == ""
