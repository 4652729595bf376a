"""What is made of the figures: every figure as a row, the goals against them, a table to read and a plot.

A ratio is taken within each round, where both were measured one after the other; its row has the median of the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from kvcache.bench.engine_goals import Figures
from kvcache.bench.report import Row, row
from kvcache.bench.systems.contestants import GENAI, HTTP, LLAMA, ONE, PLAIN, TORCH, TWO, VLLM
from kvcache.plots import plot

SYSTEMS = (ONE, HTTP, TWO, TORCH, PLAIN, GENAI, LLAMA, VLLM)
WORKLOADS = ("chats", "documents", "no sharing")
SHARING = ("chats", "documents")
FIRST_P50, FIRST_P90, RATE, SUCCESS = "first token p50", "first token p90", "tokens", "success"
UNITS = {FIRST_P50: "ms", FIRST_P90: "ms", RATE: "tok/s", SUCCESS: "%", "memory": "MiB"}
IN_PROCESS = "our engine, in process"
FIRST_GOAL, RATE_GOAL, OVERHEAD_PERCENT = 10.0, 5.0, 5.0
KV_GOALS = {"put": 10.0, "get": 10.0, "append": 20.0}
KV_UNIT = "ms"
RIVALS = (
    *((PLAIN, ours) for ours in (ONE, HTTP, TWO, TORCH)),
    *((peer, ours) for peer in (GENAI, LLAMA, VLLM) for ours in (ONE, TWO)),
)


def rows(figures: Figures) -> list[Row]:
    """Every figure, then the goals, then how ours compares with each peer."""
    plain = [row(f"{figure}: {system}", values, _unit(figure)) for figure, system, values in figures]
    return [*plain, *goals(figures), *_ratios(figures)]


def goals(figures: Figures) -> Iterator[Row]:
    """Those of which both sides were measured."""
    for workload in SHARING:
        first, rate = f"{workload}, {FIRST_P50}", f"{workload}, {RATE}"
        yield from _times(f"{first}: {ONE}, times sooner than {PLAIN}", figures, first, PLAIN, ONE, FIRST_GOAL)
        yield from _times(f"{rate}: {ONE}, times those of {PLAIN}", figures, rate, ONE, PLAIN, RATE_GOAL)
    yield from _overhead(figures)
    for figure in dict.fromkeys(figure for figure, _, _ in figures if figure.startswith("KV ")):
        goal = KV_GOALS[figure.split()[1]]
        yield from _times(f"{figure}: ours, times sooner than {PLAIN}", figures, figure, PLAIN, "ours", goal)


def _overhead(figures: Figures) -> Iterator[Row]:
    """What stands around the engine costs, where nothing can be reused: the same work through the whole system."""
    figure = f"no sharing, {RATE}"
    pairs = _pairs(figures, figure, IN_PROCESS, ONE)
    if pairs:
        more = [100 * (engine / system - 1) for engine, system in pairs]
        name = f"no sharing, time more than {IN_PROCESS}: {ONE}"
        yield row(name, more, "%", goal=OVERHEAD_PERCENT, sense="<=", on="value")


def _ratios(figures: Figures) -> Iterator[Row]:
    """Without a goal. The plain services compute with torch, so ours on torch shows what is not the runner's merit."""
    for workload in WORKLOADS:
        for peer, ours in RIVALS:
            if (peer, ours) == (PLAIN, ONE) and workload in SHARING:
                continue  # a goal
            yield from _compared(figures, workload, peer, ours)


def _compared(figures: Figures, workload: str, peer: str, ours: str) -> Iterator[Row]:
    first, rate = f"{workload}, {FIRST_P50}", f"{workload}, {RATE}"
    yield from _times(f"{first}: {ours}, times sooner than {peer}", figures, first, peer, ours, None)
    yield from _times(f"{rate}: {ours}, times those of {peer}", figures, rate, ours, peer, None)


def _times(name: str, figures: Figures, figure: str, above: str, below: str, goal: float | None) -> Iterator[Row]:
    pairs = _pairs(figures, figure, above, below)
    if pairs:
        yield row(name, [top / bottom for top, bottom in pairs], "x", goal=goal, on="value")


def _pairs(figures: Figures, figure: str, left: str, right: str) -> list[tuple[float, float]]:
    """The rounds that both were there for; who has failed once is not asked again, so these are the first ones."""
    return list(zip(figures.of(figure, left), figures.of(figure, right), strict=False))


def _unit(figure: str) -> str:
    return KV_UNIT if figure.startswith("KV ") else UNITS[figure.rpartition(", ")[2]]


def markdown(figures: Figures, failures: Mapping[str, str]) -> str:
    """The tables for people: a line for each system, with the reason where there are no figures; goals; KV."""
    return "\n\n".join(_as_table(*table) for table in _tables(figures, failures) if table[1]) + "\n"


def _tables(figures: Figures, failures: Mapping[str, str]) -> Iterator[tuple[list[str], list[list[str]]]]:
    shown = (FIRST_P50, FIRST_P90, RATE, SUCCESS)
    heads = [f"{workload}: {part}, {UNITS[part]}" for workload in WORKLOADS for part in shown]
    names = [f"{workload}, {part}" for workload in WORKLOADS for part in shown]
    systems = [system for system in SYSTEMS if system in failures or any(figures.of(name, system) for name in names)]
    body = [
        [system, *(_median(figures.of(name, system)) for name in (*names, "memory")), failures.get(system, "")]
        for system in systems
    ]
    yield ["", *heads, "memory, MiB", "left out"], body
    judged = [
        [each.name, f"{each.value:.2f} {each.unit}", each.goal, "yes" if each.met else "**no**", _spread(each)]
        for each in goals(figures)
    ]
    yield ["goal", "measured", "", "met", "spread of the rounds"], judged
    parts = [f"{workload}: {part}" for workload in WORKLOADS for part in ("first token sooner", "tokens")]
    ratios = [[f"{ours} / {peer}", *_ratio_cells(figures, peer, ours)] for peer, ours in RIVALS]
    yield ["ratio (spread of the rounds)", *parts], [line for line in ratios if any(line[1:])]
    stored = list(dict.fromkeys(figure for figure, _, _ in figures if figure.startswith("KV ")))
    stores = list(dict.fromkeys(system for figure, system, _ in figures if figure in stored))
    kept = [[figure, *(_median(figures.of(figure, store)) for store in stores)] for figure in stored]
    yield [f"{KV_UNIT}", *stores], kept


def _ratio_cells(figures: Figures, peer: str, ours: str) -> Iterator[str]:
    for workload in WORKLOADS:
        found = [f"{each.value:.2f}x ({_spread(each)})" for each in _compared(figures, workload, peer, ours)]
        yield from found or ("", "")


def points(figures: Figures) -> str:
    """Each system as a point: how soon the first token of a chat comes, and how many come in all. As SVG."""
    places = {}
    for system in SYSTEMS:
        first, rate = figures.of(f"chats, {FIRST_P50}", system), figures.of(f"chats, {RATE}", system)
        if first and rate:
            places[system] = [(statistics.median(first), statistics.median(rate))]
    names = "median time to the first token, ms", "tokens per second"
    return plot("Chats behind one system prompt", *names, places, as_points=True, log_x=True, log_y=True)


def _as_table(heads: list[str], body: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):,.4g}" if values else ""


def _spread(each: Row) -> str:
    return f"{min(each.runs):.3g} to {max(each.runs):.3g}"
