"""What processes wrote about one request: lines as JSON, and spans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def spans_in_logs() -> Iterator[None]:
    """Processes that are started meanwhile write spans into their logs, of requests whose caller records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_TRACES_EXPORTER", "console")
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield


def entries(log: Path) -> list[dict[str, Any]]:
    """Whole lines only, the last may still be being written; libraries may print what is none of ours."""
    lines = log.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def said_of(log: Path, request_id: str) -> list[str]:
    """The messages about one request."""
    return [entry["message"] for entry in entries(log) if entry.get("request_id") == request_id]


def spans_of(log: Path, trace_id: str) -> list[dict[str, Any]]:
    """The spans of one trace, as OpenTelemetry's console exporter writes them."""
    return [entry for entry in entries(log) if entry.get("context", {}).get("trace_id") == f"0x{trace_id}"]
