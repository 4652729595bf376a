"""What clients that are not ours were seen to send, as plain requests: it is answered, or refused by its name."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import httpx
import pytest

from bus.stats import BrokerStats, ClusterStats, WorkerView
from kvcache.client.results import Done, Event, Start, Timings, Token, Usage
from kvcache.gateway.access import Keys
from kvcache.gateway.app import make_app
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.measuring import Answers

WORKER = WorkerView(
    worker_id="w", status="ready", weight=1, share=1.0, inflight=0, dispatched=0, last_heard_s=0.0, lease_s=1.0,
    models=(("org/m", "ready"),),
)  # fmt: skip
STATS = ClusterStats(
    healthy=True, broker=BrokerStats(incarnation=1, state="serving", policy="prefix"), workers=(WORKER,)
)
HI = {"messages": [{"role": "user", "content": "hi"}]}


class FakeGeneration:
    """Says `ab`."""

    def __init__(self) -> None:
        done = Done("ab", "stop", Usage(10, 4, 2), Timings(0.1, 0.2, 1.0, 0.0, 0.0, 0.0, 0), "w", "because", "r")
        self._batches: list[list[Event]] = [[Start("w", "because", "m", 10, 4), Token(0, 5, "ab")], [done]]

    async def next_batch(self) -> list[Event]:
        return self._batches.pop(0) if self._batches else []

    async def cancel(self) -> None:
        pass


class FakeClient:
    def generate(self, **_: object) -> FakeGeneration:
        return FakeGeneration()

    async def stats(self) -> ClusterStats:
        return STATS


def web(config: GatewayConfig = GatewayConfig()) -> httpx.AsyncClient:
    client: Any = FakeClient()
    app = make_app(config, client, Keys(), asyncio.Event(), Answers())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/chat/completions",
    ],
)
async def test_a_chat_is_answered_under_every_base_that_people_type_and_without_a_redirect(path: str) -> None:
    async with web() as http:
        answer = await http.post(path, json=HI, params={"api-version": "2026-01-01"})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "ab", "refusal": None}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/v1/models/org/m/", "/models/org/m"])
async def test_models_are_shown_under_every_base(path: str, method: str) -> None:
    async with web() as http:
        answer = await http.request(method, path)
    assert (answer.status_code, "org/m" in answer.text) == (200, method == "GET")


async def test_the_dashboard_still_sends_its_readers_where_its_files_are_found() -> None:
    async with web() as http:
        answer = await http.get("/dashboard/")
    assert (answer.status_code, answer.headers["location"]) == (307, "http://gateway/dashboard")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/api/chat"])
async def test_an_api_that_is_not_here_is_refused_with_those_that_are(path: str) -> None:
    async with web() as http:
        answer = await http.post(path, json={"model": "m", "input": "hi"})
    assert answer.status_code == 404
    assert "/v1/chat/completions and /v1/completions" in answer.json()["error"]["message"]


async def test_openais_javascript_client_may_call_from_a_page_of_an_origin_that_is_let_in() -> None:
    origin = "https://app.example"
    wanted = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
    }
    async with web(GatewayConfig(cors_origin=(origin,))) as http:
        asked = await http.options("/v1/chat/completions", headers=wanted)
        answer = await http.post("/v1/chat/completions", json=HI, headers={"origin": origin, "x-stainless-lang": "js"})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-headers"] == wanted["access-control-request-headers"]
    assert answer.headers["access-control-allow-origin"] == origin


async def test_a_whole_answer_says_how_long_it_is() -> None:
    """A caller of HTTP/1.0, as some proxies are, knows no chunks."""
    async with web() as http:
        answer = await http.post("/v1/chat/completions", json=HI)
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_a_compressed_body_is_refused_as_that_and_not_as_bad_json() -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    async with web() as http:
        answer = await http.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert answer.status_code == 415
    assert "content-encoding is 'gzip'" in answer.json()["error"]["message"]


async def test_a_chat_of_content_parts_with_all_that_clients_add_is_answered() -> None:
    body = {
        "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]}],
        "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}, "store": True,
        "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True, "reasoning_effort": "low", "tools": [],
        "tool_choice": "none", "max_tokens": None, "max_completion_tokens": 8, "top_k": -1, "user": "u" * 300,
        "functions": [], "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "stop": [],
    }  # fmt: skip
    async with web() as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
