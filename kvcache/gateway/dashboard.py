"""The dashboard: its page, which anybody may load and which holds no figures, and the events that feed it.

The events ask for a key as everything else does; the page asks its reader for one if need be. A policy lets the page
run our own files and nothing else, connect to us only, and stand in nobody's frame; it makes no HTML out of text.
"""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.generating import EventStream, until_gone
from kvcache.gateway.watch import Watch

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

ROOT = "/dashboard"
EVENTS = f"{ROOT}/events"
_FILES = {
    "dashboard.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "feed.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
OPEN_PATHS = frozenset({ROOT, *(f"{ROOT}/{name}" for name in _FILES)})

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class Dashboard:
    """The handlers. stopping: set when the server is told to end, since viewers would stay for ever."""

    def __init__(self, config: GatewayConfig, watch: Watch, stopping: asyncio.Event) -> None:
        self._config = config
        self._watch = watch
        self._stopping = stopping
        folder = resources.files("kvcache.gateway") / "pages"
        self._files = {name: (folder / name).read_bytes() for name in _FILES}

    def routes(self) -> list[Route]:
        return [
            Route(ROOT, self.page),
            Route(EVENTS, self.events),
            Route(f"{ROOT}/{{name}}", self.file),
        ]

    async def page(self, request: Request) -> Response:
        return self._file("dashboard.html")

    async def file(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    async def events(self, request: Request) -> Response:
        return View(self._config, self._watch, self._stopping)

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(404)
        return Response(self._files[name], headers=_HEADERS | {"content-type": _FILES[name]})


class View(Response):
    """One viewer's events, until it leaves or the server ends."""

    def __init__(self, config: GatewayConfig, watch: Watch, stopping: asyncio.Event) -> None:
        self._config = config
        self._watch = watch
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Overloaded, before anything was sent, if there are too many viewers."""
        self._watch.enter()
        events = EventStream(send, self._config.write_timeout_s, self._config.ping_s)
        try:
            async with asyncio.TaskGroup() as group:
                endless = until_gone(receive), events.keep_open(), self._tell(events)
                tasks = [group.create_task(each) for each in endless]
                await self._stopping.wait()
                for task in tasks:
                    task.cancel()
            await events.end([])
        except* ClientDisconnect:
            pass  # nobody is left to tell
        finally:
            self._watch.leave()

    async def _tell(self, events: EventStream) -> None:
        await events.write([self._watch.history()])
        number, version = 0, -1
        while True:
            number, frame = await self._watch.next_frame(after=number)
            news = [frame]
            if (slowest := self._watch.slowest(after=version)) is not None:
                version, shown = slowest
                news.append(shown)
            await events.write(news)
