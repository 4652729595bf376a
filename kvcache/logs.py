"""Logging for the processes we start: one line an event, as text for people or JSON for machines, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from bus.errors import BadArgument

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (UTC), level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(level: str, style: str) -> None:
    """Send everything at `level` and above to stderr. Raises BadArgument for a level or style that is not one."""
    if level.lower() not in LEVELS:
        raise BadArgument(f"log level {level!r} does not exist; use one of {', '.join(LEVELS)}")
    if style not in {"text", "json"}:
        raise BadArgument(f"log format {style!r} is neither 'text' nor 'json'")
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    logging.basicConfig(level=LEVELS[level.lower()], handlers=[handler], force=True)
