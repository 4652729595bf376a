"""What every engine that is measured speaks: JSON lines on stdin and stdout, one answer to each line.

    {"do": "load", "model": FOLDER, "threads": N, "dtype": "bfloat16"}  ->  {"engine": ..., "dtype": ..., ...}
    {"do": "run", "prompts": [[token id, ...], ...], "max_tokens": N}   ->  {"seconds": ..., "tokens": ...}
    {"do": "memory"}                                                    ->  {"peak_bytes": ...}
    {"do": EXTRA}: what only some engines tell, a method named in their `extras`

and a store of keys and values:

    {"do": "open"}                                          ->  {"store": ...}: what it is, and its version
    {"do": "measure", "num_bytes": N, "repeats": N}         ->  {"put": seconds, "get": seconds, "append": ...}

A line that fails is answered {"error": ...}, and whoever was asked goes on. This file and the peers' scripts run in
foreign environments: they import the standard library and their engine, and nothing of this project.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

TOKEN_BYTES = 3 * 64 * 4
"""A token's K, or V, in one layer of SmolLM2 in float32: 3 heads of 64."""
Bytes = bytes | memoryview
Measure = Callable[[Any, int, int], dict[str, float]]
"""(store, bytes, repeats) -> seconds by verb."""


class Engine(Protocol):
    """One engine. Decoding is greedy and never ends before `max_tokens`."""

    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        """Load; returns facts for the report: engine and its version, the precision it really computes in."""

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        """Generate for all prompts at once, to the end; returns how many tokens came out."""


class Store(Protocol):
    """K and V of one sequence, each so many bytes a token, at the other end of a connection."""

    def put(self, k: Bytes, v: Bytes) -> None:
        """Returns when the other end has them, in place of what it had."""

    def get(self) -> tuple[Bytes, Bytes]: ...


class AppendingStore(Store, Protocol):
    """One that can add to the end of what it has."""

    def append(self, k: Bytes, v: Bytes) -> None: ...


def serve(engine: Engine) -> None:
    """Answer lines until stdin ends. What the engine's libraries print goes to stderr."""
    _answer_lines(lambda request: _answer(engine, request))


def serve_store(open_store: Callable[[], tuple[Any, str]], measure: Measure | None = None) -> None:
    """The same for a store, which `open_store` opens and describes. measure: in place of `measure_store`, for a store
    that does not take bytes as they are."""
    opened: list[Any] = []
    measured = measure or measure_store

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "open":
                store, what = open_store()
                opened[:] = [store]
                return {"store": what}
            case "measure":
                return dict(measured(opened[0], request["num_bytes"], request["repeats"]))
            case other:
                raise ValueError(f"nobody knows how to do {other!r}")

    _answer_lines(answer)


def measure_store(
    store: Store | AppendingStore, num_bytes: int, repeats: int, *, appends: bool = True
) -> dict[str, float]:
    """Median seconds of a put and of a get of `num_bytes`, K and V together, and of appending a token to them.

    appends: measure that too, of a store that can. What comes back is compared, once.
    Raises RuntimeError if it is not what was put.
    """
    k, v = (bytes(os.urandom(num_bytes // 2 // TOKEN_BYTES * TOKEN_BYTES)) for _ in range(2))
    seconds = {"put": median_s(lambda: store.put(k, v), repeats), "get": median_s(store.get, repeats)}
    num_appended = 0
    if appends and hasattr(store, "append"):
        seconds["append"] = median_s(lambda: store.append(k[:TOKEN_BYTES], v[:TOKEN_BYTES]), repeats)
        num_appended = repeats
    for sent, came in zip((k, v), store.get(), strict=True):
        if bytes(came) != sent + num_appended * sent[:TOKEN_BYTES]:
            raise RuntimeError(f"{type(store).__name__} gave back other bytes")
    return seconds


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _answer_lines(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            told = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 (whatever a foreign engine raises is its answer)
            told = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "load":
            return dict(engine.load(request["model"], request["threads"], request["dtype"]))
        case "run":
            started = time.perf_counter()
            tokens = engine.run(request["prompts"], request["max_tokens"])
            return {"seconds": time.perf_counter() - started, "tokens": tokens}
        case "memory":
            return {"peak_bytes": _peak_bytes(os.getpid())}
        case other if other in getattr(engine, "extras", ()):
            return dict(getattr(engine, other)())
        case other:
            raise ValueError(f"nobody knows how to do {other!r}")


def _peak_bytes(pid: int) -> int:
    """The most memory that this process and its children have held at a time, added up."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(found[1]) * 1024 if found else 0) + sum(_peak_bytes(int(child)) for child in children)
