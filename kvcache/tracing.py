"""Traces, if OpenTelemetry's own variables ask for them: OTEL_TRACES_EXPORTER, or an OTLP endpoint.

Owns whether a process traces at all; what it does then is `kvcache.otel`, which is only imported in that case, so
that nothing is loaded, and nothing costs anything, when it is off.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from bus.errors import BadArgument
from bus.traces import Attributes, Span

EXPORTERS = ("otlp", "console", "none")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

log = logging.getLogger(__name__)


class OpenSpan(Protocol):
    """A span that has begun here."""

    @property
    def traceparent(self) -> str:
        """What others are asked within it."""

    def end(self, attributes: Attributes, error: str = "") -> None:
        """It ends now; `error` says why it failed, if it did."""


class Tracer(Protocol):
    """Where spans go. Never blocks, and never raises for what becomes of them."""

    def begin(self, name: str, traceparent: str, attributes: Attributes, tracestate: str = "") -> OpenSpan:
        """Begin a span within this context, or a trace of its own, as far as the sampler wants it, if that is none.

        tracestate: what others than us note of the trace (W3C); one that cannot be read counts as none.
        """

    def record(self, span: Span, now: float) -> None:
        """A span has ended, now (monotonic seconds)."""


def exporter_of(env: Mapping[str, str]) -> str:
    """One of EXPORTERS. Raises BadArgument for another."""
    name = env.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    if not name:
        return "otlp" if any(env.get(endpoint) for endpoint in ENDPOINTS) else "none"
    if name not in EXPORTERS:
        raise BadArgument(f"OTEL_TRACES_EXPORTER {name!r} is not known here; use one of {', '.join(EXPORTERS)}")
    return name


@contextmanager
def tracer_for(service: str, instance: str, env: Mapping[str, str]) -> Iterator[Tracer | None]:
    """The tracer of this process, None if it is to have none; what it still has is exported when the block is left.

    service, instance: the resource's name and id, unless OTEL_SERVICE_NAME says otherwise. Raises BadArgument.
    """
    exporter = exporter_of(env)
    if exporter == "none":
        yield None
        return
    try:
        from kvcache.otel import OtelTracer, make_exporter
    except ModuleNotFoundError as error:
        log.warning("no traces: %s is not installed; run in the checkout: pip install -e '.[otel]'", error.name)
        yield None
        return
    tracer = OtelTracer(service, instance, make_exporter(exporter))
    try:
        yield tracer
    finally:
        tracer.close()
