"""`/metrics` of a real gateway after a request, and of the exporter for clusters without one."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvcache.local import free_port
from kvcache.metrics.exporter import export
from tests.harness.cluster import Cluster
from tests.harness.gateway import gateway
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "kvcache.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"

NAME = re.compile(r"(kvcache_\w+)(\{([^}]*)\})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPS = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
UNSEEN = {"code"}
"""Labels of what has not happened to the cluster of the test."""

OPENMETRICS = "application/openmetrics-text"
KEY = {"authorization": "Bearer a-key-of-mine"}


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text("utf-8"))
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return panels + [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]


def alert_expressions() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def page(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Metric]]:
    """What is shown after one request has been answered."""
    flags = ("--api-key", "a-key-of-mine", "--metrics-compat", "vllm")
    log = tmp_path_factory.mktemp("metrics") / "log"
    with gateway(shared_cluster.url, log, *flags) as url, httpx.Client(base_url=url, headers=KEY, timeout=30.0) as web:
        body = {"prompt": "hello " * 40, "max_tokens": 5, "ignore_eos": True}
        assert web.post("/v1/completions", json=body).status_code == 200
        end = time.monotonic() + 60
        while "kvcache_up 1.0" not in (text := web.get("/metrics").text):  # on a machine that stalls
            assert time.monotonic() < end, text
            time.sleep(0.2)
        yield list(parse_text(text))


def test_a_request_shows_in_the_metrics_of_its_gateway(page: list[Metric]) -> None:
    samples: dict[str, float] = {}  # of each name, the sum over its labels
    for sample in (sample for family in page for sample in family.samples):
        samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
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
        "vllm:generation_tokens_total": 5,
        "vllm:request_success_total": 1,
    }
    assert {name: samples.get(name) for name in expected} == expected
    assert samples["kvcache_http_requests_total"] >= 1
    assert samples["kvcache_broker_requests_total"] >= 1
    assert samples["kvcache_e2e_request_latency_seconds_sum"] >= samples["kvcache_time_to_first_token_seconds_sum"] > 0
    assert samples["process_resident_memory_bytes"] > 0


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_what_dashboard_and_alerts_name_is_there(page: list[Metric], expressions: Callable[[], list[str]]) -> None:
    labels: dict[str, set[str]] = {}
    for family in page:
        if family.type == "counter":
            labels.setdefault(f"{family.name}_total", set())  # it may have no sample yet
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    known = {"instance"}.union(*labels.values(), UNSEEN)
    found = expressions()
    assert len(found) > 10
    for expression in found:
        names = NAME.findall(expression)
        assert names, f"{expression!r} asks for nothing of ours"
        for name, _, selector in names:
            assert name in labels, f"{name} is not shown"
            wrong = set(LABEL.findall(selector)) - (labels[name] or known)
            assert not wrong, f"{name} has no {wrong}"
        grouped = {label.strip() for group in GROUPS.findall(expression) for label in group.split(",") if label.strip()}
        assert grouped <= known, f"{expression!r} groups by what no figure has: {grouped - known}"


def test_panels_of_the_dashboard_are_apart_and_say_what_they_show() -> None:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} covers another"
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


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
            odd = await web.get(f"http://127.0.0.1:{port}/metrics", headers={"accept": f"{OPENMETRICS}; version=odd"})
            assert (odd.status_code, "kvcache_up 1.0" in odd.text) == (200, True)
        finally:
            exporter.cancel()
            await asyncio.gather(exporter, return_exceptions=True)
        assert await page() == ""
