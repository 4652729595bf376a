"""Logging for the processes we start: one line an event, as text for people or JSON for machines, on stderr.

A line about one request names it: by `extra=about(request_id)` where it is known, else, in a gateway's tasks, by
`current_request`. What a line is made of may come from a peer, so in text no message can begin a line of its own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType

from bus.errors import BadArgument

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The request that this task serves; empty for none."""

DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that have those around them read from the other side: a name with them can show as another."""
_CONTROL = re.compile(rf"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029{DIRECTIONS}]")

log = logging.getLogger("kvcache")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; request_id and traceback where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _request_of(record):
            line["request_id"] = request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, with the request's id at the end; a traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))
        request_id = _request_of(record)
        return f"{line} [{request_id}]" if request_id else line


def configure(level: str, style: str) -> None:
    """Send everything at `level` and above to stderr, warnings and what ends the process included.

    Raises BadArgument for a level or style that is not one.
    """
    if level.lower() not in LEVELS:
        raise BadArgument(f"log level {level!r} does not exist; use one of {', '.join(LEVELS)}")
    if style not in {"text", "json"}:
        raise BadArgument(f"log format {style!r} is neither 'text' nor 'json'")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=LEVELS[level.lower()], handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_end


def about(request_id: str) -> Mapping[str, str]:
    """What to hand to a logging call as `extra`."""
    return {"request_id": request_id}


def _request_of(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", "")) or current_request.get()


def _log_end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What nobody caught, as a line like any other."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        log.critical("this process ends: %s", kind.__name__, exc_info=(kind, error, traceback))
