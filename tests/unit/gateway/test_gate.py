"""What every request passes first: it has an id, and a line in the log under it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from bus.errors import Overloaded
from bus.traces import Attributes, Span
from kvcache import logs
from kvcache.gateway.access import Keys
from kvcache.gateway.gate import Gate


@pytest.fixture(autouse=True)
def _forget() -> Any:
    token = logs.current_request.set("")
    yield
    logs.current_request.reset(token)


class FakeTracer:
    """Keeps what it is told, in order."""

    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def begin(self, name: str, traceparent: str, attributes: Attributes, tracestate: str = "") -> FakeTracer:
        self.told.append((name, traceparent, dict(attributes), tracestate))
        return self

    def end(self, attributes: Attributes, error: str = "") -> None:
        self.told.append((dict(attributes), error))

    def record(self, span: Span, now: float) -> None:
        raise AssertionError


async def ask(
    app: Any,
    path: str = "/v1/completions",
    tracer: FakeTracer | None = None,
    **headers: str,
) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        raise AssertionError

    scope: Any = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"key=secret",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "state": {},
    }
    await Gate(app, Keys(), lambda handler, status: None, tracer=tracer)(scope, receive, send)
    return said


async def fine(scope: Any, receive: Any, send: Any) -> None:
    logging.getLogger("app").warning("serving %s", logs.current_request.get())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def full(scope: Any, receive: Any, send: Any) -> None:
    raise Overloaded("full")


async def broken(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("why")


async def test_a_request_is_told_with_its_status_and_without_its_query(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await ask(fine, x_request_id="mine-1")
    await ask(full)
    serving, first, second = (record.getMessage() for record in caplog.records)
    assert serving == "serving mine-1"
    assert first.startswith("POST /v1/completions: 200, ")
    assert second.startswith("POST /v1/completions: 429, ")


async def test_a_fault_is_told_with_its_traceback_and_answered_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    said = await ask(broken, x_request_id="mine-2")
    assert said[0]["status"] == 500
    assert b"mine-2" in said[1]["body"]
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None


async def test_probes_are_told_in_detail_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await ask(fine, "/health")
    levels = [record.levelno for record in caplog.records if "/health" in record.getMessage()]
    assert levels == [logging.DEBUG]


async def test_what_generates_is_traced_from_its_callers_span_to_its_status() -> None:
    given, tracer = f"00-{'c' * 32}-{'d' * 16}-01", FakeTracer()

    async def generates(scope: Any, receive: Any, send: Any) -> None:
        assert scope["state"]["traceparent"] == tracer.traceparent
        await fine(scope, receive, send)

    await ask(generates, tracer=tracer, traceparent=given, x_request_id="mine-3", tracestate="a=1", Tracestate="b=2")
    await ask(broken, tracer=tracer, x_request_id="mine-4")
    asked = {"http.request.method": "POST", "url.path": "/v1/completions"}
    assert tracer.told == [
        ("POST /v1/completions", given, asked, "a=1,b=2"),
        ({"http.response.status_code": 200, "kvcache.request.id": "mine-3"}, ""),
        ("POST /v1/completions", "", asked, ""),
        ({"http.response.status_code": 500, "kvcache.request.id": "mine-4"}, "status 500"),
    ]


async def test_what_does_not_generate_is_not_traced() -> None:
    tracer = FakeTracer()
    await ask(fine, "/health", tracer)
    await ask(fine, "/v1/models", tracer)
    assert tracer.told == []


@pytest.mark.parametrize("given", ["", "x" * 129, "two\nlines", "\u00e9"])
async def test_an_id_that_no_log_should_hold_is_replaced(given: str) -> None:
    (start, _) = await ask(fine, x_request_id=given)
    found = dict(start["headers"])[b"x-request-id"].decode()
    assert found != given
    assert len(found) == 32
