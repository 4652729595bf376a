"""Traces: off unless asked for, one trace with the right parents when they are, sampling respected."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bus.errors import BadArgument
from bus.traces import Span, parse_traceparent, sampled
from kvcache.tracing import exporter_of, tracer_for

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("env", "exporter"),
    [
        ({}, "none"),
        ({"OTEL_TRACES_EXPORTER": ""}, "none"),
        ({"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://x"}, "none"),
        ({"OTEL_TRACES_EXPORTER": " Console "}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({ENDPOINT: "http://x"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, "none"),
    ],
)
def test_the_exporter_is_what_opentelemetrys_variables_say(env: dict[str, str], exporter: str) -> None:
    assert exporter_of(env) == exporter


def test_an_unknown_exporter_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadArgument, match="'jaeger' is not known here; use one of otlp, console, none"):
        exporter_of({"OTEL_TRACES_EXPORTER": "jaeger"})


def test_nothing_is_loaded_when_it_is_off() -> None:
    code = (
        "import sys, kvcache.gateway.main, kvcache.broker.main, workers.main\n"
        "with kvcache.gateway.main.tracer_for('s', 'i', {}) as tracer: assert tracer is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "kvcache.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with tracer_for("s", "i", {ENDPOINT: "http://x"}) as tracer:
        assert tracer is None
    assert "pip install -e '.[otel]'" in caplog.text


def test_gateway_broker_and_worker_make_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from kvcache.otel import OtelTracer

    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.delenv("OTEL_TRACES_SAMPLER", raising=False)
    exporters = {name: InMemorySpanExporter() for name in ("gateway", "broker", "worker")}
    gateway, broker, worker = (OtelTracer(name, "1", exporter) for name, exporter in exporters.items())

    asked = gateway.begin("POST /v1/completions", "", {"http.request.method": "POST"})
    parent = sampled(asked.traceparent)
    assert parent is not None
    routed = Span(name="kvcache.broker", parent=parent, started_at=10.0, id="c" * 16)
    parts = (("queue", 0.25), ("prefill", 0.5), ("decode", 1.0))
    worker.record(Span(name="kvcache.worker", parent=routed.context, started_at=11.0, parts=parts), 13.0)
    broker.record(routed, 14.0)
    asked.end({"http.response.status_code": 503}, "status 503")
    for tracer in (worker, broker, gateway):
        tracer.close()

    made = {span.name: span for exporter in exporters.values() for span in exporter.get_finished_spans()}
    names = {span.context.span_id: name for name, span in made.items()}
    parents = {name: names[span.parent.span_id] if span.parent else "" for name, span in made.items()}
    assert parents == {
        "POST /v1/completions": "",
        "kvcache.broker": "POST /v1/completions",
        "kvcache.worker": "kvcache.broker",
        "queue": "kvcache.worker",
        "prefill": "kvcache.worker",
        "decode": "kvcache.worker",
    }
    assert len({span.context.trace_id for span in made.values()}) == 1
    assert made["kvcache.broker"].context.span_id == int("c" * 16, 16)
    times = {name: (span.start_time or 0, span.end_time or 0) for name, span in made.items()}
    whole, queue, prefill, decode = (times[name] for name in ("kvcache.worker", "queue", "prefill", "decode"))
    assert whole[1] - whole[0] == 2_000_000_000
    assert (queue[1], prefill[1], decode[1]) == (prefill[0], decode[0], whole[1])
    assert decode[1] - queue[0] == 1_750_000_000
    assert not made["POST /v1/completions"].status.is_ok
    assert made["kvcache.broker"].resource.attributes["service.name"] == "broker"


def test_what_a_stranger_calls_a_tracestate_is_not_repeated_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from kvcache.otel import MAX_TRACESTATE, OtelTracer

    spans = InMemorySpanExporter()
    tracer = OtelTracer("gateway", "1", spans)
    for state in ("a=\u00e9", 60_000 * "x", ",".join(f"k{number}=v" for number in range(MAX_TRACESTATE))):
        tracer.begin("x", f"00-{'a' * 32}-{'b' * 16}-01", {}, state).end({})
    tracer.close()
    assert [dict(span.context.trace_state) for span in spans.get_finished_spans()] == [{}, {}, {}]
    assert caplog.records == []


def test_sampling_is_the_callers_or_else_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from kvcache.otel import OtelTracer

    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    spans = InMemorySpanExporter()
    tracer = OtelTracer("gateway", "1", spans)
    for given in ("", "nonsense", f"00-{'a' * 32}-{'b' * 16}-00"):
        asked = tracer.begin("x", given, {}, "a tracestate, that=\u00e9 is none")
        context = parse_traceparent(asked.traceparent)
        assert context is not None
        assert not context.is_sampled
        asked.end({})
    asked = tracer.begin("x", f"00-{'a' * 32}-{'b' * 16}-01", {}, "vendor=1,other=2")
    assert asked.traceparent.startswith(f"00-{'a' * 32}-")
    assert asked.traceparent.endswith("-01")
    asked.end({})
    tracer.close()
    (span,) = spans.get_finished_spans()
    assert span.resource.attributes["service.name"] == "mine"
    assert dict(span.context.trace_state) == {"vendor": "1", "other": "2"}
