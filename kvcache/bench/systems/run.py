"""`kvcache bench peers`: the whole system against what its users would run instead, all in one run.

Every system is real processes on this machine with the same weights. In each round each one takes its turn at each
workload, while all the others are stopped; the prompts of a turn were never sent before, so what is reused is what the
workload itself repeats. A system that fails is ended, left out of the rounds that follow, and named with the reason.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from bus.errors import KVCacheError
from kvcache.bench.engine import DType
from kvcache.bench.engine_goals import Figures
from kvcache.bench.peers.contract import measure_store
from kvcache.bench.peers.environments import PeerUnavailable, python_of
from kvcache.bench.peers.process import PeerProcess
from kvcache.bench.peers.processes import Processes
from kvcache.bench.peers.weights import gguf_folder
from kvcache.bench.report import Report, report
from kvcache.bench.systems import goals
from kvcache.bench.systems.asking import put
from kvcache.bench.systems.contestants import MODEL, ONE, OURS, PEERS, PLAIN, SCRIPTS, Door, Setup, System
from kvcache.bench.systems.goals import FIRST_P50, FIRST_P90, IN_PROCESS, RATE, SUCCESS
from kvcache.bench.systems.stores import OurStore, PlainStore
from kvcache.bench.systems.workloads import Workload, chats, documents, unshared
from kvcache.client import Client
from kvcache.models import DEFAULT_HOME, ModelRegistry

ROUNDS, QUICK_ROUNDS = 5, 3
WORKLOAD_S = 300.0
KIB, MIB = 1 << 10, 1 << 20
SIZES, QUICK_SIZES = (64 * KIB, MIB, 4 * MIB, 16 * MIB), (64 * KIB, MIB, 4 * MIB)
KV_REPEATS = 5
STORES = {"valkey": ("Valkey", "run_valkey.py"), "lmcache": ("LMCache server", "run_lmcache.py")}
FAILURES = (KVCacheError, RuntimeError, OSError, subprocess.SubprocessError, http.client.HTTPException)
"""Whatever a system may do wrong: it is left out, and the others go on. A TimeoutError is an OSError."""
NAMES = (*PEERS, *STORES)
"""The peers, as they are named on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """peers: of NAMES. install: make the environments that are missing. markdown, plot: files to write."""

    peers: tuple[str, ...] = NAMES
    install: bool = False
    dtype: DType = "bfloat16"
    threads: int = os.cpu_count() or 1
    home: Path = DEFAULT_HOME
    markdown: Path | None = None
    plot: Path | None = None


def run(*, quick: bool, progress: Callable[[str], None], options: Options | None = None) -> Report:
    """All workloads on all systems that run here. `quick`: fewer rounds and shorter workloads.

    Raises PeerUnavailable if not even our own system runs.
    """
    options = options or Options()
    options = replace(options, home=options.home.expanduser())
    bench = _Bench(options, progress, quick=quick)
    with _ended_by_signals(), ExitStack() as stack:
        bench.start(stack)
        num_rounds = QUICK_ROUNDS if quick else ROUNDS
        for number in range(1, num_rounds + 1):
            bench.round(number, num_rounds)
    if options.markdown:
        options.markdown.write_text(goals.markdown(bench.figures, bench.failures), "utf-8")
    if options.plot:
        options.plot.write_text(goals.points(bench.figures), "utf-8")
    notes = [f"{name} was left out: {reason}" for name, reason in bench.failures.items()]
    return report("peers", goals.rows(bench.figures), [*bench.notes, *notes])


class _Bench:
    """What runs, and what was measured of it."""

    def __init__(self, options: Options, progress: Callable[[str], None], *, quick: bool) -> None:
        self.figures = Figures()
        self.failures: dict[str, str] = {}
        self.notes: list[str] = []
        self._options, self._progress, self._quick = options, progress, quick
        self._systems: list[System] = []
        self._stores: dict[str, PeerProcess] = {}
        self._engine: PeerProcess | None = None

    def start(self, stack: ExitStack) -> None:
        """Start everything, one after the other; `stack` ends it. Raises PeerUnavailable without our own system."""
        folder = ModelRegistry(self._options.home).find(MODEL).path
        setup = Setup(
            folder=folder,
            gguf_folder=lambda: gguf_folder(folder, self._options.home, self._options.dtype, self._progress),
            threads=self._options.threads,
            dtype=self._options.dtype,
            python_of=self._python_of,
        )
        peers = [PEERS[name] for name in self._options.peers if name in PEERS]
        for name, start in (*OURS.items(), *peers):
            self._progress(f"starting {name}")
            processes = Processes()
            stack.callback(processes.close)
            try:
                system = start(setup, processes)
                with processes.awake():
                    asyncio.run(system.ready())
            except FAILURES as error:
                self.failures[name] = str(error)
                processes.close()
                continue
            self._systems.append(system)
        if ONE in self.failures:
            raise PeerUnavailable(f"our own system does not run: {self.failures[ONE]}")
        self._start_engine(stack, folder)
        for name in self._options.peers:
            if name in STORES:
                self._start_store(stack, name)

    def round(self, number: int, num_rounds: int) -> None:
        """Every workload on every system, then the stores. Who begins is another one in each round."""
        for workload_of in self._workloads():
            if not self._systems:
                return
            turns = self._systems[number % len(self._systems) :] + self._systems[: number % len(self._systems)]
            for system in turns:
                self._progress(f"round {number} of {num_rounds}: {workload_of('').name}, {system.doors[0].name}")
                self._on_system(system, number, workload_of)
                if workload_of == self._unshared and system.doors[0].name == ONE:
                    self._on_engine(number)  # at once, as the machine is not the same for minutes
        for system in list(self._systems):
            with system.processes.awake():
                held = system.processes.memory_bytes() / MIB
            for door in system.doors:
                self.figures.add("memory", door.name, held)
        for size in QUICK_SIZES if self._quick else SIZES:
            self._progress(f"round {number} of {num_rounds}: KV, {_text(size)}")
            self._on_stores(size)

    def _workloads(self) -> tuple[Callable[[str], Workload], ...]:
        """Each a function of its seed."""
        num_chats, num_turns, num_documents, num_questions = (4, 3, 2, 3) if self._quick else (8, 4, 3, 4)
        reply = 16 if self._quick else 32
        return (
            lambda seed: chats(
                seed, system_tokens=512, num_chats=num_chats, num_turns=num_turns, turn_tokens=64, reply=reply
            ),
            lambda seed: documents(
                seed, document_tokens=1024, num_documents=num_documents, num_questions=num_questions, reply=reply
            ),
            self._unshared,
        )

    def _unshared(self, seed: str) -> Workload:
        return unshared(seed, num_prompts=8, prompt_tokens=256, reply=32 if self._quick else 64)

    def _on_system(self, system: System, number: int, workload_of: Callable[[str], Workload]) -> None:
        try:
            with system.processes.awake():
                asyncio.run(system.ready())
                for door in system.doors:
                    asyncio.run(self._measure(door, workload_of(f"{number} {door.name}")))
        except FAILURES as error:
            self._leave_out(system, str(error) or f"a workload took more than {WORKLOAD_S:.0f} s")

    async def _measure(self, door: Door, workload: Workload) -> None:
        """Raises PeerUnavailable if nothing was answered, TimeoutError."""
        async with asyncio.timeout(WORKLOAD_S), door.opened() as ask:
            outcome = await put(workload, ask)
        if outcome.first_p50_ms is None or outcome.first_p90_ms is None:
            raise PeerUnavailable(f"no request of {workload.name} was answered: {outcome.failure}")
        if outcome.failure:
            self.notes.append(f"{door.name}, {workload.name}: {outcome.failure}")
        for part, value in (
            (FIRST_P50, outcome.first_p50_ms),
            (FIRST_P90, outcome.first_p90_ms),
            (RATE, outcome.tokens_per_s),
            (SUCCESS, outcome.success_percent),
        ):
            self.figures.add(f"{workload.name}, {part}", door.name, value)

    def _leave_out(self, system: System, reason: str) -> None:
        for door in system.doors:
            self.failures[door.name] = reason
        self._systems.remove(system)
        system.processes.close()

    def _start_engine(self, stack: ExitStack, folder: Path) -> None:
        """Our engine without anything around it, which tells what the rest costs."""
        self._progress(f"starting {IN_PROCESS}")
        try:
            command = [sys.executable, "-m", "workers.bench_peer", "auto"]
            process = PeerProcess(command, {"OMP_NUM_THREADS": str(self._options.threads)})
            stack.callback(process.close)
            with process.awake():
                process.ask(do="load", model=str(folder), threads=self._options.threads, dtype=self._options.dtype)
        except FAILURES as error:
            self.failures[IN_PROCESS] = str(error)
            return
        self._engine = process

    def _on_engine(self, number: int) -> None:
        if self._engine is None:
            return
        warm_up, workload = self._unshared(f"{number} warm-up"), self._unshared(f"{number} {IN_PROCESS}")
        try:
            with self._engine.awake():
                self._engine.ask(do="run", prompts=[warm_up.conversations[0][0]], max_tokens=4)
                prompts = [prompt for (prompt,) in workload.conversations]
                told = self._engine.ask(do="run", prompts=prompts, max_tokens=workload.max_tokens)
            self.figures.add(f"no sharing, {RATE}", IN_PROCESS, told["tokens"] / told["seconds"])
        except FAILURES as error:
            self.failures[IN_PROCESS], self._engine = str(error), None

    def _start_store(self, stack: ExitStack, name: str) -> None:
        title, script = STORES[name]
        self._progress(f"starting {title}")
        try:
            command = [str(self._python_of(name)), str(SCRIPTS / script)]
            process = PeerProcess(command, {"PYTHONPATH": str(SCRIPTS.parent)})
            stack.callback(process.close)
            with process.awake():
                self.notes.append(f"{title}: {process.ask(do='open')['store']}")
        except FAILURES as error:
            self.failures[title] = str(error)
            return
        self._stores[title] = process

    def _on_stores(self, size: int) -> None:
        for title, process in list(self._stores.items()):
            try:
                with process.awake():
                    self._add_kv(title, size, process.ask(do="measure", num_bytes=size, repeats=KV_REPEATS))
            except FAILURES as error:
                self.failures[title] = str(error)
                del self._stores[title]
        for system in list(self._systems):
            door = system.doors[0]
            if door.name not in {ONE, PLAIN}:
                continue
            try:
                with system.processes.awake():
                    asyncio.run(system.ready())
                    measured = _own_store(door.address, size) if door.name == ONE else _plain_store(door.address, size)
                self._add_kv("ours" if door.name == ONE else PLAIN, size, measured)
            except FAILURES as error:
                self._leave_out(system, f"KV of {_text(size)}: {error}")

    def _add_kv(self, name: str, size: int, seconds: dict[str, float]) -> None:
        for verb, value in seconds.items():
            self.figures.add(f"KV {verb} {_text(size)}", name, 1000 * value)

    def _python_of(self, name: str) -> Path:
        return python_of(name, self._options.home, install=self._options.install, progress=self._progress)


def _own_store(address: str, size: int) -> dict[str, float]:
    with Client(address, timeout=60.0) as client:
        return measure_store(OurStore(client), size, KV_REPEATS)


def _plain_store(address: str, size: int) -> dict[str, float]:
    store = PlainStore(address)
    try:
        return measure_store(store, size, KV_REPEATS)
    finally:
        store.close()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the run by an exception, so that everything that was started is ended too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that C code had set
                signal.signal(number, handler)


def _text(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
