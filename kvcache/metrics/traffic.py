"""What a gateway sees of generations: how long they took, how many tokens they were, how they ended. Core.

Each output is a request of its own, as it is to the workers: with `n` outputs a prompt counts `n` times. Times are
seconds of a monotonic clock, taken when events reach the gateway, so they hold what broker and network add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bus.errors import ErrorCode, KVCacheError
from bus.messages import FinishReason
from kvcache.client.results import Done, Event, Start, Token
from kvcache.metrics.families import OTHER, Family, Histogram, Kind

MAX_MODELS = 64

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
"""vLLM's bounds, here and below, so that its users' panels fit; finer ones are added where small models need them."""
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
REQUEST_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the request to its first token.", FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between a token and the next; what comes together shares the time.", TOKEN_S),
    "request_time_per_output_token_seconds": ("Per token after the first, one value a request.", TOKEN_S),
    "e2e_request_latency_seconds": ("From the request to its end.", REQUEST_S),
    "request_queue_time_seconds": ("Spent waiting on the worker that ended it.", REQUEST_S),
    "request_prefill_time_seconds": ("Spent on the prompt, by that worker.", REQUEST_S),
    "request_decode_time_seconds": ("Spent on the output, by that worker.", REQUEST_S),
    "request_inference_time_seconds": ("Spent on both.", REQUEST_S),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of an output.", TOKENS),
}
_COUNTERS: dict[str, str] = {
    "prompt_tokens": "Tokens of prompts that were begun, cached ones included.",
    "cached_prompt_tokens": "Of them, those whose KV was in a worker's cache.",
    "generation_tokens": "Tokens that were generated.",
    "stream_resumes": "Times that a stream lost its worker or broker and went on elsewhere.",
}


@dataclass(slots=True)
class _Model:
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
    )
    counters: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


class Traffic:
    """Totals since the process started."""

    def __init__(self) -> None:
        self.num_open = 0
        self._models: dict[str, _Model] = {}
        self._failures: Counter[str] = Counter()

    def watch(self, num_outputs: int, now: float) -> Watch:
        """A request with so many outputs begins."""
        return Watch(self, num_outputs, now)

    def model(self, name: str) -> _Model:
        """What is counted of this model; of very many models the last ones share their figures."""
        if name not in self._models and len(self._models) >= MAX_MODELS:
            name = OTHER
        return self._models.setdefault(name, _Model())

    def failed(self, code: ErrorCode, num_outputs: int) -> None:
        self._failures[code.name] += num_outputs

    def families(self) -> list[Family]:
        """All of it, at this moment."""
        running = Family("gateway_outputs_running", Kind.GAUGE, "Outputs that have not ended.")
        running.add(self.num_open)
        failures = Family(
            "request_failures", Kind.COUNTER, "Outputs that ended badly; CANCELLED: the caller left.", ("code",)
        )
        for code in ErrorCode:
            failures.add(self._failures[code.name], code.name)
        ends = Family("request_success", Kind.COUNTER, "Outputs that ended well.", ("model_name", "finished_reason"))
        for name, model in self._models.items():
            for reason in FinishReason:
                ends.add(model.ends[reason.value], name, reason.value)
        return [running, failures, ends, *self._counters(), *self._histograms()]

    def _counters(self) -> list[Family]:
        found = [Family(name, Kind.COUNTER, text, ("model_name",)) for name, text in _COUNTERS.items()]
        for family in found:
            for name, model in self._models.items():
                family.add(model.counters[family.name], name)
        return found

    def _histograms(self) -> list[Family]:
        found = [Family(name, Kind.HISTOGRAM, text, ("model_name",)) for name, (text, _) in _HISTOGRAMS.items()]
        for family in found:
            for name, model in self._models.items():
                family.add(model.histograms[family.name].buckets(), name)
        return found


@dataclass(slots=True)
class _Output:
    """One output that has not ended. first_at, last_at: when tokens came; the request's begin before any has."""

    model: _Model
    first_at: float
    last_at: float
    num_tokens: int = 0


class Watch:
    """One request's outputs, until all have ended or the request is `closed`."""

    def __init__(self, traffic: Traffic, num_outputs: int, now: float) -> None:
        self._traffic = traffic
        self._begun_at = now
        self._num_open = num_outputs
        self._outputs: dict[int, _Output] = {}
        traffic.num_open += num_outputs

    def saw(self, events: Sequence[Event], now: float) -> None:
        """These events of its outputs came together."""
        tokens: dict[int, int] = {}
        ends: list[Done] = []
        for event in events:
            match event:
                case Start():
                    self._started(event)
                case Token():
                    tokens[event.index] = tokens.get(event.index, 0) + 1
                case Done():
                    ends.append(event)
        for index, num_tokens in tokens.items():
            self._produced(self._outputs[index], num_tokens, now)
        for done in ends:
            self._ended(done, now)

    def closed(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        """Nothing more will be seen; what has not ended ended for this reason."""
        self._traffic.failed(code, self._num_open)
        self._traffic.num_open -= self._num_open
        self._num_open = 0

    def failed(self, error: KVCacheError) -> None:
        self.closed(error.code)

    def _started(self, start: Start) -> None:
        model = self._traffic.model(start.model)
        self._outputs[start.index] = _Output(model, self._begun_at, self._begun_at)
        model.counters["prompt_tokens"] += start.prompt_tokens
        model.counters["cached_prompt_tokens"] += start.cached_tokens

    def _produced(self, output: _Output, num_tokens: int, now: float) -> None:
        histograms = output.model.histograms
        num_later, interval = num_tokens, (now - output.last_at) / num_tokens
        if output.num_tokens == 0:
            histograms["time_to_first_token_seconds"].observe(now - self._begun_at)
            output.first_at = now
            num_later, interval = num_tokens - 1, 0.0
        if num_later:
            histograms["inter_token_latency_seconds"].observe(interval, num_later)
        output.last_at = now
        output.num_tokens += num_tokens
        output.model.counters["generation_tokens"] += num_tokens

    def _ended(self, done: Done, now: float) -> None:
        output, timings = self._outputs.pop(done.index), done.timings
        values = {
            "e2e_request_latency_seconds": now - self._begun_at,
            "request_queue_time_seconds": timings.queue_ms / 1000,
            "request_prefill_time_seconds": timings.prefill_ms / 1000,
            "request_decode_time_seconds": timings.decode_ms / 1000,
            "request_inference_time_seconds": (timings.prefill_ms + timings.decode_ms) / 1000,
            "request_prompt_tokens": done.usage.prompt_tokens,
            "request_generation_tokens": done.usage.completion_tokens,
        }
        if output.num_tokens > 1:
            per_token = (output.last_at - output.first_at) / (output.num_tokens - 1)
            values["request_time_per_output_token_seconds"] = per_token
        for name, value in values.items():
            output.model.histograms[name].observe(value)
        output.model.counters["stream_resumes"] += timings.resumes
        output.model.ends[done.finish_reason] += 1
        self._num_open -= 1
        self._traffic.num_open -= 1
