"""Families as the text that Prometheus reads, under our names and, if wanted, also under vLLM's.

Ours begin with `kvcache_`: colons, which vLLM's names have, are reserved for recording rules by Prometheus' own
conventions. Behind the prefix the names are vLLM's where the meaning is, so that whoever knows those finds these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from kvcache.metrics.families import Buckets, Family, Kind

PREFIX = "kvcache_"
VLLM_PREFIX = "vllm:"

VLLM_NAMES: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens", "request_success"),
        *("prompt_tokens", "generation_tokens"),
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
        "cache_config_info",
    )
} | {
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
}
"""Of our families, those that mean what vLLM's of these names do; the `gpu_` ones are older, still on dashboards."""
_VLLM_LABELS = {"worker": "engine"}


def also_as_vllm(families: Sequence[Family]) -> Iterator[Family]:
    """Those that vLLM has too, under its names and with its labels."""
    for family in families:
        for name in VLLM_NAMES.get(family.name, ()):
            labels = tuple(_VLLM_LABELS.get(label, label) for label in family.labels)
            yield replace(family, name=name, labels=labels)


class Page(Collector):
    """Everything that one scrape tells: families, and what the system says of this very process."""

    def __init__(self, families: Iterable[Family], *, is_vllm_compatible: bool) -> None:
        self._families = list(families)
        self._is_vllm_compatible = is_vllm_compatible

    def collect(self) -> Iterator[Metric]:
        yield from (_metric(PREFIX, family) for family in self._families)
        if self._is_vllm_compatible:
            yield from (_metric(VLLM_PREFIX, family) for family in also_as_vllm(self._families))
        yield from ProcessCollector(registry=None).collect()

    def encode(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, as the header `Accept` wants it, or as plain text if that cannot be read."""
        encoder, content_type = choose_encoder(readable_accept(accept))
        return encoder(self), content_type


def readable_accept(accept: str) -> str:
    """The header, or nothing if prometheus_client cannot read it: it fails on a version that is none."""
    try:
        choose_encoder(accept)
    except (ValueError, TypeError):
        return ""
    return accept


def _metric(prefix: str, family: Family) -> Metric:
    name = prefix + family.name
    match family.kind:
        case Kind.COUNTER:
            counter = CounterMetricFamily(name, family.text, labels=family.labels)
            for labels, value in family.samples:
                counter.add_metric(labels, _number(value))
            return counter
        case Kind.GAUGE:
            gauge = GaugeMetricFamily(name, family.text, labels=family.labels)
            for labels, value in family.samples:
                gauge.add_metric(labels, _number(value))
            return gauge
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(name, family.text, labels=family.labels)
            for labels, value in family.samples:
                assert isinstance(value, Buckets), f"{name} is a histogram, and {value} is a number"
                counts = [(_bound(bound), count) for bound, count in zip(value.bounds, value.counts, strict=True)]
                histogram.add_metric(labels, counts, value.total)
            return histogram


def _number(value: float | Buckets) -> float:
    assert not isinstance(value, Buckets), "only histograms have buckets"
    return float(value)


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else str(float(bound))
