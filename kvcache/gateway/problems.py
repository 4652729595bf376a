"""Errors as HTTP callers see them: a status, OpenAI's body, and when to come again. Core."""

from __future__ import annotations

import math
import re

import msgspec

from bus.errors import (
    BadArgument,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    KVCacheError,
    ModelNotFound,
    ModelUnavailable,
    NotFound,
    Overloaded,
    Rejected,
    Unauthenticated,
    Unavailable,
)

_KINDS: tuple[tuple[type[KVCacheError], int, str], ...] = (
    (ModelNotFound, 404, "invalid_request_error"),
    (NotFound, 404, "invalid_request_error"),
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (Conflict, 409, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (Cancelled, 503, "server_error"),
    (Unavailable, 503, "server_error"),
    (ModelUnavailable, 503, "server_error"),
)
_REJECTED = (400, "invalid_request_error")
_INTERNAL = (500, "server_error")

_PARAMETER = re.compile(r"(?:a token id of )?([a-z][a-z_]*)(?:\[\d+\])? (?:must|is|has|are|names)\b")


class Detail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """OpenAI's error object."""

    error: Detail


class Problem(Exception):  # not always an error of ours: the status says whose it is
    """Something to answer instead of a result. closes: the rest of the connection cannot be understood."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.closes = closes

    def body(self) -> bytes:
        detail = Detail(message=self.message, type=self.kind, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(detail))

    def headers(self) -> dict[str, str]:
        found = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            found["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.closes:
            found["connection"] = "close"
        return found


def problem_of(error: KVCacheError) -> Problem:
    """The answer for an error of the bus; what it says to the user stays as it was said."""
    status, kind = next(
        ((status, kind) for known, status, kind in _KINDS if isinstance(error, known)),
        _REJECTED if isinstance(error, Rejected) else _INTERNAL,
    )
    named = _PARAMETER.match(error.message) if isinstance(error, BadArgument) else None
    waits = status in {429, 503}
    return Problem(
        status,
        error.message,
        kind,
        param="model" if isinstance(error, ModelNotFound) else named[1] if named else None,
        code="model_not_found" if isinstance(error, ModelNotFound) else error.code.name.lower(),
        retry_after_s=max(1, math.ceil(error.retry_after_ms / 1000)) if waits else None,
    )
