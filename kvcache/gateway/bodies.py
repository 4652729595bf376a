"""A request's body, whole and in time, or a refusal: who sends slowly or much costs no more than a buffer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.requests import ClientDisconnect

from kvcache.gateway.problems import Problem
from kvcache.gateway.schema import parse

if TYPE_CHECKING:
    from starlette.requests import Request

S = TypeVar("S", bound=msgspec.Struct)


async def read(request: Request, kind: type[S], *, max_bytes: int, timeout_s: float) -> S:
    """The body as `kind`. Raises Problem: 413, 408, 415 or 400; ClientDisconnect if the caller has left."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise Problem(415, "the body must be application/json", closes=True)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", ""}:
        raise Problem(415, f"the body must not be compressed; its content-encoding is {encoding!r:.40}", closes=True)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _collect(request, max_bytes)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {timeout_s:g} s", closes=True) from None
    return parse(body, kind)


async def _collect(request: Request, max_bytes: int) -> bytes:
    too_large = Problem(413, f"the body is larger than {max_bytes} bytes", closes=True)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)
