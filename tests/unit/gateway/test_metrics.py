"""`/metrics` of the gateway's application, without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from bus.errors import BadArgument, ConnectionLost
from bus.stats import BrokerStats, ClusterStats
from kvcache.gateway.access import read_keys
from kvcache.gateway.app import make_app
from kvcache.gateway.config import GatewayConfig, config_from
from kvcache.gateway.measuring import Answers

KEY = "a-key-of-mine"


class FakeClient:
    def __init__(self, stats: ClusterStats | None) -> None:
        self._stats = stats

    async def stats(self) -> ClusterStats:
        if self._stats is None:
            raise ConnectionLost("nobody is there")
        return self._stats


STATS = ClusterStats(healthy=True, broker=BrokerStats(incarnation=1, state="serving", policy="prefix"))


def web(stats: ClusterStats | None, keys: tuple[str, ...] = (), **config: object) -> httpx.AsyncClient:
    client: Any = FakeClient(stats)
    app = make_app(GatewayConfig(**config), client, read_keys(keys, ()), asyncio.Event(), Answers())  # type: ignore[arg-type]  # as tests want it
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def test_a_scrape_never_fails_for_want_of_a_broker() -> None:
    async with web(None) as http:
        answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "kvcache_up 0.0" in answer.text


async def test_metrics_ask_for_a_key_where_others_do_unless_they_are_made_public() -> None:
    async with web(STATS, (KEY,)) as http:
        assert (await http.get("/metrics")).status_code == 401
        answer = await http.get("/metrics", headers={"authorization": f"Bearer {KEY}"})
        assert "kvcache_up 1.0" in answer.text
    async with web(STATS, (KEY,), metrics_public=True) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/server_info")).status_code == 401


async def test_answers_are_counted_by_path_and_status_and_unknown_paths_as_one() -> None:
    async with web(STATS) as http:
        for path in ("/version", "/version", "/v1/models/of-a-caller", "/nothing/1", "/nothing/2"):
            await http.get(path)
        await http.post("/v1/completions", content=b"{")
        text = (await http.get("/metrics")).text
    assert 'kvcache_http_requests_total{path="/version",status="200"} 2.0' in text
    assert 'kvcache_http_requests_total{path="/v1/models/{name:path}",status="404"} 1.0' in text
    assert 'kvcache_http_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'kvcache_http_requests_total{path="other",status="404"} 2.0' in text
    assert "of-a-caller" not in text


def test_how_late_the_loop_is_is_told_at_once_and_forgotten_slowly() -> None:
    answers, found = Answers(), []
    for now in (10.0, 10.1, 10.7, 10.8, 10.9):
        answers.tick(now)
        ((_, lag_s),) = {family.name: family for family in answers.families()}["gateway_loop_lag_seconds"].samples
        found.append(lag_s)
    assert found == pytest.approx([0.0, 0.0, 0.5, 0.45, 0.405])


async def test_two_gateways_of_one_process_count_apart() -> None:
    async with web(STATS) as one, web(STATS) as other:
        await one.get("/version")
        assert 'path="/version"' in (await one.get("/metrics")).text
        assert 'path="/version"' not in (await other.get("/metrics")).text


async def test_vllm_names_are_there_only_if_they_are_wanted() -> None:
    async with web(STATS) as plain, web(STATS, metrics_compat="vllm") as compatible:
        assert "vllm:" not in (await plain.get("/metrics")).text
        assert "vllm:num_requests_running" in (await compatible.get("/metrics")).text


def test_switches_are_read_from_flags_and_environment() -> None:
    assert config_from({"metrics_public": "true"}, {}).metrics_public
    assert config_from({}, {"KVCACHE_GATEWAY_METRICS_PUBLIC": "Yes"}).metrics_public
    assert not config_from({}, {"KVCACHE_GATEWAY_METRICS_PUBLIC": "0"}).metrics_public
    with pytest.raises(BadArgument, match="METRICS_PUBLIC must be true or false, not 'perhaps'"):
        config_from({}, {"KVCACHE_GATEWAY_METRICS_PUBLIC": "perhaps"})
    with pytest.raises(BadArgument, match="compatible with 'vllm', not with 'tgi'"):
        config_from({"metrics_compat": "tgi"}, {})
