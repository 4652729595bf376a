"""What every engine that is measured speaks: JSON lines on stdin and stdout, one answer to each line.

    {"do": "load", "model": FOLDER, "threads": N, "dtype": "bfloat16"}  ->  {"engine": ..., "dtype": ..., ...}
    {"do": "run", "prompts": [[token id, ...], ...], "max_tokens": N}   ->  {"seconds": ..., "tokens": ...}
    {"do": "memory"}                                                    ->  {"peak_bytes": ...}
    {"do": EXTRA}: what only some engines tell, a method named in their `extras`

A line that fails is answered {"error": ...}, and the engine goes on. This file and the engines' scripts run in
foreign environments: they import the standard library and their engine, and nothing of this project.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """One engine. Decoding is greedy and never ends before `max_tokens`."""

    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        """Load; returns facts for the report: engine and its version, the precision it really computes in."""

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        """Generate for all prompts at once, to the end; returns how many tokens came out."""


def serve(engine: Engine) -> None:
    """Answer lines until stdin ends. What the engine's libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:  # noqa: BLE001 (whatever a foreign engine raises is its answer)
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
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
