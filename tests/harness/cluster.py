"""A cluster of real processes on free ports: brokers and workers that a test may kill, stop and start again.

`Cluster` owns the processes and their logs: `with` ends them all, whatever a test did to them. A test that has
harmed it leaves that to `heal`, which the fixture calls before the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bus.endpoints import endpoints
from bus.errors import KVCacheError, NotFound
from bus.stats import WorkerView
from kvcache import Client
from kvcache.local import free_url, wait_for_port

ROOT = Path(__file__).parents[2]
READY_S = 90.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Node:
    """One process that can be started again. Its output is added to one log."""

    def __init__(self, name: str, module: str, flags: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = [sys.executable, "-m", module, *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, **env: str) -> None:
        """Start it; `env` is for this time only."""
        assert not self.is_running, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | ONE_THREAD | env
            )
        self._is_stopped = False

    def kill9(self) -> None:
        """End it as the OOM killer does, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self.wait()

    def term(self) -> None:
        """Ask it to drain."""
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Freeze it: its sockets stay open and nothing answers."""
        self._signal(signal.SIGSTOP)
        self._is_stopped = True

    def cont(self) -> None:
        """Let a frozen one run on."""
        if self._is_stopped and self.is_running:
            self._signal(signal.SIGCONT)
        self._is_stopped = False

    def wait(self, seconds: float = 30.0) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired if it does not end."""
        assert self._process is not None
        return self._process.wait(seconds)

    def close(self) -> None:
        """End it for good, politely first."""
        if not self.is_running:
            return
        self.cont()
        self.term()
        try:
            self.wait(15.0)
        except subprocess.TimeoutExpired:
            self.kill9()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Cluster:
    """Brokers and workers by name. `url` is the first broker's address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._marks: dict[str, int] = {}
        self.brokers: dict[str, Node] = {}
        self.workers: dict[str, Node] = {}
        self.urls: list[str] = []

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def broker(self) -> Node:
        return self.brokers["broker-1"]

    def add_broker(self, *flags: str) -> Node:
        """Start one more broker and wait until its ports are open."""
        name, url = f"broker-{len(self.brokers) + 1}", free_url()
        node = Node(name, "kvcache.broker", ["--bind", url, *flags], self._folder / f"{name}.log")
        self.brokers[name] = node
        self.urls.append(url)
        self.start_broker(name)
        return node

    def start_broker(self, name: str = "broker-1") -> None:
        self.brokers[name].start()
        wait_for_port(endpoints(self.urls[list(self.brokers).index(name)]).tokens)

    def add_worker(self, name: str, *flags: str, brokers: list[str] | None = None, **env: str) -> Node:
        """Start one more worker of these brokers (None: all of ours); does not wait for it."""
        told = [flag for url in brokers or self.urls for flag in ("--broker", url)]
        node = Node(name, "workers", ["--worker-id", name, *told, *flags], self._folder / f"{name}.log")
        self.workers[name] = node
        node.start(**env)
        return node

    def drop_worker(self, name: str) -> None:
        """End a worker and forget it."""
        self.workers.pop(name).close()

    def heal(self) -> None:
        """Start what is dead, let run on what is frozen, and wait until all of it serves."""
        for name, broker in self.brokers.items():
            broker.cont()
            if not broker.is_running:
                self.start_broker(name)
        for worker in self.workers.values():
            worker.cont()
            if not worker.is_running:
                worker.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until every broker has every worker ready, and none that is not ours."""
        for url in self.urls:
            with Client(url, timeout=10.0) as client:
                self._wait_for(url, lambda client=client: _ready(client) == set(self.workers))  # type: ignore[misc]

    def mark(self) -> None:
        """What the logs hold from here on is what `fresh_logs` shows."""
        for node in self._nodes():
            self._marks[node.name] = node.log.stat().st_size if node.log.exists() else 0

    def fresh_logs(self, limit: int = 6000) -> Iterator[tuple[str, str]]:
        """By the name of each process and its log: what it wrote since the mark, the last of it if that is much."""
        for node in self._nodes():
            text = node.log.read_bytes()[self._marks.get(node.name, 0) :].decode(errors="replace")
            if text:
                yield f"{node.name}, whole in {node.log}", text[-limit:]

    def close(self) -> None:
        """End everything, workers first."""
        for node in reversed(self._nodes()):
            node.close()

    def _nodes(self) -> list[Node]:
        return [*self.brokers.values(), *self.workers.values()]

    def _wait_for(self, url: str, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + READY_S
        while not condition():
            dead = [node for node in self._nodes() if not node.is_running]
            logs = "\n".join(f"--- {name}\n{text}" for name, text in self.fresh_logs())
            assert not dead, f"{', '.join(node.name for node in dead)} ended while starting\n{logs}"
            assert time.monotonic() < until, f"the workers of {url} are not ready after {READY_S:.0f} s\n{logs}"
            time.sleep(0.05)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """An empty cluster, with its logs under `folder`; ended with the block."""
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def _ready(client: Client) -> set[str]:
    """The workers that are ready at a broker that takes requests, which one that has just started does not."""
    try:
        views: tuple[WorkerView, ...] = client.workers()
        client.kv.length("nobody", 0)
    except NotFound:
        return {view.worker_id for view in views if view.status == "ready"}
    except KVCacheError:
        return set()
    raise AssertionError("a sequence that nobody put is there")
