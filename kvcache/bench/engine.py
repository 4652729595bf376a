"""`kvcache bench engine`: our engine against what its users would run instead, all in one run.

Every engine has a process of its own with the same weights, threads and prompts, and takes its turn at each figure in
each round, while the others are stopped. Prompts are random tokens that were never sent before, so nothing is found in
a cache but what the figure is about. An engine that cannot run is left out, with the reason.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvcache.bench.engine_goals import Figures, compare
from kvcache.bench.peers.environments import PeerUnavailable, python_of
from kvcache.bench.peers.process import PeerProcess
from kvcache.bench.peers.weights import gguf_folder
from kvcache.bench.report import Report, report
from kvcache.models import DEFAULT_HOME, ModelRegistry
from kvcache.plots import plot

MODEL = "smollm2"
PEERS_FOLDER = Path(__file__).parent / "peers"
VOCABULARY = range(1000, 40_000)
ROUNDS, QUICK_ROUNDS = 5, 3
DECODE_STREAMS = (1, 8, 32)
DECODE_PROMPT = 32
DECODE_TOKENS, QUICK_DECODE_TOKENS = 64, 24
PREFILLS = (512, 1024)
CACHED = 1008
SYSTEM_TOKENS, TURN_TOKENS, REPLY_TOKENS = 512, 64, 32
CHATS, TURNS = 16, 4
DType = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine: how it is called here, its script (ours is a module), and the environment it lives in."""

    name: str
    script: str
    environment: str = ""
    reads_gguf: bool = False


OURS = (Contestant("ours, torch", "torch"), Contestant("ours, openvino", "openvino"))
PEERS: dict[str, Contestant] = {
    "transformers": Contestant("transformers generate", "run_transformers_generate.py"),
    "transformers-batching": Contestant("transformers batching", "run_transformers_batching.py"),
    "openvino-genai": Contestant("OpenVINO GenAI", "run_openvino_genai.py", "openvino-genai", reads_gguf=True),
    "llama-cpp": Contestant("llama.cpp server", "run_llama_cpp.py", "llama-cpp", reads_gguf=True),
    "vllm-cpu": Contestant("vLLM CPU", "run_vllm_cpu.py", "vllm-cpu"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """peers: which ones, by their names in PEERS. install: make the environments that are missing. plot: where to."""

    peers: tuple[str, ...] = tuple(PEERS)
    install: bool = False
    dtype: DType = "bfloat16"
    threads: int = os.cpu_count() or 1
    home: Path = DEFAULT_HOME
    plot: Path | None = None


def run(*, quick: bool, progress: Callable[[str], None], options: Options | None = None) -> Report:
    """All figures of all engines that run here. `quick`: fewer rounds and tokens, and no cost growth without a plot.

    Raises PeerUnavailable if not even our own engine runs.
    """
    options = options or Options()
    options = replace(options, home=options.home.expanduser())
    figures = Figures()
    with ExitStack() as stack:
        engines = dict(_started(stack, options, figures, progress))
        if not any(contestant.name in engines for contestant in OURS):
            raise PeerUnavailable("; ".join(figures.notes))
        driver = _Driver(engines, figures, quick=quick)
        for number in range(1, driver.num_rounds + 1):
            progress(f"round {number} of {driver.num_rounds}: {', '.join(driver.names)}")
            driver.round()
        driver.sizes()
        if options.plot:
            progress("cost growth")
            options.plot.write_text(driver.growth())
    return report("engine", compare(figures), figures.notes)


def _started(
    stack: ExitStack, options: Options, figures: Figures, progress: Callable[[str], None]
) -> Iterator[tuple[str, PeerProcess]]:
    """Every engine that loads, by name; why another does not is a note."""
    folder = ModelRegistry(options.home).find(MODEL).path
    for contestant in (*OURS, *(PEERS[name] for name in options.peers)):
        progress(f"loading {contestant.name}")
        try:
            model = folder
            if contestant.reads_gguf:
                model = gguf_folder(folder, options.home, options.dtype, progress)
            process = PeerProcess(_command(contestant, options, progress), _variables(contestant, options.threads))
            stack.callback(process.close)
            facts = process.ask(do="load", model=str(model), threads=options.threads, dtype=options.dtype)
        except PeerUnavailable as error:
            figures.notes.append(f"{contestant.name} was left out: {error.message}")
            continue
        figures.notes.append(f"{contestant.name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
        yield contestant.name, process


def _command(contestant: Contestant, options: Options, progress: Callable[[str], None]) -> list[str]:
    if contestant in OURS:
        return [sys.executable, "-m", "workers.bench_peer", contestant.script]
    python = Path(sys.executable)
    if contestant.environment:
        python = python_of(contestant.environment, options.home, install=options.install, progress=progress)
    return [str(python), str(PEERS_FOLDER / "scripts" / contestant.script)]


def _variables(contestant: Contestant, threads: int) -> dict[str, str]:
    """A foreign script finds the contract by its path: this project is not installed where it runs."""
    variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return variables if contestant in OURS else {**variables, "PYTHONPATH": str(PEERS_FOLDER)}


class _Driver:
    """Measures every engine at every figure, one after the other."""

    def __init__(self, engines: Mapping[str, PeerProcess], figures: Figures, *, quick: bool) -> None:
        self.num_rounds = QUICK_ROUNDS if quick else ROUNDS
        self._engines = dict(engines)
        self._figures = figures
        self._tokens = QUICK_DECODE_TOKENS if quick else DECODE_TOKENS
        self._chats, self._turns = (CHATS // 4, TURNS // 2) if quick else (CHATS, TURNS)
        self._draw = random.Random(17)
        for name in self.names:
            with self._turn(name) as ask:
                ask(do="run", prompts=[self._prompt(DECODE_PROMPT)] * 2, max_tokens=2)

    @property
    def names(self) -> list[str]:
        return list(self._engines)

    def round(self) -> None:
        """Every figure of every engine once, the figure's prompts the same for all."""
        for streams in DECODE_STREAMS:
            self._each(self._decode, [self._prompt(DECODE_PROMPT) for _ in range(3 * streams)])
        for length in PREFILLS:
            self._each(self._prefill, [self._prompt(length)])
        self._each(self._warm, [self._prompt(PREFILLS[-1])])
        self._each(self._mixed, self._conversations())

    def sizes(self) -> None:
        """Peak memory of each engine, and what the machine can do at most, as our own measures it."""
        for name in self.names:
            with self._turn(name) as ask:
                self._figures.add("peak memory", name, ask(do="memory")["peak_bytes"] / 2**20)
        ours = next((name for name in self.names if name.startswith("ours")), None)
        if ours is not None:
            with self._turn(ours) as ask:
                self._figures.ceilings = ask(do="ceilings")

    def growth(self) -> str:
        """Step time against context for some batches, of each of our runners, as an SVG plot."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for name in (name for name in self.names if name.startswith("ours")):
            with self._turn(name) as ask:
                for context, batch, milliseconds in ask(do="growth")["rows"]:
                    lines.setdefault(f"{name.removeprefix('ours, ')}, {batch} streams", []).append(
                        (context, milliseconds)
                    )
        return plot("Time of a decode step", "context, tokens", "milliseconds", lines, log_x=True, log_y=True)

    def _each(self, measure: Callable[[str, Any, list[list[int]]], None], prompts: list[list[int]]) -> None:
        for name in self.names:
            try:
                with self._turn(name) as ask:
                    measure(name, ask, prompts)
            except PeerUnavailable as error:
                self._figures.notes.append(f"{name} stopped answering: {error.message}")
                self._engines.pop(name)

    def _decode(self, name: str, ask: Any, prompts: list[list[int]]) -> None:  # noqa: ANN401 (PeerProcess.ask)
        """Tokens per second after the first, all streams together: the run less one of the first tokens alone.

        One that is not timed goes before: in it an engine may put away what it kept of the figure before.
        """
        streams = len(prompts) // 3
        _seconds(ask, prompts[:streams], 1)
        first = _seconds(ask, prompts[streams : 2 * streams], 1)
        ask_spent = name.startswith("ours")
        if ask_spent:
            ask(do="spent")
        whole = _seconds(ask, prompts[2 * streams :], 1 + self._tokens)
        if ask_spent:
            spent = ask(do="spent")
            share = 100 * (1 - spent["computing_s"] / spent["stepping_s"])
            self._figures.add(f"bookkeeping, {streams} streams", name, share)
        self._figures.add(f"decode, {streams} streams", name, streams * self._tokens / max(whole - first, 1e-9))

    def _prefill(self, name: str, ask: Any, prompts: list[list[int]]) -> None:  # noqa: ANN401
        seconds = _seconds(ask, prompts, 1)
        length = len(prompts[0])
        self._figures.add(f"prefill, {length} tokens", name, length / seconds)
        if length == PREFILLS[-1]:
            self._figures.add("first token, cold", name, 1000 * seconds)

    def _warm(self, name: str, ask: Any, prompts: list[list[int]]) -> None:  # noqa: ANN401
        (prompt,) = prompts
        _seconds(ask, [prompt], 1)
        tail = [token + 1 for token in prompt[CACHED:]]
        self._figures.add("first token, warm", name, 1000 * _seconds(ask, [prompt[:CACHED] + tail], 1))

    def _mixed(self, name: str, ask: Any, turns: list[list[int]]) -> None:  # noqa: ANN401
        """Requests per second of chats behind one system prompt; `turns`: that prompt, then each chat's additions."""
        system, *additions = turns
        histories = [list(system) for _ in range(self._chats)]
        seconds = 0.0
        for turn in range(self._turns):
            for chat, history in enumerate(histories):
                history += additions[turn * self._chats + chat]
            seconds += _seconds(ask, histories, REPLY_TOKENS)
        self._figures.add("chats", name, self._chats * self._turns / seconds)

    def _conversations(self) -> list[list[int]]:
        """What the user says, and before it what the engine is taken to have said: the same for every engine."""
        additions = [self._prompt(TURN_TOKENS + REPLY_TOKENS) for _ in range(self._chats * self._turns)]
        return [self._prompt(SYSTEM_TOKENS), *additions]

    def _prompt(self, length: int) -> list[int]:
        return self._draw.choices(VOCABULARY, k=length)

    @contextmanager
    def _turn(self, name: str) -> Iterator[Callable[..., dict[str, Any]]]:
        with self._engines[name].awake():
            yield self._engines[name].ask


def _seconds(ask: Callable[..., dict[str, Any]], prompts: list[list[int]], max_tokens: int) -> float:
    answer = ask(do="run", prompts=prompts, max_tokens=max_tokens)
    if answer["tokens"] != len(prompts) * max_tokens:
        raise PeerUnavailable(f"{answer['tokens']} tokens came for {len(prompts)} prompts of {max_tokens}")
    return float(answer["seconds"])
