"""What every request passes first: an id, the key, and an answer in the right form whatever goes wrong behind it.

Pure ASGI, so that a stream's messages pass without a task or a queue in between.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bus.errors import KVCacheError
from kvcache import logs
from kvcache.gateway import dashboard
from kvcache.gateway.access import Keys
from kvcache.gateway.asks import SESSION_HEADERS, Caller
from kvcache.gateway.paths import canonical
from kvcache.gateway.problems import Problem, problem_of
from kvcache.tracing import OpenSpan, Tracer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

OnAnswer = Callable[[object, int], None]

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/openapi.json"}) | dashboard.OPEN_PATHS
PROBES = OPEN_PATHS | {"/metrics"}
"""What is asked all the time, by machines."""
TRACED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
MAX_REQUEST_ID_CHARS = 128


class Gate:
    """Middleware. Puts `request_id` and `caller` into the scope's state, and X-Request-ID on every answer.

    open_paths: that need no key. on_answer: is told the handler of each answer, None if there is none, and its status.
    tracer: of what generates; None for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        on_answer: OnAnswer,
        open_paths: Collection[str] = OPEN_PATHS,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._on_answer = on_answer
        self._open_paths = open_paths
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = canonical(scope["path"])
        headers = {name.lower(): value for name, value in reversed(scope["headers"])}
        request_id = _request_id(headers.get(b"x-request-id", b""))
        has_begun = False
        status, began_at = 0, time.monotonic()
        logs.current_request.set(request_id)
        span = self._begin_span(scope, headers)

        async def reply(message: Message) -> None:
            nonlocal has_begun, status
            if message["type"] == "http.response.start":
                has_begun, status = True, message["status"]
                self._on_answer(scope.get("endpoint"), status)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            state = scope.setdefault("state", {})
            state["request_id"] = request_id
            state["traceparent"] = span.traceparent if span is not None else None
            state["caller"] = self._caller(scope["path"], headers)
            await self._app(scope, receive, reply)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as error:
            if has_begun:
                raise  # the server logs it and closes the connection
            await send_problem(_problem(error, request_id), reply)
        finally:
            _log_end(scope, status, time.monotonic() - began_at)
            if span is not None:
                _end_span(span, status, request_id)

    def _begin_span(self, scope: Scope, headers: dict[bytes, bytes]) -> OpenSpan | None:
        """Of what generates; None for all else, and where nothing is traced."""
        if self._tracer is None or scope["path"] not in TRACED_PATHS:
            return None
        given = headers.get(b"traceparent", b"").decode("latin-1")
        states = b",".join(value for name, value in scope["headers"] if name.lower() == b"tracestate")  # may be several
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        name = f"{scope['method']:.8} {scope['path']}"
        return self._tracer.begin(name, given, attributes, states.decode("latin-1"))

    def _caller(self, path: str, headers: dict[bytes, bytes]) -> Caller:
        key = b""
        if path not in self._open_paths:
            given = headers.get(b"authorization")
            key = self._keys.check(None if given is None else given.decode("latin-1"))
        found = (headers[name.encode()] for name in SESSION_HEADERS if headers.get(name.encode()))
        return Caller(key=key, session=next((value.decode("latin-1") for value in found), None))


async def http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses (no such path, wrong method), in the form of all other errors."""
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, f"{request.method} {request.url.path:.200}: {error.detail}{_hint(error)}")
    return Response(problem.body(), error.status_code, {**(error.headers or {}), **problem.headers()})


def _hint(error: HTTPException) -> str:
    """What is there, for clients that are set to an API of OpenAI's that is not (responses, embeddings, ...)."""
    return f"; this server generates at {' and '.join(sorted(TRACED_PATHS))}" if error.status_code == 404 else ""


async def send_problem(problem: Problem, send: Send) -> None:
    """Answer with an error."""
    body = problem.body()
    headers = [(name.encode(), value.encode()) for name, value in problem.headers().items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _problem(error: Exception, request_id: str) -> Problem:
    match error:
        case Problem():
            return error
        case KVCacheError():
            return problem_of(error)
        case _:
            log.error("a request failed", exc_info=error)
            return Problem(500, f"a fault of the server; its log has request {request_id}", "server_error")


def _end_span(span: OpenSpan, status: int, request_id: str) -> None:
    """A status of 0: the caller left before there was one."""
    error = "the caller left" if not status else f"status {status}" if status >= 500 else ""
    span.end({"http.response.status_code": status, "kvcache.request.id": request_id}, error)


def _log_end(scope: Scope, status: int, seconds: float) -> None:
    """A line for each request, without its query, which may hold anything; probes only in detail."""
    level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
    outcome = status or "left"
    log.log(level, "%s %.200s: %s, %.3f s", scope["method"], scope["path"], outcome, seconds)


def _request_id(given: bytes) -> str:
    """The caller's own if it can stand in a header and a log, else a new one."""
    text = given.decode("latin-1")
    is_fit = 0 < len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()
    return text if is_fit else secrets.token_hex(16)
