"""What is asked of a broker that does not answer is answered all the same, and soon."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from kvcache.gateway import queries
from kvcache.gateway.access import Keys
from kvcache.gateway.app import make_app
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.measuring import Answers


class WaitingClient:
    """Waits for its broker to come back, as a client does for as long as its requests may take."""

    async def stats(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/m", "/server_info"])
async def test_a_broker_that_is_away_is_told_at_once_and_not_when_it_is_back(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "HEALTH_S", 0.05)
    client: Any = WaitingClient()
    app = make_app(GatewayConfig(), client, Keys(), asyncio.Event(), Answers())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        async with asyncio.timeout(10):
            answer = await http.get(path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["message"]
