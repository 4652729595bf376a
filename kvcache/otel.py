"""OpenTelemetry, all of it: the one file that imports it, and only when traces are wanted (`kvcache.tracing`).

Sampling, batches and limits are the SDK's, and follow its OTEL_ variables. Spans of cores come when they are over, with
an id that others were asked within already; the SDK is told that id by its own hook, an id generator.
"""

from __future__ import annotations

import logging
import sys
import threading
import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from bus.traces import Attributes, Span, TraceContext, parse_traceparent

FLUSH_S = 3.0
MAX_TRACESTATE = 512
"""Characters, which is what W3C asks everybody to keep (Trace Context, 3.3.1.5)."""

# It would repeat in our log what a stranger wrote where a `tracestate` should be.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)


class OtelTracer:
    """A `kvcache.tracing.Tracer`, for one thread. What the environment says of the resource wins over what we do."""

    def __init__(self, service: str, instance: str, exporter: SpanExporter) -> None:
        ours = Resource({"service.name": service, "service.instance.id": instance})
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=ours.merge(_from_environment()), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvcache")

    def begin(self, name: str, traceparent: str, attributes: Attributes, tracestate: str = "") -> OtelSpan:
        parent = parse_traceparent(traceparent)
        state = TraceState.from_header([tracestate]) if len(tracestate) <= MAX_TRACESTATE else None
        within = Context() if parent is None else _within(parent, state)
        return OtelSpan(self._tracer.start_span(name, within, SpanKind.SERVER, attributes))

    def record(self, span: Span, now: float) -> None:
        ended_ns = time.time_ns()
        self._ids.next_span_id = int(span.id, 16) if span.id else 0
        whole = self._tracer.start_span(
            span.name,
            _within(span.parent),
            SpanKind.SERVER,
            span.attributes,
            start_time=ended_ns - _ns(now - span.started_at),
        )
        start_ns = ended_ns - sum(_ns(seconds) for _, seconds in span.parts)
        for name, seconds in span.parts:
            part = self._tracer.start_span(name, trace.set_span_in_context(whole, Context()), start_time=start_ns)
            start_ns += _ns(seconds)
            part.end(start_ns)
        if span.error:
            whole.set_status(Status(StatusCode.ERROR, span.error))
        whole.end(ended_ns)

    def close(self) -> None:
        """Export what is left, for at most FLUSH_S: the SDK takes a limit, and its exporters do not keep it."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(FLUSH_S)


class OtelSpan:
    """A `kvcache.tracing.OpenSpan`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        context = self._span.get_span_context()
        trace_id, span_id = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        return str(TraceContext(trace_id, span_id, context.trace_flags.sampled))

    def end(self, attributes: Attributes, error: str = "") -> None:
        self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class _Ids(RandomIdGenerator):
    """Random ids, but for one span whose id is known."""

    def __init__(self) -> None:
        self.next_span_id = 0

    def generate_span_id(self) -> int:
        known, self.next_span_id = self.next_span_id, 0
        return known or super().generate_span_id()


def make_exporter(name: str) -> SpanExporter:
    """`otlp`, to where the SDK's variables say, over HTTP; or `console`, a JSON object a line on stderr."""
    return ConsoleSpanExporter(out=sys.stderr, formatter=_as_line) if name == "console" else OTLPSpanExporter()


def _as_line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


def _from_environment() -> Resource:
    """What OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and the SDK say, but for a name that it only made up."""
    found = Resource.create()
    given = {
        key: value
        for key, value in found.attributes.items()
        if key != "service.name" or not str(value).startswith("unknown_service")
    }
    return Resource(given)


def _within(context: TraceContext, state: TraceState | None = None) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    remote = SpanContext(
        int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags, trace_state=state
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), Context())


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
