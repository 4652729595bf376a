"""The dashboard's paths and events, with the broker and the viewers played by the test."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from bus.errors import ConnectionLost, Overloaded
from bus.stats import BrokerStats, ClusterStats
from kvcache.gateway import watch as watching
from kvcache.gateway.access import read_keys
from kvcache.gateway.app import make_app
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.dashboard import OPEN_PATHS
from kvcache.gateway.measuring import Answers
from kvcache.gateway.slowest import Slow, Slowest
from kvcache.gateway.watch import Watch
from kvcache.metrics import latest as asking
from kvcache.metrics.latest import LatestStats

KEY = "a-key-of-the-test"
FIGURES = ClusterStats(healthy=True, broker=BrokerStats(incarnation=1, state="serving", policy="prefix"))


class FakeClient:
    """A broker that counts how often it is asked; an error is raised."""

    def __init__(self, *answers: ClusterStats | Exception) -> None:
        self._answers = list(answers)
        self.num_asked = 0

    async def stats(self) -> ClusterStats:
        self.num_asked += 1
        answer = self._answers.pop(0) if self._answers else FIGURES
        if isinstance(answer, Exception):
            raise answer
        return answer


class Viewer:
    """One request, as a server and its network would carry it."""

    def __init__(self, app: Any, path: str, key: str | None) -> None:
        self._app = app
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        self._scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "state": {},
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.left = asyncio.Event()
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def events(self, number: int) -> list[Any]:
        """So many more of the events, once they are there."""
        found: list[Any] = []
        while len(found) < number:
            message = await self.messages.get()
            lines = message.get("body", b"").decode().splitlines()
            found += [msgspec.json.decode(line[6:]) for line in lines if line.startswith("data: ")]
        return found

    async def _receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        self.body += message.get("body", b"")
        self.messages.put_nowait(message)


class Site:
    """The application, with what a test may do to it."""

    def __init__(self, client: FakeClient, *keys: str, dashboard: str = "on") -> None:
        self.stopping = asyncio.Event()
        config = GatewayConfig(dashboard=dashboard)
        self._app = make_app(config, client, read_keys(keys, ()), self.stopping, Answers())  # type: ignore[arg-type]  # as asked

    async def get(self, path: str, key: str | None = None) -> Viewer:
        viewer = Viewer(self._app, path, key)
        async with asyncio.timeout(30):
            await viewer.run()
        return viewer

    @asynccontextmanager
    async def viewer(self, key: str | None = None) -> AsyncIterator[Viewer]:
        """Somebody who looks until the block is left."""
        viewer = Viewer(self._app, "/dashboard/events", key)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(viewer.run())
            yield viewer
            viewer.left.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.01)
    monkeypatch.setattr(asking, "FRESH_S", 0.01)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_the_page_is_open_and_may_run_and_reach_nothing_but_its_own(path: str) -> None:
    answer = await Site(FakeClient(), KEY).get(path)
    assert answer.status == 200
    policy = answer.headers[b"content-security-policy"].decode()
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers[b"x-content-type-options"] == b"nosniff"
    text = answer.body.decode()
    foreign = [url for url in re.findall(r"https?://[^\s\"']+", text) if not url.startswith("http://www.w3.org/")]
    assert foreign == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\sstyle=|\son[a-z]+=", text)


async def test_the_figures_ask_for_a_key() -> None:
    site = Site(FakeClient(), KEY)
    assert (await site.get("/dashboard/events")).status == 401
    assert (await site.get("/dashboard/events", "another-key")).status == 401
    async with site.viewer(KEY) as viewer:
        assert (await viewer.events(1))[0]["kind"] == "history"


async def test_an_unknown_file_and_a_dashboard_that_is_off_are_not_found() -> None:
    assert (await Site(FakeClient()).get("/dashboard/other.js")).status == 404
    site = Site(FakeClient(), dashboard="off")
    assert (await site.get("/dashboard")).status == 404
    assert (await site.get("/dashboard/events")).status == 404


async def test_a_viewer_sees_the_history_and_then_the_cluster_again_and_again() -> None:
    async with Site(FakeClient()).viewer() as viewer:
        history, first, slowest, second = await viewer.events(4)
    assert [event["kind"] for event in (history, first, slowest, second)] == ["history", "now", "slowest", "now"]
    assert first["snapshot"]["broker"]["policy"] == "prefix"
    assert second["snapshot"]["point"]["at"] >= first["snapshot"]["point"]["at"]


async def test_a_broker_that_does_not_answer_is_said_and_its_return_seen() -> None:
    client = FakeClient(FIGURES, ConnectionLost("the broker is gone"))
    async with Site(client).viewer() as viewer:
        events = [event["snapshot"] for event in await viewer.events(6) if event["kind"] == "now"]
    assert [snapshot["problem"] for snapshot in events[:3]] == ["", "the broker is gone", ""]
    assert events[1]["broker"] == events[0]["broker"]


async def test_all_viewers_share_one_question_and_nobody_asks_when_nobody_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client: Any = FakeClient()
    watch = Watch(LatestStats(client.stats), Slowest())
    monkeypatch.setattr(watching, "POLL_S", 0.0)
    first = await asyncio.gather(*(watch.next_frame(after=0) for _ in range(50)))
    assert (client.num_asked, {number for number, _ in first}) == (1, {1})
    assert await watch.next_frame(after=1) != first[0]
    assert client.num_asked == 2


async def test_dashboard_and_metrics_share_one_question_and_no_frame_is_shown_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "FRESH_S", 3600.0)
    client: Any = FakeClient()
    latest = LatestStats(client.stats)
    watch = Watch(latest, Slowest())
    scraped = await latest.get()
    await watch.next_frame(after=0)
    assert (client.num_asked, await latest.get()) == (1, scraped)
    await watch.next_frame(after=1)
    assert (client.num_asked, (await latest.get()).at > scraped.at) == (2, True)


async def test_a_viewer_that_leaves_while_it_asks_leaves_that_to_the_next() -> None:
    client: Any = FakeClient()
    watch = Watch(LatestStats(client.stats), Slowest())
    await watch.next_frame(after=0)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        leaving = group.create_task(watch.next_frame(after=1))
        staying = group.create_task(watch.next_frame(after=1))
        await asyncio.sleep(0)
        leaving.cancel()
        number, _ = await staying
    assert number == 2


async def test_the_slowest_are_told_again_only_when_they_change() -> None:
    slowest = Slowest()
    watch = Watch(LatestStats(FakeClient().stats), slowest)
    told = watch.slowest(after=-1)
    assert told is not None
    assert watch.slowest(after=told[0]) is None
    slowest.add(Slow(at=2e9, request_id="r", ttft_s=1.0, total_s=1.0, outcome="stop"))
    assert watch.slowest(after=told[0]) is not None


async def test_viewers_are_limited_and_those_who_left_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_VIEWERS", 1)
    site = Site(FakeClient())
    async with site.viewer() as viewer:
        await viewer.events(1)
        refused = await site.get("/dashboard/events")
        assert (refused.status, refused.headers[b"retry-after"]) == (429, b"5")
    async with site.viewer() as viewer:
        assert await viewer.events(1)


async def test_viewers_do_not_hold_up_a_server_that_ends() -> None:
    site = Site(FakeClient())
    async with site.viewer() as viewer:
        await viewer.events(2)
        site.stopping.set()
        while (await viewer.messages.get()).get("more_body", True):
            pass
        assert not viewer.left.is_set()


def test_too_many_viewers_is_an_error_that_says_when_to_come_again() -> None:
    watch = Watch(LatestStats(FakeClient().stats), Slowest())
    for _ in range(watching.MAX_VIEWERS):
        watch.enter()
    with pytest.raises(Overloaded, match="64 dashboards are open"):
        watch.enter()
