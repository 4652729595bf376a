"""The engine benchmark's figures, and what they are held against: rows for the report, with its goals.

Precisions are equal within a run, so a ratio is between two engines that compute the same numbers.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from kvcache.bench.report import Row, row

UNITS = {"decode": "tok/s", "prefill": "tok/s", "first": "ms", "chats": "req/s", "peak": "MiB", "bookkeeping": "%"}
TORCH, OPENVINO, GENERATE, BATCHING = "ours, torch", "ours, openvino", "transformers generate", "transformers batching"
GENAI, LLAMA, VLLM = "OpenVINO GenAI", "llama.cpp server", "vLLM CPU"
COLD, WARM = "first token, cold", "first token, warm"
REUSING = (GENAI, LLAMA, VLLM, BATCHING)
"""The peers that keep prefixes."""
Sense = Literal[">=", "<="]
GOALS: tuple[tuple[str, str, str, Sense, float], ...] = (
    ("decode, 1 streams", TORCH, GENERATE, ">=", 1.0),
    ("decode, 8 streams", TORCH, GENERATE, ">=", 1.3),
    ("decode, 32 streams", TORCH, GENERATE, ">=", 1.3),
    ("decode, 8 streams", TORCH, BATCHING, ">=", 1.5),
    ("decode, 32 streams", TORCH, BATCHING, ">=", 1.5),
    ("decode, 1 streams", OPENVINO, GENAI, ">=", 0.95),
    ("decode, 8 streams", OPENVINO, GENAI, ">=", 0.95),
    ("decode, 32 streams", OPENVINO, GENAI, ">=", 0.95),
    ("decode, 8 streams", OPENVINO, VLLM, ">=", 1.2),
    ("decode, 32 streams", OPENVINO, VLLM, ">=", 1.2),
    ("decode, 8 streams", OPENVINO, LLAMA, ">=", 1.2),
    ("decode, 32 streams", OPENVINO, LLAMA, ">=", 1.2),
    (COLD, OPENVINO, GENAI, "<=", 1.1),
)
BOOKKEEPING_PERCENT = 3.0
COLD_OVER_WARM = 20.0
CHATS_OVER_BEST = 1.2


class Figures:
    """What was measured: by figure and engine, one value per round."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ceilings: dict[str, float] = {}
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, figure: str, engine: str, value: float) -> None:
        self._values[figure][engine].append(value)

    def of(self, figure: str, engine: str) -> list[float]:
        """The rounds of one engine; empty if it was not measured."""
        return self._values.get(figure, {}).get(engine, [])

    def __iter__(self) -> Iterator[tuple[str, str, list[float]]]:
        for figure, engines in self._values.items():
            for engine, values in engines.items():
                yield figure, engine, values


def compare(figures: Figures) -> list[Row]:
    """Every figure, then every goal that both of its engines were there for."""
    plain = [row(f"{figure}: {engine}", values, _unit(figure)) for figure, engine, values in figures]
    return [*plain, *_goals(figures), *_bests(figures), *_own_goals(figures), *_roofline(figures)]


def _goals(figures: Figures) -> Iterator[Row]:
    for figure, engine, reference, sense, goal in GOALS:
        pairs = list(zip(figures.of(figure, engine), figures.of(figure, reference), strict=False))
        if pairs:
            yield _against(figure, engine, reference, pairs, sense, goal)


def _bests(figures: Figures) -> Iterator[Row]:
    """Warm first tokens and shared prefixes, against the best of the peers that keep prefixes."""
    for figure, sense, goal in ((WARM, "<=", 1.0), ("chats", ">=", CHATS_OVER_BEST)):
        medians = {peer: statistics.median(values) for peer in REUSING if (values := figures.of(figure, peer))}
        if not medians:
            continue
        choose = min if sense == "<=" else max
        best = choose(medians, key=lambda peer: medians[peer])
        pairs = list(zip(figures.of(figure, OPENVINO), figures.of(figure, best), strict=False))
        if pairs:
            yield _against(figure, OPENVINO, best, pairs, "<=" if sense == "<=" else ">=", goal)


def _own_goals(figures: Figures) -> Iterator[Row]:
    for engine in (TORCH, OPENVINO):
        cold, warm = figures.of(COLD, engine), figures.of(WARM, engine)
        pairs = list(zip(cold, warm, strict=False))
        if pairs:
            ratios = [left / right for left, right in pairs]
            yield row(f"first token, cold over warm: {engine}", ratios, "x", goal=COLD_OVER_WARM, on="value")
        figure = "bookkeeping, 32 streams"
        if figures.of(figure, engine):
            values = figures.of(figure, engine)
            yield row(f"{figure}: {engine}, of a step", values, "%", goal=BOOKKEEPING_PERCENT, sense="<=", on="value")


def _roofline(figures: Figures) -> Iterator[Row]:
    """How much of the machine is used: a decode step reads all weights, a prefill multiplies each by every token."""
    if not (ceiling := figures.ceilings):
        return
    for figure, engine, values in figures:
        kind, _, rest = figure.partition(", ")
        if kind == "decode":
            streams = int(rest.split()[0])
            shares = [100 * value / streams * ceiling["weight_bytes"] / ceiling["bytes_per_s"] for value in values]
            yield row(f"share of memory bandwidth, {figure}: {engine}", shares, "%")
        if kind == "prefill":
            shares = [100 * value * 2 * ceiling["num_weights"] / ceiling["flops_per_s"] for value in values]
            yield row(f"share of matrix products, {figure}: {engine}", shares, "%")


def _against(
    figure: str, engine: str, reference: str, pairs: Sequence[tuple[float, float]], sense: Sense, goal: float
) -> Row:
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    name = f"{figure}: {engine} / {reference}"
    return row(name, ours, _unit(figure), against=theirs, reference=reference, goal=goal, sense=sense)


def _unit(figure: str) -> str:
    return UNITS[figure.replace(",", " ").split()[0]]
